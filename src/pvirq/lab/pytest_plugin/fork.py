"""A pytest item in a copy of the process: set up, called and torn down there; its reports come back.

What the copy finds set up already, such as a fixture of the session, it uses and leaves to the original; what it sets
up itself, whatever its scope, it tears down. Output, warnings, a pending alarm (pytest-timeout) and coverage go on
there; hooks that report to somebody outside (a terminal, xdist) are called in the original only.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from _pytest.runner import runtestprotocol

from pvirq.fork import Fork, ForkError, fork
from pvirq.lab.pytest_plugin.guest import Booted
from pvirq.lab.pytest_plugin.run import RUN, Run

# A copy whose alarm went off while it was deaf is ended so many seconds later.
GRACE_S: Final = 15.0


@dataclass
class Outcome:
    """What comes back from a run in a copy. Without reports: it died, of what `death` says."""

    reports: list[dict[str, Any]] = field(default_factory=list)  # serialised
    warnings: list[tuple[Warning | str, type[Warning], str, int]] = field(default_factory=list)
    stop: bool | str = False  # session.shouldstop, .shouldfail
    fail: bool | str = False
    failure: tuple[str, ...] | None = None  # Run.failure
    skipped: bool = False
    choices: int = 0
    taken: dict[int, int] = field(default_factory=dict)
    fingerprint: str = ""
    death: str = ""
    seconds: float = 0.0


class ItemFork:
    """A run of an item in a copy of the process, under way."""

    def __init__(self, item: pytest.Item, run: Run, booted: Booted | None, *, alarm: float, silent: bool) -> None:
        """`alarm`: after so many seconds SIGALRM comes in the copy, 0 for never. A `silent` one's output is lost."""
        self._began = time.monotonic()
        self._end = self._began + alarm + GRACE_S if alarm else None
        self._fork: Fork[Outcome] | None = None

        def perform() -> Outcome:
            if alarm:
                signal.setitimer(signal.ITIMER_REAL, alarm)
            if booted is not None:
                assert booted.host is not None
                run.begin(booted.host, booted.guest, booted.tail)
            return _perform(item, run, silent=silent)

        try:
            if booted is None or booted.host is None:
                self._fork = fork(perform)
            else:
                self._fork = booted.host.fork(lambda _: perform(), seed=run.schedule)
            self._outcome = None
        except (ForkError, OSError) as error:
            self._outcome = self._died(f"it can't run in a copy of the process: {error}")

    def _died(self, how: str) -> Outcome:
        return Outcome(failure=("died", how), death=how, seconds=time.monotonic() - self._began)

    def poll(self) -> Outcome | None:
        """How it went, once it has ended. What stops all tests is raised: KeyboardInterrupt, pytest.exit's."""
        if self._outcome is None:
            assert self._fork is not None
            if self._fork.done():
                try:
                    self._outcome = self._fork.result()
                except ForkError as error:
                    self._outcome = self._died(_how(error))
            elif self._end is not None and time.monotonic() > self._end:
                self._fork.kill()
                self._outcome = self._died("its time was over, and it didn't answer")
        return self._outcome

    def kill(self) -> None:
        """End it at once; idempotent."""
        if self._fork is not None:
            self._fork.kill()

    def fileno(self) -> int:
        """For select: readable when something has come."""
        assert self._fork is not None
        return self._fork.fileno()

    @property
    def ended(self) -> bool:
        """`poll` has said how it went."""
        return self._outcome is not None

    @property
    def seconds_left(self) -> float | None:
        """Until it has to be looked at, whatever comes."""
        return None if self._end is None else max(self._end - time.monotonic(), 0)


def _how(error: ForkError) -> str:
    """A copy's death in words: "signal 11" says little."""
    text = re.sub(r"^process \d+", "it", str(error))
    for number in signal.Signals:
        text = text.replace(f"(signal {number.value})", f"(signal {number.value}, {number.name})")
    return text


def wait(forks: list[ItemFork]) -> None:
    """Until one of several that run has something to say."""
    lefts = [left for fork in forks if (left := fork.seconds_left) is not None]
    select.select(forks, [], [], min(lefts) + 0.01 if lefts else None)


def result(fork: ItemFork) -> Outcome:
    """How it went, when it has ended."""
    try:
        while (outcome := fork.poll()) is None:
            wait([fork])
        return outcome
    finally:
        fork.kill()


@contextlib.contextmanager
def alarm_paused() -> Iterator[float]:
    """The seconds until SIGALRM, which doesn't come meanwhile; 0 for never."""
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        yield left
    finally:
        if left:
            signal.setitimer(signal.ITIMER_REAL, left)


# -- in the copy -------------------------------------------------------------------------------------------------------


def _perform(item: pytest.Item, run: Run, *, silent: bool) -> Outcome:
    config, session = item.config, item.session
    if silent:
        _no_debugger(config)
    _own_output(config, silent=silent)
    _leave_fixtures(item)
    reports = _Reports()
    _report_only_to(reports, config)
    item.stash[RUN] = run
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        runtestprotocol(item, nextitem=None)
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, 0)
    _save_coverage()
    return Outcome(
        [config.hook.pytest_report_to_serializable(config=config, report=report) for report in reports.all],
        [_portable(warning) for warning in caught],
        session.shouldstop, session.shouldfail, run.failure, any(map(_is_skip, reports.all)),
        run.schedule.count, run.schedule.taken, run.fingerprint(), seconds=time.monotonic() - began,
    )  # fmt: skip


def _leave_fixtures(item: pytest.Item) -> None:
    """What is set up already is the original's to tear down."""
    for finalizers, _ in item.session._setupstate.stack.values():
        finalizers.clear()
    if isinstance(item, pytest.Function):
        for definitions in item._fixtureinfo.name2fixturedefs.values():
            for definition in definitions:
                if definition.cached_result is not None:
                    definition._finalizers.clear()  # it is asked to where a test has another parameter for it


def _is_skip(report: pytest.TestReport) -> bool:
    return report.skipped and not hasattr(report, "wasxfail")


class _Reports:
    """A plugin that keeps what is reported."""

    def __init__(self) -> None:
        self.all: list[pytest.TestReport] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.all.append(report)


def _report_only_to(reports: _Reports, config: pytest.Config) -> None:
    """Neither terminal nor xdist nor anybody's file is to be told from here."""
    hook: Any = config.hook.pytest_runtest_logreport
    for implementation in hook.get_hookimpls():
        hook._remove_plugin(implementation.plugin)
    config.pluginmanager.register(reports, "pvirq-reports")


def _no_debugger(config: pytest.Config) -> None:
    config.option.usepdb = config.option.trace = False
    for name in ("pdbinvoke", "pdbtrace"):
        if config.pluginmanager.has_plugin(name):
            config.pluginmanager.unregister(name=name)


def _own_output(config: pytest.Config, *, silent: bool) -> None:
    """What pytest captures goes into files of its own, for several copies may run at once."""
    capture: Any = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.read_global_capture()
        capture.stop_global_capturing()
    if silent:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.close(null)
    if capture is not None:
        capture.start_global_capturing()
        capture.suspend_global_capture()


def _portable(warning: warnings.WarningMessage) -> tuple[Warning | str, type[Warning], str, int]:
    import pickle

    try:
        pickle.loads(pickle.dumps((warning.message, warning.category)))
    except Exception:
        return f"{warning.category.__name__}: {warning.message}", UserWarning, warning.filename, warning.lineno
    return warning.message, warning.category, warning.filename, warning.lineno


def _save_coverage() -> None:
    """What was covered here: coverage.py writes it when a process ends, which a copy does without further ado."""
    coverage = sys.modules.get("coverage")
    if coverage is not None and (current := coverage.Coverage.current()) is not None:
        current.stop()
        current.save()


# -- in the original ---------------------------------------------------------------------------------------------------


def replay(
    item: pytest.Item, nextitem: pytest.Item | None, outcome: Outcome,
    change: Callable[[pytest.TestReport], None] = lambda report: None,
) -> None:  # fmt: skip
    """Tell everybody what a copy reported, after `change`; and tear down here what the next test doesn't need."""
    from pvirq.lab.pytest_plugin.report import death_report

    config = item.config
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for message, category, filename, line in outcome.warnings:
        warnings.showwarning(message, category, filename, line)
    reports = [config.hook.pytest_report_from_serializable(config=config, data=data) for data in outcome.reports] or [
        death_report(item, outcome.death, outcome.seconds)
    ]
    for report in reports:
        change(report)
        item.ihook.pytest_runtest_logreport(report=report)
    if outcome.stop:
        item.session.shouldstop = outcome.stop
    if outcome.fail:
        item.session.shouldfail = outcome.fail
    _tear_down(item, nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)


def _tear_down(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """As `runtestprotocol` does; reported only where it goes wrong."""
    session = item.session
    if session.shouldfail or session.shouldstop:
        nextitem = None
    call = pytest.CallInfo.from_call(
        lambda: session._setupstate.teardown_exact(nextitem), "teardown", (pytest.exit.Exception, KeyboardInterrupt)
    )
    if call.excinfo is not None:
        report = item.ihook.pytest_runtest_makereport(item=item, call=call)
        item.ihook.pytest_runtest_logreport(report=report)

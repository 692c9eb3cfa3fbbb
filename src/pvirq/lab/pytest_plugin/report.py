"""What a failing test's report says of the hosts: schedule, how to repeat it, interrupts, trace, consoles, crashes."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Final, cast

import pytest

from pvirq.lab.pytest_plugin.run import RUN, Run, interactive
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.guest import Guest
    from pvirq.host import Host
    from pvirq.modelled import ModelledGuest

TITLE: Final = "pvirq"
# What a guest is given to tell its interrupts after a failure: of its own time, and of everybody's.
ANSWER_S: Final = 5.0
PATIENCE_S: Final = 5.0
LINES_MAX: Final = 100  # of a section
CONSOLE_LINES: Final = 20

# Rows of /proc/interrupts: any; those of the architecture that have counted nothing.
_ROW: Final = re.compile(r" +CPU0| *(\d+|[A-Z]{3}):( +\d+)+")
_EMPTY_ROW: Final = re.compile(r" *[A-Z]{3}:( +0)+( +[A-Za-z].*)?\n", re.ASCII)
_TABLE: Final = re.compile(rb"^ +CPU0[^\n]*\n(?: *[\w-]+:[^\n]*\n)+", re.MULTILINE)


def explain(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Put all there is to say into the report of a failure, and note in the run what it was."""
    run = item.stash.get(RUN, None)
    if run is None:
        return
    if run.failure is None:
        run.failure = failure(call)
    if run.brief:
        return
    summary(item, run, report)
    if run.host is not None:
        sections = []
        if run.tail is not None:  # first: asking a guest for its interrupts is in its trace as well
            sections = [("the last events", _tried(lambda: "\n".join(run.tail.lines() if run.tail else [])))]
        sections += _sections(run.host, ask=not interactive(item.config))
        report.sections += [(f"{TITLE}: {title}", text.rstrip("\n") + "\n") for title, text in sections if text]


def failure(call: pytest.CallInfo[None]) -> tuple[str, ...]:
    """What tells one failure from another: the phase, the exception, and where it was raised."""
    if call.excinfo is None:
        return call.when, "no exception"  # a strict xfail that passes
    entry = call.excinfo.traceback[-1] if call.excinfo.traceback else None
    where = "" if entry is None else f"{entry.path}:{entry.lineno + 1}"
    return call.when, call.excinfo.typename, where


def summary(item: pytest.Item, run: Run, report: pytest.TestReport) -> None:
    """Put the schedule, and the command that repeats it, below the traceback: so JUnit's files have it as well."""
    lines = [_schedule(run), *run.story.splitlines()]
    if run.made:
        lines += ["choices that were not first-in-first-out:", *(f"  {choice}" for choice in run.made)]
    command = repeat_command(item, run.seed, run.choices)
    lines.append(f"to repeat it: {command}")
    text = "\n".join(lines)
    add = getattr(report.longrepr, "addsection", None)
    if add is not None:
        add(TITLE, text)
    elif isinstance(report.longrepr, str):
        report.longrepr = f"{report.longrepr}\n{text}"
    else:
        report.sections.append((TITLE, text + "\n"))
    report.user_properties.append(("pvirq_repeat", command))


def _schedule(run: Run) -> str:
    if run.choices is not None:
        what = f"{len(run.choices)} choices given"
    elif run.seed:
        what = f"seed {run.seed}"
    else:
        what = "seed 0, first-in-first-out"
    text = f"schedule: {what}"
    if run.schedule.count:
        text += f"; {run.schedule.count} choices until now, {len(run.schedule.taken)} of them not first-in-first-out"
    return text if run.host is None else f"{text}; virtual time {run.now() / NS_PER_S:.9f} s"


def repeat_command(item: pytest.Item, seed: int, choices: Mapping[int, int] | None) -> str:
    """The line that repeats a run, from the directory in which pytest was started."""
    path = os.path.relpath(item.path, item.config.invocation_params.dir)
    _, colons, name = item.nodeid.partition("::")
    words = ["pytest", f"{path}{colons}{name}", "--pvirq-seed", str(seed)]
    if choices is not None:
        words += ["--pvirq-choices", ",".join(f"{number}={choice}" for number, choice in sorted(choices.items()))]
    return shlex.join(words)


def death_report(item: pytest.Item, how: str, seconds: float) -> pytest.TestReport:
    """Of a test whose process ended before it could say anything."""
    report = pytest.TestReport(
        nodeid=item.nodeid, location=item.location, keywords=dict.fromkeys(item.keywords, 1), outcome="failed",
        longrepr=f"{item.nodeid}: {how}", when="call", duration=seconds,
    )  # fmt: skip
    run = item.stash.get(RUN, None)
    if run is not None:
        summary(item, run, report)
    return report


# -- the host ----------------------------------------------------------------------------------------------------------


def _sections(host: Host, *, ask: bool) -> Iterator[tuple[str, str]]:
    """Titles and texts: what can't be had is no reason to lose the rest. Real guests run for that if they are asked."""
    consoles = _consoles(host)  # before guests are asked there
    if host.has_dom0:
        yield "/proc/interrupts of domain 0", _counted(_tried(host.dom0.proc_interrupts))
    for modelled in list(host.modelled):
        yield f"/proc/interrupts of {modelled.name}", _counted(_tried(modelled.proc_interrupts))
    for guest in list(host.guests):
        text, why = _interrupts(host, guest, ask=ask)
        yield f"/proc/interrupts of {guest.name}{why and f', {why}: the last that are known'}", _counted(text)
        if why and ask:
            yield guest.name, _tried(lambda guest=guest, why=why: _crash(guest, why))  # type: ignore[misc]
    yield "event channels (debug key e)", _short(_tried(lambda: host.debug_key("e")))
    for name, words in consoles.items():
        yield f"the last of {name}'s console", words


def _consoles(host: Host) -> dict[str, str]:
    """What guests wrote last, without tables of interrupts: there are newer ones."""
    from pvirq.crash import last_words

    found = {}
    owners: list[Guest | ModelledGuest] = [*host.modelled, *host.guests]
    for owner in owners:
        words = last_words(cast("Guest", owner), LINES_MAX)  # which looks at the console alone
        words = [line for line in words if not _ROW.match(line)][-CONSOLE_LINES:]
        if words:
            found[owner.name] = "\n".join(words)
    return found


def _counted(table: str) -> str:
    return _EMPTY_ROW.sub("", table)


def _tried(text: Callable[[], str]) -> str:
    try:
        return text()
    except Exception as error:
        return f"can't be had: {type(error).__name__}: {error}"


def _short(text: str) -> str:
    lines = text.splitlines()
    return "\n".join(
        lines if len(lines) <= LINES_MAX else [*lines[:LINES_MAX], f"... and {len(lines) - LINES_MAX} more"]
    )


def _crash(guest: Guest, why: str) -> str:
    from pvirq.crash import report

    reason = guest.machine.crash
    return report(guest, f"{guest.name} crashed{f': {reason}' if reason else ''}" if guest.ended else why)


class _TooLong(Exception):
    """A guest takes too much of everybody's time."""


def _interrupts(host: Host, guest: Guest, *, ask: bool) -> tuple[str, str]:
    """A real guest's /proc/interrupts, and why they are old ones, if they are."""
    end = time.monotonic() + PATIENCE_S
    before = host.on_turn

    def turn() -> None:
        if time.monotonic() > end:
            raise _TooLong(f"no answer in {PATIENCE_S:g} s")
        if before is not None:
            before()

    if guest.ended:
        why = f"it has ended ({guest.shutdown_reason})"
    elif not ask:
        why = "it isn't to run before the debugger"
    else:
        host.on_turn = turn
        try:
            return guest.run("cat /proc/interrupts", ANSWER_S).text, ""
        except Exception as error:
            why = f"it doesn't answer ({error})"
        finally:
            host.on_turn = before
    tables = _TABLE.findall(bytes(guest.console.output).replace(b"\r", b""))
    return tables[-1].decode("utf-8", "replace") if tables else "none", why

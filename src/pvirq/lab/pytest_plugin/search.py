"""How a test that uses pvirq is run: once, here or in a copy; or under many schedules until one fails."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from importlib import import_module

import pytest
from _pytest.runner import runtestprotocol

from pvirq.lab.pytest_plugin.fork import ItemFork, Outcome, alarm_paused, replay, result, wait
from pvirq.lab.pytest_plugin.guest import Booted, guests_of
from pvirq.lab.pytest_plugin.plugin import GUEST
from pvirq.lab.pytest_plugin.report import summary
from pvirq.lab.pytest_plugin.run import RUN, Run, Settings, interactive, plain_run
from pvirq.lab.reduce import reduce


def perform(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """The protocol of an item that uses pvirq; None leaves it to pytest, with a run prepared."""
    settings = Settings.of(item.config)
    booted = guests_of(item.config).of(item) if GUEST in getattr(item, "fixturenames", ()) else None
    has_no_guest = booted is None and GUEST in getattr(item, "fixturenames", ())
    if settings.seeds and not has_no_guest:
        with alarm_paused() as alarm:
            return Search(item, nextitem, settings, booted, alarm).perform()
    item.stash[RUN] = run = plain_run(settings)
    if booted is None:
        return None
    if interactive(item.config):
        _use_up(item, booted, run)
        return None
    with alarm_paused() as alarm:
        replay(item, nextitem, result(ItemFork(item, run, booted, alarm=alarm, silent=False)))
    return True


def _use_up(item: pytest.Item, booted: Booted, run: Run) -> None:
    """Run a test on the guest itself. It is of no use to others then."""
    assert booted.host is not None
    guests_of(item.config).used_up = True
    booted.host.schedule = run.schedule
    run.begin(booted.host, booted.guest, booted.tail)
    run.story = f"{run.story}\nrun on the guest itself, for the debugger: the next test boots another one".lstrip("\n")


class Search:
    """One test's runs under many schedules."""

    def __init__(
        self, item: pytest.Item, nextitem: pytest.Item | None, settings: Settings, booted: Booted | None, alarm: float
    ) -> None:
        self.item, self.nextitem = item, nextitem
        self.settings = settings
        self.booted = booted
        self.alarm = alarm
        self.seeds = range(settings.first_seed, settings.first_seed + settings.seeds)

    def perform(self) -> bool | None:
        """Run it, and report the first seed that fails, or that none does."""
        import_module("pvirq.host")  # here, and not in each copy
        outcomes = self._until_one_fails()
        last = max(outcomes)
        if outcomes[last].failure is None:
            tried = len(outcomes)
            which = f"{self.seeds[0]} to {self.seeds[tried - 1]}" if tried > 1 else f"{self.seeds[0]}"

            def note(report: pytest.TestReport) -> None:
                report.user_properties.append(("pvirq_seeds", which))

            replay(self.item, self.nextitem, outcomes[self.seeds[0]], note)
            return True
        return self._report(last, outcomes[last])

    # -- runs ----------------------------------------------------------------------------------------------------------

    def _launch(self, run: Run, *, silent: bool = True) -> ItemFork:
        return ItemFork(self.item, run, self.booted, alarm=self.alarm, silent=silent)

    def _until_one_fails(self) -> dict[int, Outcome]:
        """All seeds' outcomes, or those up to the first that fails (or skips the test: so do all, then)."""
        todo, running, outcomes = deque(self.seeds), dict[int, ItemFork](), dict[int, Outcome]()
        try:
            while todo or running:
                while todo and len(running) < self.settings.jobs:
                    seed = todo.popleft()
                    running[seed] = self._launch(Run(seed, brief=True))
                if not any(fork.ended for fork in running.values()):
                    wait(list(running.values()))
                for seed, fork in list(running.items()):
                    outcome = fork.poll()
                    if outcome is None or seed not in running:
                        continue
                    del running[seed]
                    outcomes[seed] = outcome
                    if outcome.failure is not None or outcome.skipped:
                        todo.clear()
                        for later in [other for other in running if other > seed]:
                            running.pop(later).kill()
                        outcomes = {other: known for other, known in outcomes.items() if other <= seed}
        finally:
            for fork in running.values():
                fork.kill()
        return outcomes

    def _outcome(self, run: Run, *, silent: bool = True) -> Outcome:
        return result(self._launch(run, silent=silent))

    # -- a failure -----------------------------------------------------------------------------------------------------

    def _report(self, seed: int, outcome: Outcome) -> bool | None:
        story = f"seed {seed} is the first of {len(self.seeds)} that fails"
        if seed > self.seeds[0]:
            story += f": {self.seeds[0]} to {seed - 1} passed"
        again = self._outcome(Run(seed, brief=True))
        if not _same(again, outcome):
            return self._not_repeatable(seed, outcome, story, _difference(again, outcome))
        choices = None
        if outcome.taken:
            choices, told = self._reduce(seed, outcome)
            story += f"\n{told}"
        elif outcome.death:
            story += "\nits choices went with it: not reduced"
        run = Run(seed, choices, trace_lines=self.settings.trace_lines, story=story)
        self.item.stash[RUN] = run
        if interactive(self.item.config):
            if self.booted is not None:
                _use_up(self.item, self.booted, run)
            self.item.ihook.pytest_runtest_logstart(nodeid=self.item.nodeid, location=self.item.location)
            runtestprotocol(self.item, nextitem=self.nextitem)
            self.item.ihook.pytest_runtest_logfinish(nodeid=self.item.nodeid, location=self.item.location)
            return True
        final = self._outcome(run, silent=False)
        if final.failure != outcome.failure:
            return self._not_repeatable(seed, outcome, story, _difference(final, outcome))
        replay(self.item, self.nextitem, final)
        return True

    def _reduce(self, seed: int, outcome: Outcome) -> tuple[dict[int, int], str]:
        """The fewest choices that fail in the same way, and what to say of them."""
        tries = 0

        def fails(choices: Mapping[int, int]) -> bool:
            nonlocal tries
            tries += 1
            return self._outcome(Run(seed, choices, brief=True)).failure == outcome.failure

        limit = self.settings.reduce_tries
        choices = reduce(fails, outcome.taken, tries=limit)
        told = f"of its {len(outcome.taken)} choices others than the first {len(choices)} are needed"
        told += " (it fails first-in-first-out, too)" if not choices else ""
        return choices, f"{told}: {tries} tries{', no more were allowed' if tries >= limit else ''}"

    def _not_repeatable(self, seed: int, outcome: Outcome, story: str, difference: str) -> bool:
        """Say that the seed doesn't say it all: the test depends on something else, such as the real time."""
        run = Run(seed, story=f"{story}\nNOT REPEATABLE: {difference}")
        run.schedule.count, run.schedule.taken = outcome.choices, outcome.taken
        self.item.stash[RUN] = run

        def tell(report: pytest.TestReport) -> None:
            if report.failed and outcome.reports:
                summary(self.item, run, report)

        replay(self.item, self.nextitem, outcome, tell)
        return True


def _same(a: Outcome, b: Outcome) -> bool:
    return (a.failure, a.fingerprint) == (b.failure, b.fingerprint)


def _difference(again: Outcome, first: Outcome) -> str:
    """What a second run did otherwise."""
    if again.failure is None:
        return "another run under the same schedule passed"
    if again.failure != first.failure:
        return f"another run under the same schedule failed otherwise: {' '.join(again.failure)}"
    return f"another run under the same schedule took another course ({again.choices} choices, not {first.choices})"

"""What `pvirq campaign run` shows while it goes on: a bar in a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Final

from pvirq.cli.messages import Messages
from pvirq.lab.campaign.report import duration, totals

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pvirq.lab.campaign.perform import Outcome
    from pvirq.lab.campaign.plan import Run

LINE_S: Final = 10.0
"""How often there is a line where stderr is no terminal."""
MOST_LINES: Final = 20
"""Failures that are told as they come; the table at the end has all."""


class View:
    """Counts what comes, and shows it."""

    def __init__(self, total: int, before: int, say: Messages) -> None:
        """`total` runs are to be done; `before` are done since an earlier time."""
        self._total, self._before, self._say = total, before, say
        self.verdicts: Counter[str] = Counter()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._last = time.monotonic()
        self._first = 0.0
        self._told = 0

    def __enter__(self) -> View:
        if sys.stderr.isatty() and not self._say.quiet:
            self._progress = _bar()
            self._task = self._progress.add_task("starting", total=self._total, rate="", counts="")
            self._progress.start()
        elif self._before:
            self._say.note(f"{self._before} runs are done already, {self._total} are left")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    @property
    def done(self) -> int:
        """How many have come."""
        return self.verdicts.total()

    def add(self, run: Run, outcome: Outcome) -> None:
        """A run has ended."""
        self.verdicts[outcome.verdict] += 1
        now = time.monotonic()
        if outcome.verdict != "pass" and not self._say.quiet:
            self._failure(f"{run.name}: {outcome.verdict}: {outcome.message}")
        self._first = self._first or now  # workers start and boot before that: it says nothing of what is to come
        rate = (self.done - 1) / max(now - self._first, 1e-3)
        if self._progress is not None:
            assert self._task is not None
            counts = totals(self.verdicts) + (f" ({self._before} before)" if self._before else "")
            self._progress.update(self._task, advance=1, description="running", rate=f"{rate:.3g}/s", counts=counts)
        elif now - self._last >= LINE_S and self.done < self._total and not self._say.quiet:
            self._last = now
            left = f"; {rate:.3g}/s, {duration((self._total - self.done) / rate)} left" if rate else ""
            self._say.note(f"{self.done} of {self._total}: {totals(self.verdicts)}{left}")

    def _failure(self, text: str) -> None:
        self._told += 1
        if self._told > MOST_LINES:
            return
        if self._told == MOST_LINES:
            text += " (no more of these are shown here)"
        if self._progress is not None:
            self._progress.console.print(f"pvirq: {text}", markup=False, highlight=False, soft_wrap=True)
        else:
            self._say.note(text)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.fields[counts]}", markup=False),
        console=Console(file=sys.stderr), transient=True,
    )  # fmt: skip

"""The fewest choices that a failing run needs: delta debugging over what a schedule took.

A run's choices are numbers by number (`pvirq.schedule`), 0 where they are first-in-first-out. `reduce` tries runs with
fewer of them, and with smaller ones, as long as they fail (Zeller and Hildebrandt, "Simplifying and Isolating
Failure-Inducing Input", 2002: ddmin). Leaving a choice out can make all that come behind it be about something else;
nothing is assumed of that, as each candidate is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

TRIES: Final = 200

Choices = Mapping[int, int]


def reduce(
    fails: Callable[[Choices], bool],
    choices: Choices,
    *,
    tries: int = TRIES,
    go_on: Callable[[], bool] = lambda: True,
) -> dict[int, int]:
    """A part of `choices`, some perhaps smaller, with which a run still fails.

    `fails` says that of a run; that it holds for `choices` isn't tried again. At most so many `tries` are made, each
    while `go_on()`. With enough of them none of the result can be left out, or be smaller, by itself. The same answers
    of `fails` give the same result.
    """
    best = {number: choice for number, choice in sorted(choices.items()) if choice}
    search = _Search(fails, best, tries, go_on)
    try:
        if best and not search.better({}):
            search.ddmin()
            while search.smaller() or search.fewer():
                pass
    except _Enough:
        pass
    return search.best


class _Enough(Exception):
    """No more tries."""


class _Search:
    """The best choices until now, and what has been tried."""

    def __init__(
        self, fails: Callable[[Choices], bool], best: dict[int, int], tries: int, go_on: Callable[[], bool]
    ) -> None:
        self.best = best
        self._fails = fails
        self._tries = tries
        self._go_on = go_on
        self._passed: set[tuple[tuple[int, int], ...]] = set()

    def better(self, candidate: dict[int, int]) -> bool:
        """Does it fail as well? It is the best then. _Enough."""
        key = tuple(candidate.items())
        if key in self._passed:
            return False
        if self._tries <= 0 or not self._go_on():
            raise _Enough
        self._tries -= 1
        if not self._fails(candidate):
            self._passed.add(key)
            return False
        self.best = candidate
        return True

    def ddmin(self) -> None:
        """Leave out ever smaller pieces; at the end, one by one."""
        pieces = 2
        while len(self.best) > 1:
            pieces = min(pieces, len(self.best))
            parts = list(_split(list(self.best), pieces))
            if any(self.better(self._only(part)) for part in parts):
                pieces = 2
            elif pieces > 2 and any(self.better(self._without(part)) for part in parts):
                pieces = max(pieces - 1, 2)
            elif pieces == len(self.best):
                return
            else:
                pieces *= 2

    def fewer(self) -> bool:
        """Leave out one after the other until none can be: whether one could."""
        before = len(self.best)
        while any(self.better(self._without([number])) for number in list(self.best)):
            pass
        return len(self.best) < before

    def smaller(self) -> bool:
        """Make each as small as can be by itself: whether one became smaller."""
        before = self.best
        for number, choice in before.items():
            any(self.better(self.best | {number: value}) for value in range(1, choice))
        return self.best != before

    def _only(self, numbers: list[int]) -> dict[int, int]:
        return {number: self.best[number] for number in numbers}

    def _without(self, numbers: list[int]) -> dict[int, int]:
        return {number: choice for number, choice in self.best.items() if number not in numbers}


def _split(numbers: list[int], pieces: int) -> Iterator[list[int]]:
    """In so many parts, of nearly the same length."""
    for piece in range(pieces):
        start, end = (len(numbers) * at // pieces for at in (piece, piece + 1))
        yield numbers[start:end]

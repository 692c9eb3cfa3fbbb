"""What searches say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pvirq.check.steps import End
from pvirq.check.system import State, System


@dataclass(frozen=True)
class Failure:
    """A property that doesn't hold, and the moves that lead there: (process, which of its choices)."""

    message: str
    schedule: tuple[tuple[int, int], ...]


@dataclass
class Result:
    """What a search found. `complete`: all there is was searched, so that no failure means there is none."""

    failure: Failure | None = None
    complete: bool = False
    states: int = 0
    steps: int = 0  # moves taken
    ends: int = 0  # states in which nobody can go on
    deepest: int = 0  # moves of the longest way
    reduced: bool = True
    cyclic: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RandomResult:
    """What random runs found. `chance`: how likely each of them was, at least, to meet a bug of this depth."""

    failure: Failure | None
    seed: int | None  # of the run that failed
    runs: int
    steps: int  # moves taken
    longest: int  # moves of the longest run
    depth: int
    chance: float
    unfinished: int = 0  # runs cut off: they go on and on
    complete: bool = False  # never: there may be other schedules


@dataclass(frozen=True)
class Watch:
    """Who is told of a search, and when it stops."""

    max_states: int | None = None
    on_progress: Callable[[Result], None] | None = None
    on_end: Callable[[End], None] | None = None

    def end(self, system: System, state: State, result: Result) -> str | None:
        """A state in which nobody can go on: what is wrong with it."""
        result.ends += 1
        if self.on_end is not None:
            self.on_end(system.end(state))
        return system.verdict(state)

    def arrived(self, result: Result) -> bool:
        """A state was met; is that enough?"""
        if self.on_progress is not None and not result.states & 0x3FFF:
            self.on_progress(result)
        return self.max_states is not None and result.states >= self.max_states

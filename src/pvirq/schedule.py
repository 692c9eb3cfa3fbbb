"""Where a host is free to choose what comes next: whose turn it is, for how long, and when a modelled domain answers.

A host without a schedule takes what is first in line, and may be connected with the outside. With one, each choice is a
number: 0 is what is first in line, and all else is legal as well, for Xen promises no order. As time is counted (see
`pvirq.engine.open_engine`) and nothing comes from outside, the same choices are the same run, to the bit.

    Schedule(7)                  each choice drawn at random, always the same for the same seed
    Schedule.fifo()              always 0
    Schedule.script({12: 1})     the 13th choice is 1, all others are 0

`taken` are the choices of a run that weren't 0: `Schedule.script(schedule.taken)` is that run again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pvirq.xen.domain import Vcpu

# What a turn may last, in ns, and when a modelled domain that was woken has its turn: the first is what a host without
# a schedule does. The weights keep a run from being all switches.
SLICES: Final = (5_000_000, 1_000_000, 300_000, 100_000, 30_000)
SLICE_WEIGHTS: Final = (8, 4, 2, 1, 1)
DELAYS: Final = (0, 3_000, 20_000, 100_000, 500_000)
DELAY_WEIGHTS: Final = (24, 2, 2, 2, 2)

NEXT, SLICE, ANSWER, ORDER = "next", "slice", "answer", "order"


Listener = Callable[[str, int, int, int], object]
"""Is told of each choice: what it was about, the how manieth of all, of how many, and which was taken."""


class Schedule:
    """The choices of one run: drawn from a seed, or as a script has them."""

    def __init__(self, seed: int) -> None:
        self.seed: int | None = seed
        self.count = 0  # choices so far
        self.taken: dict[int, int] = {}
        self.listeners: list[Listener] = []
        # While they are called: for "next" and "order" the vCPUs that it is among, as they stand in line; for "slice"
        # and "answer" the one whose it is.
        self.vcpus: Sequence[Vcpu] = ()
        self._random: random.Random | None = random.Random(seed)
        self._script: Mapping[int, int] = {}

    @classmethod
    def fifo(cls) -> Schedule:
        """What is first in line comes first."""
        return cls.script({})

    @classmethod
    def script(cls, choices: Mapping[int, int]) -> Schedule:
        """By number of the choice, what it is; 0 where it isn't there, the last that there is where it is too much."""
        schedule = cls(0)
        schedule.seed = schedule._random = None
        schedule._script = dict(choices)
        return schedule

    def choose(self, what: str, n: int, weights: Sequence[int] | None = None, vcpus: Sequence[Vcpu] = ()) -> int:
        """One of 0 ... n - 1; `vcpus` are for who is told of it (see `vcpus`)."""
        number = self.count
        self.count += 1
        if self._random is None:
            took = min(self._script.get(number, 0), n - 1)
        elif weights is None:
            took = self._random.randrange(n)
        else:
            took = self._random.choices(range(n), weights)[0]
        if took:
            self.taken[number] = took
        self.vcpus = vcpus
        for listener in self.listeners:
            listener(what, number, n, took)
        return took

    def slice_ns(self, *vcpu: Vcpu) -> int:
        """How long the next turn, of `vcpu`, may last."""
        return SLICES[self.choose(SLICE, len(SLICES), SLICE_WEIGHTS, vcpu)]

    def answer_ns(self, *vcpu: Vcpu) -> int:
        """After which time a modelled domain whose `vcpu` was woken has its turn."""
        return DELAYS[self.choose(ANSWER, len(DELAYS), DELAY_WEIGHTS, vcpu)]

    def __repr__(self) -> str:
        return f"<schedule {f'seed {self.seed}' if self._random else f'script of {len(self._script)}'}>"

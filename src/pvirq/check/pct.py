"""Random schedules with priorities, and a known chance to find a bug (PCT).

Each thread has a random priority, and the highest that can go on does; at `depth` - 1 random steps whoever is to go on
falls below all others. Where it takes `depth` orders between steps to make something fail, one run of a model with n
threads and k steps finds it with a chance of 1/(n * k^(depth-1)) at least (Burckhardt, Kothari, Musuvathi and
Nagarakatte, "A randomized scheduler with probabilistic guarantees of finding bugs", 2010).

A store buffer counts as a thread. Choices are thrown as well: the bound is for models without them. Runs share nothing
but the places that they find, so what a seed does hangs on nothing else, and not on how many cores there are.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pvirq.check.cores import in_order
from pvirq.check.result import Failure
from pvirq.check.steps import Model
from pvirq.check.system import System, apply

_CHUNK = 250  # seeds that a worker is given at once
_TRIALS = 8  # runs that say how long runs are


@dataclass
class PctResult:
    """What random runs found."""

    depth: int
    processes: int  # n: threads and store buffers
    steps: int  # k: the most that a run had, or was expected to have
    runs: int = 0
    failures: dict[int, Failure] = field(default_factory=dict)  # by seed
    longest: int = 0  # steps of the longest run
    cut: int = 0  # runs that were longer than max_steps

    @property
    def bound(self) -> float:
        """The least chance of one run to find a bug of this depth."""
        chance: float = 1 / (self.processes * max(self.steps, 1) ** (self.depth - 1))
        return chance

    def missed(self) -> float:
        """The chance, at most, that a bug of this depth was missed by all runs."""
        chance: float = (1 - self.bound) ** self.runs
        return chance


def pct(
    model: Model,
    *,
    depth: int = 3,
    seeds: Iterable[int] = range(1000),
    steps: int | None = None,
    max_steps: int = 10_000,
    jobs: int = 1,
    first: bool = True,
    on_progress: Callable[[PctResult], None] | None = None,
) -> PctResult:
    """Run a model once for each seed, until one fails (all of them, with `first` false).

    `steps` is k, by default the most that a few runs took that aren't counted. A run is cut after `max_steps`. With
    several `jobs` the seeds are shared out to as many processes (forks, so a model need be nothing special), and the
    result is the same as with one: that of the lowest failing seed, and of those before it.
    """
    if depth < 1:
        raise ValueError(f"depth {depth} is less than 1")
    system = System(model)
    if steps is None:
        steps = max(_run(system, seed, 1, 1, max_steps)[1] for seed in range(_TRIALS))
    result = PctResult(depth, system.processes, steps)
    for seed, (failure, taken) in _runs(system, list(seeds), depth, steps, max_steps, jobs):
        result.runs += 1
        if on_progress is not None and not result.runs & 0xFF:
            on_progress(result)
        result.longest = max(result.longest, taken)
        result.cut += failure is None and taken >= max_steps
        if failure is not None:
            result.failures[seed] = failure
            if first:
                break
    result.steps = max(steps, min(result.longest, max_steps))
    return result


def _runs(
    system: System, seeds: list[int], depth: int, steps: int, max_steps: int, jobs: int
) -> Iterator[tuple[int, tuple[Failure | None, int]]]:
    if jobs == 1:
        for seed in seeds:
            yield seed, _run(system, seed, depth, steps, max_steps)
        return
    chunks = [seeds[at : at + _CHUNK] for at in range(0, len(seeds), _CHUNK)]

    def run(chunk: list[int]) -> list[tuple[Failure | None, int]]:
        return [_run(system, seed, depth, steps, max_steps) for seed in chunk]

    for chunk, found in zip(chunks, in_order(run, chunks, jobs), strict=True):
        yield from zip(chunk, found, strict=True)


def _run(system: System, seed: int, depth: int, steps: int, max_steps: int) -> tuple[Failure | None, int]:
    """One run: what failed, and how many steps it took."""
    rng = random.Random(f"{seed}/{depth}/{steps}")
    # The higher, the sooner; priorities below `depth` are those of points at which somebody falls.
    priorities = list(range(depth, depth + system.processes))
    rng.shuffle(priorities)
    falls = {rng.randrange(max(steps, 1)): depth - 1 - number for number in range(depth - 1)}
    state = system.initial
    schedule: list[tuple[int, int]] = []
    wrong = system.broken(state)
    while wrong is None:
        able = [process for process in range(system.processes) if system.edge(state, process).moves]
        if not able:
            wrong = system.verdict(state)
            break
        if len(schedule) >= max_steps:
            break
        process = max(able, key=priorities.__getitem__)
        fall = falls.get(len(schedule))
        if fall is not None:
            priorities[process] = fall
            process = max(able, key=priorities.__getitem__)
        moves = system.edge(state, process).moves
        choice = rng.randrange(len(moves)) if len(moves) > 1 else 0
        changes, mask, place = moves[choice]
        state = apply(state, changes)
        schedule.append((process, choice))
        if place is not None and place.broken is not None:
            wrong = system.says(place)
        elif mask & system.watched:
            wrong = system.unsound(state)
    return (None if wrong is None else Failure(wrong, tuple(schedule))), len(schedule)

"""Random schedules with a known chance: probabilistic concurrency testing.

Each process gets a random priority, and the one with the highest that can move does; at `depth` - 1 random moments the
one that is about to move falls behind all others. Of n processes that take k moves altogether, each such run meets any
given bug that takes `depth` orderings with a probability of at least 1 / (n * k ** (depth - 1)), however large the
model is (Burckhardt, Kothari, Musuvathi and Nagarakatte, "A randomized scheduler with probabilistic guarantees of
finding bugs", 2010).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from pvirq.check.parallel import in_order
from pvirq.check.result import Failure, RandomResult
from pvirq.check.steps import Model
from pvirq.check.system import Move, System

CALIBRATION = 20  # runs that tell how long one is
CHUNK = 500  # runs that a process does before it tells what it found
LONGEST = 100_000  # moves of a run: one that takes more goes round in circles


def pct(
    model: Callable[[], Model],
    *,
    depth: int = 3,
    runs: int = 10_000,
    seed: int = 0,
    jobs: int | None = 1,
    on_progress: Callable[[int], None] | None = None,
) -> RandomResult:
    """Runs `seed` to `seed + runs - 1`, until one fails: the first in that order, whatever `jobs` is."""
    system = System(model())
    # Not from `seed`: a run is the same whichever was the first.
    length = longest = max(_run(system, Random(f"length {number}"), 1, 1)[1] for number in range(CALIBRATION))
    done = steps = unfinished = 0
    work = partial(_chunk, system, depth, length, seed + runs)
    failure: Failure | None = None
    failed: int | None = None
    for found, number, taken, long, cut in in_order(work, range(seed, seed + runs, CHUNK), jobs):
        done += number
        steps += taken
        unfinished += cut
        longest = max(longest, long)
        if on_progress is not None:
            on_progress(done)
        if found is not None:
            failed, failure = found
            break
    chance = float(1 / (system.processes * max(longest, 1) ** (depth - 1)))
    return RandomResult(failure, failed, done, steps, longest, depth, chance, unfinished)


def _chunk(
    system: System, depth: int, k: int, end: int, first: int
) -> tuple[tuple[int, Failure] | None, int, int, int, int]:
    """Some runs: the first failure and its seed; runs, moves, moves of the longest, runs cut off."""
    steps = longest = cut = runs = 0
    for seed in range(first, min(first + CHUNK, end)):
        failure, taken = _run(system, Random(seed), depth, k)
        runs += 1
        steps += taken
        longest = max(longest, taken)
        cut += taken >= LONGEST
        if failure is not None:
            return (seed, failure), runs, steps, longest, cut
    return None, runs, steps, longest, cut


def _run(system: System, random: Random, depth: int, k: int) -> tuple[Failure | None, int]:
    """One run: what is wrong, if anything is, and how many moves it took."""
    priorities = list(range(depth, depth + system.processes))
    random.shuffle(priorities)
    moments = iter(sorted(random.sample(range(max(k, depth - 1)), depth - 1)))
    falls: Iterator[int] = iter(random.sample(range(1, depth), depth - 1))
    moment = next(moments, -1)
    state = system.initial
    schedule: list[tuple[int, int]] = []
    while len(schedule) < LONGEST:
        moves = system.moves(state)
        if not moves:
            wrong = system.verdict(state)
            return (Failure(wrong, tuple(schedule)) if wrong is not None else None), len(schedule)
        process = _highest(moves, priorities)
        if len(schedule) == moment:
            priorities[process] = next(falls)
            moment = next(moments, -1)
            process = _highest(moves, priorities)
        own = [move for move in moves if move[0] == process]
        choice = random.randrange(len(own)) if len(own) > 1 else 0
        state = own[choice][1]
        schedule.append((process, choice))
        wrong = system.broken(state)
        if wrong is not None:
            return Failure(wrong, tuple(schedule)), len(schedule)
    return None, len(schedule)


def _highest(moves: list[Move], priorities: list[int]) -> int:
    return max((move[0] for move in moves), key=priorities.__getitem__)

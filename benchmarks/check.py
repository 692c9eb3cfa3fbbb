"""The checker: steps a second, what reduction saves, and how long each known race takes.

    python -m benchmarks.check

Processor times of one core; the least of several rounds counts, since whatever else the machine does can only make one
slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Final

from pvirq.check import Model, Result, Thread, explore
from pvirq.check.race import races
from pvirq.check.search import count_moves

ROUNDS: Final = 3
PLAIN_STATES: Final = 1_000_000  # a plain search that would be longer isn't compared


def philosophers(count: int, meals: int) -> Model:
    """Who take the lower fork first, and note that they have eaten."""
    model = Model()
    forks = [model.lock(f"fork {number}") for number in range(count)]
    eaten = model.array("eaten", count)

    def thread(me: int) -> Thread:
        first, second = sorted((me, (me + 1) % count))
        for _ in range(meals):
            yield forks[first].acquire()
            yield forks[second].acquire()
            times = yield eaten[me].read()
            yield eaten[me].write(times + 1)
            yield forks[second].release()
            yield forks[first].release()

    for number in range(count):
        model.thread(f"philosopher {number}", thread, number)
    return model


def timed(make: Callable[[], Model], *, reduce: bool = True, rounds: int = ROUNDS) -> tuple[Result, float]:
    """A search, and the least time that it took."""
    best = float("inf")
    for _ in range(rounds):
        model = make()
        began = time.process_time()
        result = explore(model, reduce=reduce, max_states=None if reduce else PLAIN_STATES)
        best = min(best, time.process_time() - began)
    return result, best


def factors(make: Callable[[], Model], result: Result) -> tuple[float | None, float | None]:
    """How many times as many moves others take as the reduced search did: the plain one, which knows the states that it
    has met, and brute force, which doesn't. None where that is too many to count."""
    plain, _ = timed(make, reduce=False, rounds=1)
    moves = count_moves(make(), max_states=PLAIN_STATES) if plain.complete else None
    return plain.steps / result.steps if plain.complete else None, None if moves is None else moves / result.steps


def run() -> dict[str, float]:
    """All figures by name."""
    found: dict[str, float] = {}
    result, seconds = timed(lambda: philosophers(5, 2))
    found["check.philosophers.steps_per_s"] = result.steps / seconds
    plain, seconds = timed(lambda: philosophers(5, 2), reduce=False, rounds=1)
    found["check.philosophers.plain_steps_per_s"] = plain.steps / seconds
    found["check.philosophers.reduction"] = plain.steps / result.steps
    steps, total = 0, 0.0
    slowest = {True: 0.0, False: 0.0}
    reductions: list[float] = []
    brute: list[float] = []
    for name, race in races().items():
        for fault in (True, False):
            result, seconds = timed(partial(race.model, fault), rounds=1)
            if fault == (result.failure is None):
                raise RuntimeError(f"{name}, fault {fault}: {result.failure}")
            slowest[fault] = max(slowest[fault], seconds)
            found[f"check.race.{name}.{'found' if fault else 'clean'}.s"] = seconds
        steps, total = steps + result.steps, total + seconds
        found[f"check.race.{name}.states"] = result.states
        if name.startswith("fifo-") and result.reduced:
            plain_factor, brute_factor = factors(partial(race.model, False), result)
            if plain_factor is not None:
                reductions.append(plain_factor)
                found[f"check.race.{name}.reduction"] = plain_factor
            if brute_factor is not None:
                brute.append(brute_factor)
                found[f"check.race.{name}.brute_force"] = brute_factor
    if total:
        found["check.races.steps_per_s"] = steps / total
        found["check.races.slowest_found.s"] = slowest[True]
        found["check.races.slowest_clean.s"] = slowest[False]
    if brute:
        found["check.fifo.median_reduction"] = median(reductions)
        found["check.fifo.median_brute_force"] = median(brute)
    return found


if __name__ == "__main__":
    for figure, value in run().items():
        print(f"{figure:60} {value:14,.3f}" if value < 1e9 else f"{figure:60} {value:14.2e}")

"""The checker: steps a second, what reduction saves, and how long each known race takes.

    python -m benchmarks.check

Processor times of one core; the least of several rounds counts, since whatever else the machine does can only make one
slower.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from pvirq.check import Model, Result, Thread, count_schedules, explore
from pvirq.check.race import races

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
    """How many times fewer steps the reduced search took: than the plain one, which hashes states, too; and than brute
    force, which runs each schedule from its beginning (at most as many steps as the longest way has)."""
    plain, _ = timed(make, reduce=False, rounds=1)
    if not plain.complete:
        return None, None
    schedules = count_schedules(make(), max_states=PLAIN_STATES)
    return plain.steps / result.steps, None if schedules is None else schedules / max(result.ends, 1)


def run(only_totals: bool = False) -> dict[str, float]:
    """All figures by name."""
    found: dict[str, float] = {}
    result, seconds = timed(lambda: philosophers(5, 2))
    found["check.philosophers.steps_per_s"] = result.steps / seconds
    plain, seconds = timed(lambda: philosophers(5, 2), reduce=False, rounds=1)
    found["check.philosophers.plain_steps_per_s"] = plain.steps / seconds
    found["check.philosophers.reduction"] = plain.steps / result.steps
    steps = total = 0.0
    slowest = {True: 0.0, False: 0.0}
    least_plain, least_brute = float("inf"), float("inf")
    for name, race in races().items():
        for fault in (True, False):
            result, seconds = timed(lambda race=race, fault=fault: race.model(fault), rounds=1)  # type: ignore[misc]
            assert fault == (result.failure is not None), f"{name}, fault {fault}: {result.failure}"
            slowest[fault] = max(slowest[fault], seconds)
            if not only_totals:
                found[f"check.race.{name}.{'found' if fault else 'clean'}.s"] = seconds
        steps, total = steps + result.steps, total + seconds
        if name.startswith("fifo-") and not result.cyclic:
            plain_factor, brute_factor = factors(lambda race=race: race.model(False), result)  # type: ignore[misc]
            if plain_factor is not None:
                least_plain = min(least_plain, plain_factor)
            if brute_factor is not None:
                least_brute = min(least_brute, brute_factor)
            if not only_totals:
                found |= {
                    f"check.race.{name}.{kind}": factor
                    for kind, factor in (("reduction", plain_factor), ("schedules_per_end", brute_factor))
                    if factor is not None
                }
    if total:
        found["check.races.steps_per_s"] = steps / total
        found["check.races.slowest_found.s"] = slowest[True]
        found["check.races.slowest_clean.s"] = slowest[False]
    if least_plain < float("inf"):
        found["check.fifo.least_reduction"] = least_plain
    if least_brute < float("inf"):
        found["check.fifo.least_schedules_per_end"] = least_brute
    return found


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:60} {value:14,.3f}" if value < 1e9 else f"{name:60} {value:14.2e}")

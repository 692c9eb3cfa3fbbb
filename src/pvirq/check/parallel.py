"""Work for several processes, its results in the order of the tasks: what is printed doesn't hang on who was faster."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from pvirq.fork import Fork, fork

Task = TypeVar("Task")
Done = TypeVar("Done")

TICK_S = 0.2


def cores() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Task], Done],
    tasks: Iterable[Task],
    jobs: int | None = None,
    on_tick: Callable[[], None] | None = None,
) -> Iterator[Done]:
    """`work(task)` of each task, in copies of this process, `jobs` at once (default: one a CPU; 1: in this process).

    What a task raises is raised when its turn comes. Who stops asking ends the rest. `on_tick` is called now and then
    while there is nothing to give.
    """
    jobs = jobs or cores()
    if jobs == 1:
        yield from map(work, tasks)
        return
    left = iter(tasks)
    running: deque[Fork[Done]] = deque()
    more = True
    try:
        while running or more:
            while more and sum(not each.done() for each in running) < jobs:
                try:
                    running.append(fork(partial(work, next(left))))
                except StopIteration:
                    more = False
            if running and running[0].done():
                yield running.popleft().result()
            elif running:
                select.select([each for each in running if not each.done()], [], [], TICK_S)
                if on_tick is not None:
                    on_tick()
    finally:
        for each in running:
            each.kill()

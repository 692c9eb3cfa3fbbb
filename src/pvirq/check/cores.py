"""Work for several cores, in copies of this process: what is printed doesn't hang on who was faster."""

from __future__ import annotations

import os
import select
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final, TypeVar

from pvirq.check.result import Result
from pvirq.check.search import explore
from pvirq.check.steps import Model
from pvirq.fork import Fork, fork

Task = TypeVar("Task")
Done = TypeVar("Done")

TICK_S: Final = 0.2


def cores() -> int:
    """How many CPUs this process may use."""
    return len(os.sched_getaffinity(0))


def explore_all(
    models: Mapping[str, Callable[[], Model]], *, jobs: int = 1, reduce: bool = True, max_states: int | None = None
) -> Iterator[tuple[str, Result]]:
    """Search several models, each on one core: the results in the order of `models`, each as soon as it and those
    before it are there. With one job it is this process that searches."""

    def search(name: str) -> Result:
        return explore(models[name](), reduce=reduce, max_states=max_states)

    yield from zip(models, in_order(search, models, jobs), strict=True)


def in_order(
    work: Callable[[Task], Done], tasks: Iterable[Task], jobs: int, on_tick: Callable[[], None] = lambda: None
) -> Iterator[Done]:
    """`work(task)` of each task, `jobs` at once; 1: in this process. Results come back pickled.

    What a task raises is raised when its turn comes. Who stops asking ends the rest. `on_tick` is called now and then
    while there is nothing to give.
    """
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
                on_tick()
    finally:
        for each in running:
            each.kill()

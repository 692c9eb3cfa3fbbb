"""Searches on several cores: workers that are forks of this process."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from pvirq.check.result import Result
from pvirq.check.search import explore
from pvirq.check.steps import Model

_worker: dict[str, Any] = {}  # of a worker: what it was forked with


def explore_all(
    models: Mapping[str, Callable[[], Model]], *, jobs: int = 1, reduce: bool = True, max_states: int | None = None
) -> Iterator[tuple[str, Result]]:
    """Search several models, each on one core: the results in the order of `models`, each as soon as it and those
    before it are there. With one job it is this process that searches."""
    if jobs == 1:
        for name, make in models.items():
            yield name, explore(make(), reduce=reduce, max_states=max_states)
        return
    with forked(jobs, (dict(models), reduce, max_states)) as pool:
        yield from zip(models, pool.map(_explore, models), strict=True)


def _explore(name: str) -> Result:
    models, reduce, max_states = inherited()
    return explore(models[name](), reduce=reduce, max_states=max_states)


@contextmanager
def forked(jobs: int, inherit: Any) -> Iterator[ProcessPoolExecutor]:
    """Workers that have all that this process has, so that models need be nothing special. What goes to them later and
    comes back is pickled. Where something is raised, as by Ctrl-C, they are ended at once."""
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), _begin, (inherit,))
    try:
        yield pool
    except BaseException:
        workers = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown(cancel_futures=True)


def _begin(inherit: Any) -> None:
    _worker["inherited"] = inherit
    # Ctrl-C is the parent's to see; it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def inherited() -> Any:
    """What this worker was forked with."""
    return _worker["inherited"]

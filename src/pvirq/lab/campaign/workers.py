"""Runs on workers: processes of this machine or of a Dask cluster, else one after the other right here.

Dask schedules them. Each worker is given a stretch of the campaign, so that it mostly goes on with the kernel that it
has booted; whoever has nothing left to do takes from the others (Dask's work stealing).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Final

from pvirq.lab.campaign import pool
from pvirq.lab.campaign.cluster import Cluster, silence
from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Run
from pvirq.lab.campaign.spec import CampaignError

if TYPE_CHECKING:
    from distributed import Client

# How many runs the scheduler knows of at once, for it keeps some KiB about each.
AT_ONCE: Final = 5000
# A run whose worker was lost so often, it may be the run: it isn't tried again.
LOST_WORKERS: Final = 2
LOST: Final = Outcome("error", f"its worker was lost, {LOST_WORKERS + 1} times")
CONNECT_S: Final = 30.0
CHECK_S: Final = 2.0  # how often is looked whether the workers are still there
CLOSE_S: Final = 0.5
LOOK_S: Final = 0.02
SETTINGS: Final = {
    "distributed.scheduler.allowed-failures": LOST_WORKERS,
    "distributed.comm.timeouts.connect": f"{CONNECT_S} s",
    "distributed.admin.tick.limit": "1 h",  # a worker whose runs keep the cores busy is not to complain
}

Look = Callable[[float], None]
"""Called while there is nothing to do but wait, with the seconds to sleep at most; what it raises ends the campaign."""


class NoDask(CampaignError):
    """dask.distributed isn't installed."""


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))


def here(runs: Sequence[Run], look: Look) -> Iterator[tuple[Run, Outcome]]:
    """One after the other, without Dask."""
    mine = pool.Pool()
    executor = ThreadPoolExecutor(1)
    try:
        for run in runs:
            future = executor.submit(mine.run, "", run)
            while not wait([future], LOOK_S).done:
                look(0)
            look(0)
            yield run, future.result()
    finally:
        mine.kill()
        executor.shutdown()


def on_workers(
    runs: Sequence[Run], look: Look, *, workers: int = 0, scheduler: str = ""
) -> Iterator[tuple[Run, Outcome]]:
    """Each run with its outcome, as they end: on `workers` processes here (0: one for each core), or on a cluster.

    Closing the iterator lets go of what still runs. CampaignError where there is no cluster; NoDask.
    """
    with _client(workers or cores(), scheduler, look) as client:
        futures: dict[Any, Run] = {}
        try:
            yield from _run_all(client, runs, look, futures)
        finally:
            if scheduler:  # others' workers live on: what they have of ours must not
                with contextlib.suppress(Exception):
                    client.cancel(list(futures), force=True)
                    client.run(pool.close_pool)


@contextlib.contextmanager
def _client(workers: int, scheduler: str, look: Look) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        cluster = None
        try:
            if not scheduler and importlib.util.find_spec("distributed"):
                cluster = stack.enter_context(Cluster(workers))  # while it starts we import
            import dask
            from distributed import Client
        except ImportError as error:
            raise NoDask(
                f"several workers need Dask (pip install 'pvirq[campaign]'; --workers 0 doesn't): {error}"
            ) from None
        silence()
        stack.enter_context(dask.config.set(SETTINGS))
        address = cluster.address(look, LOOK_S) if cluster else scheduler
        try:
            client = Client(address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise CampaignError(f"--scheduler {address}: {' '.join(str(error).split())}") from None
        try:
            yield client
        except BaseException:
            if cluster:
                cluster.kill()
            raise
        finally:
            client.close(timeout=CLOSE_S)


def _run_all(client: Client, runs: Sequence[Run], look: Look, futures: dict[Any, Run]) -> Iterator[tuple[Run, Outcome]]:
    """`futures` has what isn't done yet."""
    token = uuid.uuid4().hex
    for start in range(0, len(runs), AT_ONCE):
        left = dict.fromkeys(runs[start : start + AT_ONCE])
        in_vain = 0
        while left:
            addresses = _wait_for_workers(client, look)
            before = len(left)
            _submit(client, list(left), addresses, token, futures)
            for run, outcome in _collect(client, addresses, look, futures):
                del left[run]
                yield run, outcome
            # All of those workers are gone. Dask would hold what was meant for them for ever.
            client.cancel(list(futures), force=True)
            futures.clear()
            in_vain = 0 if len(left) < before else in_vain + 1
            if in_vain > LOST_WORKERS:
                run = next(iter(left))  # of those that were under way
                del left[run]
                yield run, LOST
                in_vain = 0


def _wait_for_workers(client: Client, look: Look) -> list[str]:
    while not (addresses := _addresses(client)):
        look(LOOK_S)
    return addresses


def _addresses(client: Client) -> list[str]:
    return sorted(client.nthreads())


def _submit(client: Client, runs: Sequence[Run], addresses: Sequence[str], token: str, futures: dict[Any, Run]) -> None:
    """A stretch of the runs for each worker. They aren't held to it: it may go, and others may be idle."""
    number = uuid.uuid4().hex
    for i, address in enumerate(addresses):
        stretch = runs[len(runs) * i // len(addresses) : len(runs) * (i + 1) // len(addresses)]
        submitted = client.map(
            pool.carry_out, [token] * len(stretch), stretch, key=[(run.cell.name, number, run.seed) for run in stretch],
            workers=[address], allow_other_workers=True, pure=False, retries=0,
        )  # fmt: skip
        futures.update(zip(submitted, stretch, strict=True))


def _collect(
    client: Client, addresses: Sequence[str], look: Look, futures: dict[Any, Run]
) -> Iterator[tuple[Run, Outcome]]:
    """Results until there are no more to come, or all of these workers are gone and others there."""
    from distributed import as_completed

    waiting = as_completed(list(futures), loop=client.loop, with_results=True, raise_errors=False)
    next_check = time.monotonic() + CHECK_S
    while futures:
        ended = waiting.next_batch(block=False)
        for future, outcome in ended:
            yield futures.pop(future), _outcome(future, outcome)
        look(0 if ended else LOOK_S)
        if time.monotonic() >= next_check:
            next_check = time.monotonic() + CHECK_S
            there = _addresses(client)
            if there and not set(there) & set(addresses):
                return


def _outcome(future: Any, result: object) -> Outcome:
    if isinstance(result, Outcome):
        return result
    error = result[1] if isinstance(result, tuple) and len(result) > 1 else result
    kind = type(error).__name__
    if kind == "KilledWorker":
        return LOST
    return Outcome("error", f"{kind}: {' '.join(str(error).split())}" if error else f"Dask says {future.status}")

"""A Dask cluster of this machine's own, in a session of its own, so that no Ctrl-C of a terminal's gets to it.

Whoever starts it (`Cluster`) holds its standard input: when that ends, so does the cluster, whatever has happened.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Final

from pvirq.lab.campaign.spec import CampaignError

START: Final = "import sys; from pvirq.lab.campaign.cluster import main; main(sys.argv[1:])"
CLOSE_S: Final = 5.0


class Cluster:
    """The process of a scheduler and its workers, each a process with one thread."""

    def __init__(self, workers: int) -> None:
        """It starts; `address` waits for it."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # until the end
        # -P: a file in the current directory that is called as a module of the standard library isn't one.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(workers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._said, start_new_session=True,
        )  # fmt: skip

    def address(self, look: Callable[[float], None], every_s: float) -> str:
        """Of the scheduler, once there is one; `look` is called meanwhile. CampaignError where it doesn't start."""
        assert self._process.stdout is not None
        while not select.select([self._process.stdout], [], [], 0)[0]:
            look(every_s)
        address = self._process.stdout.readline().decode().strip()
        if not address:
            self._said.seek(0)
            lines = self._said.read().decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise CampaignError(f"the workers don't start: {lines[-1]}")
        return address

    def kill(self) -> None:
        """End it at once; idempotent."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it, and all of its workers; idempotent."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_S)
        self.kill()
        self._said.close()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if value is not None:
            self.kill()  # nobody is to wait for what still runs
        self.close()


def silence() -> None:
    """Dask's own words are no use to who runs a campaign: what went wrong is in the results."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def main(arguments: list[str]) -> None:
    """The process: says the scheduler's address, and waits for the end of its input."""
    import dask
    from distributed import LocalCluster

    from pvirq.lab.campaign.workers import SETTINGS

    silence()
    with (
        dask.config.set(SETTINGS),
        LocalCluster(
            n_workers=int(arguments[0]), threads_per_worker=1, processes=True, host="127.0.0.1",
            dashboard_address=None, memory_limit=0, silence_logs=logging.CRITICAL,
        ) as cluster,
    ):  # fmt: skip
        print(cluster.scheduler_address, flush=True)
        sys.stdin.read()

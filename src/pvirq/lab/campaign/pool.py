"""The runners of a worker process: started when first needed, kept for the next run that begins alike."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Final

from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Run, Start
from pvirq.lab.campaign.runner import Booted
from pvirq.xen.timer import NS_PER_S

# Booted guests that wait for their next run. Each keeps its guest's memory.
MOST_IDLE: Final = 2
GRACE_S: Final = 30.0  # beyond a run's limit, which the runner itself keeps
TRIES: Final = 2
# Not -m: what it sends has to be of the module's classes, not of __main__'s.
START: Final = "import sys; from pvirq.lab.campaign.runner import main; main(sys.argv[1:])"


class RunnerGone(Exception):
    """A runner ended though nobody told it to."""


class RunnerProcess:
    """A runner, from its worker's side. RunnerGone."""

    def __init__(self, start: Start) -> None:
        ours, theirs = socket.socketpair()
        # -P: a file beside the campaign's that is called as a module of the standard library isn't one.
        command = [sys.executable, "-P", "-c", START, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                start_new_session=True, cwd=start.directory,
            )  # fmt: skip
        self._connection = Connection(ours.detach())
        self.start = start

    def boot(self) -> Booted:
        """Wait until it is ready; once, before any run."""
        try:
            self._connection.send(self.start)
        except OSError as error:
            raise RunnerGone(f"a runner of {self.start.name} doesn't start") from error
        limit_s = self.start.limit_ns / NS_PER_S
        booted = self._answer(limit_s)
        return booted if isinstance(booted, Booted) else _too_long(limit_s)

    def run(self, run: Run) -> Outcome:
        """Carry a run out."""
        try:
            self._connection.send(run)
        except OSError as error:
            raise RunnerGone("a runner ended between two runs") from error
        outcome = self._answer(run.cell.limit_ns / NS_PER_S + GRACE_S)
        if not isinstance(outcome, Outcome):
            raise RunnerGone("a runner didn't come back from a run")
        return outcome

    def _answer(self, limit_s: float) -> object:
        """None where there is none in time."""
        try:
            return self._connection.recv() if self._connection.poll(limit_s) else None
        except (EOFError, OSError) as error:
            status = self._process.wait()
            raise RunnerGone(f"a runner of {self.start.name} ended by itself ({status})") from error

    def kill(self) -> None:
        """End it, and a run that is under way; who waits for it has a RunnerGone."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # of its own session: itself, and the fork that a run is
            self._process.wait()

    def close(self) -> None:
        """The same, by whom it belongs to: nobody waits for it."""
        self.kill()
        self._connection.close()


def _too_long(limit_s: float) -> Booted:
    return Booted(limit_s, Outcome("hung", f"its boot took more than {limit_s:g} s in reality"))


class Pool:
    """The runners of this process. Used by several threads at once, each of which takes one for a run."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[RunnerProcess] = []  # the one that was used last is the last
        self._busy: list[RunnerProcess] = []
        self._most_busy = 0
        self._failed: dict[tuple[str, str], Outcome] = {}
        self._killed = False

    def run(self, campaign: str, run: Run) -> Outcome:
        """Carry a run out with a runner that is there, or a new one; never raises for what happens to it.

        A boot that fails is tried once in a `campaign` (any text that tells this one from others): it would fail again.
        """
        key, problem = (campaign, run.cell.start.key), ""
        for _ in range(TRIES):
            if (failure := self._failed.get(key)) is not None:
                return failure
            if self._killed:
                break
            try:
                runner, is_new = self._take(run.cell.start)
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}"
                continue
            keep = False
            try:
                booted = runner.boot() if is_new else Booted(0)
                if booted.failure is not None:
                    self._failed[key] = booted.failure
                    return replace(booted.failure, boot_s=booted.seconds)
                outcome = runner.run(run)
                keep = True
            except RunnerGone as error:
                problem = str(error)
                continue
            finally:
                self._give_back(runner, keep)
            outcome.boot_s = booted.seconds
            return outcome
        return Outcome("error", f"{problem}, {TRIES} times")

    def _take(self, start: Start) -> tuple[RunnerProcess, bool]:
        """A runner of that start for the caller alone, and whether it is new."""
        with self._lock:
            found = next((runner for runner in reversed(self._idle) if runner.start.key == start.key), None)
            if found is not None:
                self._idle.remove(found)
            runner = found or RunnerProcess(start)
            self._busy.append(runner)
            self._most_busy = max(self._most_busy, len(self._busy))
        return runner, found is None

    def _give_back(self, runner: RunnerProcess, keep: bool) -> None:
        with self._lock:
            self._busy.remove(runner)
            if keep:
                self._idle.append(runner)
            kept = max(MOST_IDLE, self._most_busy)
            gone, self._idle = self._idle[:-kept], self._idle[-kept:]
        for one in gone if keep else [*gone, runner]:
            one.close()

    def close(self) -> None:
        """End all runners that do nothing."""
        with self._lock:
            idle, self._idle = self._idle, []
        for runner in idle:
            runner.close()

    def kill(self) -> None:
        """End all, whatever they do; there are to be no more."""
        self._killed = True
        with self._lock:
            busy = list(self._busy)
        for runner in busy:
            runner.kill()
        self.close()


_pools: dict[int, Pool] = {}


def pool() -> Pool:
    """This process's."""
    return _pools.setdefault(os.getpid(), Pool())


def carry_out(campaign: str, run: Run) -> Outcome:
    """A run, in whichever worker process this is called: what a campaign's tasks are."""
    return pool().run(campaign, run)


def close_pool() -> None:
    """Nothing more is to be run in this process."""
    pool().close()

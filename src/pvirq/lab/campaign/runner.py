"""A process that builds or boots a host once, and carries each run out in a fork of it.

A worker starts one (`main`) and talks to it over a socket, pickled objects one way and the other: the Start first,
answered by a Booted; then Runs, each answered by an Outcome. It ends when the socket does. Whatever a run does to its
process (an endless loop, a segmentation fault) is the fork's alone.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Final

from pvirq.fork import Fork, ForkError, fork
from pvirq.guest import Guest, GuestCrashed, GuestError, GuestTimeout, HostStuck
from pvirq.host import Host
from pvirq.lab.campaign.hosts import BOOT_SEED, Blueprint
from pvirq.lab.campaign.perform import UNUSABLE, Outcome, carry_out, prepare
from pvirq.lab.campaign.plan import Run, Start
from pvirq.xen.timer import NS_PER_S

# What nobody has asked anything of for so long isn't needed any more.
IDLE_S: Final = 600.0
OUTPUT: Final = 16 << 10  # of a run's process is kept


@dataclass
class Booted:
    """A start is ready after `seconds`; or it never will be, and all its runs have this `failure`."""

    seconds: float
    failure: Outcome | None = None


class Runner:
    """What a start has become in this process."""

    def __init__(self, start: Start) -> None:
        self.blueprint: Blueprint | None = None
        self.host: Host | None = None
        self.guest: Guest | None = None
        self.booted = self._begin(start)

    def _begin(self, start: Start) -> Booted:
        began = time.monotonic()
        failure = None
        try:
            self.blueprint = Blueprint(start)
            if start.booted:
                self.host, self.guest = self.blueprint.boot()
                prepare(self.host)
            else:
                # What can't be built fails here, once; and what is imported here needn't be in each fork.
                self.blueprint.build(BOOT_SEED)[0].close()
        except GuestCrashed as error:
            failure = Outcome("crash", f"in its boot: {error}")
        except GuestTimeout as error:
            stuck = isinstance(error.__context__, HostStuck)
            failure = Outcome("stuck" if stuck else "timeout", f"in its boot: {error}")
        except GuestError as error:
            failure = Outcome("fail", f"in its boot: {error}")
        except (*UNUSABLE, OSError) as error:
            failure = Outcome("error", f"{start.name}: {' '.join(str(error).split())}")
        except Exception as error:
            failure = Outcome("error", f"{start.name}: {type(error).__name__}: {error}", traceback.format_exc())
        return Booted(time.monotonic() - began, failure)

    def carry_out(self, run: Run, gone: Connection) -> Outcome:
        """One run, in a fork. SystemExit where the worker goes (`gone` ends) meanwhile."""
        began = time.monotonic()
        said = os.memfd_create("output")
        try:
            with self._fork(run, said) as process:
                outcome = _result(process, run.cell.limit_ns / NS_PER_S, gone)
            text = _kept(said)
        finally:
            os.close(said)
        outcome.output = outcome.output or text
        outcome.wall_s = time.monotonic() - began
        return outcome

    def _fork(self, run: Run, said: int) -> Fork[Outcome]:
        """Begin a run in a process of its own, what it prints into a file."""
        blueprint, guest = self.blueprint, self.guest
        assert blueprint is not None

        def child(host: Host | None) -> Outcome:
            os.dup2(said, 1)
            os.dup2(said, 2)
            return carry_out(run, blueprint, host, guest)

        return fork(lambda: child(None)) if self.host is None else self.host.fork(child, seed=run.seed)


def _result(process: Fork[Outcome], limit_s: float, gone: Connection) -> Outcome:
    """What a run's process returns; it is killed after `limit_s`."""
    ready = wait([process, gone], limit_s)  # type: ignore[list-item]  # anything with a fileno
    if gone in ready:  # nobody asks for the next run before this one is answered: it is the end
        raise SystemExit
    if not ready:
        return Outcome("hung", f"{limit_s:g} s passed in reality; its process was killed")
    try:
        return process.result()
    except ForkError as error:
        return Outcome("error", str(error).replace(f"process {process.pid}", "its process"))
    except Exception as error:
        detail = "".join(traceback.format_exception(error))
        return Outcome("error", f"{type(error).__name__}: {' '.join(str(error).split())}", detail)


def _kept(said: int) -> str:
    """The end of what a process has printed."""
    size = os.fstat(said).st_size
    return os.pread(said, OUTPUT, max(size - OUTPUT, 0)).decode("utf-8", "replace")


def serve(connection: Connection) -> None:
    """Answer until the other end goes, or has asked nothing for a while."""
    runner = Runner(connection.recv())
    connection.send(runner.booted)
    if runner.booted.failure is not None:
        return
    while connection.poll(IDLE_S):
        connection.send(runner.carry_out(connection.recv(), connection))


def main(arguments: list[str]) -> None:
    """A runner's whole life; its argument is the socket's descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's: whoever started us decides
    faulthandler.enable()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError), Connection(int(arguments[0])) as connection:
        serve(connection)

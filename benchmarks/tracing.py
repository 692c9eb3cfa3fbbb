"""What a trace costs: the same work with and without one, as a ratio of processor times.

    python -m benchmarks.tracing

Rounds with and without take turns, and the least of each counts, since whatever else the machine does can only make one
slower. Before each round the kernels have taken notice that a trace has come or gone. In memory, what was recorded is
made lines of after the round, when somebody asks for them; with a file, that is part of it.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from benchmarks import devices
from pvirq.drivers.blockstore import MemoryStore
from pvirq.host import Host
from pvirq.lab.trace import Trace
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body
from pvirq.modelled import ModelledGuest
from pvirq.schedule import Schedule

EVENTS: Final = 5_000  # of modelled guests, back and forth
READS: Final = 300
ROUND_TRIPS: Final = 1_000  # of a real guest's process with domain 0
ROUNDS: Final = 20
LINUX_ROUNDS: Final = 5
KERNELS: Final = ("2.6.18", "suse", "pvops")


def ratio(host: Host, work: Callable[[], object], rounds: int, path: Path | None = None) -> float:
    """How many times as long `work` takes on a host that is traced."""
    times: dict[bool, float] = {}
    work()
    for _ in range(rounds):
        for traced in (False, True):
            trace = Trace(host, path) if traced else nullcontext()
            with trace:
                if not traced:
                    work()  # what the end of a trace has left to be done
                else:
                    host.settle()
                began = time.process_time()
                work()
                if path is not None and isinstance(trace, Trace):
                    trace.flush()
                taken = time.process_time() - began
            times[traced] = min(times.get(traced, taken), taken)
    return times[True] / times[False]


def _ping_pong(host: Host, kernel: str) -> Callable[[], object]:
    """EVENTS from one guest to another and back, one at a time, with handlers that do nothing else."""
    left = 0

    def end(kernel: Kernel[Any]) -> Any:
        notify, eoi = kernel.events.notify_remote_via_irq, kernel.events.eoi

        def handler(irq: int, dev_id: object) -> IrqReturn:
            nonlocal left
            if left:
                left -= 1
                notify(irq)
            eoi(irq)
            return IRQ_HANDLED

        return handler

    one, other = host.model(kernel).kernel, host.model(kernel).kernel
    irq = one.events.bind_listening(other.domain.domid, end(one), "bench", object())
    other.events.bind_interdomain(one.domain.domid, one.events.evtchn_from_irq(irq), end(other), "bench", object())
    host.run(lambda: host.quiet)

    def work() -> None:
        nonlocal left
        left = EVENTS
        one.events.notify_remote_via_irq(irq)
        host.run(lambda: host.quiet)
        assert not left

    return work


def _disk(host: Host) -> Callable[[], object]:
    """READS of 4 KiB from a disk in domain 0's memory, one after the other: split drivers at work."""
    guest: ModelledGuest = host.model("pvops")
    host.backends.devices.add("/dev/loop0", MemoryStore(READS * 8))
    host.attach_disk(guest, "xvda", "/dev/loop0")
    host.run(lambda: guest.has_disk("xvda"))
    disk = guest.disk("xvda")

    def reads() -> Body[None]:
        for number in range(READS):
            yield from disk.read(number * 8, 8)

    def work() -> None:
        thread = guest.kernel.spawn("reads", reads())
        host.run(lambda: thread.done)

    return work


def modelled() -> dict[str, float]:
    found = {}
    for kernel in KERNELS:
        with Host() as host:
            found[f"events.{kernel}"] = ratio(host, _ping_pong(host, kernel), ROUNDS)
    with tempfile.TemporaryDirectory() as scratch, Host() as host:
        found["events_to_file.pvops"] = ratio(host, _ping_pong(host, "pvops"), ROUNDS, Path(scratch) / "trace.jsonl")
    with Host() as host:
        found["disk.pvops"] = ratio(host, _disk(host), ROUNDS)
    return found


def linux() -> dict[str, float]:
    """A process of a real guest sends an event to domain 0 and waits for the answer, again and again.

    By counted time, in which the guest has the same to do however busy the machine is.
    """
    kernel, initrd = devices.guest_parts()
    with Host(seed=Schedule.fifo()) as host:
        guest = devices.boot_guest(host, kernel, initrd, 0)
        guest.await_agent()
        bench = devices.PvirqBench(host, [guest])
        bench.sh(0, devices.USABLE)

        def work() -> None:
            bench.sh(0, f"work events {bench.echo()} {ROUND_TRIPS} together")

        found = {"linux_events": ratio(host, work, LINUX_ROUNDS)}
        with tempfile.TemporaryDirectory() as scratch:
            found["linux_events_to_file"] = ratio(host, work, LINUX_ROUNDS, Path(scratch) / "trace.jsonl")
    return found


def run(with_linux: bool = True) -> dict[str, float]:
    """All ratios, by their names in benchmarks.bench.TARGETS."""
    found = modelled() | (linux() if with_linux else {})
    return {f"tracing.{name}.ratio": value for name, value in found.items()}


if __name__ == "__main__":
    for name, value in run(bool(shutil.which("gcc"))).items():
        print(f"{name:40} {value:6.2f}")

"""How fast modelled domains are: building many, and events from one to another through the host's loop.

python -m benchmarks.model

Processor time of one thread; rates are the best of several rounds, as whatever else the machine does can only make
one slower.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from typing import Any, Final

from pvirq.host import Host
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.scenario.load import loads
from pvirq.scenario.run import Run

DOMAINS: Final = 100
VCPUS: Final = 4
ROUNDS: Final = 8
KERNELS: Final = ("2.6.18", "suse", "pvops")


class Device:
    """A driver that takes its events and does nothing."""

    def __init__(self, kernel: Kernel[Any]) -> None:
        self._eoi = kernel.events.eoi

    def interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._eoi(irq)
        return IRQ_HANDLED


def _kstat(kernels: list[Kernel[Any]]) -> int:
    return sum(sum(desc.kstat) for kernel in kernels for desc in kernel.irq.descs.values())


def _ring_of_domains(kernel: str) -> tuple[Host, list[Kernel[Any]], list[tuple[Kernel[Any], int]]]:
    """A host whose domains each have a channel for every vCPU to the next domain's; (sender, its IRQ) of each."""
    host = Host(machine_memory=4 << 30)
    kernels = [host.model(kernel, vcpus=VCPUS).kernel for _ in range(DOMAINS)]
    host.run(lambda: host.quiet)
    senders = []
    for i, receiver in enumerate(kernels):
        sender = kernels[i - 1]
        for cpu in range(VCPUS):
            irq = receiver.events.bind_listening(sender.domain.domid, Device(receiver).interrupt, "bench", object())
            port = receiver.events.evtchn_from_irq(irq)
            own = sender.events.bind_interdomain(
                receiver.domain.domid, port, Device(sender).interrupt, "bench", object()
            )
            receiver.irq.set_affinity(irq, 1 << cpu)
            senders.append((sender, own))
    host.run(lambda: host.quiet)
    return host, kernels, senders


def events(kernel: str) -> float:
    """Events per second from notify_remote_via_irq to the end of the handler; a turn has one for each vCPU."""
    host, kernels, senders = _ring_of_domains(kernel)
    notifications = [(sender.events.notify_remote_via_irq, irq) for sender, irq in senders]
    times = 25

    def work() -> None:
        for _ in range(times):
            for notify, irq in notifications:
                notify(irq)
            host.run(lambda: host.quiet)

    work()
    best, before = float("inf"), _kstat(kernels)
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    count = times * len(notifications)
    assert _kstat(kernels) - before == count * ROUNDS
    host.close()
    return count / best


SCENARIO: Final = """
[dom0]
kernel = "pvops"  # a XenLinux has no dynamic IRQs left after 124 of these guests
vcpus = 4
platform = "writeup"
[[domain]]
name = "guest"
count = {count}
disk = [{{ name = "xvda" }}]
vif = [{{}}]
"""


def build(count: int) -> tuple[float, float, float]:
    """(seconds to build a scenario of `count` guests, seconds to connect their devices, MiB of this process then).

    Each guest is a XenLinux 2.6.18 with a console, a disk and a network interface.
    """
    start = time.process_time()
    with Run(loads(SCENARIO.format(count=count), "bench.toml")) as run:
        built = time.process_time()
        run.connect()
        connected = time.process_time()
        assert all(member.connected() for member in run.members.values())
    return built - start, connected - built, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(count: int = 1000) -> dict[str, float]:
    """All figures, by name; the last part of a name is the unit."""
    built, connected, mib = build(count)
    results = {
        "model.build_1000_guests.s": built,
        "model.connect_1000_guests.s": connected,
        "model.1000_guests.mib": mib,
    }
    for kernel in KERNELS:
        results[f"model.events_100x4.{kernel}.per_s"] = events(kernel)
    return results


def run_apart() -> dict[str, float]:
    """The same in a process of its own, for memory's sake: what others have used doesn't count then."""
    command = [sys.executable, "-m", "benchmarks.model", "--json"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


if __name__ == "__main__":
    if "--json" in sys.argv:
        print(json.dumps(run()))
    else:
        for name, value in run().items():
            print(f"{name:40} {value:14,.3f}" if value < 10 else f"{name:40} {value:14,.0f}")

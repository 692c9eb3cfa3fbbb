"""What happens in a scenario: the kinds of `[[workload]]`, each a settings class with what it does.

A workload of a domain runs in threads of its kernel; one of the world outside (keys, the wire, somebody at a console)
runs on the host's clock. Chance comes from the scenario's seed, the workload's place in the file and the domain's
name, so that one more workload changes nothing in the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi import xen as abi
from pvirq.abi.errno import XenError
from pvirq.linux.irq import IrqError
from pvirq.linux.irq_map import find_irq
from pvirq.linux.kthread import Body, sleep
from pvirq.linux.personality import Ipi
from pvirq.scenario.fields import (
    Unexpected,
    choice,
    duration,
    either,
    fraction,
    integer,
    one_or_more,
    setting,
    size,
    string,
)
from pvirq.scenario.toml_lines import Path
from pvirq.xen import evtchn

if TYPE_CHECKING:
    from pvirq.scenario.run import Member, Run

SECTOR: Final = 512
ETH_HEADER: Final = 14
MAX_COUNT: Final = 100_000_000
_CPU: Final = integer(0, 31)
_VIRQS: Final = {
    name.removeprefix("VIRQ_").lower(): value for name, value in vars(abi).items() if name.startswith("VIRQ_")
}


@dataclass
class Workload:
    """What all kinds take."""

    on: list[str] = setting(one_or_more(string()), 'the domains that do it, by name, or "*" patterns of names')
    start: int = setting(duration(), "when it begins, of virtual time", 0)
    count: int = setting(integer(1, MAX_COUNT), "how many times", 1)
    every: int = setting(duration(), "time from one to the next; otherwise each follows on the last one's end", 0)
    jitter: float = setting(fraction(), "by which part of `every` that time may differ, at random", 0.0)
    path: Path = field(default=(), init=False)  # where in the file it is

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        """Set it off for one domain. Unexpected where that domain hasn't what it takes."""
        raise NotImplementedError

    def times(self, run: Run, rng: random.Random) -> Iterator[int]:
        """How long to wait (ns) before each time; asking for the next one says that this one is done."""
        run.times += self.count
        for i in range(self.count):
            gap = int(self.every * (1 + self.jitter * (2 * rng.random() - 1))) if self.jitter else self.every
            yield gap if i else self.start
            run.times_done += 1

    def unexpected(self, key: str, why: str) -> Unexpected:
        """An error about one of its settings, to be raised."""
        return Unexpected((*self.path, key), why)

    def _cpu(self, member: Member, cpu: int, key: str = "cpu") -> int:
        if cpu >= len(member.domain.vcpus):
            raise self.unexpected(key, f"expected a CPU of {member.name}, 0 to {len(member.domain.vcpus) - 1}")
        return cpu


@dataclass
class Compute(Workload):
    """Processes that keep CPUs busy, so that their timers tick."""

    cpus: list[int] = setting(one_or_more(_CPU), "the CPUs; each works for the whole time", [0], key="cpu")
    time: int = setting(duration(), "how long, each time")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        kernel = member.kernel

        def body() -> Body[None]:
            for gap in self.times(run, rng):
                yield from sleep(kernel, gap)
                yield from kernel.compute(self.time)

        for cpu in self.cpus:
            run.thread(member, f"compute/{cpu}", body(), self._cpu(member, cpu))


@dataclass
class Ipis(Workload):
    """Interrupts from one CPU to another: what wake-ups and calls across CPUs cost."""

    what: str = setting(
        choice("resched", "callfunc", "call1func", "spinlock", "irqwork"),
        "a reschedule, a call to all other CPUs, a call to one, a kick of a lock's waiter, work for the same CPU",
        "resched",
    )
    cpu: int = setting(_CPU, "the CPU that sends", 0)
    to: list[int] = setting(one_or_more(_CPU), "the CPUs that get them, in turn", [1])

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        kernel = member.kernel
        sender = self._cpu(member, self.cpu)
        targets = [self._cpu(member, cpu, "to") for cpu in self.to] if self.what in _TO_ONE else []

        def nothing() -> None:
            pass

        def send(i: int) -> None:
            if self.what == "resched":
                kernel.reschedule(targets[i % len(targets)])
            elif self.what == "spinlock":
                kernel.events.send_ipi(targets[i % len(targets)], Ipi.SPIN_UNLOCK)
                kernel.events.poll_spinlock(targets[i % len(targets)])
            elif self.what == "call1func":
                kernel.smp_call_function_single(targets[i % len(targets)], nothing)
            elif self.what == "callfunc":
                kernel.smp_call_function(nothing)
            else:
                kernel.irq_work_queue(nothing)

        def body() -> Body[None]:
            for i, gap in enumerate(self.times(run, rng)):
                # Even without a pause: the interrupts of two calls in one go would be one.
                yield from sleep(kernel, max(gap, 1))
                send(i)

        run.thread(member, self.what, body(), sender)


_TO_ONE: Final = frozenset(("resched", "spinlock", "call1func"))


@dataclass
class Affinity(Workload):
    """Somebody writes to /proc/irq/N/smp_affinity, as irqbalance does."""

    irq: Any = setting(either(integer(0, 1 << 20), string()), "the IRQ, by number or by the name of a handler")
    cpus: list[int] = setting(one_or_more(_CPU), "the CPUs that it may go to", key="cpu")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        mask = 0
        for cpu in self.cpus:
            mask |= 1 << self._cpu(member, cpu)

        def body() -> Body[None]:
            for gap in self.times(run, rng):
                yield from sleep(member.kernel, gap)
                try:
                    member.kernel.irq.set_affinity(find_irq(member.kernel, self.irq), mask)
                except IrqError as error:
                    raise self.unexpected("irq", f"{member.name}: {error}") from None

        run.thread(member, "affinity", body(), 0)


@dataclass
class Hotplug(Workload):
    """A CPU of a domain goes offline, or comes online again."""

    cpu: int = setting(_CPU, "the CPU")
    to: str = setting(choice("offline", "online"), "which")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        cpu = self._cpu(member, self.cpu)

        def steps() -> Iterator[int]:
            for gap in self.times(run, rng):
                yield gap
                try:
                    (member.kernel.cpu_up if self.to == "online" else member.kernel.cpu_down)(cpu)
                except IrqError as error:
                    raise self.unexpected("cpu", f"{member.name}: {error}") from None

        run.outside(steps())


@dataclass
class Virq(Workload):
    """The hypervisor raises a virtual IRQ in a domain."""

    virq: str = setting(choice(*_VIRQS), "which", "console")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        virq = _VIRQS[self.virq]

        def steps() -> Iterator[int]:
            for gap in self.times(run, rng):
                yield max(gap, 1)
                if evtchn.virq_is_global(virq):
                    evtchn.send_guest_domain_virq(member.domain, virq)
                else:
                    evtchn.send_guest_vcpu_virq(member.domain.vcpus[0], virq)

        run.outside(steps())


@dataclass
class ConsoleText(Workload):
    """Text on a guest's console: what its kernel prints, or what somebody types at it."""

    what: str = setting(choice("prints", "typed"), "which", "prints")
    text: str = setting(string(), "the text, each time", "Hello\n")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        guest = member.guest
        if guest is None:
            raise self.unexpected("on", f"expected a guest: {member.name} has no console of this kind")
        data = self.text.encode()

        def body() -> Body[None]:
            for gap in self.times(run, rng):
                yield from sleep(member.kernel, max(gap, 1))
                guest.xencons.write(data)

        def steps() -> Iterator[int]:
            for gap in self.times(run, rng):
                yield max(gap, 1)
                guest.console.send(data)

        if self.what == "prints":
            run.thread(member, "console", body(), 0)
        else:
            run.outside(steps())


@dataclass
class Xenstore(Workload):
    """A domain's kernel reads and writes xenstore, over its ring."""

    op: str = setting(choice("read", "write"), "which", "read")
    key: str = setting(string(), "the node, from the domain's own directory", "data/pvirq")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        xs = member.xs

        def body() -> Body[None]:
            for i, gap in enumerate(self.times(run, rng)):
                yield from sleep(member.kernel, gap)
                try:
                    if self.op == "write":
                        yield from xs.write(self.key, str(i))
                    else:
                        yield from xs.read(self.key)
                except XenError as error:
                    raise self.unexpected("key", f"{member.name}: {self.key}: {error.errno.name}") from None

        run.thread(member, "xenstore", body(), 0)


@dataclass
class DiskRequests(Workload):
    """A process reads or writes a guest's disk; what comes back is compared with what was written."""

    disk: str = setting(string(), "the disk, by name; the first one", "")
    op: str = setting(choice("read", "write", "mixed"), "which", "read")
    size: int = setting(size(SECTOR, 1 << 20), "of each request", 4096)
    pattern: str = setting(choice("sequential", "random"), "the order of places", "random")
    cpu: int = setting(_CPU, "the CPU that it runs on", 0)

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        name = self.disk or next(iter(member.disks), "")
        guest = member.guest
        if guest is None or name not in member.disks:
            known = ", ".join(member.disks) or "it has none"
            raise self.unexpected("disk", f"expected a disk of {member.name}: {known}")
        if self.size % SECTOR:
            raise self.unexpected("size", f"expected a multiple of {SECTOR}")
        sectors = self.size // SECTOR

        def body() -> Body[None]:
            try:
                disk = yield from guest.wait_disk(name)
            except XenError as error:
                raise self.unexpected("disk", f"{error.why} (see --dmesg {member.name})") from None
            places = disk.sectors // sectors
            if not places:
                raise self.unexpected("size", f"expected at most the disk's {disk.sectors * SECTOR} bytes")
            for i, gap in enumerate(self.times(run, rng)):
                yield from sleep(member.kernel, gap)
                sector = (rng.randrange(places) if self.pattern == "random" else i % places) * sectors
                if self.op == "write" or (self.op == "mixed" and rng.random() < 0.5):
                    yield from run.contents.write(disk, sector, rng.randbytes(self.size))
                else:
                    yield from run.contents.read(disk, sector, sectors)

        run.thread(member, "disk", body(), self._cpu(member, self.cpu))


@dataclass
class Packets(Workload):
    """Frames over a guest's network interface: out to the wire behind domain 0's NIC, in from it, or both ways."""

    direction: str = setting(choice("out", "in", "echo"), "which; echo: in, and an answer out", "out")
    to: str = setting(string(), 'another guest, by name, instead of the wire (direction "out")', "")
    size: int = setting(size(60, 9000), "of each frame", 1500)
    cpu: int = setting(_CPU, "the CPU of the guest that sends", 0)

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        run.traffic.start(self, member, rng)

    def cpu_of(self, member: Member) -> int:
        """The CPU that sends."""
        return self._cpu(member, self.cpu)


@dataclass
class Device(Workload):
    """A device of domain 0 is used: a key is pressed, an alarm goes off, a disk is read by domain 0 itself."""

    device: str = setting(string(), "the device, by name")
    action: str = setting(string(), "what is done, as its type has it (see --list); the first of these", "")

    def start_on(self, run: Run, member: Member, rng: random.Random) -> None:
        driver = member.devices.get(self.device)
        if driver is None:
            known = ", ".join(member.devices) or "it has none"
            raise self.unexpected("device", f"expected a device of {member.name}: {known}")
        action = self.action or next(iter(driver.uses), "")
        if action not in driver.uses:
            known = ", ".join(driver.uses) or "nothing"
            raise self.unexpected("action", f"expected what can be done with {self.device}: {known}")

        def steps() -> Iterator[int]:
            for gap in self.times(run, rng):
                yield max(gap, 1)
                try:
                    driver.use(action, rng)
                except ValueError as error:
                    raise self.unexpected("device", f"{self.device}: {error}") from None

        run.outside(steps())


KINDS: Final[dict[str, type[Workload]]] = {
    "compute": Compute,
    "disk": DiskRequests,
    "net": Packets,
    "console": ConsoleText,
    "device": Device,
    "ipi": Ipis,
    "affinity": Affinity,
    "hotplug": Hotplug,
    "xenstore": Xenstore,
    "virq": Virq,
}
"""The workloads by their `kind`."""

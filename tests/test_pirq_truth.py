"""Lines that interrupt, step by step as on real Xen 4.17 (tests/data/pirq, from tests/guests/pirq.c).

There a keyboard controller asserted irq 1 or 12; here a line of ours does. Each line of the recording is an operation,
its result and what came of it: whether the controller holds a byte, the two ports' pending and mask bits, the two pins'
entries in the I/O APIC. In the `move` ones there are two CPUs, the ports move between vCPUs, and the CPUs that the pins
aim at are told too. As a program this records: python tests/test_pirq_truth.py SEED... move-SEED...
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.domain import Hypervisor
from pvirq.xen.ioapic import IOAPIC_BASE, Line
from pvirq.xen.memory import Machine

RECORDINGS = Path(__file__).parent / "data" / "pirq"
STEP = re.compile(r"(\w+) (1|12) (\d): (-?\w+) (.*)")
IRQS = (1, 12)


class Replay:
    """Domain 0 and the keyboard controller, which holds one byte and asserts the line of its sender."""

    def __init__(self, vcpus: int) -> None:
        self.hypervisor = Hypervisor(Machine(64 << 20))
        self.dom0 = self.hypervisor.create_domain(0, privileged=True, vcpus=vcpus)
        self.ports: dict[int, int] = {}
        self.asserted: Line | None = None
        for irq in IRQS:
            physdev.map_pirq(self.dom0, DOMID_SELF, MAP_PIRQ_TYPE_GSI, irq, irq)

    def step(self, operation: str, irq: int, argument: int) -> str:
        """Do it; the rest of the recording's line."""
        result, moving = "0", len(self.dom0.vcpus) > 1
        try:
            getattr(self, operation)(irq, argument)
        except XenError as error:
            result = f"-{error.errno.name}"
        if moving:
            self.wait(0, 0)
        mem, base = self.dom0.machine.mem, self.dom0.shared_info + 2048
        bits = []
        for table in (base, base + 512):
            ports = [self.ports.get(each, 0) for each in IRQS]
            bits.append("".join(str(mem[table + port // 8] >> port % 8 & 1 if port else 0) for port in ports))
        pins = [physdev.apic_read(self.dom0, IOAPIC_BASE, 0x10 + 2 * each) for each in IRQS]
        full = int(self.asserted is not None)
        aims = [physdev.apic_read(self.dom0, IOAPIC_BASE, 0x11 + 2 * each) >> 24 for each in IRQS]
        to = f" to {aims[0]:x} {aims[1]:x}" if moving else ""
        return f"{result} full {full} pending {bits[0]} masked {bits[1]} pins {pins[0]:x} {pins[1]:x}{to}"

    def _port(self, irq: int) -> int:
        if irq not in self.ports:
            raise XenError(Errno.ENOENT)
        return self.ports[irq]

    def byte(self, irq: int, _argument: int) -> None:
        if self.asserted is not None:
            raise XenError(Errno.EBUSY)
        self.asserted = self.hypervisor.ioapic.line(irq)
        self.asserted.assert_(self)

    def read(self, _irq: int, _argument: int) -> None:
        if self.asserted is None:
            raise XenError(Errno.ENODATA)
        self.asserted.deassert(self)
        self.asserted = None

    def eoi(self, irq: int, _argument: int) -> None:
        physdev.eoi(self.dom0, irq)

    def notify(self, _irq: int, _argument: int) -> None:
        physdev.irq_unmask_notify(self.dom0)

    def mask(self, irq: int, _argument: int) -> None:
        port = self._port(irq)
        self.dom0.machine.mem[self.dom0.shared_info + 2048 + 512 + port // 8] |= 1 << port % 8

    def consume(self, irq: int, _argument: int) -> None:
        port = self._port(irq)
        self.dom0.machine.mem[self.dom0.shared_info + 2048 + port // 8] &= ~(1 << port % 8)

    def unmask(self, irq: int, _argument: int) -> None:
        self.dom0.evtchnop.unmask(self._port(irq))

    def bind(self, irq: int, argument: int) -> None:
        self.ports[irq] = self.dom0.evtchnop.bind_pirq(irq, bool(argument))

    def close(self, irq: int, _argument: int) -> None:
        self.dom0.evtchnop.close(self.ports.get(irq, 0))
        del self.ports[irq]

    def trigger(self, irq: int, argument: int) -> None:
        if self.asserted is not None:
            raise XenError(Errno.EBUSY)
        if irq in self.ports:
            self.close(irq, 0)
        physdev.apic_write(self.dom0, IOAPIC_BASE, 0x10 + 2 * irq, irq | argument << 15)

    def move(self, irq: int, argument: int) -> None:
        self.dom0.evtchnop.bind_vcpu(self.ports.get(irq, 0), argument)

    def wait(self, _irq: int, _argument: int) -> None:
        clock = self.hypervisor.clock
        end = clock.now() + 3_000_000
        while (due := clock.next_deadline()) is not None and due <= end:
            clock.jump_to(due)
            clock.fire_due()
        clock.jump_to(end)


RUNS = [path for pattern in ("[0-9]*", "move-*") for path in sorted(RECORDINGS.glob(f"{pattern}.txt.gz"))]


@pytest.mark.parametrize("recording", RUNS, ids=lambda path: path.name.split(".")[0])
def test_steps_equal_real_xen(recording: Path) -> None:
    moving = recording.name.startswith("move")
    replay = Replay(vcpus=2 if moving else 1)
    steps = gzip.decompress(recording.read_bytes()).decode().splitlines()
    assert len(steps) == (1000 if moving else 2000)
    for number, step in enumerate(steps, 1):
        match = STEP.fullmatch(step)
        assert match
        operation, irq, argument = match[1], int(match[2]), int(match[3])
        got = f"{operation} {irq} {argument}: {replay.step(operation, irq, argument)}"
        assert f"{number}: {got}" == f"{number}: {step}"


def record(seeds: list[str]) -> None:
    import guestlib
    import realxen

    if why := realxen.missing():
        sys.exit(why)
    with realxen.RealXen() as xen:
        for name in seeds:
            seed = name.removeprefix("move-")
            if seed == name:
                how: dict[str, Any] = {"cmdline": f"seed={seed} ops=2000"}
            else:
                how = {"cmdline": f"seed={seed} ops=1000 settle=1", "vcpus": 2, "xen_options": "dom0_vcpus_pin"}
                how["options"] = ["-smp", "2"]
            runs = {xen.boot(guestlib.build("pirq"), icount=True, **how) for _ in range(2)}
            lines = {tuple(guestlib.transcript(run)[1:-1]) for run in runs}
            if len(lines) == 1:
                text = "".join(f"{line}\n" for line in lines.pop())
                (RECORDINGS / f"{name}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
            else:
                print(f"{name}: two runs DIFFER")


if __name__ == "__main__":
    record(sys.argv[1:])

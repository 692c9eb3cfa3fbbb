"""Lines given to another domain and back, as real Xen 4.17 answered (tests/data/pirq/passdev.txt, from
tests/guests/passdev.c). As a program this records it: python tests/test_passdev_truth.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from pirqlib import fails
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MSI
from pvirq.xen import physdev
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine
from pvirq.xen.msi import MsiInfo, PciDevice
from pvirq.xen.pirq import irq_permission

RECORDING = Path(__file__).parent / "data" / "pirq" / "passdev.txt"
EDU = 0x28


class Replay:
    """Domain 0 and one guest that never runs."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor(Machine(64 << 20))
        self.dom0 = self.hypervisor.create_domain(0, privileged=True)
        self.guest = self.hypervisor.create_domain(1)
        self.port = 0
        PciDevice(self.hypervisor, EDU)
        physdev.pci_device_add(self.dom0, EDU)

    def step(self, operation: str, arguments: list[int]) -> str:
        """Do it; its result as it was recorded."""
        pirq = arguments[2] if operation.startswith("map") else None
        result = "0"
        try:
            mapped = getattr(self, operation)(*arguments)
            pirq = pirq if mapped is None else mapped
        except XenError as error:
            result = f"-{error.errno.name}"
        return result if pirq is None else f"{result} pirq {pirq}"

    def map(self, domid: int, index: int, pirq: int) -> int:
        return physdev.map_pirq(self.dom0, domid, MAP_PIRQ_TYPE_GSI, index, pirq)

    def map_msi(self, domid: int, index: int, pirq: int) -> int:
        return physdev.map_pirq(self.dom0, domid, MAP_PIRQ_TYPE_MSI, index, pirq, MsiInfo(EDU))

    def unmap(self, domid: int, pirq: int) -> None:
        physdev.unmap_pirq(self.dom0, domid, pirq)

    def permit(self, domid: int, pirq: int, allow: int) -> None:
        irq_permission(self.dom0, self.hypervisor.domains[domid], pirq, bool(allow))

    def bind(self, pirq: int, share: int) -> None:
        self.port = self.dom0.evtchnop.bind_pirq(pirq, bool(share))

    def close(self) -> None:
        self.dom0.evtchnop.close(self.port)

    def destroy(self) -> None:
        self.hypervisor.destroy_domain(self.guest)


def test_steps_equal_real_xen() -> None:
    replay = Replay()
    steps = RECORDING.read_text().splitlines()
    assert len(steps) == 56
    for step in steps:
        call, _, _ = step.partition(":")
        operation, *arguments = call.split()
        assert f"{call}: {replay.step(operation, [int(each) for each in arguments])}" == step


def test_guest_may_do_none_of_that() -> None:
    replay = Replay()
    fails(Errno.EPERM, irq_permission, replay.guest, replay.guest, 9, True)
    fails(Errno.EPERM, physdev.map_pirq, replay.guest, 1, MAP_PIRQ_TYPE_GSI, 9, 9)
    fails(Errno.EPERM, physdev.unmap_pirq, replay.guest, 0, 9)


def record() -> None:
    import guestlib
    import realxen

    if why := realxen.missing():
        sys.exit(why)
    with realxen.RealXen() as xen:
        options = ["-nic", "none", "-device", "edu,addr=5"]
        lines = guestlib.transcript(xen.boot(guestlib.build("passdev"), options=options))
    RECORDING.write_text("".join(f"{line}\n" for line in lines[lines.index("begin steps") + 1 : -1]))


if __name__ == "__main__":
    record()

"""Messages that interrupt, step by step as on real Xen 4.17 (tests/data/pirq/msi-*, from tests/guests/msi.c).

There a virtio serial controller raised its five messages of MSI-X (0 to 4), and QEMU's "edu" its one MSI (5); here a
`PciDevice` does. After each step: the pirq that the message was mapped to last, which ports there are and which of them
are pending, the table's mask bits and the device's pending bits. As a program this records: python
tests/test_msi_truth.py SEED...
"""

from __future__ import annotations

import gzip
import re
import sys
from pathlib import Path

import pytest

from pirqlib import TABLE, mask, pass_time
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_MSI
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine
from pvirq.xen.msi import MsiInfo, PciDevice

RECORDINGS = Path(__file__).parent / "data" / "pirq"
STEP = re.compile(r"(\w+) ([0-5]) ([01]): (-?\w+) (pirq .*)")
EDU = 5
OPTIONS = (
    "-nic", "none", "-device", "edu,addr=5",
    "-device", "virtio-serial-pci,addr=6,max_ports=5,vectors=5,disable-modern=on,ioeventfd=off",
)  # fmt: skip


class Replay:
    """Domain 0 and its two devices."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor(Machine(64 << 20))
        self.dom0 = self.hypervisor.create_domain(0, privileged=True)
        self.serial = PciDevice(self.hypervisor, 0x30, vectors=5, msix=True)
        self.edu = PciDevice(self.hypervisor, 0x28)
        self.pirqs = [0] * 6
        self.ports = [0] * 6
        for device in (self.edu, self.serial):
            physdev.pci_device_add(self.dom0, device.sbdf)

    def step(self, operation: str, which: int, argument: int) -> str:
        """Do it; the rest of the recording's line."""
        result = "0"
        self.serial.enabled = True  # its driver did that once, at the beginning
        try:
            getattr(self, operation)(which, argument)
        except XenError as error:
            result = f"-{error.errno.name}"
        pending = sum(1 << i for i, port in enumerate(self.ports) if port and self.dom0.evtchn.is_pending(port))
        ports = sum(1 << i for i, port in enumerate(self.ports) if port)
        masked = sum(message.masked << i for i, message in enumerate(self.serial.messages))
        held = sum(message.pending << i for i, message in enumerate(self.serial.messages))
        return f"{result} pirq {self.pirqs[which]} ports {ports:x} pending {pending:x} control {masked:x} held {held:x}"

    def map(self, which: int, argument: int) -> None:
        edu = which == EDU
        if edu and self.pirqs[which]:
            raise XenError(Errno.EBUSY)
        info = MsiInfo(0x28, 0, 0) if edu else MsiInfo(0x30, which, TABLE)
        wanted = -1 if argument else 100 + which
        self.pirqs[which] = physdev.map_pirq(self.dom0, DOMID_SELF, MAP_PIRQ_TYPE_MSI, -1, wanted, info)

    def unmap(self, which: int, _argument: int) -> None:
        physdev.unmap_pirq(self.dom0, DOMID_SELF, self.pirqs[which])
        if not self.ports[which]:
            self.pirqs[which] = 0

    def bind(self, which: int, argument: int) -> None:
        self.ports[which] = self.dom0.evtchnop.bind_pirq(self.pirqs[which], bool(argument))

    def close(self, which: int, _argument: int) -> None:
        self.dom0.evtchnop.close(self.ports[which])
        self.ports[which] = 0

    def raise_(self, which: int, _argument: int) -> None:
        if which == EDU:
            self.edu.raise_msi()
        else:
            self.serial.raise_msi(which)

    def eoi(self, which: int, _argument: int) -> None:
        physdev.eoi(self.dom0, self.pirqs[which])

    def _port(self, which: int) -> int:
        if not self.ports[which]:
            raise XenError(Errno.ENOENT)
        return self.ports[which]

    def mask(self, which: int, _argument: int) -> None:
        mask(self.dom0, self._port(which))

    def unmask(self, which: int, _argument: int) -> None:
        self.dom0.evtchnop.unmask(self._port(which))

    def consume(self, which: int, _argument: int) -> None:
        port = self._port(which)
        self.dom0.machine.mem[self.dom0.shared_info + 2048 + port // 8] &= ~(1 << port % 8)

    def wait(self, _which: int, _argument: int) -> None:
        pass_time(self.hypervisor, 3_000_000)


@pytest.mark.parametrize("recording", sorted(RECORDINGS.glob("msi-*.txt.gz")), ids=lambda path: path.name.split(".")[0])
def test_steps_equal_real_xen(recording: Path) -> None:
    replay = Replay()
    steps = gzip.decompress(recording.read_bytes()).decode().splitlines()
    assert len(steps) == 2000
    for number, step in enumerate(steps, 1):
        match = STEP.fullmatch(step)
        assert match
        operation, which, argument = match[1], int(match[2]), int(match[3])
        name = "raise_" if operation == "raise" else operation
        got = f"{operation} {which} {argument}: {replay.step(name, which, argument)}"
        assert f"{number}: {got}" == f"{number}: {step}"


def record(seeds: list[str]) -> None:
    import guestlib
    import realxen

    if why := realxen.missing():
        sys.exit(why)
    with realxen.RealXen() as xen:
        for seed in seeds:
            kernel, cmdline = guestlib.build("msi"), f"seed={seed} ops=2000"
            runs = [guestlib.transcript(xen.boot(kernel, cmdline, icount=True, options=OPTIONS)) for _ in range(2)]
            if runs[0] == runs[1]:
                steps = runs[0][runs[0].index("begin steps") + 1 : -1]
                text = "".join(f"{line}\n" for line in steps)
                (RECORDINGS / f"msi-{seed}.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
            else:
                print(f"seed {seed}: two runs DIFFER")


if __name__ == "__main__":
    record(sys.argv[1:])

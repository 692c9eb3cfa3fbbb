"""AHCI: a host controller with one port and a disk that queues commands (NCQ), and the driver's interrupt side.

Up to 32 commands at a time. The port notes each completion; the controller's one interrupt, an MSI or a shared level
line, is up while any is noted. Completions that come before the driver has looked are found by one interrupt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.hardware.device import MODERN, Board, Driver, Interrupt
from pvirq.hardware.disk import BlockDriver, Command, DiskDeclaration, Medium
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn
from pvirq.xen.msi import PciDevice
from pvirq.xen.msi import name as name_of
from pvirq.xen.timer import Timer

SLOTS: Final = 32
IDENTIFY_COMMANDS: Final = 3  # identify, set the transfer mode, identify again
# PxIS.
PORT_SDB_FIS: Final = 1 << 3  # a queued command is done
PORT_TF_ERR: Final = 1 << 30


class Ahci:
    """The controller. `buffers` is what each slot's last read transferred to memory."""

    def __init__(self, board: Board, interrupt: Interrupt, medium: Medium) -> None:
        self.medium = medium
        self._board = board
        self._interrupt = interrupt
        self._port_status = 0
        self._active = 0  # PxSACT
        self._failed = 0
        self.buffers = [b""] * SLOTS
        self._work: dict[int, Timer] = {}

    # Registers.

    def reset(self) -> None:
        """GHC.HR: the disk forgets its commands."""
        for timer in self._work.values():
            timer.cancel()
        self._work.clear()
        self.medium.stop()
        self._port_status = self._active = self._failed = 0
        self._interrupt.lower()

    def issue(self, slot: int, sector: int, count: int, data: bytes | None) -> None:
        """A command table's slot and PxSACT, PxCI: a queued read or write."""
        self._active |= 1 << slot
        when = self.medium.take_turn(sector, count)
        self._work[slot] = self._board.clock.at(when, lambda: self._finish(slot, sector, count, data))

    def read_is(self) -> int:
        """The controller's IS: a bit for each port that wants service."""
        return int(self._port_status != 0)

    def take_port_status(self) -> int:
        """PxIS, read and written back, then IS: the interrupt falls."""
        status, self._port_status = self._port_status, 0
        self._interrupt.lower()
        return status

    def read_active(self) -> int:
        """PxSACT: the slots that are still at work."""
        return self._active

    def take_failed(self) -> int:
        """The slots whose commands failed (the log page that libata reads after an error)."""
        failed, self._failed = self._failed, 0
        return failed

    def _finish(self, slot: int, sector: int, count: int, data: bytes | None) -> None:
        del self._work[slot]
        self._active &= ~(1 << slot)
        noted = bool(self._port_status)
        self._port_status |= PORT_SDB_FIS
        if not self.medium.fits(sector, count):
            self._failed |= 1 << slot
            self._port_status |= PORT_TF_ERR
        elif data is None:
            self.buffers[slot] = self.medium.read(sector, count)
        else:
            self.medium.write(sector, data)
        if not noted:
            self._interrupt.raise_()


class AhciDriver(BlockDriver):
    """The controller's driver. `gsi` -1: by MSI."""

    module = "ahci"

    def __init__(self, board: Board, name: str, hba: Ahci, pci: PciDevice, gsi: int, row: str) -> None:
        super().__init__(board, name, hba.medium, SLOTS)
        self.hba = hba
        self.pci = pci
        self._gsi = gsi
        self._row = row or (f"ahci[{name_of(pci.sbdf)}]" if self.kernel.events.version >= MODERN else "ahci")
        self._slots: list[Command | None] = [None] * SLOTS

    def probe(self) -> None:
        self._reset()
        irq = self.pci_irq(self.pci, self._gsi)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, self._row)
        self.kernel.queue_work(lambda: self._identify(IDENTIFY_COMMANDS))

    def _identify(self, left: int) -> None:
        """Commands of libata's own, one after the other, which interrupt here as all do (on ata_piix they don't)."""
        if left:
            self.flush(lambda data, error: self._identify(left - 1) if error is None else None)

    def _reset(self) -> None:
        self._slots = [None] * SLOTS
        self.hba.reset()

    def _issue(self, command: Command) -> None:
        slot = self._slots.index(None)
        self._slots[slot] = command
        self.hba.issue(slot, command.sector, command.count, command.data)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """ahci_single_level_irq_intr, ahci_port_intr"""
        if not self.hba.read_is():
            return IRQ_NONE
        self._take(self.hba.take_port_status())
        return IRQ_HANDLED

    def _take(self, status: int) -> None:
        failed = self.hba.take_failed() if status & PORT_TF_ERR else 0
        active = self.hba.read_active()
        done = [(i, command) for i, command in enumerate(self._slots) if command is not None and not active >> i & 1]
        for slot, command in done:
            self._slots[slot] = None
            error = Errno.EIO if failed >> slot & 1 else None
            if not command.write and not error:
                command.data = self.hba.buffers[slot]
            self._complete(command, error)

    def _timed_out(self, command: Command) -> None:
        """Its interrupt was lost, or the disk is slow: take what is done."""
        self._take(self.hba.take_port_status())


@dataclass(frozen=True)
class AhciDeclaration(DiskDeclaration):
    """An AHCI controller with one disk, by MSI, or (gsi) on a shared level line.

    Its row is `row`, else as the kernel has it: ahci, in Linux 6.1 with the device behind it.
    """

    gsi: int = -1
    slot: str = ""
    row: str = ""
    driver: ClassVar[type[Driver]] = AhciDriver

    def make(self, board: Board) -> AhciDriver:
        pci = board.pci(self.name, self.slot)
        interrupt = board.interrupt(pci, self.gsi)
        return AhciDriver(board, self.name, Ahci(board, interrupt, self.medium(board)), pci, self.gsi, self.row)

"""ATA: a channel with a disk and its bus-master DMA, and the driver's interrupt side (ata_piix on libata's SFF code).

One command at a time. In legacy mode the channel has an ISA line to itself, edge-triggered (14 or 15); in native mode
a PCI line, level-triggered and shared. The line is high from a command's end until the status register is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.hardware.device import Board, Deferred, Driver
from pvirq.hardware.disk import BlockDriver, Command, DiskDeclaration, Medium
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn

# Status register.
ATA_BUSY: Final = 0x80
ATA_DRDY: Final = 0x40
ATA_ERR: Final = 0x01
# Bus-master status register.
DMA_ERR: Final = 0x02
DMA_INTR: Final = 0x04


class AtaChannel:
    """One channel with one disk, or with nothing on it."""

    def __init__(self, board: Board, gsi: int, medium: Medium | None) -> None:
        self.medium = medium
        self._pin = board.pin(gsi)
        self._clock = board.clock
        self._done = Deferred(board, self._finish)
        self._status = ATA_DRDY if medium else 0
        self._dma_status = 0
        self._work: tuple[int, int, bytes | None] = (0, 0, None)
        self.buffer = b""  # what the last read transferred to memory

    # Registers.

    def reset(self) -> None:
        """A software reset (SRST): the disk forgets its command."""
        self._done.cancel()
        if self.medium is not None:
            self.medium.stop()
            self._status = ATA_DRDY
        self._dma_status = 0
        self._pin.lower()

    def command(self, sector: int, count: int, data: bytes | None) -> None:
        """READ or WRITE DMA EXT with its task file, and the bus master started. Nothing while the disk is busy."""
        if self.medium is None or self._status & ATA_BUSY:
            return
        self._pin.lower()
        self._status = ATA_BUSY
        self._dma_status &= ~(DMA_INTR | DMA_ERR)
        self._work = sector, count, data
        self._done.after(self.medium.take_turn(sector, count) - self._clock.now())

    def read_status(self) -> int:
        """Lowers the line."""
        self._pin.lower()
        return self._status

    def read_altstatus(self) -> int:
        """The same and the line stays."""
        return self._status

    def read_dma_status(self) -> int:
        return self._dma_status

    def clear_dma_status(self) -> None:
        self._dma_status = 0

    def _finish(self) -> None:
        sector, count, data = self._work
        assert self.medium is not None
        self._status = ATA_DRDY
        if not self.medium.fits(sector, count):
            self._status |= ATA_ERR
        elif data is None:
            self.buffer = self.medium.read(sector, count)
        else:
            self.medium.write(sector, data)
        self._dma_status |= DMA_INTR
        self._pin.raise_()


class AtaDriver(BlockDriver):
    """The channel's driver, ata_piix."""

    module = "ata_piix"

    def __init__(self, board: Board, name: str, channel: AtaChannel, medium: Medium, gsi: int, native: bool) -> None:
        super().__init__(board, name, medium, slots=1)
        self.channel = channel
        self._gsi = gsi
        self._native = native
        self._current: Command | None = None

    def probe(self) -> None:
        self._reset()
        irq = self.kernel.events.register_gsi(self._gsi, level=self._native, active_low=self._native)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, "ata_piix")

    def _reset(self) -> None:
        self._current = None
        self.channel.reset()

    def _issue(self, command: Command) -> None:
        self._current = command
        self.channel.command(command.sector, command.count, command.data)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """ata_bmdma_interrupt: not ours unless the bus master says so and the disk is done."""
        channel = self.channel
        if self._current is None or not channel.read_dma_status() & DMA_INTR:
            return IRQ_NONE
        if channel.read_altstatus() & ATA_BUSY:
            return IRQ_NONE
        self._take()
        return IRQ_HANDLED

    def _take(self) -> None:
        command, channel = self._current, self.channel
        assert command is not None
        self._current = None
        status = channel.read_status()
        channel.clear_dma_status()
        error = Errno.EIO if status & ATA_ERR else None
        if not command.write and not error:
            command.data = channel.buffer
        self._complete(command, error)

    def _timed_out(self, command: Command) -> None:
        """ata_sff_lost_interrupt: a disk that has been done for long has lost its interrupt."""
        status = self.channel.read_altstatus()
        if not status & ATA_BUSY:
            self.kernel.printk(f"{self.name}: lost interrupt (Status {status:#x})")
            self._take()


class EmptyAtaDriver(Driver):
    """ata_piix on a channel without a disk: it holds the line and waits for nothing."""

    module = "ata_piix"

    def __init__(self, board: Board, name: str, channel: AtaChannel, gsi: int, native: bool) -> None:
        super().__init__(board, name)
        self.channel = channel
        self._gsi = gsi
        self._native = native

    def probe(self) -> None:
        irq = self.kernel.events.register_gsi(self._gsi, level=self._native, active_low=self._native)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, "ata_piix")

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        return IRQ_NONE


@dataclass(frozen=True)
class AtaDeclaration(DiskDeclaration):
    """An ATA channel, ata_piix, with a disk (size_mib = 0: none); `native`: on a shared PCI line, by level."""

    gsi: int = 14
    native: bool = False
    driver: ClassVar[type[Driver]] = AtaDriver

    def make(self, board: Board) -> AtaDriver | EmptyAtaDriver:
        if not self.size_mib:
            return EmptyAtaDriver(board, self.name, AtaChannel(board, self.gsi, None), self.gsi, self.native)
        medium = self.medium(board)
        return AtaDriver(board, self.name, AtaChannel(board, self.gsi, medium), medium, self.gsi, self.native)

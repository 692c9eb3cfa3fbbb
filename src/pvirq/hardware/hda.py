"""A sound card, HD Audio: an interrupt for each period that a stream has played, by MSI or on a shared level line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.hardware.device import MODERN, MS, Board, Declaration, Deferred, Driver, Interrupt
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn
from pvirq.xen.msi import PciDevice

STREAM: Final = 0x01  # of the interrupt status register: the one stream's


class HdaController:
    """The controller with one output stream: the line is up from a period's end until that is acknowledged."""

    def __init__(self, board: Board, interrupt: Interrupt) -> None:
        self._interrupt = interrupt
        self._status = 0
        self._period_ns = 0
        self._period = Deferred(board, self._elapsed)

    def read_intsts(self) -> int:
        return self._status

    def acknowledge(self) -> None:
        """A write of ones to the stream's status register."""
        self._status = 0
        self._interrupt.lower()

    def run(self, period_ns: int) -> None:
        """Start the stream; 0: stop it."""
        self._period_ns = period_ns
        if period_ns:
            self._period.after(period_ns)
        else:
            self._period.cancel()

    def run_once(self, period_ns: int) -> None:
        """Play one period; nothing new where the stream runs."""
        if not self._period.pending:
            self._period.after(period_ns)

    def _elapsed(self) -> None:
        if not self._status:
            self._status = STREAM
            self._interrupt.raise_()
        if self._period_ns:
            self._period.after(self._period_ns)


class HdaDriver(Driver):
    """The driver, snd_hda_intel; `periods` counts what has been played, `on_period` is told of each."""

    module = "snd_hda_intel"
    uses = {"period": "play one period of 10 ms"}

    def __init__(self, board: Board, name: str, controller: HdaController, pci: PciDevice, gsi: int, row: str) -> None:
        super().__init__(board, name)
        self.pci = pci
        self.controller = controller
        self._gsi = gsi
        self._row = row
        self.periods = 0
        self.on_period: Callable[[], None] = lambda: None

    def probe(self) -> None:
        irq = self.pci_irq(self.pci, self._gsi)
        self.request_irq(irq, self._interrupt, 0 if self._gsi == -1 else IRQF_SHARED, self._row)

    def remove(self) -> None:
        self.play(0)
        super().remove()

    def play(self, period_ns: int) -> None:
        """Play in periods of so many ns; 0: stop. ValueError for less."""
        if period_ns < 0:
            raise ValueError(f"a period of {period_ns} ns")
        self.controller.run(period_ns)

    def _use(self, action: str, rng: Random) -> None:
        self.controller.run_once(10 * MS)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """azx_interrupt"""
        if not self.controller.read_intsts() & STREAM:
            return IRQ_NONE
        self.controller.acknowledge()
        self.periods += 1
        self.on_period()
        return IRQ_HANDLED


@dataclass(frozen=True)
class HdaDeclaration(Declaration):
    """A sound card on a shared level line, or (gsi = -1) by MSI.

    Its row is `row`, else as the kernel has it: HDA Intel, in Linux 6.1 snd_hda_intel:card0.
    """

    gsi: int = 16
    slot: str = ""
    row: str = ""
    driver: ClassVar[type[Driver]] = HdaDriver

    def make(self, board: Board) -> HdaDriver:
        pci = board.pci(self.name, self.slot)
        interrupt = board.interrupt(pci, self.gsi)
        row = "snd_hda_intel:card0" if board.kernel.events.version >= MODERN else "HDA Intel"
        return HdaDriver(board, self.name, HdaController(board, interrupt), pci, self.gsi, self.row or row)

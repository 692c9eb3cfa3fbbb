"""ACPI's system control interrupt, SCI: fixed events such as the power button, on a level line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.hardware.device import Board, Declaration, Driver
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn

# Bits of the PM1 status and enable registers.
PWRBTN: Final = 1 << 8
SLPBTN: Final = 1 << 9


class Pm1:
    """The chipset's PM1 event block: the line is up while an enabled status bit is set."""

    def __init__(self, board: Board, gsi: int) -> None:
        self._pin = board.pin(gsi)
        self._status = 0
        self._enabled = 0

    def read_status(self) -> int:
        return self._status

    def clear_status(self, bits: int) -> None:
        """A write of ones to the status register."""
        self._status &= ~bits
        self._look()

    def read_enable(self) -> int:
        return self._enabled

    def write_enable(self, bits: int) -> None:
        self._enabled = bits
        self._look()

    def press(self, bits: int = PWRBTN) -> None:
        """Somebody presses a button."""
        self._status |= bits
        self._look()

    def _look(self) -> None:
        if self._status & self._enabled:
            self._pin.raise_()
        else:
            self._pin.lower()


class AcpiDriver(Driver):
    """The driver; `on_event` is told of each event, from the interrupt's bottom half."""

    module = "acpi"
    uses = {"power": "press the power button", "sleep": "press the sleep button"}

    def __init__(self, board: Board, name: str, pm1: Pm1, gsi: int, active_low: bool) -> None:
        super().__init__(board, name)
        self.pm1 = pm1
        self._gsi = gsi
        self._active_low = active_low
        self.events = 0
        self.on_event: Callable[[int], None] = lambda bits: None

    def probe(self) -> None:
        irq = self.kernel.events.register_gsi(self._gsi, level=True, active_low=self._active_low)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, "acpi")
        self.pm1.clear_status(self.pm1.read_status())
        self.pm1.write_enable(PWRBTN | SLPBTN)

    def remove(self) -> None:
        self.pm1.write_enable(0)
        super().remove()

    def _use(self, action: str, rng: Random) -> None:
        self.pm1.press(PWRBTN if action == "power" else SLPBTN)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """acpi_ev_sci_xrupt_handler, acpi_ev_fixed_event_detect"""
        bits = self.pm1.read_status() & self.pm1.read_enable()
        if not bits:
            return IRQ_NONE
        self.pm1.clear_status(bits)
        self.events += 1
        self.kernel.queue_work(lambda: self.on_event(bits))
        return IRQ_HANDLED


@dataclass(frozen=True)
class AcpiDeclaration(Declaration):
    """ACPI's interrupt, with a power button."""

    gsi: int = 9
    active_low: bool = False  # the firmware of most machines overrides it so
    behind: ClassVar[tuple[str, ...]] = ("xen-pcpu",)
    driver: ClassVar[type[Driver]] = AcpiDriver

    def make(self, board: Board) -> AcpiDriver:
        return AcpiDriver(board, self.name, Pm1(board, self.gsi), self.gsi, self.active_low)

"""USB host controllers, UHCI and EHCI, as far as interrupts go: on shared level lines, where most interrupts are not
theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.hardware.device import Board, Declaration, Driver
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn

# Status bits; the two kinds have them in other places. A port change is UHCI's "resume detect": its root hub is
# suspended while nothing is plugged in.
TRANSFER: Final = 0x01
PORT_CHANGE: Final = 0x04
REASONS: Final = TRANSFER | PORT_CHANGE


class HostController:
    """The controller: the line is up while an enabled status bit is set."""

    def __init__(self, board: Board, gsi: int) -> None:
        self._pin = board.pin(gsi)
        self._status = 0
        self._enabled = 0
        self.plugged = False

    def read_status(self) -> int:
        return self._status

    def clear_status(self, bits: int) -> None:
        """A write of ones to the status register."""
        self._status &= ~bits
        self._look()

    def write_enable(self, bits: int) -> None:
        self._enabled = bits
        self._look()

    def plug(self) -> None:
        """Somebody plugs a device in."""
        self.plugged = True
        self._raise(PORT_CHANGE)

    def unplug(self) -> None:
        self.plugged = False
        self._raise(PORT_CHANGE)

    def transfer(self) -> None:
        """A transfer of a plugged device has ended. ValueError without one."""
        if not self.plugged:
            raise ValueError("nothing is plugged in")
        self._raise(TRANSFER)

    def _raise(self, bits: int) -> None:
        self._status |= bits
        self._look()

    def _look(self) -> None:
        if self._status & self._enabled:
            self._pin.raise_()
        else:
            self._pin.lower()


class UsbDriver(Driver):
    """The controller's driver, uhci_hcd or ehci_hcd. `on_event` is told of its status bits, in the bottom half."""

    uses = {"plug": "plug a device in, or out", "transfer": "one transfer of the plugged device"}

    def __init__(self, board: Board, name: str, module: str, controller: HostController, gsi: int) -> None:
        super().__init__(board, name)
        self.module = module
        self.controller = controller
        self._gsi = gsi
        self.port_changes = self.transfers = 0
        self.on_event: Callable[[int], None] = lambda bits: None

    def probe(self) -> None:
        irq = self.kernel.events.register_gsi(self._gsi, level=True, active_low=True)
        self.request_irq(irq, self._interrupt, IRQF_SHARED, f"{self.module}:{self.name}")
        self.controller.write_enable(REASONS)

    def remove(self) -> None:
        self.controller.write_enable(0)
        super().remove()

    def _use(self, action: str, rng: Random) -> None:
        if action == "transfer":
            self.controller.transfer()
        elif self.controller.plugged:
            self.controller.unplug()
        else:
            self.controller.plug()

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """uhci_irq, ehci_irq: clear what is set, so that the line falls; nothing set: another device's interrupt."""
        status = self.controller.read_status() & REASONS
        if not status:
            return IRQ_NONE
        self.controller.clear_status(status)
        self.port_changes += bool(status & PORT_CHANGE)
        self.transfers += bool(status & TRANSFER)
        self.kernel.queue_work(lambda: self.on_event(status))
        return IRQ_HANDLED


@dataclass(frozen=True)
class UhciDeclaration(Declaration):
    """A USB 1.1 controller, uhci_hcd:NAME, on a shared level line."""

    gsi: int = 16
    driver: ClassVar[type[Driver]] = UsbDriver
    module: ClassVar[str] = "uhci_hcd"

    def make(self, board: Board) -> UsbDriver:
        return UsbDriver(board, self.name, self.module, HostController(board, self.gsi), self.gsi)


@dataclass(frozen=True)
class EhciDeclaration(UhciDeclaration):
    """A USB 2.0 controller, ehci_hcd:NAME, on a shared level line."""

    module: ClassVar[str] = "ehci_hcd"

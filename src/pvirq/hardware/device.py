"""What all devices have in common: how one is declared, its interrupt output, its driver in the kernel.

A device has two sides. The hardware has registers enough to be honest about its interrupt: why it raises it, and
what lowers it again. The driver runs in domain 0's modelled kernel and knows the hardware by its registers only.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol

from pvirq.abi.errno import XenError
from pvirq.linux.irq import IrqError, IrqHandler
from pvirq.linux.kernel import Kernel
from pvirq.xen.msi import PciDevice

if TYPE_CHECKING:
    from pvirq.xen.ioapic import Line

US: Final = 1_000  # ns
MS: Final = 1_000_000

# Kernels from which on drivers behave as Linux 6.1's do; between it and the 2.6 ones nothing was looked at.
MODERN: Final = (6, 1, 0)


class HardwareError(ValueError):
    """A machine's table says something that can't be; the message tells what was expected.

    `device` is its place in the table, -1 where it is none; `key` the parameter that is wrong, "" where it is none in
    particular.
    """

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key
        self.device = -1


class Interrupt(Protocol):
    """A device's interrupt output: a pin, which it holds, or a message, which is sent once."""

    def raise_(self) -> None:
        """The device has one more reason to want service. That changes nothing at a pin which is up; a message is sent
        each time."""

    def lower(self) -> None:
        """The device has been served."""


class Pin:
    """An interrupt pin, on an I/O APIC input that other devices' pins may share. Held until the device is served."""

    def __init__(self, line: Line) -> None:
        self._line = line

    def raise_(self) -> None:
        self._line.assert_(self)

    def lower(self) -> None:
        self._line.deassert(self)


class Message:
    """Message `entry` of a PCI device."""

    def __init__(self, pci: PciDevice, entry: int = 0) -> None:
        self._pci = pci
        self._entry = entry

    def raise_(self) -> None:
        self._pci.raise_msi(self._entry)

    def lower(self) -> None:
        pass


class Board:
    """The main board: where devices find their lines and slots, and drivers the kernel that they run in."""

    def __init__(self, kernel: Kernel[Any]) -> None:
        self.kernel = kernel
        self.hypervisor = kernel.domain.hypervisor
        self.clock = kernel.clock
        self._slots: dict[int, str] = {}  # what this board has plugged in

    def pin(self, gsi: int, key: str = "gsi") -> Pin:
        """A new pin on an I/O APIC input. HardwareError where there is no such input; `key` is who says so."""
        lines = self.hypervisor.ioapic.lines
        if not 0 <= gsi < len(lines):
            raise HardwareError(f"gsi {gsi}: expected 0 to {len(lines) - 1}, an input of the I/O APIC", key)
        return Pin(lines[gsi])

    def interrupt(self, pci: PciDevice, gsi: int) -> Interrupt:
        """How a PCI device interrupts: by its pin on that input, or, at -1, by its one MSI."""
        return Message(pci) if gsi == -1 else self.pin(gsi)

    def pci(self, name: str, slot: str = "", *, vectors: int = 1, msix: bool = False) -> PciDevice:
        """Plug in a PCI function: at `slot`, as "00:1f.2", or in the next device of bus 0 without anything.

        HardwareError where that slot is taken or can't be.
        """
        bus = self.hypervisor.irqs.bus
        if slot:
            match = re.fullmatch(r"([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", slot)
            if match is None:
                raise HardwareError(f"slot {slot!r} of {name}: expected bus:device.function, as '00:1f.2'", "slot")
            bdf = int(match[1], 16) << 8 | int(match[2], 16) << 3 | int(match[3])
        else:
            taken = {at >> 3 for at in bus}
            bdf = next((device << 3 for device in range(1, 32) if device not in taken), -1)
            if bdf < 0:
                raise HardwareError(f"no slot of bus 0 is free for {name}: give it one, for example slot = '01:00.0'")
        if bdf in bus:
            raise HardwareError(f"slot {slot} of {name} is taken by {self._slots.get(bdf, 'another device')}", "slot")
        self._slots[bdf] = name
        return PciDevice(self.hypervisor, bdf, vectors=vectors, msix=msix)

    def unplug_all(self) -> None:
        """Nothing that this board has plugged in is there any more. Only before a driver has found it."""
        for bdf in self._slots:
            del self.hypervisor.irqs.bus[bdf]
        self._slots.clear()


class Driver(ABC):
    """A driver and the one device that it drives; `name` is the device's in its machine.

    `bound` tells whether its probe went well.
    """

    module: str
    """The driver's name in Linux."""

    uses: ClassVar[Mapping[str, str]] = {}
    """What the world does with such a device, or its kernel, in one go: the actions of `use`, and what each is."""

    def __init__(self, board: Board, name: str) -> None:
        self.kernel = board.kernel
        self.clock = board.clock
        self.name = name
        self.bound = False
        self._irqs: list[tuple[int, object]] = []
        self._msi: list[PciDevice] = []

    @abstractmethod
    def probe(self) -> None:
        """Find the device and request its IRQs. IrqError, XenError."""

    def bind(self) -> None:
        """Probe, as the kernel's driver core does it: a failure is a line in the log."""
        try:
            self.probe()
            self.bound = True
        except (IrqError, XenError) as error:
            self.kernel.printk(self._failure(error))
            self.remove()

    def _failure(self, error: IrqError | XenError) -> str:
        """What the log says of a probe that failed (really_probe)."""
        return f"{self.module}: probe of {self.name} failed with error {-int(error.errno)}"

    def remove(self) -> None:
        """Give all IRQs back, as on unloading the module."""
        self.bound = False
        while self._irqs:
            self.kernel.irq.free_irq(*self._irqs.pop())
        while self._msi:
            self.kernel.events.disable_msi(self._msi.pop())

    def use(self, action: str, rng: Random) -> None:
        """Do one of `uses`; `rng` chooses what it leaves open, as a sector. ValueError where that can't be now.

        HardwareError for an action that the device hasn't.
        """
        if action not in self.uses:
            expected = ", ".join(self.uses) or "none: it can't be used"
            raise HardwareError(f"unknown action {action!r} of {self.name}: expected {expected}")
        self._use(action, rng)

    def _use(self, action: str, rng: Random) -> None:
        raise NotImplementedError

    def request_irq(self, irq: int, handler: IrqHandler, flags: int, row: str, dev_id: object = None) -> None:
        """`dev_id` is the driver itself where nothing is given."""
        dev_id = self if dev_id is None else dev_id
        self.kernel.irq.request_irq(irq, handler, flags, row, dev_id)
        self._irqs.append((irq, dev_id))

    def pci_irq(self, pci: PciDevice, gsi: int) -> int:
        """The IRQ of a PCI device that interrupts as `Board.interrupt` says. IrqError, XenError."""
        if gsi == -1:
            return self.enable_msi(pci)[0]
        irq: int = self.kernel.events.register_gsi(gsi, level=True, active_low=True)
        return irq

    def enable_msi(self, pci: PciDevice, count: int = 1) -> list[int]:
        irqs: list[int] = self.kernel.events.enable_msi(pci, count, msix=pci.msix)
        self._msi.append(pci)
        return irqs


@dataclass(frozen=True)
class Declaration(ABC):
    """One row of a machine's table. A subclass is a type of device and its fields are that type's parameters.

    The first line of its docstring is its line of help. `behind` names the kernel's driver that this one follows
    at boot, the first of those that the kernel has.
    """

    name: str
    behind: ClassVar[tuple[str, ...]] = ("hvc_open",)
    driver: ClassVar[type[Driver]]

    @abstractmethod
    def make(self, board: Board) -> Driver:
        """Build the device and its driver. HardwareError where a value can't be."""

    def at_least(self, **least: int) -> None:
        """HardwareError where one of these parameters is less than that."""
        for key, value in least.items():
            if getattr(self, key) < value:
                raise HardwareError(f"{key} {getattr(self, key)}: expected {value} or more", key)


@dataclass
class Deferred:
    """Something due once: a device's work in virtual time, of which there is at most one at a time."""

    board: Board
    action: Callable[[], None]
    _cancel: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def pending(self) -> bool:
        return self._cancel is not None

    def after(self, ns: int) -> None:
        """Do it in `ns` from now; an earlier appointment is void."""
        self.cancel()
        clock = self.board.clock
        self._cancel = clock.at(clock.now() + ns, self._due).cancel

    def cancel(self) -> None:
        if self._cancel is not None:
            self._cancel()
            self._cancel = None

    def _due(self) -> None:
        self._cancel = None
        self.action()

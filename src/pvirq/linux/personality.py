"""What a modelled kernel's version is made of: the one interface that drivers and the kernel itself use.

A personality is one version of Linux, as far as interrupts go: its generic layer, its event-channel code, what it
binds at boot and how its /proc/interrupts looks. `pvirq.linux.kernel.Kernel` is what all of them stand on; drivers
(`pvirq.drivers`, `pvirq.hardware`) bind their channels and lines through this and so run on any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pvirq.linux.evtchn_dev import EvtchnUser
    from pvirq.linux.irq import IrqAction, IrqHandler
    from pvirq.linux.proc import IrqStat
    from pvirq.xen.msi import PciDevice
    from pvirq.xen.probes import Probes


class Ipi(IntEnum):
    """What one CPU asks of another (enum ipi_vector). A kernel that lacks one takes the nearest that it has."""

    RESCHEDULE = 0
    CALL_FUNCTION = 1
    CALL_FUNCTION_SINGLE = 2
    SPIN_UNLOCK = 3
    IRQ_WORK = 4


@dataclass(frozen=True)
class StartInfo:
    """What the domain builder tells a kernel (struct start_info): its first two channels and their ring pages.

    A port of 0 is one that the domain has not, as domain 0. `initial`: it is the initial domain.
    """

    initial: bool = False
    store_port: int = 0
    store_mfn: int = 0
    console_port: int = 0
    console_mfn: int = 0


class IrqLine(Protocol):
    """An interrupt line (struct irq_desc), as far as all generic layers agree."""

    irq: int
    kstat: list[int]
    depth: int
    affinity: int

    @property
    def actions(self) -> Sequence[IrqAction]: ...


class GenericIrq(Protocol):
    """A generic interrupt layer: `pvirq.linux.irq` (Linux 6.1) or `pvirq.linux.irq26` (Linux 2.6).

    Errors are IrqError with Linux's errno. `online` is a mask of CPUs.
    """

    nr_cpus: int
    online: int

    @property
    def descs(self) -> Mapping[int, IrqLine]:
        """The lines by number."""

    def request_irq(self, irq: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None) -> None:
        """Add a handler; the first one starts the line up."""

    def free_irq(self, irq: int, dev_id: object = None) -> None:
        """Take a handler away; the last one shuts the line down."""

    def disable_irq(self, irq: int) -> None:
        """Nested disable."""

    def enable_irq(self, irq: int) -> None:
        """Undo one disable."""

    def set_affinity(self, irq: int, mask: int) -> None:
        """A write to /proc/irq/N/smp_affinity."""


class Personality(ABC):
    """One version of a kernel, as far as interrupts go.

    `version` is Linux's. `initial`: it runs as the initial domain. `multi_queue`: its block and net drivers take one
    queue a CPU, and separate channels for each direction, where both ends can. `on_xenbus` and `on_console` are what
    its xenbus and console drivers do, in process context; the drivers set them.
    """

    if TYPE_CHECKING:

        @property
        def irq(self) -> GenericIrq:
            """The generic layer: a plain attribute of every personality, each of its own type."""

    version: tuple[int, int, int]
    hz: int
    initial: bool
    start_info: StartInfo
    store_port: int  # the channel to xenstored, 0 without; domain 0's kernel makes its own at boot
    multi_queue: bool = False
    initcalls: list[tuple[str, Callable[[], object]]]  # the drivers by name, in the order in which they begin
    on_xenbus: Callable[[], object]
    on_console: Callable[[], object]

    # The kernel's own.

    @abstractmethod
    def boot(self) -> None:
        """Bring up CPU 0, then the others, then the drivers, in the real kernel's order."""

    @abstractmethod
    def cpu_up(self, cpu: int) -> None:
        """Bring a CPU online."""

    @abstractmethod
    def cpu_down(self, cpu: int) -> None:
        """Take a CPU offline."""

    @abstractmethod
    def upcall(self, cpu: int) -> None:
        """Handle every pending port of this CPU; upcalls are masked."""

    def upcall_entry(self, cpu: int) -> Callable[[], object]:
        """The same for one CPU, which is known beforehand: what the kernel calls. Made when the CPU first runs."""
        return partial(self.upcall, cpu)

    def probe(self, probes: Probes) -> None:  # noqa: B027 - not every version has more than its upcalls to look into
        """Put in the way what instruments want to be told of; upcall entries are made anew after this."""

    @abstractmethod
    def send_ipi(self, cpu: int, ipi: Ipi) -> None:
        """Interrupt another CPU (or this one)."""

    def poll_spinlock(self, cpu: int) -> bool:
        """A CPU that waits for a lock polls for its holder's IPI: has it come? Each counts in the lock's row.

        Never in a kernel whose waiters only spin.
        """
        return False

    @abstractmethod
    def evtchn_user(self, name: str) -> EvtchnUser:
        """Open /dev/xen/evtchn for a process `name`."""

    @abstractmethod
    def interrupts(self) -> str:
        """The text of /proc/interrupts."""

    @property
    @abstractmethod
    def irq_stat(self) -> list[IrqStat]:
        """The architecture's own counts, per CPU."""

    def initcall_after(self, name: str, new: str, call: Callable[[], object]) -> None:
        """Put a driver, `new`, behind driver `name` in the boot order: domain 0's ACPI line is behind "xen-pcpu".

        KeyError where no driver has that name.
        """
        for i, (other, _) in enumerate(self.initcalls):
            if other == name:
                self.initcalls.insert(i + 1, (new, call))
                return
        raise KeyError(name)

    # For split drivers. XenError as the EVTCHNOP_* gives it, IrqError as request_irq.

    @abstractmethod
    def bind_listening(self, remote_domid: int, handler: IrqHandler, name: str, dev_id: object) -> int:
        """A frontend's end: a new port that `remote_domid` may bind to, with an IRQ; returns the IRQ."""

    @abstractmethod
    def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: IrqHandler, name: str, dev_id: object
    ) -> int:
        """A backend's end: connect to the frontend's port; returns the IRQ."""

    @abstractmethod
    def unbind(self, irq: int, dev_id: object) -> None:
        """Take the handler away and close the port (unbind_from_irqhandler)."""

    @abstractmethod
    def eoi(self, irq: int, spurious: bool = False) -> None:
        """The driver is done with an event: the next may come (xen_irq_lateeoi). Older kernels have no such thing."""

    @abstractmethod
    def evtchn_from_irq(self, irq: int) -> int:
        """The port of an IRQ, 0 without."""

    def ports_of_irq(self, irq: int) -> list[int]:
        """All ports of an IRQ: one, or one a CPU where the kernel has a single IRQ for all CPUs."""
        port = self.evtchn_from_irq(irq)
        return [port] if port else []

    @abstractmethod
    def notify_remote_via_irq(self, irq: int) -> None:
        """Notify the other end of an IRQ's channel; nothing happens on one that is broken."""

    # For drivers of hardware.

    @abstractmethod
    def register_gsi(self, gsi: int, *, level: bool, active_low: bool) -> int:
        """The IRQ of an I/O APIC input, to be requested then (acpi_register_gsi). IrqError, XenError."""

    @abstractmethod
    def enable_msi(self, device: PciDevice, count: int = 1, *, msix: bool = False) -> list[int]:
        """IRQs for a PCI device's first `count` messages (pci_alloc_irq_vectors). IrqError, XenError."""

    @abstractmethod
    def disable_msi(self, device: PciDevice) -> None:
        """Give them back, after free_irq (pci_free_irq_vectors)."""

"""Physical IRQs in XenLinux (drivers/xen/core/evtchn.c, io_apic-xen.c, drivers/pci/msi-xen.c): pirq_type and its lines.

Physical IRQ numbers are the first ones, one for one: an I/O APIC input's IRQ is its number, a message's is handed out
from the top. A line gets its port when it starts, and gives it back when it stops.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import BIND_PIRQ__WILL_SHARE
from pvirq.abi.physdev import MAP_PIRQ_TYPE_MSI, XENIRQSTAT_needs_eoi, XENIRQSTAT_shared
from pvirq.abi.xen import DOMID_SELF
from pvirq.linux.irq import IrqError
from pvirq.linux.irq26 import IrqChip26, IrqDesc26, IrqLayer26
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.xenlinux import XenLinux
from pvirq.linux.xenlinux_ports import IRQT_PIRQ, IRQT_UNBOUND
from pvirq.xen import evtchn, physdev
from pvirq.xen.ioapic import IOAPIC_BASE, LEVEL_ISA_IRQS, TIMER_PIN
from pvirq.xen.msi import MsiInfo

if TYPE_CHECKING:
    from pvirq.xen.msi import PciDevice

NR_IRQS_LEGACY: Final = 16
TIMER_IRQ: Final = 0
CASCADE_IRQ: Final = 2
RTC_IRQ: Final = 8
MSIX_TABLE: Final = 0x1000  # any address but 0: it tells Xen that the message is one of MSI-X


class XenLinuxPirq(XenLinux):
    """XenLinux with physical IRQs.

    `pirq_chip` drives them. `pirq_needs_eoi` holds those that Xen wants an EOI for. `io_apic_irqs`: there is an I/O
    APIC, so no IRQ is one of the 8259A's any more (identity_mapped_irq); a domain without one has those 16.
    """

    pirq_chip: IrqChip26

    def __init__(
        self,
        kernel: Kernel[Any],
        irq: IrqLayer26,
        *,
        hz: int,
        nr_pirqs: int,
        start_info: StartInfo | None,
        upcall: str,
    ) -> None:
        super().__init__(kernel, irq, hz=hz, dynirq_base=nr_pirqs, start_info=start_info, upcall=upcall)
        self.nr_pirqs = nr_pirqs
        self.pirq_needs_eoi: set[int] = set()
        self.io_apic_irqs = False
        self._msi: dict[PciDevice, list[int]] = {}
        irq.ignore_unhandled = self.irq_ignore_unhandled
        self.irq_bindcount[:nr_pirqs] = [1] * nr_pirqs  # bound for ever

    def identity_mapped_irq(self, irq: int) -> bool:
        """Is it one of the 8259A's, whose number Xen knows it by?"""
        return irq < NR_IRQS_LEGACY and not self.io_apic_irqs

    def is_legacy_line(self, irq: int) -> bool:
        """Does xen_init_IRQ give it the chip? Outside domain 0 not the RTC, whose driver is to fail its probe."""
        return irq < NR_IRQS_LEGACY and (irq != RTC_IRQ or self.initial)

    def setup_io_apic(self) -> None:
        """Domain 0: all ISA interrupts but the timer's, which is Xen's, are the I/O APIC's now (setup_IO_APIC)."""
        self.io_apic_irqs = True
        for irq in range(NR_IRQS_LEGACY):
            if irq not in (TIMER_IRQ, CASCADE_IRQ):
                with contextlib.suppress(XenError):
                    self._route(irq, irq in LEVEL_ISA_IRQS, False)
                self.evtchn_register_pirq(irq)

    def _route(self, irq: int, level: bool, active_low: bool) -> None:
        """Write the input's entry, by which Xen learns its trigger and maps it to a pirq (io_apic_set_pci_routing).

        Unmasked: it is Xen who masks, and it maps no masked one. XenError.
        """
        vector = physdev.alloc_irq_vector(self.domain, irq)
        pin = irq if irq != TIMER_IRQ else TIMER_PIN
        low = vector | 1 << 8 | 1 << 11 | active_low << 13 | level << 15  # lowest priority, logical
        physdev.apic_write(self.domain, IOAPIC_BASE, 0x11 + 2 * pin, 1 << 24)
        physdev.apic_write(self.domain, IOAPIC_BASE, 0x10 + 2 * pin, low)

    # The chip's functions.

    def _probing(self, desc: IrqDesc26) -> bool:
        """Nobody has requested the line, and yet it starts: then it must not be shared."""
        return not desc.actions

    def startup_pirq(self, desc: IrqDesc26) -> int:
        """Bind the line to a port. Where Xen doesn't give it, the line is dead, and nobody but the log knows."""
        irq = desc.irq
        port = self.evtchn_from_irq(irq)
        if not port:
            pirq = self.evtchn_get_xen_pirq(irq)
            share = not self._probing(desc)
            try:
                port = evtchn.bind_pirq(self.domain, pirq, BIND_PIRQ__WILL_SHARE if share else 0)
            except XenError:
                if share:
                    self.kernel.printk(f"Failed to obtain physical IRQ {irq}")
                return 0
            self.pirq_query_unmask(irq, pirq)
            self.evtchn_to_irq[port] = irq
            self.bind_evtchn_to_cpu(port, 0)
            self.set_irq_info(irq, self.mk_irq_info(IRQT_PIRQ, pirq, port))
        self.pirq_unmask_and_notify(port, irq)
        return 0

    def enable_pirq(self, desc: IrqDesc26) -> None:
        self.startup_pirq(desc)

    def shutdown_pirq(self, desc: IrqDesc26) -> None:
        irq = desc.irq
        port = self.evtchn_from_irq(irq)
        if not port:
            return
        self.mask_evtchn(port)
        self._close(port)
        self.bind_evtchn_to_cpu(port, 0)
        del self.evtchn_to_irq[port]
        self.set_irq_info(irq, self.mk_irq_info(IRQT_PIRQ, self.index_from_irq(irq), 0))

    def end_pirq(self, desc: IrqDesc26) -> None:
        """A line that interrupts though it is disabled is shut down; the next enable brings it back."""
        bits = self.irq.bits
        if desc.status & bits.DISABLED and desc.status & bits.PENDING:
            self.shutdown_pirq(desc)
            return
        port = self.evtchn_from_irq(desc.irq)
        if port:
            self.pirq_unmask_and_notify(port, desc.irq)

    def pirq_unmask_and_notify(self, port: int, irq: int) -> None:
        """Open the port, then tell Xen, which may send the next one at once."""
        self.unmask_evtchn(port)
        if irq in self.pirq_needs_eoi:
            self._pirq_eoi(irq)

    def _pirq_eoi(self, irq: int) -> None:
        with contextlib.suppress(XenError):
            physdev.eoi(self.domain, self.evtchn_get_xen_pirq(irq))

    def pirq_query_unmask(self, irq: int, pirq: int) -> None:
        self.pirq_needs_eoi.discard(irq)
        if self._status_flags(pirq) & XENIRQSTAT_needs_eoi:
            self.pirq_needs_eoi.add(irq)

    def _status_flags(self, pirq: int) -> int:
        try:
            return physdev.irq_status_query(self.domain, pirq)
        except XenError:
            return 0

    def irq_ignore_unhandled(self, irq: int) -> bool:
        """Another domain shares the line: an interrupt that nobody here wants may be its."""
        return irq < self.nr_pirqs and bool(self._status_flags(irq) & XENIRQSTAT_shared)

    # Numbers.

    @abstractmethod
    def setup_pirq_line(self, irq: int) -> None:
        """Give IRQ `irq` the physical chip."""

    @abstractmethod
    def clear_pirq_line(self, irq: int) -> None:
        """Take it away again."""

    def evtchn_register_pirq(self, irq: int) -> None:
        """An I/O APIC input: not to be handed out for a message, and a physical line from now on."""
        if self.identity_mapped_irq(irq) or self.type_from_irq(irq) != IRQT_UNBOUND:
            return
        self.set_irq_info(irq, self.mk_irq_info(IRQT_PIRQ, irq, 0))
        self.setup_pirq_line(irq)

    def find_free_pirq(self) -> int:
        """The highest physical number that nothing is mapped to. IrqError(ENOSPC)."""
        for irq in range(self.nr_pirqs - 1, -1, -1):
            if not self.identity_mapped_irq(irq) and not self.index_from_irq(irq):
                return irq
        raise IrqError(Errno.ENOSPC, "no physical IRQ is free")

    def evtchn_map_pirq(self, irq: int, xen_pirq: int) -> int:
        """The IRQ for a pirq that Xen chose: for `irq` -1 the highest number that is free; for `xen_pirq` 0 give it up.

        IrqError: ENOSPC, and EINVAL where `irq` is another's.
        """
        if irq < 0:
            free = self.find_free_pirq()
            self.set_irq_info(free, self.mk_irq_info(IRQT_PIRQ, xen_pirq, 0))
            self.setup_pirq_line(free)
            return free
        kind, index = self.type_from_irq(irq), self.index_from_irq(irq)
        if not xen_pirq:
            if kind != IRQT_PIRQ:
                raise IrqError(Errno.EINVAL, f"IRQ {irq} is not a pirq")
            self.clear_pirq_line(irq)
            self.set_irq_info(irq, 0)
            return 0
        if kind != IRQT_PIRQ or index != xen_pirq:
            self.kernel.printk(f"IRQ#{irq} is already mapped to {kind}:{index} - cannot map to PIRQ#{xen_pirq}")
            raise IrqError(Errno.EINVAL, f"IRQ {irq} is taken")
        return irq

    def evtchn_get_xen_pirq(self, irq: int) -> int:
        """Xen's number of a physical IRQ."""
        return self.index_from_irq(irq) if self.type_from_irq(irq) == IRQT_PIRQ else irq

    # For drivers of hardware.

    def register_gsi(self, gsi: int, *, level: bool, active_low: bool) -> int:
        """In a guest the line is one that was passed through to it, and set up by domain 0 (pcifront_enable_irq)."""
        if not 0 <= gsi < self.nr_pirqs:
            raise IrqError(Errno.EINVAL, f"no GSI {gsi}")
        if self.initial:
            self._route(gsi, level, active_low)
        self.evtchn_register_pirq(gsi)
        return gsi

    def _wanted_pirq(self) -> int:
        """The number that Xen is to give to the next message, -1 to let it choose."""
        return -1

    def enable_msi(self, device: PciDevice, count: int = 1, *, msix: bool = False) -> list[int]:
        """One message of MSI, or several of MSI-X.

        IrqError: EINVAL for a device that has them already, ENOSPC for more. XenError as PHYSDEVOP_map_pirq.
        """
        if device in self._msi:
            raise IrqError(Errno.EINVAL, "its messages are enabled already")
        if count > 1 and not msix:
            raise IrqError(Errno.ENOSPC, "one message of MSI for a device")
        if device.owner is None:  # the scan of the bus has told Xen of each device
            physdev.pci_device_add(self.domain, device.sbdf)
        irqs = self._msi[device] = []
        try:
            for entry in range(count):
                info = MsiInfo(device.sbdf, entry, MSIX_TABLE if msix else 0)
                pirq = physdev.map_pirq(self.domain, DOMID_SELF, MAP_PIRQ_TYPE_MSI, -1, self._wanted_pirq(), info)
                irqs.append(self.evtchn_map_pirq(-1, pirq))
        except (XenError, IrqError):
            self.disable_msi(device)
            raise
        return list(irqs)

    def disable_msi(self, device: PciDevice) -> None:
        for irq in self._msi.pop(device, []):
            try:
                physdev.unmap_pirq(self.domain, DOMID_SELF, self.evtchn_get_xen_pirq(irq))
            except XenError:
                self.kernel.printk(f"unmap irq {irq:x} failed")
            else:
                self.evtchn_map_pirq(irq, 0)

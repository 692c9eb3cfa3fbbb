"""Physical IRQs of a Linux 6.1 PV kernel: the chip `xen-pirq`, lines, messages, and resume.

From drivers/xen/events/events_base.c and arch/x86/pci/xen.c. A physical IRQ has a number of its own in Xen, the
pirq, which its event channel is bound to only as long as somebody has requested the IRQ. Lines are handled as
edges, or, where they may be shared, with one EOI at the end; either way Xen is told by PHYSDEVOP_eoi where it has
said that it wants to know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final, Protocol

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import BIND_PIRQ__WILL_SHARE
from pvirq.abi.physdev import (
    MAP_PIRQ_TYPE_GSI,
    MAP_PIRQ_TYPE_MSI_SEG,
    MAP_PIRQ_TYPE_MULTI_MSI,
    XENIRQSTAT_needs_eoi,
    XENIRQSTAT_shared,
)
from pvirq.abi.xen import DOMID_SELF, PAGE_SHIFT
from pvirq.linux.events_base import EventsBase
from pvirq.linux.events_info import (
    MASK_EXPLICIT,
    PIRQ_MSI_GROUP,
    PIRQ_NEEDS_EOI,
    PIRQ_SHAREABLE,
    IrqInfo,
    IrqType,
)
from pvirq.linux.irq import IrqChip, IrqDesc, IrqError, IrqLayer
from pvirq.linux.kernel import Kernel
from pvirq.xen import evtchn, physdev
from pvirq.xen.msi import MsiInfo, PciDevice

NR_IRQS_LEGACY: Final = 16
MSIX_TABLE: Final = 0xFEBF_0000  # where a device's table is, as its BAR says; to Xen it means that this is MSI-X


class PciFrontend(Protocol):
    """What brings a guest the messages of a PCI device that it was given (struct xen_pci_frontend_ops)."""

    def enable_msi(self, device: PciDevice, count: int, msix: bool) -> list[int]:
        """The backend maps them; the guest's pirqs. IrqError, XenError."""

    def disable_msi(self, device: PciDevice) -> None:
        """Give them back."""


class EventsPirq(EventsBase):
    """Event channels, with physical IRQs. `initial`: this is the initial domain, whose kernel knows GSIs."""

    initial: bool
    pci_frontend: PciFrontend | None = None

    def __init__(self, kernel: Kernel[Any], irq: IrqLayer, *, event_loop_timeout: int, event_eoi_delay: int) -> None:
        super().__init__(kernel, irq, event_loop_timeout=event_loop_timeout, event_eoi_delay=event_eoi_delay)
        self._eoi_map = 0  # where in memory Xen keeps a bit for each pirq that wants an EOI; 0: nowhere
        self._nr_legacy = 0  # descriptors that are there from the start
        self._pirqs: dict[int, IrqInfo] = {}  # by IRQ, in the order of binding
        self._gsi_to_irq: dict[int, int] = {}
        self._msi: dict[PciDevice, list[int]] = {}
        self.pirq_chip = IrqChip(
            "xen-pirq",
            irq_startup=self._startup_pirq,
            irq_shutdown=self._shutdown_pirq,
            irq_enable=self._enable_dynirq,
            irq_disable=self._disable_dynirq,
            irq_mask=self._disable_dynirq,
            irq_unmask=self._enable_dynirq,
            irq_ack=self._eoi_pirq,
            irq_eoi=self._eoi_pirq,
            irq_mask_ack=self._mask_ack_pirq,
            irq_set_affinity=self._set_affinity_irq,
            irq_retrigger=self._retrigger_dynirq,
        )

    def init_pirqs(self, isa_lines: Mapping[int, bool]) -> None:
        """The end of xen_init_IRQ: the ISA lines that the firmware knows, the map of pirqs that want an EOI.

        `isa_lines`: number -> level-triggered, in the initial domain.
        """
        if self.initial:
            self._nr_legacy = NR_IRQS_LEGACY
            for irq in range(NR_IRQS_LEGACY):
                self.irq.alloc_desc(irq).node = 0
            for irq, level in isa_lines.items():
                try:
                    self._register_pirq(irq, level)
                except IrqError:
                    continue  # it is in the log
        machine = self.domain.machine
        mfn = machine.alloc(1, self.domain.domid)
        try:
            physdev.pirq_eoi_gmfn(self.domain, mfn, 2)
        except XenError:
            machine.free(mfn)
        else:
            self._eoi_map = mfn << PAGE_SHIFT

    # The chip.

    def _pirq_query_unmask(self, info: IrqInfo) -> None:
        try:
            flags = physdev.irq_status_query(self.domain, info.index)
        except XenError:
            flags = 0
        info.flags &= ~PIRQ_NEEDS_EOI
        if flags & XENIRQSTAT_needs_eoi:
            info.flags |= PIRQ_NEEDS_EOI

    def _pirq_needs_eoi(self, info: IrqInfo) -> bool:
        if self._eoi_map:
            pirq = info.index
            return bool(self.domain.machine.mem[self._eoi_map + (pirq >> 3)] >> (pirq & 7) & 1)
        return bool(info.flags & PIRQ_NEEDS_EOI)

    def _eoi_pirq(self, desc: IrqDesc) -> None:
        info = desc.chip_data
        if isinstance(info, IrqInfo) and info.evtchn:
            info.is_active = False
            self.ops.clear_pending(info.evtchn)
            if self._pirq_needs_eoi(info):
                with contextlib.suppress(XenError):  # the kernel only warns
                    physdev.eoi(self.domain, info.index)

    def _mask_ack_pirq(self, desc: IrqDesc) -> None:
        self._disable_dynirq(desc)
        self._eoi_pirq(desc)

    def _startup_pirq(self, desc: IrqDesc) -> None:
        """Bind the pirq to a port of CPU 0. What fails is a line in the log: the IRQ is requested, and silent."""
        info = desc.chip_data
        assert isinstance(info, IrqInfo)
        if not info.evtchn:
            flags = BIND_PIRQ__WILL_SHARE if info.flags & PIRQ_SHAREABLE else 0
            try:
                port = evtchn.bind_pirq(self.domain, info.index, flags)
            except XenError:
                self.kernel.printk(f"xen:events: Failed to obtain physical IRQ {desc.irq}")
                return
            self._pirq_query_unmask(info)
            try:
                self._setup(info, IrqType.PIRQ, port, 0, False)
            except XenError as error:
                self.kernel.printk(
                    f"xen:events: irq{desc.irq}: Failed to set port to irq mapping ({-int(error.errno)})"
                )
                return
        self._do_unmask(info, MASK_EXPLICIT)
        self._eoi_pirq(desc)

    def _shutdown_pirq(self, desc: IrqDesc) -> None:
        info = desc.chip_data
        if isinstance(info, IrqInfo) and info.evtchn:
            self._do_mask(info, MASK_EXPLICIT)
            self._close(info)

    # Lines.

    def xen_irq_from_gsi(self, gsi: int) -> int:
        """The IRQ of a GSI, -1 without."""
        return self._gsi_to_irq.get(gsi, -1)

    def xen_irq_from_pirq(self, pirq: int) -> int:
        """The IRQ of a pirq, -1 without."""
        return next((irq for irq, info in self._pirqs.items() if info.index == pirq), -1)

    def xen_pirq_from_irq(self, irq: int) -> int:
        """The pirq of an IRQ. IrqError(EINVAL) for a number without one."""
        return self._pirq_info(irq).index

    def _pirq_info(self, irq: int) -> IrqInfo:
        info = self._pirqs.get(irq)
        if info is None:
            raise IrqError(Errno.EINVAL, f"IRQ {irq} is not a physical one")
        return info

    def xen_test_irq_shared(self, irq: int) -> bool:
        """Has no other guest this line? (As the kernel's function has it, its name notwithstanding.)"""
        try:
            flags = physdev.irq_status_query(self.domain, self._pirq_info(irq).index)
        except XenError:
            return False
        return not flags & XENIRQSTAT_shared

    def _pirq_setup(self, desc: IrqDesc, pirq: int, gsi: int, domid: int, flags: int) -> IrqInfo:
        info = IrqInfo(desc, IrqType.PIRQ, index=pirq, gsi=gsi, domid=domid, flags=flags, mask_reason=MASK_EXPLICIT)
        desc.chip_data = self._pirqs[desc.irq] = info
        if gsi:
            self._gsi_to_irq[gsi] = desc.irq
        return info

    def xen_bind_pirq_gsi_to_irq(self, gsi: int, pirq: int, shareable: bool, name: str) -> int:
        """The IRQ of a GSI, made if it has none: in the initial domain with the GSI's number.

        Shareable means level-triggered. IrqError: EEXIST, ENOSPC.
        """
        known = self.xen_irq_from_gsi(gsi)
        if known != -1:
            self.kernel.printk(f"xen:events: xen_bind_pirq_gsi_to_irq: returning irq {known} for gsi {gsi}")
            return known
        if not self.initial:
            desc = self.irq.alloc_desc()
        elif gsi < self._nr_legacy:
            desc = self.irq.desc(gsi)
        else:
            desc = self.irq.alloc_desc(gsi)
        if self.initial:
            try:
                physdev.alloc_irq_vector(self.domain, desc.irq)
            except XenError as error:
                if gsi >= self._nr_legacy:
                    self.irq.free_desc(desc.irq)
                raise IrqError(Errno.ENOSPC, f"GSI {gsi} gets no vector: {error.why}") from error
        info = self._pirq_setup(desc, pirq, gsi, DOMID_SELF, PIRQ_SHAREABLE if shareable else 0)
        self._pirq_query_unmask(info)
        flow = self.irq.handle_fasteoi_irq if shareable else self.irq.handle_edge_irq
        self.irq.set_chip_and_handler_name(desc, self.pirq_chip, flow, name)
        return desc.irq

    def _register_pirq(self, gsi: int, level: bool) -> int:
        """Map the GSI to the pirq of the same number, in the initial domain (xen_register_pirq)."""
        irq = self.xen_irq_from_gsi(gsi)
        if irq > 0:
            return irq
        try:
            pirq = physdev.map_pirq(self.domain, DOMID_SELF, MAP_PIRQ_TYPE_GSI, gsi, gsi)
        except XenError as error:
            self.kernel.printk(f"xen map irq failed {-int(error.errno)}")
            raise IrqError(Errno.EINVAL, f"no GSI {gsi}: {error.why}") from error
        irq = self.xen_bind_pirq_gsi_to_irq(gsi, pirq, level, "ioapic-level" if level else "ioapic-edge")
        self.kernel.printk(f"xen: --> pirq={pirq} -> irq={irq} (gsi={gsi})")
        return irq

    def register_gsi(self, gsi: int, *, level: bool, active_low: bool) -> int:
        """A device's line: its IRQ, and Xen is told how it is triggered (xen_register_gsi).

        In a guest, `gsi` is the pirq that its PCI frontend found (xen_pcifront_enable_irq). IrqError(EINVAL) where
        there is no such line.
        """
        printk = self.kernel.printk
        if not self.initial:
            return self.xen_bind_pirq_gsi_to_irq(gsi, gsi, True, "pcifront")
        printk(f"xen: registering gsi {gsi} triggering {int(not level)} polarity {int(active_low)}")
        irq = self._register_pirq(gsi, level)
        try:
            physdev.setup_gsi(self.domain, gsi, int(level), int(active_low))
        except XenError as error:
            if error.errno == Errno.EEXIST:
                printk(f"Already setup the GSI :{gsi}")
            else:
                printk(f"Failed to setup GSI :{gsi}, err_code:{-int(error.errno)}")
        return irq

    # Messages.

    def xen_bind_pirq_msi_to_irq(self, pirqs: list[int], name: str, domid: int = DOMID_SELF) -> list[int]:
        """IRQs in a row for pirqs that were mapped together (one, or a group of MSI). IrqError(ENOSPC)."""
        first = self.irq.alloc_range(len(pirqs))
        irqs = []
        for i, pirq in enumerate(pirqs):
            desc = self.irq.alloc_desc(first + i)
            self.irq.set_chip_and_handler_name(desc, self.pirq_chip, self.irq.handle_edge_irq, name)
            self._pirq_setup(desc, pirq, 0, domid, PIRQ_MSI_GROUP if i else 0)
            irqs.append(desc.irq)
        return irqs

    def xen_destroy_irq(self, irq: int) -> None:
        """Unmap the pirq and forget the IRQ, whose handlers have gone. XenError where Xen doesn't unmap it."""
        info = self._pirq_info(irq)
        if self.initial and not info.flags & PIRQ_MSI_GROUP:
            try:
                physdev.unmap_pirq(self.domain, info.domid, info.index)
            except XenError as error:
                if error.errno != Errno.ESRCH or info.domid == DOMID_SELF:
                    self.kernel.printk(f"xen:events: unmap irq failed {-int(error.errno)}")
                    raise
                self.kernel.printk(f"xen:events: domain {info.domid} does not have {info.index} anymore")
        self._free_irq(info)

    def _free_irq(self, info: IrqInfo) -> None:
        if self._pirqs.pop(info.irq, None) is not None:
            self._gsi_to_irq.pop(info.gsi, None)
        if info.irq < self._nr_legacy:  # a descriptor of the architecture's, which stays
            self.lateeoi.forget(info)
            info.desc.chip_data = None
        else:
            super()._free_irq(info)

    def enable_msi(self, device: PciDevice, count: int = 1, *, msix: bool = False) -> list[int]:
        """IRQs for a device's first `count` messages: several of MSI are one group, of MSI-X each is its own.

        In a guest its PCI frontend gets the pirqs. XenError as PHYSDEVOP_map_pirq; IrqError: EINVAL for a device
        that has them already, ENOSPC where several of MSI can't be had, ENOSYS without a frontend.
        """
        if device in self._msi:
            raise IrqError(Errno.EINVAL, "its messages are enabled already")
        if not self.initial and not msix and count > 1:
            raise IrqError(Errno.ENOSPC, "one message of MSI for a guest's device")
        groups = self._map_msi(device, count, msix) if self.initial else self._frontend_msi(device, count, msix)
        name = ("" if self.initial else "pcifront-") + ("msi-x" if msix else "msi")
        irqs: list[int] = []
        for pirqs in groups:
            irqs += self.xen_bind_pirq_msi_to_irq(pirqs, name)
        self._msi[device] = irqs
        return irqs

    def _map_msi(self, device: PciDevice, count: int, msix: bool) -> list[list[int]]:
        """xen_initdom_setup_msi_irqs"""
        domain = self.domain
        if device.owner is None:
            physdev.pci_device_add(domain, device.sbdf)  # on the real one, as the bus is scanned (drivers/xen/pci.c)
        if not msix and count > 1:
            info = MsiInfo(device.sbdf, count)
            try:
                first = physdev.map_pirq(domain, DOMID_SELF, MAP_PIRQ_TYPE_MULTI_MSI, -1, -1, info)
            except XenError as error:
                raise IrqError(Errno.ENOSPC, f"not several messages of MSI: {error.why}") from error
            return [[first + i for i in range(count)]]
        groups: list[list[int]] = []
        try:
            for entry in range(count):
                info = MsiInfo(device.sbdf, entry, MSIX_TABLE if msix else 0)
                groups.append([physdev.map_pirq(domain, DOMID_SELF, MAP_PIRQ_TYPE_MSI_SEG, -1, -1, info)])
        except XenError as error:
            self.kernel.printk(f"xen map irq failed {-int(error.errno)} for {DOMID_SELF} domain")
            for pirqs in groups:
                physdev.unmap_pirq(domain, DOMID_SELF, pirqs[0])
            raise
        return groups

    def _frontend_msi(self, device: PciDevice, count: int, msix: bool) -> list[list[int]]:
        """xen_setup_msi_irqs"""
        if self.pci_frontend is None:
            self.kernel.printk("Xen PCI frontend has not registered MSI/MSI-X support!")
            raise IrqError(Errno.ENOSYS, "no PCI frontend")
        return [[pirq] for pirq in self.pci_frontend.enable_msi(device, count, msix)]

    def disable_msi(self, device: PciDevice) -> None:
        """Give them back, after free_irq (xen_pv_teardown_msi_irqs). XenError where Xen doesn't unmap one."""
        irqs = self._msi.pop(device, [])
        if irqs and self.pci_frontend is not None:
            self.pci_frontend.disable_msi(device)
        for irq in irqs:
            self.xen_destroy_irq(irq)

    # Resume.

    def irq_resume(self) -> None:
        """All channels are gone, the domain is another one to Xen (xen_irq_resume).

        VIRQs and IPIs get new ports and keep their IRQs; so do lines. Other IRQs are left without a port, until
        their drivers bind a new one. Nothing is open before the lines are resumed (`irq_pm`). XenError where Xen
        refuses what it allowed before.
        """
        self.ops.resume(self.irq.online)
        for desc in self.irq.descs.values():
            if isinstance(desc.chip_data, IrqInfo):
                desc.chip_data.evtchn = 0
                self._channels_on_cpu_dec(desc.chip_data)
        self._evtchn_to_irq.clear()
        for cpu in range(self.irq.nr_cpus):
            for virq, irq in enumerate(self._virq_to_irq[cpu]):
                if irq != -1:
                    port = evtchn.bind_virq(self.domain, virq, cpu)
                    self._setup(self.info(irq), IrqType.VIRQ, port, cpu, False)
            for irq in self._ipi_to_irq[cpu]:
                if irq != -1:
                    self._setup(self.info(irq), IrqType.IPI, evtchn.bind_ipi(self.domain, cpu), cpu, False)
        self._restore_pirqs()

    def _restore_pirqs(self) -> None:
        """Only lines: a message's device doesn't survive this."""
        for irq, info in list(self._pirqs.items()):
            if not info.gsi:
                continue
            try:
                physdev.map_pirq(self.domain, DOMID_SELF, MAP_PIRQ_TYPE_GSI, info.gsi, info.index)
            except XenError as error:
                failed = f"gsi={info.gsi} irq={irq} pirq={info.index} rc={-int(error.errno)}"
                self.kernel.printk(f"xen:events: xen map irq failed {failed}")
                self._free_irq(info)
                continue
            self.kernel.printk(f"xen: --> irq={irq}, pirq={info.index}")
            self._startup_pirq(info.desc)

    def rebind_evtchn_irq(self, port: int, irq: int) -> None:
        """After resume: give an IRQ a new port, of CPU 0 (rebind_evtchn_irq).

        IrqError(EINVAL) for an IRQ without channel; XenError where the event array can't grow.
        """
        info = self.info(irq)
        self.irq.disable_irq(irq)
        self._setup(info, IrqType.EVTCHN, port, 0, False)
        info.dev = None
        self.irq.enable_irq(irq)

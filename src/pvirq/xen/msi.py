"""PCI devices and their message-signalled interrupts, as Xen keeps them (arch/x86/msi.c, drivers/passthrough/pci.c).

A device's driver in domain 0 maps a message to a pirq (PHYSDEVOP_map_pirq) and binds that; the device then raises it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.xen.irq import IRQ_GUEST, NO_IRQ_TYPE, IrqDesc, IrqHandler, Irqs
from pvirq.xen.lapic import LocalApic

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor

MAX_MSI_IRQS: Final = 32


class Message:
    """What a device holds for one of its messages: the vector and the CPUs it goes to, the mask and the pending bit.

    The pending bit is the device's own: it stays while nobody has mapped the message.
    """

    __slots__ = ("dest", "masked", "pending", "vector")

    def __init__(self, masked: bool) -> None:
        self.dest = 0
        self.vector = 0
        self.masked = masked
        self.pending = False


class MsiDesc:
    """A message that is mapped (struct msi_desc), and who masks it. `nvec`: in the first of several MSIs, how many.

    One message may be mapped to several irqs; it goes to the one that was mapped or bound last.
    """

    __slots__ = ("device", "entry_nr", "guest_masked", "host_masked", "irq", "maskable", "message", "msix", "nvec")

    def __init__(self, device: PciDevice, entry_nr: int, irq: int, nvec: int) -> None:
        self.device = device
        self.entry_nr = entry_nr
        self.irq = irq
        self.nvec = nvec
        self.msix = device.msix
        self.maskable = device.msix or device.maskable
        self.host_masked = self.maskable
        self.guest_masked = device.msix
        self.message = device.messages[entry_nr]
        self.message.masked = self.maskable

    def set_mask(self, host: bool, guest: bool) -> None:
        """msi_set_mask_bit; what waits goes out at unmask."""
        if self.maskable:
            self.host_masked, self.guest_masked = host, guest
            self.message.masked = host or guest
            self.device.send_pending(self.message)

    def write(self, dest: int, vector: int) -> None:
        """Where it goes from now on (write_msi_msg).

        Each of several MSIs has a vector of its own here. On hardware they share a register and differ in the low bits
        of the vector, which Xen doesn't line up without an IOMMU: it refuses them, unless their pirqs are given.
        """
        self.message.dest = dest
        self.message.vector = vector


class PciDevice:
    """A PCI function: `sbdf` (segment, bus, device and function, as in Xen), `vectors` it can raise, MSI-X or MSI.

    `maskable`: its MSIs have mask bits, as most devices' have not; those of MSI-X always do. With no `vectors` it has
    no messages at all. `owner` is the domain that it belongs to, once domain 0 has told Xen of it. `enabled` is the
    enable bit of its capability, which a driver sets when it has mapped a message. `sent` counts the messages that it
    wrote, `held` those that waited for the mask bit to go; one that waits stands for all that follow.
    """

    def __init__(
        self, hypervisor: Hypervisor, sbdf: int, *, vectors: int = 1, msix: bool = False, maskable: bool = False
    ) -> None:
        self.hypervisor = hypervisor
        self.sbdf = sbdf
        self.vectors = vectors
        self.msix = msix
        self.maskable = maskable
        self.owner: Domain | None = None
        self.enabled = False
        self.msix_reserved = 0  # PHYSDEVOP_prepare_msix holds the table
        self.messages = [Message(masked=msix) for _ in range(vectors)]
        self.descs: list[MsiDesc] = []
        self.sent = 0
        self.held = 0
        hypervisor.irqs.bus[sbdf] = self

    def raise_msi(self, entry: int = 0) -> bool:
        """The device writes message `entry`. False: it is not enabled, or masked at the device, so nothing is sent."""
        if not self.enabled or not 0 <= entry < self.vectors:
            return False
        message = self.messages[entry]
        if message.masked:
            if not message.pending:
                message.pending = True
                self.held += 1
            return False
        self._send(message)
        return True

    def _send(self, message: Message) -> None:
        self.sent += 1
        self.hypervisor.irqs.apics.request(message.dest, message.vector)

    def send_pending(self, message: Message) -> None:
        if message.pending and self.enabled and not message.masked:
            message.pending = False
            self._send(message)


class MaskableHandler(IrqHandler):
    typename = "PCI-MSI/-X"

    def __init__(self, irqs: Irqs) -> None:
        self.irqs = irqs

    def _mask(self, desc: IrqDesc, host: bool) -> None:
        msi = desc.msi_desc
        assert msi is not None
        msi.set_mask(host, msi.guest_masked)

    def startup(self, desc: IrqDesc) -> None:
        """A guest's stays masked until its port is set up (guest_unmask_msi)."""
        msi = desc.msi_desc
        assert msi is not None
        msi.set_mask(False, bool(desc.status & IRQ_GUEST))

    def shutdown(self, desc: IrqDesc) -> None:
        msi = desc.msi_desc
        if msi is not None:
            msi.set_mask(True, True)

    def enable(self, desc: IrqDesc) -> None:
        self._mask(desc, False)

    def disable(self, desc: IrqDesc) -> None:
        self._mask(desc, True)

    def ack(self, desc: IrqDesc, apic: LocalApic) -> None:
        self.irqs.move_native(desc)
        self.irqs.apics.eoi(apic)

    def set_affinity(self, desc: IrqDesc, cpus: int) -> None:
        """set_msi_affinity"""
        dest = self.irqs.set_desc_affinity(desc, cpus)
        if dest and desc.msi_desc is not None:
            desc.msi_desc.write(dest, desc.vector)


class NonmaskableHandler(MaskableHandler):
    """Nothing can hold it back but the EOI that the guest owes."""

    typename = "PCI-MSI"
    has_end = True

    def startup(self, desc: IrqDesc) -> None: ...

    def shutdown(self, desc: IrqDesc) -> None: ...

    def enable(self, desc: IrqDesc) -> None: ...

    def disable(self, desc: IrqDesc) -> None: ...

    def ack(self, desc: IrqDesc, apic: LocalApic) -> None:
        self.irqs.move_native(desc)

    def end(self, desc: IrqDesc, apic: LocalApic) -> None:
        self.irqs.apics.eoi(apic)


class MsiInfo:
    """What a caller of map_pirq says of its message (struct msi_info); `table_base` not 0 for MSI-X."""

    __slots__ = ("entry_nr", "sbdf", "table_base")

    def __init__(self, sbdf: int, entry_nr: int = 0, table_base: int = 0) -> None:
        self.sbdf = sbdf
        self.entry_nr = entry_nr
        self.table_base = table_base


def pci_enable_msi(irqs: Irqs, info: MsiInfo, irq: int) -> list[MsiDesc]:
    """Take a device's message, or its first `entry_nr` MSIs, for `irq` (pci_enable_msi); their descriptors.

    Raises ENODEV (no such device or capability), EINVAL (entry); ENFILE for more MSIs than it has, with that number in
    `info.entry_nr`. A message that is mapped already is mapped once more.
    """
    device = irqs.pci.get(info.sbdf)
    msix = bool(info.table_base)
    if device is None or not device.vectors or device.msix != msix:
        raise XenError(Errno.ENODEV, f"no such messages of device {info.sbdf:#x}")
    if msix:
        if not 0 <= info.entry_nr < device.vectors:
            raise XenError(Errno.EINVAL, f"device {info.sbdf:#x} has no message {info.entry_nr}")
        descs = [MsiDesc(device, info.entry_nr, irq, 1)]
    else:
        if not info.entry_nr:
            raise XenError(Errno.EINVAL, "no message at all")  # where Xen 4.17 runs out of its array
        if not 0 < info.entry_nr <= device.vectors:
            info.entry_nr = device.vectors
            raise XenError(Errno.ENFILE, f"device {info.sbdf:#x} has {device.vectors} messages")
        descs = [MsiDesc(device, i, irq, info.entry_nr if i == 0 else 0) for i in range(info.entry_nr)]
    device.descs += descs
    return descs


def pci_disable_msi(descs: list[MsiDesc]) -> None:
    """These mappings end; the device raises the messages no more (pci_disable_msi)."""
    for desc in descs:
        device = desc.device
        device.descs.remove(desc)
        desc.message.masked = desc.maskable
        if not device.msix or not device.descs:
            device.enabled = False


def setup_msi_irq(irqs: Irqs, desc: IrqDesc, msi: MsiDesc) -> None:
    """Write the message: from now on the device can raise it, unless it is masked (setup_msi_irq)."""
    desc.msi_desc = msi
    desc.handler = irqs.msi_maskable if msi.maskable else irqs.msi_nonmaskable
    msi.irq = desc.irq
    msi.write(desc.cpu_mask, desc.vector)
    msi.device.enabled = True


def guest_unmask_msi(desc: IrqDesc) -> None:
    """The guest has bound it (arch_evtchn_bind_pirq)."""
    msi = desc.msi_desc
    if msi is not None:
        msi.set_mask(msi.host_masked, False)


# -- the devices that Xen knows of -------------------------------------------------------------------------------------


def pci_add_device(hypervisor: Hypervisor, sbdf: int) -> PciDevice:
    """Domain 0 has found a device (pci_add_device): it is domain 0's now, unless somebody has it. Xen believes it that
    there is one; a device that isn't on the bus has no messages."""
    irqs = hypervisor.irqs
    device = irqs.bus.get(sbdf)
    if device is None:
        device = PciDevice(hypervisor, sbdf, vectors=0)
    irqs.pci[sbdf] = device
    if device.owner is None:
        device.owner = hypervisor.domains.get(0)
    irqs.log.append(f"PCI add device {name(sbdf)}")
    return device


def pci_remove_device(hypervisor: Hypervisor, sbdf: int) -> None:
    """pci_remove_device: its messages are gone with it. ENODEV."""
    irqs = hypervisor.irqs
    device = irqs.pci.pop(sbdf, None)
    if device is None:
        raise XenError(Errno.ENODEV, f"no device {name(sbdf)}")
    for msi in list(device.descs):
        pci_disable_msi([msi])
        if irqs.desc(msi.irq).handler is not NO_IRQ_TYPE:
            irqs.destroy(msi.irq)
    device.owner = None
    if not device.vectors:
        del irqs.bus[sbdf]
    irqs.log.append(f"PCI remove device {name(sbdf)}")


def assign_device(hypervisor: Hypervisor, sbdf: int, domain: Domain) -> None:
    """Give a device to a domain (XEN_DOMCTL_assign_device and deassign). ENODEV."""
    device = hypervisor.irqs.pci.get(sbdf)
    if device is None:
        raise XenError(Errno.ENODEV, f"no device {name(sbdf)}")
    device.owner = domain


def sbdf_of(segment: int, bus: int, devfn: int) -> int:
    """PCI_SBDF"""
    return (segment & 0xFFFF) << 16 | (bus & 0xFF) << 8 | devfn & 0xFF


def name(sbdf: int) -> str:
    """As Xen prints it (%pp)."""
    return f"{sbdf >> 16:04x}:{sbdf >> 8 & 0xFF:02x}:{sbdf >> 3 & 0x1F:02x}.{sbdf & 7}"

"""physdev_op: I/O privilege, which is the vCPU's, and physical interrupts (xen/arch/x86/physdev.c) by `xen.physdev`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvirq.abi import physdev as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.pv.addresses import addr_ok
from pvirq.pv.hypercalls.protocol import int32
from pvirq.xen import physdev
from pvirq.xen.msi import MsiInfo, sbdf_of

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

MAX_IO_PORTS: Final = 65536


def _set_iopl(cpu: PvVcpu, argument: int) -> None:
    (iopl,) = abi.PHYSDEV_SET_IOPL.unpack(cpu.read(argument, abi.PHYSDEV_SET_IOPL.size))
    if iopl > 3:
        raise XenError(Errno.EINVAL, f"I/O privilege level {iopl}")
    cpu.iopl = iopl << 12


def _set_iobitmap(cpu: PvVcpu, argument: int) -> None:
    bitmap, ports = abi.PHYSDEV_SET_IOBITMAP.unpack(cpu.read(argument, abi.PHYSDEV_SET_IOBITMAP.size))
    if ports > MAX_IO_PORTS or not addr_ok(bitmap):
        raise XenError(Errno.EINVAL, f"bitmap of {ports} ports at {bitmap:#x}")
    cpu.io_bitmap = (bitmap, ports)


def _eoi(cpu: PvVcpu, argument: int) -> None:
    (irq,) = abi.PHYSDEV_EOI.unpack(cpu.read(argument, abi.PHYSDEV_EOI.size))
    physdev.eoi(cpu.domain, irq)


def _irq_unmask_notify(cpu: PvVcpu, argument: int) -> None:
    physdev.irq_unmask_notify(cpu.domain)


def _pirq_eoi_gmfn(version: int) -> Callable[[PvVcpu, int], None]:
    def operation(cpu: PvVcpu, argument: int) -> None:
        (gmfn,) = abi.PHYSDEV_PIRQ_EOI_GMFN.unpack(cpu.read(argument, abi.PHYSDEV_PIRQ_EOI_GMFN.size))
        physdev.pirq_eoi_gmfn(cpu.domain, gmfn, version)

    return operation


def _irq_status_query(cpu: PvVcpu, argument: int) -> None:
    irq, _ = abi.PHYSDEV_IRQ_STATUS_QUERY.unpack(cpu.read(argument, abi.PHYSDEV_IRQ_STATUS_QUERY.size))
    flags = physdev.irq_status_query(cpu.domain, irq)
    cpu.write(argument, abi.PHYSDEV_IRQ_STATUS_QUERY.pack(irq, flags))


def _map_pirq(cpu: PvVcpu, argument: int) -> None:
    """What was asked for goes back even where it is refused, with the type that Xen knows for it."""
    domid, pad, kind, index, pirq, bus, devfn, entry_nr, pad2, table_base = abi.PHYSDEV_MAP_PIRQ.unpack(
        cpu.read(argument, abi.PHYSDEV_MAP_PIRQ.size)
    )
    segment = bus >> 16 if kind in (abi.MAP_PIRQ_TYPE_MSI_SEG, abi.MAP_PIRQ_TYPE_MULTI_MSI) else 0
    info = MsiInfo(sbdf_of(segment, bus, devfn), entry_nr, table_base)
    if kind == abi.MAP_PIRQ_TYPE_MSI_SEG:
        kind = abi.MAP_PIRQ_TYPE_MSI
    if kind == abi.MAP_PIRQ_TYPE_MULTI_MSI and table_base:
        raise XenError(Errno.EINVAL, "several messages of MSI-X")
    try:
        pirq = physdev.map_pirq(cpu.domain, domid, kind, index, pirq, info)
    finally:
        if kind == abi.MAP_PIRQ_TYPE_MULTI_MSI:
            entry_nr = info.entry_nr
        packed = abi.PHYSDEV_MAP_PIRQ.pack(domid, pad, kind, index, pirq, bus, devfn, entry_nr, pad2, table_base)
        cpu.write(argument, packed)


def _unmap_pirq(cpu: PvVcpu, argument: int) -> None:
    domid, pirq = abi.PHYSDEV_UNMAP_PIRQ.unpack(cpu.read(argument, abi.PHYSDEV_UNMAP_PIRQ.size))
    physdev.unmap_pirq(cpu.domain, domid, pirq)


def _get_free_pirq(cpu: PvVcpu, argument: int) -> None:
    kind, _ = abi.PHYSDEV_GET_FREE_PIRQ.unpack(cpu.read(argument, abi.PHYSDEV_GET_FREE_PIRQ.size))
    pirq = physdev.get_free_pirq(cpu.domain, kind)
    cpu.write(argument, abi.PHYSDEV_GET_FREE_PIRQ.pack(kind, pirq))


def _apic_read(cpu: PvVcpu, argument: int) -> None:
    base, register, value = abi.PHYSDEV_APIC.unpack(cpu.read(argument, abi.PHYSDEV_APIC.size))
    value = physdev.apic_read(cpu.domain, base, register)
    cpu.write(argument, abi.PHYSDEV_APIC.pack(base, register, value))


def _apic_write(cpu: PvVcpu, argument: int) -> None:
    base, register, value = abi.PHYSDEV_APIC.unpack(cpu.read(argument, abi.PHYSDEV_APIC.size))
    physdev.apic_write(cpu.domain, base, register, value)


def _alloc_irq_vector(cpu: PvVcpu, argument: int) -> None:
    irq, _ = abi.PHYSDEV_IRQ.unpack(cpu.read(argument, abi.PHYSDEV_IRQ.size))
    cpu.write(argument, abi.PHYSDEV_IRQ.pack(irq, physdev.alloc_irq_vector(cpu.domain, irq)))


def _setup_gsi(cpu: PvVcpu, argument: int) -> None:
    gsi, triggering, polarity = abi.PHYSDEV_SETUP_GSI.unpack(cpu.read(argument, abi.PHYSDEV_SETUP_GSI.size))
    physdev.setup_gsi(cpu.domain, gsi, triggering, polarity)


def _manage_pci_add(cpu: PvVcpu, argument: int) -> None:
    bus, devfn = abi.PHYSDEV_MANAGE_PCI.unpack(cpu.read(argument, abi.PHYSDEV_MANAGE_PCI.size))
    physdev.pci_device_add(cpu.domain, sbdf_of(0, bus, devfn))


def _manage_pci_remove(cpu: PvVcpu, argument: int) -> None:
    bus, devfn = abi.PHYSDEV_MANAGE_PCI.unpack(cpu.read(argument, abi.PHYSDEV_MANAGE_PCI.size))
    physdev.pci_device_remove(cpu.domain, sbdf_of(0, bus, devfn))


def _manage_pci_add_ext(cpu: PvVcpu, argument: int) -> None:
    bus, devfn, is_extfn, is_virtfn, physfn_bus, physfn_devfn = abi.PHYSDEV_MANAGE_PCI_EXT.unpack(
        cpu.read(argument, abi.PHYSDEV_MANAGE_PCI_EXT.size)
    )
    if is_extfn > 1 or is_virtfn > 1:
        raise XenError(Errno.EINVAL, f"extended {is_extfn}, virtual {is_virtfn}")
    physdev.pci_device_add(
        cpu.domain, sbdf_of(0, bus, devfn), sbdf_of(0, physfn_bus, physfn_devfn) if is_virtfn else None
    )


def _pci_device_add(cpu: PvVcpu, argument: int) -> None:
    segment, bus, devfn, flags, physfn_bus, physfn_devfn = abi.PHYSDEV_PCI_DEVICE_ADD.unpack(
        cpu.read(argument, abi.PHYSDEV_PCI_DEVICE_ADD.size)
    )
    if flags & abi.XEN_PCI_DEV_PXM:
        cpu.read(argument + abi.PHYSDEV_PCI_DEVICE_ADD.size, 4)  # the node, which makes no difference here
    physfn = sbdf_of(segment, physfn_bus, physfn_devfn) if flags & abi.XEN_PCI_DEV_VIRTFN else None
    physdev.pci_device_add(cpu.domain, sbdf_of(segment, bus, devfn), physfn)


def _pci_device(operation: Callable[..., None], *arguments: object) -> Callable[[PvVcpu, int], None]:
    """An operation whose argument is a device with its segment."""

    def handler(cpu: PvVcpu, argument: int) -> None:
        segment, bus, devfn = abi.PHYSDEV_PCI_DEVICE.unpack(cpu.read(argument, abi.PHYSDEV_PCI_DEVICE.size))
        operation(cpu.domain, sbdf_of(segment, bus, devfn), *arguments)

    return handler


def _restore_msi(cpu: PvVcpu, argument: int) -> None:
    bus, devfn = abi.PHYSDEV_MANAGE_PCI.unpack(cpu.read(argument, abi.PHYSDEV_MANAGE_PCI.size))
    physdev.restore_msi(cpu.domain, sbdf_of(0, bus, devfn))


def _pci_mmcfg_reserved(cpu: PvVcpu, argument: int) -> None:
    if not cpu.domain.privileged:
        raise XenError(Errno.EPERM, "memory-mapped configuration space")
    cpu.read(argument, abi.PHYSDEV_PCI_MMCFG_RESERVED.size)
    raise XenError(Errno.ENODEV, "the host has no memory-mapped configuration space")


def _dbgp_op(cpu: PvVcpu, argument: int) -> None:
    """Nothing to do without a USB debug port."""
    if cpu.domain.domid:
        raise XenError(Errno.EPERM, "the debug port")
    cpu.read(argument, abi.PHYSDEV_DBGP_OP.size)


_OPERATIONS: Final[dict[int, Callable[[PvVcpu, int], None]]] = {
    abi.PHYSDEVOP_IRQ_UNMASK_NOTIFY: _irq_unmask_notify,
    abi.PHYSDEVOP_irq_status_query: _irq_status_query,
    abi.PHYSDEVOP_set_iopl: _set_iopl,
    abi.PHYSDEVOP_set_iobitmap: _set_iobitmap,
    abi.PHYSDEVOP_apic_read: _apic_read,
    abi.PHYSDEVOP_apic_write: _apic_write,
    abi.PHYSDEVOP_alloc_irq_vector: _alloc_irq_vector,
    abi.PHYSDEVOP_eoi: _eoi,
    abi.PHYSDEVOP_map_pirq: _map_pirq,
    abi.PHYSDEVOP_unmap_pirq: _unmap_pirq,
    abi.PHYSDEVOP_manage_pci_add: _manage_pci_add,
    abi.PHYSDEVOP_manage_pci_remove: _manage_pci_remove,
    abi.PHYSDEVOP_manage_pci_add_ext: _manage_pci_add_ext,
    abi.PHYSDEVOP_pirq_eoi_gmfn_v1: _pirq_eoi_gmfn(1),
    abi.PHYSDEVOP_pirq_eoi_gmfn_v2: _pirq_eoi_gmfn(2),
    abi.PHYSDEVOP_restore_msi: _restore_msi,
    abi.PHYSDEVOP_restore_msi_ext: _pci_device(physdev.restore_msi),
    abi.PHYSDEVOP_setup_gsi: _setup_gsi,
    abi.PHYSDEVOP_get_free_pirq: _get_free_pirq,
    abi.PHYSDEVOP_pci_mmcfg_reserved: _pci_mmcfg_reserved,
    abi.PHYSDEVOP_pci_device_add: _pci_device_add,
    abi.PHYSDEVOP_pci_device_remove: _pci_device(physdev.pci_device_remove),
    abi.PHYSDEVOP_dbgp_op: _dbgp_op,
    abi.PHYSDEVOP_prepare_msix: _pci_device(physdev.prepare_msix),
    abi.PHYSDEVOP_release_msix: _pci_device(physdev.prepare_msix, True),
}


def physdev_op(cpu: PvVcpu, command: int, argument: int) -> int:
    """HYPERVISOR_physdev_op (do_physdev_op). Raises ENOSYS, and what the operation does."""
    operation = _OPERATIONS.get(int32(command))
    if operation is None:
        raise XenError(Errno.ENOSYS, f"physdev_op {int32(command)}")
    operation(cpu, argument)
    return 0


def physdev_op_compat(cpu: PvVcpu, argument: int) -> int:
    """The old form, {cmd, union}: any operation, with its argument in the union (do_physdev_op_compat)."""
    command = int.from_bytes(cpu.read(argument, 24)[:4], "little")
    return physdev_op(cpu, command, argument + 8)

"""physdev_op for a guest without physical devices (xen/arch/x86/physdev.c)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno
from pvirq.pv.addresses import addr_ok
from pvirq.pv.hypercalls.protocol import int32

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

PHYSDEVOP_IRQ_UNMASK_NOTIFY: Final = 4
PHYSDEVOP_irq_status_query: Final = 5
PHYSDEVOP_set_iopl: Final = 6
PHYSDEVOP_set_iobitmap: Final = 7
PHYSDEVOP_apic_read: Final = 8
PHYSDEVOP_apic_write: Final = 9
PHYSDEVOP_alloc_irq_vector: Final = 10
PHYSDEVOP_eoi: Final = 12
PHYSDEVOP_map_pirq: Final = 13
PHYSDEVOP_unmap_pirq: Final = 14
PHYSDEVOP_manage_pci_add: Final = 15
PHYSDEVOP_manage_pci_remove: Final = 16
PHYSDEVOP_pirq_eoi_gmfn_v1: Final = 17
PHYSDEVOP_restore_msi: Final = 19
PHYSDEVOP_manage_pci_add_ext: Final = 20
PHYSDEVOP_setup_gsi: Final = 21
PHYSDEVOP_get_free_pirq: Final = 23
PHYSDEVOP_pci_mmcfg_reserved: Final = 24
PHYSDEVOP_pci_device_add: Final = 25
PHYSDEVOP_pci_device_remove: Final = 26
PHYSDEVOP_restore_msi_ext: Final = 27
PHYSDEVOP_pirq_eoi_gmfn_v2: Final = 28
PHYSDEVOP_dbgp_op: Final = 29
PHYSDEVOP_prepare_msix: Final = 30
PHYSDEVOP_release_msix: Final = 31

# For a privileged domain only; the second number is how many bytes Xen reads first.
_PRIVILEGED: Final = {
    PHYSDEVOP_apic_read: 16, PHYSDEVOP_apic_write: 16, PHYSDEVOP_alloc_irq_vector: 8,
    PHYSDEVOP_manage_pci_add: 2, PHYSDEVOP_manage_pci_remove: 2, PHYSDEVOP_manage_pci_add_ext: 8,
    PHYSDEVOP_setup_gsi: 8, PHYSDEVOP_pci_mmcfg_reserved: 24,
    PHYSDEVOP_pci_device_add: 16, PHYSDEVOP_pci_device_remove: 4,
    PHYSDEVOP_prepare_msix: 4, PHYSDEVOP_release_msix: 4, PHYSDEVOP_dbgp_op: 8,
}  # fmt: skip
NR_PIRQS_DOMU: Final = 256
MAX_IO_PORTS: Final = 65536
XENIRQSTAT_needs_eoi: Final = 1


def physdev_op(cpu: PvVcpu, command: int, argument: int) -> int:
    """I/O privilege, and refusals for what only the owner of devices can do."""
    command = int32(command)
    if command == PHYSDEVOP_set_iopl:
        (iopl,) = struct.unpack("<I", cpu.read(argument, 4))
        if iopl > 3:
            return -Errno.EINVAL
        cpu.iopl = iopl << 12
        return 0
    if command == PHYSDEVOP_set_iobitmap:
        bitmap, ports = struct.unpack("<QI", cpu.read(argument, 16)[:12])
        if ports > MAX_IO_PORTS or not addr_ok(bitmap):
            return -Errno.EINVAL
        cpu.io_bitmap = (bitmap, ports)
        return 0
    if command == PHYSDEVOP_irq_status_query:
        (irq,) = struct.unpack("<I", cpu.read(argument, 8)[:4])
        if irq >= NR_PIRQS_DOMU:
            return -Errno.EINVAL
        cpu.write(argument, struct.pack("<II", irq, XENIRQSTAT_needs_eoi))  # Xen assumes the worst of any line
        return 0
    if command == PHYSDEVOP_eoi:
        cpu.read(argument, 4)
        return -Errno.EINVAL  # the guest has no physical lines
    if command == PHYSDEVOP_IRQ_UNMASK_NOTIFY:
        return 0
    if command in (PHYSDEVOP_map_pirq, PHYSDEVOP_unmap_pirq):
        cpu.read(argument, 40 if command == PHYSDEVOP_map_pirq else 8)
        return -Errno.EPERM
    if command == PHYSDEVOP_get_free_pirq:
        cpu.read(argument, 8)
        return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM
    if command in (PHYSDEVOP_pirq_eoi_gmfn_v1, PHYSDEVOP_pirq_eoi_gmfn_v2):
        (mfn,) = struct.unpack("<Q", cpu.read(argument, 8))
        return -Errno.ENOSYS if cpu.tables.owns(mfn) else -Errno.EINVAL
    if command in (PHYSDEVOP_restore_msi, PHYSDEVOP_restore_msi_ext):
        cpu.read(argument, 2 if command == PHYSDEVOP_restore_msi else 4)
        return -Errno.ENODEV
    size = _PRIVILEGED.get(command)
    if size is None:
        return -Errno.ENOSYS
    cpu.read(argument, size)
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def physdev_op_compat(cpu: PvVcpu, argument: int) -> int:
    """The old form, {cmd, union}: any operation, with its argument in the union (do_physdev_op_compat)."""
    (command,) = struct.unpack("<I", cpu.read(argument, 24)[:4])
    return physdev_op(cpu, command, argument + 8)

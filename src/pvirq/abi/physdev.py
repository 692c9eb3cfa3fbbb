"""Numbers and structures of xen/include/public/physdev.h, as a 64-bit guest lays them out."""

import struct
from typing import Final

PHYSDEVOP_IRQ_UNMASK_NOTIFY: Final = 4
PHYSDEVOP_irq_status_query: Final = 5
PHYSDEVOP_set_iopl: Final = 6
PHYSDEVOP_set_iobitmap: Final = 7
PHYSDEVOP_apic_read: Final = 8
PHYSDEVOP_apic_write: Final = 9
PHYSDEVOP_alloc_irq_vector: Final = 10
PHYSDEVOP_free_irq_vector: Final = 11
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

XENIRQSTAT_needs_eoi: Final = 1 << 0
XENIRQSTAT_shared: Final = 1 << 1

MAP_PIRQ_TYPE_MSI: Final = 0
MAP_PIRQ_TYPE_GSI: Final = 1
MAP_PIRQ_TYPE_UNKNOWN: Final = 2
MAP_PIRQ_TYPE_MSI_SEG: Final = 3
MAP_PIRQ_TYPE_MULTI_MSI: Final = 4

XEN_PCI_DEV_EXTFN: Final = 1
XEN_PCI_DEV_VIRTFN: Final = 2
XEN_PCI_DEV_PXM: Final = 4

# Structures by operation; what Xen copies in includes the padding at their ends.
PHYSDEV_EOI: Final = struct.Struct("<I")  # irq
PHYSDEV_PIRQ_EOI_GMFN: Final = struct.Struct("<Q")  # gmfn
PHYSDEV_IRQ_STATUS_QUERY: Final = struct.Struct("<iI")  # irq, flags (out)
PHYSDEV_SET_IOPL: Final = struct.Struct("<I")  # iopl
PHYSDEV_SET_IOBITMAP: Final = struct.Struct("<QI4x")  # bitmap, nr_ports
PHYSDEV_APIC: Final = struct.Struct("<QII")  # apic_physbase, reg, value (in or out)
PHYSDEV_IRQ: Final = struct.Struct("<II")  # irq, vector (out)
# domid, type, index, pirq, bus, devfn, entry_nr, table_base; the padding goes back as it came.
PHYSDEV_MAP_PIRQ: Final = struct.Struct("<HHiiiiiiIQ")  # domid, pad, type, index, pirq, bus, devfn, entry_nr, pad, base
PHYSDEV_UNMAP_PIRQ: Final = struct.Struct("<H2xi")  # domid, pirq
PHYSDEV_MANAGE_PCI: Final = struct.Struct("<BB")  # bus, devfn
PHYSDEV_MANAGE_PCI_EXT: Final = struct.Struct("<BB2xIIBB2x")  # bus, devfn, is_extfn, is_virtfn, physfn bus, devfn
PHYSDEV_SETUP_GSI: Final = struct.Struct("<iBB2x")  # gsi, triggering, polarity
PHYSDEV_GET_FREE_PIRQ: Final = struct.Struct("<iI")  # type, pirq (out)
PHYSDEV_PCI_MMCFG_RESERVED: Final = struct.Struct("<QHBBI")  # address, segment, start_bus, end_bus, flags
PHYSDEV_PCI_DEVICE_ADD: Final = struct.Struct("<HBBIBB2x")  # seg, bus, devfn, flags, physfn bus, devfn; optarr follows
PHYSDEV_PCI_DEVICE: Final = struct.Struct("<HBB")  # seg, bus, devfn
PHYSDEV_DBGP_OP: Final = struct.Struct("<BBHBB")  # op, bus, pci

"""Physical devices' interrupts as a domain's kernel asks for them: PHYSDEVOP_* (xen/arch/x86/physdev.c).

One function for each operation, with the domain that calls; a guest's hypercalls and modelled kernels both come here.
Each checks in Xen's order. set_iopl and set_iobitmap are the CPU's business (`pv.hypercalls.physdev`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import (
    MAP_PIRQ_TYPE_GSI,
    MAP_PIRQ_TYPE_MSI,
    MAP_PIRQ_TYPE_MSI_SEG,
    MAP_PIRQ_TYPE_MULTI_MSI,
    XENIRQSTAT_needs_eoi,
    XENIRQSTAT_shared,
)
from pvirq.xen import msi
from pvirq.xen.irq import NR_IRQS_GSI
from pvirq.xen.msi import MsiInfo

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain
    from pvirq.xen.msi import PciDevice


def _check_privileged(domain: Domain) -> None:
    """XSM_PRIV of the default policy. EPERM."""
    if not domain.privileged:
        raise XenError(Errno.EPERM, f"{domain} has no physical devices")


def _target(domain: Domain, domid: int) -> Domain:
    """The domain whose pirqs are meant (XSM_DM_PRIV). ESRCH, EPERM."""
    target = domain.hypervisor.find_domain(domid, domain)
    _check_privileged(domain)
    return target


# -- interrupts --------------------------------------------------------------------------------------------------------


def eoi(domain: Domain, pirq: int) -> None:
    """PHYSDEVOP_eoi: the guest has served the interrupt. EINVAL for a number that isn't in use at all."""
    domain.pirqs.eoi(pirq)


def irq_unmask_notify(domain: Domain) -> None:
    """PHYSDEVOP_IRQ_UNMASK_NOTIFY, the old form: every pirq whose port isn't masked has been served."""
    domain.pirqs.eoi_unmasked()


def irq_status_query(domain: Domain, pirq: int) -> int:
    """PHYSDEVOP_irq_status_query: XENIRQSTAT_*. EINVAL. Xen assumes the worst of any line: that it needs an EOI."""
    if not 0 <= pirq < domain.pirqs.nr_pirqs:
        raise XenError(Errno.EINVAL, f"{domain} has no pirq {pirq}")
    return XENIRQSTAT_needs_eoi | (XENIRQSTAT_shared if domain.pirqs.shared(pirq) else 0)


def pirq_eoi_gmfn(domain: Domain, gmfn: int, version: int) -> None:
    """PHYSDEVOP_pirq_eoi_gmfn_v1 and _v2: a page of bits that tell which pirqs need an EOI. EINVAL, EBUSY.

    After version 1 an EOI unmasks the port as well.
    """
    domain.pirqs.set_eoi_map(gmfn, version == 1)


# -- mapping -----------------------------------------------------------------------------------------------------------


def map_pirq(domain: Domain, domid: int, kind: int, index: int, pirq: int = -1, info: MsiInfo | None = None) -> int:
    """PHYSDEVOP_map_pirq for domain `domid`: `pirq`, or a free number where it is negative; the number.

    `kind` GSI: `index` is the line. MSI and MSI_SEG: `index` is -1 and `info` tells the device, and the entry of
    MSI-X; MULTI_MSI: how many, and on ENFILE how many there could be. Raises ESRCH, EPERM, EINVAL, EBUSY, EEXIST,
    ENOSPC, and for messages ENODEV, ENFILE, EDOM, EOPNOTSUPP.
    """
    if kind == MAP_PIRQ_TYPE_MULTI_MSI and info is not None and info.table_base:
        raise XenError(Errno.EINVAL, "several messages of MSI-X")
    target = _target(domain, domid)
    if kind == MAP_PIRQ_TYPE_GSI:
        return target.pirqs.map_gsi(domain, index, pirq)
    if kind == MAP_PIRQ_TYPE_MSI_SEG:
        kind = MAP_PIRQ_TYPE_MSI
    if kind not in (MAP_PIRQ_TYPE_MSI, MAP_PIRQ_TYPE_MULTI_MSI) or info is None:
        raise XenError(Errno.EINVAL, f"map type {kind}")
    return target.pirqs.map_msi(domain, kind, index, pirq, info)


def unmap_pirq(domain: Domain, domid: int, pirq: int) -> None:
    """PHYSDEVOP_unmap_pirq: the line is the domain's no more, bound or not. ESRCH, EPERM, EINVAL, EBUSY."""
    _target(domain, domid).pirqs.unmap(pirq)


def get_free_pirq(domain: Domain, kind: int) -> int:
    """PHYSDEVOP_get_free_pirq: a number set aside for the caller to map later. ENOSPC."""
    return domain.pirqs.set_aside(kind)


# -- the I/O APIC ------------------------------------------------------------------------------------------------------


def apic_read(domain: Domain, base: int, register: int) -> int:
    """PHYSDEVOP_apic_read: a register of the I/O APIC at machine address `base`. EPERM, EINVAL."""
    _check_privileged(domain)
    return domain.hypervisor.ioapic.guest_read(base, register)


def apic_write(domain: Domain, base: int, register: int, value: int) -> None:
    """PHYSDEVOP_apic_write: set a pin up, and map its line to the pirq that the vector field names. EPERM, EINVAL."""
    _check_privileged(domain)
    domain.hypervisor.ioapic.guest_write(domain, base, register, value)


def alloc_irq_vector(domain: Domain, irq: int) -> int:
    """PHYSDEVOP_alloc_irq_vector: the "vector" to write to the I/O APIC, which is the irq itself. EPERM."""
    _check_privileged(domain)
    return irq


def setup_gsi(domain: Domain, gsi: int, triggering: int, polarity: int) -> None:
    """PHYSDEVOP_setup_gsi: `triggering` 1 for level, `polarity` 1 for active low. EINVAL, EPERM, EEXIST."""
    if not 0 <= gsi < NR_IRQS_GSI:
        raise XenError(Errno.EINVAL, f"no GSI {gsi}")
    _check_privileged(domain)
    domain.hypervisor.ioapic.register_gsi(gsi, triggering, polarity)


# -- PCI devices -------------------------------------------------------------------------------------------------------


def pci_device_add(domain: Domain, sbdf: int, physfn: int | None = None) -> PciDevice:
    """PHYSDEVOP_pci_device_add, manage_pci_add and _ext: domain 0 has found a device. EPERM.

    For a virtual function `physfn` is the device that it belongs to, which is added too where it is unknown.
    """
    _check_privileged(domain)
    if physfn is not None and physfn not in domain.hypervisor.pci:
        msi.pci_add_device(domain.hypervisor, physfn)
    return msi.pci_add_device(domain.hypervisor, sbdf)


def pci_device_remove(domain: Domain, sbdf: int) -> None:
    """PHYSDEVOP_pci_device_remove and manage_pci_remove. EPERM, ENODEV."""
    _check_privileged(domain)
    msi.pci_remove_device(domain.hypervisor, sbdf)


def prepare_msix(domain: Domain, sbdf: int, release: bool = False) -> None:
    """PHYSDEVOP_prepare_msix and release_msix: whether the device's table may change. EPERM, ENODEV, EBUSY.

    Xen 4.17 falls over a device without MSI-X here; this gives ENODEV.
    """
    _check_privileged(domain)
    device = domain.hypervisor.pci.get(sbdf)
    if device is None or not device.msix:
        raise XenError(Errno.ENODEV, f"no MSI-X device {msi.name(sbdf)}")
    if len(device.descs) + device.msix_reserved != release:
        raise XenError(Errno.EBUSY, f"the messages of device {msi.name(sbdf)} are in use")
    device.msix_reserved = int(not release)


def restore_msi(domain: Domain, sbdf: int) -> None:
    """PHYSDEVOP_restore_msi and _ext: a device that lost its messages in its sleep has them again. ENODEV, EPERM."""
    if sbdf not in domain.hypervisor.pci:
        raise XenError(Errno.ENODEV, f"no device {msi.name(sbdf)}")
    _check_privileged(domain)

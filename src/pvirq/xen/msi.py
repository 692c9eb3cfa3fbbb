"""PCI devices and their message-signalled interrupts, as Xen keeps them (arch/x86/msi.c, drivers/passthrough/pci.c).

A device's driver in domain 0 maps a message to a pirq (PHYSDEVOP_map_pirq) and binds that; the device then raises it.
"""

from __future__ import annotations

from pvirq.xen.domain import Hypervisor


class MsiDesc:
    """struct msi_desc"""

    maskable = True


class PciDevice:
    """A PCI function: `sbdf` (segment, bus, device and function, as in Xen), `vectors` it can raise, MSI-X or MSI."""

    def __init__(self, hypervisor: Hypervisor, sbdf: int, *, vectors: int = 1, msix: bool = False) -> None:
        self.hypervisor = hypervisor
        self.sbdf = sbdf
        self.vectors = vectors
        self.msix = msix

    def raise_msi(self, entry: int = 0) -> bool:
        """The device writes message `entry`. False: it is not enabled, or masked at the device, so nothing is sent."""
        raise NotImplementedError

"""The I/O APIC: where devices' interrupt lines come in (xen/arch/x86/io_apic.c)."""

from __future__ import annotations


class Line:
    """One input. It is asserted while any device on it asserts it (wired OR), as PCI lines are."""

    def __init__(self, gsi: int) -> None:
        self.gsi = gsi

    @property
    def asserted(self) -> bool:
        raise NotImplementedError

    def assert_(self, source: object) -> None:
        """`source`, a device, wants service. Again while it does already: nothing new."""
        raise NotImplementedError

    def deassert(self, source: object) -> None:
        """`source` has been served."""
        raise NotImplementedError

    def pulse(self) -> None:
        """An edge of a device that doesn't hold its line."""
        raise NotImplementedError

"""Which virtual addresses a guest may name (xen/arch/x86/include/asm/x86_64/uaccess.h)."""

from __future__ import annotations

from typing import Final

from pvirq.abi.arch_x86 import HYPERVISOR_VIRT_END

LOWER_END: Final = 1 << 47
UPPER_START: Final = (1 << 64) - LOWER_END


def canonical(va: int) -> bool:
    """is_canonical_address: the upper 17 bits are alike."""
    return va < LOWER_END or va >= UPPER_START


def addr_ok(va: int) -> bool:
    """__addr_ok: in the lower half, or above Xen's own part of the upper one."""
    return va < LOWER_END or va >= HYPERVISOR_VIRT_END

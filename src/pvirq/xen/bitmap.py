"""Bitmaps as the hypervisor's console prints them."""

from __future__ import annotations


def bitmap_list(bits: list[int]) -> str:
    """Ascending numbers as printk's %*pbl: "0-2,5"."""
    ranges: list[list[int]] = []
    for bit in bits:
        if ranges and ranges[-1][1] == bit - 1:
            ranges[-1][1] = bit
        else:
            ranges.append([bit, bit])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)

"""The rings that split drivers share (xen/include/public/io/ring.h): where the indexes are, how many entries fit."""

from typing import Final

# struct sring: four free-running u32 indexes, then padding; entries start at byte 64.
REQ_PROD: Final = 0
REQ_EVENT: Final = 1
RSP_PROD: Final = 2
RSP_EVENT: Final = 3
RING_HEADER: Final = 64


def ring_size(entry_size: int, ring_bytes: int) -> int:
    """How many entries a ring of so many bytes has: the largest power of two that fits (__RING_SIZE)."""
    return 1 << ((ring_bytes - RING_HEADER) // entry_size).bit_length() - 1

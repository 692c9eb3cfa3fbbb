"""CPU masks as Linux writes and reads them: "%*pb", "%*pbl", bitmap_parse and bitmap_parselist (lib/bitmap.c)."""

from __future__ import annotations

import re

from pvirq.abi.errno import Errno
from pvirq.linux.irqdesc import IrqError

# One region of a list: all, N (the last CPU) or a number; a range; of each `group` the first `used`.
_REGION = re.compile(r"(?:all|(N|\d+)(?:-(N|\d+))?)(?::(\d+)/(\d+))?", re.ASCII)
_REGION_ENDS = re.compile(r"[,\s]+", re.ASCII)


def mask_text(mask: int, bits: int) -> str:
    """Hexadecimal in groups of 32 bits, the first as wide as `bits` need: "3", "ff,ffffffff"."""
    digits = f"{mask:0{-(-bits // 4)}x}"
    first = len(digits) % 8
    groups = ([digits[:first]] if first else []) + [digits[i : i + 8] for i in range(first, len(digits), 8)]
    return ",".join(groups)


def list_text(mask: int) -> str:
    """Ranges: "0-1,3"; empty for no CPU."""
    ranges, cpu = [], 0
    while mask >> cpu:
        if mask >> cpu & 1:
            first = cpu
            while mask >> cpu + 1 & 1:
                cpu += 1
            ranges.append(str(first) if first == cpu else f"{first}-{cpu}")
        cpu += 1
    return ",".join(ranges)


def parse_mask(text: str, bits: int) -> int:
    """What userland wrote as hexadecimal. IrqError: EINVAL, EOVERFLOW for a group or a mask that is too long."""
    mask, position = 0, 0
    groups = [group for group in _REGION_ENDS.split(text.partition("\n")[0]) if group]
    for group in reversed(groups):
        if position >= bits:
            raise IrqError(Errno.EOVERFLOW, f"{text!r} has more than {bits} bits")
        if not re.fullmatch(r"[0-9a-fA-F]{1,8}", group[-8:]):
            raise IrqError(Errno.EINVAL, f"{text!r} is not hexadecimal")
        if len(group) > 8:
            known = group[-9] in "0123456789abcdefABCDEF"
            raise IrqError(Errno.EOVERFLOW if known else Errno.EINVAL, f"{group!r} has more than 32 bits")
        mask |= int(group, 16) << position
        position += 32
    if mask >> bits:
        raise IrqError(Errno.EOVERFLOW, f"{text!r} has more than {bits} bits")
    return mask


def parse_list(text: str, bits: int) -> int:
    """What userland wrote as a list of CPUs. IrqError: EINVAL, ERANGE for a CPU beyond `bits`, EOVERFLOW."""
    mask = 0
    for region in _REGION_ENDS.split(text.partition("\n")[0]):
        if not region:
            continue
        match = _REGION.fullmatch(region)
        if match is None:
            raise IrqError(Errno.EINVAL, f"{region!r} is not a range of CPUs")
        first_text, last_text, used_text, group_text = match.groups()
        first = 0 if first_text is None else _cpu(first_text, bits)
        last = bits - 1 if first_text is None else first if last_text is None else _cpu(last_text, bits)
        used = group = last + 1
        if used_text is not None:
            used, group = int(used_text), int(group_text)
        if first > last or not group or used > group:
            raise IrqError(Errno.EINVAL, f"{region!r} is no range")
        if last >= bits:
            raise IrqError(Errno.ERANGE, f"CPU {last} is beyond the last, {bits - 1}")
        for cpu in range(first, last + 1):
            if (cpu - first) % group < used:
                mask |= 1 << cpu
    return mask


def _cpu(text: str, bits: int) -> int:
    cpu = bits - 1 if text == "N" else int(text)
    if cpu >> 32:
        raise IrqError(Errno.EOVERFLOW, f"CPU {text}")
    return cpu

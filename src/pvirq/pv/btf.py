"""Where members of a Linux kernel's structures are: from its BTF section (Documentation/bpf/btf.rst).

Kernels of distributions since about 2020 have one, for BPF; it stays in the image when the ELF is stripped.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Final

from pvirq.pv.elf import Elf, ImageError

SECTION: Final = ".BTF"
MAGIC: Final = 0xEB9F
HEADER: Final = struct.Struct(
    "<HBBIIIII"
)  # magic, version, flags, header's length; types' and strings' place and length
KIND_STRUCT: Final = 4
KIND_FLAG: Final = 1 << 31  # a member's offset has a bitfield's size in its upper byte
# How many 32-bit words follow a type's three, by its kind: some, and some for each of its members.
_TAIL: Final = {
    1: (1, 0), 3: (3, 0), 4: (0, 3), 5: (0, 3), 6: (0, 2), 13: (0, 2), 14: (1, 0), 15: (0, 3), 17: (1, 0), 19: (0, 3),
}  # fmt: skip
KINDS: Final = 20

Layout = dict[str, int]
"""Offsets in bytes by member; members of unnamed unions and structs in it, and bitfields, are left out."""


def btf_of(elf: Elf) -> memoryview | None:
    """A kernel's BTF section; None without."""
    for section in elf.shdrs:
        if elf.section_name(section) == SECTION:
            try:
                return elf.section_bytes(section)
            except ImageError:
                return None
    return None


def layouts(btf: memoryview, names: Collection[str]) -> dict[str, list[Layout]]:
    """The layouts of structures by their names: a kernel may have several of one name, and none of another.

    Nothing is found in what isn't BTF, and nothing more behind damage.
    """
    found: dict[str, list[Layout]] = {name: [] for name in names}
    if len(btf) < HEADER.size:
        return found
    magic, _, _, header, types_at, types_size, strings_at, strings_size = HEADER.unpack_from(btf)
    types_end, strings_end = header + types_at + types_size, header + strings_at + strings_size
    if magic != MAGIC or types_end > len(btf) or strings_end > len(btf):
        return found
    strings = bytes(btf[header + strings_at : strings_end])
    words = memoryview(bytes(btf[header + types_at : types_end & ~3])).cast("I")
    wanted = {at + 1: name for name in names if (at := strings.find(b"\0" + name.encode() + b"\0")) >= 0}

    def text(at: int) -> str:
        return strings[at : strings.find(b"\0", at)].decode("latin-1")

    at, end = 0, len(words) - 2
    while at < end:
        name, info = words[at], words[at + 1]
        kind, count = info >> 24 & 31, info & 0xFFFF
        if kind >= KINDS:
            break
        if kind == KIND_STRUCT and name in wanted and at + 3 + 3 * count <= len(words):
            layout = {}
            for member in range(at + 3, at + 3 + 3 * count, 3):
                bits = words[member + 2]
                if info & KIND_FLAG:
                    bits = 1 if bits >> 24 else bits  # a bitfield: at no byte
                if words[member] and not bits & 7:
                    layout[text(words[member])] = bits // 8
            found[wanted[name]].append(layout)
        some, each = _TAIL.get(kind, (0, 0))
        at += 3 + some + each * count
    return found

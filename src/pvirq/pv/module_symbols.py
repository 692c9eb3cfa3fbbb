"""Names of functions in a Linux guest's modules, out of the guest's memory: its list of modules, and their kallsyms."""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple

from pvirq.abi.errno import XenError
from pvirq.pv.btf import Layout

# A guest may be wrong or hostile: so much of its lists is looked at.
MOST_MODULES: Final = 1024
MOST_SYMBOLS: Final = 1 << 17  # of all modules together; all of a distribution's that are loaded have a tenth
NAME_SIZE: Final = 128  # KSYM_NAME_LEN of before 6.1, where longer names are cut
SYM: Final = Struct("<IBBHQQ")  # Elf64_Sym: name, info, other, section, value, size
PAGE: Final = 0x1000

Read = Callable[[int, int], bytes]


class ModuleLayout(NamedTuple):
    """Where the kernel keeps it: offsets in struct module and struct mod_kallsyms."""

    list: int
    kallsyms: int
    symtab: int
    num_symtab: int
    strtab: int


def module_layout(module: Layout | None, kallsyms: Layout | None) -> ModuleLayout | None:
    """Of the two structs' layouts; None where one lacks what is needed (Linux 4.5 and later have it)."""
    if module is None or kallsyms is None:
        return None
    try:
        return ModuleLayout(
            module["list"], module["kallsyms"], kallsyms["symtab"], kallsyms["num_symtab"], kallsyms["strtab"]
        )
    except KeyError:
        return None


def find_in_modules(read: Read, modules: int, layout: ModuleLayout, address: int) -> str | None:
    """The name of the symbol at `address` in any module; `modules` is the head of their list.

    `read(va, size)` raises XenError for what can't be read, which then isn't looked at.
    """
    left = MOST_SYMBOLS
    try:
        entry = _pointer(read, modules)
        for _ in range(MOST_MODULES):
            if entry == modules or left <= 0:
                return None
            count, name = _find_in(read, entry - layout.list, layout, address, left)
            if name is not None:
                return name
            left -= count
            entry = _pointer(read, entry)
    except XenError:
        pass
    return None


def _find_in(read: Read, module: int, layout: ModuleLayout, address: int, most: int) -> tuple[int, str | None]:
    """How many symbols of a module were looked at, and the name if it is among them."""
    try:
        kallsyms = _pointer(read, module + layout.kallsyms)
        symtab = _pointer(read, kallsyms + layout.symtab)
        count = min(int.from_bytes(read(kallsyms + layout.num_symtab, 4), "little"), most)
        strtab = _pointer(read, kallsyms + layout.strtab)
        for name, _, _, section, value, _ in SYM.iter_unpack(read(symtab, count * SYM.size)):
            if value == address and section:
                return count, _string(read, strtab + name)
        return count, None
    except XenError:
        return 0, None


def _pointer(read: Read, va: int) -> int:
    return int.from_bytes(read(va, 8), "little")


def _string(read: Read, va: int) -> str:
    size = min(NAME_SIZE, PAGE - va % PAGE)  # not into the next page, which may not be there
    raw = read(va, size)
    if b"\0" not in raw and size < NAME_SIZE:
        raw += read(va + size, NAME_SIZE - size)
    return raw.partition(b"\0")[0].decode("utf-8", "replace")

"""Names for a guest kernel's addresses: from a System.map, an ELF symbol table, or the kernel's own kallsyms.

Nothing is read or decoded before the first question; a Linux kernel's table then takes about 0.1 s.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pvirq.pv.elf import PT_LOAD, SHT_STRTAB, Elf, ImageError
from pvirq.pv.image import KernelImage, read_image
from pvirq.pv.kallsyms import find_kallsyms

UPPER_HALF: Final = 1 << 47
U64: Final = (1 << 64) - 1

# Types in nm's letters that are no addresses: absolute values, undefined, debugging.
_NO_ADDRESS: Final = b"AaUNn"
_MAP_LINE: Final = re.compile(rb"^([0-9a-fA-F]{8,16}) (\S) (\S+)(?:[ \t].*)?$", re.MULTILINE)

# ELF symbol types, bindings and section numbers.
STT_NOTYPE: Final = 0
STT_FUNC: Final = 2
STB_LOCAL: Final = 0
SHN_UNDEF: Final = 0
SHN_LORESERVE: Final = 0xFF00
_SYM: Final = np.dtype(
    [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("shndx", "<u2"), ("value", "<u8"), ("size", "<u8")]
)


class SymbolTable(NamedTuple):
    """Symbols by ascending address; of those with one address, the first is the one to print.

    `sizes` are in bytes, 0 where unknown; None if the source has none. `name(i)` decodes one name, `names()`
    all.
    """

    source: str
    addresses: NDArray[np.uint64]
    sizes: NDArray[np.uint64] | None
    name: Callable[[int], str]
    names: Callable[[], Sequence[str]]


class Symbols:
    """A kernel's symbols. `bias` is what the kernel's addresses at run time are above those in the table."""

    def __init__(self, load: Callable[[], SymbolTable | None], bias: int = 0) -> None:
        """`load` is called once, when something is asked; None from it means that nothing is known."""
        self._load = load
        self._bias = bias
        self._table: SymbolTable | None = None
        self._loaded = False
        self._addresses: memoryview | list[int] = []
        self._by_name: dict[str, int] | None = None
        # Symbols below this are not addresses of code or data, but offsets into the per-CPU area.
        self._lowest = 0

    @property
    def source(self) -> str:
        """Where the symbols come from: "System.map", "symtab", "kallsyms", or "" if there are none."""
        table = self._get()
        return table.source if table else ""

    def __len__(self) -> int:
        self._get()
        return len(self._addresses)

    def _get(self) -> SymbolTable | None:
        if not self._loaded:
            self._table = self._load()
            self._loaded = True
            if self._table is not None and len(self._table.addresses):
                self._addresses = np.ascontiguousarray(self._table.addresses).data
                if self._addresses[-1] >= UPPER_HALF:
                    self._lowest = UPPER_HALF
        return self._table

    def lookup(self, va: int) -> tuple[str, int, int | None] | None:
        """The symbol that an address belongs to: (name, offset from its start, its size or None).

        None if no symbol begins at or below `va`, or `va` is beyond the end of the last one. Without sizes in
        the source, a symbol reaches to the next one, as in the kernel's own messages.
        """
        table = self._get()
        linked = va - self._bias & U64
        found = bisect_right(self._addresses, linked)
        if table is None or not found or self._addresses[found - 1] < self._lowest:
            return None
        start = self._addresses[found - 1]
        size = self._addresses[found] - start if found < len(self._addresses) else 0
        first = found - 1  # of the symbols with this address
        while first and self._addresses[first - 1] == start:
            first -= 1
        if table.sizes is not None and (found == len(self._addresses) or linked - start < table.sizes[first]):
            size = int(table.sizes[first]) or size  # padding behind it counts as part of it
        if found == len(self._addresses) and linked - start >= (size or 1):
            return None
        return table.name(first), linked - start, size or None

    def format(self, va: int) -> str:
        """An address as the kernel prints it: name+0x12/0x80, name+0x12 if the size is unknown, else 0x..."""
        found = self.lookup(va)
        if found is None:
            return f"{va:#x}"
        name, offset, size = found
        return f"{name}+{offset:#x}" + (f"/{size:#x}" if size is not None else "")

    def address(self, name: str) -> int | None:
        """Where a symbol is; None if there is none. Of several of a name (static functions), the lowest."""
        if self._by_name is None:
            table = self._get()
            names = table.names() if table else ()
            # From the end, so that the first of a name stays.
            self._by_name = dict(zip(reversed(names), reversed(self._addresses), strict=True))
        found = self._by_name.get(name)
        if found is None:
            return None
        return found if found < self._lowest else found + self._bias & U64


def symbols_for(image: KernelImage, system_map: str | os.PathLike[str] | None = None, bias: int = 0) -> Symbols:
    """The best symbols there are for a kernel: its System.map if real, else .symtab, else kallsyms, else
    none.

    A missing, unreadable or stub System.map, and damaged tables in the image, count as absent.
    """

    def load() -> SymbolTable | None:
        if system_map is not None:
            try:
                return read_system_map(read_image(system_map))
            except ImageError:
                pass
        try:
            return read_symtab(image.elf)
        except ImageError:
            return read_kallsyms(image)

    return Symbols(load, bias)


def system_map_for(kernel: str | os.PathLike[str]) -> Path | None:
    """The System.map that belongs to a kernel file (System.map-6.1.0 beside vmlinuz-6.1.0), if it exists."""
    path = Path(kernel)
    prefix, dash, version = path.name.partition("-")
    if prefix not in ("vmlinuz", "vmlinux"):
        return None
    candidate = path.with_name(f"System.map{dash}{version}")
    return candidate if candidate.is_file() else None


def read_system_map(text: bytes) -> SymbolTable:
    """Parse a System.map (or nm output). ImageError for the stub that Debian installs, and what is no map."""
    entries = [(int(address, 16), name) for address, kind, name in _MAP_LINE.findall(text) if kind not in _NO_ADDRESS]
    if len(entries) < 2:
        if b"real System.map is in" in text:
            raise ImageError("is a stub: the real System.map is in the kernel's -dbg package")
        raise ImageError("is not a System.map: no lines of address, type and name")
    entries.sort(key=lambda entry: entry[0])
    names = [name.decode("latin-1") for _, name in entries]
    addresses = np.array([address for address, _ in entries], dtype=np.uint64)
    return SymbolTable("System.map", addresses, None, names.__getitem__, lambda: names)


def read_symtab(elf: Elf) -> SymbolTable:
    """Read an ELF's .symtab; ImageError if it has none, or a damaged one."""
    tables = elf.symtab()
    if tables is None or tables[1].type != SHT_STRTAB:
        raise ImageError("has no ELF symbol table")
    data = elf.section_bytes(tables[0])
    symbols = np.frombuffer(data[: len(data) - len(data) % _SYM.itemsize], dtype=_SYM)
    strings = bytes(elf.section_bytes(tables[1]))
    kind, binding = symbols["info"] & 15, symbols["info"] >> 4
    useful = (symbols["shndx"] != SHN_UNDEF) & (symbols["shndx"] < SHN_LORESERVE) & (kind <= STT_FUNC)
    useful &= (symbols["name"] != 0) & (symbols["name"] < len(strings))
    # At one address, real functions and objects before labels, then what has a size, then global names.
    order = np.lexsort((binding == STB_LOCAL, symbols["size"] == 0, kind == STT_NOTYPE, symbols["value"]))
    chosen = symbols[order[useful[order]]]
    if not len(chosen):
        raise ImageError("has an empty ELF symbol table")

    def name(i: int) -> str:
        start = int(chosen["name"][i])
        return strings[start : strings.find(b"\0", start)].decode("latin-1")

    return SymbolTable(
        "symtab",
        chosen["value"].astype(np.uint64),
        chosen["size"].astype(np.uint64),
        name,
        lambda: list(map(name, range(len(chosen)))),
    )


def read_kallsyms(image: KernelImage) -> SymbolTable | None:
    """The kernel's own symbols; None if it has none that can be found."""
    segments = [p for p in image.elf.phdrs if p.type == PT_LOAD]

    def file_to_va(offset: int) -> int | None:
        for p in segments:
            if p.offset <= offset < p.offset + p.filesz:
                return p.vaddr + offset - p.offset
        return None

    found = find_kallsyms(image.elf.data, file_to_va)
    if found is None:
        return None
    return SymbolTable("kallsyms", found.addresses, None, found.name, lambda: list(found.names()))

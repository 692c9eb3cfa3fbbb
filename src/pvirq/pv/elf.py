"""The ELF64 headers of a kernel image: just enough to load it, with every offset checked against the file.

Three fixed structs, so they are read with `struct` here: a general ELF library takes longer to import than
this takes to parse a kernel, and answers a damaged file with a dozen kinds of exception.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

ELF_MAGIC: Final = b"\x7fELF"
ELFCLASS64: Final = 2
ELFDATA2LSB: Final = 1
EM_386: Final = 3
EM_X86_64: Final = 62
PT_LOAD: Final = 1
PT_NOTE: Final = 4
PF_X: Final = 1
PF_RWX: Final = 7
SHT_SYMTAB: Final = 2
SHT_STRTAB: Final = 3
SHT_NOTE: Final = 7
SHT_NOBITS: Final = 8
SHF_ALLOC: Final = 2
SHF_EXECINSTR: Final = 4

MAX_STRING: Final = 4096  # ELF_MAX_STRING_LENGTH of libelf

EHDR: Final = Struct("<16sHHIQQQIHHHHHH")
PHDR: Final = Struct("<IIQQQQQQ")
SHDR: Final = Struct("<IIQQQQIIQQ")


class ImageError(ValueError):
    """A kernel image can't be used; the message is one line that says why and what would help."""


def is_elf(data: memoryview) -> bool:
    """Whether the bytes begin as an ELF file does."""
    return data[:4].tobytes() == ELF_MAGIC


class Phdr(NamedTuple):
    """Elf64_Phdr."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Shdr(NamedTuple):
    """Elf64_Shdr; `name` is an offset into the section string table."""

    name: int
    type: int
    flags: int
    addr: int
    offset: int
    size: int
    link: int
    info: int
    addralign: int
    entsize: int


class Elf(NamedTuple):
    """A parsed ELF file, `data` the whole of it. What its headers point to may lie beyond its end."""

    data: memoryview
    entry: int
    phdrs: list[Phdr]
    shdrs: list[Shdr]
    shstrndx: int

    def bytes_at(self, offset: int, size: int, what: str) -> memoryview:
        """File content [offset, offset + size); ImageError if the file is shorter."""
        if offset + size > len(self.data):
            raise ImageError(
                f"truncated or corrupt ELF: {what} at offset {offset:#x}, {size:#x} bytes long, "
                f"is beyond the end of the image ({len(self.data):#x} bytes)"
            )
        return self.data[offset : offset + size]

    def section_bytes(self, section: Shdr) -> memoryview:
        """A section's content in the file; ImageError if the file is shorter."""
        return self.bytes_at(section.offset, 0 if section.type == SHT_NOBITS else section.size, "a section")

    def string_at(self, offset: int) -> str | None:
        """The NUL-terminated string at a file offset; None if unterminated or over MAX_STRING bytes.

        As elf_strval in libelf: the end of a note or section doesn't end the string (Linux's FEATURES note
        counts no NUL in its size). Bytes beyond ASCII come out as Latin-1.
        """
        if offset >= len(self.data):
            return None
        text, nul, _ = bytes(self.data[offset : offset + MAX_STRING + 1]).partition(b"\0")
        return text.decode("latin-1") if nul else None

    def section_name(self, section: Shdr) -> str | None:
        """A section's name; None without a usable section string table."""
        if not 0 < self.shstrndx < len(self.shdrs):
            return None
        return self.string_at(self.shdrs[self.shstrndx].offset + section.name)

    def symtab(self) -> tuple[Shdr, Shdr] | None:
        """The first SHT_SYMTAB section with a valid link, and its string table."""
        for section in self.shdrs[1:]:
            if section.type == SHT_SYMTAB and 0 < section.link < len(self.shdrs):
                return section, self.shdrs[section.link]
        return None


def parse(image: bytes | bytearray | memoryview) -> Elf:
    """Read the header tables of a little-endian x86-64 ELF; ImageError for anything else."""
    data = memoryview(image).cast("B").toreadonly()
    if not is_elf(data):
        raise ImageError("not an ELF file")
    if len(data) < 20:
        raise ImageError(f"truncated ELF: only {len(data)} bytes")
    machine = int.from_bytes(data[18:20], "little")
    if data[4] != ELFCLASS64 and machine == EM_386:
        raise ImageError("is a 32-bit x86 kernel; only x86-64 PV kernels can run here")
    if data[4] != ELFCLASS64 or data[5] != ELFDATA2LSB or machine != EM_X86_64:
        raise ImageError(f"is not an x86-64 ELF (class {data[4]}, byte order {data[5]}, machine {machine})")
    if len(data) < EHDR.size:
        raise ImageError(f"truncated ELF: only {len(data)} bytes")
    (_, _, _, _, entry, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum, shstrndx) = EHDR.unpack_from(data)
    elf = Elf(data, entry, [], [], shstrndx)
    for name, header, offset, entsize, count in (
        ("program", PHDR, phoff, phentsize, phnum),
        ("section", SHDR, shoff, shentsize, shnum),
    ):
        if not count:
            continue
        if entsize != header.size:
            raise ImageError(f"corrupt ELF: {name} headers of {entsize} bytes instead of {header.size}")
        table = elf.bytes_at(offset, entsize * count, f"the {name} header table")
        if header is PHDR:
            elf.phdrs.extend(map(Phdr._make, header.iter_unpack(table)))
        else:
            elf.shdrs.extend(map(Shdr._make, header.iter_unpack(table)))
    return elf

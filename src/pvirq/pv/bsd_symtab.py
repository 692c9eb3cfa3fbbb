"""The symbol table that BSD kernels want to find in memory behind their image (XEN_ELFNOTE_BSD_SYMTAB).

elf_parse_bsdsyms and elf_load_bsdsyms of xen/common/libelf/libelf-loader.c: a 32-bit size, a small ELF header
with three section headers (undefined, .symtab, .strtab), then the two tables, each aligned to 8 bytes.
"""

from __future__ import annotations

import struct

from pvirq.pv.elf import EHDR, SHDR, SHT_STRTAB, Elf

SIZE_FIELD = 4
SECTIONS = 3


def _align8(value: int) -> int:
    return (value + 7) & ~7


def bsd_symtab(elf: Elf) -> bytes | None:
    """The block to load at the first multiple of 8 behind the kernel; None without a symbol table."""
    tables = elf.symtab()
    if tables is None or tables[1].type != SHT_STRTAB:
        return None
    symtab, strtab = tables
    symbols, strings = elf.section_bytes(symtab), elf.section_bytes(strtab)
    headers = SIZE_FIELD + EHDR.size + SECTIONS * SHDR.size
    symtab_at = _align8(headers)
    strtab_at = _align8(symtab_at + symtab.size)
    block = bytearray(_align8(strtab_at + strtab.size))
    block[symtab_at : symtab_at + symtab.size] = symbols
    block[strtab_at : strtab_at + strtab.size] = strings
    # All offsets in it count from the ELF header, which stands behind the size field.
    struct.pack_into("<I", block, 0, strtab_at + strtab.size - SIZE_FIELD)
    ehdr = list(EHDR.unpack_from(elf.data))
    ehdr[3] = 1  # e_version
    ehdr[5] = 0  # e_phoff
    ehdr[6] = EHDR.size  # e_shoff
    ehdr[8:] = [EHDR.size, 0, 0, SHDR.size, SECTIONS, 0]  # e_ehsize, e_ph*, e_shentsize, e_shnum, e_shstrndx
    EHDR.pack_into(block, SIZE_FIELD, *ehdr)
    shdrs = SIZE_FIELD + EHDR.size + SHDR.size
    SHDR.pack_into(block, shdrs, *symtab._replace(offset=symtab_at - SIZE_FIELD, link=2))
    SHDR.pack_into(block, shdrs + SHDR.size, *strtab._replace(offset=strtab_at - SIZE_FIELD))
    return bytes(block)

"""What a kernel tells its builder about itself: Xen's ELF notes, or the older `__xen_guest` section.

Follows xen/common/libelf/libelf-dominfo.c: notes of PT_NOTE segments count; without any, those of SHT_NOTE
sections; without those, the string in section `__xen_guest`. Later values replace earlier ones. Values are
taken as they stand here; `pvirq.pv.image` fills in the defaults and judges them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from pvirq.abi import elfnote as note
from pvirq.pv.elf import PT_NOTE, SHT_NOTE, Elf, ImageError, Shdr

MAX_NOTES: Final = 65536  # ELF_MAX_TOTAL_NOTE_COUNT
U64: Final = (1 << 64) - 1

_STRINGS: Final = {
    note.XEN_ELFNOTE_XEN_VERSION: "xen_version",
    note.XEN_ELFNOTE_GUEST_OS: "guest_os",
    note.XEN_ELFNOTE_GUEST_VERSION: "guest_version",
    note.XEN_ELFNOTE_LOADER: "loader",
}
_NUMBERS: Final = {
    note.XEN_ELFNOTE_ENTRY: "entry",
    note.XEN_ELFNOTE_HYPERCALL_PAGE: "hypercall_page",
    note.XEN_ELFNOTE_VIRT_BASE: "virt_base",
    note.XEN_ELFNOTE_PADDR_OFFSET: "paddr_offset",
    note.XEN_ELFNOTE_HV_START_LOW: "hv_start_low",
    note.XEN_ELFNOTE_INIT_P2M: "init_p2m",
    note.XEN_ELFNOTE_PHYS32_ENTRY: "phys32_entry",
    note.XEN_ELFNOTE_MOD_START_PFN: "mod_start_pfn",
    note.XEN_ELFNOTE_SUSPEND_CANCEL: "suspend_cancel",
}
_GUEST_STRINGS: Final = {
    "LOADER": "loader",
    "GUEST_OS": "guest_os",
    "GUEST_VER": "guest_version",
    "XEN_VER": "xen_version",
}
_GUEST_NUMBERS: Final = {
    "VIRT_BASE": "virt_base",
    "VIRT_ENTRY": "entry",
    "ELF_PADDR_OFFSET": "paddr_offset",
    "HYPERCALL_PAGE": "hypercall_page",
}


@dataclass
class XenNotes:
    """The notes of one image; None or "" where the kernel says nothing. Addresses are virtual, in bytes.

    `supported` and `required` are bitmaps of XENFEAT_*; a required feature is supported, too. `legacy` is set
    when all this came from a `__xen_guest` section. `l1_mfn_valid` holds (mask, value) pairs. `pae` is "no",
    "yes", "extended-cr3" or "bimodal" and means nothing to a 64-bit kernel.
    """

    entry: int | None = None
    hypercall_page: int | None = None
    virt_base: int | None = None
    paddr_offset: int | None = None
    hv_start_low: int | None = None
    init_p2m: int | None = None
    phys32_entry: int | None = None
    mod_start_pfn: int | None = None
    suspend_cancel: int | None = None
    xen_version: str = ""
    guest_os: str = ""
    guest_version: str = ""
    loader: str = ""
    pae: str = "no"
    bsd_symtab: bool = False
    supported: int = 0
    required: int = 0
    l1_mfn_valid: list[tuple[int, int]] = field(default_factory=list)
    legacy: bool = False


def read_notes(elf: Elf) -> XenNotes | None:
    """The image's Xen notes, or None if it has none at all. ImageError where libelf gives up on the image."""
    notes = XenNotes()
    found = total = 0
    # Old binutils left p_offset 0 in note segments.
    places = [(p.offset, p.filesz) for p in elf.phdrs if p.type == PT_NOTE and p.offset]
    sections = [(s.offset, s.size) for s in elf.shdrs[1:] if s.type == SHT_NOTE]
    for source in (places, sections):
        for offset, size in source:
            for owner, kind, desc, descsz in _notes(elf, offset, size):
                total += 1
                if total > MAX_NOTES:
                    raise ImageError(f"corrupt ELF: more than {MAX_NOTES} notes")
                if owner == "Xen":
                    found += 1
                    _take(notes, elf, kind, desc, descsz)
        if found:
            return notes
    section = _section(elf, "__xen_guest")
    if section is None:
        return None
    elf.section_bytes(section)
    text = elf.string_at(section.offset)
    if text is None:
        raise ImageError("corrupt ELF: the text in section __xen_guest has no end")
    _parse_guest_info(notes, text)
    return notes


def _section(elf: Elf, name: str) -> Shdr | None:
    return next((s for s in elf.shdrs[1:] if elf.section_name(s) == name), None)


def _notes(elf: Elf, offset: int, size: int) -> Iterator[tuple[str | None, int, int, int]]:
    """(owner, type, file offset of the description, its size) of each note in a segment or section."""
    data = elf.bytes_at(offset, size, "a segment or section of notes")
    position = 0
    while position + 12 <= size:
        namesz = int.from_bytes(data[position : position + 4], "little")
        descsz = int.from_bytes(data[position + 4 : position + 8], "little")
        kind = int.from_bytes(data[position + 8 : position + 12], "little")
        desc = position + 12 + (namesz + 3 & ~3)
        yield elf.string_at(offset + position + 12), kind, offset + desc, descsz
        position = desc + (descsz + 3 & ~3)


def _take(notes: XenNotes, elf: Elf, kind: int, desc: int, descsz: int) -> None:
    """elf_xen_parse_note."""
    if kind in _NUMBERS:
        setattr(notes, _NUMBERS[kind], _number(elf, desc, descsz))
    elif kind == note.XEN_ELFNOTE_SUPPORTED_FEATURES:
        if descsz % 4 == 0 and descsz:
            notes.supported |= int.from_bytes(elf.bytes_at(desc, 4, "a Xen note"), "little")
    elif kind == note.XEN_ELFNOTE_L1_MFN_VALID:
        words = elf.bytes_at(desc, descsz & ~15, "a Xen note").cast("Q").tolist()
        notes.l1_mfn_valid = list(zip(words[::2], words[1::2], strict=True))
    elif kind in _STRINGS or kind in (
        note.XEN_ELFNOTE_PAE_MODE,
        note.XEN_ELFNOTE_FEATURES,
        note.XEN_ELFNOTE_BSD_SYMTAB,
    ):
        text = elf.string_at(desc)
        if text is None:
            raise ImageError(f"corrupt ELF: Xen note of type {kind} is a string without an end")
        if kind in _STRINGS:
            setattr(notes, _STRINGS[kind], text)
        elif kind == note.XEN_ELFNOTE_FEATURES:
            parse_features(notes, text)
        elif kind == note.XEN_ELFNOTE_BSD_SYMTAB:
            notes.bsd_symtab |= text == "yes"
        elif "bimodal" in text:
            notes.pae = "bimodal"
        elif text == "yes":  # a kernel with notes is new enough to mean extended-cr3 (elfnote.h)
            notes.pae = "extended-cr3"


def _number(elf: Elf, desc: int, descsz: int) -> int:
    """elf_note_numeric: a number of an odd size counts as 0."""
    if descsz not in (1, 2, 4, 8):
        return 0
    return int.from_bytes(elf.bytes_at(desc, descsz, "a Xen note"), "little")


def parse_features(notes: XenNotes, text: str) -> None:
    """Add a feature string, "a|!b" with ! before what is required; elf_xen_parse_features.

    Unknown names are ignored, but ImageError for one that is required.
    """
    for word in text.split("|"):
        name = word.removeprefix("!")
        bit = note.ELFNOTE_FEATURE_BITS.get(name)
        if bit is not None:
            notes.supported |= 1 << bit
            if word != name:
                notes.required |= 1 << bit
        elif word != name:
            raise ImageError(f"requires feature {name!r}, which Xen doesn't know")


def _parse_guest_info(notes: XenNotes, text: str) -> None:
    """elf_xen_parse_guest_info: NAME=VALUE pairs with commas between them."""
    notes.legacy = True
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name in _GUEST_STRINGS:
            setattr(notes, _GUEST_STRINGS[name], value)
        elif name in _GUEST_NUMBERS:
            setattr(notes, _GUEST_NUMBERS[name], _strtoull(value))
        elif name == "PAE" and value.startswith("yes"):
            notes.pae = "extended-cr3" if value == "yes[extended-cr3]" else "yes"
        elif name == "BSD_SYMTAB":  # here its presence is enough
            notes.bsd_symtab = True
        elif name == "FEATURES":
            parse_features(notes, value)
    if notes.hypercall_page is not None:  # a page number, counted from virt_base
        notes.hypercall_page = (notes.hypercall_page << 12) + (notes.virt_base or 0) & U64


def _strtoull(text: str) -> int:
    """C's strtoull with base 0: what can't be read is 0, what follows the digits is ignored."""
    match = re.match(r"\s*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", text)
    if match is None:
        return 0
    sign, hexadecimal, octal, decimal = match.groups()
    number = int(hexadecimal, 16) if hexadecimal else int(octal, 8) if octal else int(decimal)
    number = min(number, U64)
    return -number & U64 if sign == "-" else number

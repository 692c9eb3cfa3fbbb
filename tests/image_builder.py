"""Builds small kernel images for tests: ELF files with Xen notes, bzImages, and Linux's kallsyms tables."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import lz4.block
import lz4.frame
import zstandard

from pvirq.abi.elfnote import (
    XEN_ELFNOTE_ENTRY,
    XEN_ELFNOTE_FEATURES,
    XEN_ELFNOTE_GUEST_OS,
    XEN_ELFNOTE_LOADER,
    XEN_ELFNOTE_VIRT_BASE,
    XEN_ELFNOTE_XEN_VERSION,
)
from pvirq.pv.elf import EHDR, PHDR, SHDR

VIRT_BASE = 0xFFFFFFFF80000000
PADDR = 0x1000000
TEXT = VIRT_BASE + PADDR

Note = tuple[int, bytes]
LINUX_NOTES: list[Note] = [
    (XEN_ELFNOTE_GUEST_OS, b"linux\0"),
    (XEN_ELFNOTE_LOADER, b"generic\0"),
    (XEN_ELFNOTE_XEN_VERSION, b"xen-3.0\0"),
    (XEN_ELFNOTE_VIRT_BASE, struct.pack("<Q", VIRT_BASE)),
    (XEN_ELFNOTE_ENTRY, struct.pack("<Q", TEXT + 0x10)),
    # Linux counts no NUL in this one; the padding ends it.
    (XEN_ELFNOTE_FEATURES, b"!writable_page_tables|pae_pgdir_above_4gb"),
]


def pad(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)


def note_block(notes: list[Note], owner: bytes = b"Xen\0") -> bytes:
    return b"".join(
        struct.pack("<III", len(owner), len(desc), kind) + pad(owner, 4) + pad(desc, 4) for kind, desc in notes
    )


def build_elf(
    text: bytes = b"\x90" * 0x100,
    notes: bytes | None = None,
    *,
    machine: int = 62,
    phdrs: list[tuple[int, ...]] | None = None,
    sections: list[tuple[str, int, int, int, bytes]] = [],  # noqa: B006
    note_type: int = 4,
    memsz: int | None = None,
    paddr: int = PADDR,
    vaddr: int | None = None,
    links: dict[str, int] = {},  # noqa: B006
) -> bytes:
    """One RWX segment with `text`, one of notes. `sections`: (name, sh_type, sh_flags, sh_addr, content)."""
    if notes is None:
        notes = note_block(LINUX_NOTES)
    text_at = 0x200
    notes_at = text_at + len(pad(text, 8))
    body = pad(text, 8) + pad(notes, 8)
    vaddr = VIRT_BASE + paddr if vaddr is None else vaddr
    if phdrs is None:
        phdrs = [
            (1, 7, text_at, vaddr, paddr, len(text), max(len(text), memsz or 0x2000), 4096),
            (note_type, 4, notes_at, 0, 0, len(notes), len(notes), 4),
        ]
    names = b"\0"
    shdrs = []
    for name, kind, flags, addr, content in sections:
        if kind == 1 and content == text:  # .text is the segment itself
            offset = text_at
        else:
            offset = text_at + len(body)
            body += pad(content, 8)
        link = links.get(name, 0)
        shdrs.append((len(names), kind, flags, addr, offset, len(content), link, 0, 1, 24 if kind == 2 else 0))
        names += name.encode() + b"\0"
    shnum = shoff = 0
    if sections:
        shdrs.append((len(names), 3, 0, 0, text_at + len(body), len(names) + 10, 0, 0, 1, 0))
        body += pad(names + b".shstrtab\0", 8)
        shoff, shnum = text_at + len(body), len(shdrs) + 1
        body += bytes(SHDR.size) + b"".join(SHDR.pack(*shdr) for shdr in shdrs)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = EHDR.pack(
        ident,
        2,
        machine,
        1,
        vaddr,
        64,
        shoff,
        0,
        64,
        56,
        len(phdrs),
        64 if shnum else 0,
        shnum,
        max(shnum - 1, 0),
    )
    return (header + b"".join(PHDR.pack(*phdr) for phdr in phdrs)).ljust(text_at, b"\0") + body


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[start : start + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def zstd(data: bytes) -> bytes:
    """As the kernel's build does it: without the content's size in the header."""
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lambda data: lzma.compress(data, lzma.FORMAT_XZ, preset=0),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0),
    "zstd": zstd,
    "lz4": lz4_legacy,
    "lz4frame": lz4.frame.compress,
}


def bzimage_payload(elf: bytes, compression: str) -> bytes:
    packed = COMPRESSIONS[compression](elf)
    return packed if compression == "gzip" else packed + struct.pack("<I", len(elf))


def build_bzimage(payload: bytes, version: int = 0x20F, setup_sects: int = 3, offset: int = 0x2CC) -> bytes:
    setup = bytearray((setup_sects + 1) * 512 + offset)
    setup[:2] = b"MZ"
    setup[0x1F1] = setup_sects
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, offset, len(payload))
    return bytes(setup) + payload + b"after the kernel"


# --- kallsyms ---


def compress_names(names: list[str]) -> tuple[list[bytes], list[list[int]]]:
    """A token table and the symbols in tokens, in the manner of scripts/kallsyms.c."""
    used = set("".join(names).encode()) | set(b"0123456789")
    free = [code for code in range(1, 256) if code not in used]
    tokens = [bytes([code]) for code in range(256)]
    tokens[0] = b"A0"  # never used, but not empty, as in the kernel
    coded = [list(name.encode()) for name in names]
    for code in free:
        pairs = Counter(pair for symbol in coded for pair in pairwise(symbol))
        (left, right), count = pairs.most_common(1)[0] if pairs else ((0, 0), 0)
        if count < 2 or len(tokens[left]) + len(tokens[right]) > 20:
            tokens[code] = b"zz%d" % code
            continue
        tokens[code] = tokens[left] + tokens[right]
        for i, symbol in enumerate(coded):
            merged: list[int] = []
            for byte in symbol:
                if merged and merged[-1] == left and byte == right:
                    merged[-1] = code
                else:
                    merged.append(byte)
            coded[i] = merged
    return tokens, coded


def build_kallsyms(
    symbols: list[tuple[int, str]],
    va: int,
    *,
    encoding: str = "relative",
    behind: bool = False,
    marker_width: int = 4,
    big: bool = True,
    seqs: bool = False,
) -> bytes:
    """The tables as they lie in .rodata at `va`. `symbols`: (address, type letter and name), ascending.

    `encoding`: relative, percpu, place or absolute; `behind`: the 6.4 order, addresses behind the tokens.
    """
    tokens, coded = compress_names([name for _, name in symbols])
    base = min(address for address, _ in symbols if address >> 47)

    def addresses(at: int) -> bytes:
        values = [address for address, _ in symbols]
        if encoding == "absolute":
            return struct.pack(f"<{len(values)}Q", *values)
        if encoding == "place":
            return struct.pack(f"<{len(values)}i", *(v - (at + 4 * i) for i, v in enumerate(values)))
        if encoding == "percpu":
            packed = struct.pack(f"<{len(values)}i", *(base - 1 - v if v >> 47 else v for v in values))
        else:
            packed = struct.pack(f"<{len(values)}I", *(v - base for v in values))
        return pad(packed, 8) + struct.pack("<Q", base)

    names, markers = b"", []
    for i, symbol in enumerate(coded):
        if not i % 256:
            markers.append(len(names))
        length = len(symbol)
        names += bytes([length & 0x7F | 0x80, length >> 7] if big and length > 0x7F else [length]) + bytes(symbol)
    seq = b"".join(i.to_bytes(3, "big") for i in range(len(symbols)))
    out = b"" if behind else pad(addresses(va), 8)
    out += struct.pack("<Q", len(symbols)) + pad(names, 8)
    out += pad(struct.pack(f"<{len(markers)}{'I' if marker_width == 4 else 'Q'}", *markers), 8)
    if seqs and not behind:
        out += pad(seq, 8)
    offsets = [sum(len(token) + 1 for token in tokens[:i]) for i in range(256)]
    out += pad(b"".join(token + b"\0" for token in tokens), 8) + struct.pack("<256H", *offsets)
    if behind:
        out += pad(addresses(va + len(out)), 8) + seq
    return out

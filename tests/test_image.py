"""Kernel images: formats, notes, checks, and damaged files."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_builder import (
    COMPRESSIONS,
    LINUX_NOTES,
    PADDR,
    TEXT,
    VIRT_BASE,
    build_bzimage,
    build_elf,
    bzimage_payload,
    note_block,
)
from pvirq.abi import elfnote as note
from pvirq.pv import decompress as formats
from pvirq.pv.elf import EHDR, SHDR, ImageError
from pvirq.pv.image import decompress, has_xen_notes, load_image, parse_elf

ELF = build_elf()


def quad(value: int) -> bytes:
    return struct.pack("<Q", value)


def with_notes(*changes: tuple[int, bytes | None]) -> bytes:
    """The Linux-like kernel with some notes replaced, added, or (None) taken out."""
    notes = dict(LINUX_NOTES) | dict(changes)
    return build_elf(notes=note_block([(kind, desc) for kind, desc in notes.items() if desc is not None]))


def legacy(text: str, **more: int) -> bytes:
    """A kernel with a __xen_guest section instead of notes."""
    return build_elf(notes=b"", sections=[("__xen_guest", 1, 0, 0, text.encode() + b"\0")], **more)


# --- formats ---


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bzimage(compression: str) -> None:
    image = load_image(build_bzimage(bzimage_payload(ELF, compression)))
    assert image.entry == TEXT + 0x10
    assert bytes(image.elf.data) == ELF


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_elf(compression: str) -> None:
    packed = COMPRESSIONS[compression](ELF)
    assert bytes(decompress(packed)) == ELF
    assert bytes(decompress(packed + struct.pack("<I", len(ELF)))) == ELF  # a payload cut out of a bzImage


@pytest.mark.parametrize("compression", ["gzip", "bzip2", "xz"])
def test_streams_end_to_end(compression: str) -> None:
    """Parallel compressors write several streams."""
    pack = COMPRESSIONS[compression]
    assert bytes(decompress(pack(ELF[:300]) + pack(ELF[300:]))) == ELF
    with pytest.raises(ImageError, match="streams end to end"):
        decompress(pack(b"") * 300 + pack(ELF))


def test_large_payload_of_several_lz4_blocks() -> None:
    elf = build_elf(text=bytes(range(256)) * (70 << 10))
    assert bytes(decompress(build_bzimage(bzimage_payload(elf, "lz4")))) == elf


def test_nested() -> None:
    bzimage = build_bzimage(bzimage_payload(ELF, "lz4"))
    assert bytes(decompress(COMPRESSIONS["gzip"](bzimage))) == ELF
    packed = ELF
    for _ in range(4):
        packed = COMPRESSIONS["gzip"](packed)
    with pytest.raises(ImageError, match="several layers"):
        decompress(packed)


def test_uncompressed_payload() -> None:
    assert bytes(decompress(build_bzimage(ELF)))[: len(ELF)] == ELF


def test_load_from_path(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(build_bzimage(bzimage_payload(ELF, "zstd")))
    assert load_image(path).entry == load_image(str(path)).entry == TEXT + 0x10
    assert has_xen_notes(path)


# --- what is in an image ---


def test_linux_like() -> None:
    image = parse_elf(
        with_notes(
            (note.XEN_ELFNOTE_HYPERCALL_PAGE, quad(TEXT + 0x1000)),
            (note.XEN_ELFNOTE_INIT_P2M, quad(0x8000000000)),
            (note.XEN_ELFNOTE_HV_START_LOW, quad(0xFFFF800000000000)),
            (note.XEN_ELFNOTE_MOD_START_PFN, struct.pack("<I", 1)),
            (note.XEN_ELFNOTE_SUSPEND_CANCEL, struct.pack("<I", 1)),
            (note.XEN_ELFNOTE_SUPPORTED_FEATURES, struct.pack("<I", 0x8801)),
            (note.XEN_ELFNOTE_L1_MFN_VALID, quad(1) + quad(1)),
            (note.XEN_ELFNOTE_PAE_MODE, b"yes\0"),
            (note.XEN_ELFNOTE_GUEST_VERSION, b"2.6\0"),
            (note.XEN_ELFNOTE_PHYS32_ENTRY, quad(PADDR + 0x80)),
            (0x1234, b"unknown"),
        )
    )
    assert image.virt_base == VIRT_BASE
    assert (image.virt_kstart, image.virt_kend) == (TEXT, TEXT + 0x2000)
    assert image.hypercall_page == TEXT + 0x1000
    assert image.init_p2m == 0x8000000000
    assert image.hv_start_low == 0xFFFF800000000000
    assert image.phys32_entry == PADDR + 0x80
    assert image.mod_start_pfn
    assert image.suspend_cancel
    assert image.l1_mfn_valid == ((1, 1),)
    assert image.pae == "extended-cr3"
    assert (image.guest_os, image.guest_version, image.loader) == ("linux", "2.6", "generic")
    assert image.required_feature_names == {"writable_page_tables"}
    assert image.supported_feature_names == {
        "writable_page_tables",
        "pae_pgdir_above_4gb",
        "dom0",
        "linux_rsdp_unrestricted",
    }
    (segment,) = image.segments
    assert (segment.paddr, segment.vaddr, segment.memsz, segment.flags) == (PADDR, TEXT, 0x2000, 7)
    assert bytes(segment.data) == b"\x90" * 0x100


def test_defaults() -> None:
    image = parse_elf(ELF)
    assert (image.init_p2m, image.hypercall_page, image.hv_start_low, image.phys32_entry) == (None,) * 4
    assert not image.mod_start_pfn
    assert not image.bsd_symtab
    assert image.paddr_offset == 0
    assert image.exec_ranges == ((TEXT, TEXT + 0x2000),)


def test_no_entry_note_means_e_entry() -> None:
    assert parse_elf(with_notes((note.XEN_ELFNOTE_ENTRY, None))).entry == TEXT


def test_paddr_offset() -> None:
    """Old kernels have virtual addresses in p_paddr and say so."""
    notes = note_block([*LINUX_NOTES, (note.XEN_ELFNOTE_PADDR_OFFSET, quad(VIRT_BASE))])
    image = parse_elf(build_elf(notes=notes, paddr=TEXT, vaddr=TEXT))
    assert image.paddr_offset == VIRT_BASE
    assert image.segments[0].paddr == PADDR
    assert (image.virt_kstart, image.virt_kend) == (TEXT, TEXT + 0x2000)


def test_notes_in_a_section_only() -> None:
    block = note_block(LINUX_NOTES)
    image = parse_elf(build_elf(notes=b"", note_type=0, sections=[(".note.Xen", 7, 2, 0, block)]))
    assert image.entry == TEXT + 0x10


def test_notes_of_others_are_skipped() -> None:
    gnu = note_block([(note.XEN_ELFNOTE_ENTRY, quad(1))], b"GNU\0")
    assert parse_elf(build_elf(notes=gnu + note_block(LINUX_NOTES) + gnu)).entry == TEXT + 0x10
    with pytest.raises(ImageError, match="no Xen ELF notes"):
        parse_elf(build_elf(notes=gnu))


def test_xen_guest_section() -> None:
    """What XenLinux 2.6.18 and NetBSD before notes say; paddr counts from virt_base by default."""
    text = (
        f"GUEST_OS=linux,GUEST_VER=2.6,XEN_VER=xen-3.0,VIRT_BASE={VIRT_BASE:#x},VIRT_ENTRY={TEXT:#x},"
        "HYPERCALL_PAGE=0x1001,FEATURES=writable_page_tables|pae_pgdir_above_4gb,PAE=yes[extended-cr3],LOADER=generic"
    )
    image = parse_elf(legacy(text, paddr=TEXT, vaddr=TEXT))
    assert image.entry == TEXT
    assert image.paddr_offset == VIRT_BASE
    assert image.hypercall_page == TEXT + 0x1000
    assert image.required_features == 0
    assert image.supported_feature_names == {"writable_page_tables", "pae_pgdir_above_4gb"}
    assert (image.guest_version, image.pae) == ("2.6", "extended-cr3")


def test_exec_ranges_from_sections() -> None:
    text = b"\x90" * 0x1000
    image = parse_elf(
        build_elf(
            text,
            memsz=0x5000,
            sections=[
                (".init.text", 1, 6, TEXT + 0x800, b"x" * 0x100),
                (".text", 1, 6, TEXT, b"x" * 0x700),
                (".more.text", 1, 6, TEXT + 0x700, b"x" * 0x20),
                (".data", 1, 3, TEXT + 0x900, b"x" * 0x100),
                (".elsewhere", 1, 6, 0x4000, b"x" * 0x100),
            ],
        )
    )
    assert image.exec_ranges == ((TEXT, TEXT + 0x720), (TEXT + 0x800, TEXT + 0x900))


def test_bsd_symtab() -> None:
    """The block has the layout that NetBSD reads: a size, an ELF header, its two tables."""
    strings = b"\0start\0panic\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0x12, 0, 1, TEXT, 4)
    image = parse_elf(
        build_elf(
            memsz=0x1001,
            notes=note_block([*LINUX_NOTES, (note.XEN_ELFNOTE_BSD_SYMTAB, b"yes\0")]),
            sections=[(".symtab", 2, 0, 0, symbols), (".strtab", 3, 0, 0, strings)],
            links={".symtab": 2},
        )
    )
    assert image.bsd_symtab
    block = image.segments[1]
    assert (block.paddr, block.vaddr) == (PADDR + 0x1008, TEXT + 0x1008)
    assert image.virt_kend == block.vaddr + block.memsz
    size = int.from_bytes(block.data[:4], "little")
    assert size <= block.memsz - 4
    ehdr = EHDR.unpack_from(block.data, 4)
    assert ehdr[6] == 64
    assert ehdr[11:13] == (64, 3)
    for i, content in ((1, symbols), (2, strings)):
        shdr = SHDR.unpack_from(block.data, 4 + 64 + 64 * i)
        assert bytes(block.data[4 + shdr[4] : 4 + shdr[4] + shdr[5]]) == content
    assert parse_elf(build_elf(notes=note_block([*LINUX_NOTES, (note.XEN_ELFNOTE_BSD_SYMTAB, b"yes\0")]))).bsd_symtab


def test_features() -> None:
    def load(text: bytes, *more: str) -> int:
        features = {"writable_page_tables", *more}
        return parse_elf(with_notes((note.XEN_ELFNOTE_FEATURES, text)), features).required_features

    assert load(b"!writable_page_tables|!pae_pgdir_above_4gb\0", "pae_pgdir_above_4gb") == 0x11
    assert load(b"new_thing|dom0\0") == 0
    with pytest.raises(ImageError, match="requires feature 'new_thing'"):
        load(b"!new_thing\0")
    with pytest.raises(ImageError, match="runs only as dom0"):
        load(b"!dom0\0")
    with pytest.raises(ImageError, match="auto_translated_physmap, supervisor_mode_kernel"):
        load(b"!supervisor_mode_kernel|!auto_translated_physmap\0")


# --- refusals ---


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\necho\n" * 100, "is not a kernel: neither bzImage nor ELF"),
        (bytes(4096), "is not a kernel"),
        (b"\x7fELF", "truncated ELF"),
        (ELF[:60], "truncated ELF"),
        (ELF[:100], "program header table .* beyond the end"),
        (ELF[:0x280], "segment .* beyond the end"),
        (build_elf(machine=183), "not an x86-64 ELF"),
        (ELF[:4] + b"\1" + ELF[5:18] + b"\3" + ELF[19:], "32-bit x86 kernel"),
        (build_elf(notes=b"\0" * 8), "no Xen ELF notes.*CONFIG_XEN_PV"),
        (build_elf(notes=note_block([(note.XEN_ELFNOTE_PHYS32_ENTRY, quad(0x1000000))])), "only a PVH entry"),
        (
            with_notes((note.XEN_ELFNOTE_LOADER, None), (note.XEN_ELFNOTE_GUEST_OS, b"hurd\0")),
            "another loader",
        ),
        (with_notes((note.XEN_ELFNOTE_XEN_VERSION, b"xen-4.0\0")), "is for 'xen-4.0', not for 'xen-3.0'"),
        (with_notes((note.XEN_ELFNOTE_XEN_VERSION, None)), "is for no version of Xen"),
        (
            with_notes((note.XEN_ELFNOTE_VIRT_BASE, None), (note.XEN_ELFNOTE_PADDR_OFFSET, quad(0))),
            "PADDR_OFFSET, but not VIRT_BASE",
        ),
        (with_notes((note.XEN_ELFNOTE_ENTRY, quad(TEXT + 0x2001))), "don't fit"),
        (with_notes((note.XEN_ELFNOTE_ENTRY, quad(TEXT - 1))), "don't fit"),
        (with_notes((note.XEN_ELFNOTE_INIT_P2M, quad(TEXT + 0x1000))), "p2m table"),
        (with_notes((note.XEN_ELFNOTE_HYPERCALL_PAGE, quad(0x1000))), "hypercall page"),
        (build_elf(memsz=5 << 30), "it would load from"),
        (
            build_elf(phdrs=[(1, 7, 0x200, TEXT, PADDR, 0x100, 0x80, 0), (4, 4, 0x300, 0, 0, 0xB8, 0, 0)]),
            "memory",
        ),
        (build_elf(phdrs=[(4, 4, 0x300, 0, 0, 0xB8, 0, 0)]), "nothing in it to load"),
        (
            build_elf(phdrs=[(1, 7, 0x200, TEXT, PADDR, 0x10, 0x2000, 0)] * 3 + [(4, 4, 0x300, 0, 0, 0xB8, 0, 0)]),
            "add up to more",
        ),
        (build_bzimage(b"\x89LZO\0" + bytes(20)), "LZO"),
        (build_bzimage(b"\x12\x34\x56" + bytes(20)), "unknown compression .*12 34 56"),
        (build_bzimage(b"tiny"), "compressed kernel of 4 bytes"),
        (build_bzimage(bzimage_payload(ELF, "xz"), version=0x207), "boot protocol 2.07"),
        (build_bzimage(bzimage_payload(ELF, "xz"))[:0x240], "truncated bzImage"),
        (build_bzimage(bzimage_payload(ELF, "xz"))[:-40], "its kernel ends at"),
        (build_bzimage(COMPRESSIONS["xz"](ELF) + struct.pack("<I", len(ELF) - 1)), "become more"),
        (build_bzimage(COMPRESSIONS["zstd"](ELF) + struct.pack("<I", len(ELF) + 1)), f"became {len(ELF)}"),
        (build_bzimage(COMPRESSIONS["lz4"](ELF) + b"\xff\xff\xff\xff"), "4095 MiB"),
        (build_bzimage(bzimage_payload(b"no ELF" * 10, "lz4")), "is not a kernel"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        load_image(data)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_bomb(compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing decompresses beyond the limit, nor much further before it is noticed."""
    monkeypatch.setattr(formats, "MAX_IMAGE", 1 << 20)
    packed = COMPRESSIONS[compression](bytes(20 << 20))
    with pytest.raises(ImageError, match="grow beyond 1 MiB"):
        decompress(packed)
    with pytest.raises(ImageError, match="become more"):
        decompress(
            build_bzimage(packed[:-4] + struct.pack("<I", 4096) if compression == "gzip" else packed + b"\0\x10\0\0")
        )


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_truncated_stream(compression: str) -> None:
    packed = COMPRESSIONS[compression](os.urandom(5000))
    for length in (20, len(packed) // 2, len(packed) - 1):
        with pytest.raises(ImageError, match=r"truncated|corrupt"):
            decompress(packed[:length])


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere: No such file"):
        load_image(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="is a directory"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="not a regular file"):
        load_image("/dev/null")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ImageError, match="not a regular file"):
        load_image(fifo)
    with pytest.raises(ImageError, match="null"):
        load_image("a\0b")
    huge = tmp_path / "huge"
    with open(huge, "wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(ImageError, match="no kernel is that large"):
        load_image(huge)
    secret = tmp_path / "secret"
    secret.write_bytes(ELF)
    secret.chmod(0)
    if os.geteuid():
        with pytest.raises(ImageError, match="permission denied"):
            load_image(secret)


def test_has_xen_notes(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz-6.1"
    assert not has_xen_notes(kernel)
    kernel.write_bytes(b"not looked at when there is a config")
    assert not has_xen_notes(kernel)
    config = tmp_path / "config-6.1"
    config.write_text("# Linux\nCONFIG_XEN=y\nCONFIG_XEN_PV=y\n")
    assert has_xen_notes(kernel)
    config.write_text("# Linux\n# CONFIG_XEN_PV is not set\n")
    assert not has_xen_notes(kernel)
    assert not has_xen_notes(tmp_path)
    assert not has_xen_notes("a\0b")


# --- damage ---

SAMPLES = {
    "elf": build_elf(
        sections=[
            (".text", 1, 6, TEXT, b"\x90" * 0x100),
            (".symtab", 2, 0, 0, bytes(48)),
            (".strtab", 3, 0, 0, b"\0start\0"),
        ],
        notes=note_block([*LINUX_NOTES, (note.XEN_ELFNOTE_BSD_SYMTAB, b"yes\0")]),
        links={".symtab": 3},
    ),
    "legacy": legacy("GUEST_OS=linux,XEN_VER=xen-3.0,VIRT_BASE=0xffffffff80000000,FEATURES=!dom0|x,HYPERCALL_PAGE=1"),
    **{name: build_bzimage(bzimage_payload(ELF, name)) for name in COMPRESSIONS},
    **{f"bare {name}": COMPRESSIONS[name](ELF) for name in COMPRESSIONS},
}


def load_or_image_error(image: bytes | bytearray) -> None:
    message = ""
    try:
        load_image(image)
    except ImageError as error:
        message = str(error)
    assert "\n" not in message


@settings(max_examples=600, deadline=2000)
@given(data=st.data())
def test_damaged_images_raise_image_error_only(data: st.DataObject) -> None:
    image = bytearray(SAMPLES[data.draw(st.sampled_from(sorted(SAMPLES)))])
    flips = st.lists(st.tuples(st.integers(0, len(image) - 1), st.integers(0, 255)), max_size=4)
    for position, value in data.draw(flips):
        image[position] = value
    image = image[: data.draw(st.integers(0, len(image)) | st.just(len(image)))]
    load_or_image_error(image)


@settings(max_examples=300, deadline=2000)
@given(fields=st.lists(st.tuples(st.integers(0, 0x1A0 // 8), st.integers(0, (1 << 64) - 1)), max_size=3))
def test_damaged_headers_raise_image_error_only(fields: list[tuple[int, int]]) -> None:
    """Whole header words replaced, which single bytes rarely do in a way that matters."""
    image = bytearray(SAMPLES["elf"])
    for index, value in fields:
        struct.pack_into("<Q", image, 8 * index, value)
    load_or_image_error(image)


def test_absurd_section_size() -> None:
    """Sizes are believed only after a look at the file."""
    image = bytearray(SAMPLES["elf"])
    shoff = int.from_bytes(image[40:48], "little")
    struct.pack_into("<Q", image, shoff + 3 * 64 + 32, 1 << 62)  # .strtab's sh_size
    with pytest.raises(ImageError, match="beyond the end"):
        load_image(image)


@settings(max_examples=200)
@given(st.binary(max_size=600))
def test_any_bytes(data: bytes) -> None:
    for prefix in (
        b"",
        b"\x7fELF\2\1\1",
        b"\x1f\x8b",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
        b"]\0\0",
        b"\x02\x21\x4c\x18",
    ):
        with pytest.raises(ImageError):
            load_image(prefix + data)

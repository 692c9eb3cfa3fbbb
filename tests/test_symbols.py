"""Symbols: System.map, .symtab, and kallsyms tables of every layout from 4.x to 7.x."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_builder import LINUX_NOTES, TEXT, build_elf, build_kallsyms, note_block
from pvirq.pv.elf import ImageError
from pvirq.pv.image import KernelImage, parse_elf
from pvirq.pv.symbols import Symbols, SymbolTable, read_system_map, symbols_for, system_map_for

MAP = b"""\
0000000000000000 D __per_cpu_start
0000000000001000 D cpu_debug_store
ffffffff81000000 T startup_64
ffffffff81000000 T _stext
ffffffff81000070 T secondary_startup_64
ffffffff81000100 t helper
ffffffff81000180 t helper
ffffffff81000200 A VDSO32_PRELINK
ffffffff81000280 B _end
"""


def from_map(text: bytes, bias: int = 0) -> Symbols:
    return Symbols(lambda: read_system_map(text), bias)


def test_lookup() -> None:
    symbols = from_map(MAP)
    assert symbols.source == "System.map"
    assert symbols.lookup(0xFFFFFFFF81000000) == ("startup_64", 0, 0x70)
    assert symbols.lookup(0xFFFFFFFF81000012) == ("startup_64", 0x12, 0x70)
    assert symbols.lookup(0xFFFFFFFF810001FF) == ("helper", 0x7F, 0x100)
    assert symbols.lookup(0xFFFFFFFF81000280) == ("_end", 0, None)
    for outside in (0, 0x1004, 0xFFFFFFFF80FFFFFF, 0xFFFFFFFF81000281, (1 << 64) - 1):
        assert symbols.lookup(outside) is None
        assert symbols.format(outside) == f"{outside:#x}"
    assert symbols.format(0xFFFFFFFF81000082) == "secondary_startup_64+0x12/0x90"
    assert symbols.format(0xFFFFFFFF81000280) == "_end+0x0"


def test_address() -> None:
    symbols = from_map(MAP)
    assert symbols.address("_stext") == 0xFFFFFFFF81000000
    assert symbols.address("helper") == 0xFFFFFFFF81000100
    assert symbols.address("cpu_debug_store") == 0x1000
    assert symbols.address("nobody") is None


def test_bias() -> None:
    symbols = from_map(MAP, bias=0x1000000)
    assert symbols.format(0xFFFFFFFF82000071) == "secondary_startup_64+0x1/0x90"
    assert symbols.lookup(0xFFFFFFFF81000071) is None
    assert symbols.address("helper") == 0xFFFFFFFF82000100
    assert symbols.address("cpu_debug_store") == 0x1000  # an offset doesn't move


def test_nothing_known_and_nothing_asked() -> None:
    calls = []

    def load() -> SymbolTable | None:
        calls.append(1)
        return None

    symbols = Symbols(load)
    assert not calls
    assert symbols.lookup(TEXT) is None
    assert symbols.address("panic") is None
    assert symbols.format(TEXT) == f"{TEXT:#x}"
    assert (symbols.source, len(symbols), calls) == ("", 0, [1])


def test_stub_and_garbage_maps() -> None:
    with pytest.raises(ImageError, match=r"stub.*-dbg package"):
        read_system_map(b"ffffffffffffffff B The real System.map is in the linux-image-<version>-dbg package\n")
    for text in (b"", b"\0" * 100, b"nothing here\n"):
        with pytest.raises(ImageError, match=r"not a System\.map"):
            read_system_map(text)


def test_system_map_for(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz-6.1.0-1-amd64"
    assert system_map_for(kernel) is None
    (tmp_path / "System.map-6.1.0-1-amd64").write_bytes(MAP)
    assert system_map_for(kernel) == tmp_path / "System.map-6.1.0-1-amd64"
    assert system_map_for(tmp_path / "other") is None


# --- .symtab ---


def elf_symbols(*entries: tuple[str, int, int, int, int]) -> KernelImage:
    """A kernel with these symbols: (name, st_info, section, value, size)."""
    strings, table = b"\0", bytes(24)
    for name, info, section, value, size in entries:
        table += struct.pack("<IBBHQQ", len(strings), info, 0, section, value, size)
        strings += name.encode() + b"\0"
    return parse_elf(
        build_elf(sections=[(".symtab", 2, 0, 0, table), (".strtab", 3, 0, 0, strings)], links={".symtab": 2})
    )


def test_symtab() -> None:
    symbols = symbols_for(
        elf_symbols(
            ("label", 0x00, 1, TEXT, 0),
            ("start", 0x12, 1, TEXT, 0x20),
            ("local", 0x02, 1, TEXT + 0x40, 0x10),
            ("asm", 0x10, 1, TEXT + 0x60, 0),
            ("file.c", 0x04, 0xFFF1, 0, 0),
            ("missing", 0x10, 0, 0, 0),
            ("constant", 0x10, 0xFFF1, 7, 0),
            ("data", 0x11, 2, TEXT + 0x80, 0x100),
        )
    )
    assert symbols.source == "symtab"
    assert symbols.lookup(TEXT + 4) == ("start", 4, 0x20)
    assert symbols.lookup(TEXT + 0x24) == ("start", 0x24, 0x40)  # padding counts for the one before
    assert symbols.lookup(TEXT + 0x61) == ("asm", 1, 0x20)
    assert symbols.lookup(TEXT + 0x17F) == ("data", 0xFF, 0x100)
    assert symbols.lookup(TEXT + 0x180) is None
    assert symbols.address("label") == TEXT
    assert [symbols.address(name) for name in ("file.c", "missing", "constant")] == [None] * 3


def test_map_before_symtab(tmp_path: Path) -> None:
    image = elf_symbols(("start", 0x12, 1, TEXT, 0x20))
    path = tmp_path / "System.map"
    path.write_bytes(MAP)
    assert symbols_for(image, path).source == "System.map"
    path.write_bytes(b"ffffffffffffffff B The real System.map is in the linux-image-dbg package\n")
    assert symbols_for(image, path).source == "symtab"
    assert symbols_for(image, tmp_path / "none").source == "symtab"
    assert symbols_for(parse_elf(build_elf())).source == ""


# --- kallsyms ---

PERCPU = [(0, "Dfixed_percpu_data"), (0, "D__per_cpu_start"), (0x1000, "dcpu_tss_rw"), (0x2AC0, "Dirq_stat")]
KERNEL = [
    (TEXT, "Tstartup_64"),
    (TEXT, "T_stext"),
    *((TEXT + 0x80 + 0x30 * i, f"{'tT'[i % 2]}sys_do_thing_{i:x}_xen_{i * 7919 % 1000}") for i in range(1200)),
    (TEXT + 0x10000, "Tstart_kernel"),
    (TEXT + 0x10400, "T" + "".join(f"x{i * 7919 % 10007:x}Q" for i in range(60))),  # a "big" symbol
    (TEXT + 0x20000, "B_end"),
]


def kallsyms_image(tables: bytes) -> KernelImage:
    """The tables in the middle of a segment, with things around that look a little like tables."""
    lures = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00" + struct.pack(
        "<8I", 0, 4000, 8000, 12000, 0, 900, 1, 2
    )
    text = (lures * 4).ljust(0x400, b"\xcc") + tables + lures
    return parse_elf(build_elf(text, notes=note_block(LINUX_NOTES), memsz=0x40000 + len(text)))


@pytest.mark.parametrize(
    ("title", "symbols", "layout"),
    [
        ("4.4, addresses", PERCPU + KERNEL, {"encoding": "absolute", "marker_width": 8, "big": False}),
        ("4.9, offsets", PERCPU + KERNEL, {"encoding": "percpu", "marker_width": 8, "big": False}),
        ("5.x", PERCPU + KERNEL, {"encoding": "percpu", "big": False}),
        ("5.x, one CPU", KERNEL, {"encoding": "relative", "big": False}),
        ("5.x, one CPU, odd count", KERNEL[:-1], {"encoding": "relative", "big": False}),
        ("6.1", PERCPU + KERNEL, {"encoding": "percpu"}),
        ("6.1 stable, 6.2", PERCPU + KERNEL, {"encoding": "percpu", "seqs": True}),
        ("6.2, addresses", PERCPU + KERNEL, {"encoding": "absolute", "seqs": True}),
        ("6.4", PERCPU + KERNEL, {"encoding": "percpu", "behind": True}),
        ("6.4, addresses", PERCPU + KERNEL, {"encoding": "absolute", "behind": True}),
        ("6.15", KERNEL, {"encoding": "relative", "behind": True}),
        ("6.15, odd count", KERNEL[:-1], {"encoding": "relative", "behind": True}),
        ("7.0", KERNEL, {"encoding": "place", "behind": True}),
    ],
)
def test_kallsyms(title: str, symbols: list[tuple[int, str]], layout: dict[str, str | bool | int]) -> None:
    found = symbols_for(kallsyms_image(build_kallsyms(symbols, TEXT + 0x400, **layout)))
    assert found.source == "kallsyms", title
    assert len(found) == len(symbols)
    for address, name in symbols:
        assert found.address(name[1:]) == address
    assert found.lookup(TEXT + 1) == ("startup_64", 1, 0x80)
    assert found.format(TEXT + 0x10001) == "start_kernel+0x1/0x400"
    assert found.lookup(0x1004) is None  # an offset into the per-CPU area is no address


def test_kallsyms_at_any_padding() -> None:
    """The byte before token_table may be anything: a NUL, or the end of another table."""
    for count in range(1, 9):
        symbols = KERNEL[:-count]
        found = symbols_for(kallsyms_image(build_kallsyms(symbols, TEXT + 0x400, seqs=True)))
        assert len(found) == len(symbols)


def test_truncated_kallsyms() -> None:
    tables = build_kallsyms(KERNEL, TEXT + 0x400, behind=True)
    for length in range(0, len(tables) - 4 * len(KERNEL), 997):
        assert symbols_for(kallsyms_image(tables[:length])).source == ""


TABLES = build_kallsyms(PERCPU + KERNEL, TEXT + 0x400, encoding="percpu", seqs=True)


@settings(max_examples=60, deadline=5000)
@given(st.lists(st.tuples(st.integers(0, len(TABLES) - 1), st.integers(0, 255)), max_size=8))
def test_damaged_kallsyms(flips: list[tuple[int, int]]) -> None:
    tables = bytearray(TABLES)
    for position, value in flips:
        tables[position] = value
    symbols = symbols_for(kallsyms_image(bytes(tables)))
    symbols.lookup(TEXT + 0x1234)
    symbols.address("start_kernel")
    assert symbols.source in ("kallsyms", "")

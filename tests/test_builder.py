"""The domain builder: where everything lies in a new domain, and the first page tables."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_builder import LINUX_NOTES, PADDR, TEXT, VIRT_BASE, build_elf, note_block
from pvirq import BuildError, Guest, Host, ImageError
from pvirq.abi.arch_x86 import SIF_MOD_START_PFN, SIF_VIRT_P2M_4TOOLS
from pvirq.abi.elfnote import XEN_ELFNOTE_INIT_P2M, XEN_ELFNOTE_MOD_START_PFN
from pvirq.engine.protocol import RIP, RSI, RSP
from pvirq.pv.builder import Layout, lay_out
from pvirq.pv.image import KernelImage, load_image
from pvirq.pv.pagetable import ADDRESS, NX, PRESENT, RW
from pvirq.xen.memory import PGT_L1, PGT_L4, PGT_WRITABLE

MIB = 1 << 20
INIT_P2M = 0xFFFFFE8000000000
LINUX = build_elf(
    memsz=3 << 20,
    notes=note_block(
        [
            *LINUX_NOTES,
            (XEN_ELFNOTE_INIT_P2M, struct.pack("<Q", INIT_P2M)),
            (XEN_ELFNOTE_MOD_START_PFN, struct.pack("<I", 1)),
        ]
    ),
)
OLD = build_elf(memsz=3 << 20)  # neither: initrd and p2m are in the initial mapping


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(machine_memory=2 << 30, wallclock=1_700_000_000.5) as made:
        yield made


def walk(guest: Guest, va: int) -> int:
    """The level-1 entry of an address; 0 where there is none."""
    u64, table = guest.domain.machine.u64, guest.machine.cpus[0].kernel_root
    for shift in (39, 30, 21, 12):
        entry = u64[(table << 9) + (va >> shift & 511)]
        if not entry & PRESENT:
            return 0
        table = (entry & ADDRESS) >> 12
    return entry


def start_info(guest: Guest) -> dict[str, int]:
    va = guest.machine.engine.regs[RSI]
    data = guest.machine.cpus[0].read(va, 1168)
    names = ("nr_pages", "shared_info", "flags", "store_mfn", "store_evtchn", "console_mfn", "console_evtchn",
             "pt_base", "nr_pt_frames", "mfn_list", "mod_start", "mod_len")  # fmt: skip
    fields = dict(zip(names, struct.unpack_from("<QQIxxxxQIxxxxQIxxxxQQQQQ", data, 32), strict=True))
    assert data[:32].rstrip(b"\0") == b"xen-3.0-x86_64"
    fields["first_p2m_pfn"], fields["nr_p2m_frames"] = struct.unpack_from("<QQ", data, 1152)
    return fields


def layout_of(image: bytes, initrd_size: int, memory: int) -> tuple[KernelImage, Layout]:
    loaded = load_image(image)
    return loaded, lay_out(loaded, initrd_size, memory >> 12)


def parts(image: KernelImage, layout: Layout, initrd_size: int, frames: int) -> list[tuple[int, int]]:
    """(first pfn, pages) of everything that must not overlap."""
    found = [(segment.paddr >> 12, -(-segment.memsz // 4096)) for segment in image.segments]
    found += [(layout.start_info, 1), (layout.xenstore, 1), (layout.console, 1), (layout.stack, 1)]
    found.append((layout.page_tables, layout.page_table_frames))
    found.append((layout.p2m, layout.p2m_frames or -(-frames * 8 // 4096)))
    if initrd_size:
        found.append((layout.initrd, -(-initrd_size // 4096)))
    return found


@settings(max_examples=100, deadline=None)
@given(st.sampled_from((LINUX, OLD)), st.integers(0, 60 * MIB), st.integers(32, 2048))
def test_nothing_overlaps_and_all_is_mapped(kernel: bytes, initrd_size: int, memory: int) -> None:
    try:
        image, layout = layout_of(kernel, initrd_size, memory * MIB)
    except BuildError:
        assert memory * MIB < PADDR + 4 * MIB + initrd_size + memory * MIB // 256
        return
    spans = sorted(parts(image, layout, initrd_size, memory << 8))
    for (start, count), (after, _) in pairwise(spans):
        assert start + count <= after
    assert spans[-1][0] + spans[-1][1] <= layout.end <= memory << 8
    # At least 512 KiB behind the boot stack is in the initial mapping.
    assert layout.mapped_end >= min(layout.stack + 1 + 128, memory << 8)
    assert layout.mapped_end <= layout.page_table_frames * 512


def test_the_order_is_that_of_libxenguest() -> None:
    _, layout = layout_of(OLD, 5 * MIB, 64 * MIB)
    assert layout.initrd < layout.p2m < layout.start_info
    assert [layout.xenstore, layout.console, layout.page_tables] == [layout.start_info + i for i in (1, 2, 3)]
    assert layout.stack == layout.page_tables + layout.page_table_frames
    _, layout = layout_of(LINUX, 5 * MIB, 64 * MIB)
    assert layout.start_info == (PADDR + (3 << 20)) >> 12
    assert layout.stack < layout.p2m < layout.initrd


@pytest.mark.parametrize("kernel", [LINUX, OLD], ids=["linux", "old"])
def test_memory_as_the_kernel_finds_it(host: Host, kernel: bytes) -> None:
    initrd = bytes(range(256)) * 5000
    guest = host.boot(kernel, initrd=initrd, append="console=hvc0 quiet", memory=64 * MIB)
    cpu, machine, u64 = guest.machine.cpus[0], guest.domain.machine, guest.domain.machine.u64
    info = start_info(guest)
    flags = SIF_VIRT_P2M_4TOOLS | (0 if kernel is OLD else SIF_MOD_START_PFN)
    assert (info["nr_pages"], info["flags"], info["mod_len"]) == (16384, flags, len(initrd))
    assert (info["store_evtchn"], info["console_evtchn"]) == (1, 2)
    assert guest.machine.engine.regs[RIP] == TEXT + 0x10
    assert cpu.read(guest.machine.engine.regs[RSI] + 128, 20) == b"console=hvc0 quiet\0\0"
    assert info["shared_info"] == guest.domain.shared_info
    # The p2m list, its inverse, and the initial mapping.
    p2m = struct.unpack("<16384Q", cpu.read(info["mfn_list"], 16384 * 8))
    assert list(p2m) == [guest.machine.mfn(pfn) for pfn in range(16384)]
    assert [machine.m2p[mfn] for mfn in p2m] == list(range(16384))
    tables = range((info["pt_base"] - VIRT_BASE) >> 12, ((info["pt_base"] - VIRT_BASE) >> 12) + info["nr_pt_frames"])
    pfn = 0
    while (entry := walk(guest, VIRT_BASE + pfn * 4096)) & PRESENT:
        assert (entry & ADDRESS) >> 12 == p2m[pfn]
        if pfn in tables:
            assert not entry & RW
            assert PGT_L1 <= machine.type[p2m[pfn]] <= PGT_L4
        elif kernel is OLD or not info["first_p2m_pfn"] <= pfn < info["first_p2m_pfn"] + info["nr_p2m_frames"]:
            assert entry & RW
            assert machine.type[p2m[pfn]] == PGT_WRITABLE
        pfn += 1
    assert pfn * 4096 % (4 * MIB) == 0
    assert machine.pinned[cpu.kernel_root] == 1
    assert cpu.kernel_root == p2m[tables.start]
    if kernel is OLD:
        assert info["mod_start"] >= VIRT_BASE
        assert cpu.read(info["mod_start"], len(initrd)) == initrd
    else:
        assert info["mfn_list"] == INIT_P2M
        at = guest.machine.address(info["mod_start"])
        assert bytes(machine.mem[at : at + len(initrd)]) == initrd
    # The stack is a page of its own, and Xen's machine-to-phys table can be read.
    assert walk(guest, guest.machine.engine.regs[RSP] - 8) & RW
    assert u64[(cpu.kernel_root << 9) + 256] & PRESENT
    assert not walk(guest, 0) & PRESENT


def test_rings_and_wallclock(host: Host) -> None:
    guest = host.boot(OLD, memory=64 * MIB)
    info = start_info(guest)
    machine, at = guest.domain.machine, guest.domain.shared_info
    for mfn in (info["store_mfn"], info["console_mfn"]):
        assert machine.owner[mfn] == guest.domain.domid
        assert bytes(machine.page(mfn)[:1024]) == bytes(1024)
    assert info["store_mfn"] != info["console_mfn"]
    assert struct.unpack_from("<4I", machine.mem, at + 3072) == (2, 1_700_000_000, 500_000_000, 0)
    assert machine.mem[at + 1] == 1  # upcalls are masked


def test_an_entry_marked_nx_for_speed_is_still_executable(host: Host) -> None:
    """Data pages of the initial mapping carry NX, which Xen's builder would not set: seen by the guest as not there."""
    guest = host.boot(LINUX, memory=64 * MIB)
    marked = walk(guest, VIRT_BASE + 0x5000)
    if marked & NX:
        index = guest.machine.cpus[0].l1_index(VIRT_BASE + 0x5000)
        assert index is not None
        assert guest.machine.marked_nx(marked, index)
        assert not guest.machine.marked_nx(marked & ~NX, index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": 8 * MIB}, "memory"),
        ({"memory": 20 * MIB, "initrd": bytes(4 * MIB)}, "memory"),
        ({"memory": 4 << 30}, "memory"),
        ({"append": "x" * 1024}, "command line"),
        ({"initrd": "/nonexistent/initrd"}, "initrd"),
    ],
)
def test_what_cant_be_built(host: Host, arguments: dict[str, object], message: str) -> None:
    before = dom0_state(host)
    with pytest.raises(BuildError, match=message) as info:
        host.boot(OLD, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(info.value)
    assert dom0_state(host) == before


def dom0_state(host: Host) -> object:
    machine = host.hypervisor.machine
    return (
        list(host.hypervisor.domains),
        host.guests,
        [row.split()[0::99] for row in host.dom0.proc_interrupts().splitlines()],
        int((machine.np_owner == 1).sum()),
        host.store.ls("/local/domain"),
    )


def test_what_is_no_kernel(host: Host, tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"#!/bin/sh\n" * 100)
    for kernel in (tmp_path / "text", tmp_path / "absent", b"", b"\x7fELF", bytes(5000)):
        with pytest.raises(ImageError) as info:
            host.boot(kernel)
        assert "\n" not in str(info.value)
    assert not host.guests


def test_the_longest_command_line(host: Host) -> None:
    guest = host.boot(OLD, append="y" * 1023, memory=64 * MIB)
    assert guest.machine.cpus[0].read(guest.machine.engine.regs[RSI] + 128, 1024) == b"y" * 1023 + b"\0"

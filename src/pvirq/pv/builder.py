"""The domain builder: kernel, initrd and first page tables laid out in a new domain's memory.

Follows tools/libs/guest/xg_dom_core.c and xg_dom_x86.c: from the bottom, the kernel, the initrd (unless the kernel
takes it unmapped), the p2m list (unless the kernel names its own address for it), start_info, the xenstore and
console rings, the page tables and the boot stack; then what is not in the initial mapping.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pvirq.abi import vcpu as vcpu_abi
from pvirq.abi.arch_x86 import (
    FLAT_KERNEL_CS,
    FLAT_KERNEL_SS,
    MAX_GUEST_CMDLINE,
    SIF_INITDOMAIN,
    SIF_MOD_START_PFN,
    SIF_PRIVILEGED,
    SIF_VIRT_P2M_4TOOLS,
    START_INFO_MAGIC,
)
from pvirq.abi.xen import (
    PAGE_SHIFT,
    PAGE_SIZE,
    SHARED_INFO_WC_NSEC,
    SHARED_INFO_WC_SEC,
    SHARED_INFO_WC_SEC_HI,
    SHARED_INFO_WC_VERSION,
    VCPU_INFO_SIZE,
    VCPU_INFO_TIME,
    VCPU_INFO_UPCALL_MASK,
    XEN_LEGACY_MAX_VCPUS,
)
from pvirq.engine.protocol import FLAG_IF, RIP, RSI, RSP
from pvirq.pv import descriptors
from pvirq.pv.image import KernelImage
from pvirq.pv.pagetable import ACCESSED, NX, PRESENT, RW
from pvirq.xen.memory import PGT_L4

if TYPE_CHECKING:
    from pvirq.pv.guest import PvGuest

MAPPED: Final = PRESENT | RW | ACCESSED
READ_ONLY: Final = PRESENT | ACCESSED
SLACK: Final = 512 << 10  # mapped behind the boot stack, at least
MAPPING_UNIT: Final = 4 << 20
TABLE_SPAN: Final = 2 << 20  # what one level-1 table maps


class BuildError(Exception):
    """The kernel, initrd or command line doesn't fit; one line that says what to do."""


@dataclass(frozen=True)
class Layout:
    """Where things are, in page frame numbers (pfn) of the guest and virtual addresses."""

    virt_base: int
    start_info: int
    xenstore: int
    console: int
    stack: int
    page_tables: int
    page_table_frames: int
    p2m: int
    p2m_frames: int
    p2m_address: int
    initrd: int
    initrd_size: int
    mapped_end: int  # pfn behind the initial mapping
    end: int  # first free pfn


def _pages(size: int) -> int:
    return -(-size // PAGE_SIZE)


def lay_out(image: KernelImage, initrd_size: int, frames: int) -> Layout:
    """Decide where everything goes. BuildError where `frames` pages of memory are too few."""
    top = _pages(max(segment.paddr + segment.memsz for segment in image.segments))
    if top > frames:
        raise BuildError(f"the kernel needs {top * 4 >> 10} MiB, more than --memory gives: {frames * 4 >> 10} MiB")
    initrd_pages, p2m_pages = _pages(initrd_size), _pages(frames * 8)
    initrd = p2m = -1
    if initrd_size and not image.mod_start_pfn:
        initrd, top = top, top + initrd_pages
    if image.init_p2m is None:
        p2m, top = top, top + p2m_pages
    start_info, xenstore, console, page_tables = top, top + 1, top + 2, top + 3
    tables = 0
    while True:
        stack = page_tables + tables
        end = -(-((stack + 1) * PAGE_SIZE + SLACK) // MAPPING_UNIT) * MAPPING_UNIT
        end -= image.virt_base % MAPPING_UNIT
        needed = _tables_for(image.virt_base, end)
        if needed <= tables:
            break
        tables = needed
    top = stack + 1
    p2m_frames = 0
    p2m_address = image.virt_base + (p2m << PAGE_SHIFT)
    if image.init_p2m is not None:
        p2m_address = image.init_p2m
        p2m, p2m_frames = top, p2m_pages + 2 + _pages(p2m_pages * 8)
        top += p2m_frames
    if initrd < 0 and initrd_size:
        initrd, top = top, top + initrd_pages
    # A kernel needs room to begin with: its own page tables, at least.
    if top + 64 > frames:
        raise BuildError(
            f"kernel and initrd need {(top + 64) * 4 >> 10} MiB, more than --memory gives: {frames * 4 >> 10} MiB"
        )
    return Layout(
        image.virt_base, start_info, xenstore, console, stack, page_tables, tables, p2m, p2m_frames, p2m_address,
        max(initrd, 0), initrd_size, min(end >> PAGE_SHIFT, frames), top,
    )  # fmt: skip


def _tables_for(virt_base: int, size: int) -> int:
    """Frames of page tables that map `size` bytes at `virt_base`: one root, and what is below it."""
    count = 1
    for shift in (39, 30, 21):
        first, last = virt_base >> shift, (virt_base + size - 1) >> shift
        count += last - first + 1
    return count


class _Tables:
    """Writes page tables into frames taken one by one."""

    def __init__(self, guest: PvGuest, first: int, count: int) -> None:
        self._guest = guest
        self._u64 = guest.domain.machine.u64
        self._free = list(range(first, first + count))

    def root(self) -> int:
        return self._take()

    def _take(self) -> int:
        return self._guest.mfn(self._free.pop(0))

    def l1_index(self, root: int, va: int) -> int:
        """The index in u64 of the level-1 entry for `va`, with the tables on the way to it."""
        table = root
        for shift in (39, 30, 21):
            index = (table << 9) + (va >> shift & 511)
            if not self._u64[index] & PRESENT:
                self._u64[index] = self._take() << PAGE_SHIFT | MAPPED
            table = (self._u64[index] & ~0xFFF) >> PAGE_SHIFT
        return (table << 9) + (va >> 12 & 511)


def build(guest: PvGuest, image: KernelImage, initrd: bytes, cmdline: str) -> Layout:
    """Fill a new domain's memory and start vCPU 0 at the kernel's entry."""
    command = cmdline.encode("utf-8", "surrogateescape")
    if len(command) >= MAX_GUEST_CMDLINE:
        raise BuildError(f"the command line has {len(command)} bytes; Xen allows {MAX_GUEST_CMDLINE - 1}")
    layout = lay_out(image, len(initrd), guest.frames)
    mem = guest.domain.machine.mem
    for segment in image.segments:
        at = guest.address(segment.paddr >> PAGE_SHIFT) + segment.paddr % PAGE_SIZE
        mem[at : at + len(segment.data)] = segment.data
    if initrd:
        at = guest.address(layout.initrd)
        mem[at : at + len(initrd)] = initrd
    _write_p2m(guest, layout)
    root = _write_page_tables(guest, image, layout)
    _write_start_info(guest, image, layout, command)
    _write_shared_info(guest)
    if image.hypercall_page is not None:
        guest.fill_hypercall_page(guest.mfn((image.hypercall_page - image.virt_base) >> PAGE_SHIFT))
    guest.tables.pin(root, PGT_L4)
    _start(guest, image, layout, root)
    return layout


def _write_p2m(guest: PvGuest, layout: Layout) -> None:
    at = guest.mfn(layout.p2m) << 9
    mfns = np.arange(guest.first_mfn, guest.first_mfn + guest.frames, dtype=np.uint64)
    guest.domain.machine.np_u64[at : at + guest.frames] = mfns
    pfns = np.arange(guest.frames, dtype=np.uint64)
    guest.domain.machine.np_m2p[guest.first_mfn : guest.first_mfn + guest.frames] = pfns


def _write_page_tables(guest: PvGuest, image: KernelImage, layout: Layout) -> int:
    """The initial mapping, pfn 0 at virt_base and up; page tables read-only. Returns the root's mfn."""
    tables = _Tables(guest, layout.page_tables, layout.page_table_frames)
    root = tables.root()
    entries = guest.domain.machine.np_u64
    flags = np.full(layout.mapped_end, MAPPED, dtype=np.uint64)
    read_only = [range(layout.page_tables, layout.page_tables + layout.page_table_frames)]
    p2m_pages = _pages(guest.frames * 8)
    if layout.p2m_frames:
        read_only.append(range(layout.p2m + p2m_pages, layout.p2m + layout.p2m_frames))
    for frames in read_only:
        flags[frames.start : min(frames.stop, layout.mapped_end)] = READ_ONLY
    if image.exec_ranges:
        # Not Xen's doing, and taken back on the first fetch that finds it in the way: an emulator keeps stores to
        # pages that may hold code on its slow path.
        executable = np.zeros(layout.mapped_end, dtype=bool)
        for start, end in image.exec_ranges:
            executable[(start - image.virt_base) >> 12 : _pages(end - image.virt_base)] = True
        flags[~executable] |= np.uint64(NX)
    pfn = 0
    while pfn < layout.mapped_end:
        index = tables.l1_index(root, image.virt_base + (pfn << PAGE_SHIFT))
        count = min(512 - (index & 511), layout.mapped_end - pfn)
        mfns = np.arange(guest.mfn(pfn), guest.mfn(pfn) + count, dtype=np.uint64)
        entries[index : index + count] = mfns << np.uint64(PAGE_SHIFT) | flags[pfn : pfn + count]
        guest.initial_tables[index >> 9] = guest.mfn(pfn) - (index & 511)
        pfn += count
    if layout.p2m_frames:
        tables = _Tables(guest, layout.p2m + p2m_pages, layout.p2m_frames - p2m_pages)
        for page in range(p2m_pages):
            index = tables.l1_index(root, layout.p2m_address + (page << PAGE_SHIFT))
            entries[index] = guest.mfn(layout.p2m + page) << PAGE_SHIFT | MAPPED
    return root


def _write_start_info(guest: PvGuest, image: KernelImage, layout: Layout, command: bytes) -> None:
    flags, initrd = SIF_VIRT_P2M_4TOOLS, 0
    if layout.initrd_size:
        if image.mod_start_pfn:
            flags, initrd = flags | SIF_MOD_START_PFN, layout.initrd
        else:
            initrd = layout.virt_base + (layout.initrd << PAGE_SHIFT)
    at, mem = guest.address(layout.start_info), guest.domain.machine.mem
    store_mfn, console_mfn = guest.mfn(layout.xenstore), guest.mfn(layout.console)
    if guest.domain.privileged:
        flags = flags & ~SIF_VIRT_P2M_4TOOLS | SIF_PRIVILEGED | SIF_INITDOMAIN  # Xen's own builder doesn't set it
        store_mfn = console_mfn = 0
    struct.pack_into(
        "<32sQQIxxxxQIxxxxQIxxxxQQQQQ", mem, at,
        START_INFO_MAGIC, guest.frames, guest.domain.shared_info, flags,
        store_mfn, guest.store_port, console_mfn, guest.console_port,
        layout.virt_base + (layout.page_tables << PAGE_SHIFT), layout.page_table_frames,
        layout.p2m_address, initrd, layout.initrd_size,
    )  # fmt: skip
    mem[at + 128 : at + 128 + len(command)] = command
    if layout.p2m_frames:
        struct.pack_into("<QQ", mem, at + 1152, layout.p2m, layout.p2m_frames)


def _write_shared_info(guest: PvGuest) -> None:
    domain, mem = guest.domain, guest.domain.machine.mem
    # All that there is room for, not only those of the domain's vCPUs (dom0_construct, libxenguest's shared_info_*).
    for vcpu_id in range(XEN_LEGACY_MAX_VCPUS):
        mem[domain.shared_info + vcpu_id * VCPU_INFO_SIZE + VCPU_INFO_UPCALL_MASK] = 1
    write_time(guest)


def write_time(guest: PvGuest) -> None:
    """Each vCPU's time and the time of day, where a new domain finds them (update_domain_wallclock_time)."""
    domain, mem = guest.domain, guest.domain.machine.mem
    for vcpu in domain.vcpus:
        at = vcpu.info + VCPU_INFO_TIME
        mem[at : at + vcpu_abi.TIME_INFO_SIZE] = guest.time_info()
    seconds, nanoseconds = divmod(guest.wallclock_ns, 1_000_000_000)
    at = domain.shared_info
    struct.pack_into("<I", mem, at + SHARED_INFO_WC_VERSION, 2)
    struct.pack_into("<I", mem, at + SHARED_INFO_WC_SEC, seconds & 0xFFFFFFFF)
    struct.pack_into("<I", mem, at + SHARED_INFO_WC_NSEC, nanoseconds)
    struct.pack_into("<I", mem, at + SHARED_INFO_WC_SEC_HI, seconds >> 32)


def _start(guest: PvGuest, image: KernelImage, layout: Layout, root: int) -> None:
    cpu = guest.cpus[0]
    engine, regs = guest.engine, guest.engine.regs
    guest.tables.get_type(root, PGT_L4)  # the vCPU's own reference, besides the pin
    cpu.kernel_root = root
    guest.fill_ro_mpt(root)
    cpu.load_root()
    engine.set_gdt(descriptors.DescriptorWindow.gdt_base(0), descriptors.GDT_LIMIT)
    engine.set_ldt(0, 0)
    engine.set_code_stack(FLAT_KERNEL_CS, descriptors.CODE64, FLAT_KERNEL_SS, descriptors.DATA)
    for segment in (0, 3, 4, 5):
        engine.set_segment(segment, 0, 0)
    regs[RIP] = image.entry
    regs[RSP] = layout.virt_base + ((layout.stack + 1) << PAGE_SHIFT)
    regs[RSI] = layout.virt_base + (layout.start_info << PAGE_SHIFT)
    engine.rflags = FLAG_IF | 2
    cpu.initialised = True
    cpu.vcpu.up = True

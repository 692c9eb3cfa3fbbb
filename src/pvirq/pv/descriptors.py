"""Segment descriptors of a PV guest: what is allowed in its GDT and LDT, and how the CPU finds them.

The guest's GDT frames are mapped, invisible to the guest, in Xen's per-domain area, one window of 128 KiB a vCPU:
14 pages of the guest's and, at selector 0xe000, Xen's own page with the flat segments that every guest may use; the
LDT follows at 64 KiB. Frames there have a type of their own (PGT_seg_desc_page), so that the guest can change
them only by hypercall (xen/arch/x86/pv/descriptor-tables.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pvirq.abi.arch_x86 import FIRST_RESERVED_GDT_ENTRY, FIRST_RESERVED_GDT_PAGE, LAST_RESERVED_GDT_BYTE
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import PAGE_SIZE
from pvirq.pv.pagetable import ADDRESS, PRESENT
from pvirq.xen.memory import PGT_SEG_DESC, Machine

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

# Flat segments, present, DPL 3.
CODE64: Final = 0x00AF_FB00_0000_FFFF
CODE32: Final = 0x00CF_FB00_0000_FFFF
DATA: Final = 0x00CF_F300_0000_FFFF

PERDOMAIN_VIRT_START: Final = 0xFFFF_8200_0000_0000  # level-4 slot 260
WINDOW_PAGES: Final = 32
LDT_PAGE: Final = 16  # first page of the LDT in a vCPU's window
WINDOW_BYTES: Final = WINDOW_PAGES * PAGE_SIZE
LDT_OFFSET: Final = LDT_PAGE * PAGE_SIZE
MAPPING: Final = 0x63  # present, writable, accessed, dirty; not for user code

# In the upper half of a descriptor.
SEGMENT_TYPE, SEGMENT_S, SEGMENT_P = 0xF00, 1 << 12, 1 << 15
CALL_GATE: Final = 0xC00


def xen_gdt_page() -> bytes:
    """The page behind selectors 0xe000 to 0xefff, as far as guests may use it."""
    page = bytearray(PAGE_SIZE)
    for selector, descriptor in ((0x20, CODE32), (0x28, DATA), (0x30, CODE64)):
        page[selector : selector + 8] = descriptor.to_bytes(8, "little")
    return bytes(page)


class DescriptorWindow:
    """The per-domain area of the address space: level-3 to level-1 tables, and Xen's GDT page in each window."""

    def __init__(self, machine: Machine, vcpus: int) -> None:
        tables = -(-vcpus * WINDOW_PAGES // 512)
        first = machine.alloc(3 + tables)
        l3, l2, gdt = first, first + 1, first + 2
        self._u64 = machine.u64
        self._l1 = (first + 3) << 9
        self.frames = (first, 3 + tables)
        self.l4_entry = l3 << 12 | MAPPING
        machine.u64[l3 << 9] = l2 << 12 | MAPPING
        for i in range(tables):
            machine.u64[(l2 << 9) + i] = (first + 3 + i) << 12 | MAPPING
        machine.page(gdt)[:] = xen_gdt_page()
        for vcpu in range(vcpus):
            self.set(vcpu, FIRST_RESERVED_GDT_PAGE, gdt)

    @staticmethod
    def gdt_base(vcpu: int) -> int:
        return PERDOMAIN_VIRT_START + vcpu * WINDOW_PAGES * PAGE_SIZE

    @staticmethod
    def ldt_base(vcpu: int) -> int:
        return DescriptorWindow.gdt_base(vcpu) + LDT_PAGE * PAGE_SIZE

    def entries(self, vcpu: int) -> int:
        """The machine address of the level-1 entries of a vCPU's window."""
        return (self._l1 + vcpu * WINDOW_PAGES) * 8

    def set(self, vcpu: int, page: int, mfn: int | None) -> None:
        self._u64[self._l1 + vcpu * WINDOW_PAGES + page] = 0 if mfn is None else mfn << 12 | MAPPING

    def get(self, vcpu: int, page: int) -> int | None:
        entry = self._u64[self._l1 + vcpu * WINDOW_PAGES + page]
        return (entry & ADDRESS) >> 12 if entry & PRESENT else None


def check(descriptor: int) -> int:
    """A descriptor as the guest may have it (check_descriptor): forced to DPL 3. XenError(EINVAL) for a bad one."""
    low, high = descriptor & 0xFFFFFFFF, descriptor >> 32
    if not high & SEGMENT_P:
        return descriptor
    if high & SEGMENT_S:
        return low | (high | 3 << 13) << 32
    if not high & SEGMENT_TYPE:
        return descriptor
    if high & SEGMENT_TYPE != CALL_GATE:
        raise XenError(Errno.EINVAL, f"descriptor {descriptor:#x} is a system descriptor")
    selector = low >> 16
    # A gate may lead to the guest's own code segments, or the flat one (guest_gate_selector_okay).
    if selector >> 3 >= FIRST_RESERVED_GDT_ENTRY and not selector & 4 and selector & ~3 not in (0xE030, 0xE020):
        raise XenError(Errno.EINVAL, f"call gate to selector {selector:#x}")
    if high & 0xFF:
        raise XenError(Errno.EINVAL, f"reserved bits in call gate {descriptor:#x}")
    # DPL 0, so that its use faults; the real one is kept in the selector.
    return low & 0xFFFF | (selector | 3) << 16 | (high & ~(3 << 13)) << 32


def take_page(cpu: PvVcpu, mfn: int) -> None:
    """Make a guest frame a descriptor page, every descriptor checked. XenError(EINVAL)."""
    machine, tables = cpu.domain.machine, cpu.tables
    if not tables.owns(mfn):
        raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not the guest's")
    if not machine.type_count[mfn]:
        base = mfn << 9
        page = machine.np_u64[base : base + 512]
        for i in np.flatnonzero(page & np.uint64(SEGMENT_P << 32)).tolist():
            machine.u64[base + i] = check(machine.u64[base + i])
    tables.get_type(mfn, PGT_SEG_DESC)


def set_gdt(cpu: PvVcpu, frames: list[int], entries: int) -> None:
    """Install a GDT of `entries` descriptors in whole frames (pv_set_gdt). XenError(EINVAL)."""
    taken: list[int] = []
    try:
        for mfn in frames:
            take_page(cpu, mfn)
            taken.append(mfn)
    except XenError:
        for mfn in taken:
            cpu.tables.put_type(mfn)
        raise
    window, vcpu = cpu.guest.window, cpu.vcpu.vcpu_id
    for page, mfn in enumerate(cpu.gdt_frames):
        window.set(vcpu, page, None)
        cpu.tables.put_type(mfn)
    cpu.gdt_frames, cpu.gdt_entries = frames, entries
    for page, mfn in enumerate(frames):
        window.set(vcpu, page, mfn)


def drop_ldt(cpu: PvVcpu) -> bool:
    """Unmap the LDT's pages (pv_destroy_ldt). True where there were any, and the TLB must be flushed."""
    if not cpu.ldt_pages:
        return False
    for page, mfn in cpu.ldt_pages.items():
        cpu.guest.window.set(cpu.vcpu.vcpu_id, page, None)
        cpu.tables.put_type(mfn)
    cpu.ldt_pages.clear()
    return True


def set_ldt(cpu: PvVcpu, base: int, entries: int) -> None:
    """MMUEXT_SET_LDT. Pages are mapped when the CPU first looks at them."""
    if drop_ldt(cpu):
        cpu.flush_tlb()
    cpu.ldt = (base, entries)
    cpu.engine.set_ldt(DescriptorWindow.ldt_base(cpu.vcpu.vcpu_id), entries * 8 - 1 if entries else 0)


def map_ldt_page(cpu: PvVcpu, offset: int) -> bool:
    """The CPU faulted `offset` bytes into the LDT: map the guest's page there (pv_map_ldt_shadow_page).

    True to retry; False where the page can't hold descriptors, or is mapped already.
    """
    base, entries = cpu.ldt
    page = LDT_PAGE + offset // PAGE_SIZE
    if offset >= entries * 8 or page in cpu.ldt_pages:
        return False
    try:
        mfn = cpu.translate(base + (offset & ~0xFFF)) >> 12
        take_page(cpu, mfn)
    except XenError:
        return False
    cpu.guest.window.set(cpu.vcpu.vcpu_id, page, mfn)
    cpu.ldt_pages[page] = mfn
    cpu.engine.flush_page(DescriptorWindow.ldt_base(cpu.vcpu.vcpu_id) + (offset & ~0xFFF))
    return True


def descriptor_of(cpu: PvVcpu, selector: int) -> int | None:
    """The descriptor behind a selector in the vCPU's GDT or LDT; None beyond its end or unmapped."""
    u64 = cpu.domain.machine.u64
    index = selector >> 3
    if selector & 4:
        base, entries = cpu.ldt
        if index >= entries:
            return None
        try:
            at = cpu.translate(base + index * 8)
        except XenError:
            return None
        return u64[at >> 3]
    mfn = cpu.guest.window.get(cpu.vcpu.vcpu_id, index >> 9)
    return None if mfn is None else u64[(mfn << 9) + (index & 511)]


def load_code_stack(cpu: PvVcpu, cs: int, ss: int) -> int | None:
    """Load CS and SS as IRET to user privilege does. None, or the selector that can't be loaded (they are set)."""
    code, stack = descriptor_of(cpu, cs), descriptor_of(cpu, ss)
    bad = None
    if code is None or not code >> 32 & SEGMENT_P or (code >> 40) & 0x18 != 0x18:
        bad = cs
    elif stack is None or not stack >> 32 & SEGMENT_P or (stack >> 40) & 0x1A != 0x12:
        bad = ss
    if bad is None:
        assert code is not None
        assert stack is not None
        cpu.engine.set_code_stack(cs, code, ss, stack)
    else:
        cpu.engine.set_code_stack(cs, CODE64, ss, DATA)
    return bad


def reload_data_segments(cpu: PvVcpu) -> bool:
    """Load ES, DS, FS and GS again, as at a context switch, bases of FS and GS apart. False where one can't be."""
    engine, okay = cpu.engine, True
    bases = engine.fs_base, engine.gs_base
    for which in (0, 3, 4, 5):
        selector = engine.segment(which)
        if selector <= 3:
            continue
        descriptor = descriptor_of(cpu, selector)
        if descriptor is None or not descriptor >> 32 & SEGMENT_P or not descriptor >> 32 & SEGMENT_S:
            okay, selector, descriptor = False, 0, 0
        engine.set_segment(which, selector, descriptor)
    engine.fs_base, engine.gs_base = bases
    return okay


def load_gs(cpu: PvVcpu, selector: int) -> int:
    """SEGBASE_GS_USER_SEL: load GS from its descriptor and return its base; a bad selector loads the null one."""
    if selector > 3:
        selector |= 3
    descriptor = descriptor_of(cpu, selector) if selector > 3 else 0
    if descriptor is None or (descriptor and not descriptor >> 32 & SEGMENT_P):
        selector, descriptor = 0, 0
    base = cpu.engine.gs_base
    cpu.engine.set_segment(5, selector, descriptor)
    loaded, cpu.engine.gs_base = cpu.engine.gs_base, base
    return loaded


GDT_LIMIT: Final = LAST_RESERVED_GDT_BYTE

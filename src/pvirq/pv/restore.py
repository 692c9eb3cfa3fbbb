"""Puts a saved PV guest into a new domain's frames (see `pvirq.pv.save`).

Follows libxenguest's restore side (tools/libs/guest/xg_sr_restore.c, xg_sr_restore_x86_pv.c of 4.17): memory, page
tables localised and pinned, shared_info, the guest's p2m list, start_info with the new channels, vCPUs. The guest then
returns from HYPERVISOR_suspend with 0 and builds its event channels, grants and devices anew.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pvirq.abi.arch_x86 import FIRST_RESERVED_GDT_ENTRY, VGCF_online
from pvirq.abi.errno import XenError
from pvirq.abi.migration import PFINFO_LPINTAB, PFINFO_NOTAB
from pvirq.abi.xen import (
    PAGE_SHIFT,
    SHARED_INFO_ARCH,
    SHARED_INFO_ARCH_SIZE,
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    SHARED_INFO_FRAME_LIST_LIST,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_SIZE,
    XEN_LEGACY_MAX_VCPUS,
)
from pvirq.pv import builder, context
from pvirq.pv.pagetable import ADDRESS, PRESENT
from pvirq.pv.save import SavedDomain, SavedVcpu
from pvirq.pv.saved_pages import ENTRIES, U64Array
from pvirq.xen.memory import PGT_L4

if TYPE_CHECKING:
    from pvirq.pv.guest import PvGuest

INVALID: Final = (1 << 64) - 1
BITMAP_BYTES: Final = SHARED_INFO_EVTCHN_MASK - SHARED_INFO_EVTCHN_PENDING

# struct start_info; offsets in bytes.
SI_NR_PAGES, SI_SHARED_INFO, SI_FLAGS, SI_STORE_MFN, SI_STORE_EVTCHN, SI_CONSOLE_MFN, SI_CONSOLE_EVTCHN = (
    32, 40, 48, 56, 64, 72, 80,
)  # fmt: skip


class RestoreError(Exception):
    """What was saved can't be: it contradicts itself, or isn't allowed. One line."""


@dataclass(frozen=True)
class Rings:
    """The machine frames of the guest's two rings."""

    store_mfn: int
    console_mfn: int


def restore(guest: PvGuest, saved: SavedDomain) -> Rings:
    """Fill a new domain, which has exactly as many frames as were saved, and whose two ports exist.

    RestoreError; OSError where pages are still in a file that can't be read.
    """
    try:
        return _Restorer(guest, saved).restore()
    except XenError as error:
        raise RestoreError(f"Xen refuses a part of the saved domain: {error.why}") from None


class _Restorer:
    def __init__(self, guest: PvGuest, saved: SavedDomain) -> None:
        self.guest = guest
        self.saved = saved
        self.machine = guest.domain.machine
        if len(saved.pfns) != guest.frames:
            raise RestoreError(f"{len(saved.pfns)} pages were saved, and the domain has {guest.frames}")
        if len(saved.pfns) and int(saved.pfns.max()) > saved.max_pfn:
            raise RestoreError(f"page {int(saved.pfns.max()):#x} is beyond the last, {saved.max_pfn:#x}")
        # Pages get frames in the order in which their contents were saved, and behind them those that hold zeros: so
        # they come in long pieces, which need no copying.
        has_data = np.zeros(len(saved.pfns), dtype=bool)
        has_data[saved.rows] = True
        self.pfn_of_frame = np.concatenate([saved.pfns[saved.rows], saved.pfns[~has_data]])
        self.p2m = np.full(saved.max_pfn + 1, INVALID, dtype=np.uint64)
        self.p2m[self.pfn_of_frame] = np.arange(guest.first_mfn, guest.first_mfn + guest.frames, dtype=np.uint64)
        self.types = np.zeros(saved.max_pfn + 1, dtype=np.uint8)
        self.types[saved.pfns] = saved.types

    def _mfn(self, pfn: int, what: str, kind: int | None = None) -> int:
        mfn = int(self.p2m[pfn]) if pfn <= self.saved.max_pfn else INVALID
        if mfn == INVALID:
            raise RestoreError(f"{what}: no page {pfn:#x}")
        if kind is not None and int(self.types[pfn]) & 7 != kind:
            raise RestoreError(f"{what}: page {pfn:#x} has type {int(self.types[pfn])}, not {kind}")
        return mfn

    def restore(self) -> Rings:
        guest, saved = self.guest, self.saved
        if 0 not in saved.vcpus:
            raise RestoreError("there is no vCPU 0")
        if max(saved.vcpus) >= len(guest.cpus):
            raise RestoreError(f"vCPU {max(saved.vcpus)} was saved, and the domain has {len(guest.cpus)}")
        self._write_pages()
        self._write_p2m()
        self._write_shared_info()
        contexts = {vcpu_id: self._localise_vcpu(vcpu_id, vcpu) for vcpu_id, vcpu in saved.vcpus.items()}
        rings = self._write_start_info(contexts[0])
        # Before the pins: what a root table gets of Xen's part hangs on it.
        (guest.assists,) = struct.unpack_from("<Q", contexts[0], context.VM_ASSIST)
        pinned = saved.pfns[saved.types & PFINFO_LPINTAB != 0].tolist()
        for pfn in pinned:
            guest.tables.pin(int(self.p2m[pfn]), int(self.types[pfn]) & 7)
        for vcpu_id, state in sorted(contexts.items()):
            cpu = guest.cpus[vcpu_id]
            context.reinstate(cpu, bytes(state))
            if saved.vcpus[vcpu_id].extended:
                context.reinstate_extended(cpu, saved.vcpus[vcpu_id].extended)
        guest.engine.flush_tlb()
        return rings

    # -- memory --------------------------------------------------------------------------------------------------------

    def _write_pages(self) -> None:
        guest, saved = self.guest, self.saved
        at = guest.first_mfn
        for pages in saved.data:
            pages.load(self.machine, at)
            at += len(pages)
        for row in np.flatnonzero(saved.types[saved.rows] != PFINFO_NOTAB).tolist():
            first = (guest.first_mfn + row) * ENTRIES
            # The whole of it is written, so that nothing of a page table is left in a file.
            self.machine.np_u64[first : first + ENTRIES] = self._localise(
                self.machine.np_u64[first : first + ENTRIES].copy(), int(saved.types[saved.rows[row]]) & 7
            )
        self.machine.np_m2p[guest.first_mfn : guest.first_mfn + guest.frames] = self.pfn_of_frame

    def _localise(self, table: U64Array, level: int) -> U64Array:
        """x86_pv_localise_page, in place."""
        index = np.flatnonzero(table & np.uint64(PRESENT))
        entries = table[index]
        pfns = (entries & np.uint64(ADDRESS)) >> np.uint64(PAGE_SHIFT)
        if len(pfns) and int(pfns.max()) > self.saved.max_pfn:
            raise RestoreError(f"a level-{level} page table names page {int(pfns.max()):#x}, beyond the last")
        mfns = self.p2m[pfns]
        if (mfns == INVALID).any():
            raise RestoreError(
                f"a level-{level} page table names page {int(pfns[mfns == INVALID][0]):#x}: there is none"
            )
        table[index] = entries & np.uint64(~ADDRESS & INVALID) | mfns << np.uint64(PAGE_SHIFT)
        return table

    def _write_p2m(self) -> None:
        """update_guest_p2m."""
        frames = self.saved.p2m_frames
        if len(frames) != self.saved.max_pfn // ENTRIES + 1:
            raise RestoreError(f"a p2m list of {len(frames)} pages for {self.saved.max_pfn + 1} pfns")
        for page, pfn in enumerate(frames):
            part = self.p2m[page * ENTRIES : (page + 1) * ENTRIES]
            at = self._mfn(pfn, "p2m list", PFINFO_NOTAB) * ENTRIES
            self.machine.np_u64[at : at + len(part)] = part

    def _write_shared_info(self) -> None:
        """handle_shared_info: vcpu_info and arch as they were, no event pending, all masked; the time anew."""
        domain, mem, old = self.guest.domain, self.machine.mem, self.saved.shared_info
        at = domain.shared_info
        mem[at : at + XEN_LEGACY_MAX_VCPUS * VCPU_INFO_SIZE] = old[: XEN_LEGACY_MAX_VCPUS * VCPU_INFO_SIZE]
        arch = slice(SHARED_INFO_ARCH, SHARED_INFO_ARCH + SHARED_INFO_ARCH_SIZE)
        mem[at + arch.start : at + arch.stop] = old[arch]
        struct.pack_into("<Q", mem, at + SHARED_INFO_FRAME_LIST_LIST, 0)
        for vcpu_id in range(XEN_LEGACY_MAX_VCPUS):
            struct.pack_into("<Q", mem, at + vcpu_id * VCPU_INFO_SIZE + VCPU_INFO_PENDING_SEL, 0)
        pending, mask = at + SHARED_INFO_EVTCHN_PENDING, at + SHARED_INFO_EVTCHN_MASK
        mem[pending : pending + BITMAP_BYTES] = bytes(BITMAP_BYTES)
        mem[mask : mask + BITMAP_BYTES] = b"\xff" * BITMAP_BYTES
        builder.write_time(self.guest)

    def _write_start_info(self, state: bytearray) -> Rings:
        """process_start_info; the guest has left pfns there."""
        guest, mem = self.guest, self.machine.mem
        (mfn,) = struct.unpack_from("<Q", state, context.USER_REGS_RDX)
        at = mfn << PAGE_SHIFT
        rings = []
        for offset, what in ((SI_STORE_MFN, "xenstore's ring"), (SI_CONSOLE_MFN, "the console's ring")):
            (pfn,) = struct.unpack_from("<Q", mem, at + offset)
            rings.append(self._mfn(pfn, what, PFINFO_NOTAB))
            struct.pack_into("<Q", mem, at + offset, rings[-1])
        struct.pack_into("<I", mem, at + SI_STORE_EVTCHN, guest.store_port)
        struct.pack_into("<I", mem, at + SI_CONSOLE_EVTCHN, guest.console_port)
        struct.pack_into("<Q", mem, at + SI_NR_PAGES, self.saved.max_pfn + 1)
        struct.pack_into("<Q", mem, at + SI_SHARED_INFO, guest.domain.shared_info)
        struct.pack_into("<I", mem, at + SI_FLAGS, 0)
        return Rings(*rings)

    # -- vCPUs ---------------------------------------------------------------------------------------------------------

    def _localise_vcpu(self, vcpu_id: int, vcpu: SavedVcpu) -> bytearray:
        """process_vcpu_basic: pfns become frames."""
        name = f"vCPU {vcpu_id}"
        if len(vcpu.context) != context.SIZE:
            raise RestoreError(f"{name}: a context of {len(vcpu.context)} bytes, not {context.SIZE}")
        state = bytearray(vcpu.context)
        if vcpu_id == 0:
            self._rename(state, context.USER_REGS_RDX, "start_info")
        (entries,) = struct.unpack_from("<Q", state, context.GDT_ENTS)
        if entries > FIRST_RESERVED_GDT_ENTRY:
            raise RestoreError(f"{name}: a GDT of {entries} entries")
        for i in range(-(-entries // ENTRIES)):
            self._rename(state, context.GDT_FRAMES + 8 * i, f"{name}'s GDT")
        for at, what in ((context.CR3, "root page table"), (context.CR1, "root page table of user mode")):
            (value,) = struct.unpack_from("<Q", state, at)
            if at == context.CR3 or value & 1:
                mfn = self._mfn(value >> PAGE_SHIFT, f"{name}'s {what}", PGT_L4)
                struct.pack_into("<Q", state, at, mfn << PAGE_SHIFT)
        (flags,) = struct.unpack_from("<Q", state, context.FLAGS)
        struct.pack_into("<Q", state, context.FLAGS, flags | VGCF_online)
        return state

    def _rename(self, state: bytearray, at: int, what: str) -> None:
        (pfn,) = struct.unpack_from("<Q", state, at)
        struct.pack_into("<Q", state, at, self._mfn(pfn, what, PFINFO_NOTAB))

"""Saves a PV guest that has suspended: its pages by pfn, its vCPUs, its shared_info.

Follows libxenguest's save side (tools/libs/guest/xg_sr_save.c, xg_sr_save_x86_pv.c, xg_sr_common_x86_pv.c of 4.17):
page tables and whatever else names machine frames is turned to name pfns, so that the guest can be put into other
frames. What the guest says of its memory (its p2m list) counts where the hypervisor's tables agree.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from pvirq.abi.migration import PFINFO_LPINTAB
from pvirq.abi.xen import (
    PAGE_SHIFT,
    PAGE_SIZE,
    SHARED_INFO_FRAME_LIST_LIST,
    SHARED_INFO_MAX_PFN,
    SHARED_INFO_P2M_CR3,
    SHARED_INFO_P2M_VADDR,
)
from pvirq.pv import context
from pvirq.pv.pagetable import ADDRESS, NX, PRESENT, XEN_SLOTS
from pvirq.pv.saved_pages import ENTRIES, MemoryPages, Pages, U64Array
from pvirq.xen.memory import PGT_L1, PGT_L4, PINNED

if TYPE_CHECKING:
    from pvirq.pv.guest import PvGuest
    from pvirq.pv.vcpu import PvVcpu

MOST_PFNS: Final = 1 << 27  # 512 GiB: what a 3-level list can hold, and as much as is looked at


class SaveError(Exception):
    """The guest can't be saved: what it says of its memory can't be. One line."""


@dataclass
class SavedVcpu:
    """struct vcpu_guest_context and struct xen_domctl_ext_vcpucontext, frames as pfns."""

    context: bytes
    extended: bytes = b""


@dataclass
class SavedDomain:
    """A domain apart from its frames. `pfns` are its pages in ascending order, `types` a PFINFO_* for each.

    `data` has the pages that aren't all zeros, and `rows` which of `pfns` each is.
    """

    max_pfn: int
    p2m_frames: list[int]
    pfns: U64Array
    types: npt.NDArray[np.uint8]
    rows: npt.NDArray[np.int64]
    data: list[Pages]
    vcpus: dict[int, SavedVcpu]
    shared_info: bytes


def save(guest: PvGuest) -> SavedDomain:
    """The state of a guest that has shut itself down with SHUTDOWN_suspend; it isn't changed by that. SaveError."""
    return _Saver(guest).save()


class _Saver:
    def __init__(self, guest: PvGuest) -> None:
        self.guest = guest
        self.domain = guest.domain
        machine = self.machine = guest.domain.machine
        self.domid = guest.domain.domid
        (max_pfn,) = struct.unpack_from("<Q", machine.mem, guest.domain.shared_info + SHARED_INFO_MAX_PFN)
        if not 0 < max_pfn <= MOST_PFNS:
            raise SaveError(f"shared_info has no p2m list: max_pfn {max_pfn:#x}")
        self.max_pfn = max_pfn - 1
        self.frames = self._p2m_mfns()
        p2m = np.concatenate([self._page(mfn) for mfn in self.frames])[: self.max_pfn + 1]
        # Only where Xen agrees: the frame is the guest's, and its pfn is this one.
        known = np.flatnonzero(p2m < machine.frames)
        mfns = p2m[known].astype(np.int64)
        agreed = (machine.np_owner[mfns] == self.domid) & (machine.np_m2p[mfns] == known.astype(np.uint64))
        self.pfns, self.mfns = known[agreed], mfns[agreed]
        self.pfn_of = np.full(machine.frames, -1, dtype=np.int64)
        self.pfn_of[self.mfns] = self.pfns

    def _page(self, mfn: int) -> U64Array:
        return self.machine.np_u64[mfn * ENTRIES : (mfn + 1) * ENTRIES]

    def _own(self, mfn: int, what: str) -> int:
        if not (mfn < self.machine.frames and self.machine.owner[mfn] == self.domid):
            raise SaveError(f"{what}: mfn {mfn:#x} is not the guest's")
        return mfn

    def _pfn(self, mfn: int, what: str) -> int:
        pfn = int(self.pfn_of[mfn]) if mfn < self.machine.frames else -1
        if pfn < 0:
            raise SaveError(f"{what}: mfn {mfn:#x} is not in the guest's p2m list")
        return pfn

    # -- the p2m list --------------------------------------------------------------------------------------------------

    def _p2m_mfns(self) -> list[int]:
        """The frames of the guest's p2m list (map_p2m)."""
        mem, shared = self.machine.mem, self.domain.shared_info
        (root,) = struct.unpack_from("<Q", mem, shared + SHARED_INFO_P2M_CR3)
        count = self.max_pfn // ENTRIES + 1
        if root:
            (va,) = struct.unpack_from("<Q", mem, shared + SHARED_INFO_P2M_VADDR)
            return [self._walk(root >> PAGE_SHIFT, va + page * PAGE_SIZE) for page in range(count)]
        (top,) = struct.unpack_from("<Q", mem, shared + SHARED_INFO_FRAME_LIST_LIST)
        lists = self._page(self._own(top, "p2m frame list list"))
        middle = np.concatenate(
            [self._page(self._own(int(mfn), "p2m frame list")) for mfn in lists[: -(-count // ENTRIES)].tolist()]
        )
        return [self._own(int(mfn), "p2m list") for mfn in middle[:count].tolist()]

    def _walk(self, table: int, va: int) -> int:
        """The frame mapped at `va` below a root table (map_p2m_list)."""
        for shift in (39, 30, 21, 12):
            entry = self.machine.u64[(self._own(table, "p2m list") << 9) + (va >> shift & 511)]
            if not entry & PRESENT:
                raise SaveError(f"p2m list: {va:#x} is not mapped")
            table = (entry & ADDRESS) >> PAGE_SHIFT
        return self._own(table, "p2m list")

    # -- pages ---------------------------------------------------------------------------------------------------------

    def save(self) -> SavedDomain:
        machine = self.machine
        kinds = machine.np_type[self.mfns]
        tables = (machine.np_type_count[self.mfns] > 0) & (kinds >= PGT_L1) & (kinds <= PGT_L4)
        types = np.where(tables, kinds, 0).astype(np.uint8)
        pinned = np.frombuffer(machine.pinned, dtype=np.uint8)[self.mfns] & PINNED
        types |= np.where(tables & (pinned != 0), PFINFO_LPINTAB, 0).astype(np.uint8)
        memory = machine.np_u64.reshape(-1, ENTRIES)
        rows = self._rows_with_data(memory)
        data = memory[self.mfns[rows]]  # a copy
        for row in np.flatnonzero(types[rows]).tolist():
            index = int(rows[row])
            self._canonicalise(data[row], int(types[index]) & 7, int(self.mfns[index]))
        vcpus = {cpu.vcpu.vcpu_id: self._vcpu(cpu) for cpu in self.guest.cpus if cpu.initialised and cpu.vcpu.up}
        if 0 not in vcpus:
            raise SaveError("vCPU 0 is down")
        shared = self.domain.shared_info
        return SavedDomain(
            self.max_pfn, [self._pfn(mfn, "p2m list") for mfn in self.frames], self.pfns.astype(np.uint64), types, rows,
            [MemoryPages(data)], vcpus, bytes(machine.mem[shared : shared + PAGE_SIZE]),
        )  # fmt: skip

    def _rows_with_data(self, memory: U64Array) -> npt.NDArray[np.int64]:
        """Which pages aren't all zeros; looked at by pieces, as a whole copy would be as large as the guest."""
        piece = 4096
        found = []
        for start in range(0, len(self.mfns), piece):
            some = memory[self.mfns[start : start + piece]]
            found.append(np.flatnonzero(some.any(axis=1)) + start)
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def _canonicalise(self, table: U64Array, level: int, mfn: int) -> None:
        """Entries that name frames name pfns instead (normalise_pagetable)."""
        if level == PGT_L4:
            table[XEN_SLOTS.start : XEN_SLOTS.stop] = 0
        index = np.flatnonzero(table & np.uint64(PRESENT))
        entries = table[index]
        first = self.guest.initial_tables.get(mfn) if level == PGT_L1 else None
        if first is not None:
            # The domain builder's own NX bits (pv.builder), which nobody would take back in another domain.
            builders = entries & np.uint64(ADDRESS) == (first + index.astype(np.uint64)) << np.uint64(PAGE_SHIFT)
            entries[builders] &= np.uint64(~NX & (1 << 64) - 1)
        mfns = ((entries & np.uint64(ADDRESS)) >> np.uint64(PAGE_SHIFT)).astype(np.int64)
        if len(mfns) and int(mfns.max()) >= self.machine.frames:
            raise SaveError(f"a level-{level} page table maps mfn {int(mfns.max()):#x}, which is no RAM")
        pfns = self.pfn_of[mfns]
        if (pfns < 0).any():
            bad = int(mfns[pfns < 0][0])
            raise SaveError(f"a level-{level} page table maps mfn {bad:#x}, which is not in the guest's p2m list")
        table[index] = entries & np.uint64(~ADDRESS & (1 << 64) - 1) | pfns.astype(np.uint64) << np.uint64(PAGE_SHIFT)

    # -- vCPUs ---------------------------------------------------------------------------------------------------------

    def _vcpu(self, cpu: PvVcpu) -> SavedVcpu:
        state = bytearray(context.capture(cpu))
        name = f"vCPU {cpu.vcpu.vcpu_id}"
        if cpu.vcpu.vcpu_id == 0:  # whose RDX has the frame of start_info, by HYPERVISOR_suspend's third argument
            self._rename(state, context.USER_REGS_RDX, "start_info")
        for i in range(len(cpu.gdt_frames)):
            self._rename(state, context.GDT_FRAMES + 8 * i, f"{name}'s GDT")
        for at, flag in ((context.CR3, 0), (context.CR1, 1)):
            (value,) = struct.unpack_from("<Q", state, at)
            if value:
                pfn = self._pfn(value >> PAGE_SHIFT, f"{name}'s root page table")
                struct.pack_into("<Q", state, at, pfn << PAGE_SHIFT | flag)
        return SavedVcpu(bytes(state), context.capture_extended(cpu))

    def _rename(self, state: bytearray, at: int, what: str) -> None:
        (mfn,) = struct.unpack_from("<Q", state, at)
        struct.pack_into("<Q", state, at, self._pfn(mfn, what))

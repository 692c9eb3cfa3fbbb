"""Page tables of a PV guest, validated as Xen validates them (xen/arch/x86/mm.c, direct paging).

The guest's tables are the ones the CPU walks. What keeps it from mapping what isn't its own, or writing a table
behind our back, is the type of each frame: a frame becomes a level-N table only after every entry in it was
checked, and while it is one no writable mapping of it can exist. An entry that maps a frame, or points at a table,
holds a reference; a frame's type may change only at zero references.

Whole tables are checked with numpy, because at 512 entries each a boot validates millions; single entries, the
other half of the work, in plain integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt

from pvirq.abi.errno import Errno, XenError
from pvirq.xen.domain import Domain
from pvirq.xen.memory import ABANDONED, PGT_L1, PGT_L2, PGT_L4, PGT_NONE, PGT_WRITABLE, PINNED

PRESENT, RW, USER, PWT, PCD, ACCESSED, DIRTY, PSE, GLOBAL = (1 << i for i in range(9))
PAT: Final = PSE  # bit 7 of a level-1 entry
AVAIL: Final = 0xE00
GUEST_KERNEL: Final = 1 << 52  # Xen's own mark on a kernel page, for all run with USER set
AVAIL_HIGH: Final = 0x7FF << 52
NX: Final = 1 << 63
ADDRESS: Final = 0x000F_FFFF_FFFF_F000
M64: Final = (1 << 64) - 1

FLAGS: Final = ~ADDRESS & M64
DISALLOW: Final = FLAGS & ~(PRESENT | RW | USER | ACCESSED | DIRTY | AVAIL | AVAIL_HIGH | NX)
L1_DISALLOW: Final = DISALLOW & ~GLOBAL
CACHE_ATTRIBUTES: Final = PAT | PCD | PWT

# Entries that differ in these alone need no new look at what they point at (FASTPATH_FLAG_WHITELIST). RW is not
# among them even above level 1: a linear page table must stay read-only (XSA-182).
FAST_TABLE: Final = NX | AVAIL_HIGH | AVAIL | GLOBAL | DIRTY | ACCESSED | USER
FAST_L1: Final = FAST_TABLE | CACHE_ATTRIBUTES

# The level-4 slots that are Xen's: 0xffff800000000000 to 0xffff87ffffffffff.
XEN_SLOTS: Final = range(256, 272)
ENTRIES: Final = 512

Array = npt.NDArray[np.uint64]


class PageTables:
    """The frame types of one domain's pages, and every change to its page tables.

    `xen_slots()` are the level-4 entries that a new root table gets in XEN_SLOTS. `flush` is called when a frame that
    was writable since the last TLB flush becomes a table or a descriptor page, and as `Domain.flush_tlb`.
    """

    def __init__(self, domain: Domain, xen_slots: Callable[[], list[int]], flush: Callable[[], None]) -> None:
        machine = domain.machine
        self._machine = machine
        self._domain = domain
        self._domid = domain.domid
        self._foreign = domain.foreign
        self._frames = machine.frames
        self._u64 = machine.u64
        self._np_u64 = machine.np_u64
        self._owner, self._type, self._count, self._refs = (
            machine.owner,
            machine.type,
            machine.type_count,
            machine.refs,
        )
        self._pinned = machine.pinned
        self._xen_slots = xen_slots
        self._flush = domain.flush_tlb = flush
        self._l1_disallow = L1_DISALLOW if not domain.privileged else L1_DISALLOW & ~CACHE_ATTRIBUTES
        # Frames whose last writable mapping went away since the TLB was flushed: it may still hold that mapping.
        self.stale: set[int] = set()
        # struct page_info's linear_pt_count: above zero the linear entries that a table has, below zero its uses by
        # those of others. No table has both, or two could keep each other alive.
        self._linear: dict[int, int] = {}

    # -- references ------------------------------------------------------------------------------------------------

    def owns(self, mfn: int) -> bool:
        return mfn < self._frames and self._owner[mfn] == self._domid

    def get_type(self, mfn: int, kind: int) -> None:
        """Take a reference of a type, validating where that is a change (get_page_and_type_from_mfn).

        XenError(EINVAL): not the guest's, or in use as something else; or what validation finds.
        """
        if mfn >= self._frames or self._owner[mfn] != self._domid:
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not domain {self._domid}'s")
        count = self._count[mfn]
        if count == 0:
            self._become(mfn, kind)
        elif self._type[mfn] != kind:
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} has type {self._type[mfn]}, not {kind}")
        else:
            self._count[mfn] = count + 1

    def _become(self, mfn: int, kind: int) -> None:
        if kind != PGT_WRITABLE and mfn in self.stale:
            self._flush()
        self._type[mfn] = kind
        self._count[mfn] = 1
        try:
            if PGT_L1 <= kind <= PGT_L4:
                self._promote(mfn, kind)
        except XenError:
            self._count[mfn] = 0
            self._type[mfn] = PGT_NONE
            raise

    def put_type(self, mfn: int) -> None:
        """Drop a type reference; with the last one a table's own references go too."""
        count = self._count[mfn] - 1
        self._count[mfn] = count
        if count == 0:
            kind = self._type[mfn]
            if kind == PGT_WRITABLE:
                self.stale.add(mfn)
            elif PGT_L1 <= kind <= PGT_L4:
                self._refs[mfn] += 1  # a level-1 table below may hold the last mapping of this very frame
                self._demote(mfn, kind)
                self._refs[mfn] -= 1
            if not self._refs[mfn]:
                self._unused(mfn)

    def _unused(self, mfn: int) -> None:
        """A frame that the guest gave back (XENMEM_decrease_reservation) while it was still mapped goes now."""
        if self._pinned[mfn] & ABANDONED and not self._count[mfn]:
            self._free(mfn)

    def _free(self, mfn: int) -> None:
        self._domain.hypervisor.free_frame(mfn)
        self.stale.discard(mfn)

    def release(self, mfn: int) -> None:
        """The guest gives a frame of its own back: at once, or with its last reference (guest_remove_page)."""
        if self._refs[mfn] or self._count[mfn] or self._pinned[mfn]:
            self._pinned[mfn] |= ABANDONED
        else:
            self._free(mfn)

    def pin(self, mfn: int, kind: int) -> None:
        """MMUEXT_PIN_L<n>_TABLE. XenError(EINVAL) where the frame can't be that, or is pinned."""
        self.get_type(mfn, kind)
        if self._pinned[mfn] & PINNED:
            self.put_type(mfn)
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is already pinned")
        self._pinned[mfn] |= PINNED

    def unpin(self, mfn: int) -> None:
        """MMUEXT_UNPIN_TABLE. XenError(EINVAL) where the frame isn't pinned."""
        if not self.owns(mfn) or not self._pinned[mfn] & PINNED:
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not pinned")
        self._pinned[mfn] &= ~PINNED
        self.put_type(mfn)

    # -- whole tables ----------------------------------------------------------------------------------------------

    def _entries(self, mfn: int) -> Array:
        return self._np_u64[mfn * ENTRIES : (mfn + 1) * ENTRIES]

    def _promote(self, mfn: int, level: int) -> None:
        if level == PGT_L1:
            self._promote_l1(mfn)
            return
        u64, base = self._u64, mfn * ENTRIES
        table = self._entries(mfn)
        done: list[int] = []
        for i in np.flatnonzero(table & np.uint64(PRESENT)).tolist():
            if level == PGT_L4 and i in XEN_SLOTS:
                continue
            try:
                self._get_table_entry(u64[base + i], mfn, level)
            except XenError:
                for j in done:
                    self._put_table_entry(u64[base + j], mfn)
                raise
            done.append(i)
        for i in done:
            u64[base + i] |= USER | ACCESSED if level == PGT_L4 else USER
        if level == PGT_L4:
            for slot, entry in zip(XEN_SLOTS, self._xen_slots(), strict=True):
                u64[base + slot] = entry

    def _promote_l1(self, mfn: int) -> None:
        table = self._entries(mfn)
        index = np.flatnonzero(table & np.uint64(PRESENT))
        if not len(index):
            return
        entries = table[index]
        if np.any(entries & np.uint64(self._l1_disallow)):
            raise XenError(Errno.EINVAL, "reserved bits in a level-1 entry")
        mfns = ((entries & np.uint64(ADDRESS)) >> np.uint64(12)).astype(np.int64)
        machine = self._machine
        if int(mfns.max()) >= self._frames or np.any(machine.np_owner[mfns] != self._domid):
            for entry, frame in zip(entries.tolist(), mfns.tolist(), strict=True):
                if not self.owns(frame):
                    raise self._not_ours(frame, entry)
        writable = mfns[(entries & np.uint64(RW)) != 0]
        counts, types = machine.np_type_count, machine.np_type
        if np.any((counts[writable] != 0) & (types[writable] != PGT_WRITABLE)):
            raise XenError(Errno.EBUSY, "a writable mapping of a page table or descriptor page")
        types[writable] = PGT_WRITABLE
        np.add.at(counts, writable, 1)
        np.add.at(machine.np_refs, mfns, 1)
        kernel = (entries & np.uint64(USER)) == 0
        entries |= np.where(kernel, np.uint64(GUEST_KERNEL | USER), np.uint64(USER))
        entries |= np.where(entries & np.uint64(GUEST_KERNEL), np.uint64(0), np.uint64(GLOBAL))
        table[index] = entries

    def _demote(self, mfn: int, level: int) -> None:
        if level == PGT_L1:
            self._demote_l1(mfn)
            return
        u64, base = self._u64, mfn * ENTRIES
        for i in np.flatnonzero(self._entries(mfn) & np.uint64(PRESENT)).tolist():
            if level != PGT_L4 or i not in XEN_SLOTS:
                self._put_table_entry(u64[base + i], mfn)

    def _demote_l1(self, mfn: int) -> None:
        table = self._entries(mfn)
        entries = table[(table & np.uint64(PRESENT)) != 0]
        if not len(entries):
            return
        mfns = ((entries & np.uint64(ADDRESS)) >> np.uint64(12)).astype(np.int64)
        machine = self._machine
        if self._foreign:
            foreign = machine.np_owner[mfns] != self._domid
            for entry in entries[foreign].tolist():
                self.put_l1_entry(entry)
            entries, mfns = entries[~foreign], mfns[~foreign]
        writable = mfns[(entries & np.uint64(RW)) != 0]
        np.subtract.at(machine.np_type_count, writable, 1)
        np.subtract.at(machine.np_refs, mfns, 1)
        self.stale.update(writable[machine.np_type_count[writable] == 0].tolist())
        for frame in mfns[machine.np_refs[mfns] == 0].tolist():
            self._unused(frame)

    # -- single entries ----------------------------------------------------------------------------------------------

    def _get_table_entry(self, entry: int, table: int, level: int) -> None:
        """Take what an entry of a level 2 to 4 table refers to (get_page_from_l2e and its like)."""
        if entry & DISALLOW:
            raise XenError(Errno.EINVAL, f"reserved bits in entry {entry:#x}")
        target = (entry & ADDRESS) >> 12
        try:
            self.get_type(target, level - 1)
        except XenError as error:
            # A linear page table: a table of the same level, its own as a rule, mapped read-only one level up.
            if error.errno != Errno.EINVAL or entry & RW:
                raise
            if target == table:
                return
            if not self.owns(target) or self._type[target] != level or not self._count[target]:
                raise
            if self._linear.get(table, 0) < 0 or self._linear.get(target, 0) > 0:
                raise
            self._count_linear(table, 1)
            self._count_linear(target, -1)
            self._count[target] += 1

    def _put_table_entry(self, entry: int, table: int) -> None:
        target = (entry & ADDRESS) >> 12
        if target == table:
            return
        if self._type[target] == self._type[table]:
            self._count_linear(table, -1)
            self._count_linear(target, 1)
        self.put_type(target)

    def _count_linear(self, mfn: int, change: int) -> None:
        count = self._linear.get(mfn, 0) + change
        if count:
            self._linear[mfn] = count
        else:
            del self._linear[mfn]

    def _not_ours(self, mfn: int, entry: int) -> XenError:
        if mfn >= self._frames:  # no RAM there: I/O memory, which no guest here has
            return XenError(Errno.EINVAL if mfn == ADDRESS >> 12 else Errno.EPERM, f"no RAM at mfn {mfn:#x}")
        return XenError(Errno.EBUSY, f"entry {entry:#x} maps a frame of domain {self._owner[mfn]:#x}")

    def get_l1_entry(self, entry: int) -> None:
        """Take what a present level-1 entry maps (get_page_from_l1e)."""
        if entry & self._l1_disallow:
            raise XenError(Errno.EINVAL, f"reserved bits in entry {entry:#x}")
        mfn = (entry & ADDRESS) >> 12
        if mfn >= self._frames or self._owner[mfn] != self._domid:
            raise self._not_ours(mfn, entry)
        if entry & RW:
            count = self._count[mfn]
            if self._type[mfn] != PGT_WRITABLE:
                if count:
                    raise XenError(Errno.EBUSY, f"writable mapping of mfn {mfn:#x}, a table")
                self._type[mfn] = PGT_WRITABLE
            self._count[mfn] = count + 1
        self._refs[mfn] += 1

    def put_l1_entry(self, entry: int) -> None:
        """Drop what a present level-1 entry mapped (put_page_from_l1e)."""
        mfn = (entry & ADDRESS) >> 12
        if self._foreign and mfn in self._foreign:
            self._flush()  # it was there by a grant: neither owner nor next owner may find it still mapped
            self._domain.put_granted(mfn, bool(entry & RW))
            return
        refs = self._refs[mfn] - 1
        self._refs[mfn] = refs
        if entry & RW:
            self.put_type(mfn)
        elif not refs:
            self._unused(mfn)

    def adjust_l1(self, entry: int) -> int:
        """The bits that Xen adds to a present level-1 entry: all guests' pages are user pages to the CPU."""
        if not entry & USER:
            return entry | GUEST_KERNEL | USER
        return entry if entry & GUEST_KERNEL else entry | GLOBAL

    def set_l1(self, index: int, new: int, preserve_ad: bool = False) -> None:
        """Change the level-1 entry at 64-bit index `index` of machine memory (mod_l1_entry)."""
        u64 = self._u64
        old = u64[index]
        if new & PRESENT:
            if new & self._l1_disallow:
                raise XenError(Errno.EINVAL, f"reserved bits in entry {new:#x}")
            new = self.adjust_l1(new)
            if not (old ^ new) & ~FAST_L1:
                u64[index] = new | old & (ACCESSED | DIRTY) if preserve_ad else new
                return
            self.get_l1_entry(new)
        u64[index] = new | old & (ACCESSED | DIRTY) if preserve_ad else new
        if old & PRESENT:
            self.put_l1_entry(old)

    def set_granted(self, index: int, new: int) -> None:
        """Map a granted frame, or map nothing any more, by the level-1 entry at `index`.

        The references that `new` needs are taken already; those of the old entry are dropped.
        """
        old = self._u64[index]
        self._u64[index] = new
        if old & PRESENT:
            self.put_l1_entry(old)

    def set_table_entry(self, mfn: int, slot: int, new: int, level: int, preserve_ad: bool = False) -> None:
        """Change an entry of a level 2 to 4 table (mod_l2_entry, mod_l3_entry, mod_l4_entry)."""
        if level == PGT_L4 and slot in XEN_SLOTS:
            raise XenError(Errno.EINVAL, f"level-4 slot {slot} is Xen's")
        u64, index = self._u64, mfn * ENTRIES + slot
        old = u64[index]
        kept = old & (ACCESSED | DIRTY) if preserve_ad else 0
        if new & PRESENT:
            if new & DISALLOW:
                raise XenError(Errno.EINVAL, f"reserved bits in entry {new:#x}")
            new |= USER | ACCESSED if level == PGT_L4 else USER
            if not (old ^ new) & ~FAST_TABLE:
                u64[index] = new | kept
                return
            self._get_table_entry(new, mfn, level)
        u64[index] = new | kept
        if old & PRESENT:
            self._put_table_entry(old, mfn)

    def update(self, address: int, value: int, preserve_ad: bool = False) -> bool:
        """MMU_NORMAL_PT_UPDATE at machine address `address`. True: a table above level 1 changed (flush the TLB)."""
        mfn = address >> 12
        if not self.owns(mfn):
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not domain {self._domid}'s")
        kind = self._type[mfn] if self._count[mfn] else PGT_NONE
        if kind == PGT_L1:
            self.set_l1(address >> 3, value, preserve_ad)
            return False
        if PGT_L2 <= kind <= PGT_L4:
            self.set_table_entry(mfn, address >> 3 & 511, value, kind, preserve_ad)
            return True
        if kind not in (PGT_WRITABLE, PGT_NONE):
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is a descriptor page")
        self._type[mfn] = PGT_WRITABLE
        self._u64[address >> 3] = value
        return False

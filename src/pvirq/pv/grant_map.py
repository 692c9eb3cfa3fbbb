"""Granted frames in a real guest's page tables (xen/arch/x86/pv/grant_table.c).

A guest names the level-1 entry by the address that it maps, or by its own machine address (GNTMAP_contains_pte).
The references to the frame are then the entry's: a guest that overwrites it drops them, and can't unmap any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvirq.abi import grant_table as abi
from pvirq.pv.hypercalls.protocol import handle_okay
from pvirq.pv.pagetable import ACCESSED, ADDRESS, AVAIL, DIRTY, NX, PRESENT, RW, USER
from pvirq.xen.grant import GrantError
from pvirq.xen.memory import PGT_L1

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu


def entry_flags(flags: int) -> int:
    """The flags of the entry that maps a grant with GNTMAP_* `flags` (grant_to_pte_flags)."""
    entry = PRESENT | ACCESSED | DIRTY | NX
    if flags & abi.GNTMAP_application_map:
        entry |= USER
    if not flags & abi.GNTMAP_readonly:
        entry |= RW
    return entry | (flags // abi.GNTMAP_guest_avail0 << 9) & AVAIL


class PvMapper:
    """Maps grants for the guest whose vCPU makes the hypercall; a `pvirq.xen.grant_map.Mapper`."""

    def __init__(self, cpu: PvVcpu) -> None:
        self._cpu = cpu
        self._tables = cpu.tables
        self._u64 = cpu.domain.machine.u64

    def _index(self, address: int, by_entry: bool) -> int:
        """Where the entry is, in 64-bit items of machine memory: in a level-1 table of the guest's own."""
        index: int | None = None
        if by_entry:
            if not address & 7:
                index = address >> 3
        elif handle_okay(address):
            index = self._cpu.l1_index(address)
        if index is None:
            raise GrantError(abi.GNTST_general_error, f"no page-table entry at {address:#x}")
        machine, mfn = self._cpu.domain.machine, index >> 9
        if not self._tables.owns(mfn) or machine.type[mfn] != PGT_L1 or not machine.type_count[mfn]:
            raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} is not a level-1 table")
        return index

    def create(self, address: int, mfn: int, flags: int) -> None:
        """create_grant_pv_mapping."""
        by_entry = bool(flags & abi.GNTMAP_contains_pte)
        index = self._index(address, by_entry)
        self._tables.set_granted(index, self._tables.adjust_l1(mfn << 12 | entry_flags(flags)))
        if by_entry:
            self._cpu.flush_tlb()
        else:
            self._cpu.engine.flush_page(address)

    def replace(self, address: int, mfn: int, new_address: int, flags: int) -> None:
        """replace_grant_pv_mapping; the references stay for `put`."""
        by_entry = bool(flags & abi.GNTMAP_contains_pte)
        if by_entry and new_address:
            raise GrantError(abi.GNTST_general_error, "no replacement by page-table entry")
        new = 0
        if new_address:
            other = self._index(new_address, by_entry=False)
            new, self._u64[other] = self._u64[other], 0
        try:
            index = self._index(address, by_entry)
            old = self._u64[index]
            if (old & ADDRESS) >> 12 != mfn or (old ^ entry_flags(flags)) & (PRESENT | RW):
                raise GrantError(abi.GNTST_general_error, f"entry {old:#x} is not the mapping of mfn {mfn:#x}")
        except GrantError:
            if new & PRESENT:
                self._tables.put_l1_entry(new)
            raise
        self._u64[index] = new

    def put(self, mfn: int, writable: bool) -> None:
        """Drop what the entry held of the frame; the TLB was flushed since it went."""
        if mfn in self._cpu.domain.foreign:
            self._cpu.domain.put_granted(mfn, writable)
        else:
            self._tables.put_l1_entry(mfn << 12 | (RW if writable else 0))

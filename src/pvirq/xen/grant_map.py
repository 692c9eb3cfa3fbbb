"""Mapping granted frames: handles, references and their end (map_grant_ref and unmap_common in grant_table.c).

Where a mapping is in an address space is up to the user's `Mapper`: a real guest's changes page-table entries
(`pvirq.pv.grant_map`), one in Python reads and writes the frame without any.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol

from pvirq.abi import grant_table as abi
from pvirq.abi.errno import XenError
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.domain import Domain
from pvirq.xen.grant import (
    GNTPIN_devr_inc,
    GNTPIN_devw_inc,
    GNTPIN_hstr_inc,
    GNTPIN_hstw_inc,
    GrantError,
    GrantTable,
)
from pvirq.xen.memory import PGT_WRITABLE

MAPTRACK_PER_PAGE: Final = PAGE_SIZE // 16
ENTRIES_MASK: Final = PAGE_SIZE // abi.GRANT_ENTRY_V1_SIZE - 1
ENTRIES_SHIFT: Final = ENTRIES_MASK.bit_length()
MAPS: Final = abi.GNTMAP_device_map | abi.GNTMAP_host_map


class Mapper(Protocol):
    """Puts granted frames into an address space, for a user that has references to them already.

    Each raises GrantError(general_error) where that can't be done.
    """

    def create(self, address: int, mfn: int, flags: int) -> None:
        """Map the frame as GNTMAP_* `flags` say."""
        ...

    def replace(self, address: int, mfn: int, new_address: int, flags: int) -> None:
        """End that mapping; with a `new_address`, put there what is mapped at that address now."""
        ...

    def put(self, mfn: int, writable: bool) -> None:
        """Drop a reference, after all TLBs were flushed."""
        ...


class PlainMapper:
    """The mapper of a domain whose kernel is Python: frames are read and written where they are."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def create(self, address: int, mfn: int, flags: int) -> None:
        pass

    def replace(self, address: int, mfn: int, new_address: int, flags: int) -> None:
        pass

    def put(self, mfn: int, writable: bool) -> None:
        self._domain.put_granted(mfn, writable)


class Mapping(NamedTuple):
    """One handle (struct grant_mapping); `table` grants reference `ref`. `vcpu` made it."""

    table: GrantTable
    ref: int
    flags: int
    vcpu: int


class Maptrack:
    """A domain's handles. Each vCPU has free ones of its own, used in turn, in pages of 256."""

    def __init__(self, vcpus: int, max_frames: int) -> None:
        self._max_frames = max_frames
        self._frames = 0
        self._free: list[deque[int]] = [deque() for _ in range(vcpus)]
        self._mappings: dict[int, Mapping] = {}

    def get(self, vcpu: int) -> int:
        """A free handle (get_maptrack_handle). GrantError(no_space)."""
        free = self._free[vcpu]
        if len(free) > 1:  # one always stays, as in Xen's lists
            return free.popleft()
        if self._frames < self._max_frames:
            first = self._frames * MAPTRACK_PER_PAGE
            self._frames += 1
            free.extendleft(range(first + MAPTRACK_PER_PAGE - 1, first, -1))
            return first
        for other in self._free:
            if len(other) > 1:
                if not free:
                    free.append(other.popleft())
                    return self.get(vcpu)
                return other.popleft()
        raise GrantError(abi.GNTST_no_space, "no grant handle is free")

    def put(self, handle: int, vcpu: int) -> None:
        """A handle is free again, for the vCPU that had it."""
        self._mappings.pop(handle, None)
        self._free[vcpu].append(handle)

    def mapping(self, handle: int) -> Mapping:
        """GrantError(bad_handle) where there is none."""
        found = self._mappings.get(handle)
        if found is None:
            raise GrantError(abi.GNTST_bad_handle, f"no mapping has handle {handle}")
        return found

    def set(self, handle: int, mapping: Mapping) -> None:
        self._mappings[handle] = mapping

    def __len__(self) -> int:
        return len(self._mappings)

    def release_all(self) -> None:
        """The domain ends: its mappings are no uses of the grants any more (gnttab_release_mappings).

        What the mappings hold of the frames themselves goes with its page tables.
        """
        for mapping in self._mappings.values():
            for increment in _increments(mapping.flags):
                mapping.table.release(mapping.ref, increment)
        self._mappings.clear()


def _increments(flags: int) -> tuple[int, ...]:
    """What a mapping counts in a grant's pin, for devices and for CPUs."""
    return INCREMENTS[flags & 7]


INCREMENTS: Final = [
    tuple(
        increment
        for kind, increment in (
            (abi.GNTMAP_device_map, GNTPIN_devr_inc if flags & abi.GNTMAP_readonly else GNTPIN_devw_inc),
            (abi.GNTMAP_host_map, GNTPIN_hstr_inc if flags & abi.GNTMAP_readonly else GNTPIN_hstw_inc),
        )
        if flags & kind
    )
    for flags in range(8)
]


def map_grant(
    user: GrantTable, mapper: Mapper, vcpu: int, address: int, flags: int, ref: int, domid: int
) -> tuple[int, int]:
    """GNTTABOP_map_grant_ref: (handle, mfn). GrantError with the status that the user gets."""
    increment = sum(_increments(flags))
    if not increment:
        raise GrantError(abi.GNTST_bad_gntref, "neither a host nor a device mapping")
    granter = user.domain.hypervisor.domain_or_zombie(domid)
    if granter is None:
        raise GrantError(abi.GNTST_bad_domain, f"no domain {domid:#x}")
    handle = user.maptrack.get(vcpu)
    try:
        table = granter.grant_table
        if table is None:
            raise GrantError(abi.GNTST_general_error, f"domain {domid} grants nothing")
        mfn = table.acquire(ref, user.domain.domid, increment, mapping=True).mfn
        try:
            _get_and_map(user.domain, granter, mapper, address, mfn, flags)
        except GrantError:
            table.release(ref, increment)
            raise
    except GrantError:
        user.maptrack.put(handle, vcpu)
        raise
    user.maptrack.set(handle, Mapping(table, ref, flags, vcpu))
    return handle, mfn


def _get_and_map(user: Domain, granter: Domain, mapper: Mapper, address: int, mfn: int, flags: int) -> None:
    writable = not flags & abi.GNTMAP_readonly
    taken = 0
    try:
        # The frame can have changed hands since the grant was first used: a guest that overwrites its mapping
        # drops the reference, and not the use.
        if user.machine.owner[mfn] != granter.domid:
            raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} is not domain {granter.domid}'s any more")
        for kind in (abi.GNTMAP_device_map, abi.GNTMAP_host_map):
            if flags & kind:
                user.get_granted(mfn, writable)
                taken += 1
        if flags & abi.GNTMAP_host_map:
            mapper.create(address, mfn, flags)
    except XenError:
        _put(mapper, mfn, writable, taken)
        raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} can't be mapped") from None
    except GrantError:
        _put(mapper, mfn, writable, taken)
        raise


def access_grants(user: Domain, granter: Domain, refs: Iterable[int], readonly: bool) -> list[int]:
    """Use granted frames for the time of one call, as GNTTABOP_copy does; their mfns are good until others run.

    What may be mapped may be used so, and nothing else. Who writes tells `granter.frame_written`. GrantError for the
    first that may not be.
    """
    table = granter.grant_table
    if table is None:
        raise GrantError(abi.GNTST_general_error, f"domain {granter.domid} grants nothing")
    machine = user.machine
    u64, owner, type_, type_count = machine.u64, machine.owner, machine.type, machine.type_count
    frames, active, owner_id = table.frames, table.active, granter.domid
    entries, most = 0 if granter.dying else table.entries, machine.frames
    shift = 0 if table.version == 1 else 1  # words of 64 bits for each entry
    frame_shift, frame_mask = ENTRIES_SHIFT - shift, ENTRIES_MASK >> shift
    mask = abi.GTF_type_mask | abi.GTF_sub_page | 0xFFFF << 16 | (0 if readonly else abi.GTF_readonly)
    expected = abi.GTF_permit_access | user.domid << 16
    mfns = []
    for ref in refs:
        mfn = most
        if ref < entries and ref not in active:
            # What `acquire` would mark as used, and `release` take back at once, is only looked at.
            at = (frames[ref >> frame_shift] << ENTRIES_SHIFT) + ((ref & frame_mask) << shift)
            entry = u64[at]
            if entry & mask == expected:
                mfn = u64[at + 1] if shift else entry >> 32
        if mfn >= most or owner[mfn] != owner_id:
            mfn = _acquire_now(user, table, ref, readonly)
        if not readonly and type_count[mfn] and type_[mfn] != PGT_WRITABLE:
            raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} is a page table or descriptor page")
        mfns.append(mfn)
    return mfns


def _acquire_now(user: Domain, table: GrantTable, ref: int, readonly: bool) -> int:
    """A grant that is in use already, or one whose error is to be told."""
    increment = GNTPIN_hstr_inc if readonly else GNTPIN_hstw_inc
    mfn = table.acquire(ref, user.domid, increment, mapping=True).mfn
    table.release(ref, increment)
    if user.machine.owner[mfn] != table.domain.domid:
        raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} is not domain {table.domain.domid}'s any more")
    return mfn


def _put(mapper: Mapper, mfn: int, writable: bool, times: int) -> None:
    for _ in range(times):
        mapper.put(mfn, writable)


class Unmapped(NamedTuple):
    """A mapping that is out of the address space, and whose references go once the TLBs are flushed."""

    mapper: Mapper
    table: GrantTable
    ref: int
    mfn: int
    kinds: int  # which of GNTMAP_host_map and GNTMAP_device_map, with GNTMAP_readonly

    def complete(self) -> None:
        """unmap_common_complete."""
        writable = not self.kinds & abi.GNTMAP_readonly
        for increment in _increments(self.kinds):
            self.mapper.put(self.mfn, writable)
            self.table.release(self.ref, increment)
        if writable:
            self.table.domain.frame_written(self.mfn << PAGE_SHIFT, PAGE_SIZE)


def unmap_grant(
    user: GrantTable, mapper: Mapper, handle: int, address: int, bus_address: int = 0, new_address: int = 0
) -> Unmapped:
    """GNTTABOP_unmap_grant_ref and _unmap_and_replace (unmap_common): of a mapping by CPUs where there is an
    `address`, by devices where there is a `bus_address`. GrantError with the status that the user gets.
    """
    mapping = user.maptrack.mapping(handle)
    table, ref, flags, vcpu = mapping
    mfn = table.active[ref].mfn
    kinds = 0
    if bus_address and flags & abi.GNTMAP_device_map and bus_address != mfn << PAGE_SHIFT:
        raise GrantError(abi.GNTST_bad_dev_addr, f"bus address {bus_address:#x}")
    if address and flags & abi.GNTMAP_host_map:
        mapper.replace(address, mfn, new_address, flags)
        kinds |= abi.GNTMAP_host_map
    if bus_address and flags & abi.GNTMAP_device_map:
        kinds |= abi.GNTMAP_device_map
    if flags & ~kinds & MAPS:
        user.maptrack.set(handle, mapping._replace(flags=flags & ~kinds))
    else:
        user.maptrack.put(handle, vcpu)
    return Unmapped(mapper, table, ref, mfn, kinds | flags & abi.GNTMAP_readonly)

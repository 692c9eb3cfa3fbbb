"""Grants between domains: mapping, copying and giving away frames, and what is left when a guest or a grant goes."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import guestlib
from pvirq import Host
from pvirq.abi import grant_table as abi
from pvirq.abi import memory as memory_abi
from pvirq.abi import xen as xen_abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_INVALID, DOMID_SELF, PAGE_SIZE
from pvirq.pv.grant_map import PvMapper
from pvirq.pv.hypercalls import HYPERCALLS, grant, memory, misc
from pvirq.pv.hypercalls.protocol import Preempted
from pvirq.pv.pagetable import ADDRESS, DIRTY, PINNED, PRESENT, RW, USER, XEN_SLOTS, PageTables
from pvirq.xen.domain import Hypervisor
from pvirq.xen.grant import GrantError, GrantTable
from pvirq.xen.grant_copy import Side, copy
from pvirq.xen.grant_map import Maptrack, PlainMapper, map_grant, unmap_grant
from pvirq.xen.grant_transfer import transfer
from pvirq.xen.memory import PGT_L1, PGT_WRITABLE, Machine

FRAMES = 6
HOST = abi.GNTMAP_host_map
DEVICE = abi.GNTMAP_device_map
READONLY = abi.GNTMAP_readonly
BUFFER = 0x10000000  # guest addresses from here on are the hypercall buffer


class Guest:
    """A domain with a level-1 table of its own, and as much of a vCPU as grant hypercalls need.

    Address `slot << 12` is mapped by entry `slot` of that table.
    """

    def __init__(self, hypervisor: Hypervisor, domid: int | None = None) -> None:
        self.hypervisor = hypervisor
        self.domain = hypervisor.create_domain(domid, vcpus=2)
        self.machine = hypervisor.machine
        self.flushes = 0
        self.written: list[tuple[int, int]] = []
        first = self.machine.alloc(FRAMES, self.domain.domid)
        self.frames = list(range(first, first + FRAMES))
        self.domain.tot_pages, self.domain.max_pages = FRAMES, FRAMES + 2
        self.tables = PageTables(self.domain, lambda: [0] * len(XEN_SLOTS), self.flush_tlb)
        self.domain.frame_written = lambda address, size: self.written.append((address, size))
        self.grants = self.domain.grant_table = GrantTable(self.domain)
        self.l1 = self.frames[0]
        self.tables.pin(self.l1, PGT_L1)
        self.buffer = bytearray(1 << 20)
        self.vcpu = SimpleNamespace(vcpu_id=0, runnable=True, event_pending=lambda: False)
        self.engine = SimpleNamespace(flush_page=lambda va: self.flush_tlb())
        self.hypercalls = HYPERCALLS
        self.in_multicall = False
        self.mapper = PvMapper(self)  # type: ignore[arg-type]

    def flush_tlb(self) -> None:
        self.flushes += 1

    def l1_index(self, va: int) -> int | None:
        return (self.l1 << 9) + (va >> 12) if va < 512 << 12 else None

    def read(self, va: int, size: int) -> bytes:
        at = va - BUFFER
        if at < 0 or at + size > len(self.buffer):
            raise XenError(Errno.EFAULT, "outside the buffer")
        return bytes(self.buffer[at : at + size])

    def write(self, va: int, data: bytes) -> None:
        self.read(va, len(data))
        self.buffer[va - BUFFER : va - BUFFER + len(data)] = data

    def entry(self, slot: int) -> int:
        return self.machine.u64[(self.l1 << 9) + slot]

    def set_entry(self, slot: int, entry: int) -> None:
        self.tables.update((self.l1 << 12) + slot * 8, entry)

    def grant(self, ref: int, user: Guest, mfn: int, flags: int = abi.GTF_permit_access) -> None:
        self.grants.set_entry(ref, user.domain.domid, mfn, flags)

    def map(self, granter: Guest, ref: int, slot: int = 1, flags: int = HOST) -> int:
        """The handle."""
        return map_grant(self.grants, self.mapper, 0, slot << 12, flags, ref, granter.domain.domid)[0]

    def unmap(self, handle: int, slot: int = 1, bus: int = 0, new_slot: int = 0) -> None:
        unmapped = unmap_grant(self.grants, self.mapper, handle, slot << 12, bus, new_slot << 12)
        self.flush_tlb()
        unmapped.complete()

    def flags(self, ref: int) -> int:
        return self.grants.header(ref)[0]


@pytest.fixture
def world() -> tuple[Guest, Guest]:
    """A granter and a user."""
    hypervisor = Hypervisor(Machine(4 << 20))
    return Guest(hypervisor), Guest(hypervisor)


World = tuple[Guest, Guest]


def status(work: Callable[[], object]) -> int:
    """The GNTST_* status of what is tried."""
    try:
        work()
    except GrantError as error:
        return error.status
    return abi.GNTST_okay


# -- mapping -----------------------------------------------------------------------------------------------------------


def test_mapping_gives_access_until_it_is_unmapped(world: World) -> None:
    granter, user = world
    machine, mfn = granter.machine, granter.frames[1]
    granter.grant(8, user, mfn)
    handle = user.map(granter, 8)
    assert user.entry(1) & ADDRESS == mfn << 12
    assert user.entry(1) & (PRESENT | RW | USER) == PRESENT | RW | USER
    assert (machine.refs[mfn], machine.type_count[mfn], machine.type[mfn]) == (1, 1, PGT_WRITABLE)
    assert user.domain.foreign == {mfn: [1, 1]}
    assert granter.flags(8) == abi.GTF_permit_access | abi.GTF_reading | abi.GTF_writing
    user.unmap(handle)
    assert user.entry(1) == 0
    assert (machine.refs[mfn], machine.type_count[mfn]) == (0, 0)
    assert user.domain.foreign == {}
    assert granter.flags(8) == abi.GTF_permit_access
    assert granter.written == [(mfn << 12, PAGE_SIZE)]  # it may have been code
    assert status(lambda: user.unmap(handle)) == abi.GNTST_bad_handle


def test_nothing_but_a_grant_maps_another_domains_frame(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn, abi.GTF_permit_access | abi.GTF_readonly)
    assert status(lambda: user.map(granter, 8)) == abi.GNTST_general_error
    handle = user.map(granter, 8, flags=HOST | READONLY)
    entry = user.entry(1)
    for other in (entry, entry | RW):
        with pytest.raises(XenError) as caught:  # the entry copied, with the mapping alive
            user.set_entry(2, other)
        assert caught.value.errno == Errno.EBUSY
    with pytest.raises(XenError):  # made writable
        user.set_entry(1, entry | RW)
    user.set_entry(1, entry & ~DIRTY)  # what changes no rights is the user's to change
    fake = user.frames[2]
    user.machine.u64[fake << 9] = entry
    with pytest.raises(XenError):  # in a new table
        user.tables.get_type(fake, PGT_L1)
    with pytest.raises(XenError):
        user.tables.get_type(mfn, PGT_WRITABLE)
    user.unmap(handle)
    with pytest.raises(XenError):
        user.set_entry(1, entry)


def test_what_is_mapped_writable_is_no_page_table(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    handle = user.map(granter, 8)
    with pytest.raises(XenError):
        granter.tables.pin(mfn, PGT_L1)
    # The granter's own mapping goes first: only the user's keeps the type, and the granter's TLB may still know it.
    granter.set_entry(7, mfn << 12 | PRESENT | RW)
    granter.set_entry(7, 0)
    before = granter.flushes
    user.unmap(handle)
    assert granter.flushes > before
    granter.tables.pin(mfn, PGT_L1)
    assert status(lambda: user.map(granter, 8)) == abi.GNTST_general_error
    assert granter.flags(8) == abi.GTF_permit_access
    user.unmap(user.map(granter, 8, flags=HOST | READONLY))


def test_a_revoked_grant_stays_mapped_and_is_not_mapped_again(world: World) -> None:
    granter, user = world
    granter.grant(8, user, granter.frames[1])
    handle = user.map(granter, 8)
    granter.grant(8, user, granter.frames[2], abi.GTF_invalid)
    second = user.map(granter, 8, 2)  # the use that is there counts, as in Xen
    assert user.entry(2) & ADDRESS == granter.frames[1] << 12
    user.unmap(handle)
    user.unmap(second, 2)
    assert status(lambda: user.map(granter, 8)) == abi.GNTST_general_error


def test_an_overwritten_mapping_holds_the_frame_no_more(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    handle = user.map(granter, 8)
    before = user.flushes
    user.set_entry(1, user.frames[2] << 12 | PRESENT | RW)
    assert user.flushes > before
    assert granter.machine.refs[mfn] == 0
    assert status(lambda: user.unmap(handle)) == abi.GNTST_general_error
    assert granter.grants.active[8].pin == 1  # but the use is on record for ever
    granter.tables.release(mfn)
    assert granter.machine.owner[mfn] == DOMID_INVALID
    assert status(lambda: user.map(granter, 8)) == abi.GNTST_general_error
    side = Side(8, granter.domain.domid, 0, True)
    assert status(lambda: copy(user.domain, side, Side(user.frames[2], DOMID_SELF, 0, False), 4)) != abi.GNTST_okay
    assert granter.grants.active[8].pin == 1


def test_a_table_that_goes_lets_go_of_its_grants(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    user.map(granter, 8)
    user.set_entry(2, user.frames[2] << 12 | PRESENT | RW)
    user.tables.unpin(user.l1)
    assert user.domain.foreign == {}
    assert granter.machine.refs[mfn] == granter.machine.type_count[mfn] == 0
    assert granter.machine.refs[user.frames[2]] == 0
    with pytest.raises(XenError):
        user.tables.pin(user.l1, PGT_L1)  # the entry is in it still


def test_by_page_table_entry(world: World) -> None:
    granter, user = world
    granter.grant(8, user, granter.frames[1])
    domid = granter.domain.domid

    def by_entry(address: int) -> int:
        flags = HOST | abi.GNTMAP_contains_pte
        return map_grant(user.grants, user.mapper, 0, address, flags, 8, domid)[0]

    # Not aligned, not a table, another domain's table, no RAM.
    for address in ((user.l1 << 12) + 4, user.frames[2] << 12, granter.l1 << 12, 1 << 51):
        assert status(lambda at=address: by_entry(at)) == abi.GNTST_general_error  # type: ignore[misc]
    handle = by_entry((user.l1 << 12) + 24)
    assert user.entry(3) & ADDRESS == granter.frames[1] << 12
    assert status(lambda: user.unmap(handle, 3)) == abi.GNTST_general_error
    unmap_grant(user.grants, user.mapper, handle, (user.l1 << 12) + 24).complete()
    assert user.domain.foreign == {}


def test_unmap_and_replace(world: World) -> None:
    granter, user = world
    own = user.frames[2]
    granter.grant(8, user, granter.frames[1])
    handle = user.map(granter, 8)
    user.set_entry(5, own << 12 | PRESENT | RW)
    entry = user.entry(5)
    assert status(lambda: user.unmap(handle, 2, new_slot=5)) == abi.GNTST_general_error
    assert (user.entry(5), user.machine.refs[own]) == (0, 0)  # as in Xen: what was to replace it is gone
    user.set_entry(5, own << 12 | PRESENT | RW)
    user.unmap(handle, 1, new_slot=5)
    assert (user.entry(1), user.entry(5), user.machine.refs[own]) == (entry, 0, 1)
    assert user.domain.foreign == {}


def test_device_mapping_holds_without_an_entry(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    handle = user.map(granter, 8, flags=DEVICE | HOST)
    assert user.domain.foreign == {mfn: [2, 2]}
    user.unmap(handle)
    assert user.domain.foreign == {mfn: [1, 1]}
    granter.tables.release(mfn)
    assert granter.machine.owner[mfn] == granter.domain.domid
    assert status(lambda: user.unmap(handle, 0, bus=4096)) == abi.GNTST_bad_dev_addr
    user.unmap(handle, 0, bus=mfn << 12)
    assert granter.machine.owner[mfn] == DOMID_INVALID


def test_a_guest_in_python_maps_without_page_tables(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    granter.grant(9, granter, mfn)
    for domain, ref in ((user, 8), (granter, 9)):
        mapper = PlainMapper(domain.domain)
        handle, got = map_grant(domain.grants, mapper, 1, 0, HOST, ref, granter.domain.domid)
        assert got == mfn
        assert granter.machine.refs[mfn] == 1
        unmap_grant(domain.grants, mapper, handle, 1).complete()
        assert granter.machine.refs[mfn] == 0


# -- lives and deaths --------------------------------------------------------------------------------------------------


def test_a_frame_given_back_is_freed_with_its_last_mapping(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    handle = user.map(granter, 8)
    granter.tables.release(mfn)
    assert granter.machine.owner[mfn] == granter.domain.domid
    assert granter.domain.tot_pages == FRAMES
    user.unmap(handle)
    assert granter.machine.owner[mfn] == DOMID_INVALID
    assert granter.domain.tot_pages == FRAMES - 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_dead_domains_frame_lives_while_it_is_mapped(world: World, overwrite: bool) -> None:
    granter, user = world
    machine, mfn, domid = granter.machine, granter.frames[1], granter.domain.domid
    granter.grant(8, user, mfn)
    machine.page(mfn)[:4] = b"kept"
    handle = user.map(granter, 8)
    user.hypervisor.destroy_domain(granter.domain)
    assert domid not in user.hypervisor.domains
    assert user.hypervisor.zombies == {domid: granter.domain}
    assert machine.owner[granter.frames[2]] == DOMID_INVALID
    assert bytes(machine.page(mfn)[:4]) == b"kept"
    # Neither its id nor the frame is anybody else's.
    other = Guest(user.hypervisor)
    assert other.domain.domid != domid
    assert mfn not in other.frames
    with pytest.raises(XenError):
        user.hypervisor.create_domain(domid)
    assert status(lambda: user.map(granter, 8, 2)) == abi.GNTST_general_error
    if overwrite:
        user.set_entry(1, 0)
        assert status(lambda: user.unmap(handle)) == abi.GNTST_general_error
    else:
        user.unmap(handle)
    assert machine.owner[mfn] == DOMID_INVALID
    assert user.hypervisor.zombies == {}
    assert user.domain.foreign == {}
    assert status(lambda: user.map(granter, 8, 2)) == abi.GNTST_bad_domain
    assert user.hypervisor.create_domain(domid).domid == domid


def test_a_dead_users_mappings_are_gone(world: World) -> None:
    granter, user = world
    machine, mfn = granter.machine, granter.frames[1]
    granter.grant(8, user, mfn)
    granter.grant(9, user, granter.frames[2])
    user.map(granter, 8, 1)
    user.map(granter, 8, 2, HOST | READONLY)
    user.map(granter, 9, 3, HOST | DEVICE)
    user.map(granter, 9, 4)
    user.set_entry(4, 0)
    granter.tables.release(granter.frames[2])
    user.hypervisor.destroy_domain(user.domain)
    assert granter.grants.active == {}
    assert granter.flags(8) == abi.GTF_permit_access
    assert machine.refs[mfn] == machine.type_count[mfn] == 0
    assert machine.owner[granter.frames[2]] == DOMID_INVALID
    assert user.hypervisor.zombies == {}
    granter.tables.pin(mfn, PGT_L1)


def test_both_die(world: World) -> None:
    granter, user = world
    granter.grant(8, user, granter.frames[1])
    user.grant(8, granter, user.frames[1])
    user.map(granter, 8)
    granter.map(user, 8)
    hypervisor = user.hypervisor
    hypervisor.destroy_domain(granter.domain)
    hypervisor.destroy_domain(user.domain)
    assert hypervisor.zombies == {}
    assert not np.any((granter.machine.np_owner == 1) | (granter.machine.np_owner == 2))
    assert not granter.machine.np_refs.any()


# -- handles -----------------------------------------------------------------------------------------------------------


def test_handles_run_out_and_come_back() -> None:
    track = Maptrack(2, 2)
    first = [track.get(0) for _ in range(256)]
    assert first == [*range(255), 256]  # the last free one of a vCPU stays
    assert track.get(1) == 258  # no third page: one of the other vCPU's, after one that stays
    taken = 0
    while status(lambda: track.get(0)) == abi.GNTST_okay:
        taken += 1
    assert taken == 512 - 256 - 2 - 1
    assert status(lambda: track.get(1)) == abi.GNTST_no_space
    track.put(7, 0)
    assert track.get(1) == 255
    track.put(9, 1)
    assert track.get(1) == 257


def test_uses_of_a_grant_are_counted_in_eight_bits(world: World) -> None:
    granter, user = world
    granter.grant(8, user, granter.frames[1])
    handles = [user.map(granter, 8, slot) for slot in range(1, 129)]
    assert status(lambda: user.map(granter, 8, 200)) == abi.GNTST_general_error
    assert granter.machine.refs[granter.frames[1]] == 128
    user.map(granter, 8, 200, HOST | READONLY)  # another counter
    for slot, handle in enumerate(handles, 1):
        user.unmap(handle, slot)
    assert granter.flags(8) == abi.GTF_permit_access | abi.GTF_reading


# -- copy and transfer -------------------------------------------------------------------------------------------------


def test_copy_between_domains(world: World) -> None:
    granter, user = world
    machine = granter.machine
    machine.page(granter.frames[1])[:] = bytes(range(256)) * 16
    granter.grant(8, user, granter.frames[1], abi.GTF_permit_access | abi.GTF_readonly)
    granter.grant(9, user, granter.frames[2])
    domid, own = granter.domain.domid, user.frames[2]
    copy(user.domain, Side(8, domid, 3, True), Side(own, DOMID_SELF, 0, False), 5)
    assert bytes(machine.page(own)[:6]) == bytes([3, 4, 5, 6, 7, 0])
    copy(user.domain, Side(own, DOMID_SELF, 0, False), Side(9, domid, 4091, True), 5)
    assert bytes(machine.page(granter.frames[2])[4091:]) == bytes([3, 4, 5, 6, 7])
    assert granter.written == [((granter.frames[2] << 12) + 4091, 5)]
    assert granter.grants.active == {}
    for source, dest, wanted in (
        (Side(own, DOMID_SELF, 0, False), Side(8, domid, 0, True), abi.GNTST_general_error),
        (Side(granter.frames[1], domid, 0, False), Side(own, DOMID_SELF, 0, False), abi.GNTST_permission_denied),
        (Side(granter.frames[1], DOMID_SELF, 0, False), Side(own, DOMID_SELF, 0, False), abi.GNTST_bad_page),
        (Side(8, 99, 0, True), Side(own, DOMID_SELF, 0, False), abi.GNTST_bad_domain),
        (Side(8, domid, 4092, True), Side(own, DOMID_SELF, 0, False), abi.GNTST_bad_copy_arg),
        (Side(8, domid, 0, True), Side(user.l1, DOMID_SELF, 0, False), abi.GNTST_general_error),
        (Side(8, domid, 0, True), Side(9, user.domain.domid, 0, True), abi.GNTST_general_error),
    ):
        assert status(lambda a=source, b=dest: copy(user.domain, a, b, 5)) == wanted  # type: ignore[misc]
    assert granter.flags(8) == abi.GTF_permit_access | abi.GTF_readonly
    assert granter.flags(9) == abi.GTF_permit_access


def test_a_grant_of_a_grant(world: World) -> None:
    granter, between = world
    user = Guest(granter.hypervisor)
    machine = granter.machine
    between.grants.set_version(2)
    granter.grant(8, between, granter.frames[1])
    at = between.grants.frames[0] << 12
    header = (abi.GTF_transitive, user.domain.domid, granter.domain.domid, 0, 8)
    struct.pack_into("<HHHHI", machine.mem, at + 10 * 16, *header)
    machine.page(granter.frames[1])[:4] = b"data"
    source, dest = Side(10, between.domain.domid, 0, True), Side(user.frames[2], DOMID_SELF, 0, False)
    copy(user.domain, source, dest, 4)
    assert bytes(machine.page(user.frames[2])[:4]) == b"data"
    copy(user.domain, dest, source, 4)
    assert granter.grants.active == between.grants.active == {}
    assert status(lambda: user.map(between, 10)) == abi.GNTST_general_error
    granter.grant(8, between, granter.frames[1], abi.GTF_permit_access | abi.GTF_readonly)
    assert status(lambda: copy(user.domain, dest, source, 4)) == abi.GNTST_general_error
    assert granter.grants.active == between.grants.active == {}
    # In a circle: one step and no more.
    granter.grants.set_version(2)
    circle = (abi.GTF_transitive, between.domain.domid, between.domain.domid, 0, 10)
    struct.pack_into("<HHHHI", machine.mem, (granter.grants.frames[0] << 12) + 8 * 16, *circle)
    assert status(lambda: copy(user.domain, source, dest, 4)) == abi.GNTST_general_error
    assert granter.grants.active == between.grants.active == {}


def test_transfer(world: World) -> None:
    giver, taker = world
    machine, mfn = giver.machine, giver.frames[1]
    machine.page(mfn)[:4] = b"gift"
    taker.grant(8, giver, 5, abi.GTF_accept_transfer)
    giver.set_entry(1, mfn << 12 | PRESENT)
    assert status(lambda: transfer(giver.domain, mfn, taker.domain.domid, 8)) == abi.GNTST_bad_page
    giver.set_entry(1, 0)
    for wrong in (giver.domain.shared_info_mfn, giver.grants.frames[0], taker.frames[1], 1 << 40):
        assert status(lambda x=wrong: transfer(giver.domain, x, taker.domain.domid, 8)) == abi.GNTST_bad_page  # type: ignore[misc]
    transfer(giver.domain, mfn, taker.domain.domid, 8)
    assert machine.owner[mfn] == taker.domain.domid
    assert bytes(machine.page(mfn)[:4]) == b"gift"
    assert (giver.domain.tot_pages, taker.domain.tot_pages) == (FRAMES - 1, FRAMES + 1)
    assert taker.flags(8) == abi.GTF_accept_transfer | abi.GTF_transfer_committed | abi.GTF_transfer_completed
    # By the same entry no more; and what isn't accepted is lost.
    assert status(lambda: transfer(giver.domain, giver.frames[2], taker.domain.domid, 8)) == abi.GNTST_general_error
    assert machine.owner[giver.frames[2]] == DOMID_INVALID
    taker.grant(9, giver, 0, abi.GTF_accept_transfer)
    taker.domain.max_pages = taker.domain.tot_pages
    assert status(lambda: transfer(giver.domain, giver.frames[3], taker.domain.domid, 9)) == abi.GNTST_general_error
    assert giver.domain.tot_pages == FRAMES - 3


# -- hypercalls --------------------------------------------------------------------------------------------------------


def hypercall(guest: Guest, command: int, va: int, count: int) -> int:
    try:
        return grant.grant_table_op(guest, command, va, count)  # type: ignore[arg-type]
    except XenError as error:
        return -error.errno


def test_hypercalls_between_guests(world: World) -> None:
    granter, user = world
    mfn = granter.frames[1]
    granter.grant(8, user, mfn)
    user.write(BUFFER, struct.pack("<QIIHHIQ", 1 << 12, HOST, 8, granter.domain.domid, 9, 0, 0))
    user.write(BUFFER + 32, struct.pack("<QIIHHIQ", 2 << 12, HOST, 9, granter.domain.domid, 9, 77, 78))
    assert hypercall(user, abi.GNTTABOP_map_grant_ref, BUFFER, 2) == 0
    assert struct.unpack("<xxhIQ", user.read(BUFFER + 16, 16)) == (abi.GNTST_okay, 0, mfn << 12)
    assert struct.unpack("<xxhIQ", user.read(BUFFER + 48, 16)) == (abi.GNTST_general_error, 77, 78)
    # Others' tables are not for guests to see.
    user.write(BUFFER, struct.pack("<HxxIIh", granter.domain.domid, 1, 2, 3))
    assert hypercall(user, abi.GNTTABOP_query_size, BUFFER, 1) == 0
    assert struct.unpack("<HxxIIh", user.read(BUFFER, 14)) == (granter.domain.domid, 1, 2, abi.GNTST_permission_denied)
    user.write(BUFFER, struct.pack("<QQIh", 1 << 12, 0, 0, 9))
    assert hypercall(user, abi.GNTTABOP_unmap_grant_ref, BUFFER, 1) == 0
    assert user.domain.foreign == {}


def test_a_fault_in_the_middle_still_completes_what_was_unmapped(world: World) -> None:
    granter, user = world
    granter.grant(8, user, granter.frames[1])
    handle = user.map(granter, 8)
    last = BUFFER + len(user.buffer) - 24
    user.write(last, struct.pack("<QQIh", 1 << 12, 0, handle, 9))
    assert hypercall(user, abi.GNTTABOP_unmap_grant_ref, last, 2) == -Errno.EFAULT
    assert granter.grants.active == {}
    assert user.domain.foreign == {}


@pytest.mark.parametrize("command", [0, 1, 4, 5, 7, 11, 12])
def test_huge_batches_stop_in_between(world: World, command: int) -> None:
    _, user = world
    count = (1 << 31) - 1
    with pytest.raises(Preempted) as caught:
        grant.grant_table_op(user, command, BUFFER, count)  # type: ignore[arg-type]
    again, va, left = caught.value.arguments
    assert again == command
    assert va > BUFFER
    assert count - left == grant.PREEMPT_AFTER
    assert hypercall(user, command, BUFFER, 1 << 31) == -Errno.EINVAL


def test_long_memory_operations_stop_in_between(world: World) -> None:
    _, user = world
    user.domain.max_pages = 1 << 20
    user.guest = user  # type: ignore[attr-defined]
    pfns = struct.pack("<1000Q", *range(1000))
    command = memory_abi.XENMEM_populate_physmap
    user.write(BUFFER, struct.pack(memory.RESERVATION, BUFFER + 64, 100, 2, 0, DOMID_SELF))
    user.write(BUFFER + 64, pfns)
    memory.PREEMPT_AFTER, limit = 64, memory.PREEMPT_AFTER  # type: ignore[misc]
    try:
        with pytest.raises(Preempted) as caught:
            memory.memory_op(user, command, BUFFER)  # type: ignore[arg-type]
        assert caught.value.arguments == (command | 16 << 6, BUFFER)
        assert user.domain.tot_pages == FRAMES + 64
        (again, _) = caught.value.arguments
        while True:
            try:
                done = memory.memory_op(user, again, BUFFER)  # type: ignore[arg-type]
                break
            except Preempted as rest:
                again = rest.arguments[0]
        assert done == 100
        assert user.domain.tot_pages == FRAMES + 400
    finally:
        memory.PREEMPT_AFTER = limit  # type: ignore[misc]


def multicall(guest: Guest, count: int) -> tuple[int, ...]:
    """What is left after one go; () at the end."""
    try:
        assert misc.multicall(guest, BUFFER, count) == 0  # type: ignore[arg-type]
    except Preempted as rest:
        return rest.arguments
    return ()


def test_multicall_goes_on_where_it_stopped(world: World) -> None:
    _, user = world
    entry = struct.Struct("<8Q")
    for i in range(2000):
        user.write(BUFFER + i * 64, entry.pack(xen_abi.HYPERVISOR_xen_version, 99, 7, 0, 0, 0, 0, 0))
    assert multicall(user, 2000) == (BUFFER + misc.MULTICALL_CHUNK * 64, 2000 - misc.MULTICALL_CHUNK)
    assert entry.unpack(user.read(BUFFER, 64))[1] == PAGE_SIZE
    # A call that stops in between is the first of the rest, with its arguments changed.
    batch = BUFFER + (1 << 19)
    user.write(BUFFER + 64, entry.pack(xen_abi.HYPERVISOR_grant_table_op, 99, 11, batch, 1100, 0, 0, 0))
    assert multicall(user, 3) == (BUFFER + 64, 2)
    assert entry.unpack(user.read(BUFFER + 64, 64))[2:5] == (11, batch + 1024 * 12, 76)
    assert not user.in_multicall
    # One that blocks ends its turn, not the list.
    user.vcpu.runnable = False
    assert multicall(user, 3) == (BUFFER + 64, 2)
    # A list in a list is refused.
    user.vcpu.runnable = True
    user.write(BUFFER, entry.pack(xen_abi.HYPERVISOR_multicall, 99, BUFFER, 1, 0, 0, 0, 0))
    assert multicall(user, 1) == ()
    assert entry.unpack(user.read(BUFFER, 64))[1] == (1 << 64) - Errno.EINVAL


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_arguments_at_all(data: st.DataObject) -> None:
    hypervisor = Hypervisor(Machine(4 << 20))
    granter, user = Guest(hypervisor), Guest(hypervisor)
    granter.grant(8, user, granter.frames[1])
    word = st.one_of(
        st.sampled_from([0, 1, 2, 3, 8, 0xFFF, BUFFER, DOMID_SELF, 1 << 47, (1 << 64) - 1]),
        st.integers(0, (1 << 64) - 1),
    )
    for _ in range(10):
        words = data.draw(st.lists(word, min_size=8, max_size=8))
        user.write(BUFFER, struct.pack("<8Q", *words))
        command = data.draw(st.one_of(st.integers(0, 13), st.integers(0, (1 << 64) - 1)))
        va = data.draw(st.one_of(st.just(BUFFER), word))
        count = data.draw(st.sampled_from([0, 1, 2, 1 << 31, (1 << 64) - 1]))
        result = hypercall(user, command, va, count)
        assert -200 < result <= 0
    check(granter, user)


# -- a recount of everything -------------------------------------------------------------------------------------------


def check(*guests: Guest) -> None:
    """Every reference is somebody's mapping, and every mapping of another's frame was granted."""
    refs: Counter[int] = Counter()
    types: Counter[int] = Counter()
    machine = guests[0].machine
    for guest in guests:
        if guest.domain.dying:
            continue
        by_table: Counter[int] = Counter()
        devices: Counter[int] = Counter()
        for mapping in guest.grants.maptrack._mappings.values():
            if mapping.flags & DEVICE:
                mfn, writable = mapping.table.active[mapping.ref].mfn, not mapping.flags & READONLY
                devices[mfn] += 1
                refs[mfn] += 1
                types[mfn] += writable
        if machine.pinned[guest.l1] & PINNED:
            table = machine.np_u64[guest.l1 << 9 : (guest.l1 + 1) << 9]
            for entry in table[(table & np.uint64(PRESENT)) != 0].tolist():
                mfn = (entry & ADDRESS) >> 12
                assert machine.owner[mfn] != DOMID_INVALID
                refs[mfn] += 1
                types[mfn] += bool(entry & RW)
                if machine.owner[mfn] != guest.domain.domid:
                    by_table[mfn] += 1
            types[guest.l1] += 1
        foreign = {
            mfn: count for mfn, count in (by_table + devices).items() if machine.owner[mfn] != guest.domain.domid
        }
        assert {mfn: held[0] for mfn, held in guest.domain.foreign.items()} == foreign
        for special in (guest.domain.shared_info_mfn, *guest.grants.frames, *guest.grants.status_frames):
            types[special] += 1
    for mfn in np.flatnonzero(machine.np_refs | machine.np_type_count).tolist():
        assert machine.refs[mfn] == refs[mfn], hex(mfn)
        assert machine.type_count[mfn] == types[mfn], hex(mfn)
    assert set(+refs) <= set(np.flatnonzero(machine.np_refs).tolist())


STEPS = ["grant", "revoke", "map", "unmap", "poke", "release", "copy", "unpin", "pin", "transfer", "die"]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_sequence_leaves_a_wrong_count(data: st.DataObject) -> None:
    hypervisor = Hypervisor(Machine(4 << 20))
    guests = [Guest(hypervisor) for _ in range(3)]
    every = [mfn for guest in guests for mfn in guest.frames]
    small = st.integers(0, 3)
    for step in data.draw(st.lists(st.sampled_from(STEPS), max_size=30)):
        a, b = (guests[i] for i in data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))))
        ref, slot, mfn = 8 + data.draw(small), 1 + data.draw(small), data.draw(st.sampled_from(every))
        if a.domain.dying:
            continue
        with suppress(GrantError, XenError):
            run(step, a, b, ref, slot, mfn, data)
        check(*guests)
    for guest in guests:
        if not guest.domain.dying:
            hypervisor.destroy_domain(guest.domain)
    assert hypervisor.zombies == {}
    assert not guests[0].machine.np_refs.any()
    assert set(guests[0].machine.np_owner[every].tolist()) == {DOMID_INVALID}


def run(step: str, a: Guest, b: Guest, ref: int, slot: int, mfn: int, data: Any) -> None:
    match step:
        case "grant":
            a.grant(ref, b, mfn, data.draw(st.sampled_from([1, 1, 2, 5])))
        case "revoke":
            a.grant(ref, b, 0, 0)
        case "map":
            a.map(b, ref, slot, data.draw(st.sampled_from([HOST, HOST | READONLY, DEVICE, HOST | DEVICE])))
        case "unmap":
            bus = data.draw(st.sampled_from([0, mfn << 12]))
            new_slot = data.draw(st.sampled_from([0, 0, 0, 3]))
            a.unmap(data.draw(st.integers(0, 8)), data.draw(st.sampled_from([0, slot])), bus, new_slot)
        case "poke":
            a.set_entry(slot, data.draw(st.sampled_from([0, PRESENT, PRESENT | RW])) | mfn << 12)
        case "release":
            if a.tables.owns(mfn) and mfn != a.l1:
                a.tables.release(mfn)
        case "copy":
            copy(a.domain, Side(ref, b.domain.domid, 0, True), Side(mfn, DOMID_SELF, 0, False), 16)
        case "unpin":
            a.tables.unpin(a.l1)
        case "pin":
            a.tables.pin(a.l1, PGT_L1)
        case "transfer":
            if mfn not in (a.l1, b.l1):
                transfer(a.domain, mfn, b.domain.domid, ref)
        case "die":
            if data.draw(st.integers(0, 3)) == 0:
                a.hypervisor.destroy_domain(a.domain)


# -- two real guests ---------------------------------------------------------------------------------------------------


@pytest.mark.guest
@pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")
def test_between_two_kernels() -> None:
    with Host() as host:
        image = guestlib.build("peer")
        giver = host.boot(image, append="peer=2 give=1", memory=32 << 20)
        taker = host.boot(image, append="peer=1", memory=32 << 20)
        machine, zombies = host.hypervisor.machine, host.hypervisor.zombies
        second = 1_000_000_000
        assert host.run(
            lambda: "code gives 22" in giver.console.text() and "go on" in taker.console.text(), 20 * second
        )
        assert guestlib.transcript(giver.console.text())[1:] == [
            "code gives 11", "granted", "the peer wrote 33 flags 19", "pin what it maps: -EINVAL", "code gives 22",
        ]  # fmt: skip
        (mfn,) = taker.domain.foreign
        host.destroy(giver)
        assert machine.owner[mfn] == 1
        assert list(zombies) == [1]
        third = host.boot(image, append="peer=2 give=1", memory=32 << 20)
        assert third.domain.domid == 3
        assert host.run(lambda: taker.ended, 20 * second)
        assert guestlib.transcript(taker.console.text())[1:] == [
            "mapped: reads 1", "map it by hand: -EBUSY", "copy: 0", "  status 0", "go on", "still there: 2 33",
            "unmap: 0", "  status 0", "read: trap e err 0 rip +0", "map: status -2", "done",
        ]  # fmt: skip
        assert machine.owner[mfn] == DOMID_INVALID
        assert not zombies

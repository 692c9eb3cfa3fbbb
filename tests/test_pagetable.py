"""Page tables: what a guest can pin, map and write, against a slow recount of everything after each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_XEN
from pvirq.pv.pagetable import (
    ACCESSED,
    ADDRESS,
    DIRTY,
    GLOBAL,
    GUEST_KERNEL,
    NX,
    PCD,
    PINNED,
    PRESENT,
    PSE,
    RW,
    USER,
    XEN_SLOTS,
    PageTables,
)
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import PGT_L1, PGT_L2, PGT_L3, PGT_L4, PGT_SEG_DESC, PGT_WRITABLE, Machine

FRAMES = 14  # of the guest's, besides its shared_info
TABLE_KINDS = (PGT_L1, PGT_L2, PGT_L3, PGT_L4)
XEN_ENTRY = 0x77 << 12 | PRESENT  # stands for Xen's own tables in the level-4 slots


@dataclass
class World:
    """A guest with a few frames, another domain, and what someone other than a page table holds of the guest's."""

    machine: Machine
    domain: Domain
    tables: PageTables
    own: list[int]
    foreign: list[int]
    flushes: list[int]
    roots: list[int] = field(default_factory=list)
    held: Counter[tuple[int, int]] = field(default_factory=Counter)

    def entry(self, table: int, slot: int) -> int:
        return self.machine.u64[(table << 9) + slot]

    def entries(self, table: int) -> list[tuple[int, int]]:
        """(slot, entry) of the present ones."""
        page = self.machine.np_u64[table << 9 : (table + 1) << 9]
        return [(slot, self.entry(table, slot)) for slot in np.flatnonzero(page & np.uint64(PRESENT)).tolist()]

    def poke(self, table: int, slot: int, value: int) -> None:
        """Write as the guest does with an ordinary instruction, if it can: not into a table or descriptor page."""
        kind, count = self.machine.type[table], self.machine.type_count[table]
        if self.machine.owner[table] == self.domain.domid and (not count or kind == PGT_WRITABLE):
            self.machine.u64[(table << 9) + slot] = value

    def set(self, table: int, slot: int, value: int, preserve_ad: bool = False) -> None:
        if self.tables.update((table << 12) + slot * 8, value, preserve_ad):
            self.flushes.append(-1)


def make_world(privileged: bool = False) -> World:
    hypervisor = Hypervisor(Machine(4 << 20))
    machine = hypervisor.machine
    hypervisor.create_domain(0, privileged=True)
    domain, other = hypervisor.create_domain(privileged=privileged), hypervisor.create_domain()
    first = machine.alloc(FRAMES, domain.domid)
    theirs = machine.alloc(2, other.domid)
    xen = machine.alloc(1, DOMID_XEN)
    flushes: list[int] = []
    tables = PageTables(domain, lambda: [XEN_ENTRY] * len(XEN_SLOTS), lambda: flushes.append(1))
    foreign = [theirs, theirs + 1, xen, other.shared_info_mfn, 0, machine.frames - 1, machine.frames, ADDRESS >> 12]
    world = World(machine, domain, tables, list(range(first, first + FRAMES)), foreign, flushes)
    world.held[domain.shared_info_mfn, PGT_WRITABLE] = 1
    return world


@pytest.fixture
def world() -> Iterator[World]:
    made = make_world()
    yield made
    check(made)


# -- the reference checker -------------------------------------------------------------------------------------------


def live_tables(world: World) -> dict[int, int]:
    """Every frame that is a table by now, with its level: pinned, a root in use, or reached from one."""
    machine, found = world.machine, {}
    todo = [(mfn, machine.type[mfn]) for mfn in world.own if machine.pinned[mfn] & PINNED]
    todo += [(mfn, PGT_L4) for mfn in world.roots] + [(mfn, kind) for mfn, kind in world.held if kind in TABLE_KINDS]
    while todo:
        mfn, level = todo.pop()
        if mfn in found:
            assert found[mfn] == level, f"frame {mfn:#x} is a table of levels {found[mfn]} and {level}"
            continue
        found[mfn] = level
        if level == PGT_L1:
            continue
        for slot, entry in world.entries(mfn):
            if level == PGT_L4 and slot in XEN_SLOTS:
                continue
            target = (entry & ADDRESS) >> 12
            if target == mfn:  # linear, of its own
                assert not entry & RW
            elif machine.type[target] == level and target in world.own:  # linear, another table
                assert not entry & RW
                todo.append((target, level))
            else:
                todo.append((target, level - 1))
    return found


def recount(world: World, live: dict[int, int]) -> tuple[Counter[tuple[int, int]], Counter[int]]:
    """Type references by (frame, type), and mappings of each frame, from pins, roots and entries."""
    machine = world.machine
    types, refs = Counter(world.held), Counter[int]()
    for mfn in world.own:
        if machine.pinned[mfn] & PINNED:
            types[mfn, machine.type[mfn]] += 1
    for mfn in world.roots:
        types[mfn, PGT_L4] += 1
    for mfn, level in live.items():
        for slot, entry in world.entries(mfn):
            if level == PGT_L4 and slot in XEN_SLOTS:
                continue
            target = (entry & ADDRESS) >> 12
            if level > PGT_L1:
                if target != mfn:
                    types[target, live[target]] += 1
            else:
                refs[target] += 1
                if entry & RW:
                    types[target, PGT_WRITABLE] += 1
    return types, refs


def reachable(world: World, root: int) -> Iterator[tuple[int, bool]]:
    """(frame, writable) for each page that the CPU finds from a root, by whatever way (linear tables too)."""
    seen = set()
    todo = [(root, 4, True)]
    while todo:
        table, level, writable = todo.pop()
        for slot, entry in world.entries(table):
            if level == 4 and slot in XEN_SLOTS:
                continue
            assert level == 1 or not entry & PSE, "a large page"
            target = (entry & ADDRESS) >> 12
            step = (target, level - 1, writable and bool(entry & RW))
            if step in seen:
                continue
            seen.add(step)
            if entry == XEN_ENTRY:  # by a linear table one sees Xen's slots, as on Xen; never to write
                assert not step[2]
            elif level == 1:
                yield target, step[2]
            else:
                todo.append(step)


def check(world: World) -> None:
    machine, domid = world.machine, world.domain.domid
    live = live_tables(world)
    types, refs = recount(world, live)
    for mfn in [*world.own, world.domain.shared_info_mfn]:
        if machine.owner[mfn] != domid:
            assert (machine.type_count[mfn], machine.refs[mfn], machine.pinned[mfn]) == (0, 0, 0)
        kinds = [kind for (frame, kind), count in types.items() if frame == mfn and count]
        assert len(kinds) <= 1, f"frame {mfn:#x} has types {kinds}"
        count = types[mfn, kinds[0]] if kinds else 0
        assert machine.type_count[mfn] == count, f"frame {mfn:#x}: {machine.type_count[mfn]} references, not {count}"
        assert not kinds or machine.type[mfn] == kinds[0]
        assert machine.refs[mfn] == refs[mfn]
    for mfn, level in live.items():
        assert machine.owner[mfn] == domid
        for slot, entry in world.entries(mfn):
            if level != PGT_L4 or slot not in XEN_SLOTS:
                assert entry & USER
                assert machine.owner[(entry & ADDRESS) >> 12] == domid
        if level == PGT_L4:
            assert all(world.entry(mfn, slot) == XEN_ENTRY for slot in XEN_SLOTS)
    protected = set(live) | {mfn for mfn, kind in world.held if kind == PGT_SEG_DESC}
    for root in [mfn for mfn, level in live.items() if level == PGT_L4]:
        for mfn, writable in reachable(world, root):
            assert machine.owner[mfn] == domid, f"frame {mfn:#x} of domain {machine.owner[mfn]} is mapped"
            assert not (writable and mfn in protected), f"table {mfn:#x} can be written"


# -- random sequences ------------------------------------------------------------------------------------------------

SLOTS = st.sampled_from((0, 1, 2, 255, 256, 260, 271, 272, 511))
FLAGS = st.sampled_from(
    (0, PRESENT, PRESENT | RW, PRESENT | RW | USER, PRESENT | USER, PRESENT | RW | ACCESSED | DIRTY, PRESENT | NX,
     PRESENT | GLOBAL, PRESENT | GUEST_KERNEL | RW, PRESENT | RW | PSE, PRESENT | PCD, RW, PRESENT | RW | 1 << 60)
)  # fmt: skip
FRAME = st.one_of(*[st.integers(0, FRAMES - 1)] * 6, st.integers(-8, -1), st.just(FRAMES))


def frame_of(world: World, number: int) -> int:
    if number == FRAMES:
        return world.domain.shared_info_mfn
    return world.own[number] if number >= 0 else world.foreign[number]


Operation = tuple[object, ...]
OPERATIONS: st.SearchStrategy[Operation] = st.one_of(
    *[st.tuples(st.just("poke"), FRAME, SLOTS, FRAME, FLAGS)] * 4,
    *[st.tuples(st.just("set"), FRAME, SLOTS, FRAME, FLAGS, st.booleans())] * 6,
    *[st.tuples(st.just("pin"), FRAME, st.sampled_from(TABLE_KINDS))] * 4,
    st.tuples(st.just("unpin"), FRAME),
    *[st.tuples(st.just("reflag"), FRAME, st.integers(0, 8), FLAGS)] * 2,
    st.tuples(st.just("root"), FRAME),
    st.tuples(st.just("drop root"), st.integers(0, 3)),
    st.tuples(st.just("hold"), FRAME, st.sampled_from((PGT_SEG_DESC, PGT_WRITABLE))),
    st.tuples(st.just("drop hold"), st.integers(0, 7)),
    st.tuples(st.just("release"), FRAME),
)


def apply(world: World, operation: Operation) -> None:
    tables = world.tables
    match operation:
        case "poke", int(table), int(slot), int(target), int(flags):
            if frame_of(world, table) < world.machine.frames:
                world.poke(frame_of(world, table), slot, frame_of(world, target) << 12 & ADDRESS | flags)
        case "set", int(table), int(slot), int(target), int(flags), bool(preserve):
            value = frame_of(world, target) << 12 & ADDRESS | flags
            world.set(frame_of(world, table), slot, value, preserve)
        case "reflag", int(table), int(which), int(flags):
            table = frame_of(world, table)
            present = world.entries(table) if table < world.machine.frames else []
            if present:  # one of the entries that there are
                slot, entry = present[which % len(present)]
                world.set(table, slot, entry & ADDRESS | flags)
        case "pin", int(frame), int(kind):
            tables.pin(frame_of(world, frame), kind)
        case "unpin", int(frame):
            tables.unpin(frame_of(world, frame))
        case "root", int(frame):
            tables.get_type(frame_of(world, frame), PGT_L4)
            world.roots.append(frame_of(world, frame))
        case "drop root", int(which):
            if which < len(world.roots):
                tables.put_type(world.roots.pop(which))
        case "hold", int(frame), int(kind):
            tables.get_type(frame_of(world, frame), kind)
            world.held[frame_of(world, frame), kind] += 1
        case "drop hold", int(which):
            mine = [key for key in +world.held if key[0] != world.domain.shared_info_mfn]
            if which < len(mine):
                world.held[mine[which]] -= 1
                world.held = +world.held
                tables.put_type(mine[which][0])
        case "release", int(frame):
            mfn = frame_of(world, frame)
            # As the hypercall: Xen's shared pages can't be given away, nor a frame twice.
            if tables.owns(mfn) and mfn != world.domain.shared_info_mfn and world.machine.pinned[mfn] < 2:
                tables.release(mfn)
        case _:
            raise AssertionError(operation)


def dismantle(world: World) -> None:
    """Give up every pin, root and other hold."""
    while world.roots:
        world.tables.put_type(world.roots.pop())
    for mfn, kind in list(+world.held):
        if mfn != world.domain.shared_info_mfn:
            for _ in range(world.held.pop((mfn, kind))):
                world.tables.put_type(mfn)
    for mfn in world.own:
        if world.machine.pinned[mfn] & PINNED:
            world.tables.unpin(mfn)
    check(world)
    for mfn in world.own:
        assert (world.machine.type_count[mfn], world.machine.refs[mfn]) == (0, 0), f"frame {mfn:#x} is still in use"


# Small trees to begin with, so that most sequences meet live tables of all levels; by frame number.
TREE = [(3, 0, 2, 7), (2, 0, 1, 7), (1, 0, 0, 7), (0, 0, 8, 7), (0, 1, 0, 5), (0, 2, 3, 5)]
LINEAR_TREE = [*TREE, (3, 511, 3, 5), (2, 511, 2, 5), (1, 511, 1, 5), (7, 1, 3, 5)]
SLOW = [HealthCheck.too_slow]


@settings(max_examples=2000, deadline=None, suppress_health_check=SLOW)
@given(
    st.sampled_from(([], TREE, LINEAR_TREE)),
    st.lists(OPERATIONS, max_size=40),
    st.booleans(),
)
def test_random_sequences(tree: list[tuple[int, int, int, int]], operations: list[Operation], privileged: bool) -> None:
    world = make_world(privileged)
    for table, slot, target, flags in tree:
        world.poke(world.own[table], slot, world.own[target] << 12 | flags)
    if tree:
        world.tables.pin(world.own[3], PGT_L4)
    check(world)
    for operation in operations:
        with suppress(XenError):
            apply(world, operation)
        check(world)
    dismantle(world)
    world.machine.close()


@settings(max_examples=200, deadline=None, suppress_health_check=SLOW)
@given(st.lists(st.tuples(st.integers(0, FRAMES - 1), st.integers(0, 511), FRAME, FLAGS), max_size=60), st.data())
def test_pin_of_whatever_was_written(entries: list[tuple[int, int, int, int]], data: st.DataObject) -> None:
    """Every frame full of arbitrary entries, then pinned as anything."""
    world = make_world()
    for table, slot, target, flags in entries:
        world.poke(world.own[table], slot, frame_of(world, target) << 12 & ADDRESS | flags)
    for _ in range(data.draw(st.integers(1, 6))):
        with suppress(XenError):
            world.tables.pin(world.own[data.draw(st.integers(0, FRAMES - 1))], data.draw(st.sampled_from(TABLE_KINDS)))
        check(world)
    dismantle(world)
    world.machine.close()


# -- single facts ----------------------------------------------------------------------------------------------------


def build_tree(world: World) -> list[int]:
    """frames 0 to 3 are a level 1 to 4 table; the level-1 table's slot 0 maps frame 8 writable. Pinned."""
    for table, slot, target, flags in TREE[:4]:
        world.poke(world.own[table], slot, world.own[target] << 12 | flags)
    world.tables.pin(world.own[3], PGT_L4)
    return world.own


def refused(errno: int, call: Callable[..., object], *arguments: object) -> None:
    with pytest.raises(XenError) as info:
        call(*arguments)
    assert info.value.errno == errno


def test_pin_types_the_whole_tree(world: World) -> None:
    own = build_tree(world)
    assert [world.machine.type[own[i]] for i in (0, 1, 2, 3, 8)] == [PGT_L1, PGT_L2, PGT_L3, PGT_L4, PGT_WRITABLE]
    world.tables.unpin(own[3])
    assert not any(world.machine.type_count[mfn] for mfn in own)


def test_entries_get_the_bits_that_xen_adds(world: World) -> None:
    own = build_tree(world)
    world.set(own[0], 3, own[9] << 12 | PRESENT)
    assert world.entry(own[0], 3) == own[9] << 12 | PRESENT | USER | GUEST_KERNEL
    world.set(own[0], 4, own[9] << 12 | PRESENT | USER)
    assert world.entry(own[0], 4) == own[9] << 12 | PRESENT | USER | GLOBAL
    world.set(own[3], 1, own[2] << 12 | PRESENT)
    assert world.entry(own[3], 1) == own[2] << 12 | PRESENT | USER | ACCESSED


def test_accessed_and_dirty_are_kept_where_asked(world: World) -> None:
    own = build_tree(world)
    world.set(own[0], 0, own[8] << 12 | PRESENT | RW | USER | ACCESSED | DIRTY)
    world.set(own[0], 0, own[8] << 12 | PRESENT | USER, preserve_ad=True)
    assert world.entry(own[0], 0) & (ACCESSED | DIRTY | RW) == ACCESSED | DIRTY
    world.set(own[0], 0, own[8] << 12 | PRESENT | USER)
    assert not world.entry(own[0], 0) & (ACCESSED | DIRTY)


def test_a_table_is_not_mapped_writable(world: World) -> None:
    own = build_tree(world)
    for table in own[:4]:
        refused(Errno.EBUSY, world.set, own[0], 5, table << 12 | PRESENT | RW)
        world.set(own[0], 5, table << 12 | PRESENT)
    world.set(own[0], 6, own[4] << 12 | PRESENT | RW)
    refused(Errno.EINVAL, world.set, own[1], 1, own[4] << 12 | PRESENT | RW)


def test_others_memory_is_not_mapped(world: World) -> None:
    own = build_tree(world)
    theirs, _, xen, their_shared_info, *_ = world.foreign
    for mfn in (theirs, xen, their_shared_info, 0):
        refused(Errno.EBUSY, world.set, own[0], 5, mfn << 12 | PRESENT)
        refused(Errno.EINVAL, world.set, own[1], 5, mfn << 12 | PRESENT)
        refused(Errno.EINVAL, world.tables.pin, mfn, PGT_L1)
        refused(Errno.EINVAL, world.tables.update, mfn << 12, 0)
    refused(Errno.EPERM, world.set, own[0], 5, world.machine.frames << 12 | PRESENT)
    refused(Errno.EINVAL, world.tables.update, world.machine.frames << 12, 0)


def test_xen_slots_are_xens(world: World) -> None:
    own = build_tree(world)
    for slot in (XEN_SLOTS.start, XEN_SLOTS.stop - 1):
        refused(Errno.EINVAL, world.set, own[3], slot, 0)
    world.set(own[3], XEN_SLOTS.stop, own[2] << 12 | PRESENT)


def test_a_linear_table_stays_read_only(world: World) -> None:
    own = build_tree(world)
    for level in (1, 2, 3):
        refused(Errno.EINVAL, world.set, own[level], 9, own[level] << 12 | PRESENT | RW)
        world.set(own[level], 9, own[level] << 12 | PRESENT)
        # The way by which XSA-182 went: only RW changes, and no new look is taken.
        refused(Errno.EINVAL, world.set, own[level], 9, own[level] << 12 | PRESENT | RW)
        world.set(own[level], 9, own[level] << 12 | PRESENT | ACCESSED)


def test_linear_tables_of_two_don_t_keep_each_other(world: World) -> None:
    own = build_tree(world)
    world.tables.pin(own[7], PGT_L4)
    world.set(own[3], 9, own[7] << 12 | PRESENT)
    refused(Errno.EINVAL, world.set, own[7], 9, own[3] << 12 | PRESENT)
    world.set(own[3], 9, 0)
    world.set(own[7], 9, own[3] << 12 | PRESENT)
    refused(Errno.EINVAL, world.set, own[3], 9, own[7] << 12 | PRESENT)
    world.tables.unpin(own[3])
    assert world.machine.type_count[own[3]] == 1
    world.tables.unpin(own[7])
    assert world.machine.type_count[own[3]] == 0


def test_pin_is_once_and_of_one_kind(world: World) -> None:
    own = build_tree(world)
    refused(Errno.EINVAL, world.tables.pin, own[3], PGT_L4)
    refused(Errno.EINVAL, world.tables.pin, own[3], PGT_L3)
    refused(Errno.EINVAL, world.tables.unpin, own[0])
    world.tables.pin(own[0], PGT_L1)
    world.tables.unpin(own[3])
    assert [world.machine.type_count[own[i]] for i in (0, 1)] == [1, 0]
    world.tables.unpin(own[0])


def test_a_failed_promotion_leaves_nothing(world: World) -> None:
    own = world.own
    for slot in range(20):
        world.poke(own[0], slot, own[9] << 12 | PRESENT | RW)
    world.poke(own[0], 400, world.foreign[0] << 12 | PRESENT)
    world.poke(own[1], 0, own[4] << 12 | PRESENT | RW)
    world.poke(own[1], 1, own[0] << 12 | PRESENT | RW)
    refused(Errno.EBUSY, world.tables.pin, own[1], PGT_L2)
    assert not any(world.machine.type_count[mfn] or world.machine.refs[mfn] for mfn in own)


def test_a_table_maps_itself_only_read_only(world: World) -> None:
    world.poke(world.own[0], 0, world.own[0] << 12 | PRESENT | RW)
    refused(Errno.EBUSY, world.tables.pin, world.own[0], PGT_L1)
    world.poke(world.own[0], 0, world.own[0] << 12 | PRESENT)
    world.tables.pin(world.own[0], PGT_L1)
    assert world.machine.refs[world.own[0]] == 1


def test_descriptor_pages_are_not_written(world: World) -> None:
    own = build_tree(world)
    world.tables.get_type(own[10], PGT_SEG_DESC)
    world.held[own[10], PGT_SEG_DESC] += 1
    refused(Errno.EBUSY, world.set, own[0], 5, own[10] << 12 | PRESENT | RW)
    refused(Errno.EINVAL, world.tables.update, own[10] << 12, 0)
    refused(Errno.EINVAL, world.tables.pin, own[10], PGT_L1)
    world.set(own[0], 5, own[10] << 12 | PRESENT)


def test_tlb_is_flushed_before_a_writable_page_becomes_a_table(world: World) -> None:
    own = build_tree(world)
    world.set(own[0], 0, 0)
    world.flushes.clear()
    world.tables.pin(own[8], PGT_L1)
    assert world.flushes == [1]


def test_released_frames_go_with_their_last_use(world: World) -> None:
    own = build_tree(world)
    machine, domid = world.machine, world.domain.domid
    world.tables.release(own[8])
    assert machine.owner[own[8]] == domid
    world.flushes.clear()
    world.set(own[0], 0, 0)
    assert machine.owner[own[8]] != domid
    assert world.flushes  # the CPU may still have known it
    world.set(own[0], 0, own[9] << 12 | PRESENT)
    world.set(own[0], 0, 0)
    world.flushes.clear()
    world.tables.release(own[9])
    assert machine.owner[own[9]] != domid
    assert world.flushes  # the same for one that could only be read
    world.tables.release(own[3])
    world.tables.unpin(own[3])
    assert machine.owner[own[3]] != domid
    assert machine.owner[own[2]] == domid


def test_an_ordinary_page_may_be_updated_too(world: World) -> None:
    assert world.tables.update(world.own[5] << 12 | 8, 0x1234567) is False
    assert world.entry(world.own[5], 1) == 0x1234567

"""A modelled kernel's grant references: the free list, growth, grants in use, and mapping others' frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driverlib import Guest, Host
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.grant_table import GNTST_bad_gntref, GNTST_general_error
from pvirq.abi.xen import PAGE_SIZE
from pvirq.drivers.grants import GREFS_PER_FRAME
from pvirq.xen.grant import GrantError
from pvirq.xen.memory import PGT_L1
from pvirq.xen.timer import NS_PER_S


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def guest(host: Host) -> Guest:
    return host.guest()


def test_references_come_in_order_and_go_back_first(guest: Guest) -> None:
    gnttab = guest.xenbus.gnttab
    assert gnttab.alloc(3) == [8, 9, 10]
    mfn = guest.xenbus.pages.alloc()
    ref = gnttab.grant_access(0, mfn)
    assert ref == 11
    assert gnttab.end_access(ref)
    gnttab.give_back([8])
    assert gnttab.alloc(3) == [8, 11, 12]


def test_the_table_grows_to_its_most(guest: Guest) -> None:
    gnttab = guest.xenbus.gnttab
    assert gnttab.free == GREFS_PER_FRAME - 8
    refs = gnttab.alloc(1100)
    assert len(gnttab.table.frames) == 3
    assert refs == list(range(8, 1108))
    with pytest.raises(XenError) as error:
        gnttab.alloc(GREFS_PER_FRAME * 64)
    assert error.value.errno is Errno.ENOSPC
    assert gnttab.free == 3 * GREFS_PER_FRAME - 1108


def test_a_grant_in_use_ends_later(host: Host, guest: Guest) -> None:
    ours, theirs = host.xenbus.gnttab, guest.xenbus.gnttab
    mfn = guest.xenbus.pages.alloc()
    ref = theirs.grant_access(0, mfn)
    mapped = ours.map(1, ref)
    assert not theirs.revoke(ref)
    ended: list[int] = []
    assert not theirs.end_access(ref, lambda: ended.append(ref))
    host.pass_time(3 * NS_PER_S)
    assert not ended
    ours.unmap(mapped)
    host.pass_time(2 * NS_PER_S)
    assert ended == [ref]
    assert theirs.alloc(1) == [ref]
    assert not theirs.table.active


def test_mapped_pages_are_the_same_bytes(host: Host, guest: Guest) -> None:
    ours, theirs = host.xenbus.gnttab, guest.xenbus.gnttab
    mfn = guest.xenbus.pages.alloc()
    ref = theirs.grant_access(0, mfn)
    mapped = ours.map(1, ref)
    mapped.page[100:105] = b"hello"
    assert bytes(guest.xenbus.pages.page(mfn)[100:105]) == b"hello"
    ours.unmap(mapped)
    ours.unmap(mapped)  # nothing happens
    assert theirs.end_access(ref)


def test_what_may_not_be_mapped(host: Host, guest: Guest) -> None:
    ours, theirs = host.xenbus.gnttab, guest.xenbus.gnttab
    other = host.guest()
    pages = [guest.xenbus.pages.alloc() for _ in range(2)]
    readonly = theirs.grant_access(0, pages[0], readonly=True)
    for_other = theirs.grant_access(other.domain.domid, pages[1])
    for ref, status in ((readonly, GNTST_general_error), (for_other, GNTST_general_error), (99999, GNTST_bad_gntref)):
        with pytest.raises(GrantError) as error:
            ours.map(1, ref)
        assert error.value.status == status
    ours.unmap(ours.map(1, readonly, readonly=True))
    good = theirs.grant_access(0, pages[1])
    with pytest.raises(GrantError):
        ours.map_all(1, [good, 99999])
    assert theirs.end_access(good)  # the first one was unmapped again


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60))
def test_no_reference_is_twice_in_use(steps: list[int]) -> None:
    host = Host(memory=1 << 28)
    guest = host.guest()
    gnttab, pages = guest.xenbus.gnttab, guest.xenbus.pages
    held: dict[int, int] = {}
    for step in steps:
        if step < 4:
            mfn = pages.alloc()
            ref = gnttab.grant_access(0, mfn)
            assert ref not in held
            assert mfn not in held.values()
            held[ref] = mfn
        elif held:
            ref, mfn = held.popitem()
            assert gnttab.end_access(ref, partial(pages.free, mfn))
    total = len(gnttab.table.frames) * PAGE_SIZE // 8
    assert gnttab.free + len(held) == total - 8
    host.close()


FRAMES = st.sampled_from(["own", "own", "table", "foreign", "xen", "none"])
WORDS = st.sampled_from([0, 1, 1, 2, 3, 5, 9, 25, 0x101, 0x8001])


@settings(max_examples=250)
@given(
    version=st.sampled_from([1, 2]),
    entries=st.lists(
        st.tuples(
            WORDS, st.sampled_from([0, 0, 0, 1, 0x7FF0]), st.sampled_from(["own", "table", "foreign", "xen", "none"])
        ),
        min_size=1,
        max_size=6,
    ),
    mapped=st.lists(st.integers(0, 5), max_size=2),
    refs=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    readonly=st.booleans(),
    beyond=st.sampled_from([0, 0, 0, 1 << 20, (1 << 32) - 1]),
)
def test_what_may_be_used_at_once_is_what_may_be_mapped(
    version: int, entries: list[tuple[int, int, str]], mapped: list[int], refs: list[int], readonly: bool, beyond: int
) -> None:
    """Whatever a table says, `access` gives the frames that mapping would, and the same errors; nothing stays."""
    host = Host(memory=256 << 20)
    guest, other = host.guest(), host.guest()
    gnttab, table, machine = host.xenbus.gnttab, guest.xenbus.gnttab.table, host.machine
    table.set_version(version)
    page_table = guest.xenbus.pages.alloc()
    machine.type[page_table], machine.type_count[page_table] = PGT_L1, 1
    frames = {
        "own": guest.xenbus.pages.alloc(), "table": page_table, "foreign": other.xenbus.pages.alloc(), "xen": 0x100,
        "none": machine.frames + 1,
    }  # fmt: skip
    for i, (flags, domid, frame) in enumerate(entries):
        table.set_entry(20 + i, domid, frames[frame], flags)
    held = []
    for i in mapped:
        with suppress(GrantError):
            held.append(gnttab.map(guest.domain.domid, 20 + i))
    wanted = [20 + ref + beyond for ref in refs]
    before = {ref: (act.pin, act.domid, act.mfn) for ref, act in table.active.items()}
    try:
        accessed: list[int] | int = gnttab.access(guest.domain, wanted, readonly)
    except GrantError as error:
        accessed = error.status
    assert {ref: (act.pin, act.domid, act.mfn) for ref, act in table.active.items()} == before
    pages = []
    try:
        for ref in wanted:
            pages.append(gnttab.map(guest.domain.domid, ref, readonly))
        expected: list[int] | int = [page.mfn for page in pages]
    except GrantError as error:
        expected = error.status
    assert accessed == expected
    for page in (*pages, *held):
        gnttab.unmap(page)
    host.close()

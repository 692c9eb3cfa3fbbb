"""Copies by grant from and to a buffer: the same as GNTTABOP_copy with a frame of one's own, for any entry."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi import grant_table as abi
from pvirq.abi.xen import DOMID_SELF, PAGE_SIZE
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.grant import GNTPIN_hstr_inc, GNTPIN_hstw_inc, GrantError, GrantTable
from pvirq.xen.grant_copy import Side, copy, read, read_all, tell_written, write, write_all
from pvirq.xen.memory import PGT_WRITABLE, Machine

REF = 9


class Pair:
    """A user of grants (domain 0), a granter, and a third domain."""

    def __init__(self, version: int) -> None:
        self.machine = Machine(1 << 24)
        self.hypervisor = Hypervisor(self.machine)
        self.user, self.granter, self.third = (
            self.hypervisor.create_domain(domid, vcpus=1, privileged=not domid) for domid in (0, 1, 2)
        )
        for domain in (self.user, self.granter, self.third):
            domain.grant_table = GrantTable(domain)
        self.table.set_version(version)
        self.own = self.machine.alloc(1, 0)
        self.page = self.machine.alloc(1, 1)
        self.machine.page(self.page)[:] = bytes(range(256)) * 16
        self.told: list[tuple[int, int]] = []
        self.granter.frame_written = lambda address, size: self.told.append((address, size))

    @property
    def table(self) -> GrantTable:
        assert self.granter.grant_table is not None
        return self.granter.grant_table

    def state(self) -> tuple[object, ...]:
        """All that an operation may change."""
        frames = [bytes(self.machine.page(mfn)) for mfn in (*self.table.frames, *self.table.status_frames, self.page)]
        return frames, dict(self.table.active), self.told

    def close(self) -> None:
        self.machine.close()


@pytest.fixture(params=[1, 2])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    pair = Pair(request.param)
    yield pair
    pair.close()


def test_both_ways(pair: Pair) -> None:
    pair.table.set_entry(REF, 0, pair.page)
    before = pair.state()
    assert read(pair.user, 1, REF, 10, 300) == (bytes(range(256)) * 2)[10:310]
    assert pair.state() == before
    write(pair.user, 1, REF, 4000, b"written")
    assert bytes(pair.machine.page(pair.page)[4000:4007]) == b"written"
    assert pair.told == [((pair.page << 12) + 4000, 7)]
    assert not pair.table.active


def test_a_page_table_is_not_written(pair: Pair) -> None:
    pair.table.set_entry(REF, 0, pair.page)
    pair.machine.type[pair.page], pair.machine.type_count[pair.page] = PGT_WRITABLE + 1, 1
    with pytest.raises(GrantError) as error:
        write(pair.user, 1, REF, 0, b"x")
    assert error.value.status == abi.GNTST_general_error
    assert read(pair.user, 1, REF, 0, 1) == b"\0"
    pair.machine.type[pair.page] = PGT_WRITABLE
    write(pair.user, 1, REF, 0, b"x")
    pair.machine.type_count[pair.page] = 0


def test_while_it_is_mapped(pair: Pair) -> None:
    pair.table.set_entry(REF, 0, pair.page)
    pair.table.acquire(REF, 0, GNTPIN_hstr_inc, mapping=True)
    assert pair.table.peek(REF, 0, readonly=True) is None
    write(pair.user, 1, REF, 0, b"x")
    assert read(pair.user, 1, REF, 0, 1) == b"x"
    # The marks that Xen set stay for who has it mapped.
    assert pair.table.active[REF].pin == GNTPIN_hstr_inc
    pair.table.release(REF, GNTPIN_hstr_inc)
    pair.table.acquire(REF, 0, GNTPIN_hstw_inc, mapping=True)
    with pytest.raises(GrantError):
        read(pair.third, 1, REF, 0, 1)
    pair.table.release(REF, GNTPIN_hstw_inc)


def test_of_nobody(pair: Pair) -> None:
    for call in (lambda: read(pair.user, 77, REF, 0, 1), lambda: write(pair.user, 77, REF, 0, b"x")):
        with pytest.raises(GrantError) as error:
            call()
        assert error.value.status == abi.GNTST_bad_domain


def outcome(call: object) -> object:
    try:
        return call()  # type: ignore[operator]
    except GrantError as error:
        return error.status


def entries(pair: Pair, version: int, flags: int, domid: int, mfn: int, offset: int, size: int, status: int) -> None:
    table, mem = pair.table, pair.machine.mem
    at = table._at(REF)
    if version == 1:
        struct.pack_into("<HHI", mem, at, flags, domid, mfn)
    elif flags & 3 == abi.GTF_transitive:
        struct.pack_into("<HHHHI", mem, at, flags, domid, 2, 0, REF)
    else:
        struct.pack_into("<HHHHQ", mem, at, flags, domid, offset, size, mfn)
    if version == 2:
        struct.pack_into("<H", mem, table._status_at(REF), status)


@given(
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1, 2, 3, 5, 9, 17, 25, 29, 0x101, 0x105, 0x41, 0x8001]),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.sampled_from(["page", "other", "beyond"]),
    st.sampled_from([0, 100, 4000]),
    st.sampled_from([1, 200, 4096]),
    st.sampled_from([0, 0, 8, 16, 24]),
    st.sampled_from([REF, REF, 100_000]),
    st.integers(0, PAGE_SIZE + 10),
    st.sampled_from([0, 1, 60, 4096]),
)
def test_as_the_hypercall_does_it(
    version: int, flags: int, domid: int, frame: str, start: int, size: int, status: int, ref: int, at: int, length: int
) -> None:
    def run(direct: bool) -> object:
        pair = Pair(version)
        mfn = {"page": pair.page, "other": pair.own, "beyond": pair.machine.frames + 5}[frame]
        entries(pair, version, flags, domid, mfn, start, size, status)
        data = bytes(i * 7 & 0xFF for i in range(length))
        own, theirs = Side(pair.own, DOMID_SELF, 0, False), Side(ref, 1, at, True)
        if direct:
            got = outcome(lambda: read(pair.user, 1, ref, at, length))
            put = outcome(lambda: write(pair.user, 1, ref, at, data))
        else:
            got = outcome(lambda: copy(pair.user, theirs, own, length))
            got = bytes(pair.machine.page(pair.own)[:length]) if got is None else got
            pair.machine.page(pair.own)[:length] = data
            put = outcome(lambda: copy(pair.user, own, theirs, length))
        state = pair.state()
        pair.close()
        return got, put, state

    assert run(False) == run(True)


def some_pieces(pair: Pair, kinds: list[str]) -> list[int]:
    """A reference of each kind, in a table that has one behind the other."""
    table, refs = pair.table, []
    for i, kind in enumerate(kinds):
        ref = REF + i
        mfn = pair.own if kind == "not its frame" else pair.page
        flags = abi.GTF_permit_access | (abi.GTF_readonly if kind == "read-only" else 0)
        table.set_entry(ref, 2 if kind == "not its user" else 0, mfn, flags)
        if kind == "mapped":
            table.acquire(ref, 0, GNTPIN_hstw_inc, mapping=True)
        refs.append(100_000 if kind == "beyond" else ref)
    return refs


KINDS = st.sampled_from(["good"] * 6 + ["read-only", "not its frame", "not its user", "mapped", "beyond"])


@given(
    st.sampled_from([1, 2]),
    st.lists(st.tuples(KINDS, st.integers(0, PAGE_SIZE), st.sampled_from([0, 1, 60, 2000, 4096])), min_size=1),
)
def test_several_as_one_after_the_other(version: int, pieces: list[tuple[str, int, int]]) -> None:
    def run(together: bool) -> object:
        pair = Pair(version)
        refs = some_pieces(pair, [kind for kind, _, _ in pieces])
        wanted = [(ref, at, length) for ref, (_, at, length) in zip(refs, pieces, strict=True)]
        data = [(ref, at, bytes(i + j & 0xFF for j in range(length))) for i, (ref, at, length) in enumerate(wanted)]
        if together:
            got = outcome(lambda: read_all(pair.user, 1, wanted))
            put = [None if error is None else error.status for error in write_all(pair.user, 1, data)]
        else:
            got = outcome(lambda: b"".join([read(pair.user, 1, *piece) for piece in wanted]))
            put = [outcome(lambda piece=piece: write(pair.user, 1, *piece)) for piece in data]  # type: ignore[misc]
        frames, active, told = pair.state()
        changed = {address + i for address, size in pair.told for i in range(size)}
        pair.close()
        assert isinstance(told, list)
        return got, put, frames, active, changed

    assert run(False) == run(True)


def test_several_of_nobody(pair: Pair) -> None:
    assert outcome(lambda: read_all(pair.user, 77, [(REF, 0, 1)] * 2)) == abi.GNTST_bad_domain
    errors = write_all(pair.user, 77, [(REF, 0, b"x")] * 2)
    assert [error is not None and error.status for error in errors] == [abi.GNTST_bad_domain] * 2


def test_runs_are_told_of_once(pair: Pair) -> None:
    tell_written(pair.granter, [(8192, 12288), (4096, 8192), (20000, 20100), (20050, 20200), (12288, 12300)])
    assert pair.told == [(4096, 8204), (20000, 200)]
    pair.told.clear()
    tell_written(pair.granter, [])
    tell_written(pair.granter, [(0, 4096)])
    assert pair.told == [(0, 4096)]


def test_a_dying_granter(pair: Pair) -> None:
    pair.table.set_entry(REF, 0, pair.page)
    domain: Domain = pair.granter
    domain.dying = True
    assert outcome(lambda: read(pair.user, 1, REF, 0, 1)) == abi.GNTST_general_error
    domain.dying = False

"""Copies between frames that are named by a grant or, one's own, by number (gnttab_copy in common/grant_table.c)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pvirq.abi import grant_table as abi
from pvirq.abi.xen import DOMID_SELF, PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.domain import Domain
from pvirq.xen.grant import GNTPIN_hstr_inc, GNTPIN_hstw_inc, GrantError, GrantTable
from pvirq.xen.memory import PGT_WRITABLE, Machine


@dataclass(frozen=True, slots=True)
class Side:
    """Source or destination (struct gnttab_copy_ptr): `frame` is a grant reference of `domid`'s where `by_grant`,
    else an mfn of the caller's, whose `domid` is then DOMID_SELF."""

    frame: int
    domid: int
    offset: int
    by_grant: bool


class _Claim:
    """One side's frame, for the time of the copy: bytes `start` to `start + length` of it."""

    def __init__(self, user: Domain, side: Side, owner: Domain, increment: int) -> None:
        self._table: GrantTable | None = None
        self._ref = side.frame & 0xFFFFFFFF
        self._increment = increment
        if not side.by_grant:
            table = _table(owner)
            table.check_frame(side.frame)
            self.mfn, self.start, self.length = side.frame, 0, PAGE_SIZE
            return
        table = _table(owner)
        act = table.acquire(self._ref, user.domid, increment, mapping=False)
        self.mfn, self.start, self.length = act.mfn, act.start, act.length
        self._table = table
        if act.source is None and user.machine.owner[act.mfn] != owner.domid:
            # In use by a mapping that the user has overwritten, and given to somebody else since.
            self.release()
            raise GrantError(abi.GNTST_bad_domain, f"mfn {act.mfn:#x} is not domain {owner.domid}'s any more")

    def release(self) -> None:
        if self._table is not None:
            self._table.release(self._ref, self._increment)

    def check(self, offset: int, length: int) -> None:
        """GrantError where that isn't within the page, or what is granted of it."""
        if offset + length > PAGE_SIZE:
            raise GrantError(abi.GNTST_bad_copy_arg, "beyond the page")
        if offset < self.start or offset + length > self.start + self.length:
            raise GrantError(abi.GNTST_general_error, "beyond what is granted of the page")


def _table(domain: Domain) -> GrantTable:
    if domain.grant_table is None:
        raise GrantError(abi.GNTST_general_error, f"domain {domain.domid} has no grant table")
    return domain.grant_table


def _owner(user: Domain, side: Side) -> Domain:
    if side.domid != DOMID_SELF and not side.by_grant:
        raise GrantError(abi.GNTST_permission_denied, "another domain's frame by its number")
    owner = user if side.domid == DOMID_SELF else user.hypervisor.domain_or_zombie(side.domid)
    if owner is None:
        raise GrantError(abi.GNTST_bad_domain, f"no domain {side.domid:#x}")
    return owner


def read(user: Domain, domid: int, ref: int, offset: int, length: int) -> bytes:
    """GNTTABOP_copy by domain `user` from a grant of `domid`'s to a buffer of its own; what is in that then.

    GrantError as `copy` has it.
    """
    owner = user.hypervisor.domains.get(domid)
    if owner is not None and owner.grant_table is not None and offset + length <= PAGE_SIZE:
        mfn = owner.grant_table.peek(ref, user.domid, readonly=True)
        if mfn is not None:
            at = (mfn << PAGE_SHIFT) + offset
            return bytes(user.machine.mem[at : at + length])
    claim = _Claim(user, Side(ref, domid, offset, True), _granter(user, domid), GNTPIN_hstr_inc)
    try:
        claim.check(offset, length)
        at = (claim.mfn << PAGE_SHIFT) + offset
        return bytes(user.machine.mem[at : at + length])
    finally:
        claim.release()


def write(user: Domain, domid: int, ref: int, offset: int, data: bytes | memoryview) -> None:
    """GNTTABOP_copy by domain `user` of `data`, from a buffer of its own to a grant of `domid`'s. GrantError."""
    owner = user.hypervisor.domains.get(domid)
    if owner is not None and owner.grant_table is not None and offset + len(data) <= PAGE_SIZE:
        mfn = owner.grant_table.peek(ref, user.domid, readonly=False)
        if mfn is not None:
            _check_writable(user.machine, mfn)
            at = (mfn << PAGE_SHIFT) + offset
            user.machine.mem[at : at + len(data)] = data
            if data:
                owner.frame_written(at, len(data))
            return
    claim = _Claim(user, Side(ref, domid, offset, True), _granter(user, domid), GNTPIN_hstw_inc)
    try:
        _check_writable(user.machine, claim.mfn)
        claim.check(offset, len(data))
        _store(user, claim.mfn, offset, data)
    finally:
        claim.release()


def read_all(user: Domain, domid: int, pieces: Sequence[tuple[int, int, int]]) -> bytes:
    """`read` of several, each (reference, offset, length): one behind the other. GrantError for the first."""
    if len(pieces) == 1:
        return read(user, domid, *pieces[0])
    table = _granter(user, domid).grant_table
    assert table is not None
    mem, parts = user.machine.mem, []
    mfns = table.peek_all([piece[0] for piece in pieces], user.domid, readonly=True)
    for mfn, (ref, offset, length) in zip(mfns, pieces, strict=True):
        if mfn is None or offset + length > PAGE_SIZE:
            parts.append(memoryview(read(user, domid, ref, offset, length)))
        else:
            at = (mfn << PAGE_SHIFT) + offset
            parts.append(mem[at : at + length])
    return b"".join(parts)


def write_all(
    user: Domain, domid: int, pieces: Sequence[tuple[int, int, bytes | memoryview]]
) -> list[GrantError | None]:
    """`write` of several, each (reference, offset, data): what became of each. The owner's CPUs are told at the end."""
    try:
        owner = _granter(user, domid)
        if len(pieces) == 1:
            write(user, domid, *pieces[0])
            return [None]
    except GrantError as error:
        return [error] * len(pieces)
    table, machine = owner.grant_table, user.machine
    assert table is not None
    mem, type_, type_count = machine.mem, machine.type, machine.type_count
    results: list[GrantError | None] = []
    written: list[tuple[int, int]] = []
    mfns = table.peek_all([piece[0] for piece in pieces], user.domid, readonly=False)
    for mfn, (ref, offset, data) in zip(mfns, pieces, strict=True):
        result = None
        if (
            mfn is None or offset + len(data) > PAGE_SIZE
            or (type_count[mfn] and type_[mfn] != PGT_WRITABLE)
        ):  # fmt: skip
            try:
                write(user, domid, ref, offset, data)
            except GrantError as error:
                result = error
        else:
            at = (mfn << PAGE_SHIFT) + offset
            end = at + len(data)
            mem[at:end] = data
            written.append((at, end))
        results.append(result)
    tell_written(owner, written)
    return results


def tell_written(owner: Domain, ranges: Sequence[tuple[int, int]]) -> None:
    """Tell a domain's CPUs what was written of its memory: from one machine address to another, once for each run."""
    at = end = -1
    # In order: frontends use their pages from either end, and each call costs as much as a page's copy.
    for start, stop in sorted(ranges):
        if start > end:
            if end > at:
                owner.frame_written(at, end - at)
            at = start
        end = max(end, stop)
    if end > at:
        owner.frame_written(at, end - at)


def _granter(user: Domain, domid: int) -> Domain:
    owner = user.hypervisor.domain_or_zombie(domid)
    if owner is None:
        raise GrantError(abi.GNTST_bad_domain, f"no domain {domid:#x}")
    _table(owner)
    return owner


def _check_writable(machine: Machine, mfn: int) -> None:
    if machine.type_count[mfn] and machine.type[mfn] != PGT_WRITABLE:
        raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} is a page table or descriptor page")


def _store(user: Domain, mfn: int, offset: int, data: bytes | memoryview) -> None:
    """Write into a frame, and tell the CPUs of its owner."""
    machine = user.machine
    where = (mfn << PAGE_SHIFT) + offset
    machine.mem[where : where + len(data)] = data
    if data:
        owner = user.hypervisor.domain_or_zombie(machine.owner[mfn])
        if owner is not None:
            owner.frame_written(where, len(data))


def copy(user: Domain, source: Side, dest: Side, length: int) -> None:
    """GNTTABOP_copy by domain `user`, within one page each. GrantError with the status that it gets."""
    machine = user.machine
    source_owner, dest_owner = _owner(user, source), _owner(user, dest)
    from_ = _Claim(user, source, source_owner, GNTPIN_hstr_inc)
    try:
        to = _Claim(user, dest, dest_owner, GNTPIN_hstw_inc)
        try:
            _check_writable(machine, to.mfn)
            if max(source.offset, dest.offset) + length > PAGE_SIZE:
                raise GrantError(abi.GNTST_bad_copy_arg, "beyond the page")
            from_.check(source.offset, length)
            to.check(dest.offset, length)
            at = (from_.mfn << PAGE_SHIFT) + source.offset
            _store(user, to.mfn, dest.offset, bytes(machine.mem[at : at + length]))
        finally:
            to.release()
    finally:
        from_.release()

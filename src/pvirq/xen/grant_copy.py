"""Copies between frames that are named by a grant or, one's own, by number (gnttab_copy in common/grant_table.c)."""

from __future__ import annotations

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
    owner = _granter(user, domid)
    table = owner.grant_table
    assert table is not None
    mfn = table.peek(ref, user.domid, readonly=True)
    if mfn is not None and offset + length <= PAGE_SIZE:
        at = (mfn << PAGE_SHIFT) + offset
        return bytes(user.machine.mem[at : at + length])
    claim = _Claim(user, Side(ref, domid, offset, True), owner, GNTPIN_hstr_inc)
    try:
        claim.check(offset, length)
        at = (claim.mfn << PAGE_SHIFT) + offset
        return bytes(user.machine.mem[at : at + length])
    finally:
        claim.release()


def write(user: Domain, domid: int, ref: int, offset: int, data: bytes) -> None:
    """GNTTABOP_copy by domain `user` of `data`, from a buffer of its own to a grant of `domid`'s. GrantError."""
    owner = _granter(user, domid)
    table = owner.grant_table
    assert table is not None
    mfn = table.peek(ref, user.domid, readonly=False)
    if mfn is not None and offset + len(data) <= PAGE_SIZE:
        _check_writable(user.machine, mfn)
        _store(user, mfn, offset, data)
        return
    claim = _Claim(user, Side(ref, domid, offset, True), owner, GNTPIN_hstw_inc)
    try:
        _check_writable(user.machine, claim.mfn)
        claim.check(offset, len(data))
        _store(user, claim.mfn, offset, data)
    finally:
        claim.release()


def _granter(user: Domain, domid: int) -> Domain:
    owner = user.hypervisor.domain_or_zombie(domid)
    if owner is None:
        raise GrantError(abi.GNTST_bad_domain, f"no domain {domid:#x}")
    _table(owner)
    return owner


def _check_writable(machine: Machine, mfn: int) -> None:
    if machine.type_count[mfn] and machine.type[mfn] != PGT_WRITABLE:
        raise GrantError(abi.GNTST_general_error, f"mfn {mfn:#x} is a page table or descriptor page")


def _store(user: Domain, mfn: int, offset: int, data: bytes) -> None:
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

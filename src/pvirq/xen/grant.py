"""Grant tables: which of its frames a domain lets another use (xen/common/grant_table.c).

A domain writes grants into a table that it shares with Xen, in either of two layouts; what Xen knows of a grant in
use is its active entry here. Mappings of grants are in `pvirq.xen.grant_map`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pvirq.abi import grant_table as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.domain import Domain

if TYPE_CHECKING:
    from pvirq.xen.grant_map import Maptrack

MAX_GRANT_FRAMES: Final = 64  # xl's defaults
MAX_MAPTRACK_FRAMES: Final = 1024
INITIAL_GRANT_FRAMES: Final = 1
ENTRY_SIZE: Final = {1: abi.GRANT_ENTRY_V1_SIZE, 2: abi.GRANT_ENTRY_V2_SIZE}
STATUS_PER_FRAME: Final = PAGE_SIZE // abi.GRANT_STATUS_SIZE

# struct active_grant_entry's pin: four counters of 8 bits, for mappings by CPUs (host) and for devices.
GNTPIN_hstw_inc, GNTPIN_hstr_inc, GNTPIN_devw_inc, GNTPIN_devr_inc = 1, 1 << 8, 1 << 16, 1 << 24
GNTPIN_WRITABLE: Final = 0xFF | 0xFF << 16

_unpack_v1: Final = struct.Struct("<HHI").unpack_from
_unpack_v2: Final = struct.Struct("<HHxxxxQ").unpack_from  # of a whole page
# The flags of grants of a whole page that nobody uses, for reading and for writing.
_PLAIN_ANY: Final = (abi.GTF_permit_access, abi.GTF_permit_access | abi.GTF_readonly)
_PLAIN_WRITABLE: Final = (abi.GTF_permit_access,)


class GrantError(Exception):
    """A grant operation failed with a GNTST_* status of its own, which is no errno."""

    def __init__(self, status: int, why: str = "") -> None:
        self.status = status
        super().__init__(f"GNTST {status}{': ' if why else ''}{why}")


@dataclass(slots=True)
class ActiveEntry:
    """A grant in use (struct active_grant_entry). `source` is the grant behind a transitive one."""

    pin: int
    domid: int
    mfn: int
    start: int = 0
    length: int = PAGE_SIZE
    sub_page: bool = False
    source: tuple[GrantTable, int] | None = None


class GrantTable:
    """The table that one domain shares with Xen; grows by whole frames, up to `max_frames`.

    `frames` and `status_frames` are mfns; `active` has the grants that are in use.
    """

    def __init__(
        self,
        domain: Domain,
        max_frames: int = MAX_GRANT_FRAMES,
        max_version: int = 2,
        max_maptrack_frames: int = MAX_MAPTRACK_FRAMES,
    ) -> None:
        from pvirq.xen.grant_map import Maptrack  # which needs GrantTable for its types

        self.domain = domain
        self.max_frames = max_frames
        self.max_version = max_version
        self.version = 1
        self.frames: list[int] = []
        self.status_frames: list[int] = []
        self.active: dict[int, ActiveEntry] = {}
        self.maptrack: Maptrack = Maptrack(len(domain.vcpus), max_maptrack_frames)
        self._mem = domain.machine.mem
        self.grow(INITIAL_GRANT_FRAMES)

    # -- size and version ------------------------------------------------------------------------------------------

    @property
    def entries(self) -> int:
        """How many references there are (nr_grant_entries)."""
        return len(self.frames) * PAGE_SIZE // ENTRY_SIZE[self.version]

    def grow(self, count: int) -> None:
        """Have `count` frames at least (gnttab_grow_table). XenError: EINVAL beyond the maximum, ENOMEM."""
        if count > self.max_frames:
            raise XenError(Errno.EINVAL, f"{count} grant frames; at most {self.max_frames}")
        self._add_frames(self.frames, count)
        if self.version == 2:
            self._add_frames(self.status_frames, _status_frames_for(len(self.frames)))

    def _add_frames(self, frames: list[int], count: int) -> None:
        machine = self.domain.machine
        while len(frames) < count:
            mfn = machine.alloc(1)
            machine.share(mfn, self.domain.domid)
            frames.append(mfn)

    def set_version(self, version: int) -> None:
        """GNTTABOP_set_version. All grants are gone, but for the first 8 entries, which the toolstack made.

        XenError: EINVAL for neither 1 nor 2, ENOSYS where the domain may not have version 2, EBUSY while any other
        grant is in use or the guest still maps a status frame, ERANGE where version 1 can't express those entries.
        """
        if version not in (1, 2):
            raise XenError(Errno.EINVAL, f"grant table version {version}")
        if version > self.max_version:
            raise XenError(Errno.ENOSYS, f"grant table version {version}")
        if version == self.version:
            return
        if any(ref >= abi.GNTTAB_NR_RESERVED_ENTRIES for ref in self.active):
            raise XenError(Errno.EBUSY, "grants are in use")
        if version == 2:
            self._add_frames(self.status_frames, _status_frames_for(len(self.frames)))
            reserved = [self._v1(ref) for ref in range(abi.GNTTAB_NR_RESERVED_ENTRIES)]
        else:
            reserved = [self._reserved_as_v1(ref) for ref in range(abi.GNTTAB_NR_RESERVED_ENTRIES)]
            self._drop_status_frames()
        for mfn in self.frames:
            self.domain.machine.page(mfn)[:] = bytes(PAGE_SIZE)
        self.version = version
        for ref, (flags, domid, frame) in enumerate(reserved):
            if version == 1:
                struct.pack_into("<HHI", self._mem, self._at(ref), flags, domid, frame)
            else:
                in_use = flags & (abi.GTF_reading | abi.GTF_writing)
                struct.pack_into("<H", self._mem, self._status_at(ref), in_use)
                struct.pack_into("<HHIQ", self._mem, self._at(ref), flags & ~in_use, domid, 0, frame)

    def _reserved_as_v1(self, ref: int) -> tuple[int, int, int]:
        flags, domid = self.header(ref)
        kind = flags & abi.GTF_type_mask
        (frame,) = struct.unpack_from("<Q", self._mem, self._at(ref) + 8)
        if kind == abi.GTF_transitive or (kind == abi.GTF_permit_access and frame >> 32):
            raise XenError(Errno.ERANGE, f"grant {ref} can't be one of version 1")
        if kind != abi.GTF_permit_access:
            return 0, 0, 0
        (status,) = struct.unpack_from("<H", self._mem, self._status_at(ref))
        return flags | status, domid, frame

    def _drop_status_frames(self) -> None:
        machine = self.domain.machine
        if any(machine.refs[mfn] for mfn in self.status_frames):
            raise XenError(Errno.EBUSY, "a status frame is still mapped")
        self.domain.flush_tlb()  # it may have been mapped until now
        for mfn in self.status_frames:
            machine.free(mfn)
        self.status_frames = []

    # -- entries ---------------------------------------------------------------------------------------------------

    def _at(self, ref: int) -> int:
        size = ENTRY_SIZE[self.version]
        frame, slot = divmod(ref, PAGE_SIZE // size)
        return (self.frames[frame] << PAGE_SHIFT) + slot * size

    def _status_at(self, ref: int) -> int:
        """Where Xen marks what a grant is used for: in its own flags, or in the status frames."""
        if self.version == 1:
            return self._at(ref)
        frame, slot = divmod(ref, STATUS_PER_FRAME)
        return (self.status_frames[frame] << PAGE_SHIFT) + slot * abi.GRANT_STATUS_SIZE

    def header(self, ref: int) -> tuple[int, int]:
        """(flags, domid) of a reference within the table."""
        flags, domid = struct.unpack_from("<HH", self._mem, self._at(ref))
        return flags, domid

    def _v1(self, ref: int) -> tuple[int, int, int]:
        flags, domid, frame = struct.unpack_from("<HHI", self._mem, self._at(ref))
        return flags, domid, frame

    def set_entry(self, ref: int, domid: int, mfn: int, flags: int = abi.GTF_permit_access) -> None:
        """Write a grant of a whole frame: what the toolstack and guests in Python do."""
        if self.version == 1:
            struct.pack_into("<HHI", self._mem, self._at(ref), flags, domid, mfn)
        else:
            struct.pack_into("<HHIQ", self._mem, self._at(ref), flags, domid, 0, mfn)

    def complete_transfer(self, ref: int, mfn: int) -> None:
        """Tell the domain which frame it was given by GNTTABOP_transfer."""
        flags, domid = self.header(ref)
        flags |= abi.GTF_transfer_committed | abi.GTF_transfer_completed
        if self.version == 1:
            struct.pack_into("<I", self._mem, self._at(ref) + 4, mfn)
        else:
            struct.pack_into("<Q", self._mem, self._at(ref) + 8, mfn)
        struct.pack_into("<HH", self._mem, self._at(ref), flags, domid)

    def check(self, ref: int) -> None:
        """GrantError(bad_gntref) for a reference beyond the table."""
        if ref >= self.entries:
            raise GrantError(abi.GNTST_bad_gntref, f"grant {ref} of {self.entries}")

    def swap(self, a: int, b: int) -> None:
        """GNTTABOP_swap_grant_ref. GrantError: bad_gntref; eagain where one of the two is in use."""
        self.check(a)
        self.check(b)
        if a == b:
            return
        if a in self.active or b in self.active:
            raise GrantError(abi.GNTST_eagain, "a grant is in use")
        self._swap(self._at(a), self._at(b), ENTRY_SIZE[self.version])
        if self.version == 2:
            self._swap(self._status_at(a), self._status_at(b), abi.GRANT_STATUS_SIZE)

    def _swap(self, a: int, b: int, size: int) -> None:
        first, second = bytes(self._mem[a : a + size]), bytes(self._mem[b : b + size])
        self._mem[a : a + size], self._mem[b : b + size] = second, first

    # -- use -------------------------------------------------------------------------------------------------------

    def _mark_used(self, ref: int, user: int, readonly: bool, mapping: bool) -> None:
        """Show the granter that the grant is in use (_set_status). GrantError(general_error): `user` may not."""
        flags, domid = self.header(ref)
        if ref not in self.active:
            kind = flags & (abi.GTF_type_mask | (abi.GTF_sub_page if mapping else 0))
            allowed = kind == abi.GTF_permit_access or (
                self.version == 2 and not mapping and kind == abi.GTF_transitive
            )
            if not allowed or domid != user:
                raise GrantError(abi.GNTST_general_error, f"grant {ref}: flags {flags:#x}, for domain {domid}")
        if not readonly and flags & abi.GTF_readonly:
            raise GrantError(abi.GNTST_general_error, f"grant {ref} is read-only")
        at = self._status_at(ref)
        (status,) = struct.unpack_from("<H", self._mem, at)
        status |= abi.GTF_reading if readonly else abi.GTF_reading | abi.GTF_writing
        struct.pack_into("<H", self._mem, at, status)

    def _mark_unused(self, ref: int, readonly: bool) -> None:
        """Take back from the marks what no use is left for (reduce_status_for_pin)."""
        if self.domain.dying:
            return  # nobody looks any more, and the table is gone
        pin = self.active[ref].pin if ref in self.active else 0
        clear = 0 if pin else abi.GTF_reading
        if not readonly and not pin & GNTPIN_WRITABLE:
            clear |= abi.GTF_writing
        at = self._status_at(ref)
        (status,) = struct.unpack_from("<H", self._mem, at)
        struct.pack_into("<H", self._mem, at, status & ~clear)

    def _target(self, ref: int) -> tuple[int, int, int, bool]:
        """(mfn, first byte, length, part of a page) that an entry grants. GrantError(bad_page): no such frame."""
        start, length, sub_page = 0, PAGE_SIZE, False
        if self.version == 1:
            flags, _, frame = self._v1(ref)
        else:
            flags, _, offset, size, frame = struct.unpack_from("<HHHHQ", self._mem, self._at(ref))
            if flags & abi.GTF_sub_page:
                start, length, sub_page = offset, size, True
        self.check_frame(frame)
        return frame, start, length, sub_page

    def check_frame(self, mfn: int) -> None:
        """GrantError(bad_page) where the frame is not the domain's (get_paged_frame)."""
        machine = self.domain.machine
        if mfn >= machine.frames or machine.owner[mfn] != self.domain.domid:
            raise GrantError(abi.GNTST_bad_page, f"mfn {mfn:#x} is not domain {self.domain.domid}'s")

    def peek(self, ref: int, user: int, *, readonly: bool) -> int | None:
        """The mfn of a grant for one copy by domain `user`, which is over before anybody else runs.

        Nothing is counted or marked: the marks would be gone before the granter could look. None where that is not the
        whole story, and `acquire` has to tell it: a grant that is in use, of another kind, or not to be had.
        """
        if ref in self.active or ref >= self.entries or self.domain.dying:
            return None
        mem, frames = self._mem, self.frames
        if self.version == 1:
            at = (frames[ref >> 9] << PAGE_SHIFT) + (ref & 511) * abi.GRANT_ENTRY_V1_SIZE
            flags, domid, mfn = _unpack_v1(mem, at)
        else:
            at = (frames[ref >> 8] << PAGE_SHIFT) + (ref & 255) * abi.GRANT_ENTRY_V2_SIZE
            flags, domid, mfn = _unpack_v2(mem, at)
            at = (self.status_frames[ref >> 11] << PAGE_SHIFT) + (ref & 2047) * abi.GRANT_STATUS_SIZE
            if mem[at] or mem[at + 1]:
                return None
        if domid != user or flags not in (_PLAIN_ANY if readonly else _PLAIN_WRITABLE):
            return None
        machine = self.domain.machine
        return mfn if mfn < machine.frames and machine.owner[mfn] == self.domain.domid else None

    def peek_all(self, refs: Sequence[int], user: int, *, readonly: bool) -> list[int | None]:
        """`peek` of several."""
        domain = self.domain
        if self.version != 1 or domain.dying:
            return [self.peek(ref, user, readonly=readonly) for ref in refs]
        machine = domain.machine
        u64, owner, most, domid = machine.u64, machine.owner, machine.frames, domain.domid
        frames, active, entries = self.frames, self.active, self.entries
        expected = {flags | user << 16 for flags in (_PLAIN_ANY if readonly else _PLAIN_WRITABLE)}
        found: list[int | None] = []
        for ref in refs:
            mfn = None
            if ref < entries and ref not in active:
                entry = u64[(frames[ref >> 9] << 9) + (ref & 511)]
                if entry & 0xFFFFFFFF in expected:
                    mfn = entry >> 32
                    if mfn >= most or owner[mfn] != domid:
                        mfn = None
            found.append(mfn)
        return found

    def acquire(self, ref: int, user: int, increment: int, *, mapping: bool, transitive: bool = True) -> ActiveEntry:
        """Count one more use of a grant by domain `user`, `increment` being a GNTPIN_*_inc.

        `transitive`: a grant of a grant is allowed. GrantError where the user may not have it.
        """
        if self.domain.dying:
            raise GrantError(abi.GNTST_general_error, "the granting domain is dying")
        self.check(ref)
        act = self.active.get(ref)
        if act is not None:
            overflow = act.pin & increment << 7
            if act.domid != user or overflow or (mapping and act.sub_page):
                raise GrantError(abi.GNTST_general_error, f"grant {ref} is in use by domain {act.domid}")
        readonly = not increment & GNTPIN_WRITABLE
        if not mapping and self.version == 2 and self.header(ref)[0] & abi.GTF_type_mask == abi.GTF_transitive:
            return self._acquire_transitive(ref, user, increment, readonly, transitive)
        if act is None or (not readonly and not act.pin & GNTPIN_WRITABLE):
            self._mark_used(ref, user, readonly, mapping)
            if act is None:
                try:
                    mfn, start, length, sub_page = self._target(ref)
                except GrantError:
                    self._mark_unused(ref, readonly)
                    raise
                act = self.active[ref] = ActiveEntry(0, user, mfn, start, length, sub_page)
        act.pin += increment
        return act

    def _acquire_transitive(self, ref: int, user: int, increment: int, readonly: bool, allowed: bool) -> ActiveEntry:
        act = self.active.get(ref)
        if act is None or (not readonly and not act.pin & GNTPIN_WRITABLE):
            self._mark_used(ref, user, readonly, mapping=False)
        try:
            domid, source_ref = struct.unpack_from("<HxxI", self._mem, self._at(ref) + 4)
            if not allowed or domid == self.domain.domid:
                raise GrantError(abi.GNTST_general_error, f"grant {ref} is transitive")
            source = self.domain.hypervisor.domain_or_zombie(domid)
            if source is None or source.grant_table is None:
                raise GrantError(abi.GNTST_general_error, f"grant {ref} is one of domain {domid}")
            table = source.grant_table
            found = table.acquire(source_ref, self.domain.domid, increment, mapping=False, transitive=False)
        except GrantError:
            self._mark_unused(ref, readonly)
            raise
        if act is None:
            act = ActiveEntry(0, user, found.mfn, found.start, found.length, True, (table, source_ref))
            self.active[ref] = act
        elif (act.mfn, act.start, act.length, act.source) != (
            found.mfn, found.start, found.length, (table, source_ref),
        ):  # fmt: skip
            table.release(source_ref, increment)
            self._mark_unused(ref, readonly)
            raise GrantError(abi.GNTST_general_error, f"grant {ref} changed while it was in use")
        act.pin += increment
        return act

    def release(self, ref: int, increment: int) -> None:
        """Undo one `acquire`."""
        act = self.active[ref]
        act.pin -= increment
        if not act.pin:
            del self.active[ref]
        self._mark_unused(ref, not increment & GNTPIN_WRITABLE)
        if act.source is not None:
            table, source_ref = act.source
            table.release(source_ref, increment)


def _status_frames_for(frames: int) -> int:
    return -(-frames * PAGE_SIZE // abi.GRANT_ENTRY_V2_SIZE // STATUS_PER_FRAME)

"""Grant tables, version 1: which of its frames a domain lets another use (xen/common/grant_table.c).

A host here is one booted with gnttab=max-ver:1: version 2 is refused, as guests are prepared for.
"""

from __future__ import annotations

import struct
from typing import Final

from pvirq.abi import grant_table as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.domain import Domain

MAX_GRANT_FRAMES: Final = 64  # xl's default
INITIAL_GRANT_FRAMES: Final = 1
ENTRIES_PER_FRAME: Final = PAGE_SIZE // abi.GRANT_ENTRY_V1_SIZE


class GrantTable:
    """The table that one domain shares with Xen; grows by whole frames, up to `max_frames`."""

    def __init__(self, domain: Domain, max_frames: int = MAX_GRANT_FRAMES) -> None:
        self.domain = domain
        self.max_frames = max_frames
        self.version = 1
        self.frames: list[int] = []
        self.grow(INITIAL_GRANT_FRAMES)

    def grow(self, count: int) -> None:
        """Have `count` frames at least (gnttab_grow_table). XenError(EINVAL) beyond the maximum."""
        if count > self.max_frames:
            raise XenError(Errno.EINVAL, f"{count} grant frames; at most {self.max_frames}")
        machine = self.domain.machine
        while len(self.frames) < count:
            mfn = machine.alloc(1)
            machine.share(mfn, self.domain.domid)
            self.frames.append(mfn)

    def entry(self, gref: int) -> tuple[int, int, int] | None:
        """(flags, domid, frame) of a reference; None beyond the table."""
        if gref >= len(self.frames) * ENTRIES_PER_FRAME:
            return None
        frame, slot = divmod(gref, ENTRIES_PER_FRAME)
        at = (self.frames[frame] << PAGE_SHIFT) + slot * abi.GRANT_ENTRY_V1_SIZE
        flags, domid, mfn = struct.unpack_from("<HHI", self.domain.machine.mem, at)
        return flags, domid, mfn

    def set_entry(self, gref: int, domid: int, mfn: int) -> None:
        """Grant a frame, as the toolstack does for the console and xenstore rings."""
        frame, slot = divmod(gref, ENTRIES_PER_FRAME)
        at = (self.frames[frame] << PAGE_SHIFT) + slot * abi.GRANT_ENTRY_V1_SIZE
        struct.pack_into("<HHI", self.domain.machine.mem, at, abi.GTF_permit_access, domid, mfn)

    def resolve(self, gref: int, user: Domain, write: bool) -> int:
        """The mfn behind a reference that `user` wants to read or write.

        GrantError with the GNTST_* that the user gets.
        """
        entry = self.entry(gref)
        if entry is None:
            raise GrantError(abi.GNTST_bad_gntref)
        flags, domid, mfn = entry
        if flags & abi.GTF_type_mask != abi.GTF_permit_access or domid != user.domid:
            raise GrantError(abi.GNTST_general_error)
        if write and flags & abi.GTF_readonly:
            raise GrantError(abi.GNTST_general_error)
        machine = self.domain.machine
        if mfn >= machine.frames or machine.owner[mfn] != self.domain.domid:
            raise GrantError(abi.GNTST_bad_page)
        return mfn


class GrantError(Exception):
    """A grant operation failed with a GNTST_* status of its own, which is no errno."""

    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"GNTST {status}")

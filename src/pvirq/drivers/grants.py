"""Grant references of a modelled kernel, and its use of others' (drivers/xen/grant-table.c, Linux 6.1)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple, TypeAlias

from pvirq.abi import grant_table as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.linux.kernel import Kernel
from pvirq.xen.domain import Domain
from pvirq.xen.grant import GrantError, GrantTable
from pvirq.xen.grant_map import PlainMapper, access_grants, map_grant, unmap_grant

GREFS_PER_FRAME: Final = PAGE_SIZE // abi.GRANT_ENTRY_V1_SIZE
IN_USE: Final = abi.GTF_reading | abi.GTF_writing
# Where a mapping would be in the kernel's address space: it has none, but an unmap names one.
ANYWHERE: Final = PAGE_SIZE
Page: TypeAlias = memoryview  # by this name, as mypyc doesn't find memoryview in what becomes __annotations__


class Mapped(NamedTuple):
    """A granted frame that is mapped: its bytes in place, and what it takes to unmap it."""

    page: Page
    mfn: int
    handle: int


class Gnttab:
    """A kernel's grant table. References below 8 are the toolstack's.

    `map` and `access` are `do_map` and `do_access`, unless something has been put in front of them
    (`pvirq.xen.probes.put`).
    """

    def __init__(self, kernel: Kernel[Any]) -> None:
        """Sets the domain's grant table up where nobody has."""
        self.map: Callable[..., Mapped] = self.do_map
        self.access: Callable[..., list[int]] = self.do_access
        self._kernel = kernel
        domain = kernel.domain
        self._machine = domain.machine
        if domain.grant_table is None:
            domain.grant_table = GrantTable(domain)
        self.table: GrantTable = domain.grant_table
        self._mapper = PlainMapper(domain)
        self._frames = len(self.table.frames)
        # Taken at the right, where the lowest are first; new frames' go to the far end.
        self._free = deque(range(self._frames * GREFS_PER_FRAME - 1, abi.GNTTAB_NR_RESERVED_ENTRIES - 1, -1))
        self._deferred: deque[tuple[int, Callable[[], None] | None]] = deque()
        self._deferring = False

    # -- granting ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """How many references are free without growing."""
        return len(self._free)

    def _expand(self, need: int) -> None:
        """Have `need` free ones (gnttab_expand); XenError(ENOSPC) beyond the most frames."""
        frames = self._frames + -(-(need - len(self._free)) // GREFS_PER_FRAME)
        if frames > self.table.max_frames:
            raise XenError(Errno.ENOSPC, "no grant references are left")
        self.table.grow(frames)
        self._free.extendleft(range(self._frames * GREFS_PER_FRAME, frames * GREFS_PER_FRAME))
        self._frames = frames

    def alloc(self, count: int) -> list[int]:
        """Reserve references (gnttab_alloc_grant_references); XenError(ENOSPC)."""
        free = self._free
        if len(free) < count:
            self._expand(count)
        return [free.pop() for _ in range(count)]

    def give_back(self, refs: Iterable[int]) -> None:
        """Free references that grant nothing (gnttab_free_grant_references)."""
        self._free.extend(refs)

    def grant(self, ref: int, domid: int, mfn: int, readonly: bool = False) -> None:
        """Grant a frame under a reserved reference (gnttab_grant_foreign_access_ref)."""
        flags = abi.GTF_permit_access | abi.GTF_readonly if readonly else abi.GTF_permit_access
        self._machine.u64[self._at(ref) >> 3] = flags | domid << 16 | mfn << 32

    def grant_access(self, domid: int, mfn: int, readonly: bool = False) -> int:
        """Grant a frame to a domain; returns the reference (gnttab_grant_foreign_access). XenError(ENOSPC)."""
        (ref,) = self.alloc(1)
        self.grant(ref, domid, mfn, readonly)
        return ref

    def _at(self, ref: int) -> int:
        return (self.table.frames[ref // GREFS_PER_FRAME] << PAGE_SHIFT) + ref % GREFS_PER_FRAME * 8

    def revoke(self, ref: int) -> bool:
        """End a grant and keep the reference (gnttab_end_foreign_access_ref). False while the other side uses it."""
        at = self._at(ref) >> 3
        entry = self._machine.u64[at]
        if entry & IN_USE:
            return False
        self._machine.u64[at] = entry & ~0xFFFF
        return True

    def end_access(self, ref: int, on_end: Callable[[], None] | None = None) -> bool:
        """End a grant and free its reference (gnttab_end_foreign_access).

        False while the other side uses it: then that is tried again every second, and `on_end` called once it has
        worked, when the frame may be used for something else. It is called at once where True is returned.
        """
        if self.revoke(ref):
            self._free.append(ref)
            if on_end is not None:
                on_end()
            return True
        self._deferred.append((ref, on_end))
        if not self._deferring:
            self._deferring = True
            self._kernel.set_timer_jiffies(self._kernel.events.hz, self._handle_deferred)
        return False

    def _handle_deferred(self) -> None:
        """gnttab_handle_deferred."""
        for _ in range(len(self._deferred)):
            ref, on_end = self._deferred.popleft()
            if not self.revoke(ref):
                self._deferred.append((ref, on_end))
                continue
            self._free.append(ref)
            if on_end is not None:
                on_end()
        self._deferring = bool(self._deferred)
        if self._deferring:
            self._kernel.set_timer_jiffies(self._kernel.events.hz, self._handle_deferred)

    # -- use of others' grants -----------------------------------------------------------------------------------------

    def do_map(self, domid: int, ref: int, readonly: bool = False) -> Mapped:
        """Map a frame that `domid` grants (GNTTABOP_map_grant_ref). GrantError with Xen's status."""
        flags = abi.GNTMAP_host_map | abi.GNTMAP_readonly if readonly else abi.GNTMAP_host_map
        handle, mfn = map_grant(self.table, self._mapper, self._kernel.cpu, ANYWHERE, flags, ref, domid)
        return Mapped(self._machine.page(mfn), mfn, handle)

    def do_access(self, granter: Domain, refs: Iterable[int], readonly: bool = False) -> list[int]:
        """The mfns of frames that `granter` grants, for the time of one call: nothing is mapped. GrantError."""
        return access_grants(self._kernel.domain, granter, refs, readonly)

    def map_all(self, domid: int, refs: Iterable[int]) -> list[Mapped]:
        """Map several or, where one can't be, none."""
        mapped: list[Mapped] = []
        try:
            for ref in refs:
                mapped.append(self.map(domid, ref))
        except GrantError:
            for one in mapped:
                self.unmap(one)
            raise
        return mapped

    def unmap(self, mapped: Mapped) -> None:
        """End a mapping. Nothing happens to one that has ended, with its domain for example."""
        try:
            unmapped = unmap_grant(self.table, self._mapper, mapped.handle, ANYWHERE)
        except GrantError:
            return
        unmapped.complete()

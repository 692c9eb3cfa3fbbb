"""Pages that a modelled kernel's drivers use: whole frames of its domain's."""

from __future__ import annotations

from typing import Final

from pvirq.abi.xen import PAGE_SIZE
from pvirq.xen.domain import Domain

CHUNK: Final = 16  # frames taken from the machine at a time
ZEROS: Final = bytes(PAGE_SIZE)


class Pages:
    """The page allocator of one kernel; what is freed is used again, and goes back with the domain."""

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self.machine = domain.machine
        self._new: list[int] = []
        self._used: list[int] = []

    def alloc(self, *, zero: bool = True) -> int:
        """A page: its mfn. XenError(ENOMEM) where the machine has none left."""
        if self._used:
            mfn = self._used.pop()
            if zero:
                self.machine.page(mfn)[:] = ZEROS
            return mfn
        if not self._new:
            first = self.machine.alloc(CHUNK, self._domain.domid)
            self._domain.tot_pages += CHUNK
            self._new = list(range(first + CHUNK - 1, first - 1, -1))
        return self._new.pop()

    def free(self, mfn: int) -> None:
        self._used.append(mfn)

    def page(self, mfn: int) -> memoryview:
        """Its bytes in place."""
        return self.machine.page(mfn)

"""A guest's memory by its own virtual addresses: what Xen's copy_from_guest and copy_to_guest reach."""

from __future__ import annotations

from typing import Final

from pvirq.abi.arch_x86 import HYPERVISOR_VIRT_END
from pvirq.abi.errno import Errno, XenError
from pvirq.pv.kept import Kept
from pvirq.pv.pagetable import ADDRESS, PRESENT, RW
from pvirq.xen.memory import Machine

M64: Final = (1 << 64) - 1


class GuestMemory(Kept):
    """Reads and writes through the page tables that a vCPU has loaded; every address may be nonsense."""

    def __init__(self, machine: Machine, kept: memoryview) -> None:
        """`kept`: the items of the vCPU's slot, where the roots of its page tables are."""
        super().__init__(kept)
        self._mem = machine.mem
        self._u64 = machine.u64

    def translate(self, va: int, write: bool = False) -> int:
        """The machine address behind a guest virtual address, as Xen's copy_to/from_guest would reach it.

        XenError(EFAULT): not mapped, not writable, or in Xen's part of the address space.
        """
        if not (va < 1 << 47 or va >= HYPERVISOR_VIRT_END):
            raise XenError(Errno.EFAULT, f"{va:#x} is not a guest address")
        u64 = self._u64
        entry = flags = u64[self.walk_root + (va >> 39 & 511)]
        if entry & PRESENT:
            entry = u64[((entry & ADDRESS) >> 3) + (va >> 30 & 511)]
            flags &= entry
            if entry & PRESENT:
                entry = u64[((entry & ADDRESS) >> 3) + (va >> 21 & 511)]
                flags &= entry
                if entry & PRESENT:
                    entry = u64[((entry & ADDRESS) >> 3) + (va >> 12 & 511)]
                    if entry & PRESENT and (not write or flags & entry & RW):
                        return entry & ADDRESS | va & 0xFFF
        raise XenError(Errno.EFAULT, f"{va:#x} is not {'writable' if write else 'mapped'}")

    def l1_index(self, va: int) -> int | None:
        """Where the level-1 entry of an address is, as an index of 64-bit items; None without a level-1 table."""
        u64, index = self._u64, self.walk_root + (va >> 39 & 511)
        for shift in (30, 21, 12):
            entry = u64[index]
            if not entry & PRESENT:
                return None
            index = ((entry & ADDRESS) >> 3) + (va >> shift & 511)
        return index

    def read(self, va: int, nbytes: int) -> bytes:
        """Copy from the guest; XenError(EFAULT) where any of it can't be read."""
        va &= M64
        if (va & 0xFFF) + nbytes <= 0x1000:
            at = self.translate(va)
            return bytes(self._mem[at : at + nbytes])
        parts, end = [], va + nbytes
        while va < end:
            size = min(0x1000 - (va & 0xFFF), end - va)
            at = self.translate(va & M64)
            parts.append(bytes(self._mem[at : at + size]))
            va += size
        return b"".join(parts)

    def read_as_kernel(self, va: int, nbytes: int) -> bytes:
        """`read` through the kernel's page tables, whatever mode the guest is in."""
        root, self.walk_root = self.walk_root, self.kernel_root << 9
        try:
            return self.read(va, nbytes)
        finally:
            self.walk_root = root

    def translate_as_kernel(self, va: int) -> int:
        """`translate` through the kernel's page tables."""
        root, self.walk_root = self.walk_root, self.kernel_root << 9
        try:
            return self.translate(va)
        finally:
            self.walk_root = root

    def write(self, va: int, data: bytes) -> None:
        """Copy to the guest; XenError(EFAULT), and nothing copied, where any of it can't be written."""
        va &= M64
        size = len(data)
        if (va & 0xFFF) + size <= 0x1000:
            at = self.translate(va, write=True)
            self._mem[at : at + size] = data
            return
        spans, end = [], va + size
        while va < end:
            size = min(0x1000 - (va & 0xFFF), end - va)
            spans.append((self.translate(va & M64, write=True), size))
            va += size
        done = 0
        for at, size in spans:
            self._mem[at : at + size] = data[done : done + size]
            done += size

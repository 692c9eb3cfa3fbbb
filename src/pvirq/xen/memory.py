"""Machine memory: one flat array of 4 KiB frames with an owner, a type and reference counts for each.

All of a host's frames (every domain's RAM, and the hypervisor's own pages that guests can see: shared_info,
grant tables, the machine-to-phys table) lie in one anonymous mapping, so a machine address is an index into
`Machine.mem` and CPU engines map the whole of it once. Untouched frames cost no memory. Parts of a file may lie over
parts of it, copy on write (`Machine.map_file`): the addresses stay what they are.

The frame table follows Xen's struct page_info (xen/arch/x86/include/asm/mm.h): a frame has at most one type at a
time, and the type can change only while nothing holds a reference of the old one. That rule, applied by
`pvirq.pv.pagetable`, is what keeps a guest from writing its own page tables.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
from bisect import bisect_left, insort
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_INVALID, DOMID_XEN, PAGE_SHIFT, PAGE_SIZE

MAP_NORESERVE = 0x4000  # not in Python's mmap module before 3.13

# Frame types (PGT_*). NONE and WRITABLE pages may be mapped read-write; no other may.
PGT_NONE = 0
PGT_L1 = 1
PGT_L2 = 2
PGT_L3 = 3
PGT_L4 = 4
PGT_SEG_DESC = 5
PGT_WRITABLE = 7

# Bits of Machine.pinned.
PINNED = 1
ABANDONED = 2  # no longer its owner's to use: freed with its last reference

# The first frames stay unused, so that a zero mfn is never valid and low addresses in a guest fault.
FIRST_MFN = 0x100
SMALLEST = 256 << 20
# Fewer frames than this aren't mapped by themselves, neither from a file nor in its place: a process can have 65,530
# mappings (vm.max_map_count), and which frames a guest gives back is its own choice.
LEAST_MAPPED = 512
SHORTER = "a file of saved pages has become shorter"

_mmap = ctypes.CDLL(None, use_errno=True).mmap  # Python's own can't be told where
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


def _reserve(size: int) -> tuple[mmap.mmap, int]:
    smallest = min(size, SMALLEST)
    while size >= smallest:
        frames = size >> PAGE_SHIFT
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            return mmap.mmap(-1, frames << PAGE_SHIFT, flags=flags), frames
        except OSError:
            size //= 2
    raise XenError(Errno.ENOMEM, f"the system doesn't give {SMALLEST >> 20} MiB of address space (ulimit -v?)")


def _zeros(count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """As numpy.zeros, but never of memory that was used before, which that fills with zeros: most is never touched."""
    pages = mmap.mmap(-1, count * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype=dtype)


class Machine:
    """The frames of one host.

    `mem`, `u32` and `u64` are views of the same bytes; index = machine address // item size.
    `owner[mfn]` is a domain id (DOMID_INVALID: free; DOMID_XEN: the hypervisor's own), `type[mfn]` a PGT_*,
    `type_count[mfn]` its type references, `refs[mfn]` its mappings of any kind, `pinned[mfn]` has PINNED where the
    guest holds a pin (MMUEXT_PIN_*).
    """

    def __init__(self, size: int = 16 << 30) -> None:
        """`size` bytes of machine memory (rounded to frames) are reserved, not used.

        Where the system allows less address space, half of it, and so on. XenError(ENOMEM) under SMALLEST.
        """
        self._map, self.frames = _reserve(size)
        self.mem = memoryview(self._map)
        self.u32 = self.mem.cast("I")
        self.u64 = self.mem.cast("Q")
        # numpy arrays for whole-table work; memoryviews of them because single items are faster that way.
        self.np_u64 = np.frombuffer(self._map, dtype=np.uint64)
        self.np_owner = np.full(self.frames, DOMID_INVALID, dtype=np.uint16)
        self.np_type: npt.NDArray[np.uint8] = _zeros(self.frames, np.uint8)
        self.np_type_count: npt.NDArray[np.uint32] = _zeros(self.frames, np.uint32)
        self.np_refs: npt.NDArray[np.uint32] = _zeros(self.frames, np.uint32)
        self.owner = self.np_owner.data
        self.type = self.np_type.data
        self.type_count = self.np_type_count.data
        self.refs = self.np_refs.data
        self.pinned = bytearray(self.frames)
        self._np_mapped: npt.NDArray[np.bool_] = _zeros(self.frames, np.bool_)  # frames over which a file lies
        self._maps_files = False
        self._free: list[tuple[int, int]] = [(FIRST_MFN, self.frames - FIRST_MFN)]  # (first mfn, count), sorted
        # The machine-to-phys table that all guests read: their pfn for each mfn. 2 MiB aligned, for large pages.
        self.m2p_mfn = self.alloc(-(-self.frames // 512), align=512)
        self.m2p = self.u64[self.m2p_mfn << 9 : (self.m2p_mfn << 9) + self.frames]
        self.np_m2p = self.np_u64[self.m2p_mfn << 9 : (self.m2p_mfn << 9) + self.frames]

    def alloc(self, count: int, owner: int = DOMID_XEN, align: int = 1, below: int | None = None) -> int:
        """Take `count` contiguous zeroed frames for `owner` and return the first mfn. XenError(ENOMEM) if none.

        All of them are below mfn `below`, where one is given.
        """
        limit = self.frames if below is None else below
        for i, (start, length) in enumerate(self._free):
            first = (start + align - 1) // align * align
            if first + count > min(start + length, limit):
                continue
            parts = [(start, first - start), (first + count, start + length - first - count)]
            self._free[i : i + 1] = [part for part in parts if part[1]]
            self.np_owner[first : first + count] = owner
            return first
        raise XenError(Errno.ENOMEM, f"no {count} contiguous machine frames left")

    def digest(self, domid: int) -> str:
        """The sha256 of what is in a domain's frames and which they are: the same memory, the same digest."""
        mfns = np.flatnonzero(self.np_owner == domid)
        digest = hashlib.sha256(mfns.astype("<u8").tobytes())
        breaks = np.flatnonzero(np.diff(mfns) != 1) + 1
        for piece in np.split(mfns, breaks):
            if len(piece):
                digest.update(self.mem[int(piece[0]) << PAGE_SHIFT : int(piece[-1]) + 1 << PAGE_SHIFT])
        return digest.hexdigest()

    def share(self, mfn: int, domid: int) -> None:
        """Let a domain map one of Xen's frames, writable, and use it as nothing else (share_xen_page_with_guest)."""
        self.owner[mfn] = domid
        self.type[mfn] = PGT_WRITABLE
        self.type_count[mfn] = 1

    # -- frames from a file --------------------------------------------------------------------------------------------

    def map_file(self, mfn: int, count: int, descriptor: int, offset: int) -> None:
        """Let frames be what a file has from `offset` (bytes, a whole number of pages), copied when written.

        Until then the file is read where they are: it must not change, and where it is cut short the process gets
        SIGBUS. The descriptor may be closed. OSError where it can't be mapped: the frames are then as they were.
        """
        if not self._map_fixed(mfn, count, 0, descriptor, offset):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._np_mapped[mfn : mfn + count] = True
        self._maps_files = True

    def read_file(self, mfn: int, count: int, descriptor: int, offset: int) -> None:
        """Copy what a file has from `offset` (bytes) into frames. OSError, also where it has less."""
        at, end = mfn << PAGE_SHIFT, mfn + count << PAGE_SHIFT
        while at < end:
            done = os.preadv(descriptor, [self.mem[at:end]], offset)
            if not done:
                raise OSError(errno.EIO, SHORTER)
            at, offset = at + done, offset + done

    def mapped_frames(self) -> int:
        """How many frames a file still lies over. (One that was written is its own copy, and counted all the same.)"""
        return int(np.count_nonzero(self._np_mapped))

    def _map_fixed(self, mfn: int, count: int, flags: int, descriptor: int = -1, offset: int = 0) -> bool:
        address = self.np_u64.ctypes.data + (mfn << PAGE_SHIFT)
        flags |= mmap.MAP_PRIVATE | MAP_NORESERVE | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return bool(_mmap(address, count << PAGE_SHIFT, protection, flags, descriptor, offset) != _MAP_FAILED)

    def _drop(self, mfn: int, count: int) -> None:
        """Frames hold zeros again, and as far as possible no memory."""
        if not self._maps_files or not self._np_mapped[mfn : mfn + count].any():
            self._map.madvise(mmap.MADV_DONTNEED, mfn << PAGE_SHIFT, count << PAGE_SHIFT)
        elif count >= LEAST_MAPPED and self._map_fixed(mfn, count, mmap.MAP_ANONYMOUS):
            self._np_mapped[mfn : mfn + count] = False
        else:  # a guest's balloon gives frames back one by one
            self.np_u64[mfn << 9 : mfn + count << 9] = 0

    def _unmap_files(self) -> None:
        """What came back frame by frame, and was filled with zeros, is whole again now that a domain has ended."""
        for start, length in self._free:
            mapped = np.flatnonzero(self._np_mapped[start : start + length])
            if len(mapped) and length >= LEAST_MAPPED:
                first, last = start + int(mapped[0]), start + int(mapped[-1])
                if self._map_fixed(first, last + 1 - first, mmap.MAP_ANONYMOUS):
                    self._np_mapped[first : last + 1] = False
        self._maps_files = bool(self._np_mapped.any())

    # -- frames given back ---------------------------------------------------------------------------------------------

    def free(self, mfn: int, count: int = 1) -> None:
        """Give frames back; their content is dropped, so that the next owner finds zeros."""
        self._drop(mfn, count)
        for table in (self.np_type, self.np_type_count, self.np_refs):
            table[mfn : mfn + count] = 0
        self.np_owner[mfn : mfn + count] = DOMID_INVALID
        self.pinned[mfn : mfn + count] = bytes(count)
        insort(self._free, (mfn, count))
        self._merge_free(bisect_left(self._free, (mfn, count)))

    def _merge_free(self, i: int) -> None:
        for j in (i, i - 1):
            if 0 <= j < len(self._free) - 1:
                (start, length), (after, more) = self._free[j : j + 2]
                if start + length == after:
                    self._free[j : j + 2] = [(start, length + more)]

    def free_all_of(self, owner: int, keep: Collection[int] = ()) -> None:
        """Give back every frame of a domain that has ended, but those in `keep`."""
        mine = self.np_owner == owner
        mine[list(keep)] = False
        mfns = np.flatnonzero(mine)
        if not len(mfns):
            return
        for run in np.split(mfns, np.flatnonzero(np.diff(mfns) != 1) + 1):
            self.free(int(run[0]), len(run))
        if self._maps_files:
            self._unmap_files()

    def page(self, mfn: int) -> memoryview:
        """The bytes of one frame, in place."""
        return self.mem[mfn << PAGE_SHIFT : (mfn << PAGE_SHIFT) + PAGE_SIZE]

    def close(self) -> None:
        """Unmap everything. Views that others still hold keep the mapping alive until they go."""
        self._free = []
        del self.np_u64, self.np_m2p
        for view in (self.m2p, self.u64, self.u32, self.mem):
            view.release()
        try:
            self._map.close()
        except BufferError:
            self._map.madvise(mmap.MADV_DONTNEED)

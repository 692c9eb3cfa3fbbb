"""The contents of saved pages: in memory, or still in the file that they were saved to."""

from __future__ import annotations

import errno
import os
import weakref
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen.memory import LEAST_MAPPED, SHORTER, Machine

U64Array = npt.NDArray[np.uint64]

ENTRIES: Final = PAGE_SIZE // 8  # of a page table, or pfns of a page of the p2m list


class Pages(Protocol):
    """The contents of some pages, one after the other."""

    def __len__(self) -> int: ...

    def array(self) -> U64Array:
        """One page a row. OSError as `load`."""

    def load(self, machine: Machine, mfn: int) -> None:
        """Put them into as many frames from `mfn` on. OSError where their file can't be read, or has become shorter."""


@dataclass(frozen=True, eq=False)
class MemoryPages:
    """Pages that have been read."""

    rows: U64Array

    def __len__(self) -> int:
        return len(self.rows)

    def array(self) -> U64Array:
        return self.rows

    def load(self, machine: Machine, mfn: int) -> None:
        machine.np_u64[mfn * ENTRIES : (mfn + len(self)) * ENTRIES] = self.rows.reshape(-1)


class Descriptor:
    """A descriptor of our own for a file, for as long as someone has this."""

    def __init__(self, descriptor: int) -> None:
        self.number = os.dup(descriptor)
        weakref.finalize(self, os.close, self.number)


@dataclass(frozen=True)
class FilePages:
    """`count` pages that a file has from `offset` (bytes) on. `mapped`: they may be left there until they are written.

    What is mapped, see `Machine.map_file`, trusts the file to stay as it is.
    """

    file: Descriptor
    offset: int
    count: int
    mapped: bool

    def __len__(self) -> int:
        return self.count

    def array(self) -> U64Array:
        data = os.pread(self.file.number, self.count << PAGE_SHIFT, self.offset)
        if len(data) != self.count << PAGE_SHIFT:
            raise OSError(errno.EIO, SHORTER)
        return np.frombuffer(data, dtype="<u8").reshape(-1, ENTRIES)

    def load(self, machine: Machine, mfn: int) -> None:
        if self.mapped and self.count >= LEAST_MAPPED and self.offset % PAGE_SIZE == 0:
            if os.fstat(self.file.number).st_size < self.offset + (self.count << PAGE_SHIFT):
                raise OSError(errno.EIO, SHORTER)
            try:
                machine.map_file(mfn, self.count, self.file.number, self.offset)
                return
            except OSError:  # what can't be mapped can be read
                pass
        machine.read_file(mfn, self.count, self.file.number, self.offset)

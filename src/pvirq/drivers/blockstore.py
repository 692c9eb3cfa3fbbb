"""What block backends keep their sectors in: the devices of domain 0 by number, and one in memory.

A disk driver (`pvirq.hardware.disk`) is such a store and answers by its interrupt. `MemoryStore`, and a file of the
host's (`pvirq.drivers.filestore`), are there at once, and move data between a guest's frames and themselves.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

from pvirq.abi.errno import Errno
from pvirq.hardware.disk import BlockStore, Done

SECTOR: Final = 512
PAGE: Final = mmap.PAGESIZE

__all__ = ["BlockDevices", "BlockStore", "Discards", "Done", "Flushes", "InPlace", "InPlaceStore", "MemoryStore"]


@runtime_checkable
class Flushes(Protocol):
    """A store that may keep what is written back until it is told."""

    def flush(self, done: Done) -> None:
        """Call `done(None, error)` when all that was written is safe."""


@runtime_checkable
class Discards(Protocol):
    """A store that can forget sectors, which read as zeros then."""

    def discard(self, sector: int, count: int, done: Done) -> None:
        """Forget them; EOPNOTSUPP where that can't be done (any more, or for so many)."""


@runtime_checkable
class InPlace(Protocol):
    """A store that reads into memory and writes out of it where it lies, and is done when the call returns."""

    def readv(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        """Fill the buffers, whole sectors in all, from `sector` on. Returns what went wrong."""

    def writev(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        """Write them from `sector` on."""


class InPlaceStore(InPlace):
    """The other half of a store that can do that: requests with data of their own (`BlockStore.submit`)."""

    sectors: int
    may_fork = True  # a copy of this process can go on with it

    def forked(self) -> None:
        """This is a copy of the process (`pvirq.fork`): what is written from now on stays in it."""

    def submit(self, sector: int, count: int, data: bytes | None, done: Done) -> None:
        """As `BlockStore.submit`, but `done` is called at once."""
        if data is not None:
            done(None, self.writev(sector, [memoryview(data)]))
            return
        if not 0 <= sector <= sector + count <= self.sectors:  # before so much memory is asked for
            done(None, Errno.EIO)
            return
        buffer = bytearray(count * SECTOR)
        error = self.readv(sector, [memoryview(buffer)])
        done(bytes(buffer) if error is None else None, error)

    def close(self) -> None:
        """Let go of whatever it holds."""

    def read(self, sector: int, count: int) -> bytes:
        """`count` sectors from `sector` on, for whoever looks at a disk from outside. OSError."""
        buffer = bytearray(count * SECTOR)
        error = self.readv(sector, [memoryview(buffer)])
        if error is not None:
            raise OSError(error, error.name)
        return bytes(buffer)


class MemoryStore(InPlaceStore):
    """Sectors in memory, which takes none for what was never written."""

    def __init__(self, sectors: int, data: bytes = b"") -> None:
        """`sectors` of 512 bytes that begin with `data`."""
        self.sectors = sectors
        self.data = mmap.mmap(-1, sectors * SECTOR, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data[: len(data)] = data
        self.flushes = 0
        self._view = memoryview(self.data)

    def readv(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        view, at = self._view, sector * SECTOR
        if at < 0 or at + sum(map(len, buffers)) > len(view):
            return Errno.EIO
        for buffer in buffers:
            end = at + len(buffer)
            buffer[:] = view[at:end]
            at = end
        return None

    def writev(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        view, at = self._view, sector * SECTOR
        if at < 0 or at + sum(map(len, buffers)) > len(view):
            return Errno.EIO
        for buffer in buffers:
            end = at + len(buffer)
            view[at:end] = buffer
            at = end
        return None

    def flush(self, done: Done) -> None:
        self.flushes += 1
        done(None, None)

    def discard(self, sector: int, count: int, done: Done) -> None:
        start, end = sector * SECTOR, (sector + count) * SECTOR
        if start < 0 or end > len(self.data):
            done(None, Errno.EIO)
            return
        # Whole pages go back to the system, which gives zeros for them; only what is left over takes any time.
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if first < last:
            self.data.madvise(mmap.MADV_DONTNEED, first, last - first)
            self.data[start:first] = bytes(first - start)
            self.data[last:end] = bytes(end - last)
        else:
            self.data[start:end] = bytes(end - start)
        done(None, None)


# Majors of Documentation/admin-guide/devices.txt: RAM disks, loop devices, network block devices. Others get one for
# local use.
MAJORS: Final = {"ram": 1, "loop": 7, "nbd": 43}
LOCAL_MAJOR: Final = 240


class BlockDevices:
    """The block devices that a kernel knows, by name and by number, as `physical-device` names them."""

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}
        self._stores: dict[str, BlockStore] = {}
        self._others = 0

    def add(self, name: str, store: BlockStore) -> str:
        """Make a store a device, such as /dev/loop0; returns its number, major:minor in hex as hotplug scripts write.

        ValueError for a name that is taken.
        """
        if name in self._numbers:
            raise ValueError(f"{name} exists")
        match = re.fullmatch(r"/dev/(ram|loop|nbd)(0|[1-9]\d{0,5})", name)
        if match:
            number = f"{MAJORS[match[1]]:x}:{int(match[2]):x}"
        else:
            number = f"{LOCAL_MAJOR:x}:{self._others:x}"
            self._others += 1
        self._numbers[name] = number
        self._stores[number] = store
        return number

    def add_free(self, kind: str, store: BlockStore) -> str:
        """Make a store the first free device of a kind: "loop" (as `losetup -f`), "ram" or "nbd". Returns its name."""
        minor = 0
        while f"/dev/{kind}{minor}" in self._numbers:
            minor += 1
        self.add(name := f"/dev/{kind}{minor}", store)
        return name

    def remove(self, name: str) -> None:
        """The device is gone, and its name free. KeyError."""
        del self._stores[self._numbers.pop(name)]

    def names(self) -> list[str]:
        """The devices there are."""
        return list(self._numbers)

    def number(self, name: str) -> str | None:
        """The number of a device; None where there is none."""
        return self._numbers.get(name)

    def stores(self) -> list[BlockStore]:
        """What is behind them."""
        return list(self._stores.values())

    def find(self, number: str) -> BlockStore | None:
        """The store behind major:minor; None where there is none."""
        return self._stores.get(number)

"""What block backends keep their sectors in: the devices of domain 0 by number, and one in memory.

A disk driver (`pvirq.hardware.disk`) is such a store and answers by its interrupt; `MemoryStore` answers at once.
"""

from __future__ import annotations

import mmap
from typing import Final, Protocol, runtime_checkable

from pvirq.abi.errno import Errno
from pvirq.hardware.disk import BlockStore, Done

SECTOR: Final = 512

__all__ = ["BlockDevices", "BlockStore", "Discards", "Done", "Flushes", "MemoryStore"]


@runtime_checkable
class Flushes(Protocol):
    """A store that may keep what is written back until it is told."""

    def flush(self, done: Done) -> None:
        """Call `done(None, error)` when all that was written is safe."""


@runtime_checkable
class Discards(Protocol):
    """A store that can forget sectors, which read as zeros then."""

    def discard(self, sector: int, count: int, done: Done) -> None:
        """Forget them."""


class MemoryStore:
    """Sectors in memory, which takes none for what was never written."""

    def __init__(self, sectors: int, data: bytes = b"") -> None:
        """`sectors` of 512 bytes that begin with `data`."""
        self.sectors = sectors
        self.data = mmap.mmap(-1, sectors * SECTOR, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data[: len(data)] = data
        self.flushes = 0

    def submit(self, sector: int, count: int, data: bytes | None, done: Done) -> None:
        start, end = sector * SECTOR, (sector + count) * SECTOR
        if end > len(self.data) or sector < 0:
            done(None, Errno.EIO)
        elif data is None:
            done(bytes(self.data[start:end]), None)
        else:
            self.data[start:end] = data
            done(None, None)

    def flush(self, done: Done) -> None:
        self.flushes += 1
        done(None, None)

    def discard(self, sector: int, count: int, done: Done) -> None:
        self.data[sector * SECTOR : (sector + count) * SECTOR] = bytes(count * SECTOR)
        done(None, None)


class BlockDevices:
    """The block devices that a kernel knows, by name and by number, as `physical-device` names them."""

    def __init__(self) -> None:
        self._numbers: dict[str, str] = {}
        self._stores: dict[str, BlockStore] = {}

    def add(self, name: str, store: BlockStore) -> str:
        """Make a store a device, such as /dev/loop0; returns its number, major:minor in hex as hotplug scripts write.

        ValueError for a name that is taken.
        """
        if name in self._numbers:
            raise ValueError(f"{name} exists")
        number = f"7:{len(self._numbers):x}"  # as loop devices are
        self._numbers[name] = number
        self._stores[number] = store
        return number

    def remove(self, name: str) -> None:
        """The device is gone. KeyError."""
        del self._stores[self._numbers[name]]

    def names(self) -> list[str]:
        """The devices there are."""
        return [name for name, number in self._numbers.items() if number in self._stores]

    def number(self, name: str) -> str | None:
        """The number of a device; None where there is none."""
        number = self._numbers.get(name)
        return number if number in self._stores else None

    def find(self, number: str) -> BlockStore | None:
        """The store behind major:minor; None where there is none."""
        return self._stores.get(number)

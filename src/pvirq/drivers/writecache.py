"""A volatile write cache over a store, such as a disk has: what was not flushed is lost with the power.

With it can be seen whether a guest flushes what it calls safe.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pvirq.abi.errno import Errno
from pvirq.drivers.blockstore import SECTOR, Discards, Done, Flushes, InPlaceStore

MOST_SECTORS: Final = 64 << 20 >> 9  # a cache that is full writes what it has


class WriteCache(InPlaceStore):
    """Keeps what is written until it is flushed, or is more than 64 MiB; `crash` forgets it.

    What a flush writes out goes in the order of the sectors, not of the writes: a disk promises no other.
    """

    def __init__(self, store: InPlaceStore) -> None:
        """`store` is what lies below, whose own flush follows each of ours."""
        self.store = store
        self.sectors = store.sectors
        self.may_fork = store.may_fork
        self._dirty: dict[int, bytes] = {}

    @property
    def dirty(self) -> int:
        """How many sectors would be lost."""
        return len(self._dirty)

    def forked(self) -> None:
        self.store.forked()

    def crash(self) -> int:
        """The power fails: what was not flushed is gone. Returns how many sectors that were."""
        lost, self._dirty = len(self._dirty), {}
        return lost

    def close(self) -> None:
        """The device goes in good order: it writes what it has, and closes what lies below."""
        self.flush(lambda _data, _error: None)
        self.store.close()

    def readv(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        error = self.store.readv(sector, buffers)
        dirty = self._dirty
        if error is not None or not dirty:
            return error
        for buffer in buffers:
            for at in range(0, len(buffer), SECTOR):
                kept = dirty.get(sector)
                if kept is not None:
                    buffer[at : at + SECTOR] = kept
                sector += 1
        return None

    def writev(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        if not 0 <= sector <= sector + sum(map(len, buffers)) // SECTOR <= self.sectors:
            return Errno.EIO
        for buffer in buffers:
            for at in range(0, len(buffer), SECTOR):
                self._dirty[sector] = bytes(buffer[at : at + SECTOR])
                sector += 1
        return self._write_out() if len(self._dirty) > MOST_SECTORS else None

    def _write_out(self) -> Errno | None:
        """What is dirty goes below; it stays dirty where that fails, as it isn't there."""
        dirty = sorted(self._dirty)
        start = 0
        for i in range(1, len(dirty) + 1):
            if i < len(dirty) and dirty[i] == dirty[i - 1] + 1:
                continue
            data = b"".join([self._dirty[sector] for sector in dirty[start:i]])
            error = self.store.writev(dirty[start], [memoryview(data)])
            if error is not None:
                return error
            for sector in dirty[start:i]:
                del self._dirty[sector]
            start = i
        return None

    def flush(self, done: Done) -> None:
        error = self._write_out()
        if error is None and isinstance(self.store, Flushes):
            self.store.flush(done)
        else:
            done(None, error)

    def discard(self, sector: int, count: int, done: Done) -> None:
        """As `Discards.discard`, at once: what is discarded is lost to its writer either way."""
        if not isinstance(self.store, Discards):
            done(None, Errno.EOPNOTSUPP)
            return
        for gone in [at for at in self._dirty if sector <= at < sector + count]:
            del self._dirty[gone]
        self.store.discard(sector, count, done)

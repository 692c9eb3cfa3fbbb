"""A raw image, or a block device of the host's, as a disk: what a loop device does (drivers/block/loop.c, Linux 6.1).

Data moves between the file and a guest's frames by preadv and pwritev, with no copy in between.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import mmap
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import SECTOR, Done, InPlaceStore, MemoryStore

FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
PUNCH: Final = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
MOST_BUFFERS: Final = 1024  # UIO_MAXIOV
ZEROS: Final = bytes(1 << 20)
# How much one discard may write where the file system has no holes: nobody else is served meanwhile.
MOST_ZEROS: Final = 64 << 20


def errno_of(error: OSError) -> Errno:
    """The error that a request ends with; EIO for those that Xen has no number for."""
    try:
        return Errno(error.errno or Errno.EIO)
    except ValueError:
        return Errno.EIO


@functools.cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """fallocate(2), which Python has without its modes only."""
    function: Any = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function  # type: ignore[no-any-return]


class PrivateSectors(MemoryStore):
    """The sectors of an open file, copied as they are written (MAP_PRIVATE): the file itself stays as it is."""

    def __init__(self, fd: int, sectors: int) -> None:
        """`fd` is needed no longer than this takes. OSError; ValueError for no sectors."""
        self.sectors = sectors
        self.data = mmap.mmap(fd, sectors * SECTOR, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        self.flushes = 0
        self._view = memoryview(self.data)

    def discard(self, sector: int, count: int, done: Done) -> None:
        # What a page of such a mapping becomes when it is given back is the file's, and no zeros.
        start, end = sector * SECTOR, (sector + count) * SECTOR
        if start < 0 or end > len(self.data):
            done(None, Errno.EIO)
        elif count * SECTOR > MOST_ZEROS:
            done(None, Errno.EOPNOTSUPP)
        else:
            self.data[start:end] = bytes(end - start)
            done(None, None)


class FileStore(InPlaceStore):
    """The sectors of a file or block device, in place.

    A file's last bytes that fill no sector are not there, as with a loop device. What was written is in the host's
    page cache, and so survives the end of this process; what was flushed survives the end of the host. Only what a fork
    of this process writes doesn't get there: it reads the file as it is, but for what it wrote itself.

    Writers lock the file (flock) against everybody, readers against writers, so that two disks don't share an image
    unknowingly, be it in one process or in two.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False, lock: bool = True) -> None:
        """XenError, one line: ENOENT, EACCES; EBUSY for an image in use; EINVAL for what is no file or device."""
        self.path = os.fspath(path)
        self.readonly = readonly
        self._fd = -1
        self._private: PrivateSectors | None = None  # in a fork: the file as it is, and what was written since
        try:
            # Non-blocking, or opening a FIFO would wait for its other end.
            flags = os.O_RDONLY if readonly else os.O_RDWR
            fd = os.open(self.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise XenError(errno_of(error), f"{self.path}: {error.strerror}") from error
        try:
            self.sectors = _sectors(fd, self.path)
            if lock:
                _lock(fd, self.path, readonly)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def forked(self) -> None:
        if self._fd >= 0 and not self.readonly and self.sectors:
            self._private = PrivateSectors(self._fd, self.sectors)

    def close(self) -> None:
        """Let go of the file; idempotent. Requests end with ENXIO from then on."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def readv(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        return self._transfer(os.preadv, sector, buffers)

    def writev(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        return Errno.EROFS if self.readonly else self._transfer(os.pwritev, sector, buffers)

    def _transfer(self, call: Callable[..., int], sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        fd = self._fd
        if fd < 0:
            return Errno.ENXIO
        size, at = sum(map(len, buffers)), sector * SECTOR
        if at < 0 or at + size > self.sectors * SECTOR:
            return Errno.EIO
        if self._private is not None:
            transfer = self._private.readv if call is os.preadv else self._private.writev
            return transfer(sector, buffers)
        try:
            if len(buffers) <= MOST_BUFFERS and call(fd, buffers, at) == size:
                return None
            return self._rest(call, fd, at, buffers)
        except OSError as error:
            return errno_of(error)

    def _rest(self, call: Callable[..., int], fd: int, at: int, buffers: Sequence[memoryview]) -> Errno | None:
        """The whole of it again, piece by piece: not all of it was moved at once."""
        for buffer in buffers:
            while buffer:
                moved = call(fd, [buffer], at)
                if not moved:
                    # The file has become shorter. No frame keeps what was in it before (lo_complete_rq).
                    if call is os.preadv:
                        for missing in buffers:
                            missing[:] = bytes(len(missing))
                    return Errno.EIO
                at += moved
                buffer = buffer[moved:]
        return None

    def flush(self, done: Done) -> None:
        done(None, self._flush())

    def _flush(self) -> Errno | None:
        if self._fd < 0:
            return Errno.ENXIO
        if self._private is not None:
            return None
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            return errno_of(error)
        return None

    def discard(self, sector: int, count: int, done: Done) -> None:
        """As `Discards.discard`: holes, or zeros (of 64 MiB at most) where the file system has no holes."""
        done(None, self._discard(sector, count))

    def _discard(self, sector: int, count: int) -> Errno | None:
        if self._fd < 0:
            return Errno.ENXIO
        if self.readonly:
            return Errno.EROFS
        if not 0 <= sector <= sector + count <= self.sectors:
            return Errno.EIO
        if not count:
            return None
        at, size = sector * SECTOR, count * SECTOR
        fallocate = _fallocate() if self._private is None else None
        if fallocate is not None:
            if not fallocate(self._fd, PUNCH, at, size):
                return None
            error = OSError(ctypes.get_errno(), "")
            if error.errno not in (Errno.EOPNOTSUPP, Errno.ENOSYS, Errno.ENODEV):
                return errno_of(error)
        if size > MOST_ZEROS:
            return Errno.EOPNOTSUPP
        while size:
            piece = memoryview(ZEROS)[:size]
            wrong = self.writev(at // SECTOR, [piece])
            if wrong is not None:
                return wrong
            at, size = at + len(piece), size - len(piece)
        return None


def _sectors(fd: int, path: str) -> int:
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        raise XenError(Errno.EINVAL, f"{path}: neither a file nor a block device")
    return os.lseek(fd, 0, os.SEEK_END) // SECTOR


def _lock(fd: int, path: str, readonly: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if readonly else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        how = "read-write " if readonly else ""
        raise XenError(Errno.EBUSY, f"{path} is in use {how}by another disk") from error
    except OSError as error:
        if error.errno not in (Errno.EOPNOTSUPP, Errno.ENOSYS, Errno.ENOLCK):  # no locks there: nobody else has one
            raise XenError(errno_of(error), f"{path}: {error.strerror}") from error

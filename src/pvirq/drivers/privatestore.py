"""A raw image as a disk whose changes are nobody else's: the file stays as it is, and forks of a process go apart."""

from __future__ import annotations

import mmap
import os

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import SECTOR, Done, MemoryStore
from pvirq.drivers.filestore import FileStore, errno_of

# How much one discard may write: nobody else is served meanwhile.
MOST_ZEROS = 64 << 20


class PrivateStore(MemoryStore):
    """The sectors of a file or block device of the host's, copied as they are written (MAP_PRIVATE).

    The file is locked as a reader's (`FileStore`) until `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """XenError as `FileStore`; EINVAL for a file without a sector."""
        self._file = FileStore(path, readonly=True)
        self.sectors = self._file.sectors
        self.flushes = 0
        try:
            if not self.sectors:
                raise XenError(Errno.EINVAL, f"{os.fspath(path)}: there is no sector in it")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self.data = mmap.mmap(fd, self.sectors * SECTOR, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
            finally:
                os.close(fd)
        except OSError as error:
            self._file.close()
            raise XenError(errno_of(error), f"{os.fspath(path)}: {error.strerror}") from error
        except XenError:
            self._file.close()
            raise
        self._view = memoryview(self.data)

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._file.close()

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

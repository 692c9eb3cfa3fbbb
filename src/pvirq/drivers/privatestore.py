"""A raw image as a disk whose changes are nobody else's: the file stays as it is, and forks of a process go apart."""

from __future__ import annotations

import os

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.filestore import FileStore, PrivateSectors, errno_of


class PrivateStore(PrivateSectors):
    """The sectors of a file or block device of the host's, copied as they are written.

    The file is locked as a reader's (`FileStore`) until `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """XenError as `FileStore`; EINVAL for a file without a sector."""
        self._file = FileStore(path, readonly=True)
        try:
            if not self._file.sectors:
                raise XenError(Errno.EINVAL, f"{os.fspath(path)}: there is no sector in it")
            # A descriptor of its own: a mapping keeps its file open, and with it a lock, for longer than `close`.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                super().__init__(fd, self._file.sectors)
            finally:
                os.close(fd)
        except OSError as error:
            self._file.close()
            raise XenError(errno_of(error), f"{os.fspath(path)}: {error.strerror}") from error
        except XenError:
            self._file.close()
            raise

    def close(self) -> None:
        """Let go of the file; idempotent."""
        self._file.close()

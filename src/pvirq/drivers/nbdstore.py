"""A disk that a server of network block devices keeps, over a Unix socket (the NBD protocol, doc/proto.md of NBD).

So an image of any format that QEMU knows can be one: `pvirq.toolstack.diskimage` starts its server.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import SECTOR, Done, InPlaceStore

INIT_MAGIC: Final = b"NBDMAGICIHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
REQUEST_MAGIC: Final = 0x25609513
REPLY_MAGIC: Final = 0x67446698
NBD_FLAG_FIXED_NEWSTYLE: Final = 1
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_OPT_GO: Final = 7
NBD_REP_ACK: Final = 1
NBD_REP_INFO: Final = 3
NBD_INFO_EXPORT: Final = 0
NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_DISC, NBD_CMD_FLUSH, NBD_CMD_WRITE_ZEROES = 0, 1, 2, 3, 6
REQUEST: Final = struct.Struct(">IHHQQI")
REPLY: Final = struct.Struct(">IIQ")
MOST: Final = 16 << 20  # bytes in one request; servers take 32 MiB
MOST_ZEROES: Final = 1 << 30
MOST_TEXT: Final = 4096  # of an option's reply
TIMEOUT_S: Final = 30  # as Linux's block layer gives a disk
# The errors that there are have Linux's numbers.
ERRORS: Final = (
    Errno.EPERM, Errno.EIO, Errno.ENOMEM, Errno.EINVAL, Errno.ENOSPC, Errno.EOVERFLOW, Errno.EOPNOTSUPP,
)  # fmt: skip


class NbdStore(InPlaceStore):
    """The export of an NBD server. One request at a time; a server that is gone, or mute for 30 s, is an EIO."""

    may_fork = False  # the server would have two clients at one end of a connection

    def __init__(self, path: str, export: str = "", on_close: Callable[[], object] | None = None) -> None:
        """Connect to the server's socket. `on_close` is called once the connection is closed.

        XenError, one line: ECONNREFUSED where nobody listens, EINVAL for a server that refuses or says what can't be.
        """
        self._on_close = on_close
        self._cookie = 0
        self._socket: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(TIMEOUT_S)
            self._socket.connect(path)
            self.size, self._flags = self._negotiate(export)
        except (OSError, ValueError) as error:
            self._socket.close()
            self._socket = None
            refused = isinstance(error, (ConnectionRefusedError, FileNotFoundError))
            raise XenError(Errno.ECONNREFUSED if refused else Errno.EINVAL, f"NBD server {path}: {error}") from error
        self.sectors = self.size // SECTOR
        self.readonly = bool(self._flags & NBD_FLAG_READ_ONLY)

    # -- handshake -----------------------------------------------------------------------------------------------------

    def _negotiate(self, export: str) -> tuple[int, int]:
        """(size, transmission flags) of the export."""
        greeting = self._receive(18)
        if greeting[:16] != INIT_MAGIC or not greeting[17] & NBD_FLAG_FIXED_NEWSTYLE:
            raise ValueError("no server of the fixed newstyle protocol")
        name = os.fsencode(export)
        option = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._send([struct.pack(">I", 1), b"IHAVEOPT", struct.pack(">II", NBD_OPT_GO, len(option)), option])
        found: tuple[int, int] | None = None
        while True:
            magic, _, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != OPTION_REPLY_MAGIC or length > MOST_TEXT:
                raise ValueError("its reply is none")
            data = self._receive(length)
            if kind == NBD_REP_ACK and found is not None:
                return found
            if kind == NBD_REP_INFO:
                if length >= 12 and int.from_bytes(data[:2], "big") == NBD_INFO_EXPORT:
                    size, flags = struct.unpack_from(">QH", data, 2)
                    found = size, flags
            else:
                raise ValueError(f"it refuses export {export!r}: {data.decode(errors='replace') or hex(kind)}")

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        self._receive_into(memoryview(data))
        return bytes(data)

    def _receive_into(self, buffer: memoryview) -> None:
        assert self._socket is not None
        while buffer:
            got = self._socket.recv_into(buffer)
            if not got:
                raise ConnectionResetError("the server has closed the connection")
            buffer = buffer[got:]

    def _send(self, parts: Sequence[bytes | memoryview]) -> None:
        assert self._socket is not None
        sent = self._socket.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._socket.sendall(memoryview(part)[sent:])
            sent = max(0, sent - len(part))

    # -- requests ------------------------------------------------------------------------------------------------------

    def _command(
        self, kind: int, at: int, length: int, out: Sequence[memoryview] = (), into: Sequence[memoryview] = ()
    ) -> Errno | None:
        if self._socket is None:
            return Errno.ENXIO
        self._cookie += 1
        try:
            self._send([REQUEST.pack(REQUEST_MAGIC, 0, kind, self._cookie, at, length), *out])
            magic, error, cookie = REPLY.unpack(self._receive(REPLY.size))
            if magic != REPLY_MAGIC or cookie != self._cookie:
                raise ConnectionResetError("its reply is none")
            if error:
                return Errno(error) if error in ERRORS else Errno.EIO
            for buffer in into:
                self._receive_into(buffer)
        except OSError:
            # What comes later would be taken for the answer to something else.
            self._disconnect()
            return Errno.EIO
        return None

    def _disconnect(self) -> None:
        connection, self._socket = self._socket, None
        if connection is not None:
            connection.close()

    def close(self) -> None:
        """End the connection; idempotent. Requests end with ENXIO from then on."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._send([REQUEST.pack(REQUEST_MAGIC, 0, NBD_CMD_DISC, 0, 0, 0)])
            self._disconnect()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

    def readv(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        return self._transfer(sector, buffers, write=False)

    def writev(self, sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        return Errno.EROFS if self.readonly else self._transfer(sector, buffers, write=True)

    def _transfer(self, sector: int, buffers: Sequence[memoryview], *, write: bool) -> Errno | None:
        size, at = sum(map(len, buffers)), sector * SECTOR
        if at < 0 or at + size > self.sectors * SECTOR:
            return Errno.EIO
        groups = [buffers]
        if size > MOST:
            groups = [[buffer[i : i + MOST]] for buffer in buffers for i in range(0, len(buffer), MOST)]
        for group in groups:
            length = sum(map(len, group))
            if write:
                error = self._command(NBD_CMD_WRITE, at, length, out=group)
            else:
                error = self._command(NBD_CMD_READ, at, length, into=group)
            if error is not None:
                return error
            at += length
        return None

    def flush(self, done: Done) -> None:
        done(None, self._command(NBD_CMD_FLUSH, 0, 0) if self._flags & NBD_FLAG_SEND_FLUSH else None)

    def discard(self, sector: int, count: int, done: Done) -> None:
        """As `Discards.discard`: the server may make holes of it."""
        error: Errno | None = None
        at, left = sector * SECTOR, count * SECTOR
        if self.readonly or not self._flags & NBD_FLAG_SEND_WRITE_ZEROES:
            error = Errno.EOPNOTSUPP
        elif at < 0 or sector + count > self.sectors:
            error = Errno.EIO
        while left and error is None:
            here = min(left, MOST_ZEROES)
            error = self._command(NBD_CMD_WRITE_ZEROES, at, here)
            at, left = at + here, left - here
        done(None, error)

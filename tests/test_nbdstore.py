"""Disks that an NBD server keeps: by a server here that can be made to do anything, and by QEMU."""

from __future__ import annotations

import contextlib
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.nbdstore import NbdStore
from pvirq.toolstack import diskimage
from pvirq.toolstack.diskimage import open_image, sniff_format
from storelib import ask

MIB = 1 << 20
HELLO = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)


def receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


class Server:
    """Keeps `data`, says what `script` makes of each reply, and remembers the commands."""

    def __init__(self, path: Path, hello: bytes = HELLO, option: bytes | None = None) -> None:
        self.path = path
        self.data = bytearray(range(256)) * 64
        self.flags = 1 | 4 | 64
        self.commands: list[int] = []
        self.reply: Callable[[int, bytes], bytes] = lambda kind, reply: reply
        self._hello, self._option = hello, option
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen(1)
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection, contextlib.suppress(EOFError, OSError):
            self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        connection.sendall(self._hello)
        receive(connection, 4)
        magic, option, length = struct.unpack(">8sII", receive(connection, 16))
        assert (magic, option) == (b"IHAVEOPT", 7)
        receive(connection, length)
        head = struct.pack(">QI", 0x3E889045565A9, 7)
        info = struct.pack(">HQH", 0, len(self.data), self.flags)
        answer = head + struct.pack(">II", 3, len(info)) + info + head + struct.pack(">II", 1, 0)
        connection.sendall(answer if self._option is None else self._option)
        while True:
            magic, _, kind, cookie, at, length = struct.unpack(">IHHQQI", receive(connection, 28))
            assert magic == 0x25609513
            self.commands.append(kind)
            if kind == 2:
                return
            out = b""
            if kind == 0:
                out = bytes(self.data[at : at + length])
            elif kind == 1:
                self.data[at : at + length] = receive(connection, length)
            elif kind == 6:
                self.data[at : at + length] = bytes(length)
            reply = self.reply(kind, struct.pack(">IIQ", 0x67446698, 0, cookie) + out)
            if not reply:
                return
            connection.sendall(reply)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "socket")


def test_data_both_ways(server: Server) -> None:
    ended: list[bool] = []
    store = NbdStore(str(server.path), "disk", on_close=lambda: ended.append(True))
    assert store.sectors == 32
    memory = memoryview(bytearray(2048))
    assert store.readv(1, [memory[512:1024], memory[:512]]) is None
    assert bytes(memory[:1024]) == bytes(range(256)) * 4
    assert store.writev(3, [memory[1024:], memory[:512]]) is None
    assert server.data[3 * 512 : 6 * 512] == bytes(1024) + bytes(range(256)) * 2
    assert ask(store.flush) is None
    assert ask(store.discard, 5, 2) is None
    assert server.data[5 * 512 : 7 * 512] == bytes(1024)
    for sector in (-1, 32):
        assert store.readv(sector, [memory]) is Errno.EIO
        assert store.writev(sector, [memory]) is Errno.EIO
        assert ask(store.discard, sector, 2) is Errno.EIO
    store.close()
    store.close()
    server.thread.join()
    assert server.commands == [0, 1, 3, 6, 2]
    assert ended == [True]
    assert store.readv(1, [memory]) is Errno.ENXIO


def test_a_read_only_export(tmp_path: Path) -> None:
    server = Server(tmp_path / "socket")
    server.flags = 1 | 2
    store = NbdStore(str(server.path))
    assert store.readonly
    assert store.writev(0, [memoryview(bytes(512))]) is Errno.EROFS
    assert ask(store.discard, 0, 1) is Errno.EOPNOTSUPP
    assert ask(store.flush) is None
    store.close()


def test_requests_that_are_too_large_go_in_parts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pvirq.drivers.nbdstore.MOST", 1024)
    store = NbdStore(str(server.path))
    memory = memoryview(bytearray(7 * 512))
    assert store.readv(1, [memory[:2048], memory[2048:]]) is None
    assert bytes(memory) == server.data[512 : 8 * 512]
    store.close()
    server.thread.join()
    assert server.commands == [0] * 4 + [2]


@pytest.mark.parametrize(("number", "errno"), [(28, Errno.ENOSPC), (5, Errno.EIO), (108, Errno.EIO)])
def test_errors_are_the_servers(server: Server, number: int, errno: Errno) -> None:
    store = NbdStore(str(server.path))
    server.reply = lambda kind, reply: reply[:4] + struct.pack(">I", number) + reply[8:16]
    assert store.readv(0, [memoryview(bytearray(512))]) is errno
    server.reply = lambda kind, reply: reply
    assert store.readv(0, [memoryview(bytearray(512))]) is None  # the connection goes on
    store.close()


@pytest.mark.parametrize("reply", [b"", b"x" * 16, struct.pack(">IIQ", 0x67446698, 0, 99)])
def test_a_server_that_is_gone_or_mad(server: Server, reply: bytes) -> None:
    store = NbdStore(str(server.path))
    server.reply = lambda kind, right: reply
    assert store.readv(0, [memoryview(bytearray(512))]) is Errno.EIO
    assert store.readv(0, [memoryview(bytearray(512))]) is Errno.ENXIO
    assert ask(store.flush) is Errno.ENXIO
    store.close()


@pytest.mark.parametrize(
    ("hello", "option"),
    [
        (b"x" * 18, None),
        (b"NBDMAGICIHAVEOPT\0\0", None),
        (HELLO, b"x" * 20),
        (HELLO, struct.pack(">QIII", 0x3E889045565A9, 7, 1, 0)),  # agreed, and no size
        (HELLO, struct.pack(">QIII", 0x3E889045565A9, 7, 0x80000006, 4) + b"none"),
        (HELLO, struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 31)),
    ],
)
def test_a_handshake_that_fails(tmp_path: Path, hello: bytes, option: bytes | None) -> None:
    server = Server(tmp_path / "socket", hello, option)
    with pytest.raises(XenError, match="NBD server") as error:
        NbdStore(str(server.path), "disk")
    assert error.value.errno is Errno.EINVAL
    assert "\n" not in error.value.why


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(XenError) as error:
        NbdStore(str(tmp_path / "none"))
    assert error.value.errno is Errno.ECONNREFUSED


# Images of other formats, by QEMU.


def qcow2(size: int) -> bytes:
    """An empty image, of version 2, with clusters of 64 KiB: header, refcount table and block, L1 table."""
    cluster = 1 << 16
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, size, 0, 1, 3 * cluster, cluster, 1, 0, 0)
    blocks = struct.pack(">Q", 2 * cluster)
    counts = struct.pack(">4H", 1, 1, 1, 1)
    return b"".join(part.ljust(cluster, b"\0") for part in (header, blocks, counts, b""))


@pytest.fixture(params=diskimage.SERVERS)
def image(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if not shutil.which(request.param):
        pytest.skip(f"{request.param} is not installed")
    monkeypatch.setattr(diskimage, "SERVERS", (request.param,))
    path = tmp_path / "a, b.qcow2"  # a name that takes quoting
    path.write_bytes(qcow2(64 * MIB))
    return path


def test_a_qcow2_image(image: Path) -> None:
    store = open_image(image, format="qcow2")
    assert store.sectors == 64 * MIB // 512
    assert store.read(100, 4) == bytes(2048)
    assert store.writev(100, [memoryview(b"q" * 2048)]) is None
    assert ask(store.flush) is None  # type: ignore[attr-defined]
    with pytest.raises(XenError, match=r"a, b\.qcow2: .*lock"):
        open_image(image, format="qcow2")
    store.close()
    assert image.stat().st_size < MIB
    again = open_image(image, format="qcow2", readonly=True)
    assert again.read(99, 6) == bytes(512) + b"q" * 2048 + bytes(512)
    assert again.writev(0, [memoryview(bytes(512))]) is Errno.EROFS
    again.close()


def test_the_server_ends_with_its_user(image: Path) -> None:
    """Even one that is killed: the image is free again."""
    code = (
        "import os, sys; from pvirq.toolstack import diskimage;"
        f"diskimage.SERVERS = {diskimage.SERVERS}; store = diskimage.open_image(sys.argv[1], format='qcow2');"
        "assert store.writev(7, [memoryview(b'k' * 512)]) is None; store.flush(print); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(image)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    for _ in range(200):
        try:
            store = open_image(image, format="qcow2")
            break
        except XenError:
            time.sleep(0.05)
    assert store.read(7, 1) == b"k" * 512
    store.close()


def test_what_qemu_says_is_said(image: Path) -> None:
    image.write_bytes(b"no image at all" * 100)
    with pytest.raises(XenError, match="not in qcow2 format") as error:
        open_image(image, format="qcow2")
    assert "\n" not in error.value.why


def test_without_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diskimage, "SERVERS", ())
    (tmp_path / "i").write_bytes(qcow2(MIB))
    with pytest.raises(XenError, match="qemu-utils") as error:
        open_image(tmp_path / "i", format="qcow2")
    assert error.value.errno is Errno.ENODEV


def test_formats(tmp_path: Path) -> None:
    for head, format_ in (
        (qcow2(MIB), "qcow2"), (b"QFI\xfb\0\0\0\1", "qcow"), (b"QED\0", "qed"), (b"conectix", "vhd"), (b"", "raw"),
    ):  # fmt: skip
        assert sniff_format(head) == format_
    path = tmp_path / "i"
    path.write_bytes(qcow2(MIB))
    with pytest.raises(XenError, match="looks like qcow2"):
        open_image(path)
    store = open_image(path, format="raw")  # as it is, and no longer locked by the attempt before
    assert store.read(0, 1)[:4] == b"QFI\xfb"
    store.close()
    for options in ({"format": "iso"}, {"cache": "unsafe"}):
        with pytest.raises(XenError, match="expected one of") as error:
            open_image(path, **options)  # type: ignore[arg-type]
        assert error.value.errno is Errno.EINVAL

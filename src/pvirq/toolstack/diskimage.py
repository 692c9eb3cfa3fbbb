"""Disk images by path: what format one has, and who reads it.

Raw ones are read here (`pvirq.drivers.filestore`), others by QEMU, as an NBD server on a socket of our own.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import InPlaceStore
from pvirq.drivers.filestore import FileStore, errno_of
from pvirq.drivers.nbdstore import NbdStore
from pvirq.drivers.writecache import WriteCache

# xl's names of formats, and QEMU's.
FORMATS: Final = {"raw": "raw", "qcow": "qcow", "qcow2": "qcow2", "qed": "qed", "vhd": "vpc"}
CACHES: Final = ("none", "writeback")
SERVERS: Final = ("qemu-nbd", "qemu-storage-daemon")
EXPORT: Final = "disk"
# Runs a server until it ends, or its standard input does: with this process too, however that comes to its end.
WHILE_WE_LIVE: Final = (
    'exec 3<&0; "$@" </dev/null 3<&- & server=$!; { read -r _ <&3; kill $server; } 2>/dev/null & wait $server'
)
START_S: Final = 10.0


def sniff_format(head: bytes) -> str:
    """The format that an image's first bytes say, by xl's name."""
    if head[:4] == b"QFI\xfb" and len(head) >= 8:
        return "qcow" if struct.unpack_from(">I", head, 4)[0] == 1 else "qcow2"
    if head[:4] == b"QED\0":
        return "qed"
    if head[:8] == b"conectix":  # a dynamic one; a fixed one is raw but for its last sector
        return "vhd"
    return "raw"


def open_image(
    path: str | os.PathLike[str], *, readonly: bool = False, format: str = "", cache: str = "none"
) -> InPlaceStore:
    """The disk that an image holds.

    `format` is one of xl's: raw, qcow, qcow2, qed or vhd. Without it the image is raw, unless it begins as one of the
    others: then it has to be said, for a guest can write such a beginning on its raw disk, and name any file of the
    host's in it. `cache` "writeback" is a volatile write cache (`WriteCache`) in front.

    XenError, one line: what the file's opening gave; EINVAL for format or cache; ENODEV where QEMU is needed and
    isn't installed.
    """
    path = os.fspath(path)
    if format not in ("", *FORMATS):
        raise XenError(Errno.EINVAL, f"format {format!r}: expected one of {', '.join(FORMATS)}")
    if cache not in CACHES:
        raise XenError(Errno.EINVAL, f"cache {cache!r}: expected one of {', '.join(CACHES)}")
    store: InPlaceStore
    if not readonly and os.path.isfile(path) and not os.stat(path).st_mode & 0o222:
        # The block script's rule, though root could.
        raise XenError(
            Errno.EACCES, f"File {path} is read-only, and so I will not mount it read-write in a guest domain."
        )
    if format in ("", "raw"):
        store = FileStore(path, readonly=readonly)
        found = sniff_format(store.read(0, 1)) if not format and store.sectors else "raw"
        if found != "raw":
            store.close()
            raise XenError(Errno.EINVAL, f"{path} looks like {found}: say which format it is, {found} or raw")
    else:
        store = _serve(path, FORMATS[format], readonly)
    return WriteCache(store) if cache == "writeback" else store


def _serve(path: str, driver: str, readonly: bool) -> NbdStore:
    """Have QEMU serve the image."""
    try:
        os.close(os.open(path, (os.O_RDONLY if readonly else os.O_RDWR) | os.O_CLOEXEC))
    except OSError as error:
        raise XenError(errno_of(error), f"{path}: {error.strerror}") from error
    name = next((name for name in SERVERS if shutil.which(name)), None)
    if name is None:
        raise XenError(Errno.ENODEV, f"{path}: reading {driver} images takes qemu-nbd (Debian's package qemu-utils)")
    folder = tempfile.mkdtemp(prefix="pvirq-nbd-")
    where = str(Path(folder) / "socket")
    server = subprocess.Popen(
        ["sh", "-c", WHILE_WE_LIVE, "sh", *_command(name, path, driver, readonly, where)], stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip

    def stop() -> str:
        said = server.communicate()[1].decode(errors="replace").strip().splitlines()
        shutil.rmtree(folder, ignore_errors=True)
        return said[0].rpartition(": ")[2] if said else ""  # it repeats its arguments before what is wrong

    try:
        return _connect(server, where, stop)
    except XenError as error:
        why = stop() or error.why
        raise XenError(Errno.EINVAL, f"{path}: {why}") from error
    except BaseException:
        stop()
        raise


def _connect(server: subprocess.Popen[bytes], where: str, stop: Callable[[], object]) -> NbdStore:
    deadline = time.monotonic() + START_S
    while True:
        try:
            return NbdStore(where, EXPORT, on_close=stop)
        except XenError as error:
            if error.errno is not Errno.ECONNREFUSED or server.poll() is not None or time.monotonic() > deadline:
                raise
        time.sleep(0.01)  # it isn't there yet


def _command(name: str, path: str, driver: str, readonly: bool, where: str) -> list[str]:
    """What starts the server, for one client, who then sees all that its writes did."""
    if name == "qemu-nbd":
        return [
            name, f"--socket={where}", f"--format={driver}", f"--export-name={EXPORT}", "--discard=unmap",
            *(["--read-only"] if readonly else []), "--", path,
        ]  # fmt: skip
    mode = "read-only=on" if readonly else "read-only=off"
    return [
        name,
        "--blockdev", f"driver=file,node-name=file,filename={_quote(path)},discard=unmap,{mode}",
        "--blockdev", f"driver={driver},node-name=image,file=file,discard=unmap,{mode}",
        "--nbd-server", f"addr.type=unix,addr.path={_quote(where)}",
        "--export", f"type=nbd,id=export,node-name=image,name={EXPORT},writable={'off' if readonly else 'on'}",
    ]  # fmt: skip


def _quote(value: str) -> str:
    """A comma in an option's value is written twice."""
    return value.replace(",", ",,")

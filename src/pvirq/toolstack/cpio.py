"""The newc cpio format, as the Linux kernel unpacks it for an initramfs.

Source followed: Linux Documentation/driver-api/early-userspace/buffer-format.rst and init/initramfs.c. An
archive is a run of entries: a header of 110 ASCII characters, the name with its NUL, padding to 4 bytes, the
data, padding to 4 bytes; an entry named TRAILER!!! ends it. Archives may follow one another, with zero bytes
between.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

HEADER_SIZE: Final = 110
MAGIC: Final = b"070701"
MAGIC_CRC: Final = b"070702"  # the same layout with a checksum, which readers may ignore
TRAILER: Final = "TRAILER!!!"
BLOCK: Final = 512
NAME_MAX: Final = 4095  # PATH_MAX less the NUL: the kernel skips entries with longer names


class CpioError(ValueError):
    """The bytes are no newc archive, or a name or size does not fit the format."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One member. `name` has no leading slash; `mode` includes the file type; `rdev` is (major, minor)."""

    name: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    nlink: int = 1
    ino: int = 0


class Writer:
    """Builds an archive in memory. The same calls give the same bytes: no clock, no inodes of the host.

    Directories above an entry are added when missing (mode 0755), for the kernel does not create them.
    Adding a directory twice does nothing; any other name added twice is a CpioError.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._kinds: dict[str, int] = {}  # name -> file type

    def directory(self, path: str, mode: int = 0o755) -> None:
        name = _clean(path)
        if self._kinds.get(name) != stat.S_IFDIR:
            self._add(Entry(name, stat.S_IFDIR | mode, nlink=2))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._add(Entry(_clean(path), stat.S_IFREG | mode, data))

    def symlink(self, path: str, target: str) -> None:
        if not 0 < len(_encode(target)) <= NAME_MAX:
            raise CpioError(f"symlink target of {len(target)} characters: {path}")
        self._add(Entry(_clean(path), stat.S_IFLNK | 0o777, _encode(target)))

    def device(self, path: str, kind: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A device node; `kind` is "c" (character) or "b" (block)."""
        file_type = {"c": stat.S_IFCHR, "b": stat.S_IFBLK}[kind]
        self._add(Entry(_clean(path), file_type | mode, rdev=(major, minor)))

    def __contains__(self, path: str) -> bool:
        return _clean(path) in self._kinds

    def getvalue(self) -> bytes:
        """The archive so far, with its trailer, padded to 512 bytes so that another archive may follow."""
        return _padded(b"".join([*self._parts, _pack(Entry(TRAILER, 0))]), BLOCK)

    def _add(self, entry: Entry) -> None:
        if entry.name in self._kinds:
            raise CpioError(f"added twice: {entry.name}")
        if parent := entry.name.rpartition("/")[0]:
            if self._kinds.get(parent, stat.S_IFDIR) != stat.S_IFDIR:
                raise CpioError(f"not a directory: {parent}")
            self.directory(parent)
        # Inode numbers count from 1; only hard links (nlink > 1 of regular files), never written here, share
        # them.
        self._parts.append(_pack(entry, ino=len(self._parts) + 1))
        self._kinds[entry.name] = stat.S_IFMT(entry.mode)


def read(archive: bytes | memoryview, offset: int = 0) -> Iterator[Entry]:
    """The entries of the archive at `offset`, up to its trailer, and of plain archives right behind it.

    Stops at the end of the data, or at something that is no newc header and follows a trailer (a compressed
    archive, say). CpioError for anything malformed or cut short.
    """
    view = memoryview(archive).cast("B")
    start = offset  # padding is relative to the archive's own start
    while True:
        entry, offset = _unpack(view, start, offset)
        if entry.name != TRAILER:
            yield entry
            continue
        while offset < len(view) and view[offset] == 0:
            offset += 1
        if bytes(view[offset : offset + 6]) not in (MAGIC, MAGIC_CRC):
            return
        start = offset


def _pack(entry: Entry, ino: int = 0) -> bytes:
    name = _encode(entry.name) + b"\0"
    if len(name) > NAME_MAX + 1:
        raise CpioError(f"name of {len(name) - 1} bytes")
    fields = (
        ino,
        entry.mode,
        entry.uid,
        entry.gid,
        entry.nlink,
        entry.mtime,
        len(entry.data),
        0,  # device the file was on: major
        0,  # minor
        *entry.rdev,
        len(name),
        0,  # checksum: only with MAGIC_CRC
    )
    if any(not 0 <= field < 1 << 32 for field in fields):
        raise CpioError(f"a field of {entry.name} exceeds 32 bits")
    head = MAGIC + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head, 4) + _padded(entry.data, 4)


def _unpack(view: memoryview, start: int, offset: int) -> tuple[Entry, int]:
    header = bytes(view[offset : offset + HEADER_SIZE])
    if header[:6] not in (MAGIC, MAGIC_CRC) or len(header) < HEADER_SIZE:
        raise CpioError(f"no newc header at offset {offset}")
    digits = header[6:]
    if digits.translate(None, b"0123456789abcdefABCDEF"):  # int() would take signs, spaces and underscores too
        raise CpioError(f"bad hexadecimal in the header at offset {offset}")
    fields = [int(digits[i : i + 8], 16) for i in range(0, 104, 8)]
    ino, mode, uid, gid, nlink, mtime, size, _, _, major, minor, name_size, _ = fields
    if not 2 <= name_size <= NAME_MAX + 1:
        raise CpioError(f"name of {name_size} bytes at offset {offset}")
    name_at = offset + HEADER_SIZE
    data_at = start + _align(name_at + name_size - start, 4)
    name = bytes(view[name_at : name_at + name_size])
    if data_at + size > len(view):
        raise CpioError(f"cut short: the entry at offset {offset} needs {data_at + size - len(view)} more bytes")
    if name[-1] != 0:
        raise CpioError(f"name without NUL at offset {offset}")
    entry = Entry(
        name[:-1].decode("utf-8", "surrogateescape"),
        mode,
        bytes(view[data_at : data_at + size]),
        (major, minor),
        uid,
        gid,
        mtime,
        nlink,
        ino,
    )
    # The padding behind the very last data may be missing.
    return entry, min(start + _align(data_at + size - start, 4), len(view))


def _clean(path: str) -> str:
    name = path.strip("/")
    if not name or "\0" in name or name == TRAILER or any(p in ("", ".", "..") for p in name.split("/")):
        raise CpioError(f"not a name for an archive member: {path!r}")
    return name


def _encode(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise CpioError(f"not a file name: {text!r}") from error


def _align(size: int, to: int) -> int:
    return (size + to - 1) // to * to


def _padded(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)

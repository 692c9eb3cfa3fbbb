"""The user's cache directory: fetched kernels and busybox.

    <root>/<kind>/<name>/        an entry, complete or not there at all
    <root>/<kind>/<alias>        a symlink to the entry that a request of that name found last
    <root>/tmp/, <root>/lock/    entries being made, and locks
    <root>/apt/                  package lists, when the system has none (packages.py)

Everything appears by a rename, so any number of processes may use it at once, and an interrupted one leaves
nothing but a directory in tmp/, which the next one removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

KINDS: Final = ("kernels", "busybox", "packages", "dom0", "unpacked")
_OTHER: Final = ("apt",)


class CacheError(Exception):
    """The cache directory can't be used; the message is one line."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """What the cache holds. `size` is in bytes; `aliases` are requests that it answers, such as "cloud"."""

    kind: str
    name: str
    path: Path
    size: int
    aliases: tuple[str, ...]


def default_root() -> Path:
    """$PVIRQ_CACHE, else $XDG_CACHE_HOME/pvirq, else ~/.cache/pvirq. CacheError if there is no home."""
    if chosen := os.environ.get("PVIRQ_CACHE"):
        return Path(chosen).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: relative paths are to be ignored
        return Path(xdg, "pvirq")
    try:
        return Path.home() / ".cache/pvirq"
    except RuntimeError as error:
        raise CacheError("no home directory for the cache; set PVIRQ_CACHE to a directory") from error


class Cache:
    """The cache at `root`, or default_root(). Reading never creates it; CacheError if it can't be written."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or default_root()

    def get(self, kind: str, name: str) -> Path | None:
        """The directory of an entry, by its name or an alias."""
        path = self.root / kind / name
        return path.resolve() if os.path.isdir(path) else None  # Path.is_dir raises where we may not look

    def entries(self) -> list[CacheEntry]:
        found = []
        for kind in (*KINDS, *_OTHER):
            aliases: dict[str, list[str]] = {}
            # The package lists are one entry: the directory itself.
            directories = [self.root / kind] if kind in _OTHER else _children(self.root / kind)
            for path in directories:
                if os.path.islink(path):
                    aliases.setdefault(path.readlink().name, []).append(path.name)
            for path in directories:
                if os.path.isdir(path) and not os.path.islink(path):
                    name = path.name
                    found.append(CacheEntry(kind, name, path, _size(path), tuple(aliases.get(name, ()))))
        return found

    def clear(self) -> int:
        """Remove everything, and return the bytes freed. Waits for a fetch under way."""
        if not self.root.is_dir():
            return 0
        with self.lock("fetch"), self.staging() as staging:
            freed = sum(entry.size for entry in self.entries())
            for kind in (*KINDS, *_OTHER):
                with contextlib.suppress(FileNotFoundError):
                    # Out of sight at once; removed with the staging directory.
                    (self.root / kind).rename(staging / kind)
        return freed

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty directory in which to make an entry. It is gone afterwards; publish() what shall stay."""
        tmp = self._directory("tmp")
        with contextlib.ExitStack() as stack:
            with self.lock("tmp"):  # between mkdtemp and flock nobody may take the directory for an abandoned one
                _remove_abandoned(tmp)
                path = Path(tempfile.mkdtemp(dir=tmp))
                stack.callback(shutil.rmtree, path, ignore_errors=True)
                held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, held)
                _flock(held, fcntl.LOCK_EX)
            yield path

    def publish(self, staged: Path, kind: str, name: str) -> Path:
        """Make a staged directory the entry `name`. If another process was first, its entry stays."""
        for path in (*staged.rglob("*"), staged):
            if path.is_file() or path.is_dir():
                _fsync(path)
        target = self._directory(kind) / name
        try:
            staged.rename(target)
        except OSError as error:
            if not target.is_dir():
                raise CacheError(f"cannot write {target}: {error.strerror}") from error
        return target

    def alias(self, kind: str, alias: str, name: str) -> None:
        """Let get(kind, alias) find the entry `name` from now on."""
        if alias == name:
            return
        with self.staging() as staging:
            link = staging / alias
            link.symlink_to(name)
            link.rename(self._directory(kind) / alias)

    @contextlib.contextmanager
    def lock(self, name: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold a lock among processes (until exit at the latest). `waiting` is called if another holds it."""
        path = self._directory("lock") / name
        try:
            held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CacheError(f"cannot write {path}: {error.strerror}") from error
        try:
            if not _flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB):
                waiting()
                _flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)

    def _directory(self, name: str) -> Path:
        path = self.root / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "set PVIRQ_CACHE to a directory that can be written"
            raise CacheError(f"cannot create {path}: {error.strerror}; {hint}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise CacheError(f"cannot write {path}; set PVIRQ_CACHE to a directory that can be written")
        return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all, and that an interrupt leaves as it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            os.fchmod(handle, 0o644)
            file.flush()
            os.fsync(handle)
        os.replace(name, path)
    except BaseException:  # Ctrl-C as well
        os.unlink(name)
        raise


def _children(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:  # not there, or not ours to look into
        return []


def _size(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def _flock(descriptor: int, operation: int) -> bool:
    """False if LOCK_NB was asked for and another holds the lock."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks: the renames still keep entries whole
    return True


def _remove_abandoned(tmp: Path) -> None:
    for path in _children(tmp):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its maker lives, or unlockable
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

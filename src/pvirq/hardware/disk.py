"""Disks: what is on one, how long it takes, and the queue of requests in its driver."""

from __future__ import annotations

import mmap
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, Protocol

from pvirq.abi.errno import Errno
from pvirq.hardware.device import MODERN, Board, Declaration, Driver, HardwareError
from pvirq.linux.kernel import KernelTimer
from pvirq.xen.memory import MAP_NORESERVE
from pvirq.xen.timer import NS_PER_S

SECTOR: Final = 512
MIB: Final = 1 << 20
DEFAULT_SIZE: Final = 8192 * MIB
TIMEOUT_NS: Final = 30 * NS_PER_S  # SCSI's

Done = Callable[[bytes | None, Errno | None], None]
"""How a request ends: with what was read (None for a write), and an error (None without)."""


class BlockStore(Protocol):
    """Where sectors can be read and written: a disk's driver, as a block backend uses it."""

    @property
    def sectors(self) -> int:
        """The size, in sectors of 512 bytes."""

    def submit(self, sector: int, count: int, data: bytes | None, done: Done) -> None:
        """Read `count` sectors from `sector`, or write `data`, which are so many bytes.

        `done` is called later, from the bottom half of the completion's interrupt: with EIO where the disk can't.
        """


@dataclass(frozen=True)
class Timing:
    """How long a disk takes for a command, in virtual time: a fixed part, one for the way of the heads, one for data.

    `command_ns` for any command; `seek_ns` for the heads' way over the whole disk, and less in proportion;
    `bytes_per_s` for the data, by which the heads move on too. A disk without heads has seek_ns = 0.
    """

    command_ns: int
    seek_ns: int
    bytes_per_s: int


class Medium:
    """What is on a disk, and where its heads are. One command at a time moves them; others wait for their turn.

    `bad` are sectors that can't be read or written.
    """

    def __init__(self, board: Board, size: int, timing: Timing, path: str = "") -> None:
        """`size` in bytes. With `path` the data is a file's, which is made, or grows, to that size."""
        if size < SECTOR or size % SECTOR:
            raise HardwareError(
                f"a disk of {size} bytes: expected a multiple of {SECTOR}", "file" if path else "size_mib"
            )
        self.clock = board.clock
        self.path = path
        self.sectors = size // SECTOR
        self.timing = timing
        self.bad: set[int] = set()
        self._head = 0
        self._busy_until = 0
        if path:
            try:
                self._data = _map_file(Path(path), size)
            except OSError as error:
                raise HardwareError(f"{path}: {error.strerror}", "file") from error
        else:
            # Only pages that were written take memory.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
            try:
                self._data = mmap.mmap(-1, size, flags=flags)
            except OSError as error:
                message = f"a disk of {size} bytes: {error.strerror}; with a file it needs no memory"
                raise HardwareError(message, "size_mib") from error

    def take_turn(self, sector: int, count: int) -> int:
        """The moment, in ns, at which a command given now will be done; 0 sectors: just the fixed part."""
        timing = self.timing
        took = timing.command_ns
        if count:
            took += timing.seek_ns * abs(sector - self._head) // self.sectors
            took += -(-count * SECTOR * NS_PER_S // timing.bytes_per_s)
            self._head = sector + count
        self._busy_until = max(self.clock.now(), self._busy_until) + took
        return self._busy_until

    def stop(self) -> None:
        """Forget the commands that were given (a reset)."""
        self._busy_until = 0

    def fits(self, sector: int, count: int) -> bool:
        """Are these sectors there, and in order?"""
        if not 0 <= sector <= sector + count <= self.sectors:
            return False
        return not self.bad or self.bad.isdisjoint(range(sector, sector + count))

    def read(self, sector: int, count: int) -> bytes:
        return self._data[sector * SECTOR : (sector + count) * SECTOR]

    def write(self, sector: int, data: bytes) -> None:
        self._data[sector * SECTOR : sector * SECTOR + len(data)] = data


def _size_of(path: Path) -> int:
    """A file's size, in whole sectors. HardwareError without the file."""
    try:
        return path.stat().st_size // SECTOR * SECTOR
    except OSError as error:
        raise HardwareError(f"{path}: {error.strerror}; a disk of a new file needs its size_mib", "file") from error


def _map_file(path: Path, size: int) -> mmap.mmap:
    path.touch()
    with path.open("r+b") as file:
        if path.stat().st_size < size:
            file.truncate(size)
        return mmap.mmap(file.fileno(), size)


@dataclass(frozen=True)
class DiskDeclaration(Declaration):
    """What all disks have: a size (-1: that of `file`, else 8 GiB), a file with its data or none, `Timing`."""

    size_mib: int = -1
    file: str = ""
    command_ns: int = 100_000
    seek_ns: int = 16_000_000  # 8 ms for half the way
    bytes_per_s: int = 60_000_000

    def medium(self, board: Board) -> Medium:
        if self.size_mib < -1 or not self.size_mib:
            raise HardwareError(f"size_mib {self.size_mib}: expected a number above 0, or -1", "size_mib")
        self.at_least(command_ns=0, seek_ns=0, bytes_per_s=1)
        size = self.size_mib * MIB
        if self.size_mib < 0:
            size = _size_of(Path(self.file)) if self.file else DEFAULT_SIZE
        return Medium(board, size, Timing(self.command_ns, self.seek_ns, self.bytes_per_s), self.file)


@dataclass(eq=False, slots=True)
class Command:
    """One command to a disk, a part of a request: `data` is None for a read, and at the end what was read.

    A flush is a write of no sectors.
    """

    sector: int
    count: int
    data: bytes | None
    request: Request
    write: bool
    deadline: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """What `submit` was called with, and how far it is."""

    done: Done
    left: int = 0
    error: Errno | None = None
    parts: list[Command] = field(default_factory=list)


class BlockDriver(Driver):
    """A disk's driver: it splits requests into commands, queues what the disk can't take, ends requests.

    A subclass gives commands to its disk (`_issue`) and calls `_complete` from its interrupt handler. Requests are
    neither merged nor put in another order. A command whose interrupt doesn't come within 30 s is asked after by
    `_timed_out`.

    A command moves `max_sectors` at most: where the disk's memory is a PV kernel's, Linux 6.1 keeps to what its bounce
    buffers hold in a row, 256 KiB; old kernels to the block layer's limit of those years.
    """

    max_sectors = 512
    max_sectors_old = 1024  # BLK_DEF_MAX_SECTORS of 2.6

    uses = {"read": "read 4 KiB somewhere", "write": "write 4 KiB somewhere", "flush": "flush what was written"}

    def __init__(self, board: Board, name: str, medium: Medium, slots: int) -> None:
        """`slots`: how many commands the disk takes at a time."""
        super().__init__(board, name)
        self.medium = medium
        self._slot_count = self._free_slots = slots
        if self.kernel.events.version < MODERN:
            self.max_sectors = self.max_sectors_old
        self._waiting: deque[Command] = deque()
        self._issued: list[Command] = []
        self._timer: KernelTimer | None = None

    @property
    def sectors(self) -> int:
        return self.medium.sectors

    def submit(self, sector: int, count: int, data: bytes | None, done: Done) -> None:
        """As `BlockStore.submit`. ValueError for data of another length."""
        if data is not None and len(data) != count * SECTOR:
            raise ValueError(f"{len(data)} bytes for {count} sectors")
        request = Request(done)
        if not self.bound or not 0 <= sector < sector + count <= self.sectors:
            # The block layer refuses what is beyond the end; without a driver there is no disk.
            error = Errno.EIO if self.bound else Errno.ENXIO
            self.kernel.queue_work(lambda: done(None, error))
            return
        for at in range(0, count, self.max_sectors):
            part = min(self.max_sectors, count - at)
            piece = None if data is None else data[at * SECTOR : (at + part) * SECTOR]
            request.parts.append(Command(sector + at, part, piece, request, data is not None))
        request.left = len(request.parts)
        self._waiting += request.parts
        self._dispatch()

    def flush(self, done: Done) -> None:
        """Call `done(None, error)` when what was written is safe: a command like any other, which moves no data."""
        if not self.bound:
            self.kernel.queue_work(lambda: done(None, Errno.ENXIO))
            return
        request = Request(done, 1)
        request.parts.append(Command(0, 0, None, request, True))
        self._waiting += request.parts
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting and self._free_slots:
            command = self._waiting.popleft()
            self._free_slots -= 1
            command.deadline = self.kernel.now() + TIMEOUT_NS
            self._issued.append(command)
            self._issue(command)
        # One timer for the queue, as in the block layer: a command that ends in time costs no timer.
        if self._issued and self._timer is None:
            self._timer = self.kernel.set_timer(self._issued[0].deadline, self._look_for_lost)

    def _look_for_lost(self) -> None:
        self._timer = None
        now = self.kernel.now()
        for command in [command for command in self._issued if command.deadline <= now]:
            command.deadline = now + TIMEOUT_NS
            self._timed_out(command)
        if self._issued and self._timer is None:
            self._timer = self.kernel.set_timer(min(c.deadline for c in self._issued), self._look_for_lost)

    def _complete(self, command: Command, error: Errno | None) -> None:
        """The disk is done with a command. Called in the interrupt; the rest happens in its bottom half."""
        self._issued.remove(command)
        self._free_slots += 1
        self.kernel.queue_work(lambda: self._end(command, error))
        self._dispatch()

    def _end(self, command: Command, error: Errno | None) -> None:
        request = command.request
        request.error = request.error or error
        request.left -= 1
        if not request.left:
            read = not command.write and request.error is None
            request.done(b"".join(part.data or b"" for part in request.parts) if read else None, request.error)

    def _use(self, action: str, rng: Random) -> None:
        if action == "flush":
            self.flush(lambda data, error: None)
            return
        count = min(8, self.sectors)
        sector = rng.randrange(self.sectors // count) * count
        data = rng.randbytes(count * SECTOR) if action == "write" else None
        self.submit(sector, count, data, lambda data, error: None)

    def remove(self) -> None:
        """What was still to do ends with ENXIO."""
        super().remove()
        self._reset()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        unfinished, self._issued = [*self._issued, *self._waiting], []
        self._waiting.clear()
        self._free_slots = self._slot_count
        for command in unfinished:
            self.kernel.queue_work(lambda command=command: self._end(command, Errno.ENXIO))  # type: ignore[misc]

    @abstractmethod
    def _reset(self) -> None:
        """Make the disk forget its commands, and whatever it wants."""

    @abstractmethod
    def _issue(self, command: Command) -> None:
        """Give a command to the disk."""

    @abstractmethod
    def _timed_out(self, command: Command) -> None:
        """No interrupt came for a command: look at the disk itself."""

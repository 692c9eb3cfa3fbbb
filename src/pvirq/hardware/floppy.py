"""The floppy controller, 82077, one drive, and its driver.

After reset, recalibrate and seek the line is high until "sense interrupt status" was asked; after a read or write,
until the result's first byte was read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import ClassVar, Final

from pvirq.abi.errno import Errno
from pvirq.hardware.device import MS, Board, Declaration, Deferred, Driver
from pvirq.hardware.disk import SECTOR
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kthread import Body, Completion, Kthread, sleep

# Commands, and status register 0.
FD_RECALIBRATE: Final = 0x07
FD_SENSEI: Final = 0x08
FD_SEEK: Final = 0x0F
FD_READ: Final = 0xE6
FD_WRITE: Final = 0xC5
ST0_SEEK_END: Final = 0x20
ST0_ABNORMAL: Final = 0x40
ST0_RESET: Final = 0xC0

# A 1.44 MB disk, and the time that its drive takes: 300 turns a minute, 3 ms a step, 15 ms to settle.
TRACKS, HEADS, TRACK_SECTORS = 80, 2, 18
DISK_SECTORS: Final = TRACKS * HEADS * TRACK_SECTORS
TURN_NS: Final = 200 * MS
SECTOR_NS: Final = TURN_NS // TRACK_SECTORS
STEP_NS: Final = 3 * MS
SETTLE_NS: Final = 15 * MS
RESET_NS: Final = 1 * MS

# The driver's patience (drivers/block/floppy.c): until the motor runs, until an interrupt comes, until it stops.
SPIN_UP_NS: Final = 400 * MS
COMMAND_TIMEOUT_NS: Final = 3000 * MS
SPIN_DOWN_NS: Final = 3000 * MS


class Fdc:
    """Controller and drive. `disk` is what is in the drive; None: nothing."""

    def __init__(self, board: Board, gsi: int, held: bool) -> None:
        """`held`: the firmware has left it in reset."""
        self.held = held
        self.disk: bytearray | None = None
        self.motor = False
        self.changed = True  # the disk-change line: up until a step finds a disk
        self._pin = board.pin(gsi)
        self._work = Deferred(board, self._finish)
        self._at = 0  # track under the heads
        self._to = 0
        self._result = b""
        self._sense = 0
        self._rw: tuple[int, int, int, bytes | None] | None = None
        self.transferred = b""

    def reset(self) -> None:
        """Into reset and out again, by the digital output register: everything is forgotten; the line rises when the
        controller is back."""
        self.held = False
        self._rw, self._result, self._sense = None, b"", ST0_RESET
        self._pin.lower()
        self._to = self._at
        self._work.after(RESET_NS)

    def command(self, command: int, track: int = 0, head: int = 0, sector: int = 1, data: bytes | None = None) -> None:
        """A command with its parameters, by DMA with its data: `data` None reads to the end of the track."""
        self._rw = None
        if command in (FD_RECALIBRATE, FD_SEEK):
            self._to = track if command == FD_SEEK else 0
            self._sense = ST0_SEEK_END
            self._work.after(abs(self._to - self._at) * STEP_NS + SETTLE_NS)
            return
        count = TRACK_SECTORS + 1 - sector if data is None else len(data) // SECTOR
        self._rw = (track, head, sector, data)
        if self.disk is None or not self.motor:
            return  # no index pulse comes by: the command never ends
        self._work.after(TURN_NS // 2 + count * SECTOR_NS)

    def sense_interrupt(self) -> tuple[int, int]:
        """ST0 and the track. Lowers the line."""
        self._pin.lower()
        sense, self._sense = self._sense, 0x80  # "invalid": there was none
        return sense, self._at

    def read_result(self) -> bytes:
        """The seven bytes after a read or write; nothing where there are none. Lowers the line."""
        result, self._result = self._result, b""
        if result:
            self._pin.lower()
        return result

    def _finish(self) -> None:
        if self._rw is None:
            if self._at != self._to and self.disk is not None:
                self.changed = False
            self._at = self._to
        else:
            track, head, sector, data = self._rw
            status = 0 if track == self._at and self.disk is not None else ST0_ABNORMAL
            if self.disk is not None and not status:
                start = ((track * HEADS + head) * TRACK_SECTORS + sector - 1) * SECTOR
                if data is None:
                    self.transferred = bytes(self.disk[start : start + (TRACK_SECTORS + 1 - sector) * SECTOR])
                else:
                    self.disk[start : start + len(data)] = data
            self._result = bytes((status | head << 2, 0, 0, track, head, sector, 2))
        self._pin.raise_()


class FloppyDriver(Driver):
    """The driver: all work is done by one thread, a request at a time."""

    module = "floppy"
    uses = {"read": "read a sector somewhere", "insert": "put in an empty disk", "eject": "take the disk out"}

    def __init__(self, board: Board, name: str, fdc: Fdc, gsi: int, opened: bool) -> None:
        super().__init__(board, name)
        self.fdc = fdc
        self._gsi = gsi
        self._opened = opened
        self._interrupted: Completion[tuple[int, int] | bytes | None] | None = None
        self._requests: list[tuple[int, int, bytes | None, Callable[[bytes | None, Errno | None], None]]] = []
        self._more: Completion[None] = Completion()
        self._thread: Kthread[None] | None = None
        self._track: int | None = None
        self._stop_motor: Callable[[], None] = lambda: None
        self.sectors = DISK_SECTORS

    def probe(self) -> None:
        irq = self.kernel.events.register_gsi(self._gsi, level=False, active_low=False)
        self.request_irq(irq, self._interrupt, 0, "floppy")
        if self._opened:
            # udev asks whether there is a disk as soon as /dev/fd0 appears.
            self.submit(0, 1, None, lambda data, error: None)
        self._thread = Kthread(self.kernel, "floppy", self._work())

    def remove(self) -> None:
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        super().remove()
        self._stop_motor()
        self.fdc.motor = False

    def submit(
        self, sector: int, count: int, data: bytes | None, done: Callable[[bytes | None, Errno | None], None]
    ) -> None:
        """As `disk.BlockStore.submit`; ENXIO without a disk."""
        self._requests.append((sector, count, data, done))
        self._more.complete(None)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """floppy_interrupt: the result, or where there is none, sense what happened."""
        waiting, self._interrupted = self._interrupted, None
        result: bytes | tuple[int, int] = self.fdc.read_result() or self.fdc.sense_interrupt()
        if waiting is not None:
            waiting.complete(result)
        return IRQ_HANDLED

    def _do(self, start: Callable[[], None]) -> Body[tuple[int, int] | bytes | None]:
        """Start something and wait for its interrupt; None where it doesn't come in 3 s."""
        waiting = self._interrupted = Completion()
        kernel = self.kernel
        start()
        timer = kernel.set_timer(kernel.now() + COMMAND_TIMEOUT_NS, lambda: waiting.complete(None))
        result = yield from waiting.wait()
        timer.cancel()
        self._interrupted = None
        return result

    def _work(self) -> Body[None]:
        if self.fdc.held:
            yield from self._do(self.fdc.reset)  # floppy_grab_irq_and_dma lets it out
        yield from self._do(self.fdc.reset)
        while True:
            while not self._requests:
                self._more = Completion()
                yield from self._more.wait()
            sector, count, data, done = self._requests.pop(0)
            yield from self._start_motor()
            got = bytearray()
            error: Errno | None = None
            if not 0 <= sector < sector + count <= DISK_SECTORS:
                error = Errno.EIO
            while not error and len(got) < count * SECTOR:
                at = sector + len(got) // SECTOR
                part = min(TRACK_SECTORS - at % TRACK_SECTORS, count - len(got) // SECTOR)
                piece = None if data is None else data[len(got) : len(got) + part * SECTOR]
                error = yield from self._transfer(at, piece)
                got += self.fdc.transferred[: part * SECTOR] if piece is None else piece
            self._motor_off_later()
            done(bytes(got) if data is None and not error else None, error)

    def _transfer(self, sector: int, data: bytes | None) -> Body[Errno | None]:
        """To the track, and its rest from `sector` on, or `data` to there."""
        fdc = self.fdc
        track, rest = divmod(sector, HEADS * TRACK_SECTORS)
        head, index = divmod(rest, TRACK_SECTORS)
        if self._track is None or fdc.changed:
            yield from self._do(lambda: fdc.command(FD_RECALIBRATE))
            self._track = 0
        if fdc.changed:
            # Only a step tells whether there is a disk.
            yield from self._do(lambda: fdc.command(FD_SEEK, 1))
            self._track = 1
            if fdc.changed:
                return Errno.ENXIO
        if track != self._track:
            yield from self._do(lambda: fdc.command(FD_SEEK, track))
            self._track = track
        result = yield from self._do(
            lambda: fdc.command(FD_READ if data is None else FD_WRITE, track, head, index + 1, data)
        )
        if not isinstance(result, bytes) or result[0] & ST0_RESET:
            self.kernel.printk(f"floppy0: {'timeout' if result is None else 'error'} at sector {sector}")
            yield from self._do(fdc.reset)
            self._track = None
            return Errno.EIO
        return None

    def _start_motor(self) -> Body[None]:
        self._stop_motor()
        if not self.fdc.motor:
            self.fdc.motor = True
            yield from sleep(self.kernel, SPIN_UP_NS)

    def _motor_off_later(self) -> None:
        def off() -> None:
            self.fdc.motor = False

        self._stop_motor = self.kernel.set_timer(self.kernel.now() + SPIN_DOWN_NS, off).cancel

    # The user at the drive.

    def _use(self, action: str, rng: Random) -> None:
        if action == "insert":
            self.insert(b"")
        elif action == "eject":
            self.eject()
        else:
            self.submit(rng.randrange(DISK_SECTORS), 1, None, lambda data, error: None)

    def insert(self, image: bytes) -> None:
        """Put a disk in, up to 1.44 MB."""
        if len(image) > DISK_SECTORS * SECTOR:
            raise ValueError(f"{len(image)} bytes don't fit on a floppy disk")
        self.fdc.disk = bytearray(image.ljust(DISK_SECTORS * SECTOR, b"\0"))
        self.fdc.changed = True

    def eject(self) -> None:
        self.fdc.disk, self.fdc.changed = None, True


@dataclass(frozen=True)
class FloppyDeclaration(Declaration):
    """A floppy controller with one 1.44 MB drive, empty; `opened`: udev looks into it at boot.

    `held`: the firmware has left the controller in reset.
    """

    gsi: int = 6
    opened: bool = True
    held: bool = False
    driver: ClassVar[type[Driver]] = FloppyDriver

    def make(self, board: Board) -> FloppyDriver:
        return FloppyDriver(board, self.name, Fdc(board, self.gsi, self.held), self.gsi, self.opened)

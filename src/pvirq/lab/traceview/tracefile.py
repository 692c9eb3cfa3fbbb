"""Reading a trace: a header, and then an event a line.

A file is read line by line and never held: what a gigabyte takes in memory is up to who looks at its events. Whatever
is in the file, reading it raises nothing but TraceFileError.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final

from pvirq.lab.traceview.traceevents import Event, Header, Unexpected, event_of, header_of

MAX_LINE: Final = 16 << 20
TURN_LINES: Final = 2048  # lines between two calls of `TraceFile.on_turn`


class TraceFileError(Exception):
    """A trace can't be read: one line with the file, where it applies the line, and what was expected."""


class TraceFile:
    """A trace, open for reading: its header, and its events by iterating, once. A context manager.

    `truncated` tells afterwards that the last line is cut off, as a run that is killed leaves it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the file and read its header; TraceFileError if there is none, or the file can't be read."""
        self.path = Path(path)
        self.truncated = False
        self.done = 0  # bytes read so far
        self.lines = 0
        self.last_t = 0  # of the event read last
        self.on_turn: Callable[[], None] | None = None  # called now and then while events are read
        try:
            self._file: BinaryIO = self.path.open("rb")
        except (OSError, ValueError) as error:
            raise TraceFileError(f"{self.path}: {getattr(error, 'strerror', None) or error}") from None
        try:
            status = os.fstat(self._file.fileno())
            if stat.S_ISDIR(status.st_mode):
                raise TraceFileError(f"{self.path}: is a directory")
            self.size = status.st_size  # 0 where it isn't known
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise
        self._events_at = self.done
        self.last_t = self.header.start

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _error(self, text: object) -> TraceFileError:
        return TraceFileError(f"{self.path}:{self.lines}: {text}")

    def _read_header(self) -> Header:
        line = self._read_line()
        if not line:
            raise TraceFileError(f"{self.path}: empty, expected a trace")
        try:
            return header_of(line)
        except Unexpected as error:
            raise self._error(error) from None

    def _read_line(self) -> bytes:
        try:
            line = self._file.readline(MAX_LINE + 1)
        except OSError as error:
            raise TraceFileError(f"{self.path}: {error.strerror}") from None
        if not line:
            return line
        self.lines += 1
        self.done += len(line)
        if len(line) > MAX_LINE:
            raise self._error(f"a line of over {MAX_LINE >> 20} MiB")
        return line

    def raw_lines(self) -> Iterator[bytes]:
        """The lines of events as they are, one after the other, but for one that is cut off."""
        while line := self._read_line():
            if not self.lines % TURN_LINES and self.on_turn:
                self.on_turn()
            if not line.endswith(b"\n"):
                try:
                    event_of(line, self.lines)
                except Unexpected:
                    self.truncated = True
                    return
            yield line

    def __iter__(self) -> Iterator[Event]:
        """The events. TraceFileError, with file and line, at one that isn't as it should be."""
        for line in self.raw_lines():
            yield self.parse(line)

    def parse(self, line: bytes) -> Event:
        """The event of the line that was read last."""
        try:
            event = event_of(line, self.lines)
        except Unexpected as error:
            raise self._error(error) from None
        if event.t < self.last_t:
            raise self._error(f"time goes back, from {self.last_t} to {event.t}")
        self.last_t = event.t
        return event

    def end_time(self) -> int:
        """When the last event was, in ns; without reading all that is before it. TraceFileError from a pipe."""
        if not self._file.seekable():
            raise TraceFileError(f"{self.path}: expected a file that can be read twice, not a pipe")
        here = self._file.tell()
        try:
            for size in (1 << 16, 1 << 20, 2 * MAX_LINE + 2):
                self._file.seek(max(self._events_at, self.size - size))
                for line in reversed(self._file.read(size).split(b"\n")):
                    try:
                        return event_of(line, 0).t
                    except Unexpected:
                        continue
            return self.header.start
        except OSError as error:
            raise TraceFileError(f"{self.path}: {error.strerror}") from None
        finally:
            self._file.seek(here)

"""Text as lines with their place: files, standard input, directories; and what logs put in front of a line.

Everything is read as a stream. A line beyond LONGEST is cut, which is noted; gzip is recognised by its first bytes.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

LONGEST: Final = 1 << 20  # bytes of a line; /proc/interrupts has 11 for each CPU
PEEK: Final = 4096


class InspectError(Exception):
    """What was given can't be inspected: one line that says which file (and line) and why."""


@dataclass(frozen=True, slots=True, order=True)
class Where:
    """A place in the input. `line` counts from 1; 0 is the file as a whole."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Line:
    """A line without its end. `cut`: there was more than LONGEST bytes of it."""

    where: Where
    text: str
    cut: bool = False


def decode(data: bytes) -> str:
    """Text of any bytes: what isn't UTF-8 becomes a replacement character."""
    return data.decode("utf-8", "replace")


def lines_of_text(text: str, name: str) -> Iterator[Line]:
    """The lines of a text that is there already; `name` stands for a file's."""
    for number, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST:
            yield Line(Where(name, number), line[:LONGEST], cut=True)
        elif line:
            yield Line(Where(name, number), line.removesuffix("\r"))


def lines_of(stream: IO[bytes], name: str) -> Iterator[Line]:
    """The lines of a binary stream, empty ones left out.

    InspectError: the stream can't be read, or its compression is broken. That comes when it is met, behind the lines
    in front of it.
    """
    number = 0
    try:
        while data := stream.readline(LONGEST):
            number += 1
            cut = len(data) == LONGEST and not data.endswith(b"\n")
            while cut and (rest := stream.readline(LONGEST)) and not rest.endswith(b"\n"):
                pass
            text = decode(data.rstrip(b"\r\n"))
            if text:
                yield Line(Where(name, number), text, cut)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InspectError(f"{name}:{number + 1}: can't be read: {reason}") from error


def open_text(path: str | os.PathLike[str]) -> tuple[IO[bytes], bool]:
    """A file for `lines_of` ("-": standard input), unpacked where it is gzip; and whether it looks like no text.

    InspectError.
    """
    name = os.fspath(path)
    try:
        stream: Any = sys.stdin.buffer if name == "-" else Path(name).open("rb")  # noqa: SIM115
        if not hasattr(stream, "peek"):
            stream = io.BufferedReader(stream)
        head = stream.peek(PEEK)[:PEEK]
        if head[:2] == b"\x1f\x8b":
            unpacked = io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=stream)))
            head = unpacked.peek(PEEK)[:PEEK]
            return unpacked, b"\0" in head
        return stream, b"\0" in head
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InspectError(f"{name}: can't be read: {reason}") from error


def files_under(path: str | os.PathLike[str]) -> list[str]:
    """A file itself, or the files below a directory by name; links and special files are left out. InspectError."""
    name = os.fspath(path)
    if name == "-" or not os.path.isdir(name):
        if name != "-" and not os.path.exists(name):
            raise InspectError(f"{name}: No such file or directory")
        return [name]
    found = []

    def give_up(error: OSError) -> None:
        raise InspectError(f"{error.filename}: {error.strerror}")

    for directory, directories, files in os.walk(name, onerror=give_up):
        directories.sort()
        for file in sorted(files):
            full = os.path.join(directory, file)
            if os.path.isfile(full) and not os.path.islink(full):
                found.append(full)
    return found


# -- what stands in front of a line ------------------------------------------------------------------------------------

# The console's prefix, with the hypervisor's own time behind it in any of its forms (console_timestamps=).
XEN: Final = re.compile(r"\(XEN\) ?(?:\[[^\]]{1,64}\] ?)?")
# Mail quoting; a kernel's time; syslog's and journald's; ISO times.
PREFIXES: Final = re.compile(
    r"""(?:>[> ]*(?=\S))?
        (?:\[[ \d.:TZ+-]{3,40}\][ ]?
          |(?:[A-Z][a-z]{2}[ ]{1,2}\d{1,2}[ ]\d{2}:\d{2}:\d{2}
            |\d{4}-\d{2}-\d{2}[T ][\d:.,]{8,18}(?:Z|[ ]?[+-]\d{2}:?\d{2})?)
           [ ](?:[\w.-]{1,64}[ ][\w./()\[\]-]{1,64}:[ ])?
           (?:\[[ \d.]{3,20}\][ ]?)?
        )?""",
    re.VERBOSE,
)


def messages(text: str) -> list[tuple[str, bool]]:
    """What a line says without the hypervisor's prefix, and whether there was one.

    Consoles run two messages into one line: each "(XEN)" begins another.
    """
    if "(XEN)" not in text:
        return [(text, False)]
    parts = XEN.split(text)
    return [(part, i > 0) for i, part in enumerate(parts) if part.strip() and (i > 0 or not _is_prefix(part))]


def _is_prefix(text: str) -> bool:
    """Nothing but a time and a host in front of "(XEN)"."""
    match = PREFIXES.match(text[:256])
    return match is not None and not text[match.end() :].strip(" >:")


def without_prefix(text: str) -> str:
    """The line without time and host in front of it; as it is, where there are none."""
    match = PREFIXES.match(text[:256])
    return text[match.end() :] if match else text

"""TOML files as text, and where in one a value stands: the standard library's parser gives values without lines."""

from __future__ import annotations

import re
from typing import Final

Path = tuple[str | int, ...]
"""Keys and, for arrays of tables, indexes: ("domain", 0, "disk", 1, "size")."""

_PART = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_PART}(?:\s*\.\s*{_PART})*"
_HEADER: Final = re.compile(rf"\s*(\[\[?)\s*({_DOTTED})\s*\]\]?\s*(?:#.*)?$")
_KEY: Final = re.compile(rf"\s*({_DOTTED})\s*=")
_NEXT_TOKEN: Final = re.compile(r'"""|' + r"'''" + r"""|"(?:\\.|[^"\\])*"|'[^']*'|[\[\]{}#]""")


def read_text(name: str, most: int, what: str, error: type[Exception]) -> str:
    """A file's text, of `most` bytes; `what` it should be, and the `error` that says in one line why it can't."""
    try:
        with open(name, "rb") as file:
            data = file.read(most + 1)
    except OSError as failure:
        raise error(f"{name}: {failure.strerror}") from None
    if len(data) > most:
        raise error(f"{name}: longer than {most >> 20} MiB: that is no {what}")
    try:
        return data.decode()
    except UnicodeDecodeError as failure:
        raise error(f"{name}:{data[: failure.start].count(10) + 1}: expected UTF-8 text") from None


def line_of(text: str, path: Path) -> int:
    """The line (from 1) of the value at `path` in a valid TOML text; of the nearest thing around it where it has none.

    What is inside an inline table or array is at the line of the key that it belongs to.
    """
    lines = _lines(text)
    for length in range(len(path), 0, -1):
        if (line := lines.get(path[:length])) is not None:
            return line
    return 1


def _lines(text: str) -> dict[Path, int]:
    found: dict[Path, int] = {}
    arrays: dict[Path, int] = {}  # how many tables of an array there have been
    table: Path = ()
    open_string, depth = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        starts = not open_string and depth == 0
        if starts and (header := _HEADER.match(line)):
            path = _resolve(_parts(header[2]), arrays)
            if header[1] == "[[":
                found.setdefault(path, number)
                arrays[path] = arrays.get(path, -1) + 1
                path = (*path, arrays[path])
            table = path
            for length in range(1, len(path) + 1):  # [a.b] makes a table a, too
                found.setdefault(path[:length], number)
            continue
        if starts and (key := _KEY.match(line)):
            path = table
            for part in _parts(key[1]):
                path = (*path, part)
                found.setdefault(path, number)
        open_string, depth = _scan(line, open_string, depth)
    return found


def _parts(dotted: str) -> list[str]:
    return [part.strip("\"'") for part in re.findall(_PART, dotted)]


def _resolve(parts: list[str], arrays: dict[Path, int]) -> Path:
    """A header's path, with the index of the last table of each array on the way."""
    path: Path = ()
    for i, part in enumerate(parts):
        path = (*path, part)
        if i < len(parts) - 1 and path in arrays:
            path = (*path, arrays[path])
    return path


def _scan(line: str, open_string: str, depth: int) -> tuple[str, int]:
    """What is still open at the end of a line: a multi-line string's delimiter, and brackets."""
    at = 0
    while at < len(line):
        if open_string:
            end = line.find(open_string, at)
            if end < 0:
                return open_string, depth
            at, open_string = end + len(open_string), ""
            continue
        token = _NEXT_TOKEN.search(line, at)
        if token is None or token[0] == "#":
            break
        at = token.end()
        if token[0] in ('"""', "'''"):
            open_string = token[0]
        elif token[0] in "[{":
            depth += 1
        elif token[0] in "]}":
            depth -= 1
    return open_string, depth

"""Settings of a scenario file as dataclass fields: what a value may be, in which unit, and what it is for.

A settings class is a dataclass whose fields are made by `setting`. `parse` fills one from a TOML table, and `describe`
says what can be in it, so that the help can't differ from what is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

from pvirq.scenario.toml_lines import Path

T = TypeVar("T")

_UNITS_NS: Final = {
    "ns": 1, "us": 1000, "ms": 1_000_000, "s": 1_000_000_000, "min": 60_000_000_000, "h": 3600_000_000_000,
}  # fmt: skip
_UNITS_BYTES: Final = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MISSING: Final = object()


class Unexpected(Exception):
    """A value is not what it should be: `path` says which one, the text what was expected."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        super().__init__(why)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a value may be: `parse(value, path)` returns it in its unit, or raises Unexpected; `text` is for people."""

    text: str
    parse: Callable[[Any, Path], Any]


def _expect(condition: bool, path: Path, kind: str, value: object) -> None:
    if not condition:
        raise Unexpected(path, f"expected {kind}, not {_show(value)}")


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list):
        return "a list"
    return f'"{value}"' if isinstance(value, str) else str(value)


def integer(low: int, high: int) -> Kind:
    text = f"a whole number from {low} to {high}"

    def parse(value: Any, path: Path) -> int:
        _expect(type(value) is int and low <= value <= high, path, text, value)
        return int(value)

    return Kind(text, parse)


def fraction() -> Kind:
    text = "a number from 0 to 1"

    def parse(value: Any, path: Path) -> float:
        _expect(type(value) in (int, float) and 0 <= value <= 1, path, text, value)
        return float(value)

    return Kind(text, parse)


def string() -> Kind:
    def parse(value: Any, path: Path) -> str:
        _expect(isinstance(value, str) and value != "", path, "a text", value)
        return str(value)

    return Kind("a text", parse)


def boolean() -> Kind:
    def parse(value: Any, path: Path) -> bool:
        _expect(isinstance(value, bool), path, "true or false", value)
        return bool(value)

    return Kind("true or false", parse)


def choice(*options: str) -> Kind:
    text = "one of " + ", ".join(f'"{option}"' for option in options) if len(options) > 1 else f'"{options[0]}"'

    def parse(value: Any, path: Path) -> str:
        _expect(value in options, path, text, value)
        return str(value)

    return Kind(text, parse)


def duration() -> Kind:
    """Virtual time, in ns."""
    text = 'a time such as "20ms", "1.5s" or "10min"'

    def parse(value: Any, path: Path) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s|min|h)", value) if isinstance(value, str) else None
        if match is None:
            raise Unexpected(path, f"expected {text}, not {_show(value)}")
        return int(float(match[1]) * _UNITS_NS[match[2]])

    return Kind(text, parse)


def size(low: int, high: int) -> Kind:
    """Bytes."""
    text = f'a size such as 512, "4K" or "64M", from {low} to {high} bytes'

    def parse(value: Any, path: Path) -> int:
        match = re.fullmatch(r"(\d+)\s*([KMG]?)(?:i?B)?", str(value)) if type(value) in (int, str) else None
        number = int(match[1]) * _UNITS_BYTES[match[2]] if match else -1
        _expect(low <= number <= high, path, text, value)
        return number

    return Kind(text, parse)


def one_or_more(kind: Kind) -> Kind:
    """A value or a list of such; always a list afterwards."""

    def parse(value: Any, path: Path) -> list[Any]:
        values = value if isinstance(value, list) else [value]
        _expect(bool(values), path, f"{kind.text}, or several", value)
        return [kind.parse(one, path) for one in values]

    return Kind(f"{kind.text}, or a list of such", parse)


def either(*kinds: Kind) -> Kind:
    """The first of the kinds that a value fits."""
    text = ", or ".join(kind.text for kind in kinds)

    def parse(value: Any, path: Path) -> Any:
        for kind in kinds:
            try:
                return kind.parse(value, path)
            except Unexpected:
                continue
        raise Unexpected(path, f"expected {text}, not {_show(value)}")

    return Kind(text, parse)


def raw_table() -> Kind:
    """A table whose keys somebody else knows; its path goes with it, under the key None."""

    def parse(value: Any, path: Path) -> dict[Any, Any]:
        _expect(isinstance(value, Mapping), path, "a table", value)
        return {**value, None: path}

    return Kind("a table", parse)


def table(cls: type[T]) -> Kind:
    """A table of settings."""
    return Kind("a table", lambda value, path: parse(cls, value, path))


def tables(kind: Kind) -> Kind:
    """A list of tables."""

    def parse(value: Any, path: Path) -> list[Any]:
        _expect(isinstance(value, list), path, "a list of tables", value)
        return [kind.parse(one, (*path, i)) for i, one in enumerate(value)]

    return Kind("a list of tables", parse)


def setting(kind: Kind, about: str, default: Any = _MISSING, *, key: str = "") -> Any:
    """A dataclass field for a value of `kind`; without a `default` it must be given. `key`: its name in the file."""
    metadata = {"kind": kind, "about": about, "key": key}
    if default is _MISSING:
        return dataclasses.field(metadata=metadata, kw_only=True)
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata, kw_only=True)
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


def _settings(cls: type[Any]) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    for field in dataclasses.fields(cls):
        if "kind" in field.metadata:
            yield field.metadata["key"] or field.name, field


def parse(cls: type[T], value: object, path: Path, known: Iterable[str] = ()) -> T:
    """Fill a settings class from a table. Unexpected for a wrong value, a missing one, or a key that isn't `known`."""
    if not isinstance(value, Mapping):
        raise Unexpected(path, f"expected a table, not {_show(value)}")
    settings = dict(_settings(cls))
    allowed = [*settings, *known]
    for key in value:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f'did you mean "{near[0]}"?' if near else "expected one of " + ", ".join(allowed)
            raise Unexpected((*path, key), f'unknown key "{key}": {hint}')
    arguments = {}
    for key, field in settings.items():
        if key in value:
            arguments[field.name] = field.metadata["kind"].parse(value[key], (*path, key))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Unexpected(path, f'expected a key "{key}" here: {field.metadata["about"]}')
    return cls(**arguments)


def describe(cls: type[Any]) -> list[tuple[str, str, str]]:
    """(key, what it may be, what it is for) of each setting of a class."""
    return [(key, field.metadata["kind"].text, field.metadata["about"]) for key, field in _settings(cls)]

"""The values that rules are made of, as text and as numbers: times, counts, shares, names."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pvirq.abi import grant_table
from pvirq.abi.errno import Errno

Value = int | float | str
UNITS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
TIME: Final = re.compile(r"([+-]?)(\d{1,18}(?:\.\d{1,9})?)(ns|us|ms|s)", re.ASCII)
GRANT_ERRORS: Final = {
    name: value for name, value in vars(grant_table).items() if name.startswith("GNTST_") and value < 0
}  # fmt: skip


class FaultError(ValueError):
    """A rule that can't be: one line."""


@dataclass(frozen=True)
class Form:
    """One kind of value: `shown` is how a table of parameters calls it.

    `parse` reads it from text, `check` takes it from a program; both raise FaultError. `write` is its text.
    """

    shown: str
    parse: Callable[[str], Value]
    check: Callable[[object], Value]
    write: Callable[[Value], str] = str


def parse_time(text: str) -> int:
    """ "5ms" in ns; FaultError."""
    match = TIME.fullmatch(text)
    if match is None:
        raise FaultError(f"{text!r} is no time: expected a number and a unit, as in 250us, 5ms or 1.5s")
    sign, number, unit = match.groups()
    whole, _, fraction = number.partition(".")
    ns, rest = divmod(int(whole + fraction) * UNITS[unit], 10 ** len(fraction))
    if rest:
        raise FaultError(f"{text!r} is finer than a nanosecond")
    return int(-ns if sign == "-" else ns)


def time_text(value: Value) -> str:
    """The same back, in the largest unit in which it is a whole number."""
    ns = int(value)
    unit = next(unit for unit in ("s", "ms", "us", "ns") if not ns % UNITS[unit])
    return f"{ns // UNITS[unit]}{unit}"


def _whole(value: object, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise FaultError(f"{value!r} is no {what}" + (f" (at least {least})" if isinstance(value, int) else ""))
    return value


def _number(text: str) -> int:
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise FaultError(f"{text!r} is no number")
    return int(text)


def time(least: int = 0) -> Form:
    """ns, `least` or more."""

    def check(value: object) -> int:
        return _whole(value, least, "time in ns")

    return Form("TIME", lambda text: check(parse_time(text)), check, time_text)


def signed_time() -> Form:
    """ns, forward or back."""

    def check(value: object) -> int:
        return _whole(value, -(1 << 62), "time in ns")

    return Form("TIME", parse_time, check, time_text)


def number(least: int = 0) -> Form:
    """A whole number."""

    def check(value: object) -> int:
        return _whole(value, least, "number")

    return Form("N", lambda text: check(_number(text)), check)


def share() -> Form:
    """A number between 0 and 1, which are two of them."""

    def check(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise FaultError(f"{value!r} is not between 0 and 1")
        return float(value)

    def parse(text: str) -> float:
        try:
            return check(float(text))
        except ValueError:
            raise FaultError(f"{text!r} is not between 0 and 1") from None

    return Form("SHARE", parse, check, lambda value: repr(float(value)))


def choice(*words: str) -> Form:
    """One of some words."""

    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise FaultError(f"{value!r} is none of {', '.join(words)}")
        return value

    return Form("|".join(words), check, check)


def name(shown: str) -> Form:
    """Any name."""

    def check(value: object) -> str:
        if not isinstance(value, str) or not value:
            raise FaultError(f"{value!r} is no {shown.lower()}")
        return value

    return Form(shown, check, check)


def domain() -> Form:
    """A domain by id or name."""

    def check(value: object) -> int | str:
        if isinstance(value, str) and value:
            return value
        return _whole(value, 0, "domain")

    def parse(text: str) -> int | str:
        return int(text) if re.fullmatch(r"\d{1,5}", text, re.ASCII) else check(text)

    return Form("DOMAIN", parse, check)


def error() -> Form:
    """An errno's name, or that of a grant operation's status; a program may give an `Errno` as well."""

    def check(value: object) -> str:
        if isinstance(value, Errno):
            return value.name
        if isinstance(value, str) and (value in Errno.__members__ or value in GRANT_ERRORS):
            return value
        if isinstance(value, int) and not isinstance(value, bool) and value in list(Errno):
            return Errno(value).name
        raise FaultError(f"{value!r} is no error: expected a name such as ENOSPC or GNTST_bad_gntref")

    return Form("ERROR", check, check)

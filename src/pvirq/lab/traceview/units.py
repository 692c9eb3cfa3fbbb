"""Times of traces as people read and write them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

UNITS_NS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "min": 60_000_000_000}


def duration(ns: int) -> str:
    """Three digits and a unit: "850ns", "12.3us", "1.23ms", "45.6s"."""
    for unit in ("ns", "us", "ms"):
        value = ns / UNITS_NS[unit]
        if value < 999.5:
            return f"{ns}ns" if unit == "ns" else f"{_three(value)}{unit}"
    return f"{_three(ns / UNITS_NS['s'])}s"


def _three(value: float) -> str:
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def moment(ns: int) -> str:
    """A point of time to the nanosecond, in ms: "1234.567890 ms"."""
    return f"{ns // 1_000_000}.{ns % 1_000_000:06d} ms"


def parse_time(text: str) -> int:
    """ "1.5s", "20ms", "300us", "5000ns" or "2min" in ns; ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*(ns|us|ms|s|min)", text.strip())
    if match is None:
        raise ValueError(f'expected a time such as "20ms" or "1.5s", not {text!r}')
    return int(Fraction(match[1]) * UNITS_NS[match[2]])

"""States as numbers: quick to make from one another, to keep and to look up.

The values that an index of a state takes are numbered as they come, and each index has a field of so many bits. A move
changes some fields, so the state after it is `state & keep | put`; what a process can do hangs on some fields, so it is
found by `state & fields`.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from struct import Struct
from typing import Any, Final

from pvirq.check.system import State

_CODES: Final = {8: "B", 16: "H", 32: "I", 64: "Q"}  # of struct


class Full(Exception):
    """An index of the state has taken more values than there are numbers in its field."""


class Numbers:
    """All states of a system that were met."""

    def __init__(self, size: int, bits: int) -> None:
        self.bits = bits
        self.all = (1 << size * bits) - 1  # all fields
        self._fields = Struct(f"<{size}{_CODES[bits]}")
        self._numbers: list[dict[Any, int]] = [{} for _ in range(size)]
        self._values: list[list[Any]] = [[] for _ in range(size)]

    def put(self, index: int, value: Any) -> int:
        """A value in its field."""
        values = self._values[index]
        number = self._numbers[index].setdefault(value, len(values))
        if number == len(values):
            if number >> self.bits:
                raise Full
            values.append(value)
        return number << index * self.bits

    def fields(self, indices: Iterable[int]) -> int:
        """All bits of these fields."""
        return sum((1 << self.bits) - 1 << index * self.bits for index in indices)

    def number(self, state: State) -> int:
        return sum(self.put(index, value) for index, value in enumerate(state))

    def state(self, number: int) -> State:
        fields = self._fields.unpack(number.to_bytes(self._fields.size, "little"))
        return tuple(map(getitem, self._values, fields))

"""What an engine notes of a guest without calling Python: calls of functions, returns from them, some hypercalls.

notes.c is the machine code; this is what it shares with Python. A `Book` is what notes are put down in, by whoever
wants them; `Calls` are what one engine looks for, a `Site` being one function or one place to which calls return. Each
call is asked about once (`pvirq.engine.protocol.Engine.watch`), and from then on noted as it was said.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from pvirq.engine.protocol import Slot

# struct note: lengths of two lists, number, ticks; a hypercall with its six arguments, and its result.
NOTE_ITEMS: Final = 12
NOTE_FORM: Final = struct.Struct(f"<{NOTE_ITEMS}Q")
FINISHED, READ = 1 << 32, 1 << 33
# struct book
USED, ROOM, TAKEN, EVENTS_AT, VALUES_AT = range(5)
NOTE: Final = 5
MOST_NOTES: Final = 4096  # in a book
# struct site
CPU, ASK, SITE_FIRST, SITE_SECOND, SIZE, RETURNS = range(6)
SITE_ITEMS: Final = 6
# struct side
SIDE_VCPU, HYPERCALLS, UPCALLS, DEPTH = range(4)
SIDE_ITEMS: Final = 4 + 2 * 8
# struct calls
BOOK, FULL, GENERATION, ASKED, SIDES, SIDE, HYPERCALLS_THERE, SIZES = range(8)
OPERATIONS: Final = 16
BACKS: Final = SIZES + OPERATIONS
BACK: Final = BACKS + 1
MOST_RETURNS: Final = 64
KNOWN: Final = BACK + MOST_RETURNS
KNOWN_ITEMS: Final = 1024 * (7 + 256 // 8)
SEEN: Final = 256  # bytes behind a call's first argument that can be compared

M64: Final = (1 << 64) - 1


class Book:
    """Notes among what Python appends to two lists meanwhile: each says how long those were.

    `full` is called when it is, while a guest runs, to `take` them.
    """

    _books = 0

    def __init__(self, events: list[Any], values: list[Any], full: Callable[[], None]) -> None:
        self._lists = events, values
        self.full = full
        self._struct = (ctypes.c_uint64 * (NOTE + MOST_NOTES * NOTE_ITEMS))()
        self.address = ctypes.addressof(self._struct)
        self.items = items = memoryview(self._struct).cast("B").cast("Q")
        Book._books += 1
        items[ROOM], items[TAKEN] = MOST_NOTES, Book._books << 32  # told from that of others which lay here
        items[EVENTS_AT], items[VALUES_AT] = map(_length_of, (events, values))

    @staticmethod
    def of(events: list[Any], values: list[Any], full: Callable[[], None]) -> Book | None:
        """None where a list's length can't be looked at from outside of Python."""
        probe: list[None] = []
        length = ctypes.c_ssize_t.from_address(_length_of(probe))
        before = length.value
        probe += [None] * 77
        return Book(events, values, full) if (before, length.value) == (0, 77) else None

    @property
    def used(self) -> int:
        return self.items[USED]

    def take(self) -> bytes:
        """All notes since the last time, one after the other, each as `NOTE_FORM` has it."""
        items = self.items
        taken = bytes(items[NOTE : NOTE + items[USED] * NOTE_ITEMS])
        items[USED] = 0
        items[TAKEN] += 1
        return taken


def _length_of(items: list[Any]) -> int:
    """Where CPython has it: behind what every object begins with."""
    return id(items) + object.__basicsize__


class Site:
    """A function that is watched, or an address to which calls return; see `Calls`."""

    def __init__(self, function: int, items: Sequence[int]) -> None:
        self.function = function  # the hook
        self._struct = (ctypes.c_uint64 * SITE_ITEMS)(*items)
        self.address = ctypes.addressof(self._struct)

    def ask(self, callback: Any) -> None:
        """A ctypes function, to be called for what isn't known."""
        self._struct[ASK] = ctypes.cast(callback, ctypes.c_void_p).value or 0


class Calls:
    """What one engine notes by itself, from `begin` to `end`."""

    def __init__(
        self, cpu: int, on_call: int, on_return: int, know: int, *, fail: Callable[[BaseException], None]
    ) -> None:
        """The address of the engine's struct cpu, and those of three functions of notes.c. `fail` is told of what is
        raised while the engine runs."""
        self._cpu, self._on_call, self._on_return = cpu, on_call, on_return
        self._know = ctypes.PYFUNCTYPE(None, *[ctypes.c_uint64] * 3)(know)
        self._struct = (ctypes.c_uint64 * (KNOWN + KNOWN_ITEMS))()
        self.address = ctypes.addressof(self._struct)
        self._items = memoryview(self._struct).cast("B").cast("Q")
        self._sides: dict[int, int] = {}  # by a slot's address: where its struct side is
        self._book: Book | None = None

        def full() -> None:
            try:
                if self._book is not None:
                    self._book.full()
            except BaseException as failure:
                fail(failure)

        self._full = ctypes.CFUNCTYPE(None)(full)
        self._items[FULL] = ctypes.cast(self._full, ctypes.c_void_p).value or 0

    def begin(self, book: Book, generation: int, slots: Sequence[Slot]) -> None:
        """Nothing is known yet. What is said of calls is good until the number at the address `generation` changes;
        `slots` are those of the CPUs whose calls are noted."""
        self.end()
        self._side_items = (ctypes.c_uint64 * (SIDE_ITEMS * len(slots)))()
        at = ctypes.addressof(self._side_items)
        self._sides = {slot.address: i * SIDE_ITEMS for i, slot in enumerate(slots)}
        for address, where in self._sides.items():
            self._side_items[where + SIDE_VCPU] = address
        items = self._items
        items[GENERATION], items[SIDES], items[SIDE] = generation, len(slots), at
        self._book, items[BOOK] = book, book.address

    def end(self) -> None:
        """Nothing is noted any more."""
        self._items[BOOK] = self._items[SIDES] = self._items[BACKS] = self._items[ASKED] = 0
        self._book = None
        self.forget()

    def forget(self) -> None:
        """Ask again about each call."""
        ctypes.memset(self.address + KNOWN * 8, 0, KNOWN_ITEMS * 8)

    def entry(self, *, first: int = M64, second: int = 0, size: int = 0, returns: bool = False) -> Site | None:
        """A function, for `Engine.watch`. A call is told from others by those bits of its first and second arguments,
        and by `size` bytes that the first points to; None where those are too many. `returns`: so are its returns."""
        items = (self._cpu, 0, first, second, size, returns)
        return Site(self._on_call, items) if self._book is not None and size <= SEEN else None

    def back(self, va: int) -> Site | None:
        """An address to which such calls return, likewise; None where there are too many."""
        items = self._items
        count = items[BACKS]
        if self._book is None or count >= MOST_RETURNS:
            return None
        items[BACK + count], items[BACKS] = va, count + 1
        return Site(self._on_return, (self._cpu, 0, 0, 0, 0, 0))

    def know(self, site: Site, enter: int, leave: int) -> None:
        """While Python is being asked about a call: note `enter` of the next one like it, and `leave` when it returns.

        Those are a note's `NUMBER` and one more; 0 for none.
        """
        self._know(site.address, enter, leave)

    def note_hypercalls(self, slot: Slot, number: int, count: int, sizes: Mapping[int, int]) -> None:
        """A slot that has `SHORT_HYPERCALLS` say `NOTED` makes hypercalls: `number` likewise is what is noted of those
        with numbers below `count`. `sizes` are how much to note of what event channel operations point to."""
        self._side_items[self._sides[slot.address] + HYPERCALLS] = number
        items = self._items
        items[HYPERCALLS_THERE] = count
        for operation, size in sizes.items():
            items[SIZES + operation] = size

    def note_upcalls(self, slot: Slot, number: int) -> None:
        """The same of each `Engine.upcall` that is done."""
        self._side_items[self._sides[slot.address] + UPCALLS] = number

    def asked(self, count: int) -> None:
        """Python was asked about so many calls and waits for them to return."""
        self._items[ASKED] = count

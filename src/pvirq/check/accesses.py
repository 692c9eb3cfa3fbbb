"""What moves touch, made ready for the reduced search: what its table has to have for that, and where.

The table has a mask of moves at each index. Which there are is seen on the way: two for each thing that was touched
(three for a lock), and one for each kind of access to it that was met.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from pvirq.check.system import Mode, System, Touch

# By the mode of the later of two moves, those of earlier ones that it races. (What takes a lock can't come before what
# gave it back; nor are there two to give it back.)
_RACES: Final = {
    Mode.READ: {Mode.WRITE, Mode.TAKE, Mode.SHARE, Mode.GIVE, Mode.LEAVE},
    Mode.WRITE: set(Mode),
    Mode.TAKE: {Mode.READ, Mode.WRITE, Mode.TAKE, Mode.SHARE},
    Mode.SHARE: {Mode.READ, Mode.WRITE, Mode.TAKE},
    Mode.GIVE: {Mode.READ, Mode.WRITE},
    Mode.LEAVE: {Mode.READ, Mode.WRITE},
}


class Kind(NamedTuple):
    """A kind of access: its mode, the locks that are held (as writer, as reader) or taken with it, and by whom, if
    there are any (else -1)."""

    mode: Mode
    writer: int
    reader: int
    thread: int


class Plan(NamedTuple):
    """What is done in the table where a move touches what it touches."""

    checks: list[int]  # it races these
    bits: int  # of a summary: these races
    after: list[int]  # it happens after these
    marks: list[int]  # these kinds of accesses would race it; more may be met
    sets: list[int]  # it happens before what happens after these, and has happened after all else there
    joins: list[int]  # it happens before what happens after these


class Accesses:
    """The things that moves touch, and the kinds of accesses to each, as indices of a table."""

    def __init__(self, system: System) -> None:
        self.system = system
        # First, of each process the moves that happened before its next one; then, of each thread those that happened
        # before what came out of its buffer.
        self.drained = system.processes
        self.size = system.processes + system.threads
        self.new: list[tuple[int, int, Kind]] = []  # kinds that were met since somebody asked: index, thing
        self._clocks: dict[int, tuple[int, int, tuple[int, ...]]] = {}  # of each thing, indices
        self._kinds: dict[int, list[tuple[int, Kind]]] = {}  # of each thing, with their indices
        self._touching: dict[int, list[tuple[Mode, Touch, list[int]]]] = {}  # of each thing, who does, and its marks
        self._numbers: dict[tuple[int, int], int] = {}  # of these bits
        self.bits: list[tuple[int, int]] = []  # of a summary: a process, and the index of what it races

    def plan(self, touch: Touch) -> Plan:
        system = self.system
        writer, reader = touch.held
        for thing, mode in touch.may:
            # Who is to take a lock comes after all that is done while others hold it.
            writer |= (mode is Mode.TAKE) << thing
            reader |= (mode is Mode.SHARE) << thing
        thread = system.thread(touch.process) if writer | reader else -1
        checks = [self._kind(thing, Kind(mode, writer, reader, thread)) for thing, mode in touch.may]
        plan = Plan(checks, self._summary(touch.process, checks), [], [], [], [])
        for thing, mode in touch.things:
            changed, read, shared = self._clock(thing)
            plan.after.append(changed)
            if mode is Mode.READ:
                plan.joins.append(read)
                plan.after.extend(shared)
            elif mode in (Mode.SHARE, Mode.LEAVE):
                plan.after.append(read)
                plan.joins.extend(shared)
            else:
                plan.after.extend((read, *shared))
                plan.sets.append(changed)
            plan.marks.extend(index for index, kind in self._kinds.get(thing, ()) if self.races(kind, mode, touch))
            self._touching.setdefault(thing, []).append((mode, touch, plan.marks))
        return plan

    def races(self, kind: Kind, mode: Mode, touch: Touch) -> bool:
        """Whether an access races an earlier one of the same thing: none orders them."""
        if mode not in _RACES[kind.mode]:
            return False
        writers, readers = touch.held
        if not (kind.writer & (writers | readers) or kind.reader & writers):
            return True
        return kind.thread == self.system.thread(touch.process)

    def _summary(self, process: int, checks: list[int]) -> int:
        bits = 0
        for index in checks:
            number = self._numbers.setdefault((process, index), len(self.bits))
            if number == len(self.bits):
                self.bits.append((process, index))
            bits |= 1 << number
        return bits

    def _clock(self, thing: int) -> tuple[int, int, tuple[int, ...]]:
        """Where the table has what happened before the moves that changed a thing last, those that have read it, and
        for a lock those that share it."""
        found = self._clocks.get(thing)
        if found is None:
            first = self.size
            lock = thing < self.system.variables and self.system.model.variables[thing].lock
            found = self._clocks[thing] = first, first + 1, (first + 2,) if lock else ()
            self.size += 3 if lock else 2
        return found

    def _kind(self, thing: int, kind: Kind) -> int:
        """Where the table has the latest moves that such an access would race."""
        kinds = self._kinds.setdefault(thing, [])
        for index, known in kinds:
            if known == kind:
                return index
        index = self.size
        self.size += 1
        kinds.append((index, kind))
        self.new.append((index, thing, kind))
        for mode, touch, marks in self._touching.get(thing, ()):
            if self.races(kind, mode, touch):
                marks.append(index)
        return index

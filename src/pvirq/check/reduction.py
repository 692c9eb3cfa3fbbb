"""The exhaustive search with dynamic partial-order reduction and state hashing.

Two moves that touch nothing in common lead to the same state in either order, and one order is enough. Which orders
matter is seen on the way (Flanagan and Godefroid, "Dynamic partial-order reduction for model checking software", 2005):
where a move meets an earlier one of another process that it depends on, and nothing forces their order, the state
before that one is left in the other order as well. A state that was met before isn't searched again; what is below it
may depend on the way to it, so what each process touches there is kept (a summary; Yang, Chen, Gopalakrishnan and
Kirby, "Efficient stateful dynamic partial order reduction", 2008), and the states before all of the way's moves that
depend on that are left in another order too.

What makes it narrow:

- Of the earlier of two moves counts what it does where it is taken: one that changes nothing has only read. That is
  right because moves that are independent of it can't change what it reads, so it does the same after them. Of the
  later one counts all that it may do, as it may do something else where it comes first.
- A race is looked for when a move is taken. A process that can't go on is looked at whenever what it waits for has
  changed: it could perhaps go on before that.
- Of the earlier moves that an access races only the latest count, those that happened before no other one: if those are
  ordered with it, so are the others.
- Moves of two processes that hold the same lock are ordered already, by the lock. Taking a lock can't come before its
  release, and those who read under a rwlock come and go in any order.

That is sound while no way leads back into itself.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, Final

from pvirq.check.result import Failure, Result, Watch
from pvirq.check.system import Edge, Mode, State, System, Touch


class Circle(Exception):
    """A way leads back into itself."""


class _Level:
    """A state on the way, and what is to be done from it. What says "mask" has a bit a process."""

    __slots__ = (
        "chosen", "edges", "enabled", "free", "left", "process", "state", "summary", "todo", "undo", "waits",
    )  # fmt: skip

    def __init__(self, state: State, edges: list[Edge], enabled: int, free: int, waits: int, todo: int) -> None:
        self.state = state
        self.edges = edges  # of each process
        self.enabled = enabled  # mask of those that can go on
        self.free = free  # mask of those whose next move touches nothing that others see
        self.waits = waits  # mask of those that others may let go on
        self.summary = 0
        self.todo = todo  # mask of those that are to be taken on
        self.left = todo  # mask of those that haven't been
        self.process = -1  # that is being searched
        self.chosen = 0  # how many of its choices have been
        self.undo: tuple[tuple[int, ...], tuple[Any, ...]] | None = None  # of the table, for the move that was taken


class _Compiled:
    """What is done where a move touches what it touches: indices of the table, and bits of a summary."""

    __slots__ = (
        "after", "bits", "checks", "drained", "joins", "marks", "pop", "push", "saved", "saves", "sets", "stores",
        "version",
    )  # fmt: skip

    after: tuple[int, ...]  # it happens after these
    bits: int
    checks: tuple[int, ...]  # it races these
    joins: tuple[int, ...]  # it happens before what happens after these
    marks: tuple[int, ...]  # these kinds of accesses would race it
    drained: int
    pop: tuple[int, int, int] | None
    push: int
    stores: bool  # there is `pop`, or `drained` is to be asked
    saved: Callable[[list[Any]], tuple[Any, ...]]  # what is there
    saves: tuple[int, ...]  # all that it changes
    sets: tuple[int, ...]  # as `joins`, and it has happened after all else there
    version: int


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


# A kind of access: its mode, the locks that are held (as writer, as reader), or taken with it, and if there are any by
# whom.
_Kind = tuple[Mode, int, int, int]


class Reduced:
    """A search. Bit i of a mask of moves stands for the i-th move of the way.

    `table` has all that changes with the way: of each process the moves that happened before its next one; of each
    buffer the moves that happened before each of its stores, and before those that came out of it; of each kind of
    access (thing, mode, locks held) the latest moves that it would race; of each thing the moves that happened before
    those that changed it last, that have read it, and that share it (a rwlock).
    """

    def __init__(self, system: System, result: Result, watch: Watch) -> None:
        self.system = system
        self.result = result
        self.watch = watch
        self.way: list[_Level] = []
        self.table: list[Any] = [0] * system.processes + [()] * system.threads + [0] * system.threads
        self.version = 0  # of what was compiled: how many kinds of accesses are known
        self.kinds: dict[int, list[tuple[int, _Kind]]] = {}  # of each thing: index in the table
        self.clocks: dict[int, tuple[int, int, int]] = {}  # of each thing: indices in the table
        self.bits: dict[tuple[int, int], int] = {}  # of a summary: process, what it races
        self.bit_list: list[tuple[int, int]] = []
        self.decoded: dict[int, list[tuple[int, list[int]]]] = {}
        self.moved = [0] * system.processes  # moves of this process
        self.has = [0] * system.processes  # levels from which it is taken on
        self.saturated = 0  # levels from which all are
        self.looking: dict[int, list[int]] = {}  # buffers that look at what changes
        self.enough = False
        self.pause = watch.next(result)  # at so many states

    def run(self) -> None:
        system, result, way, table, moved = self.system, self.result, self.way, self.table, self.moved
        watched, unsound, arrive, take = system.watched, system.unsound, self._arrive, self._take
        met: dict[State, int] = {system.initial: -1}  # what each process touches from there on; -1: on the way
        wrong = system.broken(system.initial) or self._start()
        while wrong is None and not self.enough:
            level = way[-1]
            # The next move of this state.
            process = level.process
            if process < 0 or level.chosen == len(level.edges[process].moves):
                if not level.left:
                    met[level.state] = self._leave()
                    if not way:
                        result.complete = True
                        return
                    continue
                here = 1 << len(way) - 1
                if process >= 0:
                    moved[process] ^= here
                bit = level.left & -level.left
                level.left ^= bit
                process = level.process = bit.bit_length() - 1
                level.chosen = 0
                moved[process] |= here
            edge = level.edges[process]
            changes, mask, place = edge.moves[level.chosen]
            level.chosen += 1
            result.steps += 1
            # What it races.
            compiled = edge.touch.compiled
            if compiled is None or compiled.version != self.version:
                compiled = self._compile(edge.touch)
            level.summary |= compiled.bits
            found = 0
            for index in compiled.checks:
                found |= table[index]
            if found:
                happened = table[process] | self._stores(compiled) if compiled.stores else table[process]
                found &= ~happened
                if found:
                    self._race(process, found.bit_length() - 1, happened)
            # Where it leads.
            new = list(level.state)
            for index, value in changes:
                new[index] = value
            state = tuple(new)
            known = met.get(state)
            take(level, compiled, process)
            if known is not None:
                if known < 0:
                    raise Circle
                if known:
                    level.summary |= known
                    self._meet(known)
                self._back(level)
                continue
            met[state] = -1
            if place is not None and place.broken is not None:
                wrong = system.says(place)
            elif mask & watched:
                wrong = unsound(state)
            ended = arrive(level, state, mask, process)
            wrong = wrong or ended  # what a thread says is wrong, rather than that nobody can go on there
        if wrong is not None:
            result.failure = Failure(wrong, tuple((level.process, level.chosen - 1) for level in way[:-1]))

    # -- states ----------------------------------------------------------------------------------------------------

    def _start(self) -> str | None:
        nothing = _Level(self.system.initial, [self.system.ended] * self.system.processes, 0, 0, 0, 0)
        return self._arrive(nothing, self.system.initial, ~0, 0)

    def _arrive(self, level: _Level, state: State, mask: int, process: int) -> str | None:
        """A new state, where what `mask` says has changed: what can be done there, and what is wrong with it."""
        system, result = self.system, self.result
        edges = level.edges.copy()
        enabled, free, waits = level.enabled, level.free, level.waits
        bit = 1
        for each in range(system.threads):
            place = state[each]
            if place.look & mask or each == process or mask < 0:
                try:
                    edge = place.edges[place.key(state)]
                except KeyError:
                    edge = system.edge(state, each)
                edges[each] = edge
                if edge.moves:
                    enabled |= bit
                    waits &= ~bit
                    if edge.touch.may:
                        free &= ~bit
                    else:
                        free |= bit
                else:
                    enabled &= ~bit
                    free &= ~bit
                    if edge.touch.may:
                        waits |= bit
                        self._waits(each, edge.touch)
                    else:
                        waits &= ~bit
            bit <<= 1
        if system.buffers:
            for each in self._looking(mask):
                edge = edges[each] = system.edge(state, each)
                if edge.moves:
                    enabled |= 1 << each
                else:
                    enabled &= ~(1 << each)
        # Who touches nothing that others see goes first, and nobody need be tried in its place; otherwise who went.
        first = free or (enabled & 1 << process) or enabled
        first &= -first
        new = _Level(state, edges, enabled, free, waits, first)
        while waits:
            bit = waits & -waits
            waits ^= bit
            touch = edges[bit.bit_length() - 1].touch
            new.summary |= (touch.compiled or self._compile(touch)).bits
        depth = len(self.way)
        self.way.append(new)
        result.states += 1
        result.deepest = max(result.deepest, depth)
        if result.states >= self.pause:
            self._pause()
        if not enabled:
            return self.watch.end(system, state, result)
        self.has[first.bit_length() - 1] |= 1 << depth
        if first == enabled:
            self.saturated |= 1 << depth
        return None

    def _looking(self, mask: int) -> list[int]:
        """The buffers that look at what has changed."""
        looking = self.looking.get(mask)
        if looking is None:
            system = self.system
            looking = self.looking[mask] = [
                system.threads + number for number, buffer in enumerate(system.buffers) if buffer.look & mask
            ]
        return looking

    def _pause(self) -> None:
        """So many states were met: somebody may be told, or it is enough."""
        self.enough = self.watch.arrived(self.result)
        self.pause = self.watch.next(self.result)

    def _leave(self) -> int:
        """All that is below a state is searched: its summary."""
        level = self.way.pop()
        here = ~(1 << len(self.way))
        self.saturated &= here
        todo = level.todo
        while todo:
            bit = todo & -todo
            todo ^= bit
            self.has[bit.bit_length() - 1] &= here
        if level.process >= 0:
            self.moved[level.process] &= here
        if self.way:
            self.way[-1].summary |= level.summary
            self._back(self.way[-1])
        return level.summary

    # -- races -----------------------------------------------------------------------------------------------------

    def _stores(self, compiled: _Compiled) -> int:
        """What happened before a move because of a buffer: its store, or all that had to leave it."""
        if compiled.pop is None:
            return int(self.table[compiled.drained])
        index, position, _ = compiled.pop
        return int(self.table[index][position])

    def _waits(self, process: int, touch: Touch) -> None:
        """A process that can't go on: it might have, before what it waits for changed."""
        found = 0
        for index in (touch.compiled or self._compile(touch)).checks:
            found |= self.table[index]
        found &= ~self.table[process]
        if found:
            self._race(process, found.bit_length() - 1, self.table[process])

    def _meet(self, known: int) -> None:
        """A move led to a state that is searched: what is below it may race the way to it."""
        table = self.table
        decoded = self.decoded.get(known)
        if decoded is None:
            decoded = self.decoded[known] = self._decode(known)
        for process, checks in decoded:
            found = 0
            for index in checks:
                found |= table[index]
            if found:
                found &= ~(table[process] | self.has[process] | self.saturated)
                while found:
                    bit = found & -found
                    found ^= bit
                    self._race(process, bit.bit_length() - 1, table[process])

    def _decode(self, summary: int) -> list[tuple[int, list[int]]]:
        found: dict[int, list[int]] = {}
        for number, (process, index) in enumerate(self.bit_list):
            if summary >> number & 1:
                found.setdefault(process, []).append(index)
        return list(found.items())

    def _race(self, process: int, depth: int, happened: int) -> None:
        """The next move of a process, before which these happened, or a later one, is to come before the one that was
        taken at `depth`."""
        if self.has[process] >> depth & 1:
            return
        level = self.way[depth]
        # Whoever must move on before it does would do as well.
        needed = happened >> depth + 1 << depth + 1
        if needed:
            todo = level.todo
            while todo:
                bit = todo & -todo
                todo ^= bit
                if self.moved[bit.bit_length() - 1] & needed:
                    return
        added = 1 << process
        if not level.enabled & added:
            added = level.enabled & ~level.todo
            if needed:
                left = added
                while left:
                    bit = left & -left
                    left ^= bit
                    if self.moved[bit.bit_length() - 1] & needed:
                        added = bit
                        break
        level.todo |= added
        level.left |= added
        if level.todo == level.enabled:
            self.saturated |= 1 << depth
        while added:
            bit = added & -added
            added ^= bit
            self.has[bit.bit_length() - 1] |= 1 << depth

    # -- the way ---------------------------------------------------------------------------------------------------

    def _take(self, level: _Level, compiled: _Compiled, process: int) -> None:
        """Note what a move touched, and what happened before it."""
        table = self.table
        level.undo = compiled.saves, compiled.saved(table)
        here = 1 << len(self.way) - 1
        happened = table[process] | here
        for index in compiled.after:
            happened |= table[index]
        if compiled.pop is not None:
            index, position, barriers = compiled.pop
            stores = table[index]
            happened |= stores[position]
            stores = stores[:position] + stores[position + 1 :]
            table[index] = tuple([each | happened for each in stores[barriers:]]) if barriers else stores
        for index in compiled.marks:
            table[index] = table[index] & ~happened | here
        for index in compiled.sets:
            table[index] = happened
        for index in compiled.joins:
            table[index] |= happened
        table[process] = happened
        if compiled.push >= 0:
            table[compiled.push] = (*table[compiled.push], happened)

    def _back(self, level: _Level) -> None:
        """Take the move of a level back."""
        assert level.undo is not None
        table = self.table
        for index, value in zip(*level.undo, strict=True):
            table[index] = value
        level.undo = None

    # -- what moves touch ------------------------------------------------------------------------------------------

    def _compile(self, touch: Touch) -> _Compiled:
        system = self.system
        writer, reader = touch.held
        for thing, mode in touch.may:
            # Who is to take a lock comes after all that is done while others hold it.
            writer |= (mode is Mode.TAKE) << thing
            reader |= (mode is Mode.SHARE) << thing
        thread = self.system.thread(touch.process) if writer | reader else -1
        checks = [self._kind(thing, (mode, writer, reader, thread)) for thing, mode in touch.may]
        after: list[int] = []
        sets: list[int] = []
        joins: list[int] = []
        marks: list[int] = []
        for thing, mode in touch.things:
            changed, read, shared = self._clock(thing)
            after.append(changed)
            lock = thing < system.variables and system.model.variables[thing].lock
            if mode is Mode.READ:
                joins.append(read)
                after += [shared] * lock
            elif mode in (Mode.SHARE, Mode.LEAVE):
                after.append(read)
                joins.append(shared)
            else:
                after += [read, shared] if lock else [read]
                sets.append(changed)
            marks += [index for index, kind in self.kinds.get(thing, ()) if self._races(kind, mode, touch)]
        stores, drained = system.processes, system.processes + system.threads
        compiled = _Compiled()
        compiled.push = stores + touch.process if touch.push else -1
        compiled.pop = None
        compiled.stores = touch.fence or touch.pop is not None
        compiled.drained = drained + touch.process
        if touch.fence:
            after.append(compiled.drained)
        saves = [touch.process, touch.process, *marks, *sets, *joins]  # two at least, so that `saved` is a tuple
        if touch.push:
            saves.append(compiled.push)
        if touch.pop is not None:
            thread, position, barriers = touch.pop
            compiled.pop = stores + thread, position, barriers
            joins.append(drained + thread)
            saves += [stores + thread, drained + thread]
        compiled.checks, compiled.after, compiled.marks = tuple(checks), tuple(after), tuple(marks)
        compiled.sets, compiled.joins, compiled.saves = tuple(sets), tuple(joins), tuple(saves)
        compiled.saved = itemgetter(*saves)
        compiled.bits = 0
        for index in checks:
            number = self.bits.setdefault((touch.process, index), len(self.bit_list))
            if number == len(self.bit_list):
                self.bit_list.append((touch.process, index))
            compiled.bits |= 1 << number
        compiled.version = self.version
        touch.compiled = compiled
        return compiled

    def _clock(self, thing: int) -> tuple[int, int, int]:
        found = self.clocks.get(thing)
        if found is None:
            first = len(self.table)
            found = self.clocks[thing] = first, first + 1, first + 2
            self.table += [0, 0, 0]
        return found

    def _kind(self, thing: int, kind: _Kind) -> int:
        """Where the table has the moves that such an access would race."""
        kinds = self.kinds.setdefault(thing, [])
        for index, known in kinds:
            if known == kind:
                return index
        index = len(self.table)
        kinds.append((index, kind))
        self.version += 1
        # The moves so far, as if they had known.
        moves = 0
        for depth, level in enumerate(self.way):
            if level.undo is None:
                break
            touch = level.edges[level.process].touch
            if any(each == thing and self._races(kind, mode, touch) for each, mode in touch.things):
                level.undo = (*level.undo[0], index), (*level.undo[1], moves)
                moves |= 1 << depth
        self.table.append(moves)
        return index

    def _races(self, kind: _Kind, mode: Mode, touch: Touch) -> bool:
        """Whether an access races an earlier one of the same thing: none orders them."""
        later, writer, reader, thread = kind
        if mode not in _RACES[later]:
            return False
        writers, readers = touch.held
        return not (writer & (writers | readers) or reader & writers) or thread == self.system.thread(touch.process)

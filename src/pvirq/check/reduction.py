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

from pvirq.check.accesses import Accesses
from pvirq.check.numbers import Numbers
from pvirq.check.result import Failure, Result, Watch
from pvirq.check.system import System, Touch
from pvirq.check.threads import Place


class Circle(Exception):
    """A way leads back into itself."""


class _Touched:
    """What is done where a move touches what it touches: indices of the table, and bits of a summary."""

    __slots__ = (
        "after", "barriers", "bits", "buffered", "checks", "drained", "joins", "known", "marks", "pop", "position",
        "process", "push", "sets", "stores", "touch",
    )  # fmt: skip

    def __init__(self, touch: Touch) -> None:
        self.touch = touch
        self.process = touch.process
        self.known = False  # whether the lists are; not before somebody asks
        self.checks: list[int] = []  # it races these
        self.bits = 0
        self.after: list[int] = []  # it happens after these
        self.marks: list[int] = []  # these kinds of accesses would race it
        self.sets: list[int] = []  # it happens before what happens after these, and has happened after all else there
        self.joins: list[int] = []  # it happens before what happens after these
        self.push = -1  # the thread into whose buffer it puts a store
        self.pop = -1  # the thread out of whose buffer it takes one,
        self.position = 0  # from here,
        self.barriers = 0  # and so many barriers
        self.drained = -1  # it happens after what came out of its buffer
        self.buffered = False  # there is something of these that it happens after,
        self.stores = False  # or that changes what is in a buffer


class _Stand:
    """Where a process stands: a thread at a place, or a buffer."""

    __slots__ = ("edges", "fields", "look", "place", "process")

    def __init__(self, process: int, look: int, fields: int, place: Place | None) -> None:
        self.process = process
        self.look = look  # mask of what its edges hang on
        self.fields = fields  # the same in a state's number
        self.place = place
        self.edges: dict[int, _Edge] = {}


class _Edge:
    """What a process can do."""

    __slots__ = ("can", "look", "moves", "stand", "touched", "waits")

    def __init__(self, stand: _Stand, look: int, moves: list[_Move], touched: _Touched, can: int, waits: bool) -> None:
        self.stand = stand
        self.look = look  # mask: where that changes, it may be another one
        self.moves = moves
        self.touched = touched
        self.can = can  # its part of a level's
        self.waits = waits  # for others


class _Move:
    """How a state's number changes: one of the choices of a process."""

    __slots__ = ("changes", "keep", "put", "then", "watched")

    def __init__(self, keep: int, put: int, changes: int, then: _Edge | None, watched: bool) -> None:
        self.keep = keep
        self.put = put
        self.changes = changes  # mask of what does
        self.then = then  # where its thread stands then, not looked at yet
        self.watched = watched  # an invariant looks at what changes, or the thread says what is broken


class _Level:
    """A state on the way, and what is to be done from it. What says "mask" has a bit a process."""

    __slots__ = (
        "after", "can", "chosen", "edges", "enabled", "here", "left", "moves", "process", "state", "stores",
        "stores_after", "summary", "table", "todo", "touched",
    )  # fmt: skip

    def __init__(self, depth: int, edge: _Edge) -> None:
        self.here = 1 << depth
        self.state = 0
        self.edges: list[_Edge] = []  # of each process
        self.can = 0  # three masks: threads that others may let go on; those that touch nothing that others see next;
        self.enabled = 0  # processes that can go on: this
        self.table: list[int] = []
        self.stores: list[tuple[int, ...]] = []
        self.summary = 0
        self.todo = 0  # mask of those that are to be taken on
        self.left = 0  # mask of those that haven't been
        self.process = -1  # that is being searched, and of that:
        self.touched = edge.touched
        self.moves = edge.moves
        self.chosen = 0  # how many of its choices have been
        self.after: list[int] = []  # `table` with its move
        self.stores_after: list[tuple[int, ...]] = []


class Reduced:
    """A search. Bit i of a mask of moves stands for the i-th move of the way.

    A level's `table` has masks of all that changes with the way: of each process the moves that happened before its
    next one; of each thread those that happened before what came out of its buffer; of each kind of access (thing,
    mode, locks held) the latest moves that it would race; of each thing the moves that happened before those that
    changed it last, that have read it, and that share it (a rwlock). `stores` has, of each thread, the moves that
    happened before each of the stores in its buffer.
    """

    def __init__(self, system: System, result: Result, watch: Watch, bits: int) -> None:
        self.system = system
        self.result = result
        self.watch = watch
        self.numbers = Numbers(len(system.initial), bits)
        self.accesses = Accesses(system)
        self.bits = self.accesses.bits
        self.threads = system.threads
        self.each_thread = list(range(system.threads))
        self.all_threads = (1 << system.threads) - 1
        all_can = (1 << 2 * system.threads + system.processes) - 1
        self.others = [all_can & ~self._can(each, True, True, True) for each in range(system.processes)]
        self.watched = self._fields(system.watched)
        self.sound: set[int] = set()  # for which all invariants hold
        self.places: dict[Place, _Edge] = {}
        self.touches: dict[Touch, _Touched] = {}
        self.decoded: dict[int, list[tuple[int, list[int]]]] = {}  # summaries
        # Of each thread: the fields that its stores are in; of a level's `can` what others have; and what its buffers
        # have, by what is in these fields.
        self.stores = [0] * system.threads
        self.others_stores = [all_can] * system.threads
        self.flushed: list[dict[int, int]] = [{} for _ in range(system.threads)]
        for process, buffer in enumerate(system.buffers, system.threads):
            self.stores[buffer.thread] = self.numbers.fields([buffer.slot])
            self.others_stores[buffer.thread] &= self.others[process]
        self.stored: dict[int, list[int]] = {}  # the threads whose stores change, by what changes
        self.no_moves: list[_Move] = []
        self.nothing = _Edge(_Stand(0, 0, 0, None), 0, self.no_moves, self._touched(system.ended.touch), 0, False)
        self.way: list[_Level] = []  # and what is left of the longest so far
        self.depth = -1  # of the state that is being searched
        self.root = [0] * self.accesses.size  # the table before all moves
        self.moved = [0] * system.processes  # moves of this process
        self.has = [0] * system.processes  # levels from which it is taken on
        self.saturated = 0  # levels from which all are
        self.met: dict[int, int] = {}  # of each state's number what each process touches from there on; -1: on the way
        self.steps = 0
        self.states = 0
        self.enough = False
        self.pause = watch.next(result)  # at so many states

    def run(self) -> None:
        try:
            self._search()
        finally:
            self._tell()

    def _search(self) -> None:
        system, met, way = self.system, self.met, self.way
        wrong: str | None = system.broken(system.initial) or self._begin()
        level = way[0] if way else _Level(0, self.nothing)
        while wrong is None and not self.enough:
            # The next move of this state.
            chosen, moves = level.chosen, level.moves
            if chosen == len(moves):
                if not level.left:
                    self._leave(level)
                    if self.depth < 0:
                        self.result.complete = True
                        return
                    summary = level.summary
                    level = way[self.depth]
                    level.summary |= summary
                    continue
                moves = self._take(level)
                chosen = 0
            move = moves[chosen]
            level.chosen = chosen + 1
            self.steps += 1
            # Where it leads.
            state = level.state & move.keep | move.put
            known = met.setdefault(state, -1)
            if known >= 0:
                if known:
                    level.summary |= known
                    self._meet(level, known)
                continue
            if len(met) == self.states:
                raise Circle
            if move.watched:
                wrong = self._wrong(move, state)
            stuck = self._arrive(level, move, state)
            wrong = wrong or stuck  # who breaks a property with a lock held makes others wait
            level = way[self.depth]
        if wrong is not None:
            schedule = [(level.process, level.chosen - 1) for level in way[: max(self.depth, 0)]]
            self.result.failure = Failure(wrong, tuple(schedule))

    def _tell(self) -> None:
        result = self.result
        result.states, result.steps, result.deepest = self.states, self.steps, max(len(self.way) - 1, 0)

    # -- states ----------------------------------------------------------------------------------------------------

    def _begin(self) -> str | None:
        system, numbers = self.system, self.numbers
        nowhere = _Level(0, self.nothing)
        nowhere.process = 0
        nowhere.after = self.root
        nowhere.stores_after = [()] * self.threads
        nowhere.edges = [self._at(process, system.initial[process]) for process in range(self.threads)]
        for process, buffer in enumerate(system.buffers, self.threads):
            nowhere.edges.append(self._bare(_Stand(process, buffer.look, self._fields(buffer.look), None)))
        state = numbers.number(system.initial)
        self.met[state] = -1
        return self._arrive(nowhere, _Move(0, 0, -1, None, False), state)

    def _arrive(self, level: _Level, move: _Move, state: int) -> str | None:
        """A new state, after a move of a level: what can be done there, and what is wrong with it."""
        can, changes, process, threads, others = level.can, move.changes, level.process, self.threads, self.others
        edges = level.edges.copy()
        if move.then is not None:
            edges[process] = move.then
        for each in self.each_thread:
            edge = edges[each]
            if edge.look & changes:
                stand = edge.stand
                found = stand.edges.get(state & stand.fields)
                if found is None:
                    found = self._edge(stand, state)
                edges[each] = found
                can = can & others[each] | found.can
                if found.waits:
                    self._waits(level, found.touched)
        if len(edges) > threads:
            for each in self._stored(changes):
                can = can & self.others_stores[each] | self._flushed(each, state)
            flushed = can >> 3 * threads
            while flushed:
                bit = flushed & -flushed
                flushed ^= bit
                each = threads + bit.bit_length() - 1
                stand = edges[each].stand
                if stand.look & changes:
                    found = stand.edges.get(state & stand.fields)
                    edges[each] = self._edge(stand, state) if found is None else found
        # Who touches nothing that others see goes first, and nobody need be tried in its place; otherwise who went.
        enabled = can >> 2 * threads
        first = can >> threads & self.all_threads or enabled & 1 << process or enabled
        first &= -first
        depth, way = self.depth + 1, self.way
        self.depth = depth
        if depth == len(way):
            way.append(_Level(depth, self.nothing))
        new = way[depth]
        new.state = state
        new.edges = edges
        new.can = can
        new.enabled = enabled
        new.table = level.after
        new.stores = level.stores_after
        new.todo = new.left = first
        new.process = -1
        new.moves = self.no_moves
        new.chosen = 0
        summary = 0
        waits = can & self.all_threads
        while waits:
            bit = waits & -waits
            waits ^= bit
            summary |= edges[bit.bit_length() - 1].touched.bits  # known, since it was looked at in `_waits`
        new.summary = summary
        self.states += 1
        if self.states >= self.pause:
            self._pause()
        if not enabled:
            return self.watch.end(self.system, self.numbers.state(state), self.result)
        self.has[first.bit_length() - 1] |= new.here
        if first == enabled:
            self.saturated |= new.here
        return None

    def _leave(self, level: _Level) -> None:
        """All that is below a state is searched."""
        here = level.here
        todo = level.todo
        if todo:
            if todo == level.enabled:
                self.saturated ^= here
            self.moved[level.process] ^= here
            while todo:
                bit = todo & -todo
                todo ^= bit
                self.has[bit.bit_length() - 1] ^= here
        self.met[level.state] = level.summary
        self.depth -= 1

    def _wrong(self, move: _Move, state: int) -> str | None:
        """What a thread says, or the invariant that doesn't hold."""
        place = None if move.then is None else move.then.stand.place
        if place is not None and place.broken is not None:
            return self.system.says(place)
        key = state & self.watched
        if key in self.sound:
            return None
        wrong = self.system.unsound(self.numbers.state(state))
        if wrong is None:
            self.sound.add(key)
        return wrong

    def _pause(self) -> None:
        """So many states were met: somebody may be told, or it is enough."""
        self._tell()
        self.enough = self.watch.arrived(self.result)
        self.pause = self.watch.next(self.result)

    # -- what processes can do -------------------------------------------------------------------------------------

    def _can(self, process: int, waits: bool, free: bool, goes: bool) -> int:
        """A process in the masks of a level's `can`."""
        if process < self.threads:
            return waits << process | free << self.threads + process | goes << 2 * self.threads + process
        return goes << 2 * self.threads + process

    def _bare(self, stand: _Stand) -> _Edge:
        """A process stands there, and hasn't looked what it can do."""
        return _Edge(stand, -1, self.no_moves, self.nothing.touched, 0, False)

    def _at(self, process: int, place: Place) -> _Edge:
        bare = self.places.get(place)
        if bare is None:
            look = place.look
            bare = self.places[place] = self._bare(_Stand(process, look, self._fields(look), place))
        return bare

    def _fields(self, mask: int) -> int:
        return self.numbers.fields(index for index in range(len(self.system.initial)) if mask >> index & 1)

    def _edge(self, stand: _Stand, state: int) -> _Edge:
        """What a process can do, which it didn't know."""
        system, process = self.system, stand.process
        edge = system.edge(self.numbers.state(state), process)
        moves: list[_Move] = []
        for changes, mask, place in edge.moves:
            after = dict(changes)  # of two changes of the same the later counts
            put = sum(self.numbers.put(index, value) for index, value in after.items())
            keep = self.numbers.all ^ self.numbers.fields(after)
            watched = bool(mask & system.watched) or (place is not None and place.broken is not None)
            moves.append(_Move(keep, put, mask, None if place is None else self._at(process, place), watched))
        touch = edge.touch
        waits = not moves and bool(touch.may) and process < self.threads
        can = self._can(process, waits, bool(moves) and not touch.may, bool(moves))
        found = stand.edges[state & stand.fields] = _Edge(stand, stand.look, moves, self._touched(touch), can, waits)
        return found

    def _touched(self, touch: Touch) -> _Touched:
        touched = self.touches.get(touch)
        if touched is None:
            touched = self.touches[touch] = _Touched(touch)
        return touched

    def _known(self, touched: _Touched, taken: int) -> _Touched:
        """What a move touches, with what is to be done for it; so many levels' moves were taken so far."""
        if touched.known:
            return touched
        touch, accesses = touched.touch, self.accesses
        plan = accesses.plan(touch)
        touched.checks, touched.bits, touched.after = plan.checks, plan.bits, plan.after
        touched.marks, touched.sets, touched.joins = plan.marks, plan.sets, plan.joins
        if touch.push:
            touched.push = touch.process
        if touch.pop is not None:
            touched.pop, touched.position, touched.barriers = touch.pop
            touched.joins.append(accesses.drained + touched.pop)
        if touch.fence:
            touched.drained = accesses.drained + touch.process
        touched.buffered = touch.fence or touch.pop is not None
        touched.stores = touch.push or touch.pop is not None
        touched.known = True
        # The moves so far, as if they had known what is new in the table.
        levels = self.way[:taken]
        for table in [self.root, *(level.after for level in levels)]:
            table += [0] * (accesses.size - len(table))
        for index, thing, kind in accesses.new:
            moves = 0
            for level in levels:
                earlier = level.touched.touch
                if any(each == thing and accesses.races(kind, mode, earlier) for each, mode in earlier.things):
                    moves |= level.here
                level.after[index] = moves
        accesses.new.clear()
        return touched

    def _stored(self, changes: int) -> list[int]:
        """The threads whose buffers change."""
        stored = self.stored.get(changes)
        if stored is None:
            slots = [(buffer.thread, buffer.slot) for buffer in self.system.buffers]
            stored = self.stored[changes] = sorted({thread for thread, slot in slots if changes >> slot & 1})
        return stored

    def _flushed(self, thread: int, state: int) -> int:
        """Of a level's `can`, those of a thread's buffers that have a store which may become visible."""
        key = state & self.stores[thread]
        flushed = self.flushed[thread].get(key)
        if flushed is None:
            system, values = self.system, self.numbers.state(state)
            flushed = self.flushed[thread][key] = sum(
                self._can(self.threads + number, False, False, True)
                for number, buffer in enumerate(system.buffers)
                if buffer.thread == thread and system.flushes(values, buffer)
            )
        return flushed

    # -- races -----------------------------------------------------------------------------------------------------

    def _waits(self, level: _Level, touched: _Touched) -> None:
        """A process that can't go on after a level's move: it might have, before what it waits for changed."""
        table, process = level.after, touched.process
        found = 0
        for index in self._known(touched, self.depth + 1).checks:
            found |= table[index]
        happened = table[process]
        found &= ~happened
        if found:
            self._race(process, found.bit_length() - 1, happened)

    def _meet(self, level: _Level, known: int) -> None:
        """A level's move led to a state that is searched: what is below it may race the way to it."""
        table = level.after
        decoded = self.decoded.get(known)
        if decoded is None:
            decoded = self.decoded[known] = self._decode(known)
        for process, checks in decoded:
            found = 0
            for index in checks:
                found |= table[index]
            if found:
                happened = table[process]
                found &= ~(happened | self.has[process] | self.saturated)
                while found:
                    bit = found & -found
                    found ^= bit
                    self._race(process, bit.bit_length() - 1, happened)

    def _decode(self, summary: int) -> list[tuple[int, list[int]]]:
        """What the processes of a summary race: of each its indices of the table."""
        found: dict[int, list[int]] = {}
        for (process, index), digit in zip(self.bits, f"{summary:b}"[::-1], strict=False):
            if digit == "1":
                if process in found:
                    found[process].append(index)
                else:
                    found[process] = [index]
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
            self.saturated |= level.here
        while added:
            bit = added & -added
            added ^= bit
            self.has[bit.bit_length() - 1] |= level.here

    def _take(self, level: _Level) -> list[_Move]:
        """The moves of the next process of a level: what they race, what they touch, and what happened before."""
        here, moved = level.here, self.moved
        if level.process >= 0:
            moved[level.process] ^= here
        left = level.left
        bit = left & -left
        level.left = left ^ bit
        process = level.process = bit.bit_length() - 1
        moved[process] ^= here
        edge = level.edges[process]
        touched = level.touched = edge.touched
        if not touched.known:
            self._known(touched, self.depth)
        level.summary |= touched.bits
        table = level.after = level.table.copy()
        happened = table[process]
        if touched.buffered:
            happened |= self._stored_before(level, touched)
        found = 0
        for index in touched.checks:
            found |= table[index]
        if found:
            found &= ~happened
            depth = found.bit_length() - 1
            if found and not self.has[process] >> depth & 1:
                self._race(process, depth, happened)
        happened |= here
        for index in touched.after:
            happened |= table[index]
        unordered = happened ^ (here | here - 1)
        for index in touched.marks:
            latest = table[index] & unordered  # nearly always none
            table[index] = latest | here if latest else here
        for index in touched.sets:
            table[index] = happened
        for index in touched.joins:
            table[index] |= happened
        table[process] = happened
        level.stores_after = self._store(level, touched, happened) if touched.stores else level.stores
        level.moves = edge.moves
        return edge.moves

    def _stored_before(self, level: _Level, touched: _Touched) -> int:
        """What happened before a move because of a buffer: its store, or all that had to leave it."""
        if touched.pop >= 0:
            return level.stores[touched.pop][touched.position]
        return level.table[touched.drained]

    def _store(self, level: _Level, touched: _Touched, happened: int) -> list[tuple[int, ...]]:
        """What a move, before which these happened, leaves in the buffers."""
        stores = level.stores.copy()
        if touched.pop >= 0:
            left = stores[touched.pop]
            left = left[: touched.position] + left[touched.position + 1 :]
            if touched.barriers:
                left = tuple([each | happened for each in left[touched.barriers :]])
            stores[touched.pop] = left
        else:
            stores[touched.push] = (*stores[touched.push], happened)
        return stores

"""All that a model's threads can do next, under one of three memory orders.

A state is a tuple: the place of each thread, the value of each variable, and what the order keeps for each thread. It
is taken on by moves of one process each: a thread, or a store buffer that makes a store visible some time later. What a
process can do in a state is an `Edge`, worked out once for all states that look the same to it.

- "sc": each step is seen by all at once.
- "tso", x86: a thread's stores wait in a buffer, in order; its own loads see them. Locked instructions and mb() wait
  until it is empty.
- "weak": stores to different variables become visible in any order, unless wmb() stands between them; and a load may
  give any old value (a choice), unless the thread has loaded a newer one, or something (rmb(), mb(), a lock, a locked
  instruction) has made it forget.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from operator import itemgetter
from typing import Any, Final

from pvirq.check.steps import End, Kind, Model, Step
from pvirq.check.threads import Held, Place, ThreadAutomaton

State = tuple[Any, ...]
Move = tuple[int, State]  # a process, and the state after it
Changes = tuple[tuple[int, Any], ...]  # of a state: index, what is there then
ORDERS: Final = ("sc", "tso", "weak")

# What waits in a buffer: a store's variable and value, whether it releases a lock, and what its thread held. None: a
# wmb().
Entry = tuple[int, Hashable, bool, Held] | None


class Mode(enum.IntEnum):
    """How a move touches a thing."""

    READ = 0
    WRITE = 1
    TAKE = 2  # a lock
    SHARE = 3  # a lock, for reading
    GIVE = 4
    LEAVE = 5


_LOCKING: Final = {Kind.ACQUIRE: Mode.TAKE, Kind.SHARE: Mode.SHARE, Kind.RELEASE: Mode.GIVE, Kind.LEAVE: Mode.LEAVE}


class Touch:
    """What a move touches: the things that moves can depend on each other by, each with its mode.

    A thing is a variable, an invariant (moves that change what it looks at depend on each other), what a thread's own
    loads see of its buffer, or what a thread remembers of old values. `things` is what it does touch where it is taken,
    `may` what it may touch elsewhere.
    """

    __slots__ = ("compiled", "fence", "held", "may", "pop", "process", "push", "things")

    def __init__(
        self,
        process: int,
        things: tuple[tuple[int, Mode], ...],
        may: tuple[tuple[int, Mode], ...],
        held: Held,
        push: bool,
        pop: tuple[int, int, int] | None,
        fence: bool,
    ) -> None:
        self.process = process
        self.things = things
        self.may = may
        self.held = held
        self.push = push  # into its buffer
        self.pop = pop  # out of a buffer: the thread, the position, how many barriers go with it
        self.fence = fence  # it comes after all that came out of its buffer
        self.compiled: Any = None  # what a search makes of it


class Edge:
    """What a process can do: for each of its choices what changes, a mask of these, and the thread's new place."""

    __slots__ = ("moves", "touch")

    def __init__(self, moves: tuple[tuple[Changes, int, Place | None], ...], touch: Touch) -> None:
        self.moves = moves
        self.touch = touch


class WildLock(Exception):
    """A lock's word was changed by one who doesn't hold it: it can't be told apart from other variables any more."""


class System:
    """A model ready to run. Places are shared by all states of one System."""

    def __init__(self, model: Model) -> None:
        if model.order not in ORDERS:
            raise ValueError(f"order {model.order!r} is none of {', '.join(ORDERS)}")
        self.model = model
        self.threads = len(model.programs)
        self.variables = len(model.variables)
        self.wild = 0  # mask of locks that are variables like others
        self.strict = False  # to raise where another one turns out to be: what moves touch has to be right
        self._touches: dict[Hashable, Touch] = {}
        self._invariants: list[list[int]] = [[] for _ in model.variables]  # of each variable, as things
        for number, invariant in enumerate(model.invariants):
            for variable in invariant.touches:
                self._invariants[variable.index].append(self.variables + number)
        self.watched = 0  # what invariants look at, as a mask of indices of a state
        for variable, found in zip(model.variables, self._invariants, strict=True):
            self.watched |= bool(found) << self.threads + variable.index
        self.extra = self.variables + len(model.invariants)  # things from here on are the order's
        self.ended = Edge((), self.touch(0, {}, {}))
        self._order = {"sc": Sequential, "tso": Tso, "weak": Weak}[model.order](self)
        self.buffers = self._order.buffers
        self.automata = [ThreadAutomaton(program, slot, self._prepare) for slot, program in enumerate(model.programs)]
        self.initial: State = (
            *(automaton.start for automaton in self.automata), *(variable.initial for variable in model.variables),
            *self._order.initial(),
        )  # fmt: skip
        self.processes = self.threads + len(self.buffers)

    def tame(self, wild: int) -> None:
        """Begin again, with these locks as variables like others."""
        self.wild |= wild
        for automaton in self.automata:
            for place in automaton.places.values():
                place.edges.clear()
        for buffer in self.buffers:
            buffer.edges.clear()
        self._touches.clear()

    # -- the way on ------------------------------------------------------------------------------------------------

    def _prepare(self, place: Place) -> None:
        """What the edges of a place hang on."""
        slots = sorted(self._order.slots(place)) if place.step is not None else []
        place.look = sum(1 << slot for slot in slots)
        place.key = itemgetter(*(slots or [place.thread.slot]))

    def edge(self, state: State, process: int) -> Edge:
        """What a process can do in a state."""
        stands: Any = state[process] if process < self.threads else self.buffers[process - self.threads]
        key = stands.key(state)
        try:
            return stands.edges[key]  # type: ignore[no-any-return]
        except KeyError:
            if process >= self.threads:
                edge = self._order.flush(state, stands)
            else:
                edge = self._order.edge(state, process) if stands.step is not None else self.ended
            stands.edges[key] = edge
            return edge

    def flushes(self, state: State, buffer: Buffer) -> bool:
        """Whether a buffer has a store that may become visible. It hangs on the thread's stores alone."""
        return self._order.first(buffer, state[buffer.slot]) >= 0

    def moves(self, state: State) -> list[Move]:
        """All moves that can be taken, in the order of processes, then of choices."""
        found = []
        for process, stands in enumerate((*state[: self.threads], *self.buffers)):
            edge = stands.edges.get(stands.key(state)) or self.edge(state, process)
            for changes, _, _ in edge.moves:
                found.append((process, apply(state, changes)))
        return found

    def step(self, state: State, process: int, choice: int) -> State | None:
        """The state after one move, as a schedule names it; None where there is no such move."""
        moves = self.edge(state, process).moves if process < self.processes else ()
        return apply(state, moves[choice][0]) if choice < len(moves) else None

    # -- what moves touch ------------------------------------------------------------------------------------------

    def touch(
        self,
        process: int,
        things: dict[int, Mode],
        may: dict[int, Mode],
        held: Held = (0, 0),
        *,
        push: bool = False,
        pop: tuple[int, int, int] | None = None,
        fence: bool = False,
    ) -> Touch:
        held = held[0] & ~self.wild, held[1] & ~self.wild
        key = process, tuple(sorted(things.items())), tuple(sorted(may.items())), held, push, pop, fence
        touch = self._touches.get(key)
        if touch is None:
            touch = self._touches[key] = Touch(*key)
        return touch

    def things(self, step: Step, changed: list[int]) -> dict[int, Mode]:
        """What a step touches that is seen at once, and has changed these variables."""
        locking = _LOCKING.get(step.kind)
        if locking is not None and not self.wild >> step.writes[0].index & 1:
            things = {step.writes[0].index: locking}
        else:
            # What doesn't change anything has only looked, a store as well: whether it does hangs on the value.
            things = {variable.index: Mode.READ for variable in (*step.reads, *step.writes)}
            for index in changed:
                things[index] = Mode.WRITE
        self.seen(things, changed)
        return things

    def seen(self, things: dict[int, Mode], changed: list[int]) -> None:
        """The invariants that look at what has changed."""
        for index in changed:
            for thing in self._invariants[index]:
                things[thing] = Mode.WRITE

    def tamed(self, place: Place, step: Step, state: State, new: tuple[Any, ...]) -> None:
        """Notice a lock that is changed by who doesn't hold it."""
        writer, reader = place.held
        for position, variable in enumerate(step.writes):
            bit = 1 << variable.index
            if not variable.lock or self.wild & bit:
                continue
            value = state[self.threads + variable.index]
            after = new[position] if new else value
            fine = False
            if step.kind is Kind.RELEASE:
                fine = bool(writer & bit)
            elif step.kind is Kind.LEAVE:
                fine = bool(reader & bit)
            elif step.kind in (Kind.ACQUIRE, Kind.SHARE):
                continue
            elif step.kind is Kind.ATOMIC:
                single = len(step.writes) == len(step.reads) == 1
                fine = value == after or (single and _legal(value, after, place.held, bit))
            if not fine:
                if self.strict:
                    raise WildLock(bit)
                self.wild |= bit

    # -- what is wrong ---------------------------------------------------------------------------------------------

    def broken(self, state: State) -> str | None:
        """The property that doesn't hold in a state: said by a thread, or an invariant."""
        for place in state[: self.threads]:
            if place.broken is not None:
                return self.says(place)
        return self.unsound(state)

    def wrong(self, state: State) -> str | None:
        """What is wrong with a state, be it on the way or one in which nobody can go on."""
        wrong = self.broken(state)
        if wrong is None and not any(self.edge(state, process).moves for process in range(self.processes)):
            wrong = self.verdict(state)
        return wrong

    def says(self, place: Place) -> str:
        """What a thread says that is broken."""
        return f"{place.thread.program.name}: {place.broken}"

    def unsound(self, state: State) -> str | None:
        """The invariant that doesn't hold."""
        for invariant in self.model.invariants:
            if not invariant.holds(*(state[self.threads + variable.index] for variable in invariant.touches)):
                return invariant.message
        return None

    def end(self, state: State) -> End:
        """A state as `Model.at_end` sees it."""
        return End(
            {variable: state[self.threads + variable.index] for variable in self.model.variables},
            {
                place.thread.program.name: place.step.text
                for place in state[: self.threads] if place.step is not None
            },
        )  # fmt: skip

    def verdict(self, state: State) -> str | None:
        """What is wrong with a state in which nobody can go on."""
        end = self.end(state)
        for judge in self.model.ends:
            wrong = judge(end)
            if wrong is not None:
                return wrong
        stuck = [
            f"{place.thread.program.name} ({place.step.text})"
            for place in state[: self.threads] if place.step is not None and not place.thread.program.may_wait
        ]  # fmt: skip
        return f"deadlock: {', '.join(stuck)}" if stuck else None

    # -- for people ------------------------------------------------------------------------------------------------

    def thread(self, process: int) -> int:
        """Whose process it is: a buffer's are its thread's."""
        return process if process < self.threads else self.buffers[process - self.threads].thread

    def process_name(self, process: int) -> str:
        """The thread's; a buffer has its thread's name."""
        return self.model.programs[self.thread(process)].name

    def describe(self, state: State, process: int) -> str:
        """What a process does next from a state, in words."""
        if process < self.threads:
            step: Step | None = state[process].step
            return step.text if step is not None else "ends"
        buffer = self.buffers[process - self.threads]
        for entry in state[buffer.slot]:
            if entry is not None and buffer.variable in (None, entry[0]):
                return f"its store of {entry[1]!r} to {self.model.variables[entry[0]].name} becomes visible"
        return "has no store"

    def read_by(self, state: State, process: int, choice: int) -> tuple[tuple[str, Any], ...]:
        """What the next move of a process reads, as it sees it: names and values."""
        step: Step | None = state[process].step if process < self.threads else None
        if step is None:
            return ()
        if step.kind is Kind.LOAD:
            return ((step.reads[0].name, self._order.loads(state, process)[choice]),)
        return tuple((variable.name, state[self.threads + variable.index]) for variable in step.reads)

    def written_by(self, before: State, process: int, choice: int) -> tuple[str, ...]:
        """The variables that the next move of a process writes for all to see, changed or not."""
        step: Step | None = before[process].step if process < self.threads else None
        changes, _, _ = self.edge(before, process).moves[choice]
        indices = {index - self.threads for index, _ in changes}
        if step is not None and (step.kind is not Kind.STORE or self.model.order == "sc"):
            indices |= {variable.index for variable in step.writes}
        return tuple(variable.name for variable in self.model.variables if variable.index in indices)


def apply(state: State, changes: Changes) -> State:
    """A state with what a move changes."""
    new = list(state)
    for index, value in changes:
        new[index] = value
    return tuple(new)


def _legal(value: Any, after: Any, held: Held, bit: int) -> bool:
    """Whether a lock's word is changed as the lock's own operations would."""
    if after == -1:
        return bool(value == 0)
    if value == -1:
        return after == 0 and bool(held[0] & bit)
    return bool(after == value + 1) or (after == value - 1 and bool(held[1] & bit))


class Buffer:
    """The process that makes a thread's stores visible, or those to one variable."""

    __slots__ = ("edges", "key", "look", "slot", "thread", "variable")

    def __init__(self, thread: int, slot: int, variable: int | None, looks: list[int]) -> None:
        self.thread = thread
        self.slot = slot  # of the stores in a state
        self.variable = variable
        self.look = sum(1 << index for index in looks)
        self.key = itemgetter(*looks)
        self.edges: dict[Any, Edge] = {}


class Sequential:
    """Each step is seen by all at once."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.base = system.threads
        self.buffers: list[Buffer] = []

    def initial(self) -> list[Any]:
        return []

    def slots(self, place: Place) -> set[int]:
        """What a place's edge hangs on: indices of a state."""
        step = place.step
        assert step is not None
        return {self.base + variable.index for variable in (*step.reads, *step.writes)}

    def edge(self, state: State, thread: int) -> Edge:
        return self._now(state, thread, ())

    def first(self, buffer: Buffer, stores: tuple[Entry, ...]) -> int:
        """The position of the store that may become visible; -1: there is none."""
        raise NotImplementedError

    def flush(self, state: State, buffer: Buffer) -> Edge:
        raise NotImplementedError

    def loads(self, state: State, thread: int) -> list[Any]:
        """What a thread that stands at a load may see: a value for each of its choices."""
        return [state[self.base + state[thread].step.reads[0].index]]

    def _now(self, state: State, thread: int, also: Changes, *, fence: bool = False) -> Edge:
        """A step whose effect all see at once."""
        place: Place = state[thread]
        step = place.step
        assert step is not None
        outcome = place.outcome(tuple([state[self.base + variable.index] for variable in step.reads]))
        touch = self.system.touch
        if outcome is None:
            return Edge((), touch(thread, {}, self._may(thread, step), place.held))
        new, nexts = outcome
        self.system.tamed(place, step, state, new)
        changed = [
            (variable.index, value) for variable, value in zip(step.writes, new, strict=bool(new))
            if state[self.base + variable.index] != value
        ]  # fmt: skip
        things = self.system.things(step, [index for index, _ in changed])
        changes = list(also)
        for index, value in changed:
            changes += self._commit(state, thread, index, value, things)
        may = self._may(thread, step)
        return Edge(_moves(thread, tuple(changes), nexts), touch(thread, things, may, place.held, fence=fence))

    def _may(self, thread: int, step: Step) -> dict[int, Mode]:
        return self.system.things(step, [variable.index for variable in step.writes])

    def _commit(self, state: State, thread: int, index: int, value: Any, things: dict[int, Mode]) -> Changes:
        """A store is seen by all."""
        return ((self.base + index, value),)


def _moves(thread: int, changes: Changes, nexts: tuple[Place, ...]) -> tuple[tuple[Changes, int, Place | None], ...]:
    mask = 1 << thread
    for index, _ in changes:
        mask |= 1 << index
    return tuple(((*changes, (thread, place)), mask, place) for place in nexts)


class Tso(Sequential):
    """A buffer a thread, behind the variables of a state."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.stores = self.base + system.variables  # indices of the buffers in a state
        self.buffers = [
            Buffer(thread, self.stores + thread, None, [self.stores + thread]) for thread in range(system.threads)
        ]

    def initial(self) -> list[Any]:
        return [()] * self.system.threads

    def slots(self, place: Place) -> set[int]:
        step = place.step
        assert step is not None
        own = {self.stores + place.thread.slot}
        if step.kind in (Kind.LOCAL, Kind.WMB, Kind.RMB):
            return set()
        if step.kind is Kind.STORE:
            return own
        return super().slots(place) | own

    def edge(self, state: State, thread: int) -> Edge:
        kind = state[thread].step.kind
        if kind is Kind.LOAD:
            return self._load(state, thread)
        if kind is Kind.STORE or kind is Kind.RELEASE:
            return self._store(state, thread)
        if kind in (Kind.LOCAL, Kind.WMB, Kind.RMB):
            return self._now(state, thread, ())
        if state[self.stores + thread]:
            return Edge((), self.system.touch(thread, {}, {}))
        return self._now(state, thread, (), fence=True)

    def _own(self, thread: int, index: int) -> int:
        """The thing that stands for what a thread's loads see of its own stores to a variable."""
        return self.system.extra + thread * self.system.variables + index

    def _load(self, state: State, thread: int) -> Edge:
        place: Place = state[thread]
        assert place.step is not None
        index = place.step.reads[0].index
        value, thing = self._sees(state, thread, index)
        outcome = place.outcome((value,))
        moves = () if outcome is None else _moves(thread, (), outcome[1])
        return Edge(moves, self.system.touch(thread, {thing: Mode.READ}, self._look(thread, index), place.held))

    def _look(self, thread: int, index: int) -> dict[int, Mode]:
        return {index: Mode.READ, self._own(thread, index): Mode.READ}

    def loads(self, state: State, thread: int) -> list[Any]:
        return [self._sees(state, thread, state[thread].step.reads[0].index)[0]]

    def _store(self, state: State, thread: int) -> Edge:
        place: Place = state[thread]
        step = place.step
        assert step is not None
        index = step.writes[0].index
        stores = state[self.stores + thread]
        release = step.kind is Kind.RELEASE
        # What a lock is before its release is looked at only where it may be somebody else's.
        value, own = self._sees(state, thread, index)
        outcome = place.outcome((value,) if release else ())
        assert outcome is not None
        new, nexts = outcome
        self.system.tamed(place, step, state, new)
        wild = release and self.system.wild >> index & 1
        things, may = ({own: Mode.READ}, self._look(thread, index)) if wild else ({}, {})
        entry: Entry = (index, new[0], release, place.held) if new else None
        changes = ((self.stores + thread, (*stores, entry)),) if new else ()
        touch = self.system.touch(thread, things, may, place.held, push=bool(new))
        return Edge(_moves(thread, changes, nexts), touch)

    def _sees(self, state: State, thread: int, index: int) -> tuple[Any, int]:
        """The value that a thread sees of a variable, its own store's if there is one; and that as a thing."""
        for entry in reversed(state[self.stores + thread]):
            if entry is not None and entry[0] == index:
                return entry[1], self._own(thread, index)
        return state[self.base + index], index

    def flush(self, state: State, buffer: Buffer) -> Edge:
        stores: tuple[Entry, ...] = state[buffer.slot]
        position = self.first(buffer, stores)
        if position < 0:
            return self.system.ended
        entry = stores[position]
        assert entry is not None
        index, value, release, held = entry
        left = stores[:position] + stores[position + 1 :]
        barriers = 0
        while barriers < len(left) and left[barriers] is None:
            barriers += 1
        release = release and not self.system.wild >> index & 1
        things = {index: Mode.GIVE if release else Mode.WRITE, self._own(buffer.thread, index): Mode.WRITE}
        self.system.seen(things, [index])
        may = things | self._memories(buffer.thread, index)
        changes = (
            *self._commit(state, buffer.thread, index, value, things), (buffer.slot, left[barriers:]),
        )  # fmt: skip
        mask = sum(1 << slot for slot in dict(changes))
        process = self.system.threads + self.buffers.index(buffer)
        touch = self.system.touch(process, things, may, held, pop=(buffer.thread, position, barriers))
        return Edge(((changes, mask, None),), touch)

    def _memories(self, thread: int, index: int) -> dict[int, Mode]:
        """What a store to a variable adds to."""
        return {}

    def first(self, buffer: Buffer, stores: tuple[Entry, ...]) -> int:
        return 0 if stores else -1


class Weak(Tso):
    """A buffer a thread and variable, and behind them what old values each thread may still load: a tuple of
    (variable, values), the oldest first; None for a thread that has ended."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.old = self.stores + system.threads
        olds = list(range(self.old, self.old + system.threads))
        self.buffers = [
            Buffer(thread, self.stores + thread, variable, [self.stores + thread, self.base + variable, *olds])
            for thread in range(system.threads)
            for variable in range(system.variables)
        ]

    def initial(self) -> list[Any]:
        return [()] * (2 * self.system.threads)

    def slots(self, place: Place) -> set[int]:
        step = place.step
        assert step is not None
        own, old = {self.stores + place.thread.slot}, {self.old + place.thread.slot}
        if step.kind in (Kind.STORE, Kind.WMB):
            return own
        if step.kind is Kind.RMB:
            return old
        if step.kind is Kind.LOCAL:
            return set()
        olds = old if step.kind is Kind.LOAD else {self.old + thread for thread in range(self.system.threads)}
        return super().slots(place) | olds

    def edge(self, state: State, thread: int) -> Edge:
        edge = self._edge(state, thread)
        # One that has ended remembers nothing.
        moves = tuple(
            (changes, mask, place) if place is None or place.step is not None
            else ((*changes, (self.old + thread, None)), mask | 1 << self.old + thread, place)
            for changes, mask, place in edge.moves
        )  # fmt: skip
        return Edge(moves, edge.touch)

    def _edge(self, state: State, thread: int) -> Edge:
        kind = state[thread].step.kind
        if kind is Kind.LOAD:
            return self._load(state, thread)
        if kind is Kind.STORE:
            return self._store(state, thread)
        if kind is Kind.LOCAL:
            return self._now(state, thread, ())
        forgets: Changes = ((self.old + thread, ()),) if state[self.old + thread] else ()
        stores = state[self.stores + thread]
        if kind is Kind.RMB:
            return self._forgetting(self._now(state, thread, forgets), thread)
        if kind is Kind.WMB:
            if not stores or stores[-1] is None:
                return self._now(state, thread, ())
            edge = self._now(state, thread, ((self.stores + thread, (*stores, None)),))
            return Edge(edge.moves, self.system.touch(thread, {}, {}, push=True))
        if stores:
            return Edge((), self.system.touch(thread, {}, {}))
        return self._forgetting(self._now(state, thread, forgets, fence=True), thread)

    def _may(self, thread: int, step: Step) -> dict[int, Mode]:
        may = super()._may(thread, step)
        for variable in step.writes:
            may |= self._memories(thread, variable.index)
        return may

    def _memory(self, thread: int) -> int:
        """The thing that stands for what a thread remembers."""
        return self.system.extra + self.system.threads * self.system.variables + thread

    def _memories(self, thread: int, index: int) -> dict[int, Mode]:
        if self.system.model.variables[index].coherent:
            return {}
        return {self._memory(other): Mode.READ for other in range(self.system.threads) if other != thread}

    def _forgetting(self, edge: Edge, thread: int) -> Edge:
        """What others store meanwhile isn't forgotten: it comes before or after."""
        touch = edge.touch
        own = {self._memory(thread): Mode.WRITE}
        things, may = dict(touch.things), dict(touch.may)
        touch = self.system.touch(thread, things | own, may | own, touch.held, push=touch.push, fence=touch.fence)
        return Edge(edge.moves, touch)

    def _load(self, state: State, thread: int) -> Edge:
        newest = super()._load(state, thread)
        place: Place = state[thread]
        assert place.step is not None
        index = place.step.reads[0].index
        old: dict[int, tuple[Any, ...]] = dict(state[self.old + thread])
        if index not in old or newest.touch.things[0][0] != index:  # there are none, or there is its own store
            return newest
        values = old.pop(index)
        moves: list[tuple[Changes, int, Place | None]] = []
        for number, value in enumerate((*values, state[self.base + index])):
            outcome = place.outcome((value,))
            if outcome is not None:
                left = old | {index: values[number:]} if number < len(values) else old
                changes = ((self.old + thread, tuple(sorted(left.items()))),) if number else ()
                moves += _moves(thread, changes, outcome[1])
        return Edge(tuple(moves), newest.touch)

    def loads(self, state: State, thread: int) -> list[Any]:
        place: Place = state[thread]
        assert place.step is not None
        index = place.step.reads[0].index
        value, thing = self._sees(state, thread, index)
        old = dict(state[self.old + thread]).get(index, ()) if thing == index else ()
        return [each for each in (*old, value) if place.outcome((each,)) is not None]

    def first(self, buffer: Buffer, stores: tuple[Entry, ...]) -> int:
        for position, entry in enumerate(stores):
            if entry is None:
                break
            if entry[0] == buffer.variable:
                return position
        return -1

    def _commit(self, state: State, thread: int, index: int, value: Any, things: dict[int, Mode]) -> Changes:
        before = state[self.base + index]
        changes: list[tuple[int, Any]] = []
        if before != value:
            changes.append((self.base + index, value))
        if before == value or self.system.model.variables[index].coherent:
            return tuple(changes)
        for other in range(self.system.threads):
            known = state[self.old + other]
            if known is None:
                continue
            old = dict(known)
            if other == thread:
                if index not in old:
                    continue
                del old[index]  # it has its own
            else:
                old[index] = (*old.get(index, ()), before)
                things[self._memory(other)] = Mode.READ
            changes.append((self.old + other, tuple(sorted(old.items()))))
        return tuple(changes)

"""All that a model's threads can do next, under one of three memory orders.

A state is a tuple: the place of each thread, the value of each variable, and what the order keeps for each thread. It
is taken on by `Move`s, one process each: a thread, or a piece of hardware that makes a store visible (or an old value
forgotten) some time later.

- "sc": each step is seen by all at once.
- "tso", x86: a thread's stores wait in a buffer, in order; its own loads see them. Locked instructions and mb() wait
  until it is empty.
- "weak": stores to different variables become visible in any order, unless wmb() stands between them; and a load may
  give an old value for as long as nothing (rmb(), mb(), a lock, a locked instruction) has made the thread forget it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from pvirq.check.steps import End, Kind, Model, Step
from pvirq.check.threads import Edge, Place, ThreadAutomaton

State = tuple[Any, ...]
ORDERS: Final = ("sc", "tso", "weak")
_BARRIER: Final = -1  # in a buffer: a wmb()


@dataclass(frozen=True, slots=True)
class Access:
    """What a move touches, as masks: a bit for each variable, then for what else moves can depend on each other by.

    Locks are apart: what takes one can't come before what gave it back, so these two need no other order.
    """

    reads: int = 0
    writes: int = 0
    takes: int = 0
    gives: int = 0


Move = tuple[int, State, Access]  # process, the state after it, what it touched


class System:
    """A model ready to run. Places are shared by all states of one System."""

    def __init__(self, model: Model) -> None:
        if model.order not in ORDERS:
            raise ValueError(f"order {model.order!r} is none of {', '.join(ORDERS)}")
        self.model = model
        self.threads = len(model.programs)
        self.variables = len(model.variables)
        self.automata = [ThreadAutomaton(program, slot, self.threads) for slot, program in enumerate(model.programs)]
        initial: list[Any] = [automaton.start for automaton in self.automata]
        initial += [variable.initial for variable in model.variables]
        self._hardware: Hardware | None = None
        if model.order != "sc":
            self._hardware = Hardware(self, weak=model.order == "weak")
            initial += self._hardware.initial()
        self.initial: State = tuple(initial)
        self.processes = self.threads + (self._hardware.processes if self._hardware else 0)
        # Steps that write what one invariant looks at depend on each other: their order shows in between.
        self._visible = [0] * self.variables
        extra = self.variables + 2 * self.threads
        for number, invariant in enumerate(model.invariants):
            for variable in invariant.touches:
                self._visible[variable.index] |= 1 << extra + number
        self.bits = extra + len(model.invariants)  # things that moves can depend on each other by

    # -- the way on ------------------------------------------------------------------------------------------------

    def moves(self, state: State) -> list[Move]:
        """All moves that can be taken, in the order of processes, then of choices."""
        if self._hardware is not None:
            return list(self._hardware.moves(state))
        found: list[Move] = []
        for process in range(self.threads):
            place = state[process]
            if place.step is None:
                continue
            values = place.key(state)
            try:
                edge = place.edges[values]
            except KeyError:
                edge = place.edge(values)
            if edge is not None:
                self._take(found, state, process, place, edge)
        return found

    def _take(self, found: list[Move], state: State, process: int, place: Place, edge: Edge) -> None:
        writes, nexts = edge
        access = place.access or self.access(place)
        new = list(state)
        if writes:
            changed = False
            for index, value in writes:
                if new[index] != value:
                    changed = True
                    new[index] = value
            if not changed:
                access = place.looks
        for after in nexts:
            new[process] = after
            found.append((process, tuple(new), access))

    def access(self, place: Place) -> Access:
        """What the step at a place touches, whatever comes of it."""
        if place.access is not None:
            return place.access  # type: ignore[no-any-return]
        reads = writes = takes = gives = 0
        step = place.step
        assert step is not None
        for index in place.reads:
            reads |= 1 << index
        for index in place.writes:
            writes |= 1 << index | self._visible[index]
        variables = (1 << self.variables) - 1
        if step.kind is Kind.ACQUIRE:
            takes, reads, writes = writes & variables, 0, writes & ~variables
        elif step.kind is Kind.RELEASE:
            gives, reads, writes = writes & variables, 0, writes & ~variables
        access = place.access = Access(reads, writes, takes, gives)
        # A locked instruction that changes nothing has only looked.
        place.looks = Access(reads) if step.kind is Kind.ATOMIC else access
        return access

    def pending(self, state: State) -> Iterator[tuple[int, Access]]:
        """What each process would touch next, whether it can go on or not."""
        if self._hardware is not None:
            yield from self._hardware.pending(state)
            return
        for process in range(self.threads):
            if state[process].step is not None:
                yield process, state[process].access or self.access(state[process])

    def visible(self, index: int) -> int:
        """The bits that stand for the invariants that look at a variable."""
        return self._visible[index]

    # -- what is wrong ---------------------------------------------------------------------------------------------

    def broken(self, state: State) -> str | None:
        """The property that doesn't hold in a state: said by a thread, or an invariant."""
        for place in state[: self.threads]:
            if place.broken is not None:
                name = place.thread.program.name
                return f"{name}: {place.broken}"
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

    def seen(self, state: State, thread: int) -> tuple[tuple[str, Any], ...]:
        """What the next step of a thread reads, as it sees it: names and values."""
        place = state[thread]
        if place.step is None:
            return ()
        if self._hardware is not None and place.step.kind is Kind.LOAD:
            return ((place.step.reads[0].name, self._hardware.load(state, thread, place.reads[0])),)
        return tuple((variable.name, state[self.threads + variable.index]) for variable in place.step.reads)

    def stored(self, state: State, process: int) -> tuple[str, ...]:
        """The variables that the next move of a process writes for all to see."""
        if process >= self.threads:
            assert self._hardware is not None
            return self._hardware.stored(state, process)
        step: Step | None = state[process].step
        if step is None or (self._hardware is not None and step.kind is Kind.STORE):
            return ()
        return tuple(variable.name for variable in step.writes)

    def owner(self, process: int) -> int:
        """The thread that a process is, or belongs to."""
        return process if self._hardware is None or process < self.threads else self._hardware.owner(process)

    # -- for people ------------------------------------------------------------------------------------------------

    def process_name(self, process: int) -> str:
        if process < self.threads:
            return self.model.programs[process].name
        assert self._hardware is not None
        return self._hardware.name(process)

    def describe(self, state: State, process: int) -> str:
        """What a process does next from a state, in words."""
        if process < self.threads:
            step: Step | None = state[process].step
            return step.text if step is not None else "ends"
        assert self._hardware is not None
        return self._hardware.describe(state, process)


class Hardware:
    """Store buffers, and for the weak order old values: each a slot a thread behind the variables of a state.

    Processes behind the threads: with "tso" one a thread (its buffer's oldest store becomes visible), with "weak" two
    for each thread and variable (a store to it becomes visible; its oldest value is forgotten).
    """

    def __init__(self, system: System, *, weak: bool) -> None:
        self.system = system
        self.weak = weak
        self.threads = system.threads
        self.variables = system.variables
        self.base = self.threads + self.variables  # of the buffers in a state
        self.old = self.base + self.threads  # of old values
        self.processes = 2 * self.threads * self.variables if weak else self.threads

    def initial(self) -> list[Any]:
        return [()] * (2 * self.threads if self.weak else self.threads)

    def _buffer_bit(self, thread: int) -> int:
        return 1 << self.variables + thread

    def _old_bit(self, thread: int) -> int:
        return 1 << self.variables + self.threads + thread

    # -- threads ---------------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        for process in range(self.threads):
            if state[process].step is not None:
                yield from self._thread(state, process, state[process])
        for process, thread, index in self._ready(state):
            yield self._visible(state, process, thread, index)
        if self.weak:
            for process, thread, index in self._outdated(state):
                yield self._forget(state, process, thread, index)

    def _thread(self, state: State, thread: int, place: Place) -> Iterator[Move]:
        step = place.step
        assert step is not None
        kind = step.kind
        buffer = state[self.base + thread]
        new = list(state)
        access = self._access(thread, place)
        if kind is Kind.LOAD:
            values = self.load(state, thread, place.reads[0])
        elif kind is Kind.STORE or (kind is Kind.RELEASE and not self.weak):
            values = place.key(state)
        elif kind in (Kind.WMB, Kind.RMB, Kind.LOCAL):
            values = place.key(state)
            if kind is Kind.RMB and self.weak:
                new[self.old + thread] = ()
            if kind is Kind.WMB and self.weak and buffer and buffer[-1][0] != _BARRIER:
                new[self.base + thread] = (*buffer, (_BARRIER, None))
        else:  # locked, mb(), locks
            if buffer:
                return
            values = place.key(state)
            if self.weak:
                new[self.old + thread] = ()
        try:
            edge = place.edges[values]
        except KeyError:
            edge = place.edge(values)
        if edge is None:
            return
        for index, value in edge[0]:
            if kind is Kind.STORE or (kind is Kind.RELEASE and not self.weak):
                new[self.base + thread] = (*new[self.base + thread], (index - self.threads, value))
            elif new[index] != value:
                self._commit(new, thread, index - self.threads, value)
        for after in edge[1]:
            new[thread] = after
            yield thread, tuple(new), access

    def load(self, state: State, thread: int, index: int) -> Any:
        for stored, value in reversed(state[self.base + thread]):
            if stored == index:
                return value
        if self.weak:
            for known, values in state[self.old + thread]:
                if known == index:
                    return values[0]
        return state[self.threads + index]

    def _access(self, thread: int, place: Place) -> Access:
        known = self.system.access(place)
        step = place.step
        if step is None:
            return known
        reads = known.reads | self._buffer_bit(thread) | (self._old_bit(thread) if self.weak else 0)
        # Locks are words as any other here.
        writes = known.writes | known.takes | known.gives
        kind = step.kind
        if kind in (Kind.STORE, Kind.WMB) or (kind is Kind.RELEASE and not self.weak):
            writes = self._buffer_bit(thread)
        elif writes and self.weak:
            writes |= self._others(thread)
        if self.weak and kind not in (Kind.LOAD, Kind.STORE, Kind.WMB, Kind.LOCAL):
            writes |= self._old_bit(thread)
        return Access(reads | known.takes, writes)

    def _others(self, thread: int) -> int:
        mask = 0
        for other in range(self.threads):
            if other != thread:
                mask |= self._old_bit(other)
        return mask

    def _commit(self, new: list[Any], thread: int, index: int, value: Hashable) -> None:
        """A store is seen by all; in the weak order others may still have the value before."""
        before = new[self.threads + index]
        new[self.threads + index] = value
        if not self.weak or self.system.model.variables[index].coherent:
            return
        for other in range(self.threads):
            old = dict(new[self.old + other])
            if other == thread:
                old.pop(index, None)  # it has its own
            else:
                old[index] = (*old.get(index, ()), before)
            new[self.old + other] = tuple(sorted(old.items()))

    # -- what happens some time later ------------------------------------------------------------------------------

    def _ready(self, state: State) -> Iterator[tuple[int, int, int]]:
        """Stores that may become visible now: process, thread, position in its buffer."""
        for thread in range(self.threads):
            buffer = state[self.base + thread]
            if not self.weak:
                if buffer:
                    yield self.threads + thread, thread, 0
                continue
            seen = set()
            for position, (index, _) in enumerate(buffer):
                if index == _BARRIER:
                    break
                if index not in seen:
                    seen.add(index)
                    yield self.threads + thread * self.variables + index, thread, position

    def _outdated(self, state: State) -> Iterator[tuple[int, int, int]]:
        first = self.threads + self.threads * self.variables
        for thread in range(self.threads):
            for index, _ in state[self.old + thread]:
                yield first + thread * self.variables + index, thread, index

    def _visible(self, state: State, process: int, thread: int, position: int) -> Move:
        buffer = state[self.base + thread]
        index, value = buffer[position]
        new = list(state)
        left = buffer[:position] + buffer[position + 1 :]
        while left and left[0][0] == _BARRIER:
            left = left[1:]
        new[self.base + thread] = left
        if new[self.threads + index] != value:
            self._commit(new, thread, index, value)
        return process, tuple(new), Access(self._buffer_bit(thread), self._store_mask(thread, index))

    def _store_mask(self, thread: int, index: int) -> int:
        mask = 1 << index | self.system.visible(index) | self._buffer_bit(thread)
        if self.weak:
            mask |= self._others(thread) | self._old_bit(thread)
        return mask

    def _forget(self, state: State, process: int, thread: int, index: int) -> Move:
        old = dict(state[self.old + thread])
        values = old.pop(index)[1:]
        if values:
            old[index] = values
        new = list(state)
        new[self.old + thread] = tuple(sorted(old.items()))
        return process, tuple(new), Access(0, self._old_bit(thread))

    def pending(self, state: State) -> Iterator[tuple[int, Access]]:
        for process in range(self.threads):
            if state[process].step is not None:
                yield process, self._access(process, state[process])
        for process, thread, position in self._ready(state):
            index = state[self.base + thread][position][0]
            yield process, Access(self._buffer_bit(thread), self._store_mask(thread, index))
        if self.weak:
            for process, thread, _ in self._outdated(state):
                yield process, Access(0, self._old_bit(thread))

    # -- for people ------------------------------------------------------------------------------------------------

    def owner(self, process: int) -> int:
        if not self.weak:
            return process - self.threads
        return (process - self.threads) // self.variables % self.threads

    def name(self, process: int) -> str:
        return self.system.model.programs[self.owner(process)].name

    def stored(self, state: State, process: int) -> tuple[str, ...]:
        variables = self.system.model.variables
        return tuple(
            variables[state[self.base + thread][position][0]].name
            for found, thread, position in self._ready(state)
            if found == process
        )

    def describe(self, state: State, process: int) -> str:
        variables = self.system.model.variables
        for found, thread, position in self._ready(state):
            if found == process:
                index, value = state[self.base + thread][position]
                return f"its store of {value!r} to {variables[index].name} becomes visible"
        return f"forgets an old value of {variables[(process - self.threads) % self.variables].name}"

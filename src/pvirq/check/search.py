"""Exhaustive search of all that a model can do: depth first, with state hashing and dynamic partial-order reduction.

Two moves that touch nothing in common lead to the same state in either order, and one order is enough. Which orders
matter is seen on the way (Flanagan and Godefroid, "Dynamic partial-order reduction for model checking software", 2005):
where a move meets an earlier one of another process that it depends on, and nothing forces their order, the state
before that one is left in the other order as well. A state that was met before isn't searched again; what is below it
may depend on the way to it, so it keeps what each process touches there (Yang, Chen, Gopalakrishnan and Kirby,
"Efficient stateful dynamic partial order reduction", 2008), and all of the way that depends on that is left otherwise
as well.

That is sound while no way leads back into itself. For a model that can go round in circles the search starts again
without reduction, and then also looks for circles that a fair scheduler may stay in for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pvirq.check.cycles import fair_cycle
from pvirq.check.steps import Model
from pvirq.check.system import Move, State, System


@dataclass(frozen=True)
class Failure:
    """A property that doesn't hold, and the moves that lead there: (process, which of its choices)."""

    message: str
    schedule: tuple[tuple[int, int], ...]


@dataclass
class Result:
    """What a search found. `complete`: all there is was searched, so that no failure means there is none."""

    failure: Failure | None = None
    complete: bool = False
    states: int = 0
    steps: int = 0  # moves taken
    ends: int = 0  # states in which nobody can go on
    deepest: int = 0  # moves of the longest way
    reduced: bool = True
    cyclic: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class _Circle(Exception):
    """A way leads back into itself."""


def explore(
    model: Model,
    *,
    reduce: bool = True,
    max_states: int | None = None,
    on_progress: Callable[[Result], None] | None = None,
) -> Result:
    """Search until a property is broken or all is searched, or `max_states` states were met."""
    begin = time.perf_counter()
    system = System(model)
    result = Result(reduced=reduce)
    try:
        if reduce:
            try:
                _Reduced(system, result, max_states, on_progress).run()
            except _Circle:
                result = Result(reduced=False, cyclic=True, notes=["it can go round in circles: no reduction"])
                _Plain(system, result, max_states, on_progress).run()
        else:
            _Plain(system, result, max_states, on_progress).run()
    finally:
        result.seconds = time.perf_counter() - begin
    return result


def choice_of(moves: list[Move], position: int) -> tuple[int, int]:
    """A move of a state's as it stands in a schedule."""
    process = moves[position][0]
    return process, sum(1 for move in moves[:position] if move[0] == process)


def _judge(system: System, state: State, moves: list[Move]) -> str | None:
    wrong = system.broken(state)
    if wrong is None and not moves:
        wrong = system.verdict(state)
    return wrong


class _Plain:
    """Every move of every state, once."""

    def __init__(
        self, system: System, result: Result, limit: int | None, on_progress: Callable[[Result], None] | None
    ) -> None:
        self.system = system
        self.result = result
        self.limit = limit
        self.on_progress = on_progress

    def run(self) -> None:
        system, result = self.system, self.result
        edges: dict[State, list[Move]] = {}
        path: list[tuple[list[Move], int]] = []  # moves of a state, and which is being searched
        on_path: set[State] = set()
        ways: list[State] = []
        state = system.initial
        while True:
            # A new state.
            moves = system.moves(state)
            edges[state] = moves
            result.states += 1
            result.deepest = max(result.deepest, len(path))
            wrong = _judge(system, state, moves)
            if wrong is not None:
                result.failure = Failure(wrong, tuple(choice_of(*each) for each in path))
                return
            result.ends += not moves
            if self.limit is not None and result.states >= self.limit:
                return
            if self.on_progress is not None and not result.states & 0x3FFF:
                self.on_progress(result)
            on_path.add(state)
            ways.append(state)
            path.append((moves, -1))
            # The next move that leads to another one.
            while path:
                moves, position = path.pop()
                position += 1
                if position == len(moves):
                    on_path.discard(ways.pop())
                    continue
                path.append((moves, position))
                result.steps += 1
                state = moves[position][1]
                if state not in edges:
                    break
                if state in on_path:
                    result.cyclic = True
            else:
                break
        if result.cyclic:
            found = fair_cycle(system, edges)
            if found is not None:
                result.failure = Failure(*found)
                return
        result.complete = True


class _Summary:
    """What each process touches in a state and below it: as `Access` has it."""

    __slots__ = ("gives", "open", "reads", "takes", "writes")

    def __init__(self, processes: int) -> None:
        self.open = True  # it's on the way that is being searched
        self.reads = [0] * processes
        self.writes = [0] * processes
        self.takes = [0] * processes
        self.gives = [0] * processes


class _Level:
    """A state on the way, and what is to be done from it."""

    __slots__ = ("at", "chosen", "done", "enabled", "moves", "summary", "todo", "undo")

    def __init__(self, moves: list[Move], summary: _Summary) -> None:
        self.moves = moves
        self.summary = summary
        self.enabled = 0  # masks of processes
        for move in moves:
            self.enabled |= 1 << move[0]
        self.todo = 0
        self.done = 0
        self.chosen: list[int] = []  # positions of moves that are still to be taken, of the process that is searched
        self.at = -1  # the move that is being searched
        self.undo: Any = None


class _Reduced:
    """The search with reduction. Bit i of a mask of "moves" stands for the i-th move of the way."""

    def __init__(
        self, system: System, result: Result, limit: int | None, on_progress: Callable[[Result], None] | None
    ) -> None:
        self.system = system
        self.result = result
        self.limit = limit
        self.on_progress = on_progress
        self.way: list[_Level] = []
        bits = system.bits
        self.before = [0] * system.processes  # of each process: moves that happened before its next one
        self.readers = [0] * bits  # of each thing: moves that read it
        self.writers = [0] * bits
        self.takers = [0] * bits  # moves that took a lock
        self.givers = [0] * bits  # moves that gave it back
        self.read_before = [0] * bits  # moves before, or among, those that read it since it was last written
        self.write_before = [0] * bits  # ... before, or among, those that wrote it
        self.saturated = 0  # levels from which every process is searched
        self.has = [0] * system.processes  # levels from which this process is searched

    def run(self) -> None:
        system, result, way = self.system, self.result, self.way
        met: dict[State, _Summary] = {}
        state: State | None = system.initial
        while True:
            if state is not None:
                self._arrive(state, met)
                if result.failure is not None or (self.limit is not None and result.states >= self.limit):
                    return
            state = None
            while way and state is None:
                level = way[-1]
                self._back(level)
                if not level.chosen:
                    left = level.todo & ~level.done
                    if not left:
                        way.pop()
                        self._leave(level)
                        continue
                    process = (left & -left).bit_length() - 1
                    level.done |= 1 << process
                    level.chosen = [at for at, move in enumerate(level.moves) if move[0] == process][::-1]
                level.at = level.chosen.pop()
                move = level.moves[level.at]
                result.steps += 1
                self._forth(level, move)
                known = met.get(move[1])
                if known is None:
                    state = move[1]
                elif known.open:
                    raise _Circle
                else:
                    self._meet(level, known)
            if state is None:
                result.complete = True
                return

    def _arrive(self, state: State, met: dict[State, _Summary]) -> None:
        system, result = self.system, self.result
        moves = system.moves(state)
        result.states += 1
        depth = len(self.way)
        result.deepest = max(result.deepest, depth)
        summary = met[state] = _Summary(system.processes)
        level = _Level(moves, summary)
        wrong = _judge(system, state, moves)
        if wrong is not None:
            result.failure = Failure(wrong, tuple(choice_of(each.moves, each.at) for each in self.way))
            return
        result.ends += not moves
        if self.on_progress is not None and not result.states & 0x3FFF:
            self.on_progress(result)
        for process, access in system.pending(state):
            summary.reads[process] = access.reads
            summary.writes[process] = access.writes
            summary.takes[process] = access.takes
            summary.gives[process] = access.gives
            self._races(process, access.reads, access.writes, access.takes, access.gives, latest=True)
        if moves:
            self._add(level, depth, 1 << moves[0][0])
        self.way.append(level)

    def _races(self, process: int, reads: int, writes: int, takes: int, gives: int, *, latest: bool) -> None:
        """Where a process that touches this may come earlier, let it: after the latest, or all moves that it races."""
        found = 0
        mask = reads | writes | takes | gives
        while mask:
            bit = mask & -mask
            mask ^= bit
            thing = bit.bit_length() - 1
            moves = self.writers[thing]
            if (writes | takes | gives) & bit:
                moves |= self.readers[thing]
            # A summary may have all four of one lock: what is only given back is no more than that.
            if (reads | writes | takes) & bit:
                moves |= self.takers[thing]
            if (reads | writes) & bit:
                moves |= self.givers[thing]
            found |= moves
        found &= ~self.before[process]
        if latest and found:
            found = 1 << found.bit_length() - 1
        found &= ~(self.has[process] | self.saturated)
        while found:
            bit = found & -found
            found ^= bit
            depth = bit.bit_length() - 1
            level = self.way[depth]
            self._add(level, depth, 1 << process if level.enabled >> process & 1 else level.enabled)

    def _add(self, level: _Level, depth: int, processes: int) -> None:
        level.todo |= processes
        if level.todo == level.enabled:
            self.saturated |= 1 << depth
        while processes:
            bit = processes & -processes
            processes ^= bit
            self.has[bit.bit_length() - 1] |= 1 << depth

    def _forth(self, level: _Level, move: Move) -> None:
        """Take a move: what happened before it, and what it touched."""
        process, _, access = move
        reads, writes, changes = access.reads, access.writes, access.writes | access.takes | access.gives
        depth = len(self.way) - 1
        here = 1 << depth
        happened = self.before[process]
        undo = [(self.before, process, happened)]
        mask = reads | changes
        while mask:
            bit = mask & -mask
            mask ^= bit
            thing = bit.bit_length() - 1
            happened |= self.write_before[thing]
            if changes & bit:
                happened |= self.read_before[thing]
        happened |= here
        mask = reads & ~changes
        while mask:
            bit = mask & -mask
            mask ^= bit
            thing = bit.bit_length() - 1
            undo.append((self.readers, thing, self.readers[thing]))
            undo.append((self.read_before, thing, self.read_before[thing]))
            self.readers[thing] |= here
            self.read_before[thing] |= happened
        mask = changes
        while mask:
            bit = mask & -mask
            mask ^= bit
            thing = bit.bit_length() - 1
            moves = self.writers if writes & bit else self.takers if access.takes & bit else self.givers
            undo.append((moves, thing, moves[thing]))
            undo.append((self.write_before, thing, self.write_before[thing]))
            moves[thing] |= here
            self.write_before[thing] = happened
        self.before[process] = happened
        level.undo = undo

    def _back(self, level: _Level) -> None:
        """Take the move of a level back, if there is one."""
        if level.undo is not None:
            for where, index, value in level.undo:
                where[index] = value
            level.undo = None

    def _meet(self, level: _Level, known: _Summary) -> None:
        """A move led to a state that is searched: what is below it may race the way to it."""
        summary = level.summary
        for process in range(self.system.processes):
            reads, writes = known.reads[process], known.writes[process]
            takes, gives = known.takes[process], known.gives[process]
            if reads | writes | takes | gives:
                summary.reads[process] |= reads
                summary.writes[process] |= writes
                summary.takes[process] |= takes
                summary.gives[process] |= gives
                self._races(process, reads, writes, takes, gives, latest=False)

    def _leave(self, level: _Level) -> None:
        """All that is below a state is searched."""
        here = ~(1 << len(self.way))
        self.saturated &= here
        for process, mask in enumerate(self.has):
            self.has[process] = mask & here
        level.summary.open = False
        if self.way:
            above, below = self.way[-1].summary, level.summary
            for process in range(self.system.processes):
                above.reads[process] |= below.reads[process]
                above.writes[process] |= below.writes[process]
                above.takes[process] |= below.takes[process]
                above.gives[process] |= below.gives[process]

"""Exhaustive search of all that a model can do: depth first, with state hashing and partial-order reduction.

For a model that can go round in circles the search starts again without reduction, and then also looks for circles that
a fair scheduler may stay in for ever.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from pvirq.check.cycles import fair_cycle
from pvirq.check.numbers import Full
from pvirq.check.reduction import Circle, Reduced
from pvirq.check.result import Failure, Result, Watch
from pvirq.check.steps import End, Model
from pvirq.check.system import Move, State, System, WildLock

BITS = 16  # of a state's number, for each thread and variable: 8, 16, 32 or 64, and more where that turns out too few


def explore(
    model: Model,
    *,
    reduce: bool = True,
    max_states: int | None = None,
    on_progress: Callable[[Result], None] | None = None,
    on_end: Callable[[End], None] | None = None,
) -> Result:
    """Search until a property is broken or all is searched, or `max_states` states were met.

    `on_progress` is called now and then, `on_end` with each state in which nobody can go on.
    """
    begin = time.perf_counter()
    # What a search makes it keeps, nearly all of it: looking for garbage again and again is for nothing.
    collecting = gc.isenabled()
    gc.disable()
    result = Result(reduced=reduce)
    watch = Watch(max_states, on_progress, on_end)
    try:
        system = System(model)
        bits = BITS
        while True:
            system.strict = reduce
            try:
                if reduce:
                    Reduced(system, result, watch, bits).run()
                else:
                    _plain(system, result, watch)
                break
            except WildLock as lock:
                system.tame(lock.args[0])
                result = Result(reduced=reduce, notes=result.notes)
            except Full:
                bits *= 2
                result = Result(reduced=reduce, notes=result.notes)
            except Circle:
                reduce = False
                result = Result(reduced=False, notes=["it can go round in circles: no reduction"])
    finally:
        if collecting:
            gc.enable()
        result.seconds = time.perf_counter() - begin
    return result


def count_schedules(model: Model, *, max_states: int = 1_000_000) -> int | None:
    """How many schedules a model has: what brute force would have to run. None where there is no end of them, or more
    than `max_states` states. (A state where something is broken is an end.)"""
    return _count(model, 1, 0, max_states)


def count_moves(model: Model, *, max_states: int = 1_000_000) -> int | None:
    """How many moves brute force would take: a search that forgets what it has met. None as with `count_schedules`."""
    return _count(model, 0, 1, max_states)


def _count(model: Model, end: int, move: int, max_states: int) -> int | None:
    system = System(model)
    counts: dict[State, int] = {}
    open_: set[State] = set()
    way: list[tuple[State, list[Move]]] = [(system.initial, system.moves(system.initial))]
    while way:
        state, moves = way[-1]
        if state in counts:
            way.pop()
            continue
        if state not in open_:
            if len(counts) + len(open_) >= max_states:
                return None
            open_.add(state)
            if not moves or system.broken(state) is not None:
                counts[state] = end
        if state not in counts:
            left = [after for _, after in moves if after not in counts]
            if left:
                if any(after in open_ for after in left):
                    return None
                way.append((left[0], system.moves(left[0])))
                continue
            counts[state] = sum(move + counts[after] for _, after in moves)
        open_.discard(state)
        way.pop()
    return counts[system.initial]


def choice_of(moves: list[Move], position: int) -> tuple[int, int]:
    """A move of a state's as it stands in a schedule."""
    process = moves[position][0]
    return process, sum(1 for move in moves[:position] if move[0] == process)


def _plain(system: System, result: Result, watch: Watch) -> None:
    """Every move of every state, once."""
    edges: dict[State, list[Move]] = {}
    way: list[State] = []
    left: list[list[Move]] = []  # of each state on the way, its moves,
    taken: list[int] = []  # and which is being searched
    on_way: set[State] = set()
    steps = 0
    pause = watch.next(result)  # at so many states
    state = system.initial
    while True:
        # A new state.
        moves = edges[state] = system.moves(state)
        result.states += 1
        result.steps = steps
        result.deepest = max(result.deepest, len(way))
        wrong = system.broken(state)
        if not moves:
            wrong = watch.end(system, state, result) if wrong is None else wrong
        if wrong is not None:
            result.failure = Failure(wrong, tuple(map(choice_of, left, taken)))
            return
        if result.states >= pause:
            if watch.arrived(result):
                return
            pause = watch.next(result)
        on_way.add(state)
        way.append(state)
        left.append(moves)
        taken.append(-1)
        # The next move that leads to another one.
        while way:
            moves = left[-1]
            position = taken[-1] + 1
            if position == len(moves):
                on_way.discard(way.pop())
                left.pop()
                taken.pop()
                continue
            taken[-1] = position
            steps += 1
            state = moves[position][1]
            if state not in edges:
                break
            if state in on_way:
                result.cyclic = True
        else:
            break
    result.steps = steps
    if result.cyclic:
        found = fair_cycle(system, edges)
        if found is not None:
            result.failure = Failure(*found)
            return
    result.complete = True

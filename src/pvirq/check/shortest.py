"""The shortest way to a failure: fewest moves, and of these ways the one that changes least from CPU to CPU."""

from __future__ import annotations

from pvirq.check.result import Failure
from pvirq.check.steps import Model
from pvirq.check.system import State, System

MAX_STATES = 400_000

_Stand = tuple[State, int]  # a state, and whose move came last


def shorten(model: Model, failure: Failure, max_states: int = MAX_STATES) -> Failure:
    """The shortest failing schedule there is, whatever it breaks; `failure` itself where that takes more than
    `max_states` states to find, or where it is a circle that is never left."""
    system = System(model)
    begin: _Stand = (system.initial, -1)
    # Of each stand, breadth first: how many changes of CPU it took, whence it came, and by which move.
    switches: dict[_Stand, int] = {begin: 0}
    came: dict[_Stand, tuple[_Stand, tuple[int, int]]] = {}
    level = [begin]
    for _ in range(len(failure.schedule)):
        after: dict[_Stand, None] = {}
        ends: list[tuple[int, int, _Stand, str]] = []
        for stand in level:
            state, last = stand
            count = -1
            before = -1
            for process, new in system.moves(state):
                count = count + 1 if process == before else 0
                before = process
                owner = system.owner(process)
                arrived = (new, owner)
                cost = switches[stand] + (owner != last)
                if arrived in switches and (arrived not in after or switches[arrived] <= cost):
                    continue  # as short before, with no more changes
                switches[arrived] = cost
                came[arrived] = stand, (process, count)
                after[arrived] = None
        for arrived in after:
            wrong = _wrong(system, arrived[0])
            if wrong is not None:
                ends.append((switches[arrived], len(ends), arrived, wrong))
        if ends:
            _, _, end, wrong = min(ends)
            return Failure(wrong, _way(came, end))
        if len(switches) > max_states:
            return failure
        level = list(after)
    return failure


def _wrong(system: System, state: State) -> str | None:
    wrong = system.broken(state)
    if wrong is None and not any(system.edge(state, process).moves for process in range(system.processes)):
        wrong = system.verdict(state)
    return wrong


def _way(came: dict[_Stand, tuple[_Stand, tuple[int, int]]], end: _Stand) -> tuple[tuple[int, int], ...]:
    way = []
    while end in came:
        end, move = came[end]
        way.append(move)
    return tuple(way[::-1])

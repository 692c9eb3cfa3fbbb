"""The shortest way to a failure: fewest steps, then fewest switches between threads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pvirq.check.guided import ScheduleError
from pvirq.check.result import Failure
from pvirq.check.steps import Model
from pvirq.check.system import State, System

Schedule = tuple[tuple[int, int], ...]


def shorten(model: Model, failure: Failure, *, same: bool = True, max_states: int = 200_000) -> Failure:
    """A failure with the same message, and the shortest schedule that has it; with `same` false the shortest schedule
    on which anything is wrong.

    All schedules are tried that are shorter, breadth first, unless that takes more than `max_states` states: then only
    parts of this one are left out, as long as it still fails. What a livelock goes through again and again is kept, and
    the way to it made short. The same failure is made the same one each time. (Threads keep their names in a message,
    so a deadlock of others is another failure.)
    """
    system = System(model)
    around = _around(system, failure.schedule) if failure.message.startswith("livelock: ") else None
    if around is not None:
        head, lasso, state = around
        found = _breadth_first(system, None, state, len(head), max_states)
        return Failure(failure.message, (*(head if found is None else found), *lasso))
    if _fails(system, failure.schedule) != failure.message:
        raise ScheduleError("the schedule doesn't lead to the failure")
    found = _breadth_first(system, failure.message if same else None, None, len(failure.schedule), max_states)
    if found is None:
        return Failure(failure.message, _fewer(system, failure))
    return Failure(_fails(system, found) or failure.message, found)


def switches(system: System, schedule: Sequence[tuple[int, int]]) -> int:
    """How often another thread goes on than the one before (a store buffer is its thread's)."""
    threads = [system.thread(process) for process, _ in schedule]
    return sum(1 for before, after in pairwise(threads) if before != after)


def _fails(system: System, schedule: Sequence[tuple[int, int]]) -> str | None:
    """What is wrong where a schedule ends; None also where it can't be followed."""
    state: State | None = system.initial
    for process, choice in schedule:
        state = system.step(state, process, choice) if state is not None else None
    return None if state is None else system.wrong(state)


def _around(system: System, schedule: Schedule) -> tuple[Schedule, Schedule, State] | None:
    """A livelock's schedule: the way to the circle, the circle, and where it begins."""
    states = [system.initial]
    for process, choice in schedule:
        after = system.step(states[-1], process, choice)
        if after is None:
            raise ScheduleError("the schedule can't be followed")
        states.append(after)
    # The whole circle comes back to where it began, maybe more than once on the way: the first time counts.
    begin = states.index(states[-1])
    if begin == len(states) - 1:
        return None
    return schedule[:begin], schedule[begin:], states[-1]


def _breadth_first(
    system: System, message: str | None, target: State | None, longest: int, max_states: int
) -> Schedule | None:
    """The shortest way to a state with that failure, or to that state; None: there were too many states.

    Where several are as short, the one with the fewest switches: so what is searched is a state together with the
    thread that went last, and of each the fewest switches to there.
    """
    if target is not None and target == system.initial:
        return ()
    Node = tuple[State, int]
    begin: Node = (system.initial, -1)
    # Of each state: at how many steps it was met first. Those met later are on no shortest way.
    met: dict[State, int] = {system.initial: 0}
    came: dict[Node, tuple[Node, tuple[int, int]]] = {}
    layer: dict[Node, int] = {begin: 0}  # the fewest switches
    for length in range(1, longest + 1):
        following: dict[Node, int] = {}
        ends: dict[State, bool] = {}
        for node, count in layer.items():
            state, last = node
            for process in range(system.processes):
                thread = system.thread(process)
                cost = count + (last not in (-1, thread))
                for choice in range(len(system.edge(state, process).moves)):
                    after = system.step(state, process, choice)
                    assert after is not None
                    if met.setdefault(after, length) < length:
                        continue
                    reached: Node = (after, thread)
                    if reached not in following or cost < following[reached]:
                        following[reached] = cost
                        came[reached] = node, (process, choice)
                    if after not in ends:
                        wrong = system.wrong(after) if target is None else None
                        ends[after] = after == target or (wrong is not None and message in (None, wrong))
        found = [(cost, number) for number, (node, cost) in enumerate(following.items()) if ends[node[0]]]
        if found:
            node = list(following)[min(found)[1]]
            way = []
            while node != begin:
                node, move = came[node]
                way.append(move)
            return tuple(reversed(way))
        if len(met) > max_states:
            return None
        # Where something else is wrong nobody goes on.
        layer = {node: cost for node, cost in following.items() if system.broken(node[0]) is None}
    return None


def _fewer(system: System, failure: Failure) -> Schedule:
    """The schedule with as much left out as can be, the longest parts first."""
    schedule = list(failure.schedule)
    size = len(schedule) // 2
    while size:
        at = 0
        while at < len(schedule):
            rest = schedule[:at] + schedule[at + size :]
            if _fails(system, rest) == failure.message:
                schedule = rest
            else:
                at += size
        size //= 2
    # Steps of one thread brought together, where that doesn't matter.
    changed = True
    while changed:
        changed = False
        for at in range(1, len(schedule)):
            thread = system.thread(schedule[at][0])
            earlier = at - 1
            while earlier >= 0 and system.thread(schedule[earlier][0]) != thread:
                earlier -= 1
            if earlier in (-1, at - 1):
                continue
            moved = [*schedule[: earlier + 1], schedule[at], *schedule[earlier + 1 : at], *schedule[at + 1 :]]
            if switches(system, moved) < switches(system, schedule) and _fails(system, moved) == failure.message:
                schedule, changed = moved, True
                break
    return tuple(schedule)

"""Ways that never end: circles of states in which a fair scheduler may stay for ever.

Fair is who lets each process go on that could all the time. A circle is one of these if each process that can move in
all of its states does move in one of them. Models are to end, or to wait, whatever the schedule: such a circle is a
livelock.
"""

from __future__ import annotations

from pvirq.check.system import Move, State, System


def fair_cycle(system: System, edges: dict[State, list[Move]]) -> tuple[str, tuple[tuple[int, int], ...]] | None:
    """What goes on for ever, and the schedule that leads there and once around; None if there is nothing."""
    for component in _components(edges):
        inside = set(component)
        always = ~0
        moving = 0
        for state in component:
            able = 0
            for process, after in edges[state]:
                able |= 1 << process
                if after in inside:
                    moving |= 1 << process
            always &= able
        if moving and not always & ~moving:
            names = sorted(
                {system.process_name(process) for process in range(system.processes) if moving >> process & 1}
            )
            way = _way(edges, system.initial, component[-1], None)
            around = _around(edges, component[-1], inside, moving)
            return f"livelock: {', '.join(names)} go on for ever", (*way, *around)
    return None


def _components(edges: dict[State, list[Move]]) -> list[list[State]]:
    """Strongly connected components (Tarjan's), those with a circle in them. The first state leads to all."""
    states = list(edges)
    numbers = {state: number for number, state in enumerate(states)}
    following = [[numbers[after] for _, after in moves] for moves in edges.values()]
    index = [-1] * len(states)
    low = [0] * len(states)
    met = 0
    stack: list[int] = []
    on_stack = [False] * len(states)
    found = []
    work = [(0, 0)]
    while work:
        number, position = work.pop()
        afters = following[number]
        if position == 0:
            index[number] = low[number] = met
            met += 1
            stack.append(number)
            on_stack[number] = True
        elif on_stack[afters[position - 1]]:
            low[number] = min(low[number], low[afters[position - 1]])
        for at in range(position, len(afters)):
            after = afters[at]
            if index[after] < 0:
                work.append((number, at + 1))
                work.append((after, 0))
                break
            if on_stack[after]:
                low[number] = min(low[number], index[after])
        else:
            if low[number] == index[number]:
                component = []
                last = -1
                while last != number:
                    last = stack.pop()
                    on_stack[last] = False
                    component.append(last)
                if len(component) > 1 or number in afters:
                    found.append([states[each] for each in component])
    return found


def _way(edges: dict[State, list[Move]], begin: State, end: State, inside: set[State] | None) -> list[tuple[int, int]]:
    """The shortest way, as a schedule; through `inside` only, if that is given."""
    came: dict[State, tuple[State, tuple[int, int]] | None] = {begin: None}
    queue = [begin]
    for state in queue:
        if state == end:
            break
        counts: dict[int, int] = {}
        for process, after in edges[state]:
            choice = counts[process] = counts.get(process, -1) + 1
            if after not in came and (inside is None or after in inside):
                came[after] = state, (process, choice)
                queue.append(after)
    way = []
    step = came[end]
    while step is not None:
        way.append(step[1])
        step = came[step[0]]
    return way[::-1]


def _around(edges: dict[State, list[Move]], begin: State, inside: set[State], moving: int) -> list[tuple[int, int]]:
    """A way from `begin` back to it on which each process of `moving` moves."""
    way: list[tuple[int, int]] = []
    state = begin
    left = moving
    while left:
        # The nearest state from which one that hasn't moved does.
        for target in inside:
            counts: dict[int, int] = {}
            for process, after in edges[target]:
                choice = counts[process] = counts.get(process, -1) + 1
                if left >> process & 1 and after in inside:
                    steps = _way(edges, state, target, inside)
                    way += [*steps, (process, choice)]
                    left &= ~(1 << process)
                    for done, _ in steps:
                        left &= ~(1 << done)
                    state = after
                    break
            else:
                continue
            break
    return way + _way(edges, state, begin, inside)

"""A model run by a given schedule: again what an explorer found, or one thread after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pvirq.check.steps import End, Kind, Model
from pvirq.check.system import State, System

LOCKING: Final = (Kind.ACQUIRE, Kind.SHARE, Kind.RELEASE, Kind.LEAVE)


class ScheduleError(Exception):
    """The schedule doesn't fit the model."""


@dataclass(frozen=True)
class Moved:
    """One step of a run, for people: who, what, where in the source, and what variables it changed."""

    process: int
    choice: int
    thread: int  # whose column it is in: itself, or for hardware the thread that it belongs to
    name: str
    text: str
    line: str
    changed: tuple[tuple[str, object, object], ...]  # name, before, after
    read: tuple[tuple[str, object], ...]  # name and value, as the thread saw it
    wrote: tuple[str, ...]  # what it wrote for all to see, changed or not
    state: State


def follow(model: Model, schedule: Iterable[tuple[int, int]]) -> tuple[list[Moved], str | None]:
    """The moves of a schedule of (process, choice), and what is wrong where it ends, if anything is."""
    system = System(model)
    state = system.initial
    moved: list[Moved] = []
    for process, choice in schedule:
        after = system.step(state, process, choice)
        if after is None:
            name = system.process_name(process) if process < system.processes else f"process {process}"
            raise ScheduleError(f"step {len(moved) + 1}: {name} can't go on there")
        moved.append(_moved(system, state, process, choice, after))
        state = after
    return moved, system.wrong(state)


def _moved(system: System, state: State, process: int, choice: int, after: State) -> Moved:
    place = state[process] if process < system.threads else None
    # What a lock's word holds is nobody's business.
    silent = place is not None and place.step is not None and place.step.kind in LOCKING
    return Moved(
        process=process,
        choice=choice,
        thread=system.thread(process),
        name=system.process_name(process),
        text=system.describe(state, process),
        line=place.line if place is not None else "",
        changed=() if silent else _changes(system, state, after),
        read=() if silent else system.read_by(state, process, choice),
        wrote=() if silent else system.written_by(state, process, choice),
        state=after,
    )


def _changes(system: System, before: State, after: State) -> tuple[tuple[str, object, object], ...]:
    return tuple(
        (variable.name, before[system.threads + variable.index], after[system.threads + variable.index])
        for variable in system.model.variables
        if before[system.threads + variable.index] != after[system.threads + variable.index]
    )


def one_by_one(model: Model, *names: str) -> End:
    """Run threads to where they end or wait, one after the other: those named, in that order, or all. No failure is
    looked for, but for what a thread itself says (`Broken` is raised); a choice is its first."""
    system = System(model)
    order = [program.name for program in model.programs]
    state = system.initial
    for name in names or order:
        slot = order.index(name)
        while True:
            # What waits in a buffer is seen before anybody else goes on.
            moves = [move for move in system.moves(state) if move[0] == slot or move[0] >= system.threads]
            if not moves:
                break
            # In "weak" order a load's last choice is the newest value.
            newest = moves[-1][0] >= system.threads or state[slot].step.kind is Kind.LOAD
            state = moves[-1 if newest else 0][1]
            place = state[slot]
            if place.broken is not None:
                raise AssertionError(f"{name}: {place.broken}")
    return system.end(state)

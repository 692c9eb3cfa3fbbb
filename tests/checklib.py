"""Models for tests of the checker: random small programs, and what a search of one says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pvirq.check import (
    Broken,
    End,
    Lock,
    Model,
    Result,
    Step,
    Thread,
    Var,
    atomically,
    choose,
    explore,
    fail,
    look,
    mb,
    rmb,
    wmb,
)
from pvirq.check.steps import Kind

Op = tuple[Any, ...]
Draw = Callable[[int], int]  # a number below its argument

ORDERS = ("sc", "tso", "weak")


@dataclass(frozen=True)
class Program:
    """What each thread does, as data."""

    order: str
    threads: tuple[tuple[Op, ...], ...]
    variables: int
    locks: int
    invariant: tuple[int, int, int] | None = None  # of variables and locks a and b: a + b != c
    may_wait: bool = True

    def model(self) -> Model:
        model = Model(self.order)
        words = model.array("v", self.variables)
        locks = [model.lock(f"l{number}") for number in range(self.locks)]
        for number, ops in enumerate(self.threads):
            out = model.var(f"out{number}", None, coherent=True)
            model.thread(f"t{number}", run, ops, words, locks, out, may_wait=self.may_wait)
        if self.invariant is not None:
            a, b, c = self.invariant
            looked = [*words, *(lock.var for lock in locks)]
            model.invariant("the invariant", {looked[a], looked[b]}, lambda *values: sum(values) != c)
        return model


def run(ops: tuple[Op, ...], words: list[Var], locks: list[Lock], out: Var) -> Thread:
    """A thread: what it has read in the end is in `out`."""
    registers = [0, 0]
    yield from _part(ops, registers, words, locks)
    yield out.xchg(tuple(registers))


def _part(ops: tuple[Op, ...], registers: list[int], words: list[Var], locks: list[Lock]) -> Thread:
    for name, *rest in ops:
        if name == "load":
            registers[rest[0]] = yield words[rest[1]].read()
        elif name == "store":
            yield words[rest[0]].write(rest[1])
        elif name == "copy":
            yield words[rest[0]].write(registers[rest[1]])
        elif name == "xchg":
            registers[rest[0]] = yield words[rest[1]].xchg(rest[2])
        elif name == "cmpxchg":
            registers[rest[0]] = yield words[rest[1]].cmpxchg(rest[2], rest[3])
        elif name == "add":
            yield words[rest[0]].update(lambda value: (value + 1) % 3)
        elif name == "both":
            yield atomically([words[rest[0]], words[rest[1]]], lambda a, b: (b, a) if a > b else None)
        elif name == "look":
            registers[0], registers[1] = yield look([words[rest[0]], words[rest[1]]])
        elif name == "await":
            yield look([words[rest[0]], words[rest[1]]], lambda a, b: a != b)
        elif name == "wait":
            registers[0] = yield words[rest[0]].wait(lambda value: value != 0)
        elif name == "locked":
            yield locks[rest[0]].acquire()
            yield from _part(rest[1], registers, words, locks)
            yield locks[rest[0]].release()
        elif name == "shared":
            yield locks[rest[0]].read_acquire()
            yield from _part(rest[1], registers, words, locks)
            yield locks[rest[0]].read_release()
        elif name == "try":
            if (yield locks[rest[0]].trylock()):
                yield from _part(rest[1], registers, words, locks)
                yield locks[rest[0]].release()
        elif name == "take":
            yield locks[rest[0]].acquire()
        elif name == "give":
            yield locks[rest[0]].release()
        elif name == "leave":
            yield locks[rest[0]].read_release()
        elif name == "held":
            registers[rest[1]] = yield locks[rest[0]].var.read()
        elif name == "choose":
            registers[rest[0]] = yield choose(2)
        elif name == "if":
            if registers[rest[0]]:
                yield from _part(rest[1], registers, words, locks)
        elif name == "assert":
            if registers[rest[0]] == rest[1]:
                fail(f"register {rest[0]} is {rest[1]}")
        else:
            yield {"mb": mb, "wmb": wmb, "rmb": rmb}[name]()


def program(draw: Draw, order: str, *, asserts: bool, size: int = 9) -> Program:
    """A random program of 2 to 4 threads with `size` operations at most. With `asserts`, something may be wrong."""
    variables, locks = 1 + draw(3), 1 + draw(2)
    odd = draw(4) == 0  # locks are released by who doesn't hold them, and looked at
    barriers = ["mb", "wmb", "rmb"] if order != "sc" else []
    simple = ["load", "store", "load", "store", "copy", "xchg", "cmpxchg", "add", "both", "look", *barriers]
    rare = ["await", "wait", "choose", "locked", "shared", "try", "if", "locked"]
    strange = ["take", "give", "leave", "held"] if odd else []
    left = size

    def op(deep: int) -> Op:
        names = simple + (rare if deep < 2 else []) + strange + (["assert"] if asserts else [])
        name = names[draw(len(names))]
        word, other, register, value = draw(variables), draw(variables), draw(2), draw(3)
        if name in ("both", "look", "await") and word == other:
            name = "load"
        return {
            "load": lambda: (name, register, word),
            "store": lambda: (name, word, value),
            "copy": lambda: (name, word, register),
            "xchg": lambda: (name, register, word, value),
            "cmpxchg": lambda: (name, register, word, draw(2), value),
            "add": lambda: (name, word),
            "both": lambda: (name, word, other),
            "look": lambda: (name, word, other),
            "await": lambda: (name, word, other),
            "wait": lambda: (name, word),
            "choose": lambda: (name, register),
            "held": lambda: (name, draw(locks), register),
            "take": lambda: (name, draw(locks)),
            "give": lambda: (name, draw(locks)),
            "leave": lambda: (name, draw(locks)),
            "locked": lambda: (name, draw(locks), ops(1 + draw(2), deep + 1)),
            "shared": lambda: (name, draw(locks), ops(1 + draw(2), deep + 1)),
            "try": lambda: (name, draw(locks), ops(1 + draw(2), deep + 1)),
            "if": lambda: (name, register, ops(1 + draw(2), deep + 1)),
            "assert": lambda: (name, register, value),
        }.get(name, lambda: (name,))()

    def ops(count: int, deep: int) -> tuple[Op, ...]:
        nonlocal left
        found = []
        while count and left:
            left -= 1
            count -= 1
            found.append(op(deep))
        return tuple(found)

    threads = tuple(ops(1 + draw(4), 0) for _ in range(2 + draw(3)))
    every = variables + locks
    invariant = (draw(every), draw(every), draw(7) - 2) if asserts and draw(2) else None
    return Program(order, threads, variables, locks, invariant, may_wait=not asserts or draw(2) == 0)


def ends(model: Model, **how: Any) -> tuple[Result, set[tuple[Any, ...]]]:
    """What a search says, and all the states in which it can end."""
    found: set[tuple[Any, ...]] = set()

    def on_end(end: End) -> None:
        found.add((tuple(end.values.items()), tuple(end.waiting.items())))

    result = explore(model, on_end=on_end, **how)
    # Variables of two models are different ones.
    return result, {(tuple((v.name, value) for v, value in values), waiting) for values, waiting in found}


def finals(model: Model, *variables: Var, **how: Any) -> set[tuple[Any, ...]]:
    """All values that these variables can have in the end."""
    found: set[tuple[Any, ...]] = set()
    result = explore(model, on_end=lambda end: found.add(tuple(end[variable] for variable in variables)), **how)
    assert result.failure is None
    assert result.complete
    return found


def replayed(model: Model, schedule: tuple[tuple[int, int], ...]) -> str | None:
    """What is wrong where a schedule of an "sc" model leads, by its generators alone: no place is looked up."""
    names = [each.name for each in model.programs]
    threads = [each.run() for each in model.programs]
    steps: list[Step | None] = [None] * len(threads)
    values = {variable: variable.initial for variable in model.variables}

    def able(step: Step) -> bool:
        return step.when is None or step.when(*(values[variable] for variable in step.reads))

    for process, choice in [*((number, -1) for number in range(len(threads))), *schedule]:
        try:
            result = None
            if choice >= 0:
                step = steps[process]
                assert step is not None, "it has ended"
                assert able(step), "it can't go on"
                new, result = step.do(*(values[variable] for variable in step.reads))
                values |= dict(zip(step.writes, new, strict=True))
                result = choice if step.kind is Kind.LOCAL else result
            steps[process] = threads[process].send(result)
        except StopIteration:
            steps[process] = None
        except (AssertionError, Broken) as error:
            return f"{names[process]}: {error}"
    for invariant in model.invariants:
        if not invariant.holds(*(values[variable] for variable in invariant.touches)):
            return invariant.message
    waiting = {name: step.text for name, step in zip(names, steps, strict=True) if step is not None}
    if any(step is not None and able(step) for step in steps):
        return None
    stuck = [f"{each.name} ({waiting[each.name]})" for each in model.programs if each.name in waiting]
    return f"deadlock: {', '.join(stuck)}" if stuck and not model.programs[0].may_wait else None


def wrong(program: Program) -> str | None:
    """How the reduced search of a program differs from the plain one; None if it doesn't."""
    plain, all_ends = ends(program.model(), reduce=False)
    reduced, some_ends = ends(program.model())
    if (plain.failure is None) != (reduced.failure is None):
        return f"plain: {plain.failure}, reduced: {reduced.failure}"
    for failure in (plain.failure, reduced.failure):
        if failure is not None and program.order == "sc":
            again = replayed(program.model(), failure.schedule)
            if again != failure.message:
                return f"{failure} does {again}"
    if plain.failure is None:
        if all_ends != some_ends:
            return f"ends that aren't reached: {all_ends - some_ends}, or new: {some_ends - all_ends}"
        if reduced.states > plain.states:
            return f"{reduced.states} states with reduction, {plain.states} without"
    return None

"""A property of operations that are to look as if each were done at once: some order of them gives the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import permutations

from pvirq.check.guided import one_by_one
from pvirq.check.steps import End, Model, Thread, Var


def operation(model: Model, name: str, program: Callable[[], Thread]) -> Var:
    """A thread that is one operation. The variable is its result (None while it goes on)."""
    result = model.var(f"result of {name}", None)

    def run() -> Thread:
        value = yield from program()
        yield result.write(value).saying(f"returns {value}")

    model.thread(name, run)
    return result


def as_if_one_by_one(model: Model, observed: Iterable[Var]) -> set[tuple[object, ...]]:
    """At the end of all threads, each of them one operation, these variables are as after some order of the threads.
    The result: all that they may be."""
    variables = tuple(observed)
    names = [program.name for program in model.programs]
    allowed = set()
    for order in permutations(names):
        end = one_by_one(model, *order)
        if not end.waiting:
            allowed.add(tuple(end[variable] for variable in variables))

    def judge(end: End) -> str | None:
        if end.waiting:
            return None
        values = tuple(end[variable] for variable in variables)
        if values in allowed:
            return None
        found = ", ".join(f"{variable.name} = {value!r}" for variable, value in zip(variables, values, strict=True))
        return f"no order of the operations gives this: {found}"

    model.at_end(judge)
    return allowed

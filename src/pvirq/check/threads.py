"""A thread as an automaton: what its generator did once for a value read isn't run again.

Where a thread stands (a `Place`) is all that its future hangs on: the positions and local variables of its generator
and of those that it delegates to, with what the interpreter keeps on their stacks (the position in a for loop, halves
of expressions). Two ways that lead to the same are one place, so a search sees equal states as equal, copies them as it
likes, and takes most steps by looking them up.
"""

from __future__ import annotations

import enum
import gc
import types
from collections.abc import Callable, Hashable, Iterator
from operator import itemgetter
from typing import Any

from pvirq.check.steps import Broken, Kind, Lock, Model, Program, Step, Var

# A taken step: new values by their index in the state, and the places that may come next (several: a choice).
Edge = tuple[tuple[tuple[int, Hashable], ...], tuple["Place", ...]]


class ModelError(Exception):
    """The model itself can't be run: its code raised, or isn't a function of what it was given."""


class Place:
    """Where a thread stands, and the step that it takes next (None: it has ended, or a property is broken)."""

    __slots__ = (
        "access", "broken", "edges", "generator", "history", "key", "line", "looks", "number", "reads", "step",
        "thread", "writes",
    )  # fmt: skip

    def __init__(self, thread: ThreadAutomaton, number: int, history: tuple[Any, ...]) -> None:
        self.thread = thread
        self.number = number
        self.history = history  # the results with which a new generator comes here
        self.step: Step | None = None
        self.broken: str | None = None
        self.line = ""  # "file.py:12"
        self.generator: Any = None  # one that stands here and hasn't been used, if there is one
        self.key: Callable[[tuple[Any, ...]], Any] = itemgetter(0)
        self.edges: dict[Any, Edge | None] = {}
        self.reads: tuple[int, ...] = ()
        self.writes: tuple[int, ...] = ()
        self.access: Any = None  # what pvirq.check.system notes of the step
        self.looks: Any = None

    def __repr__(self) -> str:
        return f"<{self.thread.program.name} {self.number}>"

    def edge(self, values: Any) -> Edge | None:
        """What comes of the step for `values`, as `key` reads them from a state; None: it can't be taken yet."""
        return self.thread.edge(self, values)


class ThreadAutomaton:
    """All places of a thread that were met. `base` is the index of variable 0 in a state."""

    def __init__(self, program: Program, slot: int, base: int) -> None:
        self.program = program
        self.slot = slot
        self.base = base
        self.places: dict[Hashable, Place] = {}
        self.count = 0
        self.start = self._arrive((), None)

    def edge(self, place: Place, values: Any) -> Edge | None:
        step = place.step
        assert step is not None
        arguments = values if len(step.reads) > 1 else (values,) if step.reads else ()
        edge: Edge | None = None
        if step.when is None or self._called(step.when, place, arguments):
            try:
                new, result = step.do(*arguments)
            except (Broken, AssertionError) as error:
                edge = ((), (self._broken(place, error),))
            except Exception as error:
                raise self._error(place, error) from error
            else:
                results = range(step.choices) if step.choices > 1 else (0,) if step.kind is Kind.LOCAL else (result,)
                edge = (
                    tuple(
                        (self.base + variable.index, value) for variable, value in zip(step.writes, new, strict=True)
                    ),
                    tuple(self._arrive((*place.history, each), place) for each in results),
                )
        place.edges[values] = edge
        return edge

    def _called(self, function: Callable[..., bool], place: Place, arguments: tuple[Any, ...]) -> bool:
        try:
            return bool(function(*arguments))
        except Exception as error:
            raise self._error(place, error) from error

    def _arrive(self, history: tuple[Any, ...], origin: Place | None) -> Place:
        """Where the results in `history` lead."""
        place = Place(self, self.count, history)
        generator = None
        if origin is not None and origin.generator is not None:
            generator, origin.generator = origin.generator, None
            inputs = history[-1:]
        try:
            if generator is None:
                generator = self.program.run()
                if not isinstance(generator, types.GeneratorType):
                    raise ModelError(f"{self.program.name} isn't a generator: it has no yield")
                inputs = (None, *history)
            for value in inputs:
                step = generator.send(value)
        except StopIteration:
            return self._met(("end",), place)
        except (Broken, AssertionError) as error:
            return self._broken(place, error)
        except ModelError:
            raise
        except Exception as error:
            raise self._error(origin or place, error) from error
        if not isinstance(step, Step):
            raise ModelError(f"{self.program.name} yields {step!r}, which is no step")
        place.step = step
        inner: Any = generator
        while isinstance(inner.gi_yieldfrom, types.GeneratorType):
            inner = inner.gi_yieldfrom
        place.line = f"{inner.gi_code.co_filename.rpartition('/')[2]}:{inner.gi_frame.f_lineno}"
        key = frozen(generator, step)
        found = self._met(("history", history) if key is None else key, place)
        if found is place:
            place.generator = generator
            self._index(place, step)
        else:
            generator.close()
        return found

    def _met(self, key: Hashable, place: Place) -> Place:
        found = self.places.setdefault(key, place)
        if found is place:
            self.count += 1
        return found

    def _index(self, place: Place, step: Step) -> None:
        place.reads = tuple(variable.index for variable in step.reads)
        place.writes = tuple(variable.index for variable in step.writes)
        place.key = itemgetter(*(self.base + index for index in place.reads)) if step.reads else itemgetter(self.slot)

    def _broken(self, place: Place, error: BaseException) -> Place:
        found = Place(self, self.count, place.history)
        found.broken = str(error) or _assertion(error)
        found.line = place.line
        return self._met(("broken", found.broken), found)

    def _error(self, place: Place, error: Exception) -> ModelError:
        where = f" ({place.line})" if place.line else ""
        return ModelError(f"{self.program.name}{where}: {type(error).__name__}: {error}")


def _assertion(error: BaseException) -> str:
    """An assert without words: where it is."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return "an assertion fails"
    return f"the assertion at {traceback.tb_frame.f_code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} fails"


class _Opaque(Exception):
    """Nobody can tell what state is in it."""


_PLAIN = (int, str, bytes, bool, float, type(None), types.FunctionType, types.CodeType, types.BuiltinFunctionType, type)
_ITERATORS: list[Iterator[Any]] = [
    iter(range(1)), iter(range(1 << 70)), iter([]), iter(()), iter(""), iter(dict.fromkeys(())),
    reversed([]), enumerate([]), zip(),
]  # fmt: skip
_ITERATOR_TYPES = tuple(map(type, _ITERATORS))


def frozen(generator: types.GeneratorType[Any, Any, Any], step: Step) -> Hashable | None:
    """All that tells the state of a suspended generator from another of the same program; None: that can't be told.

    The step that it has yielded belongs to it: `yield b.write((yield a.read()))` keeps the value nowhere else.

    The collector's view of a frame has what f_locals lacks: the interpreter's stack. (A `for` over a list is at a
    position there; `f((yield a), (yield b))` keeps the first result there.)
    """
    parts: list[Hashable] = []
    try:
        inner: Any = generator
        while inner is not None:
            if not isinstance(inner, types.GeneratorType):
                return None
            frame: Any = inner.gi_frame
            delegate = inner.gi_yieldfrom
            variables = frame.f_locals
            parts.append(frame.f_lasti)
            parts.append(frame.f_code)
            parts.extend((name, _freeze(value)) for name, value in variables.items())
            known = (frame, delegate, variables)
            parts.extend(
                _freeze(value) for value in gc.get_referents(inner) if not any(value is each for each in known)
            )
            inner = delegate
        parts += (step.kind, step.reads, step.writes, step.choices, _freeze_code(step.do), _freeze_code(step.when))
    except (_Opaque, RecursionError):
        return None
    return tuple(parts)


def _freeze_code(value: Any) -> Hashable:
    """A function by what it does: its code, and the values that it was made with."""
    if isinstance(value, types.MethodType):
        return (value.__func__, _freeze(value.__self__))
    if not isinstance(value, types.FunctionType):
        return _freeze(value)
    made_with = (*(value.__defaults__ or ()), *(cell.cell_contents for cell in value.__closure__ or ()))
    return (value.__code__, *map(_freeze_code, made_with))


def _freeze(value: Any) -> Hashable:
    if isinstance(value, _PLAIN):
        return (type(value), value) if isinstance(value, (bool, float)) else value
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_freeze, value))
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(map(_freeze, value)))
    if isinstance(value, dict):
        return (dict, *((_freeze(key), _freeze(entry)) for key, entry in value.items()))
    if isinstance(value, _ITERATOR_TYPES):
        return (type(value), _freeze(value.__reduce__()[1:]))
    if isinstance(value, types.CellType):
        try:
            return ("cell", _freeze(value.cell_contents))
        except ValueError:
            return "empty cell"
    if isinstance(value, BaseException):
        return (type(value), _freeze(value.args))
    if isinstance(value, (Var, Lock, Step, Model, types.ModuleType, enum.Enum)):
        return value  # what no thread changes
    if getattr(type(value), "__hash__", None) is not object.__hash__ and isinstance(value, Hashable):
        return value  # by its own idea of equality
    if hasattr(value, "__dict__") and not hasattr(value, "__next__"):
        return (type(value), _freeze(vars(value)))
    raise _Opaque

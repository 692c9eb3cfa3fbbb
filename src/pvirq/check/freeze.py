"""All that tells the state of a suspended generator from another state of it: something to look it up by."""

from __future__ import annotations

import enum
import gc
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Final

from pvirq.check.steps import Lock, Model, Step, Var


class _Opaque(Exception):
    """Nobody can tell what state is in it."""


_ITERATORS: Final[list[Iterator[Any]]] = [
    iter(range(1)), iter(range(1 << 70)), iter([]), iter(()), iter(""), iter(dict.fromkeys(())),
    reversed([]), enumerate([]), zip(),
]  # fmt: skip
_ITERATOR_TYPES: Final = tuple([type(each) for each in _ITERATORS])


_GENERATOR: Final[Any] = types.GeneratorType


def frozen(generator: Any, step: Step, head: int) -> Hashable | None:
    """The state of a suspended generator, by which it is told from another of the same program; None: that can't be
    told.

    What it computed may be in the step that it has yielded, and nowhere else.

    The collector's view of a generator has what f_locals lacks: the interpreter's stack. (A `for` over a list is at a
    position there; `f((yield a), (yield b))` keeps the first result there.) It has the local variables as well, behind
    `head` others: its code, its names, its frame...
    """
    parts: list[Hashable] = [step.kind, step.reads, step.writes, step.text, step.choices]
    try:
        parts.append(_freeze(step.do))
        parts.append(_freeze(step.when))
        inner = generator
        while inner is not None:
            if type(inner) is not _GENERATOR:
                return None
            frame = inner.gi_frame
            delegate = inner.gi_yieldfrom
            parts.append(frame.f_lasti)
            parts.append(frame.f_code)
            parts.append(tuple(frame.f_locals))  # those that have a value: what it is comes below, in the same order
            for value in gc.get_referents(inner)[head:]:
                if type(value) in _as_it_is:
                    parts.append(value)
                elif value is not delegate:
                    parts.append(_freeze(value))
            inner = delegate
    except (_Opaque, RecursionError):
        return None
    return tuple(parts)


# What stands for a value of each type that was met; those in `_as_it_is` stand for themselves.
_parts: dict[type, Callable[[Any], Hashable]] = {}
_as_it_is: set[type] = set()


def _freeze(value: Any) -> Hashable:
    kind = type(value)
    if kind in _as_it_is:
        return value  # type: ignore[no-any-return]
    part = _parts.get(kind)
    if part is None:
        part = _parts[kind] = _part(kind)
        if part is _itself:
            _as_it_is.add(kind)
    return part(value)


def _part(kind: type) -> Callable[[Any], Hashable]:
    for kinds, part in _KNOWN:
        if issubclass(kind, kinds):
            return part
    if getattr(kind, "__hash__", None) is not object.__hash__ and issubclass(kind, Hashable):
        return _itself  # by its own idea of equality
    return _content


def _itself(value: Any) -> Hashable:
    return value  # type: ignore[no-any-return]


def _with_type(value: Any) -> Hashable:
    return (type(value), value)


def _function(value: Any) -> Hashable:
    # One that the thread itself defines is another at each run, and the same function.
    if value.__closure__ is None and value.__defaults__ is None and value.__kwdefaults__ is None:
        return value.__code__  # type: ignore[no-any-return]
    parts = value.__closure__, value.__defaults__, value.__kwdefaults__
    return (value.__code__, *[_freeze(each) for each in parts])


def _cell(value: Any) -> Hashable:
    try:
        return ("cell", _freeze(value.cell_contents))
    except ValueError:
        return "empty cell"


def _sequence(value: Any) -> Hashable:
    return (type(value), *[_freeze(each) for each in value])


def _set(value: Any) -> Hashable:
    return (type(value), frozenset([_freeze(each) for each in value]))


def _dict(value: Any) -> Hashable:
    return (dict, *[(_freeze(key), _freeze(entry)) for key, entry in value.items()])


def _iterator(value: Any) -> Hashable:
    return (type(value), _freeze(value.__reduce__()[1:]))


def _method(value: Any) -> Hashable:
    return (types.MethodType, _freeze(value.__func__), _freeze(value.__self__))


def _exception(value: Any) -> Hashable:
    return (type(value), _freeze(value.args))


def _content(value: Any) -> Hashable:
    if hasattr(value, "__dict__") and not hasattr(value, "__next__"):
        return (type(value), _freeze(vars(value)))
    raise _Opaque


_KNOWN: Final[tuple[tuple[tuple[type, ...], Callable[[Any], Hashable]], ...]] = (
    ((bool, float), _with_type),  # 1, True and 1.0 are equal
    ((int, str, bytes, type(None), types.CodeType, types.BuiltinFunctionType, type), _itself),
    ((types.FunctionType,), _function),
    ((list, tuple), _sequence),
    ((set, frozenset), _set),
    ((dict,), _dict),
    (_ITERATOR_TYPES, _iterator),
    ((types.MethodType,), _method),
    ((types.CellType,), _cell),
    ((BaseException,), _exception),
    ((Var, Lock, Step, Model, types.ModuleType, enum.Enum), _itself),  # what no thread changes
)

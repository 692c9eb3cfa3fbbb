"""A thread as an automaton: what its generator did once for a value read isn't run again.

Where a thread stands (a `Place`) is all that its future hangs on: the positions and local variables of its generator
and of those that it delegates to, with what the interpreter keeps on their stacks (the position in a for loop, halves
of expressions). Two ways that lead to the same are one place, so a search sees equal states as equal, copies them as it
likes, and takes most steps by looking them up.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Callable, Generator, Hashable
from operator import itemgetter
from typing import Any

from pvirq.check.freeze import frozen
from pvirq.check.steps import Broken, Kind, Program, Step

# What came of a step: the new values of what it writes, in that order, and the places that may come next (several: a
# choice); None: it can't be taken yet.
Outcome = tuple[tuple[Hashable, ...], tuple["Place", ...]] | None


class ModelError(Exception):
    """The model itself can't be run: its code raised, or isn't a function of what it was given."""


class Place:
    """Where a thread stands, and the step that it takes next (None: it has ended, or a property is broken).

    `look`, `key` and `edges` are pvirq.check.system's, which knows what else than values the step hangs on.
    """

    __slots__ = (
        "broken", "edges", "generator", "held", "history", "key", "line", "look", "number", "origin", "outcomes",
        "step", "thread",
    )  # fmt: skip

    def __init__(
        self, thread: ThreadAutomaton, number: int, origin: Place | None, history: tuple[Any, ...], held: Held
    ) -> None:
        self.thread = thread
        self.number = number
        self.origin = origin  # the place before
        self.history = history  # the results with which a new generator comes here
        self.held = held
        self.step: Step | None = None
        self.broken: str | None = None
        self.line = ""  # "file.py:12"
        self.generator: Any = None  # one that stands here and hasn't been used, if there is one
        self.outcomes: dict[tuple[Any, ...], Outcome] = {}
        self.look = 0
        self.key: Callable[[tuple[Any, ...]], Any] = itemgetter(0)
        self.edges: dict[Any, Any] = {}

    def __repr__(self) -> str:
        return f"<{self.thread.program.name} {self.number}>"

    def outcome(self, values: tuple[Any, ...]) -> Outcome:
        """What comes of the step where `values` are those of what it reads."""
        try:
            return self.outcomes[values]
        except KeyError:
            return self.thread.outcome(self, values)


class ThreadAutomaton:
    """All places of a thread that were met."""

    def __init__(self, program: Program, slot: int, prepare: Callable[[Place], None]) -> None:
        self.program = program
        self.slot = slot
        self.prepare = prepare  # called with each new place
        self.places: dict[Hashable, Place] = {}
        self.count = 0
        self.start = self._arrive((), None, (0, 0))

    def outcome(self, place: Place, values: tuple[Any, ...]) -> Outcome:
        step = place.step
        assert step is not None
        outcome: Outcome = None
        if step.when is None or self._called(step.when, place, values):
            try:
                new, result = step.do(*values)
            except (Broken, AssertionError) as error:
                outcome = ((), (self._broken(place, error),))
            except Exception as error:
                raise self._error(place, error) from error
            else:
                if len(new) != len(step.writes):
                    raise ModelError(f"{self._where(place)}: {len(new)} values for {len(step.writes)} variables")
                results = range(step.choices) if step.choices > 1 else (0,) if step.kind is Kind.LOCAL else (result,)
                held = _held(place.held, step, values, new)
                outcome = (tuple(new), tuple(self._arrive((*place.history, each), place, held) for each in results))
        place.outcomes[values] = outcome
        return outcome

    def _arrive(self, history: tuple[Any, ...], origin: Place | None, held: Held) -> Place:
        """Where the results in `history` lead."""
        place = Place(self, self.count, origin, history, held)
        try:
            if origin is not None and origin.generator is not None:
                generator, origin.generator = origin.generator, None
            else:
                generator = self._again(origin)
            step = generator.send(history[-1] if history else None)
        except StopIteration:
            return self._met(("end", held), place)
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
        key = frozen(generator, step, _HEAD)
        found = self._met(("history", history) if key is None else (key, held), place)
        if found is place:
            place.generator = generator
        else:
            generator.close()
        return found

    def _again(self, origin: Place | None) -> Any:
        """A new generator at the place `origin`, or at the beginning."""
        generator = self.program.run()
        if not isinstance(generator, types.GeneratorType):
            raise ModelError(f"{self.program.name} isn't a generator: it has no yield")
        way = []
        place = origin
        while place is not None:
            way.append(place)
            place = place.origin
        results = () if origin is None else (None, *origin.history)
        for place, value in zip(reversed(way), results, strict=True):
            try:
                step = generator.send(value)
            except Exception as error:
                raise self._changed(place) from error
            if not isinstance(step, Step) or place.step is None or not _alike(step, place.step):
                raise self._changed(place)
        return generator

    def _met(self, key: Hashable, place: Place) -> Place:
        found = self.places.setdefault(key, place)
        if found is place:
            self.count += 1
            self.prepare(place)
        return found

    def _broken(self, place: Place, error: BaseException) -> Place:
        found = Place(self, self.count, place, place.history, place.held)
        found.broken = str(error) or _assertion(error)
        found.line = place.line
        return self._met(("broken", found.broken), found)

    def _called(self, function: Callable[..., bool], place: Place, arguments: tuple[Any, ...]) -> bool:
        try:
            return bool(function(*arguments))
        except Exception as error:
            raise self._error(place, error) from error

    def _where(self, place: Place) -> str:
        return f"{self.program.name} ({place.line})" if place.line else self.program.name

    def _error(self, place: Place, error: Exception) -> ModelError:
        return ModelError(f"{self._where(place)}: {type(error).__name__}: {error}")

    def _changed(self, place: Place) -> ModelError:
        return ModelError(f"{self._where(place)}: another step when it is run again; it keeps something outside")


def _head() -> int:
    """How much the collector's view of a suspended generator has before its local variables."""

    def sample(first: object) -> Generator[None]:
        yield

    first = object()
    generator: Any = sample(first)
    next(generator)
    _ = generator.gi_frame.f_locals
    return [value is first for value in gc.get_referents(generator)].index(True)


_HEAD = _head()


# Locks that a thread has taken and not given back, as masks of their variables: as writer (or spinlock), as reader.
Held = tuple[int, int]


def _held(held: Held, step: Step, before: tuple[Any, ...], after: tuple[Any, ...]) -> Held:
    """What a thread holds after a step: a lock's, or a locked instruction that does what those do."""
    if len(step.writes) != 1 or step.writes != step.reads or not step.writes[0].lock or before == after:
        return held
    bit = 1 << step.writes[0].index
    writer, reader = held
    if after[0] == -1:
        return writer | bit, reader
    if after[0] > before[0] >= 0:
        return writer, reader | bit
    return writer & ~bit, reader & ~bit


def _alike(step: Step, other: Step) -> bool:
    """Whether two steps are the same, as far as can be told without their functions."""
    return (
        step.kind is other.kind
        and step.reads == other.reads
        and step.writes == other.writes
        and step.text == other.text
        and step.choices == other.choices
    )


def _assertion(error: BaseException) -> str:
    """An assert without words: where it is."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return "an assertion fails"
    return f"the assertion at {traceback.tb_frame.f_code.co_filename.rpartition('/')[2]}:{traceback.tb_lineno} fails"

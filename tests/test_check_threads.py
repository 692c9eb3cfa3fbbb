"""Threads as automata: two ways to one place are merged, and never two places."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import pytest

from pvirq.check import Lock, Model, ModelError, Step, Thread, Var, choose, explore
from pvirq.check.system import System


class Plain:
    """No idea of equality."""

    def __init__(self, value: int) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


@dataclass
class Data:
    value: int


def iterators(word: Var) -> Thread:
    bits = [1, 2, 3]
    for _ in range((yield choose(3))):
        bits.pop()
    total = 0
    for bit in bits:
        yield word.read()
        total += bit
    return total


def nested_iterators(word: Var) -> Thread:
    total = 0
    pairs = zip(range(2), reversed([(yield choose(2)), 5]), strict=True)
    for first, second in pairs:
        yield word.read()
        for number, letter in enumerate("ab"):
            yield word.read()
            total = total * 7 + first + second + number + ord(letter)
    return total


def temporaries(word: Var) -> Thread:
    return ((yield choose(3)) * 10 + (yield word.read())) * 10 + (yield choose(2))


def in_the_step(word: Var) -> Thread:
    """What was chosen is nowhere but in the step."""
    yield word.write((yield choose(3)))
    return (yield word.read())


def dropped(word: Var) -> Thread:
    (yield choose(3))
    yield word.read()
    return 0


def cells(word: Var) -> Thread:
    chosen = yield choose(2)

    def get() -> int:
        return chosen

    yield word.read()
    chosen += 5 * (yield choose(2))
    yield word.read()
    return get()


def mutable(word: Var) -> Thread:
    queue: list[Any] = []
    table: dict[str, Any] = {"queue": queue, "seen": set()}
    for _ in range(2):
        queue.append((yield choose(2)))
        table["seen"].add(len(queue))
        yield word.read()
    return tuple(table["queue"]), tuple(sorted(table["seen"]))


def finally_(word: Var) -> Thread:
    value = 0
    try:
        try:
            if (yield choose(2)):
                raise KeyError((yield choose(2)))
        finally:
            yield word.read()
            value += 1
    except KeyError as error:
        yield word.read()
        value += 10 + 10 * error.args[0]
    return value


def returning(word: Var) -> Thread:
    """The value to be returned is on the interpreter's stack while the finally clause runs."""

    def inner() -> Thread:
        try:
            return (yield choose(3))
        finally:
            yield word.read()

    return (yield from inner()) + 1


def handling(word: Var) -> Thread:
    try:
        raise ValueError((yield choose(2)))
    except ValueError:
        yield word.read()
        try:
            raise
        except ValueError as error:
            return error.args[0]


def delegating(word: Var) -> Thread:
    def leaf(number: int) -> Thread:
        yield word.read()
        return number * (yield choose(2))

    def branch(number: int) -> Thread:
        first = yield from leaf(number)
        return first + (yield from leaf(number + 1))

    return (yield from branch(1 + (yield choose(2))))


def objects(kind: type[Any]) -> Callable[[Var], Thread]:
    def run(word: Var) -> Thread:
        local = kind(0)
        local.value = yield choose(3)
        yield word.read()
        return local.value

    return run


def generators(word: Var) -> Thread:
    """A generator of its own that isn't delegated to: nobody looks into it."""

    def numbers(begin: int) -> Generator[int, None, None]:
        yield from (begin, begin + 10)

    counting = numbers((yield choose(2)))
    first = next(counting)
    yield word.read()
    return first + next(counting)


def deleting(word: Var) -> Thread:
    one, two = (yield choose(2)), 1
    if one:
        del one
    else:
        del two
    yield word.read()
    return sorted(name for name in locals() if name in ("one", "two"))[0]


def booleans(word: Var) -> Thread:
    value = [0, False, 0.0][(yield choose(3))]
    yield word.read()
    return repr(value)


PROGRAMS = [
    (iterators, {6, 3, 1}),
    (in_the_step, {0, 1, 2}),
    (temporaries, {a * 100 + b for a in range(3) for b in range(2)}),
    (dropped, {0}),
    (cells, {0, 1, 5, 6}),
    (mutable, {((a, b), (1, 2)) for a in range(2) for b in range(2)}),
    (finally_, {1, 11, 21}),
    (returning, {1, 2, 3}),
    (handling, {0, 1}),
    (delegating, {0, 1, 2, 3, 5}),
    (objects(Plain), {0, 1, 2}),
    (objects(Slotted), {0, 1, 2}),
    (objects(Data), {0, 1, 2}),
    (generators, {10, 12}),
    (deleting, {"one", "two"}),
    (booleans, {"0", "False", "0.0"}),
]


def results(program: Callable[[Var], Thread], **how: Any) -> tuple[set[Any], int]:
    """All that a thread may return, and how many states it took."""
    model = Model()
    word, out = model.var("x"), model.var("out", None)

    def thread() -> Thread:
        yield out.write((yield from program(word)))

    model.thread("t", thread)
    found = set()
    result = explore(model, on_end=lambda end: found.add(end[out]), **how)
    assert result.complete
    return found, result.states


@pytest.mark.parametrize(("program", "wanted"), PROGRAMS)
@pytest.mark.parametrize("reduce", [False, True])
def test_places_that_differ_are_kept_apart(program: Callable[[Var], Thread], wanted: set[Any], reduce: bool) -> None:
    found, _ = results(program, reduce=reduce)
    assert found == wanted


def test_each_position_of_iterators_is_a_place_of_its_own() -> None:
    def run(chosen: int) -> int:
        total = 0
        for first, second in zip(range(2), reversed([chosen, 5]), strict=True):
            for number, letter in enumerate("ab"):
                total = total * 7 + first + second + number + ord(letter)
        return total

    assert results(nested_iterators)[0] == {run(0), run(1)}


def test_what_is_forgotten_tells_no_places_apart() -> None:
    # Three choices that come together again: 1 beginning, then read, write and end.
    assert results(dropped)[1] == 4
    # Nor does what an object was before.
    assert results(objects(Data))[1] == 1 + 3 * 3


def places(*programs: Callable[..., Thread]) -> list[int]:
    model = Model()
    word = model.var("x")
    for program in programs:
        model.thread(program.__name__, program, word)
    explore(model)
    system = System(model)
    seen, queue = {system.initial}, [system.initial]
    for state in queue:
        for _, after in system.moves(state):
            if after not in seen:
                seen.add(after)
                queue.append(after)
    return [automaton.count for automaton in system.automata]


def test_what_others_do_makes_no_new_places() -> None:
    def adds(word: Var) -> Thread:
        for _ in range(5):
            yield word.add(1)

    def looks(word: Var) -> Thread:
        while True:
            if (yield word.read()) % 2:
                return

    # Each add's result is dropped: 5 places and the end. The other one reads, again and again.
    assert places(adds, looks) == [6, 2]


def one(program: Callable[..., Any], *arguments: Any) -> Model:
    model = Model()
    model.thread("the thread", program, model.var("x"), *arguments)
    return model


def raises(word: Var) -> Thread:
    yield word.read()
    raise KeyError("gone")


def yields_nothing_known(word: Var) -> Any:
    yield word.read()
    yield 5


def no_generator(word: Var) -> Any:
    return None


def bad_step(word: Var) -> Thread:
    yield word.update(lambda value: value.missing)


def bad_wait(word: Var) -> Thread:
    yield word.wait(lambda value: value["missing"])


def bad_count(word: Var) -> Thread:
    yield Step(word.read().kind, (word,), (word,), lambda value: ((), value))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (raises, r"the thread \(test_check_threads.py:\d+\): KeyError: 'gone'"),
        (yields_nothing_known, "the thread yields 5, which is no step"),
        (no_generator, "the thread isn't a generator: it has no yield"),
        (
            bad_step,
            r"the thread \(test_check_threads.py:\d+\): AttributeError: 'int' object has no attribute 'missing'",
        ),
        (bad_wait, r"the thread \(test_check_threads.py:\d+\): TypeError: "),
        (bad_count, r"the thread \(test_check_threads.py:\d+\): 0 values for 1 variables"),
    ],
)
@pytest.mark.parametrize("reduce", [False, True])
def test_a_model_that_raises_is_said_so(program: Callable[..., Any], message: str, reduce: bool) -> None:
    with pytest.raises(ModelError, match=message):
        explore(one(program), reduce=reduce)


def test_a_model_that_keeps_something_outside_is_said_so() -> None:
    outside: list[int] = []

    def thread(word: Var) -> Thread:
        for _ in range(2):
            chosen = yield choose(2)
            outside.append(chosen)
            if len(outside) % 2:
                yield word.write(chosen)
            else:
                yield word.read()

    with pytest.raises(ModelError, match="another step when it is run again; it keeps something outside"):
        explore(one(thread))


def test_an_assertion_without_words_says_where_it_is() -> None:
    def thread(word: Var) -> Thread:
        if not (yield word.read()):
            raise AssertionError

    failure = explore(one(thread)).failure
    assert failure is not None
    assert re.fullmatch(r"the thread: the assertion at test_check_threads.py:\d+ fails", failure.message)


def test_a_lock_given_back_by_who_does_not_hold_it_is_a_failure() -> None:
    def thread(lock: Lock, read: bool) -> Thread:
        yield lock.read_release() if read else lock.release()

    for read, words in ((False, "released, and"), (True, "released for reading, and")):
        model = Model()
        model.thread("t", thread, model.lock("lock"), read)
        failure = explore(model).failure
        assert failure is not None
        assert failure.message == f"t: lock is {words} nobody holds it{' so' if read else ''}"


def calls(word: Var, step: Callable[[], Thread]) -> Thread:
    yield from step()
    yield word.read()


def test_a_function_that_a_thread_defines_is_the_same_at_each_run() -> None:
    """And another where it was made with something else."""

    def program(word: Var, differs: bool) -> Thread:
        chosen = yield choose(2)
        value = chosen if differs else 0
        del chosen

        def step() -> Thread:
            yield word.write(value)

        yield word.write(5)
        yield from calls(word, step)

    def states(differs: bool) -> int:
        model = Model()
        model.thread("t", program, model.var("v"), differs)
        return explore(model, reduce=False).states

    # From the choice on there is one way, or there are two.
    assert (states(False), states(True)) == (5, 9)

"""The exhaustive search: known numbers, known bugs, and that reduction loses nothing."""

from __future__ import annotations

from math import comb
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checklib import ORDERS, finals, program, wrong
from pvirq.check import (
    Lock,
    Model,
    Result,
    Thread,
    Var,
    atomically,
    choose,
    count_schedules,
    explore,
    fail,
    mb,
    note,
    wmb,
)
from pvirq.check.search import count_moves

# -- known numbers -----------------------------------------------------------------------------------------------------


def writers(threads: int, steps: int, *, shared: bool) -> Model:
    model = Model()
    words = model.array("x", threads)

    def thread(number: int) -> Thread:
        for step in range(steps):
            yield words[0 if shared else number].write((number, step))

    for number in range(threads):
        model.thread(f"t{number}", thread, number)
    return model


@pytest.mark.parametrize(("threads", "steps"), [(2, 1), (2, 5), (3, 3), (4, 2)])
def test_independent_steps_have_one_order(threads: int, steps: int) -> None:
    plain = explore(writers(threads, steps, shared=False), reduce=False)
    assert plain.states == (steps + 1) ** threads
    assert plain.steps == threads * steps * (steps + 1) ** (threads - 1)
    assert (plain.ends, plain.deepest, plain.complete) == (1, threads * steps, True)
    reduced = explore(writers(threads, steps, shared=False))
    assert (reduced.states, reduced.steps) == (threads * steps + 1, threads * steps)
    assert (reduced.ends, reduced.deepest, reduced.complete) == (1, threads * steps, True)


def test_dependent_steps_have_all_orders() -> None:
    # What was written last tells states apart that are otherwise the same: those with steps of both.
    for reduce in (False, True):
        result = explore(writers(2, 3, shared=True), reduce=reduce)
        assert result.states == 1 + 3 + 3 + 2 * 3 * 3
        assert result.ends == 2


def test_each_order_of_steps_that_depend_on_each_other_is_a_state_where_all_is_kept() -> None:
    def model(threads: int, steps: int) -> tuple[Model, Var]:
        model = Model()
        log = model.var("log", ())

        def thread(name: int) -> Thread:
            for _ in range(steps):
                yield log.update(lambda value: (*value, name))

        for name in range(threads):
            model.thread(f"t{name}", thread, name)
        return model, log

    made, log = model(2, 4)
    assert len(finals(made, log)) == comb(8, 4)
    made, log = model(3, 2)
    assert len(finals(made, log)) == 90


def test_a_step_that_touches_nothing_needs_no_choice() -> None:
    model = Model()

    def thread() -> Thread:
        for number in range(5):
            yield note(f"{number}")

    for name in "abcd":
        model.thread(name, thread)
    result = explore(model)
    assert (result.states, result.steps) == (21, 20)


def test_choices_are_all_tried() -> None:
    model = Model()
    word = model.var("x")

    def thread() -> Thread:
        first = yield choose(3)
        second = yield choose(2)
        yield word.write((first, second))

    model.thread("t", thread)
    assert finals(model, word) == {((a, b),) for a in range(3) for b in range(2)}


# -- known protocols ---------------------------------------------------------------------------------------------------


def peterson(order: str, barrier: bool) -> Model:
    model = Model(order)
    flags, turn, inside = model.array("flag", 2), model.var("turn"), model.var("inside", coherent=True)

    def thread(me: int) -> Thread:
        yield flags[me].write(1)
        if barrier:
            yield wmb()  # without it "weak" order gives the turn away before the flag is up
        yield turn.write(1 - me)
        if barrier:
            yield mb()
        for _ in range(2):
            if not (yield flags[1 - me].read()) or (yield turn.read()) == me:
                break
        else:
            return  # it would try again
        if (yield inside.add(1)):
            fail("two are inside")
        yield inside.add(-1)
        yield flags[me].write(0)

    model.thread("a", thread, 0)
    model.thread("b", thread, 1)
    return model


def dekker(order: str, barrier: bool) -> Model:
    """The entry: whoever sees the other's flag stays out."""
    model = Model(order)
    flags, inside = model.array("flag", 2), model.var("inside", coherent=True)

    def thread(me: int) -> Thread:
        yield flags[me].write(1)
        if barrier:
            yield mb()
        if not (yield flags[1 - me].read()):
            yield inside.add(1)

    model.thread("a", thread, 0)
    model.thread("b", thread, 1)
    model.invariant("two are inside", [inside], lambda value: value < 2)
    return model


@pytest.mark.parametrize("make", [peterson, dekker])
@pytest.mark.parametrize("reduce", [False, True])
def test_mutual_exclusion_by_loads_and_stores_needs_a_barrier_where_stores_are_buffered(
    make: Any, reduce: bool
) -> None:
    for order in ORDERS:
        for barrier in (False, True):
            result = explore(make(order, barrier), reduce=reduce)
            if order != "sc" and not barrier:
                assert result.failure is not None, order
                assert "two are inside" in result.failure.message
            else:
                assert (result.failure, result.complete) == (None, True), (order, barrier)


def philosophers(count: int, *, left_handed: bool) -> Model:
    model = Model()
    forks = [model.lock(f"fork {number}") for number in range(count)]

    def thread(number: int) -> Thread:
        mine = [forks[number], forks[(number + 1) % count]]
        if left_handed and number == count - 1:
            mine.reverse()
        for fork in mine:
            yield fork.acquire()
        for fork in mine:
            yield fork.release()

    for number in range(count):
        model.thread(f"philosopher {number}", thread, number)
    return model


@pytest.mark.parametrize("reduce", [False, True])
def test_philosophers_starve_unless_one_is_left_handed(reduce: bool) -> None:
    result = explore(philosophers(3, left_handed=False), reduce=reduce)
    assert result.failure is not None
    assert result.failure.message == (
        "deadlock: philosopher 0 (takes fork 1), philosopher 1 (takes fork 2), philosopher 2 (takes fork 0)"
    )
    result = explore(philosophers(3, left_handed=True), reduce=reduce)
    assert (result.failure, result.complete) == (None, True)


def test_philosophers_are_fewer_with_reduction() -> None:
    plain = explore(philosophers(5, left_handed=True), reduce=False)
    reduced = explore(philosophers(5, left_handed=True))
    assert reduced.complete
    assert reduced.steps * 10 < plain.steps


def sleeper(checks_again: bool) -> Model:
    """A lost wake-up: between the look at the flag and the sleep the event comes."""
    model = Model()
    flag, awake = model.var("flag"), model.var("awake", 1)

    def consumer() -> Thread:
        if checks_again:
            yield awake.write(0)
            if (yield flag.read()):
                return
        else:
            if (yield flag.read()):
                return
            yield awake.write(0)
        yield awake.wait(bool)

    def producer() -> Thread:
        yield flag.write(1)
        yield awake.write(1)

    model.thread("consumer", consumer)
    model.thread("producer", producer)
    return model


@pytest.mark.parametrize("reduce", [False, True])
def test_a_lost_wake_up_is_a_deadlock(reduce: bool) -> None:
    result = explore(sleeper(False), reduce=reduce)
    assert result.failure is not None
    assert result.failure.message == "deadlock: consumer (waits for awake)"
    result = explore(sleeper(True), reduce=reduce)
    assert (result.failure, result.complete) == (None, True)


def guarded(write: bool) -> Model:
    """Two readers and a writer, who takes the lock for reading only where `write` is false."""
    model = Model()
    lock, words = model.lock("lock"), model.array("x", 2)

    def reader() -> Thread:
        yield lock.read_acquire()
        first = yield words[0].read()
        second = yield words[1].read()
        if first != second:
            fail("torn")
        yield lock.read_release()

    def writer() -> Thread:
        yield lock.acquire() if write else lock.read_acquire()
        yield words[0].write(1)
        yield words[1].write(1)
        yield lock.release() if write else lock.read_release()

    for name, run in (("a", reader), ("b", reader), ("w", writer)):
        model.thread(name, run)
    return model


@pytest.mark.parametrize("reduce", [False, True])
def test_a_writer_must_take_the_lock_as_one(reduce: bool) -> None:
    assert explore(guarded(True), reduce=reduce).failure is None
    failure = explore(guarded(False), reduce=reduce).failure
    assert failure is not None
    assert failure.message.endswith(": torn")


# -- what reduction must not lose --------------------------------------------------------------------------------------


def hard(name: str) -> Model:
    model = Model()
    a, b, c = model.array("v", 3)
    lock = model.lock("lock")
    out = model.var("out", None)

    def loads(*words: Var) -> Thread:
        values = []
        for word in words:
            values.append((yield word.read()))
        yield out.write(tuple(values))

    def adds(word: Var) -> Thread:
        yield word.update(lambda value: value + 1)

    def swaps() -> Thread:
        # Before `c` was counted up it would do nothing, and race nothing.
        yield atomically([c, b], lambda x, y: (y, x) if x > y else None)

    def releases(lock: Lock) -> Thread:
        yield lock.release()

    def takes(lock: Lock) -> Thread:
        yield lock.acquire()

    def shares(lock: Lock) -> Thread:
        yield a.write(1)
        yield lock.read_acquire()
        yield b.write(1)
        yield lock.read_release()

    def passes(lock: Lock) -> Thread:
        yield lock.read_acquire()
        yield lock.read_release()
        yield from loads(b)

    if name == "a step that does something only after another":
        model.thread("loads", loads, b)
        model.thread("adds", adds, c)
        model.thread("swaps", swaps)
    elif name == "a lock released by another":
        model.thread("takes", takes, lock)
        model.thread("releases", releases, lock)
    else:
        model.thread("shares", shares, lock)
        model.thread("passes", passes, lock)
    return model


@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("a step that does something only after another", False),
        ("a lock released by another", True),
        ("readers that come and go", False),
    ],
)
def test_what_is_easily_lost(name: str, fails: bool) -> None:
    ends = []
    for reduce in (False, True):
        model, found = hard(name), set()

        def on_end(end: Any, found: set[Any] = found) -> None:
            found.add(tuple(end.values.values()))

        result = explore(model, reduce=reduce, on_end=on_end)
        assert (result.failure is not None) == fails
        ends.append(found)
    if not fails:
        assert ends[0] == ends[1]


@pytest.mark.parametrize("order", ORDERS)
@settings(max_examples=60)
@given(st.data())
def test_reduction_loses_no_end_and_no_failure(order: str, data: st.DataObject) -> None:
    def draw(below: int) -> int:
        return data.draw(st.integers(0, below - 1))

    found = program(draw, order, asserts=bool(draw(2)), size=6)
    assert wrong(found) is None, found


@pytest.mark.parametrize("reduce", [False, True])
def test_what_a_thread_says_comes_before_that_nobody_can_go_on(reduce: bool) -> None:
    model = Model()
    word = model.var("x")

    def waits() -> Thread:
        yield word.wait(bool)

    def says() -> Thread:
        yield word.read()
        fail("it is 0")

    model.thread("waits", waits)
    model.thread("says", says)
    failure = explore(model, reduce=reduce).failure
    assert failure is not None
    assert failure.message == "says: it is 0"


# -- around a search ---------------------------------------------------------------------------------------------------


def test_a_search_stops_at_its_bound_and_says_that_it_is_not_complete() -> None:
    for reduce in (False, True):
        result = explore(philosophers(5, left_handed=True), reduce=reduce, max_states=50)
        assert (result.states, result.complete, result.failure) == (50, False, None)


def test_progress_is_told() -> None:
    seen: list[int] = []

    def on_progress(result: Result) -> None:
        seen.append(result.states)

    explore(writers(4, 12, shared=False), reduce=False, on_progress=on_progress)
    assert seen == [0x4000]


def test_schedules_are_counted_exactly() -> None:
    for threads, steps, wanted in ((2, 3, comb(6, 3)), (3, 2, 90), (4, 2, 2520)):
        for shared in (False, True):
            assert count_schedules(writers(threads, steps, shared=shared)) == wanted
    # The beginnings of schedules, of each length.
    assert count_moves(writers(2, 1, shared=True)) == 4
    assert count_moves(writers(2, 2, shared=False)) == 2 + 4 + 6 + 6
    # Where somebody must wait there are fewer: two lock regions one after the other, and the way into the first.
    model = Model()
    lock = model.lock("lock")

    def thread() -> Thread:
        yield lock.acquire()
        yield lock.release()

    model.thread("a", thread)
    model.thread("b", thread)
    assert count_schedules(model) == 2
    assert count_schedules(writers(3, 3, shared=False), max_states=10) is None

    def forever(word: Var) -> Thread:
        while True:
            yield word.write(1)

    model = Model()
    model.thread("t", forever, model.var("x"))
    assert count_schedules(model) is None


@pytest.mark.parametrize("order", ORDERS)
def test_a_variable_may_have_more_values_than_the_search_is_prepared_for(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model() -> tuple[Model, Var]:
        model = Model(order)
        word = model.var("x", coherent=True)

        def thread(steps: int) -> Thread:
            for _ in range(steps):
                yield word.add(1)

        model.thread("a", thread, 300)
        model.thread("b", thread, 2)
        return model, word

    wide = explore(model()[0])
    monkeypatch.setattr("pvirq.check.search.BITS", 8)
    made, word = model()
    ends = []
    result = explore(made, on_end=lambda end: ends.append(end[word]))
    assert ends == [302]
    assert (result.states, result.steps, result.complete, result.notes) == (wide.states, wide.steps, True, wide.notes)


def test_the_same_model_is_searched_the_same_way_each_time() -> None:
    first, second = (explore(philosophers(3, left_handed=False)) for _ in range(2))
    assert (first.failure, first.states, first.steps) == (second.failure, second.states, second.steps)

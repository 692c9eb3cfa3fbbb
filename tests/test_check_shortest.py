"""The shortest schedule of a failure."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checklib import program
from pvirq.check import Failure, Model, Thread, Var, explore, fail, pct, shorten
from pvirq.check.guided import ScheduleError, follow
from pvirq.check.shortest import switches
from pvirq.check.system import State, System


def lost_update(others: int) -> Model:
    """Two threads add one, by load and store; others do something else."""
    model = Model()
    word, away = model.var("x"), model.var("y")

    def adds() -> Thread:
        value = yield word.read()
        yield word.write(value + 1)

    def other() -> Thread:
        for _ in range(3):
            yield away.add(1)

    def judges() -> Thread:
        yield word.wait(lambda value: value > 0)
        yield away.read()
        if (yield word.read()) == 1 and (yield away.read()) >= 2:
            raise AssertionError("an update is lost")

    for number in range(others):
        model.thread(f"other {number}", other)
    model.thread("a", adds)
    model.thread("b", adds)
    model.thread("judges", judges)
    return model


def shortest(model: Model, message: str) -> int:
    """By the plainest breadth-first search."""
    system = System(model)
    layer: set[State] = {system.initial}
    for length in range(100):
        for state in layer:
            wrong = system.broken(state)
            if wrong is None and not system.moves(state):
                wrong = system.verdict(state)
            if wrong == message:
                return length
        layer = {after for state in layer if system.broken(state) is None for _, after in system.moves(state)}
    raise AssertionError("it never fails")


@pytest.mark.parametrize("max_states", [200_000, 0])
def test_a_failure_becomes_as_short_as_it_can_be(max_states: int) -> None:
    result = pct(lost_update(2), depth=3, seeds=range(500), first=False)
    longest = max(result.failures.values(), key=lambda failure: len(failure.schedule))
    short = shorten(lost_update(2), longest, max_states=max_states)
    assert short.message == longest.message
    assert follow(lost_update(2), short.schedule)[1] == short.message
    # The judge reads four times, and somebody adds to each of the two.
    assert len(short.schedule) == 8 < len(longest.schedule)
    assert shorten(lost_update(2), longest, max_states=max_states) == short


def test_of_the_shortest_it_is_the_one_with_fewest_switches() -> None:
    failure = explore(lost_update(1)).failure
    assert failure is not None
    system = System(lost_update(1))
    short = shorten(lost_update(1), failure)
    assert len(short.schedule) == 8
    # One adds; the judge looks, or the other one first.
    assert switches(system, short.schedule) == 2


@settings(max_examples=40)
@given(st.data())
def test_it_is_the_shortest_of_all(data: st.DataObject) -> None:
    def draw(below: int) -> int:
        return data.draw(st.integers(0, below - 1))

    found = program(draw, ["sc", "tso"][draw(2)], asserts=True, size=6)
    failure = explore(found.model(), reduce=False).failure
    if failure is None:
        return
    short = shorten(found.model(), failure)
    assert follow(found.model(), short.schedule)[1] == failure.message
    assert len(short.schedule) == shortest(found.model(), failure.message)
    greedy = shorten(found.model(), failure, max_states=0)
    assert follow(found.model(), greedy.schedule)[1] == failure.message
    assert len(greedy.schedule) <= len(failure.schedule)


def toggling() -> Model:
    model = Model()
    words = model.array("x", 2)

    def toggles(word: Var) -> Thread:
        yield words[1].add(1)
        while True:
            yield word.write(1)
            yield word.write(0)

    def once() -> Thread:
        for _ in range(4):
            yield words[1].add(1)

    model.thread("once", once)
    model.thread("toggles", toggles, words[0])
    return model


def test_a_livelock_keeps_its_circle() -> None:
    failure = explore(toggling()).failure
    assert failure is not None
    assert failure.message == "livelock: toggles go on for ever"
    short = shorten(toggling(), failure)
    assert short.message == failure.message
    assert len(short.schedule) <= len(failure.schedule)
    states = [move.state for move in follow(toggling(), short.schedule)[0]]
    assert states[-1] in states[:-1]


def test_a_schedule_that_does_not_fail_is_said_so() -> None:
    for process in (0, 9):
        with pytest.raises(ScheduleError, match="doesn't lead to the failure"):
            shorten(lost_update(0), Failure("nothing", ((process, 0),)))


def test_anything_that_is_wrong_may_be_shorter() -> None:
    model = Model()
    word = model.var("word")

    def thread(me: int) -> Thread:
        for _ in range(me):
            yield word.read()
        fail(f"{me} steps are too many")

    model.thread("long", thread, 5)
    model.thread("short", thread, 2)
    failure = Failure("long: 5 steps are too many", ((0, 0),) * 5)
    assert shorten(model, failure) == failure
    assert shorten(model, failure, same=False) == Failure("short: 2 steps are too many", ((1, 0),) * 2)

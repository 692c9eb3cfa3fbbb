"""Ways that never end: a livelock is what a fair scheduler may stay in."""

from __future__ import annotations

import pytest

from pvirq.check import Model, Thread, Var, explore
from pvirq.check.guided import follow


def spins(word: Var) -> Thread:
    while not (yield word.read()):
        pass


def sets(word: Var) -> Thread:
    yield word.write(1)


def toggles(word: Var, number: int) -> Thread:
    while True:
        yield word.write(number)


@pytest.mark.parametrize("order", ["sc", "tso"])
def test_who_waits_for_one_that_can_go_on_is_no_livelock(order: str) -> None:
    model = Model(order)
    word = model.var("x")
    model.thread("spins", spins, word)
    model.thread("sets", sets, word)
    result = explore(model)
    assert (result.failure, result.complete, result.cyclic, result.reduced) == (None, True, True, False)
    assert result.notes == ["it can go round in circles: no reduction"]


def test_who_waits_for_what_never_comes_is_one() -> None:
    model = Model()
    word = model.var("x")
    model.thread("spins", spins, word)
    model.thread("sets", sets, model.var("y"))
    failure = explore(model).failure
    assert failure is not None
    assert failure.message == "livelock: spins go on for ever"


def test_the_schedule_of_a_livelock_goes_once_around() -> None:
    model = Model()
    word = model.var("x")
    model.thread("a", toggles, word, 1)
    model.thread("b", toggles, word, 2)
    failure = explore(model).failure
    assert failure is not None
    assert failure.message == "livelock: a, b go on for ever"
    moved, wrong = follow(model, failure.schedule)
    assert wrong is None
    assert {move.name for move in moved} == {"a", "b"}
    assert moved[-1].state in [move.state for move in moved[:-1]]


def test_two_that_yield_to_each_other_for_ever() -> None:
    def polite(mine: Var, other: Var) -> Thread:
        while True:
            yield mine.write(1)
            if not (yield other.read()):
                return
            yield mine.write(0)

    model = Model()
    flags = model.array("flag", 2)
    model.thread("a", polite, flags[0], flags[1])
    model.thread("b", polite, flags[1], flags[0])
    failure = explore(model).failure
    assert failure is not None
    # One alone is enough: the other may have gone, and left its flag up.
    assert failure.message.startswith("livelock: ")
    moved, _ = follow(model, failure.schedule)
    assert moved[-1].state in [move.state for move in moved[:-1]]

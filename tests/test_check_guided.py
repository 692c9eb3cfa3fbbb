"""Schedules that are followed."""

from __future__ import annotations

import pytest

from checklib import ORDERS
from pvirq.check import Model, Thread, Var, choose, explore, explore_all
from pvirq.check.guided import ScheduleError, follow, one_by_one


def model(order: str = "sc") -> Model:
    made = Model(order)
    word = made.var("x")

    def writes(word: Var) -> Thread:
        yield word.write((yield choose(3)))

    def reads(word: Var) -> Thread:
        if (yield word.read().saying("looks")) == 2:
            raise AssertionError("it is 2")

    made.thread("writes", writes, word)
    made.thread("reads", reads, word)
    return made


def test_each_step_says_who_did_what_where_and_what_changed() -> None:
    moved, wrong = follow(model(), [(0, 2), (0, 0), (1, 0)])
    assert wrong == "reads: it is 2"
    assert [(move.name, move.text, move.changed) for move in moved] == [
        ("writes", "chooses one of 3", ()), ("writes", "writes x = 2", (("x", 0, 2),)), ("reads", "looks", ()),
    ]  # fmt: skip
    assert all(move.line.startswith("test_check_guided.py:") for move in moved)
    assert follow(model(), [(0, 1), (0, 0), (1, 0)])[1] is None


def test_a_store_buffer_has_steps_of_its_own() -> None:
    moved, wrong = follow(model("tso"), [(0, 2), (0, 0), (1, 0), (2, 0)])
    assert wrong is None
    assert (moved[-1].name, moved[-1].text) == ("writes", "its store of 2 to x becomes visible")
    assert moved[-1].changed == (("x", 0, 2),)


def test_a_schedule_that_does_not_fit_is_said_so() -> None:
    for schedule, message in (
        ([(0, 3)], "step 1: writes can't go on there"),
        ([(1, 0), (1, 0)], "step 2: reads can't go on there"),
        ([(7, 0)], "step 1: process 7 can't go on there"),
    ):
        with pytest.raises(ScheduleError, match=message):
            follow(model(), schedule)


@pytest.mark.parametrize("order", ORDERS)
def test_what_a_search_finds_is_what_its_schedule_does(order: str) -> None:
    failure = explore(model(order)).failure
    assert failure is not None
    assert follow(model(order), failure.schedule)[1] == failure.message == "reads: it is 2"


@pytest.mark.parametrize("order", ORDERS)
def test_one_by_one(order: str) -> None:
    end = one_by_one(model(order), "reads", "writes")
    assert (list(end.values.values()), end.waiting) == ([0], {})


@pytest.mark.parametrize("order", ORDERS)
def test_one_by_one_each_sees_what_those_before_it_did(order: str) -> None:
    made = Model(order)
    words, seen = made.array("x", 2), made.var("seen", None)

    def writes() -> Thread:
        yield words[0].write(1)
        yield words[1].write(2)

    def reads() -> Thread:
        yield seen.write(((yield words[0].read()), (yield words[1].read())))

    made.thread("reads", reads)
    made.thread("writes", writes)
    assert one_by_one(made, "writes", "reads")[seen] == (1, 2)


@pytest.mark.parametrize("jobs", [1, 2])
def test_several_models_on_several_cores(jobs: int) -> None:
    def clean() -> Model:
        made = Model()
        word = made.var("x")

        def thread() -> Thread:
            yield word.add(1)

        for name in "abc":
            made.thread(name, thread)
        return made

    found = list(explore_all({"fails": model, "clean": clean, "again": model}, jobs=jobs))
    assert [name for name, _ in found] == ["fails", "clean", "again"]
    assert [result.failure and result.failure.message for _, result in found] == [
        "reads: it is 2",
        None,
        "reads: it is 2",
    ]
    assert [(result.states, result.complete) for _, result in found][1] == (8, True)

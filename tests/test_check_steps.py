"""The language: what each step does and gives."""

from __future__ import annotations

from typing import Any

import pytest

from pvirq.check import End, Model, Step, Thread, Var, atomically, explore, look, mb, note, rmb, wmb
from pvirq.check.guided import one_by_one


@pytest.mark.parametrize(
    ("make", "before", "after", "result", "text"),
    [
        (lambda x: x.read(), 3, 3, 3, "reads x"),
        (lambda x: x.write(4), 3, 4, None, "writes x = 4"),
        (lambda x: x.wait(bool), 3, 3, 3, "waits for x"),
        (lambda x: x.update(lambda value: value * 2), 3, 6, 3, "changes x"),
        (lambda x: x.update(lambda value: value * 2, "doubles x"), 3, 6, 3, "doubles x"),
        (lambda x: x.xchg(9), 3, 9, 3, "exchanges x for 9"),
        (lambda x: x.cmpxchg(3, 5), 3, 5, 3, "compares x with 3, exchanges it for 5"),
        (lambda x: x.cmpxchg(2, 5), 3, 3, 3, "compares x with 2, exchanges it for 5"),
        (lambda x: x.add(2), 3, 5, 3, "adds 2 to x"),
        (lambda x: x.set_bit(2), 3, 7, False, "sets bit 2 of x"),
        (lambda x: x.set_bit(1), 3, 3, True, "sets bit 1 of x"),
        (lambda x: x.clear_bit(1), 3, 1, True, "clears bit 1 of x"),
        (lambda x: x.clear_bit(2), 3, 3, False, "clears bit 2 of x"),
        (lambda x: look([x]), 3, 3, (3,), "looks at x"),
        (lambda x: atomically([x], lambda value: (value + 1,)), 3, 4, (3,), "does x"),
        (lambda x: atomically([x], lambda value: None), 3, 3, (3,), "does x"),
        (lambda x: mb(), 3, 3, None, "mb()"),
        (lambda x: wmb(), 3, 3, None, "wmb()"),
        (lambda x: rmb(), 3, 3, None, "rmb()"),
        (lambda x: note("here"), 3, 3, 0, "here"),
        (lambda x: x.read().saying("looks whether it is there"), 3, 3, 3, "looks whether it is there"),
    ],
)
@pytest.mark.parametrize("order", ["sc", "tso", "weak"])
def test_steps(order: str, make: Any, before: int, after: int, result: Any, text: str) -> None:
    model = Model(order)
    word, out = model.var("x", before), model.var("out", None)
    step: Step = make(word)
    assert step.text == text

    def thread() -> Thread:
        yield out.write((yield step))

    model.thread("t", thread)
    end = one_by_one(model)
    assert (end[word], end[out], end.waiting) == (after, result, {})


def test_locks() -> None:
    model = Model()
    lock, out = model.lock("lock"), model.var("out", ())

    def holds() -> Thread:
        yield lock.acquire()
        yield out.write(((yield lock.trylock()), (yield lock.read_trylock())))

    def waits() -> Thread:
        yield lock.read_acquire()

    model.thread("holds", holds)
    model.thread("waits", waits)
    end = one_by_one(model)
    assert (end[lock.var], end[out], end.waiting) == (-1, (False, False), {"waits": "takes lock for reading"})

    model = Model()
    lock, out = model.lock("lock"), model.var("out", ())

    def reads() -> Thread:
        yield lock.read_acquire()
        yield out.write(((yield lock.trylock()), (yield lock.read_trylock())))
        yield lock.read_release()

    model.thread("reads", reads)
    end = one_by_one(model)
    assert (end[lock.var], end[out]) == (1, (False, True))


def test_several_variables_as_one() -> None:
    model = Model()
    words = model.array("x", 3)

    def thread() -> Thread:
        values = yield atomically(words[:2], lambda a, b: (b + 1, a + 2))
        assert values == (0, 0)
        assert (yield look(words)) == (1, 2, 0)
        yield atomically(words, lambda *_: None, when=lambda a, b, c: c == 1, text="waits for the last")

    model.thread("t", thread, may_wait=True)
    end = one_by_one(model)
    assert [end[word] for word in words] == [1, 2, 0]
    assert end.waiting == {"t": "waits for the last"}
    assert [repr(word) for word in words] == ["<x[0]>", "<x[1]>", "<x[2]>"]


def test_who_waits_for_ever_is_a_deadlock_unless_it_may() -> None:
    def model(may_wait: bool) -> Model:
        model = Model()
        word = model.var("x")

        def idle(word: Var) -> Thread:
            yield word.wait(bool)

        model.thread("idle", idle, word, may_wait=may_wait)
        return model

    failure = explore(model(False)).failure
    assert failure is not None
    assert failure.message == "deadlock: idle (waits for x)"
    assert explore(model(True)).failure is None


def test_properties() -> None:
    def model() -> tuple[Model, Var]:
        model = Model()
        word = model.var("x")

        def thread(word: Var) -> Thread:
            yield word.write(1)
            yield word.write(2)

        model.thread("t", thread, word)
        return model, word

    made, word = model()
    made.invariant("x is 1", [word], lambda value: value != 1)
    failure = explore(made).failure
    assert failure is not None
    assert (failure.message, failure.schedule) == ("x is 1", ((0, 0),))

    made, word = model()

    def judge(end: End) -> str | None:
        return f"x is {end[word]} in the end" if end[word] == 2 else None

    made.at_end(judge)
    failure = explore(made).failure
    assert failure is not None
    assert (failure.message, failure.schedule) == ("x is 2 in the end", ((0, 0), (0, 0)))

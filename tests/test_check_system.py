"""Memory orders: what litmus tests may end with under each is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from checklib import ORDERS, finals
from pvirq.check import Model, Step, Thread, Var, explore, mb, rmb, wmb

Make = Callable[[Model], tuple[Any, ...]]
Barrier = Callable[[], Step] | None


def outcomes(order: str, threads: Callable[[Model, list[Var], list[Var]], None]) -> set[tuple[Any, ...]]:
    """What the registers can be in the end, by the plain search as by the reduced one."""

    def make() -> tuple[Model, list[Var]]:
        model = Model(order)
        words, registers = model.array("x", 2), model.array("r", 4, -1, coherent=True)
        threads(model, words, registers)
        return model, [*registers, *words]

    found = []
    for reduce in (False, True):
        model, seen = make()
        found.append(finals(model, *seen, reduce=reduce))
    assert found[0] == found[1]
    return found[0]


def steps(*wanted: tuple[Any, ...]) -> Callable[[], Thread]:
    """A thread: ("w", var, value), ("r", var, register) or (barrier,), None for no barrier."""

    def thread() -> Thread:
        read = []
        for name, *rest in wanted:
            if name == "w":
                yield rest[0].write(rest[1])
            elif name == "r":
                read.append((rest[1], (yield rest[0].read())))
            elif name is not None:
                yield name()
        for register, value in read:
            yield register.write(value)

    return thread


def store_buffer(barrier: Barrier) -> Callable[[Model, list[Var], list[Var]], None]:
    def threads(model: Model, x: list[Var], r: list[Var]) -> None:
        model.thread("a", steps(("w", x[0], 1), (barrier,), ("r", x[1], r[0])))
        model.thread("b", steps(("w", x[1], 1), (barrier,), ("r", x[0], r[1])))

    return threads


def message(write: Barrier, read: Barrier) -> Callable[[Model, list[Var], list[Var]], None]:
    def threads(model: Model, x: list[Var], r: list[Var]) -> None:
        model.thread("a", steps(("w", x[0], 1), (write,), ("w", x[1], 1)))
        model.thread("b", steps(("r", x[1], r[0]), (read,), ("r", x[0], r[1])))

    return threads


@pytest.mark.parametrize("order", ORDERS)
def test_store_buffering(order: str) -> None:
    found = {ends[:2] for ends in outcomes(order, store_buffer(None))}
    both = {(0, 1), (1, 0), (1, 1)}
    assert found == (both if order == "sc" else both | {(0, 0)})
    assert {ends[:2] for ends in outcomes(order, store_buffer(mb))} == both


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_for_some_accesses_are_none_for_stores_before_loads(order: str) -> None:
    for barrier in (wmb, rmb):
        assert ((0, 0) in {ends[:2] for ends in outcomes(order, store_buffer(barrier))}) == (order != "sc")


@pytest.mark.parametrize("order", ORDERS)
def test_message_passing(order: str) -> None:
    fine = {(0, 0), (0, 1), (1, 1)}
    broken = fine | {(1, 0)} if order == "weak" else fine
    assert {ends[:2] for ends in outcomes(order, message(None, None))} == broken
    assert {ends[:2] for ends in outcomes(order, message(wmb, None))} == broken
    assert {ends[:2] for ends in outcomes(order, message(None, rmb))} == broken
    assert {ends[:2] for ends in outcomes(order, message(wmb, rmb))} == fine
    assert {ends[:2] for ends in outcomes(order, message(mb, mb))} == fine


@pytest.mark.parametrize("order", ORDERS)
def test_load_buffering_needs_loads_after_later_stores_which_no_order_here_has(order: str) -> None:
    def threads(model: Model, x: list[Var], r: list[Var]) -> None:
        model.thread("a", steps(("r", x[0], r[0]), ("w", x[1], 1)))
        model.thread("b", steps(("r", x[1], r[1]), ("w", x[0], 1)))

    assert {ends[:2] for ends in outcomes(order, threads)} == {(0, 0), (0, 1), (1, 0)}


@pytest.mark.parametrize("order", ORDERS)
def test_independent_reads_of_independent_writes(order: str) -> None:
    def model_of(barrier: Barrier) -> Callable[[Model, list[Var], list[Var]], None]:
        def threads(model: Model, x: list[Var], r: list[Var]) -> None:
            model.thread("a", steps(("w", x[0], 1)))
            model.thread("b", steps(("w", x[1], 1)))
            model.thread("c", steps(("r", x[0], r[0]), (barrier,), ("r", x[1], r[1])))
            model.thread("d", steps(("r", x[1], r[2]), (barrier,), ("r", x[0], r[3])))

        return threads

    found = {ends[:4] for ends in outcomes(order, model_of(None))}
    assert len(found) == (16 if order == "weak" else 15)
    assert ((1, 0, 1, 0) in found) == (order == "weak")
    if order == "weak":
        assert (1, 0, 1, 0) not in {ends[:4] for ends in outcomes(order, model_of(rmb))}


@pytest.mark.parametrize("order", ORDERS)
def test_two_stores_each(order: str) -> None:
    def model_of(barrier: Barrier) -> Callable[[Model, list[Var], list[Var]], None]:
        def threads(model: Model, x: list[Var], r: list[Var]) -> None:
            model.thread("a", steps(("w", x[0], 1), (barrier,), ("w", x[1], 2)))
            model.thread("b", steps(("w", x[1], 1), (barrier,), ("w", x[0], 2)))

        return threads

    fine = {(1, 2), (2, 1), (2, 2)}
    assert {ends[4:] for ends in outcomes(order, model_of(None))} == (fine | {(1, 1)} if order == "weak" else fine)
    assert {ends[4:] for ends in outcomes(order, model_of(wmb))} == fine


@pytest.mark.parametrize("order", ORDERS)
def test_two_loads_of_one_variable_are_never_out_of_order(order: str) -> None:
    def threads(model: Model, x: list[Var], r: list[Var]) -> None:
        model.thread("a", steps(("w", x[0], 1), ("w", x[0], 2)))
        model.thread("b", steps(("r", x[0], r[0]), ("r", x[0], r[1])))

    assert {ends[:2] for ends in outcomes(order, threads)} == {(a, b) for a in range(3) for b in range(a, 3)}


@pytest.mark.parametrize("order", ORDERS)
def test_a_thread_sees_its_own_stores_at_once(order: str) -> None:
    def threads(model: Model, x: list[Var], r: list[Var]) -> None:
        model.thread("a", steps(("w", x[0], 1), ("w", x[0], 2), ("r", x[0], r[0])))

    assert {ends[0] for ends in outcomes(order, threads)} == {2}


def test_a_coherent_variable_has_no_old_values() -> None:
    def model_of(coherent: bool) -> tuple[Model, list[Var]]:
        model = Model("weak")
        data, flag = model.var("data", coherent=coherent), model.var("flag")
        seen = model.array("r", 2, -1, coherent=True)
        model.thread("a", steps(("w", data, 1), (wmb,), ("w", flag, 1)))
        model.thread("b", steps(("r", flag, seen[0]), ("r", data, seen[1])))
        return model, seen

    model, seen = model_of(False)
    assert (1, 0) in finals(model, *seen)
    model, seen = model_of(True)
    assert (1, 0) not in finals(model, *seen)


def test_a_lock_orders_what_it_guards_under_each_order() -> None:
    for order in ORDERS:
        model = Model(order)
        lock, words = model.lock("lock"), model.array("x", 2)

        def thread(lock: Any, words: list[Var]) -> Thread:
            yield lock.acquire()
            values = (yield words[0].read()), (yield words[1].read())
            assert values in ((0, 0), (1, 1)), values
            yield words[0].write(1)
            yield words[1].write(1)
            yield lock.release()

        model.thread("a", thread, lock, words)
        model.thread("b", thread, lock, words)
        result = explore(model)
        assert result.complete, result
        assert result.failure is None, (order, result.failure)


def test_readers_that_leave_at_once_are_counted_under_each_order() -> None:
    for order in ORDERS:
        model = Model(order)
        lock = model.lock("lock")

        def reader(lock: Any) -> Thread:
            yield lock.read_acquire()
            yield lock.read_release()

        for name in "abc":
            model.thread(name, reader, lock)
        assert finals(model, lock.var) == {(0,)}


def test_an_unknown_order_is_said_so() -> None:
    with pytest.raises(ValueError, match="pso"):
        explore(Model("pso"))

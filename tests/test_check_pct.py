"""Random schedules: the same for a seed, on any number of cores, and no rarer than promised to fail."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from math import isclose

import pytest

from pvirq.check import Model, Thread, Var, choose, pct
from pvirq.check.guided import follow


def ordered(depth: int, steps: int, threads: int = 2) -> Model:
    """A bug of that depth: the threads' steps must come in one order of `depth` - 1 switches, at known places."""
    model = Model()
    turn = model.var("turn")
    points = [(number % threads, 1 + number // threads * 2) for number in range(depth)]

    def thread(me: int) -> Thread:
        for step in range(steps):
            for number, (who, at) in enumerate(points):
                if (who, at) == (me, step):
                    yield turn.update(lambda value, number=number: value + 1 if value == number else value)
                    break
            else:
                yield turn.read()

    for number in reversed(range(threads)):
        model.thread(f"t{number}", thread, number)
    model.invariant("all came in that order", [turn], lambda value: value < depth)
    return model


@pytest.mark.parametrize(("depth", "steps", "threads"), [(1, 6, 2), (2, 6, 2), (3, 6, 2), (2, 4, 3)])
def test_a_bug_is_found_as_often_as_promised(depth: int, steps: int, threads: int) -> None:
    runs = 2000
    result = pct(ordered(depth, steps, threads), depth=depth, seeds=range(runs), steps=threads * steps, first=False)
    assert (result.runs, result.processes, result.steps) == (runs, threads, threads * steps)
    assert isclose(result.bound, 1 / (threads * (threads * steps) ** (depth - 1)))
    assert len(result.failures) / runs >= result.bound
    assert isclose(result.missed(), (1 - result.bound) ** runs)


def test_what_is_found_is_what_its_schedule_does() -> None:
    result = pct(ordered(3, 6), depth=3, seeds=range(2000))
    (seed,) = result.failures
    assert result.runs == seed + 1
    failure = result.failures[seed]
    moved, wrong = follow(ordered(3, 6), failure.schedule)
    assert (wrong, len(moved)) == ("all came in that order", len(failure.schedule))


def test_a_seed_does_the_same_again_and_on_several_cores() -> None:
    alone = pct(ordered(3, 6), depth=3, seeds=range(300), first=False)
    assert alone.failures
    assert pct(ordered(3, 6), depth=3, seeds=range(300), first=False) == alone
    assert pct(ordered(3, 6), depth=3, seeds=range(300), first=False, jobs=2) == alone
    first = pct(ordered(3, 6), depth=3, seeds=range(300))
    assert pct(ordered(3, 6), depth=3, seeds=range(300), jobs=2) == first
    assert list(first.failures) == [min(alone.failures)]


def test_a_store_buffer_is_a_thread() -> None:
    def model(order: str) -> Model:
        made = Model(order)
        flags, seen = made.array("flag", 2), made.var("seen", 0, coherent=True)

        def thread(me: int) -> Thread:
            yield flags[me].write(1)
            if not (yield flags[1 - me].read()):
                yield seen.add(1)

        made.thread("a", thread, 0)
        made.thread("b", thread, 1)
        made.invariant("neither saw the other", [seen], lambda value: value < 2)
        return made

    assert not pct(model("sc"), depth=3, seeds=range(200)).failures
    result = pct(model("tso"), depth=2, seeds=range(200))
    assert result.processes == 4
    assert result.failures


def test_deadlocks_choices_and_runs_without_end() -> None:
    model = Model()
    word = model.var("x")

    def waits() -> Thread:
        yield word.wait(bool)

    def chooses() -> Thread:
        yield word.write((yield choose(2)))

    model.thread("waits", waits)
    model.thread("chooses", chooses)
    result = pct(model, depth=1, seeds=range(50), first=False)
    assert {failure.message for failure in result.failures.values()} == {"deadlock: waits (waits for x)"}
    assert 0 < len(result.failures) < 50

    def goes_on(word: Var) -> Thread:
        while True:
            yield word.write(1)

    model = Model()
    model.thread("goes on", goes_on, model.var("x"))
    result = pct(model, seeds=range(3), max_steps=20)
    assert (result.runs, result.cut, result.longest, result.failures) == (3, 3, 20, {})


def test_depth_is_one_at_least() -> None:
    with pytest.raises(ValueError, match="depth 0"):
        pct(Model(), depth=0)


def test_ctrl_c_leaves_no_worker() -> None:
    script = textwrap.dedent("""
        import os
        from pvirq.check import Model, pct

        def goes_on(word):
            while True:
                yield word.write(1)

        model = Model()
        model.thread("t", goes_on, model.var("x"))
        print(os.getpid(), flush=True)
        pct(model, seeds=range(1 << 20), max_steps=1 << 40, steps=5, jobs=2)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    for _ in range(600):
        if len(_children(process.pid)) == 2:
            break
        time.sleep(0.05)
    workers = _children(process.pid)
    assert len(workers) == 2
    os.kill(process.pid, signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    for _ in range(600):
        if not any(_alive(worker) for worker in workers):
            break
        time.sleep(0.05)
    assert not any(_alive(worker) for worker in workers)


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(each) for each in file.read().split()]


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

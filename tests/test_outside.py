"""A host that waits for the world outside: time passes in truth while an answer is awaited, and jumps otherwise."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

import pvirq
from pvirq.cli.terminal import ConsoleInput, Interrupts
from pvirq.guest import HostStuck
from pvirq.linux.kthread import Body, sleep
from pvirq.net.outside import Outside


class Pipe:
    """An outsider with a pipe to write into."""

    def __init__(self, due_ns: int | None = None) -> None:
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.awaited = True
        self.due = due_ns
        self.got: list[bytes] = []
        self.polls: list[bool] = []
        self.closed = 0

    def fileno(self) -> int:
        return self.read_end

    def due_ns(self) -> int | None:
        return self.due

    def poll(self, *, ready: bool) -> None:
        self.polls.append(ready)
        try:
            self.got.append(os.read(self.read_end, 100))
        except BlockingIOError:
            return

    def close(self) -> None:
        self.closed += 1
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with pvirq.Host(machine_memory=1 << 28) as host:
        yield host


def test_nobody_waits_for_nothing(host: pvirq.Host) -> None:
    assert not host.outside
    began = time.monotonic()
    assert not host.run(lambda: False, 3600 * 10**9)
    assert time.monotonic() - began < 600  # it jumped


def test_time_passes_in_truth_while_somebody_is_awaited(host: pvirq.Host) -> None:
    pipe = Pipe()
    host.outside.add(pipe)
    virtual, real = host.clock.now(), time.monotonic_ns()
    assert not host.run(lambda: False, 50_000_000)
    assert time.monotonic_ns() - real >= host.clock.now() - virtual >= 50_000_000
    pipe.awaited = False
    assert not host.run(lambda: False, 3600 * 10**9)
    assert True in pipe.polls


def test_what_comes_ends_the_wait(host: pvirq.Host) -> None:
    pipe = Pipe()
    host.outside.add(pipe)
    os.write(pipe.write_end, b"x")
    assert host.run(lambda: bool(pipe.got), 10**12)  # no one else could have ended it before
    assert pipe.got == [b"x"]
    assert host.clock.now() < 10**11


def test_who_wants_to_be_asked_again_is(host: pvirq.Host) -> None:
    pipe = Pipe(due_ns=2_000_000)
    host.outside.add(pipe)
    assert host.run(lambda: len(pipe.polls) > 5)  # without any other timer
    pipe.awaited = False
    with pytest.raises(HostStuck):
        host.run(lambda: False)


def test_timers_of_guests_fire_meanwhile(host: pvirq.Host) -> None:
    host.outside.add(Pipe())
    guest = host.model("pvops")

    def work() -> Body[int]:
        yield from sleep(guest.kernel, 20_000_000)
        return guest.kernel.now()

    began = guest.kernel.now()
    thread = guest.kernel.spawn("work", work())
    assert host.run(lambda: thread.done, 10**10)
    assert 20_000_000 <= thread.result() - began < 10**10


def test_an_idle_of_ones_own_knows(host: pvirq.Host) -> None:
    pipe, other = Pipe(due_ns=5_000_000), Pipe()
    host.outside.add(pipe)
    host.outside.add(other)
    other.awaited = False
    asked: list[int | None] = []

    def idle(ns: int | None) -> int:
        asked.append(ns)
        assert host.outside.filenos() == [pipe.fileno()]
        return 1_000_000

    host.idle = idle
    host.run(lambda: len(asked) > 3)
    assert asked[:3] == [5_000_000] * 3


def test_they_end_with_the_host() -> None:
    one, two = Pipe(), Pipe()
    with pvirq.Host(machine_memory=1 << 28) as host:
        host.outside.add(one)
        host.outside.add(two)
        host.outside.remove(two)
        host.outside.remove(two)
        assert list(host.outside) == [one]
    assert (one.closed, two.closed) == (1, 0)
    two.close()


def test_a_console_whose_input_has_ended_waits_for_them_too() -> None:
    pipe, sent = Pipe(), list[bytes]()
    read_end, write_end = os.pipe()
    os.close(write_end)
    outside = Outside()
    with Interrupts() as interrupts:
        keys = ConsoleInput(read_end, interrupts, sent.append, outside.filenos)
        keys.pump()
        assert sent == [b"\x04"]
        assert keys.wait(10**8) == 10**8  # time jumps
        outside.add(pipe)
        os.write(pipe.write_end, b"x")
        assert keys.wait(10**13) < 10**13
        pipe.poll(ready=True)
        began = time.monotonic_ns()
        assert keys.wait(10**7) == 10**7
        assert time.monotonic_ns() - began >= 10**7
    outside.close()
    os.close(read_end)


def test_limit() -> None:
    outside, pipe = Outside(), Pipe(due_ns=7)
    assert (outside.limit(None), outside.limit(3)) == (None, 3)
    outside.add(pipe)
    assert (outside.limit(None), outside.limit(3), outside.limit(9)) == (7, 3, 7)
    pipe.awaited = False
    assert outside.limit(9) == 9
    outside.close()

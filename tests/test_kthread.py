"""Kernel threads: waiting, waking, ending; on a real personality, so that each wake-up has its interrupt."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, Completion, ThreadStopped, WaitQueue, sleep
from pvirq.linux.pvops import HZ, Pvops, dom0
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine
from pvirq.xen.timer import NS_PER_S


@pytest.fixture
def kernel() -> Iterator[Kernel[Pvops]]:
    machine = Machine(1 << 28)
    yield dom0(Hypervisor(machine))
    machine.close()


def settle(kernel: Kernel[Pvops]) -> None:
    """Let it run and time pass until nothing is left to do."""
    clock = kernel.clock
    while True:
        ready = [vcpu for vcpu in kernel.domain.vcpus if vcpu.runnable]
        for vcpu in ready:
            kernel.run(vcpu)
        if not ready:
            deadline = clock.next_deadline()
            if deadline is None:
                return
            clock.jump_to(deadline)
            clock.fire_due()


def count(kernel: Kernel[Pvops], name: str) -> int:
    return sum(sum(desc.kstat) for desc in kernel.irq.descs.values() if any(a.name == name for a in desc.actions))


def test_result_and_order(kernel: Kernel[Pvops]) -> None:
    seen: list[str] = []
    first: Completion[int] = Completion()

    def reader() -> Body[int]:
        seen.append("waits")
        value = yield from first.wait()
        seen.append("got")
        return value + 1

    def writer() -> Body[None]:
        seen.append("completes")
        first.complete(41)
        seen.append("goes on")  # nobody runs in between
        return
        yield

    thread = kernel.spawn("reader", reader())
    kernel.spawn("writer", writer())
    settle(kernel)
    assert seen == ["waits", "completes", "goes on", "got"]
    assert thread.done
    assert thread.result() == 42


def test_a_thread_waits_for_another_and_gets_its_failure(kernel: Kernel[Pvops]) -> None:
    def child() -> Body[None]:
        yield from sleep(kernel, 1000)
        raise ValueError("broken")

    def parent() -> Body[str]:
        try:
            yield from kernel.spawn("child", child()).wait()
        except ValueError as error:
            return str(error)
        return "fine"

    thread = kernel.spawn("parent", parent())
    settle(kernel)
    assert thread.result() == "broken"


def test_a_failure_that_nobody_waits_for_comes_out(kernel: Kernel[Pvops]) -> None:
    def body() -> Body[None]:
        raise ValueError("broken")
        yield

    thread = kernel.spawn("alone", body())
    with pytest.raises(ValueError, match="broken"):
        settle(kernel)
    assert thread.done


def test_stop_runs_finally_and_fails_who_waits(kernel: Kernel[Pvops]) -> None:
    ended: list[str] = []

    def body() -> Body[None]:
        try:
            yield from Completion[None]().wait()
        finally:
            ended.append("cleaned up")

    thread = kernel.spawn("stuck", body())
    settle(kernel)
    assert not thread.done
    thread.stop()
    settle(kernel)
    assert ended == ["cleaned up"]
    with pytest.raises(ThreadStopped):
        thread.result()


def test_wait_queue_loses_nothing_between_look_and_wait(kernel: Kernel[Pvops]) -> None:
    queue, items, taken = WaitQueue(), [1], []

    def consumer() -> Body[None]:
        while len(taken) < 3:
            while not items:
                yield from queue.wait()
            taken.append(items.pop(0))

    thread = kernel.spawn("consumer", consumer())
    settle(kernel)
    assert taken == [1]
    items.append(2)
    queue.wake_up()
    items.append(3)
    queue.wake_up()  # nobody waits at this moment; the item is found all the same
    settle(kernel)
    assert taken == [1, 2, 3]
    assert thread.done


def test_waking_a_thread_of_another_cpu_is_a_reschedule_interrupt(kernel: Kernel[Pvops]) -> None:
    go: Completion[None] = Completion()
    thread = kernel.spawn("there", go.wait(), cpu=1)
    settle(kernel)
    before = count(kernel, "resched1")

    def waker() -> Body[None]:
        go.complete(None)
        yield from ()

    kernel.spawn("here", waker(), cpu=0)
    settle(kernel)
    assert thread.done
    assert count(kernel, "resched1") == before + 1


def test_waking_from_outside_is_no_interrupt(kernel: Kernel[Pvops]) -> None:
    settle(kernel)
    before = kernel.proc_interrupts()
    thread = kernel.spawn("from outside", sleep(kernel, 0), cpu=1)
    settle(kernel)
    assert thread.done
    assert kernel.proc_interrupts() == before


def test_compute_ticks(kernel: Kernel[Pvops]) -> None:
    before, start = count(kernel, "timer1"), kernel.now()
    kernel.spawn("busy", kernel.compute(2 * NS_PER_S), cpu=1)
    settle(kernel)
    assert kernel.now() - start == 2 * NS_PER_S
    assert count(kernel, "timer1") - before == 2 * HZ
    assert count(kernel, "timer0") == 0  # idle all the time

"""Virtual time: the clock and its timers, and the timers of a vCPU."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import VIRQ_TIMER
from pvirq.xen import evtchn, vtimer
from pvirq.xen.domain import Hypervisor, Vcpu
from pvirq.xen.timer import NS_PER_S, Clock

MS = 1_000_000


class Counter:
    """A tick counter that the test advances."""

    def __init__(self, hz: float) -> None:
        self.ticks, self.hz = 10**12, hz

    def __call__(self) -> int:
        return self.ticks

    def seconds(self, seconds: float) -> None:
        self.ticks += int(seconds * self.hz)


def running_clock(hz: float = 2.5e9) -> tuple[Clock, Counter]:
    counter = Counter(hz)
    clock = Clock(counter, hz)
    clock.start()
    return clock, counter


# -- the clock ------------------------------------------------------------


@pytest.mark.parametrize("hz", [1e9, 2.5e9, 999_999_937.0, 3.7e9, 5e9, 1.1e8])
def test_time_runs_with_the_counter(hz: float) -> None:
    clock, counter = running_clock(hz)
    assert clock.now() == 0
    counter.seconds(10)
    assert clock.now() == pytest.approx(10 * NS_PER_S, rel=1e-8)
    assert 1 << 31 <= clock.mul < 1 << 32


@given(st.floats(1e8, 6e9), st.integers(0, 1 << 62))
def test_scaling_is_the_guests_own(hz: float, ticks: int) -> None:
    """pvclock_scale_delta, in 64 bits, with the factors from vcpu_time_info."""
    clock = Clock(None, hz)
    ticks >>= max(clock.shift, 0) + 1
    delta = ticks << clock.shift if clock.shift >= 0 else ticks >> -clock.shift
    assert clock.ticks_to_ns(ticks) == (delta * clock.mul) >> 32


@given(st.floats(1e8, 6e9), st.integers(0, 1 << 60))
def test_ns_to_ticks_is_the_least_that_reaches(hz: float, ns: int) -> None:
    clock = Clock(None, hz)
    ticks = clock.ns_to_ticks(ns)
    assert clock.ticks_to_ns(ticks) >= ns
    if clock.shift >= 0 and ticks:
        assert clock.ticks_to_ns(ticks - 1) < ns


def test_time_stands_still_while_stopped() -> None:
    clock, counter = running_clock()
    counter.seconds(1)
    clock.stop()
    at = clock.now()
    counter.seconds(100)
    assert clock.now() == at
    clock.start()
    assert clock.now() == at
    counter.seconds(1)
    assert clock.now() == pytest.approx(at + NS_PER_S, abs=2)
    clock.start()  # again changes nothing
    assert clock.now() == pytest.approx(at + NS_PER_S, abs=2)


def test_jumps_go_forward_only_and_reach_their_time() -> None:
    clock, counter = running_clock()
    clock.jump_to(5 * NS_PER_S)
    assert 5 * NS_PER_S <= clock.now() < 5 * NS_PER_S + 3
    clock.jump_to(NS_PER_S)
    assert clock.now() >= 5 * NS_PER_S
    clock.stop()
    clock.jump_to(7 * NS_PER_S)
    assert clock.now() >= 7 * NS_PER_S
    clock.start()
    counter.seconds(1)
    assert clock.now() == pytest.approx(8 * NS_PER_S, abs=5)


def test_an_engine_is_told_its_tsc_offset() -> None:
    clock, counter = running_clock()
    told: list[int] = []
    clock.on_offset(told.append)
    counter.seconds(1)
    clock.jump_to(9 * NS_PER_S)
    assert counter() + told[-1] == clock.ticks()
    clock.stop()
    counter.seconds(3)
    clock.start()
    assert counter() + told[-1] == clock.ticks()
    heard = len(told)
    clock.remove_offset(told.append)
    clock.jump_to(99 * NS_PER_S)
    assert len(told) == heard


def test_counter_at() -> None:
    clock, counter = running_clock()
    counter.seconds(2)
    clock.jump_to(50 * NS_PER_S)
    when = clock.now() + 3 * MS
    counter.ticks = clock.counter_at(when) - 1
    assert clock.now() < when
    counter.ticks += 1
    assert clock.now() >= when


# -- timers ---------------------------------------------------------------


def test_timers_fire_in_order_and_once() -> None:
    clock = Clock()
    fired: list[str] = []
    for name, when in (("c", 30), ("a", 10), ("b", 20), ("b2", 20)):
        clock.at(when, lambda name=name: fired.append(name))  # type: ignore[misc]
    assert clock.next_deadline() == 10
    clock.start()
    clock.jump_to(25)
    assert clock.fire_due() == 3
    assert fired == ["a", "b", "b2"]
    assert clock.next_deadline() == 30
    clock.jump_to(1000)
    assert clock.fire_due() == 1
    assert clock.fire_due() == 0
    assert clock.next_deadline() is None


def test_a_cancelled_timer_is_forgotten() -> None:
    clock = Clock()
    timer = clock.at(10, lambda: pytest.fail("cancelled"))
    timer.cancel()
    timer.cancel()
    assert clock.next_deadline() is None
    clock.start()
    clock.jump_to(20)
    assert clock.fire_due() == 0


def test_timers_from_timers() -> None:
    clock = Clock()
    fired: list[int] = []

    def again() -> None:
        fired.append(clock.now())
        if len(fired) < 4:
            clock.at(clock.now(), again)

    clock.at(5, again)
    other = clock.at(5, lambda: fired.append(-1))
    clock.at(5, other.cancel)
    clock.start()
    clock.jump_to(5)
    clock.fire_due()
    assert fired == [5, -1, 5, 5]


def test_an_earlier_deadline_is_told() -> None:
    clock = Clock()
    told: list[int] = []
    clock.on_earlier = told.append
    for when in (100, 50, 70, 20):
        clock.at(when, lambda: None)
    assert told == [100, 50, 20]


@given(st.lists(st.tuples(st.integers(0, 100), st.booleans()), max_size=40), st.integers(0, 110))
def test_exactly_those_that_are_due_fire(timers: list[tuple[int, bool]], until: int) -> None:
    clock = Clock()
    fired: list[int] = []
    for number, (when, cancelled) in enumerate(timers):
        timer = clock.at(when, lambda number=number: fired.append(number))  # type: ignore[misc]
        if cancelled:
            timer.cancel()
    clock.start()
    clock.jump_to(until)
    clock.fire_due()
    due = [number for number, (when, cancelled) in enumerate(timers) if when <= until and not cancelled]
    assert fired == sorted(due, key=lambda number: (timers[number][0], number))


# -- a vCPU's timers ------------------------------------------------------


@pytest.fixture
def vcpu() -> Vcpu:
    hypervisor = Hypervisor()
    domain = hypervisor.create_domain()
    found = domain.vcpus[0]
    found.up = True
    evtchn.bind_virq(domain, VIRQ_TIMER, 0)
    hypervisor.clock.start()
    return found


def pass_time(vcpu: Vcpu, until: int) -> list[int]:
    """When VIRQ_TIMER came, up to `until`."""
    clock = vcpu.domain.hypervisor.clock
    times: list[int] = []
    while (when := clock.next_deadline()) is not None and when <= until:
        clock.jump_to(when)
        vcpu.domain.machine.mem[vcpu.info] = 0
        _clear_pending(vcpu)
        clock.fire_due()
        if vcpu.domain.machine.mem[vcpu.info]:
            times.append(clock.now())
    clock.jump_to(until)
    return times


def _clear_pending(vcpu: Vcpu) -> None:
    base = vcpu.domain.shared_info >> 3
    for i in itertools.chain(range(256, 256 + 64)):  # evtchn_pending[]
        vcpu.domain.machine.u64[base + i] = 0
    vcpu.domain.machine.u64[(vcpu.info >> 3) + 1] = 0


def test_single_shot(vcpu: Vcpu) -> None:
    vtimer.set_singleshot(vcpu, 5 * MS)
    vtimer.set_singleshot(vcpu, 3 * MS)  # instead of the first
    assert pass_time(vcpu, 10 * MS) == [3 * MS]
    vtimer.set_singleshot(vcpu, 20 * MS)
    vtimer.stop_singleshot(vcpu)
    vtimer.stop_singleshot(vcpu)
    assert pass_time(vcpu, 30 * MS) == []


def test_single_shot_in_the_past_is_at_once(vcpu: Vcpu) -> None:
    pass_time(vcpu, 10 * MS)
    vcpu.domain.machine.mem[vcpu.info] = 0
    _clear_pending(vcpu)
    vtimer.set_singleshot(vcpu, 5 * MS)
    assert vcpu.domain.machine.mem[vcpu.info] == 1
    assert vcpu.domain.hypervisor.clock.next_deadline() is None


def test_set_timer_op(vcpu: Vcpu) -> None:
    vtimer.set_timer_op(vcpu, 5 * MS)
    assert pass_time(vcpu, 10 * MS) == [5 * MS]
    vtimer.set_timer_op(vcpu, 15 * MS)
    vtimer.set_timer_op(vcpu, 0)
    assert pass_time(vcpu, 20 * MS) == []
    vtimer.set_timer_op(vcpu, 1 << 63)  # senseless: 100 ms from now
    assert pass_time(vcpu, 200 * MS) == [120 * MS]
    vtimer.set_timer_op(vcpu, 200 * MS + (1 << 51))
    assert pass_time(vcpu, 400 * MS) == [300 * MS]


def test_periodic(vcpu: Vcpu) -> None:
    vtimer.set_periodic(vcpu, 4 * MS)
    assert pass_time(vcpu, 20 * MS) == [4 * MS, 8 * MS, 12 * MS, 16 * MS, 20 * MS]
    vtimer.set_periodic(vcpu, 0)
    assert pass_time(vcpu, 40 * MS) == []
    for period in (1, MS - 1, vtimer.STIME_DELTA_MAX + 1):
        with pytest.raises(XenError) as info:
            vtimer.set_periodic(vcpu, period)
        assert info.value.errno == Errno.EINVAL


def test_an_unbound_timer_is_lost_and_does_no_harm() -> None:
    hypervisor = Hypervisor()
    domain = hypervisor.create_domain()
    hypervisor.clock.start()
    vtimer.set_singleshot(domain.vcpus[0], MS)
    hypervisor.clock.jump_to(2 * MS)
    hypervisor.clock.fire_due()
    assert not domain.machine.mem[domain.vcpus[0].info]


def test_the_timers_of_a_destroyed_domain_are_gone(vcpu: Vcpu) -> None:
    hypervisor = vcpu.domain.hypervisor
    vtimer.set_singleshot(vcpu, 5 * MS)
    vtimer.set_periodic(vcpu, 4 * MS)
    hypervisor.destroy_domain(vcpu.domain)
    assert hypervisor.clock.next_deadline() is None

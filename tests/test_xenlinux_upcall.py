"""The three upcall loops: what they serve when, what starves, where they restart."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.abi.xen import VCPU_INFO_UPCALL_PENDING
from pvirq.linux.irq import IrqReturn
from pvirq.linux.xenlinux_2_6_18 import XenLinux2618
from pvirq.linux.xenlinux_suse import XenLinuxSuse
from pvirq.linux.xenlinux_upcall import UPCALLS
from xenlinuxlib import Setup

Upcall = Literal["lowest-first", "round-robin", "snapshot"]
BOTTOM = 40  # in word 0 all ports from here on are devices', in words 1 and 2 all


def setup(upcall: Upcall, word_bits: int = 64) -> Setup:
    """A 2.6.18 kernel with devices on ports up to 191."""
    it = Setup(partial(XenLinux2618, upcall=upcall), word_bits=word_bits)
    while max(it.peer_ports, default=0) < 191:
        it.device()
    it.took()
    return it


@pytest.fixture(scope="module")
def low() -> Iterator[Setup]:
    it = setup("lowest-first")
    yield it
    it.close()


@pytest.fixture(scope="module")
def robin() -> Iterator[Setup]:
    it = setup("round-robin")
    yield it
    it.close()


@pytest.fixture(scope="module")
def snap() -> Iterator[Setup]:
    it = setup("snapshot")
    yield it
    it.close()


def served(it: Setup, *ports: int) -> list[int]:
    """The order in which ports that are all pending are served."""
    it.send(*ports)
    it.run()
    return it.took()


def last(it: Setup, port: int) -> None:
    """Let `port` be the one that was served last."""
    assert served(it, port) == [port]


def test_the_defaults_are_the_revisions() -> None:
    assert set(UPCALLS) == {"lowest-first", "round-robin", "snapshot"}
    orders = []
    for personality in (XenLinux2618, XenLinuxSuse):
        it = Setup(personality)
        while max(it.peer_ports, default=0) < 126:
            it.device()
        it.run()
        it.took()
        last(it, 60)
        orders.append(served(it, 60, 61, 126, 50))
        it.close()
    assert orders == [[126, 50, 60, 61], [61, 126, 50, 60]]


def test_lowest_first_always_restarts_at_the_bottom(low: Setup) -> None:
    last(low, 60)
    assert served(low, 130, 61, 50, 64) == [50, 61, 64, 130]
    last(low, 130)
    assert served(low, 130, 61, 50, 64) == [50, 61, 64, 130]


def test_round_robin_restarts_in_the_next_word(robin: Setup) -> None:
    last(robin, 60)
    assert served(robin, 61, 126, 50) == [126, 50, 61]
    last(robin, 130)
    assert served(robin, 130, 131, 64, 50) == [50, 64, 130, 131]


def test_round_robin_restarts_within_one_word_at_its_bottom(robin: Setup) -> None:
    last(robin, 50)
    assert served(robin, 50, 51, 60) == [50, 51, 60]


def test_round_robin_skips_the_low_bits_of_the_next_word_at_first(robin: Setup) -> None:
    """It goes on behind the last bit too, though that was of another word."""
    last(robin, 50)
    assert served(robin, 64 + 3, 64 + 55, 42) == [64 + 55, 42, 64 + 3]
    last(robin, 63)  # behind the last bit of a word is the first of the next
    assert served(robin, 64 + 3, 64 + 55, 42) == [64 + 3, 64 + 55, 42]


def test_snapshot_restarts_behind_the_port_served_last(snap: Setup) -> None:
    last(snap, 50)
    assert served(snap, 50, 51, 60, 42) == [51, 60, 42, 50]
    last(snap, 63)
    assert served(snap, 42, 64, 70) == [64, 70, 42]
    last(snap, 130)
    assert served(snap, 42, 129, 130, 131) == [131, 42, 129, 130]


@pytest.mark.parametrize("other", [60, 100])  # in the same word, in a higher one
@pytest.mark.parametrize("upcall", ["lowest-first", "round-robin", "snapshot"])
def test_what_a_busy_low_port_does_to_others(upcall: Upcall, other: int) -> None:
    """It is notified again each time that it is served: only the original lets the other wait till the end."""
    it = setup(upcall)
    times = 50

    def again(port: int) -> None:
        if it.handled.count(port) < times:
            it.send(port)

    busy = 41
    irq = it.events.irq_from_evtchn(busy)
    action = it.irqs.descs[irq].actions[0]
    action.handler = it.handler(again)
    it.send(busy, other)
    it.run()
    handled = it.took()
    assert handled.count(busy) == times
    assert handled.index(other) == (times if upcall == "lowest-first" else 1)
    it.close()


@pytest.mark.parametrize(("upcall", "at_once"), [("lowest-first", True), ("round-robin", True), ("snapshot", False)])
def test_what_comes_while_a_word_is_being_served(upcall: Upcall, at_once: bool) -> None:
    it = setup(upcall)
    irq = it.events.irq_from_evtchn(41)
    it.irqs.descs[irq].actions[0].handler = it.handler(lambda port: it.send(50))
    it.send(41)
    it.kernel.events.upcall(0)
    assert it.took() == ([41, 50] if at_once else [41])
    assert it.machine.mem[it.domain.vcpus[0].info + VCPU_INFO_UPCALL_PENDING]  # Xen asks for another round
    it.run()
    assert it.took() == ([] if at_once else [50])
    it.close()


@pytest.mark.parametrize("upcall", ["lowest-first", "round-robin", "snapshot"])
def test_a_nested_upcall_only_counts(upcall: Upcall) -> None:
    """As a handler that runs with interrupts on is interrupted: the outer loop does the work, in one more round."""
    it = setup(upcall)
    state = it.events.upcall_state[0]
    inner: list[tuple[int, int]] = []

    def interrupted(port: int) -> None:
        it.send(50)
        before = len(it.handled)
        it.kernel.events.upcall(0)
        it.kernel.events.force_evtchn_callback()  # nothing is due any more: the first one has taken the flag
        inner.append((state.count, len(it.handled) - before))

    it.irqs.descs[it.events.irq_from_evtchn(41)].actions[0].handler = it.handler(interrupted)
    it.send(41)
    it.kernel.events.upcall(0)
    assert inner == [(2, 0)]
    assert it.took() == [41, 50]
    assert state.count == 0
    assert not it.machine.mem[it.domain.vcpus[0].info + VCPU_INFO_UPCALL_PENDING]
    it.close()


def test_force_evtchn_callback_takes_what_waits(robin: Setup) -> None:
    robin.send(50)
    robin.events.force_evtchn_callback()
    assert robin.took() == [50]
    robin.run()


def test_an_error_in_a_handler_does_not_stop_upcalls(snap: Setup) -> None:
    action = snap.irqs.descs[snap.events.irq_from_evtchn(41)].actions[0]
    working = action.handler

    def broken(irq: int, dev_id: object) -> IrqReturn:
        raise RuntimeError("a bug")

    action.handler = broken
    snap.send(41)
    with pytest.raises(RuntimeError):
        snap.run()
    action.handler = working
    assert snap.events.upcall_state[0].count == 0
    assert served(snap, 50) == [50]


def test_masked_ports_and_other_cpus_are_left_alone() -> None:
    it = Setup(partial(XenLinux2618, upcall="round-robin"), vcpus=2)
    masked, there = it.device(), it.device()
    it.run()
    it.took()
    irq = it.events.irq_from_evtchn(there)
    it.irqs.set_affinity(irq, 2)
    it.send(there)
    it.run()
    it.took()
    it.events.mask_evtchn(masked)
    it.send(masked, there)
    it.kernel.run(it.domain.vcpus[0])
    assert it.took() == []
    it.kernel.run(it.domain.vcpus[1])
    assert it.took() == [there]
    it.events.unmask_evtchn(masked)
    it.run()
    assert it.took() == [masked]
    it.close()


def test_a_guest_of_32_bits() -> None:
    """1,024 ports in words of 32."""
    it = setup("round-robin", word_bits=32)
    assert it.events.nr_channels == 1024
    last(it, 20)
    assert served(it, 21, 32 + 25, 10) == [32 + 25, 10, 21]
    it.close()


PORTS = st.lists(st.integers(BOTTOM, 191), unique=True, min_size=1, max_size=40)


@pytest.mark.parametrize("upcall", ["lowest-first", "round-robin", "snapshot"])
def test_each_pending_port_is_served_once(upcall: Upcall) -> None:
    it = setup(upcall)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(PORTS, min_size=1, max_size=4))
    def check(rounds: list[list[int]]) -> None:
        for ports in rounds:
            before = it.events.upcall_state[0].l1i * 64 + it.events.upcall_state[0].l2i
            order = served(it, *ports)
            assert sorted(order) == sorted(ports)
            if upcall == "lowest-first":
                assert order == sorted(ports)
            elif upcall == "snapshot":
                assert order == sorted(ports, key=lambda port: (port < before, port))

    check()
    it.close()

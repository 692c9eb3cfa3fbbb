"""Models of SCHEDOP_poll and of who ends it do as pvirq's own hypervisor does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.xen import (
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_MASK,
)
from pvirq.check import explore
from pvirq.check.guided import one_by_one
from pvirq.check.protocols.polling import (
    PolledDomain,
    do_poll,
    evtchn_2l_set_pending,
    lost,
    poll_timer_fn,
    vcpu_mark_events_pending,
)
from pvirq.check.steps import Model, Thread
from pvirq.xen import domain as product
from pvirq.xen import evtchn, sched
from pvirq.xen.memory import Machine

VCPUS = 2
vcpus = st.integers(0, VCPUS - 1)
Operation = tuple[Any, ...]  # its name, arguments
POLLED = (1, 2, 3)
polls = st.one_of(
    st.tuples(
        st.just("poll"), vcpus, st.lists(st.sampled_from(POLLED), max_size=2, unique=True).map(tuple)
    ),
    st.tuples(st.just("send"), st.sampled_from(POLLED)),
    st.tuples(st.just("time is up"), vcpus),
)  # fmt: skip


@given(
    st.lists(polls, max_size=12),
    st.integers(0, 15).map(lambda mask: mask << 1 & 0b1110),
    st.tuples(*[st.booleans()] * VCPUS),
    st.tuples(*[vcpus] * len(POLLED)),
)
def test_polls_in_sequence(
    sequence: list[Operation], masked: int, upcalls_masked: tuple[bool, ...], notified: tuple[int, ...]
) -> None:
    """Who polls and who wakes: after each operation the same vCPUs sleep, for the same ports."""
    hypervisor = product.Hypervisor(Machine(64 << 20))
    d = hypervisor.create_domain(1, vcpus=VCPUS)
    mem = d.machine.mem
    for port, vcpu in zip(POLLED, notified, strict=True):
        assert evtchn.bind_ipi(d, vcpu) == port
    mem[d.shared_info + SHARED_INFO_EVTCHN_MASK] = masked
    for v in d.vcpus:
        v.up = True
        mem[v.info + VCPU_INFO_UPCALL_MASK] = upcalls_masked[v.vcpu_id]

    values: dict[str, object] = {}
    for operation in sequence:
        name, *arguments = operation
        model = Model()
        modelled = PolledDomain(model, vcpus=VCPUS, masked=masked)
        for v in modelled.vcpus:
            v.evtchn_upcall_mask.initial = int(upcalls_masked[v.vcpu_id])
        for variable in model.variables:
            variable.initial = values.get(variable.name, variable.initial)  # type: ignore[assignment]
        if name == "poll":
            vcpu, polled = arguments
            if d.vcpus[vcpu].polling:
                continue  # it sleeps
            sched.do_poll(d.vcpus[vcpu], polled)
            model.thread("poll", do_poll, modelled.vcpus[vcpu], polled, may_wait=True)
        elif name == "send":
            (port,) = arguments
            evtchn.send(d, port)
            model.thread("send", evtchn_2l_set_pending, modelled.vcpus[notified[port - 1]], port)
        else:
            (vcpu,) = arguments
            d.vcpus[vcpu].end_poll()
            model.thread("timer", poll_timer_fn, modelled.vcpus[vcpu])
        end = one_by_one(model)
        assert bool(end.waiting) == (name == "poll" and d.vcpus[arguments[0]].polling)
        values = {variable.name: end[variable] for variable in model.variables}
        assert end[modelled.evtchn_pending] == mem[d.shared_info + SHARED_INFO_EVTCHN_PENDING]
        for v, real in zip(modelled.vcpus, d.vcpus, strict=True):
            assert (end[v.blocked], end[modelled.poll_mask] >> v.vcpu_id & 1) == (real.polling, real.polling)
            assert end[v.poll_evtchn] == (real.poll_port if real.polling else 0)
            assert end[v.evtchn_upcall_pending] == mem[real.info]
            assert end[v.evtchn_pending_sel] == mem[real.info + VCPU_INFO_PENDING_SEL]


@pytest.mark.parametrize("again", [True, False])
def test_whoever_wakes_a_vcpu_wakes_it_again(again: bool) -> None:
    """vcpu_unblock() takes a vCPU out of poll_mask: if that has woken and polls anew, it isn't found there any more."""
    model = Model(order="tso")
    d = PolledDomain(model, vcpus=1, masked=0b010, unblocks_again=again)
    (v,) = d.vcpus
    v.evtchn_upcall_mask.initial = 1

    def poller() -> Thread:
        # As a guest's spinlock does: woken by anything, it looks and polls again.
        for _ in range(3):
            yield from do_poll(v, (1,))
            if (yield d.evtchn_pending.read()) & 0b010:
                return

    model.thread("vCPU 0, SCHEDOP_poll", poller, may_wait=True)
    model.thread("an upcall", vcpu_mark_events_pending, v)
    model.thread("a sender to port 1", evtchn_2l_set_pending, v, 1)
    model.at_end(lambda end: lost(v, (1,), end.values))
    result = explore(model)
    if again:
        assert result.failure is None
        assert result.complete
    else:
        assert result.failure is not None
        assert result.failure.message == "v0 sleeps until port 1 is pending, and it is"

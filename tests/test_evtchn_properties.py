"""Random operation sequences on three domains: whatever they ask for, the channels stay consistent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pvirq.abi.errno import XenError
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.evtchn_channels import (
    ECS_FREE,
    ECS_INTERDOMAIN,
    ECS_RESERVED,
    ECS_VIRQ,
    virq_is_global,
)
from pvirq.xen.evtchn_fifo import LINKED, MASKED, Fifo
from pvirq.xen.evtchn_views import debug_e, lsevtchn
from pvirq.xen.memory import Machine

domids = st.sampled_from([0, 1, 2, 3, DOMID_SELF, 0x7FF1])
u32s = st.one_of(st.integers(0, 12), st.sampled_from([63, 64, 1023, 4095, 4096, 131071, 131072, (1 << 32) - 1]))
callers = st.integers(0, 2)
vcpus = st.integers(0, 2)


class Channels(RuleBasedStateMachine):
    """Domain 0 is privileged, 2 has 32-bit words; every domain has frames to give for the FIFO ABI."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(8 << 20)
        self.hypervisor = Hypervisor(self.machine)
        self.domains = [self.create(domid) for domid in range(3)]
        self.consumed = 0

    def create(self, domid: int) -> Domain:
        domain = self.hypervisor.create_domain(
            domid,
            privileged=domid == 0,
            vcpus=2,
            max_evtchns=9 if domid == 1 else -1,
            word_bits=32 if domid == 2 else 64,
        )
        domain.vcpus[0].up = True
        return domain

    def teardown(self) -> None:
        for domain in list(self.hypervisor.domains.values()):
            self.hypervisor.destroy_domain(domain)
            assert not domain.evtchn.active
        assert not self.machine.np_type_count.any()
        self.machine.close()

    def call(self, operation: Callable[..., Any], *args: Any) -> Any:
        try:
            return operation(*args)
        except XenError:
            return None

    @rule(who=callers, dom=domids, remote=domids, port=st.sampled_from([0, 0, 0, 0, 7, 70]))
    def alloc_unbound(self, who: int, dom: int, remote: int, port: int) -> None:
        self.call(evtchn.alloc_unbound, self.domains[who], dom, remote, port)

    @rule(who=callers, dom=domids, port=u32s)
    def bind_interdomain(self, who: int, dom: int, port: int) -> None:
        got = self.call(evtchn.bind_interdomain, self.domains[who], dom, port)
        assert got is None or self.domains[who].evtchn.port(got).remote_port == port

    @rule(who=callers, virq=st.integers(0, 25), vcpu=vcpus)
    def bind_virq(self, who: int, virq: int, vcpu: int) -> None:
        self.call(evtchn.bind_virq, self.domains[who], virq, vcpu)

    @rule(who=callers, vcpu=vcpus)
    def bind_ipi(self, who: int, vcpu: int) -> None:
        self.call(evtchn.bind_ipi, self.domains[who], vcpu)

    @rule(who=callers, pirq=st.integers(0, 60))
    def bind_pirq(self, who: int, pirq: int) -> None:
        self.call(evtchn.bind_pirq, self.domains[who], pirq, 1)

    @rule(who=callers)
    def xen_channel(self, who: int) -> None:
        def consumer(vcpu: object, port: int) -> None:
            self.consumed += 1

        port = self.call(evtchn.alloc_unbound_xen_event_channel, self.domains[who], 1, 0, consumer)
        if port:
            self.call(evtchn.bind_interdomain, self.domains[0], who, port)

    @rule(who=callers, port=u32s)
    def close(self, who: int, port: int) -> None:
        self.call(evtchn.close, self.domains[who], port)

    @rule(who=callers, port=u32s)
    def send(self, who: int, port: int) -> None:
        self.call(evtchn.send, self.domains[who], port)

    @rule(who=callers, port=u32s)
    def unmask(self, who: int, port: int) -> None:
        self.call(evtchn.unmask, self.domains[who], port)

    @rule(who=callers, dom=domids, port=u32s)
    def status(self, who: int, dom: int, port: int) -> None:
        self.call(evtchn.status, self.domains[who], dom, port)

    @rule(who=callers, port=u32s, vcpu=vcpus)
    def bind_vcpu(self, who: int, port: int, vcpu: int) -> None:
        self.call(evtchn.bind_vcpu, self.domains[who], port, vcpu)

    @rule(who=callers, port=u32s, priority=st.integers(0, 16))
    def set_priority(self, who: int, port: int, priority: int) -> None:
        self.call(evtchn.set_priority, self.domains[who], port, priority)

    @rule(who=callers, dom=domids, paused=st.booleans())
    def reset(self, who: int, dom: int, paused: bool) -> None:
        for domain in self.domains:
            domain.paused = paused
        self.call(evtchn.reset, self.domains[who], dom)

    @rule(who=callers, own=st.booleans(), offset=st.sampled_from([0, 4024, 4025, 4]), vcpu=vcpus)
    def init_control(self, who: int, own: bool, offset: int, vcpu: int) -> None:
        gfn = self.machine.alloc(1, who) if own else self.domains[who].machine.frames - 1
        self.call(evtchn.init_control, self.domains[who], gfn, offset, vcpu)

    @rule(who=callers)
    def expand_array(self, who: int) -> None:
        self.call(evtchn.expand_array, self.domains[who], self.machine.alloc(1, who))

    @rule(who=callers, virq=st.integers(0, 23))
    def raise_virq(self, who: int, virq: int) -> None:
        if virq_is_global(virq):
            evtchn.send_guest_domain_virq(self.domains[who], virq)
            self.call(evtchn.set_global_virq_handler, self.domains[who], virq)
            evtchn.send_global_virq(self.hypervisor, virq)
        else:
            evtchn.send_guest_vcpu_virq(self.domains[who].vcpus[1], virq)

    @rule(who=callers, ports=st.lists(u32s, max_size=3), timeout=st.sampled_from([0, 1]))
    def poll(self, who: int, ports: list[int], timeout: int) -> None:
        vcpu = self.domains[who].vcpus[0]
        if vcpu.polling:
            return  # asleep: it can't call
        self.call(sched.do_poll, vcpu, ports, timeout)
        self.hypervisor.clock.jump_to(1)
        self.hypervisor.clock.fire_due()
        if timeout:
            assert not vcpu.polling

    @precondition(lambda self: self.domains[2].evtchn.active)
    @rule()
    def rebirth(self) -> None:
        self.hypervisor.destroy_domain(self.domains[2])
        self.domains[2] = self.create(2)

    @invariant()
    def counts_and_ends_agree(self) -> None:
        for domain in self.domains:
            channels = domain.evtchn.channels
            assert channels[0].state == ECS_RESERVED
            assert domain.evtchn.active == sum(channel.state > ECS_RESERVED for channel in channels)
            assert domain.evtchn.xen_active == sum(channel.consumer is not None for channel in channels)
            for channel in domain.evtchn:
                assert 0 <= channel.notify_vcpu < len(domain.vcpus)
                if channel.state == ECS_INTERDOMAIN:
                    remote_domain = channel.remote_domain
                    assert remote_domain
                    assert remote_domain is self.hypervisor.domains[remote_domain.domid]
                    remote = remote_domain.evtchn.channels[channel.remote_port]
                    assert remote.state == ECS_INTERDOMAIN
                    assert remote.remote_domain is domain
                    assert remote.remote_port == channel.port
                else:
                    assert channel.remote_domain is None
                if channel.state == ECS_VIRQ:
                    vcpu_id = 0 if virq_is_global(channel.virq) else channel.notify_vcpu
                    assert domain.vcpus[vcpu_id].virq_to_evtchn[channel.virq] == channel.port
            for vcpu in domain.vcpus:
                for virq, port in enumerate(vcpu.virq_to_evtchn):
                    assert not port or (channels[port].state, channels[port].virq) == (ECS_VIRQ, virq)
            free = [channel for channel in channels if channel.state == ECS_FREE]
            assert all(channel.consumer is None and channel.notify_vcpu == 0 for channel in free)

    @rule(who=callers, vcpu=vcpus, port=u32s)
    def guest_masks_and_consumes(self, who: int, vcpu: int, port: int) -> None:
        """What a well-behaved FIFO guest does to its words: mask one, take a vCPU's queues apart."""
        fifo, u32 = self.domains[who].evtchn.ops, self.machine.u32
        if not isinstance(fifo, Fifo):
            return
        if port < 1024 and fifo._word(port):
            u32[fifo._word(port)] |= MASKED
        control = fifo._control[vcpu] if vcpu < 2 else 0
        if not control:
            return
        u32[control] = 0
        self.domains[who].machine.mem[self.domains[who].vcpus[vcpu].info] = 0
        for queue in range(16):
            port, u32[control + 2 + queue] = u32[control + 2 + queue], 0
            while port:
                at = fifo._word(port)
                word, u32[at] = u32[at], u32[at] & MASKED
                port = word & 0x1FFFF

    @invariant()
    def queues_are_well_formed(self) -> None:
        """Every LINKED word is on one queue that ends in its remembered tail; READY says which there are."""
        for domain in self.domains:
            fifo = domain.evtchn.ops
            if not isinstance(fifo, Fifo):
                continue
            u32 = self.machine.u32
            seen: list[int] = []
            for vcpu_id, control in enumerate(fifo._control):
                for queue in range(16) if control else ():
                    ready = u32[control] >> queue & 1
                    head = u32[control + 2 + queue]
                    assert bool(ready) == bool(head)
                    port = head
                    while port:
                        word = u32[fifo._word(port)]
                        assert word & LINKED
                        seen.append(port)
                        assert len(seen) <= 4096
                        last, port = port, word & 0x1FFFF
                    assert not head or fifo._tails[vcpu_id][queue] == last
            linked = [
                port
                for page, at in enumerate(fifo._array)
                for port, word in enumerate(u32[at : at + 1024], page * 1024)
                if word & LINKED
            ]
            assert sorted(seen) == linked

    @invariant()
    def views_print(self) -> None:
        assert debug_e(self.hypervisor).count("\n") >= 10
        for domain in self.domains:
            lines = lsevtchn(domain).count("\n")
            assert lines == domain.evtchn.active - domain.evtchn.xen_active


Channels.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestChannels = Channels.TestCase


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_guest_that_scribbles_over_its_words_harms_only_itself(data: st.DataObject) -> None:
    """Any content of the shared pages, at any time: no operation raises, and no other memory changes."""
    hypervisor = Hypervisor(Machine(4 << 20))
    machine, domain = hypervisor.machine, hypervisor.create_domain(1, vcpus=2)
    frames = machine.alloc(4, 1)
    sentinel = machine.alloc(1, 0)
    for vcpu in (0, 1):
        evtchn.init_control(domain, frames + vcpu, 0, vcpu)
    evtchn.expand_array(domain, frames + 2)
    ports = [evtchn.bind_ipi(domain, vcpu) for vcpu in (0, 1, 0, 1)]
    words = st.integers(0, (1 << 32) - 1)
    for _ in range(data.draw(st.integers(1, 30))):
        page = data.draw(st.sampled_from([frames, frames + 1, frames + 2, domain.shared_info_mfn]))
        machine.u32[(page << 10) + data.draw(st.integers(0, 20))] = data.draw(words)
        port = data.draw(st.sampled_from(ports))
        evtchn.set_priority(domain, port, data.draw(st.integers(0, 15)))
        data.draw(st.sampled_from([evtchn.send, evtchn.unmask]))(domain, port)
        debug_e(hypervisor)
    assert not any(machine.page(sentinel))
    assert not any(machine.page(frames + 3))
    machine.close()

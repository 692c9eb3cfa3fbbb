"""Event channels against a model of what guests are promised, over random sequences on three domains.

The model is plain sets and lists: which ports there are, what is pending, masked, and in which queue. After each step
every result, status and guest-visible bit must be what it says; guests consume by their own half of the ABI. What
malicious guests do is in test_evtchn_properties.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from evtchnlib import LINKED, READY, GuestSide
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    EVTCHN_FIFO_PRIORITY_DEFAULT,
    EVTCHNSTAT_closed,
    EVTCHNSTAT_interdomain,
    EVTCHNSTAT_ipi,
    EVTCHNSTAT_unbound,
    EVTCHNSTAT_virq,
)
from pvirq.abi.xen import DOMID_SELF, VIRQ_CON_RING, VIRQ_DEBUG, VIRQ_DOM_EXC, VIRQ_TIMER
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.memory import Machine

VCPUS = 2
GLOBAL_VIRQS = (VIRQ_CON_RING, VIRQ_DOM_EXC)
WORDS_PER_PAGE = 1024


@dataclass
class Port:
    """A bound port; `kind` is an EVTCHNSTAT_*. `remote` is a domain id, `remote_port` 0 while nobody is bound."""

    kind: int
    vcpu: int = 0
    remote: int = 0
    remote_port: int = 0
    virq: int = 0
    xen: bool = False


class Model:
    """What one domain's channels should be like."""

    def __init__(self, word_bits: int, limit: int) -> None:
        self.word_bits = word_bits
        self.limit = limit  # highest permitted port
        self.ports: dict[int, Port] = {}
        self.waiting: set[int] = set()  # raised without an event word; never forgotten (struct evtchn's pending)
        self.start(fifo=False)

    def start(self, fifo: bool) -> None:
        """A fresh ABI: nothing pending or masked."""
        self.fifo = fifo
        self.pages = 0
        self.blocks: set[int] = set()
        self.pending: set[int] = set()
        self.masked: set[int] = set()
        self.selected: list[set[int]] = [set() for _ in range(VCPUS)]  # two-level: words, by vCPU
        self.queues: dict[tuple[int, int], list[int]] = defaultdict(list)  # FIFO: by vCPU and priority
        self.priority: dict[int, int] = defaultdict(lambda: EVTCHN_FIFO_PRIORITY_DEFAULT)

    @property
    def linked(self) -> list[int]:
        return [port for queue in self.queues.values() for port in queue]

    def has_word(self, port: int) -> bool:
        return not self.fifo or port < self.pages * WORDS_PER_PAGE

    def allocate(self) -> int:
        """The port that the next binding gets; raises ENOSPC."""
        linked = self.linked
        port = next(port for port in range(1, 1 << 17) if port not in self.ports and port not in linked)
        if port > self.limit:
            raise XenError(Errno.ENOSPC)
        return port

    def bind(self, port: int, what: Port) -> None:
        self.ports[port] = what
        if self.fifo:
            self.priority[port] = EVTCHN_FIFO_PRIORITY_DEFAULT

    def raise_event(self, port: int, vcpu: int) -> None:
        if not self.fifo:
            if port not in self.pending:
                self.pending.add(port)
                if port not in self.masked:
                    self.selected[vcpu].add(port // self.word_bits)
        elif not self.has_word(port):
            self.waiting.add(port)
        elif vcpu in self.blocks:  # else it is lost
            self.pending.add(port)
            if port not in self.masked and port not in self.linked:
                self.queues[vcpu, self.priority[port]].append(port)

    def unmask(self, port: int) -> None:
        if not self.has_word(port) or port not in self.masked:
            return
        self.masked.discard(port)
        if port in self.pending:
            if self.fifo:
                self.raise_event(port, self.ports[port].vcpu)
            else:
                self.selected[self.ports[port].vcpu].add(port // self.word_bits)

    def take(self, vcpu: int) -> Iterator[int]:
        """What an upcall takes, in order; what is raised meanwhile counts."""
        if not self.fifo:
            words, self.selected[vcpu] = self.selected[vcpu], set()
            for word in sorted(words):
                for port in range(word * self.word_bits, (word + 1) * self.word_bits):
                    if port in self.pending - self.masked:
                        self.pending.discard(port)
                        yield port
            return
        while queues := [key for key, queue in self.queues.items() if key[0] == vcpu and queue]:
            port = self.queues[min(queues)].pop(0)
            if port in self.pending - self.masked:
                self.pending.discard(port)
                yield port

    def close(self, port: int) -> None:
        """It stays linked: the guest will find it, and nothing pending."""
        if not self.ports[port].xen:
            self.pending.discard(port)
        del self.ports[port]

    def add_page(self) -> None:
        self.pages += 1
        for port in sorted(self.waiting):
            if (self.pages - 1) * WORDS_PER_PAGE <= port < self.pages * WORDS_PER_PAGE:
                self.raise_event(port, self.ports[port].vcpu if port in self.ports else 0)


def outcome(operation: Callable[..., Any], *args: Any) -> Any:
    """What an operation returns, or the errno that it fails with."""
    try:
        return operation(*args)
    except XenError as error:
        return error.errno


doms = st.sampled_from([1, 1, 1, 2, 0])  # most things happen to one, so that they meet
vcpus = st.integers(0, VCPUS - 1)
picks = st.integers(0, 11)


class EventChannels(RuleBasedStateMachine):
    """Domain 0 is privileged; 2 has 32-bit words and few ports."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(8 << 20)
        self.hypervisor = Hypervisor(self.machine)
        self.consumed = self.consumed_expected = 0
        self.first = self.frames()
        self.sides: list[GuestSide] = []
        self.models: list[Model] = []
        for domid in range(3):
            self.create(domid)

    def frames(self) -> tuple[Any, ...]:
        machine = self.machine
        return machine.np_owner.copy(), machine.np_refs.copy(), machine.np_type_count.copy()

    def create(self, domid: int) -> None:
        word_bits, limit = (32, 12) if domid == 2 else (64, -1)
        domain = self.hypervisor.create_domain(
            domid, privileged=domid == 0, vcpus=VCPUS, max_evtchns=limit, word_bits=word_bits
        )
        self.sides[domid : domid + 1] = [GuestSide(domain)]
        self.models[domid : domid + 1] = [Model(word_bits, limit if limit >= 0 else 1 << 20)]

    def teardown(self) -> None:
        """Nobody owes anybody anything: every event can be taken, and all that there was can be had again."""
        for domid in range(3):
            for port in list(self.models[domid].ports):
                if not self.models[domid].ports[port].xen:
                    self.unmask_hypercall(domid, port)
            for vcpu in range(VCPUS):
                self.upcall(domid, vcpu, [])
            model = self.models[domid]
            assert not model.linked
            assert not any(model.selected)
            if model.blocks == set(range(VCPUS)) and model.pages:
                # Nobody unmasks one of Xen's own, which inherits the word of the port that had its number.
                assert not model.pending & {port for port, what in model.ports.items() if not what.xen}
        for domid in (2, 1, 0):
            self.hypervisor.destroy_domain(self.domain(domid))
            self.forget(domid)
            for other in range(domid):
                self.statuses_agree(other)
        assert not self.hypervisor.domains
        for now, then in zip(self.frames(), self.first, strict=True):
            assert np.array_equal(now, then)
        self.machine.close()

    def domain(self, domid: int) -> Domain:
        return self.sides[domid].domain

    def forget(self, domid: int, xen_too: bool = True) -> None:
        """All of a domain's ports are closed: other ends wait for it again."""
        for port in sorted(self.models[domid].ports):
            if xen_too or not self.models[domid].ports[port].xen:
                self.close_in_model(domid, port)

    def close_in_model(self, domid: int, port: int) -> None:
        what = self.models[domid].ports[port]
        if what.kind == EVTCHNSTAT_interdomain:
            end = self.models[what.remote].ports[what.remote_port]
            end.kind, end.remote, end.remote_port = EVTCHNSTAT_unbound, domid, 0
        self.models[domid].close(port)

    def pick(self, domid: int, pick: int) -> int:
        """A bound port mostly; otherwise a number that is free, perhaps still linked, or not there at all."""
        ports = sorted(self.models[domid].ports)
        return ports[pick] if pick < len(ports) else (0, 1, 2, 3, 13, 63, 64, 4095)[pick % 8]

    def check(self, expect: Callable[[], Any], operation: Callable[..., Any], *args: Any) -> Any:
        """Both must return the same, or fail with the same errno; None where they fail."""
        want = outcome(expect)
        got = outcome(operation, *args)
        assert got == want, f"{operation.__name__}{args}"
        return None if isinstance(got, Errno) else got

    @initialize(
        abis=st.tuples(*[st.sampled_from(["two-level", "FIFO", "FIFO without a page"])] * 3),
        ipis=st.lists(st.tuples(doms, vcpus), max_size=4),
        connections=st.lists(st.tuples(doms, doms), max_size=6),
    )
    def begin(self, abis: tuple[str, ...], ipis: list[tuple[int, int]], connections: list[tuple[int, int]]) -> None:
        """Most of what can go wrong needs the FIFO ABI and connected ports: they are not left to luck."""
        for who, abi in enumerate(abis):
            if abi != "two-level":
                self.start_fifo(who, (0, 1), abi == "FIFO")
        for who, vcpu in ipis:
            self.bind_ipi(who, vcpu)
        for who, remote in connections:
            self.connect(who, remote)

    # Binding.

    @rule(who=doms, remote=doms)
    def alloc_unbound(self, who: int, remote: int) -> None:
        model = self.models[who]
        port = self.check(model.allocate, evtchn.alloc_unbound, self.domain(who), DOMID_SELF, remote)
        if port:
            model.bind(port, Port(EVTCHNSTAT_unbound, remote=remote))

    @rule(who=doms, remote=doms, pick=picks)
    def bind_interdomain(self, who: int, remote: int, pick: int) -> None:
        model, theirs = self.models[who], self.pick(remote, pick)

        def expect() -> int:
            port = model.allocate()
            end = self.models[remote].ports.get(theirs)
            if end is None or end.kind != EVTCHNSTAT_unbound or end.remote != who:
                raise XenError(Errno.EINVAL)
            return port

        port = self.check(expect, evtchn.bind_interdomain, self.domain(who), remote, theirs)
        if port:
            end = self.models[remote].ports[theirs]
            end.kind, end.remote_port = EVTCHNSTAT_interdomain, port
            model.bind(port, Port(EVTCHNSTAT_interdomain, remote=remote, remote_port=theirs))
            model.raise_event(port, 0)

    @rule(who=doms, remote=doms)
    def connect(self, who: int, remote: int) -> None:
        """The two as one step, so that there are enough connections."""
        port = self.check(self.models[who].allocate, evtchn.alloc_unbound, self.domain(who), who, remote)
        if port:
            self.models[who].bind(port, Port(EVTCHNSTAT_unbound, remote=remote))
            self.bind_interdomain(remote, who, sorted(self.models[who].ports).index(port))

    @rule(who=doms, virq=st.sampled_from([VIRQ_TIMER, VIRQ_DEBUG, *GLOBAL_VIRQS]), vcpu=vcpus)
    def bind_virq(self, who: int, virq: int, vcpu: int) -> None:
        model = self.models[who]

        def expect() -> int:
            if virq in GLOBAL_VIRQS and vcpu:
                raise XenError(Errno.EINVAL)
            if self.virq_port(who, virq, vcpu):
                raise XenError(Errno.EEXIST)
            return model.allocate()

        port = self.check(expect, evtchn.bind_virq, self.domain(who), virq, vcpu)
        if port:
            model.bind(port, Port(EVTCHNSTAT_virq, vcpu=vcpu, virq=virq))

    def virq_port(self, who: int, virq: int, vcpu: int) -> int:
        for port, what in self.models[who].ports.items():
            if (what.kind, what.virq) == (EVTCHNSTAT_virq, virq) and (virq in GLOBAL_VIRQS or what.vcpu == vcpu):
                return port
        return 0

    @rule(who=doms, vcpu=vcpus)
    def bind_ipi(self, who: int, vcpu: int) -> None:
        port = self.check(self.models[who].allocate, evtchn.bind_ipi, self.domain(who), vcpu)
        if port:
            self.models[who].bind(port, Port(EVTCHNSTAT_ipi, vcpu=vcpu))

    @rule(who=doms)
    def xen_channel(self, who: int) -> None:
        def consumer(vcpu: Vcpu, port: int) -> None:
            assert vcpu is self.domain(who).vcpus[1]
            self.consumed += 1

        operation = evtchn.alloc_unbound_xen_event_channel
        port = self.check(self.models[who].allocate, operation, self.domain(who), 1, 0, consumer)
        if port:
            self.models[who].ports[port] = Port(EVTCHNSTAT_unbound, vcpu=1, xen=True)

    @rule(who=doms, pick=picks)
    def close(self, who: int, pick: int) -> None:
        port = self.pick(who, pick)
        what = self.models[who].ports.get(port)

        def expect() -> None:
            if what is None or what.xen:
                raise XenError(Errno.EINVAL)

        self.check(expect, evtchn.close, self.domain(who), port)
        if what and not what.xen:
            self.close_in_model(who, port)

    @rule(who=doms, pick=picks)
    def free_xen_channel(self, who: int, pick: int) -> None:
        ports = [port for port, what in self.models[who].ports.items() if what.xen]
        if ports:
            port = ports[pick % len(ports)]
            evtchn.free_xen_event_channel(self.domain(who), port)
            self.close_in_model(who, port)

    @rule(who=doms, pick=picks, vcpu=vcpus)
    def bind_vcpu(self, who: int, pick: int, vcpu: int) -> None:
        port = self.pick(who, pick)
        what = self.models[who].ports.get(port)
        movable = (EVTCHNSTAT_unbound, EVTCHNSTAT_interdomain)

        def expect() -> None:
            if what is None or what.xen or not (what.kind in movable or what.virq in GLOBAL_VIRQS):
                raise XenError(Errno.EINVAL)
            what.vcpu = vcpu

        self.check(expect, evtchn.bind_vcpu, self.domain(who), port, vcpu)

    @rule(who=doms, pick=picks, priority=st.sampled_from([0, 7, 8, 15, 16]))
    def set_priority(self, who: int, pick: int, priority: int) -> None:
        model, port = self.models[who], self.pick(who, pick)
        what = model.ports.get(port)

        def expect() -> None:
            if port >= len(self.domain(who).evtchn.channels):
                raise XenError(Errno.EINVAL)
            if not model.fifo:
                raise XenError(Errno.ENOSYS)
            if what is None or what.xen:
                raise XenError(Errno.EACCES)
            if priority > 15:
                raise XenError(Errno.EINVAL)
            model.priority[port] = priority

        self.check(expect, evtchn.set_priority, self.domain(who), port, priority)

    # Events.

    @rule(who=doms, pick=picks)
    def send(self, who: int, pick: int) -> None:
        port = self.pick(who, pick)
        what = self.models[who].ports.get(port)

        def expect() -> None:
            if what is None or what.xen or what.kind == EVTCHNSTAT_virq:
                raise XenError(Errno.EINVAL)
            if what.kind == EVTCHNSTAT_ipi:
                self.models[who].raise_event(port, what.vcpu)
            elif what.kind == EVTCHNSTAT_interdomain:
                self.arrive(what.remote, what.remote_port)

        self.check(expect, evtchn.send, self.domain(who), port)

    def arrive(self, domid: int, port: int) -> None:
        what = self.models[domid].ports[port]
        if what.xen:
            self.consumed_expected += 1
        else:
            self.models[domid].raise_event(port, what.vcpu)

    @rule(who=doms, pick=st.integers(0, 7), vcpu=vcpus, priority=st.sampled_from([3, 7]))
    def move_and_raise(self, who: int, pick: int, vcpu: int, priority: int) -> None:
        """A port that may be the old tail of one queue comes onto another."""
        self.bind_vcpu(who, pick, vcpu)
        self.set_priority(who, pick, priority)
        what = self.models[who].ports.get(self.pick(who, pick))
        if what and what.kind == EVTCHNSTAT_interdomain:
            self.send(what.remote, sorted(self.models[what.remote].ports).index(what.remote_port))

    @rule(who=doms, pick=st.integers(0, 7))
    def raise_while_masked(self, who: int, pick: int) -> None:
        self.mask(who, pick)
        what = self.models[who].ports.get(self.pick(who, pick))
        if what and what.kind == EVTCHNSTAT_interdomain:
            self.send(what.remote, sorted(self.models[what.remote].ports).index(what.remote_port))
        else:
            self.send(who, pick)
        self.unmask(who, pick)

    @rule(who=doms, pick=st.integers(0, 7), remote=doms)
    def close_and_connect(self, who: int, pick: int, remote: int) -> None:
        """The number is mostly given out again at once: nothing of its former life may show."""
        self.close(who, pick)
        self.connect(who, remote)

    @rule(who=doms, pick=picks)
    def notify_via_xen(self, who: int, pick: int) -> None:
        ports = [port for port, what in self.models[who].ports.items() if what.xen]
        if ports:
            port = ports[pick % len(ports)]
            evtchn.notify_via_xen_event_channel(self.domain(who), port)
            what = self.models[who].ports[port]
            if what.kind == EVTCHNSTAT_interdomain:
                end = self.models[what.remote]
                end.raise_event(what.remote_port, end.ports[what.remote_port].vcpu)

    @rule(who=doms, virq=st.sampled_from([VIRQ_TIMER, VIRQ_DEBUG, *GLOBAL_VIRQS]), vcpu=vcpus)
    def raise_virq(self, who: int, virq: int, vcpu: int) -> None:
        port = self.virq_port(who, virq, vcpu)
        if virq in GLOBAL_VIRQS:
            evtchn.send_guest_domain_virq(self.domain(who), virq)
        else:
            evtchn.send_guest_vcpu_virq(self.domain(who).vcpus[vcpu], virq)
        if port:
            self.models[who].raise_event(port, self.models[who].ports[port].vcpu)

    @rule(sends=st.lists(st.tuples(doms, st.integers(0, 7)), min_size=2, max_size=6))
    def send_several(self, sends: list[tuple[int, int]]) -> None:
        for who, pick in sends:
            self.send(who, pick)

    @rule(who=doms, pick=picks)
    def mask(self, who: int, pick: int) -> None:
        port = self.pick(who, pick)
        if port in self.models[who].ports and self.models[who].has_word(port):
            self.sides[who].mask(port)
            self.models[who].masked.add(port)

    @rule(who=doms, pick=picks)
    def unmask(self, who: int, pick: int) -> None:
        port = self.pick(who, pick)
        if port in self.models[who].ports and not self.models[who].ports[port].xen:
            self.unmask_hypercall(who, port)

    def unmask_hypercall(self, who: int, port: int) -> None:
        evtchn.unmask(self.domain(who), port)
        self.models[who].unmask(port)

    @rule(who=doms)
    def idle(self, who: int) -> None:
        """Every queue of a domain is emptied; tails remain."""
        for vcpu in range(VCPUS):
            self.upcall(who, vcpu, [])

    @rule(who=doms, vcpu=vcpus, sends=st.lists(st.tuples(doms, picks), max_size=4))
    def upcall(self, who: int, vcpu: int, sends: list[tuple[int, int]]) -> None:
        """A vCPU takes its events while others, or its own handlers, go on sending."""
        expected, later = self.models[who].take(vcpu), iter(sends)
        for port in self.sides[who].take(vcpu):
            assert port == next(expected, None)
            for domid, pick in later:
                self.send(domid, pick)
                break
        assert next(expected, None) is None

    # The ABI.

    @precondition(lambda self: not all(model.fifo for model in self.models))
    @rule(who=doms, block_for=st.sampled_from([(0,), (1,), (0, 1), (1, 0)]), page=st.booleans())
    def start_fifo(self, who: int, block_for: tuple[int, ...], page: bool) -> None:
        model = self.models[who]
        if model.fifo:
            return
        waiting = model.pending
        model.start(fifo=True)
        model.waiting |= waiting
        for vcpu in block_for:
            self.sides[who].init_control(vcpu, 8 * vcpu)
            model.blocks.add(vcpu)
        if page:
            self.expand_array(who)

    @rule(who=doms, vcpu=vcpus)
    def init_control(self, who: int, vcpu: int) -> None:
        model = self.models[who]
        if model.fifo and vcpu not in model.blocks:
            self.sides[who].init_control(vcpu)
            model.blocks.add(vcpu)

    @rule(who=doms)
    def expand_array(self, who: int) -> None:
        model = self.models[who]
        if model.fifo and model.pages < 2:
            self.sides[who].expand_array()
            model.add_page()

    @precondition(lambda self: sum(len(model.ports) for model in self.models) > 8)
    @rule(who=doms)
    def reset(self, who: int) -> None:
        model = self.models[who]
        evtchn.reset(self.domain(who), DOMID_SELF)
        self.forget(who, xen_too=False)
        if model.fifo:
            pages = [at >> 10 for at in [*self.sides[who].control.values(), *self.sides[who].array]]
            assert not any(self.machine.refs[mfn] or self.machine.type_count[mfn] for mfn in pages)
            self.sides[who].forget_fifo()
            model.start(fifo=False)

    @precondition(lambda self: len(self.models[1].ports) + len(self.models[2].ports) > 6)
    @rule(who=st.integers(1, 2))
    def die_and_be_born_again(self, who: int) -> None:
        self.hypervisor.destroy_domain(self.domain(who))
        self.forget(who)
        assert self.domain(who).evtchn.active == 0
        assert not (self.machine.np_owner == who).any()
        self.create(who)

    # What must hold after every step.

    @invariant()
    def ports_are_as_promised(self) -> None:
        for who in range(3):
            self.statuses_agree(who)
        assert self.consumed == self.consumed_expected

    def statuses_agree(self, who: int) -> None:
        """EVTCHNOP_status of every port, so that no port is leaked and both ends tell the same; the counters."""
        domain, model = self.domain(who), self.models[who]
        assert domain.evtchn.active == len(domain.evtchn) == len(model.ports)
        assert domain.evtchn.xen_active == sum(what.xen for what in model.ports.values())
        for port in range(1, len(domain.evtchn.channels)):
            what = model.ports.get(port)
            if what is not None and what.xen:
                continue
            status = evtchn.status(domain, DOMID_SELF, port)
            if what is None:
                assert (status.status, status.vcpu) == (EVTCHNSTAT_closed, 0)
                continue
            assert (status.status, status.vcpu, status.virq) == (what.kind, what.vcpu, what.virq)
            assert (status.dom, status.port) == (what.remote, what.remote_port)
            if what.kind == EVTCHNSTAT_interdomain:
                end = self.models[what.remote].ports[what.remote_port]
                assert (end.kind, end.remote, end.remote_port) == (EVTCHNSTAT_interdomain, who, port)
        for vcpu in range(VCPUS):
            for virq, port in enumerate(domain.vcpus[vcpu].virq_to_evtchn):
                known = virq not in GLOBAL_VIRQS or vcpu == 0
                assert port == (self.virq_port(who, virq, vcpu) if known else 0)

    @invariant()
    def guest_memory_is_as_promised(self) -> None:
        for side, model in zip(self.sides, self.models, strict=True):
            linked = model.linked
            assert len(linked) == len(set(linked))  # each port in one queue at most
            for port in {*model.ports, *model.pending, *linked}:
                if not model.has_word(port):
                    continue
                assert side.is_pending(port) == (port in model.pending)
                assert side.is_masked(port) == (port in model.masked)
                if port in model.ports and not model.ports[port].xen:
                    assert side.domain.evtchn.is_pending(port) == (port in model.pending)
                    assert side.domain.evtchn.is_masked(port) == (port in model.masked)
            if model.fifo:
                self.queues_are_as_promised(side, model)
            self.nothing_is_stuck(side, model)

    def queues_are_as_promised(self, side: GuestSide, model: Model) -> None:
        for vcpu in model.blocks:
            for priority in range(16):
                assert side.queue(vcpu, priority) == model.queues[vcpu, priority]
            ready = side.u32[side.control[vcpu] + READY]
            assert ready == sum(1 << priority for priority in range(16) if model.queues[vcpu, priority])
        linked = set(model.linked)
        for page, at in enumerate(side.array):
            for i, word in enumerate(side.u32[at : at + WORDS_PER_PAGE]):
                assert bool(word & LINKED) == (page * WORDS_PER_PAGE + i in linked)

    def nothing_is_stuck(self, side: GuestSide, model: Model) -> None:
        """What is pending and not masked will be found, and its vCPU has been told to look."""
        linked = model.linked
        for port in model.pending - model.masked:
            if model.fifo:
                assert port in linked
            else:
                assert any(port // model.word_bits in words for words in model.selected)
        for vcpu in range(VCPUS):
            if model.selected[vcpu] or any(queue for key, queue in model.queues.items() if key[0] == vcpu):
                assert side.domain.vcpus[vcpu].event_pending()


EventChannels.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow],
)
TestEventChannels = EventChannels.TestCase

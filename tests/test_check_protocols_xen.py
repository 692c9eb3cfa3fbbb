"""Models of Xen's ports do as pvirq's own hypervisor does: in sequence, and at once as in some sequence."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import (
    DOMID_SELF,
    VIRQ_CONSOLE,
    VIRQ_DEBUG,
    VIRQ_DOM_EXC,
    VIRQ_TIMER,
)
from pvirq.check import explore
from pvirq.check.guided import one_by_one
from pvirq.check.protocols import channels, virqs
from pvirq.check.protocols.ports import FIFO, Code, Domain, Fixed, Xen
from pvirq.check.steps import End, Model, Thread
from pvirq.xen import domain as product
from pvirq.xen import evtchn, evtchn_channels
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_RESERVED, ECS_UNBOUND, ECS_VIRQ
from pvirq.xen.memory import Machine

DOMAINS = (0, 1)
VCPUS = 2
PORTS = 7
BUCKET = 2
VIRQS = 4
GLOBAL = (VIRQ_CONSOLE, VIRQ_DOM_EXC)

Operation = tuple[Any, ...]  # its name, the domain, arguments
State = dict[str, object]


class Real:
    """Operations and their state in pvirq.xen."""

    def __init__(self, *, fifo: bool = False) -> None:
        self.hypervisor = product.Hypervisor(Machine(64 << 20))
        for domid in DOMAINS:
            d = self.hypervisor.create_domain(domid, privileged=domid == 0, vcpus=VCPUS)
            d.evtchn.max_port = PORTS - 1
        self.fifo = fifo

    def do(self, operation: Operation) -> int:
        name, domid, *arguments = operation
        d = self.hypervisor.domains[domid]
        try:
            result = getattr(self, name)(d, *arguments)
        except XenError as error:
            return -error.errno
        return int(result or 0)

    def alloc_unbound(self, d: product.Domain, remote: int) -> int:
        return evtchn.alloc_unbound(d, DOMID_SELF, remote)

    def bind_interdomain(self, d: product.Domain, remote: int, port: int) -> int:
        return evtchn.bind_interdomain(d, remote, port)

    def bind_ipi(self, d: product.Domain, vcpu: int) -> int:
        return evtchn.bind_ipi(d, vcpu)

    def bind_virq(self, d: product.Domain, virq: int, vcpu: int) -> int:
        return evtchn.bind_virq(d, virq, vcpu)

    def alloc_xen(self, d: product.Domain, remote: int) -> int:
        return evtchn.alloc_unbound_xen_event_channel(d, 0, remote, lambda vcpu, port: None)

    def close(self, d: product.Domain, port: int) -> None:
        evtchn.close(d, port)

    def free_xen(self, d: product.Domain, port: int) -> None:
        evtchn.free_xen_event_channel(d, port)

    def send(self, d: product.Domain, port: int) -> None:
        evtchn.send(d, port)

    def unmask(self, d: product.Domain, port: int) -> None:
        evtchn.unmask(d, port)

    def poll(self, d: product.Domain, port: int) -> bool:
        return d.evtchn.poll(port)

    def reset(self, d: product.Domain) -> None:
        evtchn.reset(d, DOMID_SELF)

    def virq(self, d: product.Domain, virq: int, vcpu: int) -> None:
        if virq in GLOBAL:
            evtchn.send_global_virq(self.hypervisor, virq)
        else:
            evtchn.send_guest_vcpu_virq(d.vcpus[vcpu], virq)

    def handler(self, d: product.Domain, virq: int) -> None:
        evtchn.set_global_virq_handler(d, virq)

    def init_control(self, d: product.Domain) -> None:
        # A vCPU has its block once; the model knows nothing of that.
        if d.evtchn.fifo:
            return
        evtchn.init_control(d, self.hypervisor.machine.alloc(1, d.domid), 0, 0)

    def expand_array(self, d: product.Domain) -> None:
        evtchn.expand_array(d, self.hypervisor.machine.alloc(1, d.domid))

    def state(self) -> State:
        state: State = {}
        for domid in DOMAINS:
            d = self.hypervisor.domains[domid]
            for channel in d.evtchn.channels[:PORTS]:
                u: tuple[int, ...] = ()
                if channel.state == ECS_UNBOUND:
                    u = (channel.remote_domid,)
                elif channel.state == ECS_INTERDOMAIN:
                    assert channel.remote_domain is not None
                    u = (channel.remote_domain.domid, channel.remote_port)
                elif channel.state == ECS_VIRQ:
                    u = (channel.virq,)
                state[f"d{domid}p{channel.port}"] = (
                    channel.state, u, channel.notify_vcpu, channel.consumer is not None,
                    not self.fifo and d.evtchn.ops.is_pending(channel),
                )  # fmt: skip
            state[f"d{domid} ports"] = len(d.evtchn.channels)
            state[f"d{domid} counts"] = d.evtchn.active, d.evtchn.xen_active
            state[f"d{domid} virqs"] = [list(vcpu.virq_to_evtchn[:VIRQS]) for vcpu in d.vcpus]
            state[f"d{domid} fifo"] = d.evtchn.fifo
        state["handlers"] = [
            handler.domid if (handler := self.hypervisor.global_virq_handlers.get(virq)) else virqs.NOBODY
            for virq in range(VIRQS)
        ]
        return state


class Modelled(Fixed):
    """The same by the generators."""

    def __init__(self) -> None:
        self.model = Model()
        # The product is Xen 4.17: global VIRQs can be taken from who has bound them.
        self.xen = Xen(self.model, Code(checks_bound=False))
        for domid in DOMAINS:
            self.xen.domain(domid, ports=PORTS, valid=BUCKET, bucket=BUCKET, vcpus=VCPUS, virqs=VIRQS)
        self.handlers = virqs.GlobalVirqs(self.xen, VIRQS)
        self.consumers = self.model.array("xen_consumers", 1, "")

    def do(self, operation: Operation) -> Thread:
        name, domid, *arguments = operation
        d = self.xen.domains[domid]
        xen: dict[str, Callable[..., Thread]] = {
            "alloc_unbound": channels.evtchn_alloc_unbound,
            "bind_interdomain": channels.evtchn_bind_interdomain,
            "bind_ipi": channels.evtchn_bind_ipi,
            "bind_virq": virqs.evtchn_bind_virq,
            "alloc_xen": self._alloc_xen,
            "close": channels.evtchn_close,
            "free_xen": self._free_xen,
            "send": channels.evtchn_send,
            "unmask": channels.evtchn_unmask,
            "poll": channels.evtchn_port_poll,
            "reset": channels.evtchn_reset,
            "virq": self._virq,
            "handler": self._handler,
            "init_control": channels.evtchn_fifo_init_control,
            "expand_array": channels.evtchn_fifo_expand_array,
        }
        return (yield from xen[name](d, *arguments))

    def _alloc_xen(self, d: Domain, remote: int) -> Thread:
        return (yield from channels.alloc_unbound_xen_event_channel(d, remote, self.consumers, "consumer"))

    def _free_xen(self, d: Domain, port: int) -> Thread:
        return (yield from channels.evtchn_close(d, port, guest=False))

    def _virq(self, d: Domain, virq: int, vcpu: int) -> Thread:
        if virq in GLOBAL:
            yield from virqs.send_global_virq(self.handlers, virq)
        else:
            yield from virqs.send_guest_vcpu_virq(d, vcpu, virq)
        return 0

    def _handler(self, d: Domain, virq: int) -> Thread:
        return (yield from virqs.set_global_virq_handler(d, self.handlers, virq))

    def state(self, end: End) -> State:
        state: State = {}
        for domid, d in self.xen.domains.items():
            valid = end[d.valid_evtchns]
            for channel in d.channels[:valid]:
                kind = end[channel.state]
                state[f"d{domid}p{channel.port}"] = (
                    kind, end[channel.u] if kind in (ECS_UNBOUND, ECS_INTERDOMAIN, ECS_VIRQ) else (),
                    end[channel.notify_vcpu_id], end[channel.xen_consumer] != 0, end[channel.pending] != 0,
                )  # fmt: skip
            state[f"d{domid} ports"] = valid
            state[f"d{domid} counts"] = end[d.active_evtchns], end[d.xen_evtchns]
            state[f"d{domid} virqs"] = [[end[port] for port in vcpu.virq_to_evtchn] for vcpu in d.vcpus]
            state[f"d{domid} fifo"] = end[d.evtchn_port_ops] == FIFO
        state["handlers"] = [end[handler] for handler in self.handlers.domids]
        return state


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evtchn_channels, "EVTCHNS_PER_BUCKET", BUCKET)


domids = st.sampled_from(DOMAINS)
ports = st.integers(0, PORTS)
vcpus = st.integers(0, VCPUS - 1)
local = st.sampled_from((VIRQ_TIMER, VIRQ_DEBUG))
operations = st.one_of(
    st.tuples(st.just("alloc_unbound"), domids, domids),
    st.tuples(st.just("bind_interdomain"), domids, domids, ports),
    st.tuples(st.just("bind_ipi"), domids, st.integers(0, VCPUS)),
    st.tuples(st.just("bind_virq"), domids, st.sampled_from((*range(VIRQS), 30)), st.integers(0, VCPUS)),
    st.tuples(st.just("alloc_xen"), domids, domids),
    st.tuples(st.sampled_from(("close", "free_xen", "send", "send", "unmask", "poll")), domids, ports),
    st.tuples(st.just("reset"), domids),
    st.tuples(st.just("virq"), domids, local, vcpus),
    st.tuples(st.just("virq"), domids, st.sampled_from(GLOBAL), st.just(0)),
    st.tuples(st.just("handler"), domids, st.integers(0, VIRQS - 1)),
)


def in_sequence(sequence: list[Operation], real: Real, modelled: Modelled) -> None:
    results = [real.do(operation) for operation in sequence]
    found = modelled.model.var("results", ())

    def run() -> Thread:
        values: tuple[int, ...] = ()
        for operation in sequence:
            values = (*values, (yield from modelled.do(operation)))
        yield found.write(values)

    modelled.model.thread("all", run)
    end = one_by_one(modelled.model)
    assert not end.waiting
    assert list(end[found]) == results
    assert modelled.state(end) == real.state()


@given(st.lists(operations, max_size=20))
def test_ports_in_sequence(sequence: list[Operation]) -> None:
    in_sequence(sequence, Real(), Modelled())


fifo_operations = st.one_of(
    st.tuples(st.sampled_from(("init_control", "expand_array", "reset")), st.just(1)),
    st.tuples(st.just("bind_ipi"), st.just(1), st.just(0)),
    st.tuples(st.sampled_from(("close", "unmask")), st.just(1), ports),
)


@given(st.lists(fifo_operations, max_size=16))
def test_change_of_abi_in_sequence(sequence: list[Operation]) -> None:
    modelled = Modelled()
    d = modelled.xen.domains[1]
    d.fifo = True
    real = Real()
    in_sequence(sequence, real, modelled)
    assert real.hypervisor.domains[1].evtchn.fifo == (sequence_abi(sequence) == FIFO)


def sequence_abi(sequence: list[Operation]) -> str:
    """The ABI after a sequence: EVTCHNOP_reset never fails where nothing else happens meanwhile."""
    abi = "2l"
    for name, *_ in sequence:
        abi = {"init_control": FIFO, "reset": "2l"}.get(name, abi)
    return abi


# EVTCHNOP_reset isn't one of them: it closes one port after the other, and fails where another was bound meanwhile. Nor
# is XEN_DOMCTL_set_virq_handler: a global VIRQ is on its way to one domain, perhaps, while another becomes its handler.
at_once = st.one_of(
    st.tuples(st.just("alloc_unbound"), domids, domids),
    st.tuples(st.just("bind_interdomain"), domids, domids, st.integers(1, 2)),
    st.tuples(st.just("bind_ipi"), domids, vcpus),
    st.tuples(st.just("bind_virq"), domids, st.integers(0, VIRQS - 1), st.just(0)),
    st.tuples(st.just("alloc_xen"), domids, domids),
    st.tuples(st.sampled_from(("close", "close", "free_xen", "send", "unmask", "poll")), domids, st.integers(1, 2)),
    st.tuples(st.just("virq"), domids, local, st.just(0)),
    st.tuples(st.just("virq"), domids, st.sampled_from(GLOBAL), st.just(0)),
)


# A port is closed and taken anew while somebody sends to it, from either end; both ends are closed at once.
IPI = [("bind_ipi", 0, 0)]
PAIR = [("alloc_unbound", 1, 0), ("bind_interdomain", 0, 1, 1)]


@example(IPI, [("send", 0, 1), ("close", 0, 1), ("alloc_unbound", 0, 1)])
@example(IPI, [("poll", 0, 1), ("close", 0, 1), ("bind_virq", 0, VIRQ_TIMER, 0)])
@example([("bind_virq", 0, VIRQ_TIMER, 0)], [("virq", 0, VIRQ_TIMER, 0), ("close", 0, 1), ("bind_ipi", 0, 0)])
@example(PAIR, [("send", 0, 1), ("close", 1, 1), ("bind_ipi", 1, 0)])
@example(PAIR, [("close", 0, 1), ("close", 1, 1), ("send", 0, 1)])
@example(PAIR[:1], [PAIR[1], ("close", 1, 1), ("send", 1, 1)])
@given(st.lists(operations, max_size=6), st.lists(at_once, min_size=2, max_size=3))
def test_ports_at_once(before: list[Operation], concurrent: list[Operation]) -> None:
    """Whatever the schedule, results and states are those of some order."""
    allowed = []
    for order in permutations(range(len(concurrent))):
        real = Real()
        for operation in before:
            real.do(operation)
        results = [0] * len(concurrent)
        for number in order:
            results[number] = real.do(concurrent[number])
        allowed.append((results, real.state()))

    modelled = Modelled()
    model = modelled.model
    ready = model.var("ready", 0)
    returned = model.array("result", len(concurrent), None)

    def first() -> Thread:
        for operation in before:
            yield from modelled.do(operation)
        yield ready.write(1)

    def one(number: int) -> Thread:
        yield ready.wait(bool)
        result = yield from modelled.do(concurrent[number])
        yield returned[number].write(result)

    model.thread("before", first)
    for number, operation in enumerate(concurrent):
        model.thread(str(operation), one, number)

    def judge(end: End) -> str | None:
        found = [end[each] for each in returned], modelled.state(end)
        return None if found in allowed else f"no order of the operations gives {found}"

    model.at_end(judge)
    result = explore(model)
    assert result.failure is None, result.failure
    assert result.complete


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (Code(), None),
        (
            Code(orders_locks=False),
            "deadlock: d1 closes (takes d2.event_lock), d2 closes (takes d1.event_lock), "
            "d2 closes and binds (takes d2.event_lock), d3 binds (takes d2.event_lock)",
        ),
        (Code(looks_again=False), "d2 closes: BUG_ON: the other end isn't bound"),
    ],
)
def test_both_ends_are_closed_at_once(code: Code, message: str | None) -> None:
    """And one of them is bound anew, to a third domain: why evtchn_close() does what it does with its locks."""
    model = Model()
    xen = Xen(model, code)
    d1, d2, d3 = (xen.domain(domid, ports=2) for domid in (1, 2, 3))
    d1.bound(1, ECS_INTERDOMAIN, (2, 1))
    d2.bound(1, ECS_INTERDOMAIN, (1, 1))

    def closer(d: Domain) -> Thread:
        rc = yield from channels.evtchn_close(d, 1)
        assert rc in (0, -Errno.EINVAL)

    def rebinder() -> Thread:
        rc = yield from channels.evtchn_close(d2, 1)
        if rc == 0:
            yield from channels.evtchn_alloc_unbound(d2, 3)

    def third() -> Thread:
        port = yield from channels.evtchn_bind_interdomain(d3, 2, 1)
        assert port in (1, -Errno.EINVAL)

    model.thread("d1 closes", closer, d1)
    model.thread("d2 closes", closer, d2)
    model.thread("d2 closes and binds", rebinder)
    model.thread("d3 binds", third)

    def judge(end: End) -> str | None:
        for d in (d1, d2, d3):
            channel = d.channels[1]
            if end[channel.state] == ECS_INTERDOMAIN:
                domid, port = end[channel.u]
                other = xen.domains[domid].channels[port]
                if end[other.state] != ECS_INTERDOMAIN or end[other.u] != (d.domid, 1):
                    return f"d{d.domid}'s port is bound to one that isn't bound to it"
            if end[d.active_evtchns] != (end[channel.state] > ECS_RESERVED):
                return f"d{d.domid} counts {end[d.active_evtchns]}"
        return None

    model.at_end(judge)
    result = explore(model)
    assert (result.failure.message if result.failure is not None else None) == message
    assert result.complete or message is not None

"""The checker's FIFO event channels do what pvirq's own do, step by step, and what the ABI promises."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.event_channel import EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_PRIORITY_DEFAULT
from pvirq.abi.xen import DOMID_SELF
from pvirq.check import End, Model, Thread, Var, explore, fail
from pvirq.check.guided import one_by_one
from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols import fifo_old as old
from pvirq.check.protocols.fifo import Fifo
from pvirq.check.protocols.fifo_setup import add_page_to_event_array, map_control_block
from pvirq.linux.events_fifo import EventsFifo
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.evtchn_fifo import BUSY, LINKED, MASKED, PENDING
from pvirq.xen.evtchn_fifo import Fifo as XenFifo
from pvirq.xen.memory import Machine

PORTS = (1, 2, 3)
VCPUS = (0, 1)
PRIORITIES = (EVTCHN_FIFO_PRIORITY_DEFAULT, 3, 0)
HEAD = 2  # index of the first head in a control block

Operation = tuple[str, int, int]
_port = st.sampled_from(PORTS)
_vcpu = st.sampled_from(VCPUS)
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("send"), _port, st.just(0)),
        st.tuples(st.just("send"), _port, st.just(0)),
        st.tuples(st.just("upcall"), _vcpu, st.just(0)),
        st.tuples(st.just("priority"), _port, st.sampled_from(PRIORITIES)),
        st.tuples(st.just("bind"), _port, _vcpu),
        st.tuples(st.sampled_from(["mask", "unmask", "clear"]), _port, st.just(0)),
    ),
    max_size=30,
)


class Product:
    """A domain of pvirq's with the three ports, and pvirq's guest layer for it."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor(Machine(8 << 20))
        self.domain: Domain = self.hypervisor.create_domain(1, vcpus=len(VCPUS))
        self.machine = self.hypervisor.machine
        for port in PORTS:
            assert evtchn.alloc_unbound(self.domain, DOMID_SELF, 0) == port
        self.handled: list[int] = []

    def ops(self) -> XenFifo:
        ops = self.domain.evtchn.ops
        assert isinstance(ops, XenFifo)
        return ops

    def send(self, port: int) -> None:
        channel = self.domain.evtchn.channels[port]
        self.domain.evtchn.set_pending(channel, channel.notify_vcpu)

    def upcall_pending(self, vcpu: int) -> int:
        return self.machine.mem[self.domain.vcpus[vcpu].info]

    def last_queue(self, port: int) -> tuple[int, int]:
        channel = self.domain.evtchn.channels[port]
        return channel.last_vcpu, channel.last_priority

    def head(self, vcpu: int, priority: int) -> int:
        return self.machine.u32[self.ops()._control[vcpu] + HEAD + priority]

    def ready(self, vcpu: int) -> int:
        return self.machine.u32[self.ops()._control[vcpu]]

    def word(self, port: int) -> int:
        return self.machine.u32[self.ops()._word(port)]


class Guest(Product):
    """With control blocks and event words as pvirq's guest layer sets them up."""

    def __init__(self) -> None:
        super().__init__()
        self.events = EventsFifo(self.domain)
        for vcpu in VCPUS:
            self.events.percpu_init(vcpu)
        self.events.setup(PORTS[-1])
        for port in PORTS:
            self.events.unmask(port)

    def handle(self, port: int) -> None:
        self.events.clear_pending(port)
        self.handled.append(port)

    def do(self, operation: Operation) -> None:
        name, number, value = operation
        match name:
            case "send":
                self.send(number)
            case "upcall":
                self.machine.mem[self.domain.vcpus[number].info] = 0
                self.events.handle_events(number, self.handle)
            case "priority":
                evtchn.set_priority(self.domain, number, value)
            case "bind":
                evtchn.bind_vcpu(self.domain, number, value)
            case "mask":
                self.events.mask(number)
            case "unmask":
                self.events.unmask(number)
            case _:
                self.ops().clear_pending(self.domain.evtchn.channels[number])


def new_fifo(model: Model, **options: bool) -> Fifo:
    """With ports that were on no queue yet: for Xen that is the first one."""
    fifo = Fifo(model, len(PORTS), len(VCPUS), PRIORITIES, **options)
    for port in PORTS:
        fifo.bound(port, 0, EVTCHN_FIFO_PRIORITY_DEFAULT, last=(0, 0))
    return fifo


def last_queue(fifo: Fifo, end: End, port: int) -> tuple[int, int]:
    last = tuple(end[variable] for variable in fifo.last_queue(port))
    return last if len(last) == 2 else last[0]


def run(fifo: Fifo, handled: Var, heads: Var, to: xen.SetPending, operations: list[Operation]) -> Thread:
    """The same on the checker's side."""

    def handle(port: int) -> Thread:
        yield fifo.word[port].update(lambda value: value & ~PENDING)
        yield handled.update(lambda before: (*before, port))

    local = {vcpu: dict.fromkeys(PRIORITIES, 0) for vcpu in VCPUS}
    for name, number, value in operations:
        if name == "send":
            yield from xen.send(fifo, number, to=to)
        elif name == "upcall":
            yield from linux.do_upcall(fifo, number, local[number], handle)
        elif name == "priority":
            yield from xen.set_priority(fifo, number, value)
        elif name == "bind":
            yield from xen.bind_vcpu(fifo, number, value)
        elif name == "mask":
            yield fifo.word[number].update(lambda word: word | MASKED)
        elif name == "unmask":
            yield from linux.unmask(fifo, number)
        else:
            yield from xen.clear_pending(fifo, number)
    yield heads.write(tuple((vcpu, *local[vcpu].items()) for vcpu in VCPUS))


def once(fifo: Fifo, vcpu: int, port: int) -> Thread:
    return old.set_pending(fifo, vcpu, port, split=False)


@pytest.mark.parametrize("to", [xen.set_pending, once, old.set_pending])
@given(operations=_operations)
def test_one_after_the_other_as_pvirq_does_it(to: xen.SetPending, operations: list[Operation]) -> None:
    if to is not xen.set_pending:
        # Unmasking leads to Xen's present code; the older ones differ from it in this alone.
        operations = [operation for operation in operations if operation[0] != "unmask"]
    guest = Guest()
    for operation in operations:
        guest.do(operation)

    model = Model()
    fifo = new_fifo(model, split=to is old.set_pending, watch=True)
    handled, heads = model.var("handled", ()), model.var("heads")
    model.thread("all", run, fifo, handled, heads, to, operations)
    end = one_by_one(model)

    assert end.waiting == {}
    assert list(end[handled]) == guest.handled
    for port in PORTS:
        assert end[fifo.word[port]] == guest.word(port)
        assert last_queue(fifo, end, port) == guest.last_queue(port)
    for vcpu in VCPUS:
        assert end[fifo.ready[vcpu]] == guest.ready(vcpu)
        assert end[fifo.upcall_pending[vcpu]] == guest.upcall_pending(vcpu)
        for priority in PRIORITIES:
            assert end[fifo.head[vcpu, priority]] == guest.head(vcpu, priority)
            assert end[fifo.tail[vcpu, priority]] == guest.ops()._tails[vcpu][priority]
    assert end[heads] == tuple((vcpu, *((p, guest.events._heads[vcpu][p]) for p in PRIORITIES)) for vcpu in VCPUS)


_setup = st.lists(
    st.one_of(
        st.tuples(st.just("send"), _port, st.just(0)),
        st.tuples(st.just("bind"), _port, _vcpu),
        st.tuples(st.sampled_from(["array", "control"]), st.just(0), st.just(0)),
    ),
    max_size=12,
)


@given(operations=_setup)
def test_set_up_late_as_pvirq_does_it(operations: list[Operation]) -> None:
    """What is raised before there are event words, or for a vCPU without a control block (vCPU 1 here)."""
    late = [each for each in ("array", "control") if (each, 0, 0) in operations]
    firsts = {operations.index((each, 0, 0)) for each in late}
    operations = [each for at, each in enumerate(operations) if at in firsts or each[0] not in late]

    product = Product()
    frames = product.machine.alloc(3, 1)
    evtchn.init_control(product.domain, frames, 0, 0)
    for name, number, value in operations:
        if name == "send":
            product.send(number)
        elif name == "bind":
            evtchn.bind_vcpu(product.domain, number, value)
        elif name == "array":
            evtchn.expand_array(product.domain, frames + 1)
        else:
            evtchn.init_control(product.domain, frames + 2, 0, 1)

    model = Model()
    fifo = new_fifo(model, late_array=True, late_control=True)
    assert fifo.control_block is not None
    fifo.control_block[1].initial = 0
    for priority in PRIORITIES:
        fifo.queue_head[1, priority].initial = 0

    def everything() -> Thread:
        for name, number, value in operations:
            if name == "send":
                yield from xen.send(fifo, number)
            elif name == "bind":
                yield from xen.bind_vcpu(fifo, number, value)
            elif name == "array":
                yield from add_page_to_event_array(fifo)
            else:
                yield from map_control_block(fifo, 1)

    model.thread("all", everything)
    end = one_by_one(model)
    for port in PORTS:
        assert bool(end[fifo.pending[port]]) == product.domain.evtchn.channels[port].pending
        assert end[fifo.word[port]] == (product.word(port) if product.ops()._array else 0)
        assert end[fifo.lastq[port]] == product.last_queue(port)
    for vcpu in VCPUS:
        assert end[fifo.upcall_pending[vcpu]] == product.upcall_pending(vcpu)
        if product.ops()._control[vcpu]:
            assert end[fifo.ready[vcpu]] == product.ready(vcpu)


@pytest.mark.parametrize(
    ("changes", "linked"),
    [((), True), ((MASKED,), True), ((LINKED,), False), ((MASKED, PENDING, MASKED, LINKED), False)],
)
def test_what_an_honest_guest_changes_meanwhile_is_no_matter(changes: tuple[int, ...], linked: bool) -> None:
    """Each change of a word spoils at most one attempt to link it; unlinking ends them, and BUSY never stays."""
    model = Model()
    fifo = Fifo(model, 2)
    word = fifo.word[1]
    word.initial = PENDING | LINKED
    result = model.var("result")

    def guest() -> Thread:
        for bit in changes:
            yield word.update(partial(lambda bit, value: value ^ bit, bit))

    def link() -> Thread:
        done = yield from xen.set_link(word, 2)
        yield result.write(done)

    def judge(end: End) -> str | None:
        value = end[word]
        if value & BUSY:
            return "BUSY stays set"
        if end[result] and linked and value & EVTCHN_FIFO_LINK_MASK != 2:
            return "it gives up"
        return None if end[result] or not linked else "it isn't linked, and the tail was"

    model.thread("guest", guest)
    model.thread("sender", link)
    model.at_end(judge)
    found = explore(model)
    assert found.failure is None
    assert found.complete


def test_masks_and_unmasks_while_others_link() -> None:
    """The tail's word changes in all the ways that a guest may change it; no event is lost for that."""
    model = Model()
    fifo = Fifo(model, 2, watch=True)

    def device() -> Thread:
        yield fifo.word[1].update(lambda value: value | MASKED)
        yield from linux.unmask(fifo, 1)

    model.thread("guest", linux.idle, fifo, 0, linux.lateeoi(fifo), may_wait=True)
    model.thread("another vCPU", device)
    model.thread("sender", xen.send, fifo, 1)
    model.thread("another", xen.send, fifo, 2)
    model.at_end(fifo.stuck)
    model.at_end(fifo.malformed)
    found = explore(model)
    assert found.failure is None
    assert found.complete


def test_an_event_waits_for_each_other_port_once() -> None:
    """Fairness: what is raised again while it waits comes behind it. The one being handled may be ahead as well."""
    model = Model()
    fifo = Fifo(model, 2)
    waiting = model.var("waiting")  # 0: not raised; then one more than were handled since; -1: it was handled

    def handle(port: int) -> Thread:
        yield fifo.word[port].update(lambda value: value & ~PENDING)
        before = yield waiting.update(lambda count: -1 if port == 2 else count + 1 if count > 0 else count)
        if port == 1 and before > 2:
            fail("port 2 waits while port 1 is handled again")

    def patient() -> Thread:
        yield from xen.send(fifo, 2)
        yield waiting.update(lambda count: 1 if count == 0 else count)

    model.thread("guest", linux.idle, fifo, 0, handle, may_wait=True)
    model.thread("sender", xen.send, fifo, 1, 1, 1)
    model.thread("another", patient)
    model.at_end(fifo.stuck)
    found = explore(model)
    assert found.failure is None
    assert found.complete


@pytest.mark.parametrize("changes", [2, 3])
def test_three_changes_of_the_queue_cost_an_event(changes: int) -> None:
    """Who sends tries three times to lock the queues: retries are bounded, and a third change loses the event."""
    model = Model()
    fifo = Fifo(model, 1, priorities=(7, 6))
    handled = model.array("handled", 2)

    def move() -> Thread:
        for change in range(changes):
            yield from xen.set_priority(fifo, 1, (6, 7)[change % 2])

    model.thread("guest", linux.idle, fifo, 0, linux.counting(fifo, handled), may_wait=True)
    model.thread("hypercalls", move)
    model.thread("sender", xen.send, fifo, 1)
    model.at_end(lambda end: None if end[handled[1]] else "port 1 was raised, and the guest never hears of it")
    found = explore(model, reduce=False)
    assert (found.failure is not None) == (changes == 3)
    assert found.failure is not None or found.complete

"""The checker's two-level ABI, upcalls, sleep and Linux IRQs against pvirq's own: the same operations, one after the
other, lead to the same state."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.abi.xen import (
    DOMID_SELF,
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_MASK,
)
from pvirq.check import Model, Thread, Var
from pvirq.check.guided import one_by_one
from pvirq.check.protocols import linux_irq, twolevel
from pvirq.check.protocols.blocking import vcpu_block_enable_events
from pvirq.check.protocols.upcall import Handle, cpu_events, lowest_first, round_robin, xen_evtchn_do_upcall
from pvirq.linux.events_2l import BITS, Events2l
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.pvops import Pvops
from pvirq.linux.xenlinux_upcall import UPCALLS, UpcallState
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import Machine

Op = tuple[Any, ...]

VCPUS = 2
PORTS = (1, 2, 63, 64, 65, 130)
WORDS = 3


class Words:
    """What a domain's memory holds of its event channels, as numbers."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.u64 = domain.machine.u64
        self.pending = (domain.shared_info + SHARED_INFO_EVTCHN_PENDING) // 8
        self.mask = (domain.shared_info + SHARED_INFO_EVTCHN_MASK) // 8

    def all(self) -> list[int]:
        mem = self.domain.machine.mem
        found = [int(self.u64[at + word]) for at in (self.pending, self.mask) for word in range(WORDS)]
        for vcpu in self.domain.vcpus:
            found += [
                mem[vcpu.info], mem[vcpu.info + VCPU_INFO_UPCALL_MASK],
                int(self.u64[(vcpu.info + VCPU_INFO_PENDING_SEL) // 8]), int(vcpu.blocked),
            ]  # fmt: skip
        return found


def words_of(info: twolevel.SharedInfo) -> list[Var]:
    """The variables in the order of `Words.all`."""
    found = [*info.pending, *info.mask]
    for vcpu in info.vcpus:
        found += [vcpu.upcall_pending, vcpu.upcall_mask, vcpu.pending_sel, vcpu.blocked]
    return found


def log_of(model: Model) -> Var:
    return model.var("log", ())


def logged(log: Var, entry: object) -> Any:
    return log.update(lambda entries: (*entries, entry))


# -- Xen's part, and the guest's port operations ----------------------------------------------------------------------

port = st.sampled_from(PORTS)
vcpu = st.integers(0, VCPUS - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("send"), port),
        st.tuples(st.just("send"), port),
        st.tuples(st.sampled_from(["mask", "clear", "hypercall"]), port),
        st.tuples(st.just("unmask"), port, vcpu),
        st.tuples(st.just("bind"), port, vcpu),
        st.tuples(st.just("upcall"), vcpu),
        st.tuples(st.sampled_from(["block", "off"]), vcpu),
    ),
    max_size=25,
)


class Product:
    def __init__(self) -> None:
        self.machine = Machine(1 << 24)
        hypervisor = Hypervisor(self.machine)
        peer = hypervisor.create_domain(0, privileged=True)
        self.domain = domain = hypervisor.create_domain(1, vcpus=VCPUS)
        self.peer, self.remote = peer, {}
        for number in range(1, max(PORTS) + 1):
            assert evtchn.alloc_unbound(domain, DOMID_SELF, 0) == number
            if number in PORTS:
                self.remote[number] = evtchn.bind_interdomain(peer, 1, number)
        self.words = Words(domain)
        # Binding notifies the port: away with that.
        for word in range(WORDS):
            self.words.u64[self.words.pending + word] = 0
        for each in domain.vcpus:
            self.machine.mem[each.info] = 0
            self.words.u64[(each.info + VCPU_INFO_PENDING_SEL) // 8] = 0
        self.cpu = 0
        self.cpu_of = dict.fromkeys(range(max(PORTS) + 1), 0)
        self.events = Events2l(domain, lambda: self.cpu, self.cpu_of.__getitem__, lambda cpu: 0)
        for number in self.cpu_of:
            self.events.bind_to_cpu(number, 0, 0)
        self.log: list[int] = []

    def do(self, op: Op) -> None:
        name, *rest = op
        if name == "send":
            evtchn.send(self.peer, self.remote[rest[0]])
        elif name == "hypercall":
            evtchn.unmask(self.domain, rest[0])
        elif name == "mask":
            self.events.mask(rest[0])
        elif name == "clear":
            self.events.clear_pending(rest[0])
        elif name == "unmask":
            self.cpu = rest[1]
            self.events.unmask(rest[0])
        elif name == "bind":
            number, cpu = rest
            evtchn.bind_vcpu(self.domain, number, cpu)
            self.events.bind_to_cpu(number, cpu, self.cpu_of[number])
            self.cpu_of[number] = cpu
        elif name == "upcall":
            self.cpu = rest[0]
            info = self.domain.vcpus[self.cpu].info
            while True:
                self.machine.mem[info] = 0
                self.events.handle_events(self.cpu, self.handle)
                if not self.machine.mem[info]:
                    break
        elif name == "block":
            sched.block(self.domain.vcpus[rest[0]])
        elif name == "off":
            self.machine.mem[self.domain.vcpus[rest[0]].info + VCPU_INFO_UPCALL_MASK] = 1

    def handle(self, number: int) -> None:
        self.log.append(number)
        self.events.clear_pending(number)


def modelled(ops: list[Op], upcall_mask: int) -> tuple[list[Any], tuple[int, ...]]:
    """The words after operations, each of which is a thread, and the ports that were handled."""
    model = Model()
    info = twolevel.shared_info(model, ports=max(PORTS) + 1, vcpus=VCPUS, upcall_mask=upcall_mask)
    cpus = [cpu_events(model, info, cpu, ports=None if cpu == 0 else 0) for cpu in range(VCPUS)]
    cpu_of = model.array("cpu_of", max(PORTS) + 1)
    log = log_of(model)

    def handle(number: int) -> Thread:
        yield logged(log, number)
        yield from twolevel.clear_evtchn(info, number)

    def thread(op: Op) -> Thread:
        name, *rest = op
        if name == "send":
            yield from twolevel.evtchn_send(info, rest[0])
        elif name == "hypercall":
            yield from twolevel.evtchn_unmask(info, rest[0])
        elif name == "mask":
            yield from twolevel.mask_evtchn(info, rest[0])
        elif name == "clear":
            yield from twolevel.clear_evtchn(info, rest[0])
        elif name == "unmask":
            number, cpu = rest
            yield from twolevel.unmask_evtchn(info, number, cpu, (yield cpu_of[number].read()))
        elif name == "bind":
            number, cpu = rest
            word, bit = info.at(number)
            yield from twolevel.evtchn_bind_vcpu(info, number, cpu)
            old = yield cpu_of[number].xchg(cpu)
            yield cpus[old].mask[word].clear_bit(bit)
            yield cpus[cpu].mask[word].set_bit(bit)
        elif name == "upcall":
            yield from xen_evtchn_do_upcall(info, rest[0], cpus[rest[0]], handle)
        elif name == "block":
            yield from vcpu_block_enable_events(info, rest[0])
        elif name == "off":
            yield info.vcpus[rest[0]].upcall_mask.write(1)

    for number, op in enumerate(ops):
        model.thread(str(number), thread, op, may_wait=True)
    end = one_by_one(model)
    return [end[word] for word in words_of(info)], end[log]


@given(operations)
@settings(max_examples=150)
def test_two_level_abi(ops: list[Op]) -> None:
    product = Product()
    try:
        upcall_mask = product.machine.mem[product.domain.vcpus[0].info + VCPU_INFO_UPCALL_MASK]
        done = []
        for op in ops:
            # Who sleeps does nothing.
            if op[0] in ("unmask", "upcall", "block", "off") and product.domain.vcpus[op[-1]].blocked:
                continue
            product.do(op)
            done.append(op)
        assert modelled(done, upcall_mask) == (product.words.all(), tuple(product.log))
    finally:
        product.machine.close()


# -- upcall loops -----------------------------------------------------------------------------------------------------

# Few bits a word, so that much meets; what is pending, masked, selected, this CPU's; and for each event that is
# handled, ports that are notified meanwhile.
SHIFT = 2
SMALL = 1 << SHIFT


def small_words() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, (1 << SMALL) - 1), min_size=SMALL, max_size=SMALL)


upcalls = st.tuples(
    small_words(), small_words(), small_words(), st.integers(0, (1 << SMALL) - 1),
    st.lists(st.lists(st.integers(0, SMALL * SMALL - 1), max_size=3), max_size=12),
    st.integers(1, 3),
)  # fmt: skip


@pytest.mark.parametrize(("name", "loop"), [("lowest-first", lowest_first), ("round-robin", round_robin)])
@given(case=upcalls)
@settings(max_examples=200)
def test_upcalls_of_xenlinux(name: str, loop: Any, case: tuple[Any, ...]) -> None:
    pending, mask, mine, selected, script, times = case
    words = [*pending, *mask, selected]
    mem = [0]
    order: list[int] = []

    def do_irq(number: int) -> None:
        words[number >> SHIFT] &= ~(1 << number % SMALL)
        for other in script[len(order)] if len(order) < len(script) else ():
            words[other >> SHIFT] |= 1 << other % SMALL
            words[-1] |= 1 << (other >> SHIFT)
            mem[0] = 1
        order.append(number)

    events = SimpleNamespace(
        mem=mem, words=words, pending_words=0, mask_words=SMALL, word_shift=SHIFT, selector=[2 * SMALL],
        domain=SimpleNamespace(vcpus=[SimpleNamespace(info=0)]), cpu_evtchn_mask=[mine],
        ways=lambda cpu: (lambda number: number, do_irq, None),
    )  # fmt: skip
    upcall = UPCALLS[name](events)(0, UpcallState())  # type: ignore[arg-type]
    for _ in range(times):
        upcall()
        words[-1] = (1 << SMALL) - 1  # all words once more

    model = Model()
    info = twolevel.shared_info(model, ports=SMALL * SMALL, word_bits=SMALL)
    cpu = cpu_events(model, info, 0, last=name == "round-robin")
    for variables, values in ((info.pending, pending), (info.mask, mask), (cpu.mask, mine)):
        for variable, value in zip(variables, values, strict=True):
            variable.initial = value
    info.vcpus[0].pending_sel.initial = selected
    log = log_of(model)

    def thread() -> Thread:
        for _ in range(times):
            yield from loop(info, 0, cpu, handler(info, log, script))
            yield info.vcpus[0].pending_sel.write((1 << SMALL) - 1)

    model.thread("CPU", thread)
    end = one_by_one(model)
    assert list(end[log]) == order
    assert [end[word] for word in info.pending] == words[:SMALL]


def handler(info: twolevel.SharedInfo, log: Var, script: list[list[int]]) -> Handle:
    """Clears the event, and then other ports are notified by the script."""

    def handle(number: int) -> Thread:
        yield from twolevel.clear_evtchn(info, number)
        handled = yield logged(log, number)
        for other in script[len(handled)] if len(handled) < len(script) else ():
            word, bit = info.at(other)
            yield info.pending[word].set_bit(bit)
            yield info.vcpus[0].pending_sel.set_bit(word)
            yield info.vcpus[0].upcall_pending.write(1)

    return handle


@given(
    ports=st.lists(port, max_size=6), masked=st.lists(port, max_size=2),
    script=st.lists(st.lists(port, max_size=3), max_size=12), times=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=100)
def test_upcall_of_linux(ports: list[int], masked: list[int], script: list[list[int]], times: int) -> None:
    product = Product()
    mem, info_at = product.machine.mem, product.domain.vcpus[0].info
    order: list[int] = []

    def notify(number: int) -> None:
        product.events.set_pending(number)
        product.words.u64[(info_at + VCPU_INFO_PENDING_SEL) // 8] |= 1 << number // BITS
        mem[info_at] = 1

    def handle(number: int) -> None:
        product.events.clear_pending(number)
        for other in script[len(order)] if len(order) < len(script) else ():
            notify(other)
        order.append(number)

    try:
        for number in masked:
            product.events.mask(number)
        for _ in range(times):
            for number in ports:
                notify(number)
            while mem[info_at]:
                mem[info_at] = 0
                product.events.handle_events(0, handle)
    finally:
        product.machine.close()

    model = Model()
    info = twolevel.shared_info(
        model, ports=max(PORTS) + 1, masked=sum(1 << number for number in set(masked)), upcall_mask=0
    )
    cpu = cpu_events(model, info, 0)
    log = log_of(model)

    def thread() -> Thread:
        for _ in range(times):
            for number in ports:
                word, bit = info.at(number)
                yield info.pending[word].set_bit(bit)
                yield info.vcpus[0].pending_sel.set_bit(word)
                yield info.vcpus[0].upcall_pending.write(1)
            if (yield info.vcpus[0].upcall_pending.read()):
                yield from xen_evtchn_do_upcall(info, 0, cpu, handler(info, log, script))

    model.thread("CPU", thread)
    assert list(one_by_one(model)[log]) == order


# -- IRQs of Linux ----------------------------------------------------------------------------------------------------

irq_operations = st.lists(
    st.one_of(
        st.just(("send",)), st.just(("eoi",)), st.tuples(st.just("move"), vcpu), st.tuples(st.just("upcall"), vcpu)
    ),
    max_size=20,
)


class LinuxProduct:
    """A kernel with one late-EOI channel; its handler leaves the EOI to a process."""

    def __init__(self) -> None:
        self.machine = Machine(1 << 26)
        hypervisor = Hypervisor(self.machine)
        self.zero = hypervisor.create_domain(0, privileged=True)
        self.domain = domain = hypervisor.create_domain(1, vcpus=VCPUS)
        store, console = (evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(2))
        info = StartInfo(store_port=store, console_port=console)
        self.kernel = Kernel(domain, partial(Pvops, fifo=False, start_info=info))
        self.kernel.boot()
        self.handled = 0
        self.irq = self.kernel.events.bind_listening(0, self.interrupt, "x", self)
        self.port = self.kernel.events.evtchn_from_irq(self.irq)
        self.remote = evtchn.bind_interdomain(self.zero, 1, self.port)
        self.info = self.kernel.events.info(self.irq)
        for cpu in range(VCPUS):
            self.upcall(cpu)
        if self.handled:
            self.kernel.events.xen_irq_lateeoi(self.irq)
        self.move(0)
        self.handled = 0

    def interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.handled += 1
        return IRQ_HANDLED

    def upcall(self, cpu: int) -> None:
        self.kernel.cpu = cpu
        if self.machine.mem[self.domain.vcpus[cpu].info]:
            self.kernel.events.upcall(cpu)

    def move(self, cpu: int) -> None:
        self.kernel.irq.set_affinity(self.irq, 1 << cpu)

    def do(self, op: Op) -> None:
        name, *rest = op
        if name == "send":
            evtchn.send(self.zero, self.remote)
        elif name == "eoi":
            self.kernel.cpu = 0
            self.kernel.events.xen_irq_lateeoi(self.irq)
        elif name == "move":
            self.kernel.cpu = 0
            self.move(rest[0])
        elif name == "upcall":
            self.upcall(rest[0])

    def state(self) -> dict[str, int]:
        ops = self.kernel.events.ops
        word = self.port // BITS
        selectors = [int(self.machine.u64[(vcpu.info + VCPU_INFO_PENDING_SEL) // 8]) for vcpu in self.domain.vcpus]
        return {
            "pending": ops.is_pending(self.port), "masked": ops.is_masked(self.port),
            "mask_reason": self.info.mask_reason, "is_active": int(self.info.is_active), "cpu": self.info.cpu,
            "selected": sum((each >> word & 1) << cpu for cpu, each in enumerate(selectors)),
            "upcalls": sum(self.machine.mem[vcpu.info] << cpu for cpu, vcpu in enumerate(self.domain.vcpus)),
            "handled": self.handled,
        }  # fmt: skip


def linux_modelled(ops: list[Op]) -> dict[str, int]:
    model = Model()
    info = twolevel.shared_info(model, ports=1, vcpus=VCPUS)
    cpus = (cpu_events(model, info, 0), cpu_events(model, info, 1, ports=0))
    irq = linux_irq.irq(model, linux_irq.LINUX_5_14, info, cpus, 0, warns=False)
    log = log_of(model)

    def upcall(cpu: int) -> Thread:
        def handle(number: int) -> Thread:
            yield from linux_irq.handle_irq_for_port(irq, cpu)
            if not (yield irq.enabled.xchg(1)):
                yield logged(log, cpu)

        if (yield info.vcpus[cpu].upcall_pending.read()):
            yield from xen_evtchn_do_upcall(info, cpu, cpus[cpu], handle)

    def thread(op: Op) -> Thread:
        name, *rest = op
        if name == "send":
            yield from twolevel.evtchn_send(info, 0)
        elif name == "eoi":
            yield from linux_irq.xen_irq_lateeoi(irq, 0)
        elif name == "move":
            yield from linux_irq.xen_rebind_evtchn_to_cpu(irq, rest[0], 0)
        elif name == "upcall":
            yield from upcall(rest[0])

    for number, op in enumerate(ops):
        model.thread(str(number), thread, op)
    end = one_by_one(model)
    return {
        "pending": end[info.pending[0]], "masked": end[info.mask[0]],
        "mask_reason": end[irq.mask_reason], "is_active": end[irq.is_active], "cpu": end[irq.cpu],
        "selected": sum(end[vcpu.pending_sel] << cpu for cpu, vcpu in enumerate(info.vcpus)),
        "upcalls": sum(end[vcpu.upcall_pending] << cpu for cpu, vcpu in enumerate(info.vcpus)),
        "handled": len(end[log]),
    }  # fmt: skip


@given(irq_operations)
@settings(max_examples=100)
def test_linux_irqs(ops: list[Op]) -> None:
    product = LinuxProduct()
    try:
        before = product.state()
        assert not before["pending"]
        assert not before["masked"]
        for op in ops:
            product.do(op)
        assert linux_modelled(ops) == product.state()
    finally:
        product.machine.close()

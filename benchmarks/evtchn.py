"""How fast event channels are: binding, sending, and the whole way from a send to a handler in a modelled domain.

python -m benchmarks.evtchn

Every figure is of one core and one thread, in processor time, and the best of many short rounds: whatever else the
machine does can only make a round slower.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Final

from pvirq.abi.event_channel import EVTCHN_FIFO_NR_CHANNELS
from pvirq.abi.xen import DOMID_SELF, SHARED_INFO_EVTCHN_PENDING, VCPU_INFO_PENDING_SEL
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.pvops import Pvops
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import Machine

ALL_PORTS: Final = EVTCHN_FIFO_NR_CHANNELS - 1  # but the reserved port 0
ROUNDS: Final = 20
SENDS: Final = 5_000


def _rate(count: int, work: Callable[[], object]) -> float:
    """How many per second, where one call of `work` does `count`."""
    best = float("inf")
    work()
    for _ in range(ROUNDS):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return count / best


def _hypervisor(megabytes: int = 64) -> Hypervisor:
    return Hypervisor(Machine(megabytes << 20))


def _use_fifo(domain: Domain, pages: int = 1) -> None:
    machine = domain.machine
    for vcpu in domain.vcpus:
        evtchn.init_control(domain, machine.alloc(1, domain.domid), 0, vcpu.vcpu_id)
    for _ in range(pages):
        evtchn.expand_array(domain, machine.alloc(1, domain.domid))


def _full_domain(hypervisor: Hypervisor) -> Domain:
    domain = hypervisor.create_domain()
    _use_fifo(domain, 128)
    for _ in range(ALL_PORTS):
        evtchn.bind_ipi(domain, 0)
    return domain


def bind_all() -> float:
    """Seconds to bind every port of the FIFO ABI, one hypercall each."""
    best = float("inf")
    for _ in range(2):
        hypervisor = _hypervisor()
        start = time.process_time()
        _full_domain(hypervisor)
        best = min(best, time.process_time() - start)
        hypervisor.machine.close()
    return best


def rebind() -> float:
    """Pairs of close and bind per second at the bottom of a full domain, where the next free port is far away."""
    hypervisor = _hypervisor()
    domain = _full_domain(hypervisor)
    evtchn.close(domain, ALL_PORTS)
    count = 1000

    def work() -> None:
        for port in range(1, count + 1):
            evtchn.close(domain, port)
            evtchn.bind_ipi(domain, 0)  # takes that one
            last = evtchn.alloc_unbound(domain, DOMID_SELF, 0)  # takes the last one
            evtchn.close(domain, last)

    return _rate(count, work)


def bytes_per_port() -> float:
    """Memory of one more interdomain port, both its ends counted apart."""
    hypervisor = _hypervisor()
    left, right = hypervisor.create_domain(), hypervisor.create_domain()
    for domain in (left, right):
        _use_fifo(domain, 16)
    gc.collect()
    count = 10_000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(count):
        evtchn.bind_interdomain(right, left.domid, evtchn.alloc_unbound(left, DOMID_SELF, right.domid))
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return used / (2 * count)


def _pair(hypervisor: Hypervisor, fifo: bool) -> tuple[Domain, int]:
    """(a domain, its port), connected to another domain's."""
    left, right = hypervisor.create_domain(), hypervisor.create_domain()
    if fifo:
        _use_fifo(left)
        _use_fifo(right)
    return left, evtchn.bind_interdomain(left, right.domid, evtchn.alloc_unbound(right, DOMID_SELF, left.domid))


def send_pending(fifo: bool) -> float:
    """Sends per second to a port that is pending already."""
    domain, port = _pair(_hypervisor(), fifo)
    send = evtchn.send

    def work() -> None:
        for _ in range(SENDS):
            send(domain, port)

    return _rate(SENDS, work)


def send_among_ports(bound: int, used: int) -> float:
    """Sends per second to `used` ports in turn, evenly among `bound` ones; none is pending when its turn comes."""
    domain = _hypervisor().create_domain()
    _use_fifo(domain, 128)
    for _ in range(bound):
        evtchn.bind_ipi(domain, 0)
    send, u32 = evtchn.send, domain.machine.u32
    array = (domain.shared_info_mfn + 1 + len(domain.vcpus)) << 10  # where `_use_fifo` put the event words
    ports = list(range(1, bound + 1, bound // used))[:used]
    times = max(1, SENDS // used)

    def work() -> None:
        for _ in range(times):
            for port in ports:
                send(domain, port)
                u32[array + port] = 0

    send(domain, ports[-1])
    assert u32[array + ports[-1]]
    return _rate(times * used, work)


def send_among_domains(domains: int, used: int) -> float:
    """Sends per second from domain 0 to `used` others in turn, of `domains` in all; each event is news to them."""
    hypervisor = _hypervisor()
    dom0 = hypervisor.create_domain(0, privileged=True)
    others = [hypervisor.create_domain() for _ in range(domains - 1)]
    ports = [evtchn.bind_interdomain(dom0, other.domid, evtchn.alloc_unbound(other, DOMID_SELF, 0)) for other in others]
    send, mem = evtchn.send, hypervisor.machine.mem
    targets = [(port, other.shared_info) for port, other in zip(ports, others, strict=True)][:: len(ports) // used]
    times = max(1, SENDS // len(targets))

    def work() -> None:
        for _ in range(times):
            for port, shared_info in targets:
                send(dom0, port)
                mem[shared_info] = mem[shared_info + VCPU_INFO_PENDING_SEL] = 0
                mem[shared_info + SHARED_INFO_EVTCHN_PENDING] = 0

    send(dom0, ports[-1])
    assert others[-1].evtchn.is_pending(1)
    return _rate(times * len(targets), work)


def _ignore(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


def _modelled(fifo: bool, ports: int) -> tuple[Domain, Kernel[Pvops], list[int]]:
    """A sender, a modelled kernel, and the sender's ports, each handled by an IRQ of that kernel."""
    hypervisor = _hypervisor(256)
    sender = hypervisor.create_domain(0, privileged=True)
    _use_fifo(sender, 128)
    receiver = Kernel(hypervisor.create_domain(1), partial(Pvops, fifo=fifo))
    receiver.boot()
    theirs = []
    for i in range(ports):
        port = evtchn.alloc_unbound(receiver.domain, DOMID_SELF, 0)
        receiver.events.bind_evtchn_to_irqhandler(port, _ignore, 0, "device", dev_id=i + 1)
        theirs.append(evtchn.bind_interdomain(sender, 1, port))
    receiver.run(receiver.domain.vcpus[0])
    return sender, receiver, theirs


def handled(fifo: bool, ports: int = 10) -> float:
    """Events per second from a send to the end of its handler, one upcall for each."""
    sender, receiver, theirs = _modelled(fifo, ports)
    send, run, vcpu = evtchn.send, receiver.run, receiver.domain.vcpus[0]
    before = _kstat(receiver)
    targets = (theirs * (SENDS // len(theirs) + 1))[:SENDS]

    def work() -> None:
        for port in targets:
            send(sender, port)
            run(vcpu)

    rate = _rate(SENDS, work)
    assert _kstat(receiver) - before == SENDS * (ROUNDS + 1)
    return rate


def handled_in_bulk(fifo: bool, ports: int = 500) -> float:
    """The same where the receiver gets its turn only after each of its ports has been sent to once."""
    sender, receiver, theirs = _modelled(fifo, ports)
    send, run, vcpu = evtchn.send, receiver.run, receiver.domain.vcpus[0]
    before = _kstat(receiver)
    times = SENDS // ports

    def work() -> None:
        for _ in range(times):
            for port in theirs:
                send(sender, port)
            run(vcpu)

    rate = _rate(times * ports, work)
    assert _kstat(receiver) - before == times * ports * (ROUNDS + 1)
    return rate


def _kstat(kernel: Kernel[Pvops]) -> int:
    return sum(sum(desc.kstat) for desc in kernel.irq.descs.values())


def run() -> dict[str, float]:
    """All figures, by name; the last part of a name is the unit."""
    return {
        "evtchn.bind_131071_ports.s": bind_all(),
        "evtchn.close_and_bind_when_full.per_s": rebind(),
        "evtchn.port.bytes": bytes_per_port(),
        "evtchn.send_pending.2l.per_s": send_pending(False),
        "evtchn.send_pending.fifo.per_s": send_pending(True),
        # The cost of a send doesn't grow with what there is; with what is used in turn, the caches' misses do.
        "evtchn.send.10_of_10_ports.per_s": send_among_ports(10, 10),
        "evtchn.send.10_of_131071_ports.per_s": send_among_ports(ALL_PORTS, 10),
        "evtchn.send.131071_of_131071_ports.per_s": send_among_ports(ALL_PORTS, ALL_PORTS),
        "evtchn.send.1_of_2_domains.per_s": send_among_domains(2, 1),
        "evtchn.send.1_of_2000_domains.per_s": send_among_domains(2000, 1),
        "evtchn.send.1999_of_2000_domains.per_s": send_among_domains(2000, 1999),
        "evtchn.handled.fifo.per_s": handled(True),
        "evtchn.handled.2l.per_s": handled(False),
        "evtchn.handled_10000_ports.fifo.per_s": handled(True, 10_000),
        "evtchn.handled_in_bulk.fifo.per_s": handled_in_bulk(True),
        "evtchn.handled_in_bulk.2l.per_s": handled_in_bulk(False),
    }


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:45} {value:14,.3f}" if value < 10 else f"{name:45} {value:14,.0f}")

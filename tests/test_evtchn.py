"""Event channel operations: results, errors and their order, effects in shared memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    EVTCHNSTAT_closed,
    EVTCHNSTAT_interdomain,
    EVTCHNSTAT_ipi,
    EVTCHNSTAT_pirq,
    EVTCHNSTAT_unbound,
    EVTCHNSTAT_virq,
)
from pvirq.abi.xen import (
    DOMID_IO,
    DOMID_SELF,
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_MASK,
    VIRQ_CON_RING,
    VIRQ_DEBUG,
    VIRQ_DOM_EXC,
    VIRQ_TIMER,
)
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.memory import Machine


@pytest.fixture
def hypervisor() -> Hypervisor:
    return Hypervisor(Machine(64 << 20))


@pytest.fixture
def dom0(hypervisor: Hypervisor) -> Domain:
    return running(hypervisor.create_domain(0, privileged=True, vcpus=2))


@pytest.fixture
def guest(hypervisor: Hypervisor, dom0: Domain) -> Domain:
    return running(hypervisor.create_domain(1, vcpus=3))


def running(domain: Domain) -> Domain:
    for vcpu in domain.vcpus:
        vcpu.up = True
        domain.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 0
    return domain


def fails(errno: Errno, operation: Callable[..., object], *args: object) -> None:
    with pytest.raises(XenError) as caught:
        operation(*args)
    assert caught.value.errno == errno


def connect(dom0: Domain, guest: Domain) -> tuple[int, int]:
    """(dom0's port, the guest's), with the event of the binding consumed."""
    theirs = evtchn.alloc_unbound(dom0, guest.domid, DOMID_SELF)
    ours = evtchn.bind_interdomain(dom0, guest.domid, theirs)
    consume(dom0)
    return ours, theirs


def consume(domain: Domain) -> None:
    """Clear all that is pending, as a guest's upcall does."""
    mem, base = domain.machine.mem, domain.shared_info
    mem[base + SHARED_INFO_EVTCHN_PENDING : base + SHARED_INFO_EVTCHN_PENDING + 512] = bytes(512)
    for vcpu in domain.vcpus:
        mem[vcpu.info] = 0
        mem[vcpu.info + VCPU_INFO_PENDING_SEL : vcpu.info + VCPU_INFO_PENDING_SEL + 8] = bytes(8)


def mask(domain: Domain, port: int) -> None:
    domain.machine.mem[domain.shared_info + SHARED_INFO_EVTCHN_MASK + port // 8] |= 1 << port % 8


def test_alloc_unbound_takes_the_lowest_free_port(dom0: Domain, guest: Domain) -> None:
    assert [evtchn.alloc_unbound(guest, DOMID_SELF, 0) for _ in range(3)] == [1, 2, 3]
    evtchn.close(guest, 2)
    assert evtchn.alloc_unbound(dom0, 1, DOMID_SELF) == 2
    assert evtchn.status(guest, DOMID_SELF, 2).dom == 0
    assert evtchn.alloc_unbound(guest, 1, 5, 70) == 70  # a port asked for; remote domain not yet there
    assert len(guest.evtchn.channels) == 128
    fails(Errno.EBUSY, evtchn.alloc_unbound, guest, 1, 5, 70)


def test_alloc_unbound_errors(hypervisor: Hypervisor, dom0: Domain, guest: Domain) -> None:
    fails(Errno.ESRCH, evtchn.alloc_unbound, dom0, 9, 0)
    fails(Errno.ESRCH, evtchn.alloc_unbound, dom0, DOMID_IO, 0)
    fails(Errno.EPERM, evtchn.alloc_unbound, guest, 0, 1)
    assert dom0.evtchn.active == 0
    small = hypervisor.create_domain(2, max_evtchns=2)
    assert [evtchn.alloc_unbound(small, DOMID_SELF, 0) for _ in range(2)] == [1, 2]
    fails(Errno.ENOSPC, evtchn.alloc_unbound, small, DOMID_SELF, 0)
    fails(Errno.ENOSPC, evtchn.alloc_unbound, guest, 2, 0)  # space comes before permission
    guest.dying = True
    fails(Errno.EINVAL, evtchn.alloc_unbound, dom0, 1, 0)


@pytest.mark.parametrize(("word_bits", "channels"), [(64, 4096), (32, 1024)])
def test_two_level_limit(hypervisor: Hypervisor, word_bits: int, channels: int) -> None:
    domain = hypervisor.create_domain(1, word_bits=word_bits)
    for port in range(1, channels):
        assert evtchn.bind_ipi(domain, 0) == port
    fails(Errno.ENOSPC, evtchn.bind_ipi, domain, 0)
    evtchn.close(domain, 77)
    assert evtchn.bind_ipi(domain, 0) == 77
    evtchn.send(domain, channels - 1)
    assert domain.evtchn.is_pending(channels - 1)
    shared, last = domain.shared_info, (channels - 1) // 8
    assert domain.machine.mem[shared + SHARED_INFO_EVTCHN_PENDING + last] == 0x80
    sel = VCPU_INFO_PENDING_SEL if word_bits == 64 else 4
    assert domain.machine.mem[shared + sel + word_bits // 8 - 1] == 0x80
    assert domain.machine.mem[shared] == 1


def test_bind_interdomain(dom0: Domain, guest: Domain) -> None:
    theirs = evtchn.alloc_unbound(dom0, 1, DOMID_SELF)
    ours = evtchn.bind_interdomain(dom0, 1, theirs)
    assert dom0.evtchn.is_pending(ours)  # a notification may have come before
    assert dom0.vcpus[0].event_pending()
    assert not guest.evtchn.is_pending(theirs)
    status = evtchn.status(dom0, DOMID_SELF, ours)
    assert (status.status, status.dom, status.port) == (EVTCHNSTAT_interdomain, 1, theirs)
    fails(Errno.EINVAL, evtchn.bind_interdomain, dom0, 1, theirs)  # taken
    fails(Errno.EINVAL, evtchn.bind_interdomain, dom0, 1, 0)
    fails(Errno.EINVAL, evtchn.bind_interdomain, dom0, 1, 1 << 31)
    fails(Errno.EINVAL, evtchn.bind_interdomain, guest, DOMID_SELF, evtchn.alloc_unbound(guest, 1, 0))
    fails(Errno.ESRCH, evtchn.bind_interdomain, dom0, 7, theirs)
    assert dom0.evtchn.active == 1
    assert [channel.port for channel in dom0.evtchn] == [ours]


def test_a_failed_bind_can_grow_the_port_array(dom0: Domain) -> None:
    for _ in range(63):
        evtchn.bind_ipi(dom0, 0)
    fails(Errno.EINVAL, evtchn.unmask, dom0, 64)
    fails(Errno.EINVAL, evtchn.bind_interdomain, dom0, DOMID_SELF, 1)
    evtchn.unmask(dom0, 64)


def test_closing_one_end_leaves_the_other_unbound(dom0: Domain, guest: Domain) -> None:
    ours, theirs = connect(dom0, guest)
    evtchn.send(guest, theirs)
    assert dom0.evtchn.is_pending(ours)
    evtchn.close(dom0, ours)
    assert not dom0.machine.mem[dom0.shared_info + SHARED_INFO_EVTCHN_PENDING]
    status = evtchn.status(guest, DOMID_SELF, theirs)
    assert (status.status, status.dom) == (EVTCHNSTAT_unbound, 0)
    evtchn.send(guest, theirs)  # dropped
    assert evtchn.bind_interdomain(dom0, 1, theirs) == ours
    for port in (0, 60, 64, -1, 1 << 32):
        fails(Errno.EINVAL, evtchn.close, dom0, port)


def test_loopback(guest: Domain) -> None:
    first = evtchn.alloc_unbound(guest, DOMID_SELF, DOMID_SELF)
    second = evtchn.bind_interdomain(guest, DOMID_SELF, first)
    consume(guest)
    evtchn.send(guest, second)
    assert guest.evtchn.is_pending(first)
    evtchn.close(guest, first)
    assert evtchn.status(guest, DOMID_SELF, second).status == EVTCHNSTAT_unbound
    evtchn.close(guest, second)
    assert not guest.evtchn.active


def test_virqs(hypervisor: Hypervisor, dom0: Domain, guest: Domain) -> None:
    timer = evtchn.bind_virq(guest, VIRQ_TIMER, 1)
    status = evtchn.status(guest, DOMID_SELF, timer)
    assert (status.status, status.virq, status.vcpu) == (EVTCHNSTAT_virq, VIRQ_TIMER, 1)
    fails(Errno.EEXIST, evtchn.bind_virq, guest, VIRQ_TIMER, 1)
    fails(Errno.EINVAL, evtchn.bind_virq, guest, 24, 9)
    fails(Errno.EINVAL, evtchn.bind_virq, guest, -1, 0)
    fails(Errno.EINVAL, evtchn.bind_virq, guest, VIRQ_CON_RING, 1)
    fails(Errno.ENOENT, evtchn.bind_virq, guest, VIRQ_DEBUG, 3)
    fails(Errno.EINVAL, evtchn.bind_vcpu, guest, timer, 0)
    assert evtchn.virq_enabled(guest.vcpus[1], VIRQ_TIMER)
    evtchn.send_guest_vcpu_virq(guest.vcpus[0], VIRQ_TIMER)  # not bound there
    assert not guest.evtchn.is_pending(timer)
    evtchn.send_guest_vcpu_virq(guest.vcpus[1], VIRQ_TIMER)
    assert guest.vcpus[1].event_pending()
    assert not guest.vcpus[0].event_pending()
    fails(Errno.EINVAL, evtchn.send, guest, timer)
    evtchn.close(guest, timer)
    assert not guest.vcpus[1].virq_to_evtchn[VIRQ_TIMER]

    evtchn.send_global_virq(hypervisor, VIRQ_DOM_EXC)  # nobody listens
    port = evtchn.bind_virq(dom0, VIRQ_DOM_EXC, 0)
    evtchn.bind_vcpu(dom0, port, 1)
    evtchn.send_global_virq(hypervisor, VIRQ_DOM_EXC)
    assert dom0.vcpus[1].event_pending()
    consume(dom0)
    evtchn.set_global_virq_handler(guest, VIRQ_DOM_EXC)
    fails(Errno.EINVAL, evtchn.set_global_virq_handler, guest, VIRQ_TIMER)
    fails(Errno.EINVAL, evtchn.set_global_virq_handler, guest, 24)
    evtchn.send_global_virq(hypervisor, VIRQ_DOM_EXC)
    assert not dom0.evtchn.is_pending(port)
    hypervisor.destroy_domain(guest)
    evtchn.send_global_virq(hypervisor, VIRQ_DOM_EXC)
    assert dom0.evtchn.is_pending(port)
    evtchn.close(dom0, port)  # bound on vCPU 0, whatever it notifies
    assert evtchn.bind_virq(dom0, VIRQ_DOM_EXC, 0) == port


def test_ipi(guest: Domain) -> None:
    port = evtchn.bind_ipi(guest, 2)
    evtchn.send(guest, port)
    assert guest.vcpus[2].event_pending()
    status = evtchn.status(guest, DOMID_SELF, port)
    assert (status.status, status.vcpu) == (EVTCHNSTAT_ipi, 2)
    fails(Errno.EINVAL, evtchn.bind_vcpu, guest, port, 0)
    fails(Errno.ENOENT, evtchn.bind_ipi, guest, 3)


def test_status(dom0: Domain, guest: Domain) -> None:
    port = evtchn.alloc_unbound(guest, DOMID_SELF, 0)
    assert evtchn.status(dom0, 1, port).status == EVTCHNSTAT_unbound
    assert evtchn.status(dom0, 1, 0).status == EVTCHNSTAT_closed
    assert evtchn.status(dom0, 1, 63).status == EVTCHNSTAT_closed
    fails(Errno.EINVAL, evtchn.status, dom0, 1, 64)
    fails(Errno.ESRCH, evtchn.status, dom0, 2, 1)
    fails(Errno.EINVAL, evtchn.status, guest, 0, 64)  # the port comes before permission
    fails(Errno.EPERM, evtchn.status, guest, 0, 1)


def test_bind_vcpu(dom0: Domain, guest: Domain) -> None:
    _, theirs = connect(dom0, guest)
    evtchn.bind_vcpu(guest, theirs, 2)
    evtchn.send(dom0, 1)
    assert [vcpu.event_pending() for vcpu in guest.vcpus] == [False, False, True]
    fails(Errno.ENOENT, evtchn.bind_vcpu, guest, 1000, 3)  # the vCPU comes first
    fails(Errno.EINVAL, evtchn.bind_vcpu, guest, 1000, 0)
    fails(Errno.EINVAL, evtchn.bind_vcpu, guest, 5, 0)
    evtchn.close(guest, theirs)
    assert evtchn.alloc_unbound(guest, DOMID_SELF, 0) == theirs
    assert evtchn.status(guest, DOMID_SELF, theirs).vcpu == 0


def test_mask_and_unmask(guest: Domain) -> None:
    port = evtchn.bind_ipi(guest, 1)
    mask(guest, port)
    evtchn.send(guest, port)
    assert guest.evtchn.is_masked(port)
    assert guest.evtchn.is_pending(port)
    assert not guest.vcpus[1].event_pending()
    evtchn.unmask(guest, port)
    assert not guest.evtchn.is_masked(port)
    assert guest.vcpus[1].event_pending()
    consume(guest)
    evtchn.unmask(guest, port)
    assert not guest.vcpus[1].event_pending()
    fails(Errno.EINVAL, evtchn.unmask, guest, 64)
    mask(guest, 9)
    evtchn.unmask(guest, 9)  # not in use: left alone
    assert guest.machine.mem[guest.shared_info + SHARED_INFO_EVTCHN_MASK + 1] == 2


def test_priority_needs_fifo(guest: Domain) -> None:
    fails(Errno.EINVAL, evtchn.set_priority, guest, 64, 0)
    fails(Errno.ENOSYS, evtchn.set_priority, guest, 1, 99)
    fails(Errno.EOPNOTSUPP, evtchn.expand_array, guest, 0)


def test_reset(dom0: Domain, guest: Domain) -> None:
    connect(dom0, guest)
    evtchn.bind_virq(guest, VIRQ_TIMER, 1)
    xen = evtchn.alloc_unbound_xen_event_channel(guest, 0, 0, lambda vcpu, port: None)
    fails(Errno.EPERM, evtchn.reset, guest, 0)
    fails(Errno.ESRCH, evtchn.reset, guest, 5)
    fails(Errno.EINVAL, evtchn.reset, dom0, 1)  # not paused
    fails(Errno.EBUSY, evtchn.reset, guest, DOMID_SELF, True)
    guest.paused = True
    evtchn.reset(dom0, 1)
    assert [channel.port for channel in guest.evtchn] == [xen]
    assert not guest.vcpus[1].virq_to_evtchn[VIRQ_TIMER]
    assert evtchn.status(dom0, DOMID_SELF, 1).status == EVTCHNSTAT_unbound


def test_domain_death_closes_both_ends(hypervisor: Hypervisor, dom0: Domain, guest: Domain) -> None:
    ours, _ = connect(dom0, guest)
    evtchn.alloc_unbound_xen_event_channel(guest, 0, 0, lambda vcpu, port: None)
    evtchn.bind_virq(guest, VIRQ_TIMER, 2)
    hypervisor.destroy_domain(guest)
    assert not guest.evtchn.active
    assert not list(guest.evtchn)
    assert evtchn.status(dom0, DOMID_SELF, ours).status == EVTCHNSTAT_unbound
    evtchn.send(dom0, ours)


def test_xen_bound_channel(dom0: Domain, guest: Domain) -> None:
    calls: list[tuple[Vcpu, int]] = []
    port = evtchn.alloc_unbound_xen_event_channel(guest, 1, 0, lambda vcpu, port: calls.append((vcpu, port)))
    for operation in (evtchn.close, evtchn.send):
        fails(Errno.EINVAL, operation, guest, port)
    fails(Errno.EINVAL, evtchn.bind_vcpu, guest, port, 0)
    fails(Errno.EACCES, evtchn.status, guest, DOMID_SELF, port)
    fails(Errno.EINVAL, sched.do_poll, guest.vcpus[0], [port])
    assert guest.evtchn.is_masked(port)
    evtchn.notify_via_xen_event_channel(guest, port)  # nobody there yet
    ours = evtchn.bind_interdomain(dom0, 1, port)
    consume(dom0)
    evtchn.send(dom0, ours)
    assert calls == [(guest.vcpus[1], port)]
    assert not guest.vcpus[1].event_pending()
    evtchn.notify_via_xen_event_channel(guest, port)
    assert dom0.evtchn.is_pending(ours)
    evtchn.free_xen_event_channel(guest, port)
    assert (guest.evtchn.active, guest.evtchn.xen_active) == (0, 0)


class OneLine:
    """A domain with pirqs 0 to 15, of which it may use 4 and 5; 5 refuses."""

    nr_pirqs = 16

    def __init__(self) -> None:
        self.port = 0
        self.vcpu: Vcpu | None = None

    def access_permitted(self, pirq: int) -> bool:
        return pirq in (4, 5)

    def port_of(self, pirq: int) -> int:
        return self.port if pirq == 4 else 0

    def bind(self, pirq: int, port: int, vcpu: Vcpu, will_share: bool) -> None:
        if pirq == 5:
            raise XenError(Errno.EBUSY)
        self.port, self.vcpu = port, vcpu

    def bound(self, pirq: int) -> None:
        pass

    def unbind(self, pirq: int) -> None:
        self.port = 0

    def set_affinity(self, pirq: int, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    def irq(self, pirq: int) -> int:
        return pirq


def test_bind_pirq(guest: Domain) -> None:
    fails(Errno.EPERM, evtchn.bind_pirq, guest, 1, 0)  # a domain that has none
    fails(Errno.EINVAL, evtchn.bind_pirq, guest, 1000, 0)
    line = OneLine()
    guest.evtchn.pirqs = line
    fails(Errno.EINVAL, evtchn.bind_pirq, guest, 16, 0)
    fails(Errno.EPERM, evtchn.bind_pirq, guest, 3, 0)
    fails(Errno.EBUSY, evtchn.bind_pirq, guest, 5, 0)
    assert guest.evtchn.active == 0
    port = evtchn.bind_pirq(guest, 4, 1)
    assert (line.port, line.vcpu) == (port, guest.vcpus[0])
    fails(Errno.EEXIST, evtchn.bind_pirq, guest, 4, 1)
    status = evtchn.status(guest, DOMID_SELF, port)
    assert (status.status, status.pirq) == (EVTCHNSTAT_pirq, 4)
    evtchn.bind_vcpu(guest, port, 1)
    assert line.vcpu is guest.vcpus[1]
    evtchn.close(guest, port)
    assert not line.port


def test_block_and_wake(guest: Domain) -> None:
    woken: list[Vcpu] = []
    guest.hypervisor.on_wake = woken.append
    port, vcpu = evtchn.bind_ipi(guest, 0), guest.vcpus[0]
    guest.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 1
    sched.block(vcpu)
    assert not vcpu.runnable
    assert not guest.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK]
    evtchn.send(guest, port)
    assert vcpu.runnable
    assert woken == [vcpu]
    sched.block(vcpu)  # an event is due: no sleep
    assert vcpu.runnable
    evtchn.send(guest, port)  # pending already: nobody is woken again
    assert woken == [vcpu]


def test_poll(guest: Domain) -> None:
    first, second, vcpu = evtchn.bind_ipi(guest, 0), evtchn.bind_ipi(guest, 1), guest.vcpus[0]
    clock = guest.hypervisor.clock
    mask(guest, first)
    mask(guest, second)
    sched.do_poll(vcpu, [first])
    assert not vcpu.runnable
    evtchn.send(guest, second)
    assert not vcpu.runnable
    evtchn.send(guest, first)
    assert vcpu.runnable
    sched.do_poll(vcpu, [second, 1 << 30])  # found pending before the bad port is looked at
    assert vcpu.runnable
    for bad in (0, 3, 1 << 30):
        fails(Errno.EINVAL, sched.do_poll, vcpu, [bad])
        assert vcpu.runnable
    fails(Errno.EINVAL, sched.do_poll, vcpu, [0] * 129)
    consume(guest)

    sched.do_poll(vcpu, [first], 1000)
    assert not vcpu.runnable
    clock.jump_to(1000)
    clock.fire_due()
    assert vcpu.runnable

    sched.do_poll(vcpu, [first, second])  # several: woken by any event
    evtchn.send(guest, evtchn.bind_ipi(guest, 1))
    assert vcpu.runnable
    guest.machine.mem[vcpu.info] = 1
    sched.do_poll(vcpu, [1 << 30])  # an upcall is due: nothing is even looked at
    assert vcpu.runnable
    guest.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 1
    sched.do_poll(vcpu, [])
    assert not vcpu.runnable


def test_pollers_are_counted(guest: Domain) -> None:
    """An event looks for pollers only while there are some: who is woken otherwise mustn't hide the rest."""
    ports = [evtchn.bind_ipi(guest, 0) for _ in range(3)]
    for port in ports:
        mask(guest, port)
    for round_ in range(2):
        for vcpu, port in zip(guest.vcpus, ports, strict=True):
            sched.do_poll(vcpu, [port])
        assert guest.pollers == 3
        guest.vcpus[0].kick()
        guest.vcpus[0].kick()
        assert guest.pollers == 2
        for vcpu, port in zip(guest.vcpus[1:], ports[1:], strict=True):
            assert not vcpu.runnable
            evtchn.send(guest, port)
            assert vcpu.runnable, f"round {round_}"
        assert guest.pollers == 0
        consume(guest)


def test_a_masked_upcall_ends_a_poll_of_another_port(guest: Domain) -> None:
    """The kick for a new upcall ends a poll even while the guest holds upcalls off."""
    polled, other, vcpu = evtchn.bind_ipi(guest, 0), evtchn.bind_ipi(guest, 0), guest.vcpus[0]
    guest.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 1
    sched.do_poll(vcpu, [polled])
    evtchn.send(guest, other)
    assert vcpu.runnable


def test_watchdog(guest: Domain) -> None:
    clock = guest.hypervisor.clock
    assert [sched.watchdog(guest, 0, 10), sched.watchdog(guest, 0, 20)] == [1, 2]
    fails(Errno.ENOSPC, sched.watchdog, guest, 0, 1)
    fails(Errno.EINVAL, sched.watchdog, guest, 3, 1)
    assert sched.watchdog(guest, 1, 0) == 0
    fails(Errno.EINVAL, sched.watchdog, guest, 1, 5)
    assert sched.watchdog(guest, 2, 30) == 0
    clock.jump_to(29_000_000_000)
    clock.fire_due()
    assert guest.shutdown_reason is None
    clock.jump_to(30_000_000_000)
    clock.fire_due()
    assert guest.shutdown_reason == 4

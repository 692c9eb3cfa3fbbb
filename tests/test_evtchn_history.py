"""Sequences that once broke Xen's event channels, each with what went wrong then (docs/evtchn-history.md)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from evtchnlib import HEAD, LINKED, MASKED, PENDING, READY, GuestSide
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    EVTCHN_2L_NR_CHANNELS,
    EVTCHN_FIFO_NR_CHANNELS,
    EVTCHN_FIFO_PRIORITY_DEFAULT,
    EVTCHNSTAT_closed,
    EVTCHNSTAT_unbound,
)
from pvirq.abi.xen import DOMID_SELF, VCPU_INFO_SIZE, VIRQ_CON_RING, VIRQ_DEBUG, VIRQ_DOM_EXC, VIRQ_TIMER
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Hypervisor, Vcpu
from pvirq.xen.evtchn_views import debug_e
from pvirq.xen.memory import Machine

DEFAULT = EVTCHN_FIFO_PRIORITY_DEFAULT


@pytest.fixture
def hypervisor() -> Hypervisor:
    return Hypervisor(Machine(512 << 20))


@pytest.fixture
def dom0(hypervisor: Hypervisor) -> GuestSide:
    return GuestSide(hypervisor.create_domain(0, privileged=True, vcpus=2))


@pytest.fixture
def guest(hypervisor: Hypervisor, dom0: GuestSide) -> GuestSide:
    return GuestSide(hypervisor.create_domain(1, vcpus=2))


@pytest.fixture
def fifo(guest: GuestSide) -> GuestSide:
    return guest.start_fifo()


def fails(errno: Errno, operation: Callable[..., object], *args: object) -> None:
    with pytest.raises(XenError) as caught:
        operation(*args)
    assert caught.value.errno == errno


def connect(near: GuestSide, far: GuestSide) -> tuple[int, int]:
    """(near's port, far's port), nothing pending."""
    theirs = evtchn.alloc_unbound(far.domain, DOMID_SELF, near.domain.domid)
    ours = evtchn.bind_interdomain(near.domain, far.domain.domid, theirs)
    near.consume_all()
    return ours, theirs


def pair(guest: GuestSide) -> tuple[int, int]:
    """(a port to send through, the port that gets it), both the guest's: unlike an IPI's, it can move."""
    return connect(guest, guest)


# -- advisories --------------------------------------------------------------------------------------------------------


def test_xsa_47_a_refused_allocation_leaves_a_usable_port_array(hypervisor: Hypervisor, guest: GuestSide) -> None:
    """The new bucket was freed on the way out of a permission error, but the pointer to it stayed."""
    target = hypervisor.create_domain(2)
    for _ in range(63):
        evtchn.bind_ipi(target, 0)
    fails(Errno.EPERM, evtchn.alloc_unbound, guest.domain, 2, DOMID_SELF)
    assert evtchn.status(target, DOMID_SELF, 64).status == EVTCHNSTAT_closed
    assert [evtchn.bind_ipi(target, 0) for _ in range(3)] == [64, 65, 66]


@pytest.mark.parametrize(("bound_to", "has_block"), [(1, 0), (0, 1)])
def test_xsa_107_an_event_for_a_vcpu_without_a_control_block(guest: GuestSide, bound_to: int, has_block: int) -> None:
    """Nothing looked whether the vCPU had a control block yet: Xen crashed on its queues, or on vCPU 0's."""
    port = evtchn.bind_ipi(guest.domain, bound_to)
    guest.init_control(has_block)
    guest.expand_array()
    evtchn.send(guest.domain, port)
    evtchn.unmask(guest.domain, port)
    assert guest.word(port) == 0  # lost, and not half there: neither PENDING nor LINKED
    assert not guest.domain.vcpus[bound_to].event_pending()
    guest.init_control(bound_to)
    evtchn.send(guest.domain, port)
    assert guest.consume(bound_to) == [port]


def test_xsa_107_an_event_moved_to_a_vcpu_without_a_control_block(guest: GuestSide) -> None:
    """The same by way of bind_vcpu, its old queue on the other vCPU."""
    guest.init_control(0)
    guest.expand_array()
    near, far = pair(guest)
    evtchn.send(guest.domain, near)
    assert guest.consume(0) == [far]
    evtchn.bind_vcpu(guest.domain, far, 1)
    evtchn.send(guest.domain, near)
    assert guest.word(far) == 0
    guest.init_control(1)
    evtchn.send(guest.domain, near)
    assert guest.consume(1) == [far]


def test_xsa_188_a_failed_first_control_block_leaves_no_fifo_state(guest: GuestSide) -> None:
    """A bad frame freed the domain's FIFO structure, but not the pointer that later calls went by."""
    fails(Errno.EINVAL, evtchn.init_control, guest.domain, guest.domain.machine.frames, 0, 0)
    assert not guest.domain.evtchn.fifo
    fails(Errno.EOPNOTSUPP, evtchn.expand_array, guest.domain, guest.frame())
    fails(Errno.EINVAL, evtchn.init_control, guest.domain, guest.domain.machine.frames, 0, 0)
    port = evtchn.bind_ipi(guest.domain, 0)
    evtchn.send(guest.domain, port)
    assert guest.consume(0) == [port]  # still the two-level ABI
    guest.start_fifo()
    evtchn.send(guest.domain, port)
    assert port in guest.consume(0)


@pytest.mark.parametrize("fifo", [False, True])
def test_xsa_221_polling_a_port_that_was_never_allocated(guest: GuestSide, fifo: bool) -> None:
    """SCHEDOP_poll looked into a bucket of ports that did not exist."""
    if fifo:
        guest.start_fifo()
    evtchn.bind_ipi(guest.domain, 0)
    vcpu = guest.domain.vcpus[0]
    for port in (64, EVTCHN_2L_NR_CHANNELS - 1, EVTCHN_FIFO_NR_CHANNELS - 1, EVTCHN_FIFO_NR_CHANNELS, (1 << 32) - 1):
        fails(Errno.EINVAL, sched.do_poll, vcpu, [1, port])
        assert vcpu.runnable


def test_a_poll_of_an_unbound_number_is_refused(guest: GuestSide) -> None:
    """Numbers inside the array were accepted, and nothing could have woken the vCPU again (after XSA-342)."""
    vcpu = guest.domain.vcpus[0]
    for port in (0, 5):
        fails(Errno.EINVAL, sched.do_poll, vcpu, [port])
        assert vcpu.runnable


@pytest.mark.parametrize(("word_bits", "last"), [(64, 4095), (32, 1023)])
def test_xsa_317_a_limit_above_the_abis(hypervisor: Hypervisor, dom0: GuestSide, word_bits: int, last: int) -> None:
    """Only "in use" counted as failure of an allocation: a full table gave out ports that were not there."""
    domain = hypervisor.create_domain(1, max_evtchns=100_000, word_bits=word_bits)
    for port in range(1, last + 1):
        assert evtchn.bind_ipi(domain, 0) == port
    before = domain.evtchn.active
    for caller in (domain, dom0.domain):
        fails(Errno.ENOSPC, evtchn.alloc_unbound, caller, 1, 0)
    fails(Errno.ENOSPC, evtchn.bind_virq, domain, VIRQ_TIMER, 0)
    fails(Errno.ENOSPC, evtchn.bind_interdomain, domain, 0, 1)
    fails(Errno.ENOSPC, evtchn.alloc_unbound_xen_event_channel, domain, 0, 0, lambda vcpu, port: None)
    assert domain.evtchn.active == before
    assert not domain.vcpus[0].virq_to_evtchn[VIRQ_TIMER]
    evtchn.close(domain, 77)
    assert evtchn.bind_virq(domain, VIRQ_TIMER, 0) == 77


def test_xsa_338_ports_above_the_two_level_limit_stay_valid_after_a_reset(
    hypervisor: Hypervisor, dom0: GuestSide, guest: GuestSide
) -> None:
    """Back from FIFO, the lower limit made live ports invalid: closing their other end hit a BUG_ON."""
    guest.start_fifo()
    evtchn.alloc_unbound(guest.domain, DOMID_SELF, 0, EVTCHN_2L_NR_CHANNELS + 63)  # the array grows that far
    while True:
        xen = evtchn.alloc_unbound_xen_event_channel(guest.domain, 0, 0, lambda vcpu, port: None)
        if xen >= EVTCHN_2L_NR_CHANNELS:
            break
    ours = evtchn.bind_interdomain(dom0.domain, 1, xen)
    evtchn.reset(guest.domain, DOMID_SELF)
    assert not guest.domain.evtchn.fifo
    evtchn.send(dom0.domain, ours)
    evtchn.notify_via_xen_event_channel(guest.domain, xen)
    assert dom0.is_pending(ours)
    assert f"{xen:4d} [" in debug_e(hypervisor)
    fails(Errno.EACCES, evtchn.status, guest.domain, DOMID_SELF, xen)
    fails(Errno.EINVAL, sched.do_poll, guest.domain.vcpus[0], [xen])
    evtchn.close(dom0.domain, ours)
    evtchn.free_xen_event_channel(guest.domain, xen)
    assert evtchn.status(guest.domain, DOMID_SELF, xen).status == EVTCHNSTAT_closed


def test_xsa_342_a_32_bit_guest_gets_no_port_beyond_its_bitmap(hypervisor: Hypervisor, dom0: GuestSide) -> None:
    """The limit of 64-bit guests held for all: port 1024 of a 32-bit one set bits in other fields of shared_info."""
    domain = hypervisor.create_domain(1, word_bits=32)
    side = GuestSide(domain)
    for _ in range(1022):
        evtchn.bind_ipi(domain, 0)
    near, far = evtchn.alloc_unbound(domain, DOMID_SELF, 0), 0
    assert near == 1023
    fails(Errno.ENOSPC, evtchn.alloc_unbound, dom0.domain, 1, 0, 1024)
    fails(Errno.ENOSPC, evtchn.bind_ipi, domain, 0)
    far = evtchn.bind_interdomain(dom0.domain, 1, near)
    before = bytes(domain.machine.page(domain.shared_info_mfn))
    evtchn.send(dom0.domain, far)
    after = bytes(domain.machine.page(domain.shared_info_mfn))
    changed = [at for at in range(4096) if before[at] != after[at]]
    bitmap = 32 * VCPU_INFO_SIZE + 127
    assert changed == [0, 7, bitmap]  # upcall_pending, the last selector byte, the last byte of the bitmap
    assert side.consume(0) == [1023]


def test_xsa_343_xens_own_channels_are_closed_to_the_guest(dom0: GuestSide, guest: GuestSide) -> None:
    """unmask and poll were let through to ports that Xen consumes, and touched bits no guest event owned."""
    xen = evtchn.alloc_unbound_xen_event_channel(guest.domain, 0, 0, lambda vcpu, port: None)
    guest.mask(xen)
    evtchn.unmask(guest.domain, xen)  # valid, but without effect
    assert guest.is_masked(xen)
    fails(Errno.EINVAL, sched.do_poll, guest.domain.vcpus[0], [xen])
    guest.start_fifo()
    guest.mask(xen)
    evtchn.unmask(guest.domain, xen)
    assert guest.is_masked(xen)
    fails(Errno.EACCES, evtchn.set_priority, guest.domain, xen, 0)


def test_xsa_343_reset_ends_with_nothing_open_but_xens(guest: GuestSide, dom0: GuestSide) -> None:
    """A reset could succeed with ports still open, above the limit of the ABI that it went back to."""
    guest.start_fifo()
    xen = evtchn.alloc_unbound_xen_event_channel(guest.domain, 0, 0, lambda vcpu, port: None)
    for _ in range(200):
        evtchn.bind_ipi(guest.domain, 1)
    evtchn.alloc_unbound(dom0.domain, 1, 0, 5000)
    evtchn.reset(guest.domain, DOMID_SELF)
    channels = guest.domain.evtchn
    assert [channel.port for channel in channels] == [xen]
    assert (channels.active, channels.xen_active) == (1, 1)


def test_xsa_344_reset_and_death_of_a_domain_with_every_port_open(hypervisor: Hypervisor, guest: GuestSide) -> None:
    """Closing all ports in one go held a physical CPU for long; here it ends in one go, with nothing left over."""
    guest.start_fifo()
    count = EVTCHN_FIFO_NR_CHANNELS - 1
    for _ in range(count // 2):
        evtchn.bind_interdomain(guest.domain, 1, evtchn.alloc_unbound(guest.domain, DOMID_SELF, 1))
    assert evtchn.bind_ipi(guest.domain, 0) == count
    evtchn.reset(guest.domain, DOMID_SELF)
    assert guest.domain.evtchn.active == 0
    fails(Errno.EBUSY, evtchn.reset, guest.domain, DOMID_SELF, True)  # there is nothing to go on with
    guest.forget_fifo()
    for _ in range(4095):
        evtchn.bind_ipi(guest.domain, 1)
    hypervisor.destroy_domain(guest.domain)
    assert guest.domain.evtchn.active == 0


def test_xsa_496_a_bind_virq_that_finds_no_port_touches_nobody_else(
    hypervisor: Hypervisor, dom0: GuestSide, guest: GuestSide
) -> None:
    """The way out of that failure tore down what belonged to domain 0's VIRQ_DOM_EXC (Xen 4.21)."""
    watcher = evtchn.bind_virq(dom0.domain, VIRQ_DOM_EXC, 0)
    while guest.domain.evtchn.active < EVTCHN_2L_NR_CHANNELS - 1:
        evtchn.bind_ipi(guest.domain, 0)
    for virq in (VIRQ_DEBUG, VIRQ_TIMER, VIRQ_DOM_EXC):
        fails(Errno.ENOSPC, evtchn.bind_virq, guest.domain, virq, 0)
        assert not guest.domain.vcpus[0].virq_to_evtchn[virq]
    evtchn.send_global_virq(hypervisor, VIRQ_DOM_EXC)
    assert dom0.consume_all() == [watcher]


def test_xsa_505_no_event_page_is_taken_after_a_reset(fifo: GuestSide) -> None:
    """expand_array saw the FIFO state, then a reset on another CPU freed it; in turn, the order is clear."""
    evtchn.reset(fifo.domain, DOMID_SELF)
    mfn = fifo.frame()
    fails(Errno.EOPNOTSUPP, evtchn.expand_array, fifo.domain, mfn)
    assert fifo.domain.machine.refs[mfn] == 0


# -- the FIFO ABI ------------------------------------------------------------------------------------------------------


def test_an_event_before_its_array_page_is_not_lost(guest: GuestSide) -> None:
    """There was nowhere to write the pending bit, so it was dropped; builders bind before the kernel runs."""
    guest.init_control(0)
    guest.expand_array()
    port = evtchn.alloc_unbound(guest.domain, DOMID_SELF, 1, 1500)
    near = evtchn.bind_interdomain(guest.domain, 1, port)
    guest.consume_all()
    evtchn.send(guest.domain, near)
    assert guest.consume(0) == []
    guest.expand_array()
    assert guest.consume(0) == [port]


def test_a_tail_that_the_guest_rewrites_does_not_hold_xen_up(fifo: GuestSide) -> None:
    """Xen tried for ever to set the link of a word that its guest kept changing; BUSY and a bound came of it."""
    first, second, third = (evtchn.bind_ipi(fifo.domain, 0) for _ in range(3))
    evtchn.send(fifo.domain, first)
    fifo.u32[fifo.word_at(first)] |= first  # a circle: Xen follows no links
    evtchn.send(fifo.domain, second)
    assert fifo.word(first) == PENDING | LINKED | second
    fifo.u32[fifo.word_at(second)] = 0  # unlinked by the guest, though still the tail that Xen remembers
    evtchn.send(fifo.domain, third)
    assert fifo.u32[fifo.control[0] + HEAD + DEFAULT] == third


def test_ready_is_set_only_for_a_new_head(fifo: GuestSide) -> None:
    """READY for each event, not each head, made the guest read a head that was no longer of that queue."""
    first, second = evtchn.bind_ipi(fifo.domain, 0), evtchn.bind_ipi(fifo.domain, 0)
    evtchn.send(fifo.domain, first)
    control = fifo.control[0]
    fifo.u32[control + READY] = 0  # the guest has begun to consume: it remembers the head itself
    evtchn.send(fifo.domain, second)
    assert fifo.u32[control + READY] == 0
    assert fifo.word(first) & 0x1FFFF == second


def test_a_port_bound_anew_has_the_default_priority(fifo: GuestSide) -> None:
    """A port kept the priority of whoever had it before, and new buckets had the highest."""
    port = evtchn.bind_ipi(fifo.domain, 0)
    evtchn.set_priority(fifo.domain, port, 3)
    evtchn.close(fifo.domain, port)
    assert evtchn.bind_ipi(fifo.domain, 0) == port
    evtchn.send(fifo.domain, port)
    assert fifo.queue(0, DEFAULT) == [port]
    beyond = evtchn.alloc_unbound(fifo.domain, DOMID_SELF, 1, 700)
    near = evtchn.bind_interdomain(fifo.domain, 1, beyond)
    fifo.consume_all()
    evtchn.send(fifo.domain, near)
    assert fifo.queue(0, DEFAULT) == [beyond]


def test_an_old_tail_linked_on_another_queue_is_no_tail(fifo: GuestSide) -> None:
    """It was linked, so the next event of its old queue was hung onto it: both queues were corrupt."""
    moved_from, moved = pair(fifo)
    stays_from, stays = pair(fifo)
    evtchn.send(fifo.domain, moved_from)
    assert fifo.consume(0) == [moved]  # queue empty, `moved` its old tail
    evtchn.bind_vcpu(fifo.domain, moved, 1)
    evtchn.set_priority(fifo.domain, moved, 2)
    evtchn.send(fifo.domain, moved_from)
    evtchn.send(fifo.domain, stays_from)
    assert fifo.queue(1, 2) == [moved]
    assert fifo.queue(0, DEFAULT) == [stays]
    assert fifo.consume(0) == [stays]
    assert fifo.consume(1) == [moved]


def test_an_old_tail_becomes_the_head_of_its_own_queue_again(fifo: GuestSide) -> None:
    """Linked a moment before the next event, it passed for a live tail: no head, and all events lost."""
    first_from, first = pair(fifo)
    second_from, second = pair(fifo)
    evtchn.send(fifo.domain, first_from)
    assert fifo.consume(0) == [first]
    evtchn.send(fifo.domain, first_from)
    evtchn.send(fifo.domain, second_from)
    assert fifo.queue(0, DEFAULT) == [first, second]
    assert fifo.consume(0) == [first, second]


def test_a_closed_port_that_is_still_linked_is_not_given_out(fifo: GuestSide) -> None:
    """Bound anew at once, it was pending on the queue of its former life, and events were lost."""
    near, far = pair(fifo)
    evtchn.send(fifo.domain, near)
    evtchn.close(fifo.domain, far)
    fails(Errno.EBUSY, evtchn.alloc_unbound, fifo.domain, DOMID_SELF, 0, far)
    others = [evtchn.bind_ipi(fifo.domain, 1) for _ in range(3)]
    assert far not in others
    assert fifo.consume(0) == []  # unlinked now, and nothing was delivered
    assert evtchn.bind_ipi(fifo.domain, 1) == far
    evtchn.send(fifo.domain, far)
    assert fifo.consume(1) == [far]


def test_reset_gives_the_pages_back_for_the_next_kernel(fifo: GuestSide) -> None:
    """Reset left control blocks and event array in place: after kexec the new kernel could not have its own."""
    machine = fifo.domain.machine
    near, far = pair(fifo)
    evtchn.send(fifo.domain, near)
    pages = {at >> 10 for at in [*fifo.control.values(), *fifo.array]}
    evtchn.reset(fifo.domain, DOMID_SELF)
    assert not any(machine.type_count[mfn] or machine.refs[mfn] for mfn in pages)
    fifo.forget_fifo()
    fifo.start_fifo()
    near, far = pair(fifo)
    evtchn.send(fifo.domain, near)
    assert fifo.consume_all() == [far]


def test_ports_above_65535(fifo: GuestSide) -> None:
    """FIFO promised 131,072 ports, but some fields that hold one had 16 bits."""
    for _ in range(70):
        fifo.expand_array()
    count = evtchn.bind_ipi(fifo.domain, 0)
    while count < 70_000:
        count = evtchn.bind_ipi(fifo.domain, 0)
    timer = evtchn.bind_virq(fifo.domain, VIRQ_TIMER, 1)
    near, far = pair(fifo)
    assert min(timer, near, far) > 65_536
    evtchn.send_guest_vcpu_virq(fifo.domain.vcpus[1], VIRQ_TIMER)
    assert fifo.consume(1) == [timer]
    fifo.mask(far)
    sched.do_poll(fifo.domain.vcpus[1], [far])
    evtchn.send(fifo.domain, far & 0xFFFF)
    assert not fifo.domain.vcpus[1].runnable
    evtchn.send(fifo.domain, near)
    assert fifo.domain.vcpus[1].runnable
    evtchn.close(fifo.domain, far)
    assert evtchn.status(fifo.domain, DOMID_SELF, near).status == EVTCHNSTAT_unbound


# -- ports and their ends ----------------------------------------------------------------------------------------------


def test_a_port_bound_anew_is_not_pending(guest: GuestSide) -> None:
    """Closing left the pending bit, and the next user of the number got an event that nobody had sent."""
    port = evtchn.bind_ipi(guest.domain, 0)
    guest.mask(port)
    evtchn.send(guest.domain, port)
    evtchn.close(guest.domain, port)
    assert evtchn.bind_ipi(guest.domain, 1) == port
    evtchn.unmask(guest.domain, port)
    assert guest.consume_all() == []


def test_unmasking_another_vcpus_port(guest: GuestSide) -> None:
    """The guest could only set its own vCPU's selector, so the event hung: unmask became a hypercall."""
    port = evtchn.bind_ipi(guest.domain, 1)
    guest.mask(port)
    evtchn.send(guest.domain, port)
    assert guest.consume_all() == []
    evtchn.unmask(guest.domain, port)
    assert guest.domain.vcpus[1].event_pending()
    assert guest.consume(1) == [port]


def test_polling_a_port_that_another_vcpu_handles(guest: GuestSide) -> None:
    """Only the vCPU that the port notified was woken, never the one that polled."""
    port = evtchn.bind_ipi(guest.domain, 1)
    guest.mask(port)
    sched.do_poll(guest.domain.vcpus[0], [port])
    evtchn.send(guest.domain, port)
    assert guest.domain.vcpus[0].runnable


def test_two_domains_that_share_a_channel_die(hypervisor: Hypervisor, dom0: GuestSide, guest: GuestSide) -> None:
    """The end left behind by the first death was leaked, or closed through a pointer to the dead domain."""
    other = GuestSide(hypervisor.create_domain(2))
    ours, theirs = connect(guest, other)
    alone, third = connect(dom0, other)
    loop = pair(other)
    hypervisor.destroy_domain(other.domain)
    assert evtchn.status(guest.domain, DOMID_SELF, ours).status == EVTCHNSTAT_unbound
    assert (other.domain.evtchn.active, theirs, third, loop) == (0, 1, 2, (4, 3))
    hypervisor.destroy_domain(guest.domain)
    assert guest.domain.evtchn.active == 0
    evtchn.close(dom0.domain, alone)
    assert evtchn.bind_ipi(dom0.domain, 0) == alone


def test_xens_notification_through_a_channel_that_is_gone(hypervisor: Hypervisor, dom0: GuestSide) -> None:
    """Xen notified a dying domain's channel after it had been closed, into an assertion."""
    domain = hypervisor.create_domain(1)
    xen = evtchn.alloc_unbound_xen_event_channel(domain, 0, 0, lambda vcpu, port: None)
    ours = evtchn.bind_interdomain(dom0.domain, 1, xen)
    dom0.consume_all()
    hypervisor.destroy_domain(domain)
    evtchn.notify_via_xen_event_channel(domain, xen)
    evtchn.notify_via_xen_event_channel(domain, 1 << 20)
    evtchn.send(dom0.domain, ours)
    assert dom0.consume_all() == []
    fails(Errno.EINVAL, evtchn.free_xen_event_channel, domain, xen)


def test_a_consumer_in_xen_may_use_event_channels(dom0: GuestSide, guest: GuestSide) -> None:
    """Consumers were called with the channel's lock held: one that sent or closed would have locked Xen up."""
    ours, theirs = connect(dom0, guest)

    def consumer(vcpu: Vcpu, port: int) -> None:
        evtchn.send(vcpu.domain, theirs)
        evtchn.free_xen_event_channel(vcpu.domain, port)

    xen = evtchn.alloc_unbound_xen_event_channel(guest.domain, 0, 0, consumer)
    to_xen = evtchn.bind_interdomain(dom0.domain, 1, xen)
    dom0.consume_all()
    evtchn.send(dom0.domain, to_xen)
    assert dom0.consume_all() == [ours]
    assert evtchn.status(dom0.domain, DOMID_SELF, to_xen).status == EVTCHNSTAT_unbound
    assert guest.domain.evtchn.xen_active == 0


def test_a_global_virq_that_moved_can_be_closed_and_bound_again(dom0: GuestSide, hypervisor: Hypervisor) -> None:
    """It is on record at vCPU 0 whatever vCPU it notifies; looked for elsewhere, the record would stay."""
    port = evtchn.bind_virq(dom0.domain, VIRQ_CON_RING, 0)
    evtchn.bind_vcpu(dom0.domain, port, 1)
    evtchn.close(dom0.domain, port)
    evtchn.send_global_virq(hypervisor, VIRQ_CON_RING)
    assert dom0.consume_all() == []
    assert evtchn.bind_virq(dom0.domain, VIRQ_CON_RING, 0) == port


def test_a_dying_domain_becomes_no_virq_handler(hypervisor: Hypervisor, dom0: GuestSide, guest: GuestSide) -> None:
    """Made the handler after its handlers had been cleared, it was referenced for ever and never freed."""
    hypervisor.destroy_domain(guest.domain)
    fails(Errno.EINVAL, evtchn.set_global_virq_handler, guest.domain, VIRQ_DOM_EXC)
    assert not hypervisor.global_virq_handlers


def test_a_port_asked_for_far_beyond_the_array(guest: GuestSide) -> None:
    """One bucket was made, for that port; those between were taken for granted and crashed Xen when used."""
    assert evtchn.alloc_unbound(guest.domain, DOMID_SELF, 0, 1000) == 1000
    for port in (64, 500, 999, 1023):
        assert evtchn.status(guest.domain, DOMID_SELF, port).status == EVTCHNSTAT_closed
        evtchn.unmask(guest.domain, port)
    fails(Errno.EINVAL, evtchn.status, guest.domain, DOMID_SELF, 1024)
    assert [evtchn.bind_ipi(guest.domain, 0) for _ in range(70)] == list(range(1, 71))


def test_masked_stays_masked_over_the_change_of_abi(guest: GuestSide) -> None:
    """Pending moves over to FIFO words, masks don't: the guest gives pages with its own MASKED bits."""
    port = evtchn.bind_ipi(guest.domain, 0)
    guest.mask(port)
    evtchn.send(guest.domain, port)
    guest.init_control(0)
    mfn = guest.frame()
    guest.u32[(mfn << 10) + port] = MASKED
    evtchn.expand_array(guest.domain, mfn)
    guest.array.append(mfn << 10)
    assert guest.word(port) == PENDING | MASKED
    evtchn.unmask(guest.domain, port)
    assert guest.consume(0) == [port]

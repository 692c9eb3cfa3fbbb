"""The FIFO ABI: event words, queues, control blocks, and the way into it and back."""

from __future__ import annotations

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import EVTCHN_FIFO_LINK_BITS, EVTCHN_FIFO_NR_CHANNELS
from pvirq.abi.xen import DOMID_SELF, SHARED_INFO_EVTCHN_PENDING, VCPU_INFO_UPCALL_MASK
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.evtchn_fifo import BUSY, LINKED, MASKED, PENDING
from pvirq.xen.memory import PGT_L1, Machine

READY, HEAD = 0, 2  # indexes of the control block's words


class FifoGuest:
    """A domain with two vCPUs; frames 0 and 1 are for control blocks, 2 for event words, 3 is spare."""

    def __init__(self) -> None:
        self.hypervisor = Hypervisor(Machine(64 << 20))
        self.domain = self.hypervisor.create_domain(1, vcpus=2)
        self.machine = self.hypervisor.machine
        self.frames = self.machine.alloc(4, 1)
        self.u32 = self.machine.u32
        for vcpu in self.domain.vcpus:
            vcpu.up = True
            self.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 0

    def start(self) -> FifoGuest:
        evtchn.init_control(self.domain, self.frames, 0, 0)
        evtchn.init_control(self.domain, self.frames + 1, 8, 1)
        evtchn.expand_array(self.domain, self.frames + 2)
        return self

    def word(self, port: int) -> int:
        return self.u32[((self.frames + 2) << 10) + port]

    def set_word(self, port: int, value: int) -> None:
        self.u32[((self.frames + 2) << 10) + port] = value

    def control(self, vcpu: int, index: int) -> int:
        return self.u32[((self.frames + vcpu) << 10) + 2 * vcpu + index]

    def consume(self, vcpu: int, queue: int) -> list[int]:
        """Take all of a queue as a guest does, leaving its words unlinked and not pending."""
        at = ((self.frames + vcpu) << 10) + 2 * vcpu
        self.u32[at + READY] &= ~(1 << queue)
        self.machine.mem[self.domain.vcpus[vcpu].info] = 0
        ports, port = [], self.u32[at + HEAD + queue]
        while port:
            ports.append(port)
            word = self.word(port)
            self.set_word(port, word & MASKED)
            port = word & 0x1FFFF
        self.u32[at + HEAD + queue] = 0
        return ports


@pytest.fixture
def guest() -> FifoGuest:
    return FifoGuest()


def fails(errno: Errno, operation: object, *args: object) -> None:
    assert callable(operation)
    with pytest.raises(XenError) as caught:
        operation(*args)
    assert caught.value.errno == errno


def test_init_control_checks(guest: FifoGuest) -> None:
    domain, frame = guest.domain, guest.frames
    fails(Errno.ENOENT, evtchn.init_control, domain, frame, 5, 2)
    for offset in (4, 4025, 4032, 1 << 31):
        fails(Errno.EINVAL, evtchn.init_control, domain, frame, offset, 0)
    foreign = guest.machine.alloc(1, 0)
    guest.machine.type[frame + 3] = PGT_L1
    guest.machine.type_count[frame + 3] = 1
    for bad in (foreign, frame + 3, (1 << 64) - 1, guest.machine.frames):
        fails(Errno.EINVAL, evtchn.init_control, domain, bad, 0, 0)
    assert not domain.evtchn.fifo
    assert evtchn.init_control(domain, frame, 4024, 0) == EVTCHN_FIFO_LINK_BITS
    assert domain.evtchn.fifo
    fails(Errno.EINVAL, evtchn.init_control, domain, frame, 0, 0)  # it has one
    fails(Errno.EINVAL, evtchn.expand_array, domain, frame + 3)


def test_pages_are_held_until_reset(guest: FifoGuest) -> None:
    guest.start()
    counts = guest.machine.type_count
    assert list(counts[guest.frames : guest.frames + 4]) == [1, 1, 1, 0]
    evtchn.reset(guest.domain, DOMID_SELF)
    assert not guest.domain.evtchn.fifo
    assert list(counts[guest.frames : guest.frames + 4]) == [0, 0, 0, 0]
    assert list(guest.machine.refs[guest.frames : guest.frames + 4]) == [0, 0, 0, 0]


def test_queue_order_and_links(guest: FifoGuest) -> None:
    domain = guest.start().domain
    ports = [evtchn.bind_ipi(domain, 0) for _ in range(3)]
    for port in (2, 1, 3, 2):
        evtchn.send(domain, port)
    assert ports == [1, 2, 3]
    assert guest.control(0, READY) == 1 << 7
    assert guest.control(0, HEAD + 7) == 2
    assert [guest.word(port) & 0x1FFFF for port in ports] == [3, 1, 0]
    assert all(guest.word(port) >> 29 == 5 for port in ports)
    assert guest.consume(0, 7) == [2, 1, 3]
    evtchn.send(domain, 3)  # the tail that Xen remembers is 3 itself, and unlinked
    assert guest.consume(0, 7) == [3]


def test_priorities_and_moves(guest: FifoGuest) -> None:
    domain = guest.start().domain
    a, b = (evtchn.alloc_unbound(domain, DOMID_SELF, DOMID_SELF) for _ in range(2))
    far_a, far_b = (evtchn.bind_interdomain(domain, DOMID_SELF, port) for port in (a, b))
    guest.consume(0, 7)
    evtchn.set_priority(domain, a, 0)
    evtchn.send(domain, far_a)
    assert guest.control(0, READY) == 1
    evtchn.set_priority(domain, a, 15)
    evtchn.send(domain, far_a)  # linked: stays on the queue that it is on
    assert guest.control(0, READY) == 1
    assert guest.consume(0, 0) == [a]
    evtchn.bind_vcpu(domain, a, 1)
    evtchn.send(domain, far_a)
    assert guest.control(1, READY) == 1 << 15
    assert domain.vcpus[1].event_pending()
    # It was the tail of vCPU 0's queue 0; b must not be linked to it there.
    evtchn.set_priority(domain, b, 0)
    evtchn.send(domain, far_b)
    assert guest.consume(0, 0) == [b]
    assert guest.consume(1, 15) == [a]
    fails(Errno.EINVAL, evtchn.set_priority, domain, a, 16)
    fails(Errno.EACCES, evtchn.set_priority, domain, 50, 16)
    fails(Errno.EINVAL, evtchn.set_priority, domain, 64, 0)


def test_mask_and_unmask(guest: FifoGuest) -> None:
    domain = guest.start().domain
    port = evtchn.bind_ipi(domain, 1)
    guest.set_word(port, MASKED)
    evtchn.send(domain, port)
    assert guest.word(port) == PENDING | MASKED
    assert not domain.vcpus[1].event_pending()
    evtchn.unmask(domain, port)
    assert guest.word(port) == PENDING | LINKED
    assert guest.consume(1, 7) == [port]
    evtchn.unmask(domain, port)
    assert guest.word(port) == 0


def test_a_tail_marked_busy_is_linked_and_cleared(guest: FifoGuest) -> None:
    domain = guest.start().domain
    first, second = evtchn.bind_ipi(domain, 0), evtchn.bind_ipi(domain, 0)
    evtchn.send(domain, first)
    guest.set_word(first, guest.word(first) | BUSY | 0x55)
    evtchn.send(domain, second)
    assert guest.word(first) == PENDING | LINKED | second


def test_events_wait_for_their_array_page(guest: FifoGuest) -> None:
    domain = guest.domain
    evtchn.init_control(domain, guest.frames, 0, 0)
    port = evtchn.bind_ipi(domain, 0)
    evtchn.send(domain, port)
    assert not domain.evtchn.is_pending(port)
    assert domain.evtchn.is_masked(port)
    evtchn.expand_array(domain, guest.frames + 2)
    assert guest.consume(0, 7) == [port]


def test_two_level_events_move_over(guest: FifoGuest) -> None:
    domain = guest.domain
    port = evtchn.bind_ipi(domain, 0)
    evtchn.send(domain, port)
    guest.start()
    assert guest.consume(0, 7) == [port]
    assert guest.machine.mem[domain.shared_info + SHARED_INFO_EVTCHN_PENDING] == 1 << port


def test_no_control_block_no_event(guest: FifoGuest) -> None:
    domain = guest.domain
    evtchn.init_control(domain, guest.frames, 0, 0)
    evtchn.expand_array(domain, guest.frames + 2)
    port = evtchn.bind_ipi(domain, 1)
    evtchn.send(domain, port)
    assert guest.word(port) == 0


def test_a_linked_port_is_not_handed_out_again(guest: FifoGuest) -> None:
    domain = guest.start().domain
    port = evtchn.bind_ipi(domain, 0)
    evtchn.send(domain, port)
    evtchn.close(domain, port)
    assert guest.word(port) == LINKED
    fails(Errno.EBUSY, evtchn.alloc_unbound, domain, DOMID_SELF, 0, port)
    assert evtchn.bind_ipi(domain, 0) == port + 1
    guest.consume(0, 7)
    assert evtchn.bind_ipi(domain, 0) == port


def test_fifo_has_room_for_more_than_two_level(guest: FifoGuest) -> None:
    domain = guest.start().domain
    high = EVTCHN_FIFO_NR_CHANNELS - 1
    assert evtchn.alloc_unbound(domain, DOMID_SELF, 0, high) == high
    fails(Errno.ENOSPC, evtchn.alloc_unbound, domain, DOMID_SELF, 0, high + 1)
    evtchn.reset(domain, DOMID_SELF)
    assert evtchn.status(domain, DOMID_SELF, high).status == 0  # the array of channels doesn't shrink
    fails(Errno.ENOSPC, evtchn.alloc_unbound, domain, DOMID_SELF, 0, high)


def test_array_is_complete_after_128_pages(guest: FifoGuest) -> None:
    domain: Domain = guest.start().domain
    frames = guest.machine.alloc(128, 1)
    for i in range(127):
        evtchn.expand_array(domain, frames + i)
    fails(Errno.ENOSPC, evtchn.expand_array, domain, frames + 127)
    guest.hypervisor.destroy_domain(domain)
    assert not guest.machine.type_count[frames]

"""The guest's half of both event channel ABIs, for tests: it knows only its memory and hypercalls, like a kernel.

A careful guest as the FIFO ABI wants it: it keeps the heads of its queues to itself while it consumes, and unmasks by
hypercall what is pending.
"""

from __future__ import annotations

from collections.abc import Iterator

from pvirq.abi.event_channel import (
    EVTCHN_FIFO_LINK_MASK,
    EVTCHN_FIFO_LINKED,
    EVTCHN_FIFO_MASKED,
    EVTCHN_FIFO_MAX_QUEUES,
    EVTCHN_FIFO_PENDING,
    SHARED_INFO_EVTCHN_MASK_32,
    VCPU_INFO_PENDING_SEL_32,
)
from pvirq.abi.xen import (
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_MASK,
)
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain

PENDING = 1 << EVTCHN_FIFO_PENDING
MASKED = 1 << EVTCHN_FIFO_MASKED
LINKED = 1 << EVTCHN_FIFO_LINKED
LINK = EVTCHN_FIFO_LINK_MASK
READY, HEAD = 0, 2  # indexes of a control block's words


class GuestSide:
    """What a domain's kernel does with its event channels; starts with the two-level ABI, upcalls unmasked."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.mem, self.u32 = domain.machine.mem, domain.machine.u32
        self.control: dict[int, int] = {}  # vCPU -> its control block, as index into u32
        self.array: list[int] = []  # the pages of event words likewise
        self.heads = [[0] * EVTCHN_FIFO_MAX_QUEUES for _ in domain.vcpus]
        wide = domain.word_bits == 64
        self._pending = domain.shared_info + SHARED_INFO_EVTCHN_PENDING
        self._mask = domain.shared_info + (SHARED_INFO_EVTCHN_MASK if wide else SHARED_INFO_EVTCHN_MASK_32)
        self._sel = VCPU_INFO_PENDING_SEL if wide else VCPU_INFO_PENDING_SEL_32
        for vcpu in domain.vcpus:
            vcpu.up = True
            self.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 0

    @property
    def fifo(self) -> bool:
        return bool(self.control)

    def frame(self) -> int:
        """A fresh frame of the domain's."""
        return self.domain.machine.alloc(1, self.domain.domid)

    def init_control(self, vcpu: int, offset: int = 0) -> None:
        mfn = self.frame()
        evtchn.init_control(self.domain, mfn, offset, vcpu)
        self.control[vcpu] = (mfn << 10) + offset // 4

    def expand_array(self) -> None:
        mfn = self.frame()
        evtchn.expand_array(self.domain, mfn)
        self.array.append(mfn << 10)

    def start_fifo(self) -> GuestSide:
        """Control blocks for all vCPUs, one page of event words."""
        for vcpu in self.domain.vcpus:
            self.init_control(vcpu.vcpu_id)
        self.expand_array()
        return self

    def forget_fifo(self) -> None:
        """After EVTCHNOP_reset: back to the two-level ABI, and clean, as a kernel that starts over."""
        self.control, self.array = {}, []
        self.heads = [[0] * EVTCHN_FIFO_MAX_QUEUES for _ in self.domain.vcpus]
        words = self.domain.word_bits**2 // 8
        self.mem[self._pending : self._pending + words] = bytes(words)
        self.mem[self._mask : self._mask + words] = bytes(words)
        for vcpu in self.domain.vcpus:
            self.mem[vcpu.info] = 0
            sel = vcpu.info + self._sel
            self.mem[sel : sel + self.domain.word_bits // 8] = bytes(self.domain.word_bits // 8)

    def word_at(self, port: int) -> int:
        return self.array[port >> 10] + (port & 1023)

    def word(self, port: int) -> int:
        return self.u32[self.word_at(port)]

    def has_word(self, port: int) -> bool:
        return port >> 10 < len(self.array) if self.fifo else port < self.domain.word_bits**2

    def is_masked(self, port: int) -> bool:
        if self.fifo:
            return bool(self.word(port) & MASKED)
        return bool(self.mem[self._mask + port // 8] >> port % 8 & 1)

    def is_pending(self, port: int) -> bool:
        if self.fifo:
            return bool(self.word(port) & PENDING)
        return bool(self.mem[self._pending + port // 8] >> port % 8 & 1)

    def mask(self, port: int) -> None:
        if self.fifo:
            self.u32[self.word_at(port)] |= MASKED
        else:
            self.mem[self._mask + port // 8] |= 1 << port % 8

    def clear_pending(self, port: int) -> None:
        if self.fifo:
            self.u32[self.word_at(port)] &= ~PENDING
        else:
            self.mem[self._pending + port // 8] &= ~(1 << port % 8) & 0xFF

    def take(self, vcpu: int) -> Iterator[int]:
        """An upcall on a vCPU: the ports whose events it takes, one by one, each cleared as it is taken."""
        self.mem[self.domain.vcpus[vcpu].info] = 0
        return self._take_fifo(vcpu) if self.fifo else self._take_2l(vcpu)

    def consume(self, vcpu: int) -> list[int]:
        return list(self.take(vcpu))

    def _take_2l(self, vcpu: int) -> Iterator[int]:
        bits = self.domain.word_bits
        at = self.domain.vcpus[vcpu].info + self._sel
        selected = int.from_bytes(self.mem[at : at + bits // 8], "little")
        self.mem[at : at + bits // 8] = bytes(bits // 8)
        for word in (i for i in range(bits) if selected >> i & 1):
            for port in range(word * bits, word * bits + bits):
                if self.is_pending(port) and not self.is_masked(port):
                    self.clear_pending(port)
                    yield port

    def _take_fifo(self, vcpu: int) -> Iterator[int]:
        control = self.control.get(vcpu)
        if control is None:
            return
        u32, heads = self.u32, self.heads[vcpu]
        ready, u32[control + READY] = u32[control + READY], 0
        steps = 0
        while ready:
            steps += 1
            assert steps < 10_000, f"the queues of vCPU {vcpu} have no end"
            queue = (ready & -ready).bit_length() - 1
            port = heads[queue] or u32[control + HEAD + queue]
            at = self.word_at(port)
            word = u32[at]
            u32[at] = word & ~(LINKED | LINK)
            heads[queue] = word & LINK
            if not heads[queue]:
                ready &= ~(1 << queue)
            if word & PENDING and not word & MASKED:
                u32[at] &= ~PENDING
                yield port
            ready |= u32[control + READY]
            u32[control + READY] = 0

    def consume_all(self) -> list[int]:
        return [port for vcpu in range(len(self.domain.vcpus)) for port in self.consume(vcpu)]

    def queue(self, vcpu: int, priority: int) -> list[int]:
        """The ports linked on a queue, without touching it."""
        control = self.control[vcpu]
        ports: list[int] = []
        port = self.heads[vcpu][priority]
        if not port and self.u32[control + READY] >> priority & 1:
            port = self.u32[control + HEAD + priority]
        while port:
            assert port not in ports, f"queue {priority} of vCPU {vcpu} is a circle"
            ports.append(port)
            port = self.word(port) & LINK
        return ports

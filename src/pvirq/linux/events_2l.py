"""The guest's side of the two-level ABI: bits in shared_info (drivers/xen/events/events_2l.c).

Every function executes at one CPU of the kernel, as the C code does with interrupts off.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from pvirq.abi.errno import XenError
from pvirq.abi.event_channel import EVTCHN_2L_NR_CHANNELS
from pvirq.abi.xen import (
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_PENDING,
)
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain

BITS: Final = 64


class Events2l:
    """evtchn_ops_2l. `cpu()` is the CPU that executes; `cpu_of(port)` the one that a port is bound to.

    `timer_port(cpu)` is the port of a CPU's timer VIRQ, which is served before all others (0: none).
    """

    max_channels: Final = EVTCHN_2L_NR_CHANNELS
    nr_channels: Final = EVTCHN_2L_NR_CHANNELS

    def __init__(
        self,
        domain: Domain,
        cpu: Callable[[], int],
        cpu_of: Callable[[int], int],
        timer_port: Callable[[int], int],
    ) -> None:
        self._domain = domain
        self._mem = domain.machine.mem
        self._u64 = domain.machine.u64
        self._cpu = cpu
        self._cpu_of = cpu_of
        self._timer_port = timer_port
        self._pending = (domain.shared_info + SHARED_INFO_EVTCHN_PENDING) // 8
        self._mask = (domain.shared_info + SHARED_INFO_EVTCHN_MASK) // 8
        nr = len(domain.vcpus)
        self._cpu_mask = [[0] * (EVTCHN_2L_NR_CHANNELS // BITS) for _ in range(nr)]
        # Where the last scan left off, so that no port starves.
        self._word_idx = [0] * nr
        self._bit_idx = [0] * nr

    def percpu_init(self, cpu: int) -> None:
        """Nothing to prepare."""

    def percpu_deinit(self, cpu: int) -> None:
        """Nothing to give back."""

    def resume(self, online: int) -> None:
        """All channels are gone; the bits in shared_info are new (evtchn_2l_resume). `online` is a mask of CPUs."""
        for cpu, words in enumerate(self._cpu_mask):
            if online >> cpu & 1:
                words[:] = [0] * len(words)

    def setup(self, port: int) -> None:
        """Every port has its bits already."""

    def remove(self, port: int, cpu: int) -> None:
        self._cpu_mask[cpu][port // BITS] &= ~(1 << port % BITS)

    def bind_to_cpu(self, port: int, cpu: int, old_cpu: int) -> None:
        self._cpu_mask[old_cpu][port // BITS] &= ~(1 << port % BITS)
        self._cpu_mask[cpu][port // BITS] |= 1 << port % BITS

    def clear_pending(self, port: int) -> None:
        self._u64[self._pending + port // BITS] &= ~(1 << port % BITS)

    def set_pending(self, port: int) -> None:
        self._u64[self._pending + port // BITS] |= 1 << port % BITS

    def is_pending(self, port: int) -> bool:
        return bool(self._u64[self._pending + port // BITS] >> port % BITS & 1)

    def mask(self, port: int) -> None:
        self._u64[self._mask + port // BITS] |= 1 << port % BITS

    def mask_and_clear(self, port: int) -> None:
        """`mask`, then `clear_pending`."""
        word, bit = port // BITS, 1 << port % BITS
        self._u64[self._mask + word] |= bit
        self._u64[self._pending + word] &= ~bit

    def is_masked(self, port: int) -> bool:
        return bool(self._u64[self._mask + port // BITS] >> port % BITS & 1)

    def unmask(self, port: int) -> None:
        """Unmask in place, or another CPU's port by hypercall, for only Xen can make it pending there."""
        cpu = self._cpu()
        if cpu != self._cpu_of(port):
            with contextlib.suppress(XenError):  # the kernel ignores what this hypercall returns
                evtchn.unmask(self._domain, port)
            return
        self._u64[self._mask + port // BITS] &= ~(1 << port % BITS)
        if self.is_pending(port):
            info = self._domain.vcpus[cpu].info
            selector = (info + VCPU_INFO_PENDING_SEL) // 8
            if not self._u64[selector] >> port // BITS & 1:
                self._u64[selector] |= 1 << port // BITS
                self._mem[info + VCPU_INFO_UPCALL_PENDING] = 1
                # The CPU is awake as it executes this, except where the call came from outside its turn.
                self._domain.vcpus[cpu].kick()

    def _active(self, cpu: int, word: int) -> int:
        u64 = self._u64
        return u64[self._pending + word] & ~u64[self._mask + word] & self._cpu_mask[cpu][word]

    def handle_events(self, cpu: int, handle: Callable[[int], None]) -> None:
        """Scan this CPU's pending ports once: the timer, then the others from where the last scan ended."""
        timer = self._timer_port(cpu)
        if timer and self._active(cpu, timer // BITS) >> timer % BITS & 1:
            handle(timer)
        selector = (self._domain.vcpus[cpu].info + VCPU_INFO_PENDING_SEL) // 8
        words, self._u64[selector] = self._u64[selector], 0
        start_word, start_bit = self._word_idx[cpu], self._bit_idx[cpu]
        word = start_word
        first = True
        while words:
            rest = words >> word << word
            if not rest:  # wrap
                word = 0
                first = False
                continue
            word = (rest & -rest).bit_length() - 1
            pending = self._active(cpu, word)
            # The word begun with is scanned in two parts: first from the middle up, at the end the whole of
            # it.
            bit = start_bit if first and word == start_word else 0
            while bits := pending >> bit << bit:
                bit = (bits & -bits).bit_length() - 1
                handle(word * BITS + bit)
                bit = (bit + 1) % BITS
                self._word_idx[cpu] = word if bit else (word + 1) % BITS
                self._bit_idx[cpu] = bit
                if bit == 0:
                    break
            if word != start_word or not first:
                words &= ~(1 << word)
            word = (word + 1) % BITS
            first = False

"""The guest's side of the FIFO ABI: control blocks, event words, queues (drivers/xen/events/events_fifo)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    EVTCHN_FIFO_LINK_MASK,
    EVTCHN_FIFO_MAX_QUEUES,
    EVTCHN_FIFO_NR_CHANNELS,
    FIFO_CONTROL_HEAD,
    FIFO_CONTROL_READY,
)
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain
from pvirq.xen.evtchn_fifo import (
    BUSY,
    FLAG_LINKED,
    FLAG_MASKED,
    FLAG_PENDING,
    LINKED,
    MASKED,
    PENDING,
    WORD_MASK,
    WORD_SHIFT,
    WORDS_PER_PAGE,
)

UNLINKED: Final = ~(LINKED | EVTCHN_FIFO_LINK_MASK)
PENDING_OR_MASKED: Final = FLAG_PENDING | FLAG_MASKED
UNMASKED: Final = ~(FLAG_MASKED | BUSY >> 24)
_READY: Final = FIFO_CONTROL_READY // 4
_HEAD: Final = FIFO_CONTROL_HEAD // 4
_ALL_MASKED: Final = MASKED.to_bytes(4, "little") * WORDS_PER_PAGE


class EventsFifo:
    """evtchn_ops_fifo: one control block per CPU, one event word per port, in frames of the domain."""

    max_channels: Final = EVTCHN_FIFO_NR_CHANNELS

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._u32 = domain.machine.u32
        self._mem = domain.machine.mem
        self._control: dict[int, int] = {}  # cpu -> index in u32 of its control block
        self._heads = [[0] * EVTCHN_FIFO_MAX_QUEUES for _ in domain.vcpus]
        self._pages: list[int] = []  # index in u32 of each event array page
        self._spare: list[int] = []  # pages of before a resume, to be used again

    @property
    def nr_channels(self) -> int:
        return len(self._pages) * WORDS_PER_PAGE

    def percpu_init(self, cpu: int) -> None:
        """Give Xen a control block for a CPU; it is kept while the CPU is offline.

        XenError as EVTCHNOP_init_control.
        """
        if cpu in self._control:
            return
        domain = self._domain
        mfn = domain.machine.alloc(1, domain.domid)
        try:
            evtchn.init_control(domain, mfn, 0, cpu)
        except XenError:
            domain.machine.free(mfn)
            raise
        self._control[cpu] = (mfn << PAGE_SHIFT) // 4

    def resume(self, online: int) -> None:
        """All channels are gone, and Xen knows neither control blocks nor event array (evtchn_fifo_resume).

        Each CPU of mask `online` gives it its control block again, others give theirs up; the pages of the event
        array will be used again. XenError as EVTCHNOP_init_control.
        """
        machine = self._domain.machine
        for cpu, control in list(self._control.items()):
            mfn = control * 4 >> PAGE_SHIFT
            if online >> cpu & 1:
                machine.mem[control * 4 : control * 4 + PAGE_SIZE] = bytes(PAGE_SIZE)
                self._heads[cpu] = [0] * EVTCHN_FIFO_MAX_QUEUES
                evtchn.init_control(self._domain, mfn, 0, cpu)
            else:
                del self._control[cpu]
                machine.free(mfn)
        self._spare = self._pages + self._spare
        self._pages.clear()

    def percpu_deinit(self, cpu: int) -> None:
        """Empty the queues of a CPU that has gone, so that its ports can be linked elsewhere."""
        self.handle_events(cpu, None)

    def setup(self, port: int) -> None:
        """Grow the event array until it has a word for `port`; XenError as EVTCHNOP_expand_array."""
        if port >= EVTCHN_FIFO_NR_CHANNELS:
            raise XenError(Errno.EINVAL, f"port {port} is beyond the event array")
        domain = self._domain
        while len(self._pages) <= port // WORDS_PER_PAGE:
            page = self._spare[0] * 4 if self._spare else domain.machine.alloc(1, domain.domid) << PAGE_SHIFT
            domain.machine.mem[page : page + PAGE_SIZE] = _ALL_MASKED  # before Xen knows of them
            try:
                evtchn.expand_array(domain, page >> PAGE_SHIFT)
            except XenError:
                if not self._spare:
                    domain.machine.free(page >> PAGE_SHIFT)
                raise
            self._pages.append(page // 4)
            del self._spare[:1]

    def remove(self, port: int, cpu: int) -> None:
        """Nothing to do."""

    def bind_to_cpu(self, port: int, cpu: int, old_cpu: int) -> None:
        """Nothing to do: Xen links the port at the CPU that it notifies."""

    def _word(self, port: int) -> int:
        return self._pages[port >> WORD_SHIFT] + (port & WORD_MASK)

    # Here and wherever each event passes, the flags are a byte (FLAG_*): see `pvirq.xen.evtchn_fifo`.

    def clear_pending(self, port: int) -> None:
        at = (self._pages[port >> WORD_SHIFT] + (port & WORD_MASK) << 2) + 3
        self._mem[at] &= ~FLAG_PENDING

    def set_pending(self, port: int) -> None:
        self._u32[self._word(port)] |= PENDING

    def is_pending(self, port: int) -> bool:
        return bool(self._u32[self._word(port)] & PENDING)

    def mask(self, port: int) -> None:
        self._u32[self._word(port)] |= MASKED

    def mask_and_clear(self, port: int) -> None:
        """`mask`, then `clear_pending`."""
        mem, at = self._mem, (self._pages[port >> WORD_SHIFT] + (port & WORD_MASK) << 2) + 3
        mem[at] = mem[at] & ~FLAG_PENDING | FLAG_MASKED

    def is_masked(self, port: int) -> bool:
        return bool(self._u32[self._word(port)] & MASKED)

    def unmask(self, port: int) -> None:
        """Clear MASKED in place, or by hypercall where the port is pending, for then Xen must link it."""
        mem, at = self._mem, (self._pages[port >> WORD_SHIFT] + (port & WORD_MASK) << 2) + 3
        flags = mem[at]
        if not flags & FLAG_MASKED:
            return
        if flags & FLAG_PENDING:
            with contextlib.suppress(XenError):  # the kernel ignores what this hypercall returns
                evtchn.unmask(self._domain, port)
            return
        mem[at] = flags & UNMASKED

    def handle_events(self, cpu: int, handle: Callable[[int], None] | None) -> None:
        """Consume this CPU's queues, the highest priority first, until none is ready.

        `handle(port)` is called for each event; None drops them.
        """
        control = self._control.get(cpu)
        if control is None:
            return
        u32, mem, pages, heads = self._u32, self._mem, self._pages, self._heads[cpu]
        ready_at, heads_at = control + _READY, control + _HEAD
        ready, u32[ready_at] = u32[ready_at], 0
        while ready:
            queue = (ready & -ready).bit_length() - 1
            # A local head of 0: the tail was reached last time, Xen has put a new one in the control block.
            port = heads[queue] or u32[heads_at + queue]
            word = pages[port >> WORD_SHIFT] + (port & WORD_MASK)
            link = u32[word] & EVTCHN_FIFO_LINK_MASK
            at = (word << 2) + 3
            flags = mem[at]
            if link:
                u32[word] &= UNLINKED
            else:
                mem[at] = flags & ~FLAG_LINKED
                ready &= ~(1 << queue)
            if flags & PENDING_OR_MASKED == FLAG_PENDING and handle is not None:
                handle(port)
            heads[queue] = link
            more = u32[ready_at]
            if more:
                u32[ready_at] = 0
                ready |= more

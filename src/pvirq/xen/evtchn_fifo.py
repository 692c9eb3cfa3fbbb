"""The FIFO event channel ABI (xen/common/event_fifo.c): queues linked through event words.

Every port has a 32-bit word in pages that the guest gives: PENDING, MASKED, LINKED, BUSY and a 17-bit link to
the next port. Every vCPU has 16 queues, by priority; their heads, and a READY bit for each, are in its
control block. Xen appends at the tail, the guest consumes from the head.

Xen shares those words with guest code on other CPUs and so uses compare-and-swap with bounded retries and a
BUSY bit to hold off unmasking. Here no guest code runs while an operation is under way, the first try always
succeeds, and BUSY, which only the retries set, is at most cleared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import (
    EVTCHN_FIFO_BUSY,
    EVTCHN_FIFO_LINK_MASK,
    EVTCHN_FIFO_LINKED,
    EVTCHN_FIFO_MASKED,
    EVTCHN_FIFO_MAX_QUEUES,
    EVTCHN_FIFO_NR_CHANNELS,
    EVTCHN_FIFO_PENDING,
    EVTCHN_FIFO_PRIORITY_DEFAULT,
    EVTCHN_FIFO_PRIORITY_MIN,
    FIFO_CONTROL_HEAD,
    FIFO_CONTROL_SIZE,
)
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.xen import probes
from pvirq.xen.memory import PGT_WRITABLE
from pvirq.xen.sched import check_pollers

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu
    from pvirq.xen.evtchn_channels import Channel
    from pvirq.xen.probes import Once, Probes

PENDING: Final = 1 << EVTCHN_FIFO_PENDING
MASKED: Final = 1 << EVTCHN_FIFO_MASKED
LINKED: Final = 1 << EVTCHN_FIFO_LINKED
BUSY: Final = 1 << EVTCHN_FIFO_BUSY
# Where each event passes, the flags are looked at and changed as the top byte of their word: small numbers, which
# Python doesn't allocate.
FLAG_PENDING: Final = PENDING >> 24
FLAG_MASKED: Final = MASKED >> 24
FLAG_LINKED: Final = LINKED >> 24
MASKED_OR_LINKED: Final = FLAG_MASKED | FLAG_LINKED
PENDING_AND_LINKED: Final = FLAG_PENDING | FLAG_LINKED
WORDS_PER_PAGE: Final = PAGE_SIZE // 4
WORD_SHIFT: Final = 10
WORD_MASK: Final = WORDS_PER_PAGE - 1
MAX_ARRAY_PAGES: Final = EVTCHN_FIFO_NR_CHANNELS // WORDS_PER_PAGE


class Fifo:
    """Port operations of one domain under the FIFO ABI (evtchn_port_ops, evtchn_fifo_domain).

    `init`, `set_pending` and `unmask` are `do_init` and so on, unless something has been put in front of them
    (`pvirq.xen.probes.put`).
    """

    fifo = True
    max_channels = EVTCHN_FIFO_NR_CHANNELS

    def __init__(self, domain: Domain, channels: list[Channel]) -> None:
        """`channels` is the domain's own list, which grows: a new array page has to know who is in it."""
        self.init: Callable[[Channel], None] = self.do_init
        self.set_pending: Callable[[Vcpu, Channel], None] = self.do_set_pending
        self.unmask: Callable[[Channel], None] = self.do_unmask
        self._domain = domain
        self._channels = channels
        self._mem = domain.machine.mem
        self._u32 = domain.machine.u32
        self._array: list[int] = []  # pages of event words, as index into u32 of their first word
        self._control: list[int] = [0] * len(domain.vcpus)  # control blocks likewise; 0: none yet
        self._tails = [[0] * EVTCHN_FIFO_MAX_QUEUES for _ in domain.vcpus]
        self._said: dict[Channel, tuple[int, dict[Any, Any]]] = {}  # where ports have their flags, what tells of them

    @staticmethod
    def check_offset(offset: int) -> None:
        """A control block must not cross its page and is 8-byte aligned; else XenError(EINVAL)."""
        if not 0 <= offset <= PAGE_SIZE - FIFO_CONTROL_SIZE or offset & 7:
            raise XenError(Errno.EINVAL, f"control block at offset {offset}")

    def map_control_block(self, vcpu: Vcpu, gfn: int, offset: int) -> None:
        """Take the control block of a vCPU. Raises EINVAL for a bad frame or a second block."""
        if self._control[vcpu.vcpu_id]:
            raise XenError(Errno.EINVAL, f"vCPU {vcpu.vcpu_id} has a control block")
        self._control[vcpu.vcpu_id] = self._map_guest_page(gfn) + offset // 4

    def add_page(self, gfn: int) -> None:
        """Append a page of event words and raise what became pending before (add_page_to_event_array)."""
        if len(self._array) >= MAX_ARRAY_PAGES:
            raise XenError(Errno.ENOSPC, "the event array is complete")
        first = len(self._array) * WORDS_PER_PAGE
        self._array.append(self._map_guest_page(gfn))
        for channel in self._channels[first : first + WORDS_PER_PAGE]:
            if channel.pending:
                self._relink(channel)

    def destroy(self) -> None:
        """Let go of the guest's pages."""
        for at in self._control + self._array:
            if at:
                self._unmap_guest_page(at)
        self._control = [0] * len(self._control)
        self._array = []
        self._said.clear()

    def _map_guest_page(self, mfn: int) -> int:
        """Hold a page of the domain's own with a writable type reference; return where it is in u32.

        Raises EINVAL for a frame that isn't the domain's, or in use as something else, say a page table.
        """
        machine = self._domain.machine
        if not 0 <= mfn < machine.frames or machine.owner[mfn] != self._domain.domid:
            raise XenError(Errno.EINVAL, f"frame {mfn:#x} is not {self._domain}'s")
        if machine.type_count[mfn] and machine.type[mfn] != PGT_WRITABLE:
            raise XenError(Errno.EINVAL, f"frame {mfn:#x} can't be written")
        machine.type[mfn] = PGT_WRITABLE
        machine.type_count[mfn] += 1
        machine.refs[mfn] += 1
        return mfn << (PAGE_SHIFT - 2)

    def _unmap_guest_page(self, at: int) -> None:
        machine, mfn = self._domain.machine, at >> (PAGE_SHIFT - 2)
        machine.type_count[mfn] -= 1
        machine.refs[mfn] -= 1

    def _word(self, port: int) -> int:
        """Index into u32 of a port's event word; 0 while its page is missing."""
        page = port >> WORD_SHIFT
        return self._array[page] + (port & WORD_MASK) if page < len(self._array) else 0

    def do_init(self, channel: Channel) -> None:
        channel.priority = EVTCHN_FIFO_PRIORITY_DEFAULT

    def do_set_pending(self, vcpu: Vcpu, channel: Channel) -> None:
        port = channel.port
        page, array = port >> WORD_SHIFT, self._array
        if page >= len(array):
            channel.pending = True  # until the page comes
            return
        at = array[page] + (port & WORD_MASK)
        vcpu_id = vcpu.vcpu_id
        control = self._control[vcpu_id]
        if not control:
            return  # the guest must not unmask before it has set this up: the event is lost
        u32, mem = self._u32, self._mem
        flags_at = (at << 2) + 3
        flags = mem[flags_at]
        if flags & MASKED_OR_LINKED:
            mem[flags_at] = flags | FLAG_PENDING
        else:
            mem[flags_at] = flags | PENDING_AND_LINKED
            # Put at the end of its queue. If it was the tail of the queue it was last on, that queue is empty now;
            # nobody may be linked to it there.
            old_tails = self._tails[channel.last_vcpu]
            if old_tails[channel.last_priority] == port:
                old_tails[channel.last_priority] = 0
            channel.last_vcpu = vcpu_id
            channel.last_priority = priority = channel.priority
            tails = self._tails[vcpu_id]
            tail = tails[priority]
            tails[priority] = port
            tail_at = array[tail >> WORD_SHIFT] + (tail & WORD_MASK) if tail else 0
            if tail_at and mem[(tail_at << 2) + 3] & FLAG_LINKED:
                u32[tail_at] = (u32[tail_at] & ~(BUSY | EVTCHN_FIFO_LINK_MASK)) | port
            else:
                # The queue's new head.
                u32[control + FIFO_CONTROL_HEAD // 4 + priority] = port
                ready = u32[control]
                if not ready >> priority & 1:
                    u32[control] = ready | 1 << priority
                    info = vcpu.info  # mark_events_pending, without its call
                    upcall = mem[info]
                    if not upcall & 1:
                        mem[info] = upcall | 1
                        vcpu.kick()
        if self._domain.pollers and not flags & FLAG_PENDING:
            check_pollers(self._domain, port)

    def outcome(self, vcpu: Vcpu, channel: Channel) -> str:
        """What `set_pending` would come to now (`pvirq.xen.probes`)."""
        port = channel.port
        page, array = port >> WORD_SHIFT, self._array
        if page >= len(array):
            return probes.WAITING
        if not self._control[vcpu.vcpu_id]:
            return probes.LOST
        flags = self._mem[(array[page] + (port & WORD_MASK) << 2) + 3]
        if flags & FLAG_PENDING:
            return probes.COALESCED
        return probes.MASKED if flags & FLAG_MASKED else probes.PENDING

    def told_set_pending(self, instruments: Probes) -> Callable[[Vcpu, Channel], None]:
        """`set_pending`, after telling instruments what it will come to: by what tells that for these flags."""
        set_pending, mem, said = self.do_set_pending, self._mem, self._said
        said.clear()

        def told(vcpu: Vcpu, channel: Channel) -> None:
            try:
                at, tells = said[channel]
                tell, what = tells[vcpu][instruments.current][mem[at]]
            except KeyError:
                tell, what = self._tell_pending(instruments, vcpu, channel)
            tell(what)
            set_pending(vcpu, channel)

        return told

    def _tell_pending(self, instruments: Probes, vcpu: Vcpu, channel: Channel) -> Once:
        """What tells of an event that is to be raised now; kept, where the port has its flags already."""
        outcome, by = self.outcome(vcpu, channel), instruments.current
        once = instruments.fixed("raised", vcpu, channel, outcome, by)
        if outcome not in (probes.WAITING, probes.LOST):
            at, tells = probes.keep(self._said, channel, lambda: ((self._word(channel.port) << 2) + 3, {}))
            probes.nest(tells, once, vcpu, by, self._mem[at])
        return once

    def clear_pending(self, channel: Channel) -> None:
        # It stays linked: the guest unlinks it, and ignores what isn't pending.
        at = self._word(channel.port)
        if at:
            self._u32[at] &= ~PENDING

    def do_unmask(self, channel: Channel) -> None:
        at = self._word(channel.port)
        if at:
            word = self._u32[at] & ~MASKED
            self._u32[at] = word
            if word & PENDING:
                self._relink(channel)

    def _relink(self, channel: Channel) -> None:
        """Put an event on its queue that was raised before: not past the door again (`pvirq.xen.probes`)."""
        self.do_set_pending(self._domain.vcpus[channel.notify_vcpu], channel)

    def mask(self, channel: Channel) -> bool:
        """Set the mask bit as the guest could; returns whether it was clear."""
        at = self._word(channel.port)
        if not at or self._u32[at] & MASKED:
            return False
        self._u32[at] |= MASKED
        return True

    def is_pending(self, channel: Channel) -> bool:
        at = self._word(channel.port)
        return at != 0 and bool(self._u32[at] & PENDING)

    def is_masked(self, channel: Channel) -> bool:
        at = self._word(channel.port)
        return at == 0 or bool(self._u32[at] & MASKED)

    def is_busy(self, channel: Channel) -> bool:
        """A closed port can't be had again while it is still linked on a queue."""
        at = self._word(channel.port)
        return at != 0 and bool(self._u32[at] & LINKED)

    def set_priority(self, channel: Channel, priority: int) -> None:
        """For events to come; one that is queued stays where it is. XenError(EINVAL) for a bad priority."""
        if not 0 <= priority <= EVTCHN_FIFO_PRIORITY_MIN:
            raise XenError(Errno.EINVAL, f"priority {priority}")
        channel.priority = priority

    def set_priority_default(self, channel: Channel) -> None:
        channel.priority = EVTCHN_FIFO_PRIORITY_DEFAULT

    def state(self, channel: Channel) -> str:
        """The third column of the 'e' debug key: busy, and the link."""
        at = self._word(channel.port)
        if not at:
            return "?     "
        word = self._u32[at]
        link = str(word & EVTCHN_FIFO_LINK_MASK) if word & LINKED else "-"
        return f"{'B' if word & BUSY else ' '} {link:<4}"

"""The two-level event channel ABI (xen/common/event_2l.c): pending and mask bitmaps in shared_info.

Level one is evtchn_pending_sel of a vCPU: a bit says that a word of the pending bitmap is worth a look. Bits
are touched as bytes: on a little-endian machine that is the same for the words of 32-bit and of 64-bit
guests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import SHARED_INFO_EVTCHN_MASK_32, VCPU_INFO_PENDING_SEL_32
from pvirq.abi.xen import SHARED_INFO_EVTCHN_MASK, SHARED_INFO_EVTCHN_PENDING, VCPU_INFO_PENDING_SEL
from pvirq.xen import probes
from pvirq.xen.sched import check_pollers

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu
    from pvirq.xen.evtchn_channels import Channel
    from pvirq.xen.probes import Probes


class TwoLevel:
    """Port operations of one domain under the two-level ABI (struct evtchn_port_ops).

    `init`, `set_pending` and `unmask` are `do_init` and so on, unless something has been put in front of them
    (`pvirq.xen.probes.put`).
    """

    fifo = False

    def __init__(self, domain: Domain) -> None:
        self.init: Callable[[Channel], None] = self.do_init
        self.set_pending: Callable[[Vcpu, Channel], None] = self.do_set_pending
        self.unmask: Callable[[Channel], None] = self.do_unmask
        self._domain = domain
        self._mem = domain.machine.mem
        wide = domain.word_bits == 64
        self._word_shift = 6 if wide else 5
        self._sel = VCPU_INFO_PENDING_SEL if wide else VCPU_INFO_PENDING_SEL_32
        self._pending = domain.shared_info + SHARED_INFO_EVTCHN_PENDING
        self._mask = domain.shared_info + (SHARED_INFO_EVTCHN_MASK if wide else SHARED_INFO_EVTCHN_MASK_32)
        self.max_channels = domain.word_bits * domain.word_bits

    def do_init(self, channel: Channel) -> None:
        """A port has been bound; nothing to prepare."""

    def do_set_pending(self, vcpu: Vcpu, channel: Channel) -> None:
        mem, port = self._mem, channel.port
        at, bit = port >> 3, 1 << (port & 7)
        pending = mem[self._pending + at]
        if pending & bit:
            return
        mem[self._pending + at] = pending | bit
        if not mem[self._mask + at] & bit:
            # As `_select`, without its call: nothing is called more often than this.
            word, info = port >> self._word_shift, vcpu.info
            at, bit = info + self._sel + (word >> 3), 1 << (word & 7)
            selected = mem[at]
            if not selected & bit:
                mem[at] = selected | bit
                flag = mem[info]
                if not flag & 1:
                    mem[info] = flag | 1
                    vcpu.kick()
        if self._domain.pollers:
            check_pollers(self._domain, port)

    def outcome(self, vcpu: Vcpu, channel: Channel) -> str:
        """What `set_pending` would come to now (`pvirq.xen.probes`)."""
        at, bit = channel.port >> 3, 1 << (channel.port & 7)
        if self._mem[self._pending + at] & bit:
            return probes.COALESCED
        return probes.MASKED if self._mem[self._mask + at] & bit else probes.PENDING

    def told_set_pending(self, instruments: Probes) -> Callable[[Vcpu, Channel], None]:
        """`set_pending`, after telling instruments what it will come to: by what tells that for these bits.

        All of it, since they are at hand here.
        """
        mem, domain, select = self._mem, self._domain, self._select
        said: dict[Channel, tuple[int, int, int, dict[Any, Any]]] = {}

        def told(vcpu: Vcpu, channel: Channel) -> None:
            try:
                pending_at, mask_at, bit, tells = said[channel]
                pending, masked = mem[pending_at], mem[mask_at] & bit
                tell, what = tells[vcpu][instruments.current][pending & bit][masked]
            except KeyError:
                at, bit, by = channel.port >> 3, 1 << (channel.port & 7), instruments.current
                pending_at, mask_at = self._pending + at, self._mask + at
                pending, masked = mem[pending_at], mem[mask_at] & bit
                tells = probes.keep(said, channel, lambda: (pending_at, mask_at, bit, {}))[3]
                once = instruments.fixed("raised", vcpu, channel, self.outcome(vcpu, channel), by)
                tell, what = probes.nest(tells, once, vcpu, by, pending & bit, masked)
            tell(what)
            if pending & bit:
                return
            mem[pending_at] = pending | bit
            if not masked:
                select(vcpu, channel.port)
            if domain.pollers:
                check_pollers(domain, channel.port)

        return told

    def _select(self, vcpu: Vcpu, port: int) -> None:
        """Point the vCPU at the word of `port`, and at its events if that is news."""
        mem, word, info = self._mem, port >> self._word_shift, vcpu.info
        at, bit = info + self._sel + (word >> 3), 1 << (word & 7)
        selected = mem[at]
        if not selected & bit:
            mem[at] = selected | bit
            flag = mem[info]  # mark_events_pending, without its call
            if not flag & 1:
                mem[info] = flag | 1
                vcpu.kick()

    def clear_pending(self, channel: Channel) -> None:
        self._mem[self._pending + (channel.port >> 3)] &= ~(1 << (channel.port & 7)) & 0xFF

    def do_unmask(self, channel: Channel) -> None:
        mem, port = self._mem, channel.port
        at, bit = port >> 3, 1 << (port & 7)
        mask = mem[self._mask + at]
        if not mask & bit:
            return
        mem[self._mask + at] = mask & ~bit
        if mem[self._pending + at] & bit:
            self._select(self._domain.vcpus[channel.notify_vcpu], port)

    def mask(self, channel: Channel) -> bool:
        """Set the mask bit as the guest could; returns whether it was clear."""
        if self.is_masked(channel):
            return False
        self._mem[self._mask + (channel.port >> 3)] |= 1 << (channel.port & 7)
        return True

    def is_pending(self, channel: Channel) -> bool:
        # Back from FIFO there can be ports beyond the bitmap.
        port = channel.port
        return port < self.max_channels and bool(self._mem[self._pending + (port >> 3)] >> (port & 7) & 1)

    def is_masked(self, channel: Channel) -> bool:
        port = channel.port
        return port >= self.max_channels or bool(self._mem[self._mask + (port >> 3)] >> (port & 7) & 1)

    def is_busy(self, channel: Channel) -> bool:
        """A closed port is free at once."""
        return False

    def set_priority(self, channel: Channel, priority: int) -> None:
        raise XenError(Errno.ENOSYS, "the two-level ABI has no priorities")

    def state(self, channel: Channel) -> str:
        """The third column of the 'e' debug key: is the port's word selected?"""
        word = channel.port >> self._word_shift
        vcpu = self._domain.vcpus[channel.notify_vcpu]
        return str(self._mem[vcpu.info + self._sel + (word >> 3)] >> (word & 7) & 1)

    def is_raw_pending(self, port: int) -> bool:
        """The pending bit of any port, bound or not."""
        return bool(self._mem[self._pending + (port >> 3)] >> (port & 7) & 1)

"""How XenLinux finds pending ports: the upcall loops of three revisions (evtchn_do_upcall, drivers/xen/core/evtchn.c).

All take and clear the vCPU's selector word, look at the words of the pending bitmap that it names, and call do_IRQ for
each port that is pending, unmasked and this CPU's. They differ in where they go on after a port:

- "lowest-first", the original: at the lowest port of the same word, until the word is empty. A port that is notified
  again before the loop looks again is served again: a busy low one starves those above it, and all higher words.
- "round-robin" (linux-2.6.18-xen changeset 324, RHEL 5): behind the port just served, round to it again. The next
  upcall starts in the word *after* the one served last, so within one word it starts at the bottom each time.
- "snapshot" (SUSE's 2.6.27 and later): behind the port served last, also across upcalls. Each word is read once, except
  that the one begun in its middle is read again for the rest; what is notified meanwhile waits for the next round.

In each, an upcall that comes while another is in the loop at this CPU only counts itself, and the outer one goes round
once more. Each is one function with all that it needs in its cells, for this is what every event passes through; what a
domain's CPUs have in common is in cells that they share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pvirq.linux.xenlinux import XenLinux

Upcall = Callable[[], None]
Ways = tuple[Callable[[int], int | None], Callable[[int], None], Callable[[int], None]]
"""The IRQ of a port, None without; do_IRQ; and what takes a port without an IRQ."""


class UpcallState:
    """A CPU's variables: nested upcalls, and the word and bit that its revision remembers."""

    __slots__ = ("count", "l1i", "l2i")

    def __init__(self, l1i: int = 0, l2i: int = 0) -> None:
        self.count = 0
        self.l1i = l1i
        self.l2i = l2i


def lowest_first(events: XenLinux) -> Callable[[int, UpcallState], Upcall]:
    """The original."""
    mem, words = events.mem, events.words
    pending, mask, shift = events.pending_words, events.mask_words, events.word_shift

    def at(cpu: int, state: UpcallState) -> Upcall:
        info, selector, mine = events.domain.vcpus[cpu].info, events.selector[cpu], events.cpu_evtchn_mask[cpu]
        get_irq, do_irq, device = events.ways(cpu)

        def upcall() -> None:
            while True:
                mem[info] = 0  # evtchn_upcall_pending: cleared first, or what comes now would be lost
                count = state.count
                state.count = count + 1
                if count:
                    return
                try:
                    l1 = words[selector]
                    if l1:
                        words[selector] = 0
                    while l1:
                        bit = l1 & -l1
                        l1 ^= bit
                        l1i = bit.bit_length() - 1
                        base, p, m = l1i << shift, pending + l1i, mask + l1i
                        while (l2 := words[p]) and (l2 := l2 & mine[l1i] & ~words[m]):
                            port = base + (l2 & -l2).bit_length() - 1
                            irq = get_irq(port)
                            if irq is None:
                                device(port)
                            else:
                                do_irq(irq)
                finally:
                    count, state.count = state.count, 0
                if count == 1:
                    return

        return upcall

    return at


def round_robin(events: XenLinux) -> Callable[[int, UpcallState], Upcall]:
    """linux-2.6.18-xen changeset 324: last_processed_l1i, last_processed_l2i."""
    mem, words = events.mem, events.words
    pending, mask, shift = events.pending_words, events.mask_words, events.word_shift
    last = (1 << shift) - 1

    def at(cpu: int, state: UpcallState) -> Upcall:
        info, selector, mine = events.domain.vcpus[cpu].info, events.selector[cpu], events.cpu_evtchn_mask[cpu]
        get_irq, do_irq, device = events.ways(cpu)
        state.l1i = state.l2i = last

        def upcall() -> None:
            while True:
                mem[info] = 0  # evtchn_upcall_pending: cleared first, or what comes now would be lost
                count = state.count
                state.count = count + 1
                if count:
                    return
                try:
                    l1 = words[selector]
                    if l1:
                        words[selector] = 0
                    l1i, l2i = state.l1i, state.l2i
                    while l1:
                        l1i = l1i + 1 & last
                        rest = l1 >> l1i
                        if not rest:  # round to the first word
                            l1i = l2i = last
                            continue
                        l1i += (rest & -rest).bit_length() - 1
                        base, p, m = l1i << shift, pending + l1i, mask + l1i
                        while True:
                            l2 = words[p]
                            if l2:
                                l2 &= mine[l1i] & ~words[m]
                            l2i = l2i + 1 & last
                            rest = l2 >> l2i
                            if not rest:
                                l2i = last
                                break
                            l2i += (rest & -rest).bit_length() - 1
                            irq = get_irq(base + l2i)
                            if irq is None:
                                device(base + l2i)
                            else:
                                do_irq(irq)
                            state.l1i, state.l2i = l1i, l2i
                            if l2i == last:
                                l2 = words[p] & mine[l1i] & ~words[m]
                                break
                        if not l2:
                            l1 &= ~(1 << l1i)
                finally:
                    count, state.count = state.count, 0
                if count == 1:
                    return

        return upcall

    return at


def snapshot(events: XenLinux) -> Callable[[int, UpcallState], Upcall]:
    """SUSE: current_l1i, current_l2i."""
    mem, words = events.mem, events.words
    pending, mask, shift = events.pending_words, events.mask_words, events.word_shift
    last = (1 << shift) - 1

    def at(cpu: int, state: UpcallState) -> Upcall:
        info, selector, mine = events.domain.vcpus[cpu].info, events.selector[cpu], events.cpu_evtchn_mask[cpu]
        get_irq, do_irq, device = events.ways(cpu)

        def upcall() -> None:
            while True:
                mem[info] = 0  # evtchn_upcall_pending: cleared first, or what comes now would be lost
                count = state.count
                state.count = count + 1
                if count:
                    return
                try:
                    l1 = words[selector]
                    if l1:
                        words[selector] = 0
                    l1i = start_l1i = state.l1i
                    start_l2i = state.l2i
                    first = True
                    while l1:
                        rest = l1 >> l1i
                        if not rest:  # round to the first word; that is a step of its own
                            l1i = 0
                            first = False
                            continue
                        l1i += (rest & -rest).bit_length() - 1
                        l2 = words[pending + l1i]
                        if l2:
                            l2 &= mine[l1i] & ~words[mask + l1i]
                        l2i = 0
                        if l1i == start_l1i:
                            if first:
                                l2i = start_l2i
                                if l1 == 1 << l1i and not l2 >> l2i:  # no other word, nothing behind the middle
                                    first, l2i = False, 0
                            else:
                                l2 &= (1 << start_l2i) - 1  # the others were served at the beginning
                        base = l1i << shift
                        while rest := l2 >> l2i:
                            l2i += (rest & -rest).bit_length() - 1
                            irq = get_irq(base + l2i)
                            if irq is None:
                                device(base + l2i)
                            else:
                                do_irq(irq)
                            l2i = l2i + 1 & last
                            state.l1i = l1i if l2i else l1i + 1 & last
                            state.l2i = l2i
                            if not l2i:
                                break
                        if l1i != start_l1i or not first:
                            l1 &= ~(1 << l1i)
                        elif l1 == 1 << l1i:  # no other word: its second part is next, without going round
                            first = False
                            continue
                        l1i = l1i + 1 & last
                        first = False
                finally:
                    count, state.count = state.count, 0
                if count == 1:
                    return

        return upcall

    return at


UPCALLS: Final = {"lowest-first": lowest_first, "round-robin": round_robin, "snapshot": snapshot}

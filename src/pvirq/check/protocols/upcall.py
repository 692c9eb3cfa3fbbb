"""Upcalls: how guests find their pending ports in the two-level bitmap, and how Xen comes to call them.

`handle(port)` of a loop is a generator: what the guest does with one event. The loops of XenLinux 2.6.18 follow
`evtchn_do_upcall` of drivers/xen/core/evtchn.c, without nesting (no handler here lets events in); the other one follows
`evtchn_2l_handle_events` and `__xen_evtchn_do_upcall` of Linux 6.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pvirq.check.protocols.twolevel import SharedInfo
from pvirq.check.steps import Model, Thread, Var, look

Handle = Callable[[int], Thread]


@dataclass(frozen=True)
class CpuEvents:
    """What a CPU of the guest knows for itself: its ports (cpu_evtchn_mask), and where its last scan ended."""

    mask: tuple[Var, ...]
    word: Var
    bit: Var


def cpu_events(model: Model, info: SharedInfo, cpu: int, *, ports: int | None = None, last: bool = False) -> CpuEvents:
    """CPU `cpu` of the guest. `ports` has a bit for each of its ports (None: all); with `last`, its first scan begins
    behind the last word and bit, as that of changeset 324 does."""
    ones = (1 << info.word_bits) - 1
    mine = (1 << info.ports) - 1 if ports is None else ports
    begin = info.word_bits - 1 if last else 0
    return CpuEvents(
        tuple(
            model.var(f"cpu_evtchn_mask[{cpu}][{word}]", mine >> word * info.word_bits & ones)
            for word in range(len(info.pending))
        ),
        model.var(f"last_word[{cpu}]", begin),
        model.var(f"last_bit[{cpu}]", begin),
    )


def active_evtchns(info: SharedInfo, events: CpuEvents, word: int) -> Thread:
    """The ports of a word that are pending, this CPU's and not masked."""
    pending = yield info.pending[word].read().saying(f"looks for pending ports in word {word}")
    mine = yield events.mask[word].read()
    masked = yield info.mask[word].read().saying(f"looks which of them are masked (pending {pending:#b})")
    return pending & mine & ~masked


def lowest_first(info: SharedInfo, cpu: int, events: CpuEvents, handle: Handle) -> Thread:
    """2.6.18: after a port, the lowest one again; a word is left when it is empty."""
    vcpu = info.vcpus[cpu]
    yield vcpu.upcall_pending.write(0).saying("clears evtchn_upcall_pending")
    selected = yield vcpu.pending_sel.xchg(0).saying("takes the selected words")
    while selected:
        word = _lowest(selected)
        selected &= ~(1 << word)
        while ports := (yield from active_evtchns(info, events, word)):
            yield from handle(word * info.word_bits + _lowest(ports))


def round_robin(info: SharedInfo, cpu: int, events: CpuEvents, handle: Handle) -> Thread:
    """linux-2.6.18-xen changeset 324: behind the port served last, and round to it again."""
    vcpu, last = info.vcpus[cpu], info.word_bits - 1
    yield vcpu.upcall_pending.write(0).saying("clears evtchn_upcall_pending")
    selected = yield vcpu.pending_sel.xchg(0).saying("takes the selected words")
    word, bit = (yield events.word.read()), (yield events.bit.read())
    while selected:
        word = (word + 1) % info.word_bits
        if not selected >> word:
            word = bit = last
            continue
        word += _lowest(selected >> word)
        while True:
            ports = yield from active_evtchns(info, events, word)
            bit = (bit + 1) % info.word_bits
            if not ports >> bit:
                bit = last
                break
            bit += _lowest(ports >> bit)
            yield from handle(word * info.word_bits + bit)
            yield events.word.write(word)
            yield events.bit.write(bit)
            if bit == last:
                break
        if not (yield from active_evtchns(info, events, word)):
            selected &= ~(1 << word)


def evtchn_2l_handle_events(info: SharedInfo, cpu: int, events: CpuEvents, handle: Handle) -> Thread:
    """Linux 6.1: from where the last scan ended; each word is read once, but for the one that is begun in its middle.
    (There is no timer here, whose port would be served first.)"""
    last = info.word_bits - 1
    selected = yield info.vcpus[cpu].pending_sel.xchg(0).saying("takes the selected words")
    start_word = word = yield events.word.read()
    start_bit = yield events.bit.read()
    first = True
    while selected:
        if not selected >> word:
            word = 0
            first = False
            continue
        word += _lowest(selected >> word)
        ports = yield from active_evtchns(info, events, word)
        bit = start_bit if first and word == start_word else 0
        while ports >> bit:
            bit += _lowest(ports >> bit)
            yield from handle(word * info.word_bits + bit)
            bit = bit + 1 & last
            yield events.word.write(word if bit else word + 1 & last)
            yield events.bit.write(bit)
            if not bit:
                break
        if word != start_word or not first:
            selected &= ~(1 << word)
        word = word + 1 & last
        first = False


def xen_evtchn_do_upcall(info: SharedInfo, cpu: int, events: CpuEvents, handle: Handle) -> Thread:
    """Linux 6.1: scan, and again for as long as Xen has set evtchn_upcall_pending meanwhile."""
    pending = info.vcpus[cpu].upcall_pending
    while True:
        yield pending.write(0).saying("clears evtchn_upcall_pending")
        yield from evtchn_2l_handle_events(info, cpu, events, handle)
        if not (yield pending.read().saying("looks whether an upcall is due again")):
            return


def cpu_loop(info: SharedInfo, cpu: int, upcall: Callable[[], Thread]) -> Thread:
    """A CPU that does nothing but wait for upcalls."""
    while True:
        yield info.vcpus[cpu].upcall_pending.wait(bool).saying("waits for an upcall")
        yield from upcall()


def return_to_guest(info: SharedInfo, cpu: int, upcall: Callable[[], Thread]) -> Thread:
    """Where Xen goes back to the guest, or an interrupt may come: call it, if an event is due and it lets them in.
    The upcall runs with events off, and its iret lets them in again."""
    vcpu = info.vcpus[cpu]
    while True:
        pending, masked = yield look((vcpu.upcall_pending, vcpu.upcall_mask), text="may be interrupted here")
        if not pending or masked:
            return
        yield vcpu.upcall_mask.write(1).saying("is interrupted by an upcall")
        yield from upcall()
        yield vcpu.upcall_mask.write(0).saying("returns from the upcall")


def lost_ports(values: Sequence[int], info: SharedInfo) -> list[int]:
    """Ports that are pending and not masked, by the values of the words of `info.pending` and then `info.mask`."""
    words = len(info.pending)
    return [
        port
        for port in range(info.ports)
        for word, bit in [info.at(port)]
        if values[word] >> bit & 1 and not values[words + word] >> bit & 1
    ]


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1

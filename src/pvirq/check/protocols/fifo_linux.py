"""FIFO event channels as Linux consumes them (drivers/xen/events/events_fifo.c, 6.1), one access at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pvirq.abi.event_channel import EVTCHN_FIFO_LINK_MASK
from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols.fifo import Fifo, Queue
from pvirq.check.steps import Kind, Step, Thread, Var, fail
from pvirq.xen.evtchn_fifo import BUSY, LINKED, MASKED, PENDING

Handler = Callable[[int], Thread]
Heads = dict[int, int]  # by priority; what a CPU keeps for itself


def clear_linked(fifo: Fifo, port: int, queue: Queue) -> Thread:
    """clear_linked(): unlink a port that was met on a queue; the result is what it was linked to."""
    word = fifo.word[port]
    seen = yield word.read()
    while True:
        found, last = yield _unlink(fifo, port, seen)
        if found == seen:
            if last != queue and found & LINKED and fifo.watch:
                fail(f"takes port {port} from queue {queue[0]}/{queue[1]}, and it is linked in {last[0]}/{last[1]}")
            return found & EVTCHN_FIFO_LINK_MASK
        seen = found


def _unlink(fifo: Fifo, port: int, seen: int) -> Step:
    """The cmpxchg, which with `Fifo.watch` tells as well which queue Xen has the port on at that moment."""
    word, watched = fifo.word[port], fifo.last_queue(port) if fifo.watch else ()

    def do(found: int, *last: Any) -> tuple[tuple[int], tuple[int, Any]]:
        new = seen & ~(LINKED | EVTCHN_FIFO_LINK_MASK) if found == seen else found
        return (new,), (found, last[0] if len(last) == 1 else last)

    return Step(Kind.ATOMIC, (word, *watched), (word,), do, text=f"unlinks port {port}, if its word is as it was")


def consume_one_event(fifo: Fifo, cpu: int, priority: int, heads: Heads, handle: Handler) -> Thread:
    """consume_one_event(): whether the queue is empty after it."""
    port = heads[priority]
    if not port:
        # Its tail was reached last time: there is a new head.
        port = yield fifo.head[cpu, priority].read().saying(f"reads the head of queue {cpu}/{priority}")
    link = yield from clear_linked(fifo, port, (cpu, priority))
    pending = (yield fifo.word[port].read().saying(f"looks whether port {port} is pending")) & PENDING
    if pending and not (yield fifo.word[port].read().saying(f"looks whether port {port} is masked")) & MASKED:
        yield from handle(port)
    heads[priority] = link
    return not link


def handle_events(fifo: Fifo, cpu: int, heads: Heads, handle: Handler) -> Thread:
    """__evtchn_fifo_handle_events(): consume this CPU's queues, the highest priority first, until none is ready."""
    ready = yield fifo.ready[cpu].xchg(0).saying("takes all READY bits")
    while ready:
        priority = (ready & -ready).bit_length() - 1
        if (yield from consume_one_event(fifo, cpu, priority, heads, handle)):
            ready &= ~(1 << priority)
        ready |= yield fifo.ready[cpu].xchg(0).saying("takes all READY bits")


def do_upcall(fifo: Fifo, cpu: int, heads: Heads, handle: Handler) -> Thread:
    """One turn of __xen_evtchn_do_upcall()."""
    yield fifo.upcall_pending[cpu].write(0).saying("takes the upcall")
    yield from handle_events(fifo, cpu, heads, handle)


def idle(fifo: Fifo, cpu: int, handle: Handler) -> Thread:
    """A CPU that does nothing but block and take upcalls: a thread that `may_wait`."""
    heads: Heads = dict.fromkeys(fifo.priorities, 0)
    while True:
        yield fifo.upcall_pending[cpu].wait(bool).saying("is blocked until an upcall is pending (SCHEDOP_block)")
        yield from do_upcall(fifo, cpu, heads, handle)


def unmask(fifo: Fifo, port: int) -> Thread:
    """evtchn_fifo_unmask(): in place, or by hypercall where it is pending, for then Xen has to link it."""
    word = fifo.word[port]
    seen = yield word.read()
    while True:
        if not seen & MASKED:
            return
        if seen & PENDING:
            yield from xen.unmask(fifo, port)
            return
        old = seen & ~BUSY
        seen = yield word.cmpxchg(old, old & ~MASKED).saying(f"clears MASKED of port {port}, if nothing else is set")
        if seen == old:
            return
        if seen & BUSY:
            seen = yield word.wait(lambda value: not value & BUSY)  # the source spins


def unmask_twice(fifo: Fifo, port: int) -> Thread:
    """evtchn_fifo_unmask() before f01337197419 (5.10): in place, and by hypercall as well where it is pending then."""
    word = fifo.word[port]
    seen = yield word.read()
    while True:
        old = seen & ~BUSY
        seen = yield word.cmpxchg(old, old & ~MASKED).saying(f"clears MASKED of port {port}")
        if seen == old:
            break
        if seen & BUSY:
            seen = yield word.wait(lambda value: not value & BUSY)
    if (yield word.read()) & PENDING:
        yield from xen.unmask(fifo, port)


# -- handlers ----------------------------------------------------------------------------------------------------------


def edge(fifo: Fifo) -> Handler:
    """handle_edge_irq() so far as the event word goes: acknowledge, then look what there is to do."""

    def handle(port: int) -> Thread:
        yield fifo.word[port].update(lambda value: value & ~PENDING, f"acknowledges port {port}, and handles it")

    return handle


def counting(fifo: Fifo, handled: list[Var]) -> Handler:
    """As `edge`, noting in `handled[port]` that it was done."""

    def handle(port: int) -> Thread:
        yield fifo.word[port].update(lambda value: value & ~PENDING, f"acknowledges port {port}")
        yield handled[port].write(1).saying(f"handles port {port}")

    return handle


def lateeoi(fifo: Fifo, handling: Var | None = None, unmask: Callable[[Fifo, int], Thread] = unmask) -> Handler:
    """handle_fasteoi_irq() of a lateeoi event: masked and acknowledged, handled (1 in `handling`), unmasked again."""

    def handle(port: int) -> Thread:
        yield fifo.word[port].update(lambda value: value | MASKED, f"masks port {port}")
        yield fifo.word[port].update(lambda value: value & ~PENDING, f"acknowledges port {port}, and handles it")
        if handling is not None:
            yield handling.write(1).saying(f"begins to handle port {port}")
            yield handling.write(0).saying(f"is done with port {port}, but for its EOI")
        yield from unmask(fifo, port)

    return handle

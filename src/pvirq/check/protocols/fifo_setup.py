"""Control blocks and pages of event words as Xen takes them from a guest (xen/common/event_fifo.c), 4.15 and later."""

from __future__ import annotations

from pvirq.check.protocols.fifo import MAPPED, Fifo, set_pending
from pvirq.check.steps import Thread, mb, wmb


def map_control_block(fifo: Fifo, vcpu: int, *, block_first: bool = False) -> Thread:
    """map_control_block(), of a Fifo with `late_control`. `block_first`: as before c5e63651fd."""
    assert fifo.control_block is not None
    if block_first:
        yield fifo.control_block[vcpu].write(MAPPED)
    for priority in fifo.priorities:
        yield fifo.queue_head[vcpu, priority].write(MAPPED)
    if not block_first:
        yield wmb()
        yield fifo.control_block[vcpu].write(MAPPED)


def add_page_to_event_array(fifo: Fifo, *, barrier: bool = True, second_look: bool = False) -> Thread:
    """add_page_to_event_array(): the first page, of a Fifo with `late_array`; then what was raised before it came.

    `barrier`: the one between the page and the number of words, since e7719a0dfa. `second_look`: see `set_pending`.
    """
    assert fifo.num_evtchns is not None
    assert fifo.event_array is not None
    yield fifo.event_array.write(MAPPED)
    if barrier:
        yield wmb()
    yield fifo.num_evtchns.write(len(fifo.word))
    if second_look:
        yield mb()
    for port in fifo.ports:
        if (yield fifo.pending[port].read().saying(f"looks whether port {port} was raised before it had a word")):
            vcpu = yield fifo.notify_vcpu[port].read()
            yield from set_pending(fifo, vcpu, port, second_look=second_look)

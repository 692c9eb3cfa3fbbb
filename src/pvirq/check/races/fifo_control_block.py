"""The control block is there for who sends, the pointers to its queues' heads are not."""

from functools import partial

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols.fifo_setup import map_control_block
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    model = Model("weak")
    fifo = xen.Fifo(model, ports=1, vcpus=1, priorities=(6, 7), late_control=True)
    assert fifo.control_block is not None
    late = [fifo.control_block[0], *fifo.queue_head.values()]
    for variable in model.variables:
        variable.coherent = variable not in late
    for variable in late:
        variable.initial = 0
    fifo.bound(1, 0, priority=7, last=(0, 7))
    model.thread("hypercall", partial(map_control_block, fifo, 0, block_first=fault))
    model.thread("sender", xen.send, fifo, 1)
    model.thread("guest", linux.idle, fifo, 0, linux.edge(fifo), may_wait=True)
    model.at_end(fifo.stuck)
    return model


RACE = Race(
    name="fifo-control-block",
    title="a control block is there for who sends before the pointers to its queues' heads are",
    where="Xen 4.4-4.14, xen/common/event_fifo.c: map_control_block()",
    brought="a4e0cea6fc (4.5)",
    cured="c5e63651fd (XSA-358, 4.15)",
    story=(
        "evtchn_fifo_set_pending() drops an event for a vCPU whose control block isn't there, and else writes through "
        "its queue's pointer to HEAD. The pointer to the block was stored first, those to its heads after it: a guest "
        "that unmasks a port of that vCPU too early has Xen write through a null pointer. The cure stores the block "
        "last, behind a write barrier; on the other side a locked instruction stands between."
    ),
    model=model,
)

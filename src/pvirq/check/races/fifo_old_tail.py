"""The tail of an empty queue is linked again, here or elsewhere, and taken for a tail that is in use."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols import fifo_old as old
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=2, priorities=(6, 7))

    def sender(*ports: int) -> Thread:
        yield from xen.send(fifo, *ports, to=old.set_pending_first if fault else xen.set_pending)

    model.thread("guest", linux.idle, fifo, 0, linux.edge(fifo), may_wait=True)
    model.thread("sender", sender, 1, 1)
    model.thread("another", sender, 2)
    model.thread("hypercall", xen.set_priority, fifo, 1, 7)
    model.at_end(fifo.stuck)
    if not fault:
        model.at_end(fifo.malformed)  # before, nobody noted which queue a port was on
    return model


RACE = Race(
    name="fifo-old-tail",
    title="the tail of an empty queue is linked again and taken for one in use",
    where="Xen 4.4 before its release, xen/common/event_fifo.c: evtchn_fifo_set_pending()",
    brought="88910061ec (4.4)",
    cured="e33d4257fc (4.4)",
    story=(
        "A port stays its queue's tail when the guest has emptied the queue; that its LINKED bit is clear tells so. "
        "That bit was set again without the lock: another port raised meanwhile is linked behind the old tail, which "
        "nobody will come to, or into another queue if the old tail has moved there. Those events are lost. The cure "
        "notes which queue a port was last on, sets LINKED under that queue's lock, and forgets it there as the tail."
    ),
    model=model,
)

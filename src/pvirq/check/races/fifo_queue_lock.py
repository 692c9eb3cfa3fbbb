"""Two CPUs raise one event whose queue has changed, and it is linked to itself."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols import fifo_old as old
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=1, priorities=(6, 7))

    def sender(*ports: int) -> Thread:
        if fault:
            yield from xen.send(fifo, *ports, to=old.set_pending, split=False)
        else:
            yield from xen.send(fifo, *ports)

    model.thread("guest", linux.idle, fifo, 0, linux.edge(fifo), may_wait=True)
    model.thread("sender", sender, 1, 1)
    model.thread("another", sender, 1)
    model.thread("hypercall", xen.set_priority, fifo, 1, 7)
    model.at_end(fifo.lost)
    if not fault:
        model.at_end(fifo.stuck)
        model.at_end(fifo.malformed)
    return model


RACE = Race(
    name="fifo-queue-lock",
    title="two CPUs raise one event whose queue changes, and it is linked to itself",
    where="Xen 4.15 before its release, xen/common/event_fifo.c: lock_old_queue()",
    brought="1277cb9dc5 (4.15); since 5f2df45ead (4.15) two CPUs may raise one event",
    cured="71ac522909 (4.15)",
    story=(
        "evtchn_fifo_set_pending() takes the lock of the queue that the port was last on, and looks again whether it "
        "still is. What it looked at was its own copy. Another CPU may have put the port on its new queue and the "
        "guest may have consumed it in between: then nobody notes that the port is that queue's old tail, and it is "
        "linked behind itself. It is no queue's head and READY isn't set, so the guest blocks for ever. The cure takes "
        "the locks of both queues, and reads again which they are, before it touches the event word."
    ),
    model=model,
)

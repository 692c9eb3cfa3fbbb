"""The queue that a port is put on isn't the one that is noted."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols import fifo_old as old
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=2, priorities=(5, 6, 7), split=True, watch=True)
    fifo.bound(1, 0, priority=6, last=(0, 7))
    fifo.bound(2, 0, priority=6, last=(0, 6))

    def sender(*ports: int) -> Thread:
        yield from xen.send(fifo, *ports, to=old.set_pending, stable=not fault)

    model.thread("guest", linux.idle, fifo, 0, linux.edge(fifo), may_wait=True)
    model.thread("sender", sender, 1, 1)
    model.thread("another", sender, 2)
    model.thread("hypercall", xen.set_priority, fifo, 1, 5)
    model.at_end(fifo.stuck)
    model.at_end(fifo.malformed)
    return model


RACE = Race(
    name="fifo-last-queue-unstable",
    title="a port is put on one queue, and another one is noted",
    where="Xen 4.4-4.14, xen/common/event_fifo.c: evtchn_fifo_set_pending()",
    brought="e33d4257fc (4.4)",
    cured="6f6f07b64c (4.15)",
    story=(
        "Which queue a port was put on was noted from its priority and its vCPU as they are then. The queue itself was "
        "chosen a little earlier, and no lock keeps the guest from changing both in between. What is noted is a queue "
        "that the port isn't on; the next time its old tail is looked for there, and the queue that really has it as "
        "old tail gets a port linked into another queue (as fifo-old-tail has it). The cure notes the queue's own."
    ),
    model=model,
)

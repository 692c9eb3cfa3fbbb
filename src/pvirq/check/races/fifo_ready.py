"""READY is set for an event that isn't a head: the guest follows an old one into another queue."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=2, vcpus=2, watch=True)

    def sender(*ports: int) -> Thread:
        yield from xen.send(fifo, *ports, ready_always=fault)

    for cpu in fifo.vcpus:
        model.thread(f"vCPU {cpu}", linux.idle, fifo, cpu, linux.edge(fifo), may_wait=True)
    model.thread("sender", sender, 1, 1)
    model.thread("another", sender, 2)
    model.thread("hypercall", xen.bind_vcpu, fifo, 1, 1)
    model.at_end(fifo.stuck)
    model.at_end(fifo.malformed)
    return model


RACE = Race(
    name="fifo-ready",
    title="READY for an event that is no head: the guest follows an old head into another queue",
    where="Xen 4.4 before its release, xen/common/event_fifo.c: evtchn_fifo_set_pending()",
    brought="88910061ec (4.4)",
    cured="70ccddb14a (4.4)",
    story=(
        "READY was set for each event put on a queue, after it was linked. The guest may have come to that event by "
        "its link and emptied the queue before. Then READY makes it read HEAD, which still names the port that was "
        "head before; if that one has moved to another queue, the guest takes it from there, on the wrong vCPU or "
        "priority, and what is linked behind it. The cure sets READY where HEAD was written, and only there."
    ),
    model=model,
)

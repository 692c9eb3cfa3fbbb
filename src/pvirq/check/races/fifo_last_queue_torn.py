"""The queue that a port was last on is read while it is written: half of it is old."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols import fifo_old as old
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=1, vcpus=2, priorities=(6, 7), split=fault)

    def move() -> Thread:
        yield from xen.bind_vcpu(fifo, 1, 1)
        yield from xen.set_priority(fifo, 1, 7)

    def sender() -> Thread:
        yield from xen.send(fifo, 1, to=old.set_pending if fault else xen.set_pending)

    for cpu in fifo.vcpus:
        model.thread(f"vCPU {cpu}", linux.idle, fifo, cpu, linux.edge(fifo), may_wait=True)
    model.thread("sender", sender)
    model.thread("another", sender)
    model.thread("hypercall", move)
    model.at_end(fifo.stuck)
    if not fault:
        model.at_end(fifo.malformed)
    return model


RACE = Race(
    name="fifo-last-queue-torn",
    title="the queue that a port was last on is half old when it is read",
    where="Xen 4.4-4.14, xen/common/event_fifo.c: lock_old_queue()",
    brought="e33d4257fc (4.4); with de6acb78bf (4.6) two CPUs may raise one event, one of them by unmasking it",
    cured="1277cb9dc5 (4.15), which forgot to read it again after locking: 71ac522909 (4.15)",
    story=(
        "vCPU and priority of the queue that a port was last on were two fields. A CPU that reads one before and one "
        "after another CPU writes them takes the lock of a queue that the port was never on, and while the other CPU "
        "is in between, finds the same when it looks again. It then doesn't see that the port is the old tail of the "
        "queue that it is to be put on, and links it behind itself: the guest never sees it again. The cure keeps both "
        "in one word. (The cured model is Xen's code since 71ac522909: 1277cb9dc5 alone has fifo-queue-lock.)"
    ),
    model=model,
)

"""A vCPU that polls is woken for an event that is on no queue yet."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols import fifo_old as old
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, fail


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=2, split=fault)
    handled = model.array("handled", 3)
    handle = linux.counting(fifo, handled)

    def guest() -> Thread:
        heads = {xen.DEFAULT: 0}
        woken = yield from xen.poll(fifo, 0, 1)
        yield from linux.do_upcall(fifo, 0, heads, handle)
        if woken and not (yield handled[1].read()):
            fail("it is woken by port 1, which it polls, and finds it on no queue")
        while True:
            yield fifo.upcall_pending[0].wait(bool).saying("is blocked until an upcall is pending (SCHEDOP_block)")
            yield from linux.do_upcall(fifo, 0, heads, handle)

    def sender(*ports: int) -> Thread:
        if fault:
            yield from xen.send(fifo, *ports, to=old.set_pending, polled=True)
        else:
            yield from xen.send(fifo, *ports, polled=True)

    model.thread("guest", guest, may_wait=True)
    model.thread("sender", sender, 1)
    model.thread("another", sender, 1, 2)
    model.at_end(fifo.stuck)
    return model


RACE = Race(
    name="fifo-poll-wake",
    title="a vCPU that polls is woken for an event that is on no queue yet",
    where="Xen 4.4-4.14, xen/common/event_fifo.c: evtchn_fifo_set_pending()",
    brought="88910061ec (4.4); common since 5f2df45ead (4.15)",
    cured="71ac522909 (4.15)",
    story=(
        "PENDING and LINKED were set without a common lock. Who sets PENDING first wakes who polls, also where another "
        "CPU has set LINKED before it and is still putting the event on its queue. The guest is woken, looks through "
        "its queues, and the event isn't there; the CPU that links it wakes no poller, for PENDING was set before. "
        "With the cure PENDING is set, and the event linked, under the lock of the queue."
    ),
    model=model,
)

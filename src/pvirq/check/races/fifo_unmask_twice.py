"""A port is unmasked twice, and the second time another CPU is handling its next event."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.race import Race
from pvirq.check.steps import Model
from pvirq.xen.evtchn_fifo import MASKED


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=1, vcpus=2)
    # Port 1 has moved to vCPU 1 while vCPU 0 handled its last event; the EOI of that one is still to come.
    fifo.bound(1, 1, xen.DEFAULT, last=(0, xen.DEFAULT))
    fifo.word[1].initial = MASKED
    handling = model.var("handling")
    unmask = linux.unmask_twice if fault else linux.unmask
    model.thread("vCPU 0", unmask, fifo, 1)
    model.thread("vCPU 1", linux.idle, fifo, 1, linux.lateeoi(fifo, handling, unmask), may_wait=True)
    model.thread("sender", xen.send, fifo, 1, 1)
    model.invariant(
        "port 1 is unmasked while its event is being handled",
        (handling, fifo.word[1]),
        lambda handled_now, word: not handled_now or bool(word & MASKED),
    )
    model.at_end(fifo.stuck)
    model.at_end(fifo.malformed)
    return model


RACE = Race(
    name="fifo-unmask-twice",
    title="a port is unmasked twice, the second time while another CPU handles its next event",
    where="Linux 3.14-5.9, drivers/xen/events/events_fifo.c: evtchn_fifo_unmask()",
    brought="3.14; it matters since 54c9de89895e (5.10) masks an event until its EOI",
    cured="f01337197419 (XSA-332, 5.10)",
    story=(
        "Unmasking cleared MASKED in place, and then looked whether the port is pending, for then Xen has to link it: "
        "that hypercall clears MASKED as well. In between the next event may have come to another CPU, which has "
        "masked the port to handle it; and one more that makes it pending. Then the hypercall takes the other CPU's "
        "mask away, and with it what holds off a storm. The cure clears MASKED in place only if nothing is pending."
    ),
    model=model,
)

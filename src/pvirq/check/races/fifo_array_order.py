"""The number of event words is seen before the page that they are in."""

from functools import partial

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols.fifo_setup import add_page_to_event_array
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    model = Model("weak")
    fifo = xen.Fifo(model, ports=2, late_array=True)
    for variable in model.variables:
        variable.coherent = variable not in (fifo.num_evtchns, fifo.event_array)
    model.thread("hypercall", partial(add_page_to_event_array, fifo, barrier=not fault))
    for port in fifo.ports:
        model.thread(f"sender of {port}", partial(xen.send, fifo, port, barrier=not fault))
    return model


RACE = Race(
    name="fifo-array-order",
    title="the number of event words is seen before the page that they are in",
    where="Xen 4.4-4.9, xen/common/event_fifo.c: evtchn_fifo_word_from_port(), add_page_to_event_array()",
    brought="88910061ec (4.4); without the domain's lock on the other side since de6acb78bf (4.6)",
    cured="e7719a0dfa (XSA-221, 4.10)",
    story=(
        "Who sends looks whether the port is below the number of words, and then for the page. Nothing kept the "
        "compiler or a CPU from storing, or loading, these two the other way round, and a null pointer was followed. "
        "The cure has a barrier on each side. On x86 CPUs alone wouldn't do it."
    ),
    model=model,
)

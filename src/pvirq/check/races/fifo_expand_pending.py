"""An event raised while its event word comes is kept where nobody looks any more."""

from functools import partial

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_linux as linux
from pvirq.check.protocols.fifo_setup import add_page_to_event_array
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread
from pvirq.xen.evtchn_fifo import PENDING

UNHEARD = "lost event: port 1 was raised, and the guest never hears of it"


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=1, late_array=True)
    work, done = model.var("work"), model.var("done")

    def sender() -> Thread:
        yield work.add(1)
        yield from xen.send(fifo, 1, second_look=not fault)

    def handle(port: int) -> Thread:
        yield fifo.word[port].update(lambda value: value & ~PENDING, f"acknowledges port {port}")
        seen = yield work.read()
        yield done.write(seen)

    model.thread("hypercall", partial(add_page_to_event_array, fifo, second_look=not fault))
    model.thread("sender", sender)
    model.thread("another", sender)
    model.thread("guest", linux.idle, fifo, 0, handle, may_wait=True)
    model.at_end(lambda end: UNHEARD if end[done] != end[work] else None)
    model.at_end(fifo.stuck)
    return model


RACE = Race(
    name="fifo-expand-pending",
    title="an event raised while its event word comes is kept where nobody looks any more",
    where="Xen 4.4 and later, xen/common/event_fifo.c: evtchn_fifo_set_pending(), add_page_to_event_array()",
    brought="917c123029 (4.4); without the domain's lock on the other side since de6acb78bf (4.6)",
    cured="not in Xen's history up to 3a6cb6aae4 (August 2026)",
    story=(
        "An event whose port has no event word yet is noted in Xen's own structure, and raised when the page comes. "
        "Who sends finds no word; then the page is added, and what was noted is raised; then the event is noted. "
        "Nobody looks again: the event is lost. What cures the model isn't in Xen: who has noted an event looks for "
        "the word a second time, behind a full barrier, and the other side has one between the page and its look."
    ),
    model=model,
)

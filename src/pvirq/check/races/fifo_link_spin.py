"""A guest that keeps changing an event word holds up who links to it."""

from pvirq.check.protocols import fifo as xen
from pvirq.check.protocols import fifo_old as old
from pvirq.check.race import Race
from pvirq.check.steps import Model, Step, Thread, Var, choose
from pvirq.xen.evtchn_fifo import LINKED, MASKED, PENDING

CHANGES = 7


def change(word: Var, bit: int) -> Step:
    return word.update(lambda value: value ^ bit, "changes the tail's word under Xen's hands")


def model(fault: bool) -> Model:
    model = Model()
    fifo = xen.Fifo(model, ports=2)
    word = fifo.word[1]
    word.initial = PENDING | LINKED
    fifo.tail[0, xen.DEFAULT].initial = 1

    def hostile() -> Thread:
        for _ in range(CHANGES):
            bit = (MASKED, PENDING, LINKED)[(yield choose(3, "chooses a bit of the tail's word"))]
            yield change(word, bit)

    def sender() -> Thread:
        yield from xen.send(fifo, 2, set_link=old.set_link_spinning if fault else xen.set_link)

    model.thread("guest", hostile)
    model.thread("sender", sender)
    if not fault:
        model.at_end(lambda end: "a queue's lock stays taken" if end[fifo.lock[0, xen.DEFAULT].var] else None)
    return model


RACE = Race(
    name="fifo-link-spin",
    title="a guest that keeps changing an event word holds up for ever who links to it",
    where="Xen 4.4 before its release, xen/common/event_fifo.c: evtchn_fifo_set_link()",
    brought="88910061ec (4.4)",
    cured="dae2a1c5f9 (4.4)",
    story=(
        "The tail's word is linked to the new event by a cmpxchg that is repeated while the word changes. It is the "
        "guest's word: a guest that writes it all the time keeps the CPU of another domain, which sends it an event, "
        "in that loop with a spinlock held. The cure sets a BUSY bit, while which a guest must not unmask; then an "
        "honest one can make at most four more changes, and after four more attempts the event is given up."
    ),
    model=model,
)

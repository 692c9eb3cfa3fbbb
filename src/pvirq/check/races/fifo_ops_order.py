"""The port operations of the FIFO ABI are seen before the structure that they use."""

from pvirq.check.protocols.fifo import MAPPED
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, fail, rmb, wmb

TWO_LEVEL, FIFO = 0, 1


def model(fault: bool) -> Model:
    model = Model("weak")
    port_ops = model.var("evtchn_port_ops", TWO_LEVEL)
    evtchn_fifo = model.var("evtchn_fifo")
    control_block = model.var("control_block")

    def init_control() -> Thread:
        yield evtchn_fifo.write(MAPPED)
        if not fault:
            yield wmb()  # map_control_block() has it
        yield control_block.write(MAPPED)
        yield port_ops.write(FIFO)

    def sender() -> Thread:
        if (yield port_ops.read()) == FIFO:
            if not fault:
                yield rmb()
            if not (yield evtchn_fifo.read().saying("looks up evtchn_fifo")):
                fail("uses the domain's evtchn_fifo, which isn't set for it")

    model.thread("hypercall", init_control)
    model.thread("sender", sender)
    model.thread("another", sender)
    return model


RACE = Race(
    name="fifo-ops-order",
    title="the FIFO port operations are seen before the structure that they use",
    where="Xen 4.4-4.14, xen/common/event_fifo.c: evtchn_fifo_word_from_port(), evtchn_fifo_init_control()",
    brought="88910061ec (4.4)",
    cured="dc8b01affd (XSA-359, 4.15), with the write barrier of c5e63651fd",
    story=(
        "A domain's first control block sets evtchn_fifo and then the port operations. Who sends holds no lock that "
        "orders these for it: where stores or loads pass each other it calls the new operations and finds no "
        "evtchn_fifo, a null pointer. The cure loads in order, and has a write barrier in between on the other side."
    ),
    model=model,
)

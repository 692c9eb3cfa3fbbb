"""The event array grows while a reset takes it away."""

from pvirq.check.protocols.fifo import MAPPED
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, fail


def model(fault: bool) -> Model:
    model = Model()
    evtchn_fifo = model.var("evtchn_fifo", MAPPED)
    event_lock = model.lock("event_lock")

    def expand_array() -> Thread:
        if fault and not (yield evtchn_fifo.read()):
            return  # EOPNOTSUPP
        yield event_lock.acquire()
        if (fault or (yield evtchn_fifo.read())) and not (yield evtchn_fifo.read().saying("looks for a free slot")):
            fail("uses the domain's evtchn_fifo, which a reset has freed")
        yield event_lock.release()

    def reset() -> Thread:
        yield event_lock.acquire()
        if (yield evtchn_fifo.read()):
            yield evtchn_fifo.write(0).saying("frees evtchn_fifo, and goes back to the 2-level ABI")
        yield event_lock.release()

    def init_control() -> Thread:
        yield event_lock.acquire()
        if not (yield evtchn_fifo.read()):
            yield evtchn_fifo.write(MAPPED)
        yield event_lock.release()

    model.thread("expand_array", expand_array)
    model.thread("another expand_array", expand_array)
    model.thread("reset", reset)
    model.thread("init_control", init_control)
    return model


RACE = Race(
    name="fifo-expand-reset",
    title="the event array grows while a reset takes it away",
    where="Xen since 4.5, xen/common/event_fifo.c: evtchn_fifo_expand_array()",
    brought="400b3bd642 (4.5)",
    cured="0e9d647aca (XSA-505, 4.23)",
    story=(
        "EVTCHNOP_expand_array looked whether the domain uses the FIFO ABI, and then took the domain's event lock. "
        "Since a reset goes back to the 2-level ABI, it may do so in between, under that lock: the page is then added "
        "to a structure that has been freed. The cure looks with the lock held."
    ),
    model=model,
)

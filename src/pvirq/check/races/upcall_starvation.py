"""An upcall that serves the lowest port first: a busy one starves all others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import le

from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, evtchn_send, shared_info
from pvirq.check.protocols.upcall import CpuEvents, Handle, cpu_events, cpu_loop, lowest_first, round_robin
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread, Var, atomically

PORTS = 3
WORD_BITS = 2
BUSY = 0  # the port whose peer sends its next event as soon as the last one is served
ANSWERS = 5  # such events
MOST = 3  # others that an event may have to wait for

Loop = Callable[[SharedInfo, int, CpuEvents, Handle], Thread]


def starvation(loop: Loop, patient: int, *, last: bool = False) -> Model:
    """A busy port, one whose event comes some time and waits (`patient`), and a third with an event from the beginning.
    `last`: as in `cpu_events`."""
    model = Model()
    (third,) = {*range(PORTS)} - {BUSY, patient}
    info = shared_info(model, ports=PORTS, word_bits=WORD_BITS, pending=1 << third)
    events = cpu_events(model, info, 0, last=last)
    served = model.var("served")  # of the busy port
    waited = model.var("waited", -1)  # others served since the patient port's event came; -1: there is none

    def handle(port: int) -> Thread:
        yield from clear_evtchn(info, port)
        if port == patient:
            yield waited.write(-1).saying(f"serves port {port} at last")
            return
        if (others := (yield waited.read().saying(f"serves port {port}"))) >= 0:
            assert others < MOST, f"port {patient} has waited for {MOST} others, and waits on"
            yield waited.write(others + 1)
        if port == BUSY:
            yield served.add(1)

    model.thread("CPU", cpu_loop, info, 0, lambda: loop(info, 0, events, handle), may_wait=True)
    model.thread(f"peer {BUSY}", _busy, info, served)
    model.thread(f"peer {patient}", _patient, info, waited, patient)

    def judge(end: End) -> str | None:
        return f"port {patient} is never served" if end[waited] >= 0 else None

    model.at_end(judge)
    return model


def model(fault: bool) -> Model:
    return starvation(lowest_first if fault else round_robin, patient=1, last=not fault)


def _busy(info: SharedInfo, served: Var) -> Thread:
    for number in range(ANSWERS):
        yield served.wait(partial(le, number)).saying("waits until its last event is served")
        yield from evtchn_send(info, BUSY)


def _patient(info: SharedInfo, waited: Var, port: int) -> Thread:
    word, bit = info.at(port)
    yield from evtchn_send(info, port)
    # From here on it counts: while Xen is about to notify it, others come first as they like.
    yield atomically(
        (info.pending[word], waited),
        lambda pending, others: (pending, 0 if pending >> bit & 1 else others),
        text=f"has sent its event to port {port}",
    )


RACE = Race(
    name="upcall-starvation",
    title="the upcall goes on at the lowest port, and a busy one starves those above it",
    where="Linux 2.6.18 (XenLinux), drivers/xen/core/evtchn.c: evtchn_do_upcall()",
    brought="",
    cured="linux-2.6.18-xen changeset 324",
    story=(
        "After each port the upcall looks at the word again from its lowest bit. A peer that sends its next event "
        "while the last one is handled is served again at once, for as long as it goes on, and ports above it in the "
        "word wait. The cure goes on behind the port served last: each of the others comes first a bounded number of "
        "times. (For ports in other words it is no cure: word-starvation.)"
    ),
    model=model,
)

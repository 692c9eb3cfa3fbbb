"""An upcall that serves the lowest port first: a busy one starves all others."""

from __future__ import annotations

from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, evtchn_send, notify_pending, shared_info
from pvirq.check.protocols.upcall import cpu_events, cpu_loop, lowest_first, round_robin
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread, Var, atomically

PORTS = 3
WORD_BITS = 2
BUSY = 0  # the port whose peer sends its next event as soon as the last one is served
ANSWERS = 5  # such events
EARLY = 1  # a port in the same word, whose event is there from the beginning
LATE = 2  # one in the next word, whose event comes some time
MOST = 2 * (PORTS - 1)  # others that an event may have to wait for


def model(fault: bool) -> Model:
    model = Model()
    info = shared_info(model, ports=PORTS, word_bits=WORD_BITS, pending=1 << EARLY)
    events = cpu_events(model, info, 0, last=not fault)
    served = model.var("served")
    # Of the event of a port: how many others were served meanwhile; -1: there is no event.
    waited = [model.var(f"waited[{port}]", 0 if port == EARLY else -1) for port in range(PORTS)]
    loop = lowest_first if fault else round_robin

    def handle(port: int) -> Thread:
        yield from clear_evtchn(info, port)
        yield waited[port].write(-1).saying(f"serves port {port}")
        for other in range(PORTS):
            if other not in (port, BUSY) and (others := (yield waited[other].read())) >= 0:
                assert others < MOST, f"port {other} has waited for {MOST} others, and waits on"
                yield waited[other].write(others + 1)
        if port == BUSY:
            yield served.add(1)

    model.thread("CPU", cpu_loop, info, 0, lambda: loop(info, 0, events, handle), may_wait=True)
    model.thread(f"peer {BUSY}", _busy, info, served)
    model.thread(f"peer {LATE}", _patient, info, waited[LATE], LATE)

    def judge(end: End) -> str | None:
        never = [port for port in range(PORTS) if end[waited[port]] >= 0]
        return f"port {never[0]} is never served" if never else None

    model.at_end(judge)
    return model


def _busy(info: SharedInfo, served: Var) -> Thread:
    for number in range(ANSWERS):
        yield served.wait(lambda count, number=number: count >= number).saying("waits until its last event is served")
        yield from evtchn_send(info, BUSY)


def _patient(info: SharedInfo, waited: Var, port: int) -> Thread:
    word, bit = info.at(port)
    yield atomically(
        (info.pending[word], waited), lambda pending, _: (pending | 1 << bit, 0), text=f"sets the pending bit of port {port}"
    )
    yield from notify_pending(info, 0, port)


RACE = Race(
    name="upcall-starvation",
    title="the upcall goes on at the lowest port, and a busy one starves those above it",
    where="Linux 2.6.18 (XenLinux), drivers/xen/core/evtchn.c: evtchn_do_upcall()",
    brought="",
    cured="linux-2.6.18-xen changeset 324",
    story=(
        "After each port the upcall looks at the word again from its lowest bit. A peer that sends its next event "
        "while the last one is handled is served again at once, for as long as it goes on, and ports above it in the "
        "word and all higher words wait. The cure goes on behind the port served last, and behind the last word at "
        "the next upcall: then each of the others comes first a bounded number of times."
    ),
    model=model,
)

"""A port that is unmasked after the look whether it is pending."""

from __future__ import annotations

from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, evtchn_send, shared_info, unmask_evtchn
from pvirq.check.protocols.upcall import CpuEvents, cpu_events, cpu_loop, lost_ports, xen_evtchn_do_upcall
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread

PORTS = 2


def model(fault: bool) -> Model:
    model = Model()
    info = shared_info(model, ports=PORTS, word_bits=2, masked=(1 << PORTS) - 1)
    events = cpu_events(model, info, 0)
    model.thread("CPU", _cpu, info, events, fault, may_wait=True)
    for port in range(PORTS):
        model.thread(f"peer {port}", evtchn_send, info, port)

    def judge(end: End) -> str | None:
        lost = lost_ports([end[each] for each in info.pending + info.mask], info)
        return f"port {lost[0]} is pending and unmasked, and no upcall will come" if lost else None

    model.at_end(judge)
    return model


def _cpu(info: SharedInfo, events: CpuEvents, look_first: bool) -> Thread:
    def handle(port: int) -> Thread:
        yield from clear_evtchn(info, port)

    for port in range(PORTS):
        yield from unmask_evtchn(info, port, 0, 0, look_first=look_first)
    yield from cpu_loop(info, 0, lambda: xen_evtchn_do_upcall(info, 0, events, handle))


RACE = Race(
    name="unmask-looks-first",
    title="an event comes between the look whether its port is pending and the port's unmasking",
    where="Linux 3.7-3.8, drivers/xen/events.c: unmask_evtchn()",
    brought="b5e579232d63 (3.7)",
    cured="c26377e62f4e (3.9)",
    story=(
        "Whoever unmasks a port has to see to an event that came while it was masked, for Xen has notified nobody of "
        "it. The look came first, for the sake of HVM guests: an event between it and the unmasking was neither seen "
        "there nor notified by Xen. Since the pending bit stays set, no later event of the port is. The cure unmasks "
        "first, and masks once more where Xen is to unmask."
    ),
    model=model,
)

"""A vCPU that looks for events before others can see that it blocks."""

from __future__ import annotations

from pvirq.check.protocols.blocking import vcpu_block_enable_events
from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, evtchn_send, shared_info
from pvirq.check.protocols.upcall import CpuEvents, cpu_events, lost_ports, lowest_first, return_to_guest
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread

PORTS = 2


def model(fault: bool) -> Model:
    model = Model(order="tso")
    info = shared_info(model, ports=PORTS, word_bits=2, send_lock=False)
    events = cpu_events(model, info, 0)
    model.thread("vCPU", _vcpu, info, events, not fault, may_wait=True)
    for port in range(PORTS):
        model.thread(f"peer {port}", evtchn_send, info, port)

    def judge(end: End) -> str | None:
        lost = lost_ports([end[each] for each in info.pending + info.mask], info)
        return f"the vCPU sleeps for ever, and port {lost[0]} is pending" if lost else None

    model.at_end(judge)
    return model


def _vcpu(info: SharedInfo, events: CpuEvents, barrier: bool) -> Thread:
    def handle(port: int) -> Thread:
        yield from clear_evtchn(info, port)

    while True:
        yield from vcpu_block_enable_events(info, 0, barrier=barrier)
        yield from return_to_guest(info, 0, lambda: lowest_first(info, 0, events, handle))


RACE = Race(
    name="block-barrier",
    title="Xen's look for events overtakes the flag that has senders wake the vCPU",
    where="Xen 4.14 on ARM, xen/common/schedule.c: vcpu_block()",
    brought="",
    cured="109e8177fd (4.15)",
    story=(
        "SCHEDOP_block sets the vCPU's flag that it is blocked, and then looks for events, so that who makes one "
        "pending later finds the flag. Where setting a bit is no barrier, as it isn't on ARM, the look may come "
        "first: the sender finds no flag, the vCPU no event, and it sleeps. The cure is a barrier between the two. "
        "(On x86 the bit is set by a locked instruction. The flag is a plain store here, which is enough for x86's "
        "order to show it.)"
    ),
    model=model,
)

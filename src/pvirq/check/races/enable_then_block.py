"""Enable events, then block: an event in between is handled, and its guest sleeps on the work that it brought."""

from __future__ import annotations

from pvirq.check.protocols.blocking import vcpu_block_enable_events
from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, evtchn_send, shared_info
from pvirq.check.protocols.upcall import (
    CpuEvents,
    cpu_events,
    lost_ports,
    lowest_first,
    return_to_guest,
)
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread, Var

PORTS = 2


def model(fault: bool) -> Model:
    model = Model()
    info = shared_info(model, ports=PORTS, word_bits=1, upcall_mask=1)
    events = cpu_events(model, info, 0)
    runnable = model.var("runnable")
    model.thread("guest", _guest, info, events, runnable, fault, may_wait=True)
    for port in range(PORTS):
        model.thread(f"peer {port}", evtchn_send, info, port)

    def judge(end: End) -> str | None:
        if end[runnable]:
            return "the guest sleeps for ever, and a thread of its is runnable"
        lost = lost_ports([end[each] for each in info.pending + info.mask], info)
        return f"the guest sleeps for ever, and port {lost[0]} is pending" if lost else None

    model.at_end(judge)
    return model


def _guest(info: SharedInfo, events: CpuEvents, runnable: Var, fault: bool) -> Thread:
    vcpu = info.vcpus[0]

    def handle(port: int) -> Thread:
        yield from clear_evtchn(info, port)
        yield runnable.write(1).saying(f"the handler of port {port} wakes a thread")

    def upcall() -> Thread:
        yield from lowest_first(info, 0, events, handle)

    while True:
        # Events are off, or the thread could be woken between the look and the sleep.
        if (yield runnable.read().saying("is a thread runnable?")):
            yield runnable.write(0).saying("runs the thread")
            continue
        if fault:
            yield vcpu.upcall_mask.write(0).saying("lets events in")
            yield from return_to_guest(info, 0, upcall)
        yield from vcpu_block_enable_events(info, 0)
        yield from return_to_guest(info, 0, upcall)
        yield vcpu.upcall_mask.write(1).saying("turns events off")


RACE = Race(
    name="enable-then-block",
    title="events are let in, and then the vCPU blocks, in two steps",
    where="Unikraft, plat/xen/lcpu.c: ukplat_lcpu_halt_irq()",
    brought="",
    cured="972f028270 (proposed in 2023; not merged)",
    story=(
        "The idle thread looks with events off whether a thread is runnable, lets events in, and blocks. An event that "
        "comes between the last two is handled there: its handler wakes a thread, and the block that follows finds "
        "nothing pending. SCHEDOP_block lets events in by itself, and looks for one after it has marked the vCPU "
        "blocked: the cure leaves it all to it."
    ),
    model=model,
)

"""Two domains' functions share one slot of xen_consumers[]."""

from __future__ import annotations

from pvirq.check.protocols.channels import alloc_unbound_xen_event_channel
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread

FUNCTIONS = ("default_xen_notification_fn", "monitor_notification", "mem_paging_notification")


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(consumer_cmpxchg=not fault))
    slots = m.array("xen_consumers", 3, "")
    domains = [xen.domain(domid, ports=2) for domid in (1, 2, 3)]

    def allocate(number: int) -> Thread:
        port = yield from alloc_unbound_xen_event_channel(domains[number], 0, slots, FUNCTIONS[number])
        assert port == 1

    for number, d in enumerate(domains):
        m.thread(f"a vCPU of d{d.domid}", allocate, number)

    def judge(end: End) -> str | None:
        for d, function in zip(domains, FUNCTIONS, strict=True):
            calls = end[slots[end[d.channels[1].xen_consumer] - 1]]
            if calls != function:
                return f"an event for d{d.domid} calls {calls}() instead of {function}()"
        return None

    m.at_end(judge)
    return m


RACE = Race(
    name="xen-consumer-slot",
    title="two functions that consume events in Xen get the same number",
    where="Xen 4.2-4.14, xen/common/event_channel.c: get_xen_consumer()",
    brought="af875b02aa (4.2)",
    cured="dcbd1d8ae5 (4.15)",
    story=(
        "A channel of Xen's own keeps a small number that stands for the function to call; functions are entered in "
        "xen_consumers[] as they are first used. Only the domain's event lock is held, so two domains may both see a "
        "free slot, enter different functions, and both take its number: the events of one go to the function of "
        "the other. The cure is a cmpxchg."
    ),
    model=model,
)

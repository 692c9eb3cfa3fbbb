"""An EOI that is given while the CPU of the handler isn't back from it, and the next event on another CPU."""

from __future__ import annotations

from pvirq.check.protocols.affinity import both_scanned, nothing_lost
from pvirq.check.protocols.linux_irq import Active, Code
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    # Either way without the race "eoi-stale-scan".
    setting = both_scanned(Code(True, Active.LOCKED, left_waits=not fault), sends=2)
    nothing_lost(setting)
    return setting.model


RACE = Race(
    name="eoi-in-progress",
    title="a handler is run once more for another CPU, and its port isn't masked until the EOI of that",
    where="Linux 5.10 and later, drivers/xen/events/events_base.c: lateeoi_mask_ack_dynirq()",
    brought="54c9de89895e (5.10), with late EOIs",
    cured="",
    story=(
        "A process gives its EOI while the CPU that ran the handler hasn't come back from it. Another CPU, to which "
        "the port has gone, takes an event, finds the handler running, masks the port and leaves the event to the "
        "first. That unmasks the port and runs the handler again; nothing masks it until the EOI of that run, and the "
        "next event has the handler run before it. Nobody has been seen to meet it, and it isn't cured. It is gone "
        "here where an event that is left keeps its mark, and masks its port until an EOI as well."
    ),
    model=model,
)

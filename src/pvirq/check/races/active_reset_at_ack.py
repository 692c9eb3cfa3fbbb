"""The first cure of one event on two CPUs, which takes the mark off an event too early."""

from __future__ import annotations

from pvirq.check.protocols.affinity import affinity_change
from pvirq.check.protocols.linux_irq import LINUX_5_12, LINUX_5_14
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    return affinity_change(LINUX_5_12 if fault else LINUX_5_14).model


RACE = Race(
    name="active-reset-at-ack",
    title="an event's mark that it is being handled goes away as it is acknowledged",
    where="Linux 5.12, drivers/xen/events/events_base.c: lateeoi_ack_dynirq()",
    brought="b6622798bc50 (5.12)",
    cured="3de218ff39b9 (5.14)",
    story=(
        "The mark that keeps two CPUs from handling one event is reset when the event is acknowledged, before its "
        "handler runs. The new CPU, which has read the bitmaps while the event was pending and looks at the mark "
        "after that, handles it again. Events with a late EOI keep the mark until then, since the second change."
    ),
    model=model,
)

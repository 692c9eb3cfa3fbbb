"""One event on two CPUs, as its affinity changes."""

from __future__ import annotations

from pvirq.check.protocols.affinity import affinity_change
from pvirq.check.protocols.linux_irq import LINUX_5_14, Active, Code
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    return affinity_change(Code(True, Active.NONE) if fault else LINUX_5_14).model


RACE = Race(
    name="two-cpus-one-event",
    title="a change of affinity has an event handled by the old CPU and by the new one",
    where="Linux 5.11, drivers/xen/events/events_base.c: handle_irq_for_port()",
    brought="54c9de89895e (5.10), with late EOIs",
    cured="b6622798bc50 (5.12), 3de218ff39b9 (5.14)",
    story=(
        "The old CPU has read the bitmaps, and hasn't acknowledged the event. The affinity changes: as the port is "
        "unmasked for the new CPU it is still pending, and notified there. Both handle it, and the handler runs again "
        "before it was told that the first run's event is done. The cure marks an event active when a CPU takes it, "
        "and has others leave it alone."
    ),
    model=model,
)

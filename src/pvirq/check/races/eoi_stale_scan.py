"""A CPU that has read the bitmaps long ago, and takes the event as its EOI is given."""

from __future__ import annotations

from pvirq.check.protocols.affinity import both_scanned, nothing_lost
from pvirq.check.protocols.linux_irq import LINUX_5_14, Active, Code
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    setting = both_scanned(LINUX_5_14 if fault else Code(True, Active.LOCKED), sends=1, warns=False)
    nothing_lost(setting)
    return setting.model


RACE = Race(
    name="eoi-stale-scan",
    title="an EOI resets is_active, a CPU that scanned before takes the event, and the EOI unmasks its port",
    where="Linux 5.14 and later, drivers/xen/events/events_base.c: xen_irq_lateeoi_locked(), handle_irq_for_port()",
    brought="3de218ff39b9 (5.14)",
    cured="",
    story=(
        "As the affinity changes two CPUs have found an event, and the old one handles it. The new one is held up "
        "before it looks at is_active, until the process gives the EOI. The EOI resets is_active; the new CPU takes "
        "the event (once more, which does no harm) and masks its port for that EOI; and the first EOI goes on and "
        "unmasks it. The next event comes while is_active is set, and is left alone; the second EOI finds the port "
        "unmasked, and Xen notifies nobody. Nobody has been seen to meet it, and it isn't cured. It is gone here "
        "where is_active is changed under the lock that the unmasking takes."
    ),
    model=model,
)

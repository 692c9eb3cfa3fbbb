"""A port that is unmasked while its EOI is still to come."""

from __future__ import annotations

from pvirq.check.protocols.affinity import affinity_change
from pvirq.check.protocols.linux_irq import LINUX_5_10, LINUX_5_14
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    # Nobody says EOI: what unmasks the port is none.
    setting = affinity_change(LINUX_5_10 if fault else LINUX_5_14, sends=1, user=False, warns=False)
    setting.model.invariant(
        "the port is unmasked while its EOI is pending",
        (setting.irq.enabled, setting.info.mask[0]),
        lambda enabled, mask: enabled or mask,
    )
    return setting.model


RACE = Race(
    name="unmask-eoi-pending",
    title="what masks a port for a moment unmasks it, and its EOI hasn't come",
    where="Linux 5.10-5.11, drivers/xen/events/events_base.c: mask_ack_dynirq(), enable_dynirq()",
    brought="54c9de89895e (5.10)",
    cured="25da4618af24 (5.12)",
    story=(
        "A port of a late-EOI event is masked from its acknowledgement to its EOI, so that a peer can't storm this "
        "domain. The one mask bit stands for all who want the port masked: when the affinity changes meanwhile and a "
        "second CPU meets the event, it masks the port and leaves the event to the first, which unmasks it to handle "
        "it, whatever the EOI. The cure keeps the reasons why a port is masked, and unmasks it with the last one."
    ),
    model=model,
)

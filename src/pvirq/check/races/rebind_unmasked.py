"""A port that is bound to another vCPU without being masked meanwhile."""

from __future__ import annotations

from pvirq.check.protocols.affinity import affinity_change, nothing_lost
from pvirq.check.protocols.linux_irq import LINUX_3_13
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    setting = affinity_change(LINUX_3_13, pending=False, sends=2, user=False, mask=not fault)
    nothing_lost(setting)
    return setting.model


RACE = Race(
    name="rebind-unmasked",
    title="an event comes between Xen's change of its vCPU and the guest's",
    where="Linux 3.13, drivers/xen/events.c: rebind_irq_to_cpu()",
    brought="",
    cured="4704fe4f03a5 (3.14)",
    story=(
        "EVTCHNOP_bind_vcpu has Xen notify the new vCPU, and then the guest changes its own masks of each CPU's ports. "
        "An event in between has the new vCPU scan the bitmap for ports that are its own: this one isn't yet, and is "
        "left. The pending bit stays set, and so Xen notifies nobody of any later event. The cure masks the port "
        "around both; if it has become pending, unmasking notifies the new vCPU."
    ),
    model=model,
)

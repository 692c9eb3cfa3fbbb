"""An upcall that doesn't leave a word before it is empty: a busy port in it starves all other words."""

from __future__ import annotations

from pvirq.check.protocols.upcall import round_robin, xen_evtchn_do_upcall
from pvirq.check.race import Race
from pvirq.check.races.upcall_starvation import starvation
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    if fault:
        return starvation(round_robin, patient=2, last=True)
    return starvation(xen_evtchn_do_upcall, patient=2)


RACE = Race(
    name="word-starvation",
    title="the upcall stays in a word until it is empty, and a busy port there starves all other words",
    where="linux-2.6.18-xen from changeset 324, drivers/xen/core/evtchn.c: evtchn_do_upcall()",
    brought="linux-2.6.18-xen changeset 324 (the loops before it have it too)",
    cured="Linux 2.6.39: a word is read once, or twice if the scan begins in its middle",
    story=(
        "The upcall takes the selected words once, and drops one of them when it finds it empty. A port that is "
        "notified again before that look keeps its word, and with no other word taken the loop comes back to it, for "
        "as long as its peer goes on. A word that Xen has selected meanwhile waits for the next upcall. The cure reads "
        "each word that it took once, and what comes meanwhile waits for its turn."
    ),
    model=model,
)

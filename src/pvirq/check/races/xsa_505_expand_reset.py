"""EVTCHNOP_expand_array against EVTCHNOP_reset."""

from __future__ import annotations

from pvirq.check.protocols.channels import evtchn_fifo_expand_array, evtchn_fifo_init_control, evtchn_reset
from pvirq.check.protocols.linear import as_if_one_by_one, operation
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import End, Model
from pvirq.xen.evtchn_channels import ECS_IPI


def model(fault: bool) -> Model:
    m = Model()
    d = Xen(m, Code(checks_fifo_locked=not fault)).domain(1, ports=4, valid=2, bucket=2, two_level=2)
    d.bound(1, ECS_IPI)
    d.use_fifo(words=2)
    results = [
        operation(m, "vCPU 0, EVTCHNOP_reset", lambda: evtchn_reset(d)),
        operation(m, "vCPU 1, EVTCHNOP_expand_array", lambda: evtchn_fifo_expand_array(d)),
        operation(m, "vCPU 3, EVTCHNOP_expand_array", lambda: evtchn_fifo_expand_array(d)),
        operation(m, "vCPU 2, EVTCHNOP_init_control", lambda: evtchn_fifo_init_control(d)),
    ]
    if not fault:
        as_if_one_by_one(m, [*results, d.evtchn_port_ops, d.num_evtchns, d.active_evtchns])

    def pages(end: End) -> str | None:
        inside = end[d.num_evtchns] // d.per_page if end[d.evtchn_fifo] else 0
        return None if end[d.mapped] == inside else f"{end[d.mapped]} pages are mapped, {inside} are in the array"

    m.at_end(pages)
    return m


RACE = Race(
    name="xsa-505-expand-reset",
    title="EVTCHNOP_expand_array adds a page to an event array that EVTCHNOP_reset has freed",
    where="Xen 4.5-4.22, xen/common/event_fifo.c: evtchn_fifo_expand_array()",
    brought="400b3bd642 (4.5)",
    cured="0e9d647aca (4.23), XSA-505, CVE-2026-62432",
    story=(
        "evtchn_fifo_expand_array() looked whether the domain is under the FIFO ABI, and only then took the event "
        "lock. Once EVTCHNOP_reset could return a domain to the two-level ABI, another vCPU may have done so between, "
        "and add_page_to_event_array() follows d->evtchn_fifo, which is NULL. The cure is to look with the lock held."
    ),
    model=model,
)

"""Races of Xen's own event channel code: found with the fault, and all of the space is clean without it."""

from __future__ import annotations

import pytest

from pvirq.check import explore
from pvirq.check.guided import follow
from pvirq.check.race import races
from pvirq.check.steps import End, Model

FOUND = {
    "close-dying-peer": "RCU, d2: get_domain() uses d1 after it was freed",
    "poll-barrier": "v0 sleeps until port 1 is pending, and it is",
    "poll-upcall": "v0 sleeps, and an upcall is due",
    "send-after-unlock": "d2's port 1 is d3's to send to, and has an event of d1's",
    "virq-handler-dying": "d1 is dead and never freed: it has 1 references",
    "virq-port-reused": "port 1 is an IPI that nobody has sent, and is pending",
    "xen-consumer-slot": (
        "an event for d2 calls mem_paging_notification() instead of monitor_notification()"
    ),
    "xsa-221-poll": "vCPU 1, SCHEDOP_poll: the pointer to the bucket of port 2 is NULL",
    "xsa-340-bucket": "vCPU 2, EVTCHNOP_unmask: the pointer to the bucket of port 3 is NULL",
    "xsa-343-reset-open": (
        "d2, EVTCHNOP_send and close: evtchn_fifo_word_from_port() follows evtchn_fifo, which is NULL"
    ),
    "xsa-343-reset-ops": (
        "vCPU 1, EVTCHNOP_unmask: evtchn_fifo_word_from_port() follows evtchn_fifo, which is NULL"
    ),
    "xsa-505-expand-reset": (
        "vCPU 1, EVTCHNOP_expand_array: add_page_to_event_array() follows evtchn_fifo, which is NULL"
    ),
}  # fmt: skip


def ends(model: Model, *, reduce: bool) -> set[tuple[object, ...]]:
    """What the variables are where nobody can go on; all of it is searched, and clean."""
    found: set[tuple[object, ...]] = set()

    def note(end: End) -> None:
        found.add((*(end[variable] for variable in model.variables), *sorted(end.waiting)))

    model.at_end(note)
    result = explore(model, reduce=reduce)
    assert result.failure is None
    assert result.complete
    assert not result.cyclic
    return found


@pytest.mark.parametrize("name", FOUND)
def test_race_is_found(name: str) -> None:
    model = races()[name].model
    failure = explore(model(True)).failure
    assert failure is not None
    assert failure.message == FOUND[name]
    # And the schedule leads there again.
    assert follow(model(True), failure.schedule)[1] == failure.message


@pytest.mark.parametrize("name", FOUND)
def test_cured_is_clean_and_reduction_loses_nothing(name: str) -> None:
    model = races()[name].model
    assert ends(model(False), reduce=True) == ends(model(False), reduce=False)


def test_barriers_of_xsa_340_are_for_weak_order_only() -> None:
    model = races()["xsa-340-bucket"].model(True)
    model.order = "tso"
    result = explore(model)
    assert result.complete
    assert result.failure is None

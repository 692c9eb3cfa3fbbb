"""Races of Xen's own event channel code: found with the fault, and all of the space is clean without it."""

from __future__ import annotations

import pytest

from pvirq.check import explore
from pvirq.check.guided import follow
from pvirq.check.race import races
from pvirq.check.races.xen_consumer_slot import FUNCTIONS
from pvirq.check.steps import End, Model

# What comes of each: one of these, whichever schedule is tried first.
FREED_FIFO = (
    "evtchn_fifo_word_from_port() follows evtchn_fifo, which is NULL",
    "evtchn_fifo_word_from_port() uses evtchn_fifo after it was freed",
)
SYMPTOMS = {
    "close-dying-peer": (
        "get_domain() uses d1 after it was freed",
        "get_domain() uses d2 after it was freed",
        "d0's port 1 is in use, and d0 has closed it",
        "d1 counts 1 ports in use, and has none",
    ),
    "consumer-called-locked": (
        "deadlock: d0, EVTCHNOP_send (takes ved->lock), d0, XEN_VM_EVENT_DISABLE (takes d0p1.lock)",
        "deadlock: d0, EVTCHNOP_send (takes ved->lock), d0, XEN_VM_EVENT_DISABLE (takes d0p1.lock), "
        "d1, vm_event_put_request (takes ved->lock)",
    ),
    "consumer-freed": ("vm_event_resume() uses the domain's ring after it was freed",),
    "poll-barrier": ("v0 sleeps until port 1 is pending, and it is", "v1 sleeps until port 1 is pending, and it is"),
    "poll-mask-freed": ("poll_timer_fn() follows d->poll_mask, which is NULL",),
    "poll-upcall": ("v0 sleeps, and an upcall is due",),
    "send-after-unlock": ("d2's port 1 is d3's to send to, and has an event of d1's",),
    "virq-handler-bound": (
        "d0 has VIRQ_CONSOLE bound, and d1 gets it",
        "d1 has VIRQ_CONSOLE bound, and d0 gets it",
    ),
    "virq-handler-dying": ("d1 is dead and never freed: it has 1 references",),
    "virq-port-reused": ("port 1 is an IPI that nobody has sent, and is pending",),
    "xen-consumer-slot": tuple(
        f"an event for d{number + 1} calls {other}() instead of {function}()"
        for number, function in enumerate(FUNCTIONS) for other in FUNCTIONS if other != function
    ),
    "xsa-221-poll": ("the pointer to the bucket of port 2 is NULL",),
    "xsa-340-bucket": (
        "the pointer to the bucket of port 2 is NULL",
        "the pointer to the bucket of port 3 is NULL",
        "the bucket of port 2 isn't set up",
        "the bucket of port 3 isn't set up",
    ),
    "xsa-343-reset-open": (
        *FREED_FIFO,
        "port 3 is beyond the bitmaps of the two-level ABI",
        "under the two-level ABI a port is open that it doesn't have",
    ),
    "xsa-343-reset-ops": FREED_FIFO,
    "xsa-505-expand-reset": (
        "add_page_to_event_array() follows evtchn_fifo, which is NULL",
        "add_page_to_event_array() uses evtchn_fifo after it was freed",
    ),
}  # fmt: skip


def ends(model: Model, *, reduce: bool) -> set[tuple[object, ...]]:
    """What the variables are where nobody can go on; all of it is searched, and clean."""
    found: set[tuple[object, ...]] = set()

    def note(end: End) -> None:
        found.add((*(end[variable] for variable in model.variables), *sorted(end.waiting)))

    result = explore(model, reduce=reduce, on_end=note)
    assert result.failure is None
    assert result.complete
    assert not result.cyclic
    return found


@pytest.mark.parametrize("name", SYMPTOMS)
def test_race_is_found(name: str) -> None:
    model = races()[name].model
    failure = explore(model(True)).failure
    assert failure is not None
    assert failure.message.endswith(SYMPTOMS[name])
    # And the schedule leads there again.
    assert follow(model(True), failure.schedule)[1] == failure.message


@pytest.mark.parametrize("name", SYMPTOMS)
def test_cured_is_clean_and_reduction_loses_nothing(name: str) -> None:
    model = races()[name].model
    assert ends(model(False), reduce=True) == ends(model(False), reduce=False)


def test_barriers_of_xsa_340_are_for_weak_order_only() -> None:
    model = races()["xsa-340-bucket"].model(True)
    model.order = "tso"
    result = explore(model)
    assert result.complete
    assert result.failure is None

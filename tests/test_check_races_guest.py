"""Races on the guest's side: found with the fault, and all of the space is clean without it."""

from __future__ import annotations

import pytest

from pvirq.check import End, Model, explore
from pvirq.check.guided import follow
from pvirq.check.protocols.affinity import affinity_change, both_scanned
from pvirq.check.protocols.linux_irq import LINUX_5_10, LINUX_5_12, LINUX_5_14, Active, Code
from pvirq.check.protocols.upcall import lowest_first, round_robin, xen_evtchn_do_upcall
from pvirq.check.race import races
from pvirq.check.races.upcall_starvation import starvation

LOST = "an event is lost: its port is pending and unmasked, and no CPU will ever look"
AGAIN = "CPU 1: port 0 is handled again, and its EOI hasn't come"
FOUND = {
    "active-reset-at-ack": AGAIN,
    "bind-after-event": "an event was lost: nobody will ever see what the peer asked for last",
    "block-barrier": "the vCPU sleeps for ever, and port 0 is pending",
    "bound-in-halves": (
        "guest: empty_callback takes a handler's data for an entry, and writes beyond events_missed"
    ),
    "enable-then-block": "the guest sleeps for ever, and a thread of its is runnable",
    "eoi-in-progress": AGAIN,
    "eoi-stale-scan": LOST,
    "evtchn-rwlock-deadlock": (
        "deadlock: CPU 1: event loop (takes hvc_lock), CPU 2: khvcd (takes evtchn_rwlock as a reader), "
        "CPU 3: unbind (takes evtchn_rwlock as a writer), CPU 4: unbind (takes evtchn_rwlock as a writer)"
    ),
    "qlock-wait-nested": "deadlock: CPU 0 (sleeps until it is woken)",
    "rebind-unmasked": LOST,
    "remove-while-handling": "CPU 0: an irq_info is used that was freed",
    "send-during-bind": LOST,
    "two-cpus-one-event": AGAIN,
    "unmask-eoi-pending": "the port is unmasked while its EOI is pending",
    "unmask-looks-first": "port 0 is pending and unmasked, and no upcall will come",
    "upcall-starvation": "CPU: port 1 has waited for 3 others, and waits on",
    "word-starvation": "CPU: port 2 has waited for 3 others, and waits on",
}  # fmt: skip


def ends(model: Model, *, reduce: bool) -> set[tuple[object, ...]]:
    """What the variables are where nobody can go on; all of it is searched, and clean."""
    found: set[tuple[object, ...]] = set()

    def note(end: End) -> None:
        found.add((*(end[variable] for variable in model.variables), *sorted(end.waiting)))

    result = explore(model, reduce=reduce, on_end=note)
    assert result.failure is None
    assert result.complete
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


@pytest.mark.parametrize("name", FOUND)
def test_race_is_found_without_reduction(name: str) -> None:
    assert explore(races()[name].model(True), reduce=False).failure is not None


def test_which_order_shows_the_missing_barrier() -> None:
    """Under sequential consistency a plain store is as good as a locked instruction."""
    for order, found in (("sc", False), ("tso", True)):
        model = races()["block-barrier"].model(True)
        model.order = order
        assert (explore(model).failure is not None) is found


@pytest.mark.parametrize(
    ("code", "handled_twice"),
    [(LINUX_5_10, True), (Code(True, Active.NONE), True), (LINUX_5_12, True), (LINUX_5_14, False)],
)
def test_one_event_on_two_cpus_in_each_state_of_the_code(code: Code, handled_twice: bool) -> None:
    failure = explore(affinity_change(code).model).failure
    assert (failure is not None) is handled_twice
    failure = explore(both_scanned(code).model).failure
    assert (failure is not None) is handled_twice


@pytest.mark.parametrize("patient", [1, 2])
@pytest.mark.parametrize("loop", ["lowest-first", "round-robin", "snapshot"])
def test_who_starves(patient: int, loop: str) -> None:
    """A port in the busy one's word (1) and one in the next word (2), under each of the three loops."""
    loops = {"lowest-first": lowest_first, "round-robin": round_robin, "snapshot": xen_evtchn_do_upcall}
    result = explore(starvation(loops[loop], patient, last=loop == "round-robin"))
    starves = loop == "lowest-first" or (loop == "round-robin" and patient == 2)
    assert (result.failure is not None) is starves
    assert result.complete is not starves

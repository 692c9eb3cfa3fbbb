"""Races of FIFO event channels: each is found where the fault is, and all schedules are searched where it isn't."""

from __future__ import annotations

import re

import pytest

from pvirq.check import explore
from pvirq.check.guided import follow
from pvirq.check.race import races

# What it comes to: which of several ports it is depends on the order of the search.
LOST = r"lost event: the guest is blocked for ever while port \d is pending and not masked"
STUCK = r"port 1 stays linked for ever: no event of it will be seen again"
UNHEARD = r"lost event: port \d was raised once, and the guest never hears of it"
RACES = {
    "fifo-array-order": "uses a page of event words that isn't there yet",
    "fifo-busy-port": LOST,
    "fifo-control-block": "writes through the pointer to a queue's head, which isn't set yet",
    "fifo-expand-pending": UNHEARD,
    "fifo-last-queue-torn": STUCK,
    "fifo-last-queue-unstable": "guest: takes port 1 from queue 0/6, and it is linked in 0/5",
    "fifo-link-spin": r"sender: after 5 attempts it still tries to link word\[1\], for as long as the guest likes",
    "fifo-old-tail": LOST,
    "fifo-ops-order": "uses the domain's evtchn_fifo, which isn't set for it",
    "fifo-poll-wake": "guest: it is woken by port 1, which it polls, and finds it on no queue",
    "fifo-queue-lock": LOST,
    "fifo-ready": r"vCPU 0: takes port \d from queue 0/7, and it is linked in 1/7",
    "fifo-unmask-twice": "port 1 is unmasked while its event is being handled",
}


def test_all_of_them() -> None:
    assert {name for name in races() if name.startswith("fifo-")} == set(RACES)


@pytest.mark.parametrize("name", RACES)
@pytest.mark.parametrize("reduce", [True, False])
def test_found_with_the_fault(name: str, reduce: bool) -> None:
    model = races()[name].model(True)
    result = explore(model, reduce=reduce)
    assert result.failure is not None
    assert re.search(RACES[name], result.failure.message)
    moved, wrong = follow(model, result.failure.schedule)
    assert wrong == result.failure.message
    assert len(moved) == len(result.failure.schedule)


@pytest.mark.parametrize(
    ("name", "reduce"),
    # Without reduction it takes too long for one of them.
    [(name, reduce) for name in RACES for reduce in (True, False) if reduce or name != "fifo-expand-pending"],
)
def test_clean_without(name: str, reduce: bool) -> None:
    result = explore(races()[name].model(False), reduce=reduce)
    assert result.failure is None
    assert result.complete
    assert not result.cyclic
    assert result.ends > 0


@pytest.mark.parametrize("name", ["fifo-control-block", "fifo-array-order"])
def test_x86_needs_the_stores_in_order_only(name: str) -> None:
    """The block stored first is seen without any weak order; the page isn't, for its stores are in order."""
    model = races()[name].model(True)
    model.order = "sc"
    assert (explore(model).failure is not None) == (name == "fifo-control-block")


@pytest.mark.parametrize("name", ["fifo-queue-lock", "fifo-old-tail", "fifo-busy-port", "fifo-link-spin"])
def test_clean_in_the_order_of_x86(name: str) -> None:
    model = races()[name].model(False)
    model.order = "tso"
    result = explore(model, reduce=False)
    assert result.failure is None
    assert result.complete

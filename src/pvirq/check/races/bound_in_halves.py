"""A handler that is bound in two steps, between which its port's event comes."""

from __future__ import annotations

from pvirq.check.race import Race
from pvirq.check.races.bind_after_event import zephyr

RACE = Race(
    name="bound-in-halves",
    title="an interrupt finds a handler's data, and not yet the handler",
    where="Zephyr 3.2, drivers/xen/events.c: bind_event_channel()",
    brought="pull request 45823 (3.2)",
    cured="event_channels_lock around both (later trees)",
    story=(
        "bind_event_channel() sets a handler's data, then the handler. empty_callback(), since it notes missed events, "
        "takes its data for its entry in the table of handlers, and counts its port from there. An event between the "
        "two steps has it do so with the new handler's data, and write wherever that leads. With the lock, or with "
        "interrupts off, the two are one."
    ),
    model=lambda fault: zephyr(missed=True, locked=not fault),
)

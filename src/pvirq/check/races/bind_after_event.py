"""A handler that is bound after its port's first event came."""

from __future__ import annotations

from pvirq.check.protocols.twolevel import SharedInfo, clear_evtchn, evtchn_send, shared_info
from pvirq.check.protocols.upcall import cpu_events, lowest_first, return_to_guest
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread, Var

PORT = 0
EVENTS = 2
EMPTY = 0  # of event_channels[port].cb: empty_callback
ENTRY = 0  # of event_channels[port].priv: the entry itself


def zephyr(*, missed: bool, locked: bool) -> Model:
    """Zephyr's driver: with `missed`, empty_callback notes events that nobody has a handler for; with `locked`, an
    interrupt sees a handler and its data change as one.

    The peer writes what is to be done and sends an event, `EVENTS` times. All that must have been seen in the end.
    """
    model = Model()
    info = shared_info(model, ports=1, word_bits=1)
    channel = Channel(
        model.var("request"), model.var("seen"), model.var("cb", EMPTY), model.var("priv", ENTRY),
        model.var("events_missed"),
    )  # fmt: skip
    events = cpu_events(model, info, 0)
    model.thread("peer", _peer, info, channel)

    def handle(port: int) -> Thread:
        yield from _process_event(info, channel, missed, port)

    def interrupts() -> Thread:
        yield from return_to_guest(info, 0, lambda: lowest_first(info, 0, events, handle))

    def guest() -> Thread:
        yield from interrupts()
        yield channel.priv.write(1).saying("sets the data of its handler")
        if not locked:
            yield from interrupts()
        yield channel.cb.write(1).saying("sets its handler")
        yield from interrupts()
        if missed and (yield channel.missed.read().saying("was an event missed?")):
            yield channel.missed.write(0)
            yield from interrupts()
            yield from look_for_work(channel)
        while True:
            yield info.vcpus[0].upcall_pending.wait(bool).saying("waits for events")
            yield from interrupts()

    model.thread("guest", guest, may_wait=True)
    model.at_end(lambda end: _judge(end, channel))
    return model


class Channel:
    """What the peer asks for and the guest has seen, and an entry of event_channels and events_missed."""

    def __init__(self, request: Var, seen: Var, cb: Var, priv: Var, missed: Var) -> None:
        self.request = request
        self.seen = seen
        self.cb = cb
        self.priv = priv
        self.missed = missed


def _peer(info: SharedInfo, channel: Channel) -> Thread:
    for number in range(1, EVENTS + 1):
        yield channel.request.write(number).saying(f"asks for thing {number}")
        yield from evtchn_send(info, PORT)


def look_for_work(channel: Channel) -> Thread:
    request = yield channel.request.read().saying("looks what is asked for")
    yield channel.seen.write(request)


def _process_event(info: SharedInfo, channel: Channel, missed: bool, port: int) -> Thread:
    """The handler and its data are fetched before the event is cleared."""
    priv = yield channel.priv.read()
    cb = yield channel.cb.read()
    yield from clear_evtchn(info, port)
    if cb != EMPTY:
        yield from look_for_work(channel)
    elif missed:
        assert priv == ENTRY, "empty_callback takes a handler's data for an entry, and writes beyond events_missed"
        yield channel.missed.write(1).saying("empty_callback notes that it missed an event")


def _judge(end: End, channel: Channel) -> str | None:
    if end[channel.seen] != end[channel.request]:
        return "an event was lost: nobody will ever see what the peer asked for last"
    return None


RACE = Race(
    name="bind-after-event",
    title="an event that comes before its handler is bound is cleared, and lost",
    where="Zephyr 3.1, drivers/xen/events.c: events_isr() and bind_event_channel()",
    brought="",
    cured="pull request 45823 (3.2): get_missed_events()",
    story=(
        "Ports without a handler have an empty one. An event of a peer that is faster than this domain's "
        "bind_event_channel() goes there: the pending bit is cleared, and nothing is left of the event. With the cure "
        "empty_callback() notes it, and who binds a handler asks for what was missed."
    ),
    # The other fault of bind_event_channel() is "bound-in-halves".
    model=lambda fault: zephyr(missed=not fault, locked=True),
)

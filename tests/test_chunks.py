"""A trace's text is the same however it is put together, and whatever comes in between."""

from __future__ import annotations

import json

import pytest

from pvirq.host import Host
from pvirq.lab.trace import Trace
from pvirq.linux.irq import IRQ_HANDLED
from pvirq.xen import evtchn
from test_trace import Echo


def run(flush: bool = False) -> str:
    with Host(seed=5) as host, Trace(host) as trace:
        echo = Echo(host, "pvops")
        for rounds in (5, 3, 8):
            echo.play(rounds)
            trace.mark("played")
            host.clock.jump_to(host.clock.now() + 1000)
            if flush:
                trace.flush()
        return trace.hash()


@pytest.mark.parametrize(("shapes", "chunks"), [(1, 10_000), (3, 2), (32, 1)])
def test_the_text_does_not_hang_on_the_chunks(monkeypatch: pytest.MonkeyPatch, shapes: int, chunks: int) -> None:
    expected = run()
    monkeypatch.setattr("pvirq.lab.chunks.MOST_SHAPES", shapes)
    monkeypatch.setattr("pvirq.lab.chunks.MOST_CHUNKS", chunks)
    assert run() == expected


def test_nor_on_when_it_is_made() -> None:
    assert run(flush=True) == run()


def test_names_are_no_formats() -> None:
    with Host() as host:
        guest = host.model("pvops")
        irq = guest.kernel.events.bind_listening(0, lambda irq, dev_id: IRQ_HANDLED, "100%d %s", object())
        port = evtchn.bind_interdomain(host.dom0.domain, guest.domain.domid, guest.kernel.events.evtchn_from_irq(irq))
        host.run(lambda: host.quiet)
        with Trace(host) as trace:
            evtchn.send(host.dom0.domain, port)
            host.run(lambda: host.quiet)
    assert [event["name"] for event in trace.where(k="irq", ph="B")] == ["100%d %s"]


def test_what_an_interruption_leaves_behind_is_taken_away() -> None:
    """Ctrl-C comes between a value and its event: what was recorded before and comes after is as it would have been."""
    with Host() as host, Trace(host) as trace:
        host.clock.jump_to(1000)
        trace._recorder._values.append(77)
        trace._recorder._realign()
        host.clock.jump_to(2000)
        trace.mark("after")
    [event] = trace.where(k="mark")
    assert event == json.loads('{"t":2000,"k":"mark","text":"after"}')

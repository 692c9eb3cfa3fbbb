"""The guest's console driver against the daemon's end of the ring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driverlib import Guest, Host, row


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def guest(host: Host) -> Guest:
    guest = host.guest()
    host.run()
    return guest


def test_output_is_one_interrupt_each_way(host: Host, guest: Guest) -> None:
    before = row(host.dom0, "evtchn:xenconsoled"), row(guest.kernel, "hvc_console")
    for i in range(20):
        guest.xencons.write(b"line %d\n" % i)
        host.run()
    assert guest.console.text() == "".join(f"line {i}\n" for i in range(20))
    assert row(host.dom0, "evtchn:xenconsoled") - before[0] == 20
    assert row(guest.kernel, "hvc_console") - before[1] == 20  # the daemon tells that it has taken it


def test_more_than_the_ring_holds(host: Host, guest: Guest) -> None:
    text = bytes(i * 7 & 0xFF for i in range(10_000))
    guest.xencons.write(text)
    host.run()
    assert bytes(guest.console.output) == text


def test_input(host: Host, guest: Guest) -> None:
    guest.console.send(b"ls\n")
    host.run()
    assert guest.xencons.input == b"ls\n"
    typed: list[bytes] = []
    guest.xencons.on_input = typed.append
    text = bytes(i * 5 & 0xFF for i in range(3000))
    guest.console.send(text)
    host.run()
    assert b"".join(typed) == text
    assert guest.xencons.input == b"ls\n"


def test_a_typed_line_is_an_interrupt(host: Host, guest: Guest) -> None:
    before = row(guest.kernel, "hvc_console")
    guest.xencons.on_input = guest.xencons.write
    guest.console.send(b"x")
    host.run()
    assert guest.console.text() == "x"
    assert row(guest.kernel, "hvc_console") - before == 2  # the key, and that its echo was taken


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.binary(max_size=2500), st.booleans()), max_size=12))
def test_nothing_is_lost_or_invented(steps: list[tuple[bool, bytes, bool]]) -> None:
    host = Host(memory=1 << 28)
    guest = host.guest()
    typed = bytearray()
    guest.xencons.on_input = typed.extend
    out, into = bytearray(), bytearray()
    for outward, data, run in steps:
        if outward:
            guest.xencons.write(data)
            out += data
        else:
            guest.console.send(data)
            into += data
        if run:
            host.run()
    host.run()
    assert (bytes(guest.console.output), bytes(typed)) == (bytes(out), bytes(into))
    host.close()

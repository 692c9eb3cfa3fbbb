"""The console ring, from the guest's side of it."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from pvirq.drivers.console import BACKLOG, IN_CONS, IN_PROD, IN_SIZE, OUT, OUT_CONS, OUT_PROD, OUT_SIZE, Console


class Ring:
    """A guest's end: writes output, reads input, as drivers/tty/hvc/hvc_xen.c does."""

    def __init__(self) -> None:
        self.page = memoryview(bytearray(4096))
        self.notified = 0
        self.console = Console()
        self.console.attach(self.page, self._notify)

    def _notify(self) -> None:
        self.notified += 1

    def index(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.page, at)[0])

    def write(self, data: bytes) -> int:
        produced = self.index(OUT_PROD)
        room = OUT_SIZE - (produced - self.index(OUT_CONS) & 0xFFFFFFFF)
        for i, byte in enumerate(data[:room]):
            self.page[OUT + (produced + i) % OUT_SIZE] = byte
        struct.pack_into("<I", self.page, OUT_PROD, produced + min(room, len(data)) & 0xFFFFFFFF)
        return min(room, len(data))

    def read(self) -> bytes:
        consumed, produced = self.index(IN_CONS), self.index(IN_PROD)
        data = bytes(self.page[i % IN_SIZE] for i in range(consumed, consumed + (produced - consumed & 0xFFFFFFFF)))
        struct.pack_into("<I", self.page, IN_CONS, produced)
        return data


@given(st.binary(max_size=9000), st.integers(0, 0xFFFFFFFF))
def test_output_arrives_whole_and_in_order(data: bytes, start: int) -> None:
    ring = Ring()
    for at in (OUT_CONS, OUT_PROD):
        struct.pack_into("<I", ring.page, at, start)
    sent = 0
    while sent < len(data):
        sent += ring.write(data[sent:])
        ring.console.service()
    assert ring.console.output == data
    assert ring.index(OUT_CONS) == ring.index(OUT_PROD)


@given(st.binary(max_size=5000), st.integers(0, 0xFFFFFFFF))
def test_input_waits_for_room(data: bytes, start: int) -> None:
    ring = Ring()
    for at in (IN_CONS, IN_PROD):
        struct.pack_into("<I", ring.page, at, start)
    ring.console.send(data)
    got = b""
    while len(got) < len(data):
        piece = ring.read()
        assert piece
        got += piece
        ring.console.service()
    assert got == data
    assert ring.read() == b""


@given(st.lists(st.integers(0, 0xFFFFFFFF), min_size=4, max_size=4))
def test_hostile_indexes_lose_data_and_no_more(indexes: list[int]) -> None:
    ring = Ring()
    struct.pack_into("<4I", ring.page, IN_CONS, *indexes)
    ring.console.service()
    ring.console.send(b"hello")
    assert len(ring.console.output) <= OUT_SIZE


def test_notifies_only_where_something_moved() -> None:
    ring = Ring()
    ring.console.service()
    assert ring.notified == 0
    ring.write(b"x")
    ring.console.service()
    assert ring.notified == 1
    ring.console.send(b"y")
    assert ring.notified == 2


def test_what_comes_both_ways_is_shown_once() -> None:
    ring = Ring()
    for line in (b"one\n", b"two\r\n", b"three\n"):
        ring.console.put_direct(line)
        ring.write(line)
        ring.console.service()
    ring.write(b"four\n")
    ring.console.service()
    ring.console.put_direct(b"four\n")
    ring.console.put_direct(b"five\n")
    ring.console.put_direct(b"six\n")
    ring.write(b"seven\n")
    ring.console.service()
    assert ring.console.text() == "one\ntwo\nthree\nfour\nfive\nsix\nseven\n"


def test_backlog_is_bounded() -> None:
    ring = Ring()
    for _ in range(2 * BACKLOG // OUT_SIZE):
        ring.write(b"x" * OUT_SIZE)
        ring.console.service()
    assert len(ring.console.output) == BACKLOG
    assert ring.console.total == 2 * BACKLOG


def test_listeners_come_and_go() -> None:
    ring = Ring()
    heard: list[bytes] = []
    remove = ring.console.on_output(heard.append)
    ring.write(b"a")
    ring.console.service()
    remove()
    remove()
    ring.write(b"b")
    ring.console.service()
    assert heard == [b"a"]

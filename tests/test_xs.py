"""A modelled kernel's xenstore client over a real ring, and what its requests cost in interrupts."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driverlib import Guest, Host, row
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import (
    REQ_PROD,
    RSP_CONS,
    RSP_PROD,
    XENSTORE_RSP,
    XENSTORE_WORDS,
    XS_DIRECTORY,
    XS_READ,
    XS_WATCH_EVENT,
    XSD_SOCKMSG,
)
from pvirq.drivers.xenstore import Perm
from pvirq.drivers.xs import Xs
from pvirq.linux.kthread import Body, Kthread


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def guest(host: Host) -> Guest:
    return host.guest()


def test_requests(host: Host, guest: Guest) -> None:
    xs = guest.xs

    def body() -> Body[None]:
        yield from xs.write("data/a", "1")
        yield from xs.write("data/a/b", b"\xff\0two")
        yield from xs.mkdir("data/c")
        assert (yield from xs.read("data/a")) == "1"
        assert (yield from xs.read_bytes("data/a/b")) == b"\xff\0two"
        assert (yield from xs.ls("data")) == ["a", "c"]
        assert (yield from xs.read_int("data/a")) == 1
        assert (yield from xs.read_int("data/none", 7)) == 7
        assert (yield from xs.read_int("data/c", 7)) == 7
        yield from xs.set_perms("data/a", ["n1", Perm(3, 1)])
        assert [str(perm) for perm in (yield from xs.get_perms("data/a"))] == ["n1", "r3"]
        yield from xs.rm("data/a")
        assert not (yield from xs.exists("data/a/b"))
        assert (yield from xs.exists("data"))

    host.do(guest.kernel, body())
    assert host.store.ls("/local/domain/1/data") == ["c"]


@pytest.mark.parametrize(("path", "errno"), [("data/none", Errno.ENOENT), ("/vm", Errno.EACCES), ("a b", Errno.EINVAL)])
def test_errors_have_their_errno(host: Host, guest: Guest, path: str, errno: Errno) -> None:
    with pytest.raises(XenError) as error:
        host.do(guest.kernel, guest.xs.read(path))
    assert error.value.errno is errno


def test_too_long(host: Host, guest: Guest) -> None:
    with pytest.raises(XenError) as error:
        host.do(guest.kernel, guest.xs.write("data/a", "x" * 4096))
    assert error.value.errno is Errno.E2BIG


def test_no_number(host: Host, guest: Guest) -> None:
    host.store.write("/local/domain/1/data/x", "one")
    with pytest.raises(XenError) as error:
        host.do(guest.kernel, guest.xs.read_int("data/x"))
    assert error.value.errno is Errno.ERANGE


def test_each_request_is_an_interrupt_on_each_side(host: Host, guest: Guest) -> None:
    host.run()  # a channel that is bound interrupts once
    store_irq = host.xenstored_events.irq_of(guest._ends[0])
    before = row(guest.kernel, "xenbus"), sum(host.dom0.irq.descs[store_irq].kstat)

    def body() -> Body[None]:
        for i in range(50):
            yield from guest.xs.write("data/n", i)

    host.do(guest.kernel, body())
    assert row(guest.kernel, "xenbus") - before[0] == 50
    assert sum(host.dom0.irq.descs[store_irq].kstat) - before[1] == 50


def test_domain_0_has_a_ring_too(host: Host) -> None:
    host.run()
    before = row(host.dom0, "xenbus"), row(host.dom0, "evtchn:xenstored")
    assert host.do(host.dom0, host.xs.read("name")) == "Domain-0"
    assert row(host.dom0, "xenbus") - before[0] == 1
    assert row(host.dom0, "evtchn:xenstored") - before[1] == 1
    assert host.xenstored.dom0.read("/local/domain/0/name") == b"Domain-0"  # the one in process works besides


def test_several_threads_at_once_and_full_rings(host: Host, guest: Guest) -> None:
    xs = guest.xs
    host.store.write("/local/domain/1/data/long", "y" * 3000)
    host.store.set_perms("/local/domain/1/data/long", ["n1"])

    def body(i: int) -> Body[tuple[str, str]]:
        yield from xs.write(f"data/{i}", str(i) * 900)
        long = yield from xs.read("data/long")
        return (yield from xs.read(f"data/{i}")), long

    threads = [Kthread(guest.kernel, f"t{i}", body(i)) for i in range(8)]
    host.run()
    assert [thread.result() for thread in threads] == [(str(i) * 900, "y" * 3000) for i in range(8)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=1500), min_size=1, max_size=12))
def test_what_was_written_is_read(values: list[bytes]) -> None:
    host = Host()
    guest = host.guest()

    def body() -> Body[list[bytes]]:
        read = []
        for i, value in enumerate(values):
            yield from guest.xs.write(f"data/{i}", value)
            read.append((yield from guest.xs.read_bytes(f"data/{i}")))
        return read

    assert host.do(guest.kernel, body()) == values
    host.close()


def test_watches(host: Host, guest: Guest) -> None:
    seen: list[str] = []
    xs = guest.xs

    def waits(path: str) -> Body[None]:
        value = yield from xs.read(path)
        seen.append(f"{path}={value}")

    first = host.do(guest.kernel, xs.watch("data", seen.append))
    host.run()
    assert seen == ["data"]
    second = host.do(guest.kernel, xs.watch("data/x", lambda path: waits(path) if len(seen) > 2 else None))
    host.run()
    host.store.write("/local/domain/1/data/x", "1")
    host.store.set_perms("/local/domain/1/data/x", ["n1"])
    host.run()
    assert seen[0:2] == ["data", "data/x"]
    assert "data/x=1" in seen
    host.do(guest.kernel, xs.unwatch(first))
    host.do(guest.kernel, xs.unwatch(first))
    host.do(guest.kernel, xs.unwatch(second))
    count = len(seen)
    host.store.write("/local/domain/1/data/x", "2")
    host.run()
    assert len(seen) == count
    with pytest.raises(XenError) as error:
        host.do(guest.kernel, xs.watch("no such", seen.append))
    assert error.value.errno is Errno.EINVAL


def test_transactions(host: Host, guest: Guest) -> None:
    xs, tries = guest.xs, []

    def body(tx: int) -> Body[None]:
        tries.append(tx)
        value = yield from xs.read_int("data/n", 0, tx)
        if len(tries) == 1:  # somebody else is faster
            host.store.write("/local/domain/1/data/n", 10)
            host.store.set_perms("/local/domain/1/data/n", ["n1"])
        yield from xs.write("data/n", value + 1, tx)

    host.do(guest.kernel, xs.transact(body))
    assert host.store.read("/local/domain/1/data/n") == b"11"
    assert len(tries) == 2

    def fails(tx: int) -> Body[None]:
        yield from xs.write("data/n", 99, tx)
        yield from xs.read("data/none", tx)

    with pytest.raises(XenError) as error:
        host.do(guest.kernel, xs.transact(fails))
    assert error.value.errno is Errno.ENOENT
    assert host.store.read("/local/domain/1/data/n") == b"11"


# What xenstored can't be trusted for.


class Alone:
    """A client with nobody at the other end: the test plays xenstored."""

    def __init__(self) -> None:
        self.host = Host()
        self.guest = self.host.guest()
        self.page = memoryview(bytearray(4096))
        self.words = self.page[XENSTORE_WORDS : XENSTORE_WORDS + 28].cast("I")
        self.xs = Xs(self.guest.kernel, self.page, 999)

    def start(self, body: Body[str]) -> Kthread[str]:
        thread = Kthread(self.guest.kernel, "test", body)
        self.host.run()
        return thread

    def answer(self, data: bytes) -> None:
        for byte in data:
            self.page[XENSTORE_RSP + self.words[RSP_PROD] % 1024] = byte
            self.words[RSP_PROD] = self.words[RSP_PROD] + 1 & 0xFFFFFFFF
        self.xs.service()
        self.host.run()


def test_messages_in_pieces_and_out_of_order() -> None:
    alone = Alone()
    threads = [alone.start(alone.xs.read(name)) for name in ("a", "b")]
    assert alone.words[REQ_PROD] == 2 * (16 + 2)
    reply = XSD_SOCKMSG.pack(XS_READ, 2, 0, 2) + b"bb" + XSD_SOCKMSG.pack(XS_READ, 1, 0, 1) + b"a"
    for i in range(len(reply)):
        assert not threads[1].done or i > 17
        alone.answer(reply[i : i + 1])
    assert [thread.result() for thread in threads] == ["a", "bb"]


def test_nonsense_from_xenstored() -> None:
    alone, errors = Alone(), []

    def body() -> Body[str]:
        try:
            return (yield from alone.xs.read("a"))
        except XenError as error:
            errors.append(error.errno)
            return ""

    thread = alone.start(body())
    alone.answer(XSD_SOCKMSG.pack(XS_READ, 77, 0, 1) + b"x")  # nobody asked that
    alone.answer(XSD_SOCKMSG.pack(XS_WATCH_EVENT, 0, 0, 4) + b"p\0t\0")  # nor watches that
    assert not thread.done
    alone.words[RSP_PROD] = alone.words[RSP_CONS] + 2000 & 0xFFFFFFFF
    alone.xs.service()
    assert alone.words[RSP_CONS] == alone.words[RSP_PROD]
    alone.answer(XSD_SOCKMSG.pack(XS_DIRECTORY, 1, 0, 0))
    assert errors == [Errno.EINVAL]
    assert alone.guest.kernel.log[-1] == f"xenbus: unexpected type [{XS_DIRECTORY}], expected [{XS_READ}]"


def test_indexes_wrap() -> None:
    alone = Alone()
    start = (1 << 32) - 5
    struct.pack_into("<4I", alone.page, XENSTORE_WORDS, start, start, start, start)
    thread = alone.start(alone.xs.read("a"))
    assert alone.words[REQ_PROD] == 16 + 2 - 5
    alone.answer(XSD_SOCKMSG.pack(XS_READ, 1, 0, 3) + b"abc")
    assert thread.result() == "abc"

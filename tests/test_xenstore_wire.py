"""The wire protocol and the ring: replies byte for byte, framing, flow control, and hostile guests."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import (
    CONNECTION,
    ERROR,
    REQ_CONS,
    REQ_PROD,
    RSP_CONS,
    RSP_PROD,
    SERVER_FEATURES,
    XENSTORE_ERROR_NONE,
    XENSTORE_ERROR_PROTO,
    XENSTORE_ERROR_RINGIDX,
    XENSTORE_RECONNECT,
    XS_CONTROL,
    XS_DIRECTORY,
    XS_DIRECTORY_PART,
    XS_ERROR,
    XS_GET_DOMAIN_PATH,
    XS_GET_PERMS,
    XS_INTRODUCE,
    XS_IS_DOMAIN_INTRODUCED,
    XS_MKDIR,
    XS_READ,
    XS_RELEASE,
    XS_RESET_WATCHES,
    XS_RESUME,
    XS_RM,
    XS_SET_PERMS,
    XS_SET_TARGET,
    XS_TRANSACTION_END,
    XS_TRANSACTION_START,
    XS_UNWATCH,
    XS_WATCH,
    XS_WATCH_EVENT,
    XS_WRITE,
)
from pvirq.drivers.xenstore import Quotas, Xenstored, XenstoreRing
from pvirq.drivers.xenstore.protocol import WireConnection
from pvirq.xen.timer import Clock

U32 = (1 << 32) - 1
Message = tuple[int, int, int, bytes]


def message(kind: int, payload: bytes = b"", tx: int = 0, req: int = 7) -> bytes:
    return struct.pack("<4I", kind, req, tx, len(payload)) + payload


def messages(data: bytes) -> Iterator[Message]:
    while data:
        kind, req, tx, length = struct.unpack_from("<4I", data)
        yield kind, req, tx, data[16 : 16 + length]
        assert len(data) >= 16 + length
        data = data[16 + length :]


class Guest:
    """The guest's end of a ring: it counts notifications, and takes replies only when it is told to."""

    def __init__(self, daemon: Xenstored, domid: int) -> None:
        self.page = bytearray(4096)
        self.words = memoryview(self.page)[2048:2076].cast("I")
        self.notified = 0
        self.ring: XenstoreRing = daemon.introduce(domid, memoryview(self.page), self.notify)

    def notify(self) -> None:
        self.notified += 1

    def put(self, data: bytes) -> int:
        """As much of `data` as the ring takes."""
        prod = self.words[REQ_PROD]
        count = min(len(data), 1024 - ((prod - self.words[REQ_CONS]) & U32))
        for i in range(count):
            self.page[(prod + i) % 1024] = data[i]
        self.words[REQ_PROD] = (prod + count) & U32
        return count

    def take(self, limit: int = 1024) -> bytes:
        cons = self.words[RSP_CONS]
        count = min(limit, (self.words[RSP_PROD] - cons) & U32)
        self.words[RSP_CONS] = (cons + count) & U32
        return bytes(self.page[1024 + (cons + i) % 1024] for i in range(count))

    def talk(self, *requests: bytes) -> list[Message]:
        """Send requests of any length and return all that comes back."""
        data, answer = b"".join(requests), b""
        for _ in range(10000):
            sent = self.put(data)
            data = data[sent:]
            self.ring.service()
            got = self.take()
            answer += got
            if not data and not got:
                break
            self.ring.service()
        return list(messages(answer))

    def ask(self, kind: int, payload: bytes = b"", tx: int = 0) -> bytes:
        """The reply's payload; XenError for XS_ERROR. Watch events are dropped."""
        reply = next(m for m in self.talk(message(kind, payload, tx)) if m[0] != XS_WATCH_EVENT)
        assert reply[1:3] == (7, tx)
        if reply[0] == XS_ERROR:
            raise XenError(Errno[reply[3][:-1].decode()])
        assert reply[0] == kind
        return reply[3]


def error(guest: Guest, kind: int, payload: bytes = b"", tx: int = 0) -> str:
    with pytest.raises(XenError) as caught:
        guest.ask(kind, payload, tx)
    return caught.value.errno.name


@pytest.fixture
def daemon() -> Xenstored:
    daemon = Xenstored()
    tool = daemon.client()
    tool.write("/local/domain/3/name", "three")
    tool.set_perms("/local/domain/3", ["n3"])
    tool.set_perms("/local/domain/3/name", ["n0", "r3"])
    return daemon


def test_requests_and_replies(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    assert guest.ask(XS_READ, b"name\0") == b"three"
    assert guest.ask(XS_WRITE, b"data/x\0va\0lue") == b"OK\0"
    assert guest.ask(XS_READ, b"/local/domain/3/data/x\0") == b"va\0lue"
    assert guest.ask(XS_MKDIR, b"data/y\0") == b"OK\0"
    assert guest.ask(XS_DIRECTORY, b"data\0") == b"x\0y\0"
    assert guest.ask(XS_DIRECTORY, b"data/x\0") == b""
    assert guest.ask(XS_GET_PERMS, b"name\0") == b"n0\0r3\0"
    assert guest.ask(XS_SET_PERMS, b"data/x\0n3\0b0\0") == b"OK\0"
    assert guest.ask(XS_GET_PERMS, b"data/x\0") == b"n3\0b0\0"
    assert guest.ask(XS_RM, b"data/x\0") == b"OK\0"
    assert guest.ask(XS_RM, b"data/x\0") == b"OK\0"
    assert guest.ask(XS_GET_DOMAIN_PATH, b"5\0") == b"/local/domain/5\0"
    assert guest.ask(XS_GET_DOMAIN_PATH, b"-1x\0") == b"/local/domain/4294967295\0"
    assert guest.ask(XS_RESET_WATCHES, b"\0") == b"OK\0"
    assert daemon.store.check() == []


def test_errors(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    assert error(guest, XS_READ, b"none\0") == "ENOENT"
    assert error(guest, XS_READ, b"/\0") == "EACCES"
    for bad in (b"", b"name", b"name\0name\0", b"na me\0", b"name/\0", b"\xff\0", b"\0", b"@releaseDomain\0"):
        assert error(guest, XS_READ, bad) == "EINVAL"
        assert error(guest, XS_DIRECTORY, bad) == "EINVAL"
        assert error(guest, XS_RM, bad) == "EINVAL"
    assert error(guest, XS_WRITE, b"name") == "EINVAL"
    assert error(guest, XS_WRITE, b"name\0x") == "EACCES"
    assert error(guest, XS_SET_PERMS, b"name\0") == "EINVAL"
    assert error(guest, XS_SET_PERMS, b"name\0" + 6 * b"?\0") == "ENOSPC"  # counted before they are read
    assert error(guest, XS_SET_PERMS, b"name\0?\0") == "EINVAL"
    assert error(guest, XS_WATCH, b"name\0") == "EINVAL"
    assert error(guest, XS_WATCH, b"name\0t\0t\0") == "EINVAL"
    assert error(guest, XS_UNWATCH, b"name\0t\0") == "ENOENT"
    assert error(guest, XS_TRANSACTION_END, b"T\0") == "ENOENT"
    assert error(guest, XS_TRANSACTION_END, b"X\0") == "EINVAL"
    assert error(guest, XS_READ, b"name\0", tx=99) == "ENOENT"
    for kind in (XS_WATCH_EVENT, XS_ERROR, 20, 23, 0xFFFF, U32):
        assert error(guest, kind) == "ENOSYS"
    privileged = (XS_CONTROL, XS_INTRODUCE, XS_RELEASE, XS_IS_DOMAIN_INTRODUCED, XS_RESUME, XS_SET_TARGET)
    for kind in privileged:
        assert error(guest, kind, b"3\0") == "EACCES"


def test_transactions_on_the_wire(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    assert guest.ask(XS_TRANSACTION_START, b"\0") == b"1\0"
    assert guest.ask(XS_TRANSACTION_START, b"\0") == b"2\0"
    assert error(guest, XS_TRANSACTION_START, b"\0", tx=1) == "EBUSY"
    guest.ask(XS_WRITE, b"data/x\0one", tx=1)
    assert error(guest, XS_READ, b"data/x\0", tx=2) == "ENOENT"
    assert guest.ask(XS_TRANSACTION_END, b"T\0", tx=1) == b"OK\0"
    assert error(guest, XS_TRANSACTION_END, b"T\0", tx=2) == "EAGAIN"
    assert error(guest, XS_TRANSACTION_END, b"T\0", tx=2) == "ENOENT"
    assert guest.ask(XS_TRANSACTION_START, b"\0") == b"3\0"
    guest.ask(XS_WRITE, b"data/x\0two", tx=3)
    assert guest.ask(XS_TRANSACTION_END, b"F\0", tx=3) == b"OK\0"
    assert guest.ask(XS_READ, b"data/x\0") == b"one"
    assert guest.ask(XS_TRANSACTION_START, b"\0") == b"4\0"
    assert guest.ask(XS_RESET_WATCHES, b"\0", tx=4) == b"OK\0"
    assert error(guest, XS_READ, b"data/x\0", tx=4) == "ENOENT"


def test_watch_reply_then_event_and_event_before_reply(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    assert guest.talk(message(XS_WATCH, b"data\0tok\0")) == [
        (XS_WATCH, 7, 0, b"OK\0"),
        (XS_WATCH_EVENT, 0, 0, b"data\0tok\0"),
    ]
    assert guest.talk(message(XS_WRITE, b"data/x\0")) == [
        (XS_WATCH_EVENT, 0, 0, b"data/x\0tok\0"),
        (XS_WRITE, 7, 0, b"OK\0"),
    ]
    assert error(guest, XS_WATCH, b"data\0tok\0") == "EEXIST"
    daemon.client().write("/local/domain/3/data/x", "1")  # reaches the ring without a request
    assert list(messages(guest.take())) == [(XS_WATCH_EVENT, 0, 0, b"data/x\0tok\0")]
    assert guest.ask(XS_UNWATCH, b"data\0tok\0") == b"OK\0"
    assert guest.talk(message(XS_WRITE, b"data/x\0")) == [(XS_WRITE, 7, 0, b"OK\0")]


def test_duplicate_events_are_sent_once(daemon: Xenstored) -> None:
    guest, tool = Guest(daemon, 3), daemon.client()
    guest.talk(message(XS_WATCH, b"data\0tok\0"))
    for i in range(200):
        tool.write(f"/local/domain/3/data/{i % 60}", "x")
    in_ring = guest.words[RSP_PROD] - guest.words[RSP_CONS]
    assert in_ring == 1024
    events = [event[3] for event in guest.talk()]
    # What the ring took is gone from the queue and can come again; what waits waits once.
    assert len(events) < 100
    assert len(set(events[-60:])) == 60


def test_directory_part() -> None:
    daemon = Xenstored()
    connection = WireConnection(daemon)
    names = [f"child-{i:04}" for i in range(500)]
    tool = daemon.client()
    for name in names:
        tool.mkdir(f"/d/{name}")

    def ask(kind: int, payload: bytes) -> Message:
        connection.feed(message(kind, payload))
        (reply,) = messages(connection.drain())
        return reply

    assert ask(XS_DIRECTORY, b"/d\0")[0::3] == (XS_ERROR, b"E2BIG\0")
    listed, offset, generations = b"", 0, set()
    while not listed.endswith(b"\0\0"):
        kind, _, _, payload = ask(XS_DIRECTORY_PART, b"/d\0%d\0" % offset)
        assert kind == XS_DIRECTORY_PART
        assert len(payload) <= 4096
        generation, _, part = payload.partition(b"\0")
        generations.add(int(generation))
        listed += part
        offset += len(part)
    assert listed[:-2].decode().split("\0") == names
    assert generations == {daemon.store.nodes["/d"].generation}
    last = b"%d\0\0" % daemon.store.nodes["/d"].generation
    assert ask(XS_DIRECTORY_PART, b"/d\0" + b"99999\0")[3] == last
    assert ask(XS_DIRECTORY_PART, b"/d\0-1\0")[3] == last
    assert ask(XS_DIRECTORY_PART, b"/d\0")[0::3] == (XS_ERROR, b"EINVAL\0")
    assert ask(XS_DIRECTORY_PART, b"/tool/xenstored\x000\0")[3] == b"3\0\0"


def test_domain_0_on_the_wire() -> None:
    pages: list[bytearray] = []

    def attach(domid: int, port: int) -> tuple[memoryview, object]:
        if port == 99:
            raise XenError(Errno.ENOENT)
        pages.append(bytearray(4096))
        return memoryview(pages[-1]), lambda: None

    daemon = Xenstored(attach=attach)  # type: ignore[arg-type]
    dom0 = Guest(daemon, 0)
    assert dom0.ask(XS_WRITE, b"name\0Domain-0") == b"OK\0"
    assert daemon.client().read("/local/domain/0/name") == b"Domain-0"
    assert dom0.ask(XS_IS_DOMAIN_INTRODUCED, b"3\0") == b"F\0"
    dom0.talk(message(XS_WATCH, b"@introduceDomain\0i\0"), message(XS_WATCH, b"@releaseDomain\0r\0"))
    assert dom0.talk(message(XS_INTRODUCE, b"3\x000\x001\0")) == [
        (XS_WATCH_EVENT, 0, 0, b"@introduceDomain\0i\0"),
        (XS_INTRODUCE, 7, 0, b"OK\0"),
    ]
    assert dom0.ask(XS_IS_DOMAIN_INTRODUCED, b"3\0") == b"T\0"
    assert dom0.ask(XS_IS_DOMAIN_INTRODUCED, b"32752\0") == b"T\0"  # DOMID_SELF
    assert error(dom0, XS_INTRODUCE, b"4\x000\0") == "EINVAL"
    assert error(dom0, XS_INTRODUCE, b"4\x000\x000\0") == "EINVAL"
    assert error(dom0, XS_INTRODUCE, b"4\x000\x0099\0") == "ENOENT"
    assert dom0.ask(XS_RESUME, b"3\0") == b"OK\0"
    assert dom0.ask(XS_SET_TARGET, b"3\x000\0") == b"OK\0"
    assert error(dom0, XS_SET_TARGET, b"3\x005\0") == "ENOENT"
    assert error(dom0, XS_RELEASE, b"0\0") == "EINVAL"
    assert error(dom0, XS_RELEASE, b"9\0") == "ENOENT"
    assert dom0.talk(message(XS_RELEASE, b"3\0"))[0] == (XS_WATCH_EVENT, 0, 0, b"@releaseDomain\0r\0")
    assert dom0.ask(XS_IS_DOMAIN_INTRODUCED, b"3\0") == b"F\0"


def test_control(daemon: Xenstored) -> None:
    dom0 = Guest(daemon, 0)
    Guest(daemon, 3)
    assert dom0.ask(XS_CONTROL, b"check\0") == b"OK\0"
    assert dom0.ask(XS_CONTROL, b"print\0hello\0") == b"OK\0"
    assert dom0.ask(XS_CONTROL, b"help\0").startswith(b"check\t\nlog\ton|off\n")
    for bad in (
        b"",
        b"check",
        b"check\0x\0",
        b"none\0",
        b"log\0maybe\0",
        b"memreport\0",
        b"quota\0set\0nodes\0",
    ):
        assert error(dom0, XS_CONTROL, bad) == "EINVAL"
    assert b"\nnodes            :     1000 Nodes per domain\n" in dom0.ask(XS_CONTROL, b"quota\0")
    assert dom0.ask(XS_CONTROL, b"quota\0set\0nodes\x0042\0") == b"OK\0"
    assert daemon.store.quotas.nodes == 42
    assert dom0.ask(XS_CONTROL, b"quota\x003\0").startswith(b"Domain 3:\nnodes           :        1\n")
    assert error(dom0, XS_CONTROL, b"quota\x0077\0") == "ENOENT"
    assert dom0.ask(XS_CONTROL, b"quota-soft\0").count(b"\n") == 2


def test_notifications(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    assert guest.notified == 0
    guest.ring.service()
    assert guest.notified == 0  # nothing moved
    guest.put(message(XS_READ, b"name\0"))
    guest.ring.service()
    assert guest.notified == 4  # header and payload taken, header and payload written
    assert guest.words[SERVER_FEATURES] == 0
    assert guest.words[ERROR] == XENSTORE_ERROR_NONE


def test_ring_wraps_and_indexes_overflow(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    for index in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
        guest.words[index] = U32 - 100
    for i in range(100):
        value = b"%d" % i * 20
        assert guest.ask(XS_WRITE, b"data/x\0" + value) == b"OK\0"
        assert guest.ask(XS_READ, b"data/x\0") == value
    assert guest.words[REQ_PROD] < 1 << 20


def test_big_messages_go_in_pieces(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    value = bytes(range(256)) * 7
    assert guest.ask(XS_WRITE, b"data/x\0" + value) == b"OK\0"
    assert guest.ask(XS_READ, b"data/x\0") == value


def test_backlog_waits_for_room_and_requests_wait_for_replies(daemon: Xenstored) -> None:
    guest, tool = Guest(daemon, 3), daemon.client()
    tool.write("/local/domain/3/data/x", "v" * 1000)
    for _ in range(40):
        guest.put(message(XS_READ, b"data/x\0"))
    guest.ring.service()
    account = daemon.store.domains[3]
    assert account.outstanding == 20
    assert guest.words[REQ_CONS] != guest.words[REQ_PROD]
    replies = guest.talk()
    assert len(replies) == 40
    assert {reply[3] for reply in replies} == {b"v" * 1000}
    assert account.outstanding == 0


def test_a_guest_that_does_not_read_stalls_the_one_that_causes_its_events() -> None:
    clock = Clock()
    daemon = Xenstored(clock=clock, quotas=Quotas(node_size=100_000))  # names of children count for their parent
    tool = daemon.client()
    tool.mkdir("/shared")
    tool.set_perms("/shared", ["b0"])
    deaf, writer = Guest(daemon, 3), Guest(daemon, 4)
    deaf.talk(message(XS_WATCH, b"/shared\0t\0"))
    account = daemon.store.domains[4]
    replies: list[Message] = []
    for i in range(100):
        if account.outstanding >= 20:
            break
        replies += writer.talk(message(XS_WRITE, b"/shared/%s\0x" % (b"n" * 101 + b"%d" % i)))
    written = len(replies)
    assert 20 < written < 40  # the ring took a few events, then they began to count
    writer.put(message(XS_MKDIR, b"/shared/late\0"))
    writer.ring.service()
    assert writer.take() == b""
    deadline = clock.next_deadline()
    assert deadline is not None
    assert 20_000_000_000 <= deadline < 20_000_001_000
    clock.jump_to(deadline)
    clock.fire_due()  # drops all events but the one whose first bytes are in the ring already
    assert account.outstanding == 1 + 1
    assert list(messages(writer.take())) == [(XS_MKDIR, 7, 0, b"OK\0")]
    assert len(deaf.talk()) == written - 20 + 1 + 1
    assert account.outstanding == 0
    assert clock.next_deadline() is None


@pytest.mark.parametrize(("prod", "cons"), [(1025, 0), (0, 1), (5, U32 - 2000), (U32, 0)])
def test_hostile_request_indexes(daemon: Xenstored, prod: int, cons: int) -> None:
    guest = Guest(daemon, 3)
    guest.talk(message(XS_WATCH, b"data\0t\0"), message(XS_TRANSACTION_START, b"\0"))
    guest.words[REQ_PROD], guest.words[REQ_CONS] = prod, cons
    guest.ring.service()
    assert guest.words[ERROR] == XENSTORE_ERROR_RINGIDX
    assert guest.ring.connection.ignored
    assert not guest.ring.connection.watches
    assert not guest.ring.connection.transactions
    guest.words[REQ_PROD] = guest.words[REQ_CONS] = 0
    assert guest.talk(message(XS_READ, b"name\0")) == []
    daemon.introduce(3, memoryview(guest.page), guest.notify)  # does not help in 4.17
    assert guest.talk(message(XS_READ, b"name\0")) == []
    daemon.release(3)


def test_hostile_response_indexes(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    guest.put(message(XS_READ, b"name\0"))
    guest.words[RSP_CONS] = 1
    guest.ring.service()
    assert guest.words[ERROR] == XENSTORE_ERROR_RINGIDX


def test_too_long_payload(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    guest.put(struct.pack("<4I", XS_READ, 1, 0, 4097) + b"name\0")
    guest.ring.service()
    assert guest.words[ERROR] == XENSTORE_ERROR_PROTO
    assert guest.words[REQ_CONS] == 16


def test_introduce_again_starts_over(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    guest.talk(message(XS_WATCH, b"data\0t\0"), message(XS_TRANSACTION_START, b"\0"))
    guest.put(message(XS_READ, b"name\0")[:20])
    guest.ring.service()
    guest.words[CONNECTION] = XENSTORE_RECONNECT
    notified = guest.notified
    daemon.introduce(3, memoryview(guest.page), guest.notify)
    assert list(guest.words) == [0] * 7
    assert guest.notified == notified + 1
    assert guest.ask(XS_READ, b"name\0") == b"three"
    assert error(guest, XS_READ, b"name\0", tx=1) == "ENOENT"
    assert not guest.ring.connection.watches


def test_released_ring_is_left_alone(daemon: Xenstored) -> None:
    guest = Guest(daemon, 3)
    guest.put(message(XS_READ, b"name\0"))
    before = bytes(guest.page)
    daemon.release(3)
    guest.ring.service()
    assert bytes(guest.page) == before
    assert daemon.store.check() == []


def test_memory_quota_stops_reading() -> None:
    daemon = Xenstored()
    daemon.store.quotas.memory = 20000
    tool = daemon.client()
    tool.mkdir("/local/domain/3")
    tool.set_perms("/local/domain/3", ["n3"])
    guest = Guest(daemon, 3)
    replies = guest.talk(*(message(XS_WRITE, b"%d\0" % i + bytes(1500)) for i in range(30)))
    assert (XS_ERROR, 7, 0, b"EIO\0") in replies
    assert daemon.store.domains[3].memory < 20000
    assert daemon.store.check() == []


REQUESTS = st.builds(
    message,
    st.one_of(st.integers(0, 23), st.integers(0, U32)),
    st.one_of(
        st.binary(max_size=40),
        st.lists(
            st.sampled_from(
                [
                    b"data",
                    b"data/a",
                    b"/local/domain/3",
                    b"/",
                    b"name",
                    b"t",
                    b"T",
                    b"F",
                    b"n3",
                    b"r0",
                    b"3",
                    b"",
                ]
            ),
            max_size=4,
        ).map(lambda parts: b"".join(part + b"\0" for part in parts)),
    ),
    st.integers(0, 3),
)


def fresh() -> tuple[Xenstored, Guest]:
    daemon = Xenstored()
    tool = daemon.client()
    tool.mkdir("/local/domain/3")
    tool.set_perms("/local/domain/3", ["n3"])
    return daemon, Guest(daemon, 3)


@settings(max_examples=150, deadline=None)
@given(st.lists(REQUESTS, max_size=25), st.lists(st.integers(1, 60), min_size=1), st.integers(0, 3))
def test_any_requests_in_any_pieces(requests: list[bytes], sizes: list[int], domid: int) -> None:
    """Whatever is asked gets one reply each, and pieces make no difference."""
    daemon, guest = fresh()
    whole_daemon, whole = fresh()
    if domid == 0:
        guest, whole = Guest(daemon, 0), Guest(whole_daemon, 0)
    data, answer, turn = b"".join(requests), b"", 0
    while data:
        piece = data[: sizes[turn % len(sizes)]]
        data = data[guest.put(piece) :]
        guest.ring.service()
        answer += guest.take()
        turn += 1
    while True:
        guest.ring.service()
        more = guest.take()
        if not more:
            break
        answer += more
    replies = [reply for reply in messages(answer) if reply[0] != XS_WATCH_EVENT]
    assert len(replies) == len(requests)
    assert replies == [reply for reply in whole.talk(*requests) if reply[0] != XS_WATCH_EVENT]
    assert daemon.store.check() == []
    assert daemon.store.nodes.keys() == whole_daemon.store.nodes.keys()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=120), max_size=10))
def test_feed_takes_any_bytes(pieces: list[bytes]) -> None:
    daemon, _ = fresh()
    connection = WireConnection(daemon, 3, daemon.store.domains[3])
    for piece in pieces:
        connection.feed(piece)
        list(messages(connection.drain()))
    assert daemon.store.check() == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 6), st.one_of(st.integers(0, U32), st.integers(0, 1100))),
            st.tuples(st.integers(0, 2), st.integers(0, 1100), REQUESTS),
            REQUESTS,
        ),
        max_size=20,
    )
)
def test_any_ring_content(scribbles: list[object]) -> None:
    """Indexes, flags and ring bytes as a hostile guest may leave them: the store survives it."""
    daemon, guest = fresh()
    other = Guest(daemon, 4)
    for scribble in scribbles:
        if isinstance(scribble, bytes):
            if (guest.words[REQ_PROD] - guest.words[REQ_CONS]) & U32 <= 1024:
                guest.put(scribble)
        elif isinstance(scribble, tuple) and len(scribble) == 2:
            guest.words[scribble[0]] = scribble[1]
        elif isinstance(scribble, tuple):
            _, at, data = scribble
            guest.page[at : at + len(data)] = data
        guest.ring.service()
    assert len(guest.page) == 4096
    assert other.ask(XS_GET_DOMAIN_PATH, b"4\0") == b"/local/domain/4\0"
    daemon.release(3)
    assert daemon.store.check() == []
    assert daemon.client().ls("/local/domain") == []

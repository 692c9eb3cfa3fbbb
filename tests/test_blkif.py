"""The block protocol: data that arrives, interrupts that are counted, and frontends that mean no good."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driverlib import Guest, Host, OneQueue, disk_of, row
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_blkif import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_REQUEST,
    BLKIF_REQUEST_DISCARD,
    BLKIF_REQUEST_INDIRECT,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    BLKIF_SEGMENT,
)
from pvirq.abi.io_ring import REQ_PROD, RING_HEADER, RSP_PROD
from pvirq.abi.io_xenbus import XenbusState
from pvirq.drivers.blkback import BlkBack, blkback
from pvirq.drivers.blkfront import BlkFront
from pvirq.drivers.blockstore import BlockStore, Done, MemoryStore
from pvirq.linux.kthread import Body, Kthread
from pvirq.linux.personality import Personality
from pvirq.linux.pvops import Pvops
from pvirq.toolstack.devices import DeviceRef, Disk
from pvirq.xen.memory import PGT_L1
from pvirq.xen.timer import NS_PER_S

SECTORS = 4096


class SlowStore:
    """Answers when it is told to, in any order; as hardware it does nothing in place."""

    def __init__(self, sectors: int) -> None:
        self.sectors = sectors
        self.memory = MemoryStore(sectors)
        self.waiting: list[Callable[[], None]] = []
        self.flush, self.discard = self.memory.flush, self.memory.discard

    @property
    def flushes(self) -> int:
        return self.memory.flushes

    def submit(self, sector: int, count: int, data: bytes | None, done: Done) -> None:
        self.waiting.append(partial(self.memory.submit, sector, count, data, done))


class Setup:
    """A guest with one disk."""

    def __init__(
        self,
        *,
        front: Callable[..., Personality] = Pvops,
        back: Callable[..., Personality] = Pvops,
        vcpus: int = 1,
        order: int = 0,
        store: BlockStore | None = None,
        readonly: bool = False,
        persistent: bool = True,
        dom0_vcpus: int = 2,
    ) -> None:
        self.host = Host(dom0=back, dom0_vcpus=dom0_vcpus)
        self.store = store or MemoryStore(SECTORS)
        self.host.devices.add("/dev/loop0", self.store)
        drivers = {"vbd": blkback(self.host.devices, persistent=persistent)}
        self.host.finish(self.host.xenbus.start_backends(drivers))
        self.guest = self.add_guest(front, vcpus, order, readonly)
        self.disk = disk_of(self.guest)

    def add_guest(
        self, front: Callable[..., Personality] = Pvops, vcpus: int = 1, order: int = 0, readonly: bool = False
    ) -> Guest:
        guest = self.host.guest(vcpus, front)
        self.host.manager.attach_disk(guest.domain.domid, Disk("xvda", "/dev/loop0", readonly))
        self.host.run()
        self.host.finish(guest.xenbus.start_frontends({"vbd": partial(BlkFront, max_ring_order=order)}))
        self.host.run()
        return guest

    def back(self, guest: Guest | None = None) -> BlkBack:
        domid = (guest or self.guest).domain.domid
        driver = self.host.xenbus.backends.devices[f"backend/vbd/{domid}/51712"].driver
        assert isinstance(driver, BlkBack)
        return driver

    def read(self, sector: int, count: int) -> bytes:
        data: bytes = self.host.do(self.guest.kernel, self.disk.read(sector, count))
        return data

    def write(self, sector: int, data: bytes) -> None:
        self.host.do(self.guest.kernel, self.disk.write(sector, data))


@pytest.fixture
def setup() -> Iterator[Setup]:
    setup = Setup()
    yield setup
    setup.host.close()


KINDS = [
    {},
    {"vcpus": 2},
    {"vcpus": 2, "order": 2},
    {"order": 4},
    {"persistent": False},
    {"front": OneQueue},
    {"back": OneQueue},
    {"front": OneQueue, "back": OneQueue, "vcpus": 2},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_data_over_many_turns_of_the_ring(kind: dict[str, object]) -> None:
    setup = Setup(**kind)  # type: ignore[arg-type]
    model, random_ = bytearray(SECTORS * 512), random.Random(1)
    for _ in range(150):
        count = random_.choice([1, 3, 8, 20, 88, 89, 300])
        sector = random_.randrange(SECTORS - count)
        if random_.random() < 0.5:
            data = random_.randbytes(count * 512)
            setup.write(sector, data)
            model[sector * 512 : (sector + count) * 512] = data
        else:
            assert setup.read(sector, count) == model[sector * 512 : (sector + count) * 512]
    assert isinstance(setup.store, MemoryStore)
    assert setup.store.data[:] == model
    gnttab = setup.guest.xenbus.gnttab
    setup.host.do(setup.guest.kernel, setup.guest.xenbus.frontends.devices["device/vbd/51712"].unbind())
    setup.host.run()
    assert not [ref for ref in gnttab.table.active if ref >= 8]  # nothing is left mapped
    assert not setup.host.xenbus.gnttab.table.maptrack
    setup.host.close()


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS[:6]),
    steps=st.lists(
        st.tuples(st.booleans(), st.integers(0, SECTORS - 1), st.integers(1, 200), st.integers(0, 255)),
        min_size=1,
        max_size=25,
    ),
)
def test_requests_at_once(kind: dict[str, object], steps: list[tuple[bool, int, int, int]]) -> None:
    """Threads that write and read places of their own, all at the same time, over a store that answers backwards."""
    store = SlowStore(SECTORS)
    setup = Setup(store=store, **kind)  # type: ignore[arg-type]
    results: list[bool] = []

    def body(place: int, writes: bool, count: int, fill: int) -> Body[None]:
        sector = place * 160
        count = min(count, 160)
        data = bytes([fill, place]) * 256 * count
        if writes:
            yield from setup.disk.write(sector, data)
            results.append((yield from setup.disk.read(sector, count)) == data)
        else:
            results.append((yield from setup.disk.read(sector, count)) == bytes(count * 512))

    store.waiting.clear()
    setup.host.run()
    for i, (writes, _, count, fill) in enumerate(steps):
        Kthread(setup.guest.kernel, f"t{i}", body(i, writes, count, fill), i % len(setup.guest.domain.vcpus))
    setup.host.run()
    while store.waiting:
        store.waiting.pop()()
        setup.host.run()
    assert results == [True] * len(steps)
    setup.host.close()


def test_a_round_trip_is_one_interrupt_on_each_side(setup: Setup) -> None:
    host, kernel = setup.host, setup.guest.kernel

    def body() -> Body[None]:
        for i in range(300):
            if i % 3:
                yield from setup.disk.read(i, 8)
            else:
                yield from setup.disk.write(i, bytes(512))

    before = row(kernel, "blkif"), row(host.dom0, "blkif-backend")
    setup.read(0, 1)
    assert (row(kernel, "blkif") - before[0], row(host.dom0, "blkif-backend") - before[1]) == (1, 1)
    host.do(kernel, body())
    assert (row(kernel, "blkif") - before[0], row(host.dom0, "blkif-backend") - before[1]) == (301, 301)


def test_rows_as_recorded() -> None:
    """A two-vCPU guest: two queues, and after its look for partitions 1 and 0 interrupts, 2 and 1 in domain 0."""
    setup = Setup(vcpus=2)
    counts = [
        [sum(desc.kstat) for desc in kernel.irq.descs.values() if desc.actions and desc.actions[0].name == name]
        for kernel, name in ((setup.guest.kernel, "blkif"), (setup.host.dom0, "blkif-backend"))
    ]
    assert counts == [[1, 0], [2, 1]]
    setup.host.close()


def test_flush_and_discard(setup: Setup) -> None:
    assert isinstance(setup.store, MemoryStore)
    setup.write(10, b"x" * 1024)
    setup.host.do(setup.guest.kernel, setup.disk.flush())
    assert setup.store.flushes == 1
    setup.host.do(setup.guest.kernel, setup.disk.discard(10, 1))
    assert setup.read(10, 2) == bytes(512) + b"x" * 512


def test_a_flush_waits_for_what_is_under_way() -> None:
    store = SlowStore(SECTORS)
    setup = Setup(store=store)
    while store.waiting:
        store.waiting.pop()()
    setup.host.run()
    order: list[str] = []

    def write() -> Body[None]:
        yield from setup.disk.write(0, bytes(512))
        order.append("written")

    def flush() -> Body[None]:
        yield from setup.disk.flush()
        order.append("flushed")

    def read() -> Body[None]:
        yield from setup.disk.read(0, 1)
        order.append("read")

    for body in (write(), flush(), read()):
        Kthread(setup.guest.kernel, "t", body)
        setup.host.run()
    assert store.flushes == 0
    assert len(store.waiting) == 1  # nothing behind the flush was taken yet
    store.waiting.pop()()
    setup.host.run()
    assert (store.flushes, order) == (1, ["written", "flushed"])
    store.waiting.pop()()
    setup.host.run()
    assert order == ["written", "flushed", "read"]
    setup.host.close()


def test_read_only_disk() -> None:
    setup = Setup(readonly=True)
    with pytest.raises(XenError) as error:
        setup.write(0, bytes(512))
    assert error.value.errno is Errno.EROFS
    setup.disk.readonly = False  # a guest that tries nevertheless
    with pytest.raises(XenError) as error:
        setup.write(0, bytes(512))
    assert error.value.errno is Errno.EIO
    assert setup.read(0, 1) == bytes(512)
    setup.host.close()


def test_a_failing_device(setup: Setup) -> None:
    setup.back().sectors *= 2  # the store is smaller than its backend thinks
    with pytest.raises(XenError) as error:
        setup.read(SECTORS, 1)
    assert error.value.errno is Errno.EIO
    assert setup.read(0, 1) == bytes(512)


# Frontends that mean no good: by hand, on the ring of a real one.


class Hostile:
    """Writes any request on the first ring of a guest's disk, and reads the answers."""

    def __init__(self, setup: Setup, guest: Guest | None = None) -> None:
        self.setup = setup
        self.guest = guest or setup.guest
        self.queue = disk_of(self.guest).queues[0]
        self.guest.kernel.irq.disable_irq(self.queue.irq)
        self.page = setup.host.machine.page(self.queue.mfns[0])
        self.words = self.page[:16].cast("I")
        self.prod = self.words[REQ_PROD]
        self.frame = self.guest.xenbus.pages.alloc()
        self.ref = self.guest.xenbus.gnttab.grant_access(0, self.frame)

    def put(self, request: bytes) -> None:
        at = RING_HEADER + self.prod % 32 * 112
        self.page[at : at + len(request)] = request
        self.prod += 1

    def go(self) -> None:
        self.words[REQ_PROD] = self.prod
        self.guest.kernel.events.notify_remote_via_irq(self.queue.irq)
        self.setup.host.run()

    def ask(self, request: bytes) -> int | None:
        """The status of the answer; None where there is none."""
        answers = self.words[RSP_PROD]
        self.put(request)
        self.go()
        if self.words[RSP_PROD] == answers:
            return None
        status: int = struct.unpack_from("<h", self.page, RING_HEADER + answers % 32 * 112 + 10)[0]
        return status

    def rw(self, operation: int, sector: int, *segments: tuple[int, int, int], count: int | None = None) -> bytes:
        head = BLKIF_REQUEST.pack(operation, len(segments) if count is None else count, 0, 5, sector)
        return head + b"".join(BLKIF_SEGMENT.pack(*segment) for segment in segments)


@pytest.fixture
def hostile(setup: Setup) -> Hostile:
    return Hostile(setup)


def test_requests_by_hand(hostile: Hostile) -> None:
    ref, page = hostile.ref, hostile.setup.host.machine.page(hostile.frame)
    page[512:1024] = b"a" * 512
    assert hostile.ask(hostile.rw(BLKIF_OP_WRITE, 7, (ref, 1, 1))) == BLKIF_RSP_OKAY
    assert hostile.ask(hostile.rw(BLKIF_OP_READ, 7, (ref, 7, 7))) == BLKIF_RSP_OKAY
    assert bytes(page[7 * 512 :]) == b"a" * 512
    assert hostile.ask(BLKIF_REQUEST_DISCARD.pack(BLKIF_OP_DISCARD, 0, 0, 1, 7, 1)) == BLKIF_RSP_OKAY
    indirect = hostile.setup.guest.xenbus.pages.alloc()
    listed = hostile.setup.guest.xenbus.gnttab.grant_access(0, indirect)
    hostile.setup.host.machine.page(indirect)[:16] = BLKIF_SEGMENT.pack(ref, 2, 2) + BLKIF_SEGMENT.pack(ref, 0, 0)
    page[:512] = b"b" * 512
    page[1024:1536] = b"c" * 512
    request = BLKIF_REQUEST_INDIRECT.pack(BLKIF_OP_INDIRECT, BLKIF_OP_WRITE, 2, 1, 100, 0, listed, *[0] * 7)
    assert hostile.ask(request) == BLKIF_RSP_OKAY
    store = hostile.setup.store
    assert isinstance(store, MemoryStore)
    assert store.data[100 * 512 : 102 * 512] == b"c" * 512 + b"b" * 512


BAD: dict[str, tuple[Callable[[Hostile], bytes], int, str]] = {
    "grant": (lambda h: h.rw(BLKIF_OP_READ, 0, (4000, 0, 7)), BLKIF_RSP_ERROR, "invalid buffer"),
    "reserved grant": (lambda h: h.rw(BLKIF_OP_READ, 0, (5, 0, 7)), BLKIF_RSP_ERROR, "invalid buffer"),
    "second grant": (lambda h: h.rw(BLKIF_OP_READ, 0, (h.ref, 0, 7), (9999, 0, 7)), BLKIF_RSP_ERROR, "invalid buffer"),
    "sector": (lambda h: h.rw(BLKIF_OP_READ, SECTORS - 1, (h.ref, 0, 7)), BLKIF_RSP_ERROR, "access denied"),
    "sector 2^64": (lambda h: h.rw(BLKIF_OP_WRITE, (1 << 64) - 1, (h.ref, 0, 7)), BLKIF_RSP_ERROR, "access denied"),
    "last before first": (lambda h: h.rw(BLKIF_OP_READ, 0, (h.ref, 4, 2)), BLKIF_RSP_ERROR, "Bad segment"),
    "beyond the page": (lambda h: h.rw(BLKIF_OP_READ, 0, (h.ref, 0, 8)), BLKIF_RSP_ERROR, "Bad segment"),
    "no segments": (lambda h: h.rw(BLKIF_OP_READ, 0), BLKIF_RSP_ERROR, "Bad number of segments"),
    "12 segments": (lambda h: h.rw(BLKIF_OP_READ, 0, count=12), BLKIF_RSP_ERROR, "Bad number of segments"),
    "operation": (lambda h: h.rw(77, 0, (h.ref, 0, 7)), BLKIF_RSP_EOPNOTSUPP, "unknown operation"),
    "indirect operation": (
        lambda h: BLKIF_REQUEST_INDIRECT.pack(BLKIF_OP_INDIRECT, BLKIF_OP_DISCARD, 2, 1, 0, 0, h.ref, *[0] * 7),
        BLKIF_RSP_ERROR,
        "Invalid indirect operation",
    ),
    "257 indirect": (
        lambda h: BLKIF_REQUEST_INDIRECT.pack(BLKIF_OP_INDIRECT, BLKIF_OP_READ, 257, 1, 0, 0, h.ref, *[0] * 7),
        BLKIF_RSP_ERROR,
        "Bad number of segments",
    ),
    "indirect grant": (
        lambda h: BLKIF_REQUEST_INDIRECT.pack(BLKIF_OP_INDIRECT, BLKIF_OP_READ, 2, 1, 0, 0, 7777, *[0] * 7),
        BLKIF_RSP_ERROR,
        "invalid buffer",
    ),
    "discard": (
        lambda h: BLKIF_REQUEST_DISCARD.pack(BLKIF_OP_DISCARD, 0, 0, 1, SECTORS, 1),
        BLKIF_RSP_ERROR,
        "access denied",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("persistent", [True, False])
def test_bad_requests_get_an_error_and_a_line(name: str, persistent: bool) -> None:
    setup = Setup(persistent=persistent)
    hostile = Hostile(setup)
    other = setup.add_guest()
    make, status, why = BAD[name]
    assert hostile.ask(make(hostile)) == status
    assert why in setup.host.dom0.log[-1]
    assert "backend/vbd/1/51712" in setup.host.dom0.log[-1]
    # The device goes on, and nobody else notices.
    assert hostile.ask(hostile.rw(BLKIF_OP_READ, 0, (hostile.ref, 0, 7))) == BLKIF_RSP_OKAY
    assert setup.host.do(other.kernel, disk_of(other).read(0, 8)) == bytes(4096)


def _foreign(hostile: Hostile) -> int:
    return hostile.setup.add_guest().xenbus.pages.alloc()


def _page_table(hostile: Hostile) -> int:
    mfn = hostile.setup.guest.xenbus.pages.alloc()
    hostile.setup.host.machine.type[mfn] = PGT_L1
    hostile.setup.host.machine.type_count[mfn] = 1
    return mfn


FRAMES: dict[str, Callable[[Hostile], int]] = {
    "another domain's": _foreign,
    "a page table": _page_table,
    "domain 0's": lambda hostile: hostile.setup.host.dom0.domain.shared_info_mfn,
    "none": lambda hostile: hostile.setup.host.machine.frames + 5,
}


@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("persistent", [True, False])
def test_frames_that_are_not_the_guests_to_grant(name: str, persistent: bool) -> None:
    setup = Setup(persistent=persistent)
    hostile = Hostile(setup)
    mfn = FRAMES[name](hostile)
    assert isinstance(setup.store, MemoryStore)
    setup.store.data[:4096] = b"x" * 4096
    before = bytes(setup.host.machine.page(mfn)) if mfn < setup.host.machine.frames else b""
    hostile.setup.guest.xenbus.gnttab.grant(hostile.ref, 0, mfn)
    assert hostile.ask(hostile.rw(BLKIF_OP_READ, 0, (hostile.ref, 0, 7))) == BLKIF_RSP_ERROR
    assert "invalid buffer" in setup.host.dom0.log[-1]
    assert before == (bytes(setup.host.machine.page(mfn)) if before else b"")
    setup.host.close()


@pytest.mark.parametrize("persistent", [True, False])
def test_a_grant_to_read_is_not_written(persistent: bool) -> None:
    setup = Setup(persistent=persistent)
    hostile = Hostile(setup)
    gnttab = setup.guest.xenbus.gnttab
    frame = setup.guest.xenbus.pages.alloc()
    setup.host.machine.page(frame)[:4096] = b"k" * 4096
    ref = gnttab.grant_access(0, frame, readonly=True)
    assert hostile.ask(hostile.rw(BLKIF_OP_READ, 0, (ref, 0, 7))) == BLKIF_RSP_ERROR
    assert bytes(setup.host.machine.page(frame)) == b"k" * 4096
    # Where grants persist they are mapped for both directions, so that such a one is of no use at all.
    expected = BLKIF_RSP_ERROR if persistent else BLKIF_RSP_OKAY
    assert hostile.ask(hostile.rw(BLKIF_OP_WRITE, 0, (ref, 0, 7))) == expected
    setup.host.close()


def test_a_failed_indirect_request_is_answered_by_its_own_operation(hostile: Hostile) -> None:
    """A frontend takes no other for an answer to what it asked."""
    answers = hostile.words[RSP_PROD]
    indirect = BLKIF_REQUEST_INDIRECT.pack(BLKIF_OP_INDIRECT, BLKIF_OP_WRITE, 2, 9, 0, 0, 7777, *[0] * 7)
    assert hostile.ask(indirect) == BLKIF_RSP_ERROR
    assert struct.unpack_from("<QB", hostile.page, RING_HEADER + answers % 32 * 112) == (9, BLKIF_OP_WRITE)


def test_reused_ids(hostile: Hostile) -> None:
    """An id means something to its frontend only: each request gets its answer."""
    answers = hostile.words[RSP_PROD]
    for sector in range(3):
        hostile.put(hostile.rw(BLKIF_OP_WRITE, sector, (hostile.ref, sector, sector)))
    hostile.go()
    assert hostile.words[RSP_PROD] == answers + 3
    assert {struct.unpack_from("<Q", hostile.page, RING_HEADER + (answers + i) % 32 * 112)[0] for i in range(3)} == {5}


def test_a_ring_whose_grant_is_taken_back(hostile: Hostile) -> None:
    """It stays mapped for as long as the backend has it, whatever its owner writes into the table."""
    setup = hostile.setup
    gnttab, ref = setup.guest.xenbus.gnttab, hostile.queue.refs[0]
    assert not gnttab.revoke(ref)
    gnttab._machine.u64[gnttab._at(ref) >> 3] = 0
    assert hostile.ask(hostile.rw(BLKIF_OP_READ, 0, (hostile.ref, 0, 7))) == BLKIF_RSP_OKAY
    setup.guest.destroy()
    setup.host.run()
    assert not setup.host.xenbus.gnttab.table.maptrack
    assert not setup.host.hypervisor.zombies


def test_a_full_ring_is_not_served_to_its_end_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a ring may do in a row is bounded; then it is the others' turn, of the same CPU's."""
    setup = Setup(dom0_vcpus=1)
    monkeypatch.setattr("pvirq.drivers.blkback_ring.BUDGET_REQUESTS", 4)
    other = setup.add_guest()
    hostile, second = Hostile(setup), Hostile(setup, other)
    order: list[int] = []
    store = setup.store
    assert isinstance(store, MemoryStore)
    readv = store.readv

    def noted(sector: int, buffers: Sequence[memoryview]) -> Errno | None:
        order.append(sector)
        return readv(sector, buffers)

    monkeypatch.setattr(store, "readv", noted)
    for _ in range(20):
        hostile.put(hostile.rw(BLKIF_OP_READ, 1, (hostile.ref, 0, 7)))
    second.put(second.rw(BLKIF_OP_READ, 2, (second.ref, 0, 7)))
    # Both are there before the backend gets its turn, on one CPU.
    for one in (hostile, second):
        one.words[REQ_PROD] = one.prod
        one.guest.kernel.events.notify_remote_via_irq(one.queue.irq)
    setup.host.run()
    assert sorted(order) == [1] * 20 + [2]
    assert order.index(2) <= 8


@pytest.mark.parametrize("ahead", [33, 1000, 1 << 31, (1 << 32) - 1])
def test_an_index_run_ahead_halts_its_ring(hostile: Hostile, ahead: int) -> None:
    setup = hostile.setup
    other = setup.add_guest()
    answers = hostile.words[RSP_PROD]
    hostile.words[REQ_PROD] = answers + ahead & 0xFFFFFFFF
    setup.guest.kernel.events.notify_remote_via_irq(hostile.queue.irq)
    setup.host.run()
    assert hostile.words[RSP_PROD] == answers
    assert "Halting ring processing" in setup.host.dom0.log[-1]
    interrupts, lines = row(setup.host.dom0, "blkif-backend"), len(setup.host.dom0.log)
    for _ in range(100):  # it may storm: nobody listens
        setup.guest.kernel.events.notify_remote_via_irq(hostile.queue.irq)
        setup.host.run()
    assert (row(setup.host.dom0, "blkif-backend"), len(setup.host.dom0.log)) == (interrupts, lines)
    assert setup.host.do(other.kernel, disk_of(other).read(0, 8)) == bytes(4096)


def test_many_bad_requests_fill_no_log(hostile: Hostile) -> None:
    lines = len(hostile.setup.host.dom0.log)
    for _ in range(200):
        assert hostile.ask(hostile.rw(77, 0)) == BLKIF_RSP_EOPNOTSUPP
    assert len(hostile.setup.host.dom0.log) - lines == 10


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("ring-ref", "4321", "mapping ring-ref"),
        ("ring-ref", "x", "reading"),
        ("ring-ref", None, "reading"),
        ("event-channel", "999", "mapping ring-ref"),
        ("event-channel", "-1", "mapping ring-ref"),
        ("event-channel", str(10**30), "mapping ring-ref"),
        ("ring-ref", str(1 << 32), "mapping ring-ref"),
        ("protocol", b"\xff", "unknown fe protocol"),
        ("protocol", "ia64-abi", "unknown fe protocol"),
        ("multi-queue-num-queues", "3", "exceeding the maximum of 2"),
        ("multi-queue-num-queues", "0", "exceeding the maximum of 2"),
        ("ring-page-order", "5", "invalid ring page order"),
    ],
)
def test_bad_rings_close_their_device(setup: Setup, key: str, value: str | bytes | None, why: str) -> None:
    host = setup.host
    guest = host.guest()
    host.manager.attach_disk(2, Disk("xvda", "/dev/loop0"))
    host.run()
    base = "/local/domain/2/device/vbd/51712"
    frame = guest.xenbus.pages.alloc()
    nodes: dict[str, str | bytes | int] = {
        "ring-ref": guest.xenbus.gnttab.grant_access(0, frame),
        "event-channel": _port(guest),
        "protocol": "x86_64-abi",
    }
    for node, text in {**nodes, key: value}.items():
        if text is not None:
            host.store.write(f"{base}/{node}", text)
    host.store.write(f"{base}/state", int(XenbusState.Initialised))
    host.run()
    assert host.store.read_text("/local/domain/0/backend/vbd/2/51712/state") == str(int(XenbusState.Closing))
    assert why in host.store.read_text("/local/domain/0/error/backend/vbd/2/51712/error")
    assert why.encode() in "\n".join(host.dom0.log).encode()
    assert setup.read(0, 8) == bytes(4096)
    assert not guest.xenbus.gnttab.table.active


def _port(guest: Guest) -> int:
    events = guest.kernel.events
    irq: int = events.bind_listening(0, lambda irq, dev: 1, "hostile", guest)
    port: int = events.evtchn_from_irq(irq)
    return port


def test_a_disk_that_is_taken_away_with_requests_under_way() -> None:
    """The backend closes first: the frontend's requests fail at once, later ones too, and nothing is left."""
    store = SlowStore(SECTORS)
    setup = Setup(store=store)
    store.waiting.pop()()
    setup.host.run()
    failed: list[Errno] = []

    def body() -> Body[None]:
        for _ in range(2):
            try:
                yield from setup.disk.read(0, 8)
            except XenError as error:
                failed.append(error.errno)

    Kthread(setup.guest.kernel, "t", body())
    setup.host.run()
    gone = setup.host.manager.detach(DeviceRef(1, "vbd", 51712))
    setup.host.run()
    assert gone.done
    assert failed[0] is Errno.EIO
    assert len(failed) == 2
    store.waiting.pop()()
    setup.host.pass_time(3 * NS_PER_S)
    assert not setup.host.xenbus.gnttab.table.maptrack
    assert not [ref for ref in setup.guest.xenbus.gnttab.table.active if ref >= 8]


def test_closing_with_requests_under_way() -> None:
    store = SlowStore(SECTORS)
    setup = Setup(store=store)
    store.waiting.pop()()
    setup.host.run()
    failed: list[Errno] = []

    def body() -> Body[None]:
        try:
            yield from setup.disk.read(0, 8)
        except XenError as error:
            failed.append(error.errno)

    Kthread(setup.guest.kernel, "t", body())
    setup.host.run()
    dev = setup.guest.xenbus.frontends.devices["device/vbd/51712"]
    setup.host.do(setup.guest.kernel, dev.unbind())
    setup.host.run()
    assert failed == [Errno.EIO]
    store.waiting.pop()()  # the answer comes for nobody
    setup.host.run()
    assert setup.host.store.read_text("/local/domain/0/backend/vbd/1/51712/state") == "6"


def test_a_guest_that_dies_with_requests_under_way() -> None:
    store = SlowStore(SECTORS)
    setup = Setup(store=store)
    store.waiting.pop()()
    setup.host.run()
    Kthread(setup.guest.kernel, "t", setup.disk.read(0, 8))
    setup.host.run()
    setup.guest.destroy()
    setup.host.run()
    assert not setup.host.xenbus.backends.devices
    store.waiting.pop()()
    setup.host.run()
    assert row(setup.host.dom0, "blkif-backend") == 0
    assert not setup.host.xenbus.gnttab.table.maptrack
    assert not setup.host.hypervisor.zombies
    setup.host.close()


def test_a_storm_of_notifications(setup: Setup) -> None:
    """Events that bring nothing are looked at ever later; what does bring something is then served late, not never."""
    host, queue = setup.host, setup.disk.queues[0]
    before = row(host.dom0, "blkif-backend")
    for _ in range(1000):
        setup.guest.kernel.events.notify_remote_via_irq(queue.irq)
        host.run()
    assert row(host.dom0, "blkif-backend") - before <= 3
    assert setup.read(0, 8) == bytes(4096)


# Backends that break.


def test_backend_dies_and_comes_back(setup: Setup) -> None:
    """It takes the ring up where it stands: requests that waited are answered."""
    host, bus = setup.host, setup.host.xenbus.backends
    setup.write(3, b"q" * 512)
    factory = blkback(host.devices)
    host.do(host.dom0, bus.kill_driver("vbd"))
    assert row(host.dom0, "blkif-backend") == 0
    thread = Kthread(setup.guest.kernel, "t", setup.disk.read(3, 1))
    host.run()
    assert not thread.done
    host.do(host.dom0, bus.register_driver("vbd", factory))
    host.run()
    assert thread.done
    assert thread.result() == b"q" * 512
    setup.write(4, b"r" * 512)
    assert setup.read(3, 2) == b"q" * 512 + b"r" * 512
    assert host.store.read_text("/local/domain/0/backend/vbd/1/51712/state") == "4"


@pytest.mark.parametrize("word", ["rsp_prod", "id"])
def test_a_backend_that_lies_breaks_the_disk_only(setup: Setup, word: str) -> None:
    queue = setup.disk.queues[0]
    free = setup.guest.xenbus.gnttab.free + len(queue.refs) + len(queue._grants)
    words = setup.host.machine.page(queue.mfns[0])[:16].cast("I")
    ring = setup.back().rings[0].ring
    if word == "rsp_prod":
        words[RSP_PROD] += 5
    else:
        ring.put(struct.pack("<QBxh", 12345, 0, 0))
        words[REQ_PROD] += 1
        queue.ring.req_prod_pvt += 1
        ring.push_responses()
    setup.host.dom0.events.notify_remote_via_irq(setup.back().rings[0]._irq)
    setup.host.run()
    assert "disabled for further use" in setup.guest.kernel.log[-1]
    with pytest.raises(XenError) as error:
        setup.read(0, 1)
    assert error.value.errno is Errno.EIO
    setup.host.do(setup.guest.kernel, setup.guest.xenbus.frontends.devices["device/vbd/51712"].unbind())
    setup.host.pass_time(3 * NS_PER_S)
    assert setup.guest.xenbus.gnttab.free == free


@pytest.mark.parametrize("limit", ["grants", "ports"])
def test_a_frontend_without_room_for_its_rings(setup: Setup, limit: str) -> None:
    host = setup.host
    guest = host.guest(2)
    gnttab = guest.xenbus.gnttab
    if limit == "grants":
        gnttab.alloc(512 * 64 - 8 - 3)  # room for one ring of two pages
    else:
        channels = guest.domain.evtchn
        channels.max_port = max(channel.port for channel in channels.channels if channel.state)
    free = gnttab.free
    host.manager.attach_disk(2, Disk("xvda", "/dev/loop0"))
    host.run()
    host.finish(guest.xenbus.start_frontends({"vbd": partial(BlkFront, max_ring_order=1)}))
    host.run()
    assert "setting up the ring" in host.store.read_text("/local/domain/2/error/device/vbd/51712/error")
    assert host.store.read_text("/local/domain/2/device/vbd/51712/state") in ("5", "6")
    assert gnttab.free == free

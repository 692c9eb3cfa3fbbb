"""Backends whose answers come late, never, as errors or as lies, and what frontends make of that; reloaded drivers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pvirq
from faultlib import MS, do, elapsed, new_host, run_for
from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blockstore import MemoryStore
from pvirq.lab.faults import Faults
from pvirq.modelled import ModelledGuest
from pvirq.xen.probes import has_front

KERNELS = ["pvops", "2.6.18"]


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with new_host() as host:
        host.add_bridge()
        yield host


@pytest.fixture
def faults(host: pvirq.Host) -> Iterator[Faults]:
    with Faults(host) as faults:
        yield faults
        faults.clear()
        for served in host.backends.xenbus.served.rings:
            assert not any(has_front(served.ring, name) for name in ("put", "put_all", "push_responses"))


def add(host: pvirq.Host, kernel: str = "pvops", vcpus: int = 1) -> ModelledGuest:
    guest = host.model(kernel, vcpus=vcpus)
    host.attach_disk(guest, "xvda", MemoryStore(4096, b"memory"))
    host.attach_nic(guest)
    host.run(lambda: guest.has_disk("xvda") and guest.has_nic(0), 10**10)
    host.settle()
    return guest


@pytest.fixture(params=KERNELS)
def guest(host: pvirq.Host, request: pytest.FixtureRequest) -> ModelledGuest:
    return add(host, request.param)


def read(guest: ModelledGuest, sector: int = 0) -> bytes:
    return do(guest, guest.disk("xvda").read(sector, 8))


def frame(to: ModelledGuest, by: ModelledGuest, payload: bytes) -> bytes:
    def mac(guest: ModelledGuest) -> bytes:
        return bytes((0, 0x16, 0x3E, 0, guest.domain.domid, 0))

    return mac(to) + mac(by) + b"\x88\xb5" + payload.ljust(46, b"\0")


# -- late and never ----------------------------------------------------------------------------------------------------


def test_slow(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    assert elapsed(host, lambda: read(guest)) == 0
    with faults.slow(20 * MS, device="vbd-51712", every=2) as rule:
        assert [elapsed(host, lambda: read(guest)) // MS for _ in range(4)] == [0, 20, 0, 20]
        assert rule.fired == 2
    assert elapsed(host, lambda: read(guest)) == 0


def test_slow_answers_come_in_their_order(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    """Each takes its time, but none can be seen before the one in front of it."""
    faults.slow(MS, jitter=50 * MS, device="vbd-51712", probability=0.7)
    ended: list[tuple[int, int]] = []
    start = host.clock.now()

    def reading(i: int) -> pvirq.linux.kthread.Body[None]:  # type: ignore[name-defined]
        data = yield from guest.disk("xvda").read(8 * i, 8)
        assert len(data) == 4096
        ended.append((i, host.clock.now()))

    threads = [guest.kernel.spawn(f"reader{i}", reading(i)) for i in range(20)]
    assert host.run(lambda: all(thread.done for thread in threads), 10**10)
    assert [i for i, _ in ended] == list(range(20))
    assert MS <= ended[-1][1] - start <= 51 * MS
    assert len({when for _, when in ended}) > 1


def test_silent(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    with faults.silent(device="vbd-51712") as rule:
        readings = [guest.kernel.spawn("reader", guest.disk("xvda").read(8 * i, 8)) for i in range(5)]
        assert not host.run(lambda: any(reading.done for reading in readings), 10**10)
        assert rule.fired == 5
    assert host.run(lambda: all(reading.done for reading in readings), MS)
    rule = faults.silent(device="vbd-51712", after=1, until=3)
    run_for(host, 1500 * MS)
    assert elapsed(host, lambda: read(guest)) == 1500 * MS
    assert not rule.active


def test_other_devices_and_domains_go_on(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    other = add(host)
    host.attach_disk(guest, "xvdb", MemoryStore(4096))
    host.run(lambda: guest.has_disk("xvdb"), 10**10)
    with faults.silent(domain=guest, device="vbd-51712", ring="blkif"):
        reading = guest.kernel.spawn("reader", guest.disk("xvda").read(0, 8))
        do(guest, guest.disk("xvdb").read(0, 8))
        read(other)
        assert not reading.done
    with faults.silent(domain=other.name) as rule:
        read(guest)
        assert rule.fired == 0


def test_a_slow_interface(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    other, got = add(host), []
    other.nic().on_receive = lambda skb: got.append((host.clock.now(), skb.data[14:20]))
    with faults.slow(5 * MS, device="vif-0", ring="rx", domain=other) as rule:
        start = host.clock.now()
        for i in range(10):
            guest.kernel.queue_work(lambda i=i: guest.nic().transmit(frame(other, guest, b"%06d" % i)))  # type: ignore[misc]
            run_for(host, MS)
        run_for(host, 100 * MS)
        assert [data for _, data in got] == [b"%06d" % i for i in range(10)]
        assert [when - start for when, _ in got] == [(5 + i) * MS for i in range(10)]
        assert rule.fired == 10
    # Nobody's transmissions are answered: the ring is full at last, and then takes no more.
    with faults.silent(device="vif-0", ring="tx", domain=guest):
        for _ in range(400):
            guest.kernel.queue_work(lambda: guest.nic().transmit(frame(other, guest, b"")))
        run_for(host, 100 * MS)
        assert len(got) == 10 + 256
    run_for(host, 100 * MS)
    assert len(got) == 410


def test_a_device_that_goes_while_answers_are_held(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rules = [faults.slow(100 * MS, ring="blkif"), faults.silent(ring="tx")]
    guest.kernel.queue_work(lambda: guest.nic().transmit(frame(guest, guest, b"")))
    reading = guest.kernel.spawn("reader", guest.disk("xvda").read(0, 8))
    run_for(host, MS)
    assert [rule.fired for rule in rules] == [1, 1]
    host.detach_disk(guest, "xvda")
    with pytest.raises(XenError):
        do(guest, reading.wait())
    host.destroy(guest)
    run_for(host, 1000 * MS)
    again = add(host)
    assert elapsed(host, lambda: read(again)) == 100 * MS


# -- errors and lies ---------------------------------------------------------------------------------------------------


def test_error(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rule = faults.error(device="vbd-51712", skip=2, count=1)
    read(guest)
    read(guest)
    with pytest.raises(XenError) as error:
        read(guest)
    assert error.value.errno is Errno.EIO
    read(guest)
    assert rule.fired == 1


def test_an_interface_with_errors(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    other, got = add(host), []
    other.nic().on_receive = got.append
    faults.error(device="vif-0", ring="rx", domain=other, every=2)
    for _ in range(10):
        guest.kernel.queue_work(lambda: guest.nic().transmit(frame(other, guest, b"")))
        run_for(host, MS)
    assert len(got) == 5


@pytest.mark.parametrize("lie", ["id", "status", "garbage", "index"])
def test_a_disk_that_lies(host: pvirq.Host, faults: Faults, guest: ModelledGuest, lie: str) -> None:
    rule = faults.hostile(lie, device="vbd-51712", count=1)
    with pytest.raises(XenError) as error:
        read(guest)
    assert error.value.errno is Errno.EIO
    assert rule.fired == 1
    broken = [line for line in guest.kernel.log if "disabled for further use" in line]
    if lie == "status":  # one request failed, no more
        assert not broken
        read(guest)
    else:
        assert broken


@pytest.mark.parametrize("lie", ["id", "garbage", "index"])
@pytest.mark.parametrize("ring", ["tx", "rx"])
def test_an_interface_that_lies(host: pvirq.Host, faults: Faults, guest: ModelledGuest, ring: str, lie: str) -> None:
    other = add(host)
    rule = faults.hostile(lie, device="vif-0", ring=ring, domain=guest)
    for _ in range(20):
        guest.kernel.queue_work(lambda: guest.nic().transmit(frame(other, guest, b"")))
        other.kernel.queue_work(lambda: other.nic().transmit(frame(guest, other, b"")))
        run_for(host, MS)
    assert rule.fired > 0
    rule.remove()
    run_for(host, 100 * MS)
    read(guest)  # the guest goes on, if without its interface


# -- restart -----------------------------------------------------------------------------------------------------------


def test_restart(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rule = faults.restart("vbd", down=500 * MS, after=0.1)
    run_for(host, 200 * MS)
    assert rule.fired == 1
    assert 399 * MS <= elapsed(host, lambda: read(guest)) <= 410 * MS
    assert [firing.action for firing in faults.firings] == ["unloaded", "loaded"]
    assert elapsed(host, lambda: read(guest)) == 0


def test_restart_again_and_again(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rule, other = faults.restart("vbd", down=20 * MS, period=0.1), faults.restart("vbd", down=30 * MS, period=0.07)
    for _ in range(30):
        read(guest)
        run_for(host, 25 * MS)
    assert rule.fired + other.fired > 10
    rule.remove()
    other.remove()
    run_for(host, 100 * MS)
    assert elapsed(host, lambda: read(guest)) == 0


def test_a_restart_that_is_taken_back(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    with faults.restart("vbd", down=10**12):
        run_for(host, MS)
        reading = guest.kernel.spawn("reader", guest.disk("xvda").read(0, 8))
        assert not host.run(lambda: reading.done, 10**9)
    assert host.run(lambda: reading.done, 10**9)


def test_rings_are_disturbed_only_while_there_is_a_rule(host: pvirq.Host, faults: Faults) -> None:
    guest = add(host, vcpus=2)
    rings = host.backends.xenbus.served.rings
    assert sorted((served.device, served.name) for served in rings) == [
        ("vbd-51712", "blkif"), ("vbd-51712", "blkif"), ("vif-0", "rx"), ("vif-0", "rx"), ("vif-0", "tx"),
        ("vif-0", "tx"),
    ]  # fmt: skip
    assert all(served.domid == guest.domain.domid for served in rings)
    with faults.slow(MS, device="nothing"):
        assert all(has_front(served.ring, "put") for served in rings)
    assert not any(has_front(served.ring, "push_responses") for served in rings)
    host.destroy(guest)
    host.settle()
    assert not rings

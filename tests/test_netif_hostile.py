"""Frontends that mean no good, beyond single requests: rings, states and storms. It costs them their own device only.

What is in requests is in test_netif.py.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driverlib import nic_of, row
from netiflib import Hostile, Net, frame
from pvirq.abi.io_netif import (
    NETIF_EXTRA_GSO,
    NETIF_RSP_ERROR,
    NETIF_TX_REQUEST,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_GSO_TYPE_TCPV4,
    NETTXF_csum_blank,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from pvirq.abi.io_ring import REQ_EVENT, REQ_PROD, RING_HEADER, RSP_EVENT, RSP_PROD
from pvirq.drivers.skb import Skb, complete, finish
from pvirq.linux.pvops import Pvops
from pvirq.net.station import Station


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net(Pvops, Pvops, Pvops)
    yield net
    net.host.close()


@pytest.fixture
def hostile(net: Net) -> Hostile:
    return Hostile(net)


def check_others(net: Net) -> None:
    """Guests 2 and 3 still reach each other."""
    for sender, to in ((2, 3), (3, 2)):
        data = frame(to, sender, random.Random(sender).randbytes(2000))
        assert net.send(sender, data)
        net.host.run()
        assert net.got[to - 1][-1].data == data


def state(net: Net, domid: int = 1) -> str:
    return net.host.store.read_text(f"/local/domain/0/backend/vif/{domid}/0/state")


@pytest.mark.parametrize("ahead", [257, 5000, 1 << 31, -1])
def test_a_receive_index_run_ahead(net: Net, ahead: int) -> None:
    """Its own frames are lost, in bounded memory; nobody believes in buffers that no ring could hold."""
    queue = nic_of(net.guests[0]).queues[0]
    words = net.host.machine.page(queue._ring_mfns[1])[:16].cast("I")
    words[REQ_PROD] = words[REQ_PROD] + ahead & 0xFFFFFFFF
    for i in range(900):
        net.send(2, frame(1, 2, bytes([i & 0xFF]) * 1400))
        net.host.run()
    vif = net.back(1).vif
    assert vif is not None
    if ahead > 256:
        assert vif.rx_dropped > 0
        assert vif.rx_packets == 0
    assert vif.queues[0]._rx_bytes < 1 << 20
    check_others(net)


@pytest.mark.parametrize("word", [REQ_EVENT, RSP_PROD, RSP_EVENT])
def test_the_words_of_the_ring_that_are_not_its_to_write(hostile: Hostile, word: int) -> None:
    """The backend goes by its own indexes, so this only spoils the frontend's notifications."""
    for value in (0, 77, 0xFFFFFFFF, 1 << 31):
        hostile.words[word] = value
        hostile.put(hostile.request(60))
    assert len(hostile.net.got[1]) == 4
    check_others(hostile.net)


def test_closing_in_the_middle_of_a_packet(hostile: Hostile) -> None:
    """The rings go, with half a packet and frames to it on the way; it may come back afterwards."""
    net, store = hostile.net, hostile.net.host.store
    at = RING_HEADER + hostile.prod % 256 * 12
    hostile.page[at : at + 12] = hostile.request(5000, flags=NETTXF_more_data)
    hostile.words[REQ_PROD] = hostile.prod + 1
    for i in range(20):
        net.send(2, frame(1, 2, bytes([i]) * 1400))
    hostile.guest.kernel.events.notify_remote_via_irq(hostile.queue.tx_irq)
    store.write("/local/domain/1/device/vif/0/state", 5)
    net.host.run()
    assert state(net) in ("5", "6")
    vif = net.back(1).vif
    assert vif is not None
    assert not vif.queues
    table = hostile.guest.xenbus.gnttab.table
    assert not [ref for ref in table.active if ref >= 8]  # nothing of it is held
    assert net.send(2, frame(1, 2, bytes(46)))
    net.host.run()
    check_others(net)


def test_destroyed_with_requests_on_the_ring(hostile: Hostile) -> None:
    """Its pages go only after domain 0 has let go of them."""
    net, host = hostile.net, hostile.net.host
    for _ in range(30):
        net.send(2, frame(1, 2, bytes(1400)))
    hostile.words[REQ_PROD] = hostile.prod + 3
    hostile.guest.kernel.events.notify_remote_via_irq(hostile.queue.tx_irq)
    hostile.guest.destroy()
    host.run()
    assert "vif1.0" not in host.network.interfaces
    assert 1 not in host.hypervisor.domains
    assert 1 not in host.hypervisor.zombies
    assert not host.store.exists("/local/domain/0/backend/vif/1/0")
    check_others(net)


def test_ring_pages_are_not_taken_back_while_they_are_mapped(hostile: Hostile) -> None:
    """The frontend ends its grants, and writes what it likes where the rings were: they stay what was mapped."""
    net, gnttab = hostile.net, hostile.guest.xenbus.gnttab
    assert not gnttab.revoke(hostile.queue.tx_ref)
    assert not gnttab.revoke(hostile.queue.rx_ref)
    table = gnttab.table
    struct.pack_into("<HHI", net.host.machine.mem, table._at(hostile.queue.tx_ref), 0, 77, 0)
    hostile.put(hostile.request(60))
    assert len(net.got[1]) == 1
    check_others(net)


def test_a_storm_of_notifications(hostile: Hostile) -> None:
    """Events with nothing behind them come later and later (lateeoi), however many the frontend sends."""
    net = hostile.net
    before = row(net.host.dom0, "vif1.0-q0-tx")
    for _ in range(2000):
        hostile.notify()
    assert row(net.host.dom0, "vif1.0-q0-tx") - before < 100
    check_others(net)
    # Once it is quiet, it is served again.
    net.host.pass_time(10**9)
    before = len(net.got[1])
    hostile.put(hostile.request(60))
    net.host.pass_time(10**9)
    assert len(net.got[1]) == before + 1


def test_errors_without_end_fill_no_log(hostile: Hostile) -> None:
    log = hostile.net.host.dom0.log
    for _ in range(300):
        assert hostile.answers(*[hostile.request(60, ref=4000)] * 16) == [NETIF_RSP_ERROR] * 16
    assert len(log) <= (log.maxlen or 0)
    assert "Grant copy of a packet failed" in log[-1]
    check_others(hostile.net)


def test_segments_of_one_byte(hostile: Hostile) -> None:
    """A wire gets nothing of a frame that wants to be cut so small, whoever else takes it whole."""
    net = hostile.net
    station = Station("station0", net.host.clock, "10.0.0.1/24")
    net.host.network.add(station, "xenbr0")
    header = frame(2, 1, b"")[:12] + b"\x08\x00" + bytes((0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6)) + bytes(10)
    net.host.machine.page(hostile.frame)[: len(header)] = header
    net.host.machine.page(hostile.frame)[:6] = station.mac
    gso = NETIF_EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, 1, XEN_NETIF_GSO_TYPE_TCPV4, 0)
    hostile.put(hostile.request(4000, flags=NETTXF_extra_info | NETTXF_csum_blank), gso)
    net.host.pass_time(10**6)
    assert not station.frames
    gso = NETIF_EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, 1000, XEN_NETIF_GSO_TYPE_TCPV4, 0)
    hostile.put(hostile.request(4000, flags=NETTXF_extra_info | NETTXF_csum_blank), gso)
    net.host.pass_time(10**6)
    assert len(station.frames) == 4
    check_others(net)


@given(
    st.binary(min_size=14, max_size=200), st.booleans(), st.sampled_from([0, 1, 48, 60, 65535]), st.integers(0, 3),
    st.sampled_from([b"\x08\x00", b"\x86\xdd", b"\x08\x06"]), st.sampled_from([6, 17, 1]), st.integers(0, 15),
)  # fmt: skip
def test_any_bytes_can_be_finished(
    data: bytes, blank: bool, gso: int, kind: int, ether: bytes, protocol: int, header: int
) -> None:
    fixed = bytearray(data)
    fixed[12:14] = ether
    if len(fixed) > 24:
        fixed[14] = 0x40 | header
        fixed[23 if ether == b"\x08\x00" else 20] = protocol
    skb = Skb(bytes(fixed), blank, False, gso, kind)
    assert len(finish(skb)) <= max(1, len(fixed) // 48 + 1)
    assert len(complete(skb)) == len(fixed)


def requests() -> st.SearchStrategy[list[bytes]]:
    flags = st.sampled_from([0, 0, NETTXF_more_data, NETTXF_extra_info, NETTXF_csum_blank, 0xFFFF])
    request = st.builds(
        NETIF_TX_REQUEST.pack, st.sampled_from([8, 9, 300, 520, 4000, 1 << 31]), st.integers(0, 65535), flags,
        st.integers(0, 65535), st.sampled_from([0, 13, 14, 60, 4096, 65535]),
    )  # fmt: skip
    extra = st.builds(
        NETIF_EXTRA_GSO.pack, st.integers(0, 6), st.integers(0, 1), st.sampled_from([0, 1, 1448]), st.integers(0, 3),
        st.just(0),
    )  # fmt: skip
    return st.lists(st.one_of(request, extra, st.binary(min_size=12, max_size=12)), max_size=30)


@settings(max_examples=40)
@given(st.lists(st.tuples(requests(), st.one_of(st.none(), st.integers(0, 0xFFFFFFFF))), max_size=5))
def test_any_bytes_on_the_ring(steps: list[tuple[list[bytes], int | None]]) -> None:
    net = Net(Pvops, Pvops, Pvops)
    hostile = Hostile(net)
    for entries, index in steps:
        hostile.put(*entries)
        if index is not None:
            hostile.words[REQ_PROD] = index
            hostile.notify()
    vif = net.back(1).vif
    assert vif is not None
    if vif.disabled:
        assert net.host.dom0.log[-1].endswith("vif1.0: fatal error; disabling device")
    check_others(net)
    net.host.close()

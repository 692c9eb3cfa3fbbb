"""The network protocol: frames both ways, interrupts that are counted, bridges, and frontends that mean no good."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driverlib import Guest, OneQueue, nic_of, row
from netiflib import Hostile, Net, frame, mac
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_netif import (
    NETIF_EXTRA_GSO,
    NETIF_EXTRA_MCAST,
    NETIF_RSP_ERROR,
    NETIF_RSP_OKAY,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_EXTRA_TYPE_MCAST_ADD,
    XEN_NETIF_GSO_TYPE_TCPV4,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from pvirq.abi.io_ring import REQ_PROD, RSP_PROD
from pvirq.drivers.bridge import Interface, PhysicalInterface
from pvirq.drivers.netback import netback
from pvirq.drivers.skb import Skb, checksum, finish
from pvirq.linux.personality import Personality
from pvirq.linux.pvops import Pvops
from pvirq.toolstack.devices import Nic


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net(Pvops, Pvops)
    yield net
    net.host.close()


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("dom0", [Pvops, OneQueue])
@pytest.mark.parametrize("kinds", [(Pvops, Pvops), (Pvops, OneQueue), (OneQueue, OneQueue)])
def test_frames_both_ways(
    kinds: tuple[Callable[..., Personality], ...], dom0: Callable[..., Personality], vcpus: int
) -> None:
    net = Net(*kinds, vcpus=vcpus, dom0=dom0)
    random_ = random.Random(2)
    sent: tuple[list[bytes], list[bytes]] = ([], [])
    for _ in range(700):
        way = random_.randrange(2)
        data = frame(2 - way, 1 + way, random_.randbytes(random_.choice([46, 200, 1500, 5000])))
        assert net.send(1 + way, data)
        sent[way].append(data)
        if random_.random() < 0.3:
            net.host.run()
    net.host.run()
    assert sorted(skb.data for skb in net.got[1]) == sorted(sent[0])
    assert sorted(skb.data for skb in net.got[0]) == sorted(sent[1])
    if vcpus == 1 or OneQueue in (*kinds, dom0):
        assert [skb.data for skb in net.got[1]] == sent[0]  # one queue keeps the order
    net.host.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(0, 9000)), max_size=60))
def test_any_frames_of_three_guests(steps: list[tuple[int, int, int]]) -> None:
    net = Net(Pvops, OneQueue, Pvops)
    expected: list[list[bytes]] = [[], [], []]
    known: set[int] = set()
    for number, (sender, to, size) in enumerate(steps):
        data = frame(to, sender, number.to_bytes(4, "big") + bytes(size))
        assert net.send(sender, data)
        net.host.run()
        known.add(sender)
        for i in (1, 2, 3):
            if i != sender and (to not in known or i == to):
                expected[i - 1].append(data)
    for i in range(3):
        assert [skb.data for skb in net.got[i]] == expected[i]
    net.host.close()


def test_a_frame_is_one_interrupt_each(net: Net) -> None:
    one, two, dom0 = net.guests[0].kernel, net.guests[1].kernel, net.host.dom0

    def counts() -> list[int]:
        return [
            row(one, "vif0-q0-tx"), row(dom0, "vif1.0-q0-tx"), row(dom0, "vif2.0-q0-rx"), row(two, "vif0-q0-rx"),
            row(one, "vif0-q0-rx"), row(two, "vif0-q0-tx"), row(dom0, "vif1.0-q0-rx"),
        ]  # fmt: skip

    net.send(1, frame(2, 1, bytes(46)))
    net.host.run()
    before = counts()
    for _ in range(200):
        net.send(1, frame(2, 1, bytes(1000)))
        net.host.run()
    # The sender hears that it was taken, domain 0 of the frame, the receiver of its arrival.
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [200, 200, 0, 200, 0, 0, 0]


def test_single_channel_rows() -> None:
    net = Net(OneQueue, OneQueue, dom0=OneQueue)
    net.send(1, frame(2, 1, bytes(46)))
    net.host.run()
    before = row(net.host.dom0, "vif1.0"), row(net.guests[1].kernel, "eth0")
    for _ in range(50):
        net.send(1, frame(2, 1, bytes(46)))
        net.host.run()
    assert row(net.host.dom0, "vif1.0") - before[0] == 50
    assert row(net.guests[1].kernel, "eth0") - before[1] == 50
    net.host.close()


def test_checksum_and_gso_are_carried(net: Net) -> None:
    data = frame(2, 1, bytes(40_000))
    net.send(1, Skb(data, True, True, 1448, XEN_NETIF_GSO_TYPE_TCPV4))
    net.send(1, Skb(data[:200], False, True))
    net.send(1, Skb(data[:300]))
    net.host.run()
    assert net.got[1] == [
        Skb(data, True, True, 1448, XEN_NETIF_GSO_TYPE_TCPV4),
        Skb(data[:200], False, True),
        Skb(data[:300]),
    ]


def test_more_than_the_ring_holds(net: Net) -> None:
    frames = [frame(2, 1, i.to_bytes(4, "big") + bytes(100)) for i in range(1300)]
    taken = [net.send(1, data) for data in frames]
    assert taken.count(True) == 256 + 1000
    net.host.run()
    assert [skb.data for skb in net.got[1]] == frames[: 256 + 1000]
    assert nic_of(net.guests[0]).tx_dropped == 44


def test_a_receiver_that_sleeps_loses_frames_only(net: Net) -> None:
    two = net.guests[1]
    vcpu = two.domain.vcpus[0]
    two.domain.paused = True
    for i in range(1200):
        net.send(1, frame(2, 1, i.to_bytes(4, "big") + bytes(1400)))
        net.host.run()
    assert net.back(2).vif is not None
    assert net.back(2).vif.rx_dropped > 0  # type: ignore[union-attr]
    two.domain.paused = False
    assert vcpu.event_pending()
    net.host.run()
    numbers = [int.from_bytes(skb.data[14:18], "big") for skb in net.got[1]]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 256
    net.send(1, frame(2, 1, bytes(46)))
    net.host.run()
    assert len(net.got[1]) == len(numbers) + 1


def test_not_connected(net: Net) -> None:
    with pytest.raises(XenError) as error:
        net.send(1, b"short")
    assert error.value.errno is Errno.EINVAL
    net.host.do(net.guests[0].kernel, net.guests[0].xenbus.frontends.devices["device/vif/0"].unbind())
    assert not nic_of_or_none(net.guests[0])
    net.host.run()
    net.send(2, frame(1, 2, bytes(46)))
    net.host.run()
    assert not [ref for ref in net.guests[0].xenbus.gnttab.table.active if ref >= 8]


def nic_of_or_none(guest: Guest) -> object:
    return guest.xenbus.frontends.devices["device/vif/0"].driver


def test_headroom_as_the_frontend_wants_it(net: Net) -> None:
    """A frontend that loads an XDP program asks for room before each frame, while it runs."""
    store = net.host.store
    store.write("/local/domain/2/device/vif/0/xdp-headroom", 256)
    store.write("/local/domain/2/device/vif/0/state", 7)  # Reconfiguring
    net.host.run()
    assert store.read_text("/local/domain/0/backend/vif/2/0/state") == "8"
    pages = {ident: mfn for ident, (_, mfn) in nic_of(net.guests[1]).queues[0]._rx_slots.items()}
    data = frame(2, 1, random.Random(4).randbytes(9000))
    net.send(1, data)
    net.host.run()
    assert [skb.data for skb in net.got[1]] == [data]
    assert bytes(net.host.machine.page(pages[0])[256:300]) == data[:44]


def test_multicast_control(net: Net) -> None:
    """A frontend that asks for it gets only the multicasts that it has named; broadcasts always."""
    group = b"\x01\x00\x5e\x00\x00\x09"

    def arrives(to: bytes) -> bool:
        count = len(net.got[1])
        net.send(1, to + mac(1) + b"\x88\xb5" + bytes(46))
        net.host.run()
        return len(net.got[1]) > count

    assert arrives(group)
    net.host.store.write("/local/domain/2/device/vif/0/request-multicast-control", 1)
    net.host.run()
    assert [arrives(group), arrives(b"\xff" * 6), arrives(mac(2))] == [False, True, True]
    vif = net.back(2).vif
    assert vif is not None
    vif.multicast.add(group)
    assert arrives(group)
    net.host.store.write("/local/domain/2/device/vif/0/request-multicast-control", 0)
    net.host.run()
    vif.multicast.clear()
    assert arrives(group)


# The bridge and what lies behind it.


class Card:
    """A network card whose wire is a list."""

    def __init__(self) -> None:
        self.on_receive: Callable[[bytes], None] = lambda frame: None
        self.wire: list[bytes] = []

    def transmit(self, frame: bytes) -> None:
        self.wire.append(frame)


def test_a_physical_card(net: Net) -> None:
    card = Card()
    net.host.network.add(PhysicalInterface("peth0", card), "xenbr0")
    net.send(1, frame(9, 1, bytes(46)))
    net.host.run()
    assert card.wire == [frame(9, 1, bytes(46))]
    assert len(net.got[1]) == 1  # nobody knew where 9 is
    card.on_receive(frame(1, 9, b"x" * 46))
    net.host.run()
    assert net.got[0][-1].data == frame(1, 9, b"x" * 46)
    net.send(2, frame(9, 2, bytes(46)))
    net.host.run()
    assert (len(card.wire), len(net.got[0])) == (2, 1)
    net.send(1, frame(2, 1, bytes(46)))
    net.host.run()
    assert len(card.wire) == 2  # what is for guests stays inside


def test_learning_ageing_and_ports_that_go(net: Net) -> None:
    bridge, network = net.host.network.bridges["xenbr0"], net.host.network
    net.send(1, frame(2, 1, bytes(46)))
    net.host.run()
    assert bridge.port_of(mac(1)) is network.interfaces["vif1.0"]
    net.host.clock.jump_to(net.host.clock.now() + 301 * 10**9)
    assert bridge.port_of(mac(1)) is None
    bridge.forward(Skb(frame(2, 1, bytes(46))), network.interfaces["vif1.0"])
    bridge.remove(network.interfaces["vif1.0"])
    assert bridge.port_of(mac(1)) is None
    with pytest.raises(XenError) as error:
        bridge.add(network.interfaces["vif2.0"])
    assert error.value.errno is Errno.EBUSY
    with pytest.raises(XenError) as error:
        network.attach("vif9.0", "xenbr0")
    assert error.value.errno is Errno.ENODEV
    with pytest.raises(XenError) as error:
        network.add_bridge("xenbr0")
    assert error.value.errno is Errno.EEXIST


def test_an_interface_that_is_no_port() -> None:
    got: list[Skb] = []
    interface = Interface("tap0")
    interface.receive(Skb(b"lost"))
    interface.on_receive = got.append
    interface.receive(Skb(b"kept"))
    interface.transmit(Skb(b"nowhere"))
    assert [skb.data for skb in got] == [b"kept"]


# Finishing frames for a wire.


def ip_packet(protocol: int, segment: bytes, v6: bool = False) -> bytes:
    if v6:
        header = struct.pack(">IHBB", 6 << 28, len(segment), protocol, 64) + bytes(range(32))
        return bytes(12) + b"\x86\xdd" + header + segment
    ipv4 = bytearray(struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(segment), 7, 0, 64, protocol, 0))
    ipv4 += bytes((10, 0, 0, 1, 10, 0, 0, 2))
    struct.pack_into(">H", ipv4, 10, ~checksum(bytes(ipv4)) & 0xFFFF)
    return bytes(12) + b"\x08\x00" + bytes(ipv4) + segment


def whole(data: bytes) -> bool:
    """The checksums of an IP packet and what it carries are right: summed up they give all ones."""
    v6 = data[12:14] == b"\x86\xdd"
    at = 54 if v6 else 34
    protocol = data[20] if v6 else data[23]
    addresses = data[22:54] if v6 else data[26:34]
    pseudo = checksum(addresses, protocol + len(data) - at)
    return checksum(data[at:], pseudo) == 0xFFFF and (v6 or checksum(data[14:34]) == 0xFFFF)


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("size", [0, 1, 333, 1400])
def test_checksums_are_filled_in(v6: bool, size: int) -> None:
    for protocol, header in ((6, struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x18, 5, 99, 0)), (17, bytes(8))):
        (data,) = finish(Skb(ip_packet(protocol, header + bytes(range(256)) * 5 + bytes(size), v6), csum_blank=True))
        assert whole(data)


@pytest.mark.parametrize("v6", [False, True])
def test_tcp_is_cut(v6: bool) -> None:
    payload = random.Random(3).randbytes(5000)
    header = struct.pack(">HHIIBBHHH", 1, 2, 1000, 4, 0x50, 0x19, 5, 0, 0)
    skb = Skb(ip_packet(6, header + payload, v6), True, True, 1448, 2 if v6 else 1)
    frames = finish(skb)
    at = 54 if v6 else 34
    assert [len(data) - at - 20 for data in frames] == [1448, 1448, 1448, 656]
    assert all(whole(data) for data in frames)
    assert b"".join(data[at + 20 :] for data in frames) == payload
    assert [struct.unpack_from(">I", data, at + 4)[0] for data in frames] == [1000, 2448, 3896, 5344]
    assert [data[at + 13] for data in frames] == [0x10, 0x10, 0x10, 0x19]


def test_what_is_left_as_it_is() -> None:
    for data in (bytes(60), ip_packet(1, bytes(40)), b"\0" * 12 + b"\x08\x00" + bytes(10), ip_packet(6, b"")):
        assert finish(Skb(data, csum_blank=True)) == [data]


# Frontends that mean no good.


@pytest.fixture
def hostile(net: Net) -> Hostile:
    return Hostile(net)


def test_requests_by_hand(hostile: Hostile) -> None:
    request, net = hostile.request, hostile.net
    assert hostile.answers(request(60)) == [NETIF_RSP_OKAY]
    two_slots = request(100, flags=NETTXF_more_data), request(40, offset=200)
    assert hostile.answers(*two_slots) == [NETIF_RSP_OKAY] * 2
    gso = NETIF_EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, 1448, XEN_NETIF_GSO_TYPE_TCPV4, 0)
    assert hostile.answers(request(60, flags=NETTXF_extra_info), gso) == [NETIF_RSP_OKAY, 1]
    assert [len(skb.data) for skb in net.got[1]] == [60, 100, 60]
    assert net.got[1][-1].gso_size == 1448
    multicast = NETIF_EXTRA_MCAST.pack(XEN_NETIF_EXTRA_TYPE_MCAST_ADD, 0, b"\x01\x00\x5e\0\0\1")
    assert hostile.answers(request(60, flags=NETTXF_extra_info), multicast) == [NETIF_RSP_OKAY, 1]
    vif = net.back(1).vif
    assert vif is not None
    assert vif.multicast == {b"\x01\x00\x5e\0\0\1"}
    assert len(net.got[1]) == 3


@pytest.mark.parametrize(
    "entries",
    [
        lambda h: [h.request(60, ref=4000)],
        lambda h: [h.request(60, ref=5)],
        lambda h: [h.request(60, ref=99999)],
        lambda h: [h.request(13)],
        lambda h: [h.request(60, flags=NETTXF_more_data), h.request(61)],
        lambda h: [h.request(6000, flags=NETTXF_more_data), *[h.request(9, flags=NETTXF_more_data)] * 17, h.request(1)],
    ],
    ids=["grant", "reserved grant", "beyond the table", "no header", "more than its sum", "19 slots"],
)  # fmt: skip
def test_bad_packets_are_lost(hostile: Hostile, entries: Callable[[Hostile], list[bytes]]) -> None:
    requests = entries(hostile)
    assert hostile.answers(*requests) == [NETIF_RSP_ERROR] * len(requests)
    assert not hostile.net.got[1]
    assert hostile.answers(hostile.request(60)) == [NETIF_RSP_OKAY]
    assert len(hostile.net.got[1]) == 1


def check_disabled(hostile: Hostile, why: str) -> None:
    """The device is off, its log line written; it may storm, and others go on."""
    net = hostile.net
    log = list(net.host.dom0.log)
    assert why in log[-2]
    assert log[-1].endswith("vif1.0: fatal error; disabling device")
    interrupts = row(net.host.dom0, "vif1.0-q0-tx")
    for _ in range(100):
        hostile.notify()
    assert row(net.host.dom0, "vif1.0-q0-tx") - interrupts <= 1
    assert list(net.host.dom0.log) == log
    net.add()
    assert net.send(3, frame(2, 3, bytes(46)))
    net.host.run()
    assert net.got[1][-1].data == frame(2, 3, bytes(46))


FATAL: dict[str, tuple[Callable[[Hostile], list[bytes]], str]] = {
    "cross page": (lambda h: [h.request(100, offset=4090)], "Cross page boundary"),
    "oversized": (lambda h: [h.request(5000)], "Cross page boundary"),
    "no more slots": (lambda h: [h.request(100, flags=NETTXF_more_data)], "Asked for 1 slots"),
    "no extra": (lambda h: [h.request(60, flags=NETTXF_extra_info)], "Missing extra info"),
    "extra type": (
        lambda h: [h.request(60, flags=NETTXF_extra_info), NETIF_EXTRA_GSO.pack(9, 0, 1, 1, 0)],
        "Invalid extra type: 9",
    ),
    "GSO type": (
        lambda h: [h.request(60, flags=NETTXF_extra_info), NETIF_EXTRA_GSO.pack(1, 0, 1448, 7, 0)],
        "Bad GSO type 7.",
    ),
    "GSO size": (
        lambda h: [h.request(60, flags=NETTXF_extra_info), NETIF_EXTRA_GSO.pack(1, 0, 0, 1, 0)],
        "GSO size must not be zero.",
    ),
    "too many slots": (
        lambda h: [h.request(65000, flags=NETTXF_more_data)] + [h.request(10, flags=NETTXF_more_data)] * 25,
        "Malicious frontend using 20 slots",
    ),
}


@pytest.mark.parametrize("name", FATAL)
def test_what_can_not_be_ends_the_device(hostile: Hostile, name: str) -> None:
    entries, why = FATAL[name]
    hostile.put(*entries(hostile))
    check_disabled(hostile, why)


@pytest.mark.parametrize("ahead", [257, 5000, 1 << 31])
def test_an_index_run_ahead(hostile: Hostile, ahead: int) -> None:
    hostile.words[REQ_PROD] = hostile.prod + ahead & 0xFFFFFFFF
    hostile.notify()
    check_disabled(hostile, "Impossible number of requests")


def test_bad_receive_buffers_lose_frames_only(net: Net) -> None:
    queue = nic_of(net.guests[1]).queues[0]
    refs = [ref for ref, _ in queue._rx_slots.values()]
    gnttab = net.guests[1].xenbus.gnttab
    for ref in refs[:3]:
        assert gnttab.revoke(ref)
    for i in range(4):
        net.send(1, frame(2, 1, bytes([i]) * 46))
        net.host.run()
    assert [skb.data[14] for skb in net.got[1]] == [3]
    assert nic_of(net.guests[1]).rx_errors == 3


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("tx-ring-ref", "4321", "mapping shared-frames"),
        ("rx-ring-ref", None, "ring-ref"),
        ("event-channel", "999", "mapping shared-frames"),
        ("event-channel", None, "event-channel(-tx/rx)"),
        ("request-rx-copy", "0", "rx-copy"),
        ("feature-rx-notify", None, "feature-rx-notify is mandatory"),
        ("multi-queue-num-queues", "3", "exceeding the maximum of 2"),
    ],
)
def test_bad_rings_close_their_device(net: Net, key: str, value: str | None, why: str) -> None:
    host = net.host
    guest = host.guest()
    host.manager.attach_nic(3, Nic(0, "00:16:3e:00:00:03"))
    host.run()
    pages = [guest.xenbus.pages.alloc() for _ in range(2)]
    events = guest.kernel.events
    port = events.evtchn_from_irq(events.bind_listening(0, lambda irq, dev: 1, "hostile", guest))
    nodes: dict[str, object] = {
        "tx-ring-ref": guest.xenbus.gnttab.grant_access(0, pages[0]),
        "rx-ring-ref": guest.xenbus.gnttab.grant_access(0, pages[1]),
        "event-channel": port,
        "request-rx-copy": 1,
        "feature-rx-notify": 1,
    }
    for node, text in {**nodes, key: value}.items():
        if text is not None:
            host.store.write(f"/local/domain/3/device/vif/0/{node}", str(text))
    host.store.write("/local/domain/3/device/vif/0/state", 4)
    host.run()
    assert host.store.read_text("/local/domain/0/backend/vif/3/0/state") == "5"
    assert why in host.store.read_text("/local/domain/0/error/backend/vif/3/0/error")
    assert not guest.xenbus.gnttab.table.active
    net.send(1, frame(2, 1, bytes(46)))
    host.run()
    assert len(net.got[1]) == 1


def test_backend_dies_and_comes_back(net: Net) -> None:
    host, bus = net.host, net.host.xenbus.backends
    host.do(host.dom0, bus.kill_driver("vif"))
    assert not host.network.interfaces
    net.send(1, frame(2, 1, b"waits" + bytes(46)))
    host.run()
    host.do(host.dom0, bus.register_driver("vif", netback(host.network)))
    host.run()
    for i in (1, 2):
        host.network.attach(f"vif{i}.0", "xenbr0")
    for i in range(5):
        net.send(1, frame(2, 1, bytes([i]) * 46))
        host.run()
    assert [skb.data[14] for skb in net.got[1]][-5:] == [0, 1, 2, 3, 4]
    assert host.store.read_text("/local/domain/0/backend/vif/1/0/state") == "4"


@pytest.mark.parametrize("ring", ["tx", "rx"])
def test_a_backend_that_lies_breaks_the_interface_only(net: Net, ring: str) -> None:
    back = net.back(1).vif
    assert back is not None
    queue = back.queues[0]
    mfn = nic_of(net.guests[0]).queues[0]._ring_mfns[ring == "rx"]
    net.host.machine.page(mfn)[:16].cast("I")[RSP_PROD] += 300
    net.host.dom0.events.notify_remote_via_irq(queue._irqs[ring == "rx"])
    net.host.run()
    assert "Disabled for further use" in net.guests[0].kernel.log[-1]
    assert not net.send(1, frame(2, 1, bytes(46)))
    assert net.send(2, frame(1, 2, bytes(46)))
    net.host.run()

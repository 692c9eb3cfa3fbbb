"""A station on a bridge: what it answers, what it ignores, and that nothing on the wire can harm it."""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pvirq
from netlib import IP, MAC, Port
from pvirq.drivers.skb import ETH_P_IP, TCP, UDP, Skb, checksum
from pvirq.net import dhcp, packets
from pvirq.net.packets import ARP_REPLY, BROADCAST, ICMP, Arp
from pvirq.net.station import LATENCY_NS, NEIGHBOURS, QUEUE, Datagram, Station
from pvirq.xen.timer import Clock

SELF = IPv4Address("10.0.0.1").packed


class Net(Port):
    def __init__(self, **options: object) -> None:
        super().__init__(Clock())
        self.station = Station("station0", self.clock, "10.0.0.1/24", **options)  # type: ignore[arg-type]
        self.net.add(self.station)


@pytest.fixture
def net() -> Net:
    return Net(names={"Web": "10.0.0.80"})


def test_its_address_is_its_own(net: Net) -> None:
    station = net.station
    assert net.resolve(SELF) == [Arp(ARP_REPLY, station.mac, SELF, MAC, IP)]
    assert net.resolve(IPv4Address("10.0.0.2").packed) == []
    assert station.mac[:3] == b"\x02\x16\x3e"
    assert Station("station1", net.clock, "10.0.0.1/24").mac != station.mac
    assert Station("x", net.clock, "10.0.0.1/24", mac="00:16:3e:01:02:03").mac == bytes.fromhex("00163e010203")
    for address in ("10.0.0.1/31", "10.0.0.300/24"):
        with pytest.raises(ValueError):
            Station("x", net.clock, address)
    with pytest.raises(ValueError):
        Station("x", net.clock, "10.0.0.1/24", mac="00:16:3e:01:02:0g")


@pytest.mark.parametrize("size", [0, 1, 56, 57, 1400])
def test_ping(net: Net, size: int) -> None:
    rest = struct.pack(">HH", 7, 1) + bytes(range(256))[:size].ljust(size, b"x")
    (answer,) = net.ask_ip(SELF, ICMP, packets.icmp(8, 0, rest), net.station.mac)
    assert (answer.source, answer.target, answer.protocol) == (SELF, IP, ICMP)
    assert answer.payload == packets.icmp(0, 0, rest)
    assert answer.frame[:12] == MAC + net.station.mac
    wrong = bytearray(packets.icmp(8, 0, rest))
    wrong[2] ^= 1
    assert net.ask_ip(SELF, ICMP, bytes(wrong), net.station.mac) == []
    assert net.ask_ip(IPv4Address("10.0.0.255").packed, ICMP, packets.icmp(8, 0, rest)) == []  # no smurf


def test_answers_take_their_time(net: Net) -> None:
    """Two stations that answer each other would else do so for ever in no time."""
    other = Station("station1", net.clock, "10.0.0.2/24")
    net.net.add(other)
    net.station.on_udp(7, lambda datagram: datagram.data)
    other.on_udp(7, lambda datagram: datagram.data)
    segment = packets.udp(IPv4Address("10.0.0.2").packed, 7, SELF, 7, b"echo")
    packet = packets.ipv4(IPv4Address("10.0.0.2").packed, SELF, UDP, segment)
    other.receive(Skb(packets.ethernet(net.station.mac, other.mac, ETH_P_IP, packet)))
    net.pass_time(100 * LATENCY_NS)
    assert 90 <= len(net.station.frames) + len(other.frames) <= 102


def test_udp(net: Net) -> None:
    got: list[Datagram] = []

    def handler(datagram: Datagram) -> bytes | None:
        got.append(datagram)
        return datagram.data[::-1] if datagram.data != b"quiet" else None

    net.station.on_udp(99, handler)
    (answer,) = net.ask_udp(SELF, 99, b"abc", mac=net.station.mac)
    assert answer.payload == packets.udp(SELF, 99, IP, 4000, b"cba")
    assert packets.checksum_right(answer)
    assert net.ask_udp(SELF, 99, b"quiet", mac=net.station.mac) == []
    assert got[0] == Datagram(IPv4Address(IP), 4000, IPv4Address(SELF), 99, b"abc", MAC)
    assert len(net.ask_udp(b"\xff" * 4, 99, b"all")) == 1
    net.station.on_udp(99, None)
    (answer,) = net.ask_udp(SELF, 99, b"abc", mac=net.station.mac)
    assert answer.payload[:2] == b"\x03\x03"  # port unreachable, with the packet it is about
    assert answer.payload[8 + 20 : 8 + 28] == packets.udp(IP, 4000, SELF, 99, b"abc")[:8]
    assert net.ask_udp(b"\xff" * 4, 99, b"all") == []


def test_what_a_handler_raises_ends_the_run_and_nothing_else() -> None:
    with pvirq.Host(machine_memory=1 << 28) as host:
        one, two = host.station("10.0.0.1/24"), host.station("10.0.0.2/24", dhcp=False)
        got: list[Datagram] = []
        one.on_udp(1, lambda datagram: int(datagram.data).to_bytes(1, "big"))
        one.on_udp(2, got.append)
        two.send_udp("10.0.0.1", 1, b"no number")
        two.send_udp("10.0.0.1", 2, b"after it")
        with pytest.raises(ValueError):
            host.run(lambda: bool(got), 10**9)
        assert host.run(lambda: bool(got), 10**9)


def test_a_guests_blank_checksum(net: Net) -> None:
    """A frame whose checksum a card would fill in is finished before anybody looks."""
    net.station.on_udp(99, lambda datagram: datagram.data)
    segment = bytearray(packets.udp(IP, 4000, SELF, 99, b"abc"))
    segment[6:8] = b"\x12\x34"
    frame = packets.ethernet(net.station.mac, MAC, ETH_P_IP, packets.ipv4(IP, SELF, UDP, bytes(segment)))
    assert net.ask(frame) == []
    assert len(net.ask(Skb(frame, csum_blank=True))) == 1
    assert packets.checksum_right(packets.read_ipv4(net.station.frames[-1]))  # type: ignore[arg-type]


def test_tcp_is_refused(net: Net) -> None:
    def segment(flags: int, data: bytes = b"") -> bytes:
        header = struct.pack(">HHIIBBHHH", 4000, 80, 1000, 77, 0x50, flags, 100, 0, 0)
        total = ~checksum(header + data, checksum(IP + SELF, TCP + 20 + len(data))) & 0xFFFF
        return header[:16] + total.to_bytes(2, "big") + header[18:] + data

    (answer,) = net.ask_ip(SELF, TCP, segment(0x02), net.station.mac)
    assert struct.unpack_from(">HHIIBB", answer.payload) == (80, 4000, 0, 1001, 0x50, 0x14)
    assert packets.checksum_right(answer)
    (answer,) = net.ask_ip(SELF, TCP, segment(0x10, b"data"), net.station.mac)
    assert struct.unpack_from(">HHIIBB", answer.payload) == (80, 4000, 77, 0, 0x50, 0x04)
    assert net.ask_ip(SELF, TCP, segment(0x04), net.station.mac) == []


def test_it_sends_by_itself(net: Net) -> None:
    net.station.send_udp("10.0.0.9", 5000, b"first", 5001)
    net.station.send_udp("10.0.0.9", 5000, b"second", 5001)
    net.pass_time()
    asked = [packets.read_arp(skb.data) for skb in net.got]
    assert [arp.target if arp else None for arp in asked] == [IP, IP]
    answer = Arp(ARP_REPLY, MAC, IP, net.station.mac, SELF)
    sent = net.ask(packets.ethernet(net.station.mac, MAC, packets.ETH_P_ARP, answer.pack()))
    assert [packets.read_ipv4(frame).payload for frame in sent] == [  # type: ignore[union-attr]
        packets.udp(SELF, 5001, IP, 5000, data) for data in (b"first", b"second")
    ]
    net.station.send_udp("255.255.255.255", 5000, b"all")
    net.pass_time()
    assert net.got[-1].data[:6] == BROADCAST
    net.station.send(MAC + net.station.mac + b"\x88\xb5" + b"raw")
    net.pass_time()
    assert net.got[-1].data[12:] == b"\x88\xb5raw"
    for wrong in (lambda: net.station.send(b"x"), lambda: net.station.send_udp("10.0.1.1", 1, b"")):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(ValueError):
        net.station.send_udp("10.0.0.9", 1, bytes(1473))


def test_frames_come_to_the_program(net: Net) -> None:
    got: list[bytes] = []
    net.station.on_frame = got.append
    mine = net.station.mac + MAC + b"\x88\xb5" + bytes(46)
    net.ask(mine)
    net.ask(BROADCAST + MAC + b"\x88\xb5" + bytes(46))
    net.ask(bytes(6) + MAC + b"\x88\xb5" + bytes(46))  # somebody else's, flooded
    assert got == list(net.station.frames) == [mine, BROADCAST + MAC + b"\x88\xb5" + bytes(46)]


def test_dhcp_then_dns(net: Net) -> None:
    options = {dhcp.MESSAGE_TYPE: bytes((dhcp.DISCOVER,)), dhcp.HOST_NAME: b"db"}
    discover = dhcp.Message(dhcp.BOOTREQUEST, 5, MAC, options=options)
    (answer,) = net.ask_udp(b"\xff" * 4, 67, discover.pack(), bytes(4), 68)
    offer = dhcp.parse(answer.payload[8:])
    assert offer is not None
    assert answer.frame[:6] == MAC
    assert (offer.kind, answer.target) == (dhcp.OFFER, offer.yiaddr)
    options |= {
        dhcp.MESSAGE_TYPE: bytes((dhcp.REQUEST,)), dhcp.REQUESTED_ADDRESS: offer.yiaddr, dhcp.SERVER_ID: SELF,
    }  # fmt: skip
    request = dhcp.Message(dhcp.BOOTREQUEST, 5, MAC, options=options, broadcast=True)
    (answer,) = net.ask_udp(b"\xff" * 4, 67, request.pack(), bytes(4), 68)
    assert answer.frame[:6] == BROADCAST
    (lease,) = net.station.leases
    assert lease.address.packed == offer.yiaddr
    assert net.station.lookup("db") == lease.address
    assert net.station.reverse(lease.address) == "db"
    assert net.station.lookup("WEB") == IPv4Address("10.0.0.80")
    assert net.station.reverse(IPv4Address("10.0.0.80")) == "web"
    assert net.station.lookup("nobody") is None


def test_without_dhcp() -> None:
    net = Net(dhcp_server=False)
    discover = dhcp.Message(dhcp.BOOTREQUEST, 5, MAC, options={dhcp.MESSAGE_TYPE: b"\1"})
    assert net.ask_udp(b"\xff" * 4, 67, discover.pack(), bytes(4), 68) == []
    assert net.station.leases == []


def test_domain() -> None:
    net = Net(names={"web": "10.0.0.80"}, domain="Example")
    assert net.station.lookup("web.example") == IPv4Address("10.0.0.80")
    assert net.station.lookup("web.other") is None


def test_what_it_keeps_is_bounded(net: Net) -> None:
    for i in range(3 * NEIGHBOURS):
        address = IPv4Address(f"10.0.0.{i % 200 + 20}").packed
        arp = Arp(1, struct.pack(">HI", 2, i), address, bytes(6), SELF)
        net.receive(Skb(packets.ethernet(BROADCAST, MAC, packets.ETH_P_ARP, arp.pack())))
    net.pass_time()
    assert len(net.got) == QUEUE
    assert len(net.station._neighbours) <= NEIGHBOURS
    for i in range(40):
        net.station.send_udp("10.0.0.2", 1, bytes([i]))
    assert len(net.station._pending[IPv4Address("10.0.0.2").packed]) == 16


def frames() -> st.SearchStrategy[bytes]:
    """Frames that are nearly right in some layer, and any bytes."""
    near = st.sampled_from([SELF, b"\xff" * 4, b"\x0a\0\0\xff", b"\x0a\0\0\x09", bytes(4)])
    segment = st.one_of(
        st.binary(max_size=80),
        st.builds(
            packets.udp, near, st.integers(0, 65535), near, st.sampled_from([53, 67, 99]), st.binary(max_size=400)
        ),
        st.builds(packets.icmp, st.sampled_from([0, 3, 8]), st.integers(0, 255), st.binary(max_size=80)),
    )
    packet = st.builds(packets.ipv4, near, near, st.sampled_from([1, 6, 17, 50]), segment)
    arp = st.builds(lambda *parts: Arp(*parts).pack(), st.integers(0, 9), st.just(MAC), near, st.just(MAC), near)
    body = st.one_of(st.binary(max_size=100), packet, arp)

    @st.composite
    def broken(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(body))
        for _ in range(draw(st.integers(0, 3))):
            if data:
                data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
        return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)

    to = st.sampled_from([BROADCAST, Net().station.mac, b"\x01\0\x5e\0\0\1"])
    kind = st.sampled_from([b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\x81\x00"])
    return st.builds(lambda to, kind, data: to + MAC + kind + data, to, kind, st.one_of(body, broken()))


@given(
    st.lists(
        st.builds(Skb, frames(), st.booleans(), st.booleans(), st.sampled_from([0, 1, 100, 65535]), st.integers(0, 3)),
        max_size=8,
    )
)
def test_no_frame_harms_it(skbs: list[Skb]) -> None:
    net = Net()
    net.station.on_udp(99, lambda datagram: datagram.data)
    for skb in skbs:
        net.ask(skb)
    assert net.resolve(SELF)[-1].sender_mac == net.station.mac
    for skb in net.got:
        packet = packets.read_ipv4(skb.data) if skb.data[12:14] == b"\x08\x00" else None
        if packet is not None and packet.protocol in (TCP, UDP):
            assert packets.checksum_right(packet)

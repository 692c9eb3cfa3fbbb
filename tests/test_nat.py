"""User-mode NAT: what gets from a bridge to the real loopback and back, and what doesn't."""

from __future__ import annotations

import ctypes
import select
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pvirq
from netlib import MAC, Port
from pvirq.abi.errno import XenError
from pvirq.drivers.bridge import Network
from pvirq.drivers.skb import ETH_P_IP, TCP, UDP, Skb, checksum, complete
from pvirq.net import dhcp, nat, packets, slirp
from pvirq.net.nat import Nat
from pvirq.net.outside import OutsideError
from pvirq.net.packets import BROADCAST, Ipv4, ethernet, ipv4
from pvirq.net.station import Station
from pvirq.xen.timer import Clock

GUEST = IPv4Address("10.0.2.15").packed
GATEWAY = IPv4Address("10.0.2.2").packed
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16


def available() -> bool:
    try:
        slirp.load()
    except OutsideError:
        return False
    return True


needs_slirp = pytest.mark.skipif(not available(), reason="libslirp is not installed")


class Net(Port):
    """A NAT, and the frames of a guest behind it."""

    def __init__(self, **options: object) -> None:
        super().__init__(Clock())
        self.nat = Nat("nat0", Network(self.clock.now), self.clock.now, "10.0.2.2/24", **options)  # type: ignore[arg-type]
        self.net.add(self.nat)
        self.mac = b"\x52\x55" + GATEWAY
        # As a guest does first: slirp sends to Ethernet addresses that it has seen.
        assert [arp.sender_mac for arp in self.resolve(GATEWAY, GUEST)] == [self.mac]

    def ask(self, frame: bytes | Skb) -> list[bytes]:
        before = len(self.got)
        self.receive(frame if isinstance(frame, Skb) else Skb(frame))
        self.nat.poll(ready=True)
        return [skb.data for skb in self.got[before:]]

    def wait(self, until: Callable[[Ipv4], bool]) -> Ipv4:
        """Poll until such a packet has come for the guest."""
        for _ in range(500):
            while self.got:
                data = complete(self.got.pop(0))
                packet = packets.read_ipv4(data) if data[12:14] == b"\x08\x00" else None
                if packet is not None and until(packet):
                    return packet
            select.select([self.nat.fileno()], [], [], 0.02)
            self.nat.poll(ready=True)
        raise AssertionError("nothing came")

    def udp(self, to: bytes, port: int, data: bytes, source_port: int = 4000) -> None:
        self.ask_udp(to, port, data, GUEST, source_port, self.mac)


class Tcp:
    """A guest's end of one TCP connection, as little as does for tests."""

    def __init__(self, net: Net, port: int, source_port: int = 5000, to: bytes = GATEWAY) -> None:
        self.net, self.port, self.source_port, self.to = net, port, source_port, to
        self.sequence, self.acknowledged = 1000, 0
        self.data = b""

    def send(self, flags: int, data: bytes = b"", *, blank: bool = False, gso: int = 0) -> None:
        header = struct.pack(
            ">HHIIBBHHH", self.source_port, self.port, self.sequence, self.acknowledged, 0x50, flags, 60000, 0, 0
        )
        total = ~checksum(header + data, checksum(GUEST + self.to, TCP + 20 + len(data))) & 0xFFFF
        segment = header[:16] + (b"\0\0" if blank else total.to_bytes(2, "big")) + header[18:] + data
        self.sequence += len(data) + bool(flags & SYN) + bool(flags & FIN)
        frame = ethernet(self.net.mac, MAC, ETH_P_IP, ipv4(GUEST, self.to, TCP, segment))
        self.net.receive(Skb(frame, blank, blank, gso, 1 if gso else 0))
        self.net.nat.poll(ready=True)

    def expect(self, flags: int) -> Ipv4:
        """A segment with all these flags; data on the way is taken."""

        def look(packet: Ipv4) -> bool:
            segment = packet.payload
            if packet.protocol != TCP or segment[2:4] != self.source_port.to_bytes(2, "big"):
                return False
            assert packets.checksum_right(packet)
            (sequence,) = struct.unpack_from(">I", segment, 4)
            self.data += segment[(segment[12] >> 4) * 4 :]
            size = len(segment) - (segment[12] >> 4) * 4 + bool(segment[13] & SYN) + bool(segment[13] & FIN)
            self.acknowledged = sequence + size & 0xFFFFFFFF
            return segment[13] & flags == flags

        return self.net.wait(look)

    def connect(self) -> None:
        self.send(SYN)
        self.expect(SYN | ACK)
        self.send(ACK)


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.nat.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        yield server


def port_of(server: socket.socket) -> int:
    port: int = server.getsockname()[1]
    return port


@needs_slirp
def test_a_service_on_the_real_loopback(net: Net, server: socket.socket) -> None:
    assert not net.nat.awaited
    tcp = Tcp(net, port_of(server))
    tcp.connect()
    assert net.nat.awaited
    real, _ = server.accept()
    with real:
        real.settimeout(10)
        tcp.send(ACK | PSH, b"hello")
        assert real.recv(100) == b"hello"
        real.sendall(b"x" * 5000)
        while len(tcp.data) < 5000:
            tcp.expect(ACK)
            tcp.send(ACK)
        assert tcp.data == b"x" * 5000
    tcp.expect(FIN)
    tcp.send(FIN | ACK)
    tcp.expect(ACK)


@needs_slirp
def test_a_large_segment_goes_in_one_piece(net: Net, server: socket.socket) -> None:
    """One that a guest leaves to be cut, its checksum blank, reaches the real socket whole."""
    tcp = Tcp(net, port_of(server))
    tcp.connect()
    real, _ = server.accept()
    with real:
        real.settimeout(10)
        data = bytes(range(256)) * 100
        tcp.send(ACK | PSH, data, blank=True, gso=1460)
        got = b""
        while len(got) < len(data):
            got += real.recv(1 << 16)
        assert got == data


@needs_slirp
def test_nobody_there(net: Net, server: socket.socket) -> None:
    port = port_of(server)
    server.close()
    tcp = Tcp(net, port)
    tcp.send(SYN)
    tcp.expect(RST)


@needs_slirp
def test_services_that_may_be_reached(server: socket.socket) -> None:
    net = Net(services=[port_of(server)])
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(0.2)
        refused = Tcp(net, port_of(other), 5001)
        refused.send(SYN)
        refused.expect(RST)
        with pytest.raises(TimeoutError):
            other.accept()
    assert net.nat.connections_refused == 1
    Tcp(net, port_of(server), 5002).connect()
    server.accept()[0].close()
    net.nat.close()


@needs_slirp
def test_nothing_beyond_unless_it_is_wanted(server: socket.socket) -> None:
    """Not the loopback by its own address either, which slirp would connect to."""
    for options in ({}, {"outbound": True}, {"services": (), "outbound": True}):
        net = Net(**options)
        for to in ("127.0.0.1", "127.9.9.9", "0.0.0.0", "10.0.2.77", "224.0.0.1"):
            tcp = Tcp(net, port_of(server), to=IPv4Address(to).packed)
            tcp.send(SYN)
            tcp.expect(RST)
        if not options:
            tcp = Tcp(net, 80, to=IPv4Address("192.0.2.1").packed)
            tcp.send(SYN)
            tcp.expect(RST)
        assert not net.nat._slirp.connections
        net.nat.close()


@needs_slirp
def test_a_guest_can_not_use_up_our_descriptors(net: Net, server: socket.socket) -> None:
    for i in range(nat.MAX_SOCKETS + 50):
        net.udp(GATEWAY, 9, b"x", 10_000 + i)
    assert len(net.nat._slirp.sockets) == len(net.nat._slirp.events) == nat.MAX_SOCKETS
    tcp = Tcp(net, port_of(server))
    tcp.send(SYN)
    tcp.expect(RST)


@needs_slirp
def test_malformed_segments_do_not_reach_the_stack(net: Net) -> None:
    good = struct.pack(">HHIIBBHHH", 5000, 80, 1, 0, 0x50, SYN, 100, 0, 0)
    datagram = packets.udp(GUEST, 5000, GATEWAY, 80, b"abc")
    for protocol, body in (
        (TCP, good[:19]), (TCP, good[:12] + b"\x40" + good[13:]), (TCP, good[:12] + b"\xf0" + good[13:]), (47, good),
        (UDP, datagram[:7]), (UDP, datagram[:4] + b"\0\x07" + datagram[6:]), (1, b"\x08\0"), (1, bytes(8)),
        (UDP, datagram[:4] + b"\0\xff" + datagram[6:]),
    ):  # fmt: skip
        packet = packets.read_ipv4(ethernet(net.mac, MAC, ETH_P_IP, ipv4(GUEST, GATEWAY, protocol, body)))
        assert packet is not None
        assert not net.nat._allowed(packet)
    packet = packets.read_ipv4(ethernet(net.mac, MAC, ETH_P_IP, ipv4(GUEST, GATEWAY, TCP, good)))
    assert packet is not None
    assert net.nat._allowed(packet)


@needs_slirp
def test_udp(net: Net) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as real:
        real.bind(("127.0.0.1", 0))
        real.settimeout(10)
        net.udp(GATEWAY, real.getsockname()[1], b"question")
        data, sender = real.recvfrom(100)
        assert data == b"question"
        assert net.nat.awaited
        real.sendto(b"answer", sender)
        answer = net.wait(lambda packet: packet.protocol == UDP)
        assert (answer.source, answer.target, answer.payload[8:]) == (GATEWAY, GUEST, b"answer")
        assert packets.checksum_right(answer)


@needs_slirp
def test_udp_that_nobody_answers_is_not_awaited_for_long(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    net.udp(GATEWAY, 9, b"question")
    assert net.nat.awaited
    monkeypatch.setattr(nat, "LINGER_NS", 0)
    assert not net.nat.awaited


@needs_slirp
def test_ping_and_dhcp(net: Net) -> None:
    rest = struct.pack(">HH", 7, 1) + b"x" * 56
    (answer,) = net.ask_ip(GATEWAY, 1, packets.icmp(8, 0, rest), net.mac, GUEST)
    assert answer.payload == packets.icmp(0, 0, rest)
    discover = dhcp.Message(dhcp.BOOTREQUEST, 5, MAC, options={dhcp.MESSAGE_TYPE: b"\1"})
    (answer,) = net.ask_udp(b"\xff" * 4, 67, discover.pack(), bytes(4), 68)
    offer = dhcp.parse(answer.payload[8:])
    assert offer is not None
    assert (offer.kind, str(IPv4Address(offer.yiaddr))) == (dhcp.OFFER, "10.0.2.1")
    assert offer.options[dhcp.ROUTER] == GATEWAY
    assert dhcp.DNS_SERVER not in offer.options
    without = Net(dhcp_server=False)
    assert without.ask_udp(b"\xff" * 4, 67, discover.pack(), bytes(4), 68) == []
    without.nat.close()


@needs_slirp
def test_a_forwarded_port(net: Net) -> None:
    port = net.nat.forward("10.0.2.15", 80)
    assert net.nat.awaited
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        tcp = Tcp(net, 0, 80)

        def look(packet: Ipv4) -> bool:
            if packet.protocol != TCP or packet.payload[13] & (SYN | ACK) != SYN:
                return False
            source, _, sequence = struct.unpack_from(">HHI", packet.payload)
            tcp.port, tcp.acknowledged = source, sequence + 1
            return packet.source == GATEWAY

        net.wait(look)
        tcp.send(SYN | ACK)
        tcp.expect(ACK)
        client.sendall(b"GET")
        tcp.expect(PSH)
        assert tcp.data == b"GET"
        tcp.send(ACK | PSH, b"200")
        client.settimeout(10)
        assert client.recv(10) == b"200"
    net.nat.unforward(port)
    net.nat.unforward(port)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 10)


@needs_slirp
def test_a_forwarded_port_for_udp() -> None:
    net = Net(services=())
    port = net.nat.forward("10.0.2.15", 53, udp=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.sendto(b"question", ("127.0.0.1", port))
        question = net.wait(lambda packet: packet.protocol == UDP)
        source, to, _ = struct.unpack_from(">HHH", question.payload)
        assert (to, question.payload[8:]) == (53, b"question")
        net.udp(question.source, source, b"answer", 53)
        assert client.recv(100) == b"answer"
    net.nat.close()


@needs_slirp
def test_what_can_not_be_forwarded(net: Net, server: socket.socket) -> None:
    with pytest.raises(OutsideError, match=f"127.0.0.1:{port_of(server)} can't be forwarded"):
        net.nat.forward("10.0.2.15", 80, port=port_of(server))
    for to, port in (("10.0.3.1", 80), ("10.0.2.15", 0), ("10.0.2.15", 65536), ("10.0.2", 80)):
        with pytest.raises(ValueError):
            net.nat.forward(to, port)
    with pytest.raises(ValueError):
        Nat("x", Network(net.clock.now), net.clock.now, "10.0.2.2/30")


@needs_slirp
def test_another_address(net: Net) -> None:
    other = Nat("nat1", Network(net.clock.now), net.clock.now, IPv4Interface("192.168.7.254/24"), outbound=True)
    assert str(other.nameserver) == "192.168.7.1"
    assert other.dhcp is not None
    assert other.dhcp.dns == other.nameserver
    other.close()
    other.close()


@needs_slirp
def test_a_closed_one_is_quiet(net: Net, server: socket.socket) -> None:
    Tcp(net, port_of(server)).connect()
    net.nat.forward("10.0.2.15", 80)
    assert net.nat.awaited
    net.nat.close()
    net.receive(Skb(ethernet(net.mac, MAC, ETH_P_IP, ipv4(GUEST, GATEWAY, 1, packets.icmp(8, 0, bytes(8))))))
    net.nat.poll(ready=True)
    assert not net.nat.awaited


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    slirp.load.cache_clear()
    with pvirq.Host(machine_memory=1 << 28) as host:
        with pytest.raises(OutsideError, match=r"user-mode NAT needs libslirp\.so\.0 \(Debian: apt"):
            host.nat()
        assert not host.outside
    slirp.load.cache_clear()


@needs_slirp
def test_beside_a_station() -> None:
    """One bridge with both: the station hands out addresses, and tells of the gateway."""
    net = Net(dhcp_server=False)
    station = Station("station0", net.clock, "10.0.2.1/24", gateway="10.0.2.2")
    net.net.add(station)
    discover = dhcp.Message(dhcp.BOOTREQUEST, 5, MAC, options={dhcp.MESSAGE_TYPE: b"\1"})
    segment = packets.udp(bytes(4), 68, b"\xff" * 4, 67, discover.pack())
    net.got.clear()
    net.receive(Skb(ethernet(BROADCAST, MAC, ETH_P_IP, ipv4(bytes(4), b"\xff" * 4, UDP, segment))))
    net.pass_time()
    net.nat.poll(ready=True)
    (skb,) = net.got
    packet = packets.read_ipv4(skb.data)
    assert packet is not None
    offer = dhcp.parse(packet.payload[8:])
    assert offer is not None
    assert offer.options[dhcp.ROUTER] == GATEWAY
    assert offer.yiaddr == IPv4Address("10.0.2.3").packed  # neither of the two
    assert [arp.sender_mac for arp in net.resolve(GATEWAY, GUEST)] == [net.mac]
    net.nat.close()


@needs_slirp
def test_in_a_host() -> None:
    with pvirq.Host(machine_memory=1 << 28) as host:
        gateway = host.nat(bridge="xenbr1")
        network = host.backends.network
        assert network.bridges["xenbr1"].ports == [gateway]
        assert list(host.outside) == [gateway]
        with pytest.raises(XenError):
            host.nat(bridge="xenbr1", name="nat0")
        assert list(host.outside) == [gateway]
        assert host.nat("10.0.3.2/24").name == "nat1"
        gateway.close()
        assert not network.bridges["xenbr1"].ports


@needs_slirp
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0x0800, 0x0806, 0x86DD]), st.sampled_from([1, 6, 17, 47]), st.binary(max_size=80),
            st.booleans(), st.lists(st.tuples(st.integers(0, 60), st.integers(0, 255)), max_size=3),
        ),
        max_size=6,
    )
)  # fmt: skip
def test_no_frame_harms_it(steps: list[tuple[int, int, bytes, bool, list[tuple[int, int]]]]) -> None:
    net = Net(services=())
    for kind, protocol, payload, whole, changes in steps:
        body = bytearray(ipv4(GUEST, GATEWAY, protocol, payload) if kind == 0x0800 else payload)
        for at, value in changes:
            if at < len(body):
                body[at] = value
        frame = (net.mac if whole else BROADCAST) + MAC + kind.to_bytes(2, "big") + bytes(body)
        net.ask(Skb(frame, csum_blank=whole, gso_size=100 if whole else 0, gso_type=1))
    assert net.resolve(GATEWAY, GUEST)
    net.nat.close()

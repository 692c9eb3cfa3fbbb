"""A host on a bridge that is no domain, as a Python object: it answers ARP, ping, DHCP and DNS, and your program."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from mypy_extensions import mypyc_attr

from pvirq.abi.io_netif import ETH_HLEN
from pvirq.drivers.bridge import Interface
from pvirq.drivers.skb import ETH_P_IP, TCP, UDP, Skb, checksum, finish
from pvirq.net import dhcp, dns, packets
from pvirq.net.dhcp import DhcpServer, Lease
from pvirq.net.packets import ARP_REPLY, ARP_REQUEST, BROADCAST, ETH_P_ARP, ICMP, IP_BROADCAST, Arp, Ipv4
from pvirq.xen.timer import Clock, Timer

LATENCY_NS: Final = 50_000  # until the station looks at a frame: two that answer each other take their time
QUEUE: Final = 1024  # frames that it has still to look at; more are lost
KEPT: Final = 1024  # of the frames that came in
FRAME_MAX: Final = 9018  # a card takes no larger ones
NEIGHBOURS: Final = 1024  # whose Ethernet address is known, or asked for
PENDING: Final = 16  # frames that wait for one such address


@dataclass(frozen=True, slots=True)
class Datagram:
    """A UDP datagram from the network. `to` is the station's own address, or a broadcast."""

    source: IPv4Address
    source_port: int
    to: IPv4Address
    port: int
    data: bytes
    mac: bytes  # of who sent it


UdpHandler = Callable[[Datagram], bytes | None]


@mypyc_attr(allow_interpreted_subclasses=True)
class Station(Interface):
    """A station with an Ethernet and an IPv4 address.

    It answers ARP, ICMP echo, DHCP (`dhcp`, a server for its subnet, None: no server) and DNS (`names`, and what DHCP
    clients call themselves); a UDP port that nobody listens on is unreachable, a TCP connection is refused. Frames for
    it, and broadcasts, come to `on_frame` too, finished, and the last of them are in `frames`. It sees a frame 50 us
    after that was sent, in virtual time, so it answers while the host runs.

    Frames from guests are hostile input: one that can't be is ignored, and what the station keeps of any is bounded.
    """

    def __init__(
        self,
        name: str,
        clock: Clock,
        address: str | IPv4Interface,
        *,
        mac: str = "",
        dhcp_server: bool = True,
        gateway: str | None = None,
        names: Mapping[str, str] | None = None,
        domain: str = "",
    ) -> None:
        """`address` is as "10.0.0.1/24", `gateway` what DHCP clients are told (default: the station).

        `names` are host names and their addresses; more can be added to the attribute. ValueError for an address, a
        subnet or a name that can't be.
        """
        super().__init__(name)
        self.interface = IPv4Interface(address)
        if self.interface.network.prefixlen > 30:
            raise ValueError(f"{self.interface}: a subnet of /30 or larger is needed")
        self.mac = packets.parse_mac(mac) if mac else b"\x02\x16\x3e" + zlib.crc32(name.encode()).to_bytes(4, "big")[1:]
        self.names: dict[str, str] = {name.lower(): str(IPv4Address(to)) for name, to in (names or {}).items()}
        self.frames: deque[bytes] = deque(maxlen=KEPT)
        self.on_frame: Callable[[bytes], None] | None = None
        self._clock = clock
        self._ip = self.interface.ip.packed
        self._broadcasts = (IP_BROADCAST, self.interface.network.broadcast_address.packed)
        self._udp: dict[int, UdpHandler] = {}
        self._neighbours: dict[bytes, bytes] = {}  # IPv4 -> Ethernet address
        self._pending: dict[bytes, deque[bytes]] = {}  # packets that wait for one
        self._in: deque[tuple[int, bytes]] = deque()  # frames to look at, and when
        self._timer: Timer | None = None
        self.dhcp: DhcpServer | None = None
        if dhcp_server:
            router = self.address if gateway is None else IPv4Address(gateway)
            self.dhcp = DhcpServer(self.interface, clock.now, router=router, dns=self.address, domain=domain)
        self._domain = domain.lower()

    @property
    def address(self) -> IPv4Address:
        """Its own address."""
        return self.interface.ip

    @property
    def leases(self) -> list[Lease]:
        """Who has an address from its DHCP server now."""
        return self.dhcp.leases if self.dhcp is not None else []

    # -- for programs --------------------------------------------------------------------------------------------------

    def send(self, frame: bytes) -> None:
        """Send a frame, header and all, as it is. ValueError for one that is shorter than a header."""
        if len(frame) < ETH_HLEN:
            raise ValueError(f"a frame of {len(frame)} bytes")
        self._send(frame)

    def on_udp(self, port: int, handler: UdpHandler | None) -> None:
        """Let `handler` have the datagrams to a port, also to DHCP's and DNS's; None: nobody any more.

        What it returns, unless None, goes back to the sender. What it raises ends the `run` of the host.
        """
        if handler is None:
            self._udp.pop(port, None)
        else:
            self._udp[port] = handler

    def send_udp(self, to: str | IPv4Address, port: int, data: bytes, source_port: int = 0) -> None:
        """Send a datagram to an address of the subnet, or a broadcast. ValueError: another one, or too much data."""
        target = IPv4Address(to)
        if target not in self.interface.network and target.packed != IP_BROADCAST:
            raise ValueError(f"{target} is not in {self.interface.network}")
        if len(data) > packets.MAX_UDP:
            raise ValueError(f"{len(data)} bytes don't fit into a datagram of one frame")
        segment = packets.udp(self._ip, source_port or port, target.packed, port, data)
        self._send_ip(target.packed, packets.ipv4(self._ip, target.packed, UDP, segment))

    def lookup(self, name: str) -> IPv4Address | None:
        """The address of a host as its DNS has it: from `names`, or of a DHCP client that calls itself so."""
        name = name.lower()
        found = self.names.get(name)
        if found is not None:
            return IPv4Address(found)
        if self._domain and name.endswith(f".{self._domain}"):
            name = name.removesuffix(f".{self._domain}")
            if name in self.names:
                return IPv4Address(self.names[name])
        return self.dhcp.address_of(name) if self.dhcp is not None else None

    def reverse(self, address: IPv4Address) -> str:
        """The name of an address, "" where none is known."""
        text = str(address)
        known = next((name for name, of in self.names.items() if of == text), "")
        return known or (self.dhcp.name_of(address) if self.dhcp is not None else "")

    # -- in ------------------------------------------------------------------------------------------------------------

    def transmit(self, skb: Skb) -> None:
        """A frame from the bridge."""
        data = skb.data
        if len(data) < ETH_HLEN or (data[:6] != self.mac and not data[0] & 1):
            return
        when = self._clock.now() + LATENCY_NS
        for frame in finish(skb):
            if len(frame) <= FRAME_MAX and len(self._in) < QUEUE:
                self._in.append((when, frame))
        self._arm()

    def _arm(self) -> None:
        if self._in and self._timer is None:
            self._timer = self._clock.at(self._in[0][0], self._look)

    def _look(self) -> None:
        """Outside of any domain, so what a program's handler raises leaves all of them in order."""
        self._timer = None
        now = self._clock.now()
        try:
            while self._in and self._in[0][0] <= now:
                frame = self._in.popleft()[1]
                self.frames.append(frame)
                if self.on_frame is not None:
                    self.on_frame(frame)
                self._input(frame)
        finally:
            self._arm()

    def _input(self, frame: bytes) -> None:
        kind = int.from_bytes(frame[12:14], "big")
        if kind == ETH_P_ARP:
            self._arp(frame)
        elif kind == ETH_P_IP:
            packet = packets.read_ipv4(frame)
            if packet is None or packet.fragment or packet.source in self._broadcasts or packet.source == self._ip:
                return
            if packet.target == self._ip or packet.target in self._broadcasts:
                self._ip_input(packet)

    def _arp(self, frame: bytes) -> None:
        arp = packets.read_arp(frame)
        if arp is None:
            return
        if IPv4Address(arp.sender) in self.interface.network:
            self._learn(arp.sender, arp.sender_mac)
        if arp.operation == ARP_REQUEST and arp.target == self._ip:
            answer = Arp(ARP_REPLY, self.mac, self._ip, arp.sender_mac, arp.sender)
            self._send(packets.ethernet(arp.sender_mac, self.mac, ETH_P_ARP, answer.pack()))

    def _ip_input(self, packet: Ipv4) -> None:
        if packet.protocol == ICMP:
            message = packet.payload
            echo = len(message) >= 8 and message[:2] == bytes((packets.ICMP_ECHO, 0)) and checksum(message) == 0xFFFF
            if echo and packet.target == self._ip:
                self._answer(packet, ICMP, packets.icmp(packets.ICMP_ECHO_REPLY, 0, message[4:]))
        elif packet.protocol == UDP:
            self._udp_input(packet)
        elif packet.protocol == TCP and packet.target == self._ip:
            reset = packets.tcp_reset(packet)
            if reset is not None and packets.checksum_right(packet):
                self._answer(packet, TCP, reset)

    def _udp_input(self, packet: Ipv4) -> None:
        header = packet.payload[: packets.UDP_HLEN]
        if len(header) < packets.UDP_HLEN:
            return
        source_port, port, length = (int.from_bytes(header[i : i + 2], "big") for i in (0, 2, 4))
        if not packets.UDP_HLEN <= length <= packet.end - packet.start or not packets.checksum_right(packet):
            return
        data = packet.frame[packet.start + packets.UDP_HLEN : packet.start + length]
        reply: bytes | None = None
        if port in self._udp:
            source, to = IPv4Address(packet.source), IPv4Address(packet.target)
            reply = self._udp[port](Datagram(source, source_port, to, port, data, packet.frame[6:12]))
        elif port == dhcp.SERVER_PORT and self.dhcp is not None:
            response = self.dhcp.respond(data, self.mac)
            if response is not None:
                self._send(response)
        elif port == dns.PORT:
            reply = dns.answer(data, self.lookup, self.reverse)
        elif packet.target == self._ip:
            # With as much of the packet as tells the sender what it was.
            start = packet.frame[ETH_HLEN : packet.start + packets.UDP_HLEN]
            message = packets.icmp(packets.ICMP_UNREACHABLE, packets.ICMP_PORT_UNREACHABLE, bytes(4) + start)
            self._answer(packet, ICMP, message)
        if reply is not None and len(reply) <= packets.MAX_UDP:
            self._answer(packet, UDP, packets.udp(self._ip, port, packet.source, source_port, reply))

    # -- out -----------------------------------------------------------------------------------------------------------

    def _answer(self, packet: Ipv4, protocol: int, payload: bytes) -> None:
        """Back to where a packet came from."""
        mac = packet.frame[6:12]
        if not mac[0] & 1:
            data = packets.ipv4(self._ip, packet.source, protocol, payload)
            self._send(packets.ethernet(mac, self.mac, ETH_P_IP, data))

    def _send_ip(self, target: bytes, packet: bytes) -> None:
        """A packet to a neighbour; it may have to be asked for its Ethernet address first."""
        mac = BROADCAST if target in self._broadcasts else self._neighbours.get(target)
        if mac is not None:
            self._send(packets.ethernet(mac, self.mac, ETH_P_IP, packet))
            return
        if target not in self._pending:
            if len(self._pending) >= NEIGHBOURS:
                del self._pending[next(iter(self._pending))]
            self._pending[target] = deque(maxlen=PENDING)
        self._pending[target].append(packet)
        arp = Arp(ARP_REQUEST, self.mac, self._ip, bytes(6), target)
        self._send(packets.ethernet(BROADCAST, self.mac, ETH_P_ARP, arp.pack()))

    def _learn(self, address: bytes, mac: bytes) -> None:
        if mac[0] & 1:
            return
        if address not in self._neighbours and len(self._neighbours) >= NEIGHBOURS:
            del self._neighbours[next(iter(self._neighbours))]
        self._neighbours[address] = mac
        for packet in self._pending.pop(address, ()):
            self._send(packets.ethernet(mac, self.mac, ETH_P_IP, packet))

    def _send(self, frame: bytes) -> None:
        self.receive(Skb(frame))

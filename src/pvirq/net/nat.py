"""User-mode NAT: guests reach services on the real loopback (or beyond), and the real machine reaches services in them.

The TCP/IP stack between the two is libslirp's. Guests are hostile and it is a library in C, so they get to it only by
frames that were looked at: ARP and IPv4 that is well formed, to addresses and ports that they may use.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from pvirq.abi.io_netif import ETH_HLEN
from pvirq.drivers.bridge import Interface, Network
from pvirq.drivers.skb import ETH_P_IP, TCP, UDP, Skb, complete
from pvirq.net import dhcp, dns, packets
from pvirq.net.dhcp import DhcpServer
from pvirq.net.gro import coalesce
from pvirq.net.outside import OutsideError
from pvirq.net.packets import BROADCAST, ETH_P_ARP, ICMP, IP_BROADCAST, Ipv4
from pvirq.net.slirp import Slirp

LOOK_NS: Final = 1_000_000  # sockets are looked at this often while the guests work
LINGER_NS: Final = 2_000_000_000  # for so long after the last frame an answer is awaited that no connection promises
LOOPBACK: Final = IPv4Address("127.0.0.1")
IN_QUEUE: Final = 256
MAX_SOCKETS: Final = 256  # that guests may make us open: the process needs descriptors for other things

SYN, ACK = 0x02, 0x10


class Nat(Interface):
    """A gateway on a bridge, behind which the real machine lies.

    A connection to the gateway's address is one to the same port of the real loopback. `services` are the ports that
    may be reached so (None: all); `outbound` lets guests reach everything else that the real machine can, and resolve
    names at the address `nameserver`. Everything else is refused, or lost. `forward` is the way into guests. The
    gateway is a DHCP server too, unless the bridge has another.

    Guests may have MAX_SOCKETS connections and UDP conversations in all; a further one is refused, or lost.

    While a connection is open or a port is forwarded, and shortly after other traffic, the host waits in real time
    when all guests sleep.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        now: Callable[[], int],
        address: str | IPv4Interface,
        *,
        dhcp_server: bool = True,
        services: Collection[int] | None = None,
        outbound: bool = False,
    ) -> None:
        """`address` is the gateway's own, as "10.0.2.2/24". `network` is where the interface was added, `now` the
        virtual time in ns, which leases end in.

        ValueError for an address that can't be, OutsideError without libslirp.
        """
        super().__init__(name)
        self.interface = IPv4Interface(address)
        subnet = self.interface.network
        if subnet.prefixlen > 29:
            raise ValueError(f"{self.interface}: a subnet of /29 or larger is needed")
        self.services = None if services is None else frozenset(services)
        self.outbound = outbound
        self.nameserver = self._beside(self.interface) if outbound else None
        self.dhcp: DhcpServer | None = None
        if dhcp_server:
            self.dhcp = DhcpServer(self.interface, now, router=self.interface.ip, dns=self.nameserver)
        self.connections_refused = 0
        self._network = network
        self._ip = self.interface.ip.packed
        self._addresses = {self._ip} | ({self.nameserver.packed} if self.nameserver else set())
        self._mac = b"\x52\x55" + self._ip  # slirp's way to make them
        self._macs = {BROADCAST} | {b"\x52\x55" + address for address in self._addresses}
        self._forwards: dict[tuple[IPv4Address, int, bool], int] = {}  # -> the port in the guest
        self._waiting: deque[bytes] = deque(maxlen=IN_QUEUE)
        self._inside = False
        self._dirty = False
        self._next_look = 0
        self._last_frame = 0
        self._slirp = Slirp(self.interface, self.nameserver)

    @staticmethod
    def _beside(interface: IPv4Interface) -> IPv4Address:
        """The address behind the gateway's, or the first of the subnet."""
        address = interface.ip + 1
        return interface.network.network_address + 1 if address == interface.network.broadcast_address else address

    @property
    def address(self) -> IPv4Address:
        """The gateway's own."""
        return self.interface.ip

    # -- forwarding ----------------------------------------------------------------------------------------------------

    def forward(
        self, to: str | IPv4Address, to_port: int, *, port: int = 0, host: str = str(LOOPBACK), udp: bool = False
    ) -> int:
        """Let connections to a port of the real machine reach a guest's; 0 takes any free one. Returns the port.

        ValueError for addresses and ports that can't be; OutsideError where the port can't be had.
        """
        guest, at = IPv4Address(to), IPv4Address(host)
        if guest not in self.interface.network:
            raise ValueError(f"{guest} is not in {self.interface.network}")
        if not 0 < to_port < 1 << 16 or not 0 <= port < 1 << 16:
            raise ValueError(f"ports {port} and {to_port}")
        taken = self._slirp.forward(at, port, guest, to_port, udp=udp)
        if not taken:
            raise OutsideError(f"{at}:{port} can't be forwarded: it is in use, or not ours to use")
        self._forwards[at, taken, udp] = to_port
        return taken

    def unforward(self, port: int, *, host: str = str(LOOPBACK), udp: bool = False) -> None:
        """Listen there no more; nothing happens where nobody did."""
        if self._forwards.pop((IPv4Address(host), port, udp), None) is not None:
            self._slirp.unforward(IPv4Address(host), port, udp=udp)

    # -- from the guests -----------------------------------------------------------------------------------------------

    def transmit(self, skb: Skb) -> None:
        """A frame from the bridge."""
        data = skb.data
        if len(data) < ETH_HLEN or data[:6] not in self._macs:
            return
        kind = int.from_bytes(data[12:14], "big")
        if kind == ETH_P_ARP:
            if packets.read_arp(data) is not None:
                self._input(data)
        elif kind == ETH_P_IP:
            packet = packets.read_ipv4(data)
            if packet is None:
                return
            if self._is_dhcp(packet):
                self._dhcp_input(packet)
            elif self._allowed(packet):
                self._input(complete(skb))
            else:
                self._refuse(packet)

    def _is_dhcp(self, packet: Ipv4) -> bool:
        to_port = packet.frame[packet.start + 2 : packet.start + 4]
        return packet.protocol == UDP and to_port == dhcp.SERVER_PORT.to_bytes(2, "big")

    def _dhcp_input(self, packet: Ipv4) -> None:
        if self.dhcp is None or packet.fragment or packet.target not in (IP_BROADCAST, self._ip):
            return
        response = self.dhcp.respond(packet.frame[packet.start + packets.UDP_HLEN : packet.end], self._mac)
        if response is not None:
            self._slirp.out.append(response)
            self._dirty = True

    def _allowed(self, packet: Ipv4) -> bool:
        """Slirp may have this packet: it is well formed, and to where guests may."""
        target, protocol, size = packet.target, packet.protocol, packet.end - packet.start
        header = packet.frame[packet.start : packet.start + 20]
        if packet.fragment or packet.start != ETH_HLEN + packets.IP_HLEN or size < 8:
            return False
        full = len(self._slirp.sockets) >= MAX_SOCKETS
        if protocol == ICMP:
            return header[0] == packets.ICMP_ECHO and not full and (target in self._addresses or self._beyond(target))
        source_port, port = int.from_bytes(header[:2], "big"), int.from_bytes(header[2:4], "big")
        if protocol == TCP:
            if size < 20 or not 20 <= (header[12] >> 4) * 4 <= size:
                return False
            if header[13] & (SYN | ACK) != SYN:
                # No new connection: if there is none, nothing comes of it.
                return target in self._addresses or self._beyond(target)
        elif protocol == UDP:
            if not 8 <= int.from_bytes(header[4:6], "big") <= size:
                return False
            if target == self._ip and any(udp and to == source_port for (_, _, udp), to in self._forwards.items()):
                return True  # an answer
        else:
            return False
        if full:
            return False
        if target == self._ip:
            return self.services is None or port in self.services
        return (target in self._addresses and port == dns.PORT) or self._beyond(target)

    def _beyond(self, target: bytes) -> bool:
        """An address outside of the virtual network that guests may reach. A loopback address would be the real one."""
        if not self.outbound:
            return False
        address = IPv4Address(target)
        return address not in self.interface.network and not (
            address.is_loopback or address.is_multicast or address.is_unspecified or address.packed == IP_BROADCAST
        )

    def _refuse(self, packet: Ipv4) -> None:
        """Tell who wants to connect that he can't."""
        if packet.protocol != TCP or packet.fragment or packet.frame[6] & 1:
            return
        reset = packets.tcp_reset(packet)
        if reset is not None:
            self.connections_refused += 1
            answer = packets.ipv4(packet.target, packet.source, TCP, reset)
            self._slirp.out.append(packets.ethernet(packet.frame[6:12], self._mac, ETH_P_IP, answer))
            self._dirty = True

    def _input(self, frame: bytes) -> None:
        if self._inside:  # slirp's own frame made somebody on the bridge answer at once
            self._waiting.append(frame)
            return
        self._inside = True
        try:
            self._slirp.input(frame)
        finally:
            self._inside = False
        self._dirty = True
        self._last_frame = time.monotonic_ns()

    # -- from outside --------------------------------------------------------------------------------------------------

    @property
    def awaited(self) -> bool:
        """A connection is open, a port is forwarded, or there was traffic just now."""
        slirp = self._slirp
        if self._forwards or not slirp.connections.isdisjoint(slirp.events):
            return True
        return bool(slirp.events or slirp.sockets) and time.monotonic_ns() - self._last_frame < LINGER_NS

    def fileno(self) -> int:
        return self._slirp.epoll.fileno()

    def due_ns(self) -> int | None:
        return self._slirp.timeout_ms * 1_000_000

    def poll(self, *, ready: bool) -> None:
        """Let slirp look at its sockets, and hand its frames on."""
        now = time.monotonic_ns()
        if not (ready or self._dirty) and now < self._next_look:
            return
        self._dirty = False
        self._next_look = now + LOOK_NS
        slirp, waiting = self._slirp, self._waiting
        self._inside = True
        try:
            for _ in range(len(waiting)):
                slirp.input(waiting.popleft())
            slirp.turn()
        finally:
            self._inside = False
        out = slirp.out
        if out:
            self._last_frame = now
        for skb in coalesce([out.popleft() for _ in range(len(out))]):
            self.receive(skb)

    def close(self) -> None:
        """Close all connections and ports, and leave the bridge."""
        self._forwards.clear()
        self._slirp.close()
        self._network.remove(self)

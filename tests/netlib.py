"""A wire for tests of what hangs on a bridge: it sends raw frames, and keeps what comes to it."""

from __future__ import annotations

from ipaddress import IPv4Address

from pvirq.drivers.bridge import Bridge, Interface
from pvirq.drivers.skb import ETH_P_IP, UDP, Skb
from pvirq.net import packets
from pvirq.net.packets import BROADCAST, ETH_P_ARP, Arp, Ipv4, read_arp, read_ipv4
from pvirq.xen.timer import Clock

MAC = bytes.fromhex("00163e000001")
IP = IPv4Address("10.0.0.9").packed


class Port(Interface):
    """A port of a bridge of its own, with the device under test at another."""

    def __init__(self, clock: Clock) -> None:
        super().__init__("port0")
        self.clock = clock
        self.got: list[Skb] = []
        self.net = Bridge("xenbr0", clock.now)
        self.net.add(self)

    def transmit(self, skb: Skb) -> None:
        self.got.append(skb)

    def pass_time(self, ns: int = 1_000_000) -> None:
        end = self.clock.now() + ns
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end:
            self.clock.jump_to(deadline)
            self.clock.fire_due()
        self.clock.jump_to(end)

    def ask(self, frame: bytes | Skb) -> list[bytes]:
        """Send a frame; what comes within a millisecond."""
        before = len(self.got)
        self.receive(frame if isinstance(frame, Skb) else Skb(frame))
        self.pass_time()
        return [skb.data for skb in self.got[before:]]

    def ask_ip(
        self, to: bytes, protocol: int, payload: bytes, mac: bytes = BROADCAST, source: bytes = IP
    ) -> list[Ipv4]:
        """The same for an IP packet, and packets in answer."""
        frame = packets.ethernet(mac, MAC, ETH_P_IP, packets.ipv4(source, to, protocol, payload))
        answers = [read_ipv4(frame) for frame in self.ask(frame)]
        assert None not in answers
        return [answer for answer in answers if answer is not None]

    def ask_udp(
        self, to: bytes, port: int, data: bytes, source: bytes = IP, source_port: int = 4000, mac: bytes = BROADCAST
    ) -> list[Ipv4]:
        return self.ask_ip(to, UDP, packets.udp(source, source_port, to, port, data), mac, source)

    def resolve(self, address: bytes, sender: bytes = IP) -> list[Arp]:
        """Ask by ARP for an address."""
        arp = Arp(packets.ARP_REQUEST, MAC, sender, bytes(6), address)
        answers = [read_arp(frame) for frame in self.ask(packets.ethernet(BROADCAST, MAC, ETH_P_ARP, arp.pack()))]
        return [answer for answer in answers if answer is not None]

"""IPv4 in Ethernet frames: reading what a guest sent, and building answers (RFC 791, 792, 768, 826).

What is read is checked first, so that nobody behind it meets an index that isn't there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pvirq.abi.io_netif import ETH_HLEN
from pvirq.drivers.skb import ETH_P_IP, TCP, UDP, checksum

ETH_P_ARP: Final = 0x0806
ETH_MIN: Final = 60  # shorter frames are padded
BROADCAST: Final = b"\xff" * 6
IP_BROADCAST: Final = b"\xff" * 4
ICMP: Final = 1
IP_HLEN: Final = 20
UDP_HLEN: Final = 8
MAX_UDP: Final = 1500 - IP_HLEN - UDP_HLEN  # what fits into one frame
TTL: Final = 64

ARP_REQUEST, ARP_REPLY = 1, 2
_ARP: Final = struct.Struct(">HHBBH6s4s6s4s")
_ARP_KIND: Final = (1, ETH_P_IP, 6, 4)  # Ethernet addresses for those of IP

ICMP_ECHO_REPLY, ICMP_UNREACHABLE, ICMP_ECHO = 0, 3, 8
ICMP_PORT_UNREACHABLE: Final = 3


def parse_mac(text: str) -> bytes:
    """The bytes of "00:16:3e:00:00:01". ValueError for a text that is no such address."""
    parts = text.split(":")
    if len(parts) != 6 or not all(len(part) == 2 for part in parts):
        raise ValueError(f"{text!r} is no Ethernet address")
    try:
        return bytes(int(part, 16) for part in parts)
    except ValueError:
        raise ValueError(f"{text!r} is no Ethernet address") from None


def format_mac(mac: bytes) -> str:
    """As `parse_mac` takes it."""
    return mac.hex(":")


def ethernet(to: bytes, sender: bytes, kind: int, payload: bytes) -> bytes:
    """A frame, padded where it is short."""
    return (to + sender + kind.to_bytes(2, "big") + payload).ljust(ETH_MIN, b"\0")


@dataclass(frozen=True, slots=True)
class Arp:
    """An ARP packet for IPv4 over Ethernet. `operation` is 1 for a question, 2 for an answer."""

    operation: int
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes

    def pack(self) -> bytes:
        return _ARP.pack(*_ARP_KIND, self.operation, self.sender_mac, self.sender, self.target_mac, self.target)


def read_arp(frame: bytes) -> Arp | None:
    """What a frame of type ETH_P_ARP says; None where it is cut short, or of other networks."""
    if len(frame) < ETH_HLEN + _ARP.size:
        return None
    *kind, operation, sender_mac, sender, target_mac, target = _ARP.unpack_from(frame, ETH_HLEN)
    return Arp(operation, sender_mac, sender, target_mac, target) if tuple(kind) == _ARP_KIND else None


@dataclass(frozen=True, slots=True)
class Ipv4:
    """An IPv4 packet within `frame`: its payload is there from `start` to `end`. `fragment`: of a larger packet."""

    frame: bytes
    source: bytes
    target: bytes
    protocol: int
    start: int
    end: int
    fragment: bool

    @property
    def payload(self) -> bytes:
        return self.frame[self.start : self.end]


def read_ipv4(frame: bytes) -> Ipv4 | None:
    """The packet in a frame of type ETH_P_IP; None where its lengths or its header's checksum can't be."""
    if len(frame) < ETH_HLEN + IP_HLEN:
        return None
    first, length, fragment, protocol, source, target = struct.unpack_from(">BxHxxHxBxx4s4s", frame, ETH_HLEN)
    header = (first & 15) * 4
    if first >> 4 != 4 or header < IP_HLEN or not header <= length <= len(frame) - ETH_HLEN:
        return None
    if checksum(frame[ETH_HLEN : ETH_HLEN + header]) != 0xFFFF:
        return None
    start = ETH_HLEN + header
    return Ipv4(frame, source, target, protocol, start, ETH_HLEN + length, bool(fragment & 0x3FFF))


def ipv4(source: bytes, target: bytes, protocol: int, payload: bytes) -> bytes:
    """A packet. It may not be fragmented, so it needs no identification (RFC 6864)."""
    header = bytearray(
        struct.pack(">BBHHHBBH4s4s", 0x45, 0, IP_HLEN + len(payload), 0, 0x4000, TTL, protocol, 0, source, target)
    )
    struct.pack_into(">H", header, 10, ~checksum(bytes(header)) & 0xFFFF)
    return bytes(header) + payload


def icmp(kind: int, code: int, rest: bytes) -> bytes:
    """An ICMP message: `rest` is what follows its checksum."""
    total = ~checksum(rest, kind << 8 | code) & 0xFFFF
    return struct.pack(">BBH", kind, code, total) + rest


def _transport_checksum(source: bytes, target: bytes, protocol: int, segment: bytes) -> int:
    return ~checksum(segment, checksum(source + target, protocol + len(segment))) & 0xFFFF


def udp(source: bytes, source_port: int, target: bytes, port: int, data: bytes) -> bytes:
    """A UDP datagram without its IP header."""
    header = struct.pack(">HHHH", source_port, port, UDP_HLEN + len(data), 0)
    total = _transport_checksum(source, target, UDP, header + data) or 0xFFFF
    return header[:6] + total.to_bytes(2, "big") + data


def checksum_right(packet: Ipv4) -> bool:
    """Is the checksum of its TCP or UDP segment what it should be? A UDP checksum of 0 is none."""
    segment = packet.payload
    if packet.protocol == UDP and segment[6:8] == b"\0\0":
        return True
    return not _transport_checksum(packet.source, packet.target, packet.protocol, segment)


def tcp_reset(packet: Ipv4) -> bytes | None:
    """What answers a TCP segment that no connection is there for (tcp_v4_send_reset), without its IP header.

    None where nothing does: for another reset, and for what is no segment.
    """
    segment = packet.payload
    if len(segment) < 20:
        return None
    source, port, sequence, acknowledged, offset, flags = struct.unpack_from(">HHIIBB", segment)
    if flags & 0x04:
        return None
    if flags & 0x10:
        answer, sequence, acknowledged = 0x04, acknowledged, 0
    else:
        size = max(len(segment) - (offset >> 4) * 4, 0) + bool(flags & 0x02) + bool(flags & 0x01)
        answer, sequence, acknowledged = 0x14, 0, sequence + size & 0xFFFFFFFF
    reply = struct.pack(">HHIIBBHHH", port, source, sequence, acknowledged, 0x50, answer, 0, 0, 0)
    total = _transport_checksum(packet.target, packet.source, TCP, reply)
    return reply[:16] + total.to_bytes(2, "big") + reply[18:]

"""Packets between drivers: an Ethernet frame and what is still to be done to it (struct sk_buff, as far as needed).

A frame from a guest may lack its checksum, or be one large TCP segment that is to be cut. Guests of the same host
hand such frames on as they are; a wire needs `finish`ed ones.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

import numpy as np

from pvirq.abi.io_netif import ETH_HLEN, XEN_NETIF_GSO_TYPE_NONE, XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6

ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
TCP, UDP = 6, 17
CHECKSUM_AT: Final = {TCP: 16, UDP: 6}  # where in its header
IPV6_HEADER: Final = 40
FEW_BYTES: Final = 512  # up to which a sum is faster with one number than with an array
MIN_GSO_SIZE: Final = 48  # TCP_MIN_SND_MSS: nobody cuts a frame smaller


@dataclass(slots=True)
class Skb:
    """A frame. `csum_blank`: its TCP or UDP checksum covers only the pseudo header so far; `data_validated`: nobody

    need check it. `gso_size` is the most payload of each TCP segment that it is to be cut into, 0: none.
    """

    data: bytes
    csum_blank: bool = False
    data_validated: bool = False
    gso_size: int = 0
    gso_type: int = XEN_NETIF_GSO_TYPE_NONE


def checksum(data: bytes | memoryview, start: int = 0) -> int:
    """The Internet checksum's sum of `data`, added to `start`, folded and not inverted."""
    if len(data) & 1:
        data = bytes(data) + b"\0"
    if len(data) <= FEW_BYTES:
        total = int.from_bytes(data, "big")  # as good as the sum of its words, since 65536 is 1 more than 65535
    else:
        total = int(np.frombuffer(data, dtype=">u2").sum(dtype=np.uint64))
    total += start
    return (total % 0xFFFF or 0xFFFF) if total else 0


def transport(data: bytes | bytearray) -> tuple[int, int] | None:
    """(protocol, where its header is) of an IP packet in a frame; None for another, or for a later fragment."""
    if len(data) < ETH_HLEN + 20:
        return None
    (kind,) = struct.unpack_from(">H", data, 12)
    if kind == ETH_P_IP:
        if struct.unpack_from(">H", data, ETH_HLEN + 6)[0] & 0x1FFF:
            return None
        return data[ETH_HLEN + 9], ETH_HLEN + (data[ETH_HLEN] & 15) * 4
    if kind == ETH_P_IPV6 and len(data) >= ETH_HLEN + IPV6_HEADER:
        return data[ETH_HLEN + 6], ETH_HLEN + IPV6_HEADER
    return None


def flow_hash(data: bytes) -> int:
    """The same number for all frames of one flow (skb_get_hash): addresses and, of TCP and UDP, ports."""
    found = transport(data)
    if found is None:
        return zlib.crc32(data[:12])
    protocol, at = found
    ports = data[at : at + 4] if protocol in CHECKSUM_AT else b""
    return zlib.crc32(data[ETH_HLEN + 8 : ETH_HLEN + 40] if data[12:14] == b"\x86\xdd" else data[26:34] + ports)


def complete(skb: Skb) -> bytes:
    """The frame in one piece with its checksum, for who takes large TCP segments as they are (skb_checksum_help)."""
    found = transport(skb.data) if skb.csum_blank or skb.gso_size else None
    if found is None:
        return skb.data
    protocol, at = found
    where = at + CHECKSUM_AT.get(protocol, 0)
    if protocol not in CHECKSUM_AT or where + 2 > len(skb.data):
        return skb.data
    frame = bytearray(skb.data)
    _fill_in(frame, at, where, protocol)
    return bytes(frame)


def finish(skb: Skb) -> list[bytes]:
    """The frames that go over a wire: cut and with their checksums (skb_checksum_help, tcp_gso_segment).

    No frame comes of one that asks for smaller segments than TCP has.
    """
    if not (skb.csum_blank or skb.gso_size):
        return [skb.data]
    found = transport(skb.data)
    if found is None:
        return [skb.data]
    protocol, at = found
    where = at + CHECKSUM_AT.get(protocol, 0)
    if protocol not in CHECKSUM_AT or where + 2 > len(skb.data):
        return [skb.data]
    if skb.gso_size and protocol == TCP and skb.gso_type in (XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6):
        return _cut(skb, at) if skb.gso_size >= MIN_GSO_SIZE else []
    frame = bytearray(skb.data)
    _fill_in(frame, at, where, protocol)
    return [bytes(frame)]


def _fill_in(frame: bytearray, at: int, where: int, protocol: int) -> None:
    """The whole checksum of the packet at `at`, whatever is in its place."""
    ipv4 = frame[12:14] == b"\x08\x00"
    # Ethernet pads short frames: the packet's end is what IP says.
    (length,) = struct.unpack_from(">H", frame, ETH_HLEN + (2 if ipv4 else 4))
    end = min(len(frame), ETH_HLEN + length + (0 if ipv4 else IPV6_HEADER))
    struct.pack_into(">H", frame, where, 0)
    addresses = frame[ETH_HLEN + 12 : ETH_HLEN + 20] if ipv4 else frame[ETH_HLEN + 8 : ETH_HLEN + 40]
    total = checksum(bytes(addresses), protocol + end - at)
    value = ~checksum(bytes(frame[at:end]), total) & 0xFFFF
    struct.pack_into(">H", frame, where, value or (0xFFFF if protocol == UDP else 0))


def _cut(skb: Skb, at: int) -> list[bytes]:
    data = skb.data
    header = at + (data[at + 12] >> 4) * 4
    ipv4 = data[12:14] == b"\x08\x00"
    (sequence,) = struct.unpack_from(">I", data, at + 4)
    (ident,) = struct.unpack_from(">H", data, ETH_HLEN + 4)
    flags = data[at + 13]
    frames = []
    for i, start in enumerate(range(header, len(data), skb.gso_size)):
        payload = data[start : start + skb.gso_size]
        frame = bytearray(data[:header] + payload)
        if ipv4:
            struct.pack_into(">HH", frame, ETH_HLEN + 2, len(frame) - ETH_HLEN, ident + i & 0xFFFF)
            struct.pack_into(">H", frame, ETH_HLEN + 10, 0)
            struct.pack_into(">H", frame, ETH_HLEN + 10, ~checksum(bytes(frame[ETH_HLEN:at])) & 0xFFFF)
        else:
            struct.pack_into(">H", frame, ETH_HLEN + 4, len(frame) - ETH_HLEN - IPV6_HEADER)
        struct.pack_into(">I", frame, at + 4, sequence + start - header & 0xFFFFFFFF)
        if start + skb.gso_size < len(data):
            frame[at + 13] = flags & ~0x09  # FIN and PSH are the last one's
        _fill_in(frame, at, at + CHECKSUM_AT[TCP], TCP)
        frames.append(bytes(frame))
    return frames

"""TCP segments that follow one another as one large frame (tcp_gro_receive of net/ipv4/tcp_offload.c).

A guest takes one large frame with much less work than the many that it stands for, and so does everybody on the way.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from pvirq.abi.io_netif import ETH_HLEN, XEN_NETIF_GSO_TYPE_TCPV4
from pvirq.drivers.skb import TCP, Skb, checksum

HEADERS: Final = ETH_HLEN + 20 + 20  # without options, which are left alone
MAX_FRAME: Final = 65535
ACK, PSH = 0x10, 0x08


def coalesce(frames: Iterable[bytes]) -> list[Skb]:
    """Finished frames, whose checksums are right, in their order: runs of segments of one connection in one piece.

    `pvirq.drivers.skb.finish` makes the same frames of it again, but for the packets' identification.
    """
    skbs: list[Skb] = []
    run: list[bytes] = []
    size = 0  # of the run, as one frame
    for frame in frames:
        if run and _continues(run, frame) and size + len(frame) - HEADERS <= MAX_FRAME:
            run.append(frame)
            size += len(frame) - HEADERS
            continue
        if run:
            skbs.append(_join(run))
            run = []
        if _is_segment(frame):
            run, size = [frame], len(frame)
        else:
            skbs.append(Skb(frame, data_validated=True))
    if run:
        skbs.append(_join(run))
    return skbs


def _is_segment(frame: bytes) -> bool:
    """Plain data on a connection: IPv4 and TCP without options, whole, with nothing but ACK and PSH."""
    return (
        len(frame) > HEADERS
        and frame[12:15] == b"\x08\x00\x45"
        and frame[23] == TCP
        and not frame[20] & 0x3F
        and not frame[21]
        and frame[46] == 0x50
        and frame[47] & ~PSH == ACK
        and int.from_bytes(frame[16:18], "big") == len(frame) - ETH_HLEN
    )


def _continues(run: list[bytes], frame: bytes) -> bool:
    first, last = run[0], run[-1]
    return (
        _is_segment(frame)
        and len(last) == len(first) >= len(frame)
        and not last[47] & PSH
        and frame[:16] == first[:16]
        and frame[20:24] == first[20:24]
        and frame[26:38] == first[26:38]  # addresses and ports
        and frame[42:46] == first[42:46]  # acknowledged
        and frame[48:50] == first[48:50]  # window
        and int.from_bytes(frame[38:42], "big")
        == (int.from_bytes(last[38:42], "big") + len(last) - HEADERS) & 0xFFFFFFFF
    )


def _join(run: list[bytes]) -> Skb:
    if len(run) == 1:
        return Skb(run[0], data_validated=True)
    payload = b"".join([frame[HEADERS:] for frame in run])
    head = bytearray(run[0][:HEADERS])
    length = 20 + len(payload)
    struct.pack_into(">H", head, 16, 20 + length)
    head[24:26] = b"\0\0"
    struct.pack_into(">H", head, 24, ~checksum(bytes(head[ETH_HLEN : ETH_HLEN + 20])) & 0xFFFF)
    head[47] = run[-1][47]
    # As of a frame from a guest: the checksum covers the pseudo header so far.
    struct.pack_into(">H", head, 50, checksum(bytes(head[26:34]), TCP + length))
    return Skb(bytes(head) + payload, True, True, len(run[0]) - HEADERS, XEN_NETIF_GSO_TYPE_TCPV4)

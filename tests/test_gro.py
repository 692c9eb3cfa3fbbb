"""Segments joined into large frames, and cut again into what they were."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.drivers.skb import TCP, Skb, checksum, finish
from pvirq.net import packets
from pvirq.net.gro import MAX_FRAME, coalesce
from pvirq.net.packets import ethernet, ipv4

ONE, TWO = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))


def segment(sequence: int, data: bytes, flags: int = 0x10, port: int = 80, window: int = 500, ack: int = 9) -> bytes:
    header = struct.pack(">HHIIBBHHH", port, 5000, sequence & 0xFFFFFFFF, ack, 0x50, flags, window, 0, 0)
    total = ~checksum(header + data, checksum(ONE + TWO, TCP + 20 + len(data))) & 0xFFFF
    return ethernet(
        b"\2" * 6, b"\4" * 6, 0x0800, ipv4(ONE, TWO, TCP, header[:16] + struct.pack(">HH", total, 0) + data)
    )


def without_ident(frame: bytes) -> bytes:
    return frame[:18] + frame[20:24] + frame[26:]


def test_a_run_becomes_one_frame() -> None:
    data = random.Random(1).randbytes(5000)
    frames = [segment((1 << 32) - 1500 + at, data[at : at + 1460]) for at in range(0, 5000, 1460)]
    frames[-1] = segment((1 << 32) - 1500 + 4380, data[4380:], flags=0x18)
    (skb,) = coalesce(frames)
    assert (len(skb.data), skb.gso_size, skb.gso_type, skb.csum_blank) == (5054, 1460, 1, True)
    assert skb.data[54:] == data
    packet = packets.read_ipv4(skb.data)
    assert packet is not None
    assert len(packet.payload) == 5020
    assert [without_ident(frame) for frame in finish(skb)] == [without_ident(frame) for frame in frames]


@pytest.mark.parametrize(
    "second",
    [
        segment(1101, b"x" * 100), segment(1099, b"x" * 100), segment(1100, b"x" * 101), segment(1100, b"x", 0x11),
        segment(1100, b"x" * 100, port=81), segment(1100, b"x" * 100, window=501), segment(1100, b"x" * 100, ack=10),
        b"\2" * 6 + b"\5" * 6 + segment(1100, b"x" * 100)[12:], segment(1100, b""), b"\2" * 60,
    ],
)  # fmt: skip
def test_what_does_not_go_on(second: bytes) -> None:
    first = segment(1000, b"x" * 100)
    assert coalesce([first, second]) == [Skb(first, data_validated=True), Skb(second, data_validated=True)]


def test_a_push_or_a_short_segment_ends_a_run() -> None:
    frames = [segment(1000 + 100 * i, b"x" * 100, flags=0x18 if i == 1 else 0x10) for i in range(4)]
    assert [len(skb.data) for skb in coalesce(frames)] == [254, 254]
    frames = [segment(1000, b"x" * 100), segment(1100, b"x" * 50), segment(1150, b"x" * 50)]
    assert [len(skb.data) for skb in coalesce(frames)] == [204, 104]


def test_frames_have_a_size_at_most() -> None:
    frames = [segment(1460 * i, b"x" * 1460) for i in range(100)]
    sizes = [len(skb.data) for skb in coalesce(frames)]
    assert len(sizes) == 3
    assert max(sizes) <= MAX_FRAME
    assert sum(size - 54 for size in sizes) == 146000


@given(
    st.lists(
        st.one_of(
            st.builds(
                segment, st.integers(0, 5).map(lambda i: i * 60), st.sampled_from([b"x" * 60, b"x" * 60, b"y" * 30]),
                flags=st.sampled_from([0x10, 0x10, 0x18, 0x11, 0x02]), port=st.sampled_from([80, 81]),
            ),
            st.binary(min_size=14, max_size=100),
        ),
        max_size=12,
    )
)  # fmt: skip
def test_nothing_is_lost_or_changed(frames: list[bytes]) -> None:
    again = [frame for skb in coalesce(frames) for frame in finish(skb)]
    assert [without_ident(frame) for frame in again] == [without_ident(frame) for frame in frames]

"""Tap devices: frames between a bridge and the real machine, where that is permitted."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import pvirq
from netlib import MAC, Port
from pvirq.drivers.bridge import Network
from pvirq.drivers.skb import Skb
from pvirq.net import packets, tap
from pvirq.net.outside import OutsideError
from pvirq.net.packets import BROADCAST
from pvirq.net.tap import Tap
from pvirq.xen.timer import Clock

KIND = 0x88B5  # for local experiments


@pytest.fixture
def device() -> Iterator[Tap]:
    clock = Clock()
    try:
        device = Tap("", Network(clock.now))
    except OutsideError as error:
        pytest.skip(str(error))
    yield device
    device.close()


def test_frames_both_ways(device: Tap) -> None:
    """The other end is a packet socket on the device."""
    if not Path(f"/sys/class/net/{device.name}/flags").read_text().startswith("0x1"):
        pytest.skip("the device can't be brought up")
    port = Port(Clock())
    port.net.add(device)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(KIND)) as real:
        real.bind((device.name, KIND))
        real.settimeout(10)
        frame = BROADCAST + MAC + KIND.to_bytes(2, "big") + b"out" * 20
        port.receive(Skb(frame))
        assert real.recv(2000) == frame
        answer = MAC + b"\x02\0\0\0\0\x09" + KIND.to_bytes(2, "big") + b"back" * 20
        real.send(answer)
        device.poll(ready=True)
        assert answer in [skb.data for skb in port.got]
    # A large segment is cut, and its checksum is right.
    source, target = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
    segment = struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x18, 5, 0, 0) + bytes(4000)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as real:
        real.bind((device.name, 0x0800))
        real.settimeout(10)
        port.receive(
            Skb(packets.ethernet(BROADCAST, MAC, 0x0800, packets.ipv4(source, target, 6, segment)), True, True, 1460, 1)
        )
        cut = [packets.read_ipv4(real.recv(2000)) for _ in range(3)]
    assert all(packet is not None and packets.checksum_right(packet) for packet in cut)


def test_a_device_that_is_down_loses_frames(device: Tap, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            tap.fcntl.ioctl(control, tap.SIOCSIFFLAGS, tap._IFREQ.pack(device.name.encode(), 0))
        except PermissionError:
            pytest.skip("flags can't be set")
    device.transmit(Skb(BROADCAST + MAC + bytes(48)))
    device.poll(ready=True)
    assert device.tx_dropped == 1


def test_what_can_not_be(device: Tap) -> None:
    network = Network(Clock().now)
    with pytest.raises(OutsideError, match=f"tap device {device.name}: Device or resource busy"):
        Tap(device.name, network)
    with pytest.raises(ValueError):
        Tap("a-name-of-sixteen", network)


@pytest.mark.parametrize("missing", ["/nonexistent/tun", "/dev/null"])
def test_not_permitted(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tap, "DEVICE", missing)
    before = len(os.listdir("/proc/self/fd"))
    with pvirq.Host(machine_memory=1 << 28) as host:
        with pytest.raises(OutsideError) as error:
            host.tap()
        assert "\n" not in str(error.value)
        assert not host.outside
    assert len(os.listdir("/proc/self/fd")) == before


def test_in_a_host() -> None:
    with pvirq.Host(machine_memory=1 << 28) as host:
        try:
            device = host.tap(bridge="xenbr0")
        except OutsideError as error:
            pytest.skip(str(error))
        assert host.backends.network.bridges["xenbr0"].ports == [device]
        assert host.outside.awaited
        device.close()
        device.close()
        assert not host.outside.awaited
        device.transmit(Skb(BROADCAST + MAC + bytes(48)))
        assert not host.run(lambda: False, 10**9)

"""A tap device of the real machine as an interface on a bridge (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from typing import Final

from pvirq.drivers.bridge import Interface, Network
from pvirq.drivers.skb import Skb, finish
from pvirq.net.outside import OutsideError

DEVICE: Final = "/dev/net/tun"
# linux/if_tun.h, linux/sockios.h, linux/if.h
TUNSETIFF: Final = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
IFF_UP: Final = 0x1
_IFREQ: Final = struct.Struct("16sH22x")

FRAME_MAX: Final = 1 << 16
BUDGET: Final = 64  # frames that one turn takes


class Tap(Interface):
    """The device's frames come out of the bridge, the bridge's go to the real machine's network stack.

    Anything may come from there at any time, so while a tap device is open a host whose guests sleep waits in real
    time. It is the user's to give the device an address, or to put it on a real bridge.
    """

    def __init__(self, name: str, network: Network) -> None:
        """Open device `name`, making it if it isn't there; "" or a name such as "tap%d" lets the kernel choose.

        It is brought up where that is permitted. `network` is where the interface was added. OutsideError where
        the device can't be had; ValueError for a name that is too long.
        """
        if len(name.encode()) > 15:
            raise ValueError(f"{name!r}: an interface's name has at most 15 characters")
        try:
            self._fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise OutsideError(f"{DEVICE}: {error.strerror}") from None
        try:
            request = fcntl.ioctl(self._fd, TUNSETIFF, _IFREQ.pack(name.encode(), IFF_TAP | IFF_NO_PI))
        except OSError as error:
            os.close(self._fd)
            raise OutsideError(f"tap device {name or 'tap%d'}: {error.strerror}") from None
        super().__init__(_IFREQ.unpack(request)[0].rstrip(b"\0").decode())
        self._network = network
        self._closed = False
        self.tx_dropped = 0
        with contextlib.suppress(PermissionError):
            self._bring_up()

    def _bring_up(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            request = fcntl.ioctl(control, SIOCGIFFLAGS, _IFREQ.pack(self.name.encode(), 0))
            flags = _IFREQ.unpack(request)[1]
            if not flags & IFF_UP:
                fcntl.ioctl(control, SIOCSIFFLAGS, _IFREQ.pack(self.name.encode(), flags | IFF_UP))

    def transmit(self, skb: Skb) -> None:
        """A frame from the bridge; it is lost where the device is down or takes no more."""
        for frame in () if self._closed else finish(skb):
            try:
                os.write(self._fd, frame)
            except OSError:
                self.tx_dropped += 1

    @property
    def awaited(self) -> bool:
        return not self._closed

    def fileno(self) -> int:
        return self._fd

    def due_ns(self) -> int | None:
        return None

    def poll(self, *, ready: bool) -> None:
        """Take the frames that are there."""
        for _ in range(0 if self._closed else BUDGET):
            try:
                frame = os.read(self._fd, FRAME_MAX)
            except OSError:  # nothing there, or the device is down
                return
            self.receive(Skb(frame))

    def close(self) -> None:
        """Close the device, which is gone with that unless it is persistent, and leave the bridge."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)
            self._network.remove(self)

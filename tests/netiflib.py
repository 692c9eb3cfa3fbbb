"""Guests with a network interface each, and one that writes its rings by hand, for tests of netback and netfront."""

from __future__ import annotations

import struct
from collections.abc import Callable

from driverlib import Guest, Host, nic_of
from pvirq.abi.io_netif import NETIF_TX_REQUEST
from pvirq.abi.io_ring import REQ_PROD, RING_HEADER, RSP_PROD
from pvirq.drivers.netback import NetBack
from pvirq.drivers.skb import Skb
from pvirq.linux.personality import Personality
from pvirq.linux.pvops import Pvops
from pvirq.toolstack.devices import Nic


def mac(i: int) -> bytes:
    return bytes((0, 0x16, 0x3E, 0, 0, i))


def frame(to: int, sender: int, payload: bytes) -> bytes:
    return mac(to) + mac(sender) + b"\x88\xb5" + payload


class Net:
    """Guests 1 to n with an interface each, on one bridge."""

    def __init__(
        self, *kinds: Callable[..., Personality], vcpus: int = 1, dom0: Callable[..., Personality] = Pvops
    ) -> None:
        self.host = Host(dom0=dom0)
        self.host.start_backends()
        self.guests: list[Guest] = []
        self.got: list[list[Skb]] = []
        for kind in kinds:
            self.add(kind, vcpus)

    def add(self, kind: Callable[..., Personality] = Pvops, vcpus: int = 1) -> Guest:
        guest = self.host.guest(vcpus, kind)
        i = guest.domain.domid
        self.host.manager.attach_nic(i, Nic(0, ":".join(f"{byte:02x}" for byte in mac(i))))
        self.host.run()
        self.host.start_frontends(guest)
        got: list[Skb] = []
        nic_of(guest).on_receive = got.append
        self.guests.append(guest)
        self.got.append(got)
        return guest

    def send(self, i: int, data: bytes | Skb) -> bool:
        return nic_of(self.guests[i - 1]).transmit(data)

    def back(self, domid: int) -> NetBack:
        driver = self.host.xenbus.backends.devices[f"backend/vif/{domid}/0"].driver
        assert isinstance(driver, NetBack)
        return driver


class Hostile:
    """Writes any request on the tx ring of guest 1, and reads the answers."""

    def __init__(self, net: Net) -> None:
        self.net = net
        self.guest = net.guests[0]
        self.queue = nic_of(self.guest).queues[0]
        for irq in {self.queue.tx_irq, self.queue.rx_irq}:
            self.guest.kernel.irq.disable_irq(irq)
        self.page = net.host.machine.page(self.queue._ring_mfns[0])
        self.words = self.page[:16].cast("I")
        self.prod = self.words[REQ_PROD]
        self.frame = self.guest.xenbus.pages.alloc()
        self.ref = self.guest.xenbus.gnttab.grant_access(0, self.frame)
        net.host.machine.page(self.frame)[:14] = frame(2, 1, b"")

    def put(self, *entries: bytes) -> None:
        for entry in entries:
            at = RING_HEADER + self.prod % 256 * 12
            self.page[at : at + len(entry)] = entry
            self.prod += 1
        self.words[REQ_PROD] = self.prod & 0xFFFFFFFF
        self.notify()

    def notify(self) -> None:
        self.guest.kernel.events.notify_remote_via_irq(self.queue.tx_irq)
        self.net.host.run()

    def request(self, size: int, *, ref: int | None = None, offset: int = 0, flags: int = 0) -> bytes:
        return NETIF_TX_REQUEST.pack(self.ref if ref is None else ref, offset, flags, 3, size)

    def answers(self, *entries: bytes) -> list[int]:
        """The statuses of the answers to these."""
        before = self.words[RSP_PROD]
        self.put(*entries)
        return [
            struct.unpack_from("<h", self.page, RING_HEADER + i % 256 * 12 + 2)[0]
            for i in range(before, self.words[RSP_PROD])
        ]

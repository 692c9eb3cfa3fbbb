"""The network of domain 0: bridges, and the interfaces that are their ports (net/bridge of Linux, brctl)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from mypy_extensions import mypyc_attr

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.skb import Skb, finish
from pvirq.xen.timer import NS_PER_S

AGEING_NS: Final = 300 * NS_PER_S  # after which a bridge has forgotten where an address was


@mypyc_attr(allow_interpreted_subclasses=True)
class Interface:
    """A network interface of domain 0. `receive` takes what came in through it; it goes to the bridge it is a port of.

    A subclass, or `transmit` given to it, sends frames out.
    """

    def __init__(self, name: str, transmit: Callable[[Skb], None] | None = None) -> None:
        self.name = name
        self.bridge: Bridge | None = None
        self.on_receive: Callable[[Skb], None] | None = None
        """Where frames go while the interface is no port of a bridge."""
        self._transmit = transmit

    def transmit(self, skb: Skb) -> None:
        """Send a frame out."""
        if self._transmit is not None:
            self._transmit(skb)

    def receive(self, skb: Skb) -> None:
        """A frame has come in."""
        if self.bridge is not None:
            self.bridge.forward(skb, self)
        elif self.on_receive is not None:
            self.on_receive(skb)


class Nic(Protocol):
    """The driver of a physical network card (`pvirq.hardware.nic`)."""

    on_receive: Callable[[bytes], None]

    def transmit(self, frame: bytes) -> object:
        """Send a frame."""
        ...


class PhysicalInterface(Interface):
    """A physical card as an interface: frames go out finished, one by one."""

    def __init__(self, name: str, nic: Nic) -> None:
        super().__init__(name)
        self.nic = nic
        nic.on_receive = lambda frame: self.receive(Skb(frame))

    def transmit(self, skb: Skb) -> None:
        for frame in finish(skb):
            self.nic.transmit(frame)


class Bridge:
    """A bridge: it learns behind which port an address is, and floods what it doesn't know."""

    def __init__(self, name: str, now: Callable[[], int]) -> None:
        """`now` is the kernel's time in ns."""
        self.name = name
        self.ports: list[Interface] = []
        self._now = now
        self._table: dict[bytes, tuple[Interface, int]] = {}

    def add(self, port: Interface) -> None:
        """brctl addif. XenError(EBUSY): it is a port already."""
        if port.bridge is not None:
            raise XenError(Errno.EBUSY, f"{port.name} is in {port.bridge.name}")
        port.bridge = self
        self.ports.append(port)

    def remove(self, port: Interface) -> None:
        """brctl delif; what was learnt of the port is forgotten. Nothing happens where it is no port."""
        if port.bridge is self:
            port.bridge = None
            self.ports.remove(port)
            self._table = {address: entry for address, entry in self._table.items() if entry[0] is not port}

    def port_of(self, address: bytes) -> Interface | None:
        """Behind which port a station is, if that is known."""
        entry = self._table.get(address)
        return entry[0] if entry is not None and self._now() - entry[1] < AGEING_NS else None

    def forward(self, skb: Skb, source: Interface) -> None:
        """A frame has come in through port `source` (br_handle_frame)."""
        data, now = skb.data, self._now()
        sender, target = data[6:12], data[:6]
        if not sender[0] & 1:
            self._table[sender] = source, now
        entry = None if target[0] & 1 else self._table.get(target)
        known = entry[0] if entry is not None and now - entry[1] < AGEING_NS else None
        if known is None:
            for port in list(self.ports):
                if port is not source:
                    port.transmit(skb)
        elif known is not source:
            known.transmit(skb)


class Network:
    """Domain 0's interfaces and bridges by name."""

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now
        self.interfaces: dict[str, Interface] = {}
        self.bridges: dict[str, Bridge] = {}

    def add_bridge(self, name: str) -> Bridge:
        """brctl addbr. XenError(EEXIST)."""
        if name in self.bridges:
            raise XenError(Errno.EEXIST, f"bridge {name} exists")
        bridge = self.bridges[name] = Bridge(name, self._now)
        return bridge

    def need_bridge(self, name: str) -> Bridge:
        """The bridge of that name, which is made if it isn't there."""
        return self.bridges.get(name) or self.add_bridge(name)

    def add(self, interface: Interface, bridge: str = "") -> None:
        """Register an interface, as a port of `bridge` where one is named. XenError(EEXIST, ENODEV)."""
        if interface.name in self.interfaces:
            raise XenError(Errno.EEXIST, f"interface {interface.name} exists")
        self.interfaces[interface.name] = interface
        if bridge:
            self.attach(interface.name, bridge)

    def remove(self, interface: Interface) -> None:
        """The interface is gone; a second time does nothing."""
        if self.interfaces.get(interface.name) is interface:
            del self.interfaces[interface.name]
        if interface.bridge is not None:
            interface.bridge.remove(interface)

    def attach(self, interface: str, bridge: str) -> None:
        """The vif-bridge script's `online`. XenError(ENODEV): no such bridge or interface."""
        if bridge not in self.bridges:
            raise XenError(Errno.ENODEV, f"Could not find bridge device {bridge}")
        if interface not in self.interfaces:
            raise XenError(Errno.ENODEV, f"{interface} does not exist")
        port = self.interfaces[interface]
        if port.bridge is not self.bridges[bridge]:
            self.bridges[bridge].add(port)

    def detach(self, interface: str) -> None:
        """The script's `offline`; nothing happens where the interface is gone."""
        port = self.interfaces.get(interface)
        if port is not None and port.bridge is not None:
            port.bridge.remove(port)

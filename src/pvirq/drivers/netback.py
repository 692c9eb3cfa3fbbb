"""The network backend: other domains' interfaces in domain 0 (drivers/net/xen-netback of Linux 6.1).

Each frontend is an interface vifDOMID.HANDLE, which the hotplug script puts on a bridge. A packet that can't be
right, or an index, is the end of the frontend's device ("fatal error; disabling device"); a grant that is no good
costs it the packet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_xenbus import XenbusState
from pvirq.abi.xen import PAGE_SIZE
from pvirq.drivers.bridge import Interface, Network
from pvirq.drivers.netback_ctrl import CtrlRing, Hashing, hash_extra
from pvirq.drivers.netback_queue import BackQueue
from pvirq.drivers.skb import Skb, finish, flow_hash
from pvirq.drivers.xenbus import Device, Driver
from pvirq.drivers.xs import XsWatch
from pvirq.linux.irq import IrqError
from pvirq.linux.kthread import Body
from pvirq.xen.grant import GrantError

FEATURES: Final = (
    ("feature-sg", 1), ("feature-gso-tcpv4", 1), ("feature-gso-tcpv6", 1), ("feature-ipv6-csum-offload", 1),
    ("feature-rx-copy", 1), ("feature-xdp-headroom", 1), ("feature-rx-flip", 0), ("feature-multicast-control", 1),
    ("feature-dynamic-multicast-control", 1),
)  # fmt: skip
MAX_HEADROOM: Final = PAGE_SIZE // 2  # XDP asks for 256 bytes; a frame must still fit into the ring
# Of XenLinux 2.6.18's netback.
OLD_FEATURES: Final = (("feature-sg", 1), ("feature-gso-tcpv4", 1), ("feature-rx-copy", 1), ("feature-rx-flip", 0))


class Vif(Interface):
    """The interface of a frontend in domain 0 (struct xenvif)."""

    def __init__(self, back: NetBack, name: str) -> None:
        super().__init__(name)
        self.back = back
        self.queues: list[BackQueue] = []
        self.ctrl: CtrlRing | None = None
        self.hashing = Hashing()
        self.disabled = False
        self.csum = True  # the frontend takes frames without checksum
        self.gso = False  # and TCP segments that are to be cut
        self.multicast_control = False
        self.multicast: set[bytes] = set()
        self.headroom = 0  # bytes that the frontend wants free before each part of a frame (xdp-headroom)
        self.tx_packets = self.tx_bytes = self.rx_packets = self.rx_bytes = self.rx_dropped = 0

    def transmit(self, skb: Skb) -> None:
        """To the frontend (xenvif_start_xmit)."""
        queues = self.queues
        if not queues or self.disabled:
            self.rx_dropped += 1
            return
        data = skb.data
        if self.multicast_control and data[0] & 1 and data[:6] != b"\xff" * 6 and data[:6] not in self.multicast:
            self.rx_dropped += 1
            return
        skbs = [skb]
        if (skb.gso_size and not self.gso) or (skb.csum_blank and not self.csum):
            skbs = [Skb(frame) for frame in finish(skb)]
        for one in skbs:
            if self.hashing.algorithm:
                found = self.hashing.hash(one.data)
                queue = queues[self.hashing.queue(found[0] if found else 0, len(queues))]
                queue.queue_rx(one, hash_extra(*found) if found else b"")
            else:
                (queues[0] if len(queues) == 1 else queues[flow_hash(one.data) % len(queues)]).queue_rx(one)


class NetBack(Driver):
    """One interface of a frontend's."""

    def __init__(self, dev: Device, network: Network, *, max_queues: int | None = None) -> None:
        """`max_queues` is xen_netback.max_queues (one a CPU)."""
        super().__init__(dev)
        self.network = network
        self.vif: Vif | None = None
        self._modern = dev.kernel.events.multi_queue
        self._max_queues = max_queues
        self._hotplug: XsWatch | None = None
        self._multicast: XsWatch | None = None
        self._wanted = XenbusState.Initialising  # the state that the hotplug script still holds up

    def _limit(self) -> int:
        return self._max_queues or bin(self.dev.kernel.irq.online).count("1")

    # -- xenbus --------------------------------------------------------------------------------------------------------

    def probe(self) -> Body[None]:
        """netback_probe."""
        dev, xs = self.dev, self.dev.xs
        yield from xs.transact(self._write_features)
        if self._modern:
            yield from xs.write(dev.path("feature-split-event-channels"), 1)
            yield from xs.write(dev.path("multi-queue-max-queues"), self._limit())
            yield from xs.write(dev.path("feature-ctrl-ring"), 1)
            yield from xs.read(dev.path("script"))
        handle = yield from xs.read_int(dev.path("handle"))
        self.vif = Vif(self, f"vif{dev.otherend_id}.{handle}")
        self.network.add(self.vif)
        yield from dev.switch_state(XenbusState.InitWait)

    def _write_features(self, tx: int) -> Body[None]:
        for key, value in FEATURES if self._modern else OLD_FEATURES:
            yield from self.dev.xs.write(self.dev.path(key), value, tx)

    def otherend_changed(self, state: XenbusState) -> Body[None]:
        """frontend_changed and set_backend_state."""
        dev = self.dev
        if state == XenbusState.Initialising:
            if dev.state == XenbusState.Closed:
                dev.kernel.printk(f"vif {dev.ident}: prepare for reconnect")
                yield from dev.switch_state(XenbusState.InitWait)
        elif state == XenbusState.Connected:
            if XenbusState.Connected not in (dev.state, self._wanted):
                self.disconnect()
                if (yield from self._connect()):
                    yield from self._await_hotplug()
                else:
                    self.disconnect()
        elif state == XenbusState.Reconfiguring:
            yield from self._read_headroom()
            yield from dev.switch_state(XenbusState.Reconfigured)
        elif state == XenbusState.Closing:
            self.disconnect()
            yield from dev.switch_state(XenbusState.Closing)
        elif state in (XenbusState.Closed, XenbusState.Unknown):
            self.disconnect()
            yield from dev.frontend_gone(state)

    def _connect(self) -> Body[bool]:
        """connect."""
        dev, xs, vif = self.dev, self.dev.xs, self.vif
        if vif is None:
            return False
        yield from xs.read(dev.path("mac"))
        queues = 1
        if self._modern:
            queues = yield from xs.read_int(dev.other("multi-queue-num-queues"), 1)
            if not 1 <= queues <= self._limit():
                why = f"guest requested {queues} queues, exceeding the maximum of {self._limit()}."
                yield from dev.fatal(XenError(Errno.EINVAL), why)
                return False
        if not (yield from xs.read_int(dev.other("request-rx-copy"), 0)):
            yield from dev.fatal(XenError(Errno.EOPNOTSUPP), "guest doesn't ask for rx-copy")
            return False
        if not (yield from xs.read_int(dev.other("feature-rx-notify"), 0)):
            yield from dev.fatal(XenError(Errno.EINVAL), "feature-rx-notify is mandatory")
            return False
        yield from xs.read_int(dev.other("feature-sg"), 0)
        vif.gso = bool((yield from xs.read_int(dev.other("feature-gso-tcpv4"), 0)))
        vif.csum = not (yield from xs.read_int(dev.other("feature-no-csum-offload"), 0))
        if self._modern:
            for key in ("feature-gso-tcpv6", "feature-ipv6-csum-offload"):
                yield from xs.read_int(dev.other(key), 0)
            yield from self._read_headroom()
            yield from self._unwatch()
            self._multicast = yield from xs.watch(dev.other("request-multicast-control"), self._multicast_changed)
        if self._modern and not (yield from self._connect_ctrl(vif)):
            return False
        for i in range(queues):
            where = dev.otherend if queues == 1 else dev.other(f"queue-{i}")
            if not (yield from self._connect_queue(vif, i, where)):
                return False
        vif.disabled = False
        for queue in vif.queues:
            queue.start()
        return True

    def _read_headroom(self) -> Body[None]:
        """read_xenbus_frontend_xdp; what is too much counts as none."""
        headroom = yield from self.dev.xs.read_int(self.dev.other("xdp-headroom"), 0)
        if self.vif is not None:
            self.vif.headroom = headroom if 0 <= headroom <= MAX_HEADROOM else 0

    def _multicast_changed(self, path: str) -> Body[None]:
        """Once as it is set, then whenever the frontend changes its mind (xen_mcast_ctrl_changed)."""
        wants = yield from self.dev.xs.read_int(self.dev.other("request-multicast-control"), 0)
        if self.vif is not None:
            self.vif.multicast_control = bool(wants)

    def _connect_ctrl(self, vif: Vif) -> Body[bool]:
        """connect_ctrl_ring; a frontend need not have one."""
        dev, xs = self.dev, self.dev.xs
        try:
            ref = yield from xs.read_int(dev.other("ctrl-ring-ref"))
        except XenError:
            return True
        try:
            port = yield from xs.read_int(dev.other("event-channel-ctrl"))
            vif.ctrl = CtrlRing(vif, ref, port)
        except (XenError, IrqError, GrantError) as error:
            yield from dev.fatal(error, f"mapping shared-frame {ref} port of the control ring")
            return False
        return True

    def _connect_queue(self, vif: Vif, index: int, where: str) -> Body[bool]:
        """connect_data_rings."""
        dev, xs = self.dev, self.dev.xs
        try:
            tx_ref = yield from xs.read_int(f"{where}/tx-ring-ref")
            rx_ref = yield from xs.read_int(f"{where}/rx-ring-ref")
        except XenError as error:
            yield from dev.fatal(error, f"reading {where}/ring-ref")
            return False
        try:
            if not self._modern:
                raise XenError(Errno.ENOENT, "one channel only")
            tx_port = yield from xs.read_int(f"{where}/event-channel-tx")
            rx_port = yield from xs.read_int(f"{where}/event-channel-rx")
        except XenError:
            try:
                tx_port = rx_port = yield from xs.read_int(f"{where}/event-channel")
            except XenError as error:
                yield from dev.fatal(error, f"reading {where}/event-channel(-tx/rx)")
                return False
        try:
            vif.queues.append(BackQueue(vif, index, tx_ref, rx_ref, tx_port, rx_port))
        except (XenError, IrqError, GrantError) as error:
            why = f"mapping shared-frames {tx_ref}/{rx_ref} port tx {tx_port} rx {rx_port}"
            yield from dev.fatal(error, why)
            return False
        return True

    def _await_hotplug(self) -> Body[None]:
        """Connected only once the script has put the interface on its bridge."""
        self._wanted = XenbusState.Connected
        self._hotplug = yield from self.dev.xs.watch(self.dev.path("hotplug-status"), self._hotplug_changed)

    def _hotplug_changed(self, path: str) -> Body[None]:
        try:
            status = yield from self.dev.xs.read(self.dev.path("hotplug-status"))
        except XenError:
            return
        if status == "connected" and self._wanted == XenbusState.Connected:
            watch, self._hotplug = self._hotplug, None
            if watch is not None:
                yield from self.dev.xs.unwatch(watch)
            yield from self.dev.switch_state(XenbusState.Connected)

    def _unwatch(self) -> Body[None]:
        watches, self._hotplug, self._multicast = (self._hotplug, self._multicast), None, None
        for watch in watches:
            if watch is not None:
                yield from self.dev.xs.unwatch(watch)

    def disconnect(self) -> None:
        """Let go of the rings (xenvif_disconnect_data)."""
        self._wanted = XenbusState.Initialising
        if self.vif is not None:
            queues, self.vif.queues = self.vif.queues, []
            for queue in queues:
                queue.free()
            ctrl, self.vif.ctrl = self.vif.ctrl, None
            if ctrl is not None:
                ctrl.free()
            self.vif.hashing = Hashing()

    def remove(self) -> Body[None]:
        """netback_remove."""
        self.disconnect()
        yield from self._unwatch()
        if self.vif is not None:
            self.network.remove(self.vif)
            self.vif = None


def netback(network: Network, **options: Any) -> Callable[[Device], NetBack]:
    """The driver to register for `vif`; `options` are the module's."""
    return partial(NetBack, network=network, **options)

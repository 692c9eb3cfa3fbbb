"""The network frontend (xen-netfront.c of Linux 6.1).

Where the kernel is an older one (`multi_queue` False) it is XenLinux's: one channel for both directions, whose row
in /proc/interrupts is the interface's name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_xenbus import XenbusState
from pvirq.drivers.netfront_queue import FrontQueue
from pvirq.drivers.skb import Skb, flow_hash
from pvirq.drivers.xenbus import Device, Driver
from pvirq.linux.irq import IrqError
from pvirq.linux.kthread import Body, Completion

MAX_QUEUES: Final = 8  # xen_netfront.max_queues' default, or the number of CPUs if that is less


class NetFront(Driver):
    """A network interface of a guest.

    `transmit` sends; `on_receive`, where set, is called in process context with each frame that comes. `address`
    is its MAC address. `ready` is done when it is connected.
    """

    def __init__(self, dev: Device, *, max_queues: int = MAX_QUEUES) -> None:
        super().__init__(dev)
        self.address = bytes(6)
        self.handle = int(dev.nodename.rpartition("/")[2])
        self.name = f"eth{self.handle}"
        self.queues: list[FrontQueue] = []
        self.on_receive: Callable[[Skb], None] | None = None
        self.ready: Completion[None] = Completion()
        self.tx_packets = self.tx_bytes = self.tx_dropped = 0
        self.rx_packets = self.rx_bytes = self.rx_errors = 0
        self.gso = False  # the other end takes TCP segments that are to be cut
        self._modern = dev.kernel.events.multi_queue
        self._max_queues = max_queues
        self._split = False

    # -- for users -----------------------------------------------------------------------------------------------------

    def connected(self) -> Body[None]:
        """Wait until frames can be sent."""
        yield from self.ready.wait()

    def transmit(self, frame: bytes | Skb) -> bool:
        """Send a frame. False: it was dropped, for want of a backend or of room (TX queue of 1,000 frames).

        XenError(EINVAL) for what can't be a frame.
        """
        skb = frame if isinstance(frame, Skb) else Skb(frame)
        if not 14 <= len(skb.data) <= 65535:
            raise XenError(Errno.EINVAL, f"a frame of {len(skb.data)} bytes")
        queues = self.queues
        if not queues or not (queues[0] if len(queues) == 1 else queues[flow_hash(skb.data) % len(queues)]).send(skb):
            self.tx_dropped += 1
            return False
        self.tx_packets += 1
        self.tx_bytes += len(skb.data)
        return True

    def received(self, skb: Skb) -> None:
        """For its queues: a frame has come."""
        self.rx_packets += 1
        self.rx_bytes += len(skb.data)
        if self.on_receive is not None:
            self.on_receive(skb)

    # -- for the bus ---------------------------------------------------------------------------------------------------

    def probe(self) -> Body[None]:
        yield from self.dev.await_backend()

    def otherend_changed(self, state: XenbusState) -> Body[None]:
        """netback_changed."""
        dev = self.dev
        if state == XenbusState.InitWait:
            if dev.state == XenbusState.Initialising and (yield from self._connect()):
                yield from dev.switch_state(XenbusState.Connected)
        elif state == XenbusState.Connected:
            if dev.state == XenbusState.Connected:
                self.ready.complete(None)
        elif state == XenbusState.Closing or (state == XenbusState.Closed and dev.state != XenbusState.Closed):
            yield from dev.frontend_closed()

    def _connect(self) -> Body[bool]:
        """xennet_connect and talk_to_netback."""
        dev, xs = self.dev, self.dev.xs
        if not (yield from xs.read_int(dev.other("feature-rx-copy"), 0)):
            dev.kernel.printk(f"{dev.kind} {dev.ident}: backend does not support copying receive path")
            return False
        try:
            self.address = bytes.fromhex((yield from xs.read(dev.path("mac"))).replace(":", ""))
        except (XenError, ValueError) as error:
            yield from dev.fatal(error, f"parsing {dev.path('mac')}")
            return False
        queues = 1
        if self._modern:
            limit = min(self._max_queues, bin(dev.kernel.irq.online).count("1"))
            queues = max(1, min(limit, (yield from xs.read_int(dev.other("multi-queue-max-queues"), 1))))
            self._split = bool((yield from xs.read_int(dev.other("feature-split-event-channels"), 0)))
            yield from xs.read_int(dev.path("trusted"), 1)
        try:
            for i in range(queues):
                self.queues.append(FrontQueue(self, i, split=self._split))
            # Rings after all queues, for their references come after those that the queues hold in reserve.
            for queue in self.queues:
                queue.setup_rings()
        except (XenError, IrqError) as error:
            yield from dev.fatal(error, "setting up the rings")
            self._free()
            return False
        if self._modern and (yield from xs.read_int(dev.other("feature-xdp-headroom"), 0)):
            yield from xs.write(dev.path("xdp-headroom"), 0)
        try:
            yield from xs.transact(self._write_rings)
        except XenError as error:
            yield from dev.fatal(error, "writing rings")
            self._free()
            return False
        for queue in self.queues:
            queue.start()
        yield from self._read_features()
        return True

    def _read_features(self) -> Body[None]:
        """What the backend takes (xennet_fix_features)."""
        xs, dev = self.dev.xs, self.dev
        for key in ("feature-sg", "feature-ipv6-csum-offload") if self._modern else ("feature-sg",):
            yield from xs.read_int(dev.other(key), 0)
        self.gso = bool((yield from xs.read_int(dev.other("feature-gso-tcpv4"), 0)))
        if self._modern:
            yield from xs.read_int(dev.other("feature-gso-tcpv6"), 0)

    def _write_rings(self, tx: int) -> Body[None]:
        dev, xs = self.dev, self.dev.xs
        write = partial(xs.write, tx=tx)
        if len(self.queues) > 1:
            yield from write(dev.path("multi-queue-num-queues"), len(self.queues))
        for i, queue in enumerate(self.queues):
            where = dev.nodename if len(self.queues) == 1 else dev.path(f"queue-{i}")
            yield from write(f"{where}/tx-ring-ref", queue.tx_ref)
            yield from write(f"{where}/rx-ring-ref", queue.rx_ref)
            if self._split:
                yield from write(f"{where}/event-channel-tx", queue.tx_port)
                yield from write(f"{where}/event-channel-rx", queue.rx_port)
            else:
                yield from write(f"{where}/event-channel", queue.tx_port)
        for key in ("request-rx-copy", "feature-rx-notify", "feature-sg", "feature-gso-tcpv4"):
            yield from write(dev.path(key), 1)
        if self._modern:
            for key in ("feature-gso-tcpv6", "feature-ipv6-csum-offload"):
                yield from write(dev.path(key), 1)

    def remove(self) -> Body[None]:
        self._free()
        self.ready = Completion()
        yield from ()

    def _free(self) -> None:
        queues, self.queues = self.queues, []
        for queue in queues:
            queue.free()


def netfront(**options: Any) -> Callable[[Device], NetFront]:
    """The driver to register for `vif`; `options` are the module's."""
    return partial(NetFront, **options)

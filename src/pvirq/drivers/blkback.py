"""The block backend: other domains' disks (drivers/block/xen-blkback of Linux 6.1).

What a frontend does wrong in a request gets it an error; an index that can't be stops its ring, and a ring that
can't be mapped closes its device. Nobody else notices; the kernel's log says why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_blkif import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    SECTOR_SIZE,
    VDISK_CDROM,
    VDISK_READONLY,
)
from pvirq.abi.io_xenbus import XenbusState
from pvirq.drivers.blkback_ring import MAX_INDIRECT_SEGMENTS, BlkbackRing
from pvirq.drivers.blockstore import BlockDevices, BlockStore, Discards, InPlace
from pvirq.drivers.xenbus import Device, Driver
from pvirq.drivers.xs import XsWatch
from pvirq.linux.irq import IrqError
from pvirq.linux.kthread import Body
from pvirq.xen.grant import GrantError

MAX_RING_ORDER: Final = 4  # XENBUS_MAX_RING_GRANT_ORDER
PROTOCOLS: Final = ("x86_64-abi", "")  # of 64-bit frontends, which an older one needn't name
OPERATIONS: Final = {
    BLKIF_OP_READ: "read", BLKIF_OP_WRITE: "write", BLKIF_OP_WRITE_BARRIER: "barrier",
    BLKIF_OP_FLUSH_DISKCACHE: "flush", BLKIF_OP_DISCARD: "discard",
}  # fmt: skip
COMPLAINTS: Final = 10  # lines in the log for one device's bad requests


class BlkBack(Driver):
    """One disk of a frontend's. Made by the bus; `devices` are where `physical-device` is looked up."""

    def __init__(
        self, dev: Device, devices: BlockDevices, *, persistent: bool = True, max_queues: int | None = None
    ) -> None:
        """`persistent` is xen_blkback.feature_persistent, `max_queues` its max_queues (one a CPU)."""
        super().__init__(dev)
        self.devices = devices
        self.store: BlockStore | None = None
        self.in_place: InPlace | None = None  # the store, where it is such a one
        self.sectors = 0
        self.readonly = False
        self.persistent = False  # the frontend's grants may stay mapped
        self.rings: list[BlkbackRing] = []
        self.name = ""
        self._modern = dev.kernel.events.multi_queue
        self._offer_persistent = persistent and self._modern
        self._max_queues = max_queues
        self._info = 0
        self._watch: XsWatch | None = None
        self._number = ""
        self._complaints = 0
        self._failures: set[tuple[int, Errno]] = set()
        self._draining: list[Callable[[], None]] = []

    # -- xenbus --------------------------------------------------------------------------------------------------------

    def probe(self) -> Body[None]:
        """xen_blkbk_probe."""
        dev, xs = self.dev, self.dev.xs
        if self._modern:
            yield from xs.write(dev.path("feature-max-indirect-segments"), MAX_INDIRECT_SEGMENTS)
            queues = self._max_queues or bin(dev.kernel.irq.online).count("1")
            yield from xs.write(dev.path("multi-queue-max-queues"), queues)
        self._watch = yield from xs.watch(dev.path("physical-device"), self._backend_changed)
        if self._modern:
            yield from xs.write(dev.path("max-ring-page-order"), MAX_RING_ORDER)
        yield from dev.switch_state(XenbusState.InitWait)

    def _backend_changed(self, path: str) -> Body[None]:
        """The hotplug script has said which device it is."""
        dev, xs = self.dev, self.dev.xs
        try:
            number = yield from xs.read(dev.path("physical-device"))
        except XenError:
            return  # not yet: the first event of a watch
        if not number or number == self._number:
            return
        if self._number:
            dev.kernel.printk(f"xen-blkback: changing physical device (from {self._number} to {number}) not supported.")
            return
        try:
            mode = yield from xs.read(dev.path("mode"))
        except XenError as error:
            yield from dev.error(error, "reading mode")
            return
        try:
            kind = yield from xs.read(dev.path("device-type"))
        except XenError:
            kind = "disk"
        store = self.devices.find(number)
        if store is None:
            yield from dev.fatal(XenError(Errno.ENOENT, f"no device {number}"), "creating vbd structure")
            return
        self.store, self._number, self.sectors = store, number, store.sectors
        self.in_place = store if isinstance(store, InPlace) else None
        self.readonly = "w" not in mode
        self._info = (VDISK_READONLY if self.readonly else 0) | (VDISK_CDROM if kind == "cdrom" else 0)
        yield from self._update_status()

    def otherend_changed(self, state: XenbusState) -> Body[None]:
        """frontend_changed."""
        dev = self.dev
        if state == XenbusState.Initialising:
            if dev.state == XenbusState.Closed:
                dev.kernel.printk(f"xen-blkback: {dev.nodename}: prepare for reconnect")
                yield from dev.switch_state(XenbusState.InitWait)
        elif state in (XenbusState.Initialised, XenbusState.Connected):
            if dev.state == XenbusState.Connected:
                return
            self.disconnect()
            if (yield from self._connect_ring()):
                yield from self._update_status()
        elif state == XenbusState.Closing:
            yield from dev.switch_state(XenbusState.Closing)
        elif state in (XenbusState.Closed, XenbusState.Unknown):
            self.disconnect()
            yield from dev.frontend_gone(state)

    def _connect_ring(self) -> Body[bool]:
        """Read where the frontend's rings are and map them."""
        dev, xs = self.dev, self.dev.xs
        try:
            protocol = yield from xs.read(dev.other("protocol"))
        except XenError:
            protocol = ""
        if protocol not in PROTOCOLS:
            yield from dev.fatal(XenError(Errno.ENOSYS, protocol), f"unknown fe protocol {protocol}")
            return False
        queues, order = 1, 0
        self.persistent = False
        if self._modern:
            wants = yield from xs.read_int(dev.other("feature-persistent"), 0)
            self.persistent = bool(wants) and self._offer_persistent
            queues = yield from xs.read_int(dev.other("multi-queue-num-queues"), 1)
            limit = self._max_queues or bin(dev.kernel.irq.online).count("1")
            if not 1 <= queues <= limit:
                error = XenError(Errno.ENOSYS)
                yield from dev.fatal(error, f"guest requested {queues} queues, exceeding the maximum of {limit}.")
                return False
            order = yield from xs.read_int(dev.other("ring-page-order"), 0)
            if not 0 <= order <= MAX_RING_ORDER:
                error = XenError(Errno.EINVAL)
                yield from dev.fatal(error, f"invalid ring page order {order} exceed max:{MAX_RING_ORDER}")
                return False
        for i in range(queues):
            where = dev.otherend if queues == 1 else dev.other(f"queue-{i}")
            if not (yield from self._map_ring(where, 1 << order)):
                self.disconnect()
                return False
        persistent = "persistent grants" if self.persistent else ""
        dev.kernel.printk(f"xen-blkback: {dev.nodename}: using {queues} queues, protocol 1 ({protocol}) {persistent}")
        return True

    def _map_ring(self, where: str, pages: int) -> Body[bool]:
        """read_per_ring_refs and xen_blkif_map."""
        dev, xs = self.dev, self.dev.xs
        try:
            port = yield from xs.read_int(f"{where}/event-channel")
            refs = []
            for i in range(pages):
                refs.append((yield from xs.read_int(f"{where}/ring-ref{i if pages > 1 else ''}")))
        except XenError as error:
            yield from dev.fatal(error, f"reading {where}/event-channel and ring-ref")
            return False
        try:
            self.rings.append(BlkbackRing(self, refs, port))
        except (XenError, IrqError, GrantError) as error:
            yield from dev.fatal(error, f"mapping ring-ref port {port}")
            return False
        return True

    def _update_status(self) -> Body[None]:
        """Connect once both the rings and the disk are there (xen_update_blkif_status)."""
        dev = self.dev
        if not self.rings or self.store is None or dev.state == XenbusState.Connected:
            return
        try:
            yield from dev.xs.transact(self._write_features)
        except XenError as error:
            yield from dev.fatal(error, f"writing {dev.path('sectors')}")
            return
        self.name = f"{dev.otherend_id}.{(yield from self._device_name())}"
        yield from dev.switch_state(XenbusState.Connected)

    def _device_name(self) -> Body[str]:
        try:
            return (yield from self.dev.xs.read(self.dev.path("dev"))).removeprefix("/dev/")
        except XenError:
            return self.dev.ident

    def _write_features(self, tx: int) -> Body[None]:
        """connect."""
        dev, xs = self.dev, self.dev.xs
        store: object = self.store
        features: list[tuple[str, int]] = []
        if self._modern:
            features.append(("feature-flush-cache", 1))
            if isinstance(store, Discards) and (yield from xs.read_int(dev.path("discard-enable"), 1, tx)):
                features += [
                    ("discard-granularity", 4096), ("discard-alignment", 0), ("discard-secure", 0),
                    ("feature-discard", 1),
                ]  # fmt: skip
        features.append(("feature-barrier", 1))
        if self._modern:
            features.append(("feature-persistent", int(self._offer_persistent)))
        features += [("sectors", self.sectors), ("info", self._info), ("sector-size", SECTOR_SIZE)]
        if self._modern:
            features.append(("physical-sector-size", SECTOR_SIZE))
        for key, value in features:
            yield from xs.write(dev.path(key), value, tx)

    def disconnect(self) -> None:
        """Let go of the rings; requests that are under way end without an answer (xen_blkif_disconnect)."""
        rings, self.rings = self.rings, []
        for ring in rings:
            ring.free()

    def remove(self) -> Body[None]:
        """xen_blkbk_remove."""
        watch, self._watch = self._watch, None
        if watch is not None:
            yield from self.dev.xs.unwatch(watch)
        self.disconnect()
        self.store, self.in_place, self._number = None, None, ""

    # -- for the rings -------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        return sum(ring.in_flight for ring in self.rings)

    def complain(self, why: str) -> None:
        """Log what a frontend did wrong, so often as helps."""
        self._complaints += 1
        if self._complaints <= COMPLAINTS:
            more = "; further ones are not logged" if self._complaints == COMPLAINTS else ""
            self.dev.kernel.printk(f"xen-blkback: {self.dev.nodename}: {why}{more}")

    def failed(self, operation: int, error: Errno) -> None:
        """The store couldn't: that is logged once for each kind of request and error."""
        if (operation, error) not in self._failures:
            self._failures.add((operation, error))
            name = OPERATIONS.get(operation, str(operation))
            printk, where = self.dev.kernel.printk, f"xen-blkback: {self.dev.nodename}"
            printk(f"{where}: {name} of device {self._number} failed: {error.name}; further ones are not logged")

    def when_drained(self, action: Callable[[], None]) -> None:
        """Do something once nothing is under way on any ring (xen_blk_drain_io)."""
        if self.in_flight:
            self._draining.append(action)
        else:
            action()

    def request_done(self) -> None:
        """A ring has one less under way."""
        while self._draining and not self.in_flight:
            self._draining.pop(0)()


def blkback(devices: BlockDevices, **options: Any) -> Callable[[Device], BlkBack]:
    """The driver to register for `vbd`; `options` are the module's."""
    return lambda dev: BlkBack(dev, devices, **options)

"""The block frontend: a disk whose sectors are another domain's to keep (xen-blkfront.c of Linux 6.1).

Where the kernel is an older one (`multi_queue` False) it is XenLinux's: one ring, no persistent grants, no indirect
requests. Both speak the protocol of `pvirq.abi.io_blkif`.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_blkif import (
    BLKIF_ENTRY_SIZE,
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_INDIRECT,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_REQUEST,
    BLKIF_REQUEST_DISCARD,
    BLKIF_REQUEST_INDIRECT,
    BLKIF_RESPONSE,
    BLKIF_RSP_OKAY,
    BLKIF_SEGMENT,
    SECTOR_SIZE,
    SECTORS_PER_PAGE,
    VDISK_READONLY,
)
from pvirq.abi.io_xenbus import XenbusState
from pvirq.abi.xen import PAGE_SIZE
from pvirq.drivers.ring import FrontRing, RingPages
from pvirq.drivers.xenbus import Device, Driver
from pvirq.linux.irq import IRQ_HANDLED, IrqError, IrqReturn
from pvirq.linux.kthread import Body, Completion

MAX_INDIRECT_SEGMENTS: Final = 32  # xen_blkfront.max_indirect_segments
PROTOCOL: Final = "x86_64-abi"


class Request:
    """One request of the block layer: so much as one ring request can carry. Done with what was read."""

    __slots__ = ("count", "data", "done", "indirect", "operation", "sector", "segments")

    def __init__(self, operation: int, sector: int, count: int, data: bytes | memoryview | None) -> None:
        self.operation = operation
        self.sector = sector
        self.count = count
        self.data = data
        self.done: Completion[bytes] = Completion()
        self.segments: list[tuple[int, int]] = []  # (reference, mfn) of each page
        self.indirect: tuple[int, int] | None = None


class Queue:
    """One ring with its channel (struct blkfront_ring_info)."""

    def __init__(self, front: BlkFront, order: int) -> None:
        """A ring of 1 << `order` pages (setup_blkring). XenError, IrqError; nothing is left of it then."""
        xenbus = front.dev.xenbus
        self.front = front
        self._gnttab, self._pages, self._machine = xenbus.gnttab, xenbus.pages, xenbus.kernel.domain.machine
        self._backend = front.dev.otherend_id
        self._events = xenbus.kernel.events
        self.mfns: list[int] = []
        self.refs: list[int] = []
        try:
            while len(self.mfns) < 1 << order:
                self.mfns.append(self._pages.alloc())
                self.refs.append(self._gnttab.grant_access(self._backend, self.mfns[-1]))
            self.irq = self._events.bind_listening(self._backend, self._interrupt, "blkif", self)
        except (XenError, IrqError):
            self._free_ring()
            raise
        self.ring = FrontRing(RingPages(self._machine, self.mfns), BLKIF_ENTRY_SIZE)
        self.port = self._events.evtchn_from_irq(self.irq)
        self.broken = False
        self._shadow: dict[int, Request] = {}
        self._free_ids = list(range(self.ring.size - 1, -1, -1))
        self._waiting: deque[Request] = deque()
        self._grants: list[tuple[int, int]] = []  # persistent ones that are not in use

    def submit(self, requests: list[Request]) -> None:
        """Put what fits on the ring and keep the rest; the backend is told once (blkif_queue_rq, flush_requests)."""
        if self.broken:
            for request in requests:
                request.done.fail(XenError(Errno.EIO, f"{self.front.name} is dead"))
            return
        self._waiting += requests
        self._kick()

    def _kick(self) -> None:
        waiting, put = self._waiting, False
        while waiting and self._free_ids:
            try:
                self._put(waiting[0])
            except XenError as error:  # no page, no reference
                if self._shadow:
                    break  # there will be one when an earlier request is done
                waiting.popleft().done.fail(error)
                continue
            waiting.popleft()
            put = True
        if put and self.ring.push_requests():
            self._events.notify_remote_via_irq(self.irq)

    def _get_grant(self, readonly: bool) -> tuple[int, int]:
        """A page and its reference: one that the backend has mapped already, where they persist (get_grant)."""
        if self._grants:
            return self._grants.pop()
        mfn = self._pages.alloc(zero=False)
        try:
            # A persistent grant serves both directions.
            return self._gnttab.grant_access(self._backend, mfn, readonly and not self.front.persistent), mfn
        except XenError:
            self._pages.free(mfn)
            raise

    def _put_grant(self, grant: tuple[int, int]) -> None:
        if self.front.persistent:
            self._grants.append(grant)
            return
        ref, mfn = grant
        if not self._gnttab.end_access(ref, partial(self._pages.free, mfn)):
            self.front.dev.kernel.printk("blkfront: backend has not unmapped grant")

    def _put(self, request: Request) -> None:
        """blkif_queue_request."""
        operation, data = request.operation, request.data
        pages = -(-request.count // SECTORS_PER_PAGE) if operation not in NO_DATA else 0
        segments = request.segments
        try:
            while len(segments) < pages:
                segments.append(self._get_grant(operation != BLKIF_OP_READ))
            if pages > BLKIF_MAX_SEGMENTS_PER_REQUEST and request.indirect is None:
                request.indirect = self._get_grant(True)
        except XenError:
            self._release(request)
            raise
        ident = self._free_ids.pop()
        self._shadow[ident] = request
        page = self._machine.page
        described = []
        left = request.count
        for i, (ref, mfn) in enumerate(segments):
            sectors = min(left, SECTORS_PER_PAGE)
            left -= sectors
            described.append(BLKIF_SEGMENT.pack(ref, 0, sectors - 1))
            if data is not None:
                page(mfn)[: sectors * SECTOR_SIZE] = data[i * PAGE_SIZE : i * PAGE_SIZE + sectors * SECTOR_SIZE]
        listed = b"".join(described)
        handle = self.front.handle
        if operation == BLKIF_OP_DISCARD:
            entry = BLKIF_REQUEST_DISCARD.pack(operation, 0, handle, ident, request.sector, request.count)
        elif request.indirect is not None:
            page(request.indirect[1])[: len(listed)] = listed
            refs = (request.indirect[0], 0, 0, 0, 0, 0, 0, 0)
            entry = BLKIF_REQUEST_INDIRECT.pack(
                BLKIF_OP_INDIRECT, operation, pages, ident, request.sector, handle, *refs
            )
        else:
            entry = BLKIF_REQUEST.pack(operation, pages, handle, ident, request.sector) + listed
        self.ring.put(entry)

    def _release(self, request: Request) -> None:
        for grant in request.segments:
            self._put_grant(grant)
        request.segments.clear()
        if request.indirect is not None:
            self._put_grant(request.indirect)
            request.indirect = None

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """blkif_interrupt."""
        ring, spurious = self.ring, True
        if self.broken:
            return IRQ_HANDLED
        while True:
            produced = ring.rsp_prod
            if ring.overflow(produced):
                return self._break(f"illegal number of responses {produced - ring.rsp_cons & 0xFFFFFFFF}")
            while ring.rsp_cons != produced:
                spurious = False
                ident, operation, status = BLKIF_RESPONSE.unpack(ring.response(BLKIF_RESPONSE.size))
                request = self._shadow.pop(ident, None)
                if request is None:
                    return self._break(f"response has incorrect id ({ident:#x})")
                self._complete(ident, request, operation, status)
            if not ring.more_responses():
                break
        if self._waiting:
            self._kick()
        self._events.eoi(irq, spurious)
        return IRQ_HANDLED

    def _complete(self, ident: int, request: Request, operation: int, status: int) -> None:
        data = b""
        if status == BLKIF_RSP_OKAY and request.operation == BLKIF_OP_READ:
            page, left = self._machine.page, request.count * SECTOR_SIZE
            parts = []
            for _ref, mfn in request.segments:
                parts.append(bytes(page(mfn)[: min(left, PAGE_SIZE)]))
                left -= PAGE_SIZE
            data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._free_ids.append(ident)
        self._release(request)
        if status == BLKIF_RSP_OKAY:
            request.done.complete(data)
        else:
            self.front.dev.kernel.printk(
                f"blk_update_request: I/O error, dev {self.front.name}, sector {request.sector} op {operation}"
            )
            request.done.fail(XenError(Errno.EIO, f"{self.front.name}, sector {request.sector}: status {status}"))

    def _break(self, why: str) -> IrqReturn:
        """The backend can't be trusted any more; its interrupts stay off (BLKIF_STATE_ERROR)."""
        self.broken = True
        dev = self.front.dev
        dev.kernel.printk(f"{dev.kind} {dev.ident}: {why}")
        dev.kernel.printk(f"{dev.kind} {dev.ident}: disabled for further use")
        self._fail_all()
        return IRQ_HANDLED

    def die(self) -> None:
        """The backend closes: no request is answered any more (blk_mark_disk_dead)."""
        self.broken = True
        self._fail_all()

    def _fail_all(self) -> None:
        """Requests that are under way fail. Their pages are kept till the end: the backend may still write to them."""
        pending = [*self._shadow.values(), *self._waiting]
        self._shadow.clear()
        self._waiting.clear()
        for request in pending:
            self._grants += request.segments
            if request.indirect is not None:
                self._grants.append(request.indirect)
            request.done.fail(XenError(Errno.EIO, f"{self.front.name} is gone"))

    def free(self) -> None:
        """Give everything back; requests that are under way fail (blkif_free_ring)."""
        self._events.unbind(self.irq, self)
        self._fail_all()
        for ref, mfn in self._grants:
            self._gnttab.end_access(ref, partial(self._pages.free, mfn))
        self._grants.clear()
        self._free_ring()

    def _free_ring(self) -> None:
        for ref, mfn in zip(self.refs, self.mfns, strict=False):
            self._gnttab.end_access(ref, partial(self._pages.free, mfn))
        for mfn in self.mfns[len(self.refs) :]:
            self._pages.free(mfn)


NO_DATA: Final = (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD)


class BlkFront(Driver):
    """A disk. Its methods for users are bodies: XenError(EIO) where the backend can't, ENXIO where the disk is gone.

    `ready` is done when the disk can be used; `sectors` is its size in sectors of 512 bytes.
    """

    def __init__(self, dev: Device, *, max_ring_order: int = 0, max_queues: int | None = None) -> None:
        """`max_ring_order` is xen_blkfront.max_ring_page_order, `max_queues` xen_blkfront.max_queues (one a CPU)."""
        super().__init__(dev)
        self.name = dev.ident
        self.handle = 0
        self.sectors = 0
        self.readonly = False
        self.persistent = False
        self.ready: Completion[None] = Completion()
        self.queues: list[Queue] = []
        self.max_segments = BLKIF_MAX_SEGMENTS_PER_REQUEST
        self._max_ring_order = max_ring_order
        self._max_queues = max_queues
        self._modern = dev.kernel.events.multi_queue
        self._flush: int | None = None
        self._discard = False
        self._ring_order = 0

    # -- for users -----------------------------------------------------------------------------------------------------

    def connected(self) -> Body[None]:
        """Wait until the disk can be used."""
        yield from self.ready.wait()

    def read(self, sector: int, count: int) -> Body[bytes]:
        """`count` sectors of 512 bytes from `sector` on."""
        parts = yield from self._do(BLKIF_OP_READ, sector, count, None)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, sector: int, data: bytes) -> Body[None]:
        """Write whole sectors; XenError(EINVAL) for other lengths, EROFS for a disk that is read-only."""
        if len(data) % SECTOR_SIZE:
            raise XenError(Errno.EINVAL, f"{len(data)} bytes")
        if self.readonly:
            raise XenError(Errno.EROFS, self.name)
        yield from self._do(BLKIF_OP_WRITE, sector, len(data) // SECTOR_SIZE, data)

    def flush(self) -> Body[None]:
        """Have what was written made safe; nothing to do where the backend has no cache."""
        if self._flush is not None:
            yield from self._do(self._flush, 0, 0, None)

    def discard(self, sector: int, count: int) -> Body[None]:
        """Have sectors forgotten; XenError(EOPNOTSUPP) where the backend doesn't."""
        if not self._discard:
            raise XenError(Errno.EOPNOTSUPP, self.name)
        yield from self._do(BLKIF_OP_DISCARD, sector, count, None)

    def _do(self, operation: int, sector: int, count: int, data: bytes | None) -> Body[list[bytes]]:
        if not self.queues:
            raise XenError(Errno.ENXIO, self.name)
        step = self.max_segments * SECTORS_PER_PAGE
        if operation in NO_DATA or count <= step:
            requests = [Request(operation, sector, count, data)]
        else:
            view = None if data is None else memoryview(data)
            requests = [
                Request(
                    operation,
                    sector + at,
                    min(step, count - at),
                    None if view is None else view[at * SECTOR_SIZE : (at + step) * SECTOR_SIZE],
                )
                for at in range(0, count, step)
            ]
        # The block layer has one hardware queue for each CPU, in turn.
        self.queues[self.dev.kernel.cpu % len(self.queues)].submit(requests)
        parts = []
        for request in requests:
            if not request.done.done:
                yield request.done
            parts.append(request.done.result())
        return parts

    # -- for the bus ---------------------------------------------------------------------------------------------------

    def probe(self) -> Body[None]:
        # blkif_vdev_t has 16 bits: an extended number loses its upper part on the ring.
        self.handle = (yield from self.dev.xs.read_int(self.dev.path("virtual-device"))) & 0xFFFF
        if self.dev.state != XenbusState.Initialising:  # it was driven before
            yield from self.dev.await_backend()

    def otherend_changed(self, state: XenbusState) -> Body[None]:
        """blkback_changed."""
        dev = self.dev
        if state == XenbusState.InitWait:
            if dev.state == XenbusState.Initialising:
                yield from self._talk_to_blkback()
        elif state == XenbusState.Connected:
            if dev.state == XenbusState.Initialised:
                yield from self._connect()
            elif dev.state == XenbusState.Connected:
                self.sectors = yield from dev.xs.read_int(dev.other("sectors"), self.sectors)
        elif state == XenbusState.Closing or (state == XenbusState.Closed and dev.state != XenbusState.Closed):
            # blkfront_closing: nobody answers any more, now or later.
            for queue in self.queues:
                queue.die()
            if self.ready.done:
                self.ready = Completion()
            yield from dev.frontend_closed()

    def _talk_to_blkback(self) -> Body[None]:
        dev, xs = self.dev, self.dev.xs
        order, queues = 0, 1
        if self._modern:
            yield from xs.read_int(dev.path("trusted"), 1)
            order = min(self._max_ring_order, (yield from xs.read_int(dev.other("max-ring-page-order"), 0)))
            limit = self._max_queues or bin(dev.kernel.irq.online).count("1")
            queues = max(1, min(limit, (yield from xs.read_int(dev.other("multi-queue-max-queues"), 1))))
        self._ring_order = order
        try:
            while len(self.queues) < queues:
                self.queues.append(Queue(self, order))
        except (XenError, IrqError) as error:
            yield from dev.fatal(error, "setting up the ring")
            self._free()
            return
        try:
            yield from xs.transact(self._write_rings)
        except XenError as error:
            yield from dev.fatal(error, "writing ring details")
            self._free()
            return
        yield from dev.switch_state(XenbusState.Initialised)

    def _write_rings(self, tx: int) -> Body[None]:
        dev, xs = self.dev, self.dev.xs
        if self._ring_order:
            yield from xs.write(dev.path("ring-page-order"), self._ring_order, tx)
        if len(self.queues) == 1:
            yield from self._write_ring(self.queues[0], dev.nodename, tx)
        else:
            yield from xs.write(dev.path("multi-queue-num-queues"), len(self.queues), tx)
            for i, queue in enumerate(self.queues):
                yield from self._write_ring(queue, dev.path(f"queue-{i}"), tx)
        yield from xs.write(dev.path("protocol"), PROTOCOL, tx)
        if self._modern:
            yield from xs.write(dev.path("feature-persistent"), 1, tx)

    def _write_ring(self, queue: Queue, where: str, tx: int) -> Body[None]:
        xs = self.dev.xs
        for i, ref in enumerate(queue.refs):
            yield from xs.write(f"{where}/ring-ref{i if len(queue.refs) > 1 else ''}", ref, tx)
        yield from xs.write(f"{where}/event-channel", queue.port, tx)

    def _connect(self) -> Body[None]:
        """blkfront_connect."""
        dev, xs = self.dev, self.dev.xs
        try:
            self.sectors = yield from xs.read_int(dev.other("sectors"))
            info = yield from xs.read_int(dev.other("info"))
            yield from xs.read_int(dev.other("sector-size"))
        except XenError as error:
            yield from dev.fatal(error, f"reading backend fields at {dev.otherend}")
            return
        self.readonly = bool(info & VDISK_READONLY)
        if self._modern:
            yield from xs.read_int(dev.other("physical-sector-size"), SECTOR_SIZE)
        if (yield from xs.read_int(dev.other("feature-barrier"), 0)):
            self._flush = BLKIF_OP_WRITE_BARRIER
        if self._modern:
            if (yield from xs.read_int(dev.other("feature-flush-cache"), 0)):
                self._flush = BLKIF_OP_FLUSH_DISKCACHE
            if (yield from xs.read_int(dev.other("feature-discard"), 0)):
                self._discard = True
                for key in ("discard-granularity", "discard-alignment", "discard-secure"):
                    yield from xs.read_int(dev.other(key), 0)
            self.persistent = bool((yield from xs.read_int(dev.other("feature-persistent"), 0)))
            indirect = yield from xs.read_int(dev.other("feature-max-indirect-segments"), 0)
            if indirect > BLKIF_MAX_SEGMENTS_PER_REQUEST:
                self.max_segments = min(indirect, MAX_INDIRECT_SEGMENTS)
        yield from dev.switch_state(XenbusState.Connected)
        if self.sectors >= SECTORS_PER_PAGE:
            # device_add_disk looks for partitions.
            try:
                yield from self.read(0, SECTORS_PER_PAGE)
            except XenError as error:
                dev.kernel.printk(f"{self.name}: unable to read partition table ({error})")
        self.ready.complete(None)

    def remove(self) -> Body[None]:
        self._free()
        self.ready = Completion()
        yield from ()

    def _free(self) -> None:
        queues, self.queues = self.queues, []
        for queue in queues:
            queue.free()

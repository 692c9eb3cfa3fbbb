"""One ring of a block backend: its requests and their way to the store (xen-blkback's blkback.c)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.grant_table import GNTST_bad_domain
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
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    BLKIF_SEGMENT,
    SECTOR_SIZE,
    SECTORS_PER_PAGE,
    SEGMENTS_PER_INDIRECT_FRAME,
)
from pvirq.abi.xen import PAGE_SHIFT
from pvirq.drivers.blockstore import Discards, Flushes, InPlace
from pvirq.drivers.grants import Mapped
from pvirq.drivers.ring import BackRing, RingPages
from pvirq.drivers.served import ServedRing
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.xen.grant import GrantError

if TYPE_CHECKING:
    from pvirq.drivers.blkback import BlkBack

MAX_INDIRECT_SEGMENTS: Final = 256
MAX_PERSISTENT: Final = 1056  # grants that stay mapped for a ring (xen_blkback.max_persistent_grants)
RW: Final = (BLKIF_OP_READ, BLKIF_OP_WRITE)
IN_PLACE: Final = (*RW, BLKIF_OP_INDIRECT)
DISPATCHED: Final = (*RW, BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_INDIRECT)
# What a ring does before the others of its kernel get their turn.
BUDGET_REQUESTS: Final = 64
BUDGET_SECTORS: Final = 8 << 20 >> 9
OPTIONAL: Final = (BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_DISCARD)  # a frontend does without
SEGMENTS: Final = [struct.Struct("<" + "IBB2x" * n) for n in range(BLKIF_MAX_SEGMENTS_PER_REQUEST + 1)]


class _Request:
    """One request under way (struct pending_req)."""

    __slots__ = ("ident", "mapped", "operation", "pieces")

    def __init__(self, ident: int, operation: int) -> None:
        self.ident = ident
        self.operation = operation
        self.mapped: list[Mapped] = []  # to unmap afterwards
        self.pieces: list[tuple[int, int]] = []  # (machine address, size) of the segments, adjacent ones as one


def _place(request: _Request, mfns: list[int], listed: list[tuple[int, int, int]]) -> None:
    """Where in memory the segments are. Those that lie behind one another are moved in one go."""
    pieces, at, end = request.pieces, 0, -1
    for mfn, (_, first, last) in zip(mfns, listed, strict=True):
        start = (mfn << PAGE_SHIFT) + first * SECTOR_SIZE
        if start != end:
            if end >= 0:
                pieces.append((at, end - at))
            at = start
        end = (mfn << PAGE_SHIFT) + (last + 1) * SECTOR_SIZE
    if end >= 0:
        pieces.append((at, end - at))


class BlkbackRing:
    """A ring, its channel and its requests (struct xen_blkif_ring)."""

    def __init__(self, back: BlkBack, refs: list[int], port: int) -> None:
        """Map the pages under `refs` and bind to the frontend's `port`. GrantError, XenError, IrqError."""
        dev = back.dev
        self.back = back
        self.in_flight = 0
        self._kernel = dev.kernel
        self._domid = dev.otherend_id
        self._gnttab = dev.xenbus.gnttab
        self._machine = dev.kernel.domain.machine
        self._mem = self._machine.mem
        self._events = dev.kernel.events
        self._persistent: dict[int, Mapped] = {}
        self._halted = False
        self._freed = False
        self._barrier = False  # nothing is taken before those under way are done
        self._queued = False
        self._scheduling = False
        self._eoi_due = False
        self._irq = 0
        self._budget = 0  # sectors
        self._owner = dev.kernel.domain.hypervisor.domain_or_zombie(self._domid)
        self._pages = self._gnttab.map_all(self._domid, refs)
        try:
            pages = RingPages(self._machine, [page.mfn for page in self._pages])
            self.ring = BackRing(pages, BLKIF_ENTRY_SIZE)
            if self.ring.overflow(self.ring.req_prod):
                raise XenError(Errno.EIO, "the ring's indexes can't be")
            self._irq = self._events.bind_interdomain(self._domid, port, self._interrupt, "blkif-backend", self)
        except Exception:
            for page in self._pages:
                self._gnttab.unmap(page)
            raise
        dev.xenbus.served.add(ServedRing(dev, "blkif", self.ring, self._notify))

    def free(self) -> None:
        """Stop, unmap everything and close the channel."""
        self._freed = True
        self.back.dev.xenbus.served.remove(self.ring)
        self._events.unbind(self._irq, self)
        for page in (*self._persistent.values(), *self._pages):
            self._gnttab.unmap(page)
        self._persistent.clear()

    # -- taking requests -----------------------------------------------------------------------------------------------

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        """xen_blkif_be_int: wake the thread."""
        self._eoi_due = True
        self._wake()
        return IRQ_HANDLED

    def _wake(self) -> None:
        if not self._queued:
            self._queued = True
            self._kernel.queue_work(self._schedule)

    def _schedule(self) -> None:
        """The ring's thread (xen_blkif_schedule, do_block_io_op)."""
        self._queued = False
        if self._freed:
            return
        self._scheduling = True
        spurious = self._take_requests()
        self._scheduling = False
        if spurious is None:
            self._wake()
        elif self._eoi_due and not self._halted:  # a frontend whose ring is halted won't interrupt again
            self._eoi_due = False
            self._events.eoi(self._irq, spurious)

    def _take_requests(self) -> bool | None:
        """Dispatch what is on the ring; returns whether there was nothing, or None: there is more than its turn's."""
        spurious = True
        ring = self.ring
        requests, self._budget = BUDGET_REQUESTS, BUDGET_SECTORS
        while not self._halted and not self._barrier:
            produced = ring.req_prod
            if ring.overflow(produced):
                self._halted = True
                self.back.complain(
                    f"Frontend provided bogus ring requests ({produced} - {ring.rsp_prod_pvt} = "
                    f"{produced - ring.rsp_prod_pvt & 0xFFFFFFFF}). Halting ring processing"
                )
                break
            while ring.req_cons != produced and ring.unconsumed() and not self._barrier:
                if not requests or self._budget <= 0:
                    return None
                requests -= 1
                spurious = False
                self._dispatch(ring.request())
            if self._barrier or not ring.more_requests():
                break
        return spurious

    def _dispatch(self, entry: bytes) -> None:
        operation = entry[0]
        if operation in DISPATCHED:
            self._dispatch_rw(entry)
        elif operation == BLKIF_OP_DISCARD:
            self._dispatch_discard(entry)
        else:
            _, _, _, ident, _ = BLKIF_REQUEST.unpack_from(entry)
            self.back.complain(f"unknown operation {operation}")
            self._respond(ident, operation, BLKIF_RSP_EOPNOTSUPP)

    def _dispatch_rw(self, entry: bytes) -> None:
        """dispatch_rw_block_io."""
        operation, segments, _, ident, sector = BLKIF_REQUEST.unpack_from(entry)
        request = _Request(ident, operation)
        in_place = self.back.in_place if operation in IN_PLACE else None
        try:
            if operation == BLKIF_OP_INDIRECT:
                _, request.operation, segments, _, _, _, *pages = BLKIF_REQUEST_INDIRECT.unpack_from(entry)
                listed = self._indirect(request, segments, pages, in_place is not None)
            else:
                if segments > BLKIF_MAX_SEGMENTS_PER_REQUEST or (
                    not segments and operation not in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER)
                ):
                    raise XenError(Errno.EINVAL, f"Bad number of segments in request ({segments})")
                fields = SEGMENTS[segments].unpack_from(entry, BLKIF_REQUEST.size)
                listed = list(zip(fields[::3], fields[1::3], fields[2::3], strict=True))
            count = self._check(request, sector, listed)
            if in_place is not None and not self.back.persistent:
                mfns = self._access([ref for ref, _, _ in listed], readonly=request.operation != BLKIF_OP_READ)
                _place(request, mfns, listed)
            else:
                self._map_segments(request, listed)
        except XenError as error:
            self.back.complain(error.why)
            self._unmap(request)
            # Of an indirect request it names the operation inside; a frontend takes no other for an answer.
            self._respond(ident, request.operation, BLKIF_RSP_ERROR)
            return
        if request.operation in (BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE):
            self._barrier = True
            self.back.when_drained(lambda: self._ordered(request, sector, count))
        elif in_place is not None:
            self._transfer(request, sector, in_place)
        else:
            self._submit(request, sector, count)

    def _indirect(
        self, request: _Request, segments: int, refs: list[int], in_place: bool
    ) -> list[tuple[int, int, int]]:
        """Read an indirect request's segments out of the frontend's pages (xen_blkbk_parse_indirect)."""
        if request.operation not in RW:
            raise XenError(Errno.EINVAL, f"Invalid indirect operation ({request.operation})")
        if not 0 < segments <= MAX_INDIRECT_SEGMENTS:
            raise XenError(Errno.EINVAL, f"Bad number of segments in request ({segments})")
        listed: list[tuple[int, int, int]] = []
        for ref in refs[: -(-segments // SEGMENTS_PER_INDIRECT_FRAME)]:
            if in_place and not self.back.persistent:
                page = self._machine.page(self._access([ref], readonly=True)[0])
            else:
                page = self._map(request, ref, readonly=True).page
            here = min(segments - len(listed), SEGMENTS_PER_INDIRECT_FRAME)
            listed += BLKIF_SEGMENT.iter_unpack(bytes(page[: here * BLKIF_SEGMENT.size]))
        return listed

    def _check(self, request: _Request, sector: int, listed: list[tuple[int, int, int]]) -> int:
        """How many sectors a request is about; XenError for what it may not touch (xen_vbd_translate)."""
        count = 0
        for _ref, first, last in listed:
            if last < first or last >= SECTORS_PER_PAGE:
                raise XenError(Errno.EINVAL, f"Bad segment: sectors {first} to {last}")
            count += last - first + 1
        self._budget -= count
        back = self.back
        writes = request.operation != BLKIF_OP_READ
        if (writes and count and back.readonly) or (count and sector + count > back.sectors):
            what = "write" if writes else "read"
            raise XenError(Errno.EACCES, f"access denied: {what} of [{sector},{sector + count}]")
        return count

    def _map(self, request: _Request, ref: int, *, readonly: bool) -> Mapped:
        """One frame of a request's; it stays mapped where grants persist (xen_blkbk_map)."""
        known = self._persistent.get(ref)
        if known is not None:
            return known
        keep = self.back.persistent and len(self._persistent) < MAX_PERSISTENT
        try:
            page = self._gnttab.map(self._domid, ref, readonly and not self.back.persistent)
        except GrantError as error:
            raise XenError(Errno.EIO, f"invalid buffer -- could not remap it ({error})") from error
        if keep:
            self._persistent[ref] = page
        else:
            request.mapped.append(page)
        return page

    def _map_segments(self, request: _Request, listed: list[tuple[int, int, int]]) -> None:
        readonly = request.operation != BLKIF_OP_READ
        known = self._persistent
        _place(
            request,
            [(known.get(ref) or self._map(request, ref, readonly=readonly)).mfn for ref, _, _ in listed],
            listed,
        )

    def _access(self, refs: list[int], *, readonly: bool) -> list[int]:
        """Frames of a request's that is done before anybody else runs: they needn't be mapped."""
        try:
            if self._owner is None:
                raise GrantError(GNTST_bad_domain, f"no domain {self._domid:#x}")
            return self._gnttab.access(self._owner, refs, readonly)
        except GrantError as error:
            raise XenError(Errno.EIO, f"invalid buffer -- could not remap it ({error})") from error

    # -- the store -----------------------------------------------------------------------------------------------------

    def _transfer(self, request: _Request, sector: int, store: InPlace) -> None:
        """A read or write of a store that is done at once, in the frontend's own frames."""
        mem = self._mem
        buffers = [mem[at : at + size] for at, size in request.pieces]
        self.in_flight += 1
        if request.operation == BLKIF_OP_READ:
            error = store.readv(sector, buffers)
            self._frames_written(request)
        else:
            error = store.writev(sector, buffers)
        self._end(request, error)

    def _frames_written(self, request: _Request) -> None:
        """Pages that are unmapped tell of it by themselves."""
        if self._owner is not None:
            written = self._owner.frame_written
            for at, size in request.pieces:
                written(at, size)

    def _submit(self, request: _Request, sector: int, count: int) -> None:
        store = self.back.store
        self.in_flight += 1
        if store is None:
            self._end(request, Errno.ENXIO)
        elif request.operation == BLKIF_OP_READ:
            store.submit(sector, count, None, lambda data, error: self._read_done(request, data, error))
        else:
            mem = self._mem
            data = b"".join([mem[at : at + size] for at, size in request.pieces])
            store.submit(sector, count, data, lambda _data, error: self._end(request, error))

    def _read_done(self, request: _Request, data: bytes | None, error: Errno | None) -> None:
        if error is None and data is not None and not self._freed:
            mem, start = self._mem, 0
            for at, size in request.pieces:
                mem[at : at + size] = data[start : start + size]
                start += size
            if self.back.persistent:
                self._frames_written(request)
        self._end(request, error)

    def _ordered(self, request: _Request, sector: int, count: int) -> None:
        """A flush or barrier, once nothing is under way: its data, if any, then all of it made safe."""
        self._barrier = False
        if not self._scheduling:
            self._wake()
        if count:
            store = self.back.store
            data = b"".join([self._mem[at : at + size] for at, size in request.pieces])
            self.in_flight += 1
            if store is None:
                self._end(request, Errno.ENXIO)
            else:
                store.submit(sector, count, data, lambda _data, error: self._flush(request, error))
        else:
            self.in_flight += 1
            self._flush(request, None)

    def _flush(self, request: _Request, error: Errno | None) -> None:
        store = self.back.store
        if error is None and isinstance(store, Flushes):
            store.flush(lambda _data, error: self._end(request, error))
        else:
            self._end(request, error)

    def _dispatch_discard(self, entry: bytes) -> None:
        operation, _, _, ident, sector, count = BLKIF_REQUEST_DISCARD.unpack_from(entry)
        back, store = self.back, self.back.store
        if back.readonly or sector + count > back.sectors:
            back.complain(f"access denied: DISCARD [{sector}->{sector + count}]")
            self._respond(ident, operation, BLKIF_RSP_ERROR)
        elif not isinstance(store, Discards):
            self._respond(ident, operation, BLKIF_RSP_EOPNOTSUPP)
        else:
            request = _Request(ident, operation)
            self.in_flight += 1
            store.discard(sector, count, lambda _data, error: self._end(request, error))

    def _end(self, request: _Request, error: Errno | None) -> None:
        """The store is done (__end_block_io_op)."""
        self.in_flight -= 1
        if self._freed:
            for page in request.mapped:
                self._gnttab.unmap(page)
            return
        if request.mapped:
            self._unmap(request)
        operation, status = request.operation, BLKIF_RSP_OKAY
        if error is not None:
            self.back.failed(operation, error)
            unsupported = error is Errno.EOPNOTSUPP and operation in OPTIONAL
            status = BLKIF_RSP_EOPNOTSUPP if unsupported else BLKIF_RSP_ERROR
        self._respond(request.ident, operation, status)
        self.back.request_done()

    def _unmap(self, request: _Request) -> None:
        for page in request.mapped:
            self._gnttab.unmap(page)
        request.mapped.clear()

    def _respond(self, ident: int, operation: int, status: int) -> None:
        """make_response."""
        self.ring.put(BLKIF_RESPONSE.pack(ident, operation, status))
        if self.ring.push_responses():
            self._events.notify_remote_via_irq(self._irq)

    def _notify(self) -> None:
        self._events.notify_remote_via_irq(self._irq)

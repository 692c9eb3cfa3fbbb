"""One ring of a block backend: its requests and their way to the store (xen-blkback's blkback.c)."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
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
    SECTOR_SIZE,
    SECTORS_PER_PAGE,
    SEGMENTS_PER_INDIRECT_FRAME,
)
from pvirq.abi.xen import PAGE_SHIFT
from pvirq.drivers.blockstore import Discards, Flushes, InPlace
from pvirq.drivers.grants import Mapped
from pvirq.drivers.ring import U32, BackRing, RingPages
from pvirq.drivers.served import ServedRing
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.xen.grant import GrantError
from pvirq.xen.grant_copy import tell_written

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
# A segment's first and last sector as one number, of 16 bits, where it is all of its page.
WHOLE_PAGE: Final = SECTORS_PER_PAGE - 1 << 8


@functools.cache
def _segments(count: int) -> struct.Struct:
    """So many of struct blkif_request_segment: of each the reference, and first and last sector as one number."""
    return struct.Struct("<" + "IH2x" * count)


class _Request:
    """One request that is under way while others run (struct pending_req)."""

    __slots__ = ("ident", "mapped", "operation", "pieces")

    def __init__(self, ident: int, operation: int, pieces: Sequence[tuple[int, int]], mapped: list[Mapped]) -> None:
        self.ident = ident
        self.operation = operation
        self.pieces = pieces  # of `_pieces`
        self.mapped = mapped  # to unmap afterwards


def _pieces(places: Sequence[int], spans: Sequence[int]) -> list[tuple[int, int]]:
    """Where in memory the segments begin and end, whose frames are at `places`. Adjacent ones are one."""
    pieces, at, end = [], 0, -1
    for place, span in zip(places, spans, strict=True):
        start = place + (span & 0xFF) * SECTOR_SIZE
        if start != end:
            if end >= 0:
                pieces.append((at, end))
            at = start
        end = place + (span >> 8) * SECTOR_SIZE + SECTOR_SIZE
    if end >= 0:
        pieces.append((at, end))
    return pieces


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
        self._persistent: list[Mapped] = []
        self._places: dict[int, int] = {}  # grant reference -> machine address, of those
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
        for page in (*self._persistent, *self._pages):
            self._gnttab.unmap(page)
        self._persistent.clear()
        self._places.clear()

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
        size = ring.size
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
            # An index that went back leaves more than the ring holds (RING_REQUEST_CONS_OVERFLOW).
            while ring.req_cons != produced and (ring.req_cons - ring.rsp_prod_pvt & U32) < size and not self._barrier:
                if not requests or self._budget <= 0:
                    return None
                requests -= 1
                spurious = False
                entry, at = ring.take()
                if entry[at] in DISPATCHED:
                    self._dispatch_rw(entry, at)
                else:
                    self._dispatch_other(entry, at)
            if self._barrier or not ring.more_requests():
                break
        return spurious

    def _dispatch_rw(self, entry: memoryview | bytes, at: int) -> None:
        """Carry out the request at `at` in `entry` (dispatch_rw_block_io)."""
        back, operation = self.back, entry[at]
        in_place = back.in_place if operation in IN_PLACE else None
        mapped: list[Mapped] = []  # to unmap afterwards
        try:
            if operation == BLKIF_OP_INDIRECT:
                # Of an indirect request an answer names the operation inside; a frontend takes no other.
                _, operation, segments, ident, sector, _, *pages = BLKIF_REQUEST_INDIRECT.unpack_from(entry, at)
                refs, spans = self._indirect(operation, segments, pages, mapped, in_place is not None)
            else:
                _, segments, _, ident, sector = BLKIF_REQUEST.unpack_from(entry, at)
                if segments > BLKIF_MAX_SEGMENTS_PER_REQUEST or (
                    not segments and operation not in (BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER)
                ):
                    raise XenError(Errno.EINVAL, f"Bad number of segments in request ({segments})")
                fields = _segments(segments).unpack_from(entry, at + BLKIF_REQUEST.size)
                refs, spans = list(fields[::2]), list(fields[1::2])
            count = self._check(operation, sector, spans)
            if back.persistent or in_place is None:
                places = self._map_all(refs, mapped, readonly=operation != BLKIF_OP_READ)
            else:
                places = self._access(refs, readonly=operation != BLKIF_OP_READ)
        except XenError as error:
            back.complain(error.why)
            self._unmap(mapped)
            self._respond(ident, operation, BLKIF_RSP_ERROR)
            return
        pieces = _pieces(places, spans)
        if in_place is not None:
            self._transfer(in_place, operation, ident, sector, pieces, mapped)
            return
        request = _Request(ident, operation, pieces, mapped)
        if operation in RW:
            self._submit(request, sector, count)
        else:
            self._barrier = True
            back.when_drained(lambda: self._ordered(request, sector, count))

    def _indirect(
        self, operation: int, segments: int, pages: list[int], mapped: list[Mapped], in_place: bool
    ) -> tuple[list[int], list[int]]:
        """An indirect request's segments, out of the frontend's pages (xen_blkbk_parse_indirect)."""
        if operation not in RW:
            raise XenError(Errno.EINVAL, f"Invalid indirect operation ({operation})")
        if not 0 < segments <= MAX_INDIRECT_SEGMENTS:
            raise XenError(Errno.EINVAL, f"Bad number of segments in request ({segments})")
        refs: list[int] = []
        spans: list[int] = []
        for ref in pages[: -(-segments // SEGMENTS_PER_INDIRECT_FRAME)]:
            if in_place and not self.back.persistent:
                (place,) = self._access((ref,), readonly=True)
            else:
                (place,) = self._map_all((ref,), mapped, readonly=True)
            here = min(segments - len(refs), SEGMENTS_PER_INDIRECT_FRAME)
            fields = _segments(here).unpack_from(self._mem, place)
            refs += fields[::2]
            spans += fields[1::2]
        return refs, spans

    def _check(self, operation: int, sector: int, spans: Sequence[int]) -> int:
        """How many sectors a request is about; XenError for what it may not touch (xen_vbd_translate)."""
        count = 0
        for span in spans:
            if span == WHOLE_PAGE:
                count += SECTORS_PER_PAGE
                continue
            first, last = span & 0xFF, span >> 8
            if last < first or last >= SECTORS_PER_PAGE:
                raise XenError(Errno.EINVAL, f"Bad segment: sectors {first} to {last}")
            count += last - first + 1
        self._budget -= count
        back = self.back
        writes = operation != BLKIF_OP_READ
        if (writes and count and back.readonly) or (count and sector + count > back.sectors):
            what = "write" if writes else "read"
            raise XenError(Errno.EACCES, f"access denied: {what} of [{sector},{sector + count}]")
        return count

    def _map_all(self, refs: Sequence[int], mapped: list[Mapped], *, readonly: bool) -> list[int]:
        """Where a request's frames are (xen_blkbk_map). They stay mapped where grants persist, else are in `mapped`."""
        known = self._places
        return [known[ref] if ref in known else self._map(ref, mapped, readonly=readonly) for ref in refs]

    def _map(self, ref: int, mapped: list[Mapped], *, readonly: bool) -> int:
        keep = self.back.persistent and len(self._persistent) < MAX_PERSISTENT
        try:
            page = self._gnttab.map(self._domid, ref, readonly and not self.back.persistent)
        except GrantError as error:
            raise XenError(Errno.EIO, f"invalid buffer -- could not remap it ({error})") from error
        place = page.mfn << PAGE_SHIFT
        if keep:
            self._persistent.append(page)
            self._places[ref] = place
        else:
            mapped.append(page)
        return place

    def _access(self, refs: Sequence[int], *, readonly: bool) -> list[int]:
        """Where frames of a request are that is done before anybody else runs: they needn't be mapped."""
        try:
            if self._owner is None:
                raise GrantError(GNTST_bad_domain, f"no domain {self._domid:#x}")
            return [mfn << PAGE_SHIFT for mfn in self._gnttab.access(self._owner, refs, readonly)]
        except GrantError as error:
            raise XenError(Errno.EIO, f"invalid buffer -- could not remap it ({error})") from error

    # -- the store -----------------------------------------------------------------------------------------------------

    def _transfer(
        self, store: InPlace, operation: int, ident: int, sector: int, pieces: list[tuple[int, int]],
        mapped: list[Mapped],
    ) -> None:  # fmt: skip
        """A read or write of a store that is done at once, in the frontend's own frames."""
        mem = self._mem
        buffers = [mem[start:end] for start, end in pieces]
        if operation == BLKIF_OP_READ:
            error = store.readv(sector, buffers)
            self._frames_written(pieces)
        else:
            error = store.writev(sector, buffers)
        if mapped:
            self._unmap(mapped)
        self._respond(ident, operation, BLKIF_RSP_OKAY if error is None else self._failed(operation, error))

    def _frames_written(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Tell the frontend's CPUs. Pages that are unmapped tell of it by themselves."""
        if self._owner is not None:
            tell_written(self._owner, pieces)

    def _submit(self, request: _Request, sector: int, count: int) -> None:
        store = self.back.store
        self.in_flight += 1
        if store is None:
            self._end(request, Errno.ENXIO)
        elif request.operation == BLKIF_OP_READ:
            store.submit(sector, count, None, lambda data, error: self._read_done(request, data, error))
        else:
            store.submit(sector, count, self._data(request), lambda _data, error: self._end(request, error))

    def _data(self, request: _Request) -> bytes:
        """What a request writes, copied."""
        mem = self._mem
        return b"".join([mem[start:end] for start, end in request.pieces])

    def _read_done(self, request: _Request, data: bytes | None, error: Errno | None) -> None:
        if error is None and data is not None and not self._freed:
            mem, at = self._mem, 0
            for start, end in request.pieces:
                mem[start:end] = data[at : at + end - start]
                at += end - start
            if self.back.persistent:
                self._frames_written(request.pieces)
        self._end(request, error)

    def _ordered(self, request: _Request, sector: int, count: int) -> None:
        """A flush or barrier, once nothing is under way: its data, if any, then all of it made safe."""
        self._barrier = False
        if not self._scheduling:
            self._wake()
        if count:
            store = self.back.store
            self.in_flight += 1
            if store is None:
                self._end(request, Errno.ENXIO)
            else:
                store.submit(sector, count, self._data(request), lambda _data, error: self._flush(request, error))
        else:
            self.in_flight += 1
            self._flush(request, None)

    def _flush(self, request: _Request, error: Errno | None) -> None:
        store: object = self.back.store
        if error is None and isinstance(store, Flushes):
            store.flush(lambda _data, error: self._end(request, error))
        else:
            self._end(request, error)

    def _dispatch_other(self, entry: memoryview | bytes, at: int) -> None:
        operation, _, _, ident, sector, count = BLKIF_REQUEST_DISCARD.unpack_from(entry, at)
        if operation == BLKIF_OP_DISCARD:
            self._dispatch_discard(ident, sector, count)
        else:
            self.back.complain(f"unknown operation {operation}")
            self._respond(ident, operation, BLKIF_RSP_EOPNOTSUPP)

    def _dispatch_discard(self, ident: int, sector: int, count: int) -> None:
        back = self.back
        store: object = back.store
        if back.readonly or sector + count > back.sectors:
            back.complain(f"access denied: DISCARD [{sector}->{sector + count}]")
            self._respond(ident, BLKIF_OP_DISCARD, BLKIF_RSP_ERROR)
        elif not isinstance(store, Discards):
            self._respond(ident, BLKIF_OP_DISCARD, BLKIF_RSP_EOPNOTSUPP)
        else:
            request = _Request(ident, BLKIF_OP_DISCARD, (), [])
            self.in_flight += 1
            store.discard(sector, count, lambda _data, error: self._end(request, error))

    def _end(self, request: _Request, error: Errno | None) -> None:
        """The store is done (__end_block_io_op)."""
        self.in_flight -= 1
        self._unmap(request.mapped)
        if self._freed:
            return
        operation = request.operation
        self._respond(request.ident, operation, BLKIF_RSP_OKAY if error is None else self._failed(operation, error))
        self.back.request_done()

    def _failed(self, operation: int, error: Errno) -> int:
        """The status of a request that the store couldn't carry out."""
        self.back.failed(operation, error)
        unsupported = error is Errno.EOPNOTSUPP and operation in OPTIONAL
        return BLKIF_RSP_EOPNOTSUPP if unsupported else BLKIF_RSP_ERROR

    def _unmap(self, mapped: list[Mapped]) -> None:
        for page in mapped:
            self._gnttab.unmap(page)
        mapped.clear()

    def _respond(self, ident: int, operation: int, status: int) -> None:
        """make_response."""
        self.ring.put(BLKIF_RESPONSE.pack(ident, operation, status))
        if self.ring.push_responses():
            self._events.notify_remote_via_irq(self._irq)

    def _notify(self) -> None:
        self._events.notify_remote_via_irq(self._irq)

"""One queue of a network frontend: a ring for each direction (struct netfront_queue of xen-netfront.c)."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import XenError
from pvirq.abi.io_netif import (
    NETIF_EXTRA_GSO,
    NETIF_RSP_OKAY,
    NETIF_RX_ENTRY_SIZE,
    NETIF_RX_REQUEST,
    NETIF_RX_RESPONSE,
    NETIF_TX_ENTRY_SIZE,
    NETIF_TX_REQUEST,
    NETIF_TX_RESPONSE,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    NETRXF_csum_blank,
    NETRXF_data_validated,
    NETRXF_extra_info,
    NETRXF_more_data,
    NETTXF_csum_blank,
    NETTXF_data_validated,
    NETTXF_extra_info,
    NETTXF_more_data,
)
from pvirq.abi.xen import PAGE_SIZE
from pvirq.drivers.ring import FrontRing, RingPages
from pvirq.drivers.skb import Skb
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn

if TYPE_CHECKING:
    from pvirq.drivers.netfront import NetFront

RING_SIZE: Final = 256
TX_QUEUE_LEN: Final = 1000  # frames that wait for the ring
BUDGET: Final = 64  # frames that one poll takes


class FrontQueue:
    """A queue. Frames that the tx ring has no room for wait in the interface's own queue (qdisc)."""

    def __init__(self, front: NetFront, index: int, *, split: bool) -> None:
        """Reserve references for whole rings; XenError(ENOSPC)."""
        dev = front.dev
        self.front = front
        self._index = index
        self._split = split
        self._kernel = dev.kernel
        self._events = dev.kernel.events
        self._backend = dev.otherend_id
        self._gnttab, self._pages = dev.xenbus.gnttab, dev.xenbus.pages
        self._machine = dev.kernel.domain.machine
        self._tx_refs = self._gnttab.alloc(RING_SIZE)
        self._rx_refs: list[int] = []
        try:
            self._rx_refs = self._gnttab.alloc(RING_SIZE)
        except XenError:
            self._gnttab.give_back(reversed(self._tx_refs))
            raise
        self._tx_refs.reverse()
        self._rx_refs.reverse()
        self._tx_slots: dict[int, tuple[int, int]] = {}  # id -> (reference, mfn)
        self._tx_ids = list(range(RING_SIZE - 1, -1, -1))
        self._rx_slots: dict[int, tuple[int, int]] = {}
        self._waiting: deque[Skb] = deque()
        self._polling = False
        self.broken = False
        self.tx_irq = self.rx_irq = self.tx_ref = self.rx_ref = self.tx_port = self.rx_port = 0
        self._ring_mfns: list[int] = []

    def setup_rings(self) -> None:
        """setup_netfront. XenError, IrqError; `free` gives back what there is then."""
        machine = self._machine
        tx_mfn, rx_mfn = self._ring_mfns = [self._pages.alloc(), self._pages.alloc()]
        self.tx = FrontRing(RingPages(machine, [tx_mfn]), NETIF_TX_ENTRY_SIZE)
        self.tx_ref = self._gnttab.grant_access(self._backend, tx_mfn)
        self.rx = FrontRing(RingPages(machine, [rx_mfn]), NETIF_RX_ENTRY_SIZE)
        self.rx_ref = self._gnttab.grant_access(self._backend, rx_mfn)
        events, backend = self._events, self._backend
        name = f"vif{self.front.handle}-q{self._index}" if events.multi_queue else self.front.name
        if self._split:
            self.tx_irq = events.bind_listening(backend, self._tx_interrupt, f"{name}-tx", self)
            self.rx_irq = events.bind_listening(backend, self._rx_interrupt, f"{name}-rx", self)
        else:
            self.tx_irq = self.rx_irq = events.bind_listening(backend, self._interrupt, name, self)
        self.tx_port, self.rx_port = events.evtchn_from_irq(self.tx_irq), events.evtchn_from_irq(self.rx_irq)

    def start(self) -> None:
        """The backend knows: give it buffers to receive into."""
        self._alloc_rx_buffers()
        self._events.notify_remote_via_irq(self.tx_irq)
        if self._split:
            self._events.notify_remote_via_irq(self.rx_irq)

    def free(self) -> None:
        """xennet_disconnect_backend and xennet_destroy_queues."""
        for irq in {self.tx_irq, self.rx_irq} - {0}:
            self._events.unbind(irq, self)
        self.broken = True
        gnttab, free = self._gnttab, self._pages.free
        for ref, mfn in (*self._tx_slots.values(), *self._rx_slots.values()):
            gnttab.end_access(ref, partial(free, mfn))
        gnttab.give_back((*self._tx_refs, *self._rx_refs))
        for ref, mfn in zip((self.tx_ref, self.rx_ref), self._ring_mfns, strict=False):
            if ref:
                gnttab.end_access(ref, partial(free, mfn))
            else:
                free(mfn)
        self._tx_slots.clear()
        self._rx_slots.clear()
        self._waiting.clear()

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def _tx_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        if self.broken:
            return IRQ_HANDLED
        found = self._tx_complete()
        if not self.broken:
            self._events.eoi(irq, not found)
        return IRQ_HANDLED

    def _rx_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        if self.broken:
            return IRQ_HANDLED
        found = self._schedule_poll()
        self._events.eoi(irq, not found)
        return IRQ_HANDLED

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        if self.broken:
            return IRQ_HANDLED
        found = self._tx_complete()
        if not self.broken:
            found = self._schedule_poll() or found
            self._events.eoi(irq, not found)
        return IRQ_HANDLED

    def _break(self, why: str) -> None:
        """The backend can't be trusted any more."""
        self.broken = True
        dev = self.front.dev
        self._kernel.printk(f"{dev.kind} {dev.ident} {self.front.name}: {why}")
        self._kernel.printk(f"{dev.kind} {dev.ident} {self.front.name}: Disabled for further use")

    # -- sending -------------------------------------------------------------------------------------------------------

    def send(self, skb: Skb) -> bool:
        """Send now or, where the ring is full, later; False where too many wait."""
        if self.broken:
            return False
        if self._waiting or not self._put(skb):
            if len(self._waiting) >= TX_QUEUE_LEN:
                return False
            self._waiting.append(skb)
            return True
        self._push()
        return True

    def _push(self) -> None:
        if self.tx.push_requests():
            self._events.notify_remote_via_irq(self.tx_irq)

    def _put(self, skb: Skb) -> bool:
        """xennet_start_xmit: a slot for each page, and one for what there is to say of GSO."""
        data = skb.data
        size = len(data)
        slots = -(-size // PAGE_SIZE)
        tx = self.tx
        if tx.free < slots + bool(skb.gso_size) or len(self._tx_ids) < slots:
            return False
        mfns: list[int] = []
        try:
            while len(mfns) < slots:
                mfns.append(self._pages.alloc(zero=False))
        except XenError:
            for mfn in mfns:
                self._pages.free(mfn)
            return False
        flags = 0
        if skb.csum_blank:
            flags = NETTXF_csum_blank | NETTXF_data_validated
        elif skb.data_validated:
            flags = NETTXF_data_validated
        if skb.gso_size:
            flags |= NETTXF_extra_info
        for i, mfn in enumerate(mfns):
            part = data[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            self._machine.page(mfn)[: len(part)] = part
            ident, ref = self._tx_ids.pop(), self._tx_refs.pop()
            self._gnttab.grant(ref, self._backend, mfn, readonly=True)
            self._tx_slots[ident] = ref, mfn
            more = NETTXF_more_data if i + 1 < slots else 0
            tx.put(NETIF_TX_REQUEST.pack(ref, 0, flags | more, ident, len(part) if i else size))
            if flags & NETTXF_extra_info:
                tx.put(NETIF_EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, 0, skb.gso_size, skb.gso_type, 0))
            flags = 0
        return True

    def _tx_complete(self) -> bool:
        """Take back what was sent (xennet_tx_buf_gc); True if there was something."""
        tx, found = self.tx, False
        while True:
            produced = tx.rsp_prod
            if tx.overflow(produced):
                self._break(f"Illegal number of responses {produced - tx.rsp_cons & 0xFFFFFFFF}")
                return found
            while tx.rsp_cons != produced:
                found = True
                ident, status = NETIF_TX_RESPONSE.unpack(tx.response(NETIF_TX_RESPONSE.size))
                if status == 1:  # NETIF_RSP_NULL: of the extra
                    continue
                slot = self._tx_slots.pop(ident, None)
                if slot is None:
                    self._break(f"Response has incorrect id ({ident})")
                    return found
                ref, mfn = slot
                if not self._gnttab.revoke(ref):
                    self._break("Grant still in use by backend domain")
                    return found
                self._tx_refs.append(ref)
                self._tx_ids.append(ident)
                self._pages.free(mfn)
                if status != NETIF_RSP_OKAY:
                    self.front.tx_dropped += 1
            if not tx.more_responses():
                break
        put = False
        while self._waiting and self._put(self._waiting[0]):
            self._waiting.popleft()
            put = True
        if put:
            self._push()
        return found

    # -- receiving -----------------------------------------------------------------------------------------------------

    def _alloc_rx_buffers(self) -> None:
        """Fill the ring with empty pages (xennet_alloc_rx_buffers)."""
        rx, refs, slots = self.rx, self._rx_refs, self._rx_slots
        grant, alloc, backend = self._gnttab.grant, self._pages.alloc, self._backend
        count = RING_SIZE - len(slots)
        for _ in range(count):
            try:
                mfn = alloc(zero=False)
            except XenError:
                break
            ident, ref = rx.req_prod_pvt & RING_SIZE - 1, refs.pop()
            grant(ref, backend, mfn)
            slots[ident] = ref, mfn
            rx.put(NETIF_RX_REQUEST.pack(ident, ref))
        if rx.push_requests():
            self._events.notify_remote_via_irq(self.rx_irq)

    def _schedule_poll(self) -> bool:
        """Is there something to receive? Then poll (xennet_handle_rx)."""
        rx = self.rx
        produced = rx.rsp_prod
        if rx.overflow(produced):
            self._break(f"Illegal number of responses {produced - rx.rsp_cons & 0xFFFFFFFF}")
            return False
        if produced == rx.rsp_cons:
            return False
        if not self._polling:
            self._polling = True
            self._kernel.queue_work(self._poll)
        return True

    def _poll(self) -> None:
        """xennet_poll."""
        rx, front, work = self.rx, self.front, 0
        while not self.broken and work < BUDGET and rx.rsp_cons != rx.rsp_prod:
            if rx.overflow(rx.rsp_prod):
                self._break("Illegal number of responses")
                break
            skb = self._get_packet()
            if skb is None:
                front.rx_errors += 1
            else:
                front.received(skb)
            work += 1
        if self.broken:
            self._polling = False
            return
        self._alloc_rx_buffers()
        if work < BUDGET and not rx.more_responses():
            self._polling = False
        else:
            self._kernel.queue_work(self._poll)

    def _get_packet(self) -> Skb | None:
        """The next frame, with all its slots; None for one that the backend had trouble with (xennet_get_responses)."""
        parts: list[bytes] = []
        gso_size = gso_type = first_flags = 0
        good, first = True, True
        while True:
            ident, offset, flags, status = NETIF_RX_RESPONSE.unpack(self.rx.response(NETIF_RX_RESPONSE.size))
            index = self.rx.rsp_cons - 1 & RING_SIZE - 1
            slot = self._rx_slots.pop(index, None)
            if slot is None:
                self._break(f"rx->id {ident} has no buffer")
                return None
            ref, mfn = slot
            if not self._gnttab.revoke(ref):
                self._break("Grant still in use by backend domain")
                return None
            self._rx_refs.append(ref)
            if status < 0 or offset + status > PAGE_SIZE:
                good = False
            else:
                parts.append(bytes(self._machine.page(mfn)[offset : offset + status]))
            self._pages.free(mfn)
            if first:
                first, first_flags = False, flags
            if flags & NETRXF_extra_info:
                gso = self._get_extras()
                if gso is None:
                    return None
                gso_size, gso_type = gso
            if not flags & NETRXF_more_data:
                break
            if self.rx.rsp_cons == self.rx.rsp_prod:
                self._break("Need more slots")
                return None
        if not good or not parts:
            return None
        blank = bool(first_flags & NETRXF_csum_blank)
        validated = bool(first_flags & NETRXF_data_validated)
        return Skb(parts[0] if len(parts) == 1 else b"".join(parts), blank, validated, gso_size, gso_type)

    def _get_extras(self) -> tuple[int, int] | None:
        """What follows a first slot: (GSO size, its type). None: it can't be (xennet_get_extras)."""
        gso = 0, 0
        while True:
            if self.rx.rsp_cons == self.rx.rsp_prod:
                self._break("Missing extra info")
                return None
            kind, flags, size, gso_type, _features = NETIF_EXTRA_GSO.unpack(self.rx.response(NETIF_EXTRA_GSO.size))
            # Its request's buffer was not used.
            slot = self._rx_slots.pop(self.rx.rsp_cons - 1 & RING_SIZE - 1, None)
            if slot is not None:
                self._gnttab.revoke(slot[0])
                self._rx_refs.append(slot[0])
                self._pages.free(slot[1])
            if kind != XEN_NETIF_EXTRA_TYPE_GSO:
                self._break(f"Invalid extra type: {kind}")
                return None
            if not size or gso_type not in (XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6):
                self._break(f"GSO of {size} bytes, type {gso_type}")
                return None
            gso = size, gso_type
            if not flags & XEN_NETIF_EXTRA_FLAG_MORE:
                return gso

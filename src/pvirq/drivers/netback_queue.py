"""One queue of a network backend: netback.c and rx.c of xen-netback."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_netif import (
    ETH_HLEN,
    NETIF_EXTRA_GSO,
    NETIF_EXTRA_MCAST,
    NETIF_RSP_ERROR,
    NETIF_RSP_NULL,
    NETIF_RSP_OKAY,
    NETIF_RX_ENTRY_SIZE,
    NETIF_RX_REQUEST,
    NETIF_RX_RESPONSE,
    NETIF_TX_ENTRY_SIZE,
    NETIF_TX_REQUEST,
    NETIF_TX_RESPONSE,
    XEN_NETIF_EXTRA_FLAG_MORE,
    XEN_NETIF_EXTRA_TYPE_GSO,
    XEN_NETIF_EXTRA_TYPE_MAX,
    XEN_NETIF_EXTRA_TYPE_MCAST_ADD,
    XEN_NETIF_EXTRA_TYPE_MCAST_DEL,
    XEN_NETIF_GSO_TYPE_TCPV4,
    XEN_NETIF_GSO_TYPE_TCPV6,
    XEN_NETIF_NR_SLOTS_MIN,
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
from pvirq.drivers.ring import U32, BackRing, RingPages
from pvirq.drivers.served import ServedRing
from pvirq.drivers.skb import Skb
from pvirq.linux.irq import IRQ_HANDLED, IrqHandler, IrqReturn
from pvirq.xen.grant import GrantError
from pvirq.xen.grant_copy import read_all, write_all

if TYPE_CHECKING:
    from pvirq.drivers.netback import Vif

FATAL_SLOTS: Final = 20  # a packet of more is no packet but an attack (xen_netback.fatal_skb_slots)
BUDGET: Final = 64  # packets that one poll takes
RX_QUEUE_BYTES: Final = 128 * PAGE_SIZE  # that may wait for the frontend's buffers


class FatalTxError(Exception):
    """The frontend did what ends its device (xenvif_fatal_tx_err); says what."""


class _Extras:
    """What the extras of a packet on its way in said of it, and how many there were."""

    __slots__ = ("count", "gso_size", "gso_type", "multicast")

    def __init__(self) -> None:
        self.count = 0
        self.gso_size = self.gso_type = 0
        self.multicast = False


NO_EXTRAS: Final = _Extras()


class BackQueue:
    """A queue (struct xenvif_queue)."""

    def __init__(self, vif: Vif, index: int, tx_ref: int, rx_ref: int, tx_port: int, rx_port: int) -> None:
        """Map the rings and bind the channels. GrantError, XenError, IrqError where they can't be."""
        dev = vif.back.dev
        self.vif = vif
        self._kernel = dev.kernel
        self._events = dev.kernel.events
        self._domid = dev.otherend_id
        self._domain = dev.kernel.domain
        self._machine = dev.kernel.domain.machine
        self._gnttab = dev.xenbus.gnttab
        self._freed = False
        self._irqs: list[int] = []
        self._mapped = self._gnttab.map_all(self._domid, (tx_ref, rx_ref))
        self._polling = False
        self._tx_eoi = self._rx_eoi = False
        self._rx_queue: deque[tuple[Skb, list[bytes]]] = deque()  # each with what goes behind its first slot
        self._rx_bytes = 0
        self._rx_scheduled = False
        name = f"{vif.name}-q{index}" if self._events.multi_queue else vif.name
        try:
            self.tx = BackRing(RingPages(self._machine, [self._mapped[0].mfn]), NETIF_TX_ENTRY_SIZE)
            self.rx = BackRing(RingPages(self._machine, [self._mapped[1].mfn]), NETIF_RX_ENTRY_SIZE)
            if self.tx.overflow(self.tx.req_prod) or self.rx.overflow(self.rx.req_prod):
                raise XenError(Errno.EIO, "the rings' indexes can't be")
            if tx_port == rx_port:
                self._bind(tx_port, self._interrupt, name)
            else:
                self._bind(tx_port, self._tx_interrupt, f"{name}-tx")
                self._bind(rx_port, self._rx_interrupt, f"{name}-rx")
        except Exception:
            self.free()
            raise
        self._tx_irq, self._rx_irq = self._irqs[0], self._irqs[-1]
        notify = self._events.notify_remote_via_irq
        dev.xenbus.served.add(ServedRing(dev, "tx", self.tx, partial(notify, self._tx_irq)))
        dev.xenbus.served.add(ServedRing(dev, "rx", self.rx, partial(notify, self._rx_irq)))

    def _bind(self, port: int, handler: IrqHandler, name: str) -> None:
        self._irqs.append(self._events.bind_interdomain(self._domid, port, handler, name, self))

    def start(self) -> None:
        """Look at what is there already (xenvif_napi_schedule_or_enable_events in xenvif_up)."""
        self._schedule_tx()

    def free(self) -> None:
        """Close the channels and unmap the rings."""
        if self._freed:
            return
        self._freed = True
        if self._irqs:  # else it didn't come so far
            for ring in (self.tx, self.rx):
                self.vif.back.dev.xenbus.served.remove(ring)
        for irq in self._irqs:
            self._events.unbind(irq, self)
        for page in self._mapped:
            self._gnttab.unmap(page)
        self._rx_queue.clear()

    # -- interrupts ----------------------------------------------------------------------------------------------------

    def _tx_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._tx_eoi = True
        if not self._handle_tx():
            self._tx_eoi = False
            self._events.eoi(irq, True)
        return IRQ_HANDLED

    def _rx_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._rx_eoi = True
        if not self._handle_rx():
            self._rx_eoi = False
            self._events.eoi(irq, True)
        return IRQ_HANDLED

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._tx_eoi = True
        has_tx, has_rx = self._handle_tx(), self._handle_rx()
        if not has_tx:
            self._tx_eoi = False
            self._events.eoi(irq, not has_rx)
        return IRQ_HANDLED

    def _handle_tx(self) -> bool:
        if self.tx.req_prod == self.tx.req_cons:
            return False
        self._schedule_tx()
        return True

    def _handle_rx(self) -> bool:
        if not self._rx_queue:
            return False
        self._schedule_rx()
        return True

    # -- from the frontend ---------------------------------------------------------------------------------------------

    def _schedule_tx(self) -> None:
        if not self._polling and not self.vif.disabled:
            self._polling = True
            self._kernel.queue_work(self._poll)

    def _poll(self) -> None:
        """xenvif_poll."""
        if self._freed or self.vif.disabled:
            self._polling = False
            return
        work, tx = 0, self.tx
        try:
            while work < BUDGET:
                # Packets are answered whole, so there is room for the answers to whatever the ring can hold.
                waiting = tx.req_prod - tx.req_cons & U32
                if waiting > tx.size:
                    raise FatalTxError(
                        f"Impossible number of requests. req_prod {tx.req_prod}, req_cons {tx.req_cons}, size {tx.size}"
                    )
                if not waiting:
                    break
                if not self._take_packet(waiting):
                    return
                work += 1
        except FatalTxError as error:
            self._push_tx()
            self._disable(str(error))
            return
        self._push_tx()
        if work < BUDGET and not tx.more_requests():
            self._polling = False
            if self._tx_eoi:
                self._tx_eoi = False
                self._events.eoi(self._tx_irq)
        else:
            self._kernel.queue_work(self._poll)

    def _disable(self, why: str) -> None:
        """xenvif_fatal_tx_err and, in the thread, xenvif_carrier_off: this frontend is not served any more."""
        self._polling = False
        self.vif.disabled = True
        self._kernel.printk(f"vif {self.vif.back.dev.ident} {self.vif.name}: {why}")
        self._kernel.printk(f"vif {self.vif.back.dev.ident} {self.vif.name}: fatal error; disabling device")

    def _push_tx(self) -> None:
        if self.tx.push_responses():
            self._events.notify_remote_via_irq(self._tx_irq)

    def _answer(self, idents: list[int], extras: int, status: int) -> None:
        responses = [NETIF_TX_RESPONSE.pack(ident, status) for ident in idents]
        if extras:
            responses[1:1] = [NETIF_TX_RESPONSE.pack(0, NETIF_RSP_NULL)] * extras
        self.tx.put_all(responses)

    def _take_packet(self, waiting: int) -> bool:
        """One packet off the ring, of `waiting` requests, and up into the network (xenvif_tx_build_gops, _submit).

        False: what it set off there has freed this queue.
        """
        gref, offset, flags, ident, total = NETIF_TX_REQUEST.unpack_from(*self.tx.take())
        idents, first, extras = [ident], total, NO_EXTRAS
        pieces = [(gref, offset, total)]
        if flags & NETTXF_extra_info:
            extras = self._read_extras(waiting - 1)
            if extras.multicast:
                self._answer(idents, extras.count, NETIF_RSP_OKAY)
                return True
        if flags & NETTXF_more_data:
            self._read_slots(waiting - extras.count, idents, pieces)
            first -= sum([size for _gref, _offset, size in pieces[1:]])
            pieces[0] = gref, offset, first
        if first < 0 or total < ETH_HLEN or len(pieces) > XEN_NETIF_NR_SLOTS_MIN:
            self._answer(idents, extras.count, NETIF_RSP_ERROR)
            return True
        for _gref, offset, size in pieces:
            if offset + size > PAGE_SIZE:
                raise FatalTxError(f"Cross page boundary, txp->offset: {offset}, size: {size}")
        vif = self.vif
        try:
            data = read_all(self._domain, self._domid, pieces)
        except GrantError as error:
            self._kernel.printk(f"vif {vif.back.dev.ident} {vif.name}: Grant copy of a packet failed: {error}")
            self._answer(idents, extras.count, NETIF_RSP_ERROR)
            return True
        self._answer(idents, extras.count, NETIF_RSP_OKAY)
        vif.tx_packets += 1
        vif.tx_bytes += total
        csum_blank, validated = flags & NETTXF_csum_blank != 0, flags & NETTXF_data_validated != 0
        vif.receive(Skb(data, csum_blank, validated, extras.gso_size, extras.gso_type))
        return not self._freed

    def _read_slots(self, waiting: int, idents: list[int], pieces: list[tuple[int, int, int]]) -> None:
        """The slots behind a packet's first, of `waiting` requests with that one (xenvif_count_requests)."""
        take, unpack, flags = self.tx.take, NETIF_TX_REQUEST.unpack_from, NETTXF_more_data
        while flags & NETTXF_more_data:
            if len(pieces) >= waiting:
                raise FatalTxError(f"Asked for {len(pieces)} slots but exceeds this limit")
            if len(pieces) >= FATAL_SLOTS:
                raise FatalTxError(f"Malicious frontend using {len(pieces)} slots, threshold {FATAL_SLOTS}")
            gref, offset, flags, ident, size = unpack(*take())
            pieces.append((gref, offset, size))
            idents.append(ident)

    def _read_extras(self, waiting: int) -> _Extras:
        """A packet's extras, of `waiting` requests (xenvif_get_extras)."""
        extras = _Extras()
        while True:
            if extras.count >= waiting:
                raise FatalTxError("Missing extra info")
            entry, at = self.tx.take()
            extras.count += 1
            kind, flags, size, gso_type, _features = NETIF_EXTRA_GSO.unpack_from(entry, at)
            if not kind or kind >= XEN_NETIF_EXTRA_TYPE_MAX:
                raise FatalTxError(f"Invalid extra type: {kind}")
            if kind == XEN_NETIF_EXTRA_TYPE_GSO:
                if gso_type not in (XEN_NETIF_GSO_TYPE_TCPV4, XEN_NETIF_GSO_TYPE_TCPV6):
                    raise FatalTxError(f"Bad GSO type {gso_type}.")
                if not size:
                    raise FatalTxError("GSO size must not be zero.")
                extras.gso_size, extras.gso_type = size, gso_type
            elif kind in (XEN_NETIF_EXTRA_TYPE_MCAST_ADD, XEN_NETIF_EXTRA_TYPE_MCAST_DEL):
                extras.multicast = True
                address = NETIF_EXTRA_MCAST.unpack_from(entry, at)[2]
                if kind == XEN_NETIF_EXTRA_TYPE_MCAST_DEL:
                    self.vif.multicast.discard(address)
                elif len(self.vif.multicast) < 64:  # XEN_NETBK_MCAST_MAX
                    self.vif.multicast.add(address)
            if not flags & XEN_NETIF_EXTRA_FLAG_MORE:
                return extras

    # -- to the frontend -----------------------------------------------------------------------------------------------

    def queue_rx(self, skb: Skb, hashed: bytes = b"") -> None:
        """xenvif_rx_queue_tail: dropped where too much waits for the frontend's buffers. `hashed`: an extra more."""
        if self._rx_bytes > RX_QUEUE_BYTES:
            self.vif.rx_dropped += 1
            return
        extras = [hashed] if hashed else []
        if skb.gso_size:
            more = XEN_NETIF_EXTRA_FLAG_MORE if hashed else 0
            extras.insert(0, NETIF_EXTRA_GSO.pack(XEN_NETIF_EXTRA_TYPE_GSO, more, skb.gso_size, skb.gso_type, 0))
        self._rx_queue.append((skb, extras))
        self._rx_bytes += len(skb.data)
        self._schedule_rx()

    def _schedule_rx(self) -> None:
        if not self._rx_scheduled:
            self._rx_scheduled = True
            self._kernel.queue_work(self._rx_action)

    def _rx_slots(self, skb: Skb, extras: list[bytes]) -> int:
        return -(-len(skb.data) // (PAGE_SIZE - self.vif.headroom)) + len(extras)

    def _rx_action(self) -> None:
        """The thread vif1.0-q0-guest-rx (xenvif_rx_action)."""
        self._rx_scheduled = False
        if self._freed:
            return
        queue, sent = self._rx_queue, False
        if self.vif.disabled:
            queue.clear()
            self._rx_bytes = 0
        try:
            while queue and self.rx.has_requests(self._rx_slots(*queue[0])):
                skb, extras = queue.popleft()
                self._rx_bytes -= len(skb.data)
                self._rx_skb(skb, extras)
                sent = True
        except FatalTxError as error:
            self._disable(str(error))
        if sent and self.rx.push_responses():
            self._events.notify_remote_via_irq(self._rx_irq)
        if self._rx_eoi:
            self._rx_eoi = False
            self._events.eoi(self._rx_irq)

    def _rx_skb(self, skb: Skb, extras: list[bytes]) -> None:
        data, rx, vif = skb.data, self.rx, self.vif
        size = len(data)
        flags = 0
        if skb.csum_blank:
            flags = NETRXF_csum_blank | NETRXF_data_validated
        elif skb.data_validated:
            flags = NETRXF_data_validated
        if extras:
            flags |= NETRXF_extra_info
        offset = vif.headroom
        room = PAGE_SIZE - offset
        responses = []
        idents, pieces = [], []
        for at in range(0, size, room):
            ident, gref = NETIF_RX_REQUEST.unpack_from(*rx.take())
            idents.append(ident)
            pieces.append((gref, offset, memoryview(data)[at : at + room] if size > room else data))
            if not at:
                for _ in extras:
                    rx.take()  # it takes a buffer's place
        results = write_all(self._domain, self._domid, pieces)
        left = len(pieces)
        for ident, (_gref, _offset, part), error in zip(idents, pieces, results, strict=True):
            status, left = len(part), left - 1
            if error is not None:
                self._kernel.printk(f"vif {vif.back.dev.ident} {vif.name}: Grant copy to the frontend failed: {error}")
                status = NETIF_RSP_ERROR
            responses.append(NETIF_RX_RESPONSE.pack(ident, offset, flags | NETRXF_more_data if left else flags, status))
            responses += extras
            flags, extras = 0, []
        rx.put_all(responses)
        vif.rx_packets += 1
        vif.rx_bytes += size

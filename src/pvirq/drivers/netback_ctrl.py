"""The control ring of a network backend: how the frontend wants its packets spread (hash.c of xen-netback)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_netif import (
    ETH_HLEN,
    NETIF_CTRL_ENTRY_SIZE,
    NETIF_CTRL_REQUEST,
    NETIF_CTRL_RESPONSE,
    NETIF_EXTRA_HASH,
    XEN_NETIF_CTRL_HASH_ALGORITHM_NONE,
    XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ,
    XEN_NETIF_CTRL_HASH_TYPE_IPV4,
    XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP,
    XEN_NETIF_CTRL_HASH_TYPE_IPV6,
    XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP,
    XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER,
    XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED,
    XEN_NETIF_CTRL_STATUS_SUCCESS,
    XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS,
    XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE,
    XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM,
    XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS,
    XEN_NETIF_CTRL_TYPE_SET_HASH_KEY,
    XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING,
    XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE,
    XEN_NETIF_EXTRA_TYPE_HASH,
)
from pvirq.abi.xen import DOMID_SELF, PAGE_SIZE
from pvirq.drivers.ring import BackRing, RingPages
from pvirq.drivers.skb import ETH_P_IP, ETH_P_IPV6, TCP
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.xen.grant import GrantError
from pvirq.xen.grant_copy import Side, copy

if TYPE_CHECKING:
    from pvirq.drivers.netback import Vif

MAX_KEY: Final = 40  # XEN_NETBK_MAX_HASH_KEY_SIZE
MAX_MAPPING: Final = 128  # XEN_NETBK_MAX_HASH_MAPPING_SIZE
ALL_TYPES: Final = 0xF
INVALID: Final = XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER
SUCCESS: Final = XEN_NETIF_CTRL_STATUS_SUCCESS


def toeplitz(key: bytes, data: bytes) -> int:
    """The Toeplitz hash of `data` under a key of 40 bytes (xen_netif_toeplitz_hash)."""
    window, bits = int.from_bytes(key, "big"), len(key) * 8 - 32
    value = int.from_bytes(data, "big")
    result = 0
    for i in range(len(data) * 8):
        if value >> len(data) * 8 - 1 - i & 1:
            result ^= window >> bits - i & 0xFFFFFFFF
    return result


class Hashing:
    """What a frontend has asked for (struct xenvif_hash)."""

    def __init__(self) -> None:
        self.algorithm = XEN_NETIF_CTRL_HASH_ALGORITHM_NONE
        self.flags = 0
        self.key = bytes(MAX_KEY)
        self.mapping: list[int] = []

    def hash(self, data: bytes) -> tuple[int, int] | None:
        """(value, its type) of a frame; None where nothing of the wanted kind is in it (xenvif_set_skb_hash)."""
        if len(data) < ETH_HLEN + 20:
            return None
        (protocol,) = struct.unpack_from(">H", data, 12)
        if protocol == ETH_P_IP:
            addresses, at = data[26:34], ETH_HLEN + (data[ETH_HLEN] & 15) * 4
            tcp = data[23] == TCP and not struct.unpack_from(">H", data, 20)[0] & 0x3FFF  # not a fragment
            plain, with_ports = XEN_NETIF_CTRL_HASH_TYPE_IPV4, XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP
        elif protocol == ETH_P_IPV6 and len(data) >= ETH_HLEN + 40:
            addresses, at, tcp = data[22:54], ETH_HLEN + 40, data[20] == TCP
            plain, with_ports = XEN_NETIF_CTRL_HASH_TYPE_IPV6, XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP
        else:
            return None
        if tcp and self.flags >> with_ports & 1 and len(data) >= at + 4:
            return toeplitz(self.key, addresses + data[at : at + 4]), with_ports
        if self.flags >> plain & 1:
            return toeplitz(self.key, addresses), plain
        return None

    def queue(self, value: int, queues: int) -> int:
        """The queue for a hash (xenvif_select_queue)."""
        return self.mapping[value % len(self.mapping)] % queues if self.mapping else value % queues


def hash_extra(value: int, kind: int) -> bytes:
    """What tells the frontend of a packet's hash, in a slot behind its first."""
    algorithm = XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ
    return NETIF_EXTRA_HASH.pack(XEN_NETIF_EXTRA_TYPE_HASH, 0, kind, algorithm, value)


class CtrlRing:
    """The ring and its channel, whose row is xen-netback-ctrl."""

    def __init__(self, vif: Vif, ref: int, port: int) -> None:
        """Map the ring and bind its channel. GrantError, XenError, IrqError where they can't be."""
        dev = vif.back.dev
        self._vif = vif
        self._domain = dev.kernel.domain
        self._domid = dev.otherend_id
        self._kernel, self._events = dev.kernel, dev.kernel.events
        self._gnttab, self._pages = dev.xenbus.gnttab, dev.xenbus.pages
        self._freed = False
        self._mapped = self._gnttab.map(self._domid, ref)
        try:
            self._ring = BackRing(RingPages(self._domain.machine, [self._mapped.mfn]), NETIF_CTRL_ENTRY_SIZE)
            if self._ring.overflow(self._ring.req_prod):
                raise XenError(Errno.EIO, "the ring's indexes can't be")
            self._irq = self._events.bind_interdomain(self._domid, port, self._interrupt, "xen-netback-ctrl", self)
        except Exception:
            self._gnttab.unmap(self._mapped)
            raise

    def free(self) -> None:
        """Close the channel and unmap the ring."""
        self._freed = True
        self._events.unbind(self._irq, self)
        self._gnttab.unmap(self._mapped)

    def _interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._kernel.queue_work(self._action)  # a threaded handler
        return IRQ_HANDLED

    def _action(self) -> None:
        """xenvif_ctrl_irq_fn and xenvif_ctrl_action.

        Linux takes every index for good and works through up to 4 G requests that aren't there. Here the ring is not
        served any more, and gets no EOI, as netback does it with packets.
        """
        ring, spurious = self._ring, True
        if self._freed:
            return
        if ring.overflow(ring.req_prod):
            why = (
                f"Impossible number of requests on the control ring: {ring.req_prod}, of which {ring.req_cons} are done"
            )
            self._kernel.printk(f"vif {self._vif.back.dev.ident} {self._vif.name}: {why}")
            return
        while ring.more_requests():
            spurious = False
            ident, kind, *data = NETIF_CTRL_REQUEST.unpack(ring.request())
            status, result = self._process(kind, data)
            ring.put(NETIF_CTRL_RESPONSE.pack(ident, kind, status, result))
            if ring.push_responses():
                self._events.notify_remote_via_irq(self._irq)
        self._events.eoi(self._irq, spurious)

    def _process(self, kind: int, data: list[int]) -> tuple[int, int]:
        """(status, data) of the answer (process_ctrl_request)."""
        hashing = self._vif.hashing
        no_algorithm = hashing.algorithm == XEN_NETIF_CTRL_HASH_ALGORITHM_NONE
        if kind == XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM:
            if data[0] not in (XEN_NETIF_CTRL_HASH_ALGORITHM_NONE, XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ):
                return INVALID, 0
            hashing.algorithm = data[0]
        elif kind == XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS:
            return (XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED, 0) if no_algorithm else (SUCCESS, ALL_TYPES)
        elif kind == XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS:
            if data[0] & ~ALL_TYPES or no_algorithm:
                return INVALID, 0
            hashing.flags = data[0]
        elif kind == XEN_NETIF_CTRL_TYPE_SET_HASH_KEY:
            key = self._copy(data[0], data[1]) if data[1] <= MAX_KEY else None
            if key is None:
                return INVALID, 0
            hashing.key = key.ljust(MAX_KEY, b"\0")
        elif kind == XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE:
            return SUCCESS, MAX_MAPPING
        elif kind == XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE:
            if data[0] > MAX_MAPPING:
                return INVALID, 0
            hashing.mapping = [0] * data[0]
        elif kind == XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING:
            return self._set_mapping(*data), 0
        else:
            return XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED, 0
        return SUCCESS, 0

    def _set_mapping(self, ref: int, count: int, start: int) -> int:
        hashing = self._vif.hashing
        if start + count > len(hashing.mapping):
            return INVALID
        table = self._copy(ref, count * 4)
        if table is None:
            return INVALID
        entries = struct.unpack(f"<{count}I", table)
        if any(entry >= len(self._vif.queues) for entry in entries):
            return INVALID
        hashing.mapping[start : start + count] = entries
        return SUCCESS

    def _copy(self, ref: int, size: int) -> bytes | None:
        """The first bytes of a frame that the frontend grants; None where it doesn't."""
        if size > PAGE_SIZE:
            return None
        buffer = self._pages.alloc()
        try:
            copy(self._domain, Side(ref, self._domid, 0, True), Side(buffer, DOMID_SELF, 0, False), size)
            return bytes(self._pages.page(buffer)[:size])
        except GrantError:
            return None
        finally:
            self._pages.free(buffer)

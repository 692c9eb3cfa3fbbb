"""A domain's xenstore ring: requests and replies in a page that the guest shares (xenstored_domain.c).

The page is the guest's to scribble on at any time. Indexes are read anew for each step and checked; a pair
that can't be is the end of the connection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from pvirq.abi.xen import PAGE_SIZE
from pvirq.abi.xs_wire import (
    CONNECTION,
    ERROR,
    REQ_CONS,
    REQ_PROD,
    RSP_CONS,
    RSP_PROD,
    XENSTORE_CONNECTED,
    XENSTORE_ERROR_RINGIDX,
    XENSTORE_NR_WORDS,
    XENSTORE_RECONNECT,
    XENSTORE_REQ,
    XENSTORE_RING_SIZE,
    XENSTORE_RSP,
    XENSTORE_WORDS,
    XSD_SOCKMSG,
)
from pvirq.drivers.xenstore.connection import HEADER
from pvirq.drivers.xenstore.protocol import WireConnection

U32: Final = (1 << 32) - 1


class XenstoreRing:
    """The server's end of a ring.

    `service()` is the event handler: it takes what requests there are and writes what replies and events fit,
    the rest when the guest has made room and says so. `notify()` is called, as by xenstored, after each run
    of bytes taken or written, which can be several for one message.
    """

    def __init__(self, page: memoryview, connection: WireConnection, notify: Callable[[], None]) -> None:
        """`page` is the ring's 4096 bytes in place."""
        self.connection = connection
        self.bind(page, notify)
        connection.on_ignored = self._set_error
        connection.wake = partial(connection.daemon.ring_ready, self)

    def bind(self, page: memoryview, notify: Callable[[], None]) -> None:
        """Use this page and event channel from now on."""
        self._page = page
        self._words = page[XENSTORE_WORDS : XENSTORE_WORDS + 4 * XENSTORE_NR_WORDS].cast("I")
        self._notify = notify

    def unbind(self) -> None:
        """Let go of the page: the frame may be another domain's soon."""
        self.bind(memoryview(bytearray(PAGE_SIZE)), lambda: None)

    def service(self) -> None:
        """Do all that can be done now; never raises, whatever the page holds."""
        self.connection.daemon.ring_ready(self)
        self.connection.daemon.settle()

    def turn(self) -> bool:
        """Take at most one request and send at most one message; True if there is more to do (main)."""
        conn, words = self.connection, self._words
        if words[REQ_CONS] != words[REQ_PROD] and conn.may_read and not (conn.between and self._whole_input()):
            self._input()
        if conn.out and not self._whole_output() and self._can_write():
            self._output()
        return (words[REQ_CONS] != words[REQ_PROD] and conn.may_read) or (bool(conn.out) and self._can_write())

    def _whole_input(self) -> bool:
        """The same as `_input` for a request that has come whole and in one piece; False: it hasn't."""
        words = self._words
        cons = words[REQ_CONS]
        filled = (words[REQ_PROD] - cons) & U32
        start = cons % XENSTORE_RING_SIZE
        after = start + HEADER
        if not HEADER <= filled <= XENSTORE_RING_SIZE or after > XENSTORE_RING_SIZE:
            return False
        kind, req_id, tx_id, length = XSD_SOCKMSG.unpack_from(self._page, XENSTORE_REQ + start)
        end = after + length
        if end - start > filled or end > XENSTORE_RING_SIZE:
            return False
        payload = bytes(self._page[XENSTORE_REQ + after : XENSTORE_REQ + end])
        words[REQ_CONS] = (cons + end - start) & U32
        self._notify()
        self._notify()
        self.connection.take_request(kind, req_id, tx_id, payload)
        return True

    def _whole_output(self) -> bool:
        """The same as `_output` for a message that fits whole and in one piece; False: it doesn't."""
        conn, words = self.connection, self._words
        message = conn.out[0]
        cons, prod = words[RSP_CONS], words[RSP_PROD]
        payload = message.payload
        size = HEADER + len(payload)
        start = prod % XENSTORE_RING_SIZE
        if (
            message.used
            or not message.in_header
            or (prod - cons & U32) + size > XENSTORE_RING_SIZE
            or start + size > XENSTORE_RING_SIZE
            or conn.ignored
        ):
            return False
        at = XENSTORE_RSP + start
        header = XSD_SOCKMSG.pack(message.message_type, message.req_id, message.tx_id, len(payload))
        self._page[at : at + size] = header + payload
        words[RSP_PROD] = (prod + size) & U32
        self._notify()
        self._notify()
        if message.queued:  # else dropped meanwhile: the guest's end ran at the notification
            conn.free(message)
        return True

    def reset(self) -> None:
        """Start over at XS_INTRODUCE: indexes are zero; a guest that waits for reconnection learns of it."""
        self.connection.reset()
        for index in (REQ_CONS, REQ_PROD, RSP_CONS, RSP_PROD):
            self._words[index] = 0
        if self._words[CONNECTION] == XENSTORE_RECONNECT:
            self._words[CONNECTION] = XENSTORE_CONNECTED
            self._notify()

    def _set_error(self, error: int) -> None:
        self._words[ERROR] = error

    def _can_write(self) -> bool:
        used = (self._words[RSP_PROD] - self._words[RSP_CONS]) & U32
        return not self.connection.ignored and used != XENSTORE_RING_SIZE

    def _input(self) -> None:
        """The rest of a header, and of the payload behind it, as far as they have come (handle_input)."""
        conn = self.connection
        if conn.in_header:
            data = self._read(conn.missing)
            if data is not None:
                conn.take_header(data)
        if not conn.ignored and not conn.in_header:
            data = self._read(conn.missing)
            if data is not None:
                conn.take_payload(data)

    def _read(self, count: int) -> bytes | None:
        """Up to `count` bytes that lie in one piece, none too; None if the indexes are wrong (readchn)."""
        words = self._words
        cons, prod = words[REQ_CONS], words[REQ_PROD]
        filled = (prod - cons) & U32
        if filled > XENSTORE_RING_SIZE:
            self.connection.ignore(XENSTORE_ERROR_RINGIDX)
            return None
        start = cons % XENSTORE_RING_SIZE
        count = min(count, filled, XENSTORE_RING_SIZE - start)
        data = bytes(self._page[XENSTORE_REQ + start : XENSTORE_REQ + start + count])
        words[REQ_CONS] = (cons + count) & U32
        self._notify()
        return data

    def _output(self) -> None:
        """Of the first message that waits, one piece of its header and one of its payload."""
        conn = self.connection
        if not conn.out:
            return
        message = conn.out[0]
        if message.in_header:
            written = self._write(message.header[message.used :])
            if written is None:
                return
            message.used += written
            if message.used < HEADER:
                return
            message.in_header = False
            message.used = 0
        if not message.queued:  # dropped meanwhile: the guest's end ran at the notification
            return
        written = self._write(message.payload[message.used :])
        if written is None:
            return
        message.used += written
        if message.used == len(message.payload) and message.queued:
            conn.free(message)

    def _write(self, data: bytes) -> int | None:
        """Write what fits in one piece and return how much; None if the indexes are wrong (writechn)."""
        words = self._words
        cons, prod = words[RSP_CONS], words[RSP_PROD]
        used = (prod - cons) & U32
        if used > XENSTORE_RING_SIZE:
            self.connection.ignore(XENSTORE_ERROR_RINGIDX)
            return None
        start = prod % XENSTORE_RING_SIZE
        count = min(len(data), XENSTORE_RING_SIZE - used, XENSTORE_RING_SIZE - start)
        self._page[XENSTORE_RSP + start : XENSTORE_RSP + start + count] = data[:count]
        words[RSP_PROD] = (prod + count) & U32
        self._notify()
        return count

"""A modelled kernel's xenstore client, over its ring page and event channel (xenbus_xs.c, xenbus_comms.c, Linux 6.1).

Requests are bodies of threads: `value = yield from xs.read("device/vif/0/mac")`. Each costs what it costs a real
kernel: xenstored's interrupt and, for the reply, the kernel's own. Callbacks of watches run one after the other in
the thread "xenwatch"; one that is itself a body may wait for requests, and the next callback waits for it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import (
    REQ_CONS,
    REQ_PROD,
    RSP_CONS,
    RSP_PROD,
    XENSTORE_NR_WORDS,
    XENSTORE_PAYLOAD_MAX,
    XENSTORE_REQ,
    XENSTORE_RING_SIZE,
    XENSTORE_RSP,
    XENSTORE_WORDS,
    XS_DIRECTORY,
    XS_ERROR,
    XS_GET_PERMS,
    XS_MKDIR,
    XS_READ,
    XS_RM,
    XS_SET_PERMS,
    XS_TRANSACTION_END,
    XS_TRANSACTION_START,
    XS_UNWATCH,
    XS_WATCH,
    XS_WATCH_EVENT,
    XS_WRITE,
    XSD_SOCKMSG,
)
from pvirq.drivers.xenstore import Perm, Xenstored
from pvirq.linux.evtchn_dev import EvtchnUser
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, Completion, Kthread, WaitQueue
from pvirq.xen import evtchn
from pvirq.xen.memory import Machine

U32: Final = 0xFFFFFFFF
HEADER: Final = XSD_SOCKMSG.size
WatchCallback = Callable[[str], Body[None] | None]
"""What a change calls, with the path that changed; it may return a body, which is run then."""


class XsWatch:
    """A watch (struct xenbus_watch)."""

    __slots__ = ("callback", "path", "token")

    def __init__(self, path: str, token: str, callback: WatchCallback) -> None:
        self.path = path
        self.token = token
        self.callback = callback


class Xs:
    """The client of one kernel. Errors of requests are XenError with the errno that xenstored named.

    Paths may be relative to the domain's own directory. `tx` is a transaction's number, 0 outside of any.
    """

    def __init__(self, kernel: Kernel[Any], page: memoryview, port: int, *, follow: bool = False) -> None:
        """`page` is the ring in place, `port` this kernel's end of its channel.

        `follow`: xenwatch moves to the CPU that takes the interrupts, which spares one to wake it each time. A
        scheduler may do either; without, it stays on CPU 0.
        """
        self.kernel = kernel
        self.requests = 0  # how many were made
        self._page = page
        self._words = page[XENSTORE_WORDS : XENSTORE_WORDS + 4 * XENSTORE_NR_WORDS].cast("I")
        self._port = port
        self._send = kernel.domain, port
        self._out = bytearray()
        self._in = bytearray()
        self._req_id = 0
        self._waiting: dict[int, tuple[int, Completion[bytes]]] = {}
        self._watches: dict[str, XsWatch] = {}
        self._token = 0
        self._events: deque[tuple[XsWatch, str]] = deque()
        self._wake_xenwatch = WaitQueue()
        self._xenwatch: Kthread[None] | None = None
        self._xenwatch_idle = False
        self._follow = follow
        kernel.events.on_xenbus = self.service

    # -- the ring ------------------------------------------------------------------------------------------------------

    def _notify(self) -> None:
        try:  # noqa: SIM105  # a context manager takes as long as the whole rest
            evtchn.send(*self._send)
        except XenError:
            pass

    def service(self) -> None:
        """What the xenbus interrupt wakes: take replies and events, send what has waited for room."""
        words, page = self._words, self._page
        while True:
            cons, prod = words[RSP_CONS], words[RSP_PROD]
            size = prod - cons & U32
            if not size:
                break
            if size > XENSTORE_RING_SIZE:  # nonsense: as xb_read, drop it all
                words[RSP_CONS] = prod
                break
            at = cons % XENSTORE_RING_SIZE
            data = bytes(page[XENSTORE_RSP + at : XENSTORE_RSP + min(at + size, XENSTORE_RING_SIZE)])
            if len(data) < size:
                data += bytes(page[XENSTORE_RSP : XENSTORE_RSP + size - len(data)])
            words[RSP_CONS] = prod
            if size == XENSTORE_RING_SIZE:  # xenstored had no room left
                self._notify()
            self._take(data)
        if self._out:
            self._flush()

    def _take(self, data: bytes) -> None:
        if self._in:
            self._in += data
            data = bytes(self._in)
            self._in.clear()
        at, end = 0, len(data)
        while end - at >= HEADER:
            kind, req_id, _tx_id, length = XSD_SOCKMSG.unpack_from(data, at)
            after = at + HEADER + length
            if after > end:
                break
            self._message(kind, req_id, data[at + HEADER : after])
            at = after
        if at < end:
            self._in += data[at:]

    def _message(self, kind: int, req_id: int, payload: bytes) -> None:
        if kind == XS_WATCH_EVENT:
            path, _, token = payload[:-1].decode("latin-1").partition("\0")
            watch = self._watches.get(token)
            if watch is not None:
                self._events.append((watch, path))
                if self._xenwatch_idle:
                    self._xenwatch_idle = False
                    if self._follow and self._xenwatch is not None:
                        self._xenwatch.cpu = self.kernel.cpu
                    self._wake_xenwatch.wake_up()
            return
        waiting = self._waiting.pop(req_id, None)
        if waiting is None:
            return
        wanted, done = waiting
        if kind == wanted:
            done.complete(payload)
        elif kind == XS_ERROR:
            name = payload[:-1].decode("latin-1")
            done.fail(XenError(Errno[name] if name in Errno.__members__ else Errno.EINVAL, "xenstored says so"))
        else:
            self.kernel.printk(f"xenbus: unexpected type [{kind}], expected [{wanted}]")
            done.fail(XenError(Errno.EINVAL, f"reply of type {kind}"))

    def _flush(self) -> None:
        """Write what fits of the requests that wait (xb_write); told only to who may have seen an empty ring."""
        words, out = self._words, self._out
        while out:
            cons, prod = words[REQ_CONS], words[REQ_PROD]
            used = prod - cons & U32
            if used >= XENSTORE_RING_SIZE:
                return
            at = prod % XENSTORE_RING_SIZE
            count = min(len(out), XENSTORE_RING_SIZE - used, XENSTORE_RING_SIZE - at)
            if count == len(out):
                self._page[XENSTORE_REQ + at : XENSTORE_REQ + at + count] = out
                out.clear()
            else:
                self._page[XENSTORE_REQ + at : XENSTORE_REQ + at + count] = out[:count]
                del out[:count]
            words[REQ_PROD] = prod + count & U32
            if not used:
                self._notify()

    def talk(self, kind: int, payload: bytes, tx: int = 0) -> Body[bytes]:
        """One request of type XS_*, and its reply's payload (xs_talkv). XenError(E2BIG): too long a message."""
        if len(payload) > XENSTORE_PAYLOAD_MAX:
            raise XenError(Errno.E2BIG, f"{len(payload)} bytes")
        self.requests += 1
        req_id = self._req_id = self._req_id + 1 & U32
        done: Completion[bytes] = Completion()
        self._waiting[req_id] = kind, done
        self._out += XSD_SOCKMSG.pack(kind, req_id, tx, len(payload)) + payload
        self._flush()
        if not done.done:
            yield done
        return done.result()

    # -- requests ------------------------------------------------------------------------------------------------------

    def read_bytes(self, path: str, tx: int = 0) -> Body[bytes]:
        """A node's value."""
        return self.talk(XS_READ, path.encode("latin-1") + b"\0", tx)

    def read(self, path: str, tx: int = 0) -> Body[str]:
        """A node's value as text."""
        value = yield from self.talk(XS_READ, path.encode("latin-1") + b"\0", tx)
        return value.decode("utf-8", "surrogateescape")

    def read_int(self, path: str, default: int | None = None, tx: int = 0) -> Body[int]:
        """A node's value as number (xenbus_scanf, xenbus_read_unsigned): `default` where there is none or no number.

        Without a default: XenError, ERANGE for what is no number.
        """
        try:
            value = yield from self.talk(XS_READ, path.encode("latin-1") + b"\0", tx)
            return int(value)
        except ValueError:
            if default is None:
                raise XenError(Errno.ERANGE, path) from None
        except XenError:
            if default is None:
                raise
        return default

    def write(self, path: str, value: str | int | bytes, tx: int = 0) -> Body[None]:
        """Set a node's value."""
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        yield from self.talk(XS_WRITE, path.encode("latin-1") + b"\0" + data, tx)

    def mkdir(self, path: str, tx: int = 0) -> Body[None]:
        """Make a node without value."""
        yield from self.talk(XS_MKDIR, path.encode("latin-1") + b"\0", tx)

    def rm(self, path: str, tx: int = 0) -> Body[None]:
        """Remove a node and all below."""
        yield from self.talk(XS_RM, path.encode("latin-1") + b"\0", tx)

    def ls(self, path: str, tx: int = 0) -> Body[list[str]]:
        """The names of a node's children."""
        names = yield from self.talk(XS_DIRECTORY, path.encode("latin-1") + b"\0", tx)
        return names.decode("latin-1").split("\0")[:-1]

    def exists(self, path: str, tx: int = 0) -> Body[bool]:
        """Can the node be listed (xenbus_exists)?"""
        try:
            yield from self.talk(XS_DIRECTORY, path.encode("latin-1") + b"\0", tx)
        except XenError:
            return False
        return True

    def get_perms(self, path: str, tx: int = 0) -> Body[list[Perm]]:
        """A node's permissions, its owner first."""
        perms = yield from self.talk(XS_GET_PERMS, path.encode("latin-1") + b"\0", tx)
        return [Perm.parse(perm) for perm in perms.decode("latin-1").split("\0")[:-1]]

    def set_perms(self, path: str, perms: Iterable[Perm | str], tx: int = 0) -> Body[None]:
        """Set permissions, as `Perm` or in the form `n0`, `r5`."""
        payload = "".join(f"{text}\0" for text in (path, *perms))
        yield from self.talk(XS_SET_PERMS, payload.encode("latin-1"), tx)

    def transaction_start(self) -> Body[int]:
        """Begin a transaction; returns its number."""
        return int((yield from self.talk(XS_TRANSACTION_START, b"\0"))[:-1])

    def transaction_end(self, tx: int, commit: bool = True) -> Body[None]:
        """End it. XenError(EAGAIN): others' changes were in its way."""
        yield from self.talk(XS_TRANSACTION_END, b"T\0" if commit else b"F\0", tx)

    def transact(self, body: Callable[[int], Body[None]]) -> Body[None]:
        """Run `body(tx)` in a transaction, again for as long as others' changes get in its way; its errors abort it."""
        while True:
            tx = yield from self.transaction_start()
            try:
                yield from body(tx)
            except XenError:
                with contextlib.suppress(XenError):
                    yield from self.transaction_end(tx, commit=False)
                raise
            try:
                yield from self.transaction_end(tx)
            except XenError as error:
                if error.errno is not Errno.EAGAIN:
                    raise
            else:
                return

    # -- watches -------------------------------------------------------------------------------------------------------

    def watch(self, path: str, callback: WatchCallback) -> Body[XsWatch]:
        """Have `callback(path)` called once now and after each change at `path` or below (register_xenbus_watch)."""
        if self._xenwatch is None:
            self._xenwatch = Kthread(self.kernel, "xenwatch", self._run_xenwatch())
        self._token += 1
        token = f"{self._token:X}"
        watch = self._watches[token] = XsWatch(path, token, callback)
        try:
            yield from self.talk(XS_WATCH, f"{path}\0{token}\0".encode("latin-1"))
        except XenError:
            del self._watches[token]
            raise
        return watch

    def unwatch(self, watch: XsWatch) -> Body[None]:
        """Remove a watch; its events that wait are dropped. A second time does nothing (unregister_xenbus_watch)."""
        if self._watches.pop(watch.token, None) is None:
            return
        if self._events:
            self._events = deque(event for event in self._events if event[0] is not watch)
        try:
            yield from self.talk(XS_UNWATCH, f"{watch.path}\0{watch.token}\0".encode("latin-1"))
        except XenError as error:
            self.kernel.printk(f"xenbus: Failed to release watch {watch.path}: {-error.errno}")

    def _run_xenwatch(self) -> Body[None]:
        while True:
            while self._events:
                watch, path = self._events.popleft()
                body = watch.callback(path)
                if body is not None:
                    yield from body
            self._xenwatch_idle = True
            yield from self._wake_xenwatch.wait()


def connect_xenstored(kernel: Kernel[Any], xenstored: Xenstored, events: EvtchnUser, port: int, mfn: int = 0) -> Xs:
    """Give domain 0's kernel its ring: a page of its own, and xenstored's end bound to its `port` (xenbus_init).

    `events` is the daemon's /dev/xen/evtchn. `mfn` is the page, allocated where it is 0.
    """
    machine: Machine = kernel.domain.machine
    page = machine.page(mfn or machine.alloc(1, kernel.domain.domid))
    ring = xenstored.introduce(0, page, lambda: None)
    end = events.bind_interdomain(0, port, lambda _port: ring.service())
    # IOCTL_EVTCHN_NOTIFY without its checks: this port stays as it is, and nothing is notified as often.
    ring.bind(page, partial(evtchn.send, kernel.domain, end))
    return Xs(kernel, page, port, follow=True)

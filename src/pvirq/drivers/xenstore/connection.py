"""Who uses the store: domains' accounts, connections with their queues of messages, and watches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import XenError
from pvirq.abi.xs_wire import XENSTORE_PAYLOAD_MAX, XS_WATCH_EVENT, XSD_SOCKMSG

if TYPE_CHECKING:
    from pvirq.drivers.xenstore.database import Transaction
    from pvirq.drivers.xenstore.store import Store
    from pvirq.xen.timer import Clock, Timer

HEADER: Final = XSD_SOCKMSG.size
# An event that an unprivileged domain doesn't take for so long is dropped (timeout_watch_event_msec).
WATCH_EVENT_TIMEOUT_NS: Final = 20_000_000_000


class Account:
    """A domain as the store counts it (struct domain); it may exist before the domain is introduced."""

    def __init__(self, domid: int, generation: int) -> None:
        self.domid = domid
        self.generation = generation
        self.introduced = False
        self.shutdown = False
        self.entries = 0
        self.memory = 0
        self.watches = 0
        self.outstanding = 0
        self.connection: Connection | None = None


@dataclass(eq=False, slots=True)
class Watch:
    """A watch of a connection; `prefix` is the implicit path where it was set relative to that."""

    conn: Connection
    node: str
    token: str
    prefix: str
    serial: int
    callback: Callable[[str, str], None] | None

    def event_path(self, path: str) -> str:
        """The path as the watcher named it: relative again for a relative watch."""
        return path[len(self.prefix) :].removeprefix("/") if self.prefix else path


class Outgoing:
    """A message to a client: a reply, from its request on, or a watch event (struct buffered_data)."""

    __slots__ = (
        "cause", "deadline", "domid", "events", "held", "in_header", "message_type", "payload", "queued",
        "req_id", "tx_id", "used", "watch",
    )  # fmt: skip

    def __init__(self, domid: int, req_id: int = 0, tx_id: int = 0) -> None:
        self.domid = domid
        self.req_id = req_id
        self.tx_id = tx_id
        self.message_type = 0
        self.payload = b""
        self.in_header = True
        self.used = 0  # bytes of the header, then of the payload, that have been sent
        self.queued = False
        self.watch: Watch | None = None  # of an event
        self.cause: Outgoing | None = None  # of an event: the request that set it off
        self.events = 0  # of a request: events that it set off and that are not delivered yet
        self.held = False  # the reply is out, but events still count against the requester
        self.deadline: int | None = None

    @property
    def header(self) -> bytes:
        return XSD_SOCKMSG.pack(self.message_type, self.req_id, self.tx_id, len(self.payload))


class Connection:
    """One user of the store and the messages that wait for it.

    With an `account`, the connection is a domain's own, and unprivileged unless that is domain 0; without, it
    is a tool's in domain 0 (a socket connection of xenstored).
    """

    def __init__(
        self, store: Store, domid: int = 0, account: Account | None = None, clock: Clock | None = None
    ) -> None:
        self.store = store
        self.domid = domid
        self.account = account
        self.unprivileged = account is not None and domid != 0
        self.implicit_path = f"/local/domain/{domid}"
        self.serial = store.next_serial()
        self.target: Connection | None = None
        self.current: Transaction | None = None  # the one that the current request is in
        self.transactions: dict[int, Transaction] = {}
        self.next_transaction_id = 1
        self.watches: dict[tuple[str, str], Watch] = {}
        self.request: Outgoing | None = None  # the request being served
        self.ignored = False
        self.out: deque[Outgoing] = deque()
        self.wake: Callable[[], None] = lambda: None  # there is something to send, or again leave to read
        self._pending_events: set[tuple[int, bytes]] = set()
        self._held: set[Outgoing] = set()
        self._clock = clock
        self._timer: Timer | None = None

    def canonicalize(self, path: str) -> str:
        """The absolute path; relative ones start from the domain's own directory."""
        return path if path.startswith(("/", "@")) else f"{self.implicit_path}/{path}"

    def send_event(self, watch: Watch, path: str, cause: Outgoing | None) -> None:
        """Queue a watch event, unless it is too long, waits already, or exceeds the memory quota."""
        payload = f"{path}\0{watch.token}\0".encode("latin-1")
        special = path.startswith("@")
        key = _event_key(watch, payload)
        if len(payload) > XENSTORE_PAYLOAD_MAX or (not special and key in self._pending_events):
            return
        event = Outgoing(self.domid)
        event.message_type = XS_WATCH_EVENT
        event.payload = payload
        try:
            self.store.account_memory(self.domid, HEADER + len(payload))
        except XenError:
            return
        if not special:
            self._pending_events.add(key)
        event.watch = watch
        event.cause = cause
        if cause is not None:
            cause.events += 1
        if self._clock is not None and self.unprivileged:
            event.deadline = self._clock.now() + WATCH_EVENT_TIMEOUT_NS
            if self._timer is None:
                self._timer = self._clock.at(event.deadline, self.expire_events)
        self.enqueue(event)

    def enqueue(self, message: Outgoing) -> None:
        message.queued = True
        self.out.append(message)
        self.wake()

    def free(self, message: Outgoing) -> None:
        """A message is delivered or dropped: settle what it counted for (free_buffered_data)."""
        self.out.remove(message)  # all but always the first
        message.queued = False
        self.store.account_memory(self.domid, -HEADER - len(message.payload), check=False)
        if message.watch is not None:
            self._pending_events.discard(_event_key(message.watch, message.payload))
            if self._timer is not None and not any(other.deadline is not None for other in self.out):
                self._timer.cancel()
                self._timer = None
            if message.cause is not None:
                self._event_done(message.cause)
        elif message.events:
            message.held = True
            self._held.add(message)
        else:
            self._request_done(self.account)

    def _event_done(self, cause: Outgoing) -> None:
        cause.events -= 1
        if not cause.events and cause.held:
            cause.held = False
            self._request_done(self.store.domains.get(cause.domid))

    def _request_done(self, account: Account | None) -> None:
        if account is None:
            return
        account.outstanding -= 1
        if account.outstanding == self.store.quotas.outstanding - 1 and account.connection is not None:
            account.connection.wake()

    def expire_events(self) -> None:
        """Drop the events whose time is over and of which nothing is sent yet (check_event_timeout)."""
        self._timer = None
        assert self._clock is not None
        now = self._clock.now()
        for message in list(self.out):
            if message.deadline is None or not message.in_header or message.used:
                continue
            if message.deadline > now:
                self._timer = self._clock.at(message.deadline, self.expire_events)
                break
            self.free(message)

    def drop_output(self) -> None:
        """Forget all that waits to be sent."""
        while self.out:
            self.free(self.out[0])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def reset(self) -> None:
        """Forget watches, transactions and all that waits to be sent (domain_conn_reset)."""
        self.store.drop_watches(self)
        self.store.drop_transactions(self)
        self.drop_output()

    def close(self) -> None:
        """End the connection (destroy_conn)."""
        self.ignored = True
        self.reset()
        # Its replies' events may still be under way, but don't count for whoever has this domid next.
        for message in self._held:
            message.held = False
        self._held.clear()


def _event_key(watch: Watch, payload: bytes) -> tuple[int, bytes]:
    """What makes an event a duplicate of one that waits: its bytes and, with callbacks, whose it is."""
    return (watch.serial if watch.callback is not None else 0), payload

"""One connection's state machine: bytes of requests in, bytes of replies and watch events out.

Requests come in any pieces. What the client does wrong within a message gets it an XS_ERROR; a payload that
is declared too long breaks the framing, so the connection is ignored from then on (xenstored_core.c,
handle_input to send_reply).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF
from pvirq.abi.xs_wire import (
    XENSTORE_ERROR_PROTO,
    XENSTORE_PAYLOAD_MAX,
    XS_CONTROL,
    XS_DIRECTORY,
    XS_DIRECTORY_PART,
    XS_ERROR,
    XS_GET_DOMAIN_PATH,
    XS_GET_PERMS,
    XS_INTRODUCE,
    XS_IS_DOMAIN_INTRODUCED,
    XS_MKDIR,
    XS_READ,
    XS_RELEASE,
    XS_RESET_WATCHES,
    XS_RESUME,
    XS_RM,
    XS_SET_PERMS,
    XS_SET_TARGET,
    XS_TRANSACTION_END,
    XS_TRANSACTION_START,
    XS_UNWATCH,
    XS_WATCH,
    XS_WRITE,
    XSD_ERRORS,
    XSD_SOCKMSG,
)
from pvirq.drivers.xenstore.connection import HEADER, Account, Connection, Outgoing
from pvirq.drivers.xenstore.control import control
from pvirq.drivers.xenstore.node import U32, Perm, atoi

if TYPE_CHECKING:
    from pvirq.drivers.xenstore.daemon import Xenstored

OK: Final = b"OK\0"


class WireConnection(Connection):
    """A connection that speaks the wire protocol.

    The transport gives `take_header` or `take_payload`, as `in_header` says, up to `missing` bytes, and sends
    what lies in `out`. `feed` and `drain` do both for a transport without limits.
    """

    def __init__(self, daemon: Xenstored, domid: int = 0, account: Account | None = None) -> None:
        super().__init__(daemon.store, domid, account, daemon.clock)
        self.daemon = daemon
        self.in_header = True
        self.on_ignored: Callable[[int], None] = lambda error: None  # called with an XENSTORE_ERROR_*
        self._header = bytearray()
        self._payload = bytearray()
        self._type = 0
        self._length = 0
        self._backlog = bytearray()

    @property
    def may_read(self) -> bool:
        """Whether requests may be taken: not if ignored, nor from a domain at its quota (domain_can_read)."""
        if self.ignored:
            return False
        if not self.unprivileged or self.account is None:
            return True
        quotas = self.store.quotas
        memory_left = self.account.memory < quotas.memory or not quotas.memory
        return self.account.outstanding < quotas.outstanding and memory_left

    @property
    def missing(self) -> int:
        """Bytes still missing of the header or, after it, of the payload."""
        return XSD_SOCKMSG.size - len(self._header) if self.in_header else self._length - len(self._payload)

    def take_header(self, data: bytes | memoryview) -> None:
        """Up to `missing` bytes of a header; with the last, `in_header` ends or the connection does."""
        self._header += data
        if self.missing:
            return
        self._type, req_id, tx_id, self._length = XSD_SOCKMSG.unpack(self._header)
        if self._length > XENSTORE_PAYLOAD_MAX:
            self.ignore(XENSTORE_ERROR_PROTO)
            return
        self.request = Outgoing(self.domid, req_id, tx_id)
        self.in_header = False

    @property
    def between(self) -> bool:
        """Nothing of a request has come yet."""
        return self.in_header and not self._header

    def take_request(self, kind: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """A whole request at once."""
        self._type = kind
        self.request = Outgoing(self.domid, req_id, tx_id)
        self._process(payload)

    def take_payload(self, data: bytes | memoryview) -> None:
        """Up to `missing` bytes of a payload, none too; when it is complete, the request is served."""
        if self.ignored:
            return
        self._payload += data
        if self.missing:
            return
        payload = bytes(self._payload)
        self._start_message()
        self._process(payload)

    def _start_message(self) -> None:
        self.in_header = True
        self._header.clear()
        self._payload.clear()

    def feed(self, data: bytes) -> None:
        """Take bytes of requests, in any pieces, and serve what is complete and within quota."""
        self._backlog += data
        while self._backlog and self.may_read:
            if self.in_header:
                self.take_header(self._from_backlog())
            if not self.in_header:
                self.take_payload(self._from_backlog())
        if self.ignored:
            self._backlog.clear()

    def _from_backlog(self) -> bytes:
        count = self.missing
        piece = bytes(self._backlog[:count])
        del self._backlog[:count]
        return piece

    def drain(self) -> bytes:
        """All messages that wait, as bytes; what was held back for quota is served then."""
        sent = bytearray()
        while self.out:
            message = self.out[0]
            sent += (message.header + message.payload)[message.used :]
            self.free(message)
            if not self.out:
                self.feed(b"")
        return bytes(sent)

    def expire_events(self) -> None:
        super().expire_events()
        self.daemon.settle()  # whoever caused what is dropped may go on

    def reset(self) -> None:
        super().reset()
        self._start_message()
        self._backlog.clear()

    def ignore(self, error: int) -> None:
        """Never read nor write again; the ring gets `error` (XENSTORE_ERROR_*) (ignore_connection)."""
        self.ignored = True
        self.on_ignored(error)
        self.reset()
        self.request = None

    # Replies.

    def _reply(self, message_type: int, payload: bytes) -> None:
        message = self.request
        if message is None:
            return
        if len(payload) > XENSTORE_PAYLOAD_MAX:
            self._reply_error(Errno.E2BIG)
            return
        message.message_type = message_type
        message.payload = payload
        try:
            # Short replies are beyond quota, so that there is always room for an error.
            self.store.account_memory(self.domid, HEADER + len(payload), check=len(payload) > 16)
        except XenError:
            self._reply_error(Errno.ENOMEM)
            return
        self.request = None
        if self.account is not None:
            self.account.outstanding += 1
        self.enqueue(message)

    def _reply_error(self, errno: Errno) -> None:
        name = errno.name if errno in XSD_ERRORS else Errno.EINVAL.name
        self._reply(XS_ERROR, name.encode("ascii") + b"\0")

    def _process(self, payload: bytes) -> None:
        """Serve one request (process_message)."""
        assert self.request is not None
        try:
            handler = HANDLERS.get(self._type)
            if handler is None:
                raise XenError(Errno.ENOSYS, f"request {self._type}")
            if self._type in PRIVILEGED and self.unprivileged:
                raise XenError(Errno.EACCES, "only for domain 0")
            tx_id = self.request.tx_id
            if tx_id and self._type not in WITHOUT_TRANSACTION:
                self.current = self.transactions.get(tx_id)
                if self.current is None:
                    raise XenError(Errno.ENOENT, f"no transaction {tx_id}")
            reply = handler(self, payload)
            if reply is not None:
                self._reply(self._type, reply)
        except XenError as error:
            self._reply_error(error.errno)
        finally:
            self.current = None

    # Requests. Each returns its reply's payload, or None if it has replied itself.

    def do_control(self, payload: bytes) -> bytes:
        return control(self.store, payload)

    def do_directory(self, payload: bytes) -> bytes:
        return self.store.directory(self, one_arg(payload)).child_list()

    def do_directory_part(self, payload: bytes) -> bytes:
        if payload.count(0) != 2:
            raise XenError(Errno.EINVAL, "two strings, please")
        path, offset_text = strings(payload)
        node = self.store.directory(self, path)
        offset = atoi(offset_text.encode("latin-1")) & U32
        generation = b"%d\0" % node.generation
        names = node.child_list()
        if offset >= len(names):
            return generation + b"\0"
        room = XENSTORE_PAYLOAD_MAX - len(generation) - 1
        end = offset
        while end < len(names):
            following = names.index(0, end) + 1
            if following - 1 - offset >= room:
                break
            end = following
        # An empty name marks the end of the whole list.
        return generation + names[offset:end] + (b"\0" if end == len(names) else b"")

    def do_read(self, payload: bytes) -> bytes:
        return self.store.read(self, one_arg(payload))

    def do_get_perms(self, payload: bytes) -> bytes:
        perms = self.store.directory(self, one_arg(payload)).perms
        return b"".join(str(perm).encode("ascii") + b"\0" for perm in perms)

    def do_watch(self, payload: bytes) -> None:
        if payload.count(0) != 2:
            raise XenError(Errno.EINVAL, "two strings, please")
        path, token = strings(payload)
        watch = self.store.watch(self, path, token)
        self._reply(XS_WATCH, OK)
        # Once at the start, so that the client needs no look of its own; not counted for the request.
        self.send_event(watch, watch.event_path(watch.node), None)

    def do_unwatch(self, payload: bytes) -> bytes:
        if payload.count(0) != 2:
            raise XenError(Errno.EINVAL, "two strings, please")
        path, token = strings(payload)
        self.store.unwatch(self, path, token)
        return OK

    def do_transaction_start(self, payload: bytes) -> bytes:
        return b"%d\0" % self.store.transaction_start(self).id

    def do_transaction_end(self, payload: bytes) -> bytes:
        if payload not in (b"T\0", b"F\0"):
            raise XenError(Errno.EINVAL, "T or F, please")
        self.store.transaction_end(self, payload == b"T\0")
        return OK

    def do_write(self, payload: bytes) -> bytes:
        path, nul, value = payload.partition(b"\0")
        if not nul:
            raise XenError(Errno.EINVAL, "no path")
        self.store.write(self, path.decode("latin-1"), value)
        return OK

    def do_mkdir(self, payload: bytes) -> bytes:
        self.store.mkdir(self, one_arg(payload))
        return OK

    def do_rm(self, payload: bytes) -> bytes:
        self.store.rm(self, one_arg(payload))
        return OK

    def do_set_perms(self, payload: bytes) -> bytes:
        path, *perms = strings(payload) or [""]
        quota = self.store.quotas.permissions
        if self.unprivileged and len(perms) > quota:  # before a look at what they say
            raise XenError(Errno.ENOSPC, "too many permissions")
        self.store.set_perms(self, path, [Perm.parse(perm) for perm in perms])
        return OK

    def do_introduce(self, payload: bytes) -> bytes:
        args = strings(payload)
        if len(args) < 3:
            raise XenError(Errno.EINVAL, "three strings, please")
        domid, port = (atoi(args[i].encode("latin-1")) & U32 for i in (0, 2))
        if port == 0:
            raise XenError(Errno.EINVAL, "no port")
        self.daemon.introduce_by_port(domid, port)
        return OK

    def do_release(self, payload: bytes) -> bytes:
        self.daemon.release(domid_arg(payload))
        return OK

    def do_resume(self, payload: bytes) -> bytes:
        self.daemon.resume(domid_arg(payload))
        return OK

    def do_set_target(self, payload: bytes) -> bytes:
        args = strings(payload)
        if len(args) < 2:
            raise XenError(Errno.EINVAL, "two strings, please")
        domid, target = (atoi(arg.encode("latin-1")) & U32 for arg in args[:2])
        self.daemon.set_target(domid, target)
        return OK

    def do_get_domain_path(self, payload: bytes) -> bytes:
        return b"/local/domain/%d\0" % (atoi(one_arg(payload).encode("latin-1")) & U32)

    def do_is_domain_introduced(self, payload: bytes) -> bytes:
        domid = atoi(one_arg(payload).encode("latin-1")) & U32
        return b"T\0" if domid == DOMID_SELF or self.daemon.is_introduced(domid) else b"F\0"

    def do_reset_watches(self, payload: bytes) -> bytes:
        self.store.drop_watches(self)
        self.store.drop_transactions(self)
        return OK


def strings(payload: bytes) -> list[str]:
    """The strings in a payload; what follows the last NUL is none (get_strings)."""
    return payload.decode("latin-1").split("\0")[:-1]


def one_arg(payload: bytes) -> str:
    """The only string in a payload; XenError(EINVAL) (onearg).

    Where this fails, xenstored's file operations answer with whatever errno was left over; EINVAL is what it
    means them to.
    """
    if payload.find(0) != len(payload) - 1 or not payload:
        raise XenError(Errno.EINVAL, "one string, please")
    return payload[:-1].decode("latin-1")


def domid_arg(payload: bytes) -> int:
    """The only string in a payload as domain id; XenError(EINVAL), for domain 0 too (onearg_domain)."""
    domid = atoi(one_arg(payload).encode("latin-1")) & U32
    if domid == 0:
        raise XenError(Errno.EINVAL, "not domain 0")
    return domid


HANDLERS: Final[dict[int, Callable[[WireConnection, bytes], bytes | None]]] = {
    XS_CONTROL: WireConnection.do_control,
    XS_DIRECTORY: WireConnection.do_directory,
    XS_READ: WireConnection.do_read,
    XS_GET_PERMS: WireConnection.do_get_perms,
    XS_WATCH: WireConnection.do_watch,
    XS_UNWATCH: WireConnection.do_unwatch,
    XS_TRANSACTION_START: WireConnection.do_transaction_start,
    XS_TRANSACTION_END: WireConnection.do_transaction_end,
    XS_INTRODUCE: WireConnection.do_introduce,
    XS_RELEASE: WireConnection.do_release,
    XS_GET_DOMAIN_PATH: WireConnection.do_get_domain_path,
    XS_WRITE: WireConnection.do_write,
    XS_MKDIR: WireConnection.do_mkdir,
    XS_RM: WireConnection.do_rm,
    XS_SET_PERMS: WireConnection.do_set_perms,
    XS_IS_DOMAIN_INTRODUCED: WireConnection.do_is_domain_introduced,
    XS_RESUME: WireConnection.do_resume,
    XS_SET_TARGET: WireConnection.do_set_target,
    XS_RESET_WATCHES: WireConnection.do_reset_watches,
    XS_DIRECTORY_PART: WireConnection.do_directory_part,
}
PRIVILEGED: Final = frozenset({XS_CONTROL, XS_INTRODUCE, XS_RELEASE, XS_IS_DOMAIN_INTRODUCED, XS_RESUME, XS_SET_TARGET})
WITHOUT_TRANSACTION: Final = frozenset({XS_WATCH, XS_UNWATCH})

"""The store for code in this process: toolstack, drivers and modelled kernels (what libxenstore is to xl)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import XENSTORE_PAYLOAD_MAX
from pvirq.drivers.xenstore.connection import Account, Connection, Watch
from pvirq.drivers.xenstore.node import Perm, join, parse_perms

if TYPE_CHECKING:
    from pvirq.drivers.xenstore.daemon import Xenstored
    from pvirq.drivers.xenstore.database import Transaction

T = TypeVar("T")


class Operations:
    """What can be done outside and inside a transaction alike. Errors are XenError with the wire's errnos."""

    def _do(self, operation: Callable[[Connection], T]) -> T:
        """Run one operation, in the transaction if there is one."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        """The value of a node."""
        return self._do(lambda conn: conn.store.read(conn, path))

    def read_text(self, path: str, default: str | None = None) -> str:
        """The value as text; `default`, if given, where there is no such node."""
        try:
            return self.read(path).decode("utf-8", "surrogateescape")
        except XenError as error:
            if default is None or error.errno is not Errno.ENOENT:
                raise
            return default

    def write(self, path: str, value: bytes | str | int) -> None:
        """Set a value, creating what is missing of the path. XenError(E2BIG): too long for a message."""
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        if len(path) + 1 + len(data) > XENSTORE_PAYLOAD_MAX:
            raise XenError(Errno.E2BIG, path)
        self._do(lambda conn: conn.store.write(conn, path, data))

    def mkdir(self, path: str) -> None:
        """Create a node without value; one that exists stays as it is."""
        self._do(lambda conn: conn.store.mkdir(conn, path))

    def rm(self, path: str) -> None:
        """Remove a node and all below it; none there is fine if its parent exists."""
        self._do(lambda conn: conn.store.rm(conn, path))

    def ls(self, path: str) -> list[str]:
        """The names of a node's children, in order of creation."""
        return self._do(lambda conn: list(conn.store.directory(conn, path).children))

    def exists(self, path: str) -> bool:
        """Whether the node is there; XenError(EACCES) where this connection may not know."""
        try:
            self.read(path)
        except XenError as error:
            if error.errno is not Errno.ENOENT:
                raise
            return False
        return True

    def get_perms(self, path: str) -> list[Perm]:
        """A node's permissions, its owner first."""
        return self._do(lambda conn: list(conn.store.directory(conn, path).perms))

    def set_perms(self, path: str, perms: Iterable[Perm | str]) -> None:
        """Set permissions, given as `Perm` or in the form `n0`, `r5`; the first names the owner."""
        parsed = parse_perms(perms)
        self._do(lambda conn: conn.store.set_perms(conn, path, parsed))

    def dump(self, path: str = "/") -> Iterator[str]:
        """The lines that `xenstore-ls -f` prints for what is below `path`."""
        stack = [join(path, name) for name in reversed(self.ls(path))]
        while stack:
            node = stack.pop()
            try:
                value, names = self.read(node), self.ls(node)
            except XenError as error:
                if error.errno is Errno.ENOENT:  # gone since it was listed
                    continue
                raise
            yield f'{node} = "{sanitise(value)}"'
            stack += [join(node, name) for name in reversed(names)]


class Client(Connection, Operations):
    """A connection of this process. Watch callbacks run one after the other, never inside an operation."""

    def __init__(self, daemon: Xenstored, domid: int, account: Account | None) -> None:
        """Made by `Xenstored.client`."""
        super().__init__(daemon.store, domid, account)
        self._daemon = daemon
        self.wake = lambda: daemon.client_ready(self)

    def _do(self, operation: Callable[[Connection], T]) -> T:
        return self.run(operation, None)

    def run(self, operation: Callable[[Connection], T], transaction: Transaction | None) -> T:
        """One operation, then whatever it set off. XenError(ENOTCONN) once the connection is closed."""
        if self.ignored:
            raise XenError(Errno.ENOTCONN, "the connection is closed")
        self.current = transaction
        try:
            return operation(self)
        finally:
            self.current = None
            self._daemon.settle()

    def watch(self, path: str, token: str, callback: Callable[[str, str], None]) -> WatchHandle:
        """Call `callback(path, token)` once now and after each change at `path` or below it.

        A relative `path` starts from the domain's directory, and events name it relatively too.
        XenError(EINVAL, EEXIST, E2BIG, ENOMEM).
        """
        if not token.isascii() or "\0" in token or not path.isascii() or "\0" in path:
            raise XenError(Errno.EINVAL, f"{path!r}, {token!r}")

        def register(conn: Connection) -> Watch:
            watch = conn.store.watch(conn, path, token, callback)
            conn.send_event(watch, watch.event_path(watch.node), None)
            return watch

        return WatchHandle(self.run(register, None))

    def deliver(self) -> None:
        """For the daemon: hand over the oldest event."""
        if not self.out:
            return
        event = self.out[0]
        self.free(event)
        if self.out:
            self.wake()
        watch = event.watch
        if watch is not None and watch.callback is not None and self.watches.get((watch.node, watch.token)) is watch:
            path, token = event.payload[:-1].decode("latin-1").split("\0")
            watch.callback(path, token)

    def transaction(self) -> ClientTransaction:
        """Begin a transaction: `with client.transaction() as t:` commits at the end of the block, or aborts
        where that raises. XenError(ENOSPC) for a guest with too many, and at the end what `commit` raises.
        """
        return ClientTransaction(self, self.run(lambda conn: conn.store.transaction_start(conn), None))

    def transact(self, body: Callable[[Operations], T]) -> T:
        """Run `body` in a transaction, again for as long as others' changes get in its way (EAGAIN)."""
        while True:
            try:
                with self.transaction() as transaction:
                    return body(transaction)
            except XenError as error:
                if error.errno is not Errno.EAGAIN:
                    raise

    def close(self) -> None:
        super().close()
        self._daemon.forget_client(self)


class WatchHandle:
    """A watch that is set."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def close(self) -> None:
        """Remove the watch; its events that wait are not delivered any more. A second time does nothing."""
        watch = self._watch
        if watch.conn.watches.get((watch.node, watch.token)) is watch:
            watch.conn.store.unwatch(watch.conn, watch.node, watch.token)


class ClientTransaction(Operations):
    """A transaction: it keeps what it has read, and nobody sees what it does before the commit."""

    def __init__(self, client: Client, transaction: Transaction) -> None:
        self._client = client
        self._transaction = transaction

    def _do(self, operation: Callable[[Connection], T]) -> T:
        if self._client.transactions.get(self._transaction.id) is not self._transaction:
            raise XenError(Errno.ENOENT, "the transaction is over")
        return self._client.run(operation, self._transaction)

    def commit(self) -> None:
        """Make it all visible at once. XenError(EAGAIN): what it read has changed; ENOMEM, ENOSPC: quotas."""
        self._do(lambda conn: conn.store.transaction_end(conn, True))

    def abort(self) -> None:
        """Forget it all."""
        self._do(lambda conn: conn.store.transaction_end(conn, False))

    def __enter__(self) -> ClientTransaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client.transactions.get(self._transaction.id) is not self._transaction:
            return  # ended by hand, or with its connection
        if kind is None:
            self.commit()
        else:
            self.abort()


def sanitise(value: bytes) -> str:
    """A value as xenstore-ls prints it (sanitise_value)."""
    named = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r", ord("\\"): "\\\\"}
    text = ""
    for byte in value:
        if byte in named:
            text += named[byte]
        elif 0x20 <= byte <= 0x7E:
            text += chr(byte)
        else:
            text += f"\\{byte:03o}" if byte < 0o10 else f"\\x{byte:02x}"
    return text

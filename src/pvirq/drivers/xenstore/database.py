"""The database under the store: records of nodes, who pays for them, and what transactions see instead.

Follows read_node, write_node and do_tdb_write of tools/xenstore/xenstored_core.c, access_node of
xenstored_transaction.c and the accounting of xenstored_domain.c. `conn` is the connection that asks (None:
the daemon itself); its current transaction decides which version of a node is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import XENSTORE_REL_PATH_MAX
from pvirq.drivers.xenstore.connection import Account, Connection
from pvirq.drivers.xenstore.node import XS_PERM_IGNORE, XS_PERM_NONE, Node, Perm

NO_GENERATION: Final = -1  # the node was absent when the transaction looked


@dataclass
class Quotas:
    """Limits on unprivileged domains, with xenstored's defaults."""

    nodes: int = 1000
    watches: int = 128
    transactions: int = 10
    outstanding: int = 20
    transaction_nodes: int = 1024
    memory: int = 2 * 1024 * 1024 + 512 * 1024
    memory_soft: int = 2 * 1024 * 1024  # only ever a line in xenstored's log
    node_size: int = 2048
    path_max: int = XENSTORE_REL_PATH_MAX
    permissions: int = 5


class Accessed:
    """What a transaction knows of one path.

    `node` is its own version, None where it has none; `generation` the store's when it first looked.
    """

    __slots__ = ("check", "exact", "fire", "generation", "modified", "node", "perms")

    def __init__(self, generation: int, check: bool, perms: tuple[Perm, ...] | None) -> None:
        self.node: Node | None = None
        self.generation = generation
        self.check = check
        self.perms = perms
        self.modified = False
        self.fire = False
        self.exact = False


class Transaction:
    """A transaction of one connection (struct transaction)."""

    def __init__(self, conn: Connection, transaction_id: int, generation: int) -> None:
        self.conn = conn
        self.id = transaction_id
        self.generation = generation
        # With a path, the length of the database key of the copy, `<generation>/<path>`, which quotas count.
        self.key_prefix = len(f"{generation}/")
        self.accessed: dict[str, Accessed] = {}  # in order of first access
        self.entries: dict[int, int] = {}  # domid -> change of its number of nodes
        self.node_created = False
        self.fail = False


class Database:
    """Nodes by path, global and per transaction, and the accounts of the domains that own them."""

    def __init__(self, domain_exists: Callable[[int], bool] | None, quotas: Quotas | None) -> None:
        """`domain_exists(domid)` says whether Xen has such a domain, introduced or not; default: always."""
        self.domain_exists: Callable[[int], bool] = domain_exists or (lambda domid: True)
        self.quotas = quotas or Quotas()
        self.nodes: dict[str, Node] = {}
        self.generation = 0
        self.domains: dict[int, Account] = {}  # in order of creation
        self.alloc_domain(0).introduced = True
        for path, children in (("/", ("tool",)), ("/tool", ("xenstored",)), ("/tool/xenstored", ())):
            self.write_node(None, Node(path, b"", children, (Perm(0, XS_PERM_NONE),), 0))
            self.domains[0].entries += 1

    # Domains and what they use.

    def alloc_domain(self, domid: int) -> Account:
        """Begin to account for a domain (alloc_domain)."""
        account = self.domains[domid] = Account(domid, self.generation)
        return account

    def existing_domain(self, domid: int) -> Account | None:
        """The account of a domain that Xen knows, made where need be (find_or_alloc_existing_domain)."""
        account = self.domains.get(domid)
        return self.alloc_domain(domid) if account is None and self.domain_exists(domid) else account

    def account_memory(self, domid: int, delta: int, check: bool = True) -> None:
        """Charge `delta` bytes to a domain; XenError(ENOMEM) where `check` and over the hard quota."""
        account = self.domains.get(domid)
        if account is None:
            if check:
                raise XenError(Errno.ENOENT, f"no domain {domid}")
            return
        limit, before, connection = self.quotas.memory, account.memory, account.connection
        after = before + delta
        if check and after >= limit > 0 and domid != 0 and not (connection is not None and connection.ignored):
            raise XenError(Errno.ENOMEM, f"memory quota of domain {domid}")
        account.memory = after
        if before >= limit > after and connection is not None:
            connection.wake()

    def count_entry(self, conn: Connection | None, node: Node, delta: int) -> None:
        """One node more or fewer for its owner (domain_entry_inc, domain_entry_dec)."""
        domid = node.perms[0].domid
        if conn is not None and conn.current is not None:
            entries = conn.current.entries
            entries[domid] = entries.get(domid, 0) + delta
            return
        account = self.existing_domain(domid) if delta > 0 else self.domains.get(domid)
        if account is not None:
            account.entries += delta
        elif delta > 0:
            raise XenError(Errno.ENOMEM, f"no domain {domid} to own a node")

    # The database: global records, and the private copies of transactions.

    def record(self, node: Node, check: bool) -> None:
        """Store a global node and charge its owner (do_tdb_write); XenError(EIO) over the memory quota."""
        old = self.nodes.get(node.path)
        owner, key = node.perms[0].domid, len(node.path)
        delta = node.size + key
        moved = old is not None and old.perms[0].domid != owner
        if old is not None:
            if moved:
                self.account_memory(old.perms[0].domid, -old.size - key, check=False)
            else:  # one charge for both
                delta -= old.size + key
        try:
            self.account_memory(owner, delta, check)
        except XenError as error:
            if old is not None and moved:
                self.account_memory(old.perms[0].domid, old.size + key, check=False)
            raise XenError(Errno.EIO, error.why) from error
        self.nodes[node.path] = node

    def delete(self, path: str) -> None:
        """Remove a global node (do_tdb_delete)."""
        node = self.nodes.pop(path)
        self.account_memory(node.perms[0].domid, -node.size - len(path), check=False)

    def set_copy(self, trans: Transaction, path: str, entry: Accessed, node: Node | None, check: bool = False) -> None:
        """Replace a transaction's copy, charged to who runs the transaction; XenError(EIO) over the quota."""
        domid, key, old = trans.conn.domid, trans.key_prefix + len(path), entry.node
        delta = (0 if node is None else node.size + key) - (0 if old is None else old.size + key)
        try:
            self.account_memory(domid, delta, check and node is not None)
        except XenError as error:
            raise XenError(Errno.EIO, error.why) from error
        entry.node = node

    def _access(self, conn: Connection | None, path: str, node: Node | None, *, read: bool) -> Accessed | None:
        """Note an access in the transaction, if there is one (access_node).

        XenError(ENOSPC) for too many nodes in it; the transaction can't be committed then.
        """
        trans = conn.current if conn is not None else None
        if conn is None or trans is None:
            return None
        entry = trans.accessed.get(path)
        if entry is None:
            if conn.unprivileged and len(trans.accessed) >= self.quotas.transaction_nodes:
                trans.fail = True
                raise XenError(Errno.ENOSPC, "too many nodes in one transaction")
            generation = NO_GENERATION if node is None else node.generation
            entry = Accessed(generation, read, node.perms if node is not None else None)
            if read and node is not None:
                self.set_copy(trans, path, entry, node)
            trans.accessed[path] = entry
        if not read:
            entry.modified = True
        return entry

    def _adjust_perms(self, node: Node) -> Node:
        """Void the entries of domains that are gone or younger than the node (domain_adjust_node_perms)."""
        generation, domains = node.generation, self.domains
        for domid, _access in node.perms[1:]:
            account = domains.get(domid)
            if account is None or account.generation > generation:
                break
        else:
            return node
        perms = list(node.perms)
        for i, perm in enumerate(perms[1:], 1):
            if not perm.access & XS_PERM_IGNORE:
                account = self.domains.get(perm.domid)
                if account is None or account.generation > node.generation:
                    perms[i] = Perm(perm.domid, perm.access | XS_PERM_IGNORE)
        if tuple(perms) == node.perms:
            return node
        return Node(node.path, node.value, node.children, tuple(perms), node.generation)

    def find_node(self, conn: Connection | None, path: str) -> Node | None:
        """A node, whoever asks; None where there is none. XenError(ENOSPC) from a transaction's quota."""
        if conn is None or conn.current is None:
            node = self.nodes.get(path)
            return node if node is None or len(node.perms) == 1 else self._adjust_perms(node)
        entry = conn.current.accessed.get(path)
        node = entry.node if entry is not None else self.nodes.get(path)
        if node is not None and len(node.perms) != 1:
            node = self._adjust_perms(node)
        if entry is None:
            self._access(conn, path, node, read=True)
        return node

    def read_node(self, conn: Connection | None, path: str) -> Node:
        """A node, whoever asks; XenError(ENOENT), or ENOSPC from a transaction's quota."""
        node = self.find_node(conn, path)
        if node is None:
            raise XenError(Errno.ENOENT, path)
        return node

    def write_node(self, conn: Connection | None, node: Node, check: bool = True) -> Node:
        """Store a new node under a new generation; XenError(ENOSPC) for its size, EIO for memory (write_node).

        No entry of its permissions is to be void: they are those of a node that was found just now, or checked.
        """
        self.generation += 1
        node.generation = self.generation
        trans = conn.current if conn is not None else None
        entry = None if trans is None else self._access(conn, node.path, node, read=False)
        try:
            if check and conn is not None and conn.unprivileged and node.size >= self.quotas.node_size:
                raise XenError(Errno.ENOSPC, f"{node.path} has {node.size} bytes")
            if trans is not None and entry is not None:
                self.set_copy(trans, node.path, entry, node, check)
            else:
                self.record(node, check)
        except XenError:
            if trans is not None:
                trans.fail = True
            raise
        return node

    def delete_node(self, conn: Connection | None, node: Node) -> None:
        """Remove a node, but not its name from the parent."""
        self.generation += 1
        entry = self._access(conn, node.path, node, read=False)
        if conn is not None and conn.current is not None and entry is not None:
            self.set_copy(conn.current, node.path, entry, None)
        else:
            self.delete(node.path)

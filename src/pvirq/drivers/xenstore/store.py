"""The store: operations on the tree with their permissions, transactions and watches, as in C xenstored 4.17.

Every operation takes the connection that asks and works in that connection's current transaction. Order of
checks, errors, generation counts and the order of events follow tools/xenstore: xenstored_core.c for
operations, xenstored_transaction.c for conflicts and xenstored_watch.c for events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import XENSTORE_REL_PATH_MAX
from pvirq.drivers.xenstore.connection import Account, Connection, Watch
from pvirq.drivers.xenstore.database import NO_GENERATION, Database, Quotas, Transaction
from pvirq.drivers.xenstore.node import (
    U32,
    XS_PERM_IGNORE,
    XS_PERM_NONE,
    XS_PERM_OWNER,
    XS_PERM_READ,
    XS_PERM_WRITE,
    Node,
    Perm,
    is_valid_nodename,
    join,
    parent_of,
)

EVERYTHING: Final = XS_PERM_READ | XS_PERM_WRITE | XS_PERM_OWNER
RELEASE_DOMAIN: Final = "@releaseDomain"
INTRODUCE_DOMAIN: Final = "@introduceDomain"


class Store(Database):
    """The tree and all who use it."""

    def __init__(self, domain_exists: Callable[[int], bool] | None = None, quotas: Quotas | None = None) -> None:
        """`domain_exists(domid)` says whether Xen has such a domain, introduced or not; default: always."""
        super().__init__(domain_exists, quotas)
        self.special_perms: dict[str, tuple[Perm, ...]] = {
            name: (Perm(0, XS_PERM_NONE),) for name in (RELEASE_DOMAIN, INTRODUCE_DOMAIN)
        }
        self._watches: dict[str, list[Watch]] = {}  # by path watched
        self._serial = 0

    def next_serial(self) -> int:
        """Numbers that give connections and watches their order."""
        self._serial += 1
        return self._serial

    # Permissions.

    @staticmethod
    def perm_for(conn: Connection, perms: Sequence[Perm]) -> int:
        """What a connection may do under `perms`: XS_PERM_READ, _WRITE, _OWNER (perm_for_conn)."""
        ids = (conn.domid,) if conn.target is None else (conn.domid, conn.target.domid)
        if not conn.unprivileged or perms[0].domid in ids:
            return EVERYTHING
        for perm in perms[1:]:
            if perm.domid in ids and not perm.access & XS_PERM_IGNORE:
                return perm.access & EVERYTHING
        return perms[0].access & EVERYTHING

    def get_node(self, conn: Connection, path: str, need: int) -> Node:
        """A node with `need` permitted; XenError(EINVAL), EACCES, ENOENT (only to whom may know), ENOSPC."""
        node, errno, _ = self._find_permitted(conn, path, need)
        if node is None:
            raise XenError(errno, path)
        return node

    def _find_permitted(self, conn: Connection, path: str, need: int) -> tuple[Node | None, Errno, Node]:
        """The same, with EACCES or ENOENT told instead of raised; and the nearest node above, if it isn't there."""
        if path not in self.nodes and not is_valid_nodename(path, self.quotas.path_max):
            raise XenError(Errno.EINVAL, f"no node name: {path!r}")
        errno = Errno.ENOENT
        node = self.find_node(conn, path)
        if node is not None:
            if not conn.unprivileged or self.perm_for(conn, node.perms) & need == need:
                return node, errno, node
            errno = Errno.EACCES
        # The nearest node above decides whether the asker may learn why.
        above, node = path, None
        while node is None:
            above = above[: above.rfind("/")] or "/"  # parent_of
            node = self.find_node(conn, above)
        if conn.unprivileged and not self.perm_for(conn, node.perms) & need:
            errno = Errno.EACCES
        return None, errno, node

    # Operations of the protocol.

    def read(self, conn: Connection, path: str) -> bytes:
        """XS_READ; `path` may be relative, here and below."""
        return self.get_node(conn, conn.canonicalize(path), XS_PERM_READ).value

    def directory(self, conn: Connection, path: str) -> Node:
        """XS_DIRECTORY, XS_DIRECTORY_PART and XS_GET_PERMS: the node, if readable."""
        return self.get_node(conn, conn.canonicalize(path), XS_PERM_READ)

    def write(self, conn: Connection, path: str, value: bytes) -> None:
        """XS_WRITE: set a value, creating the node and those above it that are missing."""
        path = conn.canonicalize(path)
        parent: Node | None = None
        node, errno, above = self._find_permitted(conn, path, XS_PERM_WRITE)
        if node is None:
            if errno is not Errno.ENOENT:
                raise XenError(errno, path)
            node, parent = self._create(conn, path, value, above)
        else:
            node = self.write_node(conn, Node(path, value, node.children, node.perms, 0))
        self.fire_watches(conn, path, node, parent=parent)

    def mkdir(self, conn: Connection, path: str) -> None:
        """XS_MKDIR: like write of nothing, but an existing node stays as it is."""
        path = conn.canonicalize(path)
        found, errno, above = self._find_permitted(conn, path, XS_PERM_WRITE)
        if found is None:
            if errno is not Errno.ENOENT:
                raise XenError(errno, path)
            node, parent = self._create(conn, path, b"", above)
            self.fire_watches(conn, path, node, parent=parent)

    def _create(self, conn: Connection, path: str, value: bytes, existing: Node) -> tuple[Node, Node]:
        """Make a node and what is missing between `existing` and it; returns it and its parent (create_node)."""
        missing = [path]
        while (above := parent_of(missing[-1])) != existing.path:
            missing.append(above)
        perms, account = existing.perms, conn.account
        if conn.unprivileged and perms[0].domid != conn.domid:  # it owns what it creates
            perms = (Perm(conn.domid, perms[0].access), *perms[1:])
        if conn.current is not None:
            conn.current.node_created = True
        # Bottom up, so that a failure leaves nothing that the tree can reach.
        made: list[Node] = []
        below: tuple[str, ...] = ()
        try:
            for new in missing:
                if conn.unprivileged and account is not None and account.entries >= self.quotas.nodes:
                    raise XenError(Errno.ENOSPC, "too many nodes")
                node = self.write_node(conn, Node(new, value, below, perms, 0))
                made.append(node)
                self.count_entry(conn, node, 1)
                value, below = b"", (new[new.rfind("/") + 1 :],)
            children = existing.children + below
            top = self.write_node(conn, Node(existing.path, existing.value, children, existing.perms, 0))
        except XenError:
            for node in made:
                self._undo_create(conn, node)
            raise
        return made[0], made[1] if len(made) > 1 else top

    def _undo_create(self, conn: Connection, node: Node) -> None:
        if conn.current is not None:
            conn.current.fail = True  # what it has noted can't be taken back, so it must not commit
            self.set_copy(conn.current, node.path, conn.current.accessed[node.path], None)
        else:
            self.delete(node.path)
        self.count_entry(conn, node, -1)

    def rm(self, conn: Connection, path: str) -> None:
        """XS_RM: remove a node and all below it. None there is fine if its parent exists."""
        path = conn.canonicalize(path)
        try:
            self.get_node(conn, path, XS_PERM_WRITE)
        except XenError as error:
            if error.errno is not Errno.ENOENT:
                raise
            self.read_node(conn, parent_of(path))
            return
        if path == "/":
            raise XenError(Errno.EINVAL, "the root stays")
        self.rm_node(conn, path)

    def rm_node(self, conn: Connection | None, path: str) -> None:
        """Remove a subtree without a look at permissions; XenError(EINVAL, EIO, ENOSPC) (rm_node)."""
        try:
            top_parent = self.read_node(conn, parent_of(path))
        except XenError as error:
            raise error if error.errno is Errno.ENOSPC else XenError(Errno.EINVAL, path) from error
        try:
            top = self.read_node(conn, path)
            stack = [(top, iter(top.children))]
            while stack:
                node, children = stack[-1]
                name = next(children, None)
                if name is not None:
                    child = self.read_node(conn, join(node.path, name))
                    stack.append((child, iter(child.children)))
                    continue
                stack.pop()
                self.delete_node(conn, node)
                # Those below fire only watches on themselves: a watch further up gets one event, for the top.
                parent = stack[-1][0] if stack else None
                self.fire_watches(conn, node.path, node, exact=bool(stack), parent=parent)
                self.count_entry(conn, node, -1)
                if stack:
                    self.generation += 1  # xenstored rewrites the parent without this child
        except XenError as error:
            raise XenError(Errno.EIO, error.why) from error
        name = path[path.rfind("/") + 1 :]
        children_left = tuple(child for child in top_parent.children if child != name)
        self.write_node(conn, Node(top_parent.path, top_parent.value, children_left, top_parent.perms, 0), check=False)

    def set_perms(self, conn: Connection, path: str, perms: Sequence[Perm]) -> None:
        """XS_SET_PERMS, for a node or for @introduceDomain and @releaseDomain."""
        if not perms:
            raise XenError(Errno.EINVAL, "no permissions")
        if conn.unprivileged and len(perms) > self.quotas.permissions:
            raise XenError(Errno.ENOSPC, "too many permissions")
        new = tuple(perms)
        for i, (domid, access) in enumerate(new):
            if self.existing_domain(domid) is None:
                new = (*new[:i], Perm(domid, access | XS_PERM_IGNORE), *new[i + 1 :])
        if new[0].access & XS_PERM_IGNORE:
            raise XenError(Errno.ENOENT, f"no domain {new[0].domid}")
        if path.startswith("@"):
            self._set_perms_special(conn, path, new)
            return
        path = conn.canonicalize(path)
        node = self.get_node(conn, path, XS_PERM_WRITE | XS_PERM_OWNER)
        if conn.unprivileged and new[0].domid != node.perms[0].domid:
            raise XenError(Errno.EPERM, "only dom0 gives nodes away")
        if new == node.perms:
            new = node.perms  # one tuple for the many nodes that have it from the one above
        changed = Node(path, node.value, node.children, new, 0)
        self.count_entry(conn, node, -1)
        self.count_entry(conn, changed, 1)
        try:
            changed = self.write_node(conn, changed)
        except XenError:
            self.count_entry(conn, changed, -1)
            self.count_entry(conn, node, 1)
            raise
        self.fire_watches(conn, path, changed, old_perms=node.perms)

    def _set_perms_special(self, conn: Connection, name: str, perms: tuple[Perm, ...]) -> None:
        old = self.special_perms.get(name)
        if old is None:
            raise XenError(Errno.EINVAL, name)
        need = XS_PERM_WRITE | XS_PERM_OWNER
        if self.perm_for(conn, old) & need != need:
            raise XenError(Errno.EACCES, name)
        self.special_perms[name] = perms

    # Transactions.

    def transaction_start(self, conn: Connection) -> Transaction:
        """XS_TRANSACTION_START; XenError(EBUSY) inside another, ENOSPC for too many."""
        if conn.current is not None:
            raise XenError(Errno.EBUSY, "transactions don't nest")
        if conn.unprivileged and len(conn.transactions) > self.quotas.transactions:
            raise XenError(Errno.ENOSPC, "too many transactions")
        self.generation += 1
        while conn.next_transaction_id == 0 or conn.next_transaction_id in conn.transactions:
            conn.next_transaction_id = (conn.next_transaction_id + 1) & U32
        trans = Transaction(conn, conn.next_transaction_id, self.generation)
        conn.next_transaction_id = (conn.next_transaction_id + 1) & U32
        conn.transactions[trans.id] = trans
        return trans

    def transaction_end(self, conn: Connection, commit: bool) -> None:
        """XS_TRANSACTION_END of the current one, which is gone whatever comes of it.

        XenError(EAGAIN): something it read has changed since; ENOMEM: an operation in it failed for want of
        quota; ENOSPC: its new nodes are too many; ENOENT: there is none.
        """
        trans = conn.current
        if trans is None:
            raise XenError(Errno.ENOENT, "no transaction")
        conn.current = None
        del conn.transactions[trans.id]
        try:
            if commit:
                self._commit(conn, trans)
        finally:
            self._drop(trans)

    def _commit(self, conn: Connection, trans: Transaction) -> None:
        if trans.fail:
            raise XenError(Errno.ENOMEM, "an operation in the transaction failed")
        for domid, change in trans.entries.items():
            account = self.existing_domain(domid)
            if account is None:
                raise XenError(Errno.ENOMEM, f"no domain {domid}")
            count = account.entries + change
            if trans.node_created and conn.unprivileged and domid != 0 and count >= self.quotas.nodes:
                raise XenError(Errno.ENOSPC, "too many nodes")
        for path, entry in list(trans.accessed.items()):
            if entry.check:
                node = self.nodes.get(path)
                if entry.generation != (NO_GENERATION if node is None else node.generation):
                    raise XenError(Errno.EAGAIN, path)
            if not entry.modified:
                self.set_copy(trans, path, entry, None)
                del trans.accessed[path]
        for path, entry in trans.accessed.items():
            node = entry.node
            if node is not None:
                # It was changed, so this node is the transaction's own, and becomes the store's.
                self.generation += 1
                node.generation = self.generation
                self.record(node, check=False)
                self.set_copy(trans, path, entry, None)
            elif entry.generation != NO_GENERATION:
                self.delete(path)
            if entry.fire:
                # What was deleted fires only for those whom its old permissions let read it.
                self.fire_watches(conn, path, None, exact=entry.exact, old_perms=entry.perms)
        for domid, change in trans.entries.items():
            self.domains[domid].entries += change

    def _drop(self, trans: Transaction) -> None:
        for path, entry in trans.accessed.items():
            if entry.node is not None:
                self.set_copy(trans, path, entry, None)
        trans.accessed.clear()

    def drop_transactions(self, conn: Connection) -> None:
        """End all of a connection's transactions without effect."""
        for trans in conn.transactions.values():
            self._drop(trans)
        conn.transactions.clear()
        conn.current = None

    # Watches.

    def watch(
        self, conn: Connection, path: str, token: str, callback: Callable[[str, str], None] | None = None
    ) -> Watch:
        """XS_WATCH. The caller sends the first event, `watch.event_path(watch.node)`, once it has replied.

        XenError(EINVAL): no such path; EEXIST: the connection has it; E2BIG: too many; ENOMEM: memory quota.
        """
        relative = not path.startswith(("/", "@"))
        node = conn.canonicalize(path)
        if path.startswith("@"):
            valid = len(path) <= XENSTORE_REL_PATH_MAX
        else:
            valid = is_valid_nodename(node, self.quotas.path_max)
        if not valid:
            raise XenError(Errno.EINVAL, f"nothing to watch: {path!r}")
        if (node, token) in conn.watches:
            raise XenError(Errno.EEXIST, node)
        account = conn.account
        if conn.unprivileged and account is not None and account.watches > self.quotas.watches:
            raise XenError(Errno.E2BIG, "too many watches")
        self.account_memory(conn.domid, len(node) + len(token))
        prefix = conn.implicit_path if relative else ""
        watch = Watch(conn, node, token, prefix, self.next_serial(), callback)
        conn.watches[node, token] = watch
        self._watches.setdefault(node, []).append(watch)
        if account is not None:
            account.watches += 1
        return watch

    def unwatch(self, conn: Connection, path: str, token: str) -> None:
        """XS_UNWATCH; XenError(ENOENT)."""
        watch = conn.watches.get((conn.canonicalize(path), token))
        if watch is None:
            raise XenError(Errno.ENOENT, path)
        self._forget(watch)

    def drop_watches(self, conn: Connection) -> None:
        """Remove all watches of a connection."""
        for watch in list(conn.watches.values()):
            self._forget(watch)

    def _forget(self, watch: Watch) -> None:
        conn = watch.conn
        del conn.watches[watch.node, watch.token]
        same_path = self._watches[watch.node]
        same_path.remove(watch)
        if not same_path:
            del self._watches[watch.node]
        self.account_memory(conn.domid, -len(watch.node) - len(watch.token), check=False)
        if conn.account is not None and conn.account.watches:
            conn.account.watches -= 1

    def fire_watches(
        self,
        conn: Connection | None,
        path: str,
        node: Node | None = None,
        *,
        exact: bool = False,
        old_perms: tuple[Perm, ...] | None = None,
        parent: Node | None = None,
    ) -> None:
        """Send events for a change at `path` to all who watch it or, unless `exact`, a node above it.

        Only those who may read the node or its parent (or could, under `old_perms`) get one. In a transaction
        the event waits for the commit; there, one that isn't exact replaces one that is.
        """
        if conn is not None and conn.current is not None:
            entry = conn.current.accessed.get(path)
            if entry is None:
                conn.current.fail = True
            elif not entry.fire:
                entry.fire, entry.exact = True, exact
            elif not exact:
                entry.exact = False
            return
        watches, above = self._watches, path
        hits = [*watches[path]] if path in watches else []
        while not exact and above != "/":
            above = above[: above.rfind("/")] or "/"  # parent_of
            if above in watches:
                hits += watches[above]
        if not hits:
            return
        # Connection after connection, and within each in the order of registration.
        hits.sort(key=lambda watch: (watch.conn.serial, watch.serial))
        cause = conn.request if conn is not None and conn.unprivileged else None
        permitted: dict[int, bool] = {}
        for watch in hits:
            watcher = watch.conn
            if watcher.serial not in permitted:
                permitted[watcher.serial] = self._may_see(watcher, path, node, old_perms, parent)
            if permitted[watcher.serial]:
                watcher.send_event(watch, watch.event_path(path), cause)

    def _may_see(
        self,
        conn: Connection,
        path: str,
        node: Node | None,
        old_perms: tuple[Perm, ...] | None,
        parent: Node | None,
    ) -> bool:
        """check_perms_special and watch_permitted."""
        if path.startswith("@"):
            special = self.special_perms.get(path)
            return special is not None and bool(self.perm_for(conn, special) & XS_PERM_READ)
        if old_perms is not None and self.perm_for(conn, old_perms) & XS_PERM_READ:
            return True
        try:
            node = node or self.read_node(None, path)
            if self.perm_for(conn, node.perms) & XS_PERM_READ:
                return True
            parent = parent or self.read_node(None, parent_of(path))
        except XenError:
            return False
        return bool(self.perm_for(conn, parent.perms) & XS_PERM_READ)

    # Domains that end.

    def remove_domain(self, account: Account) -> None:
        """Forget a domain: what it owns goes, as do its rights on the special watches (destroy_domain)."""
        domid = account.domid
        stack = ["/"]
        while stack and account.entries > 0:
            path = stack.pop()
            node = self.nodes.get(path)
            if node is None:
                continue
            if node.perms[0].domid == domid and path != "/":
                self.rm_node(None, path)
            else:
                stack += [join(path, name) for name in reversed(node.children)]
        for name, perms in self.special_perms.items():
            owner = Perm(0, perms[0].access) if perms[0].domid == domid else perms[0]
            self.special_perms[name] = (owner, *(perm for perm in perms[1:] if perm.domid != domid))
        del self.domains[domid]

    def check(self) -> list[str]:
        """What is inconsistent in tree and accounts, a line each; nothing, unless there is a bug here."""
        found: list[str] = []
        entries = dict.fromkeys(self.domains, 0)
        reached, stack = set[str](), ["/"]
        while stack:
            path = stack.pop()
            node = self.nodes.get(path)
            if node is None or path in reached or node.path != path:
                found.append(f"{path}: {'not found' if node is None else 'duplicated'}")
                continue
            reached.add(path)
            owner = node.perms[0].domid
            entries[owner] = entries.get(owner, 0) + 1
            stack += [join(path, name) for name in node.children]
        found += [f"{path}: orphaned" for path in self.nodes.keys() - reached]
        found += [
            f"domain {domid}: {count} nodes, not as counted"
            for domid, count in entries.items()
            if domid not in self.domains or self.domains[domid].entries != count
        ]
        return found

"""The daemon: the store, the domains that are introduced to it, and the order in which they are served."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.xenstore.client import Client
from pvirq.drivers.xenstore.connection import Account
from pvirq.drivers.xenstore.database import Quotas
from pvirq.drivers.xenstore.protocol import WireConnection
from pvirq.drivers.xenstore.ring import XenstoreRing
from pvirq.drivers.xenstore.store import INTRODUCE_DOMAIN, RELEASE_DOMAIN, Store
from pvirq.xen.timer import Clock


class DomainState(IntEnum):
    """What Xen says of a domain, as far as xenstored asks (xc_domain_getinfo)."""

    ABSENT = 0
    ALIVE = 1
    SHUTDOWN = 2  # or crashed
    DYING = 3


class Xenstored:
    """xenstored in domain 0.

    Tools and drivers use `client()`, guests the rings that `introduce` sets up. Requests are served and
    events delivered before the call that brought them returns, in order of arrival and never one inside
    another: what a watch callback sets off is served after it.
    """

    def __init__(
        self,
        domain_state: Callable[[int], DomainState] | None = None,
        attach: Callable[[int, int], tuple[memoryview, Callable[[], None]]] | None = None,
        clock: Clock | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        """`domain_state(domid)` asks Xen; default: every domain is alive.

        `attach(domid, port)` finds a domain's ring page and binds its port, for an XS_INTRODUCE that comes
        over a ring; it may raise XenError. With a `clock`, events that a guest leaves unread expire.
        """
        self._domain_state = domain_state or (lambda domid: DomainState.ALIVE)
        self._attach = attach
        self.clock = clock
        self.store = Store(lambda domid: self._domain_state(domid) is not DomainState.ABSENT, quotas)
        self.rings: dict[int, XenstoreRing] = {}
        self._clients: list[Client] = []
        self._ready_rings: dict[XenstoreRing, None] = {}  # ordered sets
        self._ready_clients: dict[Client, None] = {}
        self._serving = False
        # Domain 0's kernel: without a ring, its connection is in-process too.
        dom0 = self.store.domains[0]
        dom0.connection = self.dom0 = Client(self, 0, dom0)
        self._clients.append(self.dom0)

    def client(self, domid: int = 0) -> Client:
        """A connection for code in this process: a tool of domain 0 or, with a `domid`, that domain's kernel.

        XenError(ENOENT) where the domain has not been introduced. It ends with the domain's release.
        """
        account = None
        if domid != 0:
            account = self._introduced(domid)
        client = Client(self, domid, account)
        if account is not None and account.connection is not None:
            client.target = account.connection.target
        self._clients.append(client)
        return client

    def forget_client(self, client: Client) -> None:
        """For Client.close."""
        if client in self._clients:
            self._clients.remove(client)
        self._ready_clients.pop(client, None)

    # Domains.

    def introduce(self, domid: int, page: memoryview, notify: Callable[[], None]) -> XenstoreRing:
        """XS_INTRODUCE: serve a domain's ring; `notify` raises its event channel, whose handler is `service`.

        For a domain that has been introduced already the connection starts over, on this page. A connection
        that is ignored for its errors stays so.
        """
        ring = self._introduce(domid, page, notify)
        self.settle()
        return ring

    def _introduce(self, domid: int, page: memoryview, notify: Callable[[], None]) -> XenstoreRing:
        store = self.store
        account = store.domains.get(domid) or store.alloc_domain(domid)
        ring = self.rings.get(domid)
        if ring is not None:
            ring.bind(page, notify)
        else:
            connection = WireConnection(self, domid, account)
            ring = self.rings[domid] = XenstoreRing(page, connection, notify)
            account.connection = connection
            account.introduced = True
            if domid != 0:
                store.fire_watches(None, INTRODUCE_DOMAIN, exact=True)
        ring.reset()
        return ring

    def introduce_by_port(self, domid: int, port: int) -> None:
        """XS_INTRODUCE from the wire; XenError(EINVAL) if there is nothing to attach rings with."""
        if self._attach is None:
            raise XenError(Errno.EINVAL, "rings are attached by the toolstack")
        page, notify = self._attach(domid, port)
        self._introduce(domid, page, notify)

    def release(self, domid: int) -> None:
        """XS_RELEASE: drop a domain's connection, watches, transactions and nodes, and fire @releaseDomain.

        XenError(EINVAL) for domain 0, ENOENT if it is not introduced.
        """
        if domid == 0:
            raise XenError(Errno.EINVAL, "not domain 0")
        account = self._introduced(domid)
        ring = self.rings.pop(domid, None)
        if ring is not None:
            self._ready_rings.pop(ring, None)
            ring.connection.close()
            ring.unbind()
        for client in [client for client in self._clients if client.domid == domid]:
            client.close()
        self.store.remove_domain(account)
        self.store.fire_watches(None, RELEASE_DOMAIN, exact=True)
        self.settle()

    def resume(self, domid: int) -> None:
        """XS_RESUME: a later shutdown of the domain counts anew; XenError(ENOENT)."""
        self._introduced(domid).shutdown = False

    def set_target(self, domid: int, target: int) -> None:
        """XS_SET_TARGET: `domid` (a device model's) may do what `target` may; XenError(ENOENT, EINVAL)."""
        accounts = [self._introduced(domid), self._introduced(target)]
        connections = [account.connection for account in accounts]
        if None in connections:
            raise XenError(Errno.EINVAL, "no connection")
        for client in [client for client in self._clients if client.domid == domid]:
            client.target = connections[1]
        if connections[0] is not None:
            connections[0].target = connections[1]

    def is_introduced(self, domid: int) -> bool:
        """XS_IS_DOMAIN_INTRODUCED."""
        account = self.store.domains.get(domid)
        return account is not None and account.introduced

    def _introduced(self, domid: int) -> Account:
        account = self.store.domains.get(domid)
        if account is None or not account.introduced:
            raise XenError(Errno.ENOENT, f"domain {domid} is not introduced")
        return account

    def check_domains(self) -> None:
        """VIRQ_DOM_EXC: look which domains have shut down or are going, and fire @releaseDomain for them."""
        notify = False
        for account in reversed(list(self.store.domains.values())):  # xenstored keeps the newest first
            state = self._domain_state(account.domid)
            if account.domid == 0 or account.domid not in self.store.domains:
                continue
            if not account.introduced:
                if state is DomainState.ABSENT:
                    self.store.remove_domain(account)
            elif state in (DomainState.ABSENT, DomainState.DYING):
                self.release(account.domid)
                notify = False  # the release has fired
            elif state is DomainState.SHUTDOWN and not account.shutdown:
                account.shutdown = True
                notify = True
        if notify:
            self.store.fire_watches(None, RELEASE_DOMAIN, exact=True)
        self.settle()

    # Serving.

    def settle(self) -> None:
        """Serve rings and deliver events until nothing is left; in a callback, leave that for after it."""
        if self._serving:
            return
        self._serving = True
        try:
            while self._ready_rings or self._ready_clients:
                if self._ready_rings:
                    ring = next(iter(self._ready_rings))
                    del self._ready_rings[ring]
                    if ring.turn():
                        self._ready_rings[ring] = None
                    else:  # whatever has made it ready meanwhile is done
                        self._ready_rings.pop(ring, None)
                else:
                    client = next(iter(self._ready_clients))
                    del self._ready_clients[client]
                    client.deliver()
        finally:
            self._serving = False

    def ring_ready(self, ring: XenstoreRing) -> None:
        """A ring may have requests, or room for what waits."""
        self._ready_rings[ring] = None

    def client_ready(self, client: Client) -> None:
        """A client has events to deliver."""
        self._ready_clients[client] = None

"""What runs in domain 0's userland: xenstored and xenconsoled, and how a new domain is connected to them.

The order of the steps is xl's and libxl's (xs_introduce_domain, then xenconsoled's own look at the store); it decides
domain 0's ports and IRQ numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from pvirq.abi.grant_table import GNTTAB_RESERVED_CONSOLE, GNTTAB_RESERVED_XENSTORE
from pvirq.abi.xen import VIRQ_DOM_EXC
from pvirq.drivers.console import Console
from pvirq.drivers.xenstore import DomainState, Xenstored
from pvirq.drivers.xs import connect_xenstored
from pvirq.linux.kernel import Kernel
from pvirq.toolstack.domain import DomainInfo, write_dom0, write_domain
from pvirq.xen.domain import Domain, Hypervisor


@dataclass
class Ends:
    """Domain 0's ends of a domain's first two channels (ports)."""

    store: int = 0
    console: int = 0


class Daemons:
    """The two daemons in a modelled domain 0, with an open /dev/xen/evtchn each.

    `store` is the toolstack's own connection to xenstored, `xs` that of domain 0's kernel.
    """

    def __init__(self, hypervisor: Hypervisor, dom0: Kernel[Any]) -> None:
        self._hypervisor = hypervisor
        self.xenstored = Xenstored(domain_state=self._domain_state, clock=hypervisor.clock)
        self.store = self.xenstored.client()
        self.xenstored_events = dom0.evtchn_user("xenstored")
        self.xenconsoled_events = dom0.evtchn_user("xenconsoled")
        self.xenstored_events.bind_virq(VIRQ_DOM_EXC, lambda _port: self.xenstored.check_domains())
        # The ring of domain 0's own kernel, for its backends.
        self.xs = connect_xenstored(dom0, self.xenstored, self.xenstored_events, dom0.events.store_port)
        write_dom0(self.store)

    def _domain_state(self, domid: int) -> DomainState:
        domain = self._hypervisor.domains.get(domid)
        if domain is None:
            return DomainState.ABSENT
        if domain.dying:
            return DomainState.DYING
        return DomainState.ALIVE if domain.shutdown_reason is None else DomainState.SHUTDOWN

    def connect(self, domain: Domain, console: Console, info: DomainInfo) -> Ends:
        """Write a domain's nodes, and bind its rings and ports, which `info` names, to the daemons."""
        grants = domain.grant_table
        assert grants is not None
        grants.set_entry(GNTTAB_RESERVED_CONSOLE, 0, info.console_mfn)
        grants.set_entry(GNTTAB_RESERVED_XENSTORE, 0, info.store_mfn)
        write_domain(self.store, info)
        page, store_events, console_events = domain.machine.page, self.xenstored_events, self.xenconsoled_events
        ends, store_page = Ends(), page(info.store_mfn)
        ring = self.xenstored.introduce(domain.domid, store_page, lambda: None)  # its port isn't known yet
        console.attach(page(info.console_mfn), lambda: console_events.notify(ends.console))
        ends.store = store_events.bind_interdomain(domain.domid, info.store_port, lambda _port: ring.service())
        ring.bind(store_page, partial(store_events.notify, ends.store))
        ends.console = console_events.bind_interdomain(domain.domid, info.console_port, lambda _port: console.service())
        return ends

    def disconnect(self, domain: Domain, ends: Ends) -> None:
        """Take back what the daemons hold of a domain that ends."""
        self.xenconsoled_events.unbind(ends.console)
        self.xenstored_events.unbind(ends.store)
        self.xenstored.release(domain.domid)

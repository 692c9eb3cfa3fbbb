"""A modelled guest: a domain whose kernel is Python, as a program sees it."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from pvirq.drivers.console import Console
from pvirq.linux.kernel import Kernel
from pvirq.linux.personalities import KernelFactory
from pvirq.linux.personality import Personality, StartInfo
from pvirq.toolstack import domain as toolstack
from pvirq.toolstack.daemons import Ends
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain
from pvirq.xen.grant import GrantTable

if TYPE_CHECKING:
    from pvirq.host import Host

MEMORY_KIB: Final = 64 << 10  # what xenstore is told; only the frames in use are really there


class ModelledGuest:
    """One modelled guest of a host. Made by `Host.model`; gone with `Host.destroy` or the host.

    `kernel` is its kernel, `console` the host's end of its console.
    """

    def __init__(self, host: Host, domain: Domain, factory: KernelFactory, name: str) -> None:
        self.host = host
        self.domain = domain
        self.name = name
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, f"pvirq/{name}/{domain.domid}"))
        self.console = Console()
        domain.grant_table = GrantTable(domain)
        dom0, machine = host.dom0.domain, domain.machine
        # In this order, for the guest's ports are 1 and 2.
        store_port = evtchn.alloc_unbound(dom0, domain.domid, 0)
        console_port = evtchn.alloc_unbound(dom0, domain.domid, 0)
        store_mfn, console_mfn = machine.alloc(1, domain.domid), machine.alloc(1, domain.domid)
        start_info = StartInfo(False, store_port, store_mfn, console_port, console_mfn)
        self.kernel: Kernel[Personality] = Kernel(domain, lambda kernel: factory(kernel, start_info=start_info))
        cpus = len(domain.vcpus)
        self._dom0_ports: Ends | None = host.daemons.connect(
            domain,
            self.console,
            toolstack.DomainInfo(
                domain.domid, name, MEMORY_KIB, cpus, cpus, store_port, store_mfn, console_port, console_mfn,
                uuid=self.uuid,
            ),
        )  # fmt: skip

    def boot(self) -> None:
        """Boot the kernel; its drivers go on when the host runs."""
        self.kernel.boot()

    def release(self) -> None:
        """Take back what domain 0 holds of the guest; `Host.destroy` calls this."""
        ends, self._dom0_ports = self._dom0_ports, None
        if ends is not None:
            self.host.daemons.disconnect(self.domain, ends)
        self.console.close()
        toolstack.remove_domain(self.host.store, self.domain.domid, self.uuid)

    def proc_interrupts(self) -> str:
        """The text of its /proc/interrupts."""
        return self.kernel.proc_interrupts()

"""A modelled guest: a domain whose kernel is Python, as a program sees it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from pvirq.abi.errno import Errno, XenError
from pvirq.drivers.blkfront import BlkFront
from pvirq.drivers.console import Console, note_input
from pvirq.drivers.netfront import NetFront, netfront
from pvirq.drivers.xenbus import Driver, Xenbus
from pvirq.drivers.xencons import XenCons
from pvirq.drivers.xs import Xs
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, sleep
from pvirq.linux.personalities import KernelFactory
from pvirq.linux.personality import Personality, StartInfo
from pvirq.toolstack import domain as toolstack
from pvirq.toolstack.config import DomainConfig
from pvirq.toolstack.daemons import Ends
from pvirq.toolstack.devices import vdev_number
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain
from pvirq.xen.grant import GrantTable
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.host import Host

D = TypeVar("D", bound=Driver)

CONNECT_NS: Final = 10 * NS_PER_S  # what isn't connected by then won't be
PROBE_NS: Final = 1_000_000  # how often somebody looks who waits for a device
MEMORY_KIB: Final = 64 << 10  # what xenstore is told; only the frames in use are really there


class ModelledGuest:
    """One modelled guest of a host. Made by `Host.model`; gone with `Host.destroy` or the host.

    `kernel` is its kernel, `console` the host's end of its console, `xencons` the guest's; `xs` is the kernel's
    connection to xenstore, `xenbus` its split drivers: blkfront and netfront are built in.
    """

    def __init__(self, host: Host, domain: Domain, factory: KernelFactory, name: str) -> None:
        self.host = host
        self.domain = domain
        self.name = name
        self.uuid = str(uuid.uuid5(uuid.NAMESPACE_OID, f"pvirq/{name}/{domain.domid}"))
        self.config = DomainConfig(name=name, memory=MEMORY_KIB << 10, vcpus=len(domain.vcpus), uuid=self.uuid)
        domain.label.name = name
        self.console = Console()
        self.console.on_input = partial(note_input, domain)
        domain.grant_table = GrantTable(domain)
        dom0, machine = host.dom0.domain, domain.machine
        # In this order, for the guest's ports are 1 and 2.
        store_port = evtchn.alloc_unbound(dom0, domain.domid, 0)
        console_port = evtchn.alloc_unbound(dom0, domain.domid, 0)
        store_mfn, console_mfn = machine.alloc(1, domain.domid), machine.alloc(1, domain.domid)
        start_info = StartInfo(False, store_port, store_mfn, console_port, console_mfn)
        self.kernel: Kernel[Personality] = Kernel(domain, lambda kernel: factory(kernel, start_info=start_info))
        cpus = len(domain.vcpus)
        self.xs = Xs(self.kernel, machine.page(store_mfn), store_port)
        self.xencons = XenCons(self.kernel, machine.page(console_mfn), console_port)
        self.xenbus = Xenbus(self.kernel, self.xs)
        self._dom0_ports: Ends | None = host.daemons.connect(
            domain,
            self.console,
            toolstack.DomainInfo(
                domain.domid, name, MEMORY_KIB, cpus, cpus, store_port, store_mfn, console_port, console_mfn,
                uuid=self.uuid, start_time=host.wallclock(),
            ),
        )  # fmt: skip

    def boot(self) -> None:
        """Boot the kernel; its drivers go on when the host runs."""
        self.kernel.events.initcall_after(
            "xenbus", "frontends", lambda: self.xenbus.start_frontends({"vbd": BlkFront, "vif": netfront()})
        )
        self.kernel.boot()

    def release(self) -> None:
        """Take back what domain 0 holds of the guest; `Host.destroy` calls this."""
        ends, self._dom0_ports = self._dom0_ports, None
        if ends is not None:
            self.host.daemons.disconnect(self.domain, ends)
        self.console.close()
        toolstack.remove_domain(self.host.store, self.domain.domid, self.uuid)

    def disk(self, vdev: str) -> BlkFront:
        """A disk of its, as "xvda". XenError(ENXIO): it has no such disk (yet)."""
        devid = vdev_number(vdev)
        return self._need(self._device("vbd", devid, BlkFront), "vbd", devid)

    def nic(self, devid: int = 0) -> NetFront:
        """A network interface of its, by number. XenError(ENXIO)."""
        return self._need(self._device("vif", devid, NetFront), "vif", devid)

    def has_nic(self, devid: int) -> bool:
        """There is such an interface, and it is connected."""
        nic = self._device("vif", devid, NetFront)
        return nic is not None and nic.ready.done

    def has_disk(self, vdev: str) -> bool:
        """The same for a disk."""
        disk = self._device("vbd", vdev_number(vdev), BlkFront)
        return disk is not None and disk.ready.done

    def wait_disk(self, vdev: str) -> Body[BlkFront]:
        """Wait in a thread of the guest's until a disk is there and connected; XenError(ETIMEDOUT) after 10 s."""
        yield from self._wait_device(vdev, lambda: self.has_disk(vdev))
        return self.disk(vdev)

    def wait_nic(self, devid: int = 0) -> Body[NetFront]:
        """The same for a network interface."""
        yield from self._wait_device(f"vif {devid}", lambda: self.has_nic(devid))
        return self.nic(devid)

    def _wait_device(self, name: str, is_there: Callable[[], bool]) -> Body[None]:
        end = self.kernel.now() + CONNECT_NS
        while not is_there():
            if self.kernel.now() >= end:
                raise XenError(Errno.ETIMEDOUT, f"{name} of {self.name} doesn't connect")
            yield from sleep(self.kernel, PROBE_NS)

    def _device(self, kind: str, devid: int, driver: type[D]) -> D | None:
        device = self.xenbus.frontends.devices.get(f"device/{kind}/{devid}")
        return device.driver if device is not None and isinstance(device.driver, driver) else None

    def _need(self, driver: D | None, kind: str, devid: int) -> D:
        if driver is None:
            raise XenError(Errno.ENXIO, f"{self.name} has no {kind} {devid}")
        return driver

    def proc_interrupts(self) -> str:
        """The text of its /proc/interrupts."""
        return self.kernel.proc_interrupts()

"""A host of modelled domains for driver tests: domain 0 with xenstored, guests, and a loop that runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pvirq.drivers.blkback import blkback
from pvirq.drivers.blkfront import BlkFront
from pvirq.drivers.blockstore import BlockDevices
from pvirq.drivers.bridge import Network
from pvirq.drivers.console import Console
from pvirq.drivers.netback import netback
from pvirq.drivers.netfront import NetFront
from pvirq.drivers.xenbus import Xenbus
from pvirq.drivers.xencons import XenCons
from pvirq.drivers.xenstore import Xenstored
from pvirq.drivers.xs import Xs, connect_xenstored
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, Completion, Kthread
from pvirq.linux.personality import Personality, StartInfo
from pvirq.linux.pvops import Pvops
from pvirq.toolstack import domain as toolstack
from pvirq.toolstack.devices import DeviceManager
from pvirq.xen import evtchn
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine


class OneQueue(Pvops):
    """A kernel whose drivers are as before multiple queues and late EOI, for what that changes in the drivers."""

    multi_queue = False


class Guest:
    """A modelled domain with xenstore and console rings, as a toolstack builds one."""

    def __init__(self, host: Host, vcpus: int, personality: Callable[..., Personality]) -> None:
        self.host = host
        dom0 = host.dom0.domain
        self.domain = host.hypervisor.create_domain(vcpus=vcpus)
        domid, machine = self.domain.domid, host.machine
        store_port = evtchn.alloc_unbound(self.domain, domid, 0)
        console_port = evtchn.alloc_unbound(self.domain, domid, 0)
        store_mfn, console_mfn = machine.alloc(1, domid), machine.alloc(1, domid)
        info = StartInfo(False, store_port, store_mfn, console_port, console_mfn)
        self.uuid = f"00000000-0000-0000-0000-{domid:012}"
        toolstack.write_domain(
            host.store,
            toolstack.DomainInfo(
                domid, f"guest{domid}", 131072, vcpus, vcpus, store_port, store_mfn, console_port, console_mfn,
                uuid=self.uuid,
            ),
        )  # fmt: skip
        events = host.xenstored_events
        self._ends = [0, 0]
        ring = host.xenstored.introduce(domid, machine.page(store_mfn), lambda: events.notify(self._ends[0]))
        self.console = Console()
        self.console.attach(machine.page(console_mfn), lambda: host.xenconsoled_events.notify(self._ends[1]))
        self._ends[0] = events.bind_interdomain(domid, store_port, lambda _port: ring.service())
        self._ends[1] = host.xenconsoled_events.bind_interdomain(
            domid, console_port, lambda _port: self.console.service()
        )
        assert dom0 is not self.domain
        self.kernel: Kernel[Any] = Kernel(self.domain, partial(personality, start_info=info))
        self.kernel.boot()
        self.xs = Xs(self.kernel, machine.page(store_mfn), store_port)
        self.xencons = XenCons(self.kernel, machine.page(console_mfn), console_port)
        self.xenbus = Xenbus(self.kernel, self.xs)

    def destroy(self) -> None:
        """What `xl destroy` does, as far as devices see it."""
        events = self.host.xenstored_events
        self.host.manager.detach_all(self.domain.domid)
        events.unbind(self._ends[0])
        self.host.xenconsoled_events.unbind(self._ends[1])
        self.host.xenstored.release(self.domain.domid)
        toolstack.remove_domain(self.host.store, self.domain.domid, self.uuid)
        self.host.hypervisor.destroy_domain(self.domain)
        self.host.guests.remove(self)


class Host:
    """Domain 0, its daemons, and guests. `run` and `do` run all of them until they sleep."""

    def __init__(self, *, dom0: Callable[..., Personality] = Pvops, dom0_vcpus: int = 2, memory: int = 1 << 30) -> None:
        self.machine = Machine(memory)
        self.hypervisor = Hypervisor(self.machine)
        self.clock = self.hypervisor.clock
        domain = self.hypervisor.create_domain(0, privileged=True, vcpus=dom0_vcpus)
        self.dom0: Kernel[Any] = Kernel(domain, dom0)
        self.dom0.boot()
        self.xenstored = Xenstored(clock=self.clock)
        self.store = self.xenstored.client()
        self.xenstored_events = self.dom0.evtchn_user("xenstored")
        self.xenconsoled_events = self.dom0.evtchn_user("xenconsoled")
        toolstack.write_dom0(self.store)
        port: int = self.dom0.events.store_port
        self.xs = connect_xenstored(self.dom0, self.xenstored, self.xenstored_events, port)
        self.xenbus = Xenbus(self.dom0, self.xs)
        self.devices = BlockDevices()
        self.network = Network(self.dom0.now)
        self.network.add_bridge("xenbr0")
        self.manager = DeviceManager(self.store, self.devices, self.network)
        self.guests: list[Guest] = []

    def guest(self, vcpus: int = 1, personality: Callable[..., Personality] = Pvops) -> Guest:
        guest = Guest(self, vcpus, personality)
        self.guests.append(guest)
        return guest

    def run(self, until: Callable[[], bool] | None = None) -> None:
        """Give every vCPU with an event its turn until all sleep, or `until()`."""
        while until is None or not until():
            ran = False
            for kernel in (self.dom0, *(guest.kernel for guest in self.guests)):
                for vcpu in kernel.domain.vcpus:
                    if vcpu.runnable:
                        kernel.run(vcpu)
                        ran = True
            if not ran:
                return

    def pass_time(self, ns: int) -> None:
        """Let virtual time pass, stopping at each timer."""
        end = self.clock.now() + ns
        self.run()
        while (deadline := self.clock.next_deadline()) is not None and deadline <= end:
            self.clock.jump_to(deadline)
            self.clock.fire_due()
            self.run()
        self.clock.jump_to(end)

    def finish(self, done: Completion[Any]) -> Any:
        """Run until it is done and return its result; timers fire as they must."""
        self.run(lambda: done.done)
        while not done.done:
            deadline = self.clock.next_deadline()
            assert deadline is not None, "everybody sleeps"
            self.clock.jump_to(deadline)
            self.clock.fire_due()
            self.run(lambda: done.done)
        return done.result()

    def do(self, kernel: Kernel[Any], body: Body[Any]) -> Any:
        """Run a body in a thread of `kernel`'s to its end."""
        return self.finish(Kthread(kernel, "test", body))

    def start_frontends(self, guest: Guest) -> None:
        """Let a guest's drivers find its devices, and connect them."""
        self.finish(guest.xenbus.start_frontends({"vbd": BlkFront, "vif": NetFront}))
        self.run()

    def start_backends(self) -> None:
        self.finish(self.xenbus.start_backends({"vbd": blkback(self.devices), "vif": netback(self.network)}))
        self.run()

    def close(self) -> None:
        self.machine.close()


def disk_of(guest: Guest, devid: int = 51712) -> BlkFront:
    driver = guest.xenbus.frontends.devices[f"device/vbd/{devid}"].driver
    assert isinstance(driver, BlkFront)
    return driver


def nic_of(guest: Guest, devid: int = 0) -> NetFront:
    driver = guest.xenbus.frontends.devices[f"device/vif/{devid}"].driver
    assert isinstance(driver, NetFront)
    return driver


def row(kernel: Kernel[Any], name: str) -> int:
    """The sum of the counts of all lines whose row in /proc/interrupts ends in `name`."""
    return sum(
        sum(desc.kstat) for desc in kernel.irq.descs.values() if any(action.name == name for action in desc.actions)
    )

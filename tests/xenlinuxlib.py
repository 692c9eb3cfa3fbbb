"""A XenLinux kernel and somebody who notifies it, for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pvirq.abi.xen import DOMID_SELF, SHARED_INFO_EVTCHN_PENDING, VCPU_INFO_PENDING_SEL, VCPU_INFO_UPCALL_PENDING
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.xenlinux import XenLinux
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import Machine


class Setup:
    """A host with a bare domain `peer` and the kernel `kernel`, booted, of domain `domid` (0: the initial one)."""

    def __init__(
        self, personality: Callable[[Kernel[Any]], XenLinux], *, vcpus: int = 1, domid: int = 1, word_bits: int = 64
    ) -> None:
        self.machine = Machine(1 << 26)
        self.hypervisor = Hypervisor(self.machine)
        if domid:
            self.peer = self.hypervisor.create_domain(0, privileged=True)
        self.domain = self.hypervisor.create_domain(domid, privileged=not domid, vcpus=vcpus, word_bits=word_bits)
        if not domid:
            self.peer = self.hypervisor.create_domain(7)
        self.kernel: Kernel[Any] = Kernel(self.domain, personality)
        self.events: Any = self.kernel.events
        self.irqs: Any = self.kernel.irq
        self.kernel.boot()
        self.handled: list[int] = []  # ports, in the order of service
        self.peer_ports: dict[int, int] = {}  # by the kernel's port
        self.run()

    def close(self) -> None:
        self.machine.close()

    def run(self) -> None:
        """Until every vCPU blocks."""
        vcpus = self.domain.vcpus
        while ready := [vcpu for vcpu in vcpus if vcpu.runnable]:
            for vcpu in ready:
                self.kernel.run(vcpu)

    def handler(self, what: Callable[[int], object] = lambda port: None) -> Callable[[int, object], IrqReturn]:
        """One that notes its port, and then does `what` with it."""

        def handle(irq: int, dev_id: object) -> IrqReturn:
            port = self.events.evtchn_from_irq(irq)
            self.handled.append(port)
            what(port)
            return IRQ_HANDLED

        return handle

    def device(self, name: str = "device", what: Callable[[int], object] = lambda port: None) -> int:
        """A channel between the kernel and the peer, with an IRQ of the kernel's; the kernel's port."""
        irq = self.events.bind_listening(self.peer.domid, self.handler(what), name, object())
        port: int = self.events.evtchn_from_irq(irq)
        self.peer_ports[port] = evtchn.bind_interdomain(self.peer, self.domain.domid, port)
        return port

    def devices(self, count: int) -> list[int]:
        return [self.device(f"device{i}") for i in range(count)]

    def send(self, *ports: int) -> None:
        """The peer notifies ports of the kernel."""
        for port in ports:
            evtchn.send(self.peer, self.peer_ports[port])

    def took(self) -> list[int]:
        handled, self.handled = self.handled, []
        return handled

    def counts(self, irq: int) -> list[int]:
        return list(self.irqs.descs[irq].kstat)


def unbound(domain: Domain, remote: int) -> int:
    """A port of `domain` that `remote` may bind to."""
    return evtchn.alloc_unbound(domain, DOMID_SELF, remote)


def start_info(domain: Domain) -> StartInfo:
    """A guest's, with fresh ports for xenstore and console."""
    return StartInfo(False, unbound(domain, 0), 0, unbound(domain, 0), 0)


def resumed(it: Setup) -> StartInfo:
    """The domain has new event channels, as after save and restore."""
    evtchn.reset(it.domain, DOMID_SELF)
    for vcpu in it.domain.vcpus:
        it.machine.mem[vcpu.info + VCPU_INFO_UPCALL_PENDING] = 0
        it.machine.u64[(vcpu.info + VCPU_INFO_PENDING_SEL) // 8] = 0
    start = it.domain.shared_info + SHARED_INFO_EVTCHN_PENDING
    it.machine.mem[start : start + 512] = bytes(512)
    return start_info(it.domain)

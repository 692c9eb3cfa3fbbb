"""Modelled Linux kernels for tests: running them, and the domain 0 that the recordings in tests/data are of."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pvirq.abi.xen import (
    DOMID_SELF,
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
)
from pvirq.linux.events_2l import Events2l
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.pvops import Pvops
from pvirq.xen import evtchn
from pvirq.xen.msi import PciDevice

DATA = Path(__file__).parent / "data" / "linux-2vcpu"


def run(*kernels: Kernel[Pvops]) -> None:
    """Give every vCPU with an event its turn, until all sleep."""
    while True:
        ready = [(kernel, vcpu) for kernel in kernels for vcpu in kernel.domain.vcpus if vcpu.runnable]
        if not ready:
            return
        for kernel, vcpu in ready:
            kernel.run(vcpu)


def sleep_until(when: int, *kernels: Kernel[Pvops]) -> None:
    """Let virtual time pass, stopping at each timer."""
    clock = kernels[0].clock
    run(*kernels)
    while (deadline := clock.next_deadline()) is not None and deadline <= when:
        clock.jump_to(deadline)
        clock.fire_due()
        run(*kernels)
    clock.jump_to(when)


def counts(kernel: Kernel[Pvops], irq: int) -> list[int]:
    return kernel.irq.descs[irq].kstat


def ignore(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


class RecordedDom0(Pvops):
    """The domain 0 of the recordings, whose drivers of hardware take their lines in the real one's order."""

    def __init__(self, kernel: Kernel[Pvops], *, virtio: bool = True) -> None:
        """Without `virtio` it has no disks."""
        super().__init__(kernel)
        self.initcall_after("xen-pcpu", "acpi", partial(self.line, 9, "acpi", level=True))
        for gsi in (1, 12):
            self.initcall_after("hvc_console", f"i8042-{gsi}", partial(self.line, gsi, "i8042"))
        self.virtio: list[PciDevice] = []
        if virtio:
            self.initcall_after("hvc_open", "virtio", self.virtio_disks)
        self.initcall_after("hvc_open", "rtc0", partial(self.line, 8, "rtc0"))

    def line(self, gsi: int, name: str, *, level: bool = False) -> None:
        irq = self.register_gsi(gsi, level=level, active_low=False)
        self.irq.request_irq(irq, ignore, 0, name, self)

    def virtio_disks(self) -> None:
        for disk in (0, 1):
            device = PciDevice(self.domain.hypervisor, (4 + disk) << 3, vectors=3, msix=True)
            self.virtio.append(device)
            for irq, name in zip(self.enable_msi(device, 3, msix=True), ("config", "req.0", "req.1"), strict=True):
                self.irq.request_irq(irq, ignore, 0, f"virtio{disk}-{name}", device)


def renewed(kernel: Kernel[Pvops]) -> StartInfo:
    """What the toolstack does to a domain that is saved and restored: no channels, fresh bits, two new ports."""
    domain = kernel.domain
    domain.paused = True
    evtchn.reset(domain.hypervisor.domains[0], domain.domid)
    domain.paused = False
    mem, shared = domain.machine.mem, domain.shared_info
    mem[shared + SHARED_INFO_EVTCHN_PENDING : shared + SHARED_INFO_EVTCHN_PENDING + 512] = bytes(512)
    mem[shared + SHARED_INFO_EVTCHN_MASK : shared + SHARED_INFO_EVTCHN_MASK + 512] = b"\xff" * 512
    for vcpu in domain.vcpus:
        mem[vcpu.info] = 0
        mem[vcpu.info + VCPU_INFO_PENDING_SEL : vcpu.info + VCPU_INFO_PENDING_SEL + 8] = bytes(8)
    store, console = (evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(2))
    return StartInfo(store_port=store, console_port=console)


def maps_are_inverse(kernel: Kernel[Pvops]) -> None:
    """Ports and IRQs name each other; Xen notifies the CPU that Linux thinks; the counts of channels are right."""
    events = kernel.events
    ports = {irq: port for irq in kernel.irq.descs if (port := events.evtchn_from_irq(irq))}
    assert {port: info.irq for port, info in events._evtchn_to_irq.items()} == {p: irq for irq, p in ports.items()}
    on_cpu = [0] * kernel.irq.nr_cpus
    for port in ports.values():
        on_cpu[events.cpu_from_evtchn(port)] += 1
        assert evtchn.status(kernel.domain, DOMID_SELF, port).vcpu == events.cpu_from_evtchn(port)
    assert events._channels_on_cpu == on_cpu
    if isinstance(events.ops, Events2l):
        assert [sum(word.bit_count() for word in words) for words in events.ops._cpu_mask] == on_cpu

"""XenLinux 2.6.18: the classic guest, and its domain 0 (drivers/xen/core/evtchn.c of linux-2.6.18-xen.hg in late 2008).

Of that file it is the revision with evtchn_register_pirq, before the one that changed the upcall's order once more.

IRQ numbers 0 to 255 are physical, 256 to 511 dynamic. Each CPU has IRQs of its own for the timer and the two IPIs. All
lines go through __do_IRQ.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Literal

from pvirq.abi.xen import NR_VIRQS, VIRQ_CONSOLE, VIRQ_TIMER
from pvirq.linux.irq import IrqHandler
from pvirq.linux.irq26 import IRQF_DISABLED, IrqChip26, IrqDesc26
from pvirq.linux.irq2618 import IrqLayer2618
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.proc26 import Arch, Style, interrupts_2618
from pvirq.linux.xenlinux_pirq import XenLinuxPirq
from pvirq.linux.xenlinux_ports import IRQT_IPI, IRQT_VIRQ, NR_DYNIRQS, dynirq_chip
from pvirq.xen import evtchn

HZ: Final = 100
NR_PIRQS: Final = 256
DYNIRQ_BASE: Final = NR_PIRQS
NR_IRQS: Final = NR_PIRQS + NR_DYNIRQS

RESCHEDULE_VECTOR: Final = 0
CALL_FUNCTION_VECTOR: Final = 1
NR_IPIS: Final = 2
# Later kernels' IPIs by what this one has: a function call interrupt also runs irq_work.
_VECTOR: Final = {
    Ipi.RESCHEDULE: RESCHEDULE_VECTOR,
    Ipi.CALL_FUNCTION: CALL_FUNCTION_VECTOR,
    Ipi.CALL_FUNCTION_SINGLE: CALL_FUNCTION_VECTOR,
    Ipi.SPIN_UNLOCK: RESCHEDULE_VECTOR,
    Ipi.IRQ_WORK: CALL_FUNCTION_VECTOR,
}


class XenLinux2618(XenLinuxPirq):
    """The personality of a XenLinux 2.6.18 kernel."""

    version = (2, 6, 18)
    irq: IrqLayer2618
    type_shift: ClassVar[int] = 24
    index_shift: ClassVar[int] = 16

    def __init__(
        self,
        kernel: Kernel[Any],
        *,
        start_info: StartInfo | None = None,
        upcall: Literal["lowest-first", "round-robin", "snapshot"] = "round-robin",
        timer_first: bool = False,
        arch: Arch = "i386",
        style: Style = "source",
    ) -> None:
        """Without `start_info` it is the initial domain as the domain is privileged, and nobody gave it any ports.

        `timer_first`: a further CPU binds its timer before its IPIs, as some listings have it. `arch` and `style` are
        of /proc/interrupts.
        """
        irq = IrqLayer2618(
            len(kernel.domain.vcpus),
            NR_IRQS,
            cpu=lambda: kernel.cpu,
            jiffies=kernel.jiffies,
            hz=HZ,
            printk=kernel.printk,
            after=kernel.set_timer_jiffies,
        )
        super().__init__(kernel, irq, hz=HZ, nr_pirqs=NR_PIRQS, start_info=start_info, upcall=upcall)
        self.timer_first = timer_first
        self.arch = arch
        self.style = style
        self.ipi_to_irq = [[-1] * NR_IPIS for _ in range(self.nr_cpus)]
        self._ipi_handlers = (
            ("resched", self._reschedule_interrupt),
            ("callfunc", self._call_function_interrupt),
        )
        self.dynirq_type = dynirq_chip(self, "Dynamic-irq")
        self.pirq_chip = self._pirq_type()
        irq.init_desc = self._init_desc
        self.initcalls = [("xenbus", self.init_xenbus), ("xencons", self._init_xencons)]

    def _pirq_type(self) -> IrqChip26:
        return IrqChip26(
            "Phys-irq",
            startup=self.startup_pirq,
            shutdown=self.shutdown_pirq,
            enable=self.enable_pirq,
            ack=self.make_ack(),
            end=self.end_pirq,
            set_affinity=self.set_affinity_irq,
            retrigger=self.resend_irq_on_evtchn,
        )

    def _init_desc(self, desc: IrqDesc26) -> None:
        """What xen_init_IRQ does for one line."""
        if desc.irq >= DYNIRQ_BASE:
            desc.chip = self.dynirq_type
        elif self.is_legacy_line(desc.irq):
            desc.chip = self.pirq_chip

    def init_irq(self) -> None:
        self.init_evtchn_cpu_bindings()
        self.mask_all()

    def _wanted_pirq(self) -> int:
        """Its own number, as a packed binding has room for no higher one than 255."""
        return self.find_free_pirq()

    def setup_pirq_line(self, irq: int) -> None:
        self.irq.desc(irq).chip = self.pirq_chip

    def clear_pirq_line(self, irq: int) -> None:
        self.irq.desc(irq).chip = self.irq.no_irq_chip

    # CPUs (time-xen.c, drivers/xen/core/smpboot.c).

    def _boot_cpu(self) -> None:
        self._local_setup_timer(0)
        self._smp_intr_init(0)
        if self.initial:
            self.setup_io_apic()

    def _local_setup_timer(self, cpu: int) -> None:
        self.bind_virq_to_irqhandler(VIRQ_TIMER, cpu, self._timer_interrupt, IRQF_DISABLED, f"timer{cpu}")

    def _smp_intr_init(self, cpu: int) -> None:
        for ipi, (name, handler) in enumerate(self._ipi_handlers):
            self.bind_ipi_to_irqhandler(ipi, cpu, handler, IRQF_DISABLED, f"{name}{cpu}")

    def cpu_up(self, cpu: int) -> None:
        if self.timer_first:
            self._local_setup_timer(cpu)
        self._smp_intr_init(cpu)
        if not self.timer_first:
            self._local_setup_timer(cpu)
        self.irq.online |= 1 << cpu
        vcpu = self.domain.vcpus[cpu]
        vcpu.up, vcpu.blocked = True, False

    def cpu_down(self, cpu: int) -> None:
        """__cpu_disable, __cpu_die: lines move, what is the CPU's own is unbound."""
        self.irq.online &= ~(1 << cpu)
        self._fixup_irqs()
        self.unbind_from_irqhandler(self.virq_to_irq[cpu][VIRQ_TIMER])
        for ipi in range(NR_IPIS):
            self.unbind_from_irqhandler(self.ipi_to_irq[cpu][ipi])

    def _fixup_irqs(self) -> None:
        """Every line that can move goes to an online CPU of its mask, or to any."""
        online = self.irq.online
        for desc in list(self.irq.descs.values()):
            if desc.irq != 2 and desc.chip.set_affinity is not None:
                desc.chip.set_affinity(desc, desc.affinity & online or online)

    def bind_ipi_to_irq(self, ipi: int, cpu: int) -> int:
        """The IRQ of an IPI to a CPU. XenError, IrqError(ENOSPC)."""
        irq = self.ipi_to_irq[cpu][ipi]
        if irq == -1:
            irq = self._find_dynirq()
            port = evtchn.bind_ipi(self.domain, cpu)
            self._bound(irq, IRQT_IPI, ipi, port)
            self.ipi_to_irq[cpu][ipi] = irq
            self.bind_evtchn_to_cpu(port, cpu)
        self.irq_bindcount[irq] += 1
        return irq

    def bind_ipi_to_irqhandler(
        self, ipi: int, cpu: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None
    ) -> int:
        return self._request(self.bind_ipi_to_irq(ipi, cpu), handler, flags, name, dev_id)

    def _ipi_unbound(self, irq: int, port: int) -> None:
        self.ipi_to_irq[self.cpu_evtchn[port]][self.index_from_irq(irq)] = -1

    def send_ipi(self, cpu: int, ipi: Ipi) -> None:
        self.notify_remote_via_irq(self.ipi_to_irq[cpu][_VECTOR[ipi]])

    # The console (drivers/xen/console).

    def _init_xencons(self) -> None:
        self.init_xencons_ring()
        if self.initial:
            self.console_irq = self.bind_virq_to_irqhandler(VIRQ_CONSOLE, 0, self._console_interrupt, 0, "console")

    # Resume (irq_resume, and what xenbus and console do then).

    def irq_resume(self) -> None:
        """The domain runs on with new event channels: bind all CPUs' VIRQs and IPIs again, forget all other ports.

        No pirq may be bound.
        """
        assert not any(info & self.evtchn_mask for info in self.irq_info[:NR_PIRQS]), "a pirq is still bound"
        self.init_evtchn_cpu_bindings()
        self.mask_all()
        for irq in range(NR_IRQS):
            self.set_irq_info(irq, self.irq_info[irq] & ~self.evtchn_mask)
        self.evtchn_to_irq.clear()
        for cpu in range(self.nr_cpus):
            for virq in range(NR_VIRQS):
                irq = self.virq_to_irq[cpu][virq]
                if irq != -1:
                    self._rebound(irq, IRQT_VIRQ, virq, evtchn.bind_virq(self.domain, virq, cpu), cpu)
            for ipi in range(NR_IPIS):
                irq = self.ipi_to_irq[cpu][ipi]
                if irq != -1:
                    self._rebound(irq, IRQT_IPI, ipi, evtchn.bind_ipi(self.domain, cpu), cpu)

    def _rebound(self, irq: int, kind: int, index: int, port: int, cpu: int) -> None:
        self._bound(irq, kind, index, port)
        self.bind_evtchn_to_cpu(port, cpu)
        self.unmask_evtchn(port)

    def resume(self, start_info: StartInfo) -> None:
        """After save and restore: event channels, xenbus, console. Drivers connect again by themselves."""
        self.start_info = start_info
        self.store_port, self.console_port = start_info.store_port, start_info.console_port
        self.irq_resume()
        self.init_xenbus()
        self.init_xencons_ring()
        self.kernel.resume_timers()

    # What userland sees.

    def interrupts(self) -> str:
        return interrupts_2618(self.irq, self._stat, arch=self.arch, style=self.style)

"""XenLinux as SUSE carried it to 2.6.27 to 2.6.34 (drivers/xen/core/evtchn.c, smpboot.c, spinlock.c of its kernels).

The timer and each IPI have one IRQ for all CPUs, behind which each CPU has a port of its own. Dynamic lines are either
such ("percpu") or plain ("level"); physical ones are all "level", whatever their trigger. Dynamic numbers follow the
physical ones, of which there are as many as this machine can need (arch_probe_nr_irqs).
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Final, Literal

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import EVTCHNSTAT_virq
from pvirq.abi.xen import DOMID_SELF, PAGE_SHIFT, VIRQ_CONSOLE, VIRQ_MCA, VIRQ_TIMER
from pvirq.linux.irq import IRQ_HANDLED, IRQF_TIMER_BIT, IrqAction, IrqError, IrqHandler, IrqReturn
from pvirq.linux.irq26 import IRQ_TYPE_PROBE, IRQF_DISABLED, IrqChip26, IrqDesc26
from pvirq.linux.irq2632 import IrqLayer2632, Status2632
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.proc26 import Style, interrupts_suse
from pvirq.linux.proc_irq import ProcIrq
from pvirq.linux.xenlinux_percpu import XenLinuxPercpu
from pvirq.linux.xenlinux_ports import NR_DYNIRQS
from pvirq.xen import evtchn, physdev

HZ: Final = 250
NR_PIRQS: Final = 256 + 32 * 128  # NR_VECTORS + 32 * MAX_IO_APICS
NR_GSIS: Final = 24  # of domain 0's I/O APIC
NR_GSIS_LEGACY: Final = 16

RESCHEDULE_VECTOR: Final = 0
CALL_FUNCTION_VECTOR: Final = 1
CALL_FUNC_SINGLE_VECTOR: Final = 2
REBOOT_VECTOR: Final = 3
SPIN_UNLOCK_VECTOR: Final = 4
NR_IPIS: Final = 5
# Other kernels' IPIs by what this one has: a function call interrupt also runs irq_work.
_VECTOR: Final = {
    Ipi.RESCHEDULE: RESCHEDULE_VECTOR,
    Ipi.CALL_FUNCTION: CALL_FUNCTION_VECTOR,
    Ipi.CALL_FUNCTION_SINGLE: CALL_FUNC_SINGLE_VECTOR,
    Ipi.SPIN_UNLOCK: SPIN_UNLOCK_VECTOR,
    Ipi.IRQ_WORK: CALL_FUNC_SINGLE_VECTOR,
}


def nr_pirqs(gsis: int, cpus: int) -> int:
    """How many physical IRQ numbers there are: `gsis` of inputs, and room for messages (arch_probe_nr_irqs)."""
    return min(gsis + 8 * cpus + 16 * gsis, NR_PIRQS)


class XenLinuxSuse(XenLinuxPercpu):
    """The personality of a SUSE kernel for Xen."""

    version = (2, 6, 32)
    proc_irq: ClassVar[ProcIrq] = ProcIrq(("smp_affinity", "spurious"))
    type_shift: ClassVar[int] = 28
    index_shift: ClassVar[int] = 12

    def __init__(
        self,
        kernel: Kernel[Any],
        *,
        start_info: StartInfo | None = None,
        upcall: Literal["lowest-first", "round-robin", "snapshot"] = "snapshot",
        style: Style = "source",
    ) -> None:
        """Without `start_info` it is the initial domain as the domain is privileged, and nobody gave it any ports.

        `style` is of /proc/interrupts.
        """
        initial = start_info.initial if start_info else kernel.domain.privileged
        nr_cpus = len(kernel.domain.vcpus)
        gsis = NR_GSIS if initial else NR_GSIS_LEGACY
        pirqs = nr_pirqs(gsis, nr_cpus)
        kernel.printk(f"nr_irqs_gsi={gsis} nr_pirqs={pirqs}")
        irq = IrqLayer2632(
            nr_cpus,
            pirqs + NR_DYNIRQS,
            cpu=lambda: kernel.cpu,
            jiffies=kernel.jiffies,
            hz=HZ,
            printk=kernel.printk,
            after=kernel.set_timer_jiffies,
        )
        super().__init__(kernel, irq, hz=HZ, nr_pirqs=pirqs, start_info=start_info, upcall=upcall, nr_ipis=NR_IPIS)
        self.style = style
        self._ipi_handlers: tuple[tuple[str, IrqHandler], ...] = (
            ("resched", self._reschedule_interrupt),
            ("callfunc", self._call_function_interrupt),
            ("call1func", self._call_function_interrupt),
            ("reboot", self._ignore_interrupt),
            ("spinlock", self._ignore_interrupt),
        )
        self._timer_action = IrqAction(self._timer_interrupt, IRQF_DISABLED | IRQF_TIMER_BIT, "timer", None)
        self._eoi_map = 0  # where in memory Xen keeps a bit for each pirq that wants an EOI; 0: nowhere
        self._probing_pirqs: set[int] = set()
        self.pirq_chip = self._make_pirq_chip()
        irq.init_desc = self._init_desc
        if self.initial:
            self.initcalls = [("mce", self._init_mce), ("console", self._init_console), ("xenbus", self.init_xenbus)]
        else:
            self.initcalls = [("xenbus", self.init_xenbus), ("xencons", self.init_xencons_ring)]

    # Chips.

    def _make_pirq_chip(self) -> IrqChip26:
        """Without a function to disable it, so that a disabled line is masked by its next interrupt only."""
        ack = self.make_ack()
        return IrqChip26(
            "Phys",
            startup=self.startup_pirq,
            shutdown=self.shutdown_pirq,
            enable=self.enable_pirq,
            ack=ack,
            mask_ack=ack,
            unmask=self.enable_pirq,
            end=self.end_pirq,
            set_affinity=self.set_affinity_irq,
            retrigger=self.resend_irq_on_evtchn,
            set_type=self._set_type_pirq,
        )

    def _init_desc(self, desc: IrqDesc26) -> None:
        """What xen_init_IRQ does for one of the first 16 lines; others get their chips when they are bound."""
        if self.is_legacy_line(desc.irq):
            self._set_line(desc, self.pirq_chip)

    def setup_pirq_line(self, irq: int) -> None:
        self._set_line(self.irq.irq_to_desc_alloc(irq), self.pirq_chip)

    def clear_pirq_line(self, irq: int) -> None:
        desc = self.irq.desc(irq)
        desc.chip, desc.flow, desc.name = self.irq.no_irq_chip, self.irq.handle_bad_irq, None

    def _set_type_pirq(self, desc: IrqDesc26, kind: int) -> None:
        """A trigger type is Xen's to set (EINVAL); that the line is being probed is worth to know."""
        if kind != IRQ_TYPE_PROBE:
            raise IrqError(Errno.EINVAL, f"type {kind} of a physical IRQ")
        self._probing_pirqs.add(desc.irq)

    def _probing(self, desc: IrqDesc26) -> bool:
        return desc.irq in self._probing_pirqs or bool(desc.status & Status2632.AUTODETECT)

    def startup_pirq(self, desc: IrqDesc26) -> int:
        super().startup_pirq(desc)
        self._probing_pirqs.discard(desc.irq)
        return 0

    # EOIs: where Xen keeps the map, its EOI unmasks the port as well.

    def init_irq(self) -> None:
        self.init_evtchn_cpu_bindings()
        machine = self.domain.machine
        mfn = machine.alloc(1, self.domain.domid)
        try:
            physdev.pirq_eoi_gmfn(self.domain, mfn, 1)
        except XenError:
            machine.free(mfn)
        else:
            self._eoi_map = mfn << PAGE_SHIFT
        self.mask_all()

    @property
    def pirq_eoi_does_unmask(self) -> bool:
        return bool(self._eoi_map)

    def pirq_query_unmask(self, irq: int, pirq: int) -> None:
        if not self._eoi_map:
            super().pirq_query_unmask(irq, pirq)

    def pirq_unmask_and_notify(self, port: int, irq: int) -> None:
        if not self._eoi_map:
            super().pirq_unmask_and_notify(port, irq)
            return
        pirq = self.evtchn_get_xen_pirq(irq)
        if self.mem[self._eoi_map + (pirq >> 3)] >> (pirq & 7) & 1:
            self._pirq_eoi(irq)
        else:
            self.unmask_evtchn(port)

    # CPUs (time-xen.c, smpboot.c, spinlock.c).

    def _boot_cpu(self) -> None:
        self._local_setup_timer(0)
        self._smp_intr_init(0)
        if self.initial:
            self.setup_io_apic()
        self._mcheck_init(0)

    def _local_setup_timer(self, cpu: int) -> None:
        self.bind_virq_to_irqaction(VIRQ_TIMER, cpu, self._timer_action)

    def _smp_intr_init(self, cpu: int) -> None:
        for ipi, (name, handler) in enumerate(self._ipi_handlers):
            fresh = self.ipi_to_irq[ipi] == -1
            irq = self.bind_ipi_to_irqaction(ipi, cpu, IrqAction(handler, IRQF_DISABLED, name, None))
            if fresh and ipi == SPIN_UNLOCK_VECTOR:
                self.irq.disable_irq(irq)  # polled for, never delivered

    def _mcheck_init(self, cpu: int) -> None:
        if self.initial:
            self._stat[cpu].mce_poll += 1  # each CPU polls its banks once as it comes up

    def cpu_up(self, cpu: int) -> None:
        self._smp_intr_init(cpu)
        self._local_setup_timer(cpu)
        self.irq.online |= 1 << cpu
        vcpu = self.domain.vcpus[cpu]
        vcpu.up, vcpu.blocked = True, False
        self._mcheck_init(cpu)

    def cpu_down(self, cpu: int) -> None:
        self.irq.online &= ~(1 << cpu)
        self._fixup_irqs()
        self.unbind_from_per_cpu_irq(self.virq_to_irq[cpu][VIRQ_TIMER], cpu, self._timer_action)
        for irq in self.ipi_to_irq:
            self.unbind_from_per_cpu_irq(irq, cpu)

    def _fixup_irqs(self) -> None:
        """Move each line in use that may notify a CPU that is offline."""
        online = self.irq.online
        for desc in list(self.irq.descs.values()):
            if not desc.actions or desc.status & Status2632.PER_CPU or not desc.affinity & ~online:
                continue
            if desc.chip.mask is not None:
                desc.chip.mask(desc)
            if desc.chip.set_affinity is not None:
                desc.chip.set_affinity(desc, desc.affinity & online or online)
            # The kernel opens disabled lines too here, which loses their next event.
            if desc.chip.unmask is not None and not desc.status & Status2632.DISABLED:
                desc.chip.unmask(desc)

    def send_ipi(self, cpu: int, ipi: Ipi) -> None:
        self.notify_remote_via_ipi(_VECTOR[ipi], cpu)

    def poll_spinlock(self, cpu: int) -> bool:
        """A CPU that waits for a lock polls its port: has the lock's holder notified it? Each time counts."""
        irq = self.ipi_to_irq[SPIN_UNLOCK_VECTOR]
        port = self.percpu_evtchn[irq][cpu]
        if not port or not self.test_evtchn(port):
            return False
        self.clear_evtchn(port)
        self.irq.desc(irq).kstat[cpu] += 1
        return True

    def _ignore_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        return IRQ_HANDLED

    # Drivers.

    def _init_mce(self) -> None:
        self.bind_virq_to_irqhandler(VIRQ_MCA, 0, self._ignore_interrupt, 0, "mce")

    def _init_console(self) -> None:
        self.console_irq = self.bind_virq_to_irqhandler(VIRQ_CONSOLE, 0, self._console_interrupt, 0, "console")

    # Resume.

    def evtchn_resume(self) -> bool:
        """The domain runs on, perhaps with new event channels: then bind VIRQs and IPIs again, forget all other ports.

        False: its old ones are still there, as the suspend was cancelled. No pirq may be bound.
        """
        timer = self.percpu_evtchn[self.virq_to_irq[0][VIRQ_TIMER]][0]
        with contextlib.suppress(XenError):
            status = evtchn.status(self.domain, DOMID_SELF, timer)
            if status.status == EVTCHNSTAT_virq and status.vcpu == 0 and status.virq == VIRQ_TIMER:
                return False
        assert not any(info & self.evtchn_mask for info in self.irq_info[: self.nr_pirqs]), "a pirq is still bound"
        self.init_evtchn_cpu_bindings()
        if self._eoi_map:
            with contextlib.suppress(XenError):  # the hypervisor kept it
                physdev.pirq_eoi_gmfn(self.domain, self._eoi_map >> PAGE_SHIFT, 1)
        self.mask_all()
        for irq in range(self.nr_irqs):
            if irq not in self.percpu_evtchn:
                self.set_irq_info(irq, self.irq_info[irq] & ~self.evtchn_mask)
        self.evtchn_to_irq.clear()
        for cpu in range(self.nr_cpus):
            self._restore_cpu_virqs(cpu)
            self._restore_cpu_ipis(cpu)
        return True

    def resume(self, start_info: StartInfo) -> None:
        """After save and restore: event channels, xenbus, console. Drivers connect again by themselves."""
        self.start_info = start_info
        self.store_port, self.console_port = start_info.store_port, start_info.console_port
        if self.evtchn_resume():
            self.init_xenbus()
            self.init_xencons_ring()
        self.kernel.resume_timers()

    # What userland sees.

    def interrupts(self) -> str:
        return interrupts_suse(self.irq, self._stat, mce=True, style=self.style)

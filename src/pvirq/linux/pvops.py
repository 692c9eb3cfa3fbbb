"""Linux 6.1 pvops: how that kernel boots its interrupts, in domain 0 or another PV domain.

The event channels themselves are in `events_base`. Here is what binds them: arch/x86/xen's timer, IPIs and
spinlocks, the drivers of xenbus, console, machine checks and physical CPUs, in the real kernel's order; for
that order decides ports, IRQ numbers and CPUs. Hardware goes into `initcalls` where the real kernel has it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import EVTCHN_FIFO_PRIORITY_MAX
from pvirq.abi.xen import DOMID_SELF, VIRQ_CONSOLE, VIRQ_DEBUG, VIRQ_MCA, VIRQ_PCPU_STATE, VIRQ_TIMER
from pvirq.linux.events_base import EVENT_LOOP_TIMEOUT
from pvirq.linux.events_info import XenbusDevice
from pvirq.linux.events_lateeoi import EVENT_EOI_DELAY
from pvirq.linux.events_pirq import NR_IRQS_LEGACY, EventsPirq
from pvirq.linux.evtchn_dev import EvtchnUser
from pvirq.linux.irq import (
    IRQ_HANDLED,
    IRQF_EARLY_RESUME,
    IRQF_FORCE_RESUME,
    IRQF_NOBALANCING,
    IRQF_PERCPU,
    IRQF_TIMER,
    IrqError,
    IrqHandler,
    IrqLayer,
    IrqReturn,
)
from pvirq.linux.irq_pm import resume_irqs, suspend_device_irqs
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, Personality, StartInfo
from pvirq.linux.proc import IrqStat, header, irq_rows, x86_rows
from pvirq.xen import evtchn
from pvirq.xen.domain import Hypervisor
from pvirq.xen.ioapic import LEVEL_ISA_IRQS

HZ: Final = 250  # Debian's
NR_GSIS: Final = 24  # of domain 0's I/O APIC; its dynamic IRQs start after them
# The ISA lines that the firmware knows (number -> level-triggered): all but 0, whose GSI is 2.
ISA_LINES: Final[Mapping[int, bool]] = {irq: irq in LEVEL_ISA_IRQS for irq in range(1, NR_IRQS_LEGACY)}


class Pvops(EventsPirq, Personality):
    """The personality of a Linux 6.1 pvops kernel, in domain 0 or another domain."""

    hz = HZ
    version = (6, 1, 0)
    multi_queue = True

    def __init__(
        self,
        kernel: Kernel[Pvops],
        *,
        fifo: bool = True,
        start_info: StartInfo | None = None,
        mce: bool | None = None,
        isa_lines: Mapping[int, bool] = ISA_LINES,
        event_loop_timeout: int = EVENT_LOOP_TIMEOUT,
        event_eoi_delay: int = EVENT_EOI_DELAY,
    ) -> None:
        """`fifo` False: xen.fifo_events=0 on the command line, the two-level ABI.

        Without `start_info` it is the initial domain as the domain is privileged, and nobody gave it any ports.
        `mce`: has it machine-check code (None: the initial domain has)? `isa_lines` are what the initial domain's
        firmware says of them. The last two are parameters of the kernel, xen.event_*, in jiffies.
        """
        domain = kernel.domain
        self.start_info = start_info or StartInfo(initial=domain.privileged)
        self.initial = self.start_info.initial
        self.mce = self.initial if mce is None else mce
        self.fifo = fifo
        self.store_port = self.start_info.store_port
        self.console_port = self.start_info.console_port
        self.nr_cpus = len(domain.vcpus)
        gsi_top = NR_GSIS if self.initial else 0
        nr_irqs = gsi_top + NR_IRQS_LEGACY + 8 * self.nr_cpus  # arch_probe_nr_irqs
        nr_irqs += 16 * gsi_top if gsi_top > NR_IRQS_LEGACY else 8 * self.nr_cpus
        irq = IrqLayer(
            self.nr_cpus,
            cpu=lambda: kernel.cpu,
            jiffies=kernel.jiffies,
            hz=HZ,
            printk=kernel.printk,
            after=kernel.set_timer_jiffies,
            dynirq_base=gsi_top,
            nr_irqs=min(nr_irqs, 256 * self.nr_cpus),
        )
        super().__init__(kernel, irq, event_loop_timeout=event_loop_timeout, event_eoi_delay=event_eoi_delay)
        self._isa_lines = isa_lines
        self._stat = [IrqStat() for _ in range(self.nr_cpus)]
        self._percpu_irqs: list[list[int]] = [[] for _ in range(self.nr_cpus)]
        # The drivers that bind channels at boot, in order. Hardware puts its own between: see
        # `initcall_after`.
        self.initcalls: list[tuple[str, Callable[[], object]]] = [
            ("xenbus", self._init_xenbus),
            *([("xen-pcpu", self._init_pcpu), ("mce", self._init_mce)] if self.initial else []),
            ("hvc_console", self._init_hvc),
            ("hvc_open", self._open_hvc),
        ]
        # Reactions of the kernel's own drivers, in process context; set by whoever models them.
        self.on_xenbus: Callable[[], object] = lambda: None
        self.on_console: Callable[[], object] = lambda: None
        self.xenbus_irq = 0
        self.console_irq = 0

    # Boot (xen_init_IRQ, arch/x86/xen/{time,smp,smp_pv,spinlock}.c).

    def boot(self) -> None:
        vcpu = self.domain.vcpus[0]
        vcpu.up, vcpu.blocked = True, False
        self.irq.online = 1
        self.irq.proc_ready = False
        self.fifo = self.init_irq(self.fifo)
        self.init_pirqs(self._isa_lines)
        self._setup_timer(0)
        self._init_lock_cpu(0)
        self._smp_intr_init(0)
        self._mcheck_cpu_init(0)
        for cpu in range(1, self.nr_cpus):
            self.cpu_up(cpu)
        self.irq.proc_ready = True  # init_irq_proc
        for _, call in self.initcalls:
            call()

    def cpu_up(self, cpu: int) -> None:
        """Bring a CPU online: control block, per-CPU IRQs in the real kernel's order, the vCPU itself."""
        self.ops.percpu_init(cpu)
        self._setup_timer(cpu)
        self._smp_intr_init(cpu)
        self._init_lock_cpu(cpu)
        vcpu = self.domain.vcpus[cpu]
        vcpu.up, vcpu.blocked = True, False
        self.irq.online |= 1 << cpu
        self._mcheck_cpu_init(cpu)

    def cpu_down(self, cpu: int) -> None:
        """Take a CPU offline: dynamic IRQs move, its own are unbound."""
        self.irq.online &= ~(1 << cpu)
        self.irq.migrate_off(cpu)
        irqs, self._percpu_irqs[cpu] = self._percpu_irqs[cpu], []
        for irq in irqs:
            self.unbind_from_irqhandler(irq)
        self.cpu_dead(cpu)

    # Suspend and resume (drivers/xen/manage.c).

    def suspend(self) -> None:
        """The domain is about to be saved: no device interrupts any more. IrqError(ENODEV): domain 0 stays."""
        if self.initial:
            raise IrqError(Errno.ENODEV, "the initial domain can't be suspended")
        suspend_device_irqs(self.irq)

    def resume(self, start_info: StartInfo) -> None:
        """It goes on, as what is another domain to Xen: its channels are gone, its pages are the same.

        VIRQs and IPIs are bound again, the console and xenbus take the ports that the toolstack has given it now.
        The other drivers' IRQs have no port; they connect anew. XenError where Xen refuses a channel.
        """
        self.start_info = start_info
        self.irq_resume()
        resume_irqs(self.irq, early=True)
        self.console_port = start_info.console_port
        if self.console_irq:
            self.rebind_evtchn_irq(self.console_port, self.console_irq)
        resume_irqs(self.irq, early=False)
        self.kernel.resume_timers()
        self.store_port = start_info.store_port
        if self.xenbus_irq:
            self.rebind_evtchn_irq(self.store_port, self.xenbus_irq)

    def _setup_timer(self, cpu: int) -> None:
        flags = IRQF_PERCPU | IRQF_NOBALANCING | IRQF_TIMER | IRQF_FORCE_RESUME | IRQF_EARLY_RESUME
        irq = self.bind_virq_to_irqhandler(VIRQ_TIMER, cpu, self._timer_interrupt, flags, f"timer{cpu}")
        self._percpu_irqs[cpu].append(irq)
        with contextlib.suppress(XenError):  # the two-level ABI has no priorities
            evtchn.set_priority(self.domain, self.evtchn_from_irq(irq), EVTCHN_FIFO_PRIORITY_MAX)

    def _bind_ipi(self, ipi: Ipi, cpu: int, name: str, handler: Callable[[], None]) -> int:
        def interrupt(irq: int, dev_id: object) -> IrqReturn:
            handler()
            return IRQ_HANDLED

        irq = self.bind_ipi_to_irqhandler(ipi, cpu, interrupt, IRQF_PERCPU | IRQF_NOBALANCING, f"{name}{cpu}")
        self._percpu_irqs[cpu].append(irq)
        return irq

    def _init_lock_cpu(self, cpu: int) -> None:
        """The IPI that wakes a waiter for a spinlock: polled for, never delivered; one CPU needs none."""
        if self.nr_cpus > 1:
            self.irq.disable_irq(self._bind_ipi(Ipi.SPIN_UNLOCK, cpu, "spinlock", lambda: None))

    def poll_spinlock(self, cpu: int) -> bool:
        """xen_qlock_wait, after xen_poll_irq."""
        desc = self.irq.descs.get(self._ipi_to_irq[cpu][Ipi.SPIN_UNLOCK])
        port = self.evtchn_from_irq(desc.irq) if desc else 0
        if desc is None or not port or not self.ops.is_pending(port):
            return False
        self.ops.clear_pending(port)
        desc.kstat[cpu] += 1
        return True

    def _smp_intr_init(self, cpu: int) -> None:
        self._bind_ipi(Ipi.RESCHEDULE, cpu, "resched", self._reschedule_interrupt)
        self._bind_ipi(Ipi.CALL_FUNCTION, cpu, "callfunc", self._call_function_interrupt)
        if not self.fifo:
            flags = IRQF_PERCPU | IRQF_NOBALANCING
            irq = self.bind_virq_to_irqhandler(VIRQ_DEBUG, cpu, self._debug_interrupt, flags, f"debug{cpu}")
            self._percpu_irqs[cpu].append(irq)
        self._bind_ipi(Ipi.CALL_FUNCTION_SINGLE, cpu, "callfuncsingle", self._call_function_interrupt)
        self._bind_ipi(Ipi.IRQ_WORK, cpu, "irqwork", self._irq_work_interrupt)

    def _mcheck_cpu_init(self, cpu: int) -> None:
        if self.mce:
            self._stat[cpu].mce_poll += 1  # each CPU polls its banks once as it comes up

    def _init_xenbus(self) -> None:
        """Domain 0's kernel makes the port that its xenstored will bind to; others are given theirs."""
        if not self.store_port:
            if not self.initial:
                return
            self.store_port = evtchn.alloc_unbound(self.domain, DOMID_SELF, DOMID_SELF)
        self.xenbus_irq = self.bind_evtchn_to_irqhandler(
            self.store_port, self._xenbus_interrupt, 0, "xenbus", dev_id=self
        )

    def _init_pcpu(self) -> None:
        self.bind_virq_to_irqhandler(VIRQ_PCPU_STATE, 0, self._ignore_interrupt, 0, "xen-pcpu")

    def _init_mce(self) -> None:
        self.bind_virq_to_irqhandler(VIRQ_MCA, 0, self._ignore_interrupt, 0, "mce")

    def _init_hvc(self) -> None:
        if self.initial:
            self.console_irq = self.bind_virq_to_irq(VIRQ_CONSOLE, 0, False)
        elif self.console_port:
            self.console_irq = self.bind_evtchn_to_irq_lateeoi(self.console_port)

    def _open_hvc(self) -> None:
        """The console's IRQ starts when init opens it, after the devices: that decides its CPU."""
        if self.console_irq:
            self.irq.request_irq(self.console_irq, self._console_interrupt, 0, "hvc_console", self)

    # Handlers.

    def _timer_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.run_timers()
        return IRQ_HANDLED

    def _reschedule_interrupt(self) -> None:
        self._stat[self.kernel.cpu].resched += 1

    def _call_function_interrupt(self) -> None:
        self._stat[self.kernel.cpu].call += 1
        self.kernel.run_calls()

    def _irq_work_interrupt(self) -> None:
        self._stat[self.kernel.cpu].apic_irq_work += 1
        self.kernel.run_irq_work()

    def _debug_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        vcpu = self.domain.vcpus[self.kernel.cpu]
        pending = [port for port in range(self.ops.nr_channels) if self.ops.is_pending(port)]
        self.kernel.printk(f"vcpu {vcpu.vcpu_id}: pending list: {pending}")
        return IRQ_HANDLED

    def _ignore_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        return IRQ_HANDLED

    def _xenbus_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.queue_work(self.on_xenbus)
        return IRQ_HANDLED

    def _console_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.queue_work(self._console_work)
        return IRQ_HANDLED

    def _console_work(self) -> None:
        self.on_console()
        if not self.initial:
            self.xen_irq_lateeoi(self.console_irq)

    # For drivers.

    def bind_listening(self, remote_domid: int, handler: IrqHandler, name: str, dev_id: object) -> int:
        port = evtchn.alloc_unbound(self.domain, DOMID_SELF, remote_domid)  # xenbus_alloc_evtchn
        return self.bind_evtchn_to_irqhandler_lateeoi(port, handler, 0, name, dev_id=dev_id)

    def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: IrqHandler, name: str, dev_id: object
    ) -> int:
        device = XenbusDevice(remote_domid)
        return self.bind_interdomain_evtchn_to_irqhandler_lateeoi(device, remote_port, handler, 0, name, dev_id=dev_id)

    def unbind(self, irq: int, dev_id: object) -> None:
        self.unbind_from_irqhandler(irq, dev_id)

    def eoi(self, irq: int, spurious: bool = False) -> None:
        desc = self.irq.descs.get(irq)
        if desc is not None and desc.chip_data is not None:
            self.lateeoi.eoi(desc.chip_data, spurious)

    # What userland sees.

    @property
    def irq_stat(self) -> list[IrqStat]:
        return self._stat

    def evtchn_user(self, name: str) -> EvtchnUser:
        """Open /dev/xen/evtchn for a process `name`."""
        return EvtchnUser(self, name)

    def interrupts(self) -> str:
        """The text of /proc/interrupts."""
        return header(self.irq) + irq_rows(self.irq) + x86_rows(self.irq, self._stat, mce=self.mce)


def dom0(hypervisor: Hypervisor, vcpus: int = 2, *, fifo: bool = True) -> Kernel[Pvops]:
    """Create and boot the modelled domain 0: Linux 6.1 without hardware.

    XenError(EEXIST) where there is one.
    """
    kernel = Kernel(hypervisor.create_domain(0, privileged=True, vcpus=vcpus), partial(Pvops, fifo=fifo))
    kernel.boot()
    return kernel

"""Event channels as IRQs in XenLinux, the kernels before pvops (drivers/xen/core/evtchn.c): what its revisions share.

From linux-2.6.18-xen.hg and SUSE's port of it to later kernels. Here is what binds ports to IRQs and what boots; the
ports themselves are in `xenlinux_ports`, physical IRQs, whose numbers come first, in `xenlinux_pirq`. An IRQ is free
while its `irq_bindcount` is zero. A port without an IRQ belongs to the evtchn device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, NR_VIRQS, VCPU_INFO_UPCALL_PENDING
from pvirq.linux.irq import IRQ_HANDLED, IrqAction, IrqError, IrqHandler, IrqReturn
from pvirq.linux.irq26 import IRQF_SAMPLE_RANDOM, IrqLayer26
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.proc import IrqStat
from pvirq.linux.xenlinux_evtchn import XenLinuxEvtchnUser
from pvirq.linux.xenlinux_ports import IRQT_CALLER_PORT, IRQT_IPI, IRQT_LOCAL_PORT, IRQT_VIRQ, XenLinuxPorts
from pvirq.linux.xenlinux_upcall import UPCALLS, UpcallState, Ways
from pvirq.xen import evtchn
from pvirq.xen.probes import Once, Tell, keep, put_last

# As whose interrupt instruments see the event of a port that has none.
_DEVICE: Final = (IrqAction(lambda irq, dev_id: IRQ_HANDLED, 0, "evtchn", None),)


class XenLinux(XenLinuxPorts):
    """The event channels of one XenLinux kernel, as IRQs. `upcall` is the revision of its loop (`xenlinux_upcall`)."""

    def __init__(
        self,
        kernel: Kernel[Any],
        irq: IrqLayer26,
        *,
        hz: int,
        dynirq_base: int,
        start_info: StartInfo | None,
        upcall: str,
    ) -> None:
        super().__init__(kernel, irq, dynirq_base=dynirq_base)
        self.hz = hz
        self.start_info = start_info or StartInfo(initial=self.domain.privileged)
        self.initial = self.start_info.initial
        self.store_port = self.start_info.store_port
        self.console_port = self.start_info.console_port
        self.irq_bindcount = [0] * self.nr_irqs
        self.virq_to_irq = [[-1] * NR_VIRQS for _ in range(self.nr_cpus)]
        self.port_user: dict[int, XenLinuxEvtchnUser] = {}
        self._warned = False
        self.upcall_state = [UpcallState() for _ in range(self.nr_cpus)]
        self._upcall_at = UPCALLS[upcall](self)
        self._upcalls = [self._upcall_at(cpu, state) for cpu, state in enumerate(self.upcall_state)]
        self._stat = [IrqStat() for _ in range(self.nr_cpus)]
        self.initcalls: list[tuple[str, Callable[[], object]]] = []
        self.on_xenbus: Callable[[], object] = lambda: None
        self.on_console: Callable[[], object] = lambda: None
        self.xenbus_irq = 0
        self.console_irq = 0

    # Binding. XenError as the EVTCHNOP_* gives it; IrqError(ENOSPC) without a free IRQ.

    def find_unbound_irq(self) -> int:
        """The first dynamic IRQ that nothing is bound to; the first time that there is none, a warning."""
        try:
            return self.irq_bindcount.index(0, self.dynirq_base, self.nr_irqs)
        except ValueError:
            if not self._warned:
                self._warned = True
                self.kernel.printk("No available IRQ to bind to: increase NR_DYNIRQS.")
            raise IrqError(Errno.ENOSPC, "no dynamic IRQ is free") from None

    def _find_dynirq(self, percpu: bool = False) -> int:
        """`find_unbound_irq`, and its line ready to be requested."""
        irq = self.find_unbound_irq()
        self.irq.desc(irq)
        return irq

    def _bound(self, irq: int, kind: int, index: int, port: int) -> None:
        self.set_irq_info(irq, self.mk_irq_info(kind, index, port))
        self.evtchn_to_irq[port] = irq

    def bind_caller_port_to_irq(self, port: int) -> int:
        """An IRQ for a port that somebody else made, and will close. EINVAL for no port that there can be."""
        if not 0 < port < self.nr_channels:
            raise IrqError(Errno.EINVAL, f"port {port}")
        irq = self.evtchn_to_irq.get(port)
        if irq is None:
            irq = self._find_dynirq()
            self._bound(irq, IRQT_CALLER_PORT, 0, port)
        self.irq_bindcount[irq] += 1
        return irq

    def bind_local_port_to_irq(self, port: int) -> int:
        """An IRQ for a port just made; it is closed where there is no IRQ, and at unbind."""
        try:
            irq = self._find_dynirq()
        except IrqError:
            evtchn.close(self.domain, port)
            raise
        self._bound(irq, IRQT_LOCAL_PORT, 0, port)
        self.irq_bindcount[irq] += 1
        return irq

    def bind_listening_port_to_irq(self, remote_domid: int) -> int:
        return self.bind_local_port_to_irq(evtchn.alloc_unbound(self.domain, DOMID_SELF, remote_domid))

    def bind_interdomain_evtchn_to_irq(self, remote_domid: int, remote_port: int) -> int:
        return self.bind_local_port_to_irq(evtchn.bind_interdomain(self.domain, remote_domid, remote_port))

    def bind_virq_to_irq(self, virq: int, cpu: int) -> int:
        irq = self.virq_to_irq[cpu][virq]
        if irq == -1:
            irq = self._find_dynirq()
            port = evtchn.bind_virq(self.domain, virq, cpu)
            self._bound(irq, IRQT_VIRQ, virq, port)
            self.virq_to_irq[cpu][virq] = irq
            self._virq_bound(virq, port)
            self.bind_evtchn_to_cpu(port, cpu)
        self.irq_bindcount[irq] += 1
        return irq

    def _virq_bound(self, virq: int, port: int) -> None:
        """A revision may keep the ports of VIRQs."""

    def unbind_from_irq(self, irq: int) -> None:
        """One user less of a dynamic IRQ; the last one's going closes the port and zeroes the counts.

        EINVAL where nothing is bound.
        """
        if not self.dynirq_base <= irq < self.nr_irqs or not self.irq_bindcount[irq]:
            raise IrqError(Errno.EINVAL, f"nothing is bound to IRQ {irq}")
        port = self.evtchn_from_irq(irq)
        self.irq_bindcount[irq] -= 1
        if self.irq_bindcount[irq] or not port:
            return
        kind = self.type_from_irq(irq)
        if kind != IRQT_CALLER_PORT:
            self._close(port)
        if kind == IRQT_VIRQ:
            virq = self.index_from_irq(irq)
            for virqs in self.virq_to_irq:  # a global one may notify another CPU by now
                if virqs[virq] == irq:
                    virqs[virq] = -1
            self._virq_bound(virq, 0)
        elif kind == IRQT_IPI:
            self._ipi_unbound(irq, port)
        self.bind_evtchn_to_cpu(port, 0)  # closed ports are vCPU 0's again
        del self.evtchn_to_irq[port]
        self.set_irq_info(irq, 0)
        desc = self.irq.desc(irq)
        desc.kstat[:] = [0] * self.nr_cpus

    def _ipi_unbound(self, irq: int, port: int) -> None:
        """A revision with IPIs of one CPU each forgets one."""

    # The same with a handler; on failure nothing stays bound.

    def _request(self, irq: int, handler: IrqHandler, flags: int, name: str, dev_id: object) -> int:
        try:
            self.irq.request_irq(irq, handler, flags, name, dev_id)
        except IrqError:
            self.unbind_from_irq(irq)
            raise
        return irq

    def bind_caller_port_to_irqhandler(
        self, port: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None
    ) -> int:
        return self._request(self.bind_caller_port_to_irq(port), handler, flags, name, dev_id)

    def bind_listening_port_to_irqhandler(
        self, remote_domid: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None
    ) -> int:
        return self._request(self.bind_listening_port_to_irq(remote_domid), handler, flags, name, dev_id)

    def bind_interdomain_evtchn_to_irqhandler(
        self, remote_domid: int, remote_port: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None
    ) -> int:
        irq = self.bind_interdomain_evtchn_to_irq(remote_domid, remote_port)
        return self._request(irq, handler, flags, name, dev_id)

    def bind_virq_to_irqhandler(
        self, virq: int, cpu: int, handler: IrqHandler, flags: int, name: str, dev_id: object = None
    ) -> int:
        return self._request(self.bind_virq_to_irq(virq, cpu), handler, flags, name, dev_id)

    def unbind_from_irqhandler(self, irq: int, dev_id: object = None) -> None:
        self.irq.free_irq(irq, dev_id)
        self.unbind_from_irq(irq)

    # Sending and receiving.

    def notify_remote_via_irq(self, irq: int) -> None:
        port = self.irq_info[irq] & self.evtchn_mask if 0 <= irq < self.nr_irqs else 0
        if port:
            try:  # noqa: SIM105 - `suppress` costs as much as a third of the send
                evtchn.send(self.domain, port)
            except XenError:
                pass

    def upcall(self, cpu: int) -> None:
        self._upcalls[cpu]()

    def upcall_entry(self, cpu: int) -> Callable[[], None]:
        state = self.upcall_state[cpu]
        kept = state.l1i, state.l2i
        upcall = self._upcalls[cpu] = self._upcall_at(cpu, state)  # anew: instruments may be in its way now, or gone
        state.l1i, state.l2i = kept
        return upcall

    def ways(self, cpu: int) -> Ways:
        """What an upcall calls for a port at a CPU, with what wants to be told of interrupts in between."""
        find, do_irq, device = self.evtchn_to_irq.get, self.irq.entry(cpu), self.evtchn_device_upcall
        probes = self.domain.hypervisor.probes
        if probes.on_irq_entry is None and probes.on_irq_exit is None:
            return find, do_irq, device
        vcpu, descs, disabled = self.domain.vcpus[cpu], self.irq.descs, self.irq.bits.DISABLED
        said: dict[int, tuple[int, int, object, Tell, Any, Tell, Any]] = {}  # what was told last
        kept: dict[Any, Once] = {}

        def ends(port: int, irq: int) -> tuple[Once, Once]:
            desc = descs.get(irq)
            status, actions = (desc.status & disabled, desc.actions) if desc is not None else (0, ())
            begin = "irq_entry", vcpu, port, irq, () if status else actions
            end = "irq_exit", vcpu, port, irq
            entry, leave = (keep(kept, record, partial(probes.fixed, *record)) for record in (begin, end))
            if desc is not None:
                put_last(said, port, (irq, status, actions, *entry, *leave))
            return entry, leave

        def told(port: int) -> None:
            irq = find(port)
            if irq is None:
                tell, what = probes.fixed("irq_entry", vcpu, port, -1, _DEVICE)
                tell(what)
                device(port)
                tell, what = probes.fixed("irq_exit", vcpu, port, -1)
                tell(what)
                return
            try:
                desc = descs[irq]
                of, status, actions, tell, entry, tell_exit, leave = said[port]
                if of != irq or status != desc.status & disabled or actions is not desc.actions:
                    raise KeyError
            except KeyError:
                (tell, entry), (tell_exit, leave) = ends(port, irq)
            tell(entry)
            try:
                do_irq(irq)
            finally:
                tell_exit(leave)

        nothing: dict[int, int] = {}
        return nothing.get, do_irq, told  # each port has one way, so that no call is only to remember which it was

    def force_evtchn_callback(self) -> None:
        """Events have come while they were masked: take them now, as a hypercall's return does in the kernel."""
        cpu = self.kernel.cpu
        if self.mem[self.domain.vcpus[cpu].info + VCPU_INFO_UPCALL_PENDING]:
            self._upcalls[cpu]()

    def evtchn_device_upcall(self, port: int) -> None:
        """A port without an IRQ: for the process that has bound it, else masked for good."""
        self.mask_evtchn(port)
        self.clear_evtchn(port)
        user = self.port_user.get(port)
        if user is not None:
            user.arrived(port)

    def evtchn_user(self, name: str) -> XenLinuxEvtchnUser:
        return XenLinuxEvtchnUser(self, name)

    # Boot.

    def boot(self) -> None:
        vcpu = self.domain.vcpus[0]
        vcpu.up, vcpu.blocked = True, False
        self.irq.online = 1
        self.init_irq()
        self._boot_cpu()
        for cpu in range(1, self.nr_cpus):
            self.cpu_up(cpu)
        for _, call in self.initcalls:
            call()

    @abstractmethod
    def init_irq(self) -> None:
        """xen_init_IRQ"""

    @abstractmethod
    def _boot_cpu(self) -> None:
        """CPU 0's timer and IPIs."""

    def init_xenbus(self) -> None:
        """Domain 0's kernel makes the port that its xenstored will bind to; others are given theirs (xb_init_comms)."""
        if not self.store_port:
            if not self.initial:
                return
            self.store_port = evtchn.alloc_unbound(self.domain, DOMID_SELF, DOMID_SELF)
        if self.xenbus_irq:
            self.unbind_from_irqhandler(self.xenbus_irq, self)
        self.xenbus_irq = self.bind_caller_port_to_irqhandler(
            self.store_port, self._xenbus_interrupt, 0, "xenbus", self
        )

    def init_xencons_ring(self) -> None:
        """The console of a domain that has one by a ring (xencons_ring_init)."""
        if self.console_irq:
            self.unbind_from_irqhandler(self.console_irq)
            self.console_irq = 0
        if self.initial or not self.console_port:
            return
        self.console_irq = self.bind_caller_port_to_irqhandler(self.console_port, self._console_interrupt, 0, "xencons")
        self.notify_remote_via_irq(self.console_irq)

    def suspend(self) -> None:
        """The domain is about to be saved; `resume` is of each revision. IrqError(ENODEV): domain 0 stays."""
        if self.initial:
            raise IrqError(Errno.ENODEV, "the initial domain can't be suspended")

    def _xenbus_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.queue_work(self._xenbus_work)
        return IRQ_HANDLED

    def _xenbus_work(self) -> None:
        self.on_xenbus()  # as it is when the work runs

    def _console_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.queue_work(self._console_work)
        return IRQ_HANDLED

    def _console_work(self) -> None:
        self.on_console()

    def _timer_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.kernel.run_timers()
        return IRQ_HANDLED

    def _reschedule_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._stat[self.kernel.cpu].resched += 1
        return IRQ_HANDLED

    def _call_function_interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self._stat[self.kernel.cpu].call += 1
        self.kernel.run_calls()
        self.kernel.run_irq_work()
        return IRQ_HANDLED

    # For split drivers.

    def bind_listening(self, remote_domid: int, handler: IrqHandler, name: str, dev_id: object) -> int:
        return self.bind_listening_port_to_irqhandler(remote_domid, handler, IRQF_SAMPLE_RANDOM, name, dev_id)

    def bind_interdomain(
        self, remote_domid: int, remote_port: int, handler: IrqHandler, name: str, dev_id: object
    ) -> int:
        return self.bind_interdomain_evtchn_to_irqhandler(remote_domid, remote_port, handler, 0, name, dev_id)

    def unbind(self, irq: int, dev_id: object) -> None:
        self.unbind_from_irqhandler(irq, dev_id)

    def eoi(self, irq: int, spurious: bool = False) -> None:
        """These kernels unmask the port when the handler returns."""

    @property
    def irq_stat(self) -> list[IrqStat]:
        return self._stat

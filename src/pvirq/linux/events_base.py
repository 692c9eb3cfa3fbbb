"""IRQs made of event channels, as Linux 6.1 makes them (drivers/xen/events/events_base.c).

Each port in use has an IRQ with one of three chips: `xen-percpu` (timer VIRQ, IPIs), `xen-dyn` (other VIRQs,
xenbus), `xen-dyn-lateeoi` (devices, /dev/xen/evtchn), whose handlers say themselves when the next event may
come, so that a remote domain can't storm this one (`events_lateeoi`). Physical IRQs (`xen-pirq`) are in
`events_pirq`.

A CPU serves its ports in one loop, `upcall`. Functions take ports and IRQ numbers, as the C ones do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import EVTCHNSTAT_virq
from pvirq.abi.xen import DOMID_SELF, NR_VIRQS, VCPU_INFO_UPCALL_PENDING, VIRQ_TIMER
from pvirq.linux.events_2l import Events2l
from pvirq.linux.events_fifo import EventsFifo
from pvirq.linux.events_info import (
    MASK_EOI_PENDING,
    MASK_EXPLICIT,
    MASK_TEMPORARY,
    XEN_EOI_FLAG_SPURIOUS,
    IrqInfo,
    IrqType,
    XenbusDevice,
)
from pvirq.linux.events_lateeoi import EVENT_EOI_DELAY, LateEoi
from pvirq.linux.irq import (
    IRQF_EARLY_RESUME,
    IRQF_FORCE_RESUME,
    IRQF_NO_SUSPEND,
    IRQF_PERCPU,
    IrqChip,
    IrqDesc,
    IrqError,
    IrqHandler,
    IrqLayer,
)
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi
from pvirq.xen import evtchn
from pvirq.xen.probes import Action, Once, Probes, Tell, keep, put, put_last

EVENT_LOOP_TIMEOUT: Final = 2  # jiffies (xen.event_loop_timeout)


class EventsBase:
    """The event channels of one kernel, as IRQs."""

    def __init__(
        self,
        kernel: Kernel[Any],
        irq: IrqLayer,
        *,
        event_loop_timeout: int = EVENT_LOOP_TIMEOUT,
        event_eoi_delay: int = EVENT_EOI_DELAY,
    ) -> None:
        """Usable after `init_irq`.

        The module parameters, in jiffies, may be changed later: `event_loop_timeout`, after which an event loop
        defers EOIs, and `lateeoi.event_eoi_delay`, for how long.
        """
        self.kernel = kernel
        self.domain = kernel.domain
        self.irq = irq
        nr_cpus = irq.nr_cpus
        self.ops: EventsFifo | Events2l
        self._evtchn_to_irq: dict[int, IrqInfo] = {}
        self._told: dict[Any, tuple[Once, Once]] = {}  # what tells of interrupts
        self._virq_to_irq = [[-1] * NR_VIRQS for _ in range(nr_cpus)]
        self._ipi_to_irq = [[-1] * len(Ipi) for _ in range(nr_cpus)]
        self._channels_on_cpu = [0] * nr_cpus
        self.event_loop_timeout = event_loop_timeout
        self.lateeoi = LateEoi(kernel, nr_cpus, irq.hz, event_eoi_delay)
        self._make_chips()

    def init_irq(self, fifo: bool) -> bool:
        """Choose the ABI and mask every port, on CPU 0 (xen_init_IRQ). Returns whether it is FIFO now."""
        if fifo:
            ops = EventsFifo(self.domain)
            try:
                ops.percpu_init(0)
            except XenError:
                fifo = False
            else:
                self.ops = ops
        if not fifo:
            self.ops = Events2l(self.domain, lambda: self.kernel.cpu, self.cpu_from_evtchn, self._timer_port)
        self.lateeoi.unmask = self.ops.unmask
        self.kernel.printk(f"xen:events: Using {'FIFO-based' if fifo else '2-level'} ABI")
        for port in range(self.ops.nr_channels):
            self.ops.mask(port)
        return fifo

    def cpu_dead(self, cpu: int) -> None:
        """A CPU has gone: empty its queues, take over its delayed EOIs."""
        self.ops.percpu_deinit(cpu)
        self.lateeoi.cpu_dead(cpu)

    def _make_chips(self) -> None:
        self.percpu_chip = IrqChip(
            "xen-percpu",
            irq_disable=self._disable_dynirq,
            irq_mask=self._disable_dynirq,
            irq_unmask=self._enable_dynirq,
            irq_ack=self._ack_dynirq,
        )
        self.dynamic_chip = IrqChip(
            "xen-dyn",
            irq_disable=self._disable_dynirq,
            irq_mask=self._disable_dynirq,
            irq_unmask=self._enable_dynirq,
            irq_ack=self._ack_dynirq,
            irq_mask_ack=self._mask_ack_dynirq,
            irq_set_affinity=self._set_affinity_irq,
            irq_retrigger=self._retrigger_dynirq,
        )
        self.lateeoi_chip = IrqChip(
            "xen-dyn-lateeoi",
            irq_disable=self._disable_dynirq,
            irq_mask=self._disable_dynirq,
            irq_unmask=self._enable_dynirq,
            irq_ack=self._lateeoi_ack_dynirq,
            irq_mask_ack=self._mask_ack_dynirq,
            irq_set_affinity=self._set_affinity_irq,
            irq_retrigger=self._retrigger_dynirq,
        )

    # Ports and IRQs.

    def info(self, irq: int) -> IrqInfo:
        """What an IRQ is to Xen; IrqError(EINVAL) for a number without one."""
        info = self.irq.desc(irq).chip_data
        if not isinstance(info, IrqInfo):
            raise IrqError(Errno.EINVAL, f"IRQ {irq} is not an event channel")
        return info

    def irq_from_evtchn(self, port: int) -> int:
        """The IRQ of a port, -1 without."""
        info = self._evtchn_to_irq.get(port)
        return info.irq if info else -1

    def evtchn_from_irq(self, irq: int) -> int:
        """The port of an IRQ, 0 without."""
        desc = self.irq.descs.get(irq)
        return desc.chip_data.evtchn if desc and isinstance(desc.chip_data, IrqInfo) else 0

    def cpu_from_evtchn(self, port: int) -> int:
        """The CPU that a port notifies."""
        info = self._evtchn_to_irq.get(port)
        return info.cpu if info else 0

    def _timer_port(self, cpu: int) -> int:
        desc = self.irq.descs.get(self._virq_to_irq[cpu][VIRQ_TIMER])
        return desc.chip_data.evtchn if desc and isinstance(desc.chip_data, IrqInfo) else 0

    def _allocate_irq(self, chip: IrqChip, percpu: bool, name: str, at: int | None = None) -> IrqInfo:
        desc = self.irq.alloc_desc(at)
        flow = self.irq.handle_percpu_irq if percpu else self.irq.handle_edge_irq
        self.irq.set_chip_and_handler_name(desc, chip, flow, name)
        info = IrqInfo(desc)
        desc.chip_data = info
        return info

    def _setup(self, info: IrqInfo, kind: IrqType, port: int, cpu: int, force_affinity: bool) -> None:
        """Connect an IRQ with its port, masked until the IRQ starts (xen_irq_info_common_setup)."""
        info.type = kind
        info.evtchn = port
        info.cpu = 0
        info.mask_reason = MASK_EXPLICIT
        self._evtchn_to_irq[port] = info
        try:
            self.ops.setup(port)
        except XenError:
            del self._evtchn_to_irq[port]
            info.evtchn = 0
            with contextlib.suppress(XenError):
                evtchn.close(self.domain, port)
            raise
        self._bind_evtchn_to_cpu(info, cpu, force_affinity)

    def _bind_evtchn_to_cpu(self, info: IrqInfo, cpu: int, force_affinity: bool) -> None:
        if force_affinity:
            info.desc.affinity = info.desc.effective_affinity = 1 << cpu
        self.ops.bind_to_cpu(info.evtchn, cpu, info.cpu)
        self._channels_on_cpu_dec(info)
        info.cpu = cpu
        self._channels_on_cpu[cpu] += 1
        info.is_accounted = True

    def _channels_on_cpu_dec(self, info: IrqInfo) -> None:
        if info.is_accounted:
            info.is_accounted = False
            self._channels_on_cpu[info.cpu] -= 1

    def bind_evtchn_to_irq(self, port: int, chip: IrqChip | None = None, dev: XenbusDevice | None = None) -> int:
        """The IRQ of a port, made if it has none; it starts on CPU 0. `chip` None: xen-dyn.

        XenError where the event array can't grow, IrqError(ENOSPC) without a free number, ENOMEM for a wrong
        port.
        """
        if not 0 < port < self.ops.max_channels:
            raise IrqError(Errno.ENOMEM, f"port {port}")
        known = self._evtchn_to_irq.get(port)
        if known is not None:
            return known.irq
        info = self._allocate_irq(chip or self.dynamic_chip, False, "event")
        info.dev = dev
        try:
            self._setup(info, IrqType.EVTCHN, port, 0, False)
        except XenError:
            self.irq.free_desc(info.irq)
            raise
        if dev is not None:
            dev.event_channels += 1
        return info.irq

    def bind_evtchn_to_irq_lateeoi(self, port: int) -> int:
        return self.bind_evtchn_to_irq(port, self.lateeoi_chip)

    def bind_interdomain_evtchn_to_irq_lateeoi(self, dev: XenbusDevice, remote_port: int) -> int:
        """Connect to the other end's port. XenError as EVTCHNOP_bind_interdomain."""
        port = evtchn.bind_interdomain(self.domain, dev.otherend_id, remote_port)
        return self.bind_evtchn_to_irq(port, self.lateeoi_chip, dev)

    def bind_virq_to_irq(self, virq: int, cpu: int, percpu: bool) -> int:
        """The IRQ of a VIRQ on a CPU, made if it has none. XenError as EVTCHNOP_bind_virq."""
        irq = self._virq_to_irq[cpu][virq]
        if irq != -1:
            return irq
        info = self._allocate_irq(self.percpu_chip if percpu else self.dynamic_chip, percpu, "virq")
        try:
            try:
                port = evtchn.bind_virq(self.domain, virq, cpu)
            except XenError as error:
                if error.errno != Errno.EEXIST:
                    raise
                port = self._find_virq(virq, cpu)  # left behind by the kernel that ran before
            info.index = virq
            self._setup(info, IrqType.VIRQ, port, cpu, percpu)
        except XenError:
            self.irq.free_desc(info.irq)
            raise
        self._virq_to_irq[cpu][virq] = info.irq
        return info.irq

    def _find_virq(self, virq: int, cpu: int) -> int:
        for port in range(1, self.ops.max_channels):
            try:
                status = evtchn.status(self.domain, DOMID_SELF, port)
            except XenError as error:
                if error.errno == Errno.EINVAL:
                    break  # beyond what is allocated
                continue
            if status.status == EVTCHNSTAT_virq and status.virq == virq and status.vcpu == cpu:
                return port
        raise XenError(Errno.ENOENT, f"no port with VIRQ {virq}")

    def bind_ipi_to_irq(self, ipi: Ipi, cpu: int) -> int:
        """The IRQ of an IPI to a CPU, made if it has none. XenError as EVTCHNOP_bind_ipi."""
        irq = self._ipi_to_irq[cpu][ipi]
        if irq != -1:
            return irq
        info = self._allocate_irq(self.percpu_chip, True, "ipi")
        info.index = ipi
        try:
            self._setup(info, IrqType.IPI, evtchn.bind_ipi(self.domain, cpu), cpu, True)
        except XenError:
            self.irq.free_desc(info.irq)
            raise
        self._ipi_to_irq[cpu][ipi] = info.irq
        return info.irq

    # The same with a handler; on failure nothing stays bound.

    def _request(self, irq: int, handler: IrqHandler, flags: int, name: str, dev_id: object) -> int:
        try:
            self.irq.request_irq(irq, handler, flags, name, dev_id)
        except IrqError:
            self._unbind_from_irq(irq)
            raise
        return irq

    def bind_evtchn_to_irqhandler(
        self, port: int, handler: IrqHandler, flags: int, name: str, *, dev_id: object = None
    ) -> int:
        """Handle a port's events with xen-dyn; returns the IRQ.

        Errors of bind_evtchn_to_irq and request_irq.
        """
        return self._request(self.bind_evtchn_to_irq(port), handler, flags, name, dev_id)

    def bind_evtchn_to_irqhandler_lateeoi(
        self, port: int, handler: IrqHandler, flags: int, name: str, *, dev_id: object = None
    ) -> int:
        """The same with xen-dyn-lateeoi: the handler, or what it wakes, calls `xen_irq_lateeoi`."""
        return self._request(self.bind_evtchn_to_irq_lateeoi(port), handler, flags, name, dev_id)

    def bind_interdomain_evtchn_to_irqhandler_lateeoi(
        self,
        dev: XenbusDevice,
        remote_port: int,
        handler: IrqHandler,
        flags: int,
        name: str,
        *,
        dev_id: object = None,
    ) -> int:
        """Connect to the other end's port and handle its events; returns the IRQ."""
        irq = self.bind_interdomain_evtchn_to_irq_lateeoi(dev, remote_port)
        return self._request(irq, handler, flags, name, dev_id)

    def bind_virq_to_irqhandler(
        self, virq: int, cpu: int, handler: IrqHandler, flags: int, name: str, *, dev_id: object = None
    ) -> int:
        irq = self.bind_virq_to_irq(virq, cpu, bool(flags & IRQF_PERCPU))
        return self._request(irq, handler, flags, name, dev_id)

    def bind_ipi_to_irqhandler(
        self, ipi: Ipi, cpu: int, handler: IrqHandler, flags: int, name: str, *, dev_id: object = None
    ) -> int:
        flags |= IRQF_NO_SUSPEND | IRQF_FORCE_RESUME | IRQF_EARLY_RESUME
        return self._request(self.bind_ipi_to_irq(ipi, cpu), handler, flags, name, dev_id)

    def unbind_from_irqhandler(self, irq: int, dev_id: object = None) -> None:
        """Take the handler away and close the port; the number is free again."""
        if not isinstance(self.irq.desc(irq).chip_data, IrqInfo):
            return
        self.irq.free_irq(irq, dev_id)
        self._unbind_from_irq(irq)

    def _unbind_from_irq(self, irq: int) -> None:
        info = self.info(irq)
        if info.evtchn:
            if info.type == IrqType.VIRQ:
                # A global VIRQ may have moved, but it is on record where it was bound.
                for virqs in self._virq_to_irq:
                    if virqs[info.index] == irq:
                        virqs[info.index] = -1
            elif info.type == IrqType.IPI:
                self._ipi_to_irq[info.cpu][info.index] = -1
            elif info.dev is not None:
                info.dev.event_channels -= 1
            self._close(info)
        self._free_irq(info)

    def _free_irq(self, info: IrqInfo) -> None:
        """Forget an IRQ that has no port; its number is free again (xen_free_irq)."""
        self.lateeoi.forget(info)
        self.irq.free_desc(info.irq)

    def _close(self, info: IrqInfo) -> None:
        """Close an IRQ's port and forget it (xen_evtchn_close, xen_irq_info_cleanup)."""
        port = info.evtchn
        try:
            evtchn.close(self.domain, port)
        except XenError as error:
            raise AssertionError(f"port {port} of IRQ {info.irq} is not ours to close") from error
        del self._evtchn_to_irq[port]
        self.ops.remove(port, info.cpu)
        info.evtchn = 0
        self._channels_on_cpu_dec(info)

    # Sending.

    def notify_remote_via_evtchn(self, port: int) -> None:
        """EVTCHNOP_send, whose errors the kernel ignores."""
        try:  # noqa: SIM105  # a context manager takes as long as the whole rest
            evtchn.send(self.domain, port)
        except XenError:
            pass

    def notify_remote_via_irq(self, irq: int) -> None:
        """Notify the other end of an IRQ's channel; nothing happens on one that is broken."""
        desc = self.irq.descs.get(irq)
        if desc is None:
            return
        info: IrqInfo | None = desc.chip_data
        if info is not None and info.evtchn:
            try:  # noqa: SIM105  # as notify_remote_via_evtchn
                evtchn.send(self.domain, info.evtchn)
            except XenError:
                pass

    def send_ipi(self, cpu: int, ipi: Ipi) -> None:
        self.notify_remote_via_irq(self._ipi_to_irq[cpu][ipi])

    # Receiving.

    def upcall(self, cpu: int) -> None:
        self.upcall_entry(cpu)()

    def upcall_entry(self, cpu: int) -> Callable[[], None]:
        """xen_evtchn_do_upcall of one CPU: scan until Xen has nothing new for it."""
        mem = self.domain.machine.mem
        pending = self.domain.vcpus[cpu].info + VCPU_INFO_UPCALL_PENDING
        find, irq_epoch = self._evtchn_to_irq.get, self.lateeoi.irq_epoch
        # How long this CPU has been in the event loop (struct evtchn_loop_ctrl).
        count, timeout, defer_eoi = 0, 0, False
        probes = self.domain.hypervisor.probes
        told = probes.on_irq_entry is not None or probes.on_irq_exit is not None
        said: dict[
            int, tuple[IrqInfo, bool, Sequence[Action], Tell, Any, Tell, Any]
        ] = {}  # what was told last, by port

        def handle_irq_for_port(port: int) -> None:
            nonlocal count, timeout, defer_eoi
            info = find(port)
            if info is None:
                return
            # The clock is looked at every 256 events. Past the timeout, all EOIs are deferred, so the loop ends
            # soon.
            if not defer_eoi:
                count += 1
                if count & 255 == 0:
                    now = self.kernel.now()
                    if not timeout:
                        timeout = now + self.kernel.jiffies_to_ns(self.event_loop_timeout)
                    elif now > timeout:
                        defer_eoi = True
            if info.is_active:
                return
            info.is_active = True
            if info.dev is not None:
                info.dev.events += 1
            if defer_eoi:
                self.lateeoi.defer(info)
            desc = info.desc
            flow = desc.flow
            assert flow is not None
            if not told:
                flow(desc, cpu)  # generic_handle_irq_desc
                return
            try:
                of, silent, actions, tell, entry, tell_exit, leave = said[port]
                if of is not info or actions is not desc.actions or silent is not (desc.disabled or desc.in_progress):
                    raise KeyError
            except KeyError:
                silent, actions = desc.disabled or desc.in_progress, desc.actions
                tells = self._tells_irq(probes, cpu, port, desc.irq, () if silent else actions)
                (tell, entry), (tell_exit, leave) = tells
                put_last(said, port, (info, silent, actions, tell, entry, tell_exit, leave))
            tell(entry)
            try:
                flow(desc, cpu)
            finally:
                tell_exit(leave)

        def upcall() -> None:
            nonlocal count, timeout, defer_eoi
            count, timeout, defer_eoi = 0, 0, False
            handle_events = self.ops.handle_events
            while True:
                mem[pending] = 0
                handle_events(cpu, handle_irq_for_port)
                if not mem[pending]:
                    break
            # Only now: an EOI is deferred only if it comes from inside the loop above.
            irq_epoch[cpu] += 1

        return upcall

    # What instruments are told (`pvirq.xen.probes`).

    def probe(self, probes: Probes) -> None:
        """In front of late EOIs; what is in front of interrupts, `upcall_entry` puts there."""
        self._told.clear()
        late = self.lateeoi
        if probes.on_eoi is None:
            put(late, "eoi", None)
            return
        eoi, vcpus, kernel = late.do_eoi, self.domain.vcpus, self.kernel
        said: dict[IrqInfo, tuple[int, int, bool, Tell, Any]] = {}  # what was told last
        kept: dict[Any, Once] = {}

        def told_eoi(info: IrqInfo, spurious: bool) -> None:
            try:
                port, cpu, was_spurious, tell, what = said[info]
                if port != info.evtchn or cpu != kernel.cpu or spurious is not was_spurious:
                    raise KeyError
            except KeyError:
                cpu, port = kernel.cpu, info.evtchn
                record = "eoi", vcpus[cpu], port or -1, info.desc.irq, spurious
                tell, what = keep(kept, record, partial(probes.fixed, *record))
                put_last(said, info, (port, cpu, spurious, tell, what))
            tell(what)
            eoi(info, spurious)

        put(late, "eoi", told_eoi)

    def _tells_irq(self, probes: Probes, cpu: int, port: int, irq: int, actions: Sequence[Action]) -> tuple[Once, Once]:
        """What tells of an interrupt's begin and end."""
        vcpu = self.domain.vcpus[cpu]
        key = vcpu, port, irq, actions
        return keep(self._told, key, lambda: (probes.fixed("irq_entry", *key), probes.fixed("irq_exit", *key[:3])))

    # Chips.

    def _do_mask(self, info: IrqInfo, reason: int) -> None:
        if not info.mask_reason:
            self.ops.mask(info.evtchn)
        info.mask_reason |= reason

    def _do_unmask(self, info: IrqInfo, reason: int) -> None:
        info.mask_reason &= ~reason
        if not info.mask_reason:
            self.ops.unmask(info.evtchn)

    @staticmethod
    def _info_of(desc: IrqDesc) -> IrqInfo | None:
        """None where the IRQ has no port (any more): then the chips do nothing."""
        info: IrqInfo | None = desc.chip_data
        return info if info is not None and info.evtchn else None

    def _event_handler_exit(self, info: IrqInfo) -> None:
        info.is_active = False
        self.ops.clear_pending(info.evtchn)

    def _enable_dynirq(self, desc: IrqDesc) -> None:
        if info := self._info_of(desc):
            self._do_unmask(info, MASK_EXPLICIT)

    def _disable_dynirq(self, desc: IrqDesc) -> None:
        if info := self._info_of(desc):
            self._do_mask(info, MASK_EXPLICIT)

    def _ack_dynirq(self, desc: IrqDesc) -> None:
        info: IrqInfo | None = desc.chip_data
        if info is not None and info.evtchn:
            info.is_active = False
            self.ops.clear_pending(info.evtchn)

    def _mask_ack_dynirq(self, desc: IrqDesc) -> None:
        if info := self._info_of(desc):
            self._do_mask(info, MASK_EXPLICIT)
            self._event_handler_exit(info)

    def _lateeoi_ack_dynirq(self, desc: IrqDesc) -> None:
        """Masked until the late EOI.

        Still active till then: moved to another CPU, it must not be handled there.
        """
        info: IrqInfo | None = desc.chip_data
        if info is not None and info.evtchn:
            if info.mask_reason:
                self.ops.clear_pending(info.evtchn)
            else:
                self.ops.mask_and_clear(info.evtchn)
            info.mask_reason |= MASK_EOI_PENDING

    def _retrigger_dynirq(self, desc: IrqDesc) -> bool:
        info = self._info_of(desc)
        if info is None:
            return False
        self._do_mask(info, MASK_TEMPORARY)
        self.ops.set_pending(info.evtchn)
        self._do_unmask(info, MASK_TEMPORARY)
        return True

    def _set_affinity_irq(self, desc: IrqDesc, mask: int) -> bool:
        """Move the port to the CPU of the mask that has the fewest channels, the first of equals."""
        info = self._info_of(desc)
        if info is None:
            return False
        online = self.irq.online
        cpus = [cpu for cpu in range(self.irq.nr_cpus) if (mask & online or online) >> cpu & 1]
        target = min(cpus, key=self._channels_on_cpu.__getitem__)
        # Masked meanwhile, so that no event is delivered to the old CPU after the move.
        self._do_mask(info, MASK_TEMPORARY)
        try:
            evtchn.bind_vcpu(self.domain, info.evtchn, target)
        except XenError:
            pass  # a channel that can't move
        else:
            self._bind_evtchn_to_cpu(info, target, False)
        self._do_unmask(info, MASK_TEMPORARY)
        desc.effective_affinity = 1 << target
        return True

    # Late EOI.

    def xen_irq_lateeoi(self, irq: int, eoi_flags: int = 0) -> None:
        """The handler is done with the event: let the next one come, or, after spurious ones, come later.

        XEN_EOI_FLAG_SPURIOUS: there was nothing to do. After more such events in a row than the device's
        threshold the EOI is delayed, by a jiffy for the first beyond it, then twice as long for each. As a
        delayed EOI ends the row, longer delays are rare; Linux has it so.
        """
        desc = self.irq.descs.get(irq)
        if desc is not None and isinstance(desc.chip_data, IrqInfo):
            self.lateeoi.eoi(desc.chip_data, bool(eoi_flags & XEN_EOI_FLAG_SPURIOUS))

"""Event channels as IRQs in XenLinux, the kernels before pvops (drivers/xen/core/evtchn.c): what its revisions share.

From linux-2.6.18-xen.hg and SUSE's port of it to later kernels. An IRQ's binding is one packed word, `irq_info`; ports
lead back by `evtchn_to_irq`; an IRQ is free while its `irq_bindcount` is zero. The two maps are each other's inverse,
but for per-CPU IRQs, behind which there is a port for each CPU. A port without an IRQ belongs to the evtchn device.

The numbers of physical IRQs come first, in `xenlinux_pirq`, those of dynamic ones after them.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import SHARED_INFO_EVTCHN_MASK_32, VCPU_INFO_PENDING_SEL_32
from pvirq.abi.xen import (
    DOMID_SELF,
    NR_VIRQS,
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_PENDING,
)
from pvirq.linux.irq import IRQ_HANDLED, IrqError, IrqHandler, IrqReturn
from pvirq.linux.irq26 import IRQF_SAMPLE_RANDOM, IrqChip26, IrqDesc26, IrqLayer26
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Personality, StartInfo
from pvirq.linux.proc import IrqStat
from pvirq.linux.xenlinux_evtchn import XenLinuxEvtchnUser
from pvirq.linux.xenlinux_upcall import UPCALLS, UpcallState
from pvirq.xen import evtchn

# Types of bindings (IRQT_*).
IRQT_UNBOUND: Final = 0
IRQT_PIRQ: Final = 1
IRQT_VIRQ: Final = 2
IRQT_IPI: Final = 3
IRQT_LOCAL_PORT: Final = 4  # closed at unbind
IRQT_CALLER_PORT: Final = 5  # its owner closes it

NR_DYNIRQS: Final = 256

Slot = tuple[int, int, int, int]
"""A port, where in memory its mask and pending bits are, and the bit: a line's chip_data, so that it costs nothing."""


class XenLinux(Personality):
    """The event channels of one XenLinux kernel.

    `mem` and `words` (of the guest's word size) are machine memory; `pending_words`, `mask_words` and `selector` (by
    CPU) are indices into `words`.
    """

    irq: IrqLayer26
    type_shift: ClassVar[int]  # layout of irq_info
    index_shift: ClassVar[int]

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
        domain = kernel.domain
        self.kernel = kernel
        self.domain = domain
        self.irq = irq
        self.hz = hz
        self.dynirq_base = dynirq_base
        self.nr_irqs = dynirq_base + NR_DYNIRQS
        self.nr_cpus = len(domain.vcpus)
        self.start_info = start_info or StartInfo(initial=domain.privileged)
        self.initial = self.start_info.initial
        self.store_port = self.start_info.store_port
        self.console_port = self.start_info.console_port
        self._map_shared_info()
        self.evtchn_to_irq: dict[int, int] = {}
        self.irq_info = [0] * self.nr_irqs
        self.irq_bindcount = [0] * self.nr_irqs
        self.virq_to_irq = [[-1] * NR_VIRQS for _ in range(self.nr_cpus)]
        self.cpu_evtchn = bytearray(self.nr_channels)  # the CPU that each port notifies
        self.cpu_evtchn_mask = [[0] * self.word_bits for _ in range(self.nr_cpus)]
        self.port_user: dict[int, XenLinuxEvtchnUser] = {}
        self.evtchn_mask = (1 << self.index_shift) - 1
        self._warned = False
        self.upcall_state = [UpcallState() for _ in range(self.nr_cpus)]
        upcall_at = UPCALLS[upcall](self)
        self._upcalls = [upcall_at(cpu, state) for cpu, state in enumerate(self.upcall_state)]
        self._stat = [IrqStat() for _ in range(self.nr_cpus)]
        self.initcalls: list[tuple[str, Callable[[], object]]] = []
        self.on_xenbus: Callable[[], object] = lambda: None
        self.on_console: Callable[[], object] = lambda: None
        self.xenbus_irq = 0
        self.console_irq = 0

    def _map_shared_info(self) -> None:
        domain = self.domain
        self.word_bits = domain.word_bits
        self.nr_channels = self.word_bits * self.word_bits
        self.mem = domain.machine.mem
        wide = self.word_bits == 64
        self.word_shift = 6 if wide else 5
        self.words = domain.machine.u64 if wide else domain.machine.u32
        size = self.word_bits // 8
        self._pending = domain.shared_info + SHARED_INFO_EVTCHN_PENDING
        self._mask = domain.shared_info + (SHARED_INFO_EVTCHN_MASK if wide else SHARED_INFO_EVTCHN_MASK_32)
        selector = VCPU_INFO_PENDING_SEL if wide else VCPU_INFO_PENDING_SEL_32
        self.pending_words = self._pending // size
        self.mask_words = self._mask // size
        self.selector = [(vcpu.info + selector) // size for vcpu in domain.vcpus]

    def slot(self, port: int) -> Slot | None:
        """What a chip wants to have at hand of a port; None for port 0."""
        return (port, self._mask + (port >> 3), self._pending + (port >> 3), 1 << (port & 7)) if port else None

    # Packed bindings.

    def set_irq_info(self, irq: int, info: int) -> None:
        """Write a line's binding."""
        self.irq_info[irq] = info
        desc = self.irq.descs.get(irq)
        if desc is not None:
            desc.chip_data = self.slot(info & self.evtchn_mask)

    def mk_irq_info(self, kind: int, index: int, port: int) -> int:
        """IrqError(EINVAL) where the index doesn't fit."""
        if index >> self.type_shift - self.index_shift:
            raise IrqError(Errno.EINVAL, f"index {index} in irq_info")
        return kind << self.type_shift | index << self.index_shift | port

    def type_from_irq(self, irq: int) -> int:
        """An IRQT_*."""
        return self.irq_info[irq] >> self.type_shift

    def index_from_irq(self, irq: int) -> int:
        """The VIRQ, IPI or Xen's pirq of an IRQ."""
        return self.irq_info[irq] >> self.index_shift & (1 << self.type_shift - self.index_shift) - 1

    def evtchn_from_irq(self, irq: int) -> int:
        return self.irq_info[irq] & self.evtchn_mask if 0 <= irq < self.nr_irqs else 0

    def irq_from_evtchn(self, port: int) -> int:
        """The IRQ of a port, -1 without."""
        return self.evtchn_to_irq.get(port, -1)

    def cpu_from_evtchn(self, port: int) -> int:
        return self.cpu_evtchn[port]

    # Which CPU a port notifies.

    def init_evtchn_cpu_bindings(self) -> None:
        """By default all ports notify CPU 0."""
        for desc in self.irq.descs.values():
            desc.affinity = 1
        self.cpu_evtchn[:] = bytes(self.nr_channels)
        for cpu, mask in enumerate(self.cpu_evtchn_mask):
            mask[:] = [0 if cpu else (1 << self.word_bits) - 1] * self.word_bits

    def bind_evtchn_to_cpu(self, port: int, cpu: int) -> None:
        irq = self.evtchn_to_irq.get(port)
        if irq is not None:
            self._note_affinity(self.irq.desc(irq), cpu)
        word, bit = port >> self.word_shift, 1 << port % self.word_bits
        self.cpu_evtchn_mask[self.cpu_evtchn[port]][word] &= ~bit
        self.cpu_evtchn_mask[cpu][word] |= bit
        self.cpu_evtchn[port] = cpu

    def _note_affinity(self, desc: IrqDesc26, cpu: int) -> None:
        desc.affinity = 1 << cpu

    def rebind_evtchn_to_cpu(self, port: int, cpu: int) -> None:
        """Masked meanwhile: an event that is pending already comes at the new CPU."""
        masked = self.test_and_set_evtchn_mask(port)
        try:
            evtchn.bind_vcpu(self.domain, port, cpu)
        except XenError:
            pass  # a VIRQ or IPI that can't move
        else:
            self.bind_evtchn_to_cpu(port, cpu)
        if not masked:
            self.unmask_evtchn(port)

    def set_affinity_irq(self, desc: IrqDesc26, mask: int) -> None:
        """To the first CPU of the mask that is online.

        SUSE's kernels take the first of all, and lose a line to a CPU that is offline.
        """
        mask = mask & self.irq.online or mask
        port = self.evtchn_from_irq(desc.irq)
        if port and mask:
            self.rebind_evtchn_to_cpu(port, (mask & -mask).bit_length() - 1)

    # Pending and mask bits.

    def mask_evtchn(self, port: int) -> None:
        self.mem[self._mask + (port >> 3)] |= 1 << (port & 7)

    def unmask_evtchn(self, port: int) -> None:
        """In place; another CPU's port by hypercall, for only Xen can make it pending there."""
        if self.kernel.cpu != self.cpu_evtchn[port]:
            with contextlib.suppress(XenError):
                evtchn.unmask(self.domain, port)
            return
        self.mem[self._mask + (port >> 3)] &= ~(1 << (port & 7))
        if self.test_evtchn(port):
            self._refire(port)

    def _refire(self, port: int) -> None:
        """An edge came while the port was masked: make this CPU look at it."""
        cpu = self.kernel.cpu
        selector, bit = self.selector[cpu], 1 << (port >> self.word_shift)
        word = self.words[selector]
        if not word & bit:
            self.words[selector] = word | bit
            vcpu = self.domain.vcpus[cpu]
            self.mem[vcpu.info + VCPU_INFO_UPCALL_PENDING] = 1
            vcpu.kick()  # it executes this, and is awake, except where the call came from outside its turn

    def clear_evtchn(self, port: int) -> None:
        self.mem[self._pending + (port >> 3)] &= ~(1 << (port & 7))

    def set_evtchn(self, port: int) -> None:
        """Only the pending bit: nobody is told."""
        self.mem[self._pending + (port >> 3)] |= 1 << (port & 7)

    def test_evtchn(self, port: int) -> bool:
        return bool(self.mem[self._pending + (port >> 3)] >> (port & 7) & 1)

    def evtchn_masked(self, port: int) -> bool:
        return bool(self.mem[self._mask + (port >> 3)] >> (port & 7) & 1)

    def test_and_set_evtchn_mask(self, port: int) -> bool:
        masked = self.evtchn_masked(port)
        self.mask_evtchn(port)
        return masked

    def mask_all(self) -> None:
        """No event channels are live right now."""
        size = self.nr_channels // 8
        self.mem[self._mask : self._mask + size] = b"\xff" * size

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

    def _close(self, port: int) -> None:
        try:
            evtchn.close(self.domain, port)
        except XenError as error:
            raise AssertionError(f"port {port} is not ours to close") from error

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

    # The dynamic chip's functions.

    def startup_dynirq(self, desc: IrqDesc26) -> int:
        self.enable_dynirq(desc)
        return 0

    def enable_dynirq(self, desc: IrqDesc26) -> None:
        port = self.evtchn_from_irq(desc.irq)
        if port:
            self.unmask_evtchn(port)

    def disable_dynirq(self, desc: IrqDesc26) -> None:
        port = self.evtchn_from_irq(desc.irq)
        if port:
            self.mask_evtchn(port)

    def make_ack(self) -> Callable[[IrqDesc26], None]:
        """ack_dynirq and ack_pirq: move the line if it is to be moved, mask its port and clear what was pending."""
        mem, move = self.mem, self.irq.move_native_irq

        def ack(desc: IrqDesc26) -> None:
            if desc.move_irq:
                move(desc)
            if desc.chip_data is not None:
                _, mask_at, pending_at, bit = desc.chip_data
                mem[mask_at] |= bit
                mem[pending_at] &= ~bit

        return ack

    def make_end(self) -> Callable[[IrqDesc26], None]:
        """end_dynirq, and unmask_dynirq for flows: `unmask_evtchn`, unless the line was disabled meanwhile."""
        kernel, cpu_evtchn, mem = self.kernel, self.cpu_evtchn, self.mem
        unmask_evtchn, refire, disabled = self.unmask_evtchn, self._refire, self.irq.bits.DISABLED

        def end(desc: IrqDesc26) -> None:
            if desc.chip_data is None or desc.status & disabled:
                return
            port, mask_at, pending_at, bit = desc.chip_data
            if kernel.cpu != cpu_evtchn[port]:
                unmask_evtchn(port)
                return
            mem[mask_at] &= ~bit
            if mem[pending_at] & bit:
                refire(port)

        return end

    def resend_irq_on_evtchn(self, desc: IrqDesc26) -> bool:
        """Raise the line's event again."""
        port = self.evtchn_from_irq(desc.irq)
        if port:
            masked = self.test_and_set_evtchn_mask(port)
            self.set_evtchn(port)
            if not masked:
                self.unmask_evtchn(port)
        return True

    # Boot.

    def initcall_after(self, name: str, new: str, call: Callable[[], object]) -> None:
        for i, (other, _) in enumerate(self.initcalls):
            if other == name:
                self.initcalls.insert(i + 1, (new, call))
                return
        raise KeyError(name)

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


def dynirq_chip(events: XenLinux, name: str) -> IrqChip26:
    """dynirq_type, dynirq_chip: a chip with functions for any flow."""
    ack, end = events.make_ack(), events.make_end()
    return IrqChip26(
        name,
        startup=events.startup_dynirq,
        shutdown=events.disable_dynirq,
        enable=events.enable_dynirq,
        disable=events.disable_dynirq,
        ack=ack,
        mask=events.disable_dynirq,
        unmask=end,
        mask_ack=ack,
        eoi=end,
        end=end,
        set_affinity=events.set_affinity_irq,
        retrigger=events.resend_irq_on_evtchn,
    )

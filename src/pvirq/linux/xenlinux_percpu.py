"""Per-CPU IRQs of SUSE's XenLinux (drivers/xen/core/evtchn.c): one IRQ for all CPUs, behind it a port for each.

They are the VIRQs that each vCPU has, and IPIs. A CPU binds and unbinds its own port; the line is requested when the
first one comes, and then there for good.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import NR_VIRQS, VIRQ_DEBUG, VIRQ_TIMER, VIRQ_XENOPROF
from pvirq.linux.irq import IRQF_PERCPU, IrqAction, IrqError
from pvirq.linux.irq26 import IrqChip26, IrqDesc26
from pvirq.linux.irq2632 import IrqLayer2632, Status2632
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.xenlinux_pirq import XenLinuxPirq
from pvirq.linux.xenlinux_ports import IRQT_IPI, IRQT_VIRQ, dynirq_chip
from pvirq.xen import evtchn

VIRQS_PER_CPU: Final = frozenset((VIRQ_TIMER, VIRQ_DEBUG, VIRQ_XENOPROF))


class PerCpuAction:
    """A handler of a per-CPU VIRQ (struct per_cpu_irqaction): `cpus` is a mask of those that it was bound on."""

    def __init__(self, action: IrqAction) -> None:
        self.key = action
        self.action = IrqAction(action.handler, action.flags | IRQF_PERCPU, action.name, action)
        self.cpus = 0


class XenLinuxPercpu(XenLinuxPirq):
    """XenLinux with per-CPU IRQs. `percpu_evtchn`: their ports by CPU. `virq_actions`: who handles which VIRQ."""

    irq: IrqLayer2632

    def __init__(
        self,
        kernel: Kernel[Any],
        irq: IrqLayer2632,
        *,
        hz: int,
        nr_pirqs: int,
        start_info: StartInfo | None,
        upcall: str,
        nr_ipis: int,
    ) -> None:
        super().__init__(kernel, irq, hz=hz, nr_pirqs=nr_pirqs, start_info=start_info, upcall=upcall)
        self.percpu_evtchn: dict[int, list[int]] = {}
        self.virq_actions: dict[int, list[PerCpuAction]] = {}
        self.ipi_to_irq = [-1] * nr_ipis
        self.dynirq_chip = dynirq_chip(self, "Dynamic")
        self.percpu_chip = self._make_percpu_chip()

    def _make_percpu_chip(self) -> IrqChip26:
        """The same dynirq_chip, for lines whose port depends on the CPU: nothing moves, nothing is shut for all."""
        kernel, mem, unmask_evtchn = self.kernel, self.mem, self.unmask_evtchn

        def ack(desc: IrqDesc26) -> None:
            slot = desc.chip_data[kernel.cpu]
            if slot is not None:
                _, mask_at, pending_at, bit = slot
                mem[mask_at] |= bit
                mem[pending_at] &= ~bit

        def end(desc: IrqDesc26) -> None:
            slot = desc.chip_data[kernel.cpu]
            if slot is not None and not desc.status & Status2632.DISABLED:
                unmask_evtchn(slot[0])

        return IrqChip26(
            "Dynamic",
            startup=self.startup_dynirq,
            shutdown=self.disable_dynirq,
            enable=self.enable_dynirq,
            disable=self.disable_dynirq,
            ack=ack,
            mask=self.disable_dynirq,
            unmask=self.enable_dynirq,
            mask_ack=ack,
            eoi=end,
            end=end,
            set_affinity=self.set_affinity_irq,
            retrigger=self.resend_irq_on_evtchn,
        )

    def _set_line(self, desc: IrqDesc26, chip: IrqChip26, percpu: bool = False) -> None:
        desc.chip = chip
        desc.flow = self.irq.handle_percpu_irq if percpu else self.irq.handle_level_irq
        desc.name = "percpu" if percpu else "level"

    def _find_dynirq(self, percpu: bool = False) -> int:
        irq = self.find_unbound_irq()
        desc = self.irq.irq_to_desc_alloc(irq)
        desc.status |= Status2632.NOPROBE
        self._set_line(desc, self.percpu_chip if percpu else self.dynirq_chip, percpu)
        return irq

    # Ports by CPU.

    def evtchn_from_irq(self, irq: int) -> int:
        """Of a per-CPU IRQ the port of the CPU that executes."""
        ports = self.percpu_evtchn.get(irq)
        return super().evtchn_from_irq(irq) if ports is None else ports[self.kernel.cpu]

    def evtchn_from_per_cpu_irq(self, irq: int, cpu: int) -> int:
        return self.percpu_evtchn[irq][cpu]

    def ports_of_irq(self, irq: int) -> list[int]:
        ports = self.percpu_evtchn.get(irq)
        return super().ports_of_irq(irq) if ports is None else [port for port in ports if port]

    def _note_affinity(self, desc: IrqDesc26, cpu: int) -> None:
        if desc.status & Status2632.PER_CPU:
            desc.affinity |= 1 << cpu
        else:
            desc.affinity = 1 << cpu

    def _new_percpu_irq(self, kind: int, index: int) -> int:
        irq = self._find_dynirq(percpu=True)
        self.irq_bindcount[irq] += 1  # one more than there are ports: it never drops to zero
        self.set_irq_info(irq, self.mk_irq_info(kind, index, 0))
        self.percpu_evtchn[irq] = [0] * self.nr_cpus
        self.irq.desc(irq).chip_data = [None] * self.nr_cpus
        return irq

    def _percpu_port(self, irq: int, cpu: int, port: int) -> None:
        self.evtchn_to_irq[port] = irq
        self._set_percpu(irq, cpu, port)
        self.bind_evtchn_to_cpu(port, cpu)

    def _set_percpu(self, irq: int, cpu: int, port: int) -> None:
        self.percpu_evtchn[irq][cpu] = port
        self.irq.desc(irq).chip_data[cpu] = self.slot(port)

    def _open_percpu(self, irq: int, port: int) -> None:
        if not self.irq.desc(irq).status & Status2632.DISABLED:
            self.unmask_evtchn(port)

    def bind_virq_to_irqaction(self, virq: int, cpu: int, action: IrqAction) -> int:
        """Handle a per-CPU VIRQ on one CPU more; several actions can share it. `action` is known by its identity.

        XenError as EVTCHNOP_bind_virq; IrqError: EINVAL for an action with a dev_id, ENOSPC, and setup_irq's.
        """
        if virq not in VIRQS_PER_CPU or action.dev_id is not None:
            raise IrqError(Errno.EINVAL, f"VIRQ {virq} is not per CPU, or its action has a dev_id")
        actions = self.virq_actions.setdefault(virq, [])
        known = next((each for each in actions if each.key is action), None)
        irq = self.virq_to_irq[cpu][virq]
        if irq == -1:
            irq = self._new_percpu_irq(IRQT_VIRQ, virq)
            for virqs in self.virq_to_irq:
                virqs[virq] = irq
        port = self.percpu_evtchn[irq][cpu]
        if not port:
            port = evtchn.bind_virq(self.domain, virq, cpu)
            self._percpu_port(irq, cpu, port)
        this = known or PerCpuAction(action)
        this.cpus |= 1 << cpu
        self.irq_bindcount[irq] += 1
        if known:
            self._open_percpu(irq, port)
            return irq
        actions.insert(0, this)
        try:
            self.irq.setup_irq(self.irq.desc(irq), this.action)
        except IrqError:
            self.unbind_from_per_cpu_irq(irq, cpu, action)
            raise
        return irq

    def bind_ipi_to_irqaction(self, ipi: int, cpu: int, action: IrqAction) -> int:
        """A port for an IPI to one CPU more; the IRQ, which the first one starts.

        IrqError: EBUSY where the CPU has it already, ENOSPC. XenError as EVTCHNOP_bind_ipi.
        """
        irq = self.ipi_to_irq[ipi]
        if irq != -1 and self.percpu_evtchn[irq][cpu]:
            raise IrqError(Errno.EBUSY, f"CPU {cpu} has IPI {ipi}")
        fresh = irq == -1
        if fresh:
            irq = self.ipi_to_irq[ipi] = self._new_percpu_irq(IRQT_IPI, ipi)
        port = evtchn.bind_ipi(self.domain, cpu)
        self._percpu_port(irq, cpu, port)
        self.irq_bindcount[irq] += 1
        if fresh:
            action.flags |= IRQF_PERCPU
            self.irq.setup_irq(self.irq.desc(irq), action)
        else:
            self._open_percpu(irq, port)
        return irq

    def unbind_from_per_cpu_irq(self, irq: int, cpu: int, action: IrqAction | None = None) -> None:
        """Take one CPU away from a per-CPU IRQ; of a VIRQ only for `action`, the port stays for others there."""
        port = self.percpu_evtchn[irq][cpu]
        if not port:
            return
        self.mask_evtchn(port)
        self.irq_bindcount[irq] -= 1
        freed = None
        if self.type_from_irq(irq) == IRQT_VIRQ:
            virq, still_used = self.index_from_irq(irq), False
            for each in list(self.virq_actions.get(virq, ())):
                if each.key is action:
                    each.cpus &= ~(1 << cpu)
                    if not each.cpus:
                        self.virq_actions[virq].remove(each)
                        freed = action
                elif each.cpus >> cpu & 1:
                    still_used = True
            if still_used:
                self._open_percpu(irq, port)  # the kernel forgets to, and the CPU's timer stands still
                port = 0
        if port:
            self.irq.desc(irq).affinity &= ~(1 << cpu)
            self._close(port)
            self._set_percpu(irq, cpu, 0)
            self.bind_evtchn_to_cpu(port, 0)  # closed ports are vCPU 0's again
            del self.evtchn_to_irq[port]
        if freed is not None:
            self.irq.free_irq(irq, freed)

    def unbind_from_irq(self, irq: int) -> None:
        if irq in self.percpu_evtchn:
            raise IrqError(Errno.EINVAL, f"IRQ {irq} is per CPU")
        super().unbind_from_irq(irq)

    def notify_remote_via_ipi(self, ipi: int, cpu: int) -> None:
        irq = self.ipi_to_irq[ipi]
        port = self.percpu_evtchn[irq][cpu] if irq != -1 else 0
        if port:
            with contextlib.suppress(XenError):
                evtchn.send(self.domain, port)

    # Resume.

    def _restore_cpu_virqs(self, cpu: int) -> None:
        for virq in range(NR_VIRQS):
            irq = self.virq_to_irq[cpu][virq]
            if irq == -1:
                continue
            ports = self.percpu_evtchn.get(irq)
            if ports is None:
                port = evtchn.bind_virq(self.domain, virq, cpu)
                self._bound(irq, IRQT_VIRQ, virq, port)
                self.bind_evtchn_to_cpu(port, cpu)
            elif ports[cpu]:
                port = evtchn.bind_virq(self.domain, virq, cpu)
                self._percpu_port(irq, cpu, port)
            else:
                continue
            self.unmask_evtchn(port)

    def _restore_cpu_ipis(self, cpu: int) -> None:
        for irq in self.ipi_to_irq:
            if irq != -1 and self.percpu_evtchn[irq][cpu]:
                port = evtchn.bind_ipi(self.domain, cpu)
                self._percpu_port(irq, cpu, port)
                self._open_percpu(irq, port)

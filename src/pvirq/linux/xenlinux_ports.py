"""A XenLinux kernel's ports: their bits in shared memory, which CPU each notifies, what IRQ is behind which.

The lower half of drivers/xen/core/evtchn.c; `xenlinux` binds ports with it. An IRQ's binding is one packed word,
`irq_info`; ports lead back by `evtchn_to_irq`. The two are each other's inverse, but for per-CPU IRQs, behind which
there is a port for each CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.event_channel import SHARED_INFO_EVTCHN_MASK_32, VCPU_INFO_PENDING_SEL_32
from pvirq.abi.xen import (
    SHARED_INFO_EVTCHN_MASK,
    SHARED_INFO_EVTCHN_PENDING,
    VCPU_INFO_PENDING_SEL,
    VCPU_INFO_UPCALL_PENDING,
)
from pvirq.linux.irq import IrqError
from pvirq.linux.irq26 import IrqChip26, IrqDesc26, IrqLayer26
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Personality
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


class XenLinuxPorts(Personality):
    """The ports of one kernel.

    `mem` and `words` (of the guest's word size) are machine memory; `pending_words`, `mask_words` and `selector` (by
    CPU) are indices into `words`. Dynamic IRQs are numbered from `dynirq_base` up.
    """

    irq: IrqLayer26
    type_shift: ClassVar[int]  # layout of irq_info
    index_shift: ClassVar[int]

    def __init__(self, kernel: Kernel[Any], irq: IrqLayer26, *, dynirq_base: int) -> None:
        self.kernel = kernel
        self.domain = kernel.domain
        self.irq = irq
        self.dynirq_base = dynirq_base
        self.nr_irqs = dynirq_base + NR_DYNIRQS
        self.nr_cpus = len(self.domain.vcpus)
        self._map_shared_info()
        self.evtchn_to_irq: dict[int, int] = {}
        self.irq_info = [0] * self.nr_irqs
        self.evtchn_mask = (1 << self.index_shift) - 1
        self.cpu_evtchn = bytearray(self.nr_channels)  # the CPU that each port notifies
        self.cpu_evtchn_mask = [[0] * self.word_bits for _ in range(self.nr_cpus)]

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

    def _close(self, port: int) -> None:
        try:
            evtchn.close(self.domain, port)
        except XenError as error:
            raise AssertionError(f"port {port} is not ours to close") from error

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


def dynirq_chip(events: XenLinuxPorts, name: str) -> IrqChip26:
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

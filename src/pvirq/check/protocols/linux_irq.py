"""IRQs that Linux makes of event channels: irq_info, masking with reasons, edge handling, late EOI, change of CPU.

Follows drivers/xen/events/events_base.c, kernel/irq/chip.c (handle_edge_irq) and drivers/xen/evtchn.c, each function as
it was in one of several states of the code (`Code`). Delays of EOIs and moves that wait for the next interrupt are left
out.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from pvirq.check.protocols.twolevel import (
    SharedInfo,
    clear_evtchn,
    evtchn_bind_vcpu,
    mask_evtchn,
    unmask_evtchn,
)
from pvirq.check.protocols.upcall import CpuEvents
from pvirq.check.steps import Lock, Model, Thread, Var, fail, note
from pvirq.linux.events_info import MASK_EOI_PENDING, MASK_EXPLICIT, MASK_TEMPORARY


class Active(enum.Enum):
    """When the flag is reset that keeps an event from being handled twice at once."""

    NONE = "there is no such flag"
    ACK = "as the event is acknowledged"
    EOI = "with its EOI"
    LOCKED = "with its EOI, as one with the unmasking that comes of it"


@dataclass(frozen=True)
class Code:
    """The state of the code: whether a masked port keeps the reasons why, what is_active does, whether the chip is
    xen-dyn-lateeoi or xen-dyn, and whether an event that is left to the CPU that runs the handler waits for an EOI
    (which it doesn't in any Linux)."""

    mask_reasons: bool
    is_active: Active
    late_eoi: bool = True
    left_waits: bool = False


LINUX_3_13: Final = Code(False, Active.NONE, late_eoi=False)
LINUX_5_10: Final = Code(False, Active.NONE)
LINUX_5_12: Final = Code(True, Active.ACK)
LINUX_5_14: Final = Code(True, Active.EOI)


@dataclass(frozen=True)
class Irq:
    """One event channel as an IRQ: irq_info, and its irq_desc."""

    code: Code
    info: SharedInfo
    cpus: tuple[CpuEvents, ...]
    port: int
    lock: Lock  # irq_info->lock
    mask_reason: Var
    is_active: Var
    cpu: Var
    desc_lock: Lock
    in_progress: Var  # IRQD_IRQ_INPROGRESS
    pending: Var  # IRQS_PENDING
    masked: Var  # IRQD_IRQ_MASKED
    enabled: Var  # /dev/xen/evtchn: 0 from when its handler has run until the process writes the port back
    warns: bool  # a handler that runs while it isn't enabled is what must not be


def irq(
    model: Model,
    code: Code,
    info: SharedInfo,
    cpus: tuple[CpuEvents, ...],
    port: int,
    *,
    cpu: int = 0,
    warns: bool = True,
) -> Irq:
    """An IRQ that is set up, unmasked and bound to CPU `cpu`."""
    return Irq(
        code, info, cpus, port,
        model.lock("info->lock"), model.var("mask_reason"), model.var("is_active"), model.var("info->cpu", cpu),
        model.lock("desc->lock"), model.var("INPROGRESS"), model.var("PENDING"), model.var("MASKED"),
        model.var("enabled", 1), warns,
    )  # fmt: skip


# -- masking ----------------------------------------------------------------------------------------------------------


def do_mask(irq: Irq, reason: int) -> Thread:
    yield irq.lock.acquire()
    reasons = yield irq.mask_reason.read()
    if not reasons:
        yield from mask_evtchn(irq.info, irq.port)
    yield irq.mask_reason.write(reasons | reason)
    yield irq.lock.release()


def do_unmask(irq: Irq, reason: int, cpu: int) -> Thread:
    yield irq.lock.acquire()
    if irq.code.is_active is Active.LOCKED and reason == MASK_EOI_PENDING:
        yield irq.is_active.write(0).saying("resets is_active")
    reasons = (yield irq.mask_reason.read()) & ~reason
    yield irq.mask_reason.write(reasons)
    if not reasons:
        yield from unmask(irq, cpu)
    yield irq.lock.release()


def unmask(irq: Irq, cpu: int) -> Thread:
    """unmask_evtchn on `cpu`, whose port ever it is."""
    yield from unmask_evtchn(irq.info, irq.port, cpu, (yield irq.cpu.read()))


# -- the chip ---------------------------------------------------------------------------------------------------------


def ack(irq: Irq) -> Thread:
    """ack_dynirq; with late EOIs lateeoi_ack_dynirq, which was mask_ack_dynirq before there were reasons."""
    if irq.code.late_eoi and irq.code.mask_reasons:
        yield from do_mask(irq, MASK_EOI_PENDING)
    elif irq.code.late_eoi:
        yield from mask_evtchn(irq.info, irq.port)
    if irq.code.is_active is Active.ACK:
        yield irq.is_active.write(0).saying("resets is_active")
    yield from clear_evtchn(irq.info, irq.port)


def mask_ack(irq: Irq) -> Thread:
    """mask_ack_dynirq, lateeoi_mask_ack_dynirq: no EOI is thought to come for it."""
    if irq.code.mask_reasons:
        yield from do_mask(irq, MASK_EXPLICIT | (MASK_EOI_PENDING if irq.code.left_waits else 0))
    else:
        yield from mask_evtchn(irq.info, irq.port)
    if irq.code.is_active is not Active.NONE and not irq.code.left_waits:
        yield irq.is_active.write(0).saying("resets is_active")
    yield from clear_evtchn(irq.info, irq.port)


def enable_dynirq(irq: Irq, cpu: int) -> Thread:
    """irq_unmask of the chip."""
    if irq.code.mask_reasons:
        yield from do_unmask(irq, MASK_EXPLICIT, cpu)
    else:
        yield from unmask(irq, cpu)


def xen_irq_lateeoi(irq: Irq, cpu: int) -> Thread:
    """The handler is done with the event, and says so on `cpu`."""
    if irq.code.is_active is Active.EOI:
        yield irq.is_active.write(0).saying("resets is_active")
    if irq.code.mask_reasons:
        yield from do_unmask(irq, MASK_EOI_PENDING, cpu)
    else:
        yield from unmask(irq, cpu)


# -- the event loop ---------------------------------------------------------------------------------------------------


def handle_irq_for_port(irq: Irq, cpu: int) -> Thread:
    if irq.code.is_active is Active.LOCKED:
        yield irq.lock.acquire()
    if irq.code.is_active is not Active.NONE:
        active = yield irq.is_active.xchg(1).saying("sets is_active")
    else:
        active = 0
    if irq.code.is_active is Active.LOCKED:
        yield irq.lock.release()
    if not active:
        yield from handle_edge_irq(irq, cpu)


def handle_edge_irq(irq: Irq, cpu: int) -> Thread:
    yield irq.desc_lock.acquire()
    if (yield irq.in_progress.read().saying("does another CPU run the handler?")):
        yield irq.pending.write(1).saying("leaves the event to the CPU that runs the handler")
        yield from mask_ack(irq)
        yield irq.masked.write(1)
    else:
        yield from ack(irq)
        again = True
        while again:
            if (yield irq.pending.read()) and (yield irq.masked.read()):
                yield from enable_dynirq(irq, cpu)
                yield irq.masked.write(0)
            yield irq.pending.write(0)
            yield irq.in_progress.write(1).saying("is to run the handler")
            yield irq.desc_lock.release()
            yield from evtchn_interrupt(irq)
            yield irq.desc_lock.acquire()
            yield irq.in_progress.write(0).saying("the handler has run")
            again = yield irq.pending.read()
    yield irq.desc_lock.release()


def xen_rebind_evtchn_to_cpu(irq: Irq, target: int, cpu: int, *, mask: bool = True) -> Thread:
    """irq_set_affinity, executed on `cpu`: the port goes to CPU `target`. Before Linux 3.14 without `mask`."""
    yield irq.desc_lock.acquire()
    masked = False
    if mask and irq.code.mask_reasons:
        yield from do_mask(irq, MASK_TEMPORARY)
    elif mask:
        masked = yield from mask_evtchn(irq.info, irq.port)
    yield from evtchn_bind_vcpu(irq.info, irq.port, target)
    yield from bind_evtchn_to_cpu(irq, target)
    if mask and irq.code.mask_reasons:
        yield from do_unmask(irq, MASK_TEMPORARY, cpu)
    elif mask and not masked:
        yield from unmask(irq, cpu)
    yield irq.desc_lock.release()


def bind_evtchn_to_cpu(irq: Irq, target: int) -> Thread:
    """The guest's own books (evtchn_2l_bind_to_cpu, and info->cpu)."""
    word, bit = irq.info.at(irq.port)
    old = yield irq.cpu.read()
    yield irq.cpus[old].mask[word].clear_bit(bit).saying(f"port {irq.port} isn't CPU {old}'s any more")
    yield irq.cpus[target].mask[word].set_bit(bit).saying(f"port {irq.port} is CPU {target}'s")
    yield irq.cpu.write(target)


# -- the driver: /dev/xen/evtchn --------------------------------------------------------------------------------------


def evtchn_interrupt(irq: Irq) -> Thread:
    """The handler of /dev/xen/evtchn: the port is the user's until the user writes it back (its ring_prod_lock is
    held around this). With the chip xen-dyn, a handler that does nothing."""
    if not irq.code.late_eoi:
        yield note("runs the handler")
    elif not (yield irq.enabled.xchg(0).saying("runs the handler")) and irq.warns:
        fail(f"port {irq.port} is handled again, and its EOI hasn't come")


def evtchn_user(irq: Irq, cpu: int) -> Thread:
    """A process that reads events and writes each back, for ever (evtchn_write)."""
    while True:
        yield irq.enabled.wait(_not).saying("waits for an event")
        yield irq.enabled.write(1).saying("enables the port again")
        yield from xen_irq_lateeoi(irq, cpu)


def _not(value: int) -> bool:
    return not value

"""Interrupts that are bound to guests: sharing, the EOI that a guest owes, and what happens when it fails to pay.

"Handling of guest-bound physical irqs" in xen/arch/x86/irq.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.xen.irq import IRQ_DISABLED, IRQ_GUEST, IRQ_INPROGRESS, NO_IRQ_TYPE, IrqDesc, Irqs
from pvirq.xen.lapic import LocalApic
from pvirq.xen.timer import Timer

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu

# The third kind, 1, is an unmask from any CPU: for the 8259A's lines, and for levels with ioapic_ack=old.
ACKTYPE_NONE: Final = 0  # the hypervisor acknowledged it already
ACKTYPE_EOI: Final = 2  # an EOI on the CPU that was interrupted

EOI_TIMEOUT_NS: Final = 1_000_000


class Pirq:
    """A domain's physical IRQ (struct pirq). `irq`: the hypervisor's number, 0 for none, -1 set aside
    (PIRQ_ALLOCATED), else negative: unmapped while it was bound. `masked`: the guest owes an EOI.
    """

    __slots__ = ("evtchn", "irq", "masked", "pirq")

    def __init__(self, pirq: int) -> None:
        self.pirq = pirq
        self.evtchn = 0
        self.irq = 0
        self.masked = False


class GuestAction:
    """Who an interrupt is bound to (irq_guest_action_t): `guests` in the order of their binding.

    `in_flight` counts those that owe an EOI, `eoi_cpus` is the bitmap of CPUs on which the EOI is due.
    """

    __slots__ = (
        "ack_type", "desc", "eoi_cpus", "eoi_deadline", "eoi_timer", "guests", "in_flight", "irqs", "shareable",
    )  # fmt: skip

    def __init__(self, irqs: Irqs, desc: IrqDesc, shareable: bool) -> None:
        self.irqs = irqs
        self.desc = desc
        self.shareable = shareable
        self.ack_type = acktype(desc)
        self.guests: list[tuple[Domain, Pirq]] = []
        self.in_flight = 0
        self.eoi_cpus = 0
        self.eoi_deadline = 0  # when the EOI is forced, in ns; 0: none is due
        self.eoi_timer: Timer | None = None

    def do_irq(self, apic: LocalApic, vector: int) -> None:
        """Send it to every guest that shares it (do_IRQ_guest)."""
        desc = self.desc
        if not self.guests:
            # It slipped through while the last guest's EOI was still due.
            desc.handler.end(desc, apic)
            return
        desc.count += 1
        if self.ack_type == ACKTYPE_NONE:
            for domain, pirq in self.guests:
                send_guest_pirq(domain, pirq)
            return
        apic.pending_eoi.append([desc.irq, vector, 0])
        self.eoi_cpus |= 1 << apic.cpu
        for domain, pirq in self.guests:
            if not pirq.masked:
                pirq.masked = True
                self.in_flight += 1
            send_guest_pirq(domain, pirq)
        clock = self.irqs.clock
        self.eoi_deadline = clock.now() + EOI_TIMEOUT_NS
        if self.eoi_timer is None:
            self.eoi_timer = clock.at(self.eoi_deadline, self._timer)

    def _timer(self) -> None:
        """One timer for many interrupts: it looks whether it is time by now."""
        self.eoi_timer = None
        if self.eoi_deadline:
            if self.irqs.clock.now() < self.eoi_deadline:
                self.eoi_timer = self.irqs.clock.at(self.eoi_deadline, self._timer)
            else:
                self.eoi_deadline = 0
                self.force_eoi()

    def force_eoi(self) -> None:
        """A guest didn't EOI within a millisecond: it is done without it (irq_guest_eoi_timer_fn)."""
        if not self.in_flight:
            return
        for _, pirq in self.guests:
            if pirq.masked:
                pirq.masked = False
                self.in_flight -= 1
        assert not self.in_flight, "every guest that owes an EOI shares the line"
        set_eoi_ready(self.irqs, self)


def send_guest_pirq(domain: Domain, pirq: Pirq) -> None:
    """Raise the event of a physical IRQ (send_guest_pirq)."""
    port = pirq.evtchn
    if port:
        evtchn = domain.evtchn
        channel = evtchn.channels[port]
        evtchn.set_pending(channel, channel.notify_vcpu)


def acktype(desc: IrqDesc) -> int:
    """What a guest must do after an interrupt of this kind (irq_acktype).

    Messages count as edges, except where there is no way to mask them. Levels are EOI'd on the CPU that took them.
    """
    if desc.handler is NO_IRQ_TYPE:
        return ACKTYPE_NONE
    if desc.msi_desc is not None:
        return ACKTYPE_NONE if desc.msi_desc.maskable else ACKTYPE_EOI
    return ACKTYPE_EOI if desc.handler.has_end else ACKTYPE_NONE


def set_eoi_ready(irqs: Irqs, action: GuestAction) -> None:
    """On each CPU that took it the EOI may be made now; it is, once those of higher vectors have been."""
    cpus = action.eoi_cpus
    if action.in_flight or not cpus:
        return
    action.eoi_cpus = 0
    apics, irq = irqs.apics, action.desc.irq
    apics.disable()
    for apic in apics.cpus:
        if cpus >> apic.cpu & 1:
            stack = apic.pending_eoi
            entry = stack[-1]
            if entry[0] != irq:
                entry = next(entry for entry in reversed(stack) if entry[0] == irq)
            entry[2] = 1
            flush_ready_eoi(irqs, apic)
    apics.enable()


def flush_ready_eoi(irqs: Irqs, apic: LocalApic) -> None:
    """EOIs can only be made for the highest interrupt in service: take all from the top that are ready.

    One whose line has become an edge meanwhile is never EOI'd, as on real Xen: that CPU takes no interrupt of its class
    or below any more.
    """
    stack = apic.pending_eoi
    while stack and stack[-1][2]:
        desc = irqs.desc(stack[-1][0])
        stack.pop()
        if desc.handler.has_end:
            desc.handler.end(desc, apic)


def desc_guest_eoi(desc: IrqDesc, pirq: Pirq) -> None:
    """A guest's EOI (desc_guest_eoi): nothing where it owes none; the line's, where it was the last to."""
    action = desc.guest_action
    if action is None or not pirq.masked:
        return
    pirq.masked = False
    action.in_flight -= 1
    if action.in_flight:
        return
    action.eoi_deadline = 0
    set_eoi_ready(action.irqs, action)


def pirq_guest_bind(irqs: Irqs, vcpu: Vcpu, pirq: Pirq, will_share: bool) -> GuestAction:
    """Bind a mapped interrupt to a domain (pirq_guest_bind); called with interrupts off.

    Raises EINVAL (not mapped), EBUSY: Xen's own, or one side doesn't share, or too many guests do.
    """
    domain = vcpu.domain
    if pirq.irq <= 0:
        raise XenError(Errno.EINVAL, f"pirq {pirq.pirq} is not mapped")
    desc = irqs.desc(pirq.irq)
    cannot = f"Cannot bind IRQ{pirq.pirq} to dom{domain.domid}."
    max_guests = irqs.max_guests if will_share else 1
    action = desc.guest_action
    if action is None:
        if desc.action is not None:
            raise _refused(irqs, f"{cannot} In use by '{desc.action.name}'.")  # type: ignore[union-attr]
        action = GuestAction(irqs, desc, will_share)
        desc.action = action
        desc.status |= IRQ_GUEST
        desc.handler.set_affinity(desc, 1 << vcpu.vcpu_id % irqs.nr_cpus)
        desc.status &= ~IRQ_DISABLED
        desc.handler.startup(desc)
    elif not will_share or not action.shareable:
        raise _refused(irqs, f"{cannot} {'Others do not share' if will_share else 'Will not share with others'}.")
    if len(action.guests) >= max_guests:
        raise _refused(
            irqs,
            f"Cannot bind IRQ{pirq.pirq} to d{domain.domid}: already at max share {irqs.max_guests}"
            " (increase with irq-max-guests= option)",
        )
    action.guests.append((domain, pirq))
    return action


def _refused(irqs: Irqs, message: str) -> XenError:
    irqs.log.append(message)
    return XenError(Errno.EBUSY, message)


def unbind(irqs: Irqs, domain: Domain, pirq: Pirq, desc: IrqDesc) -> None:
    """Take a domain off an interrupt; the last one shuts it down (__pirq_guest_unbind)."""
    action = desc.guest_action
    if action is None:
        return  # its device was removed
    action.guests = [entry for entry in action.guests if entry[0] is not domain]
    if pirq.masked:
        pirq.masked = False
        action.in_flight -= 1
        if not action.in_flight and action.guests:
            set_eoi_ready(irqs, action)
    if action.guests:
        return
    # First off, then the EOI: or a level that is still asserted would interrupt again.
    desc.handler.disable(desc)
    desc.status |= IRQ_DISABLED
    if action.eoi_cpus:
        set_eoi_ready(irqs, action)
    action.eoi_deadline = 0
    desc.action = None
    desc.status &= ~(IRQ_GUEST | IRQ_INPROGRESS)
    desc.handler.shutdown(desc)

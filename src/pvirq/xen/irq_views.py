"""Physical interrupts as the hypervisor's 'i' debug key prints them (dump_irqs, dump_ioapic_irq_info)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.xen.bitmap import bitmap_list
from pvirq.xen.irq import NO_IRQ_TYPE, IrqDesc, XenAction

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor
    from pvirq.xen.ioapic import IoApic, RouteEntry
    from pvirq.xen.irq_guest import Pirq

# The vectors that go to functions of Xen's own, without a descriptor.
_DIRECT: Final = (
    (0x22, "irq_move_cleanup_interrupt"),
    (0xF9, "pmu_apic_interrupt"),
    (0xFA, "apic_timer_interrupt"),
    (0xFB, "call_function_interrupt"),
    (0xFC, "event_check_interrupt"),
    (0xFD, "invalidate_interrupt"),
    (0xFE, "error_interrupt"),
    (0xFF, "spurious_interrupt"),
)
_DELIVERY: Final = ("Fixed", "LoPri")


def debug_i(hypervisor: Hypervisor) -> str:
    """The console output of the 'i' debug key: every interrupt that is set up, who has it, and its I/O APIC pin."""
    irqs = hypervisor.irqs
    lines = ["IRQ information:"]
    lines += (_irq_line(desc) for desc in irqs.descs if desc.handler is not NO_IRQ_TYPE)
    lines.append("Direct vector information:")
    lines += (f"   {vector:#04x} -> {function}()" for vector, function in _DIRECT)
    lines.append("IO-APIC interrupt information:")
    for irq, pin in irqs.ioapic.pins:
        lines.append(f"    IRQ{irq:3d} Vec{irqs.descs[irq].vector:3d}:")
        lines.append(f"      Apic 0x00, Pin {pin:2d}: {_entry(irqs.ioapic, pin)}")
    return "".join(f"(XEN) {line}\n" for line in lines)


def _irq_line(desc: IrqDesc) -> str:
    affinity, cpus = _cpus(desc.affinity), _cpus(desc.cpu_mask)
    line = (
        f"   IRQ:{desc.irq:4d} vec:{desc.vector:02x} {desc.handler.typename:<15} status={desc.status:03x}"
        f" aff:{{{affinity}}}/{{{cpus}}} "
    )
    action = desc.guest_action
    if action is not None:
        guests = ",".join(_guest(domain, pirq) for domain, pirq in action.guests)
        return f"{line}in-flight={action.in_flight}{' ' if guests else ''}{guests}"
    if isinstance(desc.action, XenAction):
        return f"{line}{desc.action.symbol}()"
    return f"{line}mapped, unbound"


def _cpus(mask: int) -> str:
    return bitmap_list([cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1])


def _guest(domain: Domain, pirq: Pirq) -> str:
    evtchn = domain.evtchn
    pending, masked = evtchn.is_pending(pirq.evtchn), evtchn.is_masked(pirq.evtchn)
    return f"d{domain.domid}:{pirq.pirq:3d}({'-P'[pending]}{'-M'[masked]}{'-M'[pirq.masked]})"


def _entry(ioapic: IoApic, pin: int) -> str:
    rte: RouteEntry = ioapic.rtes[pin]
    return (
        f"vec={rte.vector:02x} delivery={_DELIVERY[rte.delivery_mode]:<5} dest={'PL'[rte.dest_mode]}"
        f" status=0 polarity={rte.polarity} irr={rte.irr != 0:d}"
        f" trig={'EL'[rte.trigger]} mask={rte.mask} dest_id:{rte.dest:02x}"
    )

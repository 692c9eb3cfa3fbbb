"""/proc/interrupts of 2.6 kernels, to the byte: arch/{i386,x86_64}/kernel/irq-xen.c and arch/x86/kernel/irq-xen.c.

Style "source" is what the sources print. Style "writeup" is that of two often-quoted listings, whose columns are
narrower than those of any source that was found, and which lack the blanks at the ends of lines.
"""

from __future__ import annotations

from typing import Literal

from pvirq.linux.irq26 import IrqDesc26, IrqLayer26
from pvirq.linux.proc import IrqStat, irq_width

Style = Literal["source", "writeup"]
Arch = Literal["i386", "x86_64"]


def _counts(values: list[int]) -> str:
    return "".join(f"{value & 0xFFFFFFFF:10d} " for value in values)


def _cpus(irqs: IrqLayer26) -> list[int]:
    return [cpu for cpu in range(irqs.nr_cpus) if irqs.online >> cpu & 1]


def _actions(desc: IrqDesc26) -> str:
    return ", ".join(action.name for action in desc.actions)


def _lines(irqs: IrqLayer26) -> list[IrqDesc26]:
    return [irqs.descs[irq] for irq in sorted(irqs.descs)]


def _header(cpus: list[int], width: int, style: Style) -> str:
    text = " " * width + "".join(f"CPU{cpu:<8d}" for cpu in cpus)
    return (text.rstrip() if style == "writeup" else text) + "\n"


def interrupts_2618(irqs: IrqLayer26, stats: list[IrqStat], *, arch: Arch, style: Style) -> str:
    """2.6.18: lines with a handler; below them NMI and LOC by CPU, ERR, and on i386 MIS."""
    cpus = _cpus(irqs)
    text = _header(cpus, 11, style)
    for desc in _lines(irqs):
        if desc.actions:
            chip = f"  {desc.chip.name}" if style == "writeup" else f" {desc.chip.name:>14}"
            text += f"{desc.irq:3d}: {_counts([desc.kstat[cpu] for cpu in cpus])}{chip}  {_actions(desc)}\n"
    others = [
        f"NMI: {_counts([stats[cpu].nmi for cpu in cpus])}",
        f"LOC: {_counts([stats[cpu].apic_timer for cpu in cpus])}",
        f"ERR: {irqs.err_count:10d}",
    ]
    if arch == "i386":
        others.append(f"MIS: {irqs.mis_count:10d}")
    return text + "".join((row.rstrip() if style == "writeup" else row) + "\n" for row in others)


def interrupts_suse(
    irqs: IrqLayer26, stats: list[IrqStat], *, mce: bool, thermal: bool = False, threshold: bool = False, style: Style
) -> str:
    """2.6.27 to 2.6.34: lines with a handler or a count; below them those rows that a kernel for Xen has.

    `mce`, `thermal`, `threshold` are its configuration (CONFIG_X86_MCE, CONFIG_X86_THERMAL_VECTOR,
    CONFIG_X86_MCE_THRESHOLD).
    """
    cpus = _cpus(irqs)
    width = irq_width(irqs.nr_irqs)
    text = _header(cpus, width + 8, style)
    for desc in _lines(irqs):
        counts = [desc.kstat[cpu] for cpu in cpus]
        if desc.actions or any(counts):
            text += f"{desc.irq:{width}d}: {_counts(counts)}{_flow(desc, style)}"
            text += f"  {_actions(desc)}\n" if desc.actions else "\n"
    rows = [
        ("NMI", "nmi", "Non-maskable interrupts"),
        ("RES", "resched", "Rescheduling interrupts"),
        ("CAL", "call", "Function call interrupts"),
    ]
    if thermal:
        rows.append(("TRM", "thermal", "Thermal event interrupts"))
    if threshold:
        rows.append(("THR", "threshold", "Threshold APIC interrupts"))
    if mce:
        rows += [
            ("MCE", "mce_exception", "Machine check exceptions"),
            ("MCP", "mce_poll", "Machine check polls"),
        ]
    for label, field, what in rows:
        text += f"{label:>{width}}: {_counts([getattr(stats[cpu], field) for cpu in cpus])}  {what}\n"
    return text


def _flow(desc: IrqDesc26, style: Style) -> str:
    name = desc.name or "<NULL>"  # as these kernels print a string that isn't there
    if style == "writeup":
        return "  " + f"{desc.chip.name}-{name}".ljust(14)
    return f" {desc.chip.name:>8}-{name:<8}"

"""/proc/interrupts, to the byte: kernel/irq/proc.c's rows, and below them those of arch/x86/kernel/irq.c."""

from __future__ import annotations

from dataclasses import dataclass

from pvirq.linux.irq import IrqDesc, IrqLayer


@dataclass
class IrqStat:
    """The counts of one CPU that belong to no line (irq_cpustat_t and the machine-check counters)."""

    nmi: int = 0
    apic_timer: int = 0
    spurious: int = 0
    apic_perf: int = 0
    apic_irq_work: int = 0
    icr_read_retry: int = 0
    resched: int = 0
    call: int = 0
    tlb: int = 0
    thermal: int = 0
    threshold: int = 0
    deferred_error: int = 0
    mce_exception: int = 0
    mce_poll: int = 0
    posted: int = 0
    posted_nested: int = 0
    posted_wakeup: int = 0


# Label, field of IrqStat, text, in Linux 6.1's order. The machine-check rows are there where that code is
# built in; the two error counts, between them and the last three, have one number each.
X86_ROWS = (
    ("NMI", "nmi", "Non-maskable interrupts"),
    ("LOC", "apic_timer", "Local timer interrupts"),
    ("SPU", "spurious", "Spurious interrupts"),
    ("PMI", "apic_perf", "Performance monitoring interrupts"),
    ("IWI", "apic_irq_work", "IRQ work interrupts"),
    ("RTR", "icr_read_retry", "APIC ICR read retries"),
    ("RES", "resched", "Rescheduling interrupts"),
    ("CAL", "call", "Function call interrupts"),
    ("TLB", "tlb", "TLB shootdowns"),
    ("TRM", "thermal", "Thermal event interrupts"),
)
X86_MCE_ROWS = (
    ("THR", "threshold", "Threshold APIC interrupts"),
    ("DFR", "deferred_error", "Deferred Error APIC interrupts"),
    ("MCE", "mce_exception", "Machine check exceptions"),
    ("MCP", "mce_poll", "Machine check polls"),
)
X86_KVM_ROWS = (
    ("PIN", "posted", "Posted-interrupt notification event"),
    ("NPI", "posted_nested", "Nested posted-interrupt event"),
    ("PIW", "posted_wakeup", "Posted-interrupt wakeup event"),
)


def irq_width(nr_irqs: int) -> int:
    """The width of the number column: three digits, more where there are 1000 lines and up."""
    width, limit = 3, 1000
    while width < 10 and limit <= nr_irqs:
        width, limit = width + 1, limit * 10
    return width


def _counts(values: list[int]) -> str:
    return "".join(f"{value & 0xFFFFFFFF:10d} " for value in values)


def online_cpus(irqs: IrqLayer) -> list[int]:
    return [cpu for cpu in range(irqs.nr_cpus) if irqs.online >> cpu & 1]


def header(irqs: IrqLayer) -> str:
    return " " * (irq_width(irqs.nr_irqs) + 8) + "".join(f"CPU{cpu:<8d}" for cpu in online_cpus(irqs)) + "\n"


def irq_row(irqs: IrqLayer, desc: IrqDesc) -> str:
    """One line's row; empty where nobody uses it and it never fired (show_interrupts)."""
    counts = [desc.kstat[cpu] & 0xFFFFFFFF for cpu in online_cpus(irqs)]
    if not desc.actions and not any(counts):
        return ""
    width = irq_width(irqs.nr_irqs)
    row = f"{desc.irq:{width}d}: {_counts(counts)} {desc.chip.name if desc.chip else 'none':>8} {'':{width}}"
    if desc.name:
        row += f"-{desc.name:<8}"
    if desc.actions:
        row += "  " + ", ".join(action.name for action in desc.actions)
    return row + "\n"


def irq_rows(irqs: IrqLayer) -> str:
    return "".join(irq_row(irqs, irqs.descs[irq]) for irq in sorted(irqs.descs))


def x86_rows(irqs: IrqLayer, stats: list[IrqStat], *, mce: bool, err: int = 0, mis: int = 0) -> str:
    """The rows of arch_show_interrupts; `mce`: with those of the machine-check code."""
    width = irq_width(irqs.nr_irqs)
    cpus = online_cpus(irqs)

    def rows(table: tuple[tuple[str, str, str], ...]) -> str:
        return "".join(
            f"{label:>{width}}: {_counts([getattr(stats[cpu], name) for cpu in cpus])}  {text}\n"
            for label, name, text in table
        )

    errors = f"{'ERR':>{width}}: {err & 0xFFFFFFFF:10d}\n{'MIS':>{width}}: {mis & 0xFFFFFFFF:10d}\n"
    return rows(X86_ROWS) + (rows(X86_MCE_ROWS) if mce else "") + errors + rows(X86_KVM_ROWS)

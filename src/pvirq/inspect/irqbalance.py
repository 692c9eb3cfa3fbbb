"""What irqbalance makes of a row of /proc/interrupts, and so whether it moves the line.

It looks at words, and its rule for Xen has changed over the years:

- up to 2018 the word before the last has to contain "xen-dyn-event", as kernels before 4.x printed it;
- then a word has to contain "xen-dyn" and the one before the last "-event";
- releases since a change for arm64 look for "-event" in the handler's name instead, where it isn't.

What isn't recognised becomes "other", which is only spread over packages: on most guests over nothing.
(irqbalance's procinterrupts.c.)
"""

from __future__ import annotations

from dataclasses import dataclass

from pvirq.inspect.model import XEN_CHIPS, IrqRow


@dataclass(frozen=True)
class BalanceClass:
    """Which rules take the row for a Xen event. `reason` why it won't be balanced, "" where there is none."""

    joined: bool
    parted: bool
    by_name: bool
    reason: str


def class_of(row: IrqRow) -> BalanceClass:
    """What irqbalance takes a row for."""
    words = row.text.split()
    before_last = words[-2] if len(words) > 1 else ""
    xen = row.chip in XEN_CHIPS or row.chip.startswith(("Dynamic", "Phys"))
    joined = "xen-dyn-event" in before_last
    parted = "-event" in before_last and any("xen-dyn" in word for word in words[:-1])
    by_name = bool(row.actions) and "-event" in " ".join(row.actions) and "xen-dyn" in row.chip
    return BalanceClass(joined, parted, by_name, _reason(row, joined, parted, by_name) if xen else "")


def _reason(row: IrqRow, joined: bool, parted: bool, by_name: bool) -> str:
    if row.per_cpu:
        return ""  # nobody should
    if row.chip.startswith("Dynamic"):
        return "as it knows no line whose chip is called Dynamic"
    if row.chip.startswith(("xen-pirq", "Phys")):
        return ""  # ordinary lines, by their device
    if row.flow != "event":
        return "as a VIRQ's line is class other to it"
    if not parted:
        return "as blanks in a handler's name hide the word -event from it"
    if not by_name and not joined:
        return "if it is from before 2018, or one that looks for -event in the handler's name"
    if not by_name:
        return "if it is one that looks for -event in the handler's name"
    return ""

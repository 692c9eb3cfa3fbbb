"""Interrupt lines over suspend and resume (kernel/irq/pm.c of Linux 6.1).

Before the machine stops, every line is disabled but those that ask to stay (IRQF_NO_SUSPEND). Afterwards lines are
enabled again: first, before any device, those of IRQF_EARLY_RESUME, then the rest. IRQF_FORCE_RESUME opens the chip
though the line was never disabled, since what is behind it is new.
"""

from __future__ import annotations

from pvirq.linux.irq import IrqDesc, IrqLayer
from pvirq.linux.irqdesc import (
    IRQF_EARLY_RESUME,
    IRQF_FORCE_RESUME,
    IRQF_NO_SUSPEND,
    IRQS_SUSPENDED,
)


def suspend_device_irqs(layer: IrqLayer) -> None:
    """Disable every line in use that doesn't stay open."""
    for desc in layer.descs.values():
        if desc.actions and not any(action.flags & IRQF_NO_SUSPEND for action in desc.actions):
            layer.disable_irq(desc.irq)
            desc.istate |= IRQS_SUSPENDED


def resume_irqs(layer: IrqLayer, *, early: bool) -> None:
    """Enable lines again: `early` only those of IRQF_EARLY_RESUME, later all (resume_irqs)."""
    for desc in list(layer.descs.values()):
        if not early or (desc.actions and desc.actions[0].flags & IRQF_EARLY_RESUME):
            _resume_irq(layer, desc)


def _resume_irq(layer: IrqLayer, desc: IrqDesc) -> None:
    if not desc.istate & IRQS_SUSPENDED:
        if not any(action.flags & IRQF_FORCE_RESUME for action in desc.actions):
            return
        # As if it had been disabled, so that enabling it reaches the chip.
        desc.depth += 1
        desc.disabled = desc.masked = True
    desc.istate &= ~IRQS_SUSPENDED
    layer.enable_irq(desc.irq)

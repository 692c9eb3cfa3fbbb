"""Finding the line of a device whose driver doesn't know it (kernel/irq/autoprobe.c of Linux 6.1).

All lines are opened that nobody uses and that may be probed (no IRQ_NOPROBE); then the device is made to interrupt.
For a thread, as it sleeps in between:

    mask = yield from probe_irq_on(layer, msleep)
    # make the device interrupt, and give it time
    irq = probe_irq_off(layer)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pvirq.linux.irq import IrqDesc, IrqLayer
from pvirq.linux.irqdesc import IRQ_NOPROBE, IRQ_TYPE_PROBE, IRQS_AUTODETECT, IRQS_WAITING
from pvirq.linux.kthread import Body


def _unused(layer: IrqLayer) -> Iterator[IrqDesc]:
    for irq in sorted(layer.descs, reverse=True):
        desc = layer.descs[irq]
        if not desc.actions and not desc.status & IRQ_NOPROBE and desc.chip is not None:
            yield desc


def probe_irq_on(layer: IrqLayer, msleep: Callable[[int], Body[None]]) -> Body[int]:
    """Open the unused lines; a mask of those of the first 32 that are quiet now. `msleep` sleeps, in milliseconds."""
    for desc in _unused(layer):
        assert desc.chip is not None
        if desc.chip.irq_set_type is not None:
            desc.chip.irq_set_type(desc, IRQ_TYPE_PROBE)
        layer.irq_startup(desc, resend=False)
    yield from msleep(20)  # an interrupt from long ago comes now, and masks its line
    for desc in _unused(layer):
        desc.istate |= IRQS_AUTODETECT | IRQS_WAITING
        layer.irq_startup(desc, resend=False)
    yield from msleep(100)
    mask = 0
    for desc in list(layer.descs.values()):
        if desc.istate & IRQS_AUTODETECT:
            if not desc.istate & IRQS_WAITING:  # it interrupts by itself: not the one that is looked for
                desc.istate &= ~IRQS_AUTODETECT
                layer.irq_shutdown(desc)
            elif desc.irq < 32:
                mask |= 1 << desc.irq
    return mask


def probe_irq_off(layer: IrqLayer) -> int:
    """Close them again; the one that interrupted, 0 where none did, and a negative number where several did."""
    found: list[int] = []
    for irq in sorted(layer.descs):
        desc = layer.descs[irq]
        if desc.istate & IRQS_AUTODETECT:
            if not desc.istate & IRQS_WAITING:
                found.append(irq)
            desc.istate &= ~IRQS_AUTODETECT
            layer.irq_shutdown(desc)
    if len(found) > 1:
        return -found[0]
    return found[0] if found else 0

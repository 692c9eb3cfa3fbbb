"""Looking for a device's line among those that nobody uses, on domain 0's real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest

from linuxlib import ignore, run, sleep_until
from pvirq.linux.irq import IrqDesc, IrqError
from pvirq.linux.irq_probe import probe_irq_off, probe_irq_on
from pvirq.linux.irqdesc import IRQ_NOPROBE, IRQ_TYPE_PROBE
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, Kthread, sleep
from pvirq.linux.pvops import Pvops, dom0
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine

MS = 1_000_000


@pytest.fixture
def kernel() -> Iterator[Kernel[Pvops]]:
    machine = Machine(1 << 28)
    kernel = dom0(Hypervisor(machine))
    kernel.irq.request_irq(12, ignore, 0, "i8042")
    kernel.irq.modify_status(6, set=IRQ_NOPROBE)
    yield kernel
    machine.close()


def probe(
    kernel: Kernel[Pvops], interrupts: Callable[[], None], early: Callable[[], None] = lambda: None
) -> tuple[int, int]:
    """Probe in a thread; `early` happens before, `interrupts` after the lines were found quiet. The mask, the IRQ."""

    def msleep(ms: int) -> Body[None]:
        yield from sleep(kernel, ms * MS)

    def thread() -> Body[tuple[int, int]]:
        mask = yield from probe_irq_on(kernel.irq, msleep)
        interrupts()
        yield from msleep(10)
        return mask, probe_irq_off(kernel.irq)

    running = Kthread(kernel, "probe", thread())
    sleep_until(kernel.now() + 50 * MS, kernel)
    early()
    sleep_until(kernel.now() + 200 * MS, kernel)
    return running.result()


def pulse(kernel: Kernel[Pvops], *gsis: int) -> None:
    for gsi in gsis:
        kernel.domain.hypervisor.ioapic.line(gsi).pulse()


UNUSED = sum(1 << irq for irq in range(1, 16) if irq not in (6, 12))


def test_the_line_is_found(kernel: Kernel[Pvops]) -> None:
    bound = kernel.domain.evtchn.active
    assert probe(kernel, partial(pulse, kernel, 7)) == (UNUSED, 7)
    for irq in range(1, 16):
        assert kernel.irq.descs[irq].started == (irq == 12)
    assert kernel.domain.evtchn.active == bound
    assert sum(kernel.irq.descs[7].kstat) == 0  # nobody handled it
    kernel.irq.request_irq(7, ignore, 0, "parport0")
    pulse(kernel, 7)
    run(kernel)
    assert sum(kernel.irq.descs[7].kstat) == 1


def test_none_or_several(kernel: Kernel[Pvops]) -> None:
    assert probe(kernel, lambda: None) == (UNUSED, 0)
    assert probe(kernel, partial(pulse, kernel, 7, 3)) == (UNUSED, -3)
    # A line in use, and one that may not be probed, are not looked at.
    assert probe(kernel, partial(pulse, kernel, 12, 6)) == (UNUSED, 0)


def test_a_line_that_is_noisy_is_not_the_one(kernel: Kernel[Pvops]) -> None:
    assert probe(kernel, partial(pulse, kernel, 3, 7), partial(pulse, kernel, 3)) == (UNUSED & ~(1 << 3), 7)


def test_chips_are_told(kernel: Kernel[Pvops]) -> None:
    told: list[int] = []

    def set_type(desc: IrqDesc, kind: int) -> None:
        told.append(kind)

    kernel.irq.descs[3].chip = replace(kernel.events.pirq_chip, irq_set_type=set_type)
    probe(kernel, lambda: None)
    assert told == [IRQ_TYPE_PROBE]
    with pytest.raises(IrqError):
        kernel.irq.modify_status(99, set=IRQ_NOPROBE)

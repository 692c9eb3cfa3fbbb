"""The I/O APIC: its pins, what domain 0 may change of them, and what becomes of edges and levels that nobody takes."""

from __future__ import annotations

import pytest

from pirqlib import bind_line, fails, host, take
from pvirq.abi.errno import Errno
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.ioapic import IOAPIC_BASE
from pvirq.xen.irq import IRQ_DISABLED, IRQ_PENDING


def test_line_is_a_wired_or() -> None:
    hypervisor, _ = host()
    line = hypervisor.ioapic.line(20)
    first, second = [1], [1]  # equal, and yet two devices
    line.assert_(first)
    line.assert_(second)
    line.deassert(first)
    assert line.asserted
    line.pulse()  # unseen: the line is up
    assert line.raised == 1
    line.deassert(first)
    line.deassert(second)
    assert not line.asserted
    with pytest.raises(IndexError):
        hypervisor.ioapic.line(24)


def test_timer_comes_in_at_pin_2() -> None:
    hypervisor, _ = host()
    ticks = []
    desc = hypervisor.irqs.desc(0)
    assert desc.action is not None
    desc.action.handler = lambda: ticks.append(1)  # type: ignore[union-attr]
    for _ in range(3):
        hypervisor.ioapic.line(2).pulse()
    hypervisor.ioapic.line(0).pulse()  # nothing is wired there
    assert len(ticks) == 3
    assert desc.count == 3


def test_edge_at_a_masked_pin_is_lost() -> None:
    hypervisor, dom0 = host()
    physdev.setup_gsi(dom0, 7, 0, 0)
    line = hypervisor.ioapic.line(7)
    line.pulse()
    assert (line.sent, line.lost) == (0, 1)
    port = bind_line(dom0, 7)
    assert not take(dom0, port)
    line.pulse()
    assert take(dom0, port)


def test_edge_still_up_at_unmask_is_lost_too() -> None:
    hypervisor, dom0 = host()
    physdev.setup_gsi(dom0, 7, 0, 0)
    hypervisor.ioapic.line(7).assert_("card")
    port = bind_line(dom0, 7)
    assert not take(dom0, port)


def test_edge_that_nobody_has_is_masked_the_second_time() -> None:
    """Xen leaves ISA edges unmasked. One that comes unasked is remembered as pending; the next masks the pin."""
    hypervisor, dom0 = host()
    line, desc = hypervisor.ioapic.line(7), hypervisor.irqs.desc(7)
    line.pulse()
    assert (desc.status, hypervisor.ioapic.rtes[7].mask) == (IRQ_DISABLED | IRQ_PENDING, 0)
    line.pulse()
    assert hypervisor.ioapic.rtes[7].mask == 1
    line.pulse()
    assert (line.sent, line.lost) == (2, 1)
    port = bind_line(dom0, 7)
    assert not take(dom0, port)
    line.pulse()
    assert take(dom0, port)
    assert desc.count == 1


def test_masked_level_is_seen_at_unmask() -> None:
    hypervisor, dom0 = host()
    line = hypervisor.ioapic.line(10)
    line.assert_("disk")
    assert line.sent == 0
    bind_line(dom0, 10)
    assert line.sent == 1
    line.deassert("disk")
    assert line.lost == 0


def test_level_deasserted_before_unmask_is_forgotten() -> None:
    hypervisor, dom0 = host()
    line = hypervisor.ioapic.line(10)
    line.assert_("disk")
    line.deassert("disk")
    port = bind_line(dom0, 10)
    assert not take(dom0, port)
    assert line.sent == 0


def test_registers() -> None:
    _, dom0 = host(vcpus=2)
    assert physdev.apic_read(dom0, IOAPIC_BASE, 1) == 0x170020  # 24 pins, version 0x20
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x10 + 2 * 9) == 0x18960  # the SCI: level, masked
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x11 + 2 * 4) == 0x3000000  # the serial line goes to both CPUs
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x40) == 0
    fails(Errno.EINVAL, physdev.apic_read, dom0, 0xFEC01000, 1)
    fails(Errno.EINVAL, physdev.apic_write, dom0, IOAPIC_BASE, 0x40, 24)


def test_old_kernels_map_by_writing_the_entry() -> None:
    """XenLinux 2.6.18: a "vector" from the hypervisor, which is the pirq, written to the pin."""
    hypervisor, dom0 = host()
    for gsi in (12, 18):
        vector = physdev.alloc_irq_vector(dom0, gsi)
        physdev.apic_write(dom0, IOAPIC_BASE, 0x10 + 2 * gsi, vector | 0xA000 * (gsi == 18))
        port = dom0.evtchnop.bind_pirq(gsi)
        hypervisor.ioapic.line(gsi).assert_("card")
        assert take(dom0, port)
    assert [hypervisor.irqs.desc(gsi).handler.typename for gsi in (12, 18)] == ["IO-APIC-edge", "IO-APIC-level"]
    assert hypervisor.irqs.log == ["allocated vector a0 for irq 18"]


def test_line_in_use_stays_as_it_is() -> None:
    hypervisor, dom0 = host()
    bind_line(dom0, 10)
    before = physdev.apic_read(dom0, IOAPIC_BASE, 0x24)
    physdev.apic_write(dom0, IOAPIC_BASE, 0x24, 10)
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x24) == before
    assert hypervisor.irqs.log[-1] == "IO-APIC: Attempt to modify IO-APIC pin for in-use IRQ!"


def test_setup_gsi_once() -> None:
    hypervisor, dom0 = host()
    guest = hypervisor.create_domain()
    physdev.setup_gsi(dom0, 20, 1, 1)
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x10 + 2 * 20) == 0x1A900 | hypervisor.irqs.desc(20).vector
    fails(Errno.EEXIST, physdev.setup_gsi, dom0, 20, 0, 0)
    bind_line(dom0, 21)
    fails(Errno.EINVAL, physdev.setup_gsi, guest, 24, 0, 0)
    fails(Errno.EPERM, physdev.setup_gsi, guest, 23, 0, 0)
    assert dom0.pirqs.irq(20) == 0  # that is map_pirq's business
    assert physdev.map_pirq(dom0, DOMID_SELF, 1, 20, 20) == 20


def test_becoming_an_edge_forgets_the_remote_irr() -> None:
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 10), hypervisor.ioapic.line(10)
    line.assert_("disk")
    line.deassert("disk")
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x24) & 1 << 14
    higher = bind_line(dom0, 11)
    hypervisor.ioapic.line(11).assert_("net")  # so that the close of 10 can't EOI
    hypervisor.ioapic.line(11).deassert("net")
    dom0.evtchnop.close(port)
    assert physdev.apic_read(dom0, IOAPIC_BASE, 0x24) & 1 << 14
    physdev.apic_write(dom0, IOAPIC_BASE, 0x24, 10)
    assert not physdev.apic_read(dom0, IOAPIC_BASE, 0x24) & 1 << 14
    dom0.evtchnop.close(higher)
    # The EOI of the level that it was is never made: as on real Xen the CPU takes nothing of that class any more.
    port = dom0.evtchnop.bind_pirq(10)
    line.pulse()
    assert not take(dom0, port)

"""The hypervisor's descriptors: vectors, the order of interrupts on a CPU, the limit on their rate."""

from __future__ import annotations

from pirqlib import bind_line, fails, host, pass_time, take
from pvirq.abi.errno import Errno
from pvirq.xen.irq import RATELIMIT_THRESHOLD, XenAction
from pvirq.xen.lapic import LocalApic, LocalApics

MS = 1_000_000


def test_vectors_of_the_isa_lines() -> None:
    """As real Xen gave them (tests/data/guests/physdev-2.txt): 8 apart, without 0x80, irq 0 and 4 high."""
    hypervisor, _ = host()
    vectors = [hypervisor.irqs.desc(irq).vector for irq in (0, 1, 3, 4, 5, 12, 13, 15)]
    assert vectors == [0xF0, 0x30, 0x38, 0xF1, 0x40, 0x78, 0x88, 0x98]
    assert [hypervisor.irqs.nr_irqs, host(vcpus=4)[0].irqs.nr_irqs] == [208, 832]


def test_vectors_go_round() -> None:
    hypervisor, dom0 = host()
    irqs = [hypervisor.irqs.create(dom0) for _ in range(12)]
    vectors = [hypervisor.irqs.desc(irq).vector for irq in irqs]
    assert vectors == [0xA0, 0xA8, 0xB0, 0xB8, 0xC0, 0xC8, 0xD0, 0xD8, 0xE0, 0xE8, 0x31, 0x39]
    hypervisor.irqs.destroy(irqs[0])
    assert hypervisor.irqs.create(dom0) == irqs[0]


def test_line_of_the_hypervisor_can_be_taken_once() -> None:
    hypervisor, _ = host()
    calls = []
    hypervisor.irqs.setup(3, XenAction("probe", "probe", lambda: calls.append(1)))
    fails(Errno.EBUSY, hypervisor.irqs.setup, 3, XenAction("other", "other"))
    hypervisor.ioapic.line(3).pulse()
    assert calls == [1]


def test_rate_limit() -> None:
    """10,000 interrupts in 10 ms, then the line is off for 10 ms."""
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 10), hypervisor.ioapic.line(10)
    desc = hypervisor.irqs.desc(10)
    pass_time(hypervisor, 20 * MS)
    for _ in range(RATELIMIT_THRESHOLD):
        line.assert_("disk")
        line.deassert("disk")
        dom0.pirqs.eoi(10)
    assert take(dom0, port)
    assert desc.count == RATELIMIT_THRESHOLD
    # The next one begins a new 10 ms, as the last began at time 0.
    for _ in range(RATELIMIT_THRESHOLD):
        line.assert_("disk")
        line.deassert("disk")
        dom0.pirqs.eoi(10)
    assert desc.count == 2 * RATELIMIT_THRESHOLD
    line.assert_("disk")
    line.deassert("disk")
    dom0.pirqs.eoi(10)
    assert take(dom0, port)
    line.assert_("disk")
    assert not take(dom0, port)
    assert hypervisor.ioapic.rtes[10].mask
    assert desc.count == 2 * RATELIMIT_THRESHOLD + 1
    pass_time(hypervisor, 10 * MS - 1)
    assert not take(dom0, port)
    pass_time(hypervisor, 1)
    assert take(dom0, port)  # the level is still there


def test_edges_have_no_mask_and_drop_what_is_too_much() -> None:
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 1), hypervisor.ioapic.line(1)
    for _ in range(RATELIMIT_THRESHOLD):
        line.pulse()
    assert take(dom0, port)
    line.pulse()
    assert not take(dom0, port)  # within 10 ms of time 0
    assert not hypervisor.ioapic.rtes[1].mask
    pass_time(hypervisor, 10 * MS)
    line.pulse()
    assert take(dom0, port)


def test_local_apic_order() -> None:
    """Highest first; the same class waits for the EOI; requests merge; none is taken while they are off."""
    taken: list[int] = []
    eois: list[int] = []
    apics = LocalApics(1, lambda apic, vector: taken.append(vector))
    apics.on_eoi = eois.append
    apic: LocalApic = apics.cpus[0]
    apics.disable()
    for vector in (0x41, 0x52, 0x48, 0x41):
        apics.request(1, vector)
    assert not taken
    apics.enable()
    assert taken == [0x52]
    apics.request(1, 0x5F)
    apics.request(1, 0x60)
    assert taken == [0x52, 0x60]
    apics.eoi(apic)
    assert (taken, eois) == ([0x52, 0x60], [0x60])
    apics.eoi(apic)
    assert taken == [0x52, 0x60, 0x5F]
    apics.eoi(apic)
    assert taken[3:] == [0x48]
    apics.eoi(apic)
    assert taken[4:] == [0x41]
    assert apics.merged == 1


def test_destination_is_the_first_cpu() -> None:
    taken: list[tuple[int, int]] = []
    apics = LocalApics(4, lambda apic, vector: taken.append((apic.cpu, vector)))
    apics.request(0b1100, 0x40)
    apics.request(0b1000, 0x40)
    assert taken == [(2, 0x40), (3, 0x40)]

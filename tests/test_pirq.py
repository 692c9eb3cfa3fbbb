"""A domain's physical IRQs: binding, sharing, the EOI that is owed, and lines that are given away."""

from __future__ import annotations

import doctest
from pathlib import Path

from pirqlib import bind_line, fails, host, map_line, mask, owes_eoi, pass_time, take
from pvirq.abi.errno import Errno
from pvirq.abi.event_channel import EVTCHNSTAT_pirq
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MSI
from pvirq.abi.xen import DOMID_SELF, PAGE_SHIFT
from pvirq.xen import physdev
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.irq import IRQ_DISABLED, IRQ_GUEST
from pvirq.xen.memory import PGT_L1
from pvirq.xen.pirq import irq_permission

MS = 1_000_000


def shared_line(gsi: int = 10) -> tuple[Hypervisor, list[Domain], list[int]]:
    """Domain 0 and two guests on one line: the domains and their ports."""
    hypervisor, dom0 = host()
    domains = [dom0, hypervisor.create_domain(), hypervisor.create_domain()]
    ports = []
    for domain in domains:
        map_line(dom0, gsi, domain.domid)
        ports.append(domain.evtchnop.bind_pirq(gsi, True))
    return hypervisor, domains, ports


def test_numbers() -> None:
    hypervisor, dom0 = host(vcpus=2)
    guest = hypervisor.create_domain()
    assert dom0.pirqs.nr_pirqs == 416  # so its messages' numbers begin with 415
    assert guest.pirqs.nr_pirqs == 56
    assert dom0.pirqs.get_free(MAP_PIRQ_TYPE_MSI) == 415
    assert dom0.pirqs.get_free(MAP_PIRQ_TYPE_GSI) == 16
    assert [dom0.pirqs.set_aside(MAP_PIRQ_TYPE_MSI) for _ in range(2)] == [415, 414]
    for _ in range(32):
        guest.pirqs.set_aside(MAP_PIRQ_TYPE_MSI)
    fails(Errno.ENOSPC, guest.pirqs.get_free, MAP_PIRQ_TYPE_MSI)
    assert host()[1].pirqs.nr_pirqs == 208  # a machine of one CPU


def test_domain_that_uses_none_costs_nothing() -> None:
    hypervisor, _ = host()
    guest = hypervisor.create_domain()
    fails(Errno.EPERM, guest.evtchnop.bind_pirq, 9)
    fails(Errno.EINVAL, physdev.eoi, guest, 9)
    hypervisor.destroy_domain(guest)
    assert hypervisor.irqs_so_far is None


def test_edge() -> None:
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 1), hypervisor.ioapic.line(1)
    assert not take(dom0, port)
    for _ in range(3):
        line.pulse()
        assert take(dom0, port)
    line.assert_("key")
    assert take(dom0, port)
    line.assert_("key")
    line.assert_("mouse")
    line.deassert("key")
    line.deassert("mouse")
    assert not take(dom0, port)
    assert (line.raised, line.sent, line.lost) == (4, 4, 0)
    assert not owes_eoi(dom0, 1)  # no EOI is owed


def test_asserted_level_interrupts_again_at_each_eoi() -> None:
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 10), hypervisor.ioapic.line(10)
    line.assert_("disk")
    for _ in range(5):
        assert take(dom0, port)
        assert not take(dom0, port)  # until the EOI
        physdev.eoi(dom0, 10)
    line.assert_("usb")
    line.deassert("disk")
    assert take(dom0, port)
    physdev.eoi(dom0, 10)
    assert take(dom0, port)  # for the other device
    line.deassert("usb")
    physdev.eoi(dom0, 10)
    assert not take(dom0, port)
    physdev.eoi(dom0, 10)  # none is owed
    line.assert_("usb")
    assert take(dom0, port)
    assert (line.raised, line.sent) == (2, 8)


def test_masked_port_keeps_the_event_and_the_line_waits() -> None:
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 10), hypervisor.ioapic.line(10)
    mask(dom0, port)
    line.assert_("disk")
    assert dom0.evtchn.is_pending(port)
    upcall = dom0.vcpus[0].info
    assert not dom0.machine.mem[upcall]
    dom0.evtchnop.unmask(port)
    assert dom0.machine.mem[upcall]
    assert line.sent == 1


def test_forced_eoi() -> None:
    """A guest that doesn't EOI has a millisecond; then a line that is still asserted comes again."""
    hypervisor, dom0 = host()
    port, line = bind_line(dom0, 10), hypervisor.ioapic.line(10)
    line.assert_("disk")
    assert take(dom0, port)
    pass_time(hypervisor, MS - 1)
    assert not take(dom0, port)
    pass_time(hypervisor, 1)
    assert take(dom0, port)
    line.deassert("disk")
    pass_time(hypervisor, 10 * MS)
    assert not take(dom0, port)
    assert line.sent == 2
    assert not owes_eoi(dom0, 10)
    line.assert_("disk")  # the millisecond begins with each interrupt
    pass_time(hypervisor, MS // 2)
    assert take(dom0, port)
    physdev.eoi(dom0, 10)
    assert take(dom0, port)
    pass_time(hypervisor, MS - 1)
    assert not take(dom0, port)


def test_shared_line_needs_every_guests_eoi() -> None:
    hypervisor, domains, ports = shared_line()
    line = hypervisor.ioapic.line(10)
    assert physdev.irq_status_query(domains[1], 10) == 3  # needs an EOI, shared
    line.assert_("disk")
    for domain, port in zip(domains, ports, strict=True):
        assert take(domain, port)
    physdev.eoi(domains[1], 10)
    physdev.eoi(domains[1], 10)  # a second one of the same guest doesn't count
    physdev.eoi(domains[0], 10)
    assert not any(take(domain, port) for domain, port in zip(domains, ports, strict=True))
    physdev.eoi(domains[2], 10)
    assert all(take(domain, port) for domain, port in zip(domains, ports, strict=True))
    # A guest that leaves, by closing or by its end, owes nothing any more.
    domains[2].evtchnop.close(ports[2])
    physdev.eoi(domains[0], 10)
    assert not take(domains[0], ports[0])
    hypervisor.destroy_domain(domains[1])
    assert take(domains[0], ports[0])
    assert physdev.irq_status_query(domains[0], 10) == 1
    line.deassert("disk")
    pass_time(hypervisor, 2 * MS)
    assert line.sent == 3


def test_forced_eoi_of_a_shared_line() -> None:
    hypervisor, domains, ports = shared_line()
    hypervisor.ioapic.line(10).assert_("disk")
    for domain, port in zip(domains, ports, strict=True):
        assert take(domain, port)
    physdev.eoi(domains[0], 10)
    pass_time(hypervisor, MS)
    assert all(take(domain, port) for domain, port in zip(domains, ports, strict=True))
    assert all(owes_eoi(domain, 10) for domain in domains)


def test_sharing_rules() -> None:
    hypervisor, dom0 = host()
    guest = hypervisor.create_domain()
    log = hypervisor.irqs.log
    for gsi in (10, 11):
        map_line(dom0, gsi)
        map_line(dom0, gsi, guest.domid)
    dom0.evtchnop.bind_pirq(10, False)
    dom0.evtchnop.bind_pirq(11, True)
    fails(Errno.EBUSY, guest.evtchnop.bind_pirq, 10, True)
    assert log[-1] == "Cannot bind IRQ10 to dom1. Others do not share."
    fails(Errno.EBUSY, guest.evtchnop.bind_pirq, 11, False)
    assert log[-1] == "Cannot bind IRQ11 to dom1. Will not share with others."
    fails(Errno.EEXIST, dom0.evtchnop.bind_pirq, 10, False)
    assert guest.evtchn.active == 0
    bind = guest.evtchnop.bind_pirq(11, True)
    assert guest.evtchnop.status(bind).status == EVTCHNSTAT_pirq


def test_lines_of_the_hypervisor() -> None:
    hypervisor, dom0 = host()
    map_line(dom0, 4)
    fails(Errno.EBUSY, dom0.evtchnop.bind_pirq, 4, True)
    assert hypervisor.irqs.log[-1] == "Cannot bind IRQ4 to dom0. In use by 'ns16550'."
    fails(Errno.EPERM, map_line, dom0, 0)  # the timer's, which domain 0 has no use of


def test_at_most_32_guests_share() -> None:
    hypervisor, dom0 = host()
    for _ in range(32):
        guest = hypervisor.create_domain()
        map_line(dom0, 10, guest.domid)
        guest.evtchnop.bind_pirq(10, True)
    map_line(dom0, 10)
    fails(Errno.EBUSY, dom0.evtchnop.bind_pirq, 10, True)
    assert hypervisor.irqs.log[-1].startswith("Cannot bind IRQ10 to d0: already at max share 32")


def test_line_given_to_a_guest_and_back() -> None:
    hypervisor, dom0 = host()
    guest = hypervisor.create_domain()
    line = hypervisor.ioapic.line(11)
    fails(Errno.EPERM, guest.evtchnop.bind_pirq, 11)
    fails(Errno.EPERM, map_line, guest, 11)
    map_line(dom0, 11)
    assert physdev.map_pirq(dom0, guest.domid, MAP_PIRQ_TYPE_GSI, 11, -1) == 16  # a number of the guest's own
    port = guest.evtchnop.bind_pirq(16, False)
    fails(Errno.EBUSY, dom0.evtchnop.bind_pirq, 11)
    line.assert_("card")
    assert take(guest, port)
    line.deassert("card")
    physdev.eoi(guest, 16)
    # Back, while it is bound: the port stays, and nothing comes to it.
    physdev.unmap_pirq(dom0, guest.domid, 16)
    assert guest.evtchnop.status(port).pirq == 16
    line.assert_("card")
    assert not take(guest, port)
    fails(Errno.EPERM, guest.evtchnop.bind_pirq, 16)
    fails(Errno.EBUSY, physdev.map_pirq, dom0, guest.domid, MAP_PIRQ_TYPE_GSI, 11, -1)
    guest.evtchnop.close(port)
    mine = dom0.evtchnop.bind_pirq(11, False)
    pass_time(hypervisor, MS)
    assert take(dom0, mine)
    assert physdev.map_pirq(dom0, guest.domid, MAP_PIRQ_TYPE_GSI, 11, -1) == 16


def test_permission_without_a_mapping() -> None:
    hypervisor, dom0 = host()
    guest, other = hypervisor.create_domain(), hypervisor.create_domain()
    map_line(dom0, 11)
    map_line(dom0, 11, guest.domid)
    irq_permission(dom0, guest, 11, False)
    fails(Errno.EPERM, guest.evtchnop.bind_pirq, 11)
    irq_permission(dom0, guest, 11, True)
    guest.evtchnop.bind_pirq(11)
    fails(Errno.EPERM, irq_permission, guest, other, 11, True)
    fails(Errno.EPERM, irq_permission, dom0, guest, 12, True)  # not mapped here
    fails(Errno.EINVAL, irq_permission, dom0, guest, 5000, True)


def test_end_of_a_guest_frees_its_line() -> None:
    hypervisor, dom0 = host()
    guest = hypervisor.create_domain()
    map_line(dom0, 11, guest.domid)
    guest.evtchnop.bind_pirq(11, False)
    hypervisor.ioapic.line(11).assert_("card")
    desc = hypervisor.irqs.desc(11)
    assert desc.status & IRQ_GUEST
    hypervisor.destroy_domain(guest)
    assert desc.action is None
    assert desc.status == IRQ_DISABLED
    port = bind_line(dom0, 11, share=False)
    pass_time(hypervisor, MS)
    assert take(dom0, port)


def test_reset_closes_and_keeps_the_mapping() -> None:
    hypervisor, dom0 = host()
    bind_line(dom0, 10)
    dom0.evtchnop.reset()
    assert hypervisor.ioapic.rtes[10].mask
    hypervisor.ioapic.line(10).assert_("disk")
    dom0.evtchnop.bind_pirq(10)


def test_eoi_map() -> None:
    hypervisor, dom0 = host()
    machine = dom0.machine
    mfn = machine.alloc(1, 0)
    table = machine.alloc(1, 0)
    machine.type[table], machine.type_count[table] = PGT_L1, 1
    fails(Errno.EINVAL, physdev.pirq_eoi_gmfn, dom0, table, 2)
    fails(Errno.EINVAL, physdev.pirq_eoi_gmfn, dom0, machine.frames, 2)
    physdev.pirq_eoi_gmfn(dom0, mfn, 2)
    fails(Errno.EBUSY, physdev.pirq_eoi_gmfn, dom0, mfn, 1)
    page = machine.page(mfn)
    page[0] = 1 << 1
    bind_line(dom0, 10)
    bind_line(dom0, 1)
    assert (page[0], page[1]) == (0, 1 << 2)  # the level needs an EOI, the edge doesn't
    hypervisor.destroy_domain(dom0)
    assert machine.refs[mfn] == 0


def test_version_1_unmasks_at_eoi() -> None:
    for version in (1, 2):
        hypervisor, dom0 = host()
        physdev.pirq_eoi_gmfn(dom0, dom0.machine.alloc(1, 0), version)
        port = bind_line(dom0, 10)
        mask(dom0, port)
        physdev.eoi(dom0, 10)
        assert dom0.evtchn.is_masked(port) == (version == 2)
        del hypervisor
    assert dom0.pirqs.eoi_map & ((1 << PAGE_SHIFT) - 1) == 0


def test_unmask_notify_serves_what_is_not_masked() -> None:
    hypervisor, dom0 = host()
    masked, other = bind_line(dom0, 10), bind_line(dom0, 11)
    mask(dom0, masked)
    for gsi in (10, 11):
        hypervisor.ioapic.line(gsi).assert_("card")
    assert take(dom0, other)
    physdev.irq_unmask_notify(dom0)
    assert take(dom0, other)
    assert owes_eoi(dom0, 10)


def test_higher_interrupt_without_eoi_holds_lower_ones_back() -> None:
    """The CPU has one stack of interrupts: until the EOI of the level, a lower vector waits in its local APIC."""
    hypervisor, dom0 = host()
    key, disk = bind_line(dom0, 1), bind_line(dom0, 10)
    assert hypervisor.irqs.desc(1).vector < hypervisor.irqs.desc(10).vector
    hypervisor.ioapic.line(10).assert_("disk")
    assert take(dom0, disk)
    for _ in range(3):
        hypervisor.ioapic.line(1).pulse()
    assert not take(dom0, key)
    assert hypervisor.irqs.apics.merged == 2  # one bit remembers them
    hypervisor.ioapic.line(10).deassert("disk")
    physdev.eoi(dom0, 10)
    assert take(dom0, key)


def test_moving_to_another_cpu() -> None:
    """bind_vcpu aims the line at the vCPU's CPU, from the next interrupt on."""
    hypervisor, dom0 = host(vcpus=2)
    port = bind_line(dom0, 1)
    desc, rte = hypervisor.irqs.desc(1), hypervisor.ioapic.rtes[1]
    assert (desc.affinity, desc.cpu_mask, rte.dest, desc.vector) == (1, 1, 1, 0x30)
    dom0.evtchnop.bind_vcpu(port, 1)
    assert rte.dest == 1
    for _ in range(2):
        hypervisor.ioapic.line(1).pulse()
        assert take(dom0, port)
    assert (desc.affinity, desc.cpu_mask, rte.dest, desc.vector) == (2, 3, 2, 0xA0)
    assert rte.vector == 0xA0


def test_port_that_nobody_waits_for_in_the_old_place() -> None:
    """A pirq bound again after its close has a port of its own, and is served there."""
    hypervisor, dom0 = host()
    first = bind_line(dom0, 1)
    dom0.evtchnop.bind_ipi(0)
    dom0.evtchnop.close(first)
    dom0.evtchnop.bind_ipi(0)
    port = dom0.evtchnop.bind_pirq(1)
    assert port != first
    hypervisor.ioapic.line(1).pulse()
    assert take(dom0, port)
    assert dom0.pirqs.port_of(1) == port
    assert physdev.irq_status_query(dom0, 1) == 1
    fails(Errno.EINVAL, physdev.irq_status_query, dom0, -1)
    assert physdev.map_pirq(dom0, DOMID_SELF, MAP_PIRQ_TYPE_GSI, 1) == 1


def test_documentation() -> None:
    page = Path(__file__).parent.parent / "docs" / "api-pirq.md"
    options = doctest.IGNORE_EXCEPTION_DETAIL | doctest.REPORT_NDIFF
    failed, tried = doctest.testfile(str(page), module_relative=False, optionflags=options)
    assert (failed, tried > 20) == (0, True)

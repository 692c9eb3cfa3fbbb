"""PCI devices' messages: mapping, masks and what waits for them, the EOI of those that can't be masked."""

from __future__ import annotations

from pirqlib import TABLE, fails, host, map_message, owes_eoi, pass_time, take
from pvirq.abi.errno import Errno
from pvirq.abi.physdev import MAP_PIRQ_TYPE_MSI, MAP_PIRQ_TYPE_MSI_SEG, MAP_PIRQ_TYPE_MULTI_MSI
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.irq import NO_IRQ_TYPE
from pvirq.xen.msi import MsiInfo, PciDevice, assign_device, name

NIC = 0x0018


def with_device(**keywords: bool | int) -> tuple[Hypervisor, Domain, PciDevice]:
    """A host whose domain 0 has found the device."""
    hypervisor, dom0 = host(vcpus=2)
    device = PciDevice(hypervisor, NIC, **keywords)  # type: ignore[arg-type]
    physdev.pci_device_add(dom0, NIC)
    return hypervisor, dom0, device


def test_numbers_go_down_from_the_top() -> None:
    hypervisor, dom0, device = with_device(vectors=3, msix=True)
    assert [map_message(dom0, device, entry) for entry in range(3)] == [415, 414, 413]
    assert [dom0.pirqs.irq(pirq) for pirq in (415, 414, 413)] == [24, 25, 26]
    assert [hypervisor.irqs.desc(irq).vector for irq in (24, 25, 26)] == [0xA0, 0xA8, 0xB0]
    assert {hypervisor.irqs.desc(irq).handler.typename for irq in (24, 25, 26)} == {"PCI-MSI/-X"}
    assert hypervisor.pci[NIC].owner is dom0


def test_entries_are_apart() -> None:
    hypervisor, dom0, device = with_device(vectors=3, msix=True)
    ports = [dom0.evtchnop.bind_pirq(map_message(dom0, device, entry)) for entry in range(3)]
    for entry, port in enumerate(ports):
        assert device.raise_msi(entry)
        assert [take(dom0, each) for each in ports] == [each == port for each in ports]
    assert device.sent == 3
    assert not any(owes_eoi(dom0, pirq) for pirq in (415, 414, 413))  # as edges
    assert hypervisor.irqs.desc(24).count == 1


def test_nothing_is_sent_before_it_is_mapped() -> None:
    hypervisor, dom0, device = with_device(vectors=2, msix=True)
    assert not device.raise_msi(0)
    map_message(dom0, device, 0)
    assert not device.raise_msi(7)
    assert device.held == 0
    assert hypervisor.irqs.desc(24).count == 0


def test_message_mapped_twice_goes_where_it_was_bound_last() -> None:
    """Xen doesn't mind; a bind writes the message anew."""
    _, dom0, device = with_device(vectors=1, msix=True)
    first, second = map_message(dom0, device), map_message(dom0, device)
    ports = {pirq: dom0.evtchnop.bind_pirq(pirq) for pirq in (first, second)}
    assert device.raise_msi()
    assert [take(dom0, ports[pirq]) for pirq in (first, second)] == [False, True]
    dom0.evtchnop.close(ports[first])
    assert not device.raise_msi()  # which masked it for both
    ports[first] = dom0.evtchnop.bind_pirq(first)
    assert [take(dom0, ports[pirq]) for pirq in (first, second)] == [True, False]


def test_pending_bit_is_the_devices_own() -> None:
    """What was raised while nobody had the message comes when somebody binds it."""
    _, dom0, device = with_device(vectors=2, msix=True)
    map_message(dom0, device, 0)  # MSI-X is enabled now
    assert not device.raise_msi(1)
    pirq = map_message(dom0, device, 1)
    assert take(dom0, dom0.evtchnop.bind_pirq(pirq))


def test_message_waits_while_masked() -> None:
    """Mapped and not bound it is masked. What the device raises meanwhile is one message, sent at unmask."""
    _, dom0, device = with_device(vectors=1, msix=True)
    pirq = map_message(dom0, device)
    assert not device.raise_msi()
    assert not device.raise_msi()
    assert (device.sent, device.held) == (0, 1)
    port = dom0.evtchnop.bind_pirq(pirq)
    assert take(dom0, port)
    assert device.sent == 1
    dom0.evtchnop.close(port)
    assert not device.raise_msi()
    port = dom0.evtchnop.bind_pirq(pirq)
    assert take(dom0, port)
    assert (device.sent, device.held) == (2, 2)


def test_plain_msi_owes_an_eoi() -> None:
    """Nothing can mask it: its EOI waits for the guest, and the next message for that."""
    hypervisor, dom0, device = with_device(vectors=1)
    pirq = map_message(dom0, device)
    desc = hypervisor.irqs.desc(24)
    assert desc.handler.typename == "PCI-MSI"
    port = dom0.evtchnop.bind_pirq(pirq)
    assert device.raise_msi()
    assert take(dom0, port)
    assert owes_eoi(dom0, pirq)
    for _ in range(3):
        assert device.raise_msi()
    assert not take(dom0, port)  # in the local APIC
    physdev.eoi(dom0, pirq)
    assert take(dom0, port)
    pass_time(hypervisor, 1_000_000)
    assert not owes_eoi(dom0, pirq)
    assert not take(dom0, port)
    assert desc.count == 2


def test_maskable_msi_does_not() -> None:
    _, dom0, device = with_device(vectors=1, maskable=True)
    port = dom0.evtchnop.bind_pirq(map_message(dom0, device))
    for _ in range(3):
        assert device.raise_msi()
        assert take(dom0, port)
    assert not owes_eoi(dom0, 415)


def test_several_msis() -> None:
    """Without an IOMMU only at numbers that the caller chose."""
    hypervisor, dom0, device = with_device(vectors=4)
    info = MsiInfo(NIC, 4)
    fails(Errno.EOPNOTSUPP, physdev.map_pirq, dom0, DOMID_SELF, MAP_PIRQ_TYPE_MULTI_MSI, -1, -1, info)
    assert physdev.map_pirq(dom0, DOMID_SELF, MAP_PIRQ_TYPE_MULTI_MSI, -1, 100, info) == 100
    assert [dom0.pirqs.irq(pirq) for pirq in range(100, 104)] == [24, 25, 26, 27]
    ports = [dom0.evtchnop.bind_pirq(pirq) for pirq in range(100, 104)]
    assert device.raise_msi(2)
    assert [take(dom0, port) for port in ports] == [False, False, True, False]
    physdev.eoi(dom0, 102)
    fails(Errno.EBUSY, physdev.unmap_pirq, dom0, DOMID_SELF, 101)
    for port in ports:
        dom0.evtchnop.close(port)
    physdev.unmap_pirq(dom0, DOMID_SELF, 100)
    assert not device.descs
    assert all(hypervisor.irqs.desc(irq).handler is NO_IRQ_TYPE for irq in range(24, 28))


def test_more_msis_than_there_are() -> None:
    _, dom0, _ = with_device(vectors=4)
    info = MsiInfo(NIC, 8)
    fails(Errno.ENFILE, physdev.map_pirq, dom0, DOMID_SELF, MAP_PIRQ_TYPE_MULTI_MSI, -1, 100, info)
    assert info.entry_nr == 4
    for count, errno in ((-1, Errno.ENFILE), (0, Errno.EINVAL)):
        info = MsiInfo(NIC, count)
        fails(errno, physdev.map_pirq, dom0, DOMID_SELF, MAP_PIRQ_TYPE_MULTI_MSI, -1, 100, info)
        info.entry_nr = 4
    # One of the numbers is in use: nothing is left of the attempt.
    dom0.pirqs.map_gsi(dom0, 9, 102)
    fails(Errno.EBUSY, physdev.map_pirq, dom0, DOMID_SELF, MAP_PIRQ_TYPE_MULTI_MSI, -1, 100, info)
    assert [dom0.pirqs.irq(pirq) for pirq in range(100, 104)] == [0, 0, 9, 0]
    assert not dom0.hypervisor.pci[NIC].descs
    assert dom0.hypervisor.irqs.create(dom0) == 24


def test_refusals() -> None:
    hypervisor, dom0, device = with_device(vectors=2, msix=True)

    def map_it(sbdf: int, entry: int, table: int, kind: int = MAP_PIRQ_TYPE_MSI_SEG, index: int = -1) -> int:
        return physdev.map_pirq(dom0, DOMID_SELF, kind, index, -1, MsiInfo(sbdf, entry, table))

    fails(Errno.ENODEV, map_it, 0x20, 0, TABLE)
    fails(Errno.ENODEV, map_it, NIC, 0, 0)  # it has no MSI
    fails(Errno.EINVAL, map_it, NIC, 2, TABLE)
    fails(Errno.EINVAL, map_it, NIC, 0, TABLE, MAP_PIRQ_TYPE_MULTI_MSI)
    fails(Errno.EPERM, map_it, NIC, 0, TABLE, MAP_PIRQ_TYPE_MSI, 24)  # an irq that nobody created
    map_it(NIC, 0, TABLE)
    # What was refused has left nothing taken.
    assert map_it(NIC, 1, TABLE) == 414
    assert dom0.pirqs.irq(414) == 25
    absent = PciDevice(hypervisor, 0x20, msix=True)
    fails(Errno.ENODEV, map_it, 0x20, 0, TABLE)  # domain 0 hasn't told of it
    physdev.pci_device_add(dom0, 0x20)
    assert map_it(0x20, 0, TABLE) == 413
    assert absent.owner is dom0
    assert device.raise_msi(0) is False


def test_unmap_while_bound() -> None:
    hypervisor, dom0, device = with_device(vectors=1, msix=True)
    pirq = map_message(dom0, device)
    port = dom0.evtchnop.bind_pirq(pirq)
    physdev.unmap_pirq(dom0, DOMID_SELF, pirq)
    assert dom0.pirqs.irq(pirq) == -24
    assert not device.raise_msi()
    # The irq is free again and would be taken; but here it still stands for the number that is bound.
    fails(Errno.EBUSY, map_message, dom0, device)
    dom0.evtchnop.close(port)
    assert dom0.pirqs.irq(pirq) == 0
    assert map_message(dom0, device) == pirq
    assert hypervisor.irqs.desc(24).msi_desc is device.descs[0]


def test_device_given_to_a_guest() -> None:
    hypervisor, dom0, device = with_device(vectors=1, msix=True)
    guest = hypervisor.create_domain()
    fails(Errno.ENODEV, map_message, dom0, device, 0, guest.domid)
    assign_device(hypervisor, NIC, guest)
    fails(Errno.ENODEV, map_message, dom0, device)
    pirq = map_message(dom0, device, 0, guest.domid)
    assert pirq == 55
    port = guest.evtchnop.bind_pirq(pirq)
    assert device.raise_msi()
    assert take(guest, port)
    hypervisor.destroy_domain(guest)
    assert device.owner is dom0
    assert not device.raise_msi()
    assert map_message(dom0, device) == 415
    fails(Errno.ENODEV, assign_device, hypervisor, 0x20, dom0)


def test_device_removed_while_bound() -> None:
    hypervisor, dom0, device = with_device(vectors=1, msix=True)
    port = dom0.evtchnop.bind_pirq(map_message(dom0, device))
    physdev.pci_device_remove(dom0, NIC)
    assert not device.raise_msi()
    dom0.evtchnop.close(port)
    assert NIC not in hypervisor.pci
    assert hypervisor.irqs.log[-1] == "PCI remove device 0000:00:03.0"
    fails(Errno.ENODEV, physdev.pci_device_remove, dom0, NIC)


def test_prepare_msix() -> None:
    _, dom0, device = with_device(vectors=1, msix=True)
    fails(Errno.EBUSY, physdev.prepare_msix, dom0, NIC, True)
    physdev.prepare_msix(dom0, NIC)
    fails(Errno.EBUSY, physdev.prepare_msix, dom0, NIC)
    physdev.prepare_msix(dom0, NIC, True)
    map_message(dom0, device)
    fails(Errno.EBUSY, physdev.prepare_msix, dom0, NIC)
    physdev.restore_msi(dom0, NIC)


def test_affinity_moves_the_message() -> None:
    hypervisor, dom0, device = with_device(vectors=1, msix=True)
    port = dom0.evtchnop.bind_pirq(map_message(dom0, device))
    dom0.evtchnop.bind_vcpu(port, 1)
    assert device.messages[0].dest == 1
    assert device.raise_msi()
    assert take(dom0, port)
    assert (device.messages[0].dest, hypervisor.irqs.desc(24).affinity) == (2, 2)
    assert hypervisor.irqs.desc(24).vector == 0xA0  # which is reserved on all CPUs


def test_vectors_run_out() -> None:
    """One CPU has 190 vectors for lines and messages; 13 of them are the ISA lines'."""
    hypervisor, dom0 = host()
    devices = [PciDevice(hypervisor, at << 3, vectors=64, msix=True) for at in range(3)]
    messages = [(device, entry) for device in devices for entry in range(64)]
    for device in devices:
        physdev.pci_device_add(dom0, device.sbdf)
    for device, entry in messages[:177]:
        map_message(dom0, device, entry)
    fails(Errno.ENOSPC, map_message, dom0, *messages[177])
    physdev.unmap_pirq(dom0, DOMID_SELF, 200)
    assert map_message(dom0, *messages[177]) == 200
    assert name(devices[1].sbdf) == "0000:00:01.0"

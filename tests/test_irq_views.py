"""The 'i' debug key beside what real Xen with Linux as domain 0 printed (tests/data/linux-2vcpu)."""

from __future__ import annotations

import re
from pathlib import Path

from pvirq import Host
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MSI
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.irq_views import debug_i
from pvirq.xen.memory import Machine
from pvirq.xen.msi import MsiInfo, PciDevice

RECORDED = Path(__file__).parent / "data" / "linux-2vcpu" / "0-before.debug-i"


def as_recorded() -> Hypervisor:
    """A host whose domain 0 does with its interrupts what the recorded Linux did: what it binds and gives back, in the
    order of the vectors; which vCPU each was moved to; and which interrupted since."""
    hypervisor = Hypervisor(Machine(64 << 20))
    dom0 = hypervisor.create_domain(0, privileged=True, vcpus=2)
    ports = {}
    for irq in (1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15):
        physdev.map_pirq(dom0, DOMID_SELF, MAP_PIRQ_TYPE_GSI, irq, irq)
    for irq in (6, 7):
        physdev.setup_gsi(dom0, irq, 0, 0)
    for irq in (3, 5, 13, 14, 15):
        dom0.evtchnop.close(dom0.evtchnop.bind_pirq(irq, False))
    for irq in (9, 12, 1, 8):
        ports[irq] = dom0.evtchnop.bind_pirq(irq, irq == 9)
    for irq in (12, 1):
        move(dom0, ports[irq], 1)
        hypervisor.ioapic.line(irq).pulse()
    for irq in (9,):
        move(dom0, ports[irq], 1)
    disk = (PciDevice(hypervisor, 0x20, vectors=3, msix=True), PciDevice(hypervisor, 0x28, vectors=3, msix=True))
    for device in disk:
        physdev.pci_device_add(dom0, device.sbdf)
        for entry in range(3):
            info = MsiInfo(device.sbdf, entry, 0xFEBF1000)
            pirq = physdev.map_pirq(dom0, DOMID_SELF, MAP_PIRQ_TYPE_MSI, -1, -1, info)
            ports[pirq] = dom0.evtchnop.bind_pirq(pirq, False)
    move(dom0, ports[413], 1)
    disk[0].raise_msi(2)
    for pirq in (415, 411):
        move(dom0, ports[pirq], 1)
    for port in ports.values():
        dom0.evtchnop.unmask(port)
        dom0.machine.mem[dom0.shared_info + 2048 + port // 8] = 0
    return hypervisor


def move(dom0: Domain, port: int, vcpu: int) -> None:
    dom0.evtchnop.bind_vcpu(port, vcpu)


def test_as_recorded() -> None:
    assert debug_i(as_recorded()).splitlines() == RECORDED.read_text().splitlines()


def test_in_flight() -> None:
    """A guest that owes an EOI, whose port is pending and masked."""
    hypervisor = as_recorded()
    dom0 = hypervisor.domains[0]
    dom0.machine.mem[dom0.shared_info + 2048 + 512] = 0xFF
    hypervisor.ioapic.line(9).assert_("lid")
    line = re.search(r"IRQ:   9 .*", debug_i(hypervisor))
    assert line
    assert line[0].endswith("in-flight=1 d0:  9(PMM)")
    assert "irr=1" in debug_i(hypervisor).split("IRQ  9 Vec")[1].splitlines()[1]


def test_debug_key_of_a_host() -> None:
    with Host(dom0_vcpus=1) as host:
        text = host.debug_key("i")
    assert text.startswith(
        "(XEN) IRQ information:\n(XEN)    IRQ:   0 vec:f0 IO-APIC-edge    status=000 aff:{0}/{0} arch"
    )
    assert text.count("\n") > 40

"""Physical IRQs from the device's line to the guest's port and back."""

from __future__ import annotations

import pytest

from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import Machine


@pytest.fixture
def hypervisor() -> Hypervisor:
    return Hypervisor(Machine(256 << 20))


@pytest.fixture
def dom0(hypervisor: Hypervisor) -> Domain:
    return hypervisor.create_domain(0, privileged=True, vcpus=2)


def bind(domain: Domain, gsi: int, share: bool = True) -> int:
    pirq = physdev.map_pirq(domain, DOMID_SELF, MAP_PIRQ_TYPE_GSI, gsi, gsi)
    assert pirq == gsi
    port = domain.evtchnop.bind_pirq(gsi, share)
    domain.evtchnop.unmask(port)
    return port


def taken(domain: Domain, port: int) -> bool:
    """Was the port pending? It is not from now on."""
    pending = domain.evtchn.is_pending(port)
    if pending:
        index = domain.shared_info + 2048 + port // 8
        domain.machine.mem[index] &= ~(1 << port % 8)
    return pending


def test_edge(hypervisor: Hypervisor, dom0: Domain) -> None:
    port, line = bind(dom0, 1), hypervisor.ioapic.line(1)
    assert not taken(dom0, port)
    for _ in range(3):
        line.pulse()
        assert taken(dom0, port)
    line.assert_("key")
    assert taken(dom0, port)
    line.assert_("key")
    assert not taken(dom0, port)
    line.deassert("key")
    assert not taken(dom0, port)


def test_level(hypervisor: Hypervisor, dom0: Domain) -> None:
    port, line = bind(dom0, 10), hypervisor.ioapic.line(10)
    line.assert_("disk")
    assert taken(dom0, port)
    line.assert_("usb")
    assert not taken(dom0, port)  # until the EOI
    physdev.eoi(dom0, 10)
    assert taken(dom0, port)  # still asserted
    line.deassert("disk")
    physdev.eoi(dom0, 10)
    assert taken(dom0, port)
    line.deassert("usb")
    physdev.eoi(dom0, 10)
    assert not taken(dom0, port)

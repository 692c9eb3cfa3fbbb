"""What the tests of physical interrupts share."""

from __future__ import annotations

from typing import Any

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MSI
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import physdev
from pvirq.xen.domain import Domain, Hypervisor
from pvirq.xen.memory import Machine
from pvirq.xen.msi import MsiInfo, PciDevice

TABLE = 0xFEBF0000  # where an MSI-X table might be


def host(vcpus: int = 1) -> tuple[Hypervisor, Domain]:
    """A hypervisor and its domain 0."""
    hypervisor = Hypervisor(Machine(64 << 20))
    return hypervisor, hypervisor.create_domain(0, privileged=True, vcpus=vcpus)


def fails(errno: Errno, function: Any, *arguments: Any, **keywords: Any) -> None:
    with pytest.raises(XenError) as raised:
        function(*arguments, **keywords)
    assert raised.value.errno == errno


def map_line(dom0: Domain, gsi: int, domid: int = DOMID_SELF) -> int:
    """Map a line to the pirq of its number, for domain 0 or another."""
    return physdev.map_pirq(dom0, domid, MAP_PIRQ_TYPE_GSI, gsi, gsi)


def bind_line(dom0: Domain, gsi: int, share: bool = True) -> int:
    """Map and bind a line in domain 0; the port."""
    map_line(dom0, gsi)
    return dom0.evtchnop.bind_pirq(gsi, share)


def map_message(dom0: Domain, device: PciDevice, entry: int = 0, domid: int = DOMID_SELF) -> int:
    """Map a message of a device that domain 0 has found; the pirq."""
    info = MsiInfo(device.sbdf, entry, TABLE if device.msix else 0)
    return physdev.map_pirq(dom0, domid, MAP_PIRQ_TYPE_MSI, -1, -1, info)


def take(domain: Domain, port: int) -> bool:
    """Was the port pending? It is not from now on."""
    pending = domain.evtchn.is_pending(port)
    if pending:
        domain.machine.mem[domain.shared_info + 2048 + port // 8] &= ~(1 << port % 8)
    return pending


def owes_eoi(domain: Domain, pirq: int) -> bool:
    info = domain.pirqs.info(pirq)
    assert info is not None
    return info.masked


def mask(domain: Domain, port: int) -> None:
    """As a guest masks a port: by the bit."""
    domain.machine.mem[domain.shared_info + 2048 + 512 + port // 8] |= 1 << port % 8


def pass_time(hypervisor: Hypervisor, ns: int) -> None:
    """Let virtual time pass, with every timer at its time."""
    clock = hypervisor.clock
    end = clock.now() + ns
    while (due := clock.next_deadline()) is not None and due <= end:
        clock.jump_to(due)
        clock.fire_due()
    clock.jump_to(end)

"""Physical devices' interrupts as a domain's kernel asks for them: PHYSDEVOP_* (xen/arch/x86/physdev.c).

One function for each operation, with the domain that calls; a guest's hypercalls and modelled kernels both come here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain


def eoi(domain: Domain, pirq: int) -> None:
    """PHYSDEVOP_eoi: the guest has served the interrupt. EINVAL for a number that isn't known."""
    pirqs = domain.pirqs
    info = pirqs.info(pirq) if 0 <= pirq < pirqs.nr_pirqs else None
    if info is None:
        raise XenError(Errno.EINVAL, f"{domain} has no pirq {pirq}")
    pirqs.guest_eoi(info)


def map_pirq(domain: Domain, domid: int, kind: int, index: int, pirq: int = -1) -> int:
    """PHYSDEVOP_map_pirq: `pirq` or a free number for the line `index`; the number."""
    target = domain.hypervisor.find_domain(domid, domain)
    if target is not domain and not domain.privileged:
        raise XenError(Errno.EPERM, f"{domain} may not map for {target}")
    if kind != MAP_PIRQ_TYPE_GSI:
        raise XenError(Errno.EINVAL, f"map type {kind}")
    return target.pirqs.map_gsi(domain, index, pirq)

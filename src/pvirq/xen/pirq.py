"""A domain's physical IRQs: its numbers, what they are mapped to, which it may use (struct pirq, irq_caps).

From xen/arch/x86/irq.c and xen/common/event_channel.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.xen.irq import NR_DYNAMIC_VECTORS, NR_IRQS_GSI
from pvirq.xen.irq_guest import Pirq, desc_guest_eoi, pirq_guest_bind, unbind

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu

EXTRA_DOMU_IRQS: Final = 32
PIRQ_ALLOCATED: Final = -1


class DomainPirqs:
    """The provider of a domain's physical IRQs (`Domain.pirqs`).

    `permitted` holds the hypervisor's irqs that it may use. Domain 0 has all lines, except the timer's, from the start.
    """

    __slots__ = ("_domain", "_info", "_irq_pirq", "_nr_pirqs", "permitted")

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._info: dict[int, Pirq] = {}
        self._irq_pirq: dict[int, int] = {}
        self._nr_pirqs = 0
        self.permitted: set[int] = set(range(1, NR_IRQS_GSI)) if not domain.domid else set()

    @property
    def nr_pirqs(self) -> int:
        """How many numbers there are (domain_create; arch_hwdom_irqs for domain 0)."""
        if not self._nr_pirqs:
            self._nr_pirqs = NR_IRQS_GSI + EXTRA_DOMU_IRQS
            if not self._domain.domid:
                irqs = self._domain.hypervisor.irqs
                self._nr_pirqs = min(NR_IRQS_GSI + irqs.nr_cpus.bit_length() * NR_DYNAMIC_VECTORS, irqs.nr_irqs)
        return self._nr_pirqs

    def info(self, pirq: int) -> Pirq | None:
        return self._info.get(pirq)

    def _get_info(self, pirq: int) -> Pirq:
        info = self._info.get(pirq)
        if info is None:
            info = self._info[pirq] = Pirq(pirq)
        return info

    def _cleanup(self, info: Pirq) -> None:
        """Forget a number with nothing to be remembered (pirq_cleanup_check)."""
        if not info.evtchn and not info.irq:
            del self._info[info.pirq]

    # -- permission ----------------------------------------------------------------------------------------------------

    def permit(self, irq: int) -> None:
        """Let the domain use an irq (irq_permit_access)."""
        self.permitted.add(irq)

    def deny(self, irq: int) -> None:
        self.permitted.discard(irq)

    # -- what event channels need --------------------------------------------------------------------------------------

    def access_permitted(self, pirq: int) -> bool:
        """pirq_access_permitted"""
        return self.irq(pirq) > 0 and self.irq(pirq) in self.permitted

    def port_of(self, pirq: int) -> int:
        info = self._info.get(pirq)
        return info.evtchn if info else 0

    def irq(self, pirq: int) -> int:
        """The hypervisor's number (domain_pirq_to_irq): 0 not mapped, negative while unmapped but bound."""
        info = self._info.get(pirq)
        return info.irq if info else 0

    def pirq_of(self, irq: int) -> int:
        """The domain's number for the hypervisor's `irq` (domain_irq_to_pirq), 0 for none."""
        return self._irq_pirq.get(irq, 0)

    def bind(self, pirq: int, port: int, vcpu: Vcpu, will_share: bool) -> None:
        """EINVAL (not mapped), EBUSY. The caller goes on with `bound`, once the port is set up.

        Until then no interrupt is taken: an asserted line would find a port that isn't the guest's yet, and be lost.
        On hardware it takes longer to come than the few instructions to there.
        """
        irqs = self._domain.hypervisor.irqs
        info = self._get_info(pirq)
        info.evtchn = port
        irqs.apics.disable()
        try:
            pirq_guest_bind(irqs, vcpu, info, will_share)
        except XenError:
            info.evtchn = 0
            self._cleanup(info)
            irqs.apics.enable()
            raise

    def bound(self, pirq: int) -> None:
        self._domain.hypervisor.irqs.apics.enable()

    def unbind(self, pirq: int) -> None:
        info = self._info[pirq]
        irqs = self._domain.hypervisor.irqs
        if info.irq > 0:
            unbind(irqs, self._domain, info, irqs.desc(info.irq))
        else:
            self._irq_pirq.pop(-info.irq, None)
            info.irq = 0
        info.evtchn = 0
        self._cleanup(info)

    def set_affinity(self, pirq: int, vcpu: Vcpu) -> None:
        irqs = self._domain.hypervisor.irqs
        irq = self.irq(pirq)
        if irq > 0:
            irqs.set_affinity(irqs.desc(irq), 1 << vcpu.vcpu_id % irqs.nr_cpus)

    def guest_eoi(self, info: Pirq) -> None:
        """pirq_guest_eoi"""
        if info.irq > 0:
            desc_guest_eoi(self._domain.hypervisor.irqs.desc(info.irq), info)

    # -- mapping -------------------------------------------------------------------------------------------------------

    def map(self, caller: Domain, pirq: int, irq: int) -> None:
        """Map a line to a number (map_domain_pirq). EPERM, EINVAL; nothing where either is mapped otherwise."""
        if irq not in caller.pirqs.permitted:
            raise XenError(Errno.EPERM, f"{caller} may not use irq {irq}")
        if not 0 <= pirq < self.nr_pirqs or not 0 < irq < self._domain.hypervisor.irqs.nr_irqs:
            raise XenError(Errno.EINVAL, f"pirq {pirq}, irq {irq}")
        old_irq, old_pirq = self.irq(pirq), self.pirq_of(irq)
        if (old_irq > 0 and old_irq != irq) or (old_pirq and old_pirq != pirq):
            return
        self.permit(irq)
        self._get_info(pirq).irq = irq
        self._irq_pirq[irq] = pirq

    def map_gsi(self, caller: Domain, gsi: int, pirq: int = -1) -> int:
        """allocate_and_map_gsi_pirq"""
        if not 0 <= gsi < NR_IRQS_GSI:
            raise XenError(Errno.EINVAL, f"no GSI {gsi}")
        irq: int = caller.pirqs.irq(gsi)
        if irq <= 0:
            if caller.domid:
                raise XenError(Errno.EINVAL, f"{caller} has no pirq {gsi}")
            irq = gsi
        pirq = self.allocate(irq, pirq, MAP_PIRQ_TYPE_GSI)
        self.map(caller, pirq, irq)
        return pirq

    def allocate(self, irq: int, pirq: int, kind: int) -> int:
        """The number for an irq: `pirq`, or a free one where it is negative (allocate_pirq)."""
        current = self.pirq_of(irq)
        if pirq < 0:
            if current:
                if current < 0:
                    raise XenError(Errno.EBUSY, f"irq {irq} is still bound")
                return current
            return self.get_free(kind)
        if current and pirq != current:
            raise XenError(Errno.EEXIST, f"irq {irq} is mapped to pirq {current}")
        return pirq

    def get_free(self, kind: int) -> int:
        """A number that isn't in use (get_free_pirq): for a line one from 16 up, else from the top down. ENOSPC."""
        numbers = [*range(16, NR_IRQS_GSI)] if kind == MAP_PIRQ_TYPE_GSI else []
        for pirq in (*numbers, *range(self.nr_pirqs - 1, NR_IRQS_GSI - 1, -1)):
            info = self._info.get(pirq)
            if info is None or not info.irq:
                self._get_info(pirq)
                return pirq
        raise XenError(Errno.ENOSPC, f"{self._domain} has no free pirq")

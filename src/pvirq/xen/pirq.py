"""A domain's physical IRQs: its numbers, what they are mapped to, which it may use (struct pirq, irq_caps).

From xen/arch/x86/irq.c and xen/common/event_channel.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI, MAP_PIRQ_TYPE_MSI, MAP_PIRQ_TYPE_MULTI_MSI
from pvirq.abi.xen import PAGE_SHIFT
from pvirq.xen.irq import NO_IRQ_TYPE, NR_DYNAMIC_VECTORS, NR_IRQS_GSI, NR_ISA_IRQS
from pvirq.xen.irq_guest import ACKTYPE_NONE, Pirq, desc_guest_eoi, pirq_guest_bind, unbind
from pvirq.xen.memory import PGT_WRITABLE
from pvirq.xen.msi import MAX_MSI_IRQS, MsiInfo, guest_unmask_msi, pci_disable_msi, pci_enable_msi, setup_msi_irq

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu

EXTRA_DOMU_IRQS: Final = 32
PIRQ_ALLOCATED: Final = -1


class DomainPirqs:
    """The provider of a domain's physical IRQs (`Domain.pirqs`).

    `permitted` holds the hypervisor's irqs that it may use. Domain 0 has all lines, except the timer's, from the start.
    `eoi_map` is the byte offset of its EOI map in machine memory, 0 for none; with `auto_unmask` an EOI also unmasks
    the port.
    """

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._info: dict[int, Pirq] = {}
        self._irq_pirq: dict[int, int] = {}
        self._nr_pirqs = 0
        self.eoi_map = 0
        self.auto_unmask = False
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
        """EINVAL (not mapped), EBUSY.

        A level that is asserted already interrupts in here, as its pin is unmasked: before the port is the guest's, so
        that the event is lost. On real Xen too; the line interrupts again after the forced EOI.
        """
        irqs = self._domain.hypervisor.irqs
        info = self._get_info(pirq)
        info.evtchn = port
        irqs.apics.disable()
        try:
            action = pirq_guest_bind(irqs, vcpu, info, will_share)
            self._note_eoi(pirq, action.ack_type != ACKTYPE_NONE)
        except XenError:
            info.evtchn = 0
            self._cleanup(info)
            raise
        finally:
            irqs.apics.enable()

    def bound(self, pirq: int) -> None:
        guest_unmask_msi(self._domain.hypervisor.irqs.desc(self.irq(pirq)))

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

    def eoi(self, pirq: int) -> None:
        """The guest has served it (PHYSDEVOP_eoi): nothing where it owes no EOI. EINVAL for an unknown number."""
        info = self._info.get(pirq)
        if info is None:
            raise XenError(Errno.EINVAL, f"{self._domain} has no pirq {pirq}")
        if self.auto_unmask and info.evtchn:
            evtchn = self._domain.evtchn
            evtchn.ops.unmask(evtchn.channels[info.evtchn])
        if info.irq > 0:
            desc_guest_eoi(self._domain.hypervisor.irqs.desc(info.irq), info)

    def eoi_unmasked(self) -> None:
        """Serve all whose port isn't masked (pirq_guest_unmask)."""
        evtchn = self._domain.evtchn
        for pirq in sorted(self._info):
            info = self._info[pirq]
            if info.masked and not evtchn.is_masked(info.evtchn):
                self.eoi(pirq)

    def shared(self, pirq: int) -> bool:
        """Is its line bound to more than one guest (pirq_shared)?"""
        irq = self.irq(pirq)
        action = self._domain.hypervisor.irqs.desc(irq).guest_action if irq > 0 else None
        return action is not None and len(action.guests) > 1

    # -- mapping -------------------------------------------------------------------------------------------------------

    def _prepare(self, caller: Domain, pirq: int, irq: int) -> bool:
        """May `irq` become `pirq` here? False: nothing is to be done, for one of them is mapped otherwise.

        What map_domain_pirq checks first: EPERM, EINVAL.
        """
        if irq not in caller.pirqs.permitted:
            raise XenError(Errno.EPERM, f"{caller} may not use irq {irq}")
        if not 0 <= pirq < self.nr_pirqs or not 0 < irq < self._domain.hypervisor.irqs.nr_irqs:
            raise XenError(Errno.EINVAL, f"pirq {pirq}, irq {irq}")
        old_irq, old_pirq = self.irq(pirq), self.pirq_of(irq)
        return not ((old_irq > 0 and old_irq != irq) or (old_pirq and old_pirq != pirq))

    def _set(self, pirq: int, irq: int) -> None:
        self._get_info(pirq).irq = irq
        self._irq_pirq[irq] = pirq

    def map(self, caller: Domain, pirq: int, irq: int) -> None:
        """Map a line to a number, with permission to use it (map_domain_pirq).

        Raises EPERM (the caller has no use of the irq), EINVAL. A success too where either is mapped otherwise: then
        nothing has changed.
        """
        if self._prepare(caller, pirq, irq):
            self.permit(irq)
            self._set(pirq, irq)

    def map_gsi(self, caller: Domain, gsi: int, pirq: int = -1) -> int:
        """Map a line to `pirq`, or a free number where that is negative (allocate_and_map_gsi_pirq); the number.

        `gsi` is the caller's pirq, or for domain 0 a GSI that it has not mapped. EINVAL, EPERM, EBUSY (it is still
        bound), EEXIST (mapped to another), ENOSPC.
        """
        if not 0 <= gsi < NR_IRQS_GSI:
            raise XenError(Errno.EINVAL, f"no GSI {gsi}")
        irq = caller.pirqs.irq(gsi)
        if irq <= 0:
            if caller.domid:
                raise XenError(Errno.EINVAL, f"{caller} has no pirq {gsi}")
            irq = gsi
        pirq = self._allocate(irq, pirq, MAP_PIRQ_TYPE_GSI, None)
        self.map(caller, pirq, irq)
        return pirq

    def map_msi(self, caller: Domain, kind: int, index: int, pirq: int, info: MsiInfo) -> int:
        """Map a message of a device, or several MSIs in a row (allocate_and_map_msi_pirq); the first number.

        `index` is an irq that the caller created before, -1 for a new one. Raises what `map_gsi` does, EDOM (number of
        MSIs), EOPNOTSUPP (several need an IOMMU that remaps them), and what `pci_enable_msi` refuses with.
        """
        irqs = self._domain.hypervisor.irqs
        created = kind == MAP_PIRQ_TYPE_MULTI_MSI or index == -1
        if kind == MAP_PIRQ_TYPE_MSI and not info.table_base:
            info.entry_nr = 1
        irq = irqs.create(caller) if created else index
        if not NR_IRQS_GSI <= irq < irqs.nr_irqs:
            raise XenError(Errno.EINVAL, f"irq {irq} is no message's")
        try:
            pirq = self._allocate(irq, pirq, kind, info)
            if self._prepare(caller, pirq, irq):
                self._map_messages(caller, kind, pirq, irq, info)
        except XenError:
            if created:
                irqs.destroy(irq)
            raise
        return pirq

    def _map_messages(self, caller: Domain, kind: int, pirq: int, irq: int, info: MsiInfo) -> None:
        """The part of map_domain_pirq for messages; on XenError nothing has changed but `irq`, the caller's to free."""
        irqs = self._domain.hypervisor.irqs
        device = irqs.pci.get(info.sbdf)
        if device is None or device.owner is not self._domain:
            raise XenError(Errno.ENODEV, f"{self._domain} has no device {info.sbdf:#x}")
        descs = pci_enable_msi(irqs, info, irq)
        granted = irq not in self.permitted
        mapped: list[tuple[int, int]] = []
        try:
            for i, msi in enumerate(descs if kind == MAP_PIRQ_TYPE_MULTI_MSI else descs[:1]):
                number = irqs.create(caller) if i else irq
                mapped.append((pirq + i, number))
                desc = irqs.desc(number)
                if desc.handler is not NO_IRQ_TYPE:
                    raise XenError(Errno.EBUSY, f"irq {number} is in use")
                if i and (not pirq + i < self.nr_pirqs or self.irq(pirq + i) > 0):
                    raise XenError(Errno.EBUSY, f"pirq {pirq + i} is in use")
                setup_msi_irq(irqs, desc, msi)
        except XenError:
            pci_disable_msi(descs)
            for _, number in mapped[1:]:
                irqs.destroy(number)
            desc = irqs.desc(irq)
            if desc.msi_desc in descs:
                desc.handler = NO_IRQ_TYPE
                desc.msi_desc = None
            if granted:
                self.deny(irq)
            raise
        for number, each in mapped:
            self.permit(each)
            self._set(number, each)

    def _allocate(self, irq: int, pirq: int, kind: int, info: MsiInfo | None) -> int:
        """The number for an irq: `pirq`, or a free one where it is negative (allocate_pirq)."""
        current = self.pirq_of(irq)
        if pirq >= 0:
            if current and pirq != current:
                raise XenError(Errno.EEXIST, f"irq {irq} is mapped to pirq {current}")
            return pirq
        if current:
            if current < 0:
                raise XenError(Errno.EBUSY, f"irq {irq} is still bound")
            return current
        if info is None or kind != MAP_PIRQ_TYPE_MULTI_MSI:
            return self.get_free(kind)
        if not 0 < info.entry_nr <= MAX_MSI_IRQS:
            raise XenError(Errno.EDOM, f"{info.entry_nr} messages")
        if info.entry_nr != 1:
            raise XenError(Errno.EOPNOTSUPP, "no IOMMU remaps interrupts")
        return self.get_free(kind)

    def get_free(self, kind: int) -> int:
        """A number that isn't in use (get_free_pirq): for a line one from 16 up, else from the top down. ENOSPC."""
        if kind == MAP_PIRQ_TYPE_GSI:
            for pirq in range(NR_ISA_IRQS, NR_IRQS_GSI):
                if not self.irq(pirq):
                    return pirq
        for pirq in range(self.nr_pirqs - 1, NR_IRQS_GSI - 1, -1):
            if not self.irq(pirq):
                return pirq
        raise XenError(Errno.ENOSPC, f"{self._domain} has no free pirq")

    def set_aside(self, kind: int) -> int:
        """PHYSDEVOP_get_free_pirq: a free number that stays the caller's until it is mapped. ENOSPC."""
        pirq = self.get_free(kind)
        self._get_info(pirq).irq = PIRQ_ALLOCATED
        return pirq

    def unmap(self, pirq: int) -> None:
        """Take a mapping back, and the permission with it; a binding is ended by force (unmap_domain_pirq).

        Its port stays until the guest closes it, and so long the numbers stay taken, negative. EINVAL (not mapped),
        EBUSY (not the first of several MSIs).
        """
        irqs = self._domain.hypervisor.irqs
        info = self._info.get(pirq) if 0 <= pirq < self.nr_pirqs else None
        if info is None or info.irq <= 0:
            raise XenError(Errno.EINVAL, f"pirq {pirq} is not mapped")
        desc = irqs.desc(info.irq)
        msi, count = desc.msi_desc, 1
        if msi is not None and not msi.msix:
            if msi.entry_nr:
                raise XenError(Errno.EBUSY, f"pirq {pirq} is one of several")
            count = msi.nvec
        forced = desc.guest_action is not None and any(guest is self._domain for guest, _ in desc.guest_action.guests)
        if forced:
            unbind(irqs, self._domain, info, desc)
        created = []
        for number in range(pirq, pirq + count):
            info = self._info.get(number)
            if info is None or info.irq <= 0:
                continue
            irq = info.irq
            if forced:
                info.irq = -irq
                self._irq_pirq[irq] = -number
            else:
                info.irq = 0
                del self._irq_pirq[irq]
                self._cleanup(info)
            desc = irqs.desc(irq)
            if desc.msi_desc is not None:
                pci_disable_msi([desc.msi_desc])
                desc.handler = NO_IRQ_TYPE
                desc.msi_desc = None
                created.append(irq)
            self.deny(irq)
        for irq in created:
            irqs.destroy(irq)

    def destroy(self) -> None:
        """The domain has ended, its ports are closed (free_domain_pirqs). Its devices go back to domain 0."""
        self._drop_eoi_map()
        for pirq in sorted(self._info):
            if self.irq(pirq) > 0:
                self.unmap(pirq)
        self._info.clear()
        self.permitted.clear()
        hypervisor = self._domain.hypervisor
        if hypervisor.irqs_so_far is not None:
            for device in hypervisor.irqs_so_far.pci.values():
                if device.owner is self._domain:
                    device.owner = hypervisor.domains.get(0)

    # -- the EOI map ---------------------------------------------------------------------------------------------------

    def set_eoi_map(self, mfn: int, auto_unmask: bool) -> None:
        """A page in which a bit per pirq says whether the guest must EOI it (PHYSDEVOP_pirq_eoi_gmfn).

        A bit is set or cleared when its pirq is bound. EINVAL (not a frame that the guest may write), EBUSY.
        """
        domain = self._domain
        machine = domain.machine
        if not 0 <= mfn < machine.frames or machine.owner[mfn] != domain.domid:
            raise XenError(Errno.EINVAL, f"frame {mfn:#x} is not {domain}'s")
        if machine.type_count[mfn] and machine.type[mfn] != PGT_WRITABLE:
            raise XenError(Errno.EINVAL, f"frame {mfn:#x} can't be written")
        if self.eoi_map:
            raise XenError(Errno.EBUSY, f"{domain} has an EOI map")
        machine.type[mfn] = PGT_WRITABLE
        machine.type_count[mfn] += 1
        machine.refs[mfn] += 1
        self.eoi_map = mfn << PAGE_SHIFT
        self.auto_unmask = auto_unmask

    def _drop_eoi_map(self) -> None:
        if self.eoi_map:
            machine, mfn = self._domain.machine, self.eoi_map >> PAGE_SHIFT
            machine.type_count[mfn] -= 1
            machine.refs[mfn] -= 1
            self.eoi_map = 0
            self.auto_unmask = False

    def _note_eoi(self, pirq: int, needed: bool) -> None:
        if self.eoi_map:
            mem, at, bit = self._domain.machine.mem, self.eoi_map + pirq // 8, 1 << pirq % 8
            mem[at] = mem[at] | bit if needed else mem[at] & ~bit


def irq_permission(caller: Domain, target: Domain, pirq: int, allow: bool) -> None:
    """XEN_DOMCTL_irq_permission: let `target` use the line that is the caller's `pirq`, or no more.

    Raises EPERM (the caller itself may not, or isn't privileged), EINVAL.
    """
    if not 0 <= pirq < caller.pirqs.nr_pirqs:
        raise XenError(Errno.EINVAL, f"{caller} has no pirq {pirq}")
    if not caller.pirqs.access_permitted(pirq) or not caller.privileged:
        raise XenError(Errno.EPERM, f"{caller} may not give away pirq {pirq}")
    irq = caller.pirqs.irq(pirq)
    if allow:
        target.pirqs.permit(irq)
    else:
        target.pirqs.deny(irq)

"""Domains and their virtual CPUs as the hypervisor keeps them (xen/common/domain.c, struct domain and struct vcpu).

The same objects stand for real guests, whose code an engine runs, and for modelled ones, whose kernel is Python:
event channels, shared_info and blocking are one code for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import (
    DOMID_FIRST_RESERVED,
    DOMID_SELF,
    DOMID_XEN,
    NR_VIRQS,
    PAGE_SHIFT,
    VCPU_INFO_SIZE,
    VCPU_INFO_UPCALL_MASK,
    XEN_LEGACY_MAX_VCPUS,
)
from pvirq.xen.memory import ABANDONED, PGT_NONE, PGT_WRITABLE, Machine
from pvirq.xen.pirq import DomainPirqs
from pvirq.xen.probes import Probed, Probes
from pvirq.xen.timer import Clock, Timer

if TYPE_CHECKING:
    from pvirq.xen.evtchn import EventChannels
    from pvirq.xen.evtchn_op import Evtchnop
    from pvirq.xen.grant import GrantTable
    from pvirq.xen.ioapic import IoApic
    from pvirq.xen.irq import Irqs
    from pvirq.xen.msi import PciDevice


class Vcpu:
    """One virtual CPU.

    `info` is the byte offset of its struct vcpu_info in machine memory. A vCPU runs when it is `up` (VCPUOP_up),
    not `blocked` (SCHEDOP_block), not in `polling` (SCHEDOP_poll), and neither it nor its domain is paused.
    """

    __slots__ = (
        "blocked", "domain", "info", "pause_count", "periodic_last", "periodic_ns", "periodic_timer", "pinned",
        "poll_port", "poll_timer", "polling", "singleshot_timer", "up", "vcpu_id", "virq_to_evtchn", "yielded",
    )  # fmt: skip

    def __init__(self, domain: Domain, vcpu_id: int) -> None:
        self.domain = domain
        self.vcpu_id = vcpu_id
        self.info = domain.shared_info + vcpu_id * VCPU_INFO_SIZE
        self.up = False
        self.blocked = False
        self.polling = False
        self.pause_count = 0
        self.poll_port = 0  # 0: none, -1: several, else the one polled (struct vcpu's poll_evtchn)
        self.poll_timer: Timer | None = None
        self.yielded = False  # it wants another to have its turn; who gives turns takes this back
        self.pinned = False  # SCHEDOP_pin_override holds it on a physical CPU
        self.virq_to_evtchn = [0] * NR_VIRQS
        self.periodic_ns = 0
        self.periodic_last = 0  # when it last raised an event
        self.periodic_timer: Timer | None = None
        self.singleshot_timer: Timer | None = None

    @property
    def runnable(self) -> bool:
        return self.up and not self.blocked and not self.polling and not self.domain.paused and not self.pause_count

    def pause(self) -> None:
        """Not while this vCPU runs: let it run no more until as many `unpause`s (vcpu_pause)."""
        self.pause_count += 1

    def unpause(self) -> None:
        """Take one `pause` back (vcpu_unpause)."""
        self.pause_count -= 1
        if self.runnable:
            self.domain.hypervisor.on_wake(self)  # what woke it meanwhile was in vain

    def event_pending(self) -> bool:
        """An upcall is due: pending and not masked (local_events_need_delivery)."""
        mem, info = self.domain.machine.mem, self.info
        return bool(mem[info]) and not mem[info + VCPU_INFO_UPCALL_MASK]

    def kick(self) -> None:
        """There may be something to do for this vCPU: end a block or poll, let the host look again (vcpu_kick)."""
        self.blocked = False
        domain = self.domain
        if self.polling:
            self.polling = False
            self.poll_port = 0
            domain.pollers -= 1
        domain.hypervisor.on_wake(self)

    def end_poll(self) -> None:
        """Leave SCHEDOP_poll, for a port polled or because its time is up.

        As in Xen the timer stays armed: left over from a poll that ended early, it may cut a later one short.
        """
        if self.polling:
            self.kick()


@dataclass
class Label:
    """What those who fill a domain say of it, for traces: its name, "real" or "modelled", its kernel.

    `irqs`: how much a trace can tell of a real guest's interrupts (`pvirq.pv.irq_watch`).
    """

    name: str = ""
    kind: str = ""
    kernel: str = ""
    irqs: str = ""


class Domain:
    """A domain: its id, privilege, shared_info, vCPUs and event channels.

    `tot_pages` counts the frames of RAM that it has, `max_pages` those that it may have. `foreign` are the frames of
    other domains that it holds by their grants: mfn -> [references, how many of them to write]. `flush_tlb` and
    `frame_written` (machine address, size) tell its CPUs of what others do to its memory.
    """

    def __init__(
        self,
        hypervisor: Hypervisor,
        domid: int,
        *,
        privileged: bool = False,
        vcpus: int = 1,
        max_evtchns: int = -1,
        word_bits: int = 64,
    ) -> None:
        """`vcpus` is the most it can have; `max_evtchns` the toolstack's highest permitted port (-1: no limit).

        `word_bits` is the guest's word size, 64 or 32: it decides the layout of shared_info and the number of
        two-level event channels.
        """
        from pvirq.xen.evtchn import EventChannels  # evtchn needs Domain for its types

        if not 1 <= vcpus <= XEN_LEGACY_MAX_VCPUS:
            raise XenError(Errno.EINVAL, f"a domain has 1 to {XEN_LEGACY_MAX_VCPUS} vCPUs")
        self.hypervisor = hypervisor
        self.machine: Machine = hypervisor.machine
        self.domid = domid
        self.privileged = privileged
        self.word_bits = word_bits
        self.paused = False
        self.dying = False
        self.pollers = 0  # vCPUs in SCHEDOP_poll: an event that nobody can poll for need not look for them
        self.grant_table: GrantTable | None = None
        self.tot_pages = 0
        self.max_pages = 0
        self.foreign: dict[int, list[int]] = {}
        self.flush_tlb: Callable[[], None] = lambda: None
        self.frame_written: Callable[[int, int], None] = lambda address, size: None
        self.shutdown_code: int | None = None  # latched by SCHEDOP_shutdown_code for a shutdown still to come
        self.shutdown_reason: int | None = None
        self.watchdogs: list[Timer | None] = [None, None]  # SCHEDOP_watchdog, by id - 1; None: not in use
        self.label = Label(f"domain {domid}" if domid else "Domain-0")
        self.probed: list[Probed] = []  # what instruments look into of it, beyond its event channels
        mfn = self.machine.alloc(1, DOMID_XEN)
        self.machine.share(mfn, domid)
        self.shared_info_mfn = mfn
        self.shared_info = mfn << PAGE_SHIFT  # byte offset in machine memory
        self.vcpus = [Vcpu(self, i) for i in range(vcpus)]
        # vcpu_info starts masked, as Xen's alloc_vcpu leaves it for a PV guest.
        for vcpu in self.vcpus:
            self.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 1
        self.pirqs: DomainPirqs = DomainPirqs(self)
        self.evtchn: EventChannels = EventChannels(self, max_evtchns)
        self._evtchnop: Evtchnop | None = None

    @property
    def evtchnop(self) -> Evtchnop:
        """HYPERVISOR_event_channel_op as this domain."""
        if self._evtchnop is None:
            from pvirq.xen.evtchn_op import Evtchnop

            self._evtchnop = Evtchnop(self)
        return self._evtchnop

    def vcpu(self, vcpu_id: int) -> Vcpu:
        """A vCPU by number; XenError(ENOENT) where there is none."""
        if 0 <= vcpu_id < len(self.vcpus):
            return self.vcpus[vcpu_id]
        raise XenError(Errno.ENOENT, f"no vCPU {vcpu_id}")

    def is_special_page(self, mfn: int) -> bool:
        """A page of Xen's own that it shares with the domain: it can be mapped, and not given away."""
        table = self.grant_table
        if mfn == self.shared_info_mfn:
            return True
        return table is not None and (mfn in table.frames or mfn in table.status_frames)

    # -- granted frames --------------------------------------------------------------------------------------------

    def get_granted(self, mfn: int, writable: bool) -> None:
        """Hold a granted frame, another domain's or its own.

        XenError(EBUSY) to write one that is a page table or descriptor page.
        """
        machine = self.machine
        if writable:
            if machine.type_count[mfn] and machine.type[mfn] != PGT_WRITABLE:
                raise XenError(Errno.EBUSY, f"mfn {mfn:#x} is a page table or descriptor page")
            machine.type[mfn] = PGT_WRITABLE
            machine.type_count[mfn] += 1
        machine.refs[mfn] += 1
        if machine.owner[mfn] != self.domid:
            held = self.foreign.setdefault(mfn, [0, 0])
            held[0] += 1
            held[1] += writable

    def put_granted(self, mfn: int, writable: bool) -> None:
        """Let go of it. No translation of it may be left in this domain's TLBs by now."""
        machine = self.machine
        held = self.foreign.get(mfn)
        if held is not None:
            held[0] -= 1
            held[1] -= writable
            if not held[0]:
                del self.foreign[mfn]
        machine.refs[mfn] -= 1
        if writable:
            machine.type_count[mfn] -= 1
        if machine.type_count[mfn]:
            return
        if writable:
            owner = self.hypervisor.domain_or_zombie(machine.owner[mfn])
            if owner is not None:
                owner.flush_tlb()  # its own mappings were no longer the last: they may linger there
        if not machine.refs[mfn] and machine.pinned[mfn] & ABANDONED:
            self.hypervisor.free_frame(mfn)

    def shutdown(self, reason: int) -> None:
        """SCHEDOP_shutdown: the domain stops, with its reason kept for the toolstack (domain_shutdown).

        A code that SCHEDOP_shutdown_code has latched before comes first.
        """
        if self.shutdown_code is None:
            self.shutdown_code = reason
        if self.shutdown_reason is None:
            self.shutdown_reason = self.shutdown_code
            self.paused = True
            if (told := self.hypervisor.probes.on_shut_down) is not None:
                told(("shut_down", self, self.shutdown_code))
            self.hypervisor.on_shutdown(self)

    def unpause(self) -> None:
        """Let its vCPUs run again (domain_unpause)."""
        self.paused = False
        for vcpu in self.vcpus:
            if vcpu.runnable:
                self.hypervisor.on_wake(vcpu)  # what woke it meanwhile was in vain

    def resume(self) -> None:
        """Let a domain that has shut down go on (domain_resume)."""
        self.shutdown_reason = self.shutdown_code = None
        self.unpause()

    def __repr__(self) -> str:
        return f"<domain {self.domid}>"


class Hypervisor:
    """What all domains of a host share: frames, the clock, the domain list and the handlers of global VIRQs.

    The two callbacks are the only way up: the host sets them to learn that a vCPU may have become runnable, and
    that a domain has shut down.
    """

    def __init__(self, machine: Machine | None = None, clock: Clock | None = None) -> None:
        self.machine = machine or Machine()
        self.clock = clock or Clock()
        self.probes = Probes(self)
        self.domains: dict[int, Domain] = {}
        self.zombies: dict[int, Domain] = {}  # destroyed, but others still map frames of theirs
        self.global_virq_handlers: dict[int, Domain] = {}  # virq -> domain; domain 0 where absent
        self.on_wake: Callable[[Vcpu], None] = lambda vcpu: None
        self.on_shutdown: Callable[[Domain], None] = lambda domain: None
        self._rover = 0
        self.cpus = 0  # physical ones; 0: as many as domain 0 has
        self.irqs_so_far: Irqs | None = None  # None: nothing has asked for `irqs`

    @property
    def irqs(self) -> Irqs:
        """The physical interrupts. They come to be when something first asks for them."""
        if self.irqs_so_far is None:
            from pvirq.xen.irq import Irqs

            dom0 = self.domains.get(0)
            self.irqs_so_far = Irqs(self, self.cpus or (len(dom0.vcpus) if dom0 else 1))
        return self.irqs_so_far

    @property
    def ioapic(self) -> IoApic:
        """The I/O APIC, whose `line(gsi)` devices assert."""
        return self.irqs.ioapic

    @property
    def pci(self) -> dict[int, PciDevice]:
        """The PCI devices that domain 0 has told of, by sbdf."""
        return self.irqs.pci

    def create_domain(
        self,
        domid: int | None = None,
        *,
        privileged: bool = False,
        vcpus: int = 1,
        max_evtchns: int = -1,
        word_bits: int = 64,
    ) -> Domain:
        """Add a domain under `domid`, or the next free id behind the last that was given so (do_domctl's rover).

        XenError(EEXIST) where the id is taken.
        """
        if domid is None:
            ids = chain(range(self._rover + 1, DOMID_FIRST_RESERVED), range(1, self._rover + 1))
            domid = self._rover = next(i for i in ids if not self.domain_or_zombie(i))
        if self.domain_or_zombie(domid):
            raise XenError(Errno.EEXIST, f"domain {domid} exists")
        domain = Domain(self, domid, privileged=privileged, vcpus=vcpus, max_evtchns=max_evtchns, word_bits=word_bits)
        self.domains[domid] = domain
        self.probes.domain_created(domain)
        return domain

    def find_domain(self, domid: int, caller: Domain) -> Domain:
        """The domain that `caller` names by `domid` (DOMID_SELF too); XenError(ESRCH) where there is none."""
        if domid == DOMID_SELF:
            return caller
        domain = self.domains.get(domid)
        if domain is None:
            raise XenError(Errno.ESRCH, f"no domain {domid:#x}")
        return domain

    def domain_or_zombie(self, domid: int) -> Domain | None:
        """A domain, be it one that was destroyed and only lives on in others' mappings of its frames."""
        return self.domains.get(domid) or self.zombies.get(domid)

    def free_frame(self, mfn: int) -> None:
        """A frame of a domain's has lost its last reference (free_domheap_page)."""
        owner = self.domain_or_zombie(self.machine.owner[mfn])
        if owner is not None:
            owner.flush_tlb()  # or it could go on using, by a translation it remembers, what is somebody else's by then
            owner.tot_pages -= 1
            if owner.dying and not owner.tot_pages:
                self.zombies.pop(owner.domid, None)
        self.machine.free(mfn)

    def destroy_domain(self, domain: Domain) -> None:
        """End a domain: its event channels close both ends, its timers stop, its frames are free again.

        Those of its frames that others have mapped stay until they unmap them, and so does its id (a zombie).
        """
        domain.dying = True
        domain.paused = True
        timers = list(domain.watchdogs)
        for vcpu in domain.vcpus:
            timers += (vcpu.poll_timer, vcpu.periodic_timer, vcpu.singleshot_timer)
        for timer in timers:
            if timer is not None:
                timer.cancel()
        domain.evtchn.destroy()
        domain.pirqs.destroy()
        if domain.grant_table is not None:
            domain.grant_table.maptrack.release_all()
        for mfn, (references, writable) in list(domain.foreign.items()):
            for i in range(references):
                domain.put_granted(mfn, i < writable)
        del self.domains[domain.domid]
        self._free_frames_of(domain)
        if (told := self.probes.on_ended) is not None:
            told(("ended", domain))

    def _free_frames_of(self, domain: Domain) -> None:
        machine = self.machine
        held: dict[int, list[int]] = {}
        for other in self.domains.values():
            for mfn, (references, writable) in other.foreign.items():
                if machine.owner[mfn] == domain.domid:
                    total = held.setdefault(mfn, [0, 0])
                    total[0] += references
                    total[1] += writable
        domain.flush_tlb = lambda: None
        domain.frame_written = lambda address, size: None
        machine.free_all_of(domain.domid, held)
        for mfn, (references, writable) in held.items():
            machine.refs[mfn] = references
            machine.type_count[mfn] = writable
            machine.type[mfn] = PGT_WRITABLE if writable else PGT_NONE
            machine.pinned[mfn] = ABANDONED
        domain.tot_pages = len(held)
        if held:
            self.zombies[domain.domid] = domain

"""Domains and their virtual CPUs as the hypervisor keeps them (xen/common/domain.c, struct domain and struct vcpu).

The same objects stand for real guests, whose code an engine runs, and for modelled ones, whose kernel is Python:
event channels, shared_info and blocking are one code for both.
"""

from __future__ import annotations

from collections.abc import Callable
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
from pvirq.xen.memory import Machine
from pvirq.xen.timer import Clock, Timer

if TYPE_CHECKING:
    from pvirq.xen.evtchn import EventChannels
    from pvirq.xen.grant import GrantTable


class Vcpu:
    """One virtual CPU.

    `info` is the byte offset of its struct vcpu_info in machine memory. A vCPU runs when it is `up` (VCPUOP_up),
    not `blocked` (SCHEDOP_block), not in `polling` (SCHEDOP_poll) and its domain is not paused.
    """

    __slots__ = (
        "blocked", "domain", "info", "periodic_ns", "periodic_timer", "pinned", "poll_port", "poll_timer", "polling",
        "singleshot_timer", "up", "vcpu_id", "virq_to_evtchn",
    )  # fmt: skip

    def __init__(self, domain: Domain, vcpu_id: int) -> None:
        self.domain = domain
        self.vcpu_id = vcpu_id
        self.info = domain.shared_info + vcpu_id * VCPU_INFO_SIZE
        self.up = False
        self.blocked = False
        self.polling = False
        self.poll_port = 0  # 0: none, -1: several, else the one polled (struct vcpu's poll_evtchn)
        self.poll_timer: Timer | None = None
        self.pinned = False  # SCHEDOP_pin_override holds it on a physical CPU
        self.virq_to_evtchn = [0] * NR_VIRQS
        self.periodic_ns = 0
        self.periodic_timer: Timer | None = None
        self.singleshot_timer: Timer | None = None

    @property
    def runnable(self) -> bool:
        return self.up and not self.blocked and not self.polling and not self.domain.paused

    def event_pending(self) -> bool:
        """An upcall is due: pending and not masked (local_events_need_delivery)."""
        mem, info = self.domain.machine.mem, self.info
        return bool(mem[info]) and not mem[info + VCPU_INFO_UPCALL_MASK]

    def kick(self) -> None:
        """There may be something to do for this vCPU: end a block or poll, let the host look again (vcpu_kick)."""
        self.blocked = False
        self.polling = False
        self.poll_port = 0
        self.domain.hypervisor.on_wake(self)

    def end_poll(self) -> None:
        """Leave SCHEDOP_poll, for a port polled or because its time is up.

        As in Xen the timer stays armed: left over from a poll that ended early, it may cut a later one short.
        """
        if self.polling:
            self.kick()


class Domain:
    """A domain: its id, privilege, shared_info, vCPUs and event channels."""

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
        self.grant_table: GrantTable | None = None
        self.shutdown_code: int | None = None  # latched by SCHEDOP_shutdown_code for a shutdown still to come
        self.shutdown_reason: int | None = None
        self.watchdogs: list[Timer | None] = [None, None]  # SCHEDOP_watchdog, by id - 1; None: not in use
        mfn = self.machine.alloc(1, DOMID_XEN)
        self.machine.share(mfn, domid)
        self.shared_info_mfn = mfn
        self.shared_info = mfn << PAGE_SHIFT  # byte offset in machine memory
        self.vcpus = [Vcpu(self, i) for i in range(vcpus)]
        # vcpu_info starts masked, as Xen's alloc_vcpu leaves it for a PV guest.
        for vcpu in self.vcpus:
            self.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] = 1
        self.evtchn: EventChannels = EventChannels(self, max_evtchns)

    def vcpu(self, vcpu_id: int) -> Vcpu:
        """A vCPU by number; XenError(ENOENT) where there is none."""
        if 0 <= vcpu_id < len(self.vcpus):
            return self.vcpus[vcpu_id]
        raise XenError(Errno.ENOENT, f"no vCPU {vcpu_id}")

    def shutdown(self, reason: int) -> None:
        """SCHEDOP_shutdown: the domain stops, with its reason kept for the toolstack (domain_shutdown).

        A code that SCHEDOP_shutdown_code has latched before comes first.
        """
        if self.shutdown_code is None:
            self.shutdown_code = reason
        if self.shutdown_reason is None:
            self.shutdown_reason = self.shutdown_code
            self.paused = True
            self.hypervisor.on_shutdown(self)

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
        self.domains: dict[int, Domain] = {}
        self.global_virq_handlers: dict[int, Domain] = {}  # virq -> domain; domain 0 where absent
        self.on_wake: Callable[[Vcpu], None] = lambda vcpu: None
        self.on_shutdown: Callable[[Domain], None] = lambda domain: None

    def create_domain(
        self,
        domid: int | None = None,
        *,
        privileged: bool = False,
        vcpus: int = 1,
        max_evtchns: int = -1,
        word_bits: int = 64,
    ) -> Domain:
        """Add a domain under `domid`, or the next free id from 1 up. XenError(EEXIST) where the id is taken."""
        if domid is None:
            domid = next(i for i in range(1, DOMID_FIRST_RESERVED) if i not in self.domains)
        if domid in self.domains:
            raise XenError(Errno.EEXIST, f"domain {domid} exists")
        domain = Domain(self, domid, privileged=privileged, vcpus=vcpus, max_evtchns=max_evtchns, word_bits=word_bits)
        self.domains[domid] = domain
        return domain

    def find_domain(self, domid: int, caller: Domain) -> Domain:
        """The domain that `caller` names by `domid` (DOMID_SELF too); XenError(ESRCH) where there is none."""
        if domid == DOMID_SELF:
            return caller
        domain = self.domains.get(domid)
        if domain is None:
            raise XenError(Errno.ESRCH, f"no domain {domid:#x}")
        return domain

    def destroy_domain(self, domain: Domain) -> None:
        """End a domain: its event channels close both ends, its timers stop, its frames are free again."""
        domain.dying = True
        domain.paused = True
        timers = list(domain.watchdogs)
        for vcpu in domain.vcpus:
            timers += (vcpu.poll_timer, vcpu.periodic_timer, vcpu.singleshot_timer)
        for timer in timers:
            if timer is not None:
                timer.cancel()
        domain.evtchn.destroy()
        self.machine.free_all_of(domain.domid)
        del self.domains[domain.domid]

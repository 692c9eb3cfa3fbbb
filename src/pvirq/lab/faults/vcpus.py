"""Faults of vCPUs and of time: a vCPU that doesn't run, an upcall for nothing, timers and clocks that are wrong."""

from __future__ import annotations

import struct
from typing import Any, Final

from pvirq.abi.xen import (
    SHARED_INFO_WC_NSEC,
    SHARED_INFO_WC_SEC,
    SHARED_INFO_WC_SEC_HI,
    SHARED_INFO_WC_VERSION,
)
from pvirq.lab.faults.names import Vcpus
from pvirq.lab.faults.rule import Rule, ScheduledRule
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.sched import mark_events_pending
from pvirq.xen.timer import NS_PER_S, Timer

U32: Final = 0xFFFFFFFF


class Upcall(ScheduledRule):
    """evtchn_upcall_pending is set and the vCPU kicked, and no port is pending (vcpu_mark_events_pending)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.vcpus = Vcpus(self.names, self.spec)

    def act(self) -> None:
        for vcpu in self.vcpus.all():
            self.note("upcall", d=vcpu.domain.domid, v=vcpu.vcpu_id)
            mark_events_pending(vcpu)


class _Pauses:
    """vCPUs that a rule has paused, and when they go on."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._paused: dict[Vcpu, Timer] = {}

    def pause(self, vcpu: Vcpu, ns: int) -> None:
        """For `ns`, unless it is paused by this rule already."""
        if vcpu in self._paused:
            return
        vcpu.pause()
        self._rule.note("paused", d=vcpu.domain.domid, v=vcpu.vcpu_id, ns=ns)
        clock = self._rule.clock
        self._paused[vcpu] = clock.at(clock.now() + ns, lambda: self.go_on(vcpu))

    def go_on(self, vcpu: Vcpu) -> None:
        self._paused.pop(vcpu).cancel()
        self._rule.note("unpaused", fires=False, d=vcpu.domain.domid, v=vcpu.vcpu_id)
        vcpu.unpause()

    def end(self) -> None:
        for vcpu in list(self._paused):
            self.go_on(vcpu)


class Pause(ScheduledRule):
    """A vCPU doesn't run for a time, as by vcpu_pause. Its events and timers go on."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.vcpus = Vcpus(self.names, self.spec)
        self._pauses = _Pauses(self)

    def act(self) -> None:
        for vcpu in self.vcpus.all():
            self._pauses.pause(vcpu, self.spec.number("ns"))

    def lifted(self) -> None:
        self._pauses.end()


class Starve(ScheduledRule):
    """In each cycle a vCPU is paused for as long as isn't its share (as by the credit scheduler's cap)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.vcpus = Vcpus(self.names, self.spec)
        self._pauses = _Pauses(self)
        self._period = self.spec.number("cycle")
        self._count = None

    def act(self) -> None:
        for vcpu in self.vcpus.all():
            ns = self.spec.number("cycle") - int(self.spec.number("cycle") * float(self.spec["share"]))
            if ns:
                self._pauses.pause(vcpu, ns)

    def lifted(self) -> None:
        self._pauses.end()


class Early(Rule):
    """A one-shot timer fires before its time, where that is still to come (`Probes.deadlines`)."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.vcpus = Vcpus(self.names, self.spec)
        self.hypervisor.probes.deadlines.append(self._deadline)

    def _deadline(self, vcpu: Vcpu, when: int) -> int:
        # What is due now stays: a kernel that sets the same time again, as it is too early, must get there.
        if when - self.spec.number("ns") <= self.clock.now() or not self.vcpus.matches(vcpu) or not self.due():
            return when
        moved = max(when - self.jittered(), self.clock.now() + 1)
        self.note("early", d=vcpu.domain.domid, v=vcpu.vcpu_id, ns=when - moved)
        return moved

    def lifted(self) -> None:
        self.hypervisor.probes.deadlines.remove(self._deadline)


class ClockStep(ScheduledRule):
    """Xen's system time, and with it the guests' TSC, jumps: forward, as it never goes back."""

    def act(self) -> None:
        ns = self.spec.number("ns")
        self.note("stepped", ns=ns)
        self.clock.jump_to(self.clock.now() + ns)


class WallclockStep(ScheduledRule):
    """Xen's time of day is set anew (XENPF_settime): in shared_info, which a Linux reads at boot and resume."""

    def act(self) -> None:
        ns, wanted = self.spec.number("ns"), self.spec.get("domain")
        domain = wanted if isinstance(wanted, (int, str)) else None
        if domain is None:
            self.host.wallclock_ns += ns  # for domains that are still to come
        for found in self.names.domains(domain):
            self.note("set", d=found.domid, ns=ns)
            _step_wallclock(found, ns)


def _step_wallclock(domain: Domain, ns: int) -> None:
    """update_domain_wallclock_time; the fields are of the time at which system time began."""
    mem, at = domain.machine.mem, domain.shared_info

    def field(offset: int) -> int:
        return int(struct.unpack_from("<I", mem, at + offset)[0])

    def put(offset: int, value: int) -> None:
        struct.pack_into("<I", mem, at + offset, value & U32)

    version = field(SHARED_INFO_WC_VERSION)
    seconds = field(SHARED_INFO_WC_SEC) | field(SHARED_INFO_WC_SEC_HI) << 32
    total = max(seconds * NS_PER_S + field(SHARED_INFO_WC_NSEC) + ns, 0)
    put(SHARED_INFO_WC_VERSION, version + 1 | 1)  # odd: being written
    put(SHARED_INFO_WC_SEC, total // NS_PER_S)
    put(SHARED_INFO_WC_SEC_HI, total // NS_PER_S >> 32)
    put(SHARED_INFO_WC_NSEC, total % NS_PER_S)
    put(SHARED_INFO_WC_VERSION, (version + 1 | 1) + 1)

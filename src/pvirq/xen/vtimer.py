"""The timers of a virtual CPU: one single-shot, one periodic, both raising VIRQ_TIMER (xen/common/sched/core.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import VIRQ_TIMER
from pvirq.xen import evtchn
from pvirq.xen.domain import Vcpu

MILLISECOND: Final = 1_000_000
DEFAULT_PERIOD: Final = 10 * MILLISECOND  # of a new PV vCPU (pv_vcpu_initialise)
STIME_DELTA_MAX: Final = ((1 << 64) - 1) >> 2
HUGE_TIMEOUT: Final = 1 << 50


def send_timer_event(vcpu: Vcpu) -> None:
    """VIRQ_TIMER now; lost where the guest has not bound it."""
    evtchn.send_guest_vcpu_virq(vcpu, VIRQ_TIMER)


def arm_singleshot(vcpu: Vcpu, when: int, fire: Callable[[], None]) -> None:
    """Have the vCPU's single-shot timer call `fire` at `when` ns, or when `Probes.deadlines` have it instead."""
    hypervisor = vcpu.domain.hypervisor
    moved = when
    for deadline in hypervisor.probes.deadlines:
        moved = deadline(vcpu, moved)
    timer = vcpu.singleshot_timer = hypervisor.clock.at(moved, fire)
    timer.when = when  # what was asked for


def stop_singleshot(vcpu: Vcpu) -> None:
    """VCPUOP_stop_singleshot_timer."""
    if vcpu.singleshot_timer is not None:
        vcpu.singleshot_timer.cancel()
        vcpu.singleshot_timer = None


def set_singleshot(vcpu: Vcpu, when: int) -> None:
    """VCPUOP_set_singleshot_timer: VIRQ_TIMER at `when` ns of system time, at once where that has passed.

    VCPU_SSHOTTMR_future makes no difference: since 4.17 a timeout in the past is delivered, not refused.
    """
    clock = vcpu.domain.hypervisor.clock
    stop_singleshot(vcpu)
    if when < clock.now():
        send_timer_event(vcpu)
    else:
        arm_singleshot(vcpu, when, lambda: send_timer_event(vcpu))


def set_timer_op(vcpu: Vcpu, timeout: int) -> None:
    """HYPERVISOR_set_timer_op: as set_singleshot, but 0 stops the timer, and a senseless time is 100 ms from now."""
    clock = vcpu.domain.hypervisor.clock
    stop_singleshot(vcpu)
    if not timeout:
        return
    if timeout >> 63 or timeout - clock.now() >= HUGE_TIMEOUT:
        timeout = clock.now() + 100 * MILLISECOND
    arm_singleshot(vcpu, timeout, lambda: send_timer_event(vcpu))


def set_periodic(vcpu: Vcpu, period: int) -> None:
    """VCPUOP_set_periodic_timer, in ns; 0 stops it. XenError(EINVAL) under 1 ms or beyond 146 years."""
    if period and not MILLISECOND <= period <= STIME_DELTA_MAX:
        raise XenError(Errno.EINVAL, f"timer period of {period} ns")
    suspend_periodic(vcpu)
    vcpu.periodic_ns = period
    resume_periodic(vcpu)


def resume_periodic(vcpu: Vcpu) -> None:
    """The vCPU's turn begins, or a period is over (vcpu_periodic_timer_work): an event where one is due."""
    if not vcpu.periodic_ns:
        return
    clock = vcpu.domain.hypervisor.clock
    now = clock.now()
    if now >= vcpu.periodic_last + vcpu.periodic_ns:
        vcpu.periodic_last = now
        send_timer_event(vcpu)
    vcpu.periodic_timer = clock.at(vcpu.periodic_last + vcpu.periodic_ns, lambda: resume_periodic(vcpu))


def suspend_periodic(vcpu: Vcpu) -> None:
    """The vCPU's turn ends. The timer stands still while it doesn't run: a guest that blocks on it never wakes."""
    if vcpu.periodic_timer is not None:
        vcpu.periodic_timer.cancel()
        vcpu.periodic_timer = None

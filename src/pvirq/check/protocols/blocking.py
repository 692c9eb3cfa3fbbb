"""SCHEDOP_block (xen/common/sched/core.c); who wakes a vCPU is in `twolevel`."""

from __future__ import annotations

from pvirq.check.protocols.twolevel import SharedInfo
from pvirq.check.steps import Thread, mb


def local_events_need_delivery(info: SharedInfo, cpu: int) -> Thread:
    vcpu = info.vcpus[cpu]
    pending = yield vcpu.upcall_pending.read().saying("looks whether events are due")
    return pending and not (yield vcpu.upcall_mask.read())


def vcpu_block_enable_events(info: SharedInfo, cpu: int, *, barrier: bool = True) -> Thread:
    """SCHEDOP_block: let events in, and sleep unless one is due."""
    yield info.vcpus[cpu].upcall_mask.write(0).saying("SCHEDOP_block: clears evtchn_upcall_mask")
    yield from vcpu_block(info, cpu, barrier=barrier)


def vcpu_block(info: SharedInfo, cpu: int, *, barrier: bool = True) -> Thread:
    """Sleep until `vcpu_unblock`, unless an event is due. set_bit() of pause_flags orders nothing by itself, but on
    x86: a plain store here, and mb() behind it with `barrier`."""
    vcpu = info.vcpus[cpu]
    yield vcpu.blocked.write(1).saying(f"sets _VPF_blocked of vCPU {cpu}")
    if barrier:
        yield mb()
    # After the flag is set: who makes an event pending later finds it.
    if (yield from local_events_need_delivery(info, cpu)):
        yield vcpu.blocked.write(0).saying(f"clears _VPF_blocked of vCPU {cpu}")
        return
    yield vcpu.blocked.wait(_not).saying("sleeps")


def _not(value: int) -> bool:
    return not value

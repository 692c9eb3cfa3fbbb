"""Sleep of vCPUs in Xen: SCHEDOP_block and SCHEDOP_poll (xen/common/sched/core.c); who wakes them is in `twolevel`."""

from __future__ import annotations

from collections.abc import Sequence

from pvirq.check.protocols.twolevel import SharedInfo
from pvirq.check.steps import Thread, mb
from pvirq.xen.sched import POLL_SEVERAL


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


def do_poll(info: SharedInfo, cpu: int, ports: Sequence[int]) -> Thread:
    """SCHEDOP_poll without a timeout: sleep until one of the ports is pending or an upcall is due.

    With the look at the own flags that other architectures than x86 have: each store is a step here.
    """
    vcpu = info.vcpus[cpu]
    yield vcpu.blocked.write(1).saying(f"SCHEDOP_poll: sets _VPF_blocked of vCPU {cpu}")
    yield vcpu.poll_evtchn.write(POLL_SEVERAL)
    yield vcpu.polling.set_bit(0).saying(f"sets the poll bit of vCPU {cpu}")
    # Who saw one of the flags alone has woken it by half: then there is nothing to wait for.
    awake = not (yield vcpu.poll_evtchn.read())
    awake = awake or not (yield vcpu.blocked.read())
    awake = awake or not (yield vcpu.polling.read())
    awake = awake or (yield from local_events_need_delivery(info, cpu))
    port = 0
    for port in () if awake else ports:
        word, bit = info.at(port)
        if (yield info.pending[word].read().saying(f"looks whether port {port} is pending")) >> bit & 1:
            awake = True
            break
    if awake:
        yield vcpu.poll_evtchn.write(0)
        yield vcpu.polling.clear_bit(0)
        yield vcpu.blocked.write(0).saying(f"clears _VPF_blocked of vCPU {cpu}")
        return
    if len(ports) == 1:
        yield vcpu.poll_evtchn.write(port)
    yield vcpu.blocked.wait(_not).saying("sleeps")


def _not(value: int) -> bool:
    return not value

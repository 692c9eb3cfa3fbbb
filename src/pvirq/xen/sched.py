"""Sleeping and waking of vCPUs: block, poll, yield, watchdogs (xen/common/sched/core.c).

There is no run queue here. A vCPU's state is in `Vcpu` (blocked, polling); the host runs whatever is
runnable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.sched import SHUTDOWN_watchdog
from pvirq.abi.xen import VCPU_INFO_UPCALL_MASK
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu

POLL_MAX_PORTS: Final = 128
POLL_SEVERAL: Final = -1  # Vcpu.poll_port: any event of the domain ends the poll
NR_DOMAIN_WATCHDOG_TIMERS: Final = 2


def mark_events_pending(vcpu: Vcpu) -> None:
    """Set evtchn_upcall_pending and kick the vCPU, unless it was set already (vcpu_mark_events_pending)."""
    mem, info = vcpu.domain.machine.mem, vcpu.info
    flag = mem[info]
    if not flag & 1:
        mem[info] = flag | 1
        vcpu.kick()


def check_pollers(domain: Domain, port: int) -> None:
    """Wake every vCPU that polls `port`, or several ports (evtchn_check_pollers).

    Who polls several ports is woken by any event at all: it has to look by itself.
    """
    for vcpu in domain.vcpus:
        if vcpu.polling and (vcpu.poll_port <= 0 or vcpu.poll_port == port):
            vcpu.end_poll()


def block(vcpu: Vcpu) -> None:
    """SCHEDOP_block: unmask upcalls and sleep, unless one is due already (vcpu_block_enable_events)."""
    mem, info = vcpu.domain.machine.mem, vcpu.info
    mem[info + VCPU_INFO_UPCALL_MASK] = 0
    vcpu.blocked = not mem[info]


def do_yield(vcpu: Vcpu) -> None:
    """SCHEDOP_yield: the next runnable vCPU has its turn (vcpu_yield)."""
    vcpu.yielded = True


def poll(vcpu: Vcpu, nr_ports: int, port_at: Callable[[int], int], timeout_ns: int) -> None:
    """SCHEDOP_poll: sleep until one of the ports is pending, an upcall is due, or time is up (do_poll).

    `port_at(i)` fetches the i-th port as it is wanted, so a bad guest pointer matters only where Xen would
    have read it. `timeout_ns` is absolute system time, 0 for none; one in the past wakes the vCPU at once.
    Raises EINVAL for more than 128 ports or an unusable one, and what `port_at` raises.
    """
    if nr_ports > POLL_MAX_PORTS:
        raise XenError(Errno.EINVAL, f"poll of {nr_ports} ports")
    if vcpu.event_pending():
        return
    is_pending = vcpu.domain.evtchn.poll
    port = 0
    for i in range(nr_ports):
        port = port_at(i)
        if is_pending(port):
            return
    if not vcpu.polling:
        vcpu.polling = True
        vcpu.domain.pollers += 1
    vcpu.poll_port = port if nr_ports == 1 else POLL_SEVERAL
    if timeout_ns:
        if vcpu.poll_timer is not None:
            vcpu.poll_timer.cancel()
        vcpu.poll_timer = vcpu.domain.hypervisor.clock.at(timeout_ns, vcpu.end_poll)


def do_poll(vcpu: Vcpu, ports: Sequence[int], timeout_ns: int = 0) -> None:
    """`poll` for ports that are at hand."""
    poll(vcpu, len(ports), ports.__getitem__, timeout_ns)


def pin_override(vcpu: Vcpu, pcpu: int) -> None:
    """SCHEDOP_pin_override: hold a vCPU on a physical CPU, or let go of it for -1 (vcpu_temporary_affinity).

    There is one physical CPU. Raises EINVAL for another, or with nothing to let go of; EBUSY while it holds
    already.
    """
    if pcpu < 0:
        if not vcpu.pinned:
            raise XenError(Errno.EINVAL, "the vCPU is not pinned")
        vcpu.pinned = False
    elif pcpu > 0:
        raise XenError(Errno.EINVAL, f"no physical CPU {pcpu}")
    elif vcpu.pinned:
        raise XenError(Errno.EBUSY, "the vCPU is pinned")
    else:
        vcpu.pinned = True


def watchdog(domain: Domain, watchdog_id: int, timeout_s: int) -> int:
    """SCHEDOP_watchdog: start (id 0), restart or stop (timeout 0) a watchdog of the domain (domain_watchdog).

    Returns the new id, or 0. Raises EINVAL for an id that is not in use, ENOSPC where both are.
    """
    if watchdog_id > NR_DOMAIN_WATCHDOG_TIMERS:
        raise XenError(Errno.EINVAL, f"watchdog {watchdog_id}")
    result = 0
    if watchdog_id == 0:
        if None not in domain.watchdogs:
            raise XenError(Errno.ENOSPC, "both watchdogs are in use")
        result = watchdog_id = domain.watchdogs.index(None) + 1
    else:
        old = domain.watchdogs[watchdog_id - 1]
        if old is None:
            raise XenError(Errno.EINVAL, f"watchdog {watchdog_id} is not in use")
        old.cancel()
        if timeout_s == 0:
            domain.watchdogs[watchdog_id - 1] = None
            return 0
    clock = domain.hypervisor.clock
    when = clock.now() + timeout_s * NS_PER_S
    domain.watchdogs[watchdog_id - 1] = clock.at(when, partial(_watchdog_fired, domain))
    return result


def _watchdog_fired(domain: Domain) -> None:
    if not domain.dying:
        domain.shutdown(SHUTDOWN_watchdog)

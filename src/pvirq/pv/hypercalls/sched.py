"""HYPERVISOR_sched_op and its older form (do_sched_op, do_sched_op_compat).

They only set state: the caller looks at `vcpu.runnable` afterwards.
"""

from __future__ import annotations

from pvirq.abi import sched as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.pv.addresses import addr_ok
from pvirq.pv.hypercalls.protocol import GuestCpu, int32
from pvirq.xen import sched


def sched_op(cpu: GuestCpu, cmd: int, arg: int) -> int:
    """Carry out SCHEDOP_`cmd` with the struct at guest address `arg`; XenError is the guest's -errno."""
    domain = cpu.domain
    match int32(cmd):
        case abi.SCHEDOP_yield:
            sched.do_yield(cpu.vcpu)
        case abi.SCHEDOP_block:
            sched.block(cpu.vcpu)
        case abi.SCHEDOP_shutdown:
            (reason,) = abi.SCHED_SHUTDOWN.unpack(cpu.read(arg, abi.SCHED_SHUTDOWN.size))
            domain.shutdown(reason & 0xFF)
        case abi.SCHEDOP_shutdown_code:
            (reason,) = abi.SCHED_SHUTDOWN.unpack(cpu.read(arg, abi.SCHED_SHUTDOWN.size))
            if domain.shutdown_code is None:
                domain.shutdown_code = reason & 0xFF
        case abi.SCHEDOP_poll:
            _poll(cpu, arg)
        case abi.SCHEDOP_remote_shutdown:
            domid, reason = abi.SCHED_REMOTE_SHUTDOWN.unpack(cpu.read(arg, abi.SCHED_REMOTE_SHUTDOWN.size))
            target = domain.hypervisor.domains.get(domid)  # DOMID_SELF is none
            if target is None:
                raise XenError(Errno.ESRCH, f"no domain {domid}")
            if not domain.privileged:
                raise XenError(Errno.EPERM, f"{domain} may not shut down {target}")
            target.shutdown(reason & 0xFF)
        case abi.SCHEDOP_watchdog:
            watchdog_id, timeout_s = abi.SCHED_WATCHDOG.unpack(cpu.read(arg, abi.SCHED_WATCHDOG.size))
            try:
                return sched.watchdog(domain, watchdog_id, timeout_s)
            except XenError as error:
                if error.errno != Errno.ENOSPC:
                    raise
                return -error.errno & 0xFFFFFFFF  # Xen mixes it with an unsigned id
        case abi.SCHEDOP_pin_override:
            if domain.domid:
                raise XenError(Errno.EPERM, "only the hardware domain may pin")
            (pcpu,) = abi.SCHED_PIN_OVERRIDE.unpack(cpu.read(arg, abi.SCHED_PIN_OVERRIDE.size))
            sched.pin_override(cpu.vcpu, pcpu)
        case _:
            raise XenError(Errno.ENOSYS, f"SCHEDOP {cmd}")
    return 0


def sched_op_compat(cpu: GuestCpu, cmd: int, arg: int) -> int:
    """The form of before 3.1.1: yield, block and shutdown alone, with the reason itself as argument."""
    match int32(cmd):
        case abi.SCHEDOP_yield | abi.SCHEDOP_block:
            return sched_op(cpu, cmd, 0)
        case abi.SCHEDOP_shutdown:
            cpu.domain.shutdown(arg & 0xFF)
            return 0
    raise XenError(Errno.ENOSYS, f"SCHEDOP {cmd}")


def _poll(cpu: GuestCpu, arg: int) -> None:
    ports, nr_ports, timeout = abi.SCHED_POLL.unpack(cpu.read(arg, abi.SCHED_POLL.size))
    if timeout >> 63:
        timeout -= 1 << 64  # s_time_t: long past

    def port_at(i: int) -> int:
        return int.from_bytes(cpu.read(ports + 4 * i, 4), "little")

    if nr_ports <= sched.POLL_MAX_PORTS and not addr_ok(ports):
        raise XenError(Errno.EFAULT, f"ports at {ports:#x}")
    sched.poll(cpu.vcpu, nr_ports, port_at, timeout)

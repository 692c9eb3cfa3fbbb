"""vcpu_op and set_timer_op (xen/common/domain.c, common_vcpu_op; xen/arch/x86/domain.c, do_vcpu_op)."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi import vcpu as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.sched import SHUTDOWN_poweroff
from pvirq.abi.xen import PAGE_SIZE, VCPU_INFO_SIZE
from pvirq.pv import context
from pvirq.pv.addresses import addr_ok
from pvirq.pv.hypercalls.protocol import int32
from pvirq.xen import vtimer
from pvirq.xen.memory import PGT_WRITABLE

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

M64: Final = (1 << 64) - 1
VCPU_INFO_ALIGN: Final = 8


def set_timer_op(cpu: PvVcpu, timeout: int) -> int:
    vtimer.set_timer_op(cpu.vcpu, timeout)
    return 0


def vcpu_op(cpu: PvVcpu, command: int, vcpu_id: int, argument: int) -> int:
    """Operations on one of the caller's own vCPUs."""
    command, vcpu_id = int32(command), vcpu_id & 0xFFFFFFFF
    domain = cpu.domain
    if vcpu_id >= len(domain.vcpus):
        return -Errno.ENOENT
    target = domain.vcpus[vcpu_id]
    operation = _OPERATIONS.get(command)
    if operation is None:
        return -Errno.ENOSYS
    return operation(cpu, cpu.guest.cpus[target.vcpu_id], argument)


def _set_singleshot(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    if target is not cpu:
        return -Errno.EINVAL
    (when,) = struct.unpack("<Q", cpu.read(argument, 16)[:8])
    vtimer.set_singleshot(cpu.vcpu, when)
    return 0


def _stop_singleshot(cpu: PvVcpu, target: PvVcpu, _argument: int) -> int:
    if target is not cpu:
        return -Errno.EINVAL
    vtimer.stop_singleshot(cpu.vcpu)
    return 0


def _set_periodic(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    (period,) = struct.unpack("<Q", cpu.read(argument, 8))
    vtimer.set_periodic(target.vcpu, period or 1)
    return 0


def _stop_periodic(_cpu: PvVcpu, target: PvVcpu, _argument: int) -> int:
    vtimer.set_periodic(target.vcpu, 0)
    return 0


def _is_up(_cpu: PvVcpu, target: PvVcpu, _argument: int) -> int:
    return int(target.vcpu.up)


def _up(_cpu: PvVcpu, target: PvVcpu, _argument: int) -> int:
    if not target.initialised:
        return -Errno.EINVAL
    if not target.vcpu.up:
        target.vcpu.up = True
        target.vcpu.kick()
    return 0


def _down(cpu: PvVcpu, target: PvVcpu, _argument: int) -> int:
    if not any(vcpu.up for vcpu in cpu.domain.vcpus if vcpu is not target.vcpu):
        cpu.domain.shutdown(SHUTDOWN_poweroff)
    target.vcpu.up = False
    cpu.engine.stop()
    return 0


def _initialise(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    data = cpu.read(argument, context.SIZE)
    if target.initialised:
        return -Errno.EEXIST
    context.initialise(target, data)
    return 0


def _get_runstate(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    cpu.write(argument, target.guest.runstate(target))
    return 0


def _register_runstate_area(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    (area,) = struct.unpack("<Q", cpu.read(argument, 8))
    if not addr_ok(area):
        return -Errno.EFAULT
    target.runstate_area = area
    _try_write(cpu, area, target.guest.runstate(target))
    return 0


def _register_time_area(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    (area,) = struct.unpack("<Q", cpu.read(argument, 8))
    if not addr_ok(area):
        return -Errno.EFAULT
    target.time_area = area
    _try_write(cpu, area, target.guest.time_info())
    return 0


def _try_write(cpu: PvVcpu, area: int, data: bytes) -> None:
    """Xen takes an area that isn't mapped yet, and writes to it whenever it can."""
    with contextlib.suppress(XenError):
        cpu.write(area, data)


def _register_vcpu_info(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    """Move struct vcpu_info into a page of the guest's; once only (map_vcpu_info)."""
    mfn, offset = struct.unpack("<QI", cpu.read(argument, 16)[:12])
    if offset > PAGE_SIZE - VCPU_INFO_SIZE or offset & (VCPU_INFO_ALIGN - 1):
        return -Errno.ENXIO
    if target.vcpu_info_registered or (target is not cpu and target.vcpu.up) or not cpu.tables.owns(mfn):
        return -Errno.EINVAL
    try:
        cpu.tables.get_type(mfn, PGT_WRITABLE)
    except XenError:
        return -Errno.EINVAL
    machine, vcpu = cpu.domain.machine, target.vcpu
    at = (mfn << 12) + offset
    machine.mem[at : at + VCPU_INFO_SIZE] = machine.mem[vcpu.info : vcpu.info + VCPU_INFO_SIZE]
    vcpu.info = at
    target.vcpu_info_registered = True
    target.note()
    # An event may have been noted in the old place since it was copied: let the guest look at all of them.
    machine.u64[at + 8 >> 3] = M64
    machine.mem[at] = 1
    vcpu.kick()
    return 0


def _send_nmi(cpu: PvVcpu, target: PvVcpu, argument: int) -> int:
    """It wakes a vCPU that sleeps, whether there is a handler or not (do_vcpu_op)."""
    if argument:
        return -Errno.EINVAL
    if not target.nmi_pending:
        target.nmi_pending = True
        target.vcpu.kick()
        if target is cpu:
            cpu.engine.stop()
    return 0


def _get_physid(_cpu: PvVcpu, _target: PvVcpu, _argument: int) -> int:
    return -Errno.EINVAL  # only for a hardware domain pinned to its CPUs


_OPERATIONS: Final = {
    abi.VCPUOP_initialise: _initialise,
    abi.VCPUOP_up: _up,
    abi.VCPUOP_down: _down,
    abi.VCPUOP_is_up: _is_up,
    abi.VCPUOP_get_runstate_info: _get_runstate,
    abi.VCPUOP_register_runstate_memory_area: _register_runstate_area,
    abi.VCPUOP_set_periodic_timer: _set_periodic,
    abi.VCPUOP_stop_periodic_timer: _stop_periodic,
    abi.VCPUOP_set_singleshot_timer: _set_singleshot,
    abi.VCPUOP_stop_singleshot_timer: _stop_singleshot,
    abi.VCPUOP_register_vcpu_info: _register_vcpu_info,
    abi.VCPUOP_send_nmi: _send_nmi,
    abi.VCPUOP_get_physid: _get_physid,
    abi.VCPUOP_register_vcpu_time_memory_area: _register_time_area,
}

"""The hypercall table: each family decodes its guest structures in a module of its own and calls `pvirq.xen`.

A handler takes the vCPU and as many raw 64-bit registers as the C prototype has arguments, returns what goes to
RAX, and raises XenError for -errno. It must be prepared for any value whatever in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pvirq.abi import xen
from pvirq.abi.sched import SCHEDOP_yield
from pvirq.pv.hypercalls import evtchn, grant, memory, misc, mmu, physdev, sched, state, vcpu
from pvirq.pv.hypercalls.protocol import GuestCrash

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

Hypercall = Callable[..., int]


def _sched_op(cpu: PvVcpu, command: int, argument: int) -> int:
    result = sched.sched_op(cpu, command, argument)
    if command & 0xFFFFFFFF == SCHEDOP_yield or not cpu.vcpu.runnable:
        cpu.engine.stop()
    return result


def _sched_op_compat(cpu: PvVcpu, command: int, argument: int) -> int:
    result = sched.sched_op_compat(cpu, command, argument)
    if not cpu.vcpu.runnable:
        cpu.engine.stop()
    return result


def _iret(_cpu: PvVcpu, *_arguments: int) -> int:
    """IRET is part of the way back to the guest, not of this table; it can only come here out of a multicall."""
    raise GuestCrash("HYPERVISOR_iret in a multicall")


_HANDLERS: dict[int, tuple[Hypercall, int]] = {
    xen.HYPERVISOR_set_trap_table: (state.set_trap_table, 1),
    xen.HYPERVISOR_mmu_update: (mmu.mmu_update, 4),
    xen.HYPERVISOR_set_gdt: (state.set_gdt, 2),
    xen.HYPERVISOR_stack_switch: (state.stack_switch, 2),
    xen.HYPERVISOR_set_callbacks: (state.set_callbacks, 3),
    xen.HYPERVISOR_fpu_taskswitch: (state.fpu_taskswitch, 1),
    xen.HYPERVISOR_sched_op_compat: (_sched_op_compat, 2),
    xen.HYPERVISOR_platform_op: (misc.platform_op, 1),
    xen.HYPERVISOR_set_debugreg: (state.set_debugreg, 2),
    xen.HYPERVISOR_get_debugreg: (state.get_debugreg, 1),
    xen.HYPERVISOR_update_descriptor: (state.update_descriptor, 2),
    xen.HYPERVISOR_memory_op: (memory.memory_op, 2),
    xen.HYPERVISOR_multicall: (misc.multicall, 2),
    xen.HYPERVISOR_update_va_mapping: (mmu.update_va_mapping, 3),
    xen.HYPERVISOR_set_timer_op: (vcpu.set_timer_op, 1),
    xen.HYPERVISOR_event_channel_op_compat: (evtchn.event_channel_op_compat, 1),
    xen.HYPERVISOR_xen_version: (misc.xen_version, 2),
    xen.HYPERVISOR_console_io: (misc.console_io, 3),
    xen.HYPERVISOR_physdev_op_compat: (physdev.physdev_op_compat, 1),
    xen.HYPERVISOR_grant_table_op: (grant.grant_table_op, 3),
    xen.HYPERVISOR_vm_assist: (misc.vm_assist, 2),
    xen.HYPERVISOR_update_va_mapping_otherdomain: (mmu.update_va_mapping_otherdomain, 4),
    xen.HYPERVISOR_iret: (_iret, 0),
    xen.HYPERVISOR_vcpu_op: (vcpu.vcpu_op, 3),
    xen.HYPERVISOR_set_segment_base: (state.set_segment_base, 2),
    xen.HYPERVISOR_mmuext_op: (mmu.mmuext_op, 4),
    xen.HYPERVISOR_nmi_op: (state.nmi_op, 2),
    xen.HYPERVISOR_sched_op: (_sched_op, 2),
    xen.HYPERVISOR_callback_op: (state.callback_op, 2),
    xen.HYPERVISOR_event_channel_op: (evtchn.event_channel_op, 2),
    xen.HYPERVISOR_physdev_op: (physdev.physdev_op, 2),
    xen.HYPERVISOR_sysctl: (misc.sysctl, 1),
    xen.HYPERVISOR_domctl: (misc.domctl, 1),
    xen.HYPERVISOR_kexec_op: (misc.privileged_only, 2),
    xen.HYPERVISOR_hypfs_op: (misc.privileged_only, 5),
}

# Indexed by number; every number below NR_hypercalls has an entry.
HYPERCALLS: list[tuple[Hypercall, int]] = [
    _HANDLERS.get(number, (misc.unsupported, 1)) for number in range(xen.NR_hypercalls)
]

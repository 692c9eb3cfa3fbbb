"""What a vCPU is told about its kernel: trap table, callbacks, stacks, segments, debug and FPU state.

xen/arch/x86/pv/{traps,callback,descriptor-tables,misc-hypercalls}.c.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.arch_x86 import (
    FIRST_RESERVED_GDT_ENTRY,
    FLAT_KERNEL_CS,
    SEGBASE_FS,
    SEGBASE_GS_KERNEL,
    SEGBASE_GS_USER,
    SEGBASE_GS_USER_SEL,
    TI_IF,
    TRAP_INFO,
    TRAP_INFO_SIZE,
    CALLBACKF_mask_events,
    CALLBACKOP_register,
    CALLBACKOP_unregister,
    CALLBACKTYPE_event,
    CALLBACKTYPE_failsafe,
    CALLBACKTYPE_nmi,
    CALLBACKTYPE_syscall,
    CALLBACKTYPE_syscall32,
    CALLBACKTYPE_sysenter,
)
from pvirq.abi.errno import Errno
from pvirq.pv import descriptors, emulate
from pvirq.pv.addresses import canonical
from pvirq.pv.hypercalls.protocol import int32
from pvirq.xen.memory import PGT_SEG_DESC, PGT_WRITABLE

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

TRAP_NMI: Final = 2
CR4_DE: Final = 1 << 3
LONGEST_TRAP_TABLE: Final = 1 << 16  # entries taken in one hypercall; a table without end would hang the host


def set_trap_table(cpu: PvVcpu, traps: int) -> int:
    """Take trap_info entries up to one with address 0; a null table forgets all (do_set_trap_table)."""
    try:
        return _take_traps(cpu, traps)
    finally:
        cpu.note()


def _take_traps(cpu: PvVcpu, traps: int) -> int:
    if not traps:
        cpu.traps[:] = [(0, 0, 0)] * 256
        return 0
    for i in range(LONGEST_TRAP_TABLE):
        vector, flags, cs, address = struct.unpack(TRAP_INFO, cpu.read(traps + i * TRAP_INFO_SIZE, TRAP_INFO_SIZE))
        if not address:
            break
        if not canonical(address):
            return -Errno.EINVAL
        cpu.traps[vector] = (address, cs | 3, flags)
    return 0


def set_gdt(cpu: PvVcpu, frames: int, entries: int) -> int:
    """The frames of the GDT (do_set_gdt)."""
    entries &= 0xFFFFFFFF
    if entries > FIRST_RESERVED_GDT_ENTRY:
        return -Errno.EINVAL
    count = -(-entries // 512)
    mfns = list(struct.unpack(f"<{count}Q", cpu.read(frames, count * 8))) if count else []
    descriptors.set_gdt(cpu, mfns, entries)
    cpu.flush_tlb()
    return 0


def update_descriptor(cpu: PvVcpu, address: int, descriptor: int) -> int:
    """Change one descriptor at a machine address, in a table in use or any writable page (do_update_descriptor)."""
    if address & 7:
        return -Errno.EINVAL
    descriptor = descriptors.check(descriptor)
    mfn, tables, machine = address >> 12, cpu.tables, cpu.domain.machine
    kind = PGT_WRITABLE
    if tables.owns(mfn) and machine.type[mfn] == PGT_SEG_DESC and machine.type_count[mfn]:
        kind = PGT_SEG_DESC
    tables.get_type(mfn, kind)
    machine.u64[address >> 3] = descriptor
    tables.put_type(mfn)
    return 0


def stack_switch(cpu: PvVcpu, ss: int, sp: int) -> int:
    """The kernel stack that entries from user mode use (do_stack_switch)."""
    cpu.kernel_ss, cpu.kernel_sp = ss | 3, sp
    return 0


def set_segment_base(cpu: PvVcpu, which: int, base: int) -> int:
    """FS and GS bases, or the user's GS by selector (do_set_segment_base)."""
    which &= 0xFFFFFFFF
    if which in (SEGBASE_FS, SEGBASE_GS_USER, SEGBASE_GS_KERNEL) and not canonical(base):
        return -Errno.EINVAL
    if which == SEGBASE_FS:
        cpu.engine.fs_base = base
    elif which == SEGBASE_GS_USER:
        cpu.inactive_gs_base = base
    elif which == SEGBASE_GS_KERNEL:
        cpu.engine.gs_base = base
    elif which == SEGBASE_GS_USER_SEL:
        cpu.inactive_gs_base = descriptors.load_gs(cpu, base & 0xFFFF)
    else:
        return -Errno.EINVAL
    return 0


def fpu_taskswitch(cpu: PvVcpu, task_switched: int) -> int:
    """Set or clear CR0.TS (do_fpu_taskswitch)."""
    emulate.set_task_switched(cpu, bool(task_switched & 0xFFFFFFFF))
    return 0


def set_debugreg(cpu: PvVcpu, which: int, value: int) -> int:
    """DR0-3, 6, 7, and 4, 5 as their aliases without CR4.DE (set_debugreg)."""
    register = int32(which)
    if not 0 <= register <= 7:
        return -Errno.ENODEV
    if register in (4, 5) and cpu.cr4 & CR4_DE:
        return -Errno.ENODEV
    if register >= 4 and value >> 32:
        return -Errno.EINVAL
    return 0 if emulate.write_debug_register(cpu, register, value) else -Errno.EPERM


def get_debugreg(cpu: PvVcpu, which: int) -> int:
    """The value, or -errno in the same register (do_get_debugreg)."""
    register = int32(which)
    if not 0 <= register <= 7:
        return -Errno.ENODEV
    if register in (4, 5) and cpu.cr4 & CR4_DE:
        return -Errno.ENODEV
    return emulate.read_debug_register(cpu, register)


def set_callbacks(cpu: PvVcpu, event: int, failsafe: int, syscall: int) -> int:
    """The three callbacks at once, with no flags; what isn't canonical is left as it was (do_set_callbacks)."""
    for kind, address in (
        (CALLBACKTYPE_event, event),
        (CALLBACKTYPE_failsafe, failsafe),
        (CALLBACKTYPE_syscall, syscall),
    ):
        _register(cpu, kind, 0, address)
    return 0


def callback_op(cpu: PvVcpu, command: int, argument: int) -> int:
    """CALLBACKOP_register and _unregister (do_callback_op)."""
    command = int32(command)
    if command == CALLBACKOP_register:
        kind, flags, address = struct.unpack("<HHxxxxQ", cpu.read(argument, 16))
        return _register(cpu, kind, flags, address)
    if command == CALLBACKOP_unregister:
        (kind,) = struct.unpack("<H", cpu.read(argument, 4)[:2])
        if kind == CALLBACKTYPE_nmi:
            cpu.traps[TRAP_NMI] = (0, 0, 0)
            return 0
        known = (
            CALLBACKTYPE_event,
            CALLBACKTYPE_failsafe,
            CALLBACKTYPE_syscall,
            CALLBACKTYPE_syscall32,
            CALLBACKTYPE_sysenter,
        )
        return -Errno.EINVAL if kind in known else -Errno.ENOSYS
    return -Errno.ENOSYS


def _register(cpu: PvVcpu, kind: int, flags: int, address: int) -> int:
    if not canonical(address):
        return -Errno.EINVAL
    masks = bool(flags & CALLBACKF_mask_events)
    if kind == CALLBACKTYPE_event:
        cpu.event_callback = address
    elif kind == CALLBACKTYPE_failsafe:
        cpu.failsafe_callback, cpu.failsafe_masks_events = address, masks
    elif kind == CALLBACKTYPE_syscall:
        cpu.syscall_callback, cpu.syscall_masks_events = address, masks
    elif kind == CALLBACKTYPE_syscall32:
        cpu.syscall32_callback = (address, masks)
    elif kind == CALLBACKTYPE_sysenter:
        cpu.sysenter_callback = (address, masks)
    elif kind == CALLBACKTYPE_nmi:
        cpu.traps[TRAP_NMI] = (address, FLAT_KERNEL_CS, TI_IF)
    else:
        return -Errno.ENOSYS
    return 0


def nmi_op(cpu: PvVcpu, command: int, argument: int) -> int:
    """XENNMI_register_callback (0) and _unregister_callback (1) (do_nmi_op)."""
    command &= 0xFFFFFFFF
    if command == 0:
        (address,) = struct.unpack("<Q", cpu.read(argument, 16)[:8])
        return _register(cpu, CALLBACKTYPE_nmi, 0, address)
    if command == 1:
        cpu.traps[TRAP_NMI] = (0, 0, 0)
        return 0
    return -Errno.ENOSYS

"""struct vcpu_guest_context: the state in which VCPUOP_initialise starts a vCPU (xen/include/public/arch-x86/xen.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.arch_x86 import TRAP_INFO, TRAP_INFO_SIZE, VGCF_in_kernel, VGCF_syscall_disables_events
from pvirq.abi.errno import Errno, XenError
from pvirq.engine.protocol import FLAG_IF, RIP, RSP
from pvirq.pv import descriptors
from pvirq.xen.memory import PGT_L4

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

SIZE: Final = 5168
FLAGS: Final = 512
USER_REGS: Final = 520
TRAP_CTXT: Final = 720
LDT: Final = 4816
GDT_FRAMES: Final = 4832
GDT_ENTS: Final = 4960
KERNEL_STACK: Final = 4968
CTRLREG: Final = 4984
CALLBACKS: Final = 5112
BASES: Final = 5144

# struct cpu_user_regs begins r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi: as Engine.regs numbers.
USER_REGS_ORDER: Final = (15, 14, 13, 12, 5, 3, 11, 10, 9, 8, 0, 1, 2, 6, 7)


def initialise(target: PvVcpu, context: bytes) -> None:
    """Give a vCPU that has none its first state (arch_set_info_guest). XenError(EINVAL) for one that isn't allowed."""
    guest = target.guest
    ldt_base, ldt_entries = struct.unpack_from("<QQ", context, LDT)
    (entries,) = struct.unpack_from("<Q", context, GDT_ENTS)
    ctrlreg = struct.unpack_from("<8Q", context, CTRLREG)
    bases = struct.unpack_from("<3Q", context, BASES)
    callbacks = struct.unpack_from("<3Q", context, CALLBACKS)
    addresses = (*bases, *callbacks)
    if any(1 << 47 <= va < (1 << 64) - (1 << 47) for va in addresses):
        raise XenError(Errno.EINVAL, "an address that isn't canonical")
    if entries > 14 * 512 or ldt_entries > 8192:
        raise XenError(Errno.EINVAL, "descriptor tables too long")
    frames = list(struct.unpack_from(f"<{-(-entries // 512)}Q", context, GDT_FRAMES))
    descriptors.set_gdt(target, frames, entries)
    root = ctrlreg[3] >> 12
    guest.tables.get_type(root, PGT_L4)
    target.kernel_root = root
    if ctrlreg[1]:
        guest.tables.get_type(ctrlreg[1] >> 12, PGT_L4)
        target.user_root = ctrlreg[1] >> 12
    (flags,) = struct.unpack_from("<Q", context, FLAGS)
    target.user_mode = not flags & VGCF_in_kernel
    target.syscall_masks_events = bool(flags & VGCF_syscall_disables_events)
    for vector in range(256):
        _, trap_flags, cs, address = struct.unpack_from(TRAP_INFO, context, TRAP_CTXT + vector * TRAP_INFO_SIZE)
        target.traps[vector] = (address, cs | 3, trap_flags)
    target.kernel_ss, target.kernel_sp = struct.unpack_from("<QQ", context, KERNEL_STACK)
    target.event_callback, target.failsafe_callback, target.syscall_callback = callbacks
    target.initialised = True
    with guest.loaded(target):
        _load_registers(target, context, bases)
        descriptors.set_ldt(target, ldt_base, ldt_entries)


def _load_registers(target: PvVcpu, context: bytes, bases: tuple[int, int, int]) -> None:
    engine, regs = target.engine, target.regs
    for number, value in zip(USER_REGS_ORDER, struct.unpack_from("<15Q", context, USER_REGS), strict=True):
        regs[number] = value
    (regs[RIP],) = struct.unpack_from("<Q", context, USER_REGS + 128)
    rflags, regs[RSP] = struct.unpack_from("<QQ", context, USER_REGS + 144)
    target.domain.machine.mem[target.vcpu.info + 1] = 0 if rflags & FLAG_IF else 1
    engine.set_gdt(descriptors.DescriptorWindow.gdt_base(target.vcpu.vcpu_id), descriptors.GDT_LIMIT)
    engine.set_code_stack(0xE033, descriptors.CODE64, 0xE02B, descriptors.DATA)
    engine.fs_base, kernel_gs, user_gs = bases[0], bases[1], bases[2]
    engine.gs_base = user_gs if target.user_mode else kernel_gs
    target.inactive_gs_base = kernel_gs if target.user_mode else user_gs
    target.load_root()
    engine.rflags = rflags & 0xFFFF | FLAG_IF

"""struct vcpu_guest_context: the state in which VCPUOP_initialise starts a vCPU (xen/include/public/arch-x86/xen.h)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.arch_x86 import (
    FIRST_RESERVED_GDT_ENTRY,
    TRAP_INFO,
    TRAP_INFO_SIZE,
    VGCF_failsafe_disables_events,
    VGCF_in_kernel,
    VGCF_online,
    VGCF_syscall_disables_events,
)
from pvirq.abi.errno import Errno, XenError
from pvirq.engine.protocol import FLAG_IF, FLAG_IOPL, RIP, RSP
from pvirq.pv import descriptors
from pvirq.pv.addresses import addr_ok, canonical
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
    (flags,) = struct.unpack_from("<Q", context, FLAGS)
    ldt_base, ldt_entries = struct.unpack_from("<QQ", context, LDT)
    (entries,) = struct.unpack_from("<Q", context, GDT_ENTS)
    kernel_ss, kernel_sp = struct.unpack_from("<QQ", context, KERNEL_STACK)
    ctrlreg = struct.unpack_from("<8Q", context, CTRLREG)
    bases = struct.unpack_from("<3Q", context, BASES)
    callbacks = struct.unpack_from("<3Q", context, CALLBACKS)
    (rip,) = struct.unpack_from("<Q", context, USER_REGS + 128)
    (rsp,) = struct.unpack_from("<Q", context, USER_REGS + 152)
    traps = [struct.unpack_from(TRAP_INFO, context, TRAP_CTXT + vector * TRAP_INFO_SIZE) for vector in range(256)]
    addresses = [rip, rsp, kernel_sp, *bases, *callbacks, *(address for _, _, _, address in traps)]
    if ldt_entries:
        addresses.append(ldt_base)
    if not all(canonical(va) for va in addresses):
        raise XenError(Errno.EINVAL, "an address that isn't canonical")
    if not addr_ok(ldt_base) or ldt_base & 0xFFF or ldt_entries > 8192:
        raise XenError(Errno.EINVAL, f"LDT of {ldt_entries} entries at {ldt_base:#x}")
    if entries > FIRST_RESERVED_GDT_ENTRY:
        raise XenError(Errno.EINVAL, f"GDT of {entries} entries")
    if not flags & VGCF_in_kernel and not ctrlreg[1]:
        raise XenError(Errno.EINVAL, "user mode without user page tables")
    descriptors.set_gdt(target, list(struct.unpack_from(f"<{-(-entries // 512)}Q", context, GDT_FRAMES)), entries)
    kernel_root, user_root = ctrlreg[3] >> 12, ctrlreg[1] >> 12
    try:
        guest.tables.get_type(kernel_root, PGT_L4)
        if ctrlreg[1]:
            try:
                guest.tables.get_type(user_root, PGT_L4)
            except XenError:
                guest.tables.put_type(kernel_root)
                raise
    except XenError:
        descriptors.set_gdt(target, [], 0)
        raise
    guest.fill_ro_mpt(kernel_root)
    target.kernel_root, target.user_root = kernel_root, user_root
    target.user_mode = not flags & VGCF_in_kernel
    target.syscall_masks_events = bool(flags & VGCF_syscall_disables_events)
    target.failsafe_masks_events = bool(flags & VGCF_failsafe_disables_events)
    target.traps[:] = [(address, cs | 3, trap_flags) for _, trap_flags, cs, address in traps]
    target.kernel_ss, target.kernel_sp = kernel_ss | 3, kernel_sp
    target.event_callback, target.failsafe_callback, target.syscall_callback = callbacks
    target.initialised = True
    target.vcpu.up = bool(flags & VGCF_online)
    with guest.loaded(target):
        descriptors.set_ldt(target, ldt_base if ldt_entries else 0, ldt_entries)
        _load_registers(target, context, bases)


def _load_registers(target: PvVcpu, context: bytes, bases: tuple[int, int, int]) -> None:
    engine, regs = target.engine, target.regs
    for number, value in zip(USER_REGS_ORDER, struct.unpack_from("<15Q", context, USER_REGS), strict=True):
        regs[number] = value
    regs[RIP], cs = struct.unpack_from("<QH", context, USER_REGS + 128)
    rflags, regs[RSP], ss = struct.unpack_from("<QQH", context, USER_REGS + 144)
    es, ds, fs, gs = struct.unpack_from("<HxxxxxxHxxxxxxHxxxxxxH", context, USER_REGS + 168)
    target.iopl = rflags & FLAG_IOPL
    engine.set_gdt(descriptors.DescriptorWindow.gdt_base(target.vcpu.vcpu_id), descriptors.GDT_LIMIT)
    target.load_root()
    descriptors.load_code_stack(target, cs | 3, ss | 3)
    for which, selector in ((0, es), (3, ds), (4, fs), (5, gs)):
        engine.set_segment(which, selector, 0)  # loaded for good when the vCPU first runs
    engine.fs_base, kernel_gs, user_gs = bases
    engine.gs_base = user_gs if target.user_mode else kernel_gs
    target.inactive_gs_base = kernel_gs if target.user_mode else user_gs
    engine.rflags = rflags & 0xFFFF & ~FLAG_IOPL | FLAG_IF

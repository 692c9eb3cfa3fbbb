"""struct vcpu_guest_context (xen/include/public/arch-x86/xen.h): the state of a vCPU, as VCPUOP_initialise sets it.

One is also saved and restored by it, and by struct xen_domctl_ext_vcpucontext for what has no place in it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.arch_x86 import (
    FIRST_RESERVED_GDT_ENTRY,
    FLAT_KERNEL_CS,
    TRAP_INFO,
    TRAP_INFO_SIZE,
    VGCF_failsafe_disables_events,
    VGCF_i387_valid,
    VGCF_in_kernel,
    VGCF_online,
    VGCF_syscall_disables_events,
)
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.migration import EXT_VCPUCONTEXT, EXT_VCPUCONTEXT_SIZE
from pvirq.engine.protocol import FLAG_IF, FLAG_IOPL, RIP, RSP
from pvirq.pv import descriptors
from pvirq.pv.addresses import addr_ok, canonical
from pvirq.pv.emulate import CR0_GUEST, CR4_GUEST_WRITABLE
from pvirq.xen.memory import PGT_L4

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

SIZE: Final = 5168
FLAGS: Final = 512
USER_REGS: Final = 520
USER_REGS_RDX: Final = USER_REGS + 12 * 8
TRAP_CTXT: Final = 720
LDT: Final = 4816
GDT_FRAMES: Final = 4832
GDT_ENTS: Final = 4960
KERNEL_STACK: Final = 4968
CTRLREG: Final = 4984
CR1: Final = CTRLREG + 8  # the root of user mode, with bit 0 set
CR3: Final = CTRLREG + 24
DEBUGREG: Final = 5048
CALLBACKS: Final = 5112
VM_ASSIST: Final = 5136
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
    target.user_mode = int(not flags & VGCF_in_kernel)
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


def capture(cpu: PvVcpu) -> bytes:
    """The state of a vCPU that doesn't run (arch_get_info_guest). Frames are machine frames."""
    guest = cpu.guest
    context = bytearray(SIZE)
    flags = VGCF_i387_valid | VGCF_online
    flags |= 0 if cpu.user_mode else VGCF_in_kernel
    flags |= VGCF_failsafe_disables_events if cpu.failsafe_masks_events else 0
    flags |= VGCF_syscall_disables_events if cpu.syscall_masks_events else 0
    struct.pack_into("<Q", context, FLAGS, flags)
    for vector, (address, cs, trap_flags) in enumerate(cpu.traps):
        if address:
            at = TRAP_CTXT + vector * TRAP_INFO_SIZE
            struct.pack_into(TRAP_INFO, context, at, vector, trap_flags, cs, address)
    struct.pack_into("<QQ", context, LDT, *(cpu.ldt if cpu.ldt[1] else (0, 0)))
    struct.pack_into(f"<{len(cpu.gdt_frames)}Q", context, GDT_FRAMES, *cpu.gdt_frames)
    struct.pack_into("<Q", context, GDT_ENTS, cpu.gdt_entries)
    struct.pack_into("<QQ", context, KERNEL_STACK, cpu.kernel_ss, cpu.kernel_sp)
    user_root = cpu.user_root << 12 | 1 if cpu.user_root else 0
    struct.pack_into("<5Q", context, CTRLREG, CR0_GUEST | cpu.cr0_ts << 3, user_root, 0, cpu.kernel_root << 12, cpu.cr4)
    struct.pack_into("<8Q", context, DEBUGREG, *cpu.debug_registers)
    struct.pack_into("<3Q", context, CALLBACKS, cpu.event_callback, cpu.failsafe_callback, cpu.syscall_callback)
    struct.pack_into("<Q", context, VM_ASSIST, guest.assists)
    with guest.loaded(cpu):
        _store_registers(cpu, context)
    return bytes(context)


def _store_registers(cpu: PvVcpu, context: bytearray) -> None:
    engine, regs = cpu.engine, cpu.regs
    context[:FLAGS] = engine.fpu_state()
    struct.pack_into("<15Q", context, USER_REGS, *(regs[number] for number in USER_REGS_ORDER))
    es, cs, ss, ds, fs, gs = (engine.segment(which) for which in range(6))
    struct.pack_into("<QH", context, USER_REGS + 128, regs[RIP], cs)
    struct.pack_into("<QQH", context, USER_REGS + 144, engine.rflags & ~FLAG_IOPL | cpu.iopl, regs[RSP], ss)
    struct.pack_into("<HxxxxxxHxxxxxxHxxxxxxH", context, USER_REGS + 168, es, ds, fs, gs)
    kernel_gs, user_gs = cpu.inactive_gs_base, engine.gs_base
    if not cpu.user_mode:
        kernel_gs, user_gs = user_gs, kernel_gs
    struct.pack_into("<3Q", context, BASES, engine.fs_base, kernel_gs, user_gs)


def reinstate(cpu: PvVcpu, context: bytes) -> None:
    """Give a vCPU of a new domain the state that `capture` saw, with machine frames of the new domain's.

    XenError(EINVAL) for what isn't allowed (arch_set_info_guest, for a domain's builder).
    """
    if cpu.vcpu.vcpu_id == 0:
        (cpu.guest.assists,) = struct.unpack_from("<Q", context, VM_ASSIST)
    initialise(cpu, context)
    (flags,) = struct.unpack_from("<Q", context, FLAGS)
    cr0, _, _, _, cr4 = struct.unpack_from("<5Q", context, CTRLREG)
    cpu.cr0_ts, cpu.cr4 = bool(cr0 >> 3 & 1), cr4 & CR4_GUEST_WRITABLE
    with cpu.guest.loaded(cpu):
        cpu.engine.cr0_ts = cpu.cr0_ts
        if flags & VGCF_i387_valid:
            cpu.engine.set_fpu_state(context[:FLAGS])


def capture_extended(cpu: PvVcpu) -> bytes:
    """XEN_DOMCTL_get_ext_vcpucontext."""
    (compat, compat_masks), (sysenter, sysenter_masks) = cpu.syscall32_callback, cpu.sysenter_callback
    extended = EXT_VCPUCONTEXT.pack(
        cpu.vcpu.vcpu_id, EXT_VCPUCONTEXT_SIZE, compat, sysenter, FLAT_KERNEL_CS, FLAT_KERNEL_CS, compat_masks,
        sysenter_masks,
    )  # fmt: skip
    return extended.ljust(EXT_VCPUCONTEXT_SIZE, b"\0")


def reinstate_extended(cpu: PvVcpu, extended: bytes) -> None:
    """XEN_DOMCTL_set_ext_vcpucontext. XenError(EINVAL)."""
    if len(extended) < EXT_VCPUCONTEXT.size:
        raise XenError(Errno.EINVAL, f"{len(extended)} bytes of extended vCPU context")
    _, _, compat, sysenter, _, _, compat_masks, sysenter_masks = EXT_VCPUCONTEXT.unpack_from(extended)
    if not canonical(compat) or not canonical(sysenter):
        raise XenError(Errno.EINVAL, "a callback's address isn't canonical")
    cpu.syscall32_callback = (compat, bool(compat_masks))
    cpu.sysenter_callback = (sysenter, bool(sysenter_masks))

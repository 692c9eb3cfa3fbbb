"""A virtual CPU of a real PV guest: its registers beyond the engine's, entry to and return from the guest kernel.

Xen runs a 64-bit PV kernel at the same hardware privilege as its applications, with two root page tables, and
plays the part of the CPU at every crossing between them: it pushes the frames, keeps two GS bases and a virtual
interrupt flag (vcpu_info.evtchn_upcall_mask). This module is that part of xen/arch/x86/x86_64/entry.S
(create_bounce_frame, switch_to_kernel, test_all_events), pv/iret.c, pv/traps.c and traps.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvirq.abi.arch_x86 import (
    FLAT_KERNEL_CS,
    FLAT_KERNEL_SS,
    FLAT_RING3_CS32,
    FLAT_RING3_CS64,
    FLAT_RING3_SS64,
    HYPERVISOR_VIRT_END,
    HYPERVISOR_VIRT_START,
    TI_DPL,
    TI_IF,
    VGCF_in_syscall,
)
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.vcpu import RUNSTATE_offline
from pvirq.abi.xen import HYPERVISOR_iret
from pvirq.engine.protocol import (
    FAULT_ENTRY,
    FAULT_MASKS,
    FLAG_AC,
    FLAG_IF,
    FLAG_IOPL,
    FLAG_NT,
    FLAG_RF,
    FLAG_TF,
    FLAG_VM,
    GDT,
    INFO,
    NOTED,
    R8,
    R9,
    R10,
    R11,
    RAX,
    RCX,
    RDI,
    RDX,
    RIP,
    RSI,
    RSP,
    RUNSTATE_TIMES,
    SHORT,
    SHORT_HYPERCALLS,
    TRAP_BP,
    TRAP_DB,
    TRAP_GP,
    TRAP_NM,
    TRAP_PF,
    TRAP_SS,
    TRAP_UD,
    CpuidLeaf,
    Slot,
)
from pvirq.pv import descriptors, emulate, writable_pagetable
from pvirq.pv.addresses import canonical
from pvirq.pv.cpuid import guest_cpuid
from pvirq.pv.guest_memory import GuestMemory
from pvirq.pv.hypercalls import HYPERCALLS, Hypercall
from pvirq.pv.hypercalls.protocol import GuestCrash, Preempted
from pvirq.pv.pagetable import NX, PageTables
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.vtimer import DEFAULT_PERIOD

if TYPE_CHECKING:
    from pvirq.pv.guest import PvGuest

M64: Final = (1 << 64) - 1

TRAPS_WITH_ERROR_CODE: Final = frozenset({8, 10, 11, 12, 13, 14, 17, 21})
TRAP_NMI: Final = 2
TRAP_OF: Final = 4
LEGACY_SYSCALL_VECTOR: Final = 0x80
FLAGS_CLEARED_ON_TRAP: Final = FLAG_AC | FLAG_VM | FLAG_RF | FLAG_NT | FLAG_TF

# Page-fault error code.
PFEC_PRESENT, PFEC_WRITE, PFEC_USER, PFEC_RESERVED, PFEC_FETCH = 1, 2, 4, 8, 16

SYSCALL_LENGTH: Final = 2
ARGUMENT_REGISTERS: Final = (RDI, RSI, RDX, R10, R8, R9)
DR6_SINGLE_STEP: Final = 1 << 14
DIRECTMAP_VIRT_START: Final = 0xFFFF_8300_0000_0000

_pack_frame: Final = struct.Struct("<7Q").pack
_pack_frame_with_error: Final = struct.Struct("<8Q").pack
_unpack_iret: Final = struct.Struct("<9Q").unpack
NO_TRAP: Final = (0, 0, 0)


def no_upcall() -> None:
    """Where nobody wants to be told of one."""


class PvVcpu(GuestMemory):
    """One vCPU. While it is loaded (`PvGuest.current`), the engine holds its registers.

    Implements `pvirq.engine.protocol.GuestHandler` and `pvirq.pv.hypercalls.protocol.GuestCpu`. The engine may do
    without it what `syscall` and `exception` do most (engine/crossing.c): each of them is the reference for that.
    `deliver_events` is `do_deliver_events`, unless something has been put in front of it (`pvirq.xen.probes.put`).
    """

    def __init__(self, guest: PvGuest, vcpu: Vcpu) -> None:
        self.slot: Slot = guest.engine.slot()
        super().__init__(vcpu.domain.machine, self.slot.items)
        self.deliver_events: Callable[[int], int] = self.do_deliver_events
        self.guest = guest
        self.vcpu = vcpu
        self.domain: Domain = vcpu.domain
        self.engine = guest.engine
        self.tables: PageTables = guest.tables
        self.regs = guest.engine.regs

        self.traps: list[tuple[int, int, int]] = [NO_TRAP] * 256  # address, cs, flags
        self.event_callback = 0
        self.failsafe_callback = 0
        self.failsafe_masks_events = False
        self.syscall32_callback = (0, False)
        self.sysenter_callback = (0, False)
        self.cr0_ts = False
        self.cr4 = 0
        self.io_bitmap = (0, 0)  # guest address, number of ports
        self.debug_registers = [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400]
        self._step_to_skip: int | None = None
        self.pci_cf8 = 0
        self.cmos_index = 0
        self.gdt_frames: list[int] = []
        self.gdt_entries = 0
        self.ldt = (0, 0)  # guest address, entries
        self.ldt_pages: dict[int, int] = {}  # page of the window -> mfn mapped there
        self.time_area = 0
        self.initialised = False
        self.vcpu_info_registered = False
        self.runstate = RUNSTATE_offline
        self.kept[GDT] = guest.window.entries(vcpu.vcpu_id)
        self.hypercalls = guest.hypercalls
        self.upcall_unnoted: Callable[[], object] = no_upcall  # tells of one where the engine notes all others
        self.in_multicall = False
        vcpu.periodic_ns = DEFAULT_PERIOD

    def note(self) -> None:
        """Before a turn, and when one of them has changed: what the engine's short cuts are to know."""
        kept = self.kept
        kept[INFO] = self.vcpu.info
        kept[FAULT_ENTRY], _, flags = self.traps[TRAP_PF]
        kept[FAULT_MASKS] = flags & TI_IF

    @property
    def runstate_times(self) -> list[int]:
        """How many ns it spent in each RUNSTATE_*, up to `runstate_since`."""
        return self.kept[RUNSTATE_TIMES : RUNSTATE_TIMES + 4].tolist()

    @property
    def hypercalls(self) -> list[tuple[Hypercall, int]]:
        """What is called for each, by number, and with how many arguments. No short cut leads past another table."""
        return self._inner_hypercalls

    @hypercalls.setter
    def hypercalls(self, table: list[tuple[Hypercall, int]]) -> None:
        self._hypercalls = self._inner_hypercalls = table
        self.kept[SHORT_HYPERCALLS] = SHORT if table is HYPERCALLS else 0

    def note_hypercalls(self, inner: list[tuple[Hypercall, int]]) -> None:
        """The engine is to note them from now on; those in a multicall it doesn't see: for them there is `inner`."""
        self._inner_hypercalls = inner
        self.kept[SHORT_HYPERCALLS] |= NOTED

    # -- address spaces and modes ------------------------------------------------------------------------------------

    def update_runstate_area(self, info: bytes) -> None:
        """Write the runstate where the guest keeps it; not at all where it isn't mapped (update_runstate_area)."""
        root, self.walk_root = self.walk_root, self.kernel_root << 9
        try:
            self.write(self.runstate_area, info)
        except XenError:
            pass
        finally:
            self.walk_root = root

    def load_root(self) -> None:
        """Point the CPU at the root of the mode that it is in."""
        root = self.user_root if self.user_mode else self.kernel_root
        self.walk_root = root << 9
        self.engine.cr3 = root << 12
        self.tables.stale.clear()

    def flush_tlb(self) -> None:
        self.engine.flush_tlb()
        self.tables.stale.clear()

    def toggle_mode(self) -> None:
        """Between guest kernel and guest user: root table and GS base change (toggle_guest_mode)."""
        engine = self.engine
        self.user_mode = 1 - self.user_mode
        self.inactive_gs_base = engine.swap_gs_base(self.inactive_gs_base)
        root = self.user_root if self.user_mode else self.kernel_root
        self.walk_root = root << 9
        engine.switch_space(root << 12, bool(self.user_mode))

    # -- entering the guest kernel -------------------------------------------------------------------------------------

    def bounce(self, target: int, masks_events: bool, rip: int, rflags: int, error: int | None) -> int:
        """Push a frame and go to `target` in the guest kernel (create_bounce_frame).

        The frame, from its lowest address: RCX, R11, [error code,] RIP, CS with the saved upcall mask in bits
        32-39, RFLAGS with IF from that mask, RSP, SS. GuestCrash where the kernel's stack can't take it.
        """
        engine = self.engine
        return self._bounce_from(engine.segment(1), engine.segment(2), target, masks_events, rip, rflags, error)

    def _bounce_from(
        self, cs: int, ss: int, target: int, masks_events: bool, rip: int, rflags: int, error: int | None
    ) -> int:
        engine, regs, mem = self.engine, self.regs, self._mem
        old_sp = regs[RSP]
        if self.user_mode:
            self.toggle_mode()
            sp = self.kernel_sp
        else:
            sp = old_sp
            cs &= 0xFFFC
        sp &= ~0xF
        if HYPERVISOR_VIRT_START < sp < HYPERVISOR_VIRT_END + 64:
            raise GuestCrash(f"bad kernel stack {sp:#x}")
        mask_at = self.vcpu.info + 1
        mask = mem[mask_at]
        if masks_events:
            mem[mask_at] = mask | 1
        pushed_flags = rflags & ~(FLAG_IF | FLAG_IOPL) | (0 if mask else FLAG_IF)
        if self.architectural_iopl:
            pushed_flags |= self.iopl
        cs |= mask << 32
        if error is None:
            frame = _pack_frame(regs[RCX], regs[R11], rip, cs, pushed_flags, old_sp, ss)
        else:
            frame = _pack_frame_with_error(regs[RCX], regs[R11], error, rip, cs, pushed_flags, old_sp, ss)
        sp -= len(frame)
        try:
            self.write(sp, frame)
        except XenError:
            raise GuestCrash(f"page fault while pushing a frame at {sp:#x}") from None
        if not target:
            raise GuestCrash("no handler in the guest kernel")
        regs[RSP] = sp
        engine.set_code_stack(FLAT_KERNEL_CS, descriptors.CODE64, FLAT_KERNEL_SS, descriptors.DATA)
        engine.rflags = rflags & ~FLAGS_CLEARED_ON_TRAP | FLAG_IF
        return target

    def reload_segments(self) -> None:
        """This vCPU's turn comes after another's: where a data segment can't be loaded any more, its kernel gets the
        failsafe callback, with the selectors that it had above R11 in the frame (load_segments)."""
        engine, regs = self.engine, self.regs
        if engine.reload_segments(self.slot):
            return
        selectors = [engine.segment(which) for which in (3, 0, 4, 5)]
        if not any(selector > 3 for selector in selectors) or descriptors.reload_data_segments(self):
            return
        regs[RIP] = self.bounce(self.failsafe_callback, self.failsafe_masks_events, regs[RIP], engine.rflags, None)
        frame = self.read(regs[RSP], 16)
        regs[RSP] -= 32
        self.write(regs[RSP], frame + struct.pack("<4Q", *selectors))

    def deliver_nmi(self, rip: int) -> int:
        """The NMI that VCPUOP_send_nmi left, unless one is being handled (process_nmi); lost without a handler."""
        if self.nmi_masked:
            return rip
        self.nmi_pending = False
        address, _cs, flags = self.traps[TRAP_NMI]
        if not address:
            return rip
        self.nmi_masked = True
        return self.bounce(address, bool(flags & TI_IF), rip, self.engine.rflags, None)

    def do_deliver_events(self, rip: int) -> int:
        """The event upcall, where one is due on the way back to the guest (test_guest_events)."""
        mem, info = self._mem, self.vcpu.info
        if mem[info] and not mem[info + 1]:
            if self.engine.upcall(self.slot, self.event_callback, rip):
                return self.event_callback
            self.upcall_unnoted()
            return self.bounce(self.event_callback, True, rip, self.engine.rflags, None)
        return rip

    def inject(self, vector: int, rip: int, error: int = 0) -> int:
        """Give the guest an exception (pv_inject_event). GuestCrash where it has no handler for it."""
        address, _cs, flags = self.traps[vector]
        if not address:
            raise GuestCrash(f"unhandled exception {vector} (error code {error:#x}) at RIP {rip:#x}")
        code = error if vector in TRAPS_WITH_ERROR_CODE else None
        rip = self.bounce(address, bool(flags & TI_IF), rip, self.engine.rflags, code)
        return self.deliver_events(rip)

    def inject_page_fault(self, va: int, error: int, rip: int) -> int:
        """A page fault of the guest's own, with CR2 in vcpu_info and the user bit as the guest sees its modes."""
        self._u64[self.vcpu.info + 16 >> 3] = va
        error = error & ~PFEC_USER | (PFEC_USER if self.user_mode else 0)
        return self.inject(TRAP_PF, rip, error)

    def kernel_mode(self) -> bool:
        return not self.user_mode

    # -- what the engine calls: GuestHandler ---------------------------------------------------------------------------

    def syscall(self, rip: int, cs: int) -> int:
        """SYSCALL: a hypercall from the guest kernel, a system call from its user (lstar_enter)."""
        if self.user_mode:
            return self._user_syscall(rip, cs)
        regs = self.regs
        number = regs[RAX]
        if number == HYPERVISOR_iret:
            return self._iret()
        try:
            handler, arguments = self._hypercalls[number]
            if arguments == 2:
                result = handler(self, regs[RDI], regs[RSI])
            elif arguments == 3:
                result = handler(self, regs[RDI], regs[RSI], regs[RDX])
            elif arguments == 4:
                result = handler(self, regs[RDI], regs[RSI], regs[RDX], regs[R10])
            elif arguments == 1:
                result = handler(self, regs[RDI])
            else:
                result = handler(self, regs[RDI], regs[RSI], regs[RDX], regs[R10], regs[R8], regs[R9])
        except XenError as error:
            result = -error.errno
        except Preempted as rest:
            for register, value in zip(ARGUMENT_REGISTERS, rest.arguments, strict=False):
                regs[register] = value & M64
            result, rip = number, rip - SYSCALL_LENGTH
        except (IndexError, OverflowError):  # of a number; which one is machine code's choice
            if number < len(self._hypercalls):
                raise
            result = -Errno.ENOSYS
        regs[RAX] = result & M64
        # What SYSCALL did to the guest's registers, less the arithmetic flags in R11: they cost a fifth of a short
        # hypercall, and nobody looks for them in a register that the hypercall ABI gives away.
        regs[RCX], regs[R11] = rip, self.engine.control_flags
        if cs != FLAT_KERNEL_CS:
            self.engine.set_code_stack(FLAT_KERNEL_CS, descriptors.CODE64, FLAT_KERNEL_SS, descriptors.DATA)
        mem, info = self._mem, self.vcpu.info
        if mem[info] and not mem[info + 1]:
            return self.deliver_events(rip)
        return rip

    def _user_syscall(self, rip: int, cs: int) -> int:
        regs, rflags = self.regs, self.engine.rflags
        regs[RCX], regs[R11] = rip, rflags  # as SYSCALL leaves them
        compat = cs == FLAT_RING3_CS32
        target, masks = self.syscall32_callback if compat else (self.syscall_callback, bool(self.syscall_masks_events))
        if not target:
            return self.inject(TRAP_UD, rip - SYSCALL_LENGTH)
        cs = FLAT_RING3_CS32 if compat else FLAT_RING3_CS64
        rip = self._bounce_from(cs, FLAT_RING3_SS64, target, masks, rip, rflags, None)
        mem, info = self._mem, self.vcpu.info
        if mem[info] and not mem[info + 1]:
            return self.deliver_events(rip)
        return rip

    def _iret(self) -> int:
        """HYPERVISOR_iret: {rax, r11, rcx, flags, rip, cs, rflags, rsp, ss} on the stack (do_iret)."""
        regs, engine, mem = self.regs, self.engine, self._mem
        try:
            frame = self.read(regs[RSP], 72)
        except XenError:
            raise GuestCrash("page fault while reading the IRET frame") from None
        rip: int
        rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = _unpack_iret(frame)
        if cs & 3 == 3:
            if not self.user_root:
                raise GuestCrash("IRET to user mode without user page tables")
            self.toggle_mode()
        if self.architectural_iopl:
            self.iopl = rflags & FLAG_IOPL
        cs, ss = cs & 0xFFFF | 3, ss & 0xFFFF | 3
        if flags & VGCF_in_syscall and canonical(rip):
            # Xen leaves by SYSRET, which loads flat segments whatever the selectors.
            cs, ss = FLAT_RING3_CS32 if cs == FLAT_RING3_CS32 else FLAT_RING3_CS64, FLAT_RING3_SS64
        regs[RAX] = rax
        if flags & VGCF_in_syscall:
            regs[RCX], regs[R11] = rip, rflags & ~(FLAG_IOPL | FLAG_VM) & 0xFFFFFFFF | FLAG_IF
        else:
            regs[RCX], regs[R11] = rcx, r11
        regs[RSP] = rsp
        info = self.vcpu.info
        mem[info + 1] = 0 if rflags & FLAG_IF else 1
        self.nmi_masked = False
        if self.nmi_pending:
            engine.stop()
        if cs == FLAT_RING3_CS64 and ss == FLAT_RING3_SS64:
            engine.set_code_stack(cs, descriptors.CODE64, ss, descriptors.DATA)
        else:
            bad = descriptors.load_code_stack(self, cs, ss)
            if bad is not None:
                # Xen's own IRET faulted; it hands that on as if the target had (pre-exception table).
                engine.rflags = rflags & ~(FLAG_IOPL | FLAG_VM) & 0xFFFFFFFF | FLAG_IF
                return self.inject(TRAP_GP, rip, bad & 0xFFFC)
        engine.rflags = rflags & ~(FLAG_IOPL | FLAG_VM) & 0xFFFFFFFF | FLAG_IF
        if mem[info] and not mem[info + 1]:
            return self.deliver_events(rip)
        if rflags & FLAG_TF:
            # The CPU checks TF once more when SYSCALL is complete: that step is not the guest's.
            self._step_to_skip = rip
        return rip

    def exception(self, vector: int, error: int, rip: int, software: bool) -> int:
        """Every fault and trap of the guest's."""
        if software:
            return self._software_interrupt(vector, rip)
        if vector == TRAP_PF:
            return self._page_fault(error, rip)
        if vector == TRAP_GP:
            if not error:
                done = emulate.privileged(self, rip)
                if done is not None:
                    mem, info = self._mem, self.vcpu.info
                    return self.deliver_events(done) if mem[info] and not mem[info + 1] else done
                if emulate.is_stack_fault(self, rip):
                    return self.inject(TRAP_SS, rip)
            return self.inject(TRAP_GP, rip, error)
        if vector == TRAP_UD and not software:
            return emulate.invalid_opcode(self, rip)
        if vector == TRAP_NM:
            self.engine.cr0_ts = False
            if not self.cr0_ts:
                return rip
            self.cr0_ts = False
        elif vector == TRAP_DB:
            skip, self._step_to_skip = self._step_to_skip, None
            if skip == rip:
                return rip
            self.debug_registers[6] |= DR6_SINGLE_STEP
        return self.inject(vector, rip, error)

    def _software_interrupt(self, vector: int, rip: int) -> int:
        """INT n: allowed by the trap table's DPL, else #GP as from an IDT gate that user code may not use."""
        address, _cs, flags = self.traps[vector]
        if vector in (TRAP_BP, TRAP_OF):
            return self.inject(vector, rip)
        if address and (vector == LEGACY_SYSCALL_VECTOR or (flags & TI_DPL) >= (1 if self.kernel_mode() else 3)):
            rip = self.bounce(address, bool(flags & TI_IF), rip, self.engine.rflags, None)
            return self.deliver_events(rip)
        return self.inject(TRAP_GP, rip - 2, vector << 3 | 2)

    def _page_fault(self, error: int, rip: int) -> int:
        va = self.engine.cr2
        if self.kernel_mode():
            if error & (PFEC_PRESENT | PFEC_WRITE | PFEC_RESERVED) == PFEC_PRESENT | PFEC_WRITE:
                done = writable_pagetable.emulate_write(self, va, rip)
                if done is not None:
                    return self.deliver_events(done)
            elif error & PFEC_FETCH and error & PFEC_PRESENT and self._initial_page_executes(va):
                return rip
        if HYPERVISOR_VIRT_START <= va < HYPERVISOR_VIRT_END:
            return self._fault_in_xen(va, error, rip)
        return self.inject_page_fault(va, error, rip)

    def _fault_in_xen(self, va: int, error: int, rip: int) -> int:
        """A fault in Xen's part of the address space (fixup_page_fault, handle_gdt_ldt_mapping_fault)."""
        offset = va - descriptors.PERDOMAIN_VIRT_START
        if not error & PFEC_USER and 0 <= offset < len(self.guest.cpus) * descriptors.WINDOW_BYTES:
            # The CPU looked for a descriptor.
            offset %= descriptors.WINDOW_BYTES
            if offset < descriptors.LDT_OFFSET:
                return self.inject(TRAP_GP, rip, offset & ~7)
            offset -= descriptors.LDT_OFFSET
            if descriptors.map_ldt_page(self, offset):
                return rip
            return self.inject_page_fault(self.ldt[0] + offset & M64, error, rip)
        if 0 <= va - DIRECTMAP_VIRT_START < len(self._mem):
            error |= PFEC_PRESENT  # where Xen has all of RAM
        return self.inject_page_fault(va, error, rip)

    def _initial_page_executes(self, va: int) -> bool:
        """The builder marks data pages NX for speed, which Xen doesn't: take that back where it is in the way."""
        index = self.l1_index(va)
        if index is None:
            return False
        entry = self._u64[index]
        if not entry & NX or not self.guest.marked_nx(entry, index):
            return False
        self._u64[index] = entry & ~NX
        self.engine.flush_page(va)
        return True

    def cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf:
        domain = self.domain
        return guest_cpuid(self.engine.native_cpuid, domain.hypervisor.clock, domain.machine.frames, leaf, subleaf)

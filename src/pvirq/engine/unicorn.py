"""The embedded engine: Unicorn (QEMU's translator as a library), at user privilege over the host's machine memory."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final

import unicorn
from unicorn import x86_const as x86

from pvirq.engine import unicorn_state as layout
from pvirq.engine.crossing import (
    CODE_SEEN,
    CR3_ASIDE,
    DONE,
    FAILURES,
    FLUSHES,
    LAST_PAGES,
    ON_INTERRUPT,
    ON_SYSCALL,
    PAGE,
    PAGES,
    SLOT,
    STATE,
    STATE_BYTES,
    THERE,
    Crossing,
)
from pvirq.engine.notes import Calls, Site
from pvirq.engine.protocol import (
    FLAG_DF,
    MANY_PAUSES,
    RAX,
    RBX,
    RCX,
    RDX,
    RIP,
    TRAP_UD,
    CpuidLeaf,
    EngineError,
    GuestHandler,
    Slot,
)
from pvirq.engine.unicorn_patches import CLOCK, COUNT, PAUSES, TICK_SHIFT
from pvirq.engine.unicorn_state import CpuState

# Translated code is kept in a buffer of this size and dropped as a whole when it is full. Unicorn's own default is
# 1 GiB; a Linux boot needs about 40 MiB.
TCG_BUFFER_BYTES: Final = 48 << 20
# When that happens hangs on how long the translations are, which hangs on where in this process things lie. Where a run
# is to be repeated it had better not happen.
REPEATABLE_TCG_BUFFER_BYTES: Final = 256 << 20

M64: Final = (1 << 64) - 1

CR0_PE_PG_ETC: Final = 0x80050033  # PG AM WP NE ET MP PE
CR0_TS: Final = 1 << 3
CR4: Final = 0x620  # PAE OSFXSR OSXMMEXCPT
MSR_EFER: Final = 0xC0000080
MSR_TSC_AUX: Final = 0xC0000103
EFER: Final = 0xD01  # NXE LMA LME SCE

HF_CPL: Final = 3
# "BND registers in use": without MPX it means nothing, but code translated with it is told apart from code without.
HF_OTHER_SPACE: Final = 1 << 26
HF_CS32, HF_SS32, HF_ADDSEG, HF_CS64 = 1 << 4, 1 << 5, 1 << 6, 1 << 15
HF_MODE: Final = HF_CS32 | HF_SS32 | HF_ADDSEG | HF_CS64
HF_LONG_MODE: Final = HF_CS32 | HF_SS32 | HF_CS64
CODE_L: Final = 1 << 53  # in a whole descriptor: 64-bit code
# In the upper half of a descriptor: granularity, default size, 64-bit code.
DESC_G, DESC_B, DESC_L = 1 << 23, 1 << 22, 1 << 21

CS, SS, FS, GS = 1, 2, 4, 5
# Indexes of 32-bit items.
HFLAGS: Final = layout.HFLAGS // 4
CS_SELECTOR: Final = CpuState.segment_field(CS, 0) // 4
SS_SELECTOR: Final = CpuState.segment_field(SS, 0) // 4
SS_FLAGS: Final = CpuState.segment_field(SS, 20) // 4
DESC_FLAGS: Final = 0x00F0FF00  # of a descriptor's upper half, what a segment's cache keeps
# Indexes of items: 64-bit for the first two, 32-bit for the others. The arithmetic flags are kept apart, lazily.
EFLAGS, CC_SRC = layout.EFLAGS // 8, layout.EFLAGS // 8 + 2
CC_OP, DF = layout.EFLAGS // 4 + 8, layout.EFLAGS // 4 + 9
CC_OP_EFLAGS: Final = 1
FLAGS_ARITHMETIC: Final = 0x8D5
FLAGS_STORED: Final = 0xFFFFFFFF & ~(FLAGS_ARITHMETIC | FLAG_DF)

# An FXSAVE64 image begins with control, status and tag words, opcode, instruction and data pointers, MXCSR, its mask.
FXSAVE_BYTES, FXSAVE_ST, FXSAVE_XMM = 512, 32, 160
FXSAVE_HEADER: Final = "<HHBxHQQII"
MXCSR_MASK: Final = 0xFFFF
FPSW_TOP: Final = 11

CPUID_LEAVES_WITH_SUBLEAVES: Final = (4, 7, 0xB, 0xD)

INT_LENGTH: Final = 2

TICKS_PER_S: Final = 1e9  # of the counter
# A run ends at the latest after this long, so that Ctrl-C and the host's other work are never far.
LONGEST_RUN_BLOCKS: Final = 50_000_000 >> TICK_SHIFT
CLOCK_ITEM, COUNT_ITEM, PAUSES_ITEM = CLOCK // 8, COUNT // 8, PAUSES // 4  # of 64 bits, and of 32
NO_WINDOW: Final = 1 << 62  # the time when a TLB's size was last looked at: never long ago


class UnicornEngine:
    """See `pvirq.engine.protocol.Engine`, whose methods these are."""

    name = "unicorn"

    def __init__(self, memory: memoryview, handler: GuestHandler, repeatable: bool = False) -> None:
        self._memory = memory
        buffer = (ctypes.c_uint8 * 0).from_buffer(memory)
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.ctl_set_tcg_buffer_size(REPEATABLE_TCG_BUFFER_BYTES if repeatable else TCG_BUFFER_BYTES)
        uc.mem_map_ptr(0, len(memory), unicorn.UC_PROT_ALL, ctypes.addressof(buffer))
        self._uc: Any = uc
        state = CpuState(uc, memory)
        self._state = state
        self._env, self._cpu, self._handle = state.env, state.cpu, state.handle
        self._u32, self._u64 = state.u32, state.u64
        self.regs = state.u64[layout.REGS // 8 : layout.EIP // 8 + 1]
        self._scratch = ctypes.c_uint64(0)
        self._scratch_at = ctypes.addressof(self._scratch)
        self._reg_read = state.reg_read
        self._emu_start = state.emu_start
        self._tlb_dirty = state.tlb_dirty
        (self._tlb_aside, self._tlb_aside_fast), (self._tlb_used, self._tlb_used_fast) = state.tlb_index[:2]
        self._code_pointer = state.code_pointer
        self._crossing = Crossing(state, ctypes.addressof(buffer), len(memory))
        self._shared = self._crossing.cpu
        self._slot: Slot | None = None
        self._blank: bytes | None = None  # what a CPU begins with that has had no turn yet
        self.shortcuts = True  # as from the next exchange, do without the handler what a slot's items allow
        # Read now: it takes running an instruction, which is only possible while there is no guest.
        self._native_cpuid = {
            (leaf, subleaf): state.cpuid(leaf, subleaf)
            for leaf in (*range(0x17), *range(0x80000000, 0x80000009))
            for subleaf in range(4 if leaf in CPUID_LEAVES_WITH_SUBLEAVES else 1)
        }
        self._code_stack = (0, 0, 0, 0, 0)  # what set_code_stack loaded last: descriptors, mode, selectors
        self._translation_windows = [descriptor[16:24].cast("Q") for descriptor, _ in state.tlb_index]
        self._tlb_flush = self._flushing(state.tlb_flush)
        self._update_cr3 = self._flushing(state.update_cr3)
        self._u64[COUNT_ITEM] = self._u64[CLOCK_ITEM] = 1
        self._stop_at: int | None = None
        self._running = False
        self._failure: BaseException | None = None
        self._paging = False
        self._closed = False
        uc.ctl_exits_enabled(True)  # with none set: otherwise each emu_start walks the page tables for `until`
        self._keep: list[Any] = []
        self.handler = handler
        self._install()

    @property
    def handler(self) -> GuestHandler:
        return self._handler

    @handler.setter
    def handler(self, handler: GuestHandler) -> None:
        self._handler = handler
        self._shared[SLOT] = 0
        self._on_syscall = handler.syscall  # looked up once, not a million times

    # -- hooks: where guest code reaches the handler ---------------------------------------------------------------

    def _install(self) -> None:
        regs, u32, state = self.regs, self._u32, self._state
        error_code, is_int, old_exception = state.error_code, state.exception_is_int, state.old_exception

        def syscall(_uc: object, _data: object) -> None:
            # Unicorn leaves RIP at the instruction and adds its two bytes when this returns.
            try:
                rip = regs[RIP] + 2 & M64
                target = self._on_syscall(rip, u32[CS_SELECTOR])
                if target is not rip:  # as it is for most hypercalls, and numbers of 64 bits are slow
                    regs[RIP] = target - 2 & M64
            except BaseException as failure:
                self._fail(failure)

        def interrupt(_uc: object, vector: int, _data: object) -> None:
            # QEMU's own delivery would have cleared this; left alone, the next contributory fault becomes #DF.
            u32[old_exception] = 0xFFFFFFFF
            try:
                regs[RIP] = self.handler.exception(vector, u32[error_code], regs[RIP], bool(u32[is_int]))
            except BaseException as failure:
                self._fail(failure)

        def invalid(_uc: object, _data: object) -> bool:
            u32[old_exception] = 0xFFFFFFFF
            try:
                # INT 6 comes here too, with RIP still at the instruction.
                software = bool(u32[is_int])
                rip = regs[RIP] + (INT_LENGTH if software else 0)
                regs[RIP] = self.handler.exception(TRAP_UD, 0, rip, software)
            except BaseException as failure:
                self._fail(failure)
            return True

        def cpuid(_uc: object, _data: object) -> int:
            try:
                leaf = self.handler.cpuid(regs[RAX] & 0xFFFFFFFF, regs[RCX] & 0xFFFFFFFF)
                regs[RAX], regs[RBX], regs[RCX], regs[RDX] = leaf
            except BaseException as failure:
                self._fail(failure)
            return 1

        pointer, u32_t = ctypes.c_void_p, ctypes.c_uint32
        port_io = ctypes.c_void_p(state.general_protection_stub())
        self._hook(unicorn.UC_HOOK_INSN, port_io, x86.UC_X86_INS_IN)
        self._hook(unicorn.UC_HOOK_INSN, port_io, x86.UC_X86_INS_OUT)
        crossing = self._crossing
        for item, callback in (
            (ON_SYSCALL, ctypes.CFUNCTYPE(None, pointer, pointer)(syscall)),
            (ON_INTERRUPT, ctypes.CFUNCTYPE(None, pointer, u32_t, pointer)(interrupt)),
        ):
            self._keep.append(callback)
            crossing.call(item, callback)
        self._hook(
            unicorn.UC_HOOK_INSN, ctypes.c_void_p(crossing.on_syscall), x86.UC_X86_INS_SYSCALL, data=crossing.data
        )
        self._hook(unicorn.UC_HOOK_INTR, ctypes.c_void_p(crossing.on_interrupt), data=crossing.data)
        self._hook(
            unicorn.UC_HOOK_INSN,
            ctypes.CFUNCTYPE(ctypes.c_int, pointer, pointer)(cpuid),
            x86.UC_X86_INS_CPUID,
        )
        self._hook(unicorn.UC_HOOK_INSN_INVALID, ctypes.CFUNCTYPE(ctypes.c_bool, pointer, pointer)(invalid))

    @property
    def calls(self) -> Calls | None:
        return self._crossing.calls(self._fail) if self.shortcuts and not self._closed else None

    def watch(self, va: int, callback: Callable[[], None], site: Site | None = None) -> Callable[[], None]:
        # With bounds of one address only the block that is translated there calls the hook: all others are as ever.
        def reached(_uc: object, _va: int, _size: int, _data: object) -> None:
            try:
                callback()
            except BaseException as failure:
                self._fail(failure)

        pointer, lib = ctypes.c_void_p, self._state.lib
        raw = ctypes.CFUNCTYPE(None, pointer, ctypes.c_uint64, ctypes.c_uint32, pointer)(reached)
        if site is None:
            hook = self._hook(unicorn.UC_HOOK_CODE, raw, first=va, last=va)
        else:
            site.ask(raw)
            self._keep += [raw, site]
            function = ctypes.c_void_p(site.function)
            hook = self._hook(unicorn.UC_HOOK_CODE, function, first=va, last=va, data=site.address)

        def remove() -> None:
            # What was translated goes on calling into the list of hooks, so the callback itself stays until the end.
            if not self._closed:
                address = ctypes.cast(lib.uc_hook_del, pointer).value or 0
                ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_size_t)(address)(self._handle, hook)

        return remove

    def _hook(
        self, kind: int, callback: Any, instruction: int | None = None, *, first: int = 1, last: int = 0, data: int = 0
    ) -> int:
        # Raw callbacks cost a third of the binding's, which wrap each in a second Python call.
        self._keep.append(callback)
        add = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int, *[ctypes.c_void_p] * 5)(
            ctypes.cast(self._state.lib.uc_hook_add, ctypes.c_void_p).value or 0
        )
        hook = ctypes.c_size_t()
        result = add(
            self._handle,
            ctypes.addressof(hook),
            kind,
            ctypes.cast(callback, ctypes.c_void_p),
            data,
            first,
            last,
            instruction,
        )
        if result:
            raise EngineError(f"unicorn refuses a hook (error {result})")
        return hook.value

    def _fail(self, failure: BaseException) -> None:
        self._failure = failure
        self._shared[FAILURES] += 1
        self.stop()

    # -- registers -------------------------------------------------------------------------------------------------

    @property
    def rflags(self) -> int:
        u64 = self._u64
        if self._u32[CC_OP] == CC_OP_EFLAGS:  # no arithmetic since the flags were last computed
            return u64[EFLAGS] & FLAGS_STORED | u64[CC_SRC] & FLAGS_ARITHMETIC | self._u32[DF] & FLAG_DF
        self._scratch.value = 0
        self._reg_read(self._handle, x86.UC_X86_REG_EFLAGS, self._scratch_at)
        return self._scratch.value & 0xFFFFFFFF

    @rflags.setter
    def rflags(self, value: int) -> None:
        # cpu_load_eflags, except that it leaves the arithmetic flags in EFLAGS too, where they go stale and show.
        u32, u64 = self._u32, self._u64
        u64[CC_SRC] = value & FLAGS_ARITHMETIC
        u32[CC_OP] = CC_OP_EFLAGS
        u32[DF] = 0xFFFFFFFF if value & FLAG_DF else 1
        u64[EFLAGS] = value & FLAGS_STORED | 2

    @property
    def control_flags(self) -> int:
        flags: int = self._u64[EFLAGS] & FLAGS_STORED | self._u32[DF] & FLAG_DF
        return flags

    @property
    def cr2(self) -> int:
        return self._u64[layout.CR2 // 8]

    @property
    def cr3(self) -> int:
        return self._u64[layout.CR3 // 8]

    @cr3.setter
    def cr3(self, value: int) -> None:
        self._update_cr3(self._env, value)
        if not self._paging:
            self._enter_user_mode()

    def switch_space(self, value: int, other: bool) -> None:
        # At CPL 3 the CPU uses its second MMU index only. The first one's TLB is a place where translations of the
        # other address space can stay: exchanged with the second's, and otherwise left to QEMU, which flushes pages
        # and spaces in all of them alike. Code is found by its address and the CPU's flags, so the two spaces differ
        # in a flag. When code has been translated since the last switch, nothing may stay: Unicorn has stores to its
        # page noticed where they go by the address that it was fetched from, and in the other space it may have
        # another one.
        aside, used, aside_fast, used_fast = self._tlb_aside, self._tlb_used, self._tlb_aside_fast, self._tlb_used_fast
        descriptor, fast = bytes(aside), bytes(aside_fast)
        aside[:], aside_fast[:] = used, used_fast
        used[:], used_fast[:] = descriptor, fast
        self._tlb_dirty[0] |= 3  # or a flush would pass the first by
        u32, u64 = self._u32, self._u64
        u32[HFLAGS] = u32[HFLAGS] & ~HF_OTHER_SPACE | (HF_OTHER_SPACE if other else 0)
        old, shared = u64[layout.CR3 // 8], self._shared
        code = self._code_pointer[0]
        if shared[CR3_ASIDE] == value and shared[CODE_SEEN] == code:
            u64[layout.CR3 // 8] = value
        else:
            self._update_cr3(self._env, value)
        shared[CR3_ASIDE], shared[CODE_SEEN] = old, code

    def forget_space(self) -> None:
        self._shared[CR3_ASIDE] = 0

    def _enter_user_mode(self) -> None:
        self._paging = True
        self._uc.reg_write(x86.UC_X86_REG_CR4, CR4)
        self._uc.msr_write(MSR_EFER, EFER)
        self._uc.reg_write(x86.UC_X86_REG_CR0, CR0_PE_PG_ETC)
        self._u32[HFLAGS] |= HF_CPL

    @property
    def fs_base(self) -> int:
        return self._u64[36]

    @fs_base.setter
    def fs_base(self, value: int) -> None:
        self._u64[36] = value

    @property
    def gs_base(self) -> int:
        return self._u64[39]

    @gs_base.setter
    def gs_base(self, value: int) -> None:
        self._u64[39] = value

    def swap_gs_base(self, value: int) -> int:
        u64 = self._u64
        old: int = u64[39]
        u64[39] = value
        return old

    @property
    def tsc_aux(self) -> int:
        return int(self._uc.msr_read(MSR_TSC_AUX))

    @tsc_aux.setter
    def tsc_aux(self, value: int) -> None:
        self._uc.msr_write(MSR_TSC_AUX, value)

    @property
    def pauses(self) -> int:
        left: int = self._u32[PAUSES_ITEM]
        return left if left <= MANY_PAUSES else left - (1 << 32)

    @pauses.setter
    def pauses(self, value: int) -> None:
        self._u32[PAUSES_ITEM] = value

    @property
    def cr0_ts(self) -> bool:
        return bool(self._u64[layout.CR0 // 8] & CR0_TS)

    @cr0_ts.setter
    def cr0_ts(self, value: bool) -> None:
        self._state.update_cr0(self._env, CR0_PE_PG_ETC | (CR0_TS if value else 0))

    # -- segments --------------------------------------------------------------------------------------------------

    def segment(self, which: int) -> int:
        return self._u32[CpuState.segment_field(which, 0) // 4] & 0xFFFF

    def set_code_stack(self, cs: int, code: int, ss: int, stack: int) -> None:
        u32 = self._u32
        if code & CODE_L and u32[HFLAGS] & HF_MODE == HF_LONG_MODE and not (u32[SS_FLAGS] ^ stack >> 32) & DESC_FLAGS:
            # From 64-bit code to 64-bit code, where bases and limits mean nothing. (SS's kind counts once the guest
            # leaves 64-bit code by itself.)
            u32[CS_SELECTOR], u32[SS_SELECTOR] = cs, ss
            return
        mode = code, stack, u32[HFLAGS] & HF_MODE, u32[CS_SELECTOR], u32[SS_SELECTOR]
        if mode == self._code_stack:
            # Kernel and user share flat segments: only the selectors differ. (The guest's own far jumps and moves to SS
            # show in the mode or a selector.)
            u32[CS_SELECTOR], u32[SS_SELECTOR] = cs, ss
            self._code_stack = code, stack, mode[2], cs, ss
            return
        self._load(CS, cs, code)
        self._load(SS, ss, stack)
        hflags = 0
        if code >> 32 & DESC_L:
            hflags |= HF_CS64 | HF_CS32 | HF_SS32
        else:
            hflags |= HF_ADDSEG
            hflags |= HF_CS32 if code >> 32 & DESC_B else 0
            hflags |= HF_SS32 if stack >> 32 & DESC_B else 0
        u32[HFLAGS] = u32[HFLAGS] & ~HF_MODE | hflags
        self._code_stack = code, stack, hflags, cs, ss

    def set_segment(self, which: int, selector: int, descriptor: int) -> None:
        self._load(which, selector, descriptor)

    def _load(self, which: int, selector: int, descriptor: int) -> None:
        """Fill a segment's cache as cpu_x86_load_seg does."""
        at = CpuState.segment_field(which, 0)
        low, high = descriptor & 0xFFFFFFFF, descriptor >> 32
        limit = low & 0xFFFF | high & 0xF0000
        self._u32[at // 4] = selector
        self._u64[at // 8 + 1] = low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000
        self._u32[at // 4 + 4] = limit << 12 | 0xFFF if high & DESC_G else limit
        self._u32[at // 4 + 5] = high & DESC_FLAGS

    def set_gdt(self, base: int, limit: int) -> None:
        at = CpuState.segment_field(layout.GDT, 0)
        self._u64[at // 8 + 1], self._u32[at // 4 + 4] = base, limit

    def set_ldt(self, base: int, limit: int) -> None:
        at = CpuState.segment_field(layout.LDT, 0)
        self._u32[at // 4] = 0 if not limit else 8  # any selector that is not null
        self._u64[at // 8 + 1], self._u32[at // 4 + 4] = base, limit
        self._u32[at // 4 + 5] = 0x8200 if limit else 0  # present LDT

    # -- floating point --------------------------------------------------------------------------------------------

    def fpu_state(self) -> bytes:
        read = self._uc.reg_read
        image = bytearray(FXSAVE_BYTES)
        # The tag word has two bits a register, 3: empty; FXSAVE's one, 1: in use.
        tags, status = read(x86.UC_X86_REG_FPTAG), read(x86.UC_X86_REG_FPSW) & 0xFFFF
        in_use = sum(1 << i for i in range(8) if tags >> 2 * i & 3 != 3)
        struct.pack_into(
            FXSAVE_HEADER, image, 0, read(x86.UC_X86_REG_FPCW) & 0xFFFF, status, in_use, 0,
            0, 0, read(x86.UC_X86_REG_MXCSR), MXCSR_MASK,
        )  # fmt: skip
        for i in range(8):  # in the image from the top of the stack, in Unicorn by their places
            mantissa, exponent = read(x86.UC_X86_REG_FP0 + ((status >> FPSW_TOP) + i & 7))
            struct.pack_into("<QH", image, FXSAVE_ST + 16 * i, mantissa, exponent & 0xFFFF)
        for i in range(16):
            image[FXSAVE_XMM + 16 * i : FXSAVE_XMM + 16 * i + 16] = read(x86.UC_X86_REG_XMM0 + i).to_bytes(16, "little")
        return bytes(image)

    def set_fpu_state(self, image: bytes) -> None:
        write = self._uc.reg_write
        fcw, fsw, in_use, _, _, _, mxcsr, _ = struct.unpack_from(FXSAVE_HEADER, image)
        write(x86.UC_X86_REG_FPCW, fcw)
        write(x86.UC_X86_REG_FPSW, fsw)
        for i in range(8):
            place = x86.UC_X86_REG_FP0 + ((fsw >> FPSW_TOP) + i & 7)
            write(place, struct.unpack_from("<QH", image, FXSAVE_ST + 16 * i))
        # Last: writing a register marks it in use.
        write(x86.UC_X86_REG_FPTAG, sum(3 << 2 * i for i in range(8) if not in_use >> i & 1))
        for i in range(16):
            at = FXSAVE_XMM + 16 * i
            write(x86.UC_X86_REG_XMM0 + i, int.from_bytes(image[at : at + 16], "little"))
        write(x86.UC_X86_REG_MXCSR, mxcsr & MXCSR_MASK)

    # -- translations and code -------------------------------------------------------------------------------------

    def flush_tlb(self) -> None:
        self._tlb_flush(self._cpu)

    def flush_page(self, va: int) -> None:
        shared = self._shared
        shared[PAGE + shared[PAGES] % LAST_PAGES] = va
        shared[PAGES] += 1
        self._state.tlb_flush_page(self._cpu, va)

    def invalidate_code(self, address: int, size: int) -> None:
        self._state.invalidate_range(self._handle, address, address + size)

    # -- time ------------------------------------------------------------------------------------------------------

    def counter(self) -> int:
        u64 = self._u64
        return (u64[CLOCK_ITEM] - u64[COUNT_ITEM] & M64) << TICK_SHIFT

    def counter_hz(self) -> float:
        return TICKS_PER_S

    def set_counter(self, ticks: int) -> None:
        u64 = self._u64
        u64[CLOCK_ITEM] = (ticks >> TICK_SHIFT) + u64[COUNT_ITEM] & M64

    def set_tsc_offset(self, offset: int) -> None:
        self._u64[self._state.tsc_offset] = offset & M64

    @property
    def stop_at(self) -> int | None:
        return self._stop_at

    @stop_at.setter
    def stop_at(self, value: int | None) -> None:
        self._stop_at = value
        if self._running:
            self._arm()

    def _flushing(self, flush: Callable[..., None]) -> Callable[..., None]:
        """A function that flushes a TLB, noted, and kept from looking at the machine's clock.

        QEMU makes a TLB smaller when it has been hardly used for 100 ms, and which translations a TLB keeps shows in
        the accessed bits of page tables and in the faults that stale ones cause. Here they grow only.
        """
        windows, shared = self._translation_windows, self._shared

        def flushed(*arguments: object) -> None:
            for window in windows:
                window[0] = NO_WINDOW
            shared[FLUSHES] += 1
            flush(*arguments)

        return flushed

    def _arm(self) -> None:
        """Have the run end after as many blocks as are left until `stop_at`."""
        u64, stop_at = self._u64, self._stop_at
        done = u64[CLOCK_ITEM] - u64[COUNT_ITEM] & M64
        blocks = LONGEST_RUN_BLOCKS
        if stop_at is not None:
            left = -(((done << TICK_SHIFT) - stop_at) >> TICK_SHIFT)
            if left < blocks:
                blocks = left if left > 0 else 0
        u64[COUNT_ITEM] = blocks + 1
        u64[CLOCK_ITEM] = done + blocks + 1

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        self._running = True
        self._arm()
        try:
            result = self._emu_start(self._handle, self.regs[RIP], 1, 0, 0)
        finally:
            self._running = False
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        if result:
            message = ctypes.cast(self._state.lib.uc_strerror(result), ctypes.c_char_p).value or b"?"
            raise EngineError(f"unicorn gave up at RIP {self.regs[RIP]:#x}: {message.decode()} (error {result})")

    def stop(self) -> None:
        if not self._closed:
            self._state.stop()

    def native_cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf:
        return self._native_cpuid.get((leaf, subleaf), (0, 0, 0, 0))

    # -- several CPUs ----------------------------------------------------------------------------------------------

    def slot(self) -> Slot:
        descriptor, fast = self._state.tlb_index[2]  # which isn't used at user privilege
        return self._crossing.slot(bytes(descriptor) + bytes(fast))

    def exchange(self, slot: Slot, handler: GuestHandler) -> None:
        now, self._slot = self._slot, slot
        self.handler = handler
        if now is not None and now is not slot:
            if self._blank is None:
                self._blank = self.save()
            if not slot.items[THERE]:
                slot.items[STATE : STATE + STATE_BYTES // 8] = memoryview(self._blank).cast("Q")
            self._crossing.exchange(self._crossing.data, now.address, slot.address)
            self._code_stack = (0, 0, 0, 0, 0)
        if self.shortcuts:
            self._shared[SLOT] = slot.address

    def reload_segments(self, slot: Slot) -> bool:
        return self._crossing.reload(self._crossing.data, slot.address) != 0

    def change_runstate(self, slot: Slot, state: int, now: int, write: bool) -> bool:
        return self._crossing.change_runstate(self._crossing.data, slot.address, state, now, write) != 0

    def upcall(self, slot: Slot, target: int, rip: int) -> bool:
        return self.shortcuts and self._crossing.upcall(self._crossing.data, slot.address, target, rip) != 0

    @property
    def shortcuts_taken(self) -> int:
        """How often the handler wasn't asked."""
        return self._shared[DONE]

    def save(self) -> bytes:
        return bytes(self._state.bytes[:STATE_BYTES])

    def restore(self, state: bytes) -> None:
        # The offset of the TSC lies among the state, but time has gone on since that was saved.
        offset = self._u64[self._state.tsc_offset]
        self._state.bytes[:STATE_BYTES] = state
        self._u64[self._state.tsc_offset] = offset
        self.flush_tlb()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for window in self._translation_windows:
            window.release()
        self.regs.release()
        self._crossing.close(self._slot)
        self._state.release()
        self._keep.clear()
        self._uc = None

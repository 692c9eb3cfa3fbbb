"""The private half of the Unicorn engine: QEMU's CPU state, reached directly because the documented API is too slow
(3 us a register) and too small (no CPL, no error code, CR3 cut to 32 bits).

Everything here depends on one build of one version, so nothing is taken on trust: each offset is found or checked
by what it does when the engine is opened, in a few milliseconds, and any surprise is one EngineError. The layout
is that of CPUX86State in QEMU 5.0's target/i386/cpu.h, from which Unicorn 2 was made.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from typing import Any

import unicorn
from unicorn import x86_const as x86

from pvirq.engine import crossing, unicorn_patches
from pvirq.engine.protocol import MANY_PAUSES, CpuidLeaf, EngineError
from pvirq.engine.unicorn_patches import CLOCK, COUNT, PAUSES, TICK_SHIFT

VERSION = "2.1.4"
M64 = (1 << 64) - 1

# struct CPUX86State, in bytes.
REGS, EIP, EFLAGS = 0, 128, 136
HFLAGS = 176
SEGMENTS = 184  # ES CS SS DS FS GS LDT TR, then GDT, IDT: {u32 selector; u64 base; u32 limit; u32 flags}
SEGMENT_SIZE = 24
LDT, TR, GDT = 6, 7, 8
CR0 = 424
CR2, CR3, CR4 = CR0 + 16, CR0 + 24, CR0 + 32

# In struct CPUState the pointer to its class, and in that the function called when the CPU loop is left.
_CPU_CLASS, _CPU_EXEC_EXIT = 0x81B0, 0x88

# The TLB lies in front of the CPU's state: {u16 dirty ...; 24 bytes of counts}, then for each of the three MMU indexes
# its descriptor, then for each {u64 mask; pointer to the entries}. Entries are of 64 bytes.
TLB_INDEXES = 3
TLB_DESCRIPTOR = 696
TLB_FAST = -64
TLB_DESCRIPTORS = TLB_FAST - 8 - TLB_INDEXES * TLB_DESCRIPTOR
TLB_DIRTY = TLB_DESCRIPTORS - 32
_TLB_ENTRY = 64

# In struct uc_struct the pointer to the TCGContext, and in that where the next translation goes.
_TCG_CONTEXT, _CODE_GEN_PTR = 0x300, 0xC0
# In struct CPUState, the blocks that were last executed, by a hash of their addresses.
_JUMP_CACHE, _JUMPS = 0x138, 4096

_PROBE_PAGE = 0x1000  # machine frames below FIRST_MFN are nobody's


class CpuState:
    """Views of the CPU state of one Unicorn instance, and the internal functions that pvirq calls."""

    def __init__(self, uc: Any, memory: memoryview) -> None:
        if unicorn.__version__ != VERSION:
            raise EngineError(
                f"unicorn {unicorn.__version__} is installed, but pvirq needs exactly {VERSION}: "
                f"pip install unicorn=={VERSION}"
            )
        from unicorn.unicorn_py3 import unicorn as binding

        self.lib = binding.uclib
        self.handle = ctypes.c_void_p(uc._uch.value)
        self._uc = uc
        self._memory = memory
        self._stubs: list[mmap.mmap] = []
        self._find_cpu()
        self._bind_functions()
        self._patch()
        self._disable_mid_block_exits()
        self._install_stop()
        self._find_exception_fields()
        self._find_tsc_offset()
        self._find_tlb()
        self._find_code_pointer()
        self._find_jumps()
        self._check()
        self._check_counting()

    # -- finding things ----------------------------------------------------------------------------------------

    def _find_cpu(self) -> None:
        get_cpu = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)(self._symbol("qemu_get_cpu_x86_64"))
        self.cpu = get_cpu(self.handle, -1)  # the one CPU has no index
        if not self.cpu:
            raise self._surprise("no CPU object")
        magic = [0x1122334455660000 + i * 0x101 for i in range(8)]
        for i, value in enumerate(magic):
            self._uc.reg_write(x86.UC_X86_REG_R8 + i, value)
        with open("/proc/self/mem", "rb", buffering=0) as mem:
            around = os.pread(mem.fileno(), 0x20000, self.cpu)
        at = around.find(struct.pack("<8Q", *magic))
        if at < 0:
            raise self._surprise("registers not found in the CPU state")
        for i in range(8):
            self._uc.reg_write(x86.UC_X86_REG_R8 + i, 0)
        self.env = self.cpu + at - 64
        whole = (ctypes.c_uint8 * 0x2000).from_address(self.env)
        self.bytes = memoryview(whole).cast("B")
        self.u32 = self.bytes.cast("I")
        self.u64 = self.bytes.cast("Q")

    def _symbol(self, name: str) -> int:
        """The address of an exported function."""
        try:
            address = ctypes.cast(getattr(self.lib, name), ctypes.c_void_p).value
        except AttributeError:
            raise self._surprise(f"{name} is not exported") from None
        assert address is not None
        return address

    def _bind_functions(self) -> None:
        def bind(name: str, *argtypes: Any, restype: Any = None) -> Any:
            # A fresh function object each time: the binding's own keep their types.
            return ctypes.CFUNCTYPE(restype, *argtypes)(self._symbol(name))

        pointer, u64 = ctypes.c_void_p, ctypes.c_uint64
        self.tlb_flush = bind("tlb_flush_x86_64", pointer)
        self.tlb_flush_page = bind("tlb_flush_page_x86_64", pointer, u64)
        self.update_cr0 = bind("cpu_x86_update_cr0_x86_64", pointer, ctypes.c_uint32)
        self.update_cr3 = bind("cpu_x86_update_cr3_x86_64", pointer, u64)
        self.get_tsc = bind("cpu_get_tsc_x86_64", pointer, restype=u64)
        self.invalidate_range = bind("tb_invalidate_phys_range_x86_64", pointer, u64, u64)
        self.emu_start = bind("uc_emu_start", pointer, u64, u64, u64, ctypes.c_size_t, restype=ctypes.c_int)
        self._cpu_exit = bind("cpu_exit", pointer)
        self.reg_read = bind("uc_reg_read", pointer, ctypes.c_int, pointer, restype=ctypes.c_int)

    def _patch(self) -> None:
        functions = (
            "helper_check_exit_request_x86_64", "helper_pause_x86_64", "cpu_get_tsc_x86_64", "cpu_get_ticks_x86_64",
            "cpu_exit",
        )  # fmt: skip
        bank = self.u64[COUNT // 8 - 1 : PAUSES // 8 + 2]  # with the control words of this bank and the next
        if not unicorn_patches.install(*map(self._symbol, functions)) or list(bank) != [M64, 0, 0, 0, M64]:
            raise self._surprise("no place to count")
        self.u32[PAUSES // 4] = MANY_PAUSES

    def stop(self) -> None:
        """End the run under way at the next block of code; from any thread."""
        self._stop_wanted.value = 1
        self._cpu_exit(self.cpu)

    def _install_stop(self) -> None:
        # uc_emu_stop from another thread won't do: as long as its flag is set, Unicorn runs no more than the first
        # callback of hooked instructions, and a system call that meets a stop would not happen. cpu_exit alone has
        # the CPU loop left between two blocks, and re-entered. So on the way out of it, on the CPU's own thread, a few
        # instructions set the flag: they stand where CPUClass.cpu_exec_exit pointed, and go on there.
        # Two more things end a run there: the last of so many blocks, and the last of so many PAUSEs, each of which
        # leaves the loop (do_pause). `pvirq.engine.unicorn_patches` counts both.
        original = struct.pack("<Q", self._symbol("x86_cpu_exec_exit_x86_64"))
        with open("/proc/self/mem", "rb", buffering=0) as mem:
            (cpu_class,) = struct.unpack("<Q", os.pread(mem.fileno(), 8, self.cpu + _CPU_CLASS))
            known = os.pread(mem.fileno(), 8, cpu_class + _CPU_EXEC_EXIT) == original
        emu_stop = ctypes.string_at(self._symbol("uc_emu_stop"), 48)
        at = emu_stop.find(b"\xc6\x87")  # mov byte ptr [rdi + disp32], imm8
        if not known or at < 0 or emu_stop[at + 6] != 1:
            raise self._surprise("no place for a stop")
        (stop_request,) = struct.unpack_from("<i", emu_stop, at + 2)
        self._stop_wanted = ctypes.c_uint8(0)
        assert self.handle.value is not None
        count, pauses = (struct.pack("<i", self.env - self.cpu + field) for field in (COUNT, PAUSES))
        code = (
            b"\x48\xb8" + struct.pack("<Q", ctypes.addressof(self._stop_wanted))  # mov rax, &stop_wanted
            + b"\x31\xc9\x86\x08\x84\xc9\x75\x13"  # xor ecx, ecx; xchg [rax], cl; test cl, cl; jnz stop
            + b"\x48\x83\xbf" + count + b"\x01\x74\x09"  # cmp qword [rdi + count], 1; je stop
            + b"\x83\xbf" + pauses + b"\x00\x75\x0d"  # cmp dword [rdi + pauses], 0; jne original
            + b"\x48\xb8" + struct.pack("<Q", self.handle.value + stop_request)  # stop: mov rax, &uc->stop_request
            + b"\xc6\x00\x01"  # mov byte ptr [rax], 1
            + b"\x48\xb8" + original + b"\xff\xe0"  # original: mov rax, original; jmp rax
        )  # fmt: skip
        ctypes.c_uint64.from_address(cpu_class + _CPU_EXEC_EXIT).value = self._native(code)
        # A run of two blocks, stopped from its first: the second must not begin, nor the stop be felt by the next run.
        syscall = x86.UC_X86_INS_SYSCALL
        hook = self._uc.hook_add(unicorn.UC_HOOK_INSN, lambda _uc, _data: self.stop(), None, 1, 0, syscall)
        self._snippet(b"\x0f\x05\x48\xff\xc0", rax=7)  # syscall; inc rax
        stopped = self._reg(x86.UC_X86_REG_RAX)
        self._uc.hook_del(hook)
        self._snippet(b"\xeb\x00\x48\xff\xc0", rax=7)  # jmp to what follows; inc rax
        if (stopped, self._reg(x86.UC_X86_REG_RAX)) != (7, 8):
            raise self._surprise("a run can't be stopped")

    def _native(self, code: bytes) -> int:
        """Put machine code where it can be executed, and return its address."""
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page[: len(code)] = code
        self._stubs.append(page)
        return ctypes.addressof(ctypes.c_uint8.from_buffer(page))

    def _disable_mid_block_exits(self) -> None:
        # A stop that is asked for from another thread is also seen after each load and store, where Unicorn leaves
        # the block and runs that instruction a second time: `lock inc` would count twice. With
        # uc_struct.no_exit_request set only the check at the start of a block remains, which is exact. The field
        # is the operand of the first compare in check_exit_request.
        code = ctypes.string_at(self._symbol("check_exit_request_x86_64"), 24)
        at = code.find(b"\x80\xbe")  # cmp byte ptr [rsi + disp32], imm8
        if at < 0 or code[at + 6] != 0:
            raise self._surprise("check_exit_request looks different")
        (offset,) = struct.unpack_from("<i", code, at + 2)
        if not 0 < offset < 0x1000:
            raise self._surprise("check_exit_request looks different")
        assert self.handle.value is not None
        ctypes.c_uint8.from_address(self.handle.value + offset).value = 1

    def _find_exception_fields(self) -> None:
        # error_code; exception_is_int; exception_next_eip; and, further on, old_exception, which QEMU clears on
        # delivery and Unicorn never: a second contributory fault would become #DF.
        seen: list[int] = []

        def note(uc: Any, vector: int, _data: object) -> None:
            seen.append(vector)
            uc.emu_stop()

        hook = self._uc.hook_add(unicorn.UC_HOOK_INTR, note)
        errors: set[int] = set(range(128, len(self.u32)))
        olds = set(errors)
        for selector in (0x7A58, 0x3B68):
            before = list(self.u32)
            self._snippet(b"\x8e\xd8", rax=selector)  # mov ds, ax: #GP(selector)
            errors &= {i for i in errors if self.u32[i] == selector}
            olds &= {i for i in olds if self.u32[i] == 13 and before[i] == 0xFFFFFFFF}
            for i in olds:
                self.u32[i] = 0xFFFFFFFF
        if len(errors) != 1 or len(olds) != 1 or seen != [13, 13]:
            raise self._surprise("exception fields not found")
        self.error_code, self.old_exception = errors.pop(), olds.pop()
        self.exception_is_int = self.error_code + 1
        before_int = self.u32[self.exception_is_int]
        self._snippet(b"\xcd\x2b")
        is_int = self.u32[self.exception_is_int]
        self._snippet(b"\x8e\xd8", rax=0x7A58)
        if (before_int, is_int, self.u32[self.exception_is_int], seen[2:]) != (0, 1, 0, [0x2B, 13]):
            raise self._surprise("exception_is_int not found")
        self.u32[self.old_exception] = 0xFFFFFFFF
        self._uc.hook_del(hook)

    def _find_tsc_offset(self) -> None:
        self.tsc_offset = (self.old_exception * 4 + 16) // 8  # old_exception, vm_vmcb, tsc_offset
        self.u64[self.tsc_offset] = 1 << 60
        self._snippet(b"\x0f\x31")  # rdtsc
        ahead = (self._reg(x86.UC_X86_REG_RAX) | self._reg(x86.UC_X86_REG_RDX) << 32) - self.get_tsc(self.env)
        self.u64[self.tsc_offset] = 0
        if abs(ahead - (1 << 60)) > 1 << 40:
            raise self._surprise("TSC offset not found")

    def _find_tlb(self) -> None:
        # `tlb_index[i]` are the two parts of an MMU index's TLB, `tlb_dirty` says of which of them there are entries.
        before = (ctypes.c_uint8 * -TLB_DIRTY).from_address(self.env + TLB_DIRTY)
        tlb = memoryview(before).cast("B")
        at, fast = TLB_DESCRIPTORS - TLB_DIRTY, TLB_FAST - TLB_DIRTY
        self.tlb_dirty = tlb[:8].cast("H")
        self.tlb_index = [
            (tlb[at + i * TLB_DESCRIPTOR : at + (i + 1) * TLB_DESCRIPTOR], tlb[fast + i * 16 : fast + (i + 1) * 16])
            for i in range(TLB_INDEXES)
        ]
        self._tlb_views = [tlb, *(part for parts in self.tlb_index for part in parts)]
        self.tlb_flush(self.cpu)
        clean = self.tlb_dirty[0]
        self._snippet(b"\x48\x8b\x01", rcx=_PROBE_PAGE)  # mov rax, [rcx]
        counts = [struct.unpack_from("<Q", descriptor, 32)[0] for descriptor, _ in self.tlb_index]
        used = [i for i in range(TLB_INDEXES) if counts[i]]
        for _, pair in self.tlb_index:
            mask, table = struct.unpack("<QQ", pair)
            if mask % _TLB_ENTRY or (mask + _TLB_ENTRY) & mask or not table:
                raise self._surprise("TLB not found")
        if clean or len(used) != 1 or self.tlb_dirty[0] != 1 << used[0]:
            raise self._surprise("TLB not found")

    def _find_code_pointer(self) -> None:
        # It moves with each translation.
        assert self.handle.value is not None
        context = ctypes.c_uint64.from_address(self.handle.value + _TCG_CONTEXT).value
        with open("/proc/self/mem", "rb", buffering=0) as mem:
            try:
                os.pread(mem.fileno(), 8, context + _CODE_GEN_PTR)
            except (OSError, OverflowError):
                raise self._surprise("no TCG context") from None
        self._code_pointer = ctypes.c_uint64.from_address(context + _CODE_GEN_PTR)
        self.code_pointer = memoryview(self._code_pointer).cast("B").cast("Q")
        for _ in range(2):
            before = self.code_pointer[0]
            self._snippet(b"\x48\xff\xc0")  # inc rax
            if not 0 < self.code_pointer[0] - before < 0x1000:
                raise self._surprise("translations go elsewhere")

    def _find_jumps(self) -> None:
        # Blocks in a row, 6 bytes apart: where they are among 4096 recent ones, by their addresses. The last isn't.
        self.tlb_flush(self.cpu)
        before = self.code_pointer[0]
        self._snippet((b"\xeb\x04" + b"\x90" * 4) * 2 + b"\x48\xff\xc0")
        recent = (ctypes.c_uint64 * _JUMPS).from_address(self.cpu + _JUMP_CACHE)
        blocks = {i: block for i, block in enumerate(recent) if block}
        if list(blocks) != [0x40, 0x46] or not all(
            before <= block < self.code_pointer[0]
            and ctypes.c_uint64.from_address(block).value == _PROBE_PAGE + i - 0x40
            for i, block in blocks.items()
        ):
            raise self._surprise("recent jumps not found")
        self.tlb_flush(self.cpu)
        if any(recent):
            raise self._surprise("recent jumps stay")

    def addresses(self) -> dict[int, int]:
        """Where things are that `pvirq.engine.crossing` works on, by its names."""
        env = self.env
        return {
            crossing.COMPUTE_FLAGS: self._symbol("helper_cc_compute_all_x86_64"),
            crossing.UPDATE_CR3: self._symbol("cpu_x86_update_cr3_x86_64"),
            crossing.FLUSH: self._symbol("tlb_flush_x86_64"),
            crossing.FLUSH_PAGE: self._symbol("tlb_flush_page_x86_64"),
            crossing.DESCRIPTORS: env + TLB_DESCRIPTORS,
            crossing.FAST: env + TLB_FAST,
            crossing.DIRTY: env + TLB_DIRTY,
            crossing.JUMPS: self.cpu + _JUMP_CACHE,
            crossing.CODE: ctypes.addressof(self._code_pointer),
            crossing.ERROR_CODE: env + self.error_code * 4,
            crossing.IS_INT: env + self.exception_is_int * 4,
            crossing.OLD_EXCEPTION: env + self.old_exception * 4,
            crossing.TSC_OFFSET: env + self.tsc_offset * 8,
        }

    def _check(self) -> None:
        """The fields taken from the header alone: each must change where the API changes it."""
        uc, u64 = self._uc, self.u64
        probes = [
            (x86.UC_X86_REG_RSP, REGS + 32), (x86.UC_X86_REG_RIP, EIP), (x86.UC_X86_REG_CR2, CR2),
            (x86.UC_X86_REG_FS_BASE, self.segment_field(4, 8)), (x86.UC_X86_REG_GS_BASE, self.segment_field(5, 8)),
        ]  # fmt: skip
        for register, offset in probes:
            saved, probe = uc.reg_read(register), 0x5A5A_1000 + register
            uc.reg_write(register, probe)
            if u64[offset // 8] != probe:
                raise self._surprise(f"register {register} is not at {offset}")
            uc.reg_write(register, saved)
        for register, offset in [(x86.UC_X86_REG_CR4, CR4), (x86.UC_X86_REG_CR0, CR0)]:
            if u64[offset // 8] != uc.reg_read(register):
                raise self._surprise(f"register {register} is not at {offset}")
        # EFLAGS, and behind it cc_dst, cc_src, cc_src2, cc_op, df.
        for flags, cc_src, df in ((0x446, 0x44, 0xFFFFFFFF), (0x202, 0, 1)):
            uc.reg_write(x86.UC_X86_REG_EFLAGS, flags)
            at = EFLAGS // 8
            found = (u64[at] & ~0xCD5, u64[at + 2], self.u32[EFLAGS // 4 + 8], self.u32[EFLAGS // 4 + 9])
            if found != (flags & ~0xCD5, cc_src, 1, df):
                raise self._surprise("RFLAGS are kept differently")
        if self.u32[HFLAGS // 4] & 3:
            raise self._surprise("CPL is not 0 at reset")

    def _check_counting(self) -> None:
        # Three blocks and the end of the run; then as many again, of which two are to be run.
        jumps = b"\x48\xff\xc0\xeb\x00" * 3 + b"\x48\xff\xc0"  # inc rax; jmp to what follows
        before = self.u64[COUNT // 8]
        self._snippet(jumps)
        counted, all_run = before - self.u64[COUNT // 8] & M64, self._reg(x86.UC_X86_REG_RAX)
        self.u64[COUNT // 8], self.u64[CLOCK // 8] = 3, 1003
        self._snippet(jumps)
        limited, tsc = self._reg(x86.UC_X86_REG_RAX), self.get_tsc(self.env)
        left, self.u64[COUNT // 8], self.u64[CLOCK // 8] = self.u64[COUNT // 8], 0, 0
        if not (counted in (4, 5) and all_run == 4 and limited == 2 and left == 1 and tsc == 1002 << TICK_SHIFT):
            raise self._surprise("blocks can't be counted")
        self.u32[PAUSES // 4] = 1
        self._snippet(b"\xf3\x90" + jumps)  # pause
        if self._reg(x86.UC_X86_REG_RAX) or self.u32[PAUSES // 4]:
            raise self._surprise("PAUSEs can't be counted")
        self.u32[PAUSES // 4] = MANY_PAUSES

    @staticmethod
    def segment_field(which: int, field: int) -> int:
        """Byte offset of a field in a segment's cache: 0 selector, 8 base, 16 limit, 20 flags."""
        return SEGMENTS + which * SEGMENT_SIZE + field

    def general_protection_stub(self) -> int:
        """Address of native code that raises #GP(0) at the instruction being executed; a callback for any hook.

        Unicorn lets port I/O through at any privilege and calls its hooks instead. They can't refuse: raising an
        exception leaves the translated code by longjmp, which must not cross Python's frames. Hence machine code:
        raise_exception_err_ra(env, 13, 0, 0). The CPU state is exact there, since Unicorn restores it for hooks.
        """
        raise_exception = self._symbol("raise_exception_err_ra_x86_64")
        code = (
            b"\x48\xbf" + struct.pack("<Q", self.env)  # mov rdi, env
            + b"\xbe\x0d\x00\x00\x00\x31\xd2\x31\xc9"  # mov esi, 13; xor edx, edx; xor ecx, ecx
            + b"\x48\xb8" + struct.pack("<Q", raise_exception)  # mov rax, raise_exception_err_ra
            + b"\x48\x83\xe4\xf0\xff\xd0"  # and rsp, -16; call rax
        )  # fmt: skip
        return self._native(code)

    # -- running a few bytes before there is a guest ---------------------------------------------------------------

    def _reg(self, register: int) -> int:
        return int(self._uc.reg_read(register))

    def _snippet(self, code: bytes, rax: int = 0, rcx: int = 0) -> None:
        self._memory[_PROBE_PAGE : _PROBE_PAGE + len(code)] = code
        # Not ctl_remove_cache, which takes a virtual address. That this works is seen in that each snippet runs,
        # and not the one before it at the same place.
        self.invalidate_range(self.handle, _PROBE_PAGE, _PROBE_PAGE + 64)
        self._uc.reg_write(x86.UC_X86_REG_RAX, rax)
        self._uc.reg_write(x86.UC_X86_REG_RCX, rcx)
        self._uc.emu_start(_PROBE_PAGE, _PROBE_PAGE + len(code))
        self._memory[_PROBE_PAGE : _PROBE_PAGE + len(code)] = bytes(len(code))

    def cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf:
        """Run CPUID in this CPU."""
        self._snippet(b"\x0f\xa2", rax=leaf, rcx=subleaf)
        eax, ebx, ecx, edx = (
            self._reg(register) & 0xFFFFFFFF
            for register in (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RBX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX)
        )
        return eax, ebx, ecx, edx

    def release(self) -> None:
        """Free the instance; nothing here may be used afterwards."""
        for view in (self.code_pointer, self.tlb_dirty, *self._tlb_views, self.u32, self.u64, self.bytes):
            view.release()
        vars(self._uc)["_Uc__finalizer"]()  # uc_close, without waiting for the cycles that its hooks make

    @staticmethod
    def _surprise(what: str) -> EngineError:
        return EngineError(
            f"this build of unicorn {unicorn.__version__} is not the one that pvirq knows ({what}): "
            f"reinstall it from its wheel with pip install --force-reinstall unicorn=={VERSION}"
        )

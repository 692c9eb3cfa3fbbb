"""What a CPU engine is: registers, address spaces, and running guest code until something happens.

An engine executes 64-bit user-privilege (CPL 3) code over the host's machine memory with the page tables that
CR3 names. Everything that such code can't do by itself comes to the handler *while the guest is stopped at that
instruction*; the handler changes registers and memory as it likes and says where to go on. So an engine whose
CPU lives in this process (an emulator with callbacks) pays a function call for each, and one whose CPU exits to
its owner (KVM) calls the same handler from its run loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from pvirq.engine.notes import Calls, Site

# Indexes into Engine.regs: the order in which x86 encodes its registers, then the instruction pointer.
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
R8, R9, R10, R11, R12, R13, R14, R15 = range(8, 16)
RIP: Final = 16

# RFLAGS bits.
FLAG_CF: Final = 1 << 0
FLAG_ZF: Final = 1 << 6
FLAG_TF: Final = 1 << 8
FLAG_IF: Final = 1 << 9
FLAG_DF: Final = 1 << 10
FLAG_IOPL: Final = 3 << 12
FLAG_NT: Final = 1 << 14
FLAG_RF: Final = 1 << 16
FLAG_VM: Final = 1 << 17
FLAG_AC: Final = 1 << 18

# Exception vectors.
TRAP_DB: Final = 1
TRAP_BP: Final = 3
TRAP_UD: Final = 6
TRAP_NM: Final = 7
TRAP_DF: Final = 8
TRAP_NP: Final = 11
TRAP_SS: Final = 12
TRAP_GP: Final = 13
TRAP_PF: Final = 14
TRAP_AC: Final = 17

CpuidLeaf = tuple[int, int, int, int]  # EAX, EBX, ECX, EDX

# What the owner of a CPU keeps in its `Slot`, for crossings between kernel and user mode that it then needn't be asked
# about. Roots are frames; `WALK_ROOT` is the one in use, as an index of 64-bit items; `INFO`, `GDT` machine addresses.
(
    USER_MODE, KERNEL_ROOT, USER_ROOT, WALK_ROOT, OTHER_GS_BASE, KERNEL_SP, KERNEL_SS, SYSCALL_ENTRY, SYSCALL_MASKS,
    INFO, NMI_PENDING, NMI_MASKED, IOPL, ARCHITECTURAL_IOPL, GDT, SHORT_HYPERCALLS, FAULT_ENTRY, FAULT_MASKS,
    RUNSTATE_AREA, RUNSTATE, RUNSTATE_SINCE, RUNSTATE_TIMES,
) = range(22)  # fmt: skip
SLOT_ITEMS: Final = RUNSTATE_TIMES + 4

# SHORT_HYPERCALLS: the engine may do some by itself; it is to note them in `Engine.calls`.
SHORT, NOTED = 1, 2
MANY_PAUSES: Final = 0x7FFFFFFF  # more than a run has: no limit to `Engine.pauses`


class Slot:
    """Where one of several CPUs stays that take turns on an engine. The first items are its owner's."""

    __slots__ = ("address", "items")

    def __init__(self, items: memoryview, address: int) -> None:
        self.items = items  # of 64 bits
        self.address = address


class EngineError(Exception):
    """The engine can't be used, or lost control of its CPU. One line; says what to do where something can be done."""


class GuestHandler(Protocol):
    """Whoever owns the guest. Called on the thread that called Engine.run; an exception ends that run."""

    def syscall(self, rip: int, cs: int) -> int:
        """SYSCALL was executed; `rip` is the address after it, `cs` the selector of the code. Returns where to go on.

        No register is changed yet: what SYSCALL leaves in RCX, R11, CS and SS is the handler's business.
        """
        ...

    def exception(self, vector: int, error: int, rip: int, software: bool) -> int:
        """A fault or trap with its error code (0 where it has none). `software`: INT n or INT3 raised it.

        `rip` is what hardware would push. Returns where to go on. A page fault's address is in Engine.cr2.
        """
        ...

    def cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf:
        """CPUID was executed."""
        ...


class Engine(Protocol):
    """One CPU. Not thread-safe, except `stop`."""

    name: str
    handler: GuestHandler  # may be changed between runs
    regs: memoryview  # of 64-bit items: general registers and RIP, in place
    rflags: int
    cr3: int  # machine address of the root table; setting it flushes the TLB
    fs_base: int
    gs_base: int
    tsc_aux: int  # what RDTSCP puts in ECX
    cr0_ts: bool  # CR0.TS: the next FPU instruction raises #NM
    pauses: int  # a run ends by itself after so many PAUSEs; what is left of them
    stop_at: int | None  # counter value (`counter()`) at which a run ends by itself; None: no limit

    @property
    def control_flags(self) -> int:
        """RFLAGS without the arithmetic flags, which an emulator works out only when asked."""
        ...

    @property
    def cr2(self) -> int:
        """The address of the last page fault."""
        ...

    def switch_space(self, value: int, other: bool) -> None:
        """Set CR3 on the way between a guest's two address spaces, its kernel's and (`other`) its user's.

        Translations of the one that is left may stay until it is come back to, or until a flush; see `forget_space`.
        """
        ...

    def forget_space(self) -> None:
        """The address space that isn't in use may have changed: its translations must not be used again."""
        ...

    def swap_gs_base(self, value: int) -> int:
        """Set the GS base and return the one before."""
        ...

    def segment(self, which: int) -> int:
        """The selector in a segment register: 0 to 5 for ES, CS, SS, DS, FS, GS."""
        ...

    def set_code_stack(self, cs: int, code: int, ss: int, stack: int) -> None:
        """Load CS and SS with selectors and their 8-byte descriptors; the privilege level stays 3."""
        ...

    def set_segment(self, which: int, selector: int, descriptor: int) -> None:
        """Load ES, DS, FS or GS with a selector and its 8-byte descriptor (0: unusable, as the null selector)."""
        ...

    def set_gdt(self, base: int, limit: int) -> None:
        """Where the CPU looks for descriptors: a virtual address."""
        ...

    def set_ldt(self, base: int, limit: int) -> None:
        """The local descriptor table; limit 0 for none."""
        ...

    def flush_tlb(self) -> None:
        """Forget all translations."""
        ...

    def flush_page(self, va: int) -> None:
        """Forget the translation of one virtual page."""
        ...

    def invalidate_code(self, address: int, size: int) -> None:
        """Bytes at a machine address were changed behind the CPU's back, and may have been executed before."""
        ...

    @property
    def calls(self) -> Calls | None:
        """What it can note by itself where functions are watched; None: nothing, each call has to be told of."""
        ...

    def watch(self, va: int, callback: Callable[[], None], site: Site | None = None) -> Callable[[], None]:
        """Call `callback` whenever a jump, call or return leads to `va`, before the instruction there; with a `site`
        of `calls`, only for what isn't noted without.

        Registers but RIP are as they are then, and only to be read. The result takes the watch away.

        For a function's entry and a call's return address, which straight code doesn't come to. What may have been
        executed there before has to be told of with `invalidate_code`, also when the watch is taken away, or it goes on
        as it was.
        """
        ...

    def counter(self) -> int:
        """Ticks, which are what has been executed. The guest's TSC is derived from it: TSC = counter + offset."""
        ...

    def counter_hz(self) -> float:
        """Ticks of `counter` per second."""
        ...

    def set_counter(self, ticks: int) -> None:
        """Let the counter go on from there; between two runs."""
        ...

    def set_tsc_offset(self, offset: int) -> None:
        """What the guest's RDTSC adds to the counter."""
        ...

    def native_cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf:
        """What this CPU's own CPUID says, to be filtered by the owner."""
        ...

    def run(self) -> None:
        """Run the guest from regs[RIP] until `stop`, `stop_at`, or an exception of the handler's, which is raised.

        EngineError where the engine itself can't go on.
        """
        ...

    def stop(self) -> None:
        """End the current run at the next instruction boundary; from the handler or from any thread."""
        ...

    def fpu_state(self) -> bytes:
        """The x87 and SSE registers as FXSAVE64 writes them, 512 bytes."""
        ...

    def set_fpu_state(self, image: bytes) -> None:
        """Load what `fpu_state` returned, of an engine of any kind."""
        ...

    def slot(self) -> Slot:
        """Room for one more of the CPUs that take turns here; the first is for the one that there is."""
        ...

    def exchange(self, slot: Slot, handler: GuestHandler) -> None:
        """Another CPU's turn. One that has had none begins as this one was when the first exchange came.

        As long as nothing is flushed, each finds the translations of addresses that it left. The handler is the slot's
        owner, who needn't be called where its items say what is to be done; one that is set afterwards always is.
        """
        ...

    def reload_segments(self, slot: Slot) -> bool:
        """Load the data segments of the CPU that runs, `slot`'s, anew. False: nothing done, the owner has to."""
        ...

    def change_runstate(self, slot: Slot, state: int, now: int, write: bool) -> bool:
        """Note a CPU's new runstate; `write` it to the guest's memory too. False: not written, the owner has to."""
        ...

    def upcall(self, slot: Slot, target: int, rip: int) -> bool:
        """Push the frame of an event's callback, with `rip`, for the CPU that runs. False: nothing done, as above."""
        ...

    def save(self) -> bytes:
        """The CPU's whole architectural state, for `restore` on an engine of the same kind."""
        ...

    def restore(self, state: bytes) -> None:
        """Become the CPU that `save` saw, but for the TSC's offset, which stays: it is the clock's."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...

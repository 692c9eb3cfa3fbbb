"""The CPU engine, through its protocol alone."""

from __future__ import annotations

import gc
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import unicorn
from unicorn.unicorn_py3 import unicorn as binding

from enginelib import (
    ALL,
    CODE,
    CODE32,
    CODE_PA,
    DATA,
    DATA_PA,
    FLAT,
    GDT_PA,
    NX,
    PRESENT,
    RW,
    STACK,
    SYSCALL,
    TABLES_PA,
    USER,
    Bench,
)
from pvirq.engine import EngineError, open_engine
from pvirq.engine.protocol import (
    FLAG_TF,
    R8,
    RAX,
    RBX,
    RCX,
    RDX,
    RIP,
    RSP,
    TRAP_BP,
    TRAP_DB,
    TRAP_GP,
    TRAP_NM,
    TRAP_PF,
    TRAP_UD,
    CpuidLeaf,
)

DATA_FLAGS = ALL | NX
UD2, INT3, HLT = b"\x0f\x0b", b"\xcc", b"\xf4"
SPIN = b"\xeb\xfe"


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


# -- what reaches the handler ------------------------------------------------------------------------------------------


def test_syscall_comes_with_the_address_behind_it(bench: Bench) -> None:
    assert bench.run(b"\x90" + SYSCALL + UD2) == [("syscall", CODE + 3)]
    assert bench.regs[RIP] == CODE + 3
    assert bench.run() == [("exception", TRAP_UD, 0, CODE + 3, False)]


def test_the_handler_says_where_to_go_on(bench: Bench) -> None:
    bench.put(UD2, CODE + 0x800)
    bench.on_syscall = lambda rip: CODE + 0x800
    assert bench.run(SYSCALL + INT3) == [
        ("syscall", CODE + 2),
        ("exception", TRAP_UD, 0, CODE + 0x800, False),
    ]


@pytest.mark.parametrize(
    ("code", "event"),
    [
        (UD2, ("exception", TRAP_UD, 0, CODE, False)),
        (INT3, ("exception", TRAP_BP, 0, CODE + 1, True)),
        (b"\xcd\x80", ("exception", 0x80, 0, CODE + 2, True)),
        (b"\xcd\x0d", ("exception", 13, 0, CODE + 2, True)),
        (HLT, ("exception", TRAP_GP, 0, CODE, False)),
        (b"\xfa", ("exception", TRAP_GP, 0, CODE, False)),  # cli
        (b"\xe6\x80", ("exception", TRAP_GP, 0, CODE, False)),  # out 0x80, al
        (b"\xec", ("exception", TRAP_GP, 0, CODE, False)),  # in al, dx
        (b"\x0f\x20\xd8", ("exception", TRAP_GP, 0, CODE, False)),  # mov rax, cr3
        (b"\x0f\x32", ("exception", TRAP_GP, 0, CODE, False)),  # rdmsr
        (b"\x31\xc9\xf7\xf1", ("exception", 0, 0, CODE + 2, False)),  # div by zero
        (b"\xb8\x48\x03\x00\x00\x8e\xd8", ("exception", TRAP_GP, 0x348, CODE + 5, False)),  # mov ds, an empty selector
        (b"\xb8\x30\x10\x00\x00\x8e\xd8", ("exception", TRAP_GP, 0x1030, CODE + 5, False)),  # beyond the GDT
        (b"\xb8\x0c\x00\x00\x00\x8e\xd8", ("exception", TRAP_GP, 0xC, CODE + 5, False)),  # without an LDT
    ],
)
def test_faults(bench: Bench, code: bytes, event: tuple[object, ...]) -> None:
    assert bench.run(code) == [event]


def test_a_fault_again_and_again_is_no_double_fault(bench: Bench) -> None:
    for _ in range(3):
        assert bench.run(HLT) == [("exception", TRAP_GP, 0, CODE, False)]
        assert bench.run(b"\x8b\x07", rdi=0x1000)[0][1] == TRAP_PF


@pytest.mark.parametrize(
    ("code", "flags", "error"),
    [
        (b"\x48\x8b\x07", 0, 4),  # read; not present
        (b"\x48\x89\x07", 0, 6),  # write; not present
        (b"\x48\x8b\x07", PRESENT | RW, 5),  # not for user privilege
        (b"\x48\x89\x07", PRESENT | USER, 7),  # write to a read-only page
        (b"\xff\xe7", ALL | NX, 0x15),  # fetch from a page without code
        (b"\xff\xe7", 0, 0x14),
    ],
)
def test_page_faults(bench: Bench, code: bytes, flags: int, error: int) -> None:
    va = DATA + 0x5008
    bench.map(va & ~0xFFF, DATA_PA + 0x5000, flags)
    rip = va if code == b"\xff\xe7" else CODE
    assert bench.run(code, rdi=va) == [("exception", TRAP_PF, error, rip, False)]
    assert bench.engine.cr2 == va


def test_a_page_fault_that_is_mended_is_retried(bench: Bench) -> None:
    va = DATA + 0x100000

    def mend(vector: int, error: int, rip: int, software: bool) -> int:
        bench.map(bench.engine.cr2 & ~0xFFF, DATA_PA, DATA_FLAGS)
        return rip

    bench.on_exception = mend
    # An access across the border of two pages: both faults, then the value, whole.
    bench.memory[DATA_PA : DATA_PA + 4] = b"ABCD"
    bench.memory[DATA_PA + 0xFFC : DATA_PA + 0x1000] = b"abcd"
    events = bench.run(b"\x48\x8b\x07" + SYSCALL, rdi=va + 0xFFC)
    while events[-1][0] != "syscall":
        events += bench.run()
    assert [event[:3] for event in events[:-1]] == [("exception", TRAP_PF, 4)] * 2
    assert struct.pack("<Q", bench.regs[RAX]) == b"abcdABCD"


def test_single_step(bench: Bench) -> None:
    bench.engine.rflags |= FLAG_TF
    assert bench.run(b"\x90\x90" + UD2) == [("exception", TRAP_DB, 0, CODE + 1, False)]


def test_fpu_under_task_switched(bench: Bench) -> None:
    code = b"\x0f\x6e\xc0" + SYSCALL  # movd mm0, eax
    bench.engine.cr0_ts = True
    assert bench.engine.cr0_ts
    assert bench.run(code) == [("exception", TRAP_NM, 0, CODE, False)]
    bench.engine.cr0_ts = False
    assert bench.run() == [("syscall", CODE + 5)]


def test_cpuid(bench: Bench) -> None:
    bench.on_cpuid = lambda leaf, subleaf: (0x80000001, 2, 3, 0xFFFFFFFF)
    events = bench.run(b"\x0f\xa2" + SYSCALL, rax=0xFFFFFFFF_40000000, rcx=0xFFFFFFFF_00000007, rbx=-1, rdx=-1)
    assert events == [("cpuid", 0x40000000, 7), ("syscall", CODE + 4)]
    assert [bench.regs[i] for i in (RAX, RBX, RCX, RDX)] == [0x80000001, 2, 3, 0xFFFFFFFF]


def test_native_cpuid(bench: Bench) -> None:
    top, *vendor = bench.engine.native_cpuid(0, 0)
    assert top >= 7
    assert len(struct.pack("<3I", vendor[0], vendor[2], vendor[1]).decode("ascii")) == 12
    assert bench.engine.native_cpuid(1, 0)[3] & 1 << 26  # SSE2, which any 64-bit CPU has


@pytest.mark.parametrize("where", ["syscall", "exception", "cpuid"])
def test_an_exception_of_the_handlers_comes_out_of_run(bench: Bench, where: str) -> None:
    class Oops(Exception):
        pass

    def fail(*_arguments: object) -> int:
        raise Oops(where)

    setattr(bench, f"on_{where}", fail)
    code = {"syscall": SYSCALL, "exception": UD2, "cpuid": b"\x0f\xa2" + SYSCALL}[where]
    with pytest.raises(Oops, match=where):
        bench.run(code)
    setattr(bench, f"on_{where}", None)
    assert bench.run(b"\x90" + SYSCALL) == [("syscall", CODE + 3)]


def test_registers_and_flags_in_place(bench: Bench) -> None:
    for i in range(16):
        if i != RSP:
            bench.regs[i] = 0x1111_0000_0000_0000 * i + i
    bench.run(b"\x4d\x01\xc9\xf9\xfd" + SYSCALL)  # add r9, r9; stc; std
    assert bench.regs[9] == (0x1111_0000_0000_0000 * 9 + 9) * 2 & (1 << 64) - 1
    assert bench.regs[8] == 0x1111_0000_0000_0000 * 8 + 8
    assert bench.engine.rflags & 0x401 == 0x401
    bench.engine.rflags = 0x202
    bench.run(b"\x0f\x92\xc0" + SYSCALL)  # setc al
    assert bench.regs[RAX] & 0xFF == 0


# -- segments ----------------------------------------------------------------------------------------------------------


def test_a_32_bit_code_segment_decodes_32_bit_code(bench: Bench) -> None:
    # dec eax, inc eax, push eax there; REX.W inc rax, push rax here.
    code = b"\x48\xff\xc0\x50\xcd\x30"
    stack = STACK - 0x100
    bench.run(code, rax=5, rsp=stack)
    assert (bench.regs[RAX], bench.regs[RSP]) == (6, stack - 8)
    bench.engine.set_code_stack(0x23, CODE32, 0x2B, FLAT)
    assert (bench.engine.segment(1), bench.engine.segment(2)) == (0x23, 0x2B)
    assert bench.run(code, rax=5, rsp=stack) == [("exception", 0x30, 0, CODE + 6, True)]
    assert (bench.regs[RAX], bench.regs[RSP]) == (5, stack - 4)
    bench.engine.set_code_stack(0x33, CODE64, 0x2B, FLAT)
    bench.run(code, rax=5, rsp=stack)
    assert (bench.regs[RAX], bench.regs[RSP]) == (6, stack - 8)


CODE64 = 0x00AF_FB00_0000_FFFF


def _segment(base: int, limit: int) -> int:
    """A data descriptor of DPL 3 with byte granularity."""
    return limit & 0xFFFF | (base & 0xFFFFFF) << 16 | 0xF3 << 40 | (limit >> 16) << 48 | 0x4 << 52 | (base >> 24) << 56


def test_segment_bases_and_limits(bench: Bench) -> None:
    bench.memory[DATA_PA + 0x120 : DATA_PA + 0x128] = b"segments"
    load = b"\x64\x48\x8b\x04\x25\x20\x00\x00\x00" + SYSCALL  # mov rax, fs:[0x20]
    bench.engine.set_segment(4, 0x3B, _segment(DATA + 0x100, 0xFF))
    assert bench.engine.fs_base == DATA + 0x100
    bench.run(load)
    assert struct.pack("<Q", bench.regs[RAX]) == b"segments"
    bench.engine.fs_base = DATA + 0xF8
    bench.memory[DATA_PA + 0x118 : DATA_PA + 0x120] = b"otherone"
    bench.run(load)
    assert struct.pack("<Q", bench.regs[RAX]) == b"otherone"
    # Loaded by the guest, from the GDT.
    bench.u64[(GDT_PA + 0x40) // 8] = _segment(DATA + 0x100, 0xFF)
    bench.run(b"\xb8\x43\x00\x00\x00\x8e\xe8\x65\x48\x8b\x04\x25\x20\x00\x00\x00" + SYSCALL)  # mov gs, 0x43
    assert struct.pack("<Q", bench.regs[RAX]) == b"segments"
    assert (bench.engine.segment(5), bench.engine.gs_base) == (0x43, DATA + 0x100)


def test_descriptors_from_the_ldt(bench: Bench) -> None:
    ldt = DATA + 0x2000
    bench.map(ldt, DATA_PA + 0x2000, PRESENT | RW)
    bench.u64[(DATA_PA + 0x2008) // 8] = _segment(DATA + 0x100, 0xFF)
    code = b"\xb8\x0f\x00\x00\x00\x8e\xe8" + SYSCALL  # mov gs, 0xf
    assert bench.run(code)[0][:3] == ("exception", TRAP_GP, 0xC)
    bench.engine.set_ldt(ldt, 0xF)
    assert bench.run(code) == [("syscall", CODE + 9)]
    assert bench.engine.gs_base == DATA + 0x100
    bench.engine.set_ldt(ldt, 0x7)
    assert bench.run(code)[0][:3] == ("exception", TRAP_GP, 0xC)


# -- translations and code ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", ["flush_tlb", "flush_page", "cr3"])
def test_translations_are_kept_until_flushed(bench: Bench, flush: str) -> None:
    load = b"\x8a\x07" + SYSCALL  # mov al, [rdi]
    bench.memory[DATA_PA + 0x7000], bench.memory[DATA_PA + 0x8000] = 1, 2
    va = DATA + 0x7000
    bench.run(load, rdi=va)
    bench.map(va, DATA_PA + 0x8000, DATA_FLAGS)
    bench.run(load, rdi=va)
    assert bench.regs[RAX] & 0xFF == 1
    if flush == "flush_tlb":
        bench.engine.flush_tlb()
    elif flush == "flush_page":
        bench.engine.flush_page(va)
    else:
        bench.engine.cr3 = bench.engine.cr3
    bench.run(load, rdi=va)
    assert bench.regs[RAX] & 0xFF == 2
    # And a right that was taken away.
    bench.map(va, DATA_PA + 0x8000, 0)
    bench.engine.flush_page(va)
    assert bench.run(load, rdi=va)[0][1] == TRAP_PF


def second_space(bench: Bench) -> tuple[int, int]:
    """A copy of the page tables; its root, and where its level-1 entries for DATA begin, in 64-bit items."""
    pa = DATA_PA + 0x100000
    tables = [TABLES_PA]
    for shift in (39, 30, 21):
        tables.append(bench.u64[tables[-1] // 8 + (DATA >> shift & 511)] & ~0xFFF)
    for i, table in enumerate(tables):
        bench.memory[pa + i * 0x1000 : pa + (i + 1) * 0x1000] = bytes(bench.memory[table : table + 0x1000])
    for i, shift in enumerate((39, 30, 21)):
        bench.u64[(pa + i * 0x1000) // 8 + (DATA >> shift & 511)] = pa + (i + 1) * 0x1000 | ALL
    return pa, (pa + 0x3000) // 8


@pytest.mark.parametrize("flush", ["flush_tlb", "flush_page", "cr3", "forget_space", "save"])
def test_two_spaces_keep_their_translations(bench: Bench, flush: str) -> None:
    load, va = b"\x8a\x07" + SYSCALL, DATA + 0x7000  # mov al, [rdi]
    other, entries = second_space(bench)
    for i in range(4):
        bench.memory[DATA_PA + 0x7000 + i * 0x1000] = i + 1

    def map_both(first: int) -> None:
        bench.map(va, DATA_PA + 0x7000 + first * 0x1000, DATA_FLAGS)
        bench.u64[entries + (va >> 12 & 511)] = DATA_PA + 0x8000 + first * 0x1000 | DATA_FLAGS

    def loaded(root: int) -> int:
        if bench.engine.cr3 != root:
            bench.engine.switch_space(root, root == other)
        bench.run(rip=CODE, rdi=va)
        return bench.regs[RAX] & 0xFF

    bench.put(load)
    map_both(0)
    loaded(TABLES_PA), loaded(other)  # has the code translated in both: with that, translations are dropped
    assert [loaded(root) for root in (TABLES_PA, other, TABLES_PA)] == [1, 2, 1]
    map_both(2)
    assert [loaded(root) for root in (other, TABLES_PA)] == [2, 1]
    if flush == "flush_tlb":
        bench.engine.flush_tlb()
    elif flush == "flush_page":
        bench.engine.flush_page(va)
    elif flush == "cr3":
        bench.engine.cr3 = bench.engine.cr3
    elif flush == "save":
        bench.engine.restore(bench.engine.save())
    else:
        assert loaded(TABLES_PA) == 1
        bench.engine.forget_space()
    assert [loaded(root) for root in (other, TABLES_PA)] == [4, 3]


def test_two_spaces_keep_their_code(bench: Bench) -> None:
    """The same address, other code behind it; and a jump to where only one of them has any."""
    other, entries = second_space(bench)
    at = DATA + 0x3000
    for pa, value in ((DATA_PA + 0x3000, 1), (DATA_PA + 0x4000, 2)):
        bench.memory[pa : pa + 4] = b"\xb0" + bytes([value]) + SYSCALL  # mov al, value
        bench.engine.invalidate_code(pa, 4)
    bench.map(at, DATA_PA + 0x3000)
    bench.map(at + 0x1000, DATA_PA + 0x3000)
    bench.u64[entries + (at >> 12 & 511)] = DATA_PA + 0x4000 | ALL
    bench.u64[entries + (at >> 12 & 511) + 1] = 0
    for root, value in [(TABLES_PA, 1), (other, 2)] * 3:
        if bench.engine.cr3 != root:
            bench.engine.switch_space(root, root == other)
        bench.regs[RIP] = at
        assert bench.run()[0][0] == "syscall"
        assert bench.regs[RAX] & 0xFF == value
        bench.regs[RIP] = at + 0x1000
        assert bench.run()[0][:2] == (("syscall", at + 0x1004) if root == TABLES_PA else ("exception", TRAP_PF))
    # Code that is changed is changed in both.
    bench.u64[entries + (at >> 12 & 511)] = DATA_PA + 0x3000 | ALL
    bench.engine.flush_tlb()
    for value in (5, 6):
        bench.memory[DATA_PA + 0x3001] = value
        bench.engine.invalidate_code(DATA_PA + 0x3000, 4)
        for root in (TABLES_PA, other):
            if bench.engine.cr3 != root:
                bench.engine.switch_space(root, root == other)
            bench.regs[RIP] = at
            bench.run()
            assert bench.regs[RAX] & 0xFF == value


def test_code_is_written_in_one_space_and_run_in_the_other(bench: Bench) -> None:
    """At different addresses, as a kernel loads a program's page; again and again, without a flush in between."""
    other, entries = second_space(bench)
    write, at = DATA + 0x3000, DATA + 0x9000
    bench.memory[DATA_PA + 0x3000 : DATA_PA + 0x3004] = b"\xb0\x00" + SYSCALL  # mov al, 0
    bench.u64[entries + (at >> 12 & 511)] = DATA_PA + 0x3000 | ALL
    bench.put(b"\x40\x88\x37" + SYSCALL)  # mov [rdi], sil
    for value in range(1, 8):
        if bench.engine.cr3 != TABLES_PA:
            bench.engine.switch_space(TABLES_PA, False)
        bench.run(rip=CODE, rdi=write + 1, rsi=value)
        bench.engine.switch_space(other, True)
        for _ in range(value):
            bench.run(rip=at)
            assert bench.regs[RAX] & 0xFF == value


def test_code_that_the_guest_patches_itself(bench: Bench) -> None:
    # mov byte [rip+3], 7; jmp over nothing; mov al, 1 -> the immediate is patched before it runs.
    code = b"\xc6\x05\x03\x00\x00\x00\x07\xeb\x00\xb0\x01" + SYSCALL
    for _ in range(2):
        bench.run(code)
        assert bench.regs[RAX] & 0xFF == 7


def test_code_that_is_changed_behind_the_cpus_back(bench: Bench) -> None:
    for value in (1, 2, 3):
        bench.run(b"\xb0" + bytes([value]) + SYSCALL)
        assert bench.regs[RAX] & 0xFF == value


# A loop that calls the function at CODE + 0x40 RCX times, then SYSCALL; the function adds 1 to RBX.
CALLS = b"\xe8\x3b\x00\x00\x00\x48\xff\xc9\x75\xf6" + SYSCALL
FUNCTION = CODE + 0x40
CALLED = b"\x48\xff\xc3\xc3"


def test_a_watched_function(bench: Bench) -> None:
    """Each call is seen with its registers, also where the code was translated before; and none after the end."""
    seen: list[int] = []
    bench.put(CALLED, FUNCTION)
    bench.run(CALLS, rcx=3, rbx=0)
    remove = bench.engine.watch(FUNCTION, lambda: seen.append(bench.regs[RBX]))
    bench.engine.invalidate_code(FUNCTION - CODE + CODE_PA, 1)
    bench.regs[RIP] = CODE
    bench.run(rcx=3)
    assert seen == [3, 4, 5]
    remove()
    bench.engine.invalidate_code(FUNCTION - CODE + CODE_PA, 1)
    bench.regs[RIP] = CODE
    bench.run(rcx=3)
    assert seen == [3, 4, 5]
    assert bench.regs[RBX] == 9


def test_a_watch_that_is_taken_away_is_silent_at_once(bench: Bench) -> None:
    seen: list[int] = []
    remove = bench.engine.watch(FUNCTION, lambda: seen.append(1))
    bench.put(CALLED, FUNCTION)
    bench.run(CALLS, rcx=2, rbx=0)
    remove()
    bench.regs[RIP] = CODE
    bench.run(rcx=2)
    assert (seen, bench.regs[RBX]) == ([1, 1], 4)


def test_a_return_address_is_watched_from_within(bench: Bench) -> None:
    """A watch may be set while the guest runs, on what is translated already."""
    seen: list[str] = []

    def entry() -> None:
        seen.append("in")
        if seen == ["in"]:
            bench.engine.watch(CODE + 5, lambda: seen.append("out"))
            bench.engine.invalidate_code(CODE_PA + 5, 1)

    bench.put(CALLED, FUNCTION)
    bench.run(CALLS, rcx=2, rbx=0)
    bench.engine.watch(FUNCTION, entry)
    bench.engine.invalidate_code(FUNCTION - CODE + CODE_PA, 1)
    bench.regs[RIP] = CODE
    bench.run(rcx=3)
    assert seen == ["in", "out"] * 3


def test_stops_repeat_no_watch(bench: Bench) -> None:
    """A run that ends at a watched address tells of it once, however often it is stopped there."""
    calls, done = 0, threading.Event()

    def count() -> None:
        nonlocal calls
        calls += 1

    bench.put(CALLED, FUNCTION)
    bench.engine.watch(FUNCTION, count)

    def stopper() -> None:
        while not done.is_set():
            bench.engine.stop()
            time.sleep(0.0001)

    thread = threading.Thread(target=stopper)
    thread.start()
    try:
        bench.run(CALLS, rcx=300_000, rbx=0)
    finally:
        done.set()
        thread.join()
    assert (calls, bench.regs[RBX]) == (300_000, 300_000)


def test_an_exception_of_a_watch_comes_out_of_run(bench: Bench) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    bench.put(CALLED, FUNCTION)
    bench.engine.watch(FUNCTION, broken)
    with pytest.raises(ZeroDivisionError):
        bench.run(CALLS, rcx=1, rbx=0)


@pytest.mark.parametrize("bit", [30, 38])
def test_a_machine_address_without_memory_is_not_cut_to_one_that_has(bench: Bench, bit: int) -> None:
    bench.map(DATA + 0x9000, 1 << bit | DATA_PA, DATA_FLAGS)
    bench.memory[DATA_PA : DATA_PA + 8] = b"\xaa" * 8
    with pytest.raises(EngineError, match="memory"):
        bench.run(b"\x48\x8b\x07" + SYSCALL, rdi=DATA + 0x9000, rax=1)
    assert bench.regs[RAX] == 1


# -- stopping ----------------------------------------------------------------------------------------------------------

# lock inc qword [rdi]; inc rax; xchg-and-add through memory; push/pop; dec rcx; jnz
COUNT = (
    b"\xf0\x48\xff\x07"  # lock inc qword [rdi]
    b"\x48\xff\xc0"  # inc rax
    b"\x48\x83\x47\x08\x01"  # add qword [rdi+8], 1
    b"\xba\x01\x00\x00\x00"  # mov edx, 1
    b"\xf0\x48\x0f\xc1\x57\x10"  # lock xadd [rdi+16], rdx
    b"\x50\x58"  # push rax; pop rax
    b"\x48\xff\xc9"  # dec rcx
    b"\x75\xe2"  # jnz
) + SYSCALL


def test_stops_from_another_thread_repeat_no_instruction(bench: Bench) -> None:
    rounds = 40_000_000
    bench.put(COUNT)
    bench.regs[RIP], bench.regs[RCX], bench.regs[RAX], bench.regs[7] = CODE, rounds, 0, DATA
    done = threading.Event()
    stops = 0

    def stop() -> None:
        nonlocal stops
        while not done.is_set():
            bench.engine.stop()
            stops += 1
            time.sleep(0.00002)

    thread = threading.Thread(target=stop)
    thread.start()
    runs = 0
    try:
        while not bench.events:
            bench.engine.run()
            runs += 1
    finally:
        done.set()
        thread.join()
    assert min(runs, stops) > 200
    assert bench.regs[RAX] == rounds
    assert [bench.u64[DATA_PA // 8 + i] for i in range(3)] == [rounds] * 3
    assert bench.regs[RSP] == STACK - 0x100


def test_stop_at_repeats_no_instruction(bench: Bench) -> None:
    rounds = 3_000_000
    bench.put(COUNT)
    bench.regs[RIP], bench.regs[RCX], bench.regs[RAX], bench.regs[7] = CODE, rounds, 0, DATA
    runs = 0
    rng = random.Random(1)
    while not bench.events:
        bench.engine.stop_at = bench.engine.counter() + rng.randrange(200_000)
        bench.engine.run()
        runs += 1
    assert runs > 20
    assert bench.regs[RAX] == rounds
    assert [bench.u64[DATA_PA // 8 + i] for i in range(3)] == [rounds] * 3


def test_a_repeated_string_instruction_survives_stops(bench: Bench) -> None:
    # rep stosb over 60 KiB, again and again, stopped amid: every byte once, RDI at the end.
    bench.put(b"\xf3\xaa" + SYSCALL)
    for value in range(1, 120):
        bench.regs[RIP], bench.regs[RCX], bench.regs[RAX], bench.regs[7] = CODE, 60_000, value, DATA
        bench.events.clear()
        while not bench.events:
            bench.engine.stop_at = bench.engine.counter() + 20_000
            bench.engine.run()
        assert bench.regs[7] == DATA + 60_000
        assert bench.regs[RCX] == 0
        assert bytes(bench.memory[DATA_PA : DATA_PA + 60_001]) == bytes([value]) * 60_000 + b"\0"


def test_stops_skip_nothing_that_goes_to_the_handler(bench: Bench) -> None:
    """SYSCALL, CPUID, port I/O and software interrupts under asynchronous stops: none is left out or comes twice."""
    rounds = 30_000
    counts = {"syscall": 0, "cpuid": 0, "in": 0, "int": 0}

    def syscall(rip: int) -> int:
        counts["syscall"] += 1
        return rip

    def cpuid(leaf: int, subleaf: int) -> CpuidLeaf:
        counts["cpuid"] += 1
        return 0x1234, 0, 0, 0

    def exception(vector: int, error: int, rip: int, software: bool) -> int:
        if vector == 0x2E:  # the end
            bench.engine.stop()
            return rip
        counts["int" if software else "in"] += 1
        bench.events.clear()
        return rip if software else rip + 1  # behind IN

    bench.on_syscall, bench.on_cpuid, bench.on_exception = syscall, cpuid, exception
    bench.put(
        b"\x0f\x05"  # syscall
        b"\x0f\xa2\x3d\x34\x12\x00\x00\x75\x09"  # cpuid; cmp eax, 0x1234; jne to the end
        b"\xec"  # in al, dx
        b"\xcd\x21"  # int 0x21
        b"\x49\xff\xc8"  # dec r8
        b"\x75\xed"  # jnz
        b"\x90\xcd\x2e"  # int 0x2e
    )
    bench.regs[RIP], bench.regs[R8] = CODE, rounds
    done = threading.Event()

    def stop() -> None:
        while not done.is_set():
            bench.engine.stop()
            time.sleep(0.00001)

    thread = threading.Thread(target=stop)
    thread.start()
    rng = random.Random(3)
    runs = 0
    try:
        while ("exception", 0x2E) not in [event[:2] for event in bench.events]:
            bench.events.clear()
            bench.engine.stop_at = bench.engine.counter() + rng.randrange(100_000)
            bench.engine.run()
            runs += 1
    finally:
        done.set()
        thread.join()
    assert bench.regs[R8] == 0
    assert counts == dict.fromkeys(counts, rounds)
    assert runs > 20


def test_stop_at_is_a_time(bench: Bench) -> None:
    engine = bench.engine
    ms = int(engine.counter_hz() / 1000)
    bench.put(SPIN)
    for _ in range(10):
        bench.regs[RIP] = CODE
        engine.stop_at = engine.counter() + 5 * ms
        engine.run()
        assert engine.counter() == engine.stop_at
    engine.stop_at = engine.counter() - ms  # already past
    start = engine.counter()
    engine.run()
    assert engine.counter() == start


def test_a_run_ends_by_itself_in_the_end(bench: Bench) -> None:
    engine = bench.engine
    engine.stop_at = None
    bench.put(SPIN)
    bench.regs[RIP], start = CODE, engine.counter()
    engine.run()
    assert engine.counter() - start == 50 * int(engine.counter_hz() / 1000)


def test_stop_at_may_be_set_from_the_handler(bench: Bench) -> None:
    engine = bench.engine
    ms = int(engine.counter_hz() / 1000)
    engine.stop_at = None

    def soon(rip: int) -> int:
        engine.stop_at = engine.counter() + 2 * ms
        return rip

    bench.on_syscall = soon
    start = engine.counter()
    bench.run(SYSCALL + SPIN)
    assert 2 * ms <= engine.counter() - start < 200 * ms


def test_stop_from_the_handler_is_at_once(bench: Bench) -> None:
    assert bench.run(SYSCALL + b"\x48\xff\xc0" + SYSCALL, rax=0) == [("syscall", CODE + 2)]
    assert bench.regs[RAX] == 0


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 123_456_789, -(1 << 30), 1 << 62])
def test_rdtsc_is_counter_plus_offset(bench: Bench, offset: int) -> None:
    engine = bench.engine
    engine.set_tsc_offset(offset)
    before = engine.counter()
    bench.run(b"\x0f\x31" + SYSCALL)
    after = engine.counter()
    tsc = bench.regs[RAX] | bench.regs[RDX] << 32
    assert before <= (tsc - offset) & (1 << 64) - 1 <= after


def test_the_offset_is_the_clocks_not_the_saved_cpus(bench: Bench) -> None:
    """Time goes on while a CPU's state lies aside: two vCPUs on one engine see one clock."""
    engine = bench.engine
    engine.set_tsc_offset(1 << 50)
    state = engine.save()
    engine.set_tsc_offset(1 << 51)
    engine.restore(state)
    bench.run(b"\x0f\x31" + SYSCALL)
    assert bench.regs[RAX] | bench.regs[RDX] << 32 >= 1 << 51


def test_time_stands_still_while_nothing_is_executed(bench: Bench) -> None:
    first = bench.engine.counter()
    time.sleep(0.01)
    assert bench.engine.counter() == first


# -- the whole state ---------------------------------------------------------------------------------------------------


def test_save_and_restore(bench: Bench) -> None:
    engine = bench.engine
    rng = random.Random(2)
    for i in range(16):
        bench.regs[i] = STACK - 0x200 if i == RSP else rng.getrandbits(64)
    bench.regs[7] = DATA
    xmm = bytes(rng.randrange(256) for _ in range(16))
    bench.memory[DATA_PA : DATA_PA + 16] = xmm
    # movups xmm5, [rdi]; fldpi; stc
    bench.run(b"\x0f\x10\x2f\xd9\xeb\xf9" + SYSCALL)
    engine.fs_base, engine.gs_base = 0x1234000, 0x5678000
    engine.set_code_stack(0x33, CODE64, 0x2B, FLAT)
    flags, registers = engine.rflags, list(bench.regs)
    state = engine.save()
    bench.run(b"\x0f\x57\xed\xdb\xe3\xf8" + SYSCALL)  # xorps xmm5, xmm5; fninit; clc
    for i in range(16):
        bench.regs[i] = 0
    engine.fs_base = engine.gs_base = 0
    engine.set_code_stack(0x23, CODE32, 0x2B, FLAT)
    engine.cr0_ts = True
    engine.restore(state)
    assert (list(bench.regs), engine.rflags, engine.fs_base, engine.gs_base) == (registers, flags, 0x1234000, 0x5678000)
    assert not engine.cr0_ts
    assert engine.segment(1) == 0x33
    bench.memory[DATA_PA : DATA_PA + 64] = bytes(64)
    # movups [rdi], xmm5; fstp qword [rdi+16]; setc [rdi+24]: 64-bit code again, FPU as it was
    bench.run(b"\x0f\x11\x2f\xdd\x5f\x10\x0f\x92\x47\x18" + SYSCALL)
    assert bytes(bench.memory[DATA_PA : DATA_PA + 16]) == xmm
    assert struct.unpack("<d", bench.memory[DATA_PA + 16 : DATA_PA + 24])[0] == pytest.approx(3.14159265358979)
    assert bench.memory[DATA_PA + 24] == 1


def test_so_many_pauses_end_a_run(bench: Bench) -> None:
    """Exactly at one of them, and going on repeats none; without a limit they cost a run nothing."""
    # mov ecx, 100; loop: pause; inc eax; dec ecx; jnz loop; syscall
    bench.put(bytes.fromhex("b964000000 f390 ffc0 ffc9 75f8") + SYSCALL)
    regs = bench.regs
    regs[RIP], regs[RAX] = CODE, 0
    for done in (29, 59, 89):
        bench.engine.pauses = 30
        bench.engine.run()
        assert bench.engine.pauses == 0
        assert regs[RAX] in (done, done + 1)  # stopped at the 30th, whose block goes on when the run does
        assert not bench.events
    bench.engine.pauses = 1000
    bench.engine.run()
    assert (regs[RAX], bench.events[0][0]) == (100, "syscall")
    assert 1000 - bench.engine.pauses in range(9, 14)


def test_the_fpu_state_is_what_fxsave_writes(bench: Bench) -> None:
    """And what is loaded can be used: another engine goes on with the same stack of numbers."""
    # fninit; fld1; fldpi; fldl2e; movq xmm3, rax; movq xmm15, rbx; fxsave64 [rdi]; syscall
    code = "dbe3 d9e8 d9eb d9ea 66480f6ed8 664c0f6efb 480fae07"
    bench.run(bytes.fromhex(code) + SYSCALL, rdi=DATA, rax=0x123456789ABCDEF0, rbx=1 << 63)
    image = bench.engine.fpu_state()
    written = bytes(bench.memory[DATA_PA : DATA_PA + 512])
    # Up to the pointers to the last instruction, which aren't kept, and MXCSR's mask.
    assert image[:5] == written[:5]
    assert image[24:28] == written[24:28]
    for start, end, step in ((32, 160, 16), (160, 416, 16)):
        for at in range(start, end, step):
            size = 10 if start == 32 else 16
            assert image[at : at + size] == written[at : at + size], at
    other = Bench()
    try:
        other.engine.set_fpu_state(image)
        assert other.engine.fpu_state() == image
        # fxsave64 [rdi]; fmulp; fstp qword [rdi + 512]; syscall: log2(e) * pi
        other.run(bytes.fromhex("480fae07 dec9 dd9f00020000") + SYSCALL, rdi=DATA)
        assert bytes(other.memory[DATA_PA + 32 : DATA_PA + 416]) == written[32:416]
        (product,) = struct.unpack_from("<d", other.memory, DATA_PA + 512)
        assert product == pytest.approx(1.4426950408889634 * 3.141592653589793)
    finally:
        other.close()


def test_a_code_segment_after_restore_is_the_one_that_is_set(bench: Bench) -> None:
    """set_code_stack may take a short cut where nothing changes; restore has changed it."""
    engine = bench.engine
    state = engine.save()
    engine.set_code_stack(0x23, CODE32, 0x2B, FLAT)
    engine.restore(state)
    engine.set_code_stack(0x23, CODE32, 0x2B, FLAT)
    stack = STACK - 0x100
    bench.run(b"\x50\xcd\x30", rsp=stack)
    assert bench.regs[RSP] == stack - 4


def test_a_far_jump_of_the_guests_own_doesnt_deceive_set_code_stack(bench: Bench) -> None:
    """lretq into a 32-bit segment, by the guest alone; then the owner asks for the 64-bit segment it had set before."""
    bench.put(b"\x50\xcd\x30", CODE + 0x100)  # push eax (rax); int 0x30
    stack = STACK - 0x100
    jump = b"\x6a\x23\x68" + struct.pack("<I", CODE + 0x100) + b"\x48\xcb"  # push 0x23; push CODE + 0x100; lretq
    assert bench.run(jump, rsp=stack) == [("exception", 0x30, 0, CODE + 0x103, True)]
    assert (bench.engine.segment(1), bench.regs[RSP]) == (0x23, stack - 4)
    bench.engine.set_code_stack(0x33, CODE64, 0x2B, FLAT)
    bench.run(b"\x50\xcd\x30", rsp=stack)
    assert bench.regs[RSP] == stack - 8


def test_restore_on_another_engine(bench: Bench) -> None:
    bench.run(b"\x90" + SYSCALL, r8=77)
    other = Bench()
    try:
        other.engine.restore(bench.engine.save())
        assert other.run() == bench.run(UD2) or other.regs[R8] == 77
        assert other.regs[R8] == 77
    finally:
        other.close()


# -- a good guest of its process ---------------------------------------------------------------------------------------


def test_from_another_thread() -> None:
    results: list[object] = []

    def work() -> None:
        bench = Bench()
        bench.engine.stop_at = bench.engine.counter() + 1000
        bench.put(SPIN)
        bench.regs[RIP] = CODE
        bench.engine.run()
        bench.engine.stop_at = None
        results.extend(bench.run(b"\x90" + SYSCALL))
        bench.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [("syscall", CODE + 3)]


def test_two_engines_at_once_in_two_threads() -> None:
    results = {}

    def work(name: int) -> None:
        bench = Bench()
        bench.run(b"\x48\x01\xc8\x48\xff\xc9\x75\xf8" + SYSCALL, rax=0, rcx=1_000_000 + name)
        results[name] = bench.regs[RAX]
        bench.close()

    threads = [threading.Thread(target=work, args=(name,)) for name in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: (1_000_000 + name) * (1_000_001 + name) // 2 for name in (1, 2)}


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_nothing_is_left_after_close() -> None:
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    sizes = []
    for _ in range(25):
        bench = Bench()
        bench.run(b"\x90" * 3000 + SYSCALL)
        bench.close()
        bench.engine.close()  # again is no harm
        bench.engine.stop()
        sizes.append(_resident())
    del bench
    gc.collect()
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert sizes[-1] - sizes[4] < 4 << 20


def test_an_engine_that_is_still_open_doesnt_keep_a_program_from_ending() -> None:
    program = "import enginelib; b = enginelib.Bench(); b.run(enginelib.SYSCALL); print('done')"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


# -- when it can't work ------------------------------------------------------------------------------------------------


def _one_line(info: pytest.ExceptionInfo[EngineError]) -> str:
    message = str(info.value)
    assert message
    assert "\n" not in message
    return message


def test_an_unknown_engine() -> None:
    with pytest.raises(EngineError) as info:
        open_engine("kqemu", memoryview(bytearray(4096)), None)  # type: ignore[arg-type]
    assert "unicorn" in _one_line(info)


def test_another_version_of_unicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn, "__version__", "2.0.1")
    with pytest.raises(EngineError) as info:
        Bench()
    assert "pip install unicorn==2.1.4" in _one_line(info)


@pytest.mark.parametrize(
    "symbol",
    ["qemu_get_cpu_x86_64", "tlb_flush_x86_64", "check_exit_request_x86_64", "cpu_get_tsc_x86_64"],
)
def test_a_build_without_the_symbols(monkeypatch: pytest.MonkeyPatch, symbol: str) -> None:
    real = binding.uclib

    class Stripped:
        def __getattr__(self, name: str) -> object:
            if name == symbol:
                raise AttributeError(name)
            return getattr(real, name)

    monkeypatch.setattr(binding, "uclib", Stripped())
    with pytest.raises(EngineError) as info:
        Bench()
    assert symbol in _one_line(info)


def test_what_failed_to_open_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    monkeypatch.setattr(unicorn, "__version__", "2.0.1")
    for _ in range(3):
        with pytest.raises(EngineError):
            Bench()
    assert threading.active_count() == threads

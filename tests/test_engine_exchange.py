"""Several CPUs by turns on one engine: each is what it was, and none goes on with translations that were flushed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from enginelib import ALL, CODE, CODE_PA, DATA, DATA_PA, NX, STACK, SYSCALL, TABLES_PA, Bench
from pvirq.engine.protocol import RAX, RBX, RCX, RDI, RIP, RSP, Slot

LOAD = b"\x48\x8b\x07" + SYSCALL  # mov rax, [rdi]
STORE = b"\x48\x89\x07" + SYSCALL  # mov [rdi], rax
READER = CODE + 0xF000  # where that is
PAGE = DATA + 0x5000
OLD, NEW = DATA_PA + 0x8000, DATA_PA + 0x9000  # where it is, and where it will be


class Two:
    """Two CPUs with the same memory."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.bench.put(LOAD, READER)
        self.slots = self.bench.engine.slot(), self.bench.engine.slot()
        self.turn(0)

    def turn(self, cpu: int) -> None:
        self.bench.engine.exchange(self.slots[cpu], self.bench)
        self.bench.engine.handler = self.bench  # who sees all

    def load(self, va: int = PAGE) -> int:
        self.bench.regs[RIP] = READER
        self.bench.run(rdi=va, rsp=STACK - 0x100)
        return self.bench.regs[RAX]


@pytest.fixture
def two() -> Iterator[Two]:
    two = Two()
    two.bench.u64[OLD // 8], two.bench.u64[NEW // 8] = 1, 2
    two.bench.map(PAGE, OLD, ALL | NX)
    yield two
    two.bench.close()


def test_each_has_its_own_state(two: Two) -> None:
    engine, regs = two.bench.engine, two.bench.regs
    two.bench.run(SYSCALL, rax=11, rbx=12)
    engine.fs_base, engine.rflags = 0x1000, 0x202 | 0x41
    two.turn(1)
    assert (regs[RAX], engine.fs_base) == (11, 0x1000)  # it begins as the first one is
    two.bench.run(SYSCALL, rax=21, rbx=22)
    engine.fs_base, engine.rflags = 0x2000, 0x202
    two.turn(0)
    assert (regs[RAX], regs[RBX], engine.fs_base, engine.rflags & 0x41) == (11, 12, 0x1000, 0x41)
    two.turn(1)
    assert (regs[RAX], regs[RBX], engine.fs_base, engine.rflags & 0x41) == (21, 22, 0x2000, 0)


def test_time_is_of_all(two: Two) -> None:
    two.bench.engine.set_tsc_offset(1 << 50)
    two.turn(1)
    before = two.bench.engine.counter()
    two.bench.run(b"\x0f\x31" + SYSCALL)
    two.turn(0)
    assert two.bench.engine.counter() > before
    two.bench.run(b"\x0f\x31" + SYSCALL)
    assert two.bench.regs[2] >= 1 << 18


def _flush_all(two: Two) -> None:
    two.bench.engine.flush_tlb()


def _flush_page(two: Two) -> None:
    two.bench.engine.flush_page(PAGE)


def _flush_pages(two: Two) -> None:
    two.bench.engine.flush_page(PAGE)
    for i in range(100):  # more than there is a list of
        two.bench.engine.flush_page(STACK + i * 0x1000)


def _few_before(two: Two) -> None:
    for i in range(31):
        two.bench.engine.flush_page(STACK + i * 0x1000)
    two.bench.engine.flush_page(PAGE)


def _load_root(two: Two) -> None:
    two.bench.engine.cr3 = TABLES_PA


@pytest.mark.parametrize("flush", [_flush_all, _flush_page, _flush_pages, _few_before, _load_root])
def test_a_flush_is_of_all(two: Two, flush: Callable[[Two], None]) -> None:
    """Whichever CPU flushes, none goes on with what it remembered."""
    assert two.load() == 1
    two.turn(1)
    assert two.load() == 1
    two.bench.map(PAGE, NEW, ALL | NX)
    flush(two)
    assert two.load() == 2
    two.turn(0)
    assert two.load() == 2
    two.turn(1)
    assert two.load() == 2


@pytest.mark.parametrize("aside", [False, True])
def test_translations_stay_while_nothing_is_flushed(two: Two, aside: bool) -> None:
    """Also those of the address space that is set aside. (That they are used is seen in that a change isn't.)"""
    engine, other = two.bench.engine, TABLES_PA + 0x80000
    two.bench.memory[other : other + 0x1000] = two.bench.memory[TABLES_PA : TABLES_PA + 0x1000]
    two.turn(1)
    two.turn(0)
    two.load(DATA)
    for _ in range(2):  # the first time, and when code is new, costs a flush
        engine.switch_space(other, other=True)
        engine.switch_space(TABLES_PA, other=False)
    assert two.load() == 1
    two.bench.map(PAGE, NEW, ALL | NX)
    if aside:
        engine.switch_space(other, other=True)
    two.turn(1)
    assert two.load(DATA) == 0
    two.turn(0)
    if aside:
        engine.switch_space(TABLES_PA, other=False)
    assert two.load() == 1
    two.turn(1)
    assert two.load() == 2


def test_same_address_other_code(two: Two) -> None:
    """Two address spaces have other code at one address: blocks are found by it."""
    bench, engine = two.bench, two.bench.engine
    place = CODE + 0x3000
    for cpu, (pa, value) in enumerate(((CODE_PA + 0x4000, 7), (CODE_PA + 0x5000, 8))):
        bench.memory[pa : pa + 9] = b"\x48\xc7\xc0" + value.to_bytes(4, "little") + SYSCALL  # mov rax, value
        root = TABLES_PA + 0x90000 + cpu * 0x4000
        # A path of tables of its own to the page, all else shared.
        table = TABLES_PA
        for level, shift in enumerate((39, 30, 21, 12)):
            copy = root + level * 0x1000
            bench.memory[copy : copy + 0x1000] = bench.memory[table : table + 0x1000]
            at = copy // 8 + (place >> shift & 511)
            table = bench.u64[at] & ~0xFFF & ((1 << 52) - 1)
            bench.u64[at] = (pa if shift == 12 else copy + 0x1000) | ALL
        two.turn(cpu)
        engine.cr3 = root
    for _ in range(3):
        for cpu in range(2):
            two.turn(cpu)
            bench.regs[RIP], bench.regs[RSP] = place, STACK - 0x100
            bench.run()
            assert bench.regs[RAX] == 7 + cpu


def test_stores_to_what_became_code_are_noticed(two: Two) -> None:
    """A page that one CPU has written to is executed by the other, and then written to again."""
    bench = two.bench
    page, pa = CODE + 0x6000, CODE_PA + 0x6000
    code = [int.from_bytes(b"\x48\xff\xc0" + SYSCALL + b"\x90" * 3, "little"),  # inc rax
            int.from_bytes(b"\x48\xff\xc8" + SYSCALL + b"\x90" * 3, "little")]  # fmt: skip
    for i in range(4):
        two.turn(0)
        bench.run(STORE, rdi=page, rax=code[i % 2], rsp=STACK - 0x100)
        assert bench.u64[pa // 8] == code[i % 2]
        two.turn(1)
        bench.regs[RIP], bench.regs[RAX], bench.regs[RSP] = page, 100, STACK - 0x100
        bench.run()
        assert bench.regs[RAX] == (101, 99)[i % 2]


def test_many_turns(two: Two) -> None:
    """Whatever the turns are, each CPU counts by itself."""
    bench = two.bench
    bench.put(b"\x48\xff\xc0\x48\x01\x07" + SYSCALL)  # inc rax; add [rdi], rax
    counts = [0, 0]
    for cpu in range(2):
        two.turn(cpu)
        bench.regs[RAX], bench.regs[RDI], bench.regs[RCX] = 0, DATA + cpu * 8, 0
    for i in range(500):
        cpu = i * 7 // 3 % 2
        two.turn(cpu)
        bench.regs[RIP] = CODE
        bench.run()
        counts[cpu] += 1
        assert bench.regs[RAX] == counts[cpu]
    assert [bench.u64[DATA_PA // 8 + cpu] for cpu in range(2)] == [count * (count + 1) // 2 for count in counts]


def test_slots_are_freed() -> None:
    bench = Bench()
    slots: list[Slot] = [bench.engine.slot() for _ in range(8)]
    for slot in slots:
        bench.engine.exchange(slot, bench)
    bench.close()
    with pytest.raises(ValueError, match="released"):
        slots[0].items[0]

"""Engines whose time is what they execute: the same code is the same run, to the instruction at which it ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import unicorn
from unicorn import x86_const

from enginelib import CODE, DATA, DATA_PA, SYSCALL, Bench
from pvirq.engine.protocol import RAX, RBX, RCX, RDI, RDX, RIP

RDTSC = b"\x0f\x31"
TICKS = 8  # of a block


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def stop_points(bench: Bench, code: bytes, every: int, **registers: int) -> list[tuple[int, ...]]:
    """Where a run ends that is ended every so many ticks, with all registers, until its system call."""
    bench.put(code)
    bench.regs[RIP] = CODE
    for name, value in registers.items():
        bench.regs[{"rax": RAX, "rcx": RCX, "rdi": RDI}[name]] = value
    bench.events.clear()
    points = []
    while not bench.events:
        bench.engine.stop_at = bench.engine.counter() + every
        bench.engine.run()
        points.append((bench.engine.counter(), *bench.regs))
    return points


# inc rax; dec rcx; jnz back; syscall: a block for each time round, and one for the system call
LOOP = bytes.fromhex("48ffc0 48ffc9 75f8") + SYSCALL


def test_a_run_ends_after_so_many_blocks(bench: Bench) -> None:
    points = stop_points(bench, LOOP, 30 * TICKS, rax=0, rcx=100)
    assert [point[1 + RAX] for point in points] == [30, 60, 90, 100]
    assert [point[0] for point in points[:3]] == [points[0][0] + i * 30 * TICKS for i in range(3)]
    assert points[3][0] - points[2][0] in (10 * TICKS, 11 * TICKS)


def test_a_limit_that_is_no_multiple_is_reached(bench: Bench) -> None:
    points = stop_points(bench, LOOP, 1, rax=0, rcx=5)
    assert [point[1 + RAX] for point in points][:5] == [1, 2, 3, 4, 5]


def test_a_limit_in_the_past_runs_nothing(bench: Bench) -> None:
    bench.put(LOOP)
    bench.regs[RIP], bench.regs[RAX], bench.regs[RCX] = CODE, 0, 100
    for stop_at in (0, bench.engine.counter(), bench.engine.counter() - 1000):
        bench.engine.stop_at = stop_at
        bench.engine.run()
        assert (bench.regs[RAX], bench.regs[RIP]) == (0, CODE)


def test_stops_on_the_way_change_nothing(bench: Bench) -> None:
    """However a run is cut up, it is the same; also where the handler ends it."""
    # push and pop, a store, a call, rep movsb, a system call in each round
    code = bytes.fromhex("4889c6 50 5b 488907 e800000000 5a b905000000 f3a4 4883ef05 48ffc0 0f05 49ffc8 75dd f4")
    ends = []
    for every in (1 * TICKS, 7 * TICKS, 1000 * TICKS):
        other = Bench()
        other.put(code)
        other.regs[RIP], other.regs[8], other.regs[RDI], other.regs[RAX] = CODE, 40, DATA, DATA + 64
        began = other.engine.counter()
        for _ in range(100_000):
            other.engine.stop_at = other.engine.counter() + every
            other.engine.run()
            if other.events and other.events[-1][0] == "exception":
                break
        ends.append((other.engine.counter() - began, *other.regs, bytes(other.memory[DATA_PA : DATA_PA + 64])))
        assert len([event for event in other.events if event[0] == "syscall"]) == 40
        other.close()
    assert ends[0] == ends[1] == ends[2]


def test_the_tsc_is_the_count(bench: Bench) -> None:
    bench.engine.set_tsc_offset(1 << 40)
    before = bench.engine.counter()
    # rdtsc; mov rbx, rax; jmp to what follows; rdtsc; syscall
    bench.run(RDTSC + bytes.fromhex("4889c3 eb00") + RDTSC + SYSCALL)
    assert bench.regs[RDX] == 1 << 8
    assert bench.regs[RBX] == before + TICKS
    assert bench.regs[RAX] == before + 2 * TICKS == bench.engine.counter()


def test_the_handler_sees_the_count_of_its_instruction(bench: Bench) -> None:
    seen: list[int] = []

    def syscall(rip: int) -> int:
        seen.append(bench.engine.counter())
        if len(seen) == 5:
            bench.engine.stop()
        return rip

    bench.on_syscall = syscall
    # syscall; jmp back
    bench.run(SYSCALL + b"\xeb\xfc")
    while len(seen) < 5:
        bench.engine.run()
    gaps = {later - earlier for earlier, later in itertools.pairwise(seen)}
    assert len(gaps) == 1


def test_the_counter_can_go_on_from_elsewhere(bench: Bench) -> None:
    bench.engine.set_counter(123_456 * TICKS)
    assert bench.engine.counter() == 123_456 * TICKS
    bench.run(SYSCALL)
    assert bench.engine.counter() == 123_457 * TICKS
    assert bench.engine.counter_hz() == 1e9


def test_a_saved_cpu_has_no_count_of_its_own(bench: Bench) -> None:
    state = bench.engine.save()
    bench.run(LOOP, rcx=100)
    count = bench.engine.counter()
    bench.engine.restore(state)
    assert bench.engine.counter() == count


def test_a_pause_is_counted_when_it_is_executed(bench: Bench) -> None:
    """And nothing else is: a run that ends for another reason costs none."""
    # loop: pause; inc rax; dec rcx; jnz loop; syscall
    code = bytes.fromhex("f390 48ffc0 48ffc9 75f6") + SYSCALL
    bench.engine.pauses = 1000
    stop_points(bench, code, TICKS, rax=0, rcx=50)
    assert bench.engine.pauses == 950


@pytest.mark.parametrize("seed", range(5))
def test_two_engines_agree(seed: int) -> None:
    """Random work on memory, cut up at random: each of two engines comes to the same."""
    ends = []
    for _ in range(2):
        rng = random.Random(seed)
        bench = Bench()
        code = bytearray()
        for _ in range(60):
            code += rng.choice([
                bytes.fromhex("4801c8"), bytes.fromhex("48894f08"), bytes.fromhex("48031f"), bytes.fromhex("eb00"),
                bytes.fromhex("48ffc1"), bytes.fromhex("0f31"), bytes.fromhex("480fafc1"), bytes.fromhex("f390"),
                bytes.fromhex("a8017502 ffc0"), b"\x0f\xa2", SYSCALL,
            ])  # fmt: skip
        code += b"\xf4"
        bench.on_syscall = lambda rip: rip
        bench.put(bytes(code))
        bench.regs[RIP], bench.regs[RDI] = CODE, DATA
        while not any(event[0] == "exception" for event in bench.events):
            bench.engine.stop_at = bench.engine.counter() + rng.randrange(1, 20) * TICKS
            bench.engine.run()
        ends.append((bench.engine.counter(), *bench.regs, bytes(bench.memory[DATA_PA : DATA_PA + 64])))
        bench.close()
    assert ends[0] == ends[1]


def test_other_users_of_the_emulator_notice_nothing(bench: Bench) -> None:
    """The patches are the process's: an instance that isn't ours still runs as long as it likes, and by real time."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.mem_map(0x1000, 0x1000)
    # loop: pause; dec rcx; jnz loop; rdtsc
    uc.mem_write(0x1000, bytes.fromhex("f390 48ffc9 75f9") + RDTSC)
    stamps = []
    for _ in range(2):
        uc.reg_write(x86_const.UC_X86_REG_RCX, 100_000)
        uc.emu_start(0x1000, 0x1009)
        assert uc.reg_read(x86_const.UC_X86_REG_RCX) == 0
        stamps.append(uc.reg_read(x86_const.UC_X86_REG_RAX) | uc.reg_read(x86_const.UC_X86_REG_RDX) << 32)
    assert stamps[1] - stamps[0] > 100_000

"""A CPU engine over a little memory of its own, for the tests: no Xen, a few page tables, code given as bytes."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Final

from pvirq.engine import open_engine
from pvirq.engine.protocol import RIP, RSP, CpuidLeaf

MEMORY: Final = 16 << 20
CODE, DATA, STACK, GDT = 0x400000, 0x600000, 0x7F0000, 0xFFFF820000000000  # virtual addresses
CODE_PA, DATA_PA, STACK_PA, GDT_PA, TABLES_PA = 0x200000, 0x400000, 0x600000, 0x1F0000, 0x100000
PRESENT, RW, USER, NX = 1, 2, 4, 1 << 63
ALL: Final = PRESENT | RW | USER
CODE64, CODE32, FLAT = 0x00AF_FB00_0000_FFFF, 0x00CF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF
SYSCALL: Final = b"\x0f\x05"


class Event(tuple[object, ...]):
    """("syscall", rip), ("exception", vector, error, rip, software) or ("cpuid", leaf, subleaf)."""


class Bench:
    """An engine and its handler. By default everything that reaches the handler is noted and ends the run."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, MEMORY)
        self.memory = memoryview(self._map)
        self.u64 = self.memory.cast("Q")
        self.events: list[Event] = []
        self.on_syscall: Callable[[int], int] | None = None
        self.on_exception: Callable[[int, int, int, bool], int] | None = None
        self.on_cpuid: Callable[[int, int], CpuidLeaf] | None = None
        self._free_table = TABLES_PA + 0x1000
        self.engine = open_engine("unicorn", self.memory, self)
        self.regs = self.engine.regs
        for i in range(16):
            self.map(CODE + i * 0x1000, CODE_PA + i * 0x1000)
            self.map(DATA + i * 0x1000, DATA_PA + i * 0x1000, ALL | NX)
            self.map(STACK - (i + 1) * 0x1000, STACK_PA - (i + 1) * 0x1000, ALL | NX)
        self.map(GDT, GDT_PA, PRESENT | RW)  # the CPU's own: not for user privilege
        for selector, descriptor in ((0x20, CODE32), (0x28, FLAT), (0x30, CODE64)):
            self.u64[(GDT_PA + selector) // 8] = descriptor
        self.engine.cr3 = TABLES_PA
        self.engine.set_gdt(GDT, 0xFFF)
        self.engine.set_ldt(0, 0)
        self.engine.set_code_stack(0x33, CODE64, 0x2B, FLAT)
        for which in (0, 3, 4, 5):
            self.engine.set_segment(which, 0, 0)
        self.engine.rflags = 0x202
        self.regs[RSP] = STACK - 0x100

    def entry(self, va: int) -> int:
        """Where the level-1 entry of an address is, in 64-bit items; tables are made on the way."""
        table = TABLES_PA
        for shift in (39, 30, 21):
            at = table // 8 + (va >> shift & 511)
            if not self.u64[at]:
                self.u64[at] = self._free_table | ALL
                self._free_table += 0x1000
            table = self.u64[at] & ~0xFFF
        return table // 8 + (va >> 12 & 511)

    def map(self, va: int, pa: int, flags: int = ALL) -> None:
        self.u64[self.entry(va)] = pa | flags

    def put(self, code: bytes, at: int = CODE) -> None:
        """Write code, telling the engine."""
        pa = at - CODE + CODE_PA
        self.memory[pa : pa + len(code)] = code
        self.engine.invalidate_code(pa, len(code))

    def run(self, code: bytes | None = None, **registers: int) -> list[Event]:
        """Run `code` (None: go on at RIP) until it stops; what the handler got meanwhile."""
        from pvirq.engine import protocol

        if code is not None:
            self.put(code)
            self.regs[RIP] = CODE
        for name, value in registers.items():
            self.regs[getattr(protocol, name.upper())] = value & (1 << 64) - 1
        self.events.clear()
        while not self.events:  # a run may end by itself, at the engine's own limit
            self.engine.run()
        return list(self.events)

    def syscall(self, rip: int, cs: int) -> int:
        self.events.append(Event(("syscall", rip)))
        if self.on_syscall:
            return self.on_syscall(rip)
        self.engine.stop()
        return rip

    def exception(self, vector: int, error: int, rip: int, software: bool) -> int:
        self.events.append(Event(("exception", vector, error, rip, software)))
        if self.on_exception:
            return self.on_exception(vector, error, rip, software)
        self.engine.stop()
        return rip

    def cpuid(self, leaf: int, subleaf: int) -> CpuidLeaf:
        self.events.append(Event(("cpuid", leaf, subleaf)))
        if self.on_cpuid:
            return self.on_cpuid(leaf, subleaf)
        return 1, 2, 3, 4

    def close(self) -> None:
        self.engine.close()
        self.u64.release()
        self.memory.release()
        self._map.close()

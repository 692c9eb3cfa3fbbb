"""Instructions that the hypervisor carries out for a guest: on page tables, compared with the engine's own execution
on ordinary memory; privileged ones, MSRs, CPUID; and the decoder and descriptors behind them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from image_builder import TEXT, VIRT_BASE, build_elf
from pvirq import Host, XenError
from pvirq.abi.errno import Errno
from pvirq.engine.protocol import FLAG_DF, R8, RAX, RBX, RCX, RDI, RDX, RIP, RSI, RSP, TRAP_GP, TRAP_PF
from pvirq.pv import descriptors
from pvirq.pv.decode import decode
from pvirq.pv.msr import read_msr, write_msr
from pvirq.pv.pagetable import PRESENT, RW, USER
from pvirq.pv.vcpu import PvVcpu
from pvirq.xen.memory import PGT_L1, PGT_SEG_DESC

M64 = (1 << 64) - 1
CF, PF, AF, ZF, SF, OF = 1, 4, 0x10, 0x40, 0x80, 0x800
ALL_FLAGS = CF | PF | AF | ZF | SF | OF
CODE = TEXT
PLAIN = TEXT + 0x1000  # a page of the guest's, mapped writable
SYSCALL = b"\x0f\x05"
MEMORY = 24 << 20


class Guest:
    """A guest without a kernel: the test writes code and runs it; SYSCALL ends it, faults that are the guest's too."""

    def __init__(self) -> None:
        self.host = Host(machine_memory=256 << 20)
        guest = self.host.boot(build_elf(memsz=0x3000), memory=MEMORY)
        self.machine = guest.machine
        self.cpu: PvVcpu = guest.machine.cpus[0]
        self.engine = guest.machine.engine
        self.regs = self.engine.regs
        self.u64 = guest.domain.machine.u64
        self.mem = guest.domain.machine.mem
        self.tables = guest.machine.tables
        self.engine.handler = self
        self.faults: list[tuple[int, int, int]] = []
        self.stopped = False
        # A level-1 table of its own, all empty, visible read-only at TABLE.
        pfn = (MEMORY >> 12) - 1
        self.table_mfn = self.machine.mfn(pfn)
        self.table = PLAIN + 0x1000
        self.map(self.table, self.table_mfn, PRESENT | USER)
        self.tables.pin(self.table_mfn, PGT_L1)
        self.plain_mfn = self.mfn(PLAIN)
        self.stack = PLAIN + 0x1000
        self.saved_regs = list(self.regs)

    def mfn(self, va: int) -> int:
        return self.machine.mfn((va - VIRT_BASE) >> 12)

    def map(self, va: int, mfn: int, flags: int) -> None:
        index = self.cpu.l1_index(va)
        assert index is not None
        self.tables.set_l1(index, mfn << 12 | flags)
        self.cpu.flush_tlb()

    def syscall(self, rip: int, cs: int) -> int:
        self.stopped = True
        self.engine.stop()
        return rip

    def exception(self, vector: int, error: int, rip: int, software: bool) -> int:
        # A handler that never runs: its address is where the engine stops.
        if not self.cpu.traps[vector][0]:
            self.cpu.traps[vector] = (CODE + 0x800 + vector, 0xE033, 0)
        target = self.cpu.exception(vector, error, rip, software)
        if target == CODE + 0x800 + vector:
            self.faults.append((vector, struct.unpack("<Q", self.cpu.read(self.regs[RSP] + 16, 8))[0], rip))
            self.stopped = True
            self.engine.stop()
        return target

    def cpuid(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        return self.cpu.cpuid(leaf, subleaf)

    def run(self, code: bytes) -> list[tuple[int, int, int]]:
        """Run `code` to its end; the faults (vector, error, rip) that the guest got."""
        at = self.mfn(CODE) << 12
        self.mem[at : at + len(code) + 2] = code + SYSCALL
        self.engine.invalidate_code(at, len(code) + 2)
        self.regs[RIP] = CODE
        self.faults.clear()
        self.stopped = False
        while not self.stopped:
            self.engine.run()
        return list(self.faults)

    def page(self, mfn: int) -> memoryview:
        return self.mem[mfn << 12 : (mfn + 1) << 12]


@pytest.fixture(scope="module")
def shared() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.host.close()


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.host.close()


# -- writes to page tables ---------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """An instruction with a memory operand [rdi] (ModRM.rm = 7, no displacement)."""

    name: str
    opcode: bytes  # for bytes; with bit 0 set for the larger sizes
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    digit: int | None = None  # in ModRM.reg, instead of a register
    immediate: int = 0  # size of the immediate; -1: the operand's, at most 4
    lock: bool = True
    flags: int = ALL_FLAGS  # those that are defined
    bits: bool = False  # a register operand is the number of a bit, maybe of another word


ARITHMETIC = {"add": 0, "or": 1, "and": 4, "sub": 5, "xor": 6}
LOGIC = ALL_FLAGS & ~AF
FORMS = [
    Form("mov", b"\x88", lock=False),
    Form("mov imm", b"\xc6", digit=0, immediate=-1, lock=False),
    Form("xchg", b"\x86"),
    Form("cmpxchg", b"\x0f\xb0"),
    Form("xadd", b"\x0f\xc0"),
    Form("cmpxchg8b", b"\x0f\xc6", (4,), digit=1),
    Form("inc", b"\xfe", digit=0),
    Form("dec", b"\xfe", digit=1),
    Form("movnti", b"\x0f\xc2", (4, 8), lock=False),
    *[
        Form(name, bytes([digit << 3]), flags=LOGIC if name in ("or", "and", "xor") else ALL_FLAGS)
        for name, digit in ARITHMETIC.items()
    ],
    *[
        Form(f"{name} imm", b"\x80", digit=digit, immediate=-1, flags=LOGIC if digit in (1, 4, 6) else ALL_FLAGS)
        for name, digit in ARITHMETIC.items()
    ],
    *[
        Form(f"{name} imm8", b"\x82", (2, 4, 8), digit=digit, immediate=1,
             flags=LOGIC if digit in (1, 4, 6) else ALL_FLAGS)
        for name, digit in ARITHMETIC.items()
    ],
    *[
        Form(f"{name} imm", b"\x0f\xba", (2, 4, 8), digit=digit, immediate=1, flags=CF | ZF)
        for name, digit in (("bts", 5), ("btr", 6), ("btc", 7))
    ],
    *[
        Form(name, bytes([0x0F, opcode]), (2, 4, 8), flags=CF | ZF, bits=True)
        for name, opcode in (("bts", 0xAB), ("btr", 0xB3), ("btc", 0xBB))
    ],
]  # fmt: skip


def encode(form: Form, size: int, register: int, high_byte: bool, immediate: int, lock: bool) -> bytes:
    opcode = form.opcode
    # BTS and its like have no byte form: their opcode is what it is.
    if size > 1 and not form.opcode[-1] & 1 and form.opcode != b"\x0f\xba":
        opcode = opcode[:-1] + bytes([opcode[-1] | 1])
    field = register if form.digit is None else form.digit
    rex = 0x40 | (8 if size == 8 else 0) | (4 if field >= 8 else 0)
    if rex == 0x40 and not (size == 1 and 4 <= field < 8 and form.digit is None and not high_byte):
        rex = 0
    width = min(size, 4) if form.immediate < 0 else form.immediate
    return (
        (b"\xf0" if lock else b"")
        + (b"\x66" if size == 2 else b"")
        + (bytes([rex]) if rex else b"")
        + opcode
        + bytes([(field & 7) << 3 | 7])
        + (immediate & (1 << width * 8) - 1).to_bytes(width, "little")
    )


VALUES = st.one_of(
    st.integers(0, M64),
    st.sampled_from((0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 1 << 63, M64, M64 - 1)),
)
OLD = VALUES.map(lambda value: value & ~PRESENT)


def outcome(guest: Guest, code: bytes, base: int, mfn: int, words: list[int], registers: list[int], flags: int,
            offset: int) -> tuple[list[tuple[int, int, int]], bytes, list[int], int]:  # fmt: skip
    """Run `code` with RDI = base + offset: faults, the page behind it, the registers (RDI from base), the flags."""
    page = guest.page(mfn)
    page[:] = bytes(4096)
    struct.pack_into("<3Q", page, 0x7F8, *words)
    for i, value in enumerate(registers):
        guest.regs[i] = value
    guest.regs[RDI], guest.regs[RSP] = base + offset, guest.stack - 0x80
    guest.engine.rflags = 0x202 | flags
    faults = guest.run(code)
    found = [guest.regs[RDI] - base if i == RDI else guest.regs[i] for i in range(16)]
    return faults, bytes(page[:0xF00]), found, guest.engine.rflags


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(FORMS),
    st.data(),
    st.lists(OLD, min_size=3, max_size=3),
    st.lists(VALUES, min_size=16, max_size=16),
    st.sampled_from((0, ALL_FLAGS, CF, ZF | SF)),
)
def test_a_table_is_written_as_memory_is(
    shared: Guest, form: Form, data: st.DataObject, words: list[int], registers: list[int], flags: int
) -> None:
    size = data.draw(st.sampled_from(form.sizes))
    register = data.draw(st.sampled_from([i for i in range(16) if i not in (RSP, RDI)]))
    high_byte = data.draw(st.booleans())
    immediate = data.draw(VALUES)
    lock = form.lock and data.draw(st.booleans())
    offset = 0x800 + (data.draw(st.integers(0, 7)) & -(8 if form.name == "cmpxchg8b" else size))
    if form.bits:
        registers[register] = data.draw(st.integers(-100, 100)) & M64
    if form.name.startswith("cmpxchg") and data.draw(st.booleans()):  # half of them find what they expect
        old = int.from_bytes(struct.pack("<3Q", *words)[8 + offset - 0x800 :][:8], "little")
        registers[RAX] = registers[RAX] & ~((1 << size * 8) - 1) & M64 | old & (1 << size * 8) - 1
        if form.name == "cmpxchg8b":
            registers[RAX], registers[RDX] = old & 0xFFFFFFFF, registers[RDX] & ~0xFFFFFFFF | old >> 32
    code = encode(form, size, register, high_byte, immediate, lock)
    args = (words, registers, flags, offset)
    faults, native, native_regs, native_flags = outcome(shared, code, PLAIN, shared.plain_mfn, *args)
    assert not faults
    # An entry that becomes present is another matter: it has to be valid. A bit may be set in the one behind, too.
    assume(not any(entry & PRESENT for entry in struct.unpack_from("<4Q", native, 0x7F8)))
    faults, emulated, emulated_regs, emulated_flags = outcome(shared, code, shared.table, shared.table_mfn, *args)
    assert not faults, f"{form.name}: {code.hex()} was not emulated"
    assert emulated == native
    if form.name == "cmpxchg" and size == 4 and native_flags & ZF:
        # The engine clears the upper half of RAX even where the exchange takes place; processors leave it alone.
        assert emulated_regs[RAX] == registers[RAX]
        native_regs[RAX] = registers[RAX]
    assert emulated_regs == native_regs
    assert (
        emulated_flags & ~ALL_FLAGS | emulated_flags & form.flags
        == native_flags & ~ALL_FLAGS | native_flags & form.flags
    )


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from((1, 2, 4, 8)), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 2),
    st.lists(OLD, min_size=3, max_size=3), VALUES.map(lambda value: value & ~0x0101_0101_0101_0101),
)  # fmt: skip
def test_string_instructions(
    shared: Guest, size: int, moves: bool, backwards: bool, repeated: bool, count: int, words: list[int], value: int
) -> None:
    """STOS and MOVS; REP as long as RCX says."""
    registers = [0] * 16
    registers[RAX], registers[RCX], registers[RSI] = value, count, PLAIN + 0xF80
    struct.pack_into("<16Q", shared.page(shared.plain_mfn), 0xF40, *[value] * 16)
    code = (
        (b"\xf3" if repeated else b"")
        + (b"\x66" if size == 2 else b"\x48" if size == 8 else b"")
        + bytes([(0xA4 if moves else 0xAA) | (size > 1)])
    )
    results = []
    for base, mfn in ((PLAIN, shared.plain_mfn), (shared.table, shared.table_mfn)):
        page = shared.page(mfn)
        page[:0xF00] = bytes(0xF00)
        struct.pack_into("<3Q", page, 0x7F8, *words)
        for i, register in enumerate(registers):
            shared.regs[i] = register
        shared.regs[RDI], shared.regs[RSP] = base + 0x800, shared.stack - 0x80
        shared.engine.rflags = 0x202 | (FLAG_DF if backwards else 0)
        assert not shared.run(code)
        found = [shared.regs[RDI] - base if i == RDI else shared.regs[i] for i in range(16)]
        results.append((bytes(page[:0xF00]), found))
        shared.engine.rflags = 0x202
    assert results[0] == results[1]


def test_an_entry_must_be_valid(guest: Guest) -> None:
    mine, theirs = guest.plain_mfn, 0x55
    store = b"\x48\x89\x07"  # mov [rdi], rax
    index = (guest.table_mfn << 9) + 0x100
    guest.regs[RSP], guest.regs[RDI] = guest.stack - 0x80, guest.table + 0x800
    for bad in (theirs << 12 | PRESENT, mine << 12 | PRESENT | RW | 1 << 8 | 1 << 7, guest.table_mfn << 12 | 3):
        guest.regs[RSP], guest.regs[RAX] = guest.stack - 0x80, bad
        assert guest.run(store)[0][:2] == (TRAP_PF, 3)
        assert guest.u64[index] == 0
        assert guest.regs[RAX] == bad
    guest.regs[RSP], guest.regs[RAX] = guest.stack - 0x80, mine << 12 | PRESENT | RW
    refs = guest.machine.domain.machine.refs[mine]
    assert not guest.run(store)
    assert guest.u64[index] & ~(1 << 52 | USER) == mine << 12 | PRESENT | RW
    assert guest.machine.domain.machine.refs[mine] == refs + 1


@pytest.mark.parametrize(
    "code",
    [
        b"\x48\x11\x07",  # adc [rdi], rax
        b"\x48\xc1\x27\x01",  # shl qword [rdi], 1
        b"\x48\xf7\x17",  # not qword [rdi]
        b"\x0f\x11\x07",  # movups [rdi], xmm0
        b"\x48\x0f\xc7\x0f",  # cmpxchg16b [rdi]
        b"\x48\x89\x47\x01",  # mov [rdi+1], rax: not aligned
    ],
)
def test_other_instructions_are_the_guests_own_fault(guest: Guest, code: bytes) -> None:
    guest.regs[RSP], guest.regs[RDI] = guest.stack - 0x80, guest.table + 0x800
    before = bytes(guest.page(guest.table_mfn))
    registers = [guest.regs[i] for i in range(16) if i != RSP]
    assert guest.run(code) == [(TRAP_PF, 3, CODE)]
    assert bytes(guest.page(guest.table_mfn)) == before
    assert [guest.regs[i] for i in range(16) if i != RSP] == registers


def test_no_table_but_of_level_1_is_written(guest: Guest) -> None:
    root = guest.cpu.kernel_root
    guest.map(guest.table, root, PRESENT)
    guest.regs[RSP], guest.regs[RDI], guest.regs[RAX] = guest.stack - 0x80, guest.table, 0
    before = bytes(guest.page(root))
    assert guest.run(b"\x48\x89\x07") == [(TRAP_PF, 3, CODE)]
    assert bytes(guest.page(root)) == before


def test_a_read_only_page_that_is_no_table_stays_read_only(guest: Guest) -> None:
    spare = guest.machine.mfn((MEMORY >> 12) - 2)
    guest.map(guest.table, spare, PRESENT)
    guest.regs[RSP], guest.regs[RDI], guest.regs[RAX] = guest.stack - 0x80, guest.table, 1
    assert guest.run(b"\x48\x89\x07") == [(TRAP_PF, 3, CODE)]


# -- the decoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "length"),
    [
        ("488907", 3), ("48894708", 4), ("48898788000000", 7), ("4889042578563412", 8), ("48890425785634", None),
        ("488905785634 12", 7), ("4c890c24", 4), ("4a894c8510", 5), ("f0480fb10f", 5), ("66c7071234", 5),
        ("48c70778563412", 7), ("c60712", 3), ("0fba2f05", 4), ("f3aa", 2), ("f348ab", 3), ("48", None), ("", None),
        ("0f", None), ("f0f0f0", None), ("4889c7", None), ("90", None), ("6748890f", 4), ("64488907", 4),
    ],
)  # fmt: skip
def test_lengths(code: str, length: int | None) -> None:
    found = decode(bytes.fromhex(code))
    assert (found and found.length) == length


@settings(max_examples=1000)
@given(st.binary(max_size=15))
def test_any_bytes_decode_or_dont(code: bytes) -> None:
    found = decode(code)
    assert found is None or 1 <= found.length <= len(code)


def test_a_rex_before_another_prefix_is_none() -> None:
    assert decode(b"\x48\x66\x89\x07").size == 2  # type: ignore[union-attr]
    assert decode(b"\x66\x48\x89\x07").size == 8  # type: ignore[union-attr]


# -- privileged instructions -------------------------------------------------------------------------------------------


def run_privileged(guest: Guest, code: bytes, **registers: int) -> list[tuple[int, int, int]]:
    names = {"rax": RAX, "rbx": RBX, "rcx": RCX, "rdx": RDX, "rsi": RSI, "rdi": RDI, "r8": R8}
    guest.regs[RSP] = guest.stack - 0x80
    for name, value in registers.items():
        guest.regs[names[name]] = value
    return guest.run(code)


def test_control_registers(guest: Guest) -> None:
    assert not run_privileged(guest, b"\x0f\x20\xd8")  # mov rax, cr3
    assert guest.regs[RAX] == guest.cpu.kernel_root << 12
    assert not run_privileged(guest, b"\x41\x0f\x20\xc0")  # mov r8, cr0
    assert guest.regs[R8] == 0x80050033
    assert not run_privileged(guest, b"\x0f\x22\xc0", rax=0x8005003B)  # mov cr0, rax: TS
    assert guest.engine.cr0_ts
    assert not run_privileged(guest, b"\x0f\x06")  # clts
    assert not guest.engine.cr0_ts
    assert run_privileged(guest, b"\x0f\x22\xc0", rax=0x11) == [(TRAP_GP, 0, CODE)]  # without paging
    assert not run_privileged(guest, b"\x0f\x22\xd0", rax=0x1234)  # cr2 is the guest's own
    assert not run_privileged(guest, b"\x0f\x20\xd3")  # mov rbx, cr2
    assert guest.regs[RBX] == 0x1234


def test_a_root_is_checked(guest: Guest) -> None:
    root = guest.cpu.kernel_root
    for bad in (guest.plain_mfn, 0x55, guest.table_mfn, 1 << 40):
        assert run_privileged(guest, b"\x0f\x22\xd8", rax=bad << 12) == [(TRAP_GP, 0, CODE)]
        assert guest.cpu.kernel_root == root
    assert not run_privileged(guest, b"\x0f\x22\xd8", rax=root << 12)


def test_interrupt_flag_and_ports(guest: Guest) -> None:
    for code in (b"\xfa", b"\xfb", b"\xe4\x60", b"\xec", b"\xee", b"\x6c"):
        assert run_privileged(guest, code, rdx=0x60, rdi=PLAIN) == [(TRAP_GP, 0, CODE)], code.hex()
    guest.cpu.iopl = 1 << 12
    assert not run_privileged(guest, b"\xfa\xfb")
    assert not run_privileged(guest, b"\xe4\x60", rax=0x1100)  # in al, 0x60: nothing there
    assert guest.regs[RAX] == 0x11FF
    assert not run_privileged(guest, b"\xef\xed", rdx=0x1234, rax=5)  # out dx, eax; in eax, dx
    assert guest.regs[RAX] == 0xFFFFFFFF
    # rep insb over a page's border, 6000 of them, in more than one go
    guest.map(guest.table, guest.machine.mfn((MEMORY >> 12) - 2), PRESENT | RW)
    assert not run_privileged(guest, b"\xf3\x6c", rdx=0x60, rdi=PLAIN + 0x400, rcx=6000)
    assert (guest.regs[RDI], guest.regs[RCX]) == (PLAIN + 0x400 + 6000, 0)
    assert bytes(guest.page(guest.plain_mfn)[0x400:]) == b"\xff" * 0xC00


def test_string_io_faults_where_memory_does(guest: Guest) -> None:
    guest.cpu.iopl = 1 << 12
    faults = run_privileged(guest, b"\xf3\x6c", rdx=0x60, rdi=guest.table + 0x10, rcx=3)
    assert [fault[0] for fault in faults] == [TRAP_PF]
    assert guest.regs[RCX] == 3
    assert guest.u64[guest.cpu.vcpu.info + 16 >> 3] == guest.table + 0x10


def test_debug_registers(guest: Guest) -> None:
    assert not run_privileged(guest, b"\x0f\x23\xc0\x0f\x21\xc3", rax=0x1000)  # mov dr0, rax; mov rbx, dr0
    assert guest.regs[RBX] == 0x1000
    assert run_privileged(guest, b"\x0f\x23\xc0", rax=0xFFFF_8000_0000_0000)[0][0] == TRAP_GP
    assert run_privileged(guest, b"\x0f\x23\xf8", rax=1 << 40)[0][0] == TRAP_GP
    assert not run_privileged(guest, b"\x0f\x23\xf8\x0f\x21\xfb", rax=0)  # dr7
    assert guest.regs[RBX] == 0x400


def test_an_instruction_at_the_end_of_what_is_mapped(guest: Guest) -> None:
    """CLI as the last byte of the last page: reading 15 bytes must not be what fails."""
    guest.map(guest.table, guest.plain_mfn, 0)
    guest.map(PLAIN, guest.plain_mfn, PRESENT | RW)
    guest.page(guest.plain_mfn)[0xFFF] = 0xFA
    guest.engine.invalidate_code(guest.plain_mfn << 12, 4096)
    guest.faults.clear()
    guest.stopped = False
    guest.regs[RIP], guest.regs[RSP] = PLAIN + 0xFFF, guest.stack - 0x80
    while not guest.stopped:
        guest.engine.run()
    assert guest.faults[0][0] in (TRAP_GP, TRAP_PF)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=15, max_size=15), st.integers(0, 2**64 - 1), st.integers(0, 3), st.sampled_from((0, 3 << 12)))
def test_emulating_any_bytes_whatever(shared: Guest, code: bytes, seed: int, where: int, iopl: int) -> None:
    """The emulators get bytes that a guest could change while they look: only a result, or the guest's own fault."""
    from pvirq.pv import emulate, writable_pagetable

    at = shared.mfn(CODE) << 12
    shared.mem[at : at + 15] = code
    rng = random.Random(seed)
    cpu = shared.cpu
    cpu.iopl = iopl
    for i in range(16):
        shared.regs[i] = rng.choice([0, PLAIN, shared.table, M64, rng.getrandbits(64)])
    shared.regs[RCX] = rng.choice([0, 1, 0xC0000080, 0xC0000101, 0x40000000, M64])
    shared.regs[RSP] = shared.stack - 0x80
    cpu.traps[TRAP_GP] = cpu.traps[TRAP_PF] = cpu.traps[6] = (CODE + 0x800, 0xE033, 0)
    root, held = cpu.kernel_root, shared.machine.domain.machine.type_count[cpu.kernel_root]
    for call in (
        lambda: emulate.privileged(cpu, CODE),
        lambda: emulate.invalid_opcode(cpu, CODE),
        lambda: writable_pagetable.emulate_write(cpu, shared.table + 0x800 + where * 2, CODE),
    ):
        shared.regs[RSP] = shared.stack - 0x80
        result = call()
        assert result is None or 0 <= result <= M64
    cpu.iopl = 0
    assert cpu.kernel_root == root
    assert shared.machine.domain.machine.type_count[root] == held


# -- model-specific registers and CPUID --------------------------------------------------------------------------------


def test_msrs(guest: Guest) -> None:
    cpu = guest.cpu
    for number, attribute in ((0xC0000100, "fs_base"), (0xC0000101, "gs_base")):
        assert write_msr(cpu, number, 0x1234000)
        assert getattr(guest.engine, attribute) == 0x1234000
        assert read_msr(cpu, number) == 0x1234000
        assert not write_msr(cpu, number, 1 << 47)
        assert not write_msr(cpu, number, 0xFFFF_7FFF_FFFF_FFFF)
        assert read_msr(cpu, number) == 0x1234000
    assert write_msr(cpu, 0xC0000102, 0x77)
    assert (cpu.inactive_gs_base, read_msr(cpu, 0xC0000102)) == (0x77, 0x77)
    assert read_msr(cpu, 0xC0000080) == 0xD01
    assert write_msr(cpu, 0xC0000080, 0xD01)
    assert not write_msr(cpu, 0xC0000080, 0x501)
    assert read_msr(cpu, 0x277) == 0x050100070406
    assert read_msr(cpu, 0x12345) is None
    assert not write_msr(cpu, 0x12345, 0)


def test_the_hypercall_page_goes_into_the_guests_own_memory_only(guest: Guest) -> None:
    spare = guest.machine.mfn((MEMORY >> 12) - 2)
    assert write_msr(guest.cpu, 0x40000000, spare << 12)
    assert bytes(guest.page(spare)[32:40]) == b"\x51\x41\x53\xb8\x01\0\0\0"
    for bad in (0x55 << 12, guest.table_mfn << 12, guest.cpu.kernel_root << 12, 1 << 50, spare << 12 | 1):
        before = bytes(guest.page(bad >> 12)) if bad >> 12 < 1 << 16 else b""
        assert not write_msr(guest.cpu, 0x40000000, bad)
        assert not before or bytes(guest.page(bad >> 12)) == before


def test_rdmsr_and_wrmsr(guest: Guest) -> None:
    assert not run_privileged(guest, b"\x0f\x30\x0f\x32", rcx=0xC0000101, rax=0xFFFFFFFF_00005000, rdx=0x7F)
    assert (guest.engine.gs_base, guest.regs[RAX], guest.regs[RDX]) == (0x7F00005000, 0x5000, 0x7F)
    assert run_privileged(guest, b"\x0f\x32", rcx=0x999) == [(TRAP_GP, 0, CODE)]
    assert run_privileged(guest, b"\x0f\x30", rcx=0xC0000101, rax=0, rdx=0x8000) == [(TRAP_GP, 0, CODE)]


def cpuid(guest: Guest, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
    assert not run_privileged(guest, b"\x0f\xa2", rax=leaf, rcx=subleaf)
    return guest.regs[RAX], guest.regs[RBX], guest.regs[RCX], guest.regs[RDX]


def test_cpuid_of_xen(guest: Guest) -> None:
    eax, *signature = cpuid(guest, 0x40000000)
    assert eax >= 0x40000002
    assert struct.pack("<3I", *signature) == b"XenVMMXenVMM"
    assert cpuid(guest, 0x40000001)[0] == 4 << 16 | 17
    assert cpuid(guest, 0x40000002)[:2] == (1, 0x40000000)
    clock = guest.host.clock
    assert cpuid(guest, 0x40000003, 1)[2:] == (clock.mul, clock.shift & 0xFF)


def test_forced_cpuid_is_cpuid(guest: Guest) -> None:
    for leaf in (0, 1, 0x40000000, 0x80000001):
        plain = cpuid(guest, leaf)
        assert not run_privileged(guest, b"\x0f\x0bxen\x0f\xa2", rax=leaf, rcx=0)
        assert tuple(guest.regs[i] for i in (RAX, RBX, RCX, RDX)) == plain
    assert run_privileged(guest, b"\x0f\x0bxeN\x0f\xa2")[0][0] == 6


def test_what_cpuid_hides(guest: Guest) -> None:
    _, _, ecx, edx = cpuid(guest, 1)
    assert ecx >> 31 & 1  # a hypervisor
    for bit in (3, 5, 17, 21, 26, 27, 28):  # MONITOR, VMX, PCID, x2APIC, XSAVE, OSXSAVE, AVX
        assert not ecx >> bit & 1, bit
    for bit in (1, 3, 7, 12, 13):  # VME, PSE, MCE, MTRR, PGE
        assert not edx >> bit & 1, bit
    assert cpuid(guest, 0x80000001)[3] >> 29 & 1  # long mode
    assert not cpuid(guest, 0x80000001)[3] >> 26 & 1  # 1 GiB pages
    assert cpuid(guest, 0xD) == (0, 0, 0, 0)
    assert cpuid(guest, 0x12345678) == (0, 0, 0, 0)


# -- descriptors -------------------------------------------------------------------------------------------------------

CALL_GATE = 0xC00 << 32 | 1 << 47


@pytest.mark.parametrize(
    ("given_", "checked"),
    [
        (0, 0),
        (descriptors.CODE64 & ~(3 << 45), descriptors.CODE64),  # DPL 0 becomes 3
        (descriptors.DATA, descriptors.DATA),
        (descriptors.DATA & ~(1 << 47), descriptors.DATA & ~(1 << 47)),  # not present: anything
        (0x1234 | CALL_GATE | 0x10 << 16, 0x1234 | CALL_GATE | 0x13 << 16),
        (CALL_GATE | 0xE030 << 16 | 3 << 45, CALL_GATE | 0xE033 << 16),
        (CALL_GATE | 0xE008 << 16, None),  # Xen's own segment
        (CALL_GATE | 0x10 << 16 | 1 << 32, None),  # a parameter count
        (0x900 << 32 | 1 << 47, None),  # TSS
        (0x200 << 32 | 1 << 47, None),  # LDT
        (0xE00 << 32 | 1 << 47, None),  # interrupt gate
    ],
)
def test_descriptors(given_: int, checked: int | None) -> None:
    if checked is None:
        with pytest.raises(XenError) as info:
            descriptors.check(given_)
        assert info.value.errno == Errno.EINVAL
    else:
        assert descriptors.check(given_) == checked


@given(st.integers(0, M64))
def test_no_descriptor_gives_a_privilege(descriptor: int) -> None:
    try:
        found = descriptors.check(descriptor)
    except XenError:
        return
    high = found >> 32
    if high & descriptors.SEGMENT_P and high & descriptors.SEGMENT_S:
        assert high >> 13 & 3 == 3
    elif high & descriptors.SEGMENT_P and high & descriptors.SEGMENT_TYPE:
        assert high >> 13 & 3 == 0  # a gate, which faults
        assert found >> 16 & 3 == 3


def set_gdt(guest: Guest, page: bytes, entries: int = 512) -> int:
    mfn = guest.machine.mfn((MEMORY >> 12) - 3)
    index = guest.cpu.l1_index(VIRT_BASE + (((MEMORY >> 12) - 3) << 12))
    if index is not None and guest.u64[index] & PRESENT:
        guest.tables.set_l1(index, 0)
    guest.page(mfn)[: len(page)] = page
    descriptors.set_gdt(guest.cpu, [mfn], entries)
    guest.cpu.flush_tlb()
    return mfn


def test_a_gdt_of_the_guests(guest: Guest) -> None:
    based = descriptors.DATA & ~(0xFFFFFF << 16) | (0x5000 << 16)  # base 0x5000, flat limit
    mfn = set_gdt(guest, struct.pack("<4Q", 0, 0, based & ~(3 << 45), descriptors.CODE64))
    machine = guest.machine.domain.machine
    assert (machine.type[mfn], machine.type_count[mfn]) == (PGT_SEG_DESC, 1)
    assert not run_privileged(guest, b"\x8e\xe8", rax=0x13)  # mov gs, ax
    assert guest.engine.gs_base == 0x5000
    assert run_privileged(guest, b"\x8e\xe8", rax=0x23)[0][:2] == (TRAP_GP, 0x20)
    assert not run_privileged(guest, b"\x8e\xe8", rax=0xE02B)  # Xen's are there as ever
    with pytest.raises(XenError):
        guest.map(PLAIN, mfn, PRESENT | RW)
    guest.map(PLAIN, mfn, PRESENT)
    descriptors.set_gdt(guest.cpu, [], 0)
    assert machine.type_count[mfn] == 0
    guest.map(PLAIN, mfn, PRESENT | RW)


def test_a_bad_gdt_leaves_the_old(guest: Guest) -> None:
    mfn = set_gdt(guest, struct.pack("<2Q", 0, descriptors.DATA))
    other = guest.machine.mfn((MEMORY >> 12) - 2)
    struct.pack_into("<Q", guest.page(other), 8, 0x900 << 32 | 1 << 47)
    for frames in ([other], [mfn, other], [0x55], [guest.table_mfn], [1 << 50]):
        with pytest.raises(XenError):
            descriptors.set_gdt(guest.cpu, frames, 512 * len(frames))
        assert guest.cpu.gdt_frames == [mfn]
        assert guest.machine.domain.machine.type_count[mfn] == 1
    assert not run_privileged(guest, b"\x8e\xe8", rax=0xB)


def test_an_ldt_is_mapped_when_it_is_used(guest: Guest) -> None:
    ldt = guest.table
    mfn = guest.machine.mfn((MEMORY >> 12) - 2)
    guest.map(ldt, mfn, PRESENT)
    struct.pack_into("<3Q", guest.page(mfn), 0, 0, descriptors.DATA & ~(0xFFFFFF << 16) | 0x6000 << 16, 0)
    descriptors.set_ldt(guest.cpu, ldt, 3)
    machine = guest.machine.domain.machine
    assert machine.type_count[mfn] == 0
    assert not run_privileged(guest, b"\x8e\xe8", rax=0xF)
    assert guest.engine.gs_base == 0x6000
    assert (machine.type[mfn], machine.type_count[mfn]) == (PGT_SEG_DESC, 1)
    assert run_privileged(guest, b"\x8e\xe8", rax=0x1F)[0][:2] == (TRAP_GP, 0x1C)
    descriptors.set_ldt(guest.cpu, 0, 0)
    assert machine.type_count[mfn] == 0
    assert run_privileged(guest, b"\x8e\xe8", rax=0xF)[0][:2] == (TRAP_GP, 0xC)

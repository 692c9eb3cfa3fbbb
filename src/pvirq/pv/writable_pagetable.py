"""Writes to a page table through a read-only mapping (xen/arch/x86/pv/ro-page-fault.c).

A guest kernel may write an entry of a level-1 table with an ordinary instruction, although the table is mapped
read-only: Xen carries the write out on its behalf, checked like MMU_NORMAL_PT_UPDATE. Only the instructions that
kernels use on page-table entries are known here; any other is given back to the guest as the page fault it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import XenError
from pvirq.engine.protocol import FLAG_CF, FLAG_DF, FLAG_ZF, RAX, RBX, RCX, RDI, RDX, RSI, RSP
from pvirq.pv.decode import Instruction, decode
from pvirq.pv.pagetable import ADDRESS, PRESENT, RW
from pvirq.xen.memory import PGT_L1

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

M64: Final = (1 << 64) - 1
FLAG_PF, FLAG_AF, FLAG_SF, FLAG_OF = 1 << 2, 1 << 4, 1 << 7, 1 << 11
ARITHMETIC_FLAGS: Final = FLAG_CF | FLAG_PF | FLAG_AF | FLAG_ZF | FLAG_SF | FLAG_OF


def emulate_write(cpu: PvVcpu, va: int, rip: int) -> int | None:
    """Carry out the write to `va` that faulted at `rip`. The next RIP, or None where it isn't Xen's business."""
    index = cpu.l1_index(va)
    if index is None:
        return None
    machine = cpu.domain.machine
    pte = machine.u64[index]
    mfn = (pte & ADDRESS) >> 12
    if pte & (PRESENT | RW) != PRESENT or not cpu.tables.owns(mfn):
        return None
    if machine.type[mfn] != PGT_L1 or not machine.type_count[mfn]:
        return None
    try:
        code = cpu.read(rip, 15)
    except XenError:
        code = cpu.read(rip, 0x1000 - (rip & 0xFFF))
    instruction = decode(code)
    if instruction is None or va & (instruction.size - 1):
        return None
    at = mfn << 12 | va & 0xFFF
    result = _compute(cpu, instruction, at)
    if result is None:
        return None
    new, commit = result
    if new is not None:
        try:
            _store(cpu, at, new, instruction.size)
        except XenError:
            return None
    commit()
    cpu.engine.flush_page(va)
    return rip if commit.again else rip + instruction.length & M64


def _store(cpu: PvVcpu, at: int, value: int, size: int) -> None:
    """Put `size` bytes into the table; a part of an entry makes a new whole entry."""
    if size == 8:
        cpu.tables.set_l1(at >> 3, value)
        return
    shift = (at & 7) * 8
    mask = (1 << size * 8) - 1
    entry = cpu.domain.machine.u64[at >> 3]
    cpu.tables.set_l1(at >> 3, entry & ~(mask << shift) & M64 | (value & mask) << shift)


class _Commit:
    """Register and flag changes of an instruction, made once its write was allowed."""

    def __init__(self, cpu: PvVcpu) -> None:
        self._cpu = cpu
        self.registers: list[tuple[int, int, int, bool]] = []
        self.flags: tuple[int, int] | None = None  # mask, value
        self.again = False  # the instruction isn't finished

    def __call__(self) -> None:
        for number, size, value, rex in self.registers:
            write_register(self._cpu.regs, number, size, value, rex)
        if self.flags is not None:
            mask, value = self.flags
            self._cpu.engine.rflags = self._cpu.engine.rflags & ~mask | value


def _compute(cpu: PvVcpu, ins: Instruction, at: int) -> tuple[int | None, _Commit] | None:
    """The value that the instruction would store (None: it stores nothing new) and its other effects."""
    size, opcode = ins.size, ins.opcode
    mask = (1 << size * 8) - 1
    old = int.from_bytes(cpu.domain.machine.mem[at : at + size], "little")
    operand = read_register(cpu.regs, ins.reg, size, ins.rex)
    commit = _Commit(cpu)

    if opcode in (0x88, 0x89):  # mov r, r/m
        return operand, commit
    if opcode in (0xC6, 0xC7) and ins.reg & 7 == 0:  # mov imm
        return ins.immediate & mask, commit
    if opcode in (0x86, 0x87):  # xchg
        commit.registers.append((ins.reg, size, old, ins.rex))
        return operand, commit
    if opcode == 0x0FC3:  # movnti
        return operand, commit
    if opcode in (0xA4, 0xA5, 0xAA, 0xAB):
        return _string(cpu, ins, commit)
    if opcode == 0x8F and ins.reg & 7 == 0:  # pop
        try:
            value = int.from_bytes(cpu.read(cpu.regs[RSP], size), "little")
        except XenError:
            return None
        commit.registers.append((RSP, 8, cpu.regs[RSP] + size & M64, True))
        return value, commit
    if opcode in (0x0FB0, 0x0FB1):  # cmpxchg
        accumulator = cpu.regs[RAX] & mask
        commit.flags = (ARITHMETIC_FLAGS, _flags_of_sub(accumulator, old, size))
        if accumulator == old:
            return operand, commit
        commit.registers.append((RAX, size, old, True))
        return None, commit
    if opcode == 0x0FC7 and ins.reg & 7 == 1 and not ins.wide:  # cmpxchg8b
        old = cpu.domain.machine.u64[at >> 3]
        expected = cpu.regs[RAX] & 0xFFFFFFFF | (cpu.regs[RDX] & 0xFFFFFFFF) << 32
        commit.flags = (FLAG_ZF, FLAG_ZF if old == expected else 0)
        if old == expected:
            return cpu.regs[RBX] & 0xFFFFFFFF | (cpu.regs[RCX] & 0xFFFFFFFF) << 32, commit
        commit.registers += [(RAX, 4, old & 0xFFFFFFFF, True), (RDX, 4, old >> 32, True)]
        return None, commit
    if opcode in (0x0FC0, 0x0FC1):  # xadd
        total = old + operand & mask
        commit.registers.append((ins.reg, size, old, ins.rex))
        commit.flags = (ARITHMETIC_FLAGS, _flags_of_add(old, operand, size))
        return total, commit
    if opcode in (0x0FAB, 0x0FB3, 0x0FBB) or (opcode == 0x0FBA and ins.reg & 7 >= 5):  # bts btr btc
        # A register operand may name a bit outside the word; CR2 is then that word's address already.
        bit = (ins.immediate if opcode == 0x0FBA else operand) & (size * 8 - 1)
        kind = {0x0FAB: 5, 0x0FB3: 6, 0x0FBB: 7}.get(opcode, ins.reg & 7)
        commit.flags = (FLAG_CF, FLAG_CF if old >> bit & 1 else 0)
        new = old | 1 << bit if kind == 5 else old & ~(1 << bit) if kind == 6 else old ^ 1 << bit
        return new, commit
    return _arithmetic(ins, old, operand, mask, commit)


def _string(cpu: PvVcpu, ins: Instruction, commit: _Commit) -> tuple[int, _Commit] | None:
    """MOVS and STOS; a repeated one an element at a time, and then it is executed again."""
    step = -ins.size if cpu.engine.rflags & FLAG_DF else ins.size
    value = cpu.regs[RAX] & ((1 << ins.size * 8) - 1)
    if ins.opcode in (0xA4, 0xA5):
        try:
            value = int.from_bytes(cpu.read(cpu.regs[RSI], ins.size), "little")
        except XenError:
            return None
        commit.registers.append((RSI, 8, cpu.regs[RSI] + step & M64, True))
    commit.registers.append((RDI, 8, cpu.regs[RDI] + step & M64, True))
    if ins.repeated:
        left = cpu.regs[RCX] - 1 & M64
        commit.registers.append((RCX, 8, left, True))
        commit.again = left != 0
    return value, commit


def _arithmetic(ins: Instruction, old: int, operand: int, mask: int, commit: _Commit) -> tuple[int, _Commit] | None:
    if ins.opcode in (0xFE, 0xFF) and ins.reg & 7 < 2:  # inc, dec: as add and sub, but for CF
        kind, operand = 5 * (ins.reg & 7), 1
    elif ins.opcode in (0x80, 0x81, 0x83):
        kind, operand = ins.reg & 7, ins.immediate & mask
    elif ins.opcode < 0x38 and ins.opcode & 7 in (0, 1):
        kind = ins.opcode >> 3
    else:
        return None
    match kind:
        case 0:
            new, flags = old + operand & mask, _flags_of_add(old, operand, ins.size)
        case 1:
            new = old | operand
            flags = _flags_of_result(new, ins.size)
        case 4:
            new = old & operand
            flags = _flags_of_result(new, ins.size)
        case 5:
            new, flags = old - operand & mask, _flags_of_sub(old, operand, ins.size)
        case 6:
            new = old ^ operand
            flags = _flags_of_result(new, ins.size)
        case _:  # adc, sbb and cmp: no kernel does that to a page table
            return None
    changed = ARITHMETIC_FLAGS & ~FLAG_CF if ins.opcode in (0xFE, 0xFF) else ARITHMETIC_FLAGS
    commit.flags = (changed, flags & changed)
    return new, commit


def _flags_of_result(value: int, size: int) -> int:
    return (
        (FLAG_ZF if value == 0 else 0)
        | (FLAG_SF if value >> (size * 8 - 1) & 1 else 0)
        | (FLAG_PF if (value & 0xFF).bit_count() % 2 == 0 else 0)
    )


def _flags_of_add(a: int, b: int, size: int) -> int:
    mask = (1 << size * 8) - 1
    total = a + b
    overflow = ~(a ^ b) & (a ^ total) & mask
    return (
        _flags_of_result(total & mask, size)
        | (FLAG_CF if total > mask else 0)
        | ((a ^ b ^ total) & FLAG_AF)
        | (FLAG_OF if overflow >> (size * 8 - 1) & 1 else 0)
    )


def _flags_of_sub(a: int, b: int, size: int) -> int:
    mask = (1 << size * 8) - 1
    difference = a - b & mask
    overflow = (a ^ b) & (a ^ difference)
    return (
        _flags_of_result(difference, size)
        | (FLAG_CF if a < b else 0)
        | ((a ^ b ^ difference) & FLAG_AF)
        | (FLAG_OF if overflow >> (size * 8 - 1) & 1 else 0)
    )


def read_register(regs: memoryview, number: int, size: int, rex: bool) -> int:
    """A general register of `size` bytes; without REX the byte registers 4 to 7 are AH, CH, DH, BH."""
    if size == 1 and not rex and number >= 4:
        return regs[number - 4] >> 8 & 0xFF
    return int(regs[number]) & ((1 << size * 8) - 1)


def write_register(regs: memoryview, number: int, size: int, value: int, rex: bool = True) -> None:
    """Write a general register: 32-bit writes clear its upper half, smaller ones keep the rest."""
    if size == 1 and not rex and number >= 4:
        regs[number - 4] = regs[number - 4] & ~0xFF00 | (value & 0xFF) << 8
    elif size >= 4:
        regs[number] = value & ((1 << size * 8) - 1)
    else:
        mask = (1 << size * 8) - 1
        regs[number] = regs[number] & ~mask | value & mask

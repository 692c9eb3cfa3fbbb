"""A decoder for the few 64-bit instructions that Xen emulates for a PV guest: one operand in memory or none.

Not a disassembler: the memory operand's address is never needed (the fault gives it), so only lengths, registers
and immediates are worked out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

LEGACY_PREFIXES: Final = frozenset(b"\x26\x2e\x36\x3e\x64\x65\x66\x67\xf0\xf2\xf3")

# Opcodes (0x0Fxx for two bytes) with a ModRM byte, and how many bytes of immediate follow (-1: operand size, up to 4).
_BYTE_OPERAND: Final = frozenset(
    [0x88, 0x86, 0xC6, 0x80, 0xA4, 0xAA, 0xFE, 0x0FB0, 0x0FC0, *(op << 3 for op in range(7))]
)
_MODRM: Final = {
    **{op << 3 | low: 0 for op in range(7) for low in (0, 1)},
    0x80: 1, 0x81: -1, 0x83: 1, 0x86: 0, 0x87: 0, 0x88: 0, 0x89: 0, 0x8F: 0, 0xC6: 1, 0xC7: -1, 0xFE: 0, 0xFF: 0,
    0x0FAB: 0, 0x0FB0: 0, 0x0FB1: 0, 0x0FB3: 0, 0x0FBA: 1, 0x0FBB: 0, 0x0FC0: 0, 0x0FC1: 0, 0x0FC3: 0, 0x0FC7: 0,
}  # fmt: skip
_NO_MODRM: Final = frozenset([0xA4, 0xA5, 0xAA, 0xAB])


@dataclass(slots=True)
class Instruction:
    """`opcode` has 0x0F00 added for two-byte ones; `reg` is ModRM.reg with REX.R; `size` the operand's, in bytes."""

    opcode: int
    length: int
    size: int
    reg: int
    immediate: int  # sign-extended
    rex: bool
    wide: bool  # REX.W
    repeated: bool  # F2 or F3


# One-byte opcodes without a ModRM byte, and those of 0F xx.
_PUSHES_OR_POPS: Final = frozenset([*range(0x50, 0x60), 0x68, 0x6A, 0x8F, 0x9C, 0x9D, 0xC2, 0xC3, 0xC8, 0xC9, 0xE8])
_ONE_BYTE_MODRM: Final = frozenset(
    [op for op in range(0x40) if op & 7 < 4]
    + [0x63, 0x69, 0x6B, *range(0x80, 0x90), 0xC0, 0xC1, 0xC6, 0xC7, *range(0xD0, 0xD4), *range(0xD8, 0xE0)]
    + [0xF6, 0xF7, 0xFE, 0xFF]
)
_TWO_BYTE_WITHOUT_MODRM: Final = frozenset(
    [*range(5, 13), *range(48, 56), 119, *range(128, 144), 160, 161, 162, 168, 169, 170, *range(200, 208)]
)
_RSP, _RBP = 4, 5


def stack_operand(code: bytes) -> tuple[int, int] | None:
    """(base register, displacement) of a memory operand that goes through SS: RSP or RBP is its base; or None.

    What it is for: a non-canonical address there is #SS, elsewhere #GP.
    """
    try:
        return _stack_operand(code)
    except IndexError:
        return None


def _stack_operand(code: bytes) -> tuple[int, int] | None:
    i, rex, _, _ = prefixes(code)
    if 0x64 in code[:i] or 0x65 in code[:i]:  # FS and GS override; the others mean nothing in 64-bit code
        return None
    opcode = code[i]
    i += 1
    if opcode == 0x0F:
        if code[i] in _TWO_BYTE_WITHOUT_MODRM:
            return None
        i += 1
    elif opcode in _PUSHES_OR_POPS:
        return _RSP, 0
    elif opcode not in _ONE_BYTE_MODRM:
        return None
    modrm = code[i]
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3 or rex & 1:  # R12 and R13 go through DS
        return None
    i += 1
    if rm == _RSP:
        rm = code[i] & 7
        i += 1
    if rm not in (_RSP, _RBP) or (rm == _RBP and mod == 0):
        return None
    size = {0: 0, 1: 1, 2: 4}[mod]
    return rm, int.from_bytes(code[i : i + size], "little", signed=True)


def prefixes(code: bytes) -> tuple[int, int, bool, bool]:
    """(bytes of prefixes, REX byte or 0, 66 seen, F2/F3 seen)."""
    i, rex, small, repeated = 0, 0, False, False
    while i < len(code):
        byte = code[i]
        if byte in LEGACY_PREFIXES:
            small |= byte == 0x66
            repeated |= byte in (0xF2, 0xF3)
            rex = 0  # a REX before a legacy prefix is ignored
        elif 0x40 <= byte <= 0x4F:
            rex = byte
        else:
            break
        i += 1
    return i, rex, small, repeated


def decode(code: bytes) -> Instruction | None:
    """Decode an instruction that writes memory; None for any not in the table, or cut short."""
    try:
        return _decode(code)
    except IndexError:
        return None


def _decode(code: bytes) -> Instruction | None:
    i, rex, small, repeated = prefixes(code)
    opcode = code[i]
    i += 1
    if opcode == 0x0F:
        opcode = 0x0F00 | code[i]
        i += 1
    size = 1 if opcode in _BYTE_OPERAND else 8 if rex & 8 else 2 if small else 4
    if opcode == 0x0FC7 or (opcode == 0x8F and not small):
        size = 8
    if opcode in _NO_MODRM:
        return Instruction(opcode, i, size, 0, 0, bool(rex), bool(rex & 8), repeated)
    if opcode not in _MODRM:
        return None
    modrm = code[i]
    i += 1
    mod, rm = modrm >> 6, modrm & 7
    if mod == 3:
        return None
    if rm == 4:
        sib_base = code[i] & 7
        i += 1
        if mod == 0 and sib_base == 5:
            i += 4
    elif mod == 0 and rm == 5:
        i += 4
    i += {0: 0, 1: 1, 2: 4}[mod]
    width = _MODRM[opcode]
    if width < 0:
        width = min(size, 4)
    if i + width > len(code):
        return None
    immediate = int.from_bytes(code[i : i + width], "little", signed=True) if width else 0
    reg = modrm >> 3 & 7 | (rex & 4) << 1
    return Instruction(opcode, i + width, size, reg, immediate, bool(rex), bool(rex & 8), repeated)

"""Privileged instructions that a PV guest may nevertheless use, because Xen emulates them on the #GP.

xen/arch/x86/pv/emul-priv-op.c (which instructions, and what each does) and emul-inv-op.c (the CPUID that asks for
emulation). Everything else stays the fault that it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.abi.arch_x86 import VMASST_TYPE_architectural_iopl
from pvirq.abi.errno import XenError
from pvirq.engine.protocol import FLAG_DF, RAX, RBX, RCX, RDI, RDX, RSI, TRAP_GP, TRAP_UD
from pvirq.pv.addresses import addr_ok, canonical
from pvirq.pv.decode import prefixes, stack_operand
from pvirq.pv.msr import read_msr, write_msr
from pvirq.pv.writable_pagetable import write_register

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

M64: Final = (1 << 64) - 1
M32: Final = 0xFFFFFFFF
CR0_TS: Final = 1 << 3
CR0_GUEST: Final = 0x80050033  # PG AM WP NE ET MP PE: what Xen itself runs with, and the guest reads
CR4_GUEST_WRITABLE: Final = 1 << 2 | 1 << 3  # TSD, DE
CR4_GUEST_SHOWN: Final = 0x660  # PAE MCE OSFXSR OSXMMEXCPT
PCI_CONFIG_ADDRESS: Final = 0xCF8
RTC_INDEX: Final = 0x70
LONGEST_STRING: Final = 4096  # elements of one REP INS/OUTS before the guest gets its turn again
RDPMC: Final = b"\x0f\x33"
FORCED_CPUID: Final = b"\x0f\x0bxen\x0f\xa2"
CLI, STI = 0xFA, 0xFB
IN_BYTE: Final = 0xEC
ONE_BYTE_IO: Final = frozenset((0xEC, 0xED, 0xEE, 0xEF))


def invalid_opcode(cpu: PvVcpu, rip: int) -> int:
    """#UD: the guest's own, unless it is a call for Xen's CPUID, or an instruction that the engine lacks.

    `ud2a; .ascii "xen"; cpuid` is CPUID as Xen answers it (emulate_forced_invalid_op).
    """
    try:
        code = cpu.read(rip, len(RDPMC))
        if code == RDPMC:
            return cpu.inject(TRAP_GP, rip)  # no guest has CR4.PCE
        if code == FORCED_CPUID[:2] and cpu.read(rip, len(FORCED_CPUID)) == FORCED_CPUID:
            regs = cpu.regs
            leaf = cpu.cpuid(regs[RAX] & M32, regs[RCX] & M32)
            regs[RAX], regs[RBX], regs[RCX], regs[RDX] = leaf
            return rip + len(FORCED_CPUID) & M64
    except XenError:
        pass
    return cpu.inject(TRAP_UD, rip)


def is_stack_fault(cpu: PvVcpu, rip: int) -> bool:
    """The #GP(0) at `rip` is an access through SS to a non-canonical address: #SS(0), which the engine doesn't know."""
    try:
        operand = stack_operand(cpu.read(rip, min(15, 0x1000 - (rip & 0xFFF))))
    except XenError:
        return False
    if operand is None:
        return False
    base, displacement = operand
    va = cpu.regs[base] + displacement & M64
    return not canonical(va)


def iopl_ok(cpu: PvVcpu) -> bool:
    """The guest has the I/O privilege for the mode that it is in (iopl_ok)."""
    if cpu.user_mode:
        level = 3
    else:
        level = 0 if cpu.guest.assists & 1 << VMASST_TYPE_architectural_iopl else 1
    return level <= cpu.iopl >> 12


def privileged(cpu: PvVcpu, rip: int) -> int | None:
    """Emulate the instruction at `rip` that raised #GP(0). Where to go on, or None: the #GP is the guest's."""
    try:
        first = cpu.domain.machine.mem[cpu.translate(rip)]
        if first in ONE_BYTE_IO:  # by far the most frequent: drivers that poll a port
            return _one_byte_io(cpu, rip, first)
        room = 0x1000 - (rip & 0xFFF)
        code = cpu.read(rip, min(15, room))
        if room < 15:
            code += cpu.read(rip + room, 15 - room)
    except XenError:
        return None
    i, rex, small, repeated = prefixes(code)
    if i >= len(code) - 3:
        return None
    opcode = code[i]
    if opcode in (CLI, STI):
        # Nothing happens: Xen emulates neither, since it could never see the POPF that undoes it.
        return rip + i + 1 & M64 if iopl_ok(cpu) else None
    if opcode & 0xFC == 0x6C:
        return _string_io(cpu, rip, i + 1, opcode, small, repeated)
    if opcode & 0xF4 == 0xE4:
        return _port_io(cpu, rip, code, i, small)
    if opcode != 0x0F:
        return None
    return _two_byte(cpu, rip, code, i + 1, rex)


def _two_byte(cpu: PvVcpu, rip: int, code: bytes, i: int, rex: int) -> int | None:
    regs = cpu.regs
    opcode = code[i]
    after = rip + i + 1 & M64
    match opcode:
        case 0x06:  # clts
            if cpu.user_mode:
                return None
            set_task_switched(cpu, False)
        case 0x09:  # wbinvd: nothing to write back
            if cpu.user_mode:
                return None
        case 0x20 | 0x22:
            modrm = code[i + 1]
            register, which = modrm & 7 | (rex & 1) << 3, modrm >> 3 & 7 | (rex & 4) << 1
            after += 1
            if cpu.user_mode:
                return None
            if opcode == 0x20:
                value = _read_control(cpu, which)
                if value is None:
                    return None
                regs[register] = value
            elif not _write_control(cpu, which, regs[register]):
                return None
        case 0x21 | 0x23:
            modrm = code[i + 1]
            register, which = modrm & 7 | (rex & 1) << 3, modrm >> 3 & 7
            after += 1
            if cpu.user_mode:
                return None
            if opcode == 0x21:
                regs[register] = read_debug_register(cpu, which)
            elif not write_debug_register(cpu, which, regs[register]):
                return cpu.inject(TRAP_GP, rip)
        case 0x30:
            if cpu.user_mode or not write_msr(cpu, regs[RCX] & M32, regs[RAX] & M32 | (regs[RDX] & M32) << 32):
                return None
        case 0x32:
            if cpu.user_mode:
                return None
            value = read_msr(cpu, regs[RCX] & M32)
            if value is None:
                return None
            regs[RAX], regs[RDX] = value & M32, value >> 32
        case 0x31:  # rdtsc under CR4.TSD
            ticks = cpu.domain.hypervisor.clock.ticks()
            regs[RAX], regs[RDX] = ticks & M32, ticks >> 32
        case _:
            return None
    return after


# -- control and debug registers -----------------------------------------------------------------------------------


def set_task_switched(cpu: PvVcpu, value: bool) -> None:
    """CR0.TS as HYPERVISOR_fpu_taskswitch, CLTS and MOV to CR0 set it."""
    cpu.cr0_ts = value
    cpu.engine.cr0_ts = value


def _read_control(cpu: PvVcpu, which: int) -> int | None:
    match which:
        case 0:
            return CR0_GUEST | (CR0_TS if cpu.cr0_ts else 0)
        case 2:
            return cpu.domain.machine.u64[cpu.vcpu.info + 16 >> 3]
        case 3:
            return cpu.kernel_root << 12
        case 4:
            return CR4_GUEST_SHOWN | cpu.cr4
        case _:
            return None


def _write_control(cpu: PvVcpu, which: int, value: int) -> bool:
    match which:
        case 0:
            if (value ^ CR0_GUEST) & ~CR0_TS:
                return False
            set_task_switched(cpu, bool(value & CR0_TS))
        case 2:
            cpu.domain.machine.u64[cpu.vcpu.info + 16 >> 3] = value
        case 3:
            try:
                cpu.guest.new_kernel_root(cpu, value >> 12)
            except XenError:
                return False
        case 4:
            cpu.cr4 = value & CR4_GUEST_WRITABLE
        case _:
            return False
    return True


def read_debug_register(cpu: PvVcpu, which: int) -> int:
    """DR0-3, DR6, DR7; 4 and 5 are aliases of 6 and 7."""
    return cpu.debug_registers[which + 2 if which in (4, 5) else which]


def write_debug_register(cpu: PvVcpu, which: int, value: int) -> bool:
    """False where the value is not allowed (set_debugreg): an address of Xen's, or reserved bits."""
    which = which + 2 if which in (4, 5) else which
    if which < 4:
        if not addr_ok(value):
            return False
    elif value >> 32:
        return False
    elif which == 6:
        value = value & ~0x1000 | 0xFFFF0FF0
    elif which == 7:
        value = value & ~0xD800 | 0x400
        if value & 1 << 13:  # general detect is Xen's own
            return False
        for i in range(4):  # enabled I/O breakpoints need CR4.DE
            if value >> 2 * i & 3 and value >> (16 + 4 * i) & 3 == 2 and not cpu.cr4 & 1 << 3:
                return False
    cpu.debug_registers[which] = value
    return True


# -- ports ---------------------------------------------------------------------------------------------------------


def _io_okay(cpu: PvVcpu, port: int, size: int) -> bool:
    """By I/O privilege level, or the guest's own permission bitmap (guest_io_okay)."""
    if iopl_ok(cpu):
        return True
    bitmap, ports = cpu.io_bitmap
    if port + size > ports:
        return False
    try:
        bits = int.from_bytes(cpu.read_as_kernel(bitmap + (port >> 3), 2), "little")
    except XenError:
        return False
    return not bits >> (port & 7) & ((1 << size) - 1)


def _port_read(cpu: PvVcpu, port: int, size: int) -> int:
    """No guest here owns a port, so all ones but where Xen remembers what was written (guest_io_read)."""
    if port == PCI_CONFIG_ADDRESS and size == 4:
        return cpu.pci_cf8
    value = (1 << size * 8) - 1
    return value & ~0xFF | cpu.cmos_index if port == RTC_INDEX else value


def _port_write(cpu: PvVcpu, port: int, size: int, value: int) -> None:
    """guest_io_write: two index registers are each guest's own, all else goes nowhere."""
    if port == PCI_CONFIG_ADDRESS and size == 4:
        cpu.pci_cf8 = value & M32
    elif port == RTC_INDEX:
        cpu.cmos_index = value & 0x7F


def _in_or_out(cpu: PvVcpu, opcode: int, port: int, size: int) -> None:
    if opcode & 2:
        _port_write(cpu, port, size, cpu.regs[RAX])
    else:
        write_register(cpu.regs, RAX, size, _port_read(cpu, port, size))


def _one_byte_io(cpu: PvVcpu, rip: int, opcode: int) -> int | None:
    """IN and OUT of a byte or 32 bits, port in DX, without a prefix."""
    size = 4 if opcode & 1 else 1
    regs = cpu.regs
    port = regs[RDX] & 0xFFFF
    if not _io_okay(cpu, port, size):
        return None
    if opcode == IN_BYTE and port != RTC_INDEX:
        regs[RAX] |= 0xFF
    else:
        _in_or_out(cpu, opcode, port, size)
    return rip + 1 & M64


def _port_io(cpu: PvVcpu, rip: int, code: bytes, i: int, small: bool) -> int | None:
    opcode = code[i]
    size = 1 if not opcode & 1 else 2 if small else 4
    if opcode & 8:
        port, length = cpu.regs[RDX] & 0xFFFF, i + 1
    else:
        port, length = code[i + 1], i + 2
    if not _io_okay(cpu, port, size):
        return None
    _in_or_out(cpu, opcode, port, size)
    return rip + length & M64


def _string_io(cpu: PvVcpu, rip: int, length: int, opcode: int, small: bool, repeated: bool) -> int | None:
    """INS and OUTS. A repeated one does at most LONGEST_STRING elements, and then is executed again."""
    regs = cpu.regs
    size = 1 if not opcode & 1 else 2 if small else 4
    port = regs[RDX] & 0xFFFF
    if not _io_okay(cpu, port, size):
        return None
    count = min(regs[RCX], LONGEST_STRING) if repeated else 1
    step = -size if cpu.engine.rflags & FLAG_DF else size
    pointer = RSI if opcode & 2 else RDI
    data = _port_read(cpu, port, size).to_bytes(size, "little")
    for _ in range(count):
        va = regs[pointer]
        try:
            if opcode & 2:
                cpu.read(va, size)
            else:
                cpu.write(va, data)
        except XenError:
            return cpu.inject_page_fault(va, 0 if opcode & 2 else 2, rip)
        regs[pointer] = va + step & M64
        if repeated:
            regs[RCX] -= 1
    return rip if repeated and regs[RCX] else rip + length & M64

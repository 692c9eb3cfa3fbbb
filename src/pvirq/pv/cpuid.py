"""CPUID as a PV guest sees it: the engine's CPU less what Xen keeps for itself, and Xen's own leaves.

xen/arch/x86/cpuid.c (guest_cpuid, cpuid_hypervisor_leaves) and the PV mask of cpu-policy.c. A guest that asks in
the ordinary way gets the same answer as one that asks Xen (ud2a; "xen"; cpuid): Xen has CPUID faulting here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvirq.abi.xen import PAGE_SHIFT
from pvirq.engine.protocol import CpuidLeaf
from pvirq.xen.timer import Clock

XEN_CPUID_BASE: Final = 0x40000000
XEN_CPUID_MAX_NUM_LEAVES: Final = 5
XEN_VERSION: Final = 4 << 16 | 17
XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD: Final = 1


def _bits(*numbers: int) -> int:
    return sum(1 << number for number in numbers)


# Leaf 1 ECX: DTES64/MONITOR, VMX, SMX, PCID, x2APIC, TSC deadline, XSAVE and what needs it (FMA, AVX, F16C), RDRAND.
LEAF1_ECX_HIDDEN: Final = _bits(2, 3, 5, 6, 12, 17, 21, 24, 26, 27, 28, 29, 30)
HYPERVISOR_BIT: Final = 1 << 31
# Leaf 1 EDX: VME, PSE, MCE, SYSENTER, MTRR, PGE, MCA, PSE36, DS, ACPI. None of it is the guest's. (The APIC is shown.)
LEAF1_EDX_HIDDEN: Final = _bits(1, 3, 7, 11, 12, 13, 14, 17, 21, 22)
# Leaf 7 EBX: only instructions that need no state or control register: BMI1, BMI2, ADX. Not ERMS, which says that REP
# MOVSB is fast: an emulator moves a byte at a time, and a kernel that believes it takes eight times as long for a copy.
LEAF7_EBX_SHOWN: Final = _bits(3, 8, 19)
# Extended leaf 1: SVM, extended APIC space, IBS, SKINIT; and, repeated, the EDX bits of leaf 1, with 1 GiB pages.
EXTENDED1_ECX_HIDDEN: Final = _bits(2, 3, 10, 12)
EXTENDED1_EDX_HIDDEN: Final = _bits(1, 3, 7, 12, 13, 14, 17, 25, 26)


def guest_cpuid(
    native: Callable[[int, int], CpuidLeaf], clock: Clock, frames: int, leaf: int, subleaf: int
) -> CpuidLeaf:
    """The answer to CPUID with EAX=`leaf`, ECX=`subleaf`, on a machine with so many `frames` of memory."""
    if XEN_CPUID_BASE <= leaf < XEN_CPUID_BASE + 0x100:
        return _xen_leaf(clock, frames, leaf - XEN_CPUID_BASE, subleaf)
    eax, ebx, ecx, edx = native(leaf, subleaf if leaf in (4, 7, 0xB, 0xD) else 0)
    match leaf:
        case 0:
            eax = min(eax, 0xD)
        case 1:
            ebx &= 0x00FFFFFF  # APIC id 0
            ecx = ecx & ~LEAF1_ECX_HIDDEN | HYPERVISOR_BIT
            edx &= ~LEAF1_EDX_HIDDEN
        case 7:
            eax, ebx, ecx, edx = 0, (ebx & LEAF7_EBX_SHOWN if subleaf == 0 else 0), 0, 0
        case 5 | 6 | 9 | 0xA | 0xB | 0xD:
            eax = ebx = ecx = edx = 0
        case 0x80000001:
            ecx &= ~EXTENDED1_ECX_HIDDEN
            edx &= ~EXTENDED1_EDX_HIDDEN
        case _:
            pass
    return eax, ebx, ecx, edx


def _xen_leaf(clock: Clock, frames: int, leaf: int, subleaf: int) -> CpuidLeaf:
    match leaf, subleaf:
        case 0, _:
            return XEN_CPUID_BASE + XEN_CPUID_MAX_NUM_LEAVES, *_text(b"XenVMMXenVMM")
        case 1, _:
            return XEN_VERSION, 0, 0, 0
        case 2, _:
            return 1, XEN_CPUID_BASE, XEN_CPUID_FEAT1_MMU_PT_UPDATE_PRESERVE_AD, 0
        case 3, 0:
            return 0, 0, int(clock.hz / 1000), 0
        case 3, 1:
            return 0, 0, clock.mul, clock.shift & 0xFF
        case 3, 2:
            return int(clock.hz / 1000), 0, 0, 0
        case 5, 0:
            # The width of machine addresses: beyond 44 bits Linux has grant tables of version 2.
            return 0, (frames - 1).bit_length() + PAGE_SHIFT, 0, 0
        case _:
            return 0, 0, 0, 0


def _text(signature: bytes) -> tuple[int, int, int]:
    ebx, ecx, edx = (int.from_bytes(signature[i : i + 4], "little") for i in (0, 4, 8))
    return ebx, ecx, edx

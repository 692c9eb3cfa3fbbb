"""Model-specific registers as a PV guest finds them (guest_rdmsr and guest_wrmsr in xen/arch/x86/msr.c, and read_msr
and write_msr in pv/emul-priv-op.c). What isn't here faults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pvirq.pv.addresses import canonical

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

MSR_IA32_TSC: Final = 0x10
MSR_APIC_BASE: Final = 0x1B
MSR_IA32_UCODE_REV: Final = 0x8B
MSR_PERF_CAPABILITIES: Final = 0x345
MSR_CR_PAT: Final = 0x277
MSR_EFER: Final = 0xC0000080
MSR_FS_BASE: Final = 0xC0000100
MSR_GS_BASE: Final = 0xC0000101
MSR_SHADOW_GS_BASE: Final = 0xC0000102
MSR_INTEL_PLATFORM_INFO: Final = 0xCE
MSR_INTEL_MISC_FEATURES_ENABLES: Final = 0x140
MSR_MISC_ENABLE: Final = 0x1A0
MSR_TSC_AUX: Final = 0xC0000103
MSR_P5_MC: Final = (0, 1)
MSR_MCG_CAP: Final = 0x179
MSR_MCG_STATUS: Final = 0x17A
MSR_MC_BANKS: Final = range(0x400, 0x408)  # of the two banks that Xen gives every guest
MSR_HYPERVISOR_BASE: Final = 0x40000000

EFER_GUEST: Final = 0xD01  # NXE LMA LME SCE
XEN_MSR_PAT: Final = 0x050100070406
APIC_DEFAULT_PHYS_BASE: Final = 0xFEE00000
APIC_BASE_ENABLE, APIC_BASE_BSP = 1 << 11, 1 << 8
# What MISC_ENABLE reads on the engine's CPU (fast strings), with the bits that Xen sets for a guest:
# BTS and PEBS unavailable, xTPR messages disabled.
MISC_ENABLE_GUEST: Final = 1 | 1 << 11 | 1 << 12 | 1 << 23


def read_msr(cpu: PvVcpu, number: int) -> int | None:
    """The value, or None where RDMSR faults."""
    engine = cpu.engine
    if number == MSR_FS_BASE:
        return engine.fs_base
    if number == MSR_GS_BASE:
        return engine.gs_base
    if number == MSR_SHADOW_GS_BASE:
        return cpu.inactive_gs_base
    if number == MSR_IA32_TSC:
        return cpu.domain.hypervisor.clock.ticks()
    if number == MSR_APIC_BASE:
        return APIC_DEFAULT_PHYS_BASE | APIC_BASE_ENABLE | (0 if cpu.vcpu.vcpu_id else APIC_BASE_BSP)
    if number == MSR_IA32_UCODE_REV:
        return 0
    if number == MSR_INTEL_PLATFORM_INFO:
        return 0  # no CPUID faulting for the guest's own use
    if number == MSR_INTEL_MISC_FEATURES_ENABLES:
        return 0
    if number == MSR_MISC_ENABLE:
        return MISC_ENABLE_GUEST
    if number == MSR_CR_PAT:
        return XEN_MSR_PAT
    if number == MSR_PERF_CAPABILITIES:
        return 0
    if number == MSR_EFER:
        return EFER_GUEST
    if number == MSR_TSC_AUX:
        return engine.tsc_aux
    if number == MSR_MCG_CAP:
        return len(MSR_MC_BANKS) // 4
    if number in MSR_P5_MC or number in (MSR_MCG_STATUS, MSR_HYPERVISOR_BASE) or number in MSR_MC_BANKS:
        return 0
    return None


def write_msr(cpu: PvVcpu, number: int, value: int) -> bool:
    """False where WRMSR faults."""
    engine = cpu.engine
    if number in (MSR_FS_BASE, MSR_GS_BASE, MSR_SHADOW_GS_BASE):
        if not canonical(value):
            return False
        if number == MSR_FS_BASE:
            engine.fs_base = value
        elif number == MSR_GS_BASE:
            engine.gs_base = value
        else:
            cpu.inactive_gs_base = value
        return True
    if number == MSR_EFER:
        return value == EFER_GUEST
    if number == MSR_MISC_ENABLE:
        return True  # a change is refused without a fault
    if number == MSR_INTEL_MISC_FEATURES_ENABLES:
        return value == 0
    if number == MSR_IA32_UCODE_REV:
        return True
    if number == MSR_TSC_AUX:
        if value >> 32:
            return False
        engine.tsc_aux = value
        return True
    if number in (MSR_MCG_CAP, MSR_MCG_STATUS) or number in MSR_MC_BANKS:
        return True
    if number == MSR_HYPERVISOR_BASE:
        return cpu.guest.write_hypercall_page(value)
    return False

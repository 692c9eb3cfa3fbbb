"""Numbers of xen/include/public/xen.h and arch-x86/xen-x86_64.h: hypercalls, VIRQs, domain ids, shared_info."""

from typing import Final

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
PAGE_MASK: Final = ~(PAGE_SIZE - 1) & (1 << 64) - 1

# Hypercall numbers (__HYPERVISOR_*).
HYPERVISOR_set_trap_table: Final = 0
HYPERVISOR_mmu_update: Final = 1
HYPERVISOR_set_gdt: Final = 2
HYPERVISOR_stack_switch: Final = 3
HYPERVISOR_set_callbacks: Final = 4
HYPERVISOR_fpu_taskswitch: Final = 5
HYPERVISOR_sched_op_compat: Final = 6
HYPERVISOR_platform_op: Final = 7
HYPERVISOR_set_debugreg: Final = 8
HYPERVISOR_get_debugreg: Final = 9
HYPERVISOR_update_descriptor: Final = 10
HYPERVISOR_memory_op: Final = 12
HYPERVISOR_multicall: Final = 13
HYPERVISOR_update_va_mapping: Final = 14
HYPERVISOR_set_timer_op: Final = 15
HYPERVISOR_event_channel_op_compat: Final = 16
HYPERVISOR_xen_version: Final = 17
HYPERVISOR_console_io: Final = 18
HYPERVISOR_physdev_op_compat: Final = 19
HYPERVISOR_grant_table_op: Final = 20
HYPERVISOR_vm_assist: Final = 21
HYPERVISOR_update_va_mapping_otherdomain: Final = 22
HYPERVISOR_iret: Final = 23
HYPERVISOR_vcpu_op: Final = 24
HYPERVISOR_set_segment_base: Final = 25
HYPERVISOR_mmuext_op: Final = 26
HYPERVISOR_xsm_op: Final = 27
HYPERVISOR_nmi_op: Final = 28
HYPERVISOR_sched_op: Final = 29
HYPERVISOR_callback_op: Final = 30
HYPERVISOR_xenoprof_op: Final = 31
HYPERVISOR_event_channel_op: Final = 32
HYPERVISOR_physdev_op: Final = 33
HYPERVISOR_hvm_op: Final = 34
HYPERVISOR_sysctl: Final = 35
HYPERVISOR_domctl: Final = 36
HYPERVISOR_kexec_op: Final = 37
HYPERVISOR_tmem_op: Final = 38
HYPERVISOR_argo_op: Final = 39
HYPERVISOR_xenpmu_op: Final = 40
HYPERVISOR_dm_op: Final = 41
HYPERVISOR_hypfs_op: Final = 42
NR_hypercalls: Final = 64

# Virtual interrupts. Per vCPU: TIMER, DEBUG, XENOPROF, XENPMU; global to one handler domain: the rest.
VIRQ_TIMER: Final = 0
VIRQ_DEBUG: Final = 1
VIRQ_CONSOLE: Final = 2
VIRQ_DOM_EXC: Final = 3
VIRQ_TBUF: Final = 4
VIRQ_DEBUGGER: Final = 6
VIRQ_XENOPROF: Final = 7
VIRQ_CON_RING: Final = 8
VIRQ_PCPU_STATE: Final = 9
VIRQ_MEM_EVENT: Final = 10
VIRQ_ARGO: Final = 11
VIRQ_ENOMEM: Final = 12
VIRQ_XENPMU: Final = 13
VIRQ_ARCH_0: Final = 16
VIRQ_MCA: Final = 16
NR_VIRQS: Final = 24

# Reserved domain ids.
DOMID_FIRST_RESERVED: Final = 0x7FF0
DOMID_SELF: Final = 0x7FF0
DOMID_IO: Final = 0x7FF1
DOMID_XEN: Final = 0x7FF2
DOMID_COW: Final = 0x7FF3
DOMID_INVALID: Final = 0x7FF4
DOMID_IDLE: Final = 0x7FFF

# struct shared_info of a 64-bit guest; offsets in bytes.
XEN_LEGACY_MAX_VCPUS: Final = 32
VCPU_INFO_SIZE: Final = 64
VCPU_INFO_UPCALL_PENDING: Final = 0
VCPU_INFO_UPCALL_MASK: Final = 1
VCPU_INFO_PENDING_SEL: Final = 8
VCPU_INFO_ARCH_CR2: Final = 16
VCPU_INFO_TIME: Final = 32
SHARED_INFO_EVTCHN_PENDING: Final = 2048
SHARED_INFO_EVTCHN_MASK: Final = 2560
SHARED_INFO_WC_VERSION: Final = 3072
SHARED_INFO_WC_SEC: Final = 3076
SHARED_INFO_WC_NSEC: Final = 3080
SHARED_INFO_WC_SEC_HI: Final = 3084
# struct arch_shared_info: the guest's pfns end here, and where it keeps its p2m list.
SHARED_INFO_ARCH: Final = 3088
SHARED_INFO_MAX_PFN: Final = SHARED_INFO_ARCH
SHARED_INFO_FRAME_LIST_LIST: Final = SHARED_INFO_ARCH + 8
SHARED_INFO_NMI_REASON: Final = SHARED_INFO_ARCH + 16
SHARED_INFO_P2M_CR3: Final = SHARED_INFO_ARCH + 24
SHARED_INFO_P2M_VADDR: Final = SHARED_INFO_ARCH + 32
SHARED_INFO_P2M_GENERATION: Final = SHARED_INFO_ARCH + 40
SHARED_INFO_ARCH_SIZE: Final = 48

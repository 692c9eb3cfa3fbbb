"""Numbers of xen/include/public/arch-x86/xen.h and xen-x86_64.h: segments, traps, the address space, callbacks."""

from typing import Final

HYPERVISOR_VIRT_START: Final = 0xFFFF_8000_0000_0000
HYPERVISOR_VIRT_END: Final = 0xFFFF_8800_0000_0000
MACH2PHYS_VIRT_START: Final = 0xFFFF_8000_0000_0000
MACH2PHYS_VIRT_END: Final = 0xFFFF_8040_0000_0000

FLAT_RING3_CS32: Final = 0xE023
FLAT_RING3_CS64: Final = 0xE033
FLAT_RING3_SS64: Final = 0xE02B
FLAT_KERNEL_CS: Final = FLAT_RING3_CS64
FLAT_KERNEL_SS: Final = FLAT_RING3_SS64

FIRST_RESERVED_GDT_PAGE: Final = 14
FIRST_RESERVED_GDT_ENTRY: Final = FIRST_RESERVED_GDT_PAGE * 512
LAST_RESERVED_GDT_BYTE: Final = 15 * 4096 - 1

# struct trap_info: {u8 vector; u8 flags; u16 cs; unsigned long address}
TRAP_INFO: Final = "<BBHxxxxQ"
TRAP_INFO_SIZE: Final = 16
TI_DPL: Final = 3
TI_IF: Final = 4

# struct iret_context and its flags.
VGCF_i387_valid: Final = 1 << 0
VGCF_in_kernel: Final = 1 << 2
VGCF_failsafe_disables_events: Final = 1 << 3
VGCF_syscall_disables_events: Final = 1 << 4
VGCF_online: Final = 1 << 5
VGCF_in_syscall: Final = 1 << 8

# callback.h
CALLBACKTYPE_event: Final = 0
CALLBACKTYPE_failsafe: Final = 1
CALLBACKTYPE_syscall: Final = 2
CALLBACKTYPE_sysenter_deprecated: Final = 3
CALLBACKTYPE_nmi: Final = 4
CALLBACKTYPE_sysenter: Final = 5
CALLBACKTYPE_syscall32: Final = 7
CALLBACKF_mask_events: Final = 1
CALLBACKOP_register: Final = 0
CALLBACKOP_unregister: Final = 1

# set_segment_base
SEGBASE_FS: Final = 0
SEGBASE_GS_USER: Final = 1
SEGBASE_GS_KERNEL: Final = 2
SEGBASE_GS_USER_SEL: Final = 3

# start_info
START_INFO_MAGIC: Final = b"xen-3.0-x86_64"
SIF_PRIVILEGED: Final = 1 << 0
SIF_INITDOMAIN: Final = 1 << 1
SIF_MOD_START_PFN: Final = 1 << 3
SIF_VIRT_P2M_4TOOLS: Final = 1 << 4  # the tools find a p2m list by its virtual address: no tree of frames is needed
MAX_GUEST_CMDLINE: Final = 1024

# vm_assist
VMASST_CMD_enable: Final = 0
VMASST_CMD_disable: Final = 1
VMASST_TYPE_4gb_segments: Final = 0
VMASST_TYPE_4gb_segments_notify: Final = 1
VMASST_TYPE_writable_pagetables: Final = 2
VMASST_TYPE_pae_extended_cr3: Final = 3
VMASST_TYPE_architectural_iopl: Final = 4
VMASST_TYPE_runstate_update_flag: Final = 5
VMASST_TYPE_m2p_strict: Final = 32

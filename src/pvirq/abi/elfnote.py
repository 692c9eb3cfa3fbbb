"""ELF notes that a guest kernel speaks to its builder with, and the feature bits named in them.

Numbers of xen/include/public/elfnote.h and features.h; the names are those that libelf prints and parses.
"""

from typing import Final

# Note types, owner "Xen".
XEN_ELFNOTE_INFO: Final = 0
XEN_ELFNOTE_ENTRY: Final = 1
XEN_ELFNOTE_HYPERCALL_PAGE: Final = 2
XEN_ELFNOTE_VIRT_BASE: Final = 3
XEN_ELFNOTE_PADDR_OFFSET: Final = 4
XEN_ELFNOTE_XEN_VERSION: Final = 5
XEN_ELFNOTE_GUEST_OS: Final = 6
XEN_ELFNOTE_GUEST_VERSION: Final = 7
XEN_ELFNOTE_LOADER: Final = 8
XEN_ELFNOTE_PAE_MODE: Final = 9
XEN_ELFNOTE_FEATURES: Final = 10
XEN_ELFNOTE_BSD_SYMTAB: Final = 11
XEN_ELFNOTE_HV_START_LOW: Final = 12
XEN_ELFNOTE_L1_MFN_VALID: Final = 13
XEN_ELFNOTE_SUSPEND_CANCEL: Final = 14
XEN_ELFNOTE_INIT_P2M: Final = 15
XEN_ELFNOTE_MOD_START_PFN: Final = 16
XEN_ELFNOTE_SUPPORTED_FEATURES: Final = 17
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18

# Feature bits, as XENVER_get_features reports and XEN_ELFNOTE_SUPPORTED_FEATURES declares them.
XENFEAT_writable_page_tables: Final = 0
XENFEAT_writable_descriptor_tables: Final = 1
XENFEAT_auto_translated_physmap: Final = 2
XENFEAT_supervisor_mode_kernel: Final = 3
XENFEAT_pae_pgdir_above_4gb: Final = 4
XENFEAT_mmu_pt_update_preserve_ad: Final = 5
XENFEAT_highmem_assist: Final = 6
XENFEAT_gnttab_map_avail_bits: Final = 7
XENFEAT_hvm_callback_vector: Final = 8
XENFEAT_hvm_safe_pvclock: Final = 9
XENFEAT_hvm_pirqs: Final = 10
XENFEAT_dom0: Final = 11
XENFEAT_memory_op_vnode_supported: Final = 13
XENFEAT_ARM_SMCCC_supported: Final = 14
XENFEAT_linux_rsdp_unrestricted: Final = 15
XENFEAT_not_direct_mapped: Final = 16
XENFEAT_direct_mapped: Final = 17

XENFEAT_NAMES: Final[dict[int, str]] = {
    value: name.removeprefix("XENFEAT_")
    for name, value in list(globals().items())
    if name.startswith("XENFEAT_") and isinstance(value, int)
}

# The only names that the feature string of a kernel may use (libelf's elf_xen_feature_names). Others are
# ignored, or refused when marked as required: libelf doesn't learn the newer bits' names.
ELFNOTE_FEATURE_BITS: Final[dict[str, int]] = {
    "writable_page_tables": XENFEAT_writable_page_tables,
    "writable_descriptor_tables": XENFEAT_writable_descriptor_tables,
    "auto_translated_physmap": XENFEAT_auto_translated_physmap,
    "supervisor_mode_kernel": XENFEAT_supervisor_mode_kernel,
    "pae_pgdir_above_4gb": XENFEAT_pae_pgdir_above_4gb,
    "hvm_callback_vector": XENFEAT_hvm_callback_vector,
    "dom0": XENFEAT_dom0,
}


def feature_names(bitmap: int) -> frozenset[str]:
    """The names (without XENFEAT_) of the bits set in a feature bitmap; a bit without a name is `bit<n>`."""
    bits = (bit for bit in range(bitmap.bit_length()) if bitmap >> bit & 1)
    return frozenset(XENFEAT_NAMES.get(bit, f"bit{bit}") for bit in bits)

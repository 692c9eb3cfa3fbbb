"""Numbers of xen/include/public/grant_table.h."""

from typing import Final

GNTTABOP_map_grant_ref: Final = 0
GNTTABOP_unmap_grant_ref: Final = 1
GNTTABOP_setup_table: Final = 2
GNTTABOP_dump_table: Final = 3
GNTTABOP_transfer: Final = 4
GNTTABOP_copy: Final = 5
GNTTABOP_query_size: Final = 6
GNTTABOP_unmap_and_replace: Final = 7
GNTTABOP_set_version: Final = 8
GNTTABOP_get_status_frames: Final = 9
GNTTABOP_get_version: Final = 10
GNTTABOP_swap_grant_ref: Final = 11
GNTTABOP_cache_flush: Final = 12

GNTST_okay: Final = 0
GNTST_general_error: Final = -1
GNTST_bad_domain: Final = -2
GNTST_bad_gntref: Final = -3
GNTST_bad_handle: Final = -4
GNTST_bad_virt_addr: Final = -5
GNTST_bad_dev_addr: Final = -6
GNTST_no_device_space: Final = -7
GNTST_permission_denied: Final = -8
GNTST_bad_page: Final = -9
GNTST_bad_copy_arg: Final = -10
GNTST_address_too_big: Final = -11
GNTST_eagain: Final = -12
GNTST_no_space: Final = -13

GTF_invalid: Final = 0
GTF_permit_access: Final = 1
GTF_accept_transfer: Final = 2
GTF_transitive: Final = 3
GTF_type_mask: Final = 3
GTF_readonly: Final = 1 << 2
GTF_reading: Final = 1 << 3
GTF_writing: Final = 1 << 4
GTF_sub_page: Final = 1 << 8
# Of an entry of type GTF_accept_transfer.
GTF_transfer_committed: Final = 1 << 2
GTF_transfer_completed: Final = 1 << 3

GNTMAP_device_map: Final = 1 << 0
GNTMAP_host_map: Final = 1 << 1
GNTMAP_readonly: Final = 1 << 2
GNTMAP_application_map: Final = 1 << 3
GNTMAP_contains_pte: Final = 1 << 4
GNTMAP_guest_avail0: Final = 1 << 16  # the lowest of the bits that go to the available bits of the entry

GNTCOPY_source_gref: Final = 1 << 0
GNTCOPY_dest_gref: Final = 1 << 1

# Entries that the toolstack fills before the guest runs.
GNTTAB_RESERVED_CONSOLE: Final = 0
GNTTAB_RESERVED_XENSTORE: Final = 1
GNTTAB_NR_RESERVED_ENTRIES: Final = 8

GRANT_ENTRY_V1_SIZE: Final = 8  # {u16 flags; domid_t domid; u32 frame}
GRANT_ENTRY_V2_SIZE: Final = 16  # {u16 flags; domid_t domid; u16 page_off, length; u64 frame}, see the header
GRANT_STATUS_SIZE: Final = 2
# struct gnttab_cache_flush {u64 dev_bus_addr; u16 offset, length; u32 op}
GNTTAB_CACHE_CLEAN: Final = 1 << 0
GNTTAB_CACHE_INVAL: Final = 1 << 1
GNTTAB_CACHE_SOURCE_GREF: Final = 1 << 31

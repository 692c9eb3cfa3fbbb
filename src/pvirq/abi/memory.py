"""Numbers of xen/include/public/memory.h."""

from typing import Final

XENMEM_increase_reservation: Final = 0
XENMEM_decrease_reservation: Final = 1
XENMEM_maximum_ram_page: Final = 2
XENMEM_current_reservation: Final = 3
XENMEM_maximum_reservation: Final = 4
XENMEM_machphys_mfn_list: Final = 5
XENMEM_populate_physmap: Final = 6
XENMEM_add_to_physmap: Final = 7
XENMEM_translate_gpfn_list: Final = 8
XENMEM_memory_map: Final = 9
XENMEM_machine_memory_map: Final = 10
XENMEM_exchange: Final = 11
XENMEM_machphys_mapping: Final = 12
XENMEM_set_memory_map: Final = 13
XENMEM_maximum_gpfn: Final = 14
XENMEM_remove_from_physmap: Final = 15
XENMEM_set_pod_target: Final = 16
XENMEM_get_pod_target: Final = 17
XENMEM_access_op: Final = 21
XENMEM_add_to_physmap_batch: Final = 23
XENMEM_claim_pages: Final = 24
XENMEM_get_vnumainfo: Final = 26
XENMEM_acquire_resource: Final = 28

XENMAPSPACE_gmfn_range: Final = 3
XENMAPSPACE_gmfn_foreign: Final = 4

XENMEMF_ADDRESS_BITS: Final = 0xFF
XENMEMF_NODE: Final = 0xFF00
XENMEMF_populate_on_demand: Final = 1 << 16
XENMEMF_exact_node_request: Final = 1 << 17

MEMOP_CMD_MASK: Final = 0x3F
MEMOP_EXTENT_SHIFT: Final = 6
E820_RAM: Final = 1
E820MAX: Final = 1024  # entries of a domain's map
MAX_ORDER_UNPRIVILEGED: Final = 9  # CONFIG_DOMU_MAX_ORDER: 2 MiB

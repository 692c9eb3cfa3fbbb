"""The block device protocol (xen/include/public/io/blkif.h), in the layout of a 64-bit frontend."""

from struct import Struct
from typing import Final

BLKIF_OP_READ: Final = 0
BLKIF_OP_WRITE: Final = 1
BLKIF_OP_WRITE_BARRIER: Final = 2
BLKIF_OP_FLUSH_DISKCACHE: Final = 3
BLKIF_OP_DISCARD: Final = 5
BLKIF_OP_INDIRECT: Final = 6

BLKIF_RSP_OKAY: Final = 0
BLKIF_RSP_ERROR: Final = -1
BLKIF_RSP_EOPNOTSUPP: Final = -2

BLKIF_MAX_SEGMENTS_PER_REQUEST: Final = 11
BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST: Final = 8
SEGMENTS_PER_INDIRECT_FRAME: Final = 512

VDISK_CDROM: Final = 1
VDISK_REMOVABLE: Final = 2
VDISK_READONLY: Final = 4

SECTOR_SIZE: Final = 512  # in which the protocol counts, whatever the device's own sector size
SECTORS_PER_PAGE: Final = 8

BLKIF_ENTRY_SIZE: Final = 112
# union blkif_sring_entry: u8 operation, u8 nr_segments, blkif_vdev_t handle, u64 id, u64 sector_number, segments.
BLKIF_REQUEST: Final = Struct("<BBH4xQQ")
# struct blkif_request_segment: grant_ref_t gref, u8 first_sect, u8 last_sect. In indirect pages the same.
BLKIF_SEGMENT: Final = Struct("<IBB2x")
# struct blkif_request_discard: operation, flag, handle, id, sector_number, nr_sectors.
BLKIF_REQUEST_DISCARD: Final = Struct("<BBH4xQQQ")
# struct blkif_request_indirect: operation, indirect_op, nr_segments, id, sector_number, handle, grefs[8].
BLKIF_REQUEST_INDIRECT: Final = Struct("<BBH4xQQH2x8I")
# struct blkif_response: id, operation, status.
BLKIF_RESPONSE: Final = Struct("<QBxh")

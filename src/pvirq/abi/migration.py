"""What a saved domain looks like in a file: xl's header, libxl's stream v2, libxc's stream v3.

Numbers of xen/tools: docs/specs/libxc-migration-stream.pandoc, docs/specs/libxl-migration-stream.pandoc, xl/xl.h, and
libs/guest/xg_sr_stream_format.h of 4.17; XEN_DOMCTL_PFINFO_* of xen/include/public/domctl.h.
"""

import struct
from typing import Final

# xl: struct save_file_header, then the optional data: the length of the configuration and the configuration.
XL_MAGIC: Final = b"Xen saved domain, xl format\n \0 \r"
XL_BYTEORDER: Final = 0x01020304
XL_MANDATORY_FLAG_JSON: Final = 1
XL_MANDATORY_FLAG_STREAMv2: Final = 2
XL_HEADER: Final = struct.Struct("<32sIIII")  # magic, byteorder, mandatory flags, optional flags, optional data length

# libxl: a header in network order, then records, padded to 8 bytes.
LIBXL_IDENT: Final = 0x4C6962786C466D74
LIBXL_VERSION: Final = 2
LIBXL_OPTION_BIG_ENDIAN: Final = 1
LIBXL_OPTION_LEGACY: Final = 2
LIBXL_HEADER: Final = struct.Struct(">QII")  # ident, version, options
LIBXL_REC_END: Final = 0
LIBXL_REC_LIBXC_CONTEXT: Final = 1
LIBXL_REC_XENSTORE_DATA: Final = 2
LIBXL_REC_EMULATOR_CONTEXT: Final = 3
LIBXL_REC_CHECKPOINT_END: Final = 4

# libxc: an image header in network order, a domain header, records padded to 8 bytes.
LIBXC_MARKER: Final = 0xFFFF_FFFF_FFFF_FFFF
LIBXC_ID: Final = 0x58454E46
LIBXC_VERSION: Final = 3
LIBXC_OPTION_BIG_ENDIAN: Final = 1
LIBXC_IMAGE_HEADER: Final = struct.Struct(">QIIHHI")  # marker, id, version, options, two reserved
LIBXC_DOMAIN_HEADER: Final = struct.Struct("<IHHII")  # type, page shift, reserved, Xen's version
DOMAIN_TYPE_X86_PV: Final = 1

RECORD: Final = struct.Struct("<II")  # type, length of the body
REC_END: Final = 0x0
REC_PAGE_DATA: Final = 0x1
REC_X86_PV_INFO: Final = 0x2
REC_X86_PV_P2M_FRAMES: Final = 0x3
REC_X86_PV_VCPU_BASIC: Final = 0x4
REC_X86_PV_VCPU_EXTENDED: Final = 0x5
REC_X86_PV_VCPU_XSAVE: Final = 0x6
REC_SHARED_INFO: Final = 0x7
REC_X86_TSC_INFO: Final = 0x8
REC_X86_PV_VCPU_MSRS: Final = 0xC
REC_VERIFY: Final = 0xD
REC_CHECKPOINT: Final = 0xE
REC_STATIC_DATA_END: Final = 0x10
REC_X86_CPUID_POLICY: Final = 0x11
REC_X86_MSR_POLICY: Final = 0x12
REC_OPTIONAL: Final = 0x8000_0000  # a reader that doesn't know the record goes on
REC_PADDING: Final = REC_OPTIONAL | 0x7076_6972  # no record of Xen's: zeros, up to where pages begin

PAGE_DATA_HEADER: Final = struct.Struct(
    "<II"
)  # number of pages, reserved; then a u64 each: pfn, and type in bits 60-63
PV_INFO: Final = struct.Struct("<BB6x")  # guest width in bytes, levels of page tables
P2M_FRAMES_HEADER: Final = struct.Struct("<II")  # first and last pfn
VCPU_HEADER: Final = struct.Struct("<II")  # vCPU, reserved
TSC_INFO: Final = struct.Struct("<IIQII")  # mode, kHz, ns, incarnation, reserved

# XEN_DOMCTL_PFINFO_*, shifted down to 4 bits. 1 to 4 are page tables of that level.
PFINFO_NOTAB: Final = 0
PFINFO_LPINTAB: Final = 8  # pinned, ORed to a level
PFINFO_BROKEN: Final = 0xD
PFINFO_XALLOC: Final = 0xE  # to be populated, without data
PFINFO_XTAB: Final = 0xF  # no page there

# struct xen_domctl_ext_vcpucontext, as far as it matters: vcpu, size, the two callbacks' addresses, code segments and
# whether they mask events; machine check banks follow.
EXT_VCPUCONTEXT: Final = struct.Struct("<IIQQHHBB")
EXT_VCPUCONTEXT_SIZE: Final = 64

"""The network protocol (xen/include/public/io/netif.h)."""

from struct import Struct
from typing import Final

NETTXF_csum_blank: Final = 1 << 0
NETTXF_data_validated: Final = 1 << 1
NETTXF_more_data: Final = 1 << 2
NETTXF_extra_info: Final = 1 << 3

NETRXF_data_validated: Final = 1 << 0
NETRXF_csum_blank: Final = 1 << 1
NETRXF_more_data: Final = 1 << 2
NETRXF_extra_info: Final = 1 << 3

NETIF_RSP_NULL: Final = 1
NETIF_RSP_OKAY: Final = 0
NETIF_RSP_ERROR: Final = -1
NETIF_RSP_DROPPED: Final = -2

XEN_NETIF_EXTRA_TYPE_GSO: Final = 1
XEN_NETIF_EXTRA_TYPE_MCAST_ADD: Final = 2
XEN_NETIF_EXTRA_TYPE_MCAST_DEL: Final = 3
XEN_NETIF_EXTRA_TYPE_MAX: Final = 5
XEN_NETIF_EXTRA_FLAG_MORE: Final = 1
XEN_NETIF_GSO_TYPE_NONE: Final = 0
XEN_NETIF_GSO_TYPE_TCPV4: Final = 1
XEN_NETIF_GSO_TYPE_TCPV6: Final = 2

XEN_NETIF_NR_SLOTS_MIN: Final = 18  # a packet may have so many slots, whoever is at the other end
XEN_NETIF_MAX_TX_SIZE: Final = 0xFFFF
ETH_HLEN: Final = 14

NETIF_TX_ENTRY_SIZE: Final = 12
NETIF_RX_ENTRY_SIZE: Final = 8
NETIF_TX_REQUEST: Final = Struct("<IHHHH")  # gref, offset, flags, id, size
NETIF_TX_RESPONSE: Final = Struct("<Hh")  # id, status
NETIF_RX_REQUEST: Final = Struct("<H2xI")  # id, gref
NETIF_RX_RESPONSE: Final = Struct("<HHHh")  # id, offset, flags, status (or size)
NETIF_EXTRA_GSO: Final = Struct("<BBHBxH")  # type, flags, size, GSO type, features
NETIF_EXTRA_MCAST: Final = Struct("<BB6s")  # type, flags, address

# The control ring.
NETIF_CTRL_ENTRY_SIZE: Final = 16
NETIF_CTRL_REQUEST: Final = Struct("<HH3I")  # id, type, data
NETIF_CTRL_RESPONSE: Final = Struct("<HHII")  # id, type, status, data
XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS: Final = 1
XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS: Final = 2
XEN_NETIF_CTRL_TYPE_SET_HASH_KEY: Final = 3
XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE: Final = 4
XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE: Final = 5
XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING: Final = 6
XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM: Final = 7
XEN_NETIF_CTRL_STATUS_SUCCESS: Final = 0
XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED: Final = 1
XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER: Final = 2
XEN_NETIF_CTRL_HASH_ALGORITHM_NONE: Final = 0
XEN_NETIF_CTRL_HASH_ALGORITHM_TOEPLITZ: Final = 1
# What a hash is over, as bits of the flags; an extra has the number of the bit.
XEN_NETIF_CTRL_HASH_TYPE_IPV4: Final = 0
XEN_NETIF_CTRL_HASH_TYPE_IPV4_TCP: Final = 1
XEN_NETIF_CTRL_HASH_TYPE_IPV6: Final = 2
XEN_NETIF_CTRL_HASH_TYPE_IPV6_TCP: Final = 3
XEN_NETIF_EXTRA_TYPE_HASH: Final = 4
NETIF_EXTRA_HASH: Final = Struct("<BBBBI")  # type, flags, hash type, algorithm, value

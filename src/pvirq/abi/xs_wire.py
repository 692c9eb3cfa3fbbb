"""XenStore's wire format and ring layout (xen/include/public/io/xs_wire.h)."""

from struct import Struct
from typing import Final

from pvirq.abi.errno import Errno

# enum xsd_sockmsg_type; 20 was XS_RESTRICT.
XS_CONTROL: Final = 0
XS_DIRECTORY: Final = 1
XS_READ: Final = 2
XS_GET_PERMS: Final = 3
XS_WATCH: Final = 4
XS_UNWATCH: Final = 5
XS_TRANSACTION_START: Final = 6
XS_TRANSACTION_END: Final = 7
XS_INTRODUCE: Final = 8
XS_RELEASE: Final = 9
XS_GET_DOMAIN_PATH: Final = 10
XS_WRITE: Final = 11
XS_MKDIR: Final = 12
XS_RM: Final = 13
XS_SET_PERMS: Final = 14
XS_WATCH_EVENT: Final = 15
XS_ERROR: Final = 16
XS_IS_DOMAIN_INTRODUCED: Final = 17
XS_RESUME: Final = 18
XS_SET_TARGET: Final = 19
XS_RESET_WATCHES: Final = 21
XS_DIRECTORY_PART: Final = 22
XS_TYPE_COUNT: Final = 23

# The errors that have a name on the wire (xsd_errors); any other goes out as EINVAL.
XSD_ERRORS: Final = frozenset(
    {
        Errno.EINVAL, Errno.EACCES, Errno.EEXIST, Errno.EISDIR, Errno.ENOENT, Errno.ENOMEM, Errno.ENOSPC,
        Errno.EIO, Errno.ENOTEMPTY, Errno.ENOSYS, Errno.EROFS, Errno.EBUSY, Errno.EAGAIN, Errno.EISCONN,
        Errno.E2BIG, Errno.EPERM,
    }
)  # fmt: skip

# struct xsd_sockmsg: type, req_id, tx_id, len.
XSD_SOCKMSG: Final = Struct("<4I")
XENSTORE_PAYLOAD_MAX: Final = 4096
XENSTORE_ABS_PATH_MAX: Final = 3072
XENSTORE_REL_PATH_MAX: Final = 2048

# struct xenstore_domain_interface: two rings, then words. Offsets in bytes, numbers of words.
XENSTORE_RING_SIZE: Final = 1024
XENSTORE_REQ: Final = 0
XENSTORE_RSP: Final = 1024
XENSTORE_WORDS: Final = 2048
XENSTORE_NR_WORDS: Final = 7
REQ_CONS: Final = 0
REQ_PROD: Final = 1
RSP_CONS: Final = 2
RSP_PROD: Final = 3
SERVER_FEATURES: Final = 4
CONNECTION: Final = 5
ERROR: Final = 6

XENSTORE_SERVER_FEATURE_RECONNECTION: Final = 1
XENSTORE_SERVER_FEATURE_ERROR: Final = 2

XENSTORE_CONNECTED: Final = 0
XENSTORE_RECONNECT: Final = 1

XENSTORE_ERROR_NONE: Final = 0
XENSTORE_ERROR_COMM: Final = 1
XENSTORE_ERROR_RINGIDX: Final = 2
XENSTORE_ERROR_PROTO: Final = 3

"""The states of a split driver's two ends (xen/include/public/io/xenbus.h)."""

from enum import IntEnum


class XenbusState(IntEnum):
    """enum xenbus_state, as written to a device's `state` node."""

    Unknown = 0
    Initialising = 1
    InitWait = 2
    Initialised = 3
    Connected = 4
    Closing = 5
    Closed = 6
    Reconfiguring = 7
    Reconfigured = 8

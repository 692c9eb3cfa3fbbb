"""Numbers of xen/include/public/sched.h: SCHEDOP_*, shutdown reasons, argument layouts."""

import struct
from typing import Final

SCHEDOP_yield: Final = 0
SCHEDOP_block: Final = 1
SCHEDOP_shutdown: Final = 2
SCHEDOP_poll: Final = 3
SCHEDOP_remote_shutdown: Final = 4
SCHEDOP_shutdown_code: Final = 5
SCHEDOP_watchdog: Final = 6
SCHEDOP_pin_override: Final = 7

SHUTDOWN_poweroff: Final = 0
SHUTDOWN_reboot: Final = 1
SHUTDOWN_suspend: Final = 2
SHUTDOWN_crash: Final = 3
SHUTDOWN_watchdog: Final = 4
SHUTDOWN_soft_reset: Final = 5
SHUTDOWN_MAX: Final = 5

SCHED_SHUTDOWN: Final = struct.Struct("<I")  # reason
SCHED_POLL: Final = struct.Struct("<QI4xQ")  # ports (guest address of u32[]), nr_ports, timeout (ns, absolute)
SCHED_REMOTE_SHUTDOWN: Final = struct.Struct("<H2xI")  # domain_id, reason
SCHED_WATCHDOG: Final = struct.Struct("<II")  # id, timeout (s)
SCHED_PIN_OVERRIDE: Final = struct.Struct("<i")  # pcpu

"""Numbers of xen/include/public/vcpu.h."""

from typing import Final

VCPUOP_initialise: Final = 0
VCPUOP_up: Final = 1
VCPUOP_down: Final = 2
VCPUOP_is_up: Final = 3
VCPUOP_get_runstate_info: Final = 4
VCPUOP_register_runstate_memory_area: Final = 5
VCPUOP_set_periodic_timer: Final = 6
VCPUOP_stop_periodic_timer: Final = 7
VCPUOP_set_singleshot_timer: Final = 8
VCPUOP_stop_singleshot_timer: Final = 9
VCPUOP_register_vcpu_info: Final = 10
VCPUOP_send_nmi: Final = 11
VCPUOP_get_physid: Final = 12
VCPUOP_register_vcpu_time_memory_area: Final = 13

RUNSTATE_running: Final = 0
RUNSTATE_runnable: Final = 1
RUNSTATE_blocked: Final = 2
RUNSTATE_offline: Final = 3

# struct vcpu_runstate_info: {int state; u64 state_entry_time; u64 time[4]}
RUNSTATE_INFO: Final = "<IxxxxQ4Q"
RUNSTATE_INFO_SIZE: Final = 48

# struct vcpu_time_info: {u32 version, pad; u64 tsc_timestamp, system_time; u32 mul; s8 shift; u8 flags; u8 pad[2]}
TIME_INFO: Final = "<IIQQIbBxx"
TIME_INFO_SIZE: Final = 32
XEN_PVCLOCK_TSC_STABLE_BIT: Final = 1

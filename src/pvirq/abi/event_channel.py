"""Numbers of xen/include/public/event_channel.h: EVTCHNOP_*, channel states, the FIFO ABI."""

import struct
from typing import Final

EVTCHNOP_bind_interdomain: Final = 0
EVTCHNOP_bind_virq: Final = 1
EVTCHNOP_bind_pirq: Final = 2
EVTCHNOP_close: Final = 3
EVTCHNOP_send: Final = 4
EVTCHNOP_status: Final = 5
EVTCHNOP_alloc_unbound: Final = 6
EVTCHNOP_bind_ipi: Final = 7
EVTCHNOP_bind_vcpu: Final = 8
EVTCHNOP_unmask: Final = 9
EVTCHNOP_reset: Final = 10
EVTCHNOP_init_control: Final = 11
EVTCHNOP_expand_array: Final = 12
EVTCHNOP_set_priority: Final = 13
EVTCHNOP_reset_cont: Final = 14  # Xen's own, to go on with a preempted reset; a guest can still name it

BIND_PIRQ__WILL_SHARE: Final = 1

# Channel states as EVTCHNOP_status reports them.
EVTCHNSTAT_closed: Final = 0
EVTCHNSTAT_unbound: Final = 1
EVTCHNSTAT_interdomain: Final = 2
EVTCHNSTAT_pirq: Final = 3
EVTCHNSTAT_virq: Final = 4
EVTCHNSTAT_ipi: Final = 5

# Two-level ABI: one bit per port; the number depends on the guest's word size.
EVTCHN_2L_NR_CHANNELS: Final = 4096
EVTCHN_2L_NR_CHANNELS_32: Final = 1024
# Where a 32-bit guest's shared_info differs from abi.xen's (offsets in bytes).
SHARED_INFO_EVTCHN_MASK_32: Final = 2176
VCPU_INFO_PENDING_SEL_32: Final = 4

# FIFO ABI: one 32-bit event word per port.
EVTCHN_FIFO_PRIORITY_MAX: Final = 0
EVTCHN_FIFO_PRIORITY_DEFAULT: Final = 7
EVTCHN_FIFO_PRIORITY_MIN: Final = 15
EVTCHN_FIFO_MAX_QUEUES: Final = 16
EVTCHN_FIFO_PENDING: Final = 31
EVTCHN_FIFO_MASKED: Final = 30
EVTCHN_FIFO_LINKED: Final = 29
EVTCHN_FIFO_BUSY: Final = 28
EVTCHN_FIFO_LINK_BITS: Final = 17
EVTCHN_FIFO_LINK_MASK: Final = (1 << EVTCHN_FIFO_LINK_BITS) - 1
EVTCHN_FIFO_NR_CHANNELS: Final = 1 << EVTCHN_FIFO_LINK_BITS

# struct evtchn_fifo_control_block: u32 ready, u32 reserved, u32 head[16]; offsets in bytes.
FIFO_CONTROL_READY: Final = 0
FIFO_CONTROL_HEAD: Final = 8
FIFO_CONTROL_SIZE: Final = 8 + 4 * EVTCHN_FIFO_MAX_QUEUES

# The hypercall arguments, with their padding, as the x86-64 ABI lays them out.
EVTCHN_ALLOC_UNBOUND: Final = struct.Struct("<HHI")  # dom, remote_dom, port (out)
EVTCHN_BIND_INTERDOMAIN: Final = struct.Struct("<H2xII")  # remote_dom, remote_port, local_port (out)
EVTCHN_BIND_VIRQ: Final = struct.Struct("<III")  # virq, vcpu, port (out)
EVTCHN_BIND_PIRQ: Final = struct.Struct("<III")  # pirq, flags, port (out)
EVTCHN_BIND_IPI: Final = struct.Struct("<II")  # vcpu, port (out)
EVTCHN_PORT: Final = struct.Struct("<I")  # close, send, unmask
EVTCHN_STATUS: Final = struct.Struct("<H2xIIIII")  # dom, port; out: status, vcpu, union of 8 bytes
EVTCHN_BIND_VCPU: Final = struct.Struct("<II")  # port, vcpu
EVTCHN_RESET: Final = struct.Struct("<H")  # dom
EVTCHN_INIT_CONTROL: Final = struct.Struct("<QIIB7x")  # control_gfn, offset, vcpu, link_bits (out)
EVTCHN_EXPAND_ARRAY: Final = struct.Struct("<Q")  # array_gfn
EVTCHN_SET_PRIORITY: Final = struct.Struct("<II")  # port, priority
EVTCHN_OP_SIZE: Final = 28  # struct evtchn_op of the compat hypercall: u32 cmd, then the union

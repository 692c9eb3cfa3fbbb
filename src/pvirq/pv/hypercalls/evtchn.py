"""HYPERVISOR_event_channel_op and its older form (do_event_channel_op, do_event_channel_op_compat).

Where the result can't be copied back the guest gets -EFAULT, and the operation stays done: as in Xen, which
leaves such a port to the guest's next EVTCHNOP_reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pvirq.abi import event_channel as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.pv.hypercalls.protocol import GuestCpu, int32
from pvirq.xen import evtchn


def event_channel_op(cpu: GuestCpu, cmd: int, arg: int) -> int:
    """Carry out EVTCHNOP_`cmd` on the struct at guest address `arg`: 0; XenError is the guest's -errno."""
    operation = _OPERATIONS.get(int32(cmd))
    if operation is None:
        raise XenError(Errno.ENOSYS, f"EVTCHNOP {cmd}")
    operation(cpu, arg)
    return 0


def event_channel_op_compat(cpu: GuestCpu, arg: int) -> int:
    """The form of before 3.2.2: number and struct together in memory, and only the operations that it had."""
    op = cpu.read(arg, abi.EVTCHN_OP_SIZE)
    cmd = int.from_bytes(op[:4], "little")
    if cmd > abi.EVTCHNOP_unmask:
        raise XenError(Errno.ENOSYS, f"EVTCHNOP {cmd}")
    return event_channel_op(cpu, cmd, arg + 4)


def _alloc_unbound(cpu: GuestCpu, arg: int) -> None:
    dom, remote_dom, _ = abi.EVTCHN_ALLOC_UNBOUND.unpack(cpu.read(arg, abi.EVTCHN_ALLOC_UNBOUND.size))
    port = evtchn.alloc_unbound(cpu.domain, dom, remote_dom)
    cpu.write(arg, abi.EVTCHN_ALLOC_UNBOUND.pack(dom, remote_dom, port))


def _bind_interdomain(cpu: GuestCpu, arg: int) -> None:
    raw = cpu.read(arg, abi.EVTCHN_BIND_INTERDOMAIN.size)
    remote_dom, remote_port, _ = abi.EVTCHN_BIND_INTERDOMAIN.unpack(raw)
    port = evtchn.bind_interdomain(cpu.domain, remote_dom, remote_port)
    cpu.write(arg, raw[:8] + abi.EVTCHN_PORT.pack(port))


def _bind_virq(cpu: GuestCpu, arg: int) -> None:
    virq, vcpu, _ = abi.EVTCHN_BIND_VIRQ.unpack(cpu.read(arg, abi.EVTCHN_BIND_VIRQ.size))
    port = evtchn.bind_virq(cpu.domain, virq, vcpu)
    cpu.write(arg, abi.EVTCHN_BIND_VIRQ.pack(virq, vcpu, port))


def _bind_ipi(cpu: GuestCpu, arg: int) -> None:
    vcpu, _ = abi.EVTCHN_BIND_IPI.unpack(cpu.read(arg, abi.EVTCHN_BIND_IPI.size))
    port = evtchn.bind_ipi(cpu.domain, vcpu)
    cpu.write(arg, abi.EVTCHN_BIND_IPI.pack(vcpu, port))


def _bind_pirq(cpu: GuestCpu, arg: int) -> None:
    pirq, flags, _ = abi.EVTCHN_BIND_PIRQ.unpack(cpu.read(arg, abi.EVTCHN_BIND_PIRQ.size))
    port = evtchn.bind_pirq(cpu.domain, pirq, flags)
    cpu.write(arg, abi.EVTCHN_BIND_PIRQ.pack(pirq, flags, port))


def _close(cpu: GuestCpu, arg: int) -> None:
    evtchn.close(cpu.domain, int.from_bytes(cpu.read(arg, 4), "little"))


def _send(cpu: GuestCpu, arg: int) -> None:
    evtchn.send(cpu.domain, int.from_bytes(cpu.read(arg, 4), "little"))


def _unmask(cpu: GuestCpu, arg: int) -> None:
    evtchn.unmask(cpu.domain, int.from_bytes(cpu.read(arg, 4), "little"))


def _status(cpu: GuestCpu, arg: int) -> None:
    raw = bytearray(cpu.read(arg, abi.EVTCHN_STATUS.size))
    dom, port, *_ = abi.EVTCHN_STATUS.unpack(raw)
    status = evtchn.status(cpu.domain, dom, port)
    abi.EVTCHN_PORT.pack_into(raw, 8, status.status)
    abi.EVTCHN_PORT.pack_into(raw, 12, status.vcpu)
    # Of the union only the part that the status has is written; the rest goes back as it came.
    if status.status == abi.EVTCHNSTAT_unbound:
        raw[16:18] = status.dom.to_bytes(2, "little")
    elif status.status == abi.EVTCHNSTAT_interdomain:
        raw[16:18] = status.dom.to_bytes(2, "little")
        abi.EVTCHN_PORT.pack_into(raw, 20, status.port)
    elif status.status == abi.EVTCHNSTAT_pirq:
        abi.EVTCHN_PORT.pack_into(raw, 16, status.pirq)
    elif status.status == abi.EVTCHNSTAT_virq:
        abi.EVTCHN_PORT.pack_into(raw, 16, status.virq)
    cpu.write(arg, bytes(raw))


def _bind_vcpu(cpu: GuestCpu, arg: int) -> None:
    port, vcpu = abi.EVTCHN_BIND_VCPU.unpack(cpu.read(arg, abi.EVTCHN_BIND_VCPU.size))
    evtchn.bind_vcpu(cpu.domain, port, vcpu)


def _reset(cpu: GuestCpu, arg: int) -> None:
    evtchn.reset(cpu.domain, int.from_bytes(cpu.read(arg, abi.EVTCHN_RESET.size), "little"))


def _reset_cont(cpu: GuestCpu, arg: int) -> None:
    dom = int.from_bytes(cpu.read(arg, abi.EVTCHN_RESET.size), "little")
    evtchn.reset(cpu.domain, dom, resuming=True)


def _init_control(cpu: GuestCpu, arg: int) -> None:
    raw = cpu.read(arg, abi.EVTCHN_INIT_CONTROL.size)
    gfn, offset, vcpu, _ = abi.EVTCHN_INIT_CONTROL.unpack(raw)
    link_bits = evtchn.init_control(cpu.domain, gfn, offset, vcpu)
    cpu.write(arg, raw[:16] + bytes((link_bits,)) + raw[17:])


def _expand_array(cpu: GuestCpu, arg: int) -> None:
    evtchn.expand_array(cpu.domain, int.from_bytes(cpu.read(arg, abi.EVTCHN_EXPAND_ARRAY.size), "little"))


def _set_priority(cpu: GuestCpu, arg: int) -> None:
    port, priority = abi.EVTCHN_SET_PRIORITY.unpack(cpu.read(arg, abi.EVTCHN_SET_PRIORITY.size))
    evtchn.set_priority(cpu.domain, port, priority)


_OPERATIONS: Final[dict[int, Callable[[GuestCpu, int], None]]] = {
    abi.EVTCHNOP_bind_interdomain: _bind_interdomain,
    abi.EVTCHNOP_bind_virq: _bind_virq,
    abi.EVTCHNOP_bind_pirq: _bind_pirq,
    abi.EVTCHNOP_close: _close,
    abi.EVTCHNOP_send: _send,
    abi.EVTCHNOP_status: _status,
    abi.EVTCHNOP_alloc_unbound: _alloc_unbound,
    abi.EVTCHNOP_bind_ipi: _bind_ipi,
    abi.EVTCHNOP_bind_vcpu: _bind_vcpu,
    abi.EVTCHNOP_unmask: _unmask,
    abi.EVTCHNOP_reset: _reset,
    abi.EVTCHNOP_init_control: _init_control,
    abi.EVTCHNOP_expand_array: _expand_array,
    abi.EVTCHNOP_set_priority: _set_priority,
    abi.EVTCHNOP_reset_cont: _reset_cont,
}

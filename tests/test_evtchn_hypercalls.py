"""HYPERVISOR_event_channel_op and HYPERVISOR_sched_op: guest structs in and out, faults, numbers."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from pvirq.abi import event_channel as ev
from pvirq.abi import sched as sc
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, VCPU_INFO_UPCALL_MASK
from pvirq.pv.hypercalls.evtchn import event_channel_op, event_channel_op_compat
from pvirq.pv.hypercalls.protocol import GuestCpu
from pvirq.pv.hypercalls.sched import sched_op, sched_op_compat
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.memory import Machine

ARG = 0x1000


class FakeCpu:
    """A vCPU whose guest memory is one page at ARG; `read_only` as a guest's text would be."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.memory = bytearray(4096)
        self.read_only = False

    @property
    def domain(self) -> Domain:
        return self.vcpu.domain

    def _at(self, va: int, nbytes: int) -> int:
        if not ARG <= va <= ARG + len(self.memory) - nbytes:
            raise XenError(Errno.EFAULT)
        return va - ARG

    def read(self, va: int, nbytes: int) -> bytes:
        at = self._at(va, nbytes)
        return bytes(self.memory[at : at + nbytes])

    def write(self, va: int, data: bytes) -> None:
        at = self._at(va, len(data))
        if self.read_only:
            raise XenError(Errno.EFAULT)
        self.memory[at : at + len(data)] = data

    def op(self, cmd: int, layout: str, *values: int) -> tuple[int, ...]:
        """EVTCHNOP_cmd on a struct; what is in it afterwards."""
        self.memory[: struct.calcsize(layout)] = struct.pack(layout, *values)
        assert event_channel_op(self, cmd, ARG) == 0
        return struct.unpack_from(layout, self.memory)


@pytest.fixture
def cpu() -> FakeCpu:
    hypervisor = Hypervisor(Machine(64 << 20))
    domain = hypervisor.create_domain(0, privileged=True, vcpus=2)
    hypervisor.create_domain(1)
    for vcpu in domain.vcpus:
        vcpu.up = True
    return FakeCpu(domain.vcpus[0])


def fails(errno: Errno, operation: Callable[..., object], *args: object) -> None:
    with pytest.raises(XenError) as caught:
        operation(*args)
    assert caught.value.errno == errno


def test_every_operation(cpu: FakeCpu) -> None:
    domain: Domain = cpu.domain
    assert cpu.op(ev.EVTCHNOP_alloc_unbound, "<HHI", DOMID_SELF, DOMID_SELF, 99) == (
        DOMID_SELF,
        DOMID_SELF,
        1,
    )
    assert cpu.op(ev.EVTCHNOP_bind_interdomain, "<HHII", DOMID_SELF, 0xABCD, 1, 99)[1:] == (0xABCD, 1, 2)
    assert cpu.op(ev.EVTCHNOP_bind_virq, "<III", 1, 1, 99) == (1, 1, 3)
    assert cpu.op(ev.EVTCHNOP_bind_ipi, "<II", 1, 99) == (1, 4)
    cpu.op(ev.EVTCHNOP_send, "<I", 4)
    assert domain.evtchn.is_pending(4)
    status = "<HHIIIHHI"
    junk = (0xDEAD, 0xBEEF, 0x12345678)
    got = cpu.op(ev.EVTCHNOP_status, status, DOMID_SELF, 7, 2, 99, 99, *junk)
    assert got == (DOMID_SELF, 7, 2, ev.EVTCHNSTAT_interdomain, 0, 0, 0xBEEF, 1)
    got = cpu.op(ev.EVTCHNOP_status, status, DOMID_SELF, 7, 3, 99, 99, *junk)
    assert got[3:] == (ev.EVTCHNSTAT_virq, 1, 1, 0, 0x12345678)
    got = cpu.op(ev.EVTCHNOP_status, status, DOMID_SELF, 7, 4, 99, 99, *junk)
    assert got[3:] == (ev.EVTCHNSTAT_ipi, 1, *junk)
    cpu.op(ev.EVTCHNOP_bind_vcpu, "<II", 2, 1)
    cpu.op(ev.EVTCHNOP_unmask, "<I", 2)
    cpu.op(ev.EVTCHNOP_close, "<I", 1)
    got = cpu.op(ev.EVTCHNOP_status, status, DOMID_SELF, 7, 2, 99, 99, *junk)
    assert got[3:] == (ev.EVTCHNSTAT_unbound, 1, 0, 0xBEEF, 0x12345678)
    frames = domain.machine.alloc(2, 0)
    got = cpu.op(ev.EVTCHNOP_init_control, "<QIIQ", frames, 8, 1, 0xAABB)
    assert got == (frames, 8, 1, 0xAA00 | 17)
    cpu.op(ev.EVTCHNOP_expand_array, "<Q", frames + 1)
    cpu.op(ev.EVTCHNOP_set_priority, "<II", 4, 3)
    fails(Errno.EBUSY, event_channel_op, cpu, ev.EVTCHNOP_reset_cont, ARG + 100)
    cpu.op(ev.EVTCHNOP_reset, "<H", DOMID_SELF)
    assert not domain.evtchn.active
    fails(Errno.EPERM, cpu.op, ev.EVTCHNOP_bind_pirq, "<III", 4, 1, 0)


def test_cmd_is_a_32_bit_int(cpu: FakeCpu) -> None:
    cpu.op(1 << 32 | ev.EVTCHNOP_bind_ipi, "<II", 0, 0)
    for bad in (15, 0xFFFFFFFF, 1 << 31):
        fails(Errno.ENOSYS, event_channel_op, cpu, bad, 0)


def test_faults(cpu: FakeCpu) -> None:
    for cmd in range(15):
        fails(Errno.EFAULT, event_channel_op, cpu, cmd, ARG + 4096 - 1)
    assert not cpu.domain.evtchn.active
    cpu.read_only = True
    fails(Errno.EFAULT, event_channel_op, cpu, ev.EVTCHNOP_bind_ipi, ARG)
    assert [channel.port for channel in cpu.domain.evtchn] == [1]  # bound, though the guest wasn't told
    fails(Errno.EFAULT, event_channel_op, cpu, ev.EVTCHNOP_status, ARG)
    cpu.memory[:4] = b"\1\0\0\0"
    assert event_channel_op(cpu, ev.EVTCHNOP_send, ARG) == 0  # nothing to copy back


def test_compat_event_channel_op(cpu: FakeCpu) -> None:
    cpu.memory[:12] = struct.pack("<III", ev.EVTCHNOP_bind_ipi, 1, 0)
    assert event_channel_op_compat(cpu, ARG) == 0
    assert struct.unpack_from("<III", cpu.memory) == (ev.EVTCHNOP_bind_ipi, 1, 1)
    for cmd in (ev.EVTCHNOP_reset, ev.EVTCHNOP_set_priority, 0xFFFFFFFF):
        cpu.memory[:4] = struct.pack("<I", cmd)
        fails(Errno.ENOSYS, event_channel_op_compat, cpu, ARG)
    fails(Errno.EFAULT, event_channel_op_compat, cpu, ARG + 4096 - 12)


def test_block_yield_shutdown(cpu: FakeCpu) -> None:
    mask = cpu.vcpu.info + VCPU_INFO_UPCALL_MASK
    assert sched_op(cpu, sc.SCHEDOP_yield, 0) == 0
    assert cpu.vcpu.runnable
    assert sched_op(cpu, sc.SCHEDOP_block, 0) == 0
    assert not cpu.vcpu.runnable
    assert not cpu.domain.machine.mem[mask]
    cpu.vcpu.kick()
    assert sched_op_compat(cpu, sc.SCHEDOP_block, 0) == 0
    assert not cpu.vcpu.runnable
    cpu.vcpu.kick()
    cpu.memory[:4] = struct.pack("<I", 0x105)
    assert sched_op(cpu, sc.SCHEDOP_shutdown_code, ARG) == 0
    assert cpu.domain.shutdown_reason is None
    assert sched_op_compat(cpu, sc.SCHEDOP_shutdown, 1) == 0
    assert cpu.domain.shutdown_reason == 5  # the code latched before comes first
    assert not cpu.vcpu.runnable


def test_remote_shutdown(cpu: FakeCpu) -> None:
    other = cpu.domain.hypervisor.domains[1]
    cpu.memory[:8] = struct.pack("<HHI", 1, 0, 0x203)
    assert sched_op(cpu, sc.SCHEDOP_remote_shutdown, ARG) == 0
    assert other.shutdown_reason == 3
    for domid in (DOMID_SELF, 7):
        cpu.memory[:2] = struct.pack("<H", domid)
        fails(Errno.ESRCH, sched_op, cpu, sc.SCHEDOP_remote_shutdown, ARG)
    guest = FakeCpu(other.vcpus[0])
    guest.memory[:2] = struct.pack("<H", 1)
    fails(Errno.EPERM, sched_op, guest, sc.SCHEDOP_remote_shutdown, ARG)
    guest.memory[:4] = struct.pack("<i", 0)
    fails(Errno.EPERM, sched_op, guest, sc.SCHEDOP_pin_override, 0)


def test_watchdog_and_pin(cpu: FakeCpu) -> None:
    cpu.memory[:8] = struct.pack("<II", 0, 5)
    assert sched_op(cpu, sc.SCHEDOP_watchdog, ARG) == 1
    for pcpu, errno in (
        (-1, Errno.EINVAL),
        (1, Errno.EINVAL),
        (256, Errno.EINVAL),
        (0, None),
        (0, Errno.EBUSY),
    ):
        cpu.memory[:4] = struct.pack("<i", pcpu)
        if errno is None:
            assert sched_op(cpu, sc.SCHEDOP_pin_override, ARG) == 0
        else:
            fails(errno, sched_op, cpu, sc.SCHEDOP_pin_override, ARG)
    for bad in (8, 0xFFFFFFFF):
        fails(Errno.ENOSYS, sched_op, cpu, bad, 0)
    fails(Errno.ENOSYS, sched_op_compat, cpu, sc.SCHEDOP_poll, ARG)
    for cmd in range(2, 8):
        fails(Errno.EFAULT, sched_op, cpu, cmd, 0)


def poll(cpu: GuestCpu, ports: int, nr_ports: int, timeout: int = 0) -> int:
    cpu.write(ARG, struct.pack("<QIIQ", ports, nr_ports, 0, timeout))
    return sched_op(cpu, sc.SCHEDOP_poll, ARG)


def test_poll(cpu: FakeCpu) -> None:
    domain = cpu.domain
    port = evtchn.bind_ipi(domain, 1)
    cpu.memory[64:72] = struct.pack("<II", port, 50)
    assert poll(cpu, ARG + 64, 1) == 0
    assert not cpu.vcpu.runnable
    evtchn.send(domain, port)
    assert cpu.vcpu.runnable
    assert poll(cpu, ARG + 64, 2) == 0  # the first is pending, the second not looked at
    evtchn.close(domain, port)
    fails(Errno.EINVAL, poll, cpu, ARG + 64, 2)
    fails(Errno.EINVAL, poll, cpu, 1 << 47, 129)
    fails(Errno.EFAULT, poll, cpu, 1 << 47, 0)  # an address in the hole, though nothing is to be read
    fails(Errno.EFAULT, poll, cpu, 0, 1)
    assert cpu.vcpu.runnable
    assert poll(cpu, 0, 0, (1 << 64) - 1) == 0  # a time long past
    assert not cpu.vcpu.runnable
    domain.hypervisor.clock.fire_due()
    assert cpu.vcpu.runnable
    domain.machine.mem[cpu.vcpu.info] = 1
    domain.machine.mem[cpu.vcpu.info + VCPU_INFO_UPCALL_MASK] = 0
    assert poll(cpu, 0, 1) == 0  # an upcall is due: the bad pointer is never read

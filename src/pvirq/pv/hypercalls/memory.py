"""memory_op (xen/common/memory.c, xen/arch/x86/mm.c arch_memory_op)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np

from pvirq.abi import memory as abi
from pvirq.abi.arch_x86 import MACH2PHYS_VIRT_START
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF
from pvirq.pv.pagetable import ABANDONED
from pvirq.xen.memory import Machine

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

RESERVATION: Final = "<QQIIHxxxxxx"  # extent_start, nr_extents, extent_order, mem_flags, domid
RESERVATION_SIZE: Final = 32
LONGEST_BATCH: Final = 1 << 20  # extents in one hypercall; Xen would go on in continuations, a guest can as well
INVALID_M2P: Final = (1 << 64) - 1


def memory_op(cpu: PvVcpu, command: int, argument: int) -> int:
    """Sizes, maps and the reservation. For the reservation operations the result is how many extents were done."""
    command &= 0xFFFFFFFF
    start, operation = command >> abi.MEMOP_EXTENT_SHIFT, command & abi.MEMOP_CMD_MASK
    if operation in (
        abi.XENMEM_increase_reservation,
        abi.XENMEM_decrease_reservation,
        abi.XENMEM_populate_physmap,
    ):
        return _adjust_reservation(cpu, operation, start, argument)
    if operation == abi.XENMEM_exchange:
        return _exchange(cpu, argument)
    if start:
        return -Errno.EINVAL if operation in _SIMPLE else -Errno.ENOSYS
    handler = _SIMPLE.get(operation)
    return handler(cpu, argument) if handler else -Errno.ENOSYS


def _maximum_ram_page(cpu: PvVcpu, _argument: int) -> int:
    return cpu.domain.machine.frames - 1


def _named_self(cpu: PvVcpu, domid: int) -> None:
    domid &= 0xFFFF
    if domid in (DOMID_SELF, cpu.domain.domid):
        return
    if domid not in cpu.domain.hypervisor.domains:
        raise XenError(Errno.ESRCH, f"no domain {domid:#x}")
    raise XenError(Errno.EPERM, "another domain's memory")


def _reservation(cpu: PvVcpu, argument: int) -> int:
    (domid,) = struct.unpack("<H", cpu.read(argument, 2))
    _named_self(cpu, domid)
    return cpu.guest.frames


def _maximum_reservation(cpu: PvVcpu, argument: int) -> int:
    _reservation(cpu, argument)
    return cpu.guest.max_frames


def _maximum_gpfn(cpu: PvVcpu, argument: int) -> int:
    (domid,) = struct.unpack("<H", cpu.read(argument, 2))
    _named_self(cpu, domid)
    (max_pfn,) = struct.unpack_from("<Q", cpu.domain.machine.mem, cpu.domain.shared_info + 3088)
    return int(max_pfn) - 1 if max_pfn else 0


def _memory_map(cpu: PvVcpu, argument: int) -> int:
    """One e820 entry: RAM from 0 to the domain's size."""
    entries, buffer = struct.unpack("<IxxxxQ", cpu.read(argument, 16))
    if not cpu.guest.memory_map:
        return -Errno.ENOSYS
    count = min(entries, len(cpu.guest.memory_map))
    data = b"".join(struct.pack("<QQI", *entry) for entry in cpu.guest.memory_map[:count])
    cpu.write(buffer, data)
    cpu.write(argument, struct.pack("<I", count))
    return 0


def _set_memory_map(cpu: PvVcpu, argument: int) -> int:
    domid, entries, buffer = struct.unpack("<HxxxxxxIxxxxQ", cpu.read(argument, 24))
    if entries > 128:
        return -Errno.E2BIG
    _named_self(cpu, domid)
    data = cpu.read(buffer, entries * 20)
    cpu.guest.memory_map = list(struct.iter_unpack("<QQI", data))
    return 0


def _privileged_only(cpu: PvVcpu, _argument: int) -> int:
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def _machphys_mapping(cpu: PvVcpu, argument: int) -> int:
    machine = cpu.domain.machine
    end = MACH2PHYS_VIRT_START + machine.frames * 8
    cpu.write(argument, struct.pack("<QQQ", MACH2PHYS_VIRT_START, end, machine.frames - 1))
    return 0


def _machphys_mfn_list(cpu: PvVcpu, argument: int) -> int:
    """The first mfn of each 2 MiB of the machine-to-phys table."""
    extents, _pad, start = struct.unpack("<IIQ", cpu.read(argument, 16))
    machine = cpu.domain.machine
    count = min(extents, -(-machine.frames * 8 // (2 << 20)))
    mfns = [machine.m2p_mfn + i * 512 for i in range(count)]
    cpu.write(start, struct.pack(f"<{count}Q", *mfns))
    cpu.write(argument + 16, struct.pack("<I", count))
    return 0


_SIMPLE: Final = {
    abi.XENMEM_maximum_ram_page: _maximum_ram_page,
    abi.XENMEM_current_reservation: _reservation,
    abi.XENMEM_maximum_reservation: _maximum_reservation,
    abi.XENMEM_maximum_gpfn: _maximum_gpfn,
    abi.XENMEM_memory_map: _memory_map,
    abi.XENMEM_machine_memory_map: _privileged_only,
    abi.XENMEM_set_memory_map: _set_memory_map,
    abi.XENMEM_machphys_mapping: _machphys_mapping,
    abi.XENMEM_machphys_mfn_list: _machphys_mfn_list,
}


def _adjust_reservation(cpu: PvVcpu, operation: int, start: int, argument: int) -> int:
    """increase_reservation, decrease_reservation and populate_physmap: every failure just ends the count."""
    try:
        extents_at, count, order, _flags, domid = struct.unpack(RESERVATION, cpu.read(argument, RESERVATION_SIZE))
        _named_self(cpu, domid)
    except XenError:
        return start
    if count > 0xFFFFFFFF >> abi.MEMOP_EXTENT_SHIFT or start >= count:
        return start
    if order > abi.MAX_ORDER_UNPRIVILEGED and not (operation == abi.XENMEM_decrease_reservation and order <= 9):
        return start
    work = {
        abi.XENMEM_increase_reservation: _increase,
        abi.XENMEM_decrease_reservation: _decrease,
        abi.XENMEM_populate_physmap: _populate,
    }[operation]
    done = start
    for i in range(start, min(count, start + LONGEST_BATCH)):
        try:
            if not work(cpu, extents_at + i * 8, order):
                break
        except XenError:
            break
        done += 1
    return done


def _take_frames(cpu: PvVcpu, order: int) -> int:
    guest, size = cpu.guest, 1 << order
    if guest.frames + size > guest.max_frames:
        raise XenError(Errno.ENOMEM, "beyond the domain's maximum")
    mfn = cpu.domain.machine.alloc(size, cpu.domain.domid, align=size)
    guest.frames += size
    return mfn


def _increase(cpu: PvVcpu, extent: int, order: int) -> bool:
    mfn = _take_frames(cpu, order)
    cpu.write(extent, struct.pack("<Q", mfn))
    return True


def _populate(cpu: PvVcpu, extent: int, order: int) -> bool:
    (pfn,) = struct.unpack("<Q", cpu.read(extent, 8))
    mfn = _take_frames(cpu, order)
    _set_m2p(cpu.domain.machine, mfn, pfn, 1 << order)
    cpu.write(extent, struct.pack("<Q", mfn))
    return True


def _set_m2p(machine: Machine, mfn: int, pfn: int, count: int) -> None:
    np.frombuffer(machine.m2p, dtype=np.uint64)[mfn : mfn + count] = np.arange(pfn, pfn + count, dtype=np.uint64)


def _decrease(cpu: PvVcpu, extent: int, order: int) -> bool:
    (mfn,) = struct.unpack("<Q", cpu.read(extent, 8))
    return all(_give_back(cpu, frame) for frame in range(mfn, mfn + (1 << order)))


def _give_back(cpu: PvVcpu, mfn: int) -> bool:
    machine = cpu.domain.machine
    if not cpu.tables.owns(mfn) or cpu.guest.is_xen_page(mfn):
        return False
    machine.m2p[mfn] = INVALID_M2P
    if not machine.pinned[mfn] & ABANDONED:  # one frame given back twice makes no room for two
        cpu.guest.frames -= 1
        cpu.tables.release(mfn)
    return True


def _exchange(cpu: PvVcpu, argument: int) -> int:
    """XENMEM_exchange: give some extents, get as many frames in others (memory_exchange)."""
    in_at, in_count, in_order, _, in_domid, out_at, out_count, out_order, _, out_domid, exchanged = struct.unpack(
        RESERVATION + RESERVATION[1:] + "Q", cpu.read(argument, 72)
    )
    if exchanged > in_count:
        return -Errno.EINVAL
    if in_domid != out_domid or max(in_order, out_order) > abi.MAX_ORDER_UNPRIVILEGED:
        return -Errno.EINVAL if in_domid != out_domid else -Errno.EPERM
    if in_count << in_order != out_count << out_order or min(in_order, out_order) < 0:
        return -Errno.EINVAL
    if (in_order > out_order and out_count > LONGEST_BATCH) or in_count > LONGEST_BATCH:
        return -Errno.EINVAL
    _named_self(cpu, in_domid)
    # Whole exchange units: the larger of the two extents.
    unit = max(in_order, out_order)
    ins, outs = 1 << (unit - in_order), 1 << (unit - out_order)
    done = exchanged
    result = 0
    for chunk in range(exchanged // ins, in_count // ins):
        try:
            _exchange_unit(cpu, in_at + chunk * ins * 8, ins, in_order, out_at + chunk * outs * 8, outs, out_order)
        except XenError as error:
            result = -error.errno
            break
        done += ins
    cpu.write(argument + 64, struct.pack("<Q", done))
    return result


def _exchange_unit(cpu: PvVcpu, in_at: int, ins: int, in_order: int, out_at: int, outs: int, out_order: int) -> None:
    machine, tables = cpu.domain.machine, cpu.tables
    given = [mfn + i for (mfn,) in struct.iter_unpack("<Q", cpu.read(in_at, ins * 8)) for i in range(1 << in_order)]
    pfns = struct.unpack(f"<{outs}Q", cpu.read(out_at, outs * 8))
    for mfn in given:
        # As steal_page: only a frame that nothing else refers to.
        if not tables.owns(mfn) or cpu.guest.is_xen_page(mfn):
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not the guest's")
        if machine.refs[mfn] or machine.type_count[mfn] or machine.pinned[mfn]:
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is in use")
    if len(set(given)) != len(given):
        raise XenError(Errno.EINVAL, "a frame given twice")
    taken = []
    try:
        for _ in range(outs):
            taken.append(machine.alloc(1 << out_order, cpu.domain.domid, align=1 << out_order))
    except XenError:
        for mfn in taken:
            machine.free(mfn, 1 << out_order)
        raise
    for mfn in given:
        machine.m2p[mfn] = INVALID_M2P
        tables.release(mfn)
    for pfn, mfn in zip(pfns, taken, strict=True):
        _set_m2p(machine, mfn, pfn, 1 << out_order)
    cpu.write(out_at, struct.pack(f"<{outs}Q", *taken))

"""memory_op (xen/common/memory.c, xen/arch/x86/mm.c arch_memory_op)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from pvirq.abi import memory as abi
from pvirq.abi.arch_x86 import MACH2PHYS_VIRT_END, MACH2PHYS_VIRT_START
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, PAGE_SHIFT, SHARED_INFO_MAX_PFN
from pvirq.pv.hypercalls.protocol import Preempted
from pvirq.xen.domain import Domain
from pvirq.xen.memory import ABANDONED, Machine

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

RESERVATION: Final = "<QQIIHxxxxxx"  # extent_start, nr_extents, extent_order, mem_flags, domid
RESERVATION_SIZE: Final = 32
PREEMPT_AFTER: Final = 1 << 13  # frames in one go
INVALID_M2P: Final = (1 << 64) - 1
MAX_EXTENTS: Final = 0xFFFFFFFF >> abi.MEMOP_EXTENT_SHIFT


def memory_op(cpu: PvVcpu, command: int, argument: int) -> int:
    """Sizes, maps and the reservation. For the reservation operations the result is how many extents were done."""
    start, operation = command >> abi.MEMOP_EXTENT_SHIFT, command & abi.MEMOP_CMD_MASK
    if operation in (
        abi.XENMEM_increase_reservation,
        abi.XENMEM_decrease_reservation,
        abi.XENMEM_populate_physmap,
    ):
        return _adjust_reservation(cpu, operation, start, argument)
    handler = _WITH_START.get(operation)
    if handler is not None:
        return handler(cpu, argument, start)
    handler = _ARCH.get(operation)
    if handler is None or start:
        return -Errno.ENOSYS
    return handler(cpu, argument, start)


def _no_start(start: int) -> None:
    if start:
        raise XenError(Errno.EINVAL, "no continuation of this operation")


def _maximum_ram_page(cpu: PvVcpu, _argument: int, start: int) -> int:
    _no_start(start)
    return cpu.domain.machine.frames


def _target(cpu: PvVcpu, domid: int) -> Domain:
    """A domain that the caller may ask about or change (XSM_TARGET). XenError(ESRCH, EPERM)."""
    domain = cpu.domain.hypervisor.find_domain(domid, cpu.domain)
    if domain is not cpu.domain and not cpu.domain.privileged:
        raise XenError(Errno.EPERM, f"domain {domid}")
    return domain


def _target_at(cpu: PvVcpu, argument: int, start: int) -> Domain:
    _no_start(start)
    (domid,) = struct.unpack("<H", cpu.read(argument, 2))
    return _target(cpu, domid)


def _current_reservation(cpu: PvVcpu, argument: int, start: int) -> int:
    return _target_at(cpu, argument, start).tot_pages


def _maximum_reservation(cpu: PvVcpu, argument: int, start: int) -> int:
    return _target_at(cpu, argument, start).max_pages


def _maximum_gpfn(cpu: PvVcpu, argument: int, start: int) -> int:
    domain = _target_at(cpu, argument, start)
    (max_pfn,) = struct.unpack_from("<Q", domain.machine.mem, domain.shared_info + SHARED_INFO_MAX_PFN)
    return int(max_pfn) - 1 if max_pfn else 0


def _not_translated(cpu: PvVcpu, domid: int) -> int:
    """A PV domain has no physmap of Xen's that could be changed, whoever asks."""
    cpu.domain.hypervisor.find_domain(domid, cpu.domain)
    return -Errno.EACCES


def _add_to_physmap(cpu: PvVcpu, argument: int, start: int) -> int:
    if start > 0xFFFF:
        return -Errno.EDOM
    domid, space = struct.unpack("<HxxI", cpu.read(argument, 24)[:8])
    return -Errno.ENOSYS if space == abi.XENMAPSPACE_gmfn_foreign else _not_translated(cpu, domid)


def _add_to_physmap_batch(cpu: PvVcpu, argument: int, start: int) -> int:
    if start > 0xFFFF:
        return -Errno.EDOM
    domid, space = struct.unpack("<HH", cpu.read(argument, 32)[:4])
    return -Errno.EOPNOTSUPP if space == abi.XENMAPSPACE_gmfn_range else _not_translated(cpu, domid)


def _remove_from_physmap(cpu: PvVcpu, argument: int, start: int) -> int:
    _no_start(start)
    (domid,) = struct.unpack("<H", cpu.read(argument, 16)[:2])
    return _not_translated(cpu, domid)


def _access_op(cpu: PvVcpu, argument: int, _start: int) -> int:
    """Only for a monitor of another, translated domain."""
    (domid,) = struct.unpack("<xxH", cpu.read(argument, 32)[:4])
    if domid == DOMID_SELF or cpu.domain.hypervisor.find_domain(domid, cpu.domain) is cpu.domain:
        return -Errno.EPERM
    return -Errno.EINVAL


def _claim_pages(cpu: PvVcpu, argument: int, start: int) -> int:
    _no_start(start)
    extents, _, order, flags, domid = struct.unpack(RESERVATION, cpu.read(argument, RESERVATION_SIZE))
    if extents or order or flags or domid not in cpu.domain.hypervisor.domains:
        return -Errno.EINVAL
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def _get_vnumainfo(cpu: PvVcpu, argument: int, start: int) -> int:
    """No domain here has virtual NUMA nodes."""
    _no_start(start)
    domid, pad = struct.unpack("<HH", cpu.read(argument, 40)[:4])
    if pad:
        return -Errno.EINVAL
    _target(cpu, domid)
    return -Errno.EOPNOTSUPP


def _acquire_resource(cpu: PvVcpu, argument: int, _start: int) -> int:
    """For device models and the toolstack, which no real guest is."""
    domid, _type, _id, frames, pad, frame = struct.unpack("<HHIIIQ", cpu.read(argument, 32)[:24])
    if pad or frame >> 32 or (frame + frames) >> 32:
        return -Errno.EINVAL
    if domid == DOMID_SELF or cpu.domain.hypervisor.find_domain(domid, cpu.domain) is cpu.domain:
        return -Errno.EPERM
    return -Errno.EOPNOTSUPP if cpu.domain.privileged else -Errno.EPERM


def _memory_map(cpu: PvVcpu, argument: int, _start: int) -> int:
    """The e820 map: at first one entry, RAM from 0 to the domain's size."""
    entries, buffer = struct.unpack("<IxxxxQ", cpu.read(argument, 16))
    if not cpu.guest.memory_map:
        return -Errno.ENOSYS
    count = min(entries, len(cpu.guest.memory_map))
    data = b"".join(struct.pack("<QQI", *entry) for entry in cpu.guest.memory_map[:count])
    if data:
        cpu.write(buffer, data)
    cpu.write(argument, struct.pack("<IxxxxQ", count, buffer))
    return 0


def _set_memory_map(cpu: PvVcpu, argument: int, _start: int) -> int:
    domid, entries, buffer = struct.unpack("<HxxxxxxIxxxxQ", cpu.read(argument, 24))
    if entries > abi.E820MAX:
        return -Errno.EINVAL
    if _target(cpu, domid) is not cpu.domain:
        return -Errno.ENOSYS
    data = cpu.read(buffer, entries * 20) if entries else b""
    cpu.guest.memory_map = list(struct.iter_unpack("<QQI", data))
    return 0


def _machine_memory_map(cpu: PvVcpu, _argument: int, _start: int) -> int:
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def _machphys_mapping(cpu: PvVcpu, argument: int, _start: int) -> int:
    """The room that the table has, not what is there now: only a dom0 is told how much memory the host has."""
    most = (MACH2PHYS_VIRT_END - MACH2PHYS_VIRT_START) // 8 - 1
    if cpu.domain.privileged:
        most = cpu.domain.machine.frames - 1
    cpu.write(argument, struct.pack("<QQQ", MACH2PHYS_VIRT_START, MACH2PHYS_VIRT_END, most))
    return 0


def _machphys_mfn_list(cpu: PvVcpu, argument: int, _start: int) -> int:
    """The first mfn of each 2 MiB of the machine-to-phys table."""
    extents, pad, start = struct.unpack("<IIQ", cpu.read(argument, 24)[:16])
    machine = cpu.domain.machine
    count = min(extents, -(-machine.frames * 8 // (2 << 20)))
    mfns = [machine.m2p_mfn + i * 512 for i in range(count)]
    if mfns:
        cpu.write(start, struct.pack(f"<{count}Q", *mfns))
    cpu.write(argument, struct.pack("<IIQI", extents, pad, start, count))
    return 0


def _pod_target(cpu: PvVcpu, argument: int, _start: int) -> int:
    """Populate on demand is for HVM domains."""
    (domid,) = struct.unpack("<H", cpu.read(argument, 40)[32:34])
    cpu.domain.hypervisor.find_domain(domid, cpu.domain)
    return -Errno.EINVAL


def _adjust_reservation(cpu: PvVcpu, operation: int, start: int, argument: int) -> int:
    """increase_reservation, decrease_reservation and populate_physmap: every failure just ends the count."""
    try:
        extents_at, count, order, flags, domid = struct.unpack(RESERVATION, cpu.read(argument, RESERVATION_SIZE))
        if count > MAX_EXTENTS or start >= count:
            return start
        domain = _target(cpu, domid)
        below = _allocation_limit(cpu, flags)
    except XenError:
        return start
    # Of another domain only a toolstack changes the size, which is none of the real guests.
    if domain is not cpu.domain or order > abi.MAX_ORDER_UNPRIVILEGED:
        return start
    if operation == abi.XENMEM_populate_physmap and flags & abi.XENMEMF_populate_on_demand:
        return start
    end = min(count, start + max(PREEMPT_AFTER >> order, 1))
    done = start
    for at in range(extents_at + start * 8, extents_at + end * 8, 8):
        try:
            if operation == abi.XENMEM_decrease_reservation:
                okay = _decrease(cpu, at, order)
            elif operation == abi.XENMEM_populate_physmap:
                okay = _populate(cpu, at, order, below)
            else:
                okay = _increase(cpu, at if extents_at else 0, order, below)
        except XenError:
            okay = False
        if not okay:
            return done
        done += 1
    if done < count:
        raise Preempted(operation | done << abi.MEMOP_EXTENT_SHIFT, argument)
    return done


def _allocation_limit(cpu: PvVcpu, flags: int) -> int:
    """Which frames may be given, by the address bits in the flags: those below. XenError(EINVAL)."""
    frames = cpu.domain.machine.frames
    bits = flags & abi.XENMEMF_ADDRESS_BITS
    if flags & abi.XENMEMF_NODE and flags & abi.XENMEMF_exact_node_request and not cpu.domain.privileged:
        raise XenError(Errno.EINVAL, "a NUMA node of its choice is not for a guest")
    if not bits or bits >= (frames - 1).bit_length() + PAGE_SHIFT:
        return frames
    if bits <= PAGE_SHIFT:
        raise XenError(Errno.EINVAL, f"no frame has an address of {bits} bits")
    return 1 << bits - PAGE_SHIFT


def _take_frames(cpu: PvVcpu, order: int, below: int) -> int:
    domain, size = cpu.domain, 1 << order
    if domain.tot_pages + size > domain.max_pages:
        raise XenError(Errno.ENOMEM, "beyond the domain's maximum")
    mfn = domain.machine.alloc(size, domain.domid, align=size, below=below)
    domain.tot_pages += size
    return mfn


def _increase(cpu: PvVcpu, extent: int, order: int, below: int) -> bool:
    mfn = _take_frames(cpu, order, below)
    if extent:
        cpu.write(extent, struct.pack("<Q", mfn))
    return True


def _populate(cpu: PvVcpu, extent: int, order: int, below: int) -> bool:
    (pfn,) = struct.unpack("<Q", cpu.read(extent, 8))
    mfn = _take_frames(cpu, order, below)
    _set_m2p(cpu.domain.machine, mfn, pfn, 1 << order)
    cpu.write(extent, struct.pack("<Q", mfn))
    return True


def _set_m2p(machine: Machine, mfn: int, pfn: int, count: int) -> None:
    machine.np_m2p[mfn : mfn + count] = np.arange(count, dtype=np.uint64) + np.uint64(pfn)


def _decrease(cpu: PvVcpu, extent: int, order: int) -> bool:
    (mfn,) = struct.unpack("<Q", cpu.read(extent, 8))
    return all(_give_back(cpu, frame) for frame in range(mfn, mfn + (1 << order)))


def _give_back(cpu: PvVcpu, mfn: int) -> bool:
    machine = cpu.domain.machine
    if not cpu.tables.owns(mfn) or cpu.domain.is_special_page(mfn):
        return False
    machine.m2p[mfn] = INVALID_M2P
    if not machine.pinned[mfn] & ABANDONED:  # given back before, and not gone yet
        cpu.tables.release(mfn)
    return True


def _exchange(cpu: PvVcpu, argument: int, start: int) -> int:
    """XENMEM_exchange: give some extents, get as many frames in others (memory_exchange)."""
    _no_start(start)
    in_at, in_count, in_order, _, in_domid, out_at, out_count, out_order, flags, out_domid, exchanged = struct.unpack(
        RESERVATION + RESERVATION[1:] + "Q", cpu.read(argument, 72)
    )
    done, result, finished = exchanged, 0, True
    # Whole exchange units: the larger of the two extents.
    unit = max(in_order, out_order)
    if unit > abi.MAX_ORDER_UNPRIVILEGED:
        result = -Errno.EPERM
    elif (
        exchanged > in_count
        or in_domid != out_domid
        or (in_count << in_order | out_count << out_order) >> 64
        or in_count << in_order != out_count << out_order
    ):
        result = -Errno.EINVAL
    elif exchanged == in_count:
        return 0
    else:
        ins, outs = 1 << (unit - in_order), 1 << (unit - out_order)
        first, end = exchanged // ins, in_count // ins
        stop = min(end, first + max(PREEMPT_AFTER >> unit, 1))
        finished = stop == end
        try:
            below = _allocation_limit(cpu, flags)
            if _target(cpu, in_domid) is not cpu.domain:
                raise XenError(Errno.EPERM, "another domain's memory")
            for chunk in range(first, stop):
                done = chunk * ins
                ins_at, outs_at = in_at + chunk * ins * 8, out_at + chunk * outs * 8
                _exchange_unit(cpu, ins_at, ins, in_order, outs_at, outs, out_order, below)
            done = in_count if finished else stop * ins
        except XenError as error:
            result = -error.errno
    cpu.write(argument + 64, struct.pack("<Q", done))
    if not result and not finished:
        raise Preempted(abi.XENMEM_exchange, argument)
    return result


def _exchange_unit(
    cpu: PvVcpu, in_at: int, ins: int, in_order: int, out_at: int, outs: int, out_order: int, below: int
) -> None:
    machine, tables = cpu.domain.machine, cpu.tables
    given = [mfn + i for (mfn,) in struct.iter_unpack("<Q", cpu.read(in_at, ins * 8)) for i in range(1 << in_order)]
    pfns = struct.unpack(f"<{outs}Q", cpu.read(out_at, outs * 8))
    for mfn in given:
        # As steal_page: only a frame that nothing else refers to.
        if not tables.owns(mfn) or cpu.domain.is_special_page(mfn):
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not the guest's")
        if machine.refs[mfn] or machine.type_count[mfn] or machine.pinned[mfn]:
            raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is in use")
    if len(set(given)) != len(given):
        raise XenError(Errno.EINVAL, "a frame given twice")
    taken = []
    try:
        for _ in range(outs):
            taken.append(machine.alloc(1 << out_order, cpu.domain.domid, align=1 << out_order, below=below))
    except XenError:
        for mfn in taken:
            machine.free(mfn, 1 << out_order)
        raise
    for mfn in given:
        machine.m2p[mfn] = INVALID_M2P
        tables.release(mfn)
    cpu.domain.tot_pages += len(given)
    for pfn, mfn in zip(pfns, taken, strict=True):
        _set_m2p(machine, mfn, pfn, 1 << out_order)
    cpu.write(out_at, struct.pack(f"<{outs}Q", *taken))


Handler = Callable[["PvVcpu", int, int], int]
# do_memory_op's own, which look at a continuation's start themselves, and arch_memory_op's.
_WITH_START: Final[dict[int, Handler]] = {
    abi.XENMEM_exchange: _exchange,
    abi.XENMEM_maximum_ram_page: _maximum_ram_page,
    abi.XENMEM_current_reservation: _current_reservation,
    abi.XENMEM_maximum_reservation: _maximum_reservation,
    abi.XENMEM_maximum_gpfn: _maximum_gpfn,
    abi.XENMEM_add_to_physmap: _add_to_physmap,
    abi.XENMEM_add_to_physmap_batch: _add_to_physmap_batch,
    abi.XENMEM_remove_from_physmap: _remove_from_physmap,
    abi.XENMEM_access_op: _access_op,
    abi.XENMEM_claim_pages: _claim_pages,
    abi.XENMEM_get_vnumainfo: _get_vnumainfo,
    abi.XENMEM_acquire_resource: _acquire_resource,
}
_ARCH: Final[dict[int, Handler]] = {
    abi.XENMEM_memory_map: _memory_map,
    abi.XENMEM_machine_memory_map: _machine_memory_map,
    abi.XENMEM_set_memory_map: _set_memory_map,
    abi.XENMEM_set_pod_target: _pod_target,
    abi.XENMEM_get_pod_target: _pod_target,
    abi.XENMEM_machphys_mapping: _machphys_mapping,
    abi.XENMEM_machphys_mfn_list: _machphys_mfn_list,
}

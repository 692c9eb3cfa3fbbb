"""grant_table_op (xen/common/grant_table.c)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvirq.abi import grant_table as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF
from pvirq.pv.grant_map import PvMapper
from pvirq.pv.hypercalls.protocol import Preempted, handle_okay
from pvirq.xen import grant_copy, grant_transfer
from pvirq.xen.domain import Domain
from pvirq.xen.grant import GrantError, GrantTable
from pvirq.xen.grant_map import Unmapped, map_grant, unmap_grant

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

COMMAND_MASK: Final = 0xFFF
UNMAP_BATCH: Final = 32  # unmaps between two TLB flushes (GNTTAB_UNMAP_BATCH_SIZE)
PREEMPT_AFTER: Final = 1024  # operations in one go


def grant_table_op(cpu: PvVcpu, command: int, operations: int, count: int) -> int:
    """A batch of one kind of operation; each gets a GNTST_* status of its own in guest memory."""
    command, count = command & 0xFFFFFFFF, count & 0xFFFFFFFF
    if count >> 31:
        return -Errno.EINVAL
    if command & ~COMMAND_MASK and command & COMMAND_MASK != abi.GNTTABOP_cache_flush:
        return -Errno.EINVAL
    command &= COMMAND_MASK
    single = _SINGLE.get(command)
    if single is not None:
        if command not in _WITHOUT_COUNT and count != 1:
            return -Errno.EINVAL
        return single(cpu, operations)
    batch = _BATCH.get(command)
    if batch is None:
        return -Errno.ENOSYS
    if not handle_okay(operations):
        return -Errno.EFAULT
    size, work = batch
    done = min(count, PREEMPT_AFTER)
    result = work(cpu, operations, done)
    if not result and done < count:
        raise Preempted(command, operations + done * size, count - done)
    return result


def _one_by_one(size: int, status_at: int, work: Callable[[PvVcpu, bytes], None]) -> tuple[int, Batch]:
    """An operation of `size` bytes whose only result is the status at offset `status_at`."""

    def run(cpu: PvVcpu, va: int, count: int) -> int:
        for at in range(va, va + count * size, size):
            data = cpu.read(at, size)
            status = abi.GNTST_okay
            try:
                work(cpu, data)
            except GrantError as error:
                status = error.status
            cpu.write(at + status_at, struct.pack("<h", status))
        return 0

    return size, run


def _table(domain: Domain) -> GrantTable:
    table = domain.grant_table
    if table is None:
        raise GrantError(abi.GNTST_general_error)
    return table


def _target(cpu: PvVcpu, domid: int) -> GrantTable:
    """The table of a domain that the caller may manage: its own, or any for a privileged one."""
    target = cpu.domain if domid == DOMID_SELF else cpu.domain.hypervisor.domain_or_zombie(domid)
    if target is None:
        raise GrantError(abi.GNTST_bad_domain)
    if target is not cpu.domain and not cpu.domain.privileged:
        raise GrantError(abi.GNTST_permission_denied)
    return _table(target)


# -- the table ------------------------------------------------------------------------------------------------------


def _setup_table(cpu: PvVcpu, va: int) -> int:
    domid, count, frame_list = struct.unpack("<HxxIxxxxxxxxQ", cpu.read(va, 24))
    if not handle_okay(frame_list):
        return -Errno.EFAULT
    status = abi.GNTST_okay
    try:
        table = _target(cpu, domid)
        try:
            table.grow(count)
        except XenError:
            raise GrantError(abi.GNTST_general_error) from None
        status = _write_frames(cpu, frame_list, table.frames[:count])
    except GrantError as error:
        status = error.status
    cpu.write(va + 8, struct.pack("<h", status))
    return 0


def _write_frames(cpu: PvVcpu, va: int, frames: list[int]) -> int:
    try:
        if frames:
            cpu.write(va, struct.pack(f"<{len(frames)}Q", *frames))
    except XenError:
        return abi.GNTST_bad_virt_addr
    return abi.GNTST_okay


def _query_size(cpu: PvVcpu, va: int) -> int:
    domid, frames, most, status = struct.unpack("<HxxIIhxx", cpu.read(va, 16))
    try:
        table = _target(cpu, domid)
        frames, most, status = len(table.frames), table.max_frames, abi.GNTST_okay
    except GrantError as error:
        status = error.status
    cpu.write(va, struct.pack("<HxxIIhxx", domid, frames, most, status))
    return 0


def _set_version(cpu: PvVcpu, va: int) -> int:
    (version,) = struct.unpack("<I", cpu.read(va, 4))
    table, result = _table(cpu.domain), 0
    try:
        table.set_version(version)
    except XenError as error:
        result = -error.errno
    cpu.write(va, struct.pack("<I", table.version))
    return result


def _get_version(cpu: PvVcpu, va: int) -> int:
    (domid,) = struct.unpack("<H", cpu.read(va, 8)[:2])
    try:
        table = _target(cpu, domid)
    except GrantError as error:
        return -Errno.ESRCH if error.status == abi.GNTST_bad_domain else -Errno.EPERM
    cpu.write(va + 4, struct.pack("<I", table.version))
    return 0


def _get_status_frames(cpu: PvVcpu, va: int) -> int:
    count, domid, frame_list = struct.unpack("<IHxxQ", cpu.read(va, 16))
    if not handle_okay(frame_list):
        return -Errno.EFAULT
    try:
        table = _target(cpu, domid)
        if count > len(table.status_frames):
            raise GrantError(abi.GNTST_general_error)
        status = _write_frames(cpu, frame_list, table.status_frames[:count])
    except GrantError as error:
        status = error.status
    cpu.write(va + 6, struct.pack("<h", status))
    return 0


def _swap(cpu: PvVcpu, data: bytes) -> None:
    a, b = struct.unpack_from("<II", data)
    _table(cpu.domain).swap(a, b)


# -- mappings -------------------------------------------------------------------------------------------------------


def _map(cpu: PvVcpu, va: int, count: int) -> int:
    mapper = PvMapper(cpu)
    for at in range(va, va + count * 32, 32):
        address, flags, ref, domid, _, handle, bus = struct.unpack("<QIIHHIQ", cpu.read(at, 32))
        status = abi.GNTST_okay
        try:
            handle, mfn = map_grant(_table(cpu.domain), mapper, cpu.vcpu.vcpu_id, address, flags, ref, domid)
            bus = mfn << 12
        except GrantError as error:
            status = error.status
        cpu.write(at, struct.pack("<QIIHhIQ", address, flags, ref, domid, status, handle, bus))
    return 0


def _unmap(cpu: PvVcpu, va: int, count: int) -> int:
    return _unmap_all(cpu, va, count, 20, replace=False)


def _unmap_and_replace(cpu: PvVcpu, va: int, count: int) -> int:
    return _unmap_all(cpu, va, count, 20, replace=True)


def _unmap_all(cpu: PvVcpu, va: int, count: int, status_at: int, replace: bool) -> int:
    """What was unmapped is given back only after a TLB flush, of which there is one for a number of operations."""
    mapper, table = PvMapper(cpu), _table(cpu.domain)
    for first in range(0, count, UNMAP_BATCH):
        unmapped: list[Unmapped] = []
        try:
            for i in range(first, min(first + UNMAP_BATCH, count)):
                at = va + i * 24
                address, other, handle = struct.unpack("<QQIxxxx", cpu.read(at, 24))
                status = abi.GNTST_okay
                try:
                    if replace:
                        unmapped.append(unmap_grant(table, mapper, handle, address, new_address=other))
                    else:
                        unmapped.append(unmap_grant(table, mapper, handle, address, other))
                except GrantError as error:
                    status = error.status
                cpu.write(at + status_at, struct.pack("<h", status))
        finally:
            cpu.flush_tlb()
            for mapping in unmapped:
                mapping.complete()
    return 0


# -- contents -------------------------------------------------------------------------------------------------------


def _copy(cpu: PvVcpu, data: bytes) -> None:
    source, source_domid, source_offset, dest, dest_domid, dest_offset, length, flags = struct.unpack_from(
        "<QHHxxxxQHHxxxxHH", data
    )
    grant_copy.copy(
        cpu.domain,
        grant_copy.Side(source, source_domid, source_offset, bool(flags & abi.GNTCOPY_source_gref)),
        grant_copy.Side(dest, dest_domid, dest_offset, bool(flags & abi.GNTCOPY_dest_gref)),
        length,
    )


def _transfer(cpu: PvVcpu, data: bytes) -> None:
    mfn, domid, ref = struct.unpack_from("<QHxxI", data)
    grant_transfer.transfer(cpu.domain, mfn, domid, ref)


def _cache_flush(cpu: PvVcpu, va: int, count: int) -> int:
    """Caches are coherent here, so that only the arguments are looked at (_cache_flush)."""
    machine = cpu.domain.machine
    for at in range(va, va + count * 16, 16):
        address, offset, length, operation = struct.unpack("<QHHI", cpu.read(at, 16))
        if offset >= 4096 or length > 4096 or offset + length > 4096 or operation & ~3:
            return -Errno.EINVAL
        if not length or not operation:
            continue
        mfn = address >> 12
        if mfn >= machine.frames:
            return -Errno.EINVAL
        if machine.owner[mfn] == cpu.domain.domid:
            continue
        owner = cpu.domain.hypervisor.domain_or_zombie(machine.owner[mfn])
        if owner is None or owner.grant_table is None:
            return -Errno.EPERM
        uses = owner.grant_table.active.values()
        if not any(act.domid == cpu.domain.domid and act.mfn == mfn for act in uses):
            return -Errno.EINVAL
    return 0


Batch = Callable[["PvVcpu", int, int], int]
_SINGLE: Final[dict[int, Callable[[PvVcpu, int], int]]] = {
    abi.GNTTABOP_setup_table: _setup_table,
    abi.GNTTABOP_query_size: _query_size,
    abi.GNTTABOP_set_version: _set_version,
    abi.GNTTABOP_get_version: _get_version,
    abi.GNTTABOP_get_status_frames: _get_status_frames,
}
_WITHOUT_COUNT: Final = (abi.GNTTABOP_set_version, abi.GNTTABOP_get_version)
_BATCH: Final[dict[int, tuple[int, Batch]]] = {
    abi.GNTTABOP_map_grant_ref: (32, _map),
    abi.GNTTABOP_unmap_grant_ref: (24, _unmap),
    abi.GNTTABOP_unmap_and_replace: (24, _unmap_and_replace),
    abi.GNTTABOP_transfer: _one_by_one(24, 16, _transfer),
    abi.GNTTABOP_copy: _one_by_one(40, 36, _copy),
    abi.GNTTABOP_swap_grant_ref: _one_by_one(12, 8, _swap),
    abi.GNTTABOP_cache_flush: (16, _cache_flush),
}

"""grant_table_op (xen/common/grant_table.c)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pvirq.abi import grant_table as abi
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, PAGE_SIZE
from pvirq.xen.domain import Domain
from pvirq.xen.grant import ENTRIES_PER_FRAME, GrantError, GrantTable
from pvirq.xen.memory import PGT_NONE, PGT_WRITABLE

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

LONGEST_BATCH: Final = 1 << 16


def grant_table_op(cpu: PvVcpu, command: int, operations: int, count: int) -> int:
    """A batch of one kind of operation; each gets a GNTST_* status of its own in guest memory."""
    command, count = command & 0xFFFFFFFF, count & 0xFFFFFFFF
    if count >> 31:
        return -Errno.EINVAL
    single = _SINGLE.get(command)
    if single is not None:
        if command not in _WITHOUT_COUNT and count != 1:
            return -Errno.EINVAL
        return single(cpu, operations)
    batch = _BATCH.get(command)
    if batch is None:
        return -Errno.ENOSYS
    size, work = batch
    if operations + count * size > 1 << 64 or count > LONGEST_BATCH:
        return -Errno.EFAULT
    for i in range(count):
        result = work(cpu, operations + i * size)
        if result:
            return result
    return 0


def _target(cpu: PvVcpu, domid: int) -> Domain:
    if domid == DOMID_SELF:
        return cpu.domain
    target = cpu.domain.hypervisor.domains.get(domid)
    if target is None:
        raise GrantError(abi.GNTST_bad_domain)
    if target is not cpu.domain and not cpu.domain.privileged:
        raise GrantError(abi.GNTST_permission_denied)
    return target


def _setup_table(cpu: PvVcpu, va: int) -> int:
    domid, frames, frame_list = struct.unpack("<HxxIxxxxxxxxQ", cpu.read(va, 24))
    status = abi.GNTST_okay
    try:
        table = _table(_target(cpu, domid))
        if frames > table.max_frames:
            raise GrantError(abi.GNTST_general_error)
        table.grow(frames)
        try:
            cpu.write(frame_list, struct.pack(f"<{frames}Q", *table.frames[:frames]))
        except XenError:
            status = abi.GNTST_bad_virt_addr
    except GrantError as error:
        status = error.status
    cpu.write(va + 8, struct.pack("<h", status))
    return 0


def _table(domain: Domain) -> GrantTable:
    table = domain.grant_table
    if table is None:
        raise GrantError(abi.GNTST_general_error)
    return table


def _query_size(cpu: PvVcpu, va: int) -> int:
    (domid,) = struct.unpack("<H", cpu.read(va, 2))
    frames = most = 0
    status = abi.GNTST_okay
    try:
        table = _table(_target(cpu, domid))
        frames, most = len(table.frames), table.max_frames
    except GrantError as error:
        status = error.status
    cpu.write(va + 4, struct.pack("<IIh", frames, most, status))
    return 0


def _set_version(cpu: PvVcpu, va: int) -> int:
    (version,) = struct.unpack("<I", cpu.read(va, 4))
    if version not in (1, 2):
        return -Errno.EINVAL
    if version == 2:
        return -Errno.ENOSYS
    cpu.write(va, struct.pack("<I", 1))
    return 0


def _get_version(cpu: PvVcpu, va: int) -> int:
    (domid,) = struct.unpack("<H", cpu.read(va, 2))
    try:
        table = _table(_target(cpu, domid))
    except GrantError as error:
        return -Errno.ESRCH if error.status == abi.GNTST_bad_domain else -Errno.EPERM
    cpu.write(va + 4, struct.pack("<I", table.version))
    return 0


def _status_frames(cpu: PvVcpu, va: int) -> int:
    cpu.read(va, 24)
    cpu.write(va + 8, struct.pack("<h", abi.GNTST_general_error))  # version 2 only
    return 0


def _swap(cpu: PvVcpu, va: int) -> int:
    a, b = struct.unpack("<II", cpu.read(va, 8))
    table = _table(cpu.domain)
    status = abi.GNTST_okay
    limit = len(table.frames) * ENTRIES_PER_FRAME
    if a >= limit or b >= limit:
        status = abi.GNTST_bad_gntref
    elif a != b:
        mem = cpu.domain.machine.mem
        at = [(table.frames[g // ENTRIES_PER_FRAME] << 12) + g % ENTRIES_PER_FRAME * 8 for g in (a, b)]
        first, second = (bytes(mem[x : x + 8]) for x in at)
        mem[at[0] : at[0] + 8], mem[at[1] : at[1] + 8] = second, first
    cpu.write(va + 8, struct.pack("<h", status))
    return 0


def _map(cpu: PvVcpu, va: int) -> int:
    """Mapping into a real guest's address space belongs to back ends in real guests, of which there are none yet."""
    host_address, flags, ref, dom = struct.unpack("<QIIH", cpu.read(va, 18))
    del host_address, flags, ref
    status = abi.GNTST_general_error
    if dom != DOMID_SELF and dom not in cpu.domain.hypervisor.domains:
        status = abi.GNTST_bad_domain
    cpu.write(va + 20, struct.pack("<h", status))
    return 0


def _unmap(cpu: PvVcpu, va: int) -> int:
    cpu.read(va, 24)
    cpu.write(va + 20, struct.pack("<h", abi.GNTST_bad_handle))
    return 0


def _transfer(cpu: PvVcpu, va: int) -> int:
    cpu.read(va, 24)
    cpu.write(va + 16, struct.pack("<h", abi.GNTST_general_error))
    return 0


def _copy(cpu: PvVcpu, va: int) -> int:
    """GNTTABOP_copy: between frames named by reference or, one's own, by number; within one page each."""
    data = cpu.read(va, 40)
    status = abi.GNTST_okay
    try:
        _copy_one(cpu, data)
    except GrantError as error:
        status = error.status
    cpu.write(va + 36, struct.pack("<h", status))
    return 0


def _copy_one(cpu: PvVcpu, data: bytes) -> None:
    source, source_domid, source_offset, dest, dest_domid, dest_offset, length, flags = struct.unpack_from(
        "<QHHxxxxQHHxxxxHH", data
    )
    if source_offset + length > PAGE_SIZE or dest_offset + length > PAGE_SIZE:
        raise GrantError(abi.GNTST_bad_copy_arg)
    machine = cpu.domain.machine
    from_mfn = _copy_side(cpu, source, source_domid, bool(flags & abi.GNTCOPY_source_gref), write=False)
    to_mfn = _copy_side(cpu, dest, dest_domid, bool(flags & abi.GNTCOPY_dest_gref), write=True)
    if machine.type_count[to_mfn] and machine.type[to_mfn] not in (PGT_NONE, PGT_WRITABLE):
        raise GrantError(abi.GNTST_general_error)
    at, to = (from_mfn << 12) + source_offset, (to_mfn << 12) + dest_offset
    machine.mem[to : to + length] = bytes(machine.mem[at : at + length])
    cpu.engine.invalidate_code(to, max(length, 1))


def _copy_side(cpu: PvVcpu, value: int, domid: int, by_reference: bool, write: bool) -> int:
    if not by_reference and domid not in (DOMID_SELF, cpu.domain.domid):
        raise GrantError(abi.GNTST_permission_denied)
    owner = cpu.domain if domid == DOMID_SELF else cpu.domain.hypervisor.domains.get(domid)
    if owner is None:
        raise GrantError(abi.GNTST_bad_domain)
    if by_reference:
        return _table(owner).resolve(value & 0xFFFFFFFF, cpu.domain, write)
    if not cpu.tables.owns(value):
        raise GrantError(abi.GNTST_general_error)
    return value


Handler = Callable[["PvVcpu", int], int]
_SINGLE: Final[dict[int, Handler]] = {
    abi.GNTTABOP_setup_table: _setup_table,
    abi.GNTTABOP_query_size: _query_size,
    abi.GNTTABOP_set_version: _set_version,
    abi.GNTTABOP_get_version: _get_version,
    abi.GNTTABOP_get_status_frames: _status_frames,
}
_WITHOUT_COUNT: Final = (abi.GNTTABOP_set_version, abi.GNTTABOP_get_version, abi.GNTTABOP_get_status_frames)
_BATCH: Final[dict[int, tuple[int, Handler]]] = {
    abi.GNTTABOP_map_grant_ref: (32, _map),
    abi.GNTTABOP_unmap_grant_ref: (24, _unmap),
    abi.GNTTABOP_unmap_and_replace: (24, _unmap),
    abi.GNTTABOP_transfer: (24, _transfer),
    abi.GNTTABOP_copy: (40, _copy),
    abi.GNTTABOP_swap_grant_ref: (12, _swap),
}

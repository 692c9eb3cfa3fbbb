"""mmu_update, update_va_mapping and mmuext_op (xen/arch/x86/mm.c)."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_IO, DOMID_SELF, DOMID_XEN
from pvirq.pv import descriptors
from pvirq.pv.addresses import addr_ok
from pvirq.pv.hypercalls.protocol import Preempted, handle_okay
from pvirq.pv.pagetable import PageTables
from pvirq.xen.memory import PGT_L1, PGT_WRITABLE

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

M64: Final = (1 << 64) - 1

MMU_NORMAL_PT_UPDATE, MMU_MACHPHYS_UPDATE, MMU_PT_UPDATE_PRESERVE_AD, MMU_PT_UPDATE_NO_TRANSLATE = range(4)
MMU_UPDATE_PREEMPTED: Final = 1 << 31

MMUEXT_PIN_L1_TABLE: Final = 0
MMUEXT_PIN_L4_TABLE: Final = 3
MMUEXT_UNPIN_TABLE: Final = 4
MMUEXT_NEW_BASEPTR: Final = 5
MMUEXT_TLB_FLUSH_LOCAL: Final = 6
MMUEXT_INVLPG_LOCAL: Final = 7
MMUEXT_TLB_FLUSH_MULTI: Final = 8
MMUEXT_INVLPG_MULTI: Final = 9
MMUEXT_TLB_FLUSH_ALL: Final = 10
MMUEXT_INVLPG_ALL: Final = 11
MMUEXT_FLUSH_CACHE: Final = 12
MMUEXT_SET_LDT: Final = 13
MMUEXT_NEW_USER_BASEPTR: Final = 15
MMUEXT_CLEAR_PAGE: Final = 16
MMUEXT_COPY_PAGE: Final = 17
MMUEXT_FLUSH_CACHE_GLOBAL: Final = 18
MMUEXT_MARK_SUPER: Final = 19
MMUEXT_UNMARK_SUPER: Final = 20

UVMF_FLUSHTYPE_MASK: Final = 3
UVMF_TLB_FLUSH, UVMF_INVLPG = 1, 2
UVMF_ALL: Final = 1 << 2

# A guest may name any number of requests. A batch of CHUNK is read at once; after LONGEST_TURN others get theirs.
CHUNK: Final = 512
LONGEST_TURN: Final = 8 * CHUNK


def _continued(cpu: PvVcpu, count: int, pdone: int) -> tuple[int, int]:
    """How many requests are left, and how many an earlier turn of the same hypercall has done."""
    count &= 0xFFFFFFFF
    if not count & MMU_UPDATE_PREEMPTED:
        return count, 0
    try:
        before = int.from_bytes(cpu.read(pdone, 4), "little") if pdone else 0
    except XenError:
        before = 0
    return count & ~MMU_UPDATE_PREEMPTED, before


def _requests(cpu: PvVcpu, va: int, count: int, size: int) -> tuple[bytes, int, bool]:
    """As many of `count` items as can be read, up to CHUNK: their bytes, their number, and whether a fault ended it."""
    count = min(count, CHUNK)
    try:
        return cpu.read(va, count * size), count, False
    except XenError:
        pass
    data = b""
    for i in range(count):
        try:
            data += cpu.read(va + i * size, size)
        except XenError:
            return data, i, True
    return data, count, False


def _foreign(cpu: PvVcpu, domid: int) -> bool:
    """get_pg_owner: False for the guest's own pages, True for I/O memory (DOMID_IO). XenError for any other."""
    domid &= 0xFFFF
    if domid == DOMID_SELF:
        return False
    if domid == cpu.domain.domid:
        raise XenError(Errno.ESRCH, "DOMID_SELF is the way to name oneself")
    if domid == DOMID_IO:
        return True
    if domid == DOMID_XEN and cpu.domain.privileged:
        return True
    if domid not in cpu.domain.hypervisor.domains:
        raise XenError(Errno.ESRCH, f"no domain {domid:#x}")
    raise XenError(Errno.EPERM, "another domain's page tables")


def _report_done(cpu: PvVcpu, pdone: int, done: int) -> None:
    if pdone:
        with contextlib.suppress(XenError):  # as Xen: the result says the same
            cpu.write(pdone, struct.pack("<I", done & 0xFFFFFFFF))


def mmu_update(cpu: PvVcpu, requests: int, count: int, pdone: int, foreigndom: int) -> int:
    """Change page-table entries and machine-to-phys entries, in order, until one fails (do_mmu_update)."""
    count, before = _continued(cpu, count, pdone)
    if not handle_okay(requests):
        return -Errno.EFAULT
    if foreigndom >> 16 & 0xFFFF:
        owner = (foreigndom >> 16 & 0xFFFF) - 1
        if owner not in cpu.domain.hypervisor.domains:
            return -Errno.ESRCH
        if owner != cpu.domain.domid:
            return -Errno.EPERM
    try:
        foreign = _foreign(cpu, foreigndom)
    except XenError as error:
        if error.errno == Errno.ESRCH:
            return -error.errno
        foreign = True
    done, result, flush = 0, 0, False
    tables = cpu.tables
    while done < min(count, LONGEST_TURN) and not result:
        data, got, fault = _requests(cpu, requests + done * 16, count - done, 16)
        for pointer, value in struct.iter_unpack("<QQ", data):
            command = pointer & 7
            try:
                if command == MMU_NORMAL_PT_UPDATE and not foreign:
                    flush |= tables.update(pointer, value)
                elif command == MMU_MACHPHYS_UPDATE:
                    _machphys(cpu, pointer >> 12, value)
                elif command in (MMU_NORMAL_PT_UPDATE, MMU_PT_UPDATE_PRESERVE_AD, MMU_PT_UPDATE_NO_TRANSLATE):
                    if foreign and value & 1:
                        # Only I/O memory can be meant, and no guest here has any.
                        raise XenError(Errno.EPERM, "mapping of memory that is not the guest's")
                    flush |= tables.update(pointer & ~7, value, command == MMU_PT_UPDATE_PRESERVE_AD)
                else:
                    raise XenError(Errno.ENOSYS, f"mmu_update command {command}")
            except XenError as error:
                result = -error.errno
                break
            done += 1
        if not result and fault and got < CHUNK:
            result = -Errno.EFAULT
    if flush:
        cpu.flush_tlb()
    _report_done(cpu, pdone, before + done)
    if not result and done < count:
        raise Preempted(requests + done * 16, count - done | MMU_UPDATE_PREEMPTED, pdone, foreigndom)
    return result


def _machphys(cpu: PvVcpu, mfn: int, pfn: int) -> None:
    if not cpu.tables.owns(mfn):
        raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not the guest's")
    cpu.domain.machine.m2p[mfn] = pfn


def update_va_mapping(cpu: PvVcpu, va: int, value: int, flags: int) -> int:
    """Change the level-1 entry that maps `va`, and flush as asked (__do_update_va_mapping)."""
    index = cpu.l1_index(va) if va < 1 << 47 or va >= 0xFFFF_8000_0000_0000 else None
    if index is None:
        return -Errno.EINVAL
    machine, mfn = cpu.domain.machine, index >> 9
    if not cpu.tables.owns(mfn) or machine.type[mfn] != PGT_L1 or not machine.type_count[mfn]:
        return -Errno.EINVAL
    cpu.tables.set_l1(index, value)
    kind = flags & UVMF_FLUSHTYPE_MASK
    if kind in (UVMF_TLB_FLUSH, UVMF_INVLPG):
        where = flags & ~UVMF_FLUSHTYPE_MASK
        if where not in (0, UVMF_ALL):
            _vcpu_mask(cpu, where)
        if kind == UVMF_TLB_FLUSH:
            cpu.flush_tlb()
        else:
            cpu.engine.flush_page(va)
    return 0


def update_va_mapping_otherdomain(cpu: PvVcpu, va: int, value: int, flags: int, domid: int) -> int:
    """update_va_mapping of another domain's page; the guest must be allowed to name it."""
    try:
        foreign = _foreign(cpu, domid)
    except XenError as error:
        return -error.errno
    if foreign and value & 1:
        return -Errno.EPERM
    return update_va_mapping(cpu, va, value, flags)


def _vcpu_mask(cpu: PvVcpu, va: int) -> int:
    """vcpumask_to_pcpumask: a bitmap of vCPUs in guest memory. XenError(EINVAL) where it can't be read."""
    size = -(-len(cpu.domain.vcpus) // 8)
    try:
        return int.from_bytes(cpu.read(va, size), "little")
    except XenError:
        raise XenError(Errno.EFAULT, "vCPU mask") from None


def mmuext_op(cpu: PvVcpu, operations: int, count: int, pdone: int, foreigndom: int) -> int:
    """Pin and unpin tables, change roots, flush, clear and copy pages (do_mmuext_op)."""
    count, before = _continued(cpu, count, pdone)
    if not handle_okay(operations):
        return -Errno.EFAULT
    foreign = False
    try:
        foreign = _foreign(cpu, foreigndom)
    except XenError as error:
        return -error.errno
    done, result = 0, 0
    while done < min(count, LONGEST_TURN) and not result:
        data, got, fault = _requests(cpu, operations + done * 24, count - done, 24)
        for command, argument1, argument2 in struct.iter_unpack("<IxxxxQQ", data):
            try:
                _mmuext(cpu, command, argument1, argument2, foreign)
            except XenError as error:
                result = -error.errno
                break
            done += 1
        if not result and fault and got < CHUNK:
            result = -Errno.EFAULT
    _report_done(cpu, pdone, before + done)
    if not result and done < count:
        raise Preempted(operations + done * 24, count - done | MMU_UPDATE_PREEMPTED, pdone, foreigndom)
    return result


def _mmuext(cpu: PvVcpu, command: int, argument1: int, argument2: int, foreign: bool) -> None:
    tables: PageTables = cpu.tables
    machine = cpu.domain.machine
    if command <= MMUEXT_PIN_L4_TABLE:
        if foreign:
            raise XenError(Errno.EINVAL)
        tables.pin(argument1, PGT_L1 + command)
        return
    if command == MMUEXT_UNPIN_TABLE:
        tables.unpin(argument1)
        return
    if foreign and command not in (
        MMUEXT_CLEAR_PAGE,
        MMUEXT_COPY_PAGE,
        MMUEXT_MARK_SUPER,
        MMUEXT_UNMARK_SUPER,
    ):
        raise XenError(Errno.EPERM if command <= MMUEXT_FLUSH_CACHE_GLOBAL else Errno.ENOSYS)
    match command:
        case 5:  # MMUEXT_NEW_BASEPTR
            cpu.guest.new_kernel_root(cpu, argument1)
        case 15:  # MMUEXT_NEW_USER_BASEPTR
            cpu.guest.new_user_root(cpu, argument1)
        case 6 | 10:  # MMUEXT_TLB_FLUSH_LOCAL, _ALL
            cpu.flush_tlb()
        case 8:  # MMUEXT_TLB_FLUSH_MULTI
            _mask_argument(cpu, argument2)
            cpu.flush_tlb()
        case 7 | 11:  # MMUEXT_INVLPG_LOCAL, _ALL
            cpu.engine.flush_page(argument1)
        case 9:  # MMUEXT_INVLPG_MULTI
            _mask_argument(cpu, argument2)
            cpu.engine.flush_page(argument1)
        case 12:  # MMUEXT_FLUSH_CACHE
            if not cpu.domain.privileged:
                raise XenError(Errno.EACCES, "cache flush without I/O memory")
        case 18:  # MMUEXT_FLUSH_CACHE_GLOBAL
            if not cpu.domain.privileged:
                raise XenError(Errno.EINVAL, "cache flush without I/O memory")
        case 13:  # MMUEXT_SET_LDT
            entries = argument2 & 0xFFFFFFFF
            base = argument1 if entries else 0
            if entries > 8192 or (entries and (base & 0xFFF or not addr_ok(base))):
                raise XenError(Errno.EINVAL, f"LDT of {entries} entries at {base:#x}")
            if cpu.ldt != (base, entries):
                descriptors.set_ldt(cpu, base, entries)
        case 16:  # MMUEXT_CLEAR_PAGE
            _writable(cpu, argument1)
            machine.page(argument1)[:] = bytes(4096)
            cpu.engine.invalidate_code(argument1 << 12, 4096)
            tables.put_type(argument1)
        case 17:  # MMUEXT_COPY_PAGE
            if not tables.owns(argument2):
                raise XenError(Errno.EINVAL, f"mfn {argument2:#x} is not the guest's")
            _writable(cpu, argument1)
            machine.page(argument1)[:] = machine.page(argument2)
            cpu.engine.invalidate_code(argument1 << 12, 4096)
            tables.put_type(argument1)
        case 19 | 20:  # MMUEXT_MARK_SUPER, _UNMARK_SUPER
            raise XenError(Errno.EOPNOTSUPP)
        case _:
            raise XenError(Errno.ENOSYS, f"mmuext command {command}")


def _mask_argument(cpu: PvVcpu, va: int) -> None:
    try:
        _vcpu_mask(cpu, va)
    except XenError:
        raise XenError(Errno.EINVAL, "vCPU mask") from None


def _writable(cpu: PvVcpu, mfn: int) -> None:
    if not cpu.tables.owns(mfn):
        raise XenError(Errno.EINVAL, f"mfn {mfn:#x} is not the guest's")
    cpu.tables.get_type(mfn, PGT_WRITABLE)

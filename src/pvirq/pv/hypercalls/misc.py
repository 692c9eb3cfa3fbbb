"""xen_version, console_io, vm_assist and the control interfaces that only a privileged domain has."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pvirq.abi import arch_x86 as arch
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, PAGE_SIZE
from pvirq.pv.hypercalls.protocol import Preempted, handle_okay, int32

if TYPE_CHECKING:
    from pvirq.pv.vcpu import PvVcpu

XENVER_version: Final = 0
XENVER_extraversion: Final = 1
XENVER_compile_info: Final = 2
XENVER_capabilities: Final = 3
XENVER_changeset: Final = 4
XENVER_platform_parameters: Final = 5
XENVER_get_features: Final = 6
XENVER_pagesize: Final = 7
XENVER_guest_handle: Final = 8
XENVER_commandline: Final = 9
XENVER_build_id: Final = 10

VERSION: Final = (4, 17)
EXTRAVERSION: Final = b".7"
DENIED: Final = b"<denied>\0"
CAPABILITIES: Final = b"xen-3.0-x86_64 "

# features.h
XENFEAT_pae_pgdir_above_4gb: Final = 4
XENFEAT_mmu_pt_update_preserve_ad: Final = 5
XENFEAT_highmem_assist: Final = 6
XENFEAT_gnttab_map_avail_bits: Final = 7
XENFEAT_dom0: Final = 11
XENFEAT_memory_op_vnode_supported: Final = 13
XENFEAT_direct_mapped: Final = 17

CONSOLEIO_write: Final = 0
CONSOLEIO_read: Final = 1
LONGEST_CONSOLE_WRITE: Final = 1 << 20

M64: Final = (1 << 64) - 1
MULTICALL_ENTRY: Final = 64  # bytes
MULTICALL_CHUNK: Final = 1024  # calls in one go

SYSCTL_INTERFACE_VERSION: Final = 0x15
DOMCTL_INTERFACE_VERSION: Final = 0x15
XENPF_INTERFACE_VERSION: Final = 0x03000000

VM_ASSISTS: Final = (
    1 << arch.VMASST_TYPE_4gb_segments
    | 1 << arch.VMASST_TYPE_4gb_segments_notify
    | 1 << arch.VMASST_TYPE_writable_pagetables
    | 1 << arch.VMASST_TYPE_pae_extended_cr3
    | 1 << arch.VMASST_TYPE_architectural_iopl
    | 1 << arch.VMASST_TYPE_runstate_update_flag
    | 1 << arch.VMASST_TYPE_m2p_strict
)


def xen_version(cpu: PvVcpu, command: int, argument: int) -> int:
    """Which Xen this is (do_xen_version)."""
    command = int32(command)
    if command == XENVER_version:
        return VERSION[0] << 16 | VERSION[1]
    if command == XENVER_extraversion:
        cpu.write(argument, EXTRAVERSION.ljust(16, b"\0"))
    elif command == XENVER_compile_info:
        compiler, by, domain, date = b"pvirq", b"", b"", b""
        cpu.write(
            argument,
            compiler.ljust(64, b"\0") + by.ljust(16, b"\0") + domain.ljust(32, b"\0") + date.ljust(32, b"\0"),
        )
    elif command == XENVER_capabilities:
        cpu.write(argument, CAPABILITIES.ljust(1024, b"\0"))
    elif command == XENVER_changeset:
        cpu.write(argument, b"".ljust(64, b"\0"))
    elif command == XENVER_platform_parameters:
        cpu.write(argument, struct.pack("<Q", arch.HYPERVISOR_VIRT_START))
    elif command == XENVER_get_features:
        (submap,) = struct.unpack("<I", cpu.read(argument, 8)[:4])
        features = 0
        if submap == 0:
            features = (
                1 << XENFEAT_mmu_pt_update_preserve_ad
                | 1 << XENFEAT_highmem_assist
                | 1 << XENFEAT_gnttab_map_avail_bits
                | 1 << XENFEAT_memory_op_vnode_supported
                | 1 << XENFEAT_direct_mapped
            )
            if cpu.guest.assists & 1 << arch.VMASST_TYPE_pae_extended_cr3:
                features |= 1 << XENFEAT_pae_pgdir_above_4gb
            if cpu.domain.privileged:
                features |= 1 << XENFEAT_dom0
        elif submap > 0:
            return -Errno.EINVAL
        cpu.write(argument, struct.pack("<II", submap, features))
    elif command == XENVER_pagesize:
        return -Errno.EINVAL if argument else PAGE_SIZE
    elif command == XENVER_guest_handle:
        cpu.write(argument, cpu.guest.uuid)
    elif command == XENVER_commandline:
        cpu.write(argument, bytes(1024) if cpu.domain.privileged else DENIED)
    elif command == XENVER_build_id:
        return -Errno.EPERM if not cpu.domain.privileged else -Errno.ENODATA
    else:
        return -Errno.ENOSYS
    return 0


def console_io(cpu: PvVcpu, command: int, count: int, buffer: int) -> int:
    """The hypervisor's own console: written to by a privileged domain, and by others of a verbose build.

    What a guest that isn't privileged writes is kept with its console output, since early messages come this way.
    """
    command, count = command & 0xFFFFFFFF, count & 0xFFFFFFFF
    if command == CONSOLEIO_write:
        if count > 0x7FFFFFFF:
            return -Errno.E2BIG
        done = 0
        while done < count:
            chunk = min(count - done, 4096)
            cpu.guest.on_console_io(cpu.read(buffer + done, chunk))
            done += chunk
            if done >= LONGEST_CONSOLE_WRITE:
                break
        return 0
    if command == CONSOLEIO_read:
        return 0
    return -Errno.ENOSYS


def vm_assist(cpu: PvVcpu, command: int, kind: int) -> int:
    """Turn an assist on or off (do_vm_assist)."""
    command, kind = command & 0xFFFFFFFF, kind & 0xFFFFFFFF
    if kind >= 64 or not VM_ASSISTS >> kind & 1:
        return -Errno.EINVAL
    if command == arch.VMASST_CMD_enable:
        cpu.guest.assists |= 1 << kind
        return 0
    if command == arch.VMASST_CMD_disable:
        cpu.guest.assists &= ~(1 << kind)
        return 0
    return -Errno.ENOSYS


def _control(cpu: PvVcpu, argument: int, size: int, at: int, version: int) -> int:
    (found,) = struct.unpack_from("<I", cpu.read(argument, size), at)
    if found != version:
        return -Errno.EACCES
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def sysctl(cpu: PvVcpu, argument: int) -> int:
    return _control(cpu, argument, 136, 4, SYSCTL_INTERFACE_VERSION)


def domctl(cpu: PvVcpu, argument: int) -> int:
    """domctl; a domain may name itself or another, but only a privileged one may do anything."""
    data = cpu.read(argument, 144)
    command, found, domid = struct.unpack_from("<IIH", data)
    if found != DOMCTL_INTERFACE_VERSION:
        return -Errno.EACCES
    known = domid == DOMID_SELF or domid in cpu.domain.hypervisor.domains
    if command != 1 and not known:
        return -Errno.ESRCH
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def platform_op(cpu: PvVcpu, argument: int) -> int:
    return _control(cpu, argument, 136, 4, XENPF_INTERFACE_VERSION)


def privileged_only(cpu: PvVcpu, *_arguments: int) -> int:
    return -Errno.ENOSYS if cpu.domain.privileged else -Errno.EPERM


def unsupported(_cpu: PvVcpu, *_arguments: int) -> int:
    return -Errno.ENOSYS


def multicall(cpu: PvVcpu, calls: int, count: int) -> int:
    """A list of hypercalls: {op, result, args[6]}; each gets its result in place (do_multicall)."""
    if cpu.in_multicall:
        return -Errno.EINVAL
    if not handle_okay(calls):
        return -Errno.EFAULT
    count &= 0xFFFFFFFF
    end, stop = calls + count * MULTICALL_ENTRY, calls + min(count, MULTICALL_CHUNK) * MULTICALL_ENTRY
    clock = cpu.domain.hypervisor.clock
    deadline = clock.next_deadline()
    cpu.in_multicall = True
    try:
        for va in range(calls, stop, MULTICALL_ENTRY):
            _one_call(cpu, va, (end - va) // MULTICALL_ENTRY)
            due = clock.next_deadline()
            timer_is_due = due is not None and due != deadline and due <= clock.now()
            if not cpu.vcpu.runnable or cpu.vcpu.event_pending() or timer_is_due:
                # It blocked or went away in the middle, has an upcall to take, or has set a timer to the past
                # (hypercall_preempt_check): the rest is for when it runs again.
                stop = va + MULTICALL_ENTRY
                break
    finally:
        cpu.in_multicall = False
    if stop < end:
        raise Preempted(stop, (end - stop) // MULTICALL_ENTRY)
    return 0


def _one_call(cpu: PvVcpu, va: int, left: int) -> None:
    op, _, *arguments = struct.unpack("<8Q", cpu.read(va, MULTICALL_ENTRY))
    hypercalls = cpu.hypercalls
    try:
        if op < len(hypercalls):
            handler, number = hypercalls[op]
            result = handler(cpu, *arguments[:number])
        else:
            result = -Errno.ENOSYS
    except XenError as error:
        result = -error.errno
    except Preempted as rest:
        arguments[: len(rest.arguments)] = [value & M64 for value in rest.arguments]
        cpu.write(va, struct.pack("<8Q", op, op, *arguments))
        raise Preempted(va, left) from None
    cpu.write(va + 8, struct.pack("<Q", result & M64))

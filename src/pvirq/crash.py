"""What there is to say about a guest that crashed or hangs: registers, call trace, events, its last words.

In the form of Linux's own oops (arch/x86/kernel/process_64.c __show_regs, dumpstack.c), so that it reads as usual.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final

from pvirq.abi import xen as xen_abi
from pvirq.abi.errno import XenError
from pvirq.abi.xen import PAGE_SHIFT, VCPU_INFO_UPCALL_MASK
from pvirq.engine.protocol import R8, RAX, RBP, RBX, RCX, RDI, RDX, RIP, RSI, RSP
from pvirq.guest import Guest
from pvirq.pv.image import KernelImage
from pvirq.pv.symbols import Symbols, symbols_for
from pvirq.pv.vcpu import PvVcpu
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_IPI, ECS_PIRQ, ECS_UNBOUND, ECS_VIRQ, Channel

CONSOLE_LINES: Final = 20
LINE_MAX: Final = 200
TRACE_MAX: Final = 40
# Linux's kernel stacks of x86-64, for tasks and interrupts alike: 16 KiB, so aligned. A trace goes no further.
STACK_SIZE: Final = 16 << 10
STACKS_MAX: Final = 4
UPPER_HALF: Final = 1 << 47
VCPU_INFO_CR2: Final = 16
STUB_SIZE: Final = 32  # of one hypercall in the hypercall page
MODES: Final = {True: "user", False: "kernel"}
CHANNELS: Final = {
    ECS_UNBOUND: "unbound",
    ECS_INTERDOMAIN: "interdomain",
    ECS_PIRQ: "pirq",
    ECS_VIRQ: "virq",
    ECS_IPI: "ipi",
}
# An indirect call's opcode and ModRM byte (FF /2), by its whole length: what may stand before a return address.
_INDIRECT_CALL_LENGTHS: Final = (2, 3, 4, 6, 7)
_HYPERCALL_NAMES: Final = {
    number: name.removeprefix("HYPERVISOR_")
    for name, number in vars(xen_abi).items()
    if name.startswith("HYPERVISOR_") and isinstance(number, int)
}
_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


def report(guest: Guest, why: str, symbols: Symbols | None = None) -> str:
    """The whole text, lines ending in newlines; `why` is its first. Only reads, and never fails for what the guest
    left: a stack that isn't mapped is left out."""
    image = guest.image or guest.kernel_file()
    if symbols is None:
        symbols = Symbols(lambda: None) if image is None else symbols_for(image)
    if panic := _panic(guest):
        why += f": {panic}"
    lines = [
        why,
        f"kernel: {_banner(guest) or (image.guest_os if image else 'unknown')}, symbols: {symbols.source or 'none'}",
    ]
    for cpu in guest.machine.cpus:
        if cpu.initialised or cpu.vcpu.up:
            with guest.machine.loaded(cpu):
                lines += _vcpu(cpu, image, symbols)
    lines += _events(guest)
    if words := last_words(guest):
        lines += ["Last console lines:", *(f"  {line}" for line in words)]
    return "".join(f"{line}\n" for line in lines)


def last_words(guest: Guest, count: int = CONSOLE_LINES) -> list[str]:
    """The last lines of the guest's console, without what is meant for a terminal or for the agent."""
    text = guest.console.output[-count * 4 * LINE_MAX :].decode("utf-8", "replace")
    lines = [_CONTROL.sub("", line).rstrip()[:LINE_MAX] for line in text.split("\n")]
    return [line for line in lines if line][-count:]


def _banner(guest: Guest) -> str:
    """Linux's version, from the console if it is still there."""
    found = re.search(rb"Linux version (\S+)", guest.console.output)
    return f"Linux {found[1].decode('utf-8', 'replace')}" if found else ""


def _panic(guest: Guest) -> str:
    """Linux's reason for a crash, which it prints before everything else."""
    found = re.findall(rb"Kernel panic - not syncing: [^\r\n]*", guest.console.output)
    return _CONTROL.sub("", found[-1].decode("utf-8", "replace"))[:LINE_MAX] if found else ""


# -- one vCPU ----------------------------------------------------------------------------------------------------------


def _vcpu(cpu: PvVcpu, image: KernelImage | None, symbols: Symbols) -> Iterator[str]:
    regs, engine, mem = cpu.regs, cpu.engine, cpu.domain.machine.mem
    info, rip = cpu.vcpu.info, int(regs[RIP])
    state = "blocked" if cpu.vcpu.blocked else "polling" if cpu.vcpu.polling else "running"
    masked = "masked" if mem[info + VCPU_INFO_UPCALL_MASK] else "enabled"
    pending = ", upcall pending" if mem[info] else ""
    yield f"vCPU {cpu.vcpu.vcpu_id}: {MODES[bool(cpu.user_mode)]} mode, {state}, events {masked}{pending}"
    where = symbols.format(rip) if rip >= UPPER_HALF else f"{rip:#x}"
    number = _hypercall(image, rip) if image else None
    what = "" if number is None else f" (hypercall {number}, {_HYPERCALL_NAMES.get(number, 'unknown')})"
    yield f"RIP: {engine.segment(1):04x}:{where}{what}"
    if code := _code(cpu, rip):
        yield f"Code: {code}"
    yield f"RSP: {engine.segment(2):04x}:{regs[RSP]:016x} EFLAGS: {engine.rflags:08x} RIP: {rip:016x}"
    for names in (
        (("RAX", RAX), ("RBX", RBX), ("RCX", RCX)),
        (("RDX", RDX), ("RSI", RSI), ("RDI", RDI)),
        (("RBP", RBP), ("R08", R8), ("R09", R8 + 1)),
        (("R10", 10), ("R11", 11), ("R12", 12)),
        (("R13", 13), ("R14", 14), ("R15", 15)),
    ):
        yield " ".join(f"{name}: {regs[index]:016x}" for name, index in names)
    gs = (engine.gs_base, cpu.inactive_gs_base)
    kernel_gs, user_gs = gs[::-1] if cpu.user_mode else gs
    yield f"FS:  {engine.fs_base:016x} GS: {kernel_gs:016x} (kernel) {user_gs:016x} (user)"
    cr2 = int.from_bytes(mem[info + VCPU_INFO_CR2 : info + VCPU_INFO_CR2 + 8], "little")
    roots = f"kernel {cpu.kernel_root << PAGE_SHIFT:x}, user {cpu.user_root << PAGE_SHIFT:x}"
    yield f"CR2: {cr2:016x} CR3: {engine.cr3:x} ({roots})"
    trace = [] if cpu.user_mode or image is None else list(_trace(cpu, image, symbols))
    if trace:
        yield "Call Trace (return addresses on the stack, some perhaps old; ? where no call to one above is seen):"
        yield from trace
    elif not cpu.user_mode:
        yield f"No call trace: nothing on the stack at {regs[RSP]:#x} is a return address"


def _hypercall(image: KernelImage, rip: int) -> int | None:
    """The number of the hypercall whose stub RIP is in."""
    page = image.hypercall_page
    return (rip - page) // STUB_SIZE if page is not None and page <= rip < page + 4096 else None


def _code(cpu: PvVcpu, rip: int) -> str:
    """The bytes around RIP as Linux prints them: 42 before, and <RIP's own> with 21 behind."""
    before, behind = _read(cpu, rip - 42, 42) or b"", _read(cpu, rip, 22) or b""
    if not behind:
        return ""
    return f"{before.hex(' ')} <{behind[0]:02x}> {behind[1:].hex(' ')}".strip()


def _read(cpu: PvVcpu, va: int, size: int) -> bytes | None:
    try:
        return cpu.read(va, size)
    except XenError:
        return None


# -- the stack ---------------------------------------------------------------------------------------------------------


def _trace(cpu: PvVcpu, image: KernelImage, symbols: Symbols) -> Iterator[str]:
    """Return addresses into kernel code on the stack, the innermost first.

    Without frame pointers (Linux has had none since 4.14) and without the kernel's unwind tables, whatever is on
    the stack and lies behind a call instruction may be one; also one left from an earlier call. Where that call
    leads to a function further in, it is taken for real; any other gets Linux's question mark.
    """
    inner = {_function(symbols, int(cpu.regs[RIP]))}
    shown = 0
    for value in _stack(cpu):
        if not any(start < value < end for start, end in image.exec_ranges):
            continue
        target = _called(cpu, value)
        if target is None:
            continue
        function = _function(symbols, value - 1)
        sure = target != 0 and _function(symbols, target) in inner
        if sure:
            inner = {function}
        else:
            inner.add(function)
        yield f" {'' if sure else '? '}{symbols.format(value)}"
        shown += 1
        if shown == TRACE_MAX:
            yield " ..."
            return


def _function(symbols: Symbols, va: int) -> str:
    found = symbols.lookup(va)
    return found[0] if found else f"{va:#x}"


def _stack(cpu: PvVcpu) -> Iterator[int]:
    """The words from RSP to the end of the stack, then of the one that it was switched from (Linux keeps the old
    stack pointer in the last word of an interrupt stack)."""
    sp = int(cpu.regs[RSP]) + 7 & ~7
    seen: set[int] = set()
    while len(seen) < STACKS_MAX and sp // STACK_SIZE not in seen:
        seen.add(sp // STACK_SIZE)
        end = (sp // STACK_SIZE + 1) * STACK_SIZE
        word = 0
        while sp < end:
            size = min(end, (sp | 0xFFF) + 1) - sp
            data = _read(cpu, sp, size)
            if data is None:
                return
            words = struct.unpack(f"<{size // 8}Q", data)
            yield from words
            word = words[-1]
            sp += size
        if word < UPPER_HALF or word % 8:
            return
        sp = word


def _called(cpu: PvVcpu, address: int) -> int | None:
    """Where the call before a return address leads: 0 if that is in a register or memory; None if there is no call."""
    before = _read(cpu, address - 7, 7)
    if before is None:
        return None
    if before[2] == 0xE8:
        return address + int.from_bytes(before[3:], "little", signed=True) & (1 << 64) - 1
    indirect = any(before[7 - n] == 0xFF and before[8 - n] >> 3 & 7 == 2 for n in _INDIRECT_CALL_LENGTHS)
    # Instead of a hypercall through the page, newer kernels have SYSCALL in line, which pushes nothing.
    return 0 if indirect else None


# -- events ------------------------------------------------------------------------------------------------------------


def _events(guest: Guest) -> Iterator[str]:
    """The event channels with something pending: what the guest was told and hasn't looked at."""
    evtchn = guest.domain.evtchn
    pending = [channel for channel in evtchn if evtchn.is_pending(channel.port)]
    texts = []
    for channel in pending[:CONSOLE_LINES]:
        masked = " masked" if evtchn.is_masked(channel.port) else ""
        texts.append(f"{channel.port} ({_channel(channel)}, vCPU {channel.notify_vcpu}){masked}")
    if len(pending) > len(texts):
        texts.append(f"and {len(pending) - len(texts)} more")
    abi = "FIFO" if evtchn.fifo else "2-level"
    yield f"Event channels ({abi}) pending: {', '.join(texts) or 'none'}"


def _channel(channel: Channel) -> str:
    kind = CHANNELS.get(channel.state, "closed")
    if channel.state == ECS_VIRQ:
        return f"{kind} {channel.virq}"
    if channel.state == ECS_PIRQ:
        return f"{kind} {channel.pirq}"
    if channel.state == ECS_INTERDOMAIN and channel.remote_domain is not None:
        return f"{kind}, domain {channel.remote_domain.domid} port {channel.remote_port}"
    return kind

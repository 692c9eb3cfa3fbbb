"""The report of a guest that crashed or hangs: small kernels that crash in known ways, and Linux's panic."""

from __future__ import annotations

import re

import pytest

import guestlib
from pvirq import Guest, GuestCrashed, GuestTimeout, Host, crash
from pvirq.engine.protocol import RIP, RSP
from pvirq.toolstack.kernels import KernelChoice

MIB = 1 << 20

needs_gcc = pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")


def crashed(host: Host, which: int) -> Guest:
    guest = host.boot(guestlib.build("crash"), append=f"which={which}", memory=64 * MIB)
    assert guest.wait() == "crash"
    return guest


@pytest.mark.guest
@needs_gcc
def test_shutdown_with_reason_crash() -> None:
    with Host() as host:
        text = crash.report(crashed(host, 5), "it crashed")
    lines = text.splitlines()
    assert lines[0] == "it crashed"
    assert lines[1] == "kernel: pvirq-test, symbols: symtab"
    assert lines[2] == "vCPU 0: kernel mode, running, events masked"
    # The stub's 32 bytes: PUSH RCX, PUSH R11, MOV EAX, SYSCALL, and then RIP.
    assert re.fullmatch(r"RIP: e03[03]:\S+ \(hypercall 29, sched_op\)", lines[3])
    assert "0f 05 <41> 5b 59 c3" in lines[4]
    assert any((line.startswith(" ") and "shutdown" in line) or " test+" in line for line in lines)
    assert lines[-2:] == ["  begin", "  before 5"]


@pytest.mark.guest
@needs_gcc
@pytest.mark.parametrize("which", range(10))
def test_every_crash_can_be_reported(which: int) -> None:
    with Host() as host:
        guest = crashed(host, which)
        before = guest.machine.engine.save()
        text = crash.report(guest, "why")
        assert guest.machine.engine.save() == before
    assert f"  before {which}\n" in text
    assert re.search(r"^RSP: [0-9a-f]{4}:[0-9a-f]{16} EFLAGS: [0-9a-f]{8} RIP: [0-9a-f]{16}$", text, re.MULTILINE)
    assert "CR2: " in text
    assert "Event channels (2-level) pending: " in text


@pytest.mark.guest
@needs_gcc
@pytest.mark.parametrize("rip", [0, 1 << 63, (1 << 64) - 1, 0xFFFF800000000000, 0xFFFFFFFF80000000])
@pytest.mark.parametrize("rsp", [0, 1, 0x8000000000001000, (1 << 64) - 8, 0xFFFF830000000000])
def test_hostile_registers(rip: int, rsp: int) -> None:
    with Host() as host:
        guest = host.boot(guestlib.build("crash"), append="which=5", memory=64 * MIB)
        regs = guest.machine.engine.regs
        regs[RIP], regs[RSP] = rip, rsp
        assert f"RIP: {rip:016x}" in crash.report(guest, "why")


@pytest.mark.guest
@needs_gcc
def test_stack_that_leads_to_itself_ends() -> None:
    """A chain of stacks is followed, but not for ever."""
    with Host() as host:
        guest = crashed(host, 5)
        cpu = guest.machine.current
        top = int(cpu.regs[RSP]) // crash.STACK_SIZE * crash.STACK_SIZE + crash.STACK_SIZE - 8
        cpu.write(top, int(cpu.regs[RSP]).to_bytes(8, "little"))
        assert "CR2: " in crash.report(guest, "why")


@pytest.mark.guest
@needs_gcc
def test_last_words_are_plain_text() -> None:
    with Host() as host:
        guest = crashed(host, 5)
        guest.console.output += b"\x1b[31mred\x1b[0m\r\n\x1epvirq1 end 0\n\xff\x00x\n" + b"y" * 1000
        assert crash.last_words(guest, 4) == ["red", "pvirq1 end 0", "\ufffdx", "y" * crash.LINE_MAX]


@pytest.mark.boot
def test_linux_panic(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    with Host() as host:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent")
        with pytest.raises(GuestTimeout):
            guest.run("sleep 1000", timeout=60)
        idle = crash.report(guest, "why")
        assert "vCPU 0: kernel mode, blocked, events enabled\n" in idle
        assert re.search(r"^ \??.*(default_idle|do_idle|cpu_startup_entry)", idle, re.MULTILINE)

        guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent")
        with pytest.raises(GuestCrashed):
            guest.run("echo c > /proc/sysrq-trigger")
        text = crash.report(guest, "guest1 crashed")
    assert text.startswith("guest1 crashed: Kernel panic - not syncing: sysrq triggered crash\n")
    assert re.search(r"^kernel: Linux \d\S+, symbols: \S+$", text, re.MULTILINE)
    # Outwards from the hypercall: panic is called by sysrq_handle_crash, that by way of a write of a shell's.
    trace = re.findall(r"^ (\? )?(\w+)\+0x", text, re.MULTILINE)
    names = [name for _, name in trace]
    assert names.index("panic") < names.index("sysrq_handle_crash") < names.index("ksys_write")
    assert ("", "sysrq_handle_crash") in trace

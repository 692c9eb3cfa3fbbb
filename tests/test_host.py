"""Host and guests as a library: life and death of guests, waiting, time, and what is left behind."""

from __future__ import annotations

import gc
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import pvirq
from image_builder import build_elf
from pvirq import Guest, GuestCrashed, GuestError, GuestTimeout, Host, HostStuck
from pvirq.abi.event_channel import EVTCHNOP_send
from pvirq.abi.xen import HYPERVISOR_event_channel_op, HYPERVISOR_sched_op
from pvirq.toolstack.kernels import KernelChoice

MIB = 1 << 20
APPEND = "console=hvc0 quiet pvirq=agent"


# -- tiny kernels, of a few instructions ----------------------------------


def hypercall(number: int, *arguments: int) -> bytes:
    """mov edi/esi, argument; mov eax, number; syscall."""
    code = b""
    for opcode, value in zip((b"\x48\xbf", b"\x48\xbe", b"\x48\xba"), arguments, strict=False):
        code += opcode + struct.pack("<Q", value)
    return code + b"\xb8" + struct.pack("<I", number) + b"\x0f\x05"


SPIN = b"\xeb\xfe"
BLOCK = hypercall(HYPERVISOR_sched_op, 1, 0)  # SCHEDOP_block, for ever: no event has a handler


def kernel(code: bytes) -> bytes:
    return build_elf(b"\x90" * 0x10 + code + SPIN, memsz=0x3000)


def shutdown(reason: int) -> bytes:
    """A kernel that calls SCHEDOP_shutdown with that reason, given on its stack."""
    push = b"\x6a" + bytes([reason])
    call = b"\x48\x89\xe6\xbf\x02\0\0\0\xb8" + struct.pack("<I", HYPERVISOR_sched_op) + b"\x0f\x05"
    return kernel(push + call)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(machine_memory=1 << 30) as made:
        yield made


def boot(host: Host, image: bytes, **arguments: object) -> Guest:
    return host.boot(image, memory=32 * MIB, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reason", "name"),
    [(0, "poweroff"), (1, "reboot"), (2, "suspend"), (3, "crash"), (4, "watchdog"), (5, "soft_reset"), (9, "reason 9")],
)
def test_reasons(host: Host, reason: int, name: str) -> None:
    guest = boot(host, shutdown(reason))
    assert (guest.ended, guest.shutdown_reason) == (False, None)
    assert guest.wait(10) == name
    assert guest.ended
    assert guest.wait(10) == name  # at once


def test_a_crash_says_why(host: Host) -> None:
    guest = boot(host, kernel(b"\x0f\x0b"))
    with pytest.raises(GuestCrashed, match="unhandled exception 6") as info:
        guest.wait_for("anything", 5)
    assert "\n" not in str(info.value)
    assert guest.shutdown_reason == "crash"
    assert guest.machine.crash is not None
    other = boot(host, shutdown(0))  # the host goes on
    assert other.wait(10) == "poweroff"


def test_an_end_while_something_else_was_wanted(host: Host) -> None:
    with pytest.raises(GuestError, match="poweroff") as info:
        boot(host, shutdown(0)).wait_for("hello")
    assert not isinstance(info.value, GuestCrashed | GuestTimeout)
    with pytest.raises(GuestCrashed):
        boot(host, shutdown(3)).wait_for("hello")


def test_a_timeout_is_of_guest_time(host: Host) -> None:
    guest = boot(host, kernel(b""))
    at = host.clock.now()
    with pytest.raises(GuestTimeout, match=r"0\.2 s of guest time"):
        guest.wait(0.2)
    assert (host.clock.now() - at) / 1e9 >= 0.2


def test_a_guest_that_sleeps_for_ever(host: Host) -> None:
    guest = boot(host, kernel(BLOCK))
    began = time.perf_counter()
    with pytest.raises(GuestTimeout):
        guest.wait(3600)  # an hour of its time, of which none is real
    assert time.perf_counter() - began < 3600
    with pytest.raises(HostStuck):
        host.run(lambda: False)
    with pytest.raises(GuestTimeout, match="sleeps for ever"):
        guest.wait(None)


def test_until_and_limit(host: Host) -> None:
    boot(host, kernel(b""))
    at = host.clock.now()
    assert host.run(lambda: True, 0)
    assert not host.run(lambda: False, 50_000_000)
    assert host.clock.now() - at >= 50_000_000
    assert host.run(lambda: host.clock.now() > at + 60_000_000)
    stopped = host.clock.now()
    time.sleep(0.02)
    assert host.clock.now() == stopped


def test_an_exception_of_a_listeners_leaves_a_host_that_goes_on(host: Host) -> None:
    guest = boot(host, kernel(b""))

    def fail() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        host.run(fail)
    timer = host.clock.at(host.clock.now() + 1_000_000, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        host.run(lambda: False, 10_000_000)
    timer.cancel()
    assert not host.run(lambda: guest.ended, 10_000_000)


def test_an_engine_that_is_none(host: Host) -> None:
    host.engine_name = "bochs"
    with pytest.raises(pvirq.EngineError, match="bochs"):
        boot(host, shutdown(0))
    host.engine_name = "unicorn"
    assert not host.guests
    assert boot(host, shutdown(0)).wait(5) == "poweroff"


def dom0_state(host: Host) -> tuple[object, ...]:
    names = [row.split()[-1] for row in host.dom0.proc_interrupts().splitlines()[1:] if "xen-" in row]
    ports = [(channel.port, channel.state) for channel in host.dom0.domain.evtchn.channels if channel.state]
    machine = host.hypervisor.machine
    used = int((machine.np_owner == 0x7FF2).sum()), int((machine.np_owner == 1).sum())
    return names, ports, list(host.hypervisor.domains), used, sorted(host.store.dump())


@pytest.mark.parametrize("when", ["before", "amid", "after"])
def test_destroy_leaves_dom0_as_it_was(host: Host, when: str) -> None:
    boot(host, shutdown(0)).wait(5)
    host.destroy(host.guests[0])
    before = dom0_state(host)
    guest = boot(host, shutdown(0) if when == "after" else kernel(b""))
    assert dom0_state(host) != before
    if when == "amid":
        assert not host.run(lambda: False, 20_000_000)
    elif when == "after":
        guest.wait(5)
    host.destroy(guest)
    host.destroy(guest)  # again is no harm
    assert dom0_state(host)[:4] == before[:4]
    assert not host.guests
    assert re.sub("guest2|/2\\b|[0-9a-f-]{36}", "", str(dom0_state(host)[4])) == re.sub(
        "[0-9a-f-]{36}", "", str(before[4])
    )


def test_a_guest_destroyed_by_its_own_listener(host: Host) -> None:
    guest, other = boot(host, kernel(b"")), boot(host, kernel(b""))
    host.clock.at(host.clock.now() + 5_000_000, lambda: host.destroy(guest))
    assert not host.run(lambda: False, 20_000_000)
    assert host.guests == [other]


def test_guests_share_the_machine_fairly(host: Host) -> None:
    count = b"\x48\xff\x05\xe9\x0f\x00\x00"  # inc qword [rip+0xfe9]: at TEXT+0x1000, in a page of its own
    image = build_elf(b"\x90" * 0x10 + count + b"\xeb" + bytes([256 - len(count) - 2]), memsz=0x3000)
    guests = [boot(host, image) for _ in range(3)]
    host.run(lambda: False, 300_000_000)
    counts = [guest.domain.machine.u64[(guest.machine.address((0x1000000 >> 12) + 1)) // 8] for guest in guests]
    assert min(counts) > 0
    assert max(counts) < 3 * min(counts)


def test_no_frames_for_another_guest(host: Host) -> None:
    with pytest.raises(pvirq.BuildError, match="memory") as info:
        host.boot(shutdown(0), memory=2 << 30)
    assert "\n" not in str(info.value)
    assert boot(host, shutdown(0)).wait(5) == "poweroff"


def test_frames_are_used_again(host: Host) -> None:
    for _ in range(5):  # of 1 GiB, these would not fit side by side
        guest = host.boot(shutdown(0), memory=600 * MIB)
        assert guest.wait(5) == "poweroff"
        host.destroy(guest)


def test_without_a_domain_0() -> None:
    with Host(dom0=False, machine_memory=64 * MIB) as host:
        assert not host.has_dom0
        with pytest.raises(HostStuck):
            host.run(lambda: False)


# -- a process of many hosts ----------------------------------------------


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pvirq")]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_hosts_side_by_side() -> None:
    first, second = Host(machine_memory=256 * MIB), Host(machine_memory=256 * MIB)
    with first, second:
        a, b = boot(first, kernel(b"")), boot(second, kernel(b""))
        for _ in range(5):
            assert not first.run(lambda: False, 10_000_000)
            assert not second.run(lambda: False, 20_000_000)
        assert first.clock.now() < second.clock.now()
        assert (a.domain.domid, b.domain.domid) == (1, 1)
        first.destroy(a)
        assert boot(second, shutdown(0)).wait(5) == "poweroff"
    assert not _threads()


def test_in_threads_at_once() -> None:
    results: list[str] = []

    def work(reason: int) -> None:
        for _ in range(3):
            with Host(machine_memory=256 * MIB) as host:
                results.append(boot(host, shutdown(reason)).wait(10))

    threads = [threading.Thread(target=work, args=(reason,)) for reason in (0, 1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(results) == {"poweroff": 3, "reboot": 3, "soft_reset": 3}
    assert not _threads()


def test_everything_is_freed() -> None:
    sizes = []
    for _ in range(15):
        with Host(machine_memory=1 << 30) as host:
            guest = boot(host, shutdown(0), initrd=bytes(4 * MIB))
            guest.wait(5)
            if len(sizes) % 2:
                host.destroy(guest)
        host.close()  # again is no harm
        del host, guest
        gc.collect()
        sizes.append(_resident())
    assert not _threads()
    assert sizes[-1] - sizes[4] < 6 * MIB


def test_a_program_that_forgets_its_host_ends_all_the_same() -> None:
    program = (
        "import sys; sys.path[:0] = sys.argv[1:]; import pvirq, test_host as t\n"
        "host = pvirq.Host(machine_memory=256 << 20); guest = t.boot(host, t.kernel(b''))\n"
        "host.run(lambda: False, 10_000_000); print('done')"
    )
    paths = [str(Path(__file__).parent), str(Path(pvirq.__file__).parents[1])]
    result = subprocess.run(
        [sys.executable, "-c", program, *paths], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


# -- a real Linux ---------------------------------------------------------


class Booted:
    """One Linux guest for all tests that follow, with its hypercalls counted."""

    def __init__(self, kernel: KernelChoice, initrd: bytes) -> None:
        self.host = Host(wallclock=1_700_000_000)
        self.guest = self.host.boot(kernel.path, initrd=initrd, append=APPEND)
        self.sends: Counter[int] = Counter()
        cpu = self.guest.machine.cpus[0]
        table = list(cpu.hypercalls)
        handler, arguments = table[HYPERVISOR_event_channel_op]

        def count(cpu: object, command: int, argument: int) -> int:
            if command == EVTCHNOP_send:
                self.sends[struct.unpack("<I", cpu.read(argument, 4))[0]] += 1  # type: ignore[attr-defined]
            return handler(cpu, command, argument)

        table[HYPERVISOR_event_channel_op] = (count, arguments)
        cpu.hypercalls = table


@pytest.fixture(scope="module")
def linux(kernel_cloud: KernelChoice, initrd: bytes) -> Iterator[Booted]:
    made = Booted(kernel_cloud, initrd)
    made.guest.await_agent()
    yield made
    made.host.close()


def real_time(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.mark.boot
def test_commands(linux: Booted) -> None:
    run = linux.guest.run
    assert run("echo hello; exit 3") == pvirq.CommandResult(b"hello\n", 3)
    assert run("echo err >&2; printf 'no newline'").text == "err\nno newline"
    assert run("kill -9 $$").status == 137
    assert run("exec nosuchprogram").status == 127
    assert run("").status == 0
    assert run("printf '\\036pvirq99 end 0\\n'").stdout == b"\x1epvirq99 end 0\n"  # as the agent's, but not this one's
    assert run("echo 'öäü €'").text == "öäü €\n"
    assert run("cat", timeout=10).status == 0  # its input is empty
    pieces: list[bytes] = []
    result = run("for i in 1 2 3; do echo $i; sleep 1; done", on_output=pieces.append)
    assert b"".join(pieces) == result.stdout == b"1\n2\n3\n"
    assert len(pieces) >= 3


@pytest.mark.boot
def test_much_output(linux: Booted) -> None:
    result = linux.guest.run("seq 1 20000")
    assert result.stdout == b"".join(b"%d\n" % i for i in range(1, 20001))
    binary = linux.guest.run('i=0; while [ $i -lt 256 ]; do printf "\\\\$(printf %o $i)"; i=$((i+1)); done')
    assert binary.stdout.replace(b"\r\n", b"\n") == bytes(range(256))


@pytest.mark.boot
def test_a_command_that_takes_too_long(linux: Booted) -> None:
    with pytest.raises(GuestTimeout, match="sleep 100"):
        linux.guest.run("sleep 100", timeout=2)
    # It is still at it; what is asked next waits for its end, for the agent does one thing after another.
    assert linux.guest.run("echo again", timeout=120).stdout == b"again\n"


@pytest.mark.boot
def test_sleep_is_guest_time(linux: Booted) -> None:
    clock = linux.host.clock
    linux.guest.run("true")
    at = clock.now()
    seconds = real_time(lambda: linux.guest.run("sleep 2"))
    assert 2.0 <= (clock.now() - at) / 1e9 < 2.0 + seconds + 0.1
    at = clock.now()
    assert real_time(lambda: linux.guest.run("sleep 3600", timeout=4000)) < 30
    assert 3600 <= (clock.now() - at) / 1e9 < 3601 + 30


@pytest.mark.boot
def test_the_time_of_day_follows_wallclock(linux: Booted) -> None:
    """But for the ticks that Linux misses as it boots, before it takes Xen's clock: a busy machine costs it some."""
    now = int(linux.guest.run("date +%s").text)
    assert now == pytest.approx(1_700_000_000 + linux.host.clock.now() / 1e9, abs=30)


@pytest.mark.boot
def test_the_console_port_in_both_kernels(linux: Booted) -> None:
    """The guest's sends and dom0's interrupts, one to one.

    Domain 0's handler runs before the guest goes on (its vCPU has work as soon as the event is pending), so no two
    sends fall into one; and a guest that has sent stops at once for it.
    """
    port = linux.guest.machine.console_port
    linux.guest.run("true")

    def counted() -> tuple[int, int]:
        rows = [row.split() for row in linux.host.dom0.proc_interrupts().splitlines() if "evtchn:xenconsoled" in row]
        (row,) = rows
        return linux.sends[port], sum(int(word) for word in row[1 : row.index(next(w for w in row if w[0] == "x"))])

    sends, interrupts = counted()
    linux.guest.run("seq 1 3000; for i in 1 2 3 4 5; do echo $i; sleep 1; done")
    sends_after, interrupts_after = counted()
    assert sends_after - sends > 5
    assert interrupts_after - interrupts == sends_after - sends
    # And the guest's own interrupts for that channel: none that dom0 didn't send.
    text = linux.guest.proc_interrupts()
    assert re.search(r"hvc_console$", text, re.M)


@pytest.mark.boot
def test_two_linux_guests_at_once(linux: Booted, kernel_cloud: KernelChoice, initrd: bytes) -> None:
    host = linux.host
    before = dom0_state(host)[:4]
    other = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND, memory=128 * MIB, name="other")
    output: list[bytes] = []
    other.console.on_output(output.append)
    # The first works while the second boots.
    assert linux.guest.run("i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done; echo $i").text == "3000\n"
    assert other.run("hostname pvguest; hostname").text == "pvguest\n"
    assert linux.guest.run("hostname").text != "pvguest\n"
    assert "other" in [host.store.read_text(f"/local/domain/{g.domain.domid}/name") for g in host.guests]
    # Destroyed amid its work.
    with pytest.raises(GuestTimeout):
        other.run("while :; do :; done", timeout=1)
    host.destroy(other)
    assert dom0_state(host)[:4] == before
    assert linux.guest.run("echo still here").text == "still here\n"


@pytest.mark.boot
def test_the_example_of_the_readme(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    results: list[str] = []
    before = _threads()

    def work() -> None:  # and from a thread that is not the main one
        with pvirq.Host() as host:
            guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND)
            results.append(guest.run("cat /proc/interrupts").text)
            results.append(host.dom0.proc_interrupts())
            results.append(guest.poweroff())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    mine, dom0, reason = results
    assert "hvc_console" in mine
    assert "evtchn:xenconsoled" in dom0
    assert reason == "poweroff"
    assert _threads() == before


@pytest.mark.boot
def test_a_crashing_linux(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    with Host() as host:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append=f"{APPEND} panic=0")
        with pytest.raises(GuestCrashed):
            guest.run("echo c > /proc/sysrq-trigger")
        assert guest.shutdown_reason == "crash"
        assert "sysrq" in guest.console.text()

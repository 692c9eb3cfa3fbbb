"""How fast pvirq is: medians of several runs, printed beside their targets and written to bench.json.

    python -m benchmarks [--runs N] [--output FILE] [--only NAME ...]

The small kernel and the program in the guest are C (kernel.c, user.c); without gcc what needs them is left out.
A guest's own clock counts what it executes: how long that took is seen outside, when it says that it begins and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import campaign, check, devices, evtchn, inspect, model, pytest_guest, tracing
from pvirq import Guest, Host, machine_code
from pvirq.toolstack import kernels
from pvirq.toolstack.initrd import default_initrd

HERE = Path(__file__).parent
MIB = 1 << 20
APPEND = "console=hvc0 quiet pvirq=agent"
MEMORY = 256 * MIB
CFLAGS = ["-O2", "-std=gnu11", "-Wall", "-ffreestanding", "-fno-pic", "-fno-pie", "-no-pie", "-mno-red-zone",
          "-mno-sse", "-mno-mmx", "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables",
          "-nostdlib", "-static", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A measurement's unit, how many digits are worth printing, and what it should not exceed (or reach: `least`)."""

    unit: str
    digits: int = 2
    most: float | None = None
    least: float | None = None


TARGETS = {
    "cold_boot": Target("s", 2, most=5),
    "null_hypercall": Target("us", 2, most=2),
    "read_1_byte": Target("us", 1, most=20),
    "write_1_byte": Target("us", 1, most=20),
    "event_send": Target("us", 1),
    "event_round_trip": Target("us", 1),
    "guest_speed": Target("MIPS", 0),
    "resident_above_ram": Target("MiB", 0, most=120),
    "idle_cpu_per_minute": Target("s", 3),
    # Event channels of modelled domains (benchmarks/evtchn.py).
    "evtchn.bind_131071_ports.s": Target("s", 2, most=1),
    "evtchn.close_and_bind_when_full.per_s": Target("/s", 0),
    "evtchn.port.bytes": Target("B", 0, most=200),
    "evtchn.send_pending.2l.per_s": Target("/s", 0, least=1_500_000),
    "evtchn.send_pending.fifo.per_s": Target("/s", 0, least=1_500_000),
    "evtchn.send.10_of_10_ports.per_s": Target("/s", 0),
    "evtchn.send.10_of_131071_ports.per_s": Target("/s", 0),
    "evtchn.send.131071_of_131071_ports.per_s": Target("/s", 0),
    "evtchn.send.1_of_2_domains.per_s": Target("/s", 0),
    "evtchn.send.1_of_2000_domains.per_s": Target("/s", 0),
    "evtchn.send.1999_of_2000_domains.per_s": Target("/s", 0),
    "evtchn.handled.fifo.per_s": Target("/s", 0, least=300_000),
    "evtchn.handled.2l.per_s": Target("/s", 0, least=300_000),
    "evtchn.handled_10000_ports.fifo.per_s": Target("/s", 0),
    "evtchn.handled_in_bulk.fifo.per_s": Target("/s", 0),
    "evtchn.handled_in_bulk.2l.per_s": Target("/s", 0),
    # Modelled domains (benchmarks/model.py).
    "model.build_1000_guests.s": Target("s", 2, most=5),
    "model.connect_1000_guests.s": Target("s", 2),
    "model.1000_guests.mib": Target("MiB", 0, most=1024),
    "model.events_100x4.2.6.18.per_s": Target("/s", 0, least=200_000),
    "model.events_100x4.suse.per_s": Target("/s", 0, least=200_000),
    "model.events_100x4.pvops.per_s": Target("/s", 0, least=200_000),
    # What a trace costs: times as long as without one (benchmarks/tracing.py).
    "tracing.events.2.6.18.ratio": Target("x", 2, most=1.25),
    "tracing.events.suse.ratio": Target("x", 2, most=1.25),
    "tracing.events.pvops.ratio": Target("x", 2, most=1.25),
    "tracing.events_to_file.pvops.ratio": Target("x", 2),
    "tracing.disk.pvops.ratio": Target("x", 2, most=1.25),
    "tracing.linux_events.ratio": Target("x", 2, most=1.25),
    "tracing.linux_events_to_file.ratio": Target("x", 2),
    # Tables of any host (benchmarks/inspect.py); `percent` is of one core, at one refresh a second.
    "inspect.interrupts_512x4000.s": Target("s", 2, most=0.5),
    "inspect.explain_512x4000.s": Target("s", 2),
    "inspect.log.mb_per_s": Target("MB/s", 0),
    "inspect.top_64x500.ms": Target("ms", 1),
    "inspect.top_64x500.percent": Target("%", 1, most=5),
    # Real guests with a disk and a network interface (benchmarks/devices.py); beside real Xen: benchmarks/xen/run.py.
    "devices.boot_userspace.s": Target("s", 2),
    "devices.boot_usable.s": Target("s", 2, most=8),
    "devices.boot_with_host.s": Target("s", 2),
    "devices.event_round_trip.us": Target("us", 0, most=50),
    "devices.event_round_trip_apart.us": Target("us", 0),
    "devices.read_4k.per_s": Target("/s", 0, least=5000),
    "devices.read_1m.mb_per_s": Target("MB/s", 1, least=400),
    "devices.ping_guest.us": Target("us", 0),
    "devices.ping_dom0.us": Target("us", 0, most=500),
    "devices.tcp_guest.mb_per_s": Target("MB/s", 2, least=50),
    # Campaigns on one worker and on two (benchmarks/campaign.py).
    "campaign.real.1_worker.s": Target("s", 1),
    "campaign.real.2_workers.s": Target("s", 1),
    "campaign.real.run.s": Target("s", 3),
    "campaign.real.ratio": Target("", 2, least=1.8),
    "campaign.modelled.1_worker.s": Target("s", 1),
    "campaign.modelled.2_workers.s": Target("s", 1),
    "campaign.modelled.run.s": Target("s", 3),
    "campaign.modelled.ratio": Target("", 2, least=1.8),
    # Tests under pytest, each in a fork of a booted guest, on one core (benchmarks/pytest_guest.py).
    "pytest.guest_tests.per_min": Target("/min", 0, least=200),
    "pytest.guest_tests_with_devices.per_min": Target("/min", 0),
    # Searches of schedules on one core (benchmarks/check.py has the times of each race).
    "check.philosophers.steps_per_s": Target("/s", 0, least=200_000),
    "check.philosophers.plain_steps_per_s": Target("/s", 0),
    "check.philosophers.reduction": Target("x", 1),
    "check.races.steps_per_s": Target("/s", 0, least=200_000),
    "check.races.slowest_found.s": Target("s", 2, most=60),
    "check.races.slowest_clean.s": Target("s", 2, most=60),
    "check.fifo.median_reduction": Target("x", 1),
    "check.fifo.median_brute_force": Target("x", 1, least=10),
}


def compile_guest(name: str, directory: Path) -> Path:
    """Build kernel.c or user.c. subprocess.CalledProcessError where gcc fails."""
    output = directory / name
    flags = [*CFLAGS, "-mcmodel=kernel", f"-Wl,-T,{HERE / 'link.ld'}"] if name == "kernel" else CFLAGS
    subprocess.run(["gcc", *flags, str(HERE / f"{name}.c"), "-o", str(output)], check=True)
    return output


# -- the small kernel --------------------------------------------------------------------------------------------------


KERNEL_ROUNDS = {"null_hypercall": 200_000, "event_send": 10_000, "event_round_trip": 10_000, "guest_speed": 3_000_000}


def kernel_times(image: Path) -> dict[str, float]:
    """One run of the small kernel."""
    marks: list[float] = []
    with Host() as host:
        guest = host.boot(image, memory=16 * MIB)
        guest.machine.on_console_io = lambda data: marks.append(time.perf_counter())
        reason = guest.wait(60)
    if reason != "poweroff" or len(marks) != 2 * len(KERNEL_ROUNDS):
        raise RuntimeError(f"the benchmark's kernel ended with {reason}")
    took = zip(marks[::2], marks[1::2], strict=True)
    each = {
        name: (end - begin) / rounds for (name, rounds), (begin, end) in zip(KERNEL_ROUNDS.items(), took, strict=True)
    }
    hundred = each.pop("guest_speed")
    return {name: seconds * 1e6 for name, seconds in each.items()} | {"guest_speed": 100 / hundred / 1e6}


# -- Linux -------------------------------------------------------------------------------------------------------------


@contextmanager
def linux(files: dict[str, bytes]) -> Iterator[Guest]:
    """Debian's kernel with a busybox, ready for commands."""
    kernel = kernels.find_kernel(print_error)
    initrd = default_initrd(kernels.find_busybox(print_error), files)
    with Host() as host:
        guest = host.boot(kernel.path, initrd=initrd, append=APPEND, memory=MEMORY)
        guest.await_agent()
        yield guest


SYSTEM_CALLS = 20_000


def system_calls(guest: Guest) -> dict[str, float]:
    marks: list[float] = []
    seen = bytearray()

    def watch(output: bytes) -> None:
        moment = time.perf_counter()
        seen.extend(output)
        marks.extend([moment] * (len(re.findall(rb"begin|next|end", seen)) - len(marks)))

    result = guest.run("/bench", on_output=watch)
    if result.status or len(marks) != 3:
        raise RuntimeError(f"the benchmark's program failed: {result.text}")
    begin, between, end = marks
    return {
        "read_1_byte": (between - begin) / SYSTEM_CALLS * 1e6, "write_1_byte": (end - between) / SYSTEM_CALLS * 1e6,
    }  # fmt: skip


def idle_cpu(guest: Guest) -> dict[str, float]:
    """CPU time of this process while the guest sleeps a minute."""
    began = time.process_time()
    guest.run("sleep 60", timeout=120)
    return {"idle_cpu_per_minute": time.process_time() - began}


def cold_boot() -> dict[str, float]:
    """The whole command, from its start to its end."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "pvirq", "boot", "--exec", "true"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300)
    return {"cold_boot": time.perf_counter() - began}


def resident() -> dict[str, float]:
    """The peak of a process whose guest has used all of its memory, less that memory."""
    command = [sys.executable, "-c", "from benchmarks.bench import report_resident; report_resident()"]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300, cwd=HERE.parent)
    return {"resident_above_ram": (int(result.stdout) * 1024 - MEMORY) / MIB}


def report_resident() -> None:
    """In a process of its own: print its VmHWM in KiB."""
    with linux({}) as guest:
        guest.run("dd if=/dev/zero of=/tmp/fill bs=1M count=150; rm /tmp/fill")
        guest.poweroff()
        print(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


# -- running and reporting ---------------------------------------------------------------------------------------------


def print_error(message: str) -> None:
    print(message, file=sys.stderr)


def repeat(runs: int, measure: Callable[[], dict[str, float]], into: dict[str, list[float]]) -> None:
    for _ in range(runs):
        for name, value in measure().items():
            into.setdefault(name, []).append(value)


def collect(runs: int, wanted: set[str]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    if any(name.startswith("evtchn.") for name in wanted):
        repeat(min(runs, 3), evtchn.run, found)
    if any(name.startswith("model.") for name in wanted):
        repeat(min(runs, 3), model.run_apart, found)
    if any(name.startswith("inspect.") for name in wanted):
        repeat(min(runs, 3), inspect.run, found)
    if any(name.startswith("devices.") for name in wanted) and shutil.which("gcc"):
        for name, values in devices.run(min(runs, 3)).items():
            found.setdefault(name, []).extend(values)
    if any(name.startswith("campaign.") for name in wanted):
        repeat(1, campaign.run, found)
    if any(name.startswith("pytest.") for name in wanted):
        repeat(min(runs, 3), pytest_guest.run, found)
    if any(name.startswith("tracing.") for name in wanted):
        repeat(1, lambda: tracing.run(bool(shutil.which("gcc"))), found)
    if any(name.startswith("check.") for name in wanted):
        repeat(min(runs, 3), lambda: {name: value for name, value in check.run().items() if name in TARGETS}, found)
    with tempfile.TemporaryDirectory() as scratch:
        files: dict[str, bytes] = {}
        if shutil.which("gcc"):
            files["bench"] = compile_guest("user", Path(scratch)).read_bytes()
            if wanted & {"null_hypercall", "event_send", "event_round_trip", "guest_speed"}:
                image = compile_guest("kernel", Path(scratch))
                repeat(runs, lambda: kernel_times(image), found)
        else:
            print_error("no gcc: only what needs no program of the benchmark's own is measured")
        if wanted & {"read_1_byte", "write_1_byte", "idle_cpu_per_minute"}:
            with linux(files) as guest:
                if files:
                    repeat(runs, lambda: system_calls(guest), found)
                repeat(runs, lambda: idle_cpu(guest), found)
        if "cold_boot" in wanted:
            cold_boot()  # the first fetches the kernel and fills the disk cache
            repeat(runs, cold_boot, found)
        if "resident_above_ram" in wanted:
            repeat(min(runs, 3), resident, found)
    return {name: found[name] for name in TARGETS if name in found and name in wanted}


def verdict(target: Target, median: float) -> str:
    if target.most is not None:
        return f"{'ok' if median <= target.most else 'MISSED'}: at most {target.most:g}"
    if target.least is not None:
        return f"{'ok' if median >= target.least else 'MISSED'}: at least {target.least:g}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure pvirq.")
    parser.add_argument("--runs", type=int, default=5, help="runs of each, of which the median counts")
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="NAME")
    options = parser.parse_args()
    results = {}
    print(f"{'':42}{'median':>10} {'':5}{'least to most':>22}  target")
    for name, values in collect(max(options.runs, 1), set(options.only)).items():
        target, median = TARGETS[name], statistics.median(values)
        spread = f"{min(values):.{target.digits}f} to {max(values):.{target.digits}f}"
        print(f"{name:42}{median:>10.{target.digits}f} {target.unit:5}{spread:>22}  {verdict(target, median)}")
        results[name] = {
            "unit": target.unit, "median": median, "min": min(values), "max": max(values), "runs": len(values),
            "at_most": target.most, "at_least": target.least, "values": values,
        }  # fmt: skip
    count = machine_code.count()
    print(f"\n{count} of pvirq's modules were machine code" if count else "\nall of pvirq was Python (make compiled)")
    machine = {
        "machine_code_modules": count,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
    }
    options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    return 0

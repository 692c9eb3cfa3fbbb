"""What real Linux guests get from their devices and event channels: the same work on pvirq and on real Xen.

    python -m benchmarks.devices

Guests have two vCPUs, a disk of 64 MiB in domain 0's memory, and one interface on xenbr0. The program that works in
them is work.c, with gcc; each figure is a mean over all of one run's rounds, in wall time. On pvirq that is this
process's, from the moment "begin" comes over the guest's console to "end": the guest's own clock jumps over time in
which every vCPU sleeps. On real Xen the guest's clock is the wall's (benchmarks/xen/run.py).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from pvirq import Guest, Host
from pvirq.drivers.blockstore import SECTOR, MemoryStore
from pvirq.toolstack import kernels, modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

HERE: Final = Path(__file__).parent
MIB: Final = 1 << 20
DISK: Final = 64 * MIB
MEMORY: Final = 128 * MIB
VCPUS: Final = 2
DRIVERS: Final = ("xen-evtchn", "xen-blkfront", "xen-netfront")
APPEND: Final = "console=hvc0 quiet pvirq=agent"
ADDRESSES: Final = ("10.0.0.2", "10.0.0.3")
DOM0_ADDRESS: Final = "10.0.0.1"
EVENTS, SMALL_READS, LARGE_READS, PINGS, TCP_MIB = 1000, 1000, 48, 300, 16
PORT: Final = 5000
PREFIX: Final = "devices."
# A guest is usable when it has read a sector and its interface is up.
USABLE: Final = (
    "until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.02; done; "
    "dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null && ip link set eth0 up"
)


class Bench(Protocol):
    """Two guests, 0 and 1, and how to have them work."""

    def sh(self, guest: int, command: str) -> str:
        """What a command prints."""

    def timed(self, guest: int, command: str) -> float:
        """Wall time of what work.c does, in seconds."""

    def echo(self) -> str:
        """Let something in domain 0 send back guest 0's events: "DOMID PORT"."""


def compile_work() -> bytes:
    """work.c, static. RuntimeError without gcc or libc's static library."""
    if not shutil.which("gcc"):
        raise RuntimeError("no gcc for the guests' program")
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "work"
        flags = ["-O2", "-Wall", "-static", "-s"]
        subprocess.run(["gcc", *flags, str(HERE / "work.c"), "-o", str(output)], check=True)
        return output.read_bytes()


def guest_parts() -> tuple[KernelChoice, bytes]:
    """The kernel that the guests have on both, and their initrd: the drivers, work.c, and pvirq's agent."""
    kernel = kernels.fetch_kernel("cloud", print)
    assert kernel.modules_dir is not None
    drivers = modules.read_modules(kernel.modules_dir, DRIVERS)
    files = {"bin/work": compile_work()}
    return kernel, default_initrd(kernels.find_busybox(print), files, drivers)


def work(bench: Bench) -> dict[str, float]:
    """All measurements but boot; the names are those of benchmarks.bench.TARGETS without "devices.".

    Each is done twice, and the second time counts: in the first one the emulators translate the guests' code.
    """

    def seconds(command: str) -> float:
        bench.timed(0, command)
        return bench.timed(0, command)

    for number, address in enumerate(ADDRESSES):
        bench.sh(number, f"ip addr add {address}/24 dev eth0; ip link set eth0 up")
    events = f"work events {bench.echo()} {EVENTS}"
    found = {"event_round_trip.us": seconds(f"{events} together") / EVENTS * 1e6}
    found["event_round_trip_apart.us"] = seconds(f"{events} apart") / EVENTS * 1e6
    found["read_4k.per_s"] = SMALL_READS / seconds(f"work read /dev/xvda 4096 {SMALL_READS}")
    found["read_1m.mb_per_s"] = LARGE_READS * MIB / 1e6 / seconds(f"work read /dev/xvda {MIB} {LARGE_READS}")
    found["ping_dom0.us"] = seconds(f"work ping {DOM0_ADDRESS} {PINGS}") / PINGS * 1e6
    found["ping_guest.us"] = seconds(f"work ping {ADDRESSES[1]} {PINGS}") / PINGS * 1e6
    bench.sh(1, f"work serve {PORT} > /dev/null 2>&1 &")
    found["tcp_guest.mb_per_s"] = TCP_MIB * MIB / 1e6 / seconds(f"work send {ADDRESSES[1]} {PORT} {TCP_MIB}")
    return found


# -- pvirq -------------------------------------------------------------------------------------------------------------


class PvirqBench:
    """The guests of a host. `guest_seconds` is how long the last timed work took by the guest's own clock."""

    def __init__(self, host: Host, guests: list[Guest]) -> None:
        self.host = host
        self.guests = guests
        self.guest_seconds = 0.0

    def sh(self, guest: int, command: str) -> str:
        result = self.guests[guest].run(command, 600)
        if result.status:
            raise RuntimeError(f"{command!r} failed in guest {guest}: {result.text}")
        return result.text

    def timed(self, guest: int, command: str) -> float:
        marks: list[float] = []
        seen = bytearray()

        def watch(output: bytes) -> None:
            moment = time.perf_counter()
            seen.extend(output)
            if not marks and b"begin\n" in seen:
                marks.append(moment)
            if len(marks) == 1 and re.search(rb"end \d+\n", seen):
                marks.append(moment)

        result = self.guests[guest].run(command, 600, watch)
        if result.status or len(marks) < 2:
            raise RuntimeError(f"{command!r} failed in guest {guest}: {result.text}")
        self.guest_seconds = int(re.findall(rb"end (\d+)", seen)[0]) / 1e9
        return marks[1] - marks[0]

    def echo(self) -> str:
        user = self.host.dom0.evtchn_user("work")
        return f"0 {user.bind_unbound(self.guests[0].domain.domid, user.notify)}"


def boot_guest(host: Host, kernel: KernelChoice, initrd: bytes, number: int) -> Guest:
    if not number:
        host.backends.network.add_bridge("xenbr0")
    guest = host.boot(kernel.path, initrd=initrd, append=APPEND, memory=MEMORY, vcpus=VCPUS)
    host.backends.devices.add(f"/dev/loop{number}", MemoryStore(DISK // SECTOR))
    host.attach_disk(guest, "xvda", f"/dev/loop{number}")
    host.attach_nic(guest)
    return guest


def boot(kernel: KernelChoice, initrd: bytes) -> dict[str, float]:
    """A host and one guest, until its disk was read and its interface is up."""
    began = time.perf_counter()
    with Host() as host:
        there = time.perf_counter()
        guest = boot_guest(host, kernel, initrd, 0)
        guest.await_agent()
        agent = time.perf_counter()
        if guest.run(USABLE).status:
            raise RuntimeError("the guest's devices are not usable")
        usable = time.perf_counter()
    return {"boot_userspace.s": agent - there, "boot_usable.s": usable - there, "boot_with_host.s": usable - began}


@contextmanager
def pvirq_bench() -> Iterator[PvirqBench]:
    kernel, initrd = guest_parts()
    with Host() as host:
        guests = [boot_guest(host, kernel, initrd, number) for number in range(2)]
        host.station(f"{DOM0_ADDRESS}/24")
        bench = PvirqBench(host, guests)
        for number in range(2):
            bench.sh(number, USABLE)
        yield bench


def run(runs: int, report: Callable[[str], None] = lambda _: None) -> dict[str, list[float]]:
    """All measurements on pvirq, so many times, by their names in benchmarks.bench.TARGETS."""
    found: dict[str, list[float]] = {}

    def add(values: dict[str, float]) -> None:
        for name, value in values.items():
            found.setdefault(PREFIX + name, []).append(value)

    kernel, initrd = guest_parts()
    for _ in range(runs):
        add(boot(kernel, initrd))
        report("pvirq: booted")
        with pvirq_bench() as bench:
            add(work(bench))
        report("pvirq: worked")
    return found


if __name__ == "__main__":
    for name, values in run(3).items():
        print(f"{name:36}", *(f"{value:12.2f}" for value in values))

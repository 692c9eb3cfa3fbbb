"""Real guests with a seed: the same run to the bit, each time and wherever; and another one for another seed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.fork import fork
from pvirq.schedule import Schedule
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

WORK = """
until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done
ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up
(dd if=/dev/xvda of=/dev/null bs=4k count=200 iflag=direct
dd if=/dev/urandom of=/dev/xvda bs=4k count=50) 2>/dev/null &
(i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done) &
ping -c 3 -i 0.2 10.0.0.1
wait
cat /proc/interrupts /proc/uptime /proc/sys/kernel/random/uuid
"""


class Outcome(NamedTuple):
    """All that a run leaves behind."""

    console: str
    memory: tuple[str, ...]
    disk: str
    time: int
    choices: int
    taken: dict[int, int]


def run(kernel: Path, initrd: bytes, seed: int | Schedule, guests: int = 1) -> Outcome:
    """Boot guests with two vCPUs, a disk and a network, and let the first one use them."""
    with Host(seed=seed) as host:
        host.station("10.0.0.1/24")
        store = MemoryStore(8 << 11)
        for number in range(guests):
            guest = host.boot(kernel, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
            host.attach_disk(guest, "xvda", store if not number else MemoryStore(1 << 11))
            host.attach_nic(guest)
        result = host.guests[0].run(WORK, 120)
        assert (result.status, "0% packet loss" in result.text) == (0, True), result.text
        assert host.schedule is not None
        return Outcome(
            "".join(guest.console.output.decode("utf-8", "replace") for guest in host.guests),
            tuple(host.hypervisor.machine.digest(guest.domain.domid) for guest in host.guests),
            hashlib.sha256(store.read(0, store.sectors)).hexdigest(),
            host.clock.now(), host.schedule.count, host.schedule.taken,
        )  # fmt: skip


@pytest.fixture(scope="module")
def initrd_with_drivers(kernel_cloud: KernelChoice, busybox: Path) -> bytes:
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "xen-netfront"])
    return default_initrd(busybox, modules=drivers)


@pytest.fixture(scope="module")
def first(kernel_cloud: KernelChoice, initrd_with_drivers: bytes) -> Outcome:
    return run(kernel_cloud.path, initrd_with_drivers, 1)


def test_the_same_seed_is_the_same_run(first: Outcome, kernel_cloud: KernelChoice, initrd_with_drivers: bytes) -> None:
    # In a process where memory lies elsewhere, and strings and objects hash otherwise.
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_linux_repeatable as test\n"
        "print(repr(test.run(Path(sys.argv[2]), sys.stdin.buffer.read(), 1)))"
    )
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", script, here, str(kernel_cloud.path)],
        input=initrd_with_drivers, capture_output=True, check=True, env={**os.environ, "PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    assert done.stdout.decode().strip() == repr(first)


def test_its_choices_are_the_same_run(first: Outcome, kernel_cloud: KernelChoice, initrd_with_drivers: bytes) -> None:
    assert len(first.taken) > 50
    assert run(kernel_cloud.path, initrd_with_drivers, Schedule.script(first.taken)) == first


def test_other_seeds_are_other_runs(first: Outcome, kernel_cloud: KernelChoice, initrd_with_drivers: bytes) -> None:
    runs = [fork(lambda seed=seed: run(kernel_cloud.path, initrd_with_drivers, seed)) for seed in (2, 3)]  # type: ignore[misc]
    others = [run.result(120) for run in runs]
    assert len({outcome.memory for outcome in (first, *others)}) == 3
    assert len({outcome.time for outcome in (first, *others)}) == 3


def test_two_guests_have_one_time(kernel_cloud: KernelChoice, initrd_with_drivers: bytes) -> None:
    runs = [fork(lambda: run(kernel_cloud.path, initrd_with_drivers, 4, guests=2)) for _ in range(2)]
    first, second = (run.result(200) for run in runs)
    assert first == second


def test_a_guest_goes_on_in_a_fork_as_it_would_here(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    def go_on(host: Host) -> tuple[str, str, int]:
        text = host.guests[0].run("cat /proc/interrupts; dd if=/dev/urandom bs=1k count=64 2>/dev/null | md5sum").text
        return text, host.hypervisor.machine.digest(host.guests[0].domain.domid), host.clock.now()

    with Host(seed=1) as host:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
        guest.await_agent()
        futures = [host.fork(go_on, seed=seed) for seed in (None, 2, 2)]
        same, other, other_again = (future.result(60) for future in futures)
        assert go_on(host) == same
        assert other == other_again != same

"""Real guests with several vCPUs: up to 32, taken offline and back by guest and toolstack; their locks and time."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.abi.vcpu import RUNSTATE_offline, RUNSTATE_runnable
from pvirq.runloop import ENDLESS
from pvirq.toolstack import modules
from pvirq.toolstack.control import ControlError
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.evtchn_channels import ECS_IPI

pytestmark = pytest.mark.boot

APPEND = "console=hvc0 pvirq=agent"
RECORDED = Path(__file__).parent / "data" / "linux-2vcpu"
CPUS = "/sys/devices/system/cpu"
TICKS_PER_S = 100  # USER_HZ


def sh(guest: Guest, command: str, timeout: float = 120) -> str:
    result = guest.run(command, timeout)
    assert result.status == 0, result.text
    return result.text


def form(table: str) -> list[tuple[str, ...]]:
    """A /proc/interrupts without its counts: what must be the same at each run."""
    header, *lines = table.rstrip("\n").splitlines()
    cpus = len(header.split())
    rows = [tuple(header.split())]
    for line in lines:
        label, *rest = line.split()
        counts = len(list(filter(str.isdigit, rest[:cpus])))
        rows.append((label, str(counts), " ".join(rest[counts:])))
    return rows


def counts(table: str, name: str) -> list[int]:
    """The counts of a numbered row, or of all of that name added up."""
    rows = re.findall(rf"^ *\d+:((?: +\d+)+) .* {re.escape(name)}$", table, re.MULTILINE)
    assert rows, table
    return [sum(column) for column in zip(*(map(int, row.split()) for row in rows), strict=True)]


def online(guest: Guest) -> str:
    return sh(guest, f"cat {CPUS}/online").strip()


def await_online(guest: Guest, cpus: str) -> None:
    sh(guest, f"i=0; while [ $i -lt 50 ] && [ $(cat {CPUS}/online) != {cpus} ]; do sleep 0.1; i=$((i + 1)); done")
    assert online(guest) == cpus


def hypervisor_says(guest: Guest) -> list[bool]:
    return [vcpu.up for vcpu in guest.domain.vcpus]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [4, 8, 32])
def test_many(kernel_cloud: KernelChoice, initrd: bytes, vcpus: int) -> None:
    with Host() as host:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND, vcpus=vcpus)
        guest.await_agent(300)
        assert online(guest) == f"0-{vcpus - 1}"
        assert hypervisor_says(guest) == [True] * vcpus
        # Each of them runs programs, on a timer of its own.
        loop = f"for cpu in $(seq 0 {vcpus - 1}); do taskset $(printf %x $((1 << cpu))) sh -c 'sleep 0.05' & done; wait"
        sh(guest, loop)
        table = guest.proc_interrupts()
        for cpu in range(vcpus):
            timer = counts(table, f"timer{cpu}")
            assert timer[cpu] > 5
            assert sum(timer) == timer[cpu]
        states = [channel.state for channel in guest.domain.evtchn.channels]
        assert states.count(ECS_IPI) == 5 * vcpus
        log = sh(guest, "dmesg")
        for bad in ("Oops", "BUG:", "WARNING:", "Call Trace", "detected stall", "soft lockup"):
            assert bad not in log
        assert guest.poweroff() == "poweroff"


# -- hotplug -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded_like(kernel_cloud: KernelChoice, busybox: Path) -> Iterator[Guest]:
    """A guest with what the recorded one had: two vCPUs, a disk, an interface."""
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "xen-netfront"])
    with Host(hardware="writeup") as host:
        guest = host.boot(
            kernel_cloud.path, initrd=default_initrd(busybox, modules=drivers), append=APPEND, vcpus=2, name="u2"
        )
        host.attach_disk(guest, "xvda", "/dev/ata1")
        host.attach_nic(guest)
        sh(guest, "until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done; ip link set eth0 up")
        yield guest
        log = sh(guest, "dmesg")
        for bad in ("Oops", "BUG:", "WARNING:", "Call Trace"):
            assert bad not in log


def off_inside(guest: Guest) -> None:
    sh(guest, f"echo 0 > {CPUS}/cpu1/online")


def on_inside(guest: Guest) -> None:
    sh(guest, f"echo 1 > {CPUS}/cpu1/online")


def off_by_toolstack(guest: Guest) -> None:
    guest.host.set_vcpus(guest, 1)


def on_by_toolstack(guest: Guest) -> None:
    guest.host.set_vcpus(guest, 2)


@pytest.mark.parametrize(
    ("off", "on"), [(off_inside, on_inside), (off_by_toolstack, on_by_toolstack)], ids=["inside", "vcpu-set"]
)
def test_a_vcpu_goes_and_comes_back(
    recorded_like: Guest, off: Callable[[Guest], None], on: Callable[[Guest], None]
) -> None:
    guest = recorded_like
    for _ in range(2):
        sh(guest, "dd if=/dev/xvda of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null")
        sh(guest, "taskset 2 timeout 1 sh -c 'while :; do :; done' || true")
        before = guest.proc_interrupts()
        off(guest)
        await_online(guest, "0")
        assert hypervisor_says(guest) == [True, False]
        without = guest.proc_interrupts()
        assert form(without) == form((RECORDED / "domU.10-cpu1-off.interrupts").read_text())
        # What was bound to it, goes on elsewhere.
        sh(guest, "dd if=/dev/xvda of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null; ip addr flush eth0")
        assert counts(guest.proc_interrupts(), "blkif")[0] > counts(without, "blkif")[0]
        on(guest)
        await_online(guest, "0-1")
        assert hypervisor_says(guest) == [True, True]
        after = guest.proc_interrupts()
        assert form(after) == form((RECORDED / "domU.11-cpu1-on.interrupts").read_text())
        # Rows of its own begin anew, dynamic ones keep their counts.
        assert counts(after, "timer1")[1] < counts(before, "timer1")[1]
        assert counts(after, "blkif")[1] >= counts(before, "blkif")[1]


def test_fewer_at_first_than_there_are(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    with Host() as host:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND, vcpus=2, maxvcpus=4)
        path = f"/local/domain/{guest.domain.domid}/cpu"
        said = [host.store.read_text(f"{path}/{cpu}/availability") for cpu in range(4)]
        assert said == ["online", "online", "offline", "offline"]
        await_online(guest, "0-1")
        assert hypervisor_says(guest) == [True, True, False, False]
        for count, cpus in ((4, "0-3"), (1, "0"), (3, "0-2")):
            host.set_vcpus(guest, count)
            await_online(guest, cpus)
            assert hypervisor_says(guest) == [cpu < count for cpu in range(4)]
        for count, why in ((5, "requested 5 vCPUs, however maximum is 4"), (0, "one has to stay")):
            with pytest.raises(ControlError, match=why):
                host.set_vcpus(guest, count)


# -- locks and time ----------------------------------------------------------------------------------------------------


def test_contended_locks_sleep_and_kick(
    kernel_cloud: KernelChoice, initrd: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vCPU that waits for a lock polls its port; the one that lets go sends to it. The row counts none of that: the
    line is never enabled."""
    slept: Counter[int] = Counter()
    sent: Counter[int] = Counter()
    poll, send = sched.poll, evtchn.send

    def counting_poll(vcpu: Vcpu, nr_ports: int, port_at: Callable[[int], int], timeout_ns: int) -> None:
        poll(vcpu, nr_ports, port_at, timeout_ns)
        if nr_ports == 1 and vcpu.polling:
            slept[port_at(0)] += 1

    def counting_send(domain: Domain, port: int) -> None:
        sent[port] += domain.domid != 0
        send(domain, port)

    monkeypatch.setattr(sched, "poll", counting_poll)
    monkeypatch.setattr(evtchn, "send", counting_send)
    with Host(seed=1) as host:  # whose turns are short at times, so that one ends while its vCPU has a lock
        host.patience = ENDLESS  # or who waits would give way long before Linux has him sleep
        guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND, vcpus=4)
        guest.await_agent()
        loop = "i=0; while [ $i -lt 20 ]; do (:); i=$((i + 1)); done"
        for _ in range(20):
            sh(guest, f"for cpu in 1 2 3 4; do ({loop}) & done; wait")
            if sum(slept.values()) > 5:
                break
        assert sum(slept.values()) > 5
        for port in slept:
            channel = guest.domain.evtchn.channels[port]
            assert channel.state == ECS_IPI
            # Who sleeps is woken once; a kick may also come before the sleep.
            assert sent[port] >= slept[port] - 1
        table = guest.proc_interrupts()
        for cpu in range(4):
            assert sum(counts(table, f"spinlock{cpu}")) == 0
        assert not any(vcpu.polling for vcpu in guest.domain.vcpus) or not host.quiet


def test_steal_time(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    """Two busy vCPUs share the host's one CPU; what each waits for it is what Xen says and what the guest shows."""
    with Host() as host:
        guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND, vcpus=2)
        guest.await_agent()

        def stolen() -> list[int]:
            lines = [line.split() for line in sh(guest, "grep ^cpu[0-9] /proc/stat").splitlines()]
            return [int(line[8]) for line in lines]

        def waited() -> list[float]:
            times = [cpu.runstate_times for cpu in guest.machine.cpus]
            return [(time[RUNSTATE_runnable] + time[RUNSTATE_offline]) / 1e9 * TICKS_PER_S for time in times]

        shown, real, began = stolen(), waited(), host.clock.now()
        sh(guest, "for cpu in 1 2; do taskset $cpu timeout 2 sh -c 'while :; do :; done' & done; wait")
        shown, real = [
            [after - before for after, before in zip(new, old, strict=True)]
            for new, old in ((stolen(), shown), (waited(), real))
        ]
        passed = (host.clock.now() - began) / 1e9 * TICKS_PER_S
        assert passed > 2 * TICKS_PER_S
        for cpu in range(2):
            assert shown[cpu] > TICKS_PER_S / 2
            assert abs(shown[cpu] - real[cpu]) < 0.1 * real[cpu] + 10

"""Faults on command and a real Linux: what its own drivers make of them, seen from inside the guest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.cli.main import run
from pvirq.drivers.blockstore import MemoryStore
from pvirq.lab.faults import Faults
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

MS = 1_000_000
S = 1_000_000_000
READ = "dd if=/dev/{0} of=/dev/null bs=4k skip=$RANDOM count=1 iflag=direct 2>&1 | tail -1"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host(seed=1) as host:
        host.station("10.0.0.1/24")
        yield host


@pytest.fixture(scope="module")
def guest(host: Host, kernel_cloud: KernelChoice, busybox: Path) -> Guest:
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "xen-netfront"])
    initrd = default_initrd(busybox, modules=drivers)
    guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
    for vdev in ("xvda", "xvdb"):
        host.attach_disk(guest, vdev, MemoryStore(1 << 19))
    host.attach_nic(guest)
    sh(guest, "until [ -b /dev/xvda -a -b /dev/xvdb -a -e /sys/class/net/eth0 ]; do sleep 0.1; done")
    sh(guest, "ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0; ping -c 1 10.0.0.1")
    return guest


@pytest.fixture
def faults(host: Host) -> Iterator[Faults]:
    with Faults(host) as faults:
        yield faults


def sh(guest: Guest, command: str) -> str:
    result = guest.run(command, 120)
    assert result.status == 0, result.text
    return result.text


def row(guest: Guest, name: str) -> int:
    """What a guest's rows of a name have counted."""
    lines = [line.split() for line in guest.proc_interrupts().splitlines() if line.endswith(f" {name}")]
    assert lines
    return sum(int(line[1]) + int(line[2]) for line in lines)


def seconds(guest: Guest, command: str) -> float:
    """How long something takes by the guest's own clock."""
    text = sh(guest, f"time sh -c '{command} > /dev/null 2>&1'")
    match = re.search(r"real\t(\d+)m ([\d.]+)s", text)
    assert match, text
    return int(match[1]) * 60 + float(match[2])


def test_its_rows_and_devices(guest: Guest, faults: Faults) -> None:
    """What is derived of a real guest's channels is what its /proc/interrupts says."""
    derived = sorted(row for channel in guest.domain.evtchn for row in faults._names.rows(guest.domain, channel))
    table = [line.split()[-1] for line in guest.proc_interrupts().splitlines() if re.match(r" *\d+:", line)]
    ipis = ("resched", "callfunc", "callfuncsingle", "irqwork", "spinlock")  # of which Xen knows no more than that
    shown = [re.sub(rf"^({'|'.join(ipis)})(?=\d)", "ipi", name) for name in table]
    assert derived == sorted(shown)


def test_a_slow_disk(guest: Guest, faults: Faults) -> None:
    rule = faults.slow(300 * MS, device="vbd-51712")
    assert seconds(guest, READ.format("xvda")) >= 0.3
    fired = rule.fired
    assert fired >= 1
    sh(guest, READ.format("xvdb"))
    assert rule.fired == fired


def test_a_lost_event_stops_a_ring(guest: Guest, faults: Faults) -> None:
    """What blkfront wants to be told of (rsp_event) it has been told of, and won't be again: the next answers aren't
    notified either. The other CPU's ring goes on; an event for nothing, and all are there."""
    rule = faults.lose(domain=guest, irq="blkif", device="vbd-51712", count=1)
    one = "(taskset 1 dd if=/dev/xvda of=/dev/null bs=4k skip={0} count=1 iflag=direct 2>/dev/null; echo {1} >>/tmp/r)&"
    sh(guest, one.format(101, "first"))
    sh(guest, f"sleep 2; {one.format(202, 'second')} sleep 2; [ ! -e /tmp/r ]")
    assert (rule.fired, rule.seen) == (1, 1)
    sh(guest, "taskset 2 dd if=/dev/xvda of=/dev/null bs=4k skip=303 count=1 iflag=direct")
    faults.spurious(domain=guest, device="vbd-51712")
    assert sorted(sh(guest, "sleep 1; cat /tmp/r").split()) == ["first", "second"]


def test_a_storm_is_slowed_down(host: Host, guest: Guest, faults: Faults) -> None:
    """Of 2,000 spurious events a channel, most come while it is masked until its late EOI."""
    for direction, count in (("in", lambda: row(guest, "blkif")), ("out", lambda: _spurious(host))):
        before = count()
        with faults.storm(2000, interval=100_000, device="vbd-51712", direction=direction) as rule:  # type: ignore[arg-type]
            sh(guest, "sleep 1")
            assert rule.fired == 4000
        assert 2 < count() - before < 2000
    sh(guest, READ.format("xvda"))


def _spurious(host: Host) -> int:
    """/sys/devices/vbd-1-51712/xenbus/spurious_events in domain 0."""
    infos = [desc.chip_data for desc in host.dom0.irq.descs.values() if desc.actions]  # type: ignore[attr-defined]
    return sum(info.dev.spurious_events for info in infos if getattr(info, "dev", None) is not None)


def test_timers_that_are_wrong(host: Host, guest: Guest, faults: Faults) -> None:
    with faults.late(200 * MS, domain=guest) as late:
        sh(guest, "for i in 1 2 3; do sleep 0.1; done")
        begun = [firing for firing in faults.firings if firing.action == "delayed"]
        ended = [firing for firing in faults.firings if firing.action == "raised"]
        assert late.fired == len(begun) >= 3
        assert ended
        assert all(end.when >= start.when + 200 * MS for start, end in zip(begun, ended, strict=False))
    with faults.early(20 * MS, domain=guest) as early:
        assert seconds(guest, "sleep 0.5") >= 0.5
        assert early.fired >= 1


def test_upcalls_for_nothing(guest: Guest, faults: Faults) -> None:
    rule = faults.upcall(domain=guest, period=0.001, count=100)
    sh(guest, "sleep 1")
    assert rule.fired == 200
    sh(guest, READ.format("xvda"))


def test_a_vcpu_that_is_paused(host: Host, guest: Guest, faults: Faults) -> None:
    before = host.clock.now()
    faults.pause(2 * S, domain=guest, vcpu=1)
    sh(guest, "taskset 2 true")
    assert host.clock.now() - before >= 2 * S
    with faults.starve(0.2, domain=guest, vcpu=1) as rule:
        sh(guest, "taskset 2 sh -c 'i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done'")
        assert rule.fired > 1


def test_clock_step(host: Host, guest: Guest, faults: Faults) -> None:
    before = float(sh(guest, "cut -d' ' -f1 /proc/uptime"))
    faults.clock(5 * S)
    assert float(sh(guest, "cut -d' ' -f1 /proc/uptime")) >= before + 5


def test_events_that_come_twice_late_or_in_another_order(guest: Guest, faults: Faults) -> None:
    for text in ("duplicate domain=1", "duplicate 50us domain=1 direction=both", "reorder 3 domain=1 within=2ms"):
        with faults.rule(text) as rule:
            sh(guest, f"ping -c 3 -i 0.1 10.0.0.1; {READ.format('xvda')}")
            assert rule.fired > 5
    with faults.delay(50 * MS, device="vif-0") as rule:
        times = re.search(r"min/avg/max = ([\d.]+)/", sh(guest, "ping -c 3 -i 0.3 10.0.0.1"))
        assert times
        assert float(times[1]) >= 50
        assert rule.fired >= 6


def test_a_stuck_mask(host: Host, guest: Guest, faults: Faults) -> None:
    before = host.clock.now()
    faults.stuck_mask(irq="blkif", domain=guest, until=2)
    sh(guest, READ.format("xvda"))
    assert host.clock.now() - before >= 2 * S
    sh(guest, READ.format("xvda"))


STRESS = (
    "delay 300us jitter=3ms probability=0.3 domain=1 kind=interdomain", "duplicate probability=0.2 domain=1",
    "reorder 3 probability=0.1 within=1ms", "slow 2ms jitter=5ms probability=0.3", "late 3ms probability=0.1",
    "early 1ms probability=0.2", "pause 3ms period=70ms probability=0.5 domain=1 vcpu=1", "upcall period=30ms",
)  # fmt: skip


def _stress(host: Host, seed: int) -> list[tuple[int, str, str, dict[str, object]]]:
    with Faults(host, seed) as faults:
        for text in STRESS:
            faults.rule(text)
        sh(host.guests[0], "dd if=/dev/xvda of=/dev/null bs=4k count=50 iflag=direct; ping -c 3 -i 0.1 10.0.0.1")
        return [(firing.when, firing.rule, firing.action, firing.fields) for firing in faults.firings]


def test_the_same_seeds_make_the_same_firings(host: Host, guest: Guest) -> None:
    assert guest in host.guests
    futures = [host.fork(lambda host, seed=seed: _stress(host, seed)) for seed in (1, 1, 2)]  # type: ignore[misc]
    first, again, other = [future.result() for future in futures]
    assert {rule for _, rule, _, _ in first} == set(STRESS)
    assert again == first
    assert other != first


def test_an_error_of_the_disk(guest: Guest, faults: Faults) -> None:
    rule = faults.error(device="vbd-51712", count=1)
    assert "Input/output error" in sh(guest, READ.format("xvda"))
    assert "I/O error, dev xvda" in sh(guest, "dmesg | tail -2")
    assert "records out" in sh(guest, READ.format("xvda"))
    assert rule.fired == 1


def test_a_reloaded_backend(host: Host, guest: Guest, faults: Faults) -> None:
    rule = faults.restart("vbd", down=2 * S)
    before = host.clock.now()
    assert "records out" in sh(guest, "sleep 0.5; " + READ.format("xvda"))
    assert host.clock.now() - before >= 2 * S
    assert rule.fired == 1


def test_operations_that_fail(host: Host, guest: Guest, faults: Faults) -> None:
    compiler = "cat /sys/hypervisor/compilation/compiler"
    assert sh(guest, compiler)
    with faults.fail("xen_version", "EPERM", domain=guest) as rule:
        assert "Operation not permitted" in guest.run(f"{compiler} 2>&1").text
        assert rule.fired >= 1
    assert sh(guest, compiler)
    for rule_text in ("no-ports domain=1", "fail evtchn.alloc_unbound EUSERS domain=1"):
        made = faults.rule(rule_text)
        host.attach_disk(guest, "xvdc", MemoryStore(1024))
        sh(guest, "sleep 1; [ ! -b /dev/xvdc ]")
        assert made.fired >= 1
        made.remove()
        host.detach_disk(guest, "xvdc", force=True)
        host.settle()
    log = sh(guest, "dmesg")
    assert "vbd vbd-51744: 28 allocating event channel" in log
    assert "vbd vbd-51744: 87 allocating event channel" in log
    host.attach_disk(guest, "xvdc", MemoryStore(1024))
    sh(guest, "until [ -b /dev/xvdc ]; do sleep 0.1; done")


def test_hostile_backends(guest: Guest, faults: Faults) -> None:
    """Each device is given up for good, and nothing else is."""
    faults.hostile("id", device="vif-0", ring="tx", count=1)
    sh(guest, "ping -c 2 -W 1 10.0.0.1; dmesg | grep 'net eth0: Disabled for further use'")
    faults.hostile("id", device="vbd-51712", count=1)
    faults.hostile("index", device="vbd-51728", count=1)
    sh(guest, f"({READ.format('xvda')})& ({READ.format('xvdb')})& sleep 1; dmesg > /tmp/log")
    log = sh(guest, "cat /tmp/log")
    assert re.search(r"xvda: response has incorrect id", log)
    assert re.search(r"xvdb: illegal number of responses", log)
    assert log.count("disabled for further use") == 2
    assert sh(guest, "echo goes on") == "goes on\n"


def test_rules_of_the_command(kernel_cloud: KernelChoice, busybox: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """They are there before the guest is: a Linux that can't have FIFO goes without."""
    rule = "fail evtchn.init_control ENOSYS"
    status = run([
        "boot", str(kernel_cloud.path), "--fault", rule, "--fault", "upcall domain=1 after=1s", "--exec",
        "dmesg | grep -i ABI",
    ])  # fmt: skip
    out, err = capfd.readouterr()
    assert status == 0, err
    assert "Using 2-level ABI" in out
    assert f"pvirq: fault {rule}: fired 1 time\n" in err
    assert "pvirq: fault upcall domain=1 after=1s: fired " in err

"""Debian's own kernels, both flavours and both event-channel ABIs, from the first instruction to a working userland."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from pvirq import Guest, Host
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_IPI, ECS_RESERVED, ECS_VIRQ

pytestmark = pytest.mark.boot

MIB = 1 << 20
APPEND = "console=hvc0 earlyprintk=xen pvirq=agent"
# As a domU with one vCPU has them: no spinlock, for no other vCPU could hold a lock.
ROWS = [
    ("xen-percpu", "-virq", "timer0"),
    ("xen-percpu", "-ipi", "resched0"),
    ("xen-percpu", "-ipi", "callfunc0"),
    ("xen-percpu", "-ipi", "callfuncsingle0"),
    ("xen-percpu", "-ipi", "irqwork0"),
    ("xen-dyn", "-event", "xenbus"),
    ("xen-dyn-lateeoi", "-event", "hvc_console"),
]


@dataclass
class Linux:
    guest: Guest
    host: Host
    fifo: bool
    boot_log: str

    def sh(self, command: str, timeout: float = 120) -> str:
        """Run a command that must succeed."""
        result = self.guest.run(command, timeout)
        assert result.status == 0, result.text
        return result.text

    def uptime(self) -> float:
        return float(self.sh("cat /proc/uptime").split()[0])


@pytest.fixture(scope="module", params=["cloud", "cloud-2l", "generic"])
def linux(request: pytest.FixtureRequest, initrd: bytes) -> Iterator[Linux]:
    flavour, _, abi = request.param.partition("-")
    kernel = request.getfixturevalue(f"kernel_{flavour}")
    with Host(wallclock=1_700_000_000) as host:
        append = APPEND + (" xen.fifo_events=0" if abi else "")
        guest = host.boot(kernel.path, initrd=initrd, append=append)
        guest.await_agent()
        yield Linux(guest, host, not abi, guest.console.text())
        # The last test of all: its end.
        assert guest.poweroff() == "poweroff"
        assert guest.console.text().rstrip().endswith(("Power down", "reboot: System halted"))


def test_the_kernel_says_what_it_found(linux: Linux) -> None:
    log = linux.boot_log
    assert "Hypervisor detected: Xen PV" in log
    assert re.search(r"Xen version: 4\.17", log)
    assert ("Using FIFO-based ABI" in log) == linux.fifo
    assert ("Using 2-level ABI" in log) != linux.fifo
    assert linux.host.hypervisor.domains[linux.guest.domain.domid].evtchn.fifo == linux.fifo
    for bad in ("Oops", "BUG:", "WARNING:", "Call Trace", "unhandled", "soft lockup", "Spectre V2 : Vulnerable:"):
        assert bad not in log
    assert "clocksource: Switched to clocksource xen" in log


def test_interrupts(linux: Linux) -> None:
    rows = [line.split() for line in linux.guest.proc_interrupts().splitlines()[1:]]
    numbered = [row for row in rows if row[0][:-1].isdigit()]
    # A kernel on two-level channels has the debug key, too (xen_smp_intr_init).
    rows_wanted = ROWS if linux.fifo else [*ROWS[:3], ("xen-percpu", "-virq", "debug0"), *ROWS[3:]]
    assert [tuple(row[2:]) for row in numbered] == rows_wanted
    assert [int(row[0][:-1]) for row in numbered] == list(range(len(rows_wanted)))
    counts = {row[-1]: int(row[1]) for row in numbered}
    assert min(counts[name] for name in ("timer0", "xenbus", "hvc_console")) > 0
    assert [row for row in rows if row[0] == "ERR:"] == [["ERR:", "0"]]


def test_ports(linux: Linux) -> None:
    """What the guest's rows say, the hypervisor says of its ports."""
    states = [channel.state for channel in linux.guest.domain.evtchn.channels if channel.state > ECS_RESERVED]
    virqs = 1 if linux.fifo else 2
    wanted = [ECS_VIRQ] * virqs + [ECS_IPI] * 4 + [ECS_INTERDOMAIN] * 2
    assert sorted(states) == sorted(wanted)


def test_processes_pipes_and_signals(linux: Linux) -> None:
    assert linux.sh("for i in 1 2 3; do (echo $i; exec cat /dev/null) & done; wait; echo done").split()[-1] == "done"
    assert linux.sh("seq 1 1000 | grep 7 | sort -rn | head -1 | tr -d '\\n'") == "997"
    assert linux.sh("seq 1 100000 | awk '{s += $1} END {print s}'") == "5000050000\n"
    script = """
        trap 'echo got usr1; got=1' USR1
        sh -c "sleep 1; kill -USR1 $$" &
        while [ -z "$got" ]; do sleep 0.1; done
        sleep 1000 & victim=$!
        kill -TERM $victim; wait $victim; echo status $?
        sh -c 'kill -SEGV $$'; echo status $?
    """
    lines = [line for line in linux.sh(script).splitlines() if line.startswith(("got", "status"))]
    assert lines == ["got usr1", "status 143", "status 139"]
    assert linux.sh("i=0; while [ $i -lt 100 ]; do /bin/sh -c : || exit 1; i=$((i + 1)); done; echo $i") == "100\n"


def test_sixteen_megabytes_through_gzip(linux: Linux) -> None:
    megabyte = b"".join(b"%d\n" % i for i in range(1, 200_000))[:MIB]
    expected = hashlib.md5(megabyte * 16, usedforsecurity=False).hexdigest()
    linux.sh(f"seq 1 200000 2>/dev/null | head -c {MIB} > /tmp/one; set /tmp/one /tmp/one /tmp/one /tmp/one; "
             "cat $@ $@ $@ $@ > /tmp/data")  # fmt: skip
    assert linux.sh("md5sum < /tmp/data").split()[0] == expected
    assert linux.sh("gzip -c /tmp/data > /tmp/data.gz; gunzip -c /tmp/data.gz | md5sum").split()[0] == expected
    assert int(linux.sh("stat -c %s /tmp/data.gz")) < 8 * MIB
    assert linux.sh("rm -f /tmp/*; ls /tmp") == ""


def test_files(linux: Linux) -> None:
    linux.sh("mkdir -p /run/t && mount -t tmpfs none /run/t")
    linux.sh("cd /run/t; for i in $(seq 1 50); do echo $i > f$i; done; mkdir d; mv f7 d/; ln -s d/f7 link; ln f1 hard")
    assert linux.sh("cat /run/t/link /run/t/hard; ls /run/t | wc -l") == "7\n1\n52\n"
    assert linux.sh("cd /run/t; tar c . | tar t | wc -l") == "54\n"
    linux.sh("umount /run/t")
    assert linux.guest.run("cat /run/t/link").status != 0


def test_sleep_is_as_long_as_it_says(linux: Linux) -> None:
    for seconds in (0.5, 3, 60):
        before, began = linux.uptime(), time.perf_counter()
        linux.sh(f"sleep {seconds}")
        passed, real = linux.uptime() - before, time.perf_counter() - began
        assert seconds <= passed + 0.01
        assert passed < seconds + real + 0.05


def test_the_memory_is_there(linux: Linux) -> None:
    total = int(re.findall(r"MemTotal: +(\d+) kB", linux.sh("cat /proc/meminfo"))[0])
    assert 180 << 10 < total <= 256 << 10
    linux.sh("dd if=/dev/zero of=/tmp/fill bs=1M count=80 && rm /tmp/fill")
    assert "xenbus" in linux.sh("ls /sys/bus") or "xen" in linux.sh("ls /sys/bus")
    assert linux.sh("cat /sys/hypervisor/type /sys/hypervisor/version/major").split() == ["xen", "4"]
    assert linux.sh("cat /sys/hypervisor/uuid").strip() == linux.guest.uuid


def test_the_kernel_is_still_content(linux: Linux) -> None:
    log = linux.sh("dmesg")
    for bad in ("Oops", "BUG:", "WARNING:", "Call Trace", "detected stall", "soft lockup"):
        assert bad not in log

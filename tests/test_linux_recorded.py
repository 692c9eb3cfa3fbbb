"""A real 2-vCPU guest shows what it showed on a real Xen host, step by step (tests/data/linux-2vcpu).

Compared are both kernels' /proc/interrupts, the guest's /proc/irq, lsevtchn of both domains, Xen's 'e' dump and the
whole of xenstore, without the counts and what hangs on the run: pages, uuid, times, names of files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.linux.evtchn_dev import EvtchnUser
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

DATA = Path(__file__).parent / "data" / "linux-2vcpu"
DISK_SECTORS = 131072
FRONTENDS = ["xen-blkfront", "xen-netfront"]
IRQFILES = """
for i in /proc/irq/[0-9]*; do
  n=${i##*/}; s=/sys/kernel/irq/$n
  echo "irq $n smp_affinity=$(cat $i/smp_affinity) list=$(cat $i/smp_affinity_list)" \
    "eff=$(cat $i/effective_affinity_list) chip=$(cat $s/chip_name) hwirq=$(cat $s/hwirq)" \
    "type=$(cat $s/type) name=$(cat $s/name) actions=$(cat $s/actions)"
done
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host(hardware="recorded") as host:
        yield host


@pytest.fixture(scope="module")
def evbench(host: Host) -> EvtchnUser:
    """A program of the recording's domain 0, which had a port for the guest from before its start."""
    return host.dom0.evtchn_user("evbench")


@pytest.fixture(scope="module")
def guest(host: Host, evbench: EvtchnUser, kernel_cloud: KernelChoice, busybox: Path) -> Guest:
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, FRONTENDS)
    files: dict[str, bytes | Path] = {f"/drivers/{i}-{name}.ko": text for i, (name, text) in enumerate(drivers)}
    evbench.bind_unbound(1)
    host.add_bridge("xenbr0")
    host.backends.devices.add("/dev/loop0", MemoryStore(DISK_SECTORS))
    guest = host.boot(
        kernel_cloud.path, initrd=default_initrd(busybox, files), append="console=hvc0 pvirq=agent", vcpus=2,
        memory=128 << 20, name="u2",
    )  # fmt: skip
    host.attach_disk(guest, "xvda", "/dev/loop0")
    host.attach_nic(guest, mac="00:16:3e:00:00:01")
    guest.await_agent()
    return guest


def sh(guest: Guest, command: str) -> str:
    result = guest.run(command, 120)
    assert result.status == 0, result.text
    return result.text


# -- what is compared --------------------------------------------------------------------------------------------------


def rows(text: str) -> list[tuple[str, int, str]]:
    """(label, number of columns, chip and names) of each line of /proc/interrupts.

    A row of one CPU's alone has counted nothing on another.
    """
    lines = text.splitlines()
    found = [("", len(lines[0].split()), lines[0].strip())]
    for line in lines[1:]:
        label, rest = line.split(":", 1)
        match = re.fullmatch(r"((?: +\d+)+) *(.*)", rest)
        assert match, line
        counts = [int(count) for count in match[1].split()]
        if "xen-percpu" in rest:
            assert sum(map(bool, counts)) <= 1, line
            if len(counts) == found[0][1] and sum(counts):
                assert counts[int(rest.rstrip()[-1])], line
        found.append((label.strip(), len(counts), match[2]))
    return found


def ports(text: str) -> str:
    return text


def dump(text: str) -> str:
    """The 'e' dump. A masked IPI (a spinlock's, taken by polling) may have been sent, and a timer just be due."""
    text = re.sub(r"\[\d/1/", "[x/1/", text)
    return re.sub(r"\[\d/0/  ..  \](?=: s=5 .* v=0$)", "[x/0/  x   ]", text, flags=re.MULTILINE)


def tree(text: str) -> list[str]:
    """xenstore-ls -f, in order of the paths, with what hangs on the run taken out."""
    lines = []
    for line in sorted(text.splitlines()):
        line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", line)
        line = re.sub(r'((?:ring-ref|/event-channel|start_time|/tty|image/\w+) = )".*"', r"\1*", line)
        line = re.sub(r'(/domain/0/memory/[\w-]+ = )".*"', r"\1*", line)
        lines.append(line)
    return lines


def irqfiles(text: str) -> list[str]:
    return sorted(re.sub(r" per_cpu=.*", "", line) for line in text.splitlines())


def recorded(name: str) -> str:
    return (DATA / name).read_text()


def assert_recorded(host: Host, guest: Guest | None, stage: str) -> None:
    """All that was recorded of a stage; `guest` None: it has ended."""
    assert host.settle(2_000_000_000)
    if guest is not None:
        mine = guest.proc_interrupts()
        assert host.settle(2_000_000_000)
        assert rows(mine) == rows(recorded(f"domU.{stage}.interrupts"))
        if (DATA / f"{stage}.lsevtchn-domU").exists():
            assert host.lsevtchn(1) == recorded(f"{stage}.lsevtchn-domU")
    for name, text, form in (
        (f"{stage}.dom0.interrupts", host.dom0.proc_interrupts(), rows),
        (f"{stage}.lsevtchn-0", host.lsevtchn(0), ports),
        (f"{stage}.debug-e", host.debug_key("e"), dump),
        (f"{stage}.xenstore", "\n".join(host.store.dump()), tree),
    ):
        if (DATA / name).exists():
            assert form(text) == form(recorded(name)), name


# -- the steps, in their order -----------------------------------------------------------------------------------------


def test_before_its_drivers(host: Host, guest: Guest) -> None:
    assert_recorded(host, guest, "1-nodrivers")


def test_with_its_drivers(host: Host, guest: Guest) -> None:
    sh(guest, "for i in /drivers/*; do insmod $i; done; until [ -b /dev/xvda ]; do sleep 0.1; done")
    sh(guest, "until [ -d /sys/class/net/eth0 ]; do sleep 0.1; done")
    assert_recorded(host, guest, "2-drivers")
    assert irqfiles(sh(guest, IRQFILES)) == irqfiles(recorded("domU.2-drivers.irqfiles"))


def test_its_devices_in_sysfs(guest: Guest) -> None:
    names = "event_channels jiffies_eoi_delayed spurious_events spurious_threshold"
    for line in recorded("domU.2-sysfs").splitlines():
        if " = " in line:
            path, value = line.split(" = ")
            assert path.rpartition("/")[2] in names
            assert sh(guest, f"cat {path}").strip() == value, path


def test_affinity_moved(host: Host, guest: Guest) -> None:
    """Each dynamic row to CPU 0, then to CPU 1: it counts there, and Xen notifies that vCPU."""
    for cpu in (0, 1):
        sh(guest, f"for i in 14 15 16 17 18 19; do echo {1 << cpu} > /proc/irq/$i/smp_affinity; done")
        before = counts(guest.proc_interrupts(), 14, 20)
        sh(guest, "for i in 1 2 3 4; do dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; done")
        assert_recorded(host, guest, f"8-aff-cpu{cpu}")
        after = counts(guest.proc_interrupts(), 14, 20)
        grown = [new - old for new, old in zip(after, before, strict=True)]
        assert grown[cpu] >= 4
        assert grown[1 - cpu] == 0
        assert {int(vcpu) for vcpu in re.findall(r"(?m)^ +1[5-9]: VCPU (\d)", host.lsevtchn(1))} == {cpu}


def counts(table: str, first: int, end: int) -> list[int]:
    """Sums of some rows, by CPU."""
    found = [re.search(rf"(?m)^ *{irq}: +(\d+) +(\d+) ", table) for irq in range(first, end)]
    return [sum(int(match[cpu]) for match in found if match) for cpu in (1, 2)]


def test_a_cpu_goes_and_comes(host: Host, guest: Guest) -> None:
    sh(guest, "for i in 14 15 16 17 18 19; do echo 3 > /proc/irq/$i/smp_affinity; done")
    sh(guest, "echo 0 > /sys/devices/system/cpu/cpu1/online")
    assert_recorded(host, guest, "10-cpu1-off")
    sh(guest, "echo 1 > /sys/devices/system/cpu/cpu1/online")
    assert_recorded(host, guest, "11-cpu1-on")


def test_domain_0_after_it(host: Host, guest: Guest, evbench: EvtchnUser) -> None:
    assert guest.poweroff() == "poweroff"
    host.destroy(guest)
    evbench.close()
    assert_recorded(host, None, "7-after")

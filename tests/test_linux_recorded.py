"""Real guests show what they showed on a real Xen host, step by step (tests/data/linux-2vcpu, linux-recorded).

Compared are both kernels' /proc/interrupts, both /proc/irq, lsevtchn of both domains, Xen's 'e' dump and the whole of
xenstore, without the counts and what hangs on the run: pages, uuid, times, names of files.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.hardware.platform import MACHINES, DeviceTable
from pvirq.linux.evtchn_dev import EvtchnUser
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from test_proc_irq import irqfiles as modelled_irqfiles

pytestmark = pytest.mark.boot

DATA = Path(__file__).parent / "data"
DISK_SECTORS = 131072
FRONTENDS = ["xen-blkfront", "xen-netfront"]
AT_REST_NS = 2_000_000_000
IRQFILES = """
for i in /proc/irq/[0-9]*; do
  n=${i##*/}; s=/sys/kernel/irq/$n
  echo "irq $n smp_affinity=$(cat $i/smp_affinity) list=$(cat $i/smp_affinity_list)" \
    "eff=$(cat $i/effective_affinity_list) chip=$(cat $s/chip_name) hwirq=$(cat $s/hwirq)" \
    "type=$(cat $s/type) name=$(cat $s/name) actions=$(cat $s/actions)"
done
"""
DISKLESS: DeviceTable = tuple(device for device in MACHINES["recorded"].devices if device["type"] != "virtio-blk")


@dataclass
class Record:
    """One recording: where it is, and what ran then. `evbench`: a program in domain 0 had a port for the guest."""

    directory: str
    vcpus: int
    hardware: str | DeviceTable = DISKLESS
    append: str = ""
    evbench: bool = False
    name: str = "u"

    def text(self, file: str) -> str | None:
        """A file of it; None: that wasn't recorded."""
        path = DATA / self.directory / file
        return path.read_text() if path.exists() else None

    def has(self, stage: str) -> bool:
        return self.text(f"domU.{stage}.interrupts") is not None


RECORDS = [
    Record("linux-2vcpu", 2, "recorded", evbench=True, name="u2"),
    Record("linux-recorded/1vcpu", 1),
    Record("linux-recorded/2vcpu", 2),
    Record("linux-recorded/4vcpu", 4),
    Record("linux-recorded/2vcpu-2l", 2, append="xen.fifo_events=0"),
]


class Lab:
    """A host and its guest, and the recording that they are compared with."""

    def __init__(self, record: Record, kernel: KernelChoice, busybox: Path) -> None:
        assert kernel.modules_dir is not None
        drivers = modules.read_modules(kernel.modules_dir, FRONTENDS)
        files: dict[str, bytes | Path] = {f"/drivers/{i}-{name}.ko": text for i, (name, text) in enumerate(drivers)}
        self.record = record
        self.host = host = Host(hardware=record.hardware)
        self.evbench: EvtchnUser | None = None
        if record.evbench:
            self.evbench = host.dom0.evtchn_user("evbench")
            self.evbench.bind_unbound(1)
        host.add_bridge("xenbr0")
        host.backends.devices.add("/dev/loop0", MemoryStore(DISK_SECTORS))
        self.guest: Guest | None = host.boot(
            kernel.path, initrd=default_initrd(busybox, files), append=f"console=hvc0 pvirq=agent {record.append}",
            vcpus=record.vcpus, memory=128 << 20, name=record.name,
        )  # fmt: skip
        host.attach_disk(self.guest, "xvda", "/dev/loop0")
        host.attach_nic(self.guest, mac="00:16:3e:00:00:01")
        self.guest.await_agent()

    def sh(self, command: str) -> str:
        assert self.guest is not None
        result = self.guest.run(command, 120)
        assert result.status == 0, result.text
        return result.text

    def assert_recorded(self, stage: str) -> None:
        """All that was recorded of a stage."""
        host, text = self.host, self.record.text
        assert host.settle(AT_REST_NS)
        mine: list[tuple[str, str]] = []
        if self.guest is not None:
            mine.append((f"domU.{stage}.interrupts", self.guest.proc_interrupts()))
            if text(f"domU.{stage}.irqfiles") is not None:
                mine.append((f"domU.{stage}.irqfiles", self.sh(IRQFILES)))
            assert host.settle(AT_REST_NS)
            mine.append((f"{stage}.lsevtchn-domU", host.lsevtchn(self.guest.domain.domid)))
        mine += [
            (f"{stage}.dom0.interrupts", host.dom0.proc_interrupts()),
            (f"{stage}.lsevtchn-0", host.lsevtchn(0)),
            (f"{stage}.debug-e", host.debug_key("e")),
            (f"{stage}.xenstore", "\n".join(host.store.dump())),
        ]
        compared = 0
        for name, shown in mine:
            recorded = text(name)
            if recorded is not None:
                form = FORMS[name.rpartition(".")[2]]
                assert form(shown) == form(recorded), name
                compared += 1
        assert compared
        if (recorded := text(f"{stage}.dom0.irqfiles")) is not None:
            self._assert_irqfiles_of_dom0(recorded)

    def _assert_irqfiles_of_dom0(self, recorded: str) -> None:
        mine = modelled_irqfiles(self.host.dom0)
        for line in recorded.splitlines():
            irq, rest = line.removeprefix("irq ").split(" ", 1)
            fields = dict(re.findall(r"(\w+)=(\S*)", rest))
            del fields["per_cpu"]
            assert mine.pop(int(irq)) == fields, irq
        assert not mine


@pytest.fixture(scope="module", params=RECORDS, ids=lambda record: record.directory)
def lab(request: pytest.FixtureRequest, kernel_cloud: KernelChoice, busybox: Path) -> Iterator[Lab]:
    lab = Lab(request.param, kernel_cloud, busybox)
    yield lab
    lab.host.close()


@pytest.fixture(scope="module")
def managed(kernel_cloud: KernelChoice, busybox: Path) -> Iterator[Lab]:
    """For what the toolstack does to a guest that runs."""
    lab = Lab(Record("linux-recorded/2vcpu-toolstack", 2), kernel_cloud, busybox)
    yield lab
    lab.host.close()


# -- what is compared --------------------------------------------------------------------------------------------------


def rows(text: str) -> list[tuple[str, int, str]]:
    """(label, number of columns, chip and names) of each line of /proc/interrupts.

    A row of one CPU's alone has counted nothing on another.
    """
    lines = text.splitlines()
    cpus = lines[0].split()
    found = [("", len(cpus), lines[0].strip())]
    for line in lines[1:]:
        label, rest = line.split(":", 1)
        match = re.fullmatch(r"((?: +\d+)+) *(.*)", rest)
        assert match, line
        counts = [int(count) for count in match[1].split()]
        if "xen-percpu" in rest:
            mine = "CPU" + re.sub(r".*\D", "", rest.rstrip())
            assert all(cpu == mine for cpu, count in zip(cpus, counts, strict=True) if count), line
        found.append((label.strip(), len(counts), match[2]))
    return found


def dump(text: str) -> str:
    """The 'e' dump. A masked IPI (a spinlock's, taken by polling) may have been sent, and a timer just be due.

    As may an IPI of domain 0's, which was at work when it asked, and its console, by which the recorder did.
    """
    text = re.sub(r"\[\d/1/", "[x/1/", text)
    return re.sub(r"\[\d/0/  ..  \](?=: s=(?:6 |5 .* v=[02]$))", "[x/0/  x   ]", text, flags=re.MULTILINE)


def tree(text: str) -> list[str]:
    """xenstore-ls -f, by paths, without what hangs on the run; domain 0's memory does on its balloon."""
    lines = []
    for line in sorted(text.splitlines()):
        if line.startswith("/local/domain/0/memory"):
            continue
        line = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "UUID", line)
        line = re.sub(r"00:16:3e(:[0-9a-f]{2}){3}", "MAC", line)
        lines.append(re.sub(r'((?:ring-ref|/event-channel|start_time|/tty|image/\w+) = )".*"', r"\1*", line))
    return lines


def irqfiles(text: str) -> list[str]:
    return sorted(re.sub(r" per_cpu=.*", "", line) for line in text.splitlines())


FORMS = {
    "interrupts": rows, "irqfiles": irqfiles, "lsevtchn-domU": str, "lsevtchn-0": str, "debug-e": dump,
    "xenstore": tree,
}  # fmt: skip

# -- the steps, in their order -----------------------------------------------------------------------------------------


def test_before_its_drivers(lab: Lab) -> None:
    lab.assert_recorded("1-nodrivers")


def test_with_its_drivers(lab: Lab) -> None:
    lab.sh("for i in /drivers/*; do insmod $i; done; until [ -b /dev/xvda ]; do sleep 0.1; done")
    lab.sh("until [ -d /sys/class/net/eth0 ]; do sleep 0.1; done")
    lab.assert_recorded("2-drivers")


def test_its_devices_in_sysfs(lab: Lab) -> None:
    names = "event_channels jiffies_eoi_delayed spurious_events spurious_threshold"
    for line in (DATA / "linux-2vcpu" / "domU.2-sysfs").read_text().splitlines():
        if " = " in line:
            path, value = line.split(" = ")
            assert path.rpartition("/")[2] in names
            assert lab.sh(f"cat {path}").strip() == value, path


def test_affinity_moved(lab: Lab) -> None:
    """Each dynamic row to CPU 0, then to CPU 1: it counts there, and Xen notifies that vCPU."""
    if not lab.record.has("8-aff-cpu0"):
        pytest.skip("not recorded")
    table = lab.sh("cat /proc/interrupts")
    moved = re.findall(r"(?m)^ *(\d+):.* (?:xenbus|blkif|vif0-\S+)$", table)
    if lab.record.evbench:
        del moved[0]  # there xenbus stayed where it was
    assert len(moved) >= 6
    for cpu in (0, 1):
        lab.sh(f"for i in {' '.join(moved)}; do echo {1 << cpu} > /proc/irq/$i/smp_affinity; done")
        before = counts(lab.sh("cat /proc/interrupts"), moved[-6:])
        lab.sh("for i in 1 2 3 4; do dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null; done")
        after = counts(lab.sh("cat /proc/interrupts"), moved[-6:])
        lab.assert_recorded(f"8-aff-cpu{cpu}")
        grown = [new - old for new, old in zip(after, before, strict=True)]
        assert grown[cpu] >= 4
        assert grown[1 - cpu] == 0


def counts(table: str, irqs: list[str]) -> list[int]:
    """Sums of some rows, by CPU."""
    found = [re.search(rf"(?m)^ *{irq}: +(\d+) +(\d+) ", table) for irq in irqs]
    return [sum(int(match[cpu]) for match in found if match) for cpu in (1, 2)]


def test_a_cpu_goes_and_comes(lab: Lab) -> None:
    if not lab.record.has("10-cpu1-off"):
        pytest.skip("not recorded")
    if lab.record.evbench:
        lab.sh("for i in 14 15 16 17 18 19; do echo 3 > /proc/irq/$i/smp_affinity; done")
    lab.sh("echo 0 > /sys/devices/system/cpu/cpu1/online")
    lab.assert_recorded("10-cpu1-off")
    lab.sh("echo 1 > /sys/devices/system/cpu/cpu1/online")
    lab.assert_recorded("11-cpu1-on")


def test_domain_0_after_it(lab: Lab) -> None:
    guest, lab.guest = lab.guest, None
    assert guest is not None
    assert guest.poweroff() == "poweroff"
    lab.host.destroy(guest)
    if lab.evbench is not None:
        lab.evbench.close()
    lab.assert_recorded("7-after")


# -- what xl does to a guest, in the recording's order -----------------------------------------------------------------


def test_up(managed: Lab) -> None:
    # The recorded guest has nobody who brings a vCPU up that comes back.
    managed.sh("for p in /proc/[0-9]*; do ! grep -q '[u]event' $p/cmdline || kill ${p#/proc/}; done")
    managed.sh("for i in /drivers/*; do insmod $i; done; until [ -b /dev/xvda ]; do sleep 0.1; done")
    managed.sh("until [ -d /sys/class/net/eth0 ]; do sleep 0.1; done; ip link set eth0 up; sleep 3")
    managed.assert_recorded("3-up")


def test_vcpu_set(managed: Lab) -> None:
    assert managed.guest is not None
    for count in (1, 2):
        managed.host.set_vcpus(managed.guest, count)
        managed.sh("sleep 3")
        managed.assert_recorded(f"{11 + count}-vcpu-set-{count}")


def test_block_attach_and_detach(managed: Lab) -> None:
    host, guest = managed.host, managed.guest
    assert guest is not None
    host.backends.devices.add("/dev/loop1", MemoryStore(DISK_SECTORS))
    host.attach_disk(guest, "xvdb", "/dev/loop1")
    managed.sh("until [ -b /dev/xvdb ]; do sleep 0.1; done; sleep 2")
    managed.assert_recorded("14-block-attach")
    host.detach_disk(guest, "xvdb")
    managed.sh("sleep 3")
    managed.assert_recorded("15-block-detach")


def test_network_attach_and_detach(managed: Lab) -> None:
    host, guest = managed.host, managed.guest
    assert guest is not None
    host.attach_nic(guest, devid=1, mac="00:16:3e:00:00:02")
    managed.sh("until [ -d /sys/class/net/eth1 ]; do sleep 0.1; done; sleep 2")
    managed.assert_recorded("16-network-attach")
    host.detach_nic(guest, 1)
    managed.sh("sleep 3")
    managed.assert_recorded("17-network-detach")


def test_saved_and_restored(managed: Lab) -> None:
    host, guest = managed.host, managed.guest
    assert guest is not None
    file = io.BytesIO()
    host.save(guest, file)
    managed.guest = None
    managed.assert_recorded("19-saved")
    file.seek(0)
    managed.guest = host.restore(file)
    assert managed.guest.domain.domid == 2
    managed.sh("sleep 3")
    managed.assert_recorded("20-restored")
    managed.sh("dd if=/dev/xvda of=/dev/null bs=4k count=200 iflag=direct 2>/dev/null")
    managed.assert_recorded("21-restored-used")


def test_after_it(managed: Lab) -> None:
    test_domain_0_after_it(managed)

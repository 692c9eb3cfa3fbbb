"""What real Xen and Linux print on both sides, stage by stage, kept in files that pvirq can be held against.

    python -m benchmarks.xen.records DIRECTORY [CONFIGURATION ...]

One subdirectory for each configuration of CONFIGURATIONS, with files N-STAGE.WHAT of domain 0 and domU.N-STAGE.WHAT of
the guest; README in it has the steps in their order. A subdirectory is there when it is complete.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.xen.machine import Config, RealHost, RealXenError, missing
from pvirq.toolstack import kernels, modules
from pvirq.toolstack.initrd import default_initrd

LSEVTCHN = "/usr/lib/xen-4.17/bin/lsevtchn"
DRIVERS = ("xen_blkfront", "xen_netfront")
# A fork costs some 20 ms here, so it does with builtins.
IRQFILES = b"""#!/pvirq/busybox sh
# One line for each IRQ: what /proc/irq and /sys/kernel/irq say of it.
field() {
	value=
	{ read -r value < "$2"; } 2>/dev/null
	line="$line $1=$value"
}
for irq in /sys/kernel/irq/*; do
	n=${irq##*/}
	p=/proc/irq/$n
	[ -d "$p" ] || continue
	line="irq $n"
	field smp_affinity $p/smp_affinity
	field list $p/smp_affinity_list
	field eff $p/effective_affinity_list
	field chip $irq/chip_name
	field hwirq $irq/hwirq
	field type $irq/type
	field name $irq/name
	field actions $irq/actions
	field per_cpu $irq/per_cpu_count
	echo "$line"
done
"""
XENBUS_SYSFS = "grep -s '' /sys/devices/v*-*/xenbus/* | sed 's/:/ = /'"
SYSFS = f"{XENBUS_SYSFS}; find /sys/bus/xen | sort; grep -rs '' /sys/hypervisor | sort | sed 's/:/ = /'"
READS = "dd if=/dev/xvda of=/dev/null bs=4k count=200 iflag=direct 2>&1"


@dataclass
class Recorder:
    """Writes files into `directory` and remembers the steps."""

    host: RealHost
    directory: Path
    steps: list[str] = field(default_factory=list)

    def step(self, text: str) -> None:
        self.host.report(text.split("\n", maxsplit=1)[0])
        self.steps.append(text)

    def write(self, name: str, text: str) -> None:
        (self.directory / name).write_text(text if text.endswith("\n") or not text else text + "\n")
        self.steps.append(f"    -> {name}")

    def dom0(self, stage: str, command: str, what: str) -> None:
        """Keep what a command in domain 0 prints; its status doesn't matter."""
        self.write(f"{stage}.{what}", self.host.run(command, check=False))

    def domu(self, stage: str, command: str, what: str) -> str:
        text = self.host.guest(command, check=False)
        self.write(f"domU.{stage}.{what}", text)
        return text

    def dom0_interrupts(self, stage: str) -> None:
        self.dom0(stage, "cat /proc/interrupts", "dom0.interrupts")

    def dom0_side(self, stage: str, domid: int | None) -> None:
        """Interrupts, channels, debug keys and xenstore of domain 0."""
        self.dom0_interrupts(stage)
        self.dom0(stage, f"{LSEVTCHN} 0", "lsevtchn-0")
        if domid is not None:
            self.dom0(stage, f"{LSEVTCHN} {domid}", "lsevtchn-domU")
        self.write(f"{stage}.debug-e", self.host.debug_key("e"))
        self.dom0(stage, "xenstore-ls -f", "xenstore")

    def both(self, stage: str, domid: int = 1) -> None:
        """The guest's interrupts and IRQ files, and domain 0's side."""
        self.domu(stage, "cat /proc/interrupts", "interrupts")
        self.domu(stage, "/lab/irqfiles", "irqfiles")
        self.dom0_side(stage, domid)
        self.dom0(stage, "/lab/irqfiles", "dom0.irqfiles")


def settle(host: RealHost, seconds: int = 2) -> None:
    host.run(f"sleep {seconds}")


def attach(host: RealHost, command: str) -> None:
    """libxl gives a hotplug script 10 s, which on a busy machine are not always enough: it undoes all then."""
    host.run(f"{command} || {{ sleep 5; {command}; }} || {{ sleep 5; {command}; }}")


def begin(rec: Recorder, config: Config) -> None:
    """Stages 0 to 4: before, the guest without drivers, with drivers, interface up, after reads and pings."""
    host = rec.host
    rec.step("domain 0 booted, xenstored, xen-init-dom0, xenconsoled started, bridge xenbr0 (10.0.0.1/24), losetup")
    rec.dom0_side("0-before", None)
    rec.write("0-before.debug-i", host.debug_key("i"))
    rec.dom0("0-before", "/lab/irqfiles", "dom0.irqfiles")
    rec.step(f"xl create of:\n{config.text()}; agent in the guest takes commands")
    host.create(config)
    host.guest("true")
    settle(host)
    rec.both("1-nodrivers")
    rec.step("guest: insmod xen-blkfront.ko, xen-netfront.ko; /dev/xvda and eth0 are there; 2 s")
    for name in DRIVERS:
        host.guest(f"insmod /lab/{name}.ko")
    host.guest("until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
    settle(host)
    rec.both("2-drivers")
    rec.domu("2-drivers", SYSFS, "sysfs")
    rec.domu("2-drivers", "cat /proc/cmdline", "cmdline")
    rec.domu("2-drivers", "cat /proc/cpuinfo", "cpuinfo")
    rec.domu("2-drivers", "dmesg", "dmesg")
    rec.dom0("2-drivers", XENBUS_SYSFS, "dom0.sysfs")
    rec.dom0("2-drivers", "xl list; xl vcpu-list", "xl-list")
    rec.dom0("2-drivers", "xl list -l", "xl-list-long")
    rec.dom0("2-drivers", "xl info", "xl-info")
    rec.dom0("2-drivers", "xl block-list u; xl network-list u", "xl-devices")
    rec.write("2-drivers.debug-i", host.debug_key("i"))
    rec.write("2-drivers.debug-g", host.debug_key("g"))
    rec.step("guest: ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0; 3 s")
    host.guest("ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0")
    settle(host, 3)
    rec.both("3-up")
    rec.step(f"guest: {READS}; ping -c 10 10.0.0.1; domain 0: ping -c 10 10.0.0.2")
    rec.domu("4-after-ping", f"{READS}; ping -c 10 -i 0.2 10.0.0.1", "output")
    rec.dom0("4-after-ping", "ping -c 10 -i 0.2 10.0.0.2", "dom0.output")
    rec.both("4-after-ping")
    rec.dom0("4-after-ping", XENBUS_SYSFS, "dom0.sysfs")
    rec.dom0("4-after-ping", "cat /var/log/xen/xl-u.log; cat /var/log/xen/xen-hotplug.log", "logs")


def affinity(rec: Recorder) -> None:
    """Stage 8: the devices' and xenbus's IRQs to vCPU 0, then 1."""
    table = rec.host.guest("cat /proc/interrupts")
    irqs = re.findall(r"^ *(\d+):.* (?:blkif|vif0-\S+|xenbus)$", table, re.M)
    for cpu in (0, 1):
        echo = "; ".join(f"echo {1 << cpu} > /proc/irq/{irq}/smp_affinity" for irq in irqs)
        rec.step(f"guest: {echo}; then {READS}; ping -c 10 10.0.0.1")
        rec.host.guest(echo)
        rec.domu(f"8-aff-cpu{cpu}", "/lab/irqfiles", "irqfiles-before-reads")
        rec.host.guest(f"{READS}; ping -c 10 -i 0.2 10.0.0.1")
        rec.both(f"8-aff-cpu{cpu}")


def hotplug(rec: Recorder) -> None:
    """Stages 10 and 11: vCPU 1 off and on again, by the guest itself."""
    for stage, value in (("10-cpu1-off", 0), ("11-cpu1-on", 1)):
        rec.step(f"guest: echo {value} > /sys/devices/system/cpu/cpu1/online; 2 s")
        rec.host.guest(f"echo {value} > /sys/devices/system/cpu/cpu1/online")
        settle(rec.host)
        rec.both(stage)
        rec.dom0(stage, "xl vcpu-list", "xl-vcpu-list")


def end(rec: Recorder) -> None:
    """Stage 7: after the guest's end."""
    rec.domu("6-last", "dmesg | tail -n 40", "dmesg-tail")
    rec.step("guest: poweroff -f; xl's daemon has destroyed it; 3 s")
    rec.host.poweroff()
    settle(rec.host, 3)
    rec.dom0_side("7-after", None)
    rec.dom0("7-after", "/lab/irqfiles", "dom0.irqfiles")


def ordinary(rec: Recorder, config: Config) -> None:
    begin(rec, config)
    if config.vcpus > 1:
        affinity(rec)
        hotplug(rec)
    end(rec)


def toolstack(rec: Recorder, config: Config) -> None:
    """What xl does to a running guest: vcpu-set, attaching and detaching a disk and a NIC, pause, save, restore."""
    host = rec.host
    rec.step(f"xl create of:\n{config.text()}; guest: insmod of both drivers, eth0 up with 10.0.0.2/24; 3 s")
    host.create(config)
    for name in DRIVERS:
        host.guest(f"insmod /lab/{name}.ko")
    host.guest("until [ -b /dev/xvda ] && [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
    host.guest("ip link set eth0 up; ip addr add 10.0.0.2/24 dev eth0")
    settle(host, 3)
    rec.both("3-up")
    for stage, count in (("12-vcpu-set-1", 1), ("13-vcpu-set-2", 2)):
        rec.step(f"xl vcpu-set u {count}; 3 s")
        host.run(f"xl vcpu-set u {count}")
        settle(host, 3)
        rec.both(stage)
        rec.dom0(stage, "xl vcpu-list", "xl-vcpu-list")
    rec.step("xl block-attach u phy:/dev/loop1 xvdb w; the guest has /dev/xvdb; 2 s")
    attach(host, "xl block-attach u phy:/dev/loop1 xvdb w")
    host.guest("until [ -b /dev/xvdb ]; do sleep 0.1; done")
    settle(host)
    rec.both("14-block-attach")
    rec.step("xl block-detach u xvdb; 3 s")
    host.run("xl block-detach u xvdb")
    settle(host, 3)
    rec.both("15-block-detach")
    rec.step("xl network-attach u bridge=xenbr0 mac=00:16:3e:00:00:02; the guest has eth1; 2 s")
    attach(host, "xl network-attach u bridge=xenbr0 mac=00:16:3e:00:00:02")
    host.guest("until [ -e /sys/class/net/eth1 ]; do sleep 0.1; done")
    settle(host)
    rec.both("16-network-attach")
    rec.step("xl network-detach u 1; 3 s")
    host.run("xl network-detach u 1")
    settle(host, 3)
    rec.both("17-network-detach")
    rec.step("xl pause u; 1 s")
    host.run("xl pause u; sleep 1")
    rec.dom0_side("18-paused", 1)
    rec.dom0("18-paused", "xl list; xl vcpu-list", "xl-list")
    rec.step("xl unpause u; xl save u /run/saved; 3 s")
    host.run("xl unpause u; sleep 1")
    rec.dom0("19-saved", "xl save u /run/saved 2>&1", "output")
    settle(host, 3)
    rec.dom0_side("19-saved", None)
    rec.step("xl restore /run/saved (the domain is 2 now); 3 s")
    rec.dom0("20-restored", "xl restore /run/saved 2>&1; rm /run/saved", "output")
    settle(host, 3)
    rec.both("20-restored", domid=2)
    rec.dom0("20-restored", "xl list; xl vcpu-list", "xl-list")
    rec.step(f"guest: {READS}; ping -c 10 10.0.0.1")
    rec.domu("21-restored-used", f"{READS}; ping -c 10 -i 0.2 10.0.0.1", "output")
    rec.both("21-restored-used", domid=2)
    end(rec)


CONFIGURATIONS: dict[str, tuple[Config, Callable[[Recorder, Config], None]]] = {
    "2vcpu": (Config(vcpus=2), ordinary),
    "1vcpu": (Config(vcpus=1), ordinary),
    "4vcpu": (Config(vcpus=4), ordinary),
    "2vcpu-2l": (Config(vcpus=2, append="xen.fifo_events=0"), ordinary),
    "2vcpu-toolstack": (Config(vcpus=2), toolstack),
}


def record(name: str, into: Path, report: Callable[[str], None]) -> None:
    """Record one configuration in `into`/`name`. RealXenError."""
    config, stages = CONFIGURATIONS[name]
    kernel = kernels.fetch_kernel("cloud", report)
    assert kernel.modules_dir is not None
    drivers = modules.read_modules(kernel.modules_dir, DRIVERS)
    files = {f"lab/{driver}.ko": data for driver, data in drivers}
    initrd = default_initrd(kernels.find_busybox(report), {**files, "lab/irqfiles": IRQFILES})
    tools = {"lab/irqfiles": IRQFILES}
    with tempfile.TemporaryDirectory(dir=into, prefix=".") as scratch:
        directory = Path(scratch) / name
        directory.mkdir()
        with RealHost(report, guest_kernel=kernel.path, guest_initrd=initrd, files=tools) as host:
            host.start_tools(disks=2)
            rec = Recorder(host, directory)
            try:
                stages(rec, config)
            finally:
                (directory / "README").write_text("\n".join(rec.steps) + "\n")
                failed = into / f"{name}.failed"
                shutil.rmtree(failed, ignore_errors=True)
                if sys.exc_info()[0] is not None:
                    directory.rename(failed)
        shutil.rmtree(into / name, ignore_errors=True)
        directory.rename(into / name)
        report(f"{into / name} is complete")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.xen.records", description="Record the real Xen.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("configurations", nargs="*", metavar="CONFIGURATION", help=", ".join(CONFIGURATIONS))
    options = parser.parse_args()
    unknown = set(options.configurations) - set(CONFIGURATIONS)
    if unknown:
        parser.error(f"no configuration {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is open is closed
    if why := missing():
        print(f"records: {why}", file=sys.stderr)
        return 3
    options.directory.mkdir(parents=True, exist_ok=True)
    for name in options.configurations or CONFIGURATIONS:
        try:
            record(name, options.directory, lambda message, name=name: print(f"{name}: {message}", flush=True))
        except RealXenError as error:
            print(f"records: {name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Traces that were recorded, of modelled domains and of a real Linux guest: what the tools make of them is so."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.lab.trace import Trace
from pvirq.lab.traceview import plot, terminal
from pvirq.lab.traceview.diff import differ, hash_of
from pvirq.lab.traceview.perfetto import convert
from pvirq.lab.traceview.selection import Selection
from pvirq.lab.traceview.summary import DomainSummary, Options, Summary, summarise
from pvirq.lab.traceview.summary_text import summary_dict, summary_text
from pvirq.lab.traceview.timeline import timeline
from pvirq.lab.traceview.tracefile import TraceFile
from pvirq.scenario.load import load
from pvirq.scenario.run import Run
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from test_perfetto import read

SCENARIO = """
[dom0]
platform = "recorded"
kernel = "{kernel}"
vcpus = 2
[[domain]]
name = "g"
kernel = "{kernel}"
vcpus = 2
disk = [{{ name = "xvda", on = "virtio0" }}]
vif = [{{ bridge = "xenbr0" }}]
[[workload]]
on = "g"
kind = "disk"
count = 40
every = "2ms"
jitter = 0.5
"""


def row_counts(interrupts: str) -> Counter[str]:
    """How often each name stands for, over all CPUs and rows, in a /proc/interrupts."""
    found: Counter[str] = Counter()
    for numbers, name in re.findall(r"^ *\d+:((?: +\d+)+) .*?  (\S.*)$", interrupts, re.MULTILINE):
        found[re.split(r"  +", name)[-1]] += sum(map(int, numbers.split()))
    return +found


def irq_counts(one: DomainSummary) -> Counter[str]:
    counts: Counter[str] = Counter()
    for port in one.ports:
        counts[port.port.name or "?"] += port.irqs
    return +counts


def summary_of(path: Path) -> Summary:
    with TraceFile(path) as file:
        return summarise(file)


def look_at_everything(path: Path) -> None:
    """All that can be made of a trace; Perfetto's is read back."""
    with TraceFile(path) as file:
        drawn = timeline(file, Selection())
    assert all(len(line.plain) <= 80 for line in terminal.lines(drawn))
    plot.plot(drawn, path.with_suffix(".svg"), "svg")
    convert(path, path.with_suffix(".pftrace"))
    tracks = read(path.with_suffix(".pftrace"))
    summary = summary_of(path)
    assert summary_text(summary, Selection(), Options())
    for one in summary_dict(summary, Selection(), Options())["domains"]:
        for vcpu in one["vcpu"]:
            track = tracks.get(f"{one['name']}/vCPU {vcpu['v']}")
            slices = [found for found in (track.slices if track else []) if found.name != "runs"]
            assert len([found for found in slices if not found.args.get("continued")]) == vcpu["irqs"]


@pytest.mark.parametrize("kernel", ["pvops", "pvops-2l", "2.6.18", "suse"])
def test_a_modelled_host(tmp_path: Path, kernel: str) -> None:
    """Counts are those of /proc/interrupts, whose differences are counted before and after."""
    scenario = tmp_path / "small.toml"
    scenario.write_text(SCENARIO.format(kernel=kernel))
    path = tmp_path / "run.jsonl"
    with Run(load(str(scenario))) as run:
        run.connect()
        members = run.find("*")
        before = {member.domain.domid: row_counts(run.view("interrupts", member)) for member in members}
        with Trace(run.host, path) as trace:
            run.start()
            run.run()
        after = {member.domain.domid: row_counts(run.view("interrupts", member)) for member in members}
        hashed = trace.hash()
    with TraceFile(path) as file:
        assert hash_of(file) == hashed
    summary = summary_of(path)
    assert len(summary.domains) == 2
    for one in summary.domains:
        d = one.domain.d
        counts = irq_counts(one)
        counts.pop("evtchn", 0)  # XenLinux's /dev/xen/evtchn, whose ports have no IRQ
        assert counts == after[d] - before[d]
        assert one.domain.pending == 0
        assert all(port.outcomes["lost"] == 0 for port in one.ports)
    with TraceFile(path) as file, TraceFile(path) as other:
        assert differ(file, other) is None
    look_at_everything(path)


@pytest.fixture(scope="module")
def linux(kernel_cloud: KernelChoice, busybox: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A Linux guest that reads its disk, traced from its boot on; and its /proc/interrupts at the end."""
    assert kernel_cloud.modules_dir is not None
    path = tmp_path_factory.mktemp("linux") / "run.jsonl"
    initrd = default_initrd(busybox, modules=modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront"]))
    with Host() as host:
        with Trace(host, path) as trace:
            guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
            host.attach_disk(guest, "xvda", MemoryStore(1 << 20))
            guest.run("until [ -b /dev/xvda ]; do sleep 0.1; done")
            trace.mark("the disk is there")
            guest.run("dd if=/dev/xvda of=/dev/null bs=64k")
        interrupts = guest.proc_interrupts()
    return path, interrupts


@pytest.mark.boot
def test_a_real_guest(linux: tuple[Path, str]) -> None:
    path, interrupts = linux
    summary = summary_of(path)
    one = next(one for one in summary.domains if one.domain.world == "real")
    counts, guests = irq_counts(one), row_counts(interrupts)
    for name in ("blkif", "xenbus"):  # those that nothing has raised since
        assert counts[name] == guests[name] > 0
    for name, count in counts.items():
        assert count <= guests[name]
    for port in one.ports:
        if port.port.name == "blkif":
            assert port.delivered == port.irqs == port.latency.count
            assert 0 < port.latency.min <= port.latency.percentile(50) <= port.latency.max
    assert [text for _, text in summary.marks] == ["the disk is there"]
    for v in (0, 1):
        assert one.vcpus[v].spent["running"] > 0
        assert one.vcpus[v].wake.count > 0


@pytest.mark.boot
def test_all_views_of_a_real_guest(linux: tuple[Path, str]) -> None:
    look_at_everything(linux[0])

"""A real Linux guest's trace, held against the guest's own /proc/interrupts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.fork import fork
from pvirq.lab.trace import Trace
from pvirq.pv import irq_watch
from pvirq.pv.probed import ProbedGuest
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.xen.domain import Vcpu
from pvirq.xen.evtchn_channels import Channel
from pvirq.xen.probes import Action, Instrument, has_front

pytestmark = pytest.mark.boot

Counts = Counter[tuple[int, int]]  # by IRQ and CPU


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def trace(host: Host) -> Iterator[Trace]:
    with Trace(host) as trace:
        yield trace


@pytest.fixture(scope="module")
def guest(host: Host, trace: Trace, kernel_cloud: KernelChoice, busybox: Path) -> Guest:
    """Booted while it is traced; with a disk, whose channel has late EOIs."""
    assert kernel_cloud.modules_dir is not None
    initrd = default_initrd(busybox, modules=modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront"]))
    guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
    host.attach_disk(guest, "xvda", MemoryStore(1 << 20))
    assert guest.run("until [ -b /dev/xvda ]; do sleep 0.1; done").status == 0
    return guest


def entries(trace: Trace, guest: Guest) -> Counts:
    found = trace.where(k="irq", ph="B", d=guest.domain.domid)
    return Counter((event["irq"], event["v"]) for event in found if "handler" in event)


def table(text: str) -> tuple[Counts, dict[int, str]]:
    """Counts by IRQ and CPU, and the rows' names."""
    rows = re.findall(r"^ *(\d+): +(\d+) +(\d+) .* (\S+)$", text, re.MULTILINE)
    counts = Counter({(int(irq), cpu): int(row[cpu]) for irq, *row, _ in rows for cpu in (0, 1)})
    return counts, {int(irq): name for irq, _, _, name in rows}


def compare(trace: Trace, guest: Guest) -> tuple[int, Counts]:
    """Entries of the trace and the guest's counts: the reading lies between what the trace had before and has after.

    Returns how many rows were at rest meanwhile, so that they had to agree exactly, and the counts.
    """
    before = entries(trace, guest)
    counts, _ = table(guest.proc_interrupts())
    after = entries(trace, guest)
    for key in counts | after:
        assert before[key] <= counts[key] <= after[key], key
    return sum(before[key] == after[key] and counts[key] > 0 for key in counts), counts


def test_entries_are_what_the_guest_counts(trace: Trace, guest: Guest) -> None:
    """From its first interrupt on, and over work of every kind."""
    at_rest, first = compare(trace, guest)
    assert at_rest >= 3
    guest.run(
        "for cpu in 1 2; do (sleep 0.2; dd if=/dev/xvda of=/dev/null bs=4k count=64 iflag=direct) & done; wait; "
        "taskset 1 true; taskset 2 true"
    )
    at_rest, second = compare(trace, guest)
    assert at_rest >= 3
    grown = [irq for (irq, cpu), count in (second - first).items() if count]
    assert len(grown) >= 6


def test_names_and_handlers(trace: Trace, guest: Guest) -> None:
    _, names = table(guest.proc_interrupts())
    seen = trace.where(k="irq", ph="B", d=guest.domain.domid)
    assert {event["irq"]: event["name"] for event in seen if event["irq"] in names}.items() <= names.items()
    handlers = {event["name"]: event["handler"] for event in seen}
    assert handlers["timer0"] == "xen_timer_interrupt"
    assert handlers["hvc_console"] == "hvc_handle_interrupt"
    assert handlers["resched1"] == "xen_reschedule_interrupt"
    assert handlers["blkif"] == "blkif_interrupt"  # a module's


def test_each_entry_has_its_exit_at_its_vcpu(trace: Trace, guest: Guest) -> None:
    inside: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
    for event in trace.where(k="irq", d=guest.domain.domid):
        if event["ph"] == "B":
            inside[event["v"]].append((event["irq"], event["p"]))
        else:
            assert inside[event["v"]].pop() == (event["irq"], event["p"])
    assert inside == {0: [], 1: []}


def test_ports_are_those_that_xen_has(trace: Trace, guest: Guest) -> None:
    bound = {event["p"]: event for event in trace.where(k="bind", d=guest.domain.domid)}
    for event in trace.where(k="irq", ph="B", d=guest.domain.domid):
        port = bound[event["p"]]
        if event["name"].startswith("timer"):
            assert (port["type"], port["virq"], port["v"]) == ("virq", 0, event["v"])
        elif event["name"] in ("hvc_console", "xenbus", "blkif"):
            assert (port["type"], port["rd"]) == ("interdomain", 0)
        else:
            assert (port["type"], port["v"]) == ("ipi", event["v"])


def test_flows_of_a_disk_read(host: Host, trace: Trace, guest: Guest) -> None:
    """Hypercall, event to domain 0, its handler there, the event back, and the guest's handler: one after the other."""
    begin = len(trace.events)
    assert guest.run("dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct skip=7").status == 0
    events = trace.events[begin:]
    back = next(e for e in events if e["k"] == "irq" and e.get("name") == "blkif" and e["ph"] == "B")
    [raised_back] = [e for e in events if e["k"] == "raise" and [e.get("flow")] == back["flow"]]
    assert raised_back["by"][0] == 0
    there = next(
        e for e in events if e["k"] == "irq" and e.get("name", "").endswith("blkif-backend") and e["ph"] == "B"
    )
    raised = next(e for e in events if e["k"] == "raise" and [e.get("flow")] == there["flow"])
    assert raised["by"][0] == guest.domain.domid
    call = next(e for e in reversed(events[: events.index(raised)]) if e["k"] == "hypercall")
    assert call["op"] == "event_channel_op.send"
    assert call["r"] == 0
    port = guest.domain.evtchn.port(call["args"][0])
    assert (port.remote_port, raised["d"]) == (raised["p"], 0)
    order = [call, raised, there, raised_back, back]
    assert [events.index(event) for event in order] == sorted(events.index(event) for event in order)
    assert [event["t"] for event in order] == sorted(event["t"] for event in order)
    assert any(e["k"] == "eoi" and e.get("irq") == back["irq"] for e in events[events.index(back) :])


def test_almost_all_that_is_raised_is_handled(trace: Trace, guest: Guest) -> None:
    """What isn't: what is pending now, and what the guest clears by itself, as it does when it polls for a lock."""
    handled = {flow for event in trace.where(k="irq", ph="B", d=guest.domain.domid) for flow in event["flow"]}
    raised = {event["flow"] for event in trace.where(k="raise", d=guest.domain.domid)}
    assert handled <= raised
    assert len(raised - handled) <= len(raised) // 50
    assert all(event["flow"] for event in trace.where(k="irq", ph="B", d=guest.domain.domid))


def test_turns(trace: Trace, guest: Guest) -> None:
    domid = guest.domain.domid
    assert {event["why"] for event in trace.where(k="stop", d=domid)} >= {"blocked", "slice"}
    running: tuple[int, int] | None = None
    for event in trace:
        if event["k"] == "run":
            assert running is None
            running = event["d"], event["v"]
        elif event["k"] == "stop":
            assert running == (event["d"], event["v"])
            running = None
        elif event["k"] in ("hypercall", "upcall", "irq"):
            assert running == (event["d"], event["v"])
    times = [event["t"] for event in trace]
    assert times == sorted(times)


def test_the_header_says_how_much_is_seen(host: Host, trace: Trace, guest: Guest) -> None:
    assert trace.where(k="domain", d=guest.domain.domid)[0]["irqs"] == "lines"
    with Trace(host) as later:
        pass
    assert later.header["domains"][1] == {
        "d": guest.domain.domid, "name": guest.name, "vcpus": 2, "kind": "real",
        "kernel": "/".join(Path(guest.config.kernel).parts[-2:]), "irqs": "lines",
    }  # fmt: skip


def test_a_trace_of_a_guest_that_runs_already_and_its_end(host: Host, trace: Trace, guest: Guest) -> None:
    """Traces may come and go: what was translated before is seen, and nothing is called afterwards."""
    trace.close()
    machine = guest.machine
    [probed] = guest.domain.probed
    assert isinstance(probed, ProbedGuest)
    assert not has_front(machine, "run")
    assert all(not has_front(cpu, "deliver_events") and cpu.hypercalls is machine.hypercalls for cpu in machine.cpus)
    assert probed._irqs is not None
    assert not probed._irqs._removers
    count = len(trace.events)
    guest.run("sleep 0.1")
    assert len(trace.events) == count

    counts, _ = table(guest.proc_interrupts())
    with Trace(host, kinds=("irq",)) as again:
        guest.run("dd if=/dev/xvda of=/dev/null bs=4k count=64 iflag=direct; sleep 0.1")
        at = entries(again, guest)
    now, names = table(guest.proc_interrupts())
    rows = [(irq, cpu) for irq, name in names.items() if name == "blkif" for cpu in (0, 1)]  # one for each queue
    assert [at[row] for row in rows] == [now[row] - counts[row] for row in rows]
    assert sum(at[row] for row in rows) >= 64
    assert len(again.where(ph="B")) == len(again.where(ph="E"))


def test_only_events_of_a_real_guest(host: Host, trace: Trace, guest: Guest) -> None:
    """An instrument that wants nothing of interrupts puts no watch into the guest."""
    trace.close()

    class Raised(Instrument):
        count = 0

        def raised(self, vcpu: Vcpu, channel: Channel, outcome: str) -> None:
            self.count += 1

    host.hypervisor.probes.add(raised := Raised())
    [probed] = guest.domain.probed
    assert isinstance(probed, ProbedGuest)
    assert probed._irqs is not None
    assert not probed._irqs._removers
    guest.run("true")
    host.hypervisor.probes.remove(raised)
    assert raised.count > 2


def test_without_btf_there_are_ports(host: Host, trace: Trace, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    trace.close()
    [probed] = guest.domain.probed
    assert isinstance(probed, ProbedGuest)
    monkeypatch.setattr(probed, "_irqs", None)
    monkeypatch.setattr(irq_watch, "btf_of", lambda elf: None)
    counts, _ = table(guest.proc_interrupts())
    with Trace(host) as ports:
        guest.run("dd if=/dev/xvda of=/dev/null bs=4k count=64 iflag=direct")
    assert ports.where(k="irq", d=guest.domain.domid)
    now, names = table(guest.proc_interrupts())
    assert ports.header["domains"][1]["irqs"] == "ports"
    disk = {event["p"] for event in trace.where(k="irq", name="blkif", d=guest.domain.domid)}
    seen = [event for event in ports.where(k="irq", d=guest.domain.domid) if event["p"] in disk and "irq" not in event]
    rows = [(irq, cpu) for irq, name in names.items() if name == "blkif" for cpu in (0, 1)]
    count = sum(now[row] - counts[row] for row in rows)
    assert count >= 64
    assert [event["ph"] for event in seen] == ["B", "E"] * count
    assert all(event["flow"] for event in seen if event["ph"] == "B")
    probed.probe(host.hypervisor.probes)


def test_without_the_right_symbols_there_is_nothing(
    host: Host, trace: Trace, guest: Guest, kernel_generic: KernelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another kernel's file, as a restored guest may have: its addresses are not to be watched."""
    from pvirq.pv.image import load_image

    trace.close()
    [probed] = guest.domain.probed
    assert isinstance(probed, ProbedGuest)
    image = load_image(kernel_generic.path)
    monkeypatch.setattr(probed, "_irqs", None)
    monkeypatch.setattr(guest.machine, "kernel_image", lambda: image)
    with Trace(host) as nothing:
        guest.run("true")
    assert nothing.header["domains"][1]["irqs"] == "none"
    assert not nothing.where(k="irq", d=guest.domain.domid)
    assert nothing.where(k="upcall", d=guest.domain.domid)


class Told(Instrument):
    """Wants all that an engine would note, so that each is told instead."""

    def upcall(self, vcpu: Vcpu) -> None: ...

    def irq_entry(self, vcpu: Vcpu, port: int, irq: int, actions: Sequence[Action]) -> None: ...

    def irq_exit(self, vcpu: Vcpu, port: int, irq: int) -> None: ...

    def eoi(self, vcpu: Vcpu, port: int, irq: int, spurious: bool) -> None: ...

    def hypercall(self, vcpu: Vcpu, name: str, arguments: Sequence[int]) -> None: ...


WORK = """cat /proc/interrupts; dd if=/dev/urandom bs=1k count=16 2>/dev/null | md5sum
for i in 1 2 3; do /bin/true | cat; done; taskset 1 true; taskset 2 true; sleep 0.1"""


def seeded(kernel: Path, initrd: bytes, traced: bool, told: bool = False) -> tuple[str, int, int, str]:
    """A short life with a seed: the guest's memory at the end, the time, how many choices there were, the hash."""
    with Host(seed=5) as host:
        if told:
            host.hypervisor.probes.add(Told())
        trace = Trace(host) if traced else None
        guest = host.boot(kernel, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2)
        guest.run(WORK)
        assert host.schedule is not None
        digest, hash = host.hypervisor.machine.digest(guest.domain.domid), trace.hash() if trace is not None else ""
        return digest, host.clock.now(), host.schedule.count, hash


def test_a_trace_changes_nothing_and_is_the_same_each_time(kernel_cloud: KernelChoice, initrd: bytes) -> None:
    """Whether the engine notes what happens in the guest, or each of it is told."""
    runs = [
        fork(partial(seeded, kernel_cloud.path, initrd, *how)) for how in ((True,), (True,), (True, True), (False,))
    ]
    first, second, told, untraced = (run.result(300) for run in runs)
    assert first == second == told
    assert first[:3] == untraced[:3]
    assert first[3]

"""pvirq.inspect's picture and findings: against hosts whose ports are known, the recorded host, and each trouble."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inspectlib import DATA, NOWHERE, Row, Table, print_debug_e, print_interrupts, print_store
from pvirq.host import Host
from pvirq.inspect import (
    Explanation,
    Finding,
    Picture,
    Reader,
    Severity,
    Snapshot,
    explain,
    join,
    read_files,
    read_text,
)
from pvirq.inspect.diff import compare
from pvirq.inspect.export import prometheus
from pvirq.inspect.irqbalance import class_of
from pvirq.inspect.model import Channel, Kind
from pvirq.inspect.picture import How
from pvirq.inspect.rates import Rates
from pvirq.inspect.report import json_report, snapshot_json, text_report
from pvirq.inspect.topview import TopView
from pvirq.linux.irq_map import irq_map
from pvirq.scenario.load import load
from pvirq.scenario.run import Run

BOOT = [DATA / "linux-2vcpu" / name for name in (
    "2-drivers.debug-e", "2-drivers.xenstore", "2-drivers.dom0.interrupts", "domU.2-drivers.interrupts",
)]  # fmt: skip


def findings(text: str, *more: str, earlier: str = "", seconds: float | None = None) -> list[Finding]:
    """What is said of texts; each is a file of its own."""

    def read(texts: tuple[str, ...]) -> Snapshot:
        reader = Reader()
        for i, each in enumerate(texts):
            reader.text(each, f"file{i}")
        return reader.snapshot()

    return list(explain(read((text, *more)), read((earlier,)) if earlier else None, seconds).findings)


def of_kind(found: list[Finding], kind: str) -> list[Finding]:
    return [each for each in found if each.kind == kind]


# -- the picture -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["writeup-dom0", "writeup-guest"])
def test_ports_of_scenarios_are_found(scenario: str) -> None:
    """What is joined from the texts of a host is what its kernels know, of each port with an IRQ: XenLinux of SUSE's
    as domain 0, whose per-CPU lines have many ports, and 2.6.18 as guests."""
    with Run(load(scenario, [])) as run:
        run.connect()
        run.start()
        run.run()
        kernels = {m.kernel.domain.domid: m.kernel for m in run.members.values()}
        pairs = _compare_with_kernels(run.host, kernels)
        assert pairs == sum(
            len(irq_map(kernel).splitlines()) - 1 - irq_map(kernel).count("  -  -  ") for kernel in kernels.values()
        )


@pytest.mark.parametrize("kernel", ["pvops", "suse", "2.6.18"])
def test_ports_of_modelled_guests_are_found(kernel: str, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with Host(dom0_vcpus=2) as host:
        host.add_bridge()
        guests = [host.model(kernel, vcpus=2, name=f"g{i}") for i in range(3)]
        for guest in guests:
            host.attach_disk(guest, "xvda", tmp_path / "disk", readonly=True)
            host.attach_nic(guest)
        host.run(lambda: host.quiet)
        pairs = _compare_with_kernels(host, {0: host.dom0, **{g.domain.domid: g.kernel for g in guests}})
        assert pairs > 20


def _compare_with_kernels(host: Host, kernels: dict[int, object]) -> int:
    reader = Reader()
    reader.text(host.debug_key("e"), "debug-e")
    reader.text("\n".join(host.store.dump()), "xenstore")
    truth = {}
    for domid, kernel in kernels.items():
        reader.text(kernel.proc_interrupts(), f"interrupts-{domid}", hint=str(domid))  # type: ignore[attr-defined]
        for line in irq_map(kernel).splitlines()[1:]:  # type: ignore[arg-type]
            port, _, irq, *_ = line.split()
            if irq != "-":
                truth[domid, int(port)] = int(irq)
    picture = join(reader.snapshot())
    pairs = 0
    for view in picture.domains.values():
        for link in view.links:
            if link.row is not None and link.channel is not None:
                assert truth[view.domid, link.channel.port] == link.row.irq, (view.label, link.row.name, link.how)
                pairs += 1
    return pairs


class Machine:
    """Domain 0 and guests that take ports and IRQs lowest first, as Xen and Linux do, and give them back."""

    def __init__(self, vcpus: int) -> None:
        self.vcpus = vcpus
        self.ports: dict[int, dict[int, Channel]] = {0: {}}
        self.rows: dict[int, dict[int, tuple[str, str, str]]] = {0: {}}  # IRQ: chip, flow, handler
        self.irq_of: dict[tuple[int, int], int] = {}
        self.store: dict[str, str] = {}
        self._boot(0)

    def _boot(self, domid: int) -> None:
        for vcpu in range(self.vcpus):
            self.bind(domid, Kind.VIRQ, f"timer{vcpu}", vcpu, virq=0)
            for name in ("resched", "callfunc", "spinlock"):
                self.bind(domid, Kind.IPI, f"{name}{vcpu}", vcpu)

    def _port(self, domid: int) -> int:
        return next(port for port in range(1, 4096) if port not in self.ports[domid])

    def bind(self, domid: int, kind: Kind, name: str, vcpu: int, **more: int) -> int:
        """A port with its IRQ; returns the port."""
        port = more.pop("port", 0) or self._port(domid)
        first = 0 if domid else 24
        irq = next(irq for irq in range(first, 9999) if irq not in self.rows[domid])
        self.ports[domid][port] = Channel(NOWHERE, port, vcpu, kind, pending=False, masked=False, state="-", **more)
        chip, flow = ("xen-dyn-lateeoi", "event") if kind is Kind.INTERDOMAIN else ("xen-percpu", str(kind))
        self.rows[domid][irq] = (chip, flow, name)
        self.irq_of[domid, port] = irq
        return port

    def guest(self, domid: int) -> None:
        self.ports[domid], self.rows[domid] = {}, {}
        base = f"/local/domain/{domid}"
        self.store |= {f"{base}/name": f"g{domid}"}
        for kind, front, back in (
            ("store", "xenbus", "evtchn:xenstored"),
            ("console", "hvc_console", "evtchn:xenconsoled"),
        ):
            self.store[f"{base}/{kind}/port"] = str(self.connect(domid, front, back))
        self._boot(domid)

    def connect(self, domid: int, front: str, back: str) -> int:
        """A channel between a guest and domain 0; returns the guest's port."""
        mine, theirs = self._port(domid), self._port(0)
        self.bind(domid, Kind.INTERDOMAIN, front, domid % self.vcpus, port=mine, remote=0, remote_port=theirs)
        self.bind(0, Kind.INTERDOMAIN, back, 0, port=theirs, remote=domid, remote_port=mine)
        return mine

    def vif(self, domid: int, devid: int, queues: int) -> None:
        base = f"/local/domain/{domid}/device/vif/{devid}"
        for queue in range(queues):
            for way in ("tx", "rx"):
                port = self.connect(domid, f"vif{devid}-q{queue}-{way}", f"vif{domid}.{devid}-q{queue}-{way}")
                directory = f"{base}/queue-{queue}" if queues > 1 else base
                self.store[f"{directory}/event-channel-{way}"] = str(port)

    def vbd(self, domid: int, devid: int) -> None:
        path = f"/local/domain/{domid}/device/vbd/{devid}/event-channel"
        self.store[path] = str(self.connect(domid, "blkif", "blkif-backend"))

    def close(self, domid: int, port: int) -> None:
        channel = self.ports[domid].pop(port)
        del self.rows[domid][self.irq_of.pop((domid, port))]
        if channel.remote is not None and channel.remote_port in self.ports[channel.remote]:
            self.close(channel.remote, channel.remote_port)

    def remove(self, domid: int, kind: str, devid: int) -> None:
        prefix = f"/local/domain/{domid}/device/{kind}/{devid}/"
        for path in [path for path in self.store if path.startswith(prefix)]:
            self.close(domid, int(self.store.pop(path)))

    def texts(self) -> Snapshot:
        reader = Reader()
        dump = "".join(print_debug_e(d, [ports[port] for port in sorted(ports)]) for d, ports in self.ports.items())
        reader.text(dump, "debug-e")
        reader.text(print_store(self.store, full=True), "store")
        for domid, rows in self.rows.items():
            counts = tuple(range(self.vcpus))
            printed = tuple(Row(str(i), counts, c, "", f, (n,)) for i, (c, f, n) in sorted(rows.items()))
            reader.text(print_interrupts(Table(tuple(range(self.vcpus)), printed)), "table", hint=str(domid))
        return reader.snapshot()


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_machine_is_joined_as_it_is(data: st.DataObject) -> None:
    """Guests and devices that come and go: each IRQ has its own port, by its name or by order, and its device."""
    machine = Machine(data.draw(st.integers(1, 3)))
    devices: set[tuple[int, str, int]] = set()
    guests = data.draw(st.integers(1, 3))
    for domid in range(1, guests + 1):
        machine.guest(domid)
    for _ in range(data.draw(st.integers(0, 12))):
        domid, devid = data.draw(st.integers(1, guests)), data.draw(st.integers(0, 2))
        kind = data.draw(st.sampled_from(["vif", "vbd"]))
        if (domid, kind, devid) in devices:
            machine.remove(domid, kind, devid)
            devices.remove((domid, kind, devid))
        elif kind == "vif":
            machine.vif(domid, devid, data.draw(st.integers(1, 3)))
            devices.add((domid, kind, devid))
        else:
            machine.vbd(domid, devid)
            devices.add((domid, kind, devid))
    snapshot = machine.texts()
    assert snapshot.unread == ()
    picture = join(snapshot)
    for view in picture.domains.values():
        assert len(view.links) == len(machine.ports[view.domid])
        for link in view.links:
            assert link.row is not None
            assert link.channel is not None
            assert machine.irq_of[view.domid, link.channel.port] == link.row.irq
            if "vif" in link.row.name or "blkif" in link.row.name:
                assert link.device is not None
                assert (link.device.frontend, link.device.type, link.device.id) in devices
                assert link.how is How.NAME or "blkif" in link.row.name
    found = explain(snapshot)
    assert {each.kind for each in found.findings} <= {"not-balanced", "one-cpu"}
    assert [str(change) for change in compare(snapshot, machine.texts())] == []


def test_the_recorded_host() -> None:
    picture = join(read_files(BOOT))
    dom0, guest = picture.domains[0], picture.domains[1]
    assert guest.name == "u2"
    assert guest.table is not None
    assert guest.table.where.file.endswith("domU.2-drivers.interrupts")
    assert all(link.channel for view in (dom0, guest) for link in view.links)
    link = dom0.by_irq[53]
    assert link.channel is not None
    assert (link.channel.port, link.how, link.peer) == (34, How.NAME, (1, 17))
    assert link.device is not None
    assert (link.device.name, link.side) == ("vif 0 queue 0 tx", "back")
    assert guest.by_port[15].device is not None
    assert guest.by_port[15].device.name == "vbd 51712 queue 0"
    assert guest.by_irq[12].device is not None
    assert guest.by_irq[12].device.name == "xenstore"
    assert [str(where).rpartition("/")[2] for where in guest.by_irq[14].evidence] == [
        "domU.2-drivers.interrupts:16", "2-drivers.debug-e:59", "2-drivers.xenstore:110",
    ]  # fmt: skip


def test_a_restored_guest_has_another_order() -> None:
    """IRQs 12 and 13 were there before; their ports come first. Names and xenstore say so, order wouldn't."""
    base = DATA / "linux-recorded/2vcpu-toolstack"
    picture = join(read_files([
        base / "21-restored-used.debug-e", base / "21-restored-used.xenstore",
        base / "domU.21-restored-used.interrupts",
    ]))  # fmt: skip
    by_irq = picture.domains[2].by_irq
    ports = {irq: link.channel.port for irq, link in by_irq.items() if link.channel}
    assert ports == {0: 3, 1: 4, 2: 5, 3: 6, 4: 7, 5: 8, 6: 9, 7: 10, 8: 11, 9: 12, 10: 13, 11: 14, 12: 1, 13: 2}


def test_whose_lsevtchn_it_is_by_its_ends() -> None:
    """Two listings without names, of a guest and domain 0."""
    base = DATA / "linux-2vcpu"
    reader = Reader()
    reader.text((base / "2-drivers.lsevtchn-0").read_text(), "a", hint="0")
    reader.text((base / "2-drivers.lsevtchn-domU").read_text(), "b")
    picture = join(reader.snapshot())
    assert picture.domains[1].ports is not None
    assert picture.domains[1].ports.where.file == "b"


def test_the_last_of_several_dumps_counts() -> None:
    """All stages of a recording at once: what is said is of one time, the last one's, and not of a mixture."""
    base = DATA / "linux-recorded/2vcpu-toolstack"
    found = explain(read_files([base]))
    assert {each.kind for each in found.findings} <= {"not-balanced", "one-sided"}
    assert [view.ports is not None for view in found.picture.domains.values() if view.domid == 0] == [True]
    assert found.picture.domains[0].ports is not None
    assert found.picture.domains[0].ports.where.file.endswith("7-after.debug-e")
    assert "Older dumps of event channels had no part in this" in text_report(found)


def test_nothing_wrong_with_the_recorded_host() -> None:
    """Its spinlock IPIs are pending and masked, as they are; one test program's port waits."""
    found = explain(read_files(BOOT))
    assert {each.kind for each in found.findings} == {"unbound-port", "not-balanced"}
    assert all(each.severity is Severity.NOTE for each in found.findings)
    text = text_report(found)
    assert "domain 0 (Domain-0) has 1 port that nobody has bound yet: 29 (for domain 1)." in text
    assert "    53    34    0           6  vif1.0-q0-tx  vif 0 queue 0 tx of d1  -> d1 port 17" in text
    data = json_report(found)
    assert [each["domid"] for each in data["domains"]] == [0, 1]
    assert data["unread"] == []


# -- findings ----------------------------------------------------------------------------------------------------------

E = """\
(XEN) Event channel information for domain 0:
(XEN)        5 [0/0/  -   ]: s=3 n=0 x=0 d=3 p=4
(XEN) Event channel information for domain 3:
(XEN)        3 [0/0/  -   ]: s=5 n=0 x=0 v=0
(XEN)        4 [{p}/{m}/  7   ]: s=3 n={n} x=0 d=0 p=5
"""
VCPUS = "Name ID VCPU CPU State Time(s) Affinity (Hard / Soft)\nDomain-0 0 0 0 r-- 1.0 all / all\n"
LIST = "Name ID Mem VCPUs State Time(s)\nDomain-0 0 100 1 r----- 1.0\n"


def e_dump(p: int, m: int, n: int = 0) -> str:
    return E.format(p=p, m=m, n=n)


@pytest.mark.parametrize(
    ("vcpu", "severity", "words", "command"),
    [
        (VCPUS + "g 3 0 1 -b- 1.0 all / all\n", Severity.WARNING, "vCPU 0 is blocked", "xenctx"),
        (VCPUS + "g 3 0 - --p 1.0 all / all\n", Severity.ERROR, "vCPU 0 is offline", "xl vcpu-set 3 1"),
        (VCPUS + "g 3 0 1 r-- 1.0 all / all\n", Severity.NOTE, "on its way", "xl debug-keys e"),
        (LIST + "g 3 100 1 --p--- 1.0\n", Severity.WARNING, "the domain is paused", "xl unpause 3"),
        ("", Severity.NOTE, "nothing was read of the vCPU", "xl vcpu-list"),
        ("General information for domain 3:\n    refcnt=3 dying=0 pause_count=0\n"
         "    VCPU0: CPU1 [has=F] poll=0 upcall_pend=01 upcall_mask=01 \n    pause_count=0 pause_flags=1\n",
         Severity.ERROR, "has upcalls masked", "xenctx"),
        ("General information for domain 3:\n    refcnt=3 dying=0 pause_count=0\n"
         "    VCPU0: CPU1 [has=F] poll=0 upcall_pend=01 upcall_mask=00 \n    pause_count=0 pause_flags=0\n",
         Severity.NOTE, "about to run", "xl debug-keys e"),
    ],
)  # fmt: skip
def test_pending_and_not_taken(vcpu: str, severity: Severity, words: str, command: str) -> None:
    (found,) = of_kind(findings(e_dump(1, 0), vcpu), "stuck-pending")
    assert found.severity is severity
    assert words in found.text
    assert command in found.command
    assert str(found.evidence[0]) == "file0:5"
    assert not of_kind(findings(e_dump(0, 0), vcpu), "stuck-pending")


def test_pending_and_masked() -> None:
    (found,) = of_kind(findings(e_dump(1, 1)), "pending-masked")
    assert found.text.startswith("domain 3 port 4 (to domain 0 port 5, vCPU 0): event pending but the port is masked")
    assert not of_kind(findings(e_dump(0, 1)), "pending-masked")


def test_ports_of_domains_that_are_gone() -> None:
    text = "(XEN) Event channel information for domain 0:\n"
    text += "".join(f"(XEN)  {port} [0/0/-]: s=2 n=0 x=0 d=9\n" for port in (5, 6))
    (found,) = of_kind(findings(text), "leaked-port")
    assert "keeps 2 ports (5, 6) for domain 9, which is gone" in found.text
    assert len(found.evidence) == 2
    listing = "   5: VCPU 0: Interdomain (Waiting connection) - Remote Domain 9\n"
    assert not of_kind(findings(listing), "leaked-port")  # nobody knows which domains there are
    assert of_kind(findings(listing, LIST), "leaked-port")
    assert not of_kind(findings(listing, LIST + "x 9 1 1 -b---- 1.0\n"), "leaked-port")


def test_a_domain_that_does_not_go() -> None:
    (found,) = of_kind(findings(e_dump(0, 0), LIST + "(null) 3 0 1 --ps-d 1.0\n"), "zombie-domain")
    assert "domain 0 port 5" in found.text


STORE = """\
/local/domain/3/name = "g"
/local/domain/3/device/vif/0/state = "{state}"
/local/domain/3/device/vif/0/event-channel = "{port}"
"""


def test_devices_and_their_ports() -> None:
    wrong = STORE.format(state=4, port=8)
    (found,) = of_kind(findings(e_dump(0, 0), wrong), "device-port")
    assert found.severity is Severity.ERROR
    assert "xenstore says port 8, but that port is closed" in found.text
    assert found.command == "xl network-detach 3 0"
    assert not of_kind(findings(e_dump(0, 0), STORE.format(state=4, port=4)), "device-port")
    assert not of_kind(findings(e_dump(0, 0), STORE.format(state=6, port=8)), "device-port")  # closed, as it says
    waiting = "(XEN) Event channel information for domain 0:\n(XEN) Event channel information for domain 3:\n"
    waiting += "(XEN)        4 [0/0/  -   ]: s=2 n=0 x=0 d=0\n"
    (found,) = of_kind(findings(waiting, STORE.format(state=3, port=4)), "unbound-port")
    assert "whose backend hasn't connected" in found.text
    assert found.command == "xenstore-ls -f /local/domain/0/backend/vif/3/0"


def test_one_end_alone() -> None:
    text = e_dump(0, 0).replace("d=0 p=5", "d=0 p=6")
    assert [each.text.split(". ")[0] for each in of_kind(findings(text), "one-sided")] == [
        "domain 0: channels to domain 3 that it has no end of: port 5 (to port 4, which is to domain 0 port 6)",
        "domain 3: channels to domain 0 that it has no end of: port 4 (to port 6, which isn't open)",
    ]


def table(*rows: str, cpus: int = 2) -> str:
    return "     " + " ".join(f"CPU{cpu}" for cpu in range(cpus)) + "\n" + "".join(f"{row}\n" for row in rows)


BASE = (
    " 0: {a} 0 xen-percpu -virq timer0",
    " 1: 0 {b} xen-percpu -virq timer1",
    " 2: 0 {c} xen-dyn-lateeoi -event blkif",
)


def three(a: int, b: int, c: int) -> str:
    return table(*(row.format(a=a, b=b, c=c) for row in BASE))


def test_timers_that_stopped() -> None:
    (found,) = of_kind(findings(three(5000, 700, 900), earlier=three(2000, 700, 100)), "timer-stopped")
    assert found.severity is Severity.ERROR
    assert (
        "vCPU 1 had no timer interrupt since the earlier snapshot (another had 3000; other lines of it 800)"
        in found.text
    )
    assert not of_kind(findings(three(5000, 701, 900), earlier=three(2000, 700, 100)), "timer-stopped")
    for others, severity in ((150, Severity.WARNING), (109, Severity.NOTE)):
        (found,) = of_kind(findings(three(5000, 700, others), earlier=three(2000, 700, 100)), "timer-stopped")
        assert found.severity is severity
    (found,) = of_kind(findings(three(5000, 0, 0)), "timer-stopped")
    assert "at all" in found.text
    assert found.severity is Severity.WARNING
    for row in ("440: 9000 0 Dynamic-percpu timer", "LOC: 9000 0 Local timer interrupts"):
        (found,) = of_kind(findings(table(row, " 5: 0 200 Dynamic-level eth0")), "timer-stopped")
        assert found.severity is Severity.ERROR
    assert not of_kind(findings(three(10, 0, 0)), "timer-stopped")


@pytest.mark.parametrize(
    ("count", "severity"), [(2_000_000, Severity.ERROR), (200_000, Severity.WARNING), (90_000, None)]
)
def test_storms(count: int, severity: Severity | None) -> None:
    found = of_kind(findings(three(5000, 5000, count), earlier=three(100, 100, 0), seconds=10), "storm")
    assert [each.severity for each in found] == ([severity] if severity else [])
    assert not of_kind(findings(three(5000, 5000, count), earlier=three(100, 100, 0)), "storm")  # no time, no rate


def test_counters_wrap_between_snapshots() -> None:
    found = of_kind(findings(three(5000, 5000, 199_999), earlier=three(100, 100, (1 << 32) - 1), seconds=10), "storm")
    assert "20,000 interrupts a second" in found[0].text


def test_an_interrupt_that_a_guest_owes() -> None:
    text = "(XEN)    IRQ:  16 vec:d0 IO-APIC-level   status=030 aff:{0-7}/{3} in-flight=1 d0: 16(-M-),d2: 55(---)\n"
    (found,) = of_kind(findings(text), "storm")
    assert "in flight 1: domain 0 (pirq 16) has it masked" in found.text


def test_one_cpu_has_it_all() -> None:
    rows = [f" {i}: {5000 * i} {i} xen-dyn-lateeoi -event vif{i}.0" for i in range(1, 4)]
    (found,) = of_kind(findings(table(*rows)), "one-cpu")
    assert "vCPU 0 of 2 takes 100% of all device interrupts" in found.text
    assert found.command == "echo 1 > /proc/irq/2/smp_affinity_list"  # not the busiest: that one may stay
    even = [" 1: 9000 0 xen-dyn -event a", " 2: 0 9000 xen-dyn -event b"]
    assert not of_kind(findings(table(*even)), "one-cpu")
    assert not of_kind(findings(three(9000, 0, 3)), "one-cpu")  # timers can't be anywhere else


def test_late_eoi() -> None:
    path = "/sys/bus/xen-backend/devices/vif-1-0/xenbus/"
    text = f"{path}events:1000\n{path}spurious_events:100\n{path}spurious_threshold:1\n{path}jiffies_eoi_delayed:{{}}\n"
    (found,) = of_kind(findings(text.format(50)), "lateeoi")
    assert found.severity is Severity.WARNING
    assert "held back events for 50 jiffies: 100 of 1000 were spurious" in found.text
    assert found.command == f"echo 2 > {path}spurious_threshold"
    (found,) = of_kind(findings(text.format(50), earlier=text.format(20)), "lateeoi")
    assert "30 of them since" in found.text
    (found,) = of_kind(findings(text.format(0)), "lateeoi")
    assert "none was held back" in found.text


def test_spurious_interrupts() -> None:
    found = of_kind(findings("/proc/irq/9/spurious=count 5|unhandled 2000|last_unhandled 12 ms|\n"), "spurious-irq")
    assert [each.severity for each in found] == [Severity.WARNING]
    found = of_kind(findings(table("ERR: 3", "MIS: 0", "SPU: 0 2 Spurious interrupts")), "spurious-irq")
    assert [each.text.partition(": ")[2] for each in found] == [
        "3 errors of the interrupt controller (ERR).",
        "2 spurious interrupts of the interrupt controller (SPU).",
    ]


def test_limits() -> None:
    def dump(domid: int, port: int, state: str) -> str:
        return f"Event channel information for domain {domid}:\n {port} [0/0/{state}]: s=6 n=0 x=0\n"

    assert "xl's max_event_channels" in of_kind(findings(dump(3, 1000, "-")), "near-limit")[0].text
    assert "two-level ABI's limit of 4095" in of_kind(findings(dump(0, 4000, "0")), "near-limit")[0].text
    assert not of_kind(findings(dump(0, 4000, "-")), "near-limit")  # FIFO has more
    old = table(*(f"{256 + i}: 1 Dynamic-irq vif{i}.0" for i in range(240)), cpus=1)
    assert "240 of the 256 dynamic IRQs" in of_kind(findings(old), "near-limit")[0].text
    log = "[    0.0] NR_IRQS: 4352, nr_irqs: 256, preallocated irqs: 16\n"
    assert "room for 256" in of_kind(findings(old, log), "near-limit")[1].text


@pytest.mark.parametrize(
    ("text", "joined", "parted", "by_name"),
    [
        (" 9: 1 1   xen-dyn-event     vif0-q0-tx", True, True, False),
        (" 9: 1 1   xen-dyn    -event     vif0-q0-tx", False, True, False),
        (" 9: 1 1  xen-dyn-lateeoi    -event     vif13.0-q1-tx", False, True, False),
        (" 9: 1 1  xen-dyn-lateeoi    -event     evtchn:a b", False, False, False),
        (" 9: 1 1   xen-dyn    -virq      mce", False, False, False),
        (" 9: 1 1  IR-PCI-MSI 327680-edge      virtio3-event", False, False, False),
    ],
)
def test_what_irqbalance_sees(text: str, joined: bool, parted: bool, by_name: bool) -> None:
    row = read_text(table(text)).interrupts[0].rows[0]
    found = class_of(row)
    assert (found.joined, found.parted, found.by_name) == (joined, parted, by_name)
    assert bool(found.reason) == row.chip.startswith("xen-dyn")


def test_most_severe_first() -> None:
    found = findings(e_dump(1, 0), VCPUS + "g 3 0 1 -b- 1.0 all / all\n", three(5000, 1000, 10))
    assert [each.severity for each in found] == sorted((each.severity for each in found), reverse=True)
    assert found[0].severity is Severity.WARNING


def test_what_lasts_is_worse() -> None:
    """The same in both snapshots, with no interrupt in between: no longer on its way."""
    vcpus = VCPUS + "g 3 0 1 r-- 1.0 all / all\n"
    (found,) = of_kind(findings(e_dump(1, 0) + vcpus, earlier=e_dump(1, 0)), "stuck-pending")
    assert found.severity is Severity.WARNING
    assert "it was pending in the earlier snapshot too" in found.text
    (found,) = of_kind(findings(e_dump(1, 0) + vcpus, earlier=e_dump(0, 0)), "stuck-pending")
    assert found.severity is Severity.NOTE
    late = '/local/domain/3/store/port = "4"\n' + table(" 9: {n} 0 xen-dyn-lateeoi -event xenbus")
    for n, severity in ((5, Severity.WARNING), (6, Severity.NOTE)):
        now = [e_dump(1, 1), late.format(n=n)]
        (found,) = of_kind(findings("".join(now), earlier=e_dump(1, 1) + late.format(n=5)), "pending-masked")
        assert found.severity is severity


def test_a_line_that_is_elsewhere_for_xen() -> None:
    text = e_dump(0, 0, 1) + '/local/domain/3/store/port = "4"\n' + table(" 9: 1 0 xen-dyn -event xenbus")
    for cpu, count in (("0", 1), ("1", 0), ("0-1", 0)):
        assert len(of_kind(findings(text + f"/proc/irq/9/effective_affinity_list:{cpu}\n"), "misplaced")) == count


def test_order_is_not_trusted_against_affinity() -> None:
    text = "Event channel information for domain 0:\n 1 [0/0/-]: s=6 n=0 x=0\n 2 [0/0/-]: s=6 n=0 x=0\n"
    text += table(" 7: 0 0 xen-percpu -ipi resched0", " 8: 0 0 xen-percpu -ipi callfunc0")
    for cpu, known in (("0", True), ("1", False)):
        picture = explain(read_text(text + f"/proc/irq/8/effective_affinity_list:{cpu}\n")).picture
        assert [link.channel is not None for link in picture.domains[0].links[:2]] == [known, known]


FRAGMENTS = [
    e_dump(1, 0), e_dump(1, 1, 7), LIST + "(null) 3 0 1 --ps-d 1.0\n", VCPUS + "g 3 0 - --p 1.0 all / all\n",
    STORE.format(state=4, port=8), STORE.format(state="x", port=99999999), three(1, 2, 3), three(4_294_967_295, 0, 7),
    "/proc/irq/9/spurious=count 5|unhandled|\n/proc/irq/2/effective_affinity_list:0-99999999\n",
    "/sys/a/vif-1-0/xenbus/events:18446744073709551615\n/sys/a/vif-1-0/xenbus/jiffies_eoi_delayed:3\n",
    *(path.read_text() for path in BOOT),
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_mixture_can_be_explained_and_compared(data: st.DataObject) -> None:
    """Pieces that belong to different machines, cut anywhere: all of it is said without an error."""

    def some() -> Snapshot:
        reader = Reader()
        for i, text in enumerate(data.draw(st.lists(st.sampled_from(FRAGMENTS), max_size=4))):
            lines = text.splitlines(keepends=True)
            begin = data.draw(st.integers(0, len(lines)))
            part = "".join(lines[begin:] if data.draw(st.booleans()) else lines[: begin + 1])
            part = part.replace(
                data.draw(st.sampled_from("0123456789")), data.draw(st.sampled_from(["5", "²", "٣", "99999", "-"]))
            )
            reader.text(part, f"f{i}", hint=data.draw(st.sampled_from(["", "0", "3", "domU", "g", "40000"])))
        return reader.snapshot()

    a, b = some(), some()
    found: Explanation = explain(a, b, 1.0)
    text_report(found)
    json.dumps(json_report(found))
    json.dumps(snapshot_json(a))
    prometheus(found)
    view = TopView(Rates())
    for each in (a, b, a):
        view.rates.take(each)
        view.screen(80, 24)
    compare(a, b)
    assert compare(a, a) == []


def test_delta_of_rows_that_are_not_the_same() -> None:
    """A line that has another handler now, or a CPU that came, has no difference."""
    before = table(" 2: 100 0 xen-dyn -event blkif")
    for now in (table(" 2: 200 0 xen-dyn -event vif"), table(" 2: 200 0 1 xen-dyn -event blkif", cpus=3)):
        picture: Picture = explain(read_text(now), read_text(before), 1.0).picture
        view = next(iter(picture.domains.values()))
        assert view.earlier is not None
        assert not of_kind(list(explain(read_text(now), read_text(before), 0.001).findings), "storm")

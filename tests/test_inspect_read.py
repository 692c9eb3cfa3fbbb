"""pvirq.inspect's parsers: recorded files, forms of all ages, printed and read back, and texts that make no sense."""

from __future__ import annotations

import dataclasses
import gzip
import io
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inspectlib import (
    DATA,
    NOWHERE,
    Table,
    channel_lists,
    domain_infos,
    guest_irqs,
    irq_files,
    own_irqs,
    pins,
    print_debug_e,
    print_debug_i,
    print_debug_q,
    print_files,
    print_interrupts,
    print_lsevtchn,
    print_store,
    print_vcpu_list,
    print_xl_list,
    stores,
    tables,
    xenbus_counters,
    xl_domains,
    xl_vcpus,
)  # fmt: skip
from pvirq.inspect import InspectError, Kind, Snapshot, explain, live, read_files, read_text
from pvirq.inspect.model import Channel, DomainInfo, IoapicPin, IrqFile, XenbusCounter, XenIrq, XlDomain, XlVcpu
from pvirq.inspect.read import KEPT, Reader, hint_of_name
from pvirq.inspect.source import LONGEST, lines_of

RECORDED = sorted(
    path
    for directory in ("linux-2vcpu", "linux-recorded", "writeup", "evtchn_views", "inspect")
    for path in (DATA / directory).rglob("*")
    if path.is_file() and not path.name.startswith("README")
)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# -- recorded ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_line_of_a_recorded_file_is_read(path: Path) -> None:
    """As many things come out as there are lines of them in the file, and nothing is left."""
    snapshot = read_files([path])
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    kind = path.name.rpartition(".")[2]
    if kind == "interrupts" or path.parent.name == "writeup":
        (table,) = snapshot.interrupts
        assert len(table.rows) == len(lines) - 1
        assert len(table.cpus) == len(lines[0].split())
        for row, line in zip(table.rows, lines[1:], strict=True):
            numbers = line.split(":", 1)[1].split()[: len(row.counts)]
            assert [str(count) for count in row.counts] == numbers
            if row.irq is not None:
                assert line.rstrip().endswith(", ".join(row.actions))
    elif "lsevtchn" in path.name:
        (ports,) = snapshot.channels
        assert print_lsevtchn(list(ports.channels)) == path.read_text()
    elif "debug-e" in path.name:
        assert sum(len(each.channels) for each in snapshot.channels) == sum("]: s=" in line for line in lines)
    elif "debug-i" in path.name:
        assert len(snapshot.xen_irqs) == sum(" vec:" in line for line in lines)
        assert len(snapshot.pins) == sum(" Pin " in line for line in lines)
        assert len(snapshot.vectors) == sum(" -> " in line for line in lines)
    elif "xenstore" in path.name:
        assert [node.path for node in snapshot.store] == [line.split(" = ")[0] for line in lines]
    elif "irqfiles" in path.name:
        assert len(snapshot.irq_files) == 3 * len(lines)
    elif "xl-list" in path.name:
        assert len(snapshot.xl_domains) + len(snapshot.xl_vcpus) == len(lines) - 2
    else:  # listings of sysfs and /proc/irq, which hold more than is read
        assert snapshot.counters or snapshot.irq_files
        assert snapshot.unread
        return
    assert snapshot.unread == ()


def test_columns_of_a_recorded_table() -> None:
    (table,) = read_files([DATA / "linux-2vcpu/2-drivers.dom0.interrupts"]).interrupts
    row = table.by_irq[53]
    assert (row.chip, row.flow, row.actions, list(row.counts)) == (
        "xen-dyn-lateeoi",
        "event",
        ("vif1.0-q0-tx",),
        [6, 0],
    )
    assert (table.by_irq[1].chip, table.by_irq[1].flow) == ("xen-pirq", "ioapic-edge")
    assert str(row.where).endswith("2-drivers.dom0.interrupts:35")
    assert table.hint == "0"
    (old,) = read_files([DATA / "writeup/dom0.txt"]).interrupts
    assert old.by_irq[16].actions == ("ehci_hcd:usb2", "uhci_hcd:usb3", "uhci_hcd:usb6", "HDA Intel")
    assert (old.by_irq[440].chip, old.by_irq[440].flow) == ("Dynamic", "percpu")


def test_debug_e_and_lsevtchn_agree() -> None:
    dump = read_files([DATA / "linux-2vcpu/2-drivers.debug-e"]).channels
    for domid, name in [(0, "lsevtchn-0"), (1, "lsevtchn-domU")]:
        (ports,) = read_files([DATA / f"linux-2vcpu/2-drivers.{name}"]).channels
        known = {c.port: (c.kind, c.vcpu, c.remote, c.remote_port, c.pirq, c.virq) for c in ports.channels}
        (own,) = (each for each in dump if each.domid == domid)
        assert known == {c.port: (c.kind, c.vcpu, c.remote, c.remote_port, c.pirq, c.virq) for c in own.channels}
    assert dump[0].by_port[2].pending
    assert dump[0].by_port[2].masked
    assert dump[0].by_port[21].irq == 24


# -- forms -------------------------------------------------------------------------------------------------------------

ARM = """\
           CPU0       CPU1
 11:       7155       8882     GICv3  30 Level     arch_timer
 35:         41          0   xen-dyn     Edge    -virq      hvc_console
 42:          0          0  xen-dyn-lateeoi     Edge    -event     evtchn:xenstored
116:          0          0  MSI-INTA 1716234 Level     485c0100.dma-controller chan6
IPI0:        30        101       Rescheduling interrupts
Err:          0
"""
X86 = """\
            CPU0       CPU3
   0:         10          0   IO-APIC   2-edge      timer
   8:          0          1  IR-IO-APIC    8-edge      rtc0
  28:          0          0 PCI-MSIX-0000:00:01.0   0-edge      virtio0-config
 120:          0        500  IR-PCI-MSI 327680-edge      xhci_hcd, eth0
 NMI:          1          2   Non-maskable interrupts
"""
OLD = """\
           CPU0       CPU1
  1:          8          0    Phys-irq  i8042
 14:        100          2  IO-APIC-edge  ide0
 97:       5501       5081   xen-dyn-event     blkif
104:          0 2211547569  xen-percpu-ipi       resched1
256:     111925          0   Dynamic-irq  timer0
NMI:          0          0
"""


def test_forms_of_arm_x86_and_old_kernels() -> None:
    (arm,) = read_text(ARM).interrupts
    rows = arm.by_irq
    assert (rows[11].chip, rows[11].hwirq, rows[11].trigger, rows[11].name) == ("GICv3", "30", "Level", "arch_timer")
    assert (rows[42].chip, rows[42].trigger, rows[42].flow) == ("xen-dyn-lateeoi", "Edge", "event")
    assert rows[116].actions == ("485c0100.dma-controller chan6",)
    assert [(row.label, row.text) for row in arm.rows[-2:]] == [("IPI0", "Rescheduling interrupts"), ("Err", "")]
    (x86,) = read_text(X86).interrupts
    rows = x86.by_irq
    assert x86.cpus == (0, 3)
    assert (rows[0].chip, rows[0].hwirq, rows[0].flow, rows[0].name) == ("IO-APIC", "2", "edge", "timer")
    assert rows[28].chip == "PCI-MSIX-0000:00:01.0"
    assert rows[120].actions == ("xhci_hcd", "eth0")
    assert (x86.count(rows[120], 3), x86.count(rows[120], 1)) == (500, 0)
    (old,) = read_text(OLD).interrupts
    rows = old.by_irq
    assert (rows[1].chip, rows[1].name, rows[14].chip, rows[14].flow) == ("Phys-irq", "i8042", "IO-APIC", "edge")
    assert (rows[97].chip, rows[97].flow, rows[97].name) == ("xen-dyn", "event", "blkif")
    assert (rows[104].chip, rows[104].flow, rows[104].name) == ("xen-percpu", "ipi", "resched1")
    assert (rows[256].chip, rows[256].name) == ("Dynamic-irq", "timer0")


def test_no_cpu_and_a_row_that_is_short() -> None:
    snapshot = read_text("           \n  3:   xen-dyn    -event     dev\nERR:          0\n")
    row, errors = snapshot.interrupts[0].rows
    assert errors.label == "ERR"
    assert (snapshot.interrupts[0].cpus, row.irq, row.actions, len(row.counts)) == ((), 3, ("dev",), 0)
    assert read_text("           \n").interrupts == ()
    snapshot = read_text("           CPU0       CPU1\n  3:          7   xen-dyn    -event     dev\n")
    (row,) = snapshot.interrupts[0].rows
    assert list(row.counts) == [7]
    assert row.actions == ("dev",)
    (note,) = snapshot.unread  # kept, and said
    assert note.reason == "1 counts for 2 CPUs"
    assert note.first == 2


def test_counts_run_together() -> None:
    (table,) = read_text("       CPU0 CPU1 CPU2\n  3:         742949672954294967295  xen-dyn -event dev\n").interrupts
    assert list(table.rows[0].counts) == [7, 4294967295, 4294967295]


CONSOLE = """\
Nov 26 17:38:14 host kernel: [ 12.5] something else
(XEN) [2026-11-26 17:38:14.123] 'e' pressed -> dumping event-channel info
(XEN) [2026-11-26 17:38:14.124] Event channel information for domain 3:
(XEN) [2026-11-26 17:38:14.124] Polling vCPUs: {0,2-3}
(XEN) [2026-11-26 17:38:14.124]     port [p/m/s]
[  512.000001] guest: a line in between
(XEN) [2026-11-26 17:38:14.125]        1 [1/0/1]: s=3 n=0 x=0 d=0 p=33(XEN)        2 [1/1/1]: s=3 n=0 x=0 d=0 p=34
> > > (XEN)        3 [1/0/1]: s=5 n=0 x=0 v=0
2026-11-26T17:38:14+0100 host xen: (XEN)        4 [0/1/1]: s=2 n=0 x=0 d=0
(XEN)     5 in flux
(XEN)        6 [0/0/1]: s=5 n=0 x=2 v=0 Z=system_u:object_r:dom0_t
"""


def test_console_log_with_times_and_lines_in_between() -> None:
    snapshot = read_text(CONSOLE)
    (ports,) = snapshot.channels
    assert ports.domid == 3
    assert ports.polling == (0, 2, 3)
    assert [c.port for c in ports.channels] == [1, 2, 3, 4, 5, 6]
    assert [c.where.line for c in ports.channels] == [7, 7, 8, 9, 10, 11]
    assert ports.by_port[5].kind is Kind.UNKNOWN
    assert ports.by_port[6].consumer == 2
    assert [(u.first, u.last) for u in snapshot.unread] == [(1, 1), (6, 6)]


IRQS = """\
(XEN) IRQ information:
(XEN)    IRQ:  16 vec:d0 IO-APIC-level   status=030 aff:{0-7}/{3} in-flight=1 d0: 16(P-M),d2: 55(-M-)
(XEN)    IRQ:  17 affinity:1 vec:f0 type=IO-APIC-edge    status=00000000 timer_interrupt+0/0x182
(XEN)    IRQ:  18 affinity:ffff vec:a8 type=PCI-MSI         status=00000010 in-flight=0 domain-list=0:301(---),
(XEN)    IRQ:   3 vec:38 IO-APIC-edge    status=002 aff:{0}/{0} mapped, unbound
"""


def test_debug_i_of_several_versions() -> None:
    irqs = {irq.irq: irq for irq in read_text(IRQS).xen_irqs}
    assert [(g.domid, g.pirq, g.pending, g.masked) for g in irqs[16].guests] == [
        (0, 16, True, True),
        (2, 55, False, True),
    ]
    assert (irqs[16].in_flight, irqs[16].effective) == (1, "3")
    assert irqs[17].handler == "timer_interrupt+0/0x182"
    assert (irqs[18].guests[0].pirq, irqs[18].vector) == (301, 0xA8)
    assert irqs[3].handler == "mapped, unbound"


DOMAINS = """\
(XEN) 'q' pressed -> dumping domain info (now = 123456)
(XEN) General information for domain 4:
(XEN)     refcnt=3 dying=2 pause_count=1
(XEN)     nr_pages=32768 xenheap_pages=5 dirty_cpus={} max_pages=65792
(XEN)     handle=913b20d3-0393-4a00-98ae-07213e55ce5d vm_assist=0000002d
(XEN) Rangesets belonging to domain 4:
(XEN) VCPU information and callbacks for domain 4:
(XEN)   UNIT0 affinities: hard={0-1} soft={0-1}
(XEN)     VCPU0: CPU1 [has=F] poll=0 upcall_pend=01 upcall_mask=01 dirty_cpu=1
(XEN)     pause_count=1 pause_flags=2
(XEN)     No periodic timer
(XEN) Notifying guest 4:0 (virq 1, port 0)
"""


def test_debug_q() -> None:
    snapshot = read_text(DOMAINS)
    (domain,) = snapshot.domains
    assert (domain.domid, domain.dying, domain.pause_count) == (4, 2, 1)
    (vcpu,) = domain.vcpus
    assert (vcpu.cpu, vcpu.running, vcpu.upcall_pending, vcpu.upcall_masked) == (1, False, 1, 1)
    assert (vcpu.pause_count, vcpu.pause_flags) == (1, 2)
    assert len(domain.other) == 5
    assert snapshot.unread == ()


XL = """\
Name                                        ID   Mem VCPUs\tState\tTime(s)
Domain-0                                     0  1024     2     r-----     147.7
a name with 2 blanks                        12   128     2     -b----      29.7
(null)                                       9     0     1     --ps-d       1.0
Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)
Domain-0                             0     0    0   -b-      77.1  all / all
Domain-0                             0     1    -   --p       0.0  0-3,5 / all
"""


def test_xl_list() -> None:
    snapshot = read_text(XL)
    assert [(d.name, d.domid, d.vcpus, d.state) for d in snapshot.xl_domains] == [
        ("Domain-0", 0, 2, "r-----"), ("a name with 2 blanks", 12, 2, "-b----"), ("(null)", 9, 1, "--ps-d"),
    ]  # fmt: skip
    assert [(v.vcpu, v.cpu, v.affinity) for v in snapshot.xl_vcpus] == [(0, 0, "all / all"), (1, None, "0-3,5 / all")]
    assert snapshot.unread == ()


def test_commands_in_a_transcript_say_whose_ports_these_are() -> None:
    text = "# lsevtchn 7\n   1: VCPU 0: IPI\n# lsevtchn 0\n   1: VCPU 0: IPI\n"
    text += '# xenstore-ls /local/domain/7\nname = "a"\nvm = "b"\n'
    snapshot = read_text(text)
    assert [each.hint for each in snapshot.channels] == ["7", "0"]
    assert [node.path for node in snapshot.store] == ["/local/domain/7/name", "/local/domain/7/vm"]


def test_configuration_files_are_no_xenstore() -> None:
    snapshot = read_text('name = "u2"\nkernel = "/boot/vmlinuz"\n')
    assert snapshot.store == ()
    assert snapshot.unread[0].text == 'name = "u2"\nkernel = "/boot/vmlinuz"'


def test_grep_style_texts() -> None:
    text = (
        "/proc/irq/24/smp_affinity_list:0-3,8\n/proc/irq/24/effective_affinity_list:2\n"
        "/sys/bus/xen-backend/devices/vif-1-0/xenbus/spurious_events:17\n"
        "/sys/devices/vbd-51712/xenbus/events = 4\n"
    )
    snapshot = read_text(text)
    assert [(f.irq, f.name, f.value) for f in snapshot.irq_files] == [
        (24, "smp_affinity_list", "0-3,8"), (24, "effective_affinity_list", "2"),
    ]  # fmt: skip
    assert [(c.device, c.name, c.value) for c in snapshot.counters] == [
        ("vif-1-0", "spurious_events", 17), ("vbd-51712", "events", 4),
    ]  # fmt: skip
    assert snapshot.unread == ()


def test_a_directory_and_a_running_machine(tmp_path: Path) -> None:
    """A bug report's directory, and the same tree as a machine's root."""
    for path, text in {
        "proc/interrupts": (DATA / "linux-2vcpu/2-drivers.dom0.interrupts").read_text(),
        "proc/irq/47/smp_affinity_list": "0-1\n", "proc/irq/47/effective_affinity_list": "0\n",
        "proc/irq/5/effective_affinity_list": "\n",
        "proc/irq/47/spurious": "count 5\nunhandled 2000\nlast_unhandled 12 ms\n",
        "proc/xen/capabilities": "control_d\n",
        "sys/bus/xen-backend/devices/vif-1-0/xenbus/jiffies_eoi_delayed": "3\n",
        "picture.png": "a\0b",
    }.items():  # fmt: skip
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / "e.gz").write_bytes(gzip.compress((DATA / "linux-2vcpu/2-drivers.debug-e").read_bytes()))
    report = read_files([tmp_path])
    assert len(report.channels) == 2
    assert [(u.reason, Path(u.file).name) for u in report.unread] == [
        ("no text", "picture.png"), ("not understood", "capabilities"),
    ]  # fmt: skip
    machine = live(root=str(tmp_path), tools=False)
    for snapshot in (report, machine):
        assert {(f.irq, f.name, f.value) for f in snapshot.irq_files} == {
            (47, "effective_affinity_list", "0"), (47, "smp_affinity_list", "0-1"), (5, "effective_affinity_list", ""),
            (47, "spurious", "count 5\nunhandled 2000\nlast_unhandled 12 ms"),
        }  # fmt: skip
        (spurious,) = (each for each in explain(snapshot).findings if each.kind == "spurious-irq")
        assert spurious.text.startswith("IRQ 47: 2000 interrupts were handled by nobody")
        assert [(c.device, c.value) for c in snapshot.counters] == [("vif-1-0", 3)]
        assert len(snapshot.interrupts[0].rows) == 56
    assert machine.interrupts[0].hint == "0"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("dom0.interrupts", "0"), ("a/2-drivers.lsevtchn-domU", "domU"), ("lsevtchn.17", "17"), ("domain-3.txt", "3"),
        ("d12", "12"), ("report/dom0/proc/interrupts", "0"), ("domU/interrupts", "domU"), ("2-drivers.debug-e", ""),
        ("old1.txt", ""), ("interrupts", ""), ("random0", ""),
    ],
)  # fmt: skip
def test_whose_it_is_by_its_name(name: str, hint: str) -> None:
    assert hint_of_name(name) == hint


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match="nowhere: No such file"):
        read_files([tmp_path / "nowhere"])
    broken = tmp_path / "broken.gz"
    broken.write_bytes(gzip.compress(b"1: VCPU 0: IPI\n" * 1000)[:-20])
    with pytest.raises(InspectError, match=r"broken\.gz"):
        read_files([broken])
    (tmp_path / "interrupts").write_text(ARM)
    report = read_files([tmp_path])  # one of many is said, and the others are read
    assert len(report.interrupts) == 1
    assert [Path(unread.file).name for unread in report.unread] == ["broken.gz"]
    assert "broken.gz:" in report.unread[0].reason


# -- printed and read back ---------------------------------------------------------------------------------------------


@FEW
@given(tables(), st.sampled_from(["linux", "level", "joined", "2.6.18", "tight"]))
def test_tables_come_back(table: Table, style: str) -> None:
    snapshot = read_text(print_interrupts(table, style))
    (found,) = snapshot.interrupts
    assert found.cpus == table.cpus
    assert [(row.label, tuple(map(int, row.counts))) for row in found.rows] == [
        (row.label, row.counts) for row in table.rows + table.trailing
    ]
    for row, printed in zip(found.rows, table.rows, strict=False):
        if style == "linux":
            assert (row.chip, row.hwirq, row.flow) == (printed.chip, printed.hwirq, printed.flow)
        if style in ("linux", "level"):
            assert ", ".join(row.actions) == ", ".join(printed.actions)
        if style == "level":
            assert row.trigger == "Edge"
    assert snapshot.unread == ()


@FEW
@given(channel_lists(), st.integers(0, 32751), st.sampled_from(["", "(XEN) ", "(XEN) [  12.345678] "]), st.booleans())
def test_event_channels_come_back(channels: list[Channel], domid: int, prefix: str, with_state: bool) -> None:
    snapshot = read_text(print_debug_e(domid, channels, prefix, with_state=with_state))
    (ports,) = snapshot.channels
    assert ports.domid == domid
    same = [dataclasses.replace(c, where=NOWHERE, state=c.state if with_state else "") for c in ports.channels]
    assert same == [dataclasses.replace(c, state=c.state if with_state else "") for c in channels]
    assert snapshot.unread == ()
    (listed,) = read_text(print_lsevtchn(channels)).channels
    bare = {"pending": None, "masked": None, "state": "", "consumer": 0, "irq": None}
    assert [dataclasses.replace(c, where=NOWHERE) for c in listed.channels] == [
        dataclasses.replace(c, **bare) for c in channels
    ]


def placeless(items: object) -> list[object]:
    """The same without their places, deep within too."""

    def strip(item: object) -> object:
        changes: dict[str, object] = {"where": NOWHERE}
        if isinstance(item, DomainInfo):
            changes["vcpus"] = tuple(map(strip, item.vcpus))
        return dataclasses.replace(item, **changes)  # type: ignore[type-var]

    return [strip(item) for item in items]  # type: ignore[attr-defined]


@FEW
@given(st.lists(guest_irqs | own_irqs, max_size=6), st.lists(pins, max_size=4), st.sampled_from(["", "(XEN) "]))
def test_interrupts_of_xen_come_back(irqs: list[XenIrq], ioapic: list[IoapicPin], prefix: str) -> None:
    snapshot = read_text(print_debug_i(irqs, ioapic, prefix))
    assert placeless(snapshot.xen_irqs) == irqs
    assert placeless(snapshot.pins) == ioapic
    assert snapshot.unread == ()


@FEW
@given(st.lists(domain_infos, max_size=4), st.sampled_from(["", "(XEN) ", "Nov 26 17:38:14 h xen: (XEN) [  1.5] "]))
def test_domains_of_xen_come_back(domains: list[DomainInfo], prefix: str) -> None:
    snapshot = read_text(print_debug_q(domains, prefix))
    assert placeless(snapshot.domains) == domains
    assert snapshot.unread == ()


@FEW
@given(st.lists(xl_domains, max_size=6), st.lists(xl_vcpus, max_size=6))
def test_lists_of_xl_come_back(domains: list[XlDomain], vcpus: list[XlVcpu]) -> None:
    snapshot = read_text(print_xl_list(domains) + print_vcpu_list(vcpus))
    assert placeless(snapshot.xl_domains) == domains
    assert placeless(snapshot.xl_vcpus) == vcpus
    assert snapshot.unread == ()


@FEW
@given(st.lists(irq_files, max_size=6), st.lists(xenbus_counters, max_size=6), st.sampled_from([":", "=", " = "]))
def test_files_come_back(files: list[IrqFile], counters: list[XenbusCounter], style: str) -> None:
    snapshot = read_text(print_files(files, counters, style))
    assert placeless(snapshot.irq_files) == files
    assert placeless(snapshot.counters) == counters
    assert snapshot.unread == ()


@FEW
@given(stores(), st.booleans())
def test_stores_come_back(nodes: dict[str, str], full: bool) -> None:
    snapshot = read_text(print_store(nodes, full=full))
    assert {node.path: node.value for node in snapshot.store} == nodes
    assert snapshot.unread == ()


NOISE = [
    "[  512.000001] eth0: 1000 Mbps, full duplex", "Nov 26 17:38:15 host sshd[12]: 3: something 5",
    "(XEN) d1v0 12: RIP 4 5",
    "2026-11-26T17:38:14+0100 host app: 7 8", "CPU: 0 PID: 1 Comm: swapper", "12:34:56 1: 2", "-- MARK --", "rc=0",
]  # fmt: skip
PREFIXES = ["", "Nov 26 17:38:14 host cat[12]: ", "[   12.345678] ", "> ", "2026-11-26T17:38:14+0100 host cat: "]


@FEW
@given(tables(), channel_lists(), stores(), st.sampled_from(PREFIXES), st.data())
def test_other_lines_in_between_and_times_in_front_do_no_harm(
    table: Table, channels: list[Channel], nodes: dict[str, str], prefix: str, data: st.DataObject
) -> None:
    """A table, a dump and a listing in a log, with other programs' lines between their lines: all of them come back."""
    lines = print_interrupts(table).splitlines() + print_debug_e(3, channels).splitlines()
    lines += print_store(nodes, full=True).splitlines() + print_lsevtchn(channels).splitlines()
    mixed, noise = [], 0
    for line in lines:
        for other in data.draw(st.lists(st.sampled_from(NOISE), max_size=2)):
            mixed.append(other)
            noise += 1
        mixed.append(prefix + line)
    snapshot = read_text("\n".join(mixed))
    (found,) = snapshot.interrupts
    assert [tuple(map(int, row.counts)) for row in found.rows] == [row.counts for row in table.rows + table.trailing]
    assert [(each.source, len(each.channels)) for each in snapshot.channels] == [
        ("lsevtchn", len(channels)), ("debug-e", len(channels)),
    ]  # fmt: skip
    assert {node.path: node.value for node in snapshot.store} == nodes
    assert lines_in(snapshot) == noise


# -- nonsense ----------------------------------------------------------------------------------------------------------

SAMPLES = [path.read_bytes() for path in RECORDED if path.stat().st_size < 5000][::7] + [
    text.encode() for text in (ARM, X86, OLD, CONSOLE, IRQS, DOMAINS, XL)
]


def lines_in(snapshot: Snapshot) -> int:
    """How many lines of the input a snapshot accounts for."""
    return sum(unread.last - unread.first + 1 for unread in snapshot.unread)


def read_bytes(data: bytes) -> Snapshot:
    reader = Reader()
    reader.lines(lines_of(io.BytesIO(data), "fuzz"))
    return reader.snapshot()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_files_raise_nothing(data: st.DataObject) -> None:
    text = bytearray(data.draw(st.sampled_from(SAMPLES)))
    for _ in range(data.draw(st.integers(1, 12))):
        at = data.draw(st.integers(0, max(len(text) - 1, 0)))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "repeat", "join"]))
        if what == "flip" and text:
            text[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del text[at : at + data.draw(st.integers(1, 40))]
        elif what == "insert":
            text[at:at] = data.draw(st.one_of(st.binary(max_size=12), st.integers().map(lambda n: str(n).encode())))
        elif what == "repeat":
            text[at:at] = text[at : at + data.draw(st.integers(1, 200))]
        else:
            text[:] = text + data.draw(st.sampled_from(SAMPLES))[at:]
    read_bytes(bytes(text))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_raise_nothing_and_are_kept(data: bytes) -> None:
    snapshot = read_bytes(data)
    if snapshot.empty:
        assert lines_in(snapshot) == sum(1 for line in data.split(b"\n") if line.rstrip(b"\r").strip(b" \t"))


@pytest.mark.parametrize(
    "line",
    [
        b" " * 30_000 + b"x", b"CPU0 " * 20_000, b"1:" + b" 1" * 20_000, b"(XEN)" * 6_000,
        b"/" + b"a/" * 15_000 + b' = "',
        b"> " * 15_000, b"a " * 15_000 + b"1 1 1 r----- 1.0", b"IRQ: 1 vec:00 x status=0 aff:{" + b"0," * 15_000,
        b"/proc/irq/1/smp_affinity" * 1_300, b"[" + b" " * 30_000, b"1" * 30_000 + b":" + b"1" * 30_000, b"=" * 32_000,
        b"a" + b" " * 30_000 + b"1", b"1: VCPU 0: x" + b" " * 30_000 + b"y",
        b"IRQ: 1 vec:00" + b" " * 30_000 + b"status=0",
    ],
    ids=lambda line: repr(line[:20]),
)  # fmt: skip
def test_long_lines_take_bounded_time(line: bytes) -> None:
    """Each pattern looks at a line in time that grows with its length, not with a power of it: these would hang."""
    table = b"           CPU0       CPU1\n"
    for text in (line, table + line, XL.encode() + line, DOMAINS.encode() + line, CONSOLE.encode() + line):
        read_bytes(text + b"\n" + line)


class Endless(io.RawIOBase):
    """A stream of so many bytes, of which none is kept."""

    def __init__(self, pattern: bytes, size: int) -> None:
        self._pattern, self._left = pattern, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        size = min(len(buffer), self._left)
        buffer[:size] = (self._pattern * (size // len(self._pattern) + 1))[:size]
        self._left -= size
        return size


def test_memory_is_bounded_by_what_is_kept() -> None:
    """Logs that nobody understands, and a line of 8 MB: what is held is less."""
    tracemalloc.start()
    try:
        reader = Reader()
        for pattern in (b"Nov 26 17:38:14 host app[1]: nothing of interest\n", b"(XEN) CPU nothing of interest\n"):
            reader.lines(lines_of(io.BufferedReader(Endless(pattern, 3 << 20)), "log"))
        reader.lines(lines_of(io.BufferedReader(Endless(b"x", 8 * LONGEST)), "line"))
        snapshot = reader.snapshot()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * LONGEST + 2 * KEPT
    assert lines_in(snapshot) > 50_000
    assert (snapshot.unread[-1].first, snapshot.unread[-1].reason) == (1, "cut: too long")

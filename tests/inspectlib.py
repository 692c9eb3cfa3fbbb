"""Machines to inspect: their tables as hypothesis makes them, and printers of every form that Linux and Xen have.

The printers are written from the formats (kernel/irq/proc.c, lsevtchn.c, event_channel.c, irq.c, xl_list.c,
xenstore_client.c), not from the parsers: what they print must come back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from pvirq.inspect.model import (
    Channel,
    DomainInfo,
    IoapicPin,
    IrqFile,
    IrqGuest,
    Kind,
    VcpuInfo,
    XenbusCounter,
    XenIrq,
    XlDomain,
    XlVcpu,
)  # fmt: skip
from pvirq.inspect.source import Where

DATA: Final = Path(__file__).parent / "data"
NOWHERE: Final = Where("")


@dataclass(frozen=True)
class Row:
    """A row of /proc/interrupts before it is printed."""

    label: str
    counts: tuple[int, ...]
    chip: str = ""
    hwirq: str = ""
    flow: str = ""
    actions: tuple[str, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Table:
    cpus: tuple[int, ...]
    rows: tuple[Row, ...]
    trailing: tuple[Row, ...] = field(default=())  # with letters


# -- printers ----------------------------------------------------------------------------------------------------------


def print_interrupts(table: Table, style: str = "linux") -> str:
    """Styles: linux (since 2.6.27), level (with Edge and Level), joined (3.x: chip-flow), 2.6.18, tight (no blanks)."""
    width = max([3, *(len(row.label) for row in table.rows)])
    lines = [" " * (width + 8) + "".join(f"CPU{cpu:<8d}" for cpu in table.cpus)]
    for row in table.rows:
        if style == "tight":
            counts = "".join(f"{count:10d}" for count in row.counts) + " "
        else:
            counts = "".join(f"{count:10d} " for count in row.counts)
        line = f"{row.label:>{width}}: {counts}"
        if style == "2.6.18":
            line += f" {row.chip:>14}"
        elif style == "joined":
            line += f" {row.chip:>8}-{row.flow or 'edge':<8}"
        else:
            line += f" {row.chip:>8} {row.hwirq:>{width}}"
            line += " Edge    " if style == "level" else ""
            line += f"-{row.flow:<8}" if row.flow else ""
        lines.append(line + ("  " + ", ".join(row.actions) if row.actions else ""))
    for row in table.trailing:
        counts = "".join(f"{count:10d} " for count in row.counts)
        lines.append(f"{row.label:>{width}}: {counts}" + (f"  {row.text}" if row.text else ""))
    return "\n".join(lines) + "\n"


def print_lsevtchn(channels: list[Channel]) -> str:
    words = {
        Kind.UNBOUND: lambda c: f"Interdomain (Waiting connection) - Remote Domain {c.remote}",
        Kind.INTERDOMAIN: lambda c: f"Interdomain (Connected) - Remote Domain {c.remote}, Port {c.remote_port}",
        Kind.PIRQ: lambda c: f"Physical IRQ {c.pirq}",
        Kind.VIRQ: lambda c: f"Virtual IRQ {c.virq}",
        Kind.IPI: lambda c: "IPI",
    }
    return "".join(f"{c.port:4d}: VCPU {c.vcpu}: {words[c.kind](c)}\n" for c in channels)


def print_debug_e(domid: int, channels: list[Channel], prefix: str = "(XEN) ", *, with_state: bool = True) -> str:
    numbers = {Kind.RESERVED: 1, Kind.UNBOUND: 2, Kind.INTERDOMAIN: 3, Kind.PIRQ: 4, Kind.VIRQ: 5, Kind.IPI: 6}
    head = "    port [p/m/s]" if with_state else "    port [p/m]"
    lines = [f"Event channel information for domain {domid}:", "Polling vCPUs: {}", head]
    for c in channels:
        state = f"/{c.state}" if with_state else ""
        line = f"    {c.port:4d} [{c.pending:d}/{c.masked:d}{state}]: s={numbers[c.kind]} n={c.vcpu} x={c.consumer}"
        if c.kind is Kind.UNBOUND:
            line += f" d={c.remote}"
        elif c.kind is Kind.INTERDOMAIN:
            line += f" d={c.remote} p={c.remote_port}"
        elif c.kind is Kind.PIRQ:
            line += f" p={c.pirq} i={c.irq}"
        elif c.kind is Kind.VIRQ:
            line += f" v={c.virq}"
        lines.append(line)
    return "".join(f"{prefix}{line}\n" for line in lines)


def print_store(nodes: dict[str, str], *, full: bool) -> str:
    lines = []
    for path, value in nodes.items():
        parts = path.strip("/").split("/")
        lines.append(f'{path if full else " " * (len(parts) - 1) + parts[-1]} = "{value}"\n')
    return "".join(lines)


def print_debug_i(irqs: list[XenIrq], pins: list[IoapicPin], prefix: str = "(XEN) ") -> str:
    """As Xen since 4.13 does."""
    lines = ["IRQ information:"]
    for irq in irqs:
        line = f"   IRQ:{irq.irq:4d} vec:{irq.vector:02x} {irq.type:<15} status={irq.status:03x}"
        line += f" aff:{{{irq.affinity}}}/{{{irq.effective}}} "
        if irq.in_flight is not None:
            guests = ",".join(f"d{guest.domid}:{guest.pirq:3d}({guest.flags})" for guest in irq.guests)
            line += f"in-flight={irq.in_flight} {guests}"
        else:
            line += irq.handler if irq.handler == "mapped, unbound" else f"{irq.handler}()"
        lines.append(line)
    lines.append("IO-APIC interrupt information:")
    for pin in pins:
        entry = " ".join(f"{name}{':' if name == 'dest_id' else '='}{value}" for name, value in pin.entry)
        lines += [f"    IRQ{pin.irq:3d} Vec{pin.vector:3d}:", f"      Apic 0x{pin.apic:02x}, Pin {pin.pin:2d}: {entry}"]
    return "".join(f"{prefix}{line}\n" for line in lines)


def print_debug_q(domains: list[DomainInfo], prefix: str = "(XEN) ") -> str:
    lines = ["'q' pressed -> dumping domain info (now = 12345)"]
    for domain in domains:
        lines += [
            f"General information for domain {domain.domid}:",
            f"    refcnt=3 dying={domain.dying} pause_count={domain.pause_count}",
            f"    handle={domain.handle} vm_assist=0000002d",
            f"VCPU information and callbacks for domain {domain.domid}:",
        ]
        for vcpu in domain.vcpus:
            lines += [
                f"    VCPU{vcpu.vcpu}: CPU{vcpu.cpu} [has={'T' if vcpu.running else 'F'}] poll={vcpu.poll} "
                f"upcall_pend={vcpu.upcall_pending:02x} upcall_mask={vcpu.upcall_masked:02x} dirty_cpu={vcpu.cpu}",
                f"    pause_count={vcpu.pause_count} pause_flags={vcpu.pause_flags:x}",
            ]
    return "".join(f"{prefix}{line}\n" for line in lines)


def print_xl_list(domains: list[XlDomain]) -> str:
    lines = ["Name                                        ID   Mem VCPUs\tState\tTime(s)"]
    lines += [f"{d.name:<40} {d.domid:5d} {d.memory:5d} {d.vcpus:5d}     {d.state}  {d.seconds:8.1f}" for d in domains]
    return "\n".join(lines) + "\n"


def print_vcpu_list(vcpus: list[XlVcpu]) -> str:
    lines = ["Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)"]
    for v in vcpus:
        cpu = "-" if v.cpu is None else str(v.cpu)
        lines.append(f"{v.name:<32} {v.domid:5d} {v.vcpu:5d} {cpu:>5}   {v.state} {v.seconds:9.1f}  {v.affinity}")
    return "\n".join(lines) + "\n"


def print_files(files: list[IrqFile], counters: list[XenbusCounter], style: str) -> str:
    """As `grep . FILES` (":"), or with another mark between path and value."""
    lines = [f"/proc/irq/{file.irq}/{file.name}{style}{file.value}" for file in files]
    lines += [f"/sys/bus/xen/devices/{each.device}/xenbus/{each.name}{style}{each.value}" for each in counters]
    return "".join(f"{line}\n" for line in lines)


# -- what is printed ---------------------------------------------------------------------------------------------------

counts32 = st.one_of(st.integers(0, 99), st.integers(0, (1 << 32) - 1))
names = st.text("abcdefghijklmnopqrstuvwxyzABC0123456789:@._-/ ", min_size=1, max_size=24).map(str.strip).filter(
    lambda text: text and "  " not in text and not text.startswith("-")
)  # fmt: skip
chips = st.sampled_from(
    ["xen-dyn", "xen-dyn-lateeoi", "xen-pirq", "xen-percpu", "IO-APIC", "PCI-MSI", "GICv3", "ITS-MSI"]
)
flows = st.sampled_from(["event", "virq", "ipi", "ioapic-edge", "ioapic-level", "msi-x", "edge", "level", "fasteoi"])


@st.composite
def tables(draw: st.DrawFn, *, max_cpus: int = 12) -> Table:
    cpus = tuple(sorted(draw(st.sets(st.integers(0, 600), min_size=1, max_size=max_cpus))))
    each = st.tuples(*[counts32] * len(cpus))
    irqs = sorted(draw(st.sets(st.integers(0, 5000), max_size=10)))
    rows = []
    for irq in irqs:
        actions = tuple(draw(st.lists(names, max_size=3)))
        rows.append(
            Row(str(irq), draw(each), draw(chips), draw(st.sampled_from(["", "7", "524288"])), draw(flows), actions)
        )
    trailing = [Row("NMI", draw(each), text="Non-maskable interrupts"), Row("ERR", (draw(counts32),))]
    return Table(cpus, tuple(rows), tuple(trailing))


@st.composite
def channel_lists(draw: st.DrawFn) -> list[Channel]:
    """Ports as the 'e' key knows them."""
    domids, ports = st.integers(0, 32751), st.integers(1, 131071)
    found = []
    for port in sorted(draw(st.sets(st.integers(1, 4095), min_size=1, max_size=12))):
        kind = draw(st.sampled_from([Kind.UNBOUND, Kind.INTERDOMAIN, Kind.PIRQ, Kind.VIRQ, Kind.IPI]))
        found.append(Channel(
            NOWHERE, port, draw(st.integers(0, 511)), kind,
            remote=draw(domids) if kind in (Kind.UNBOUND, Kind.INTERDOMAIN) else None,
            remote_port=draw(ports) if kind is Kind.INTERDOMAIN else None,
            pirq=draw(st.integers(0, 4095)) if kind is Kind.PIRQ else None,
            virq=draw(st.integers(0, 23)) if kind is Kind.VIRQ else None,
            irq=draw(st.integers(0, 4095)) if kind is Kind.PIRQ else None,
            pending=draw(st.booleans()), masked=draw(st.booleans()), state=draw(st.sampled_from(["-", "0", "1", "77"])),
            consumer=draw(st.integers(0, 3)),
        ))  # fmt: skip
    return found


@st.composite
def stores(draw: st.DrawFn) -> dict[str, str]:
    """A store in the order in which xenstore-ls prints one: below each node its children."""
    keys = st.text("abcdefgh0123456789-", min_size=1, max_size=6)
    values = st.text("abc /:=\\\"'0123456789", max_size=12)
    nodes = {"/local": ""}

    def below(path: str, depth: int) -> None:
        for key in sorted(draw(st.sets(keys, max_size=3))):
            nodes[f"{path}/{key}"] = draw(values)
            if depth:
                below(f"{path}/{key}", depth - 1)

    below("/local", 2)
    return nodes


domids = st.integers(0, 32751)
small = st.integers(0, 4095)
cpu_texts = st.sampled_from(["0", "0-7", "1,3", "0-1,5-7", ""])
guests = st.builds(IrqGuest, domids, small, st.sampled_from(["---", "P--", "-M-", "PMM", "--M"]))
irq_types = st.sampled_from(["IO-APIC-edge", "IO-APIC-level", "PCI-MSI/-X", "PCI-MSI"])
guest_irqs = st.builds(
    XenIrq, st.just(NOWHERE), small, st.integers(0, 255), irq_types, st.integers(0, 0xFFF), cpu_texts, cpu_texts,
    st.integers(0, 3), st.lists(guests, min_size=1, max_size=3).map(tuple), st.just(""),
)  # fmt: skip
own_irqs = st.builds(
    XenIrq, st.just(NOWHERE), small, st.integers(0, 255), irq_types, st.integers(0, 0xFFF), cpu_texts, cpu_texts,
    st.none(), st.just(()), st.sampled_from(["mapped, unbound", "arch/x86/time.c#timer_interrupt"]),
)  # fmt: skip
pins = st.builds(
    IoapicPin, st.just(NOWHERE), st.integers(0, 255), st.integers(0, 255), st.integers(0, 3), st.integers(0, 119),
    st.just((("vec", "f0"), ("delivery", "LoPri"), ("dest", "L"), ("trig", "E"), ("mask", "0"), ("dest_id", "03"))),
)  # fmt: skip
vcpu_infos = st.builds(
    VcpuInfo, st.just(NOWHERE), small, small, st.booleans(), st.integers(-1, 4095), st.integers(0, 1),
    st.integers(0, 1), st.integers(0, 9), st.integers(0, 255),
)  # fmt: skip
domain_infos = st.builds(
    DomainInfo, st.just(NOWHERE), domids, st.integers(0, 2), st.integers(0, 9), st.uuids().map(str),
    st.lists(vcpu_infos, max_size=4).map(tuple),
)  # fmt: skip
domain_names = st.text("abcXYZ019.-_ ", min_size=1, max_size=30).map(str.strip).filter(
    lambda name: name and "  " not in name and not name.replace(" ", "").isdigit()
)  # fmt: skip
tenths = st.integers(0, 10**7).map(lambda number: number / 10)
xl_domains = st.builds(
    XlDomain, st.just(NOWHERE), domain_names, domids, st.integers(0, 10**6), st.integers(0, 512),
    st.sampled_from(["r-----", "-b----", "--p---", "---s--", "---sc-", "--psrd", "------"]), tenths,
)  # fmt: skip
xl_vcpus = st.builds(
    XlVcpu, st.just(NOWHERE), domain_names, domids, small, st.none() | small,
    st.sampled_from(["r--", "-b-", "--p", "---"]), tenths, st.sampled_from(["all / all", "0-3,8 / all", "1 / 0-7"]),
)  # fmt: skip
irq_files = st.builds(
    IrqFile, st.just(NOWHERE), st.integers(0, 10**6), st.sampled_from(["smp_affinity_list", "effective_affinity_list"]),
    cpu_texts,
)  # fmt: skip
xenbus_counters = st.builds(
    XenbusCounter, st.just(NOWHERE), st.sampled_from(["vif-0", "vbd-51712", "vif-12-3"]),
    st.sampled_from(["events", "spurious_events", "jiffies_eoi_delayed"]), st.integers(0, (1 << 64) - 1),
)  # fmt: skip

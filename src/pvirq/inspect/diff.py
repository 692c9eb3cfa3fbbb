"""What changed between two snapshots, of one machine or of two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pvirq.inspect.join import join
from pvirq.inspect.model import Channel, IrqRow, Kind, Snapshot
from pvirq.inspect.picture import DomainView, Link, Picture


@dataclass(frozen=True)
class Change:
    """`domain`: whose; `kind`: domain, cpus, row, count, port, state, vcpu, affinity, node, counter, irq or info.

    `what` is the thing, `before` and `after` its values as text, "" where it isn't there.
    """

    domain: str
    kind: str
    what: str
    before: str
    after: str

    def __str__(self) -> str:
        sign = "+" if not self.before else "-" if not self.after else " "
        change = self.after if not self.before else self.before if not self.after else f"{self.before} -> {self.after}"
        return f"{sign} {self.domain} {self.what}: {change}"


def compare(a: Snapshot, b: Snapshot, *, counts: bool = True, store: bool = True) -> list[Change]:
    """All that differs, domain by domain. `counts`: interrupt counts too; `store`: xenstore too.

    IRQs are told apart by their numbers and handlers, so two hosts with the same devices on other numbers differ.
    """
    one, two = join(a), join(b)
    changes = []
    for domid in sorted({*one.domains, *two.domains}, key=lambda each: (each < 0, abs(each))):
        before, after = one.domains.get(domid), two.domains.get(domid)
        name = f"d{domid}" if domid >= 0 else "guest"
        if before is None or after is None:
            there = before or after
            label = there.label if there else ""
            changes.append(Change(name, "domain", "domain", label if before else "", label if after else ""))
        empty = DomainView(domid)
        changes += list(_domain(name, before or empty, after or empty, counts))
        if before is not None and after is not None:
            changes += list(_affinities(name, one, two, domid))
    changes += list(_machine(a, b, store))
    return changes


def _domain(name: str, a: DomainView, b: DomainView, counts: bool) -> Iterator[Change]:
    cpus = [",".join(map(str, view.table.cpus)) if view.table else "" for view in (a, b)]
    if cpus[0] != cpus[1]:
        yield Change(name, "cpus", "online CPUs", *cpus)
    rows = [{_row_key(row): row for row in view.table.rows} if view.table else {} for view in (a, b)]
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        old, new = rows[0].get(key), rows[1].get(key)
        if old is None or new is None:
            yield Change(name, "row", _row_name(old or new), _row_text(old), _row_text(new))
        else:
            if (old.chip, old.hwirq, old.trigger, old.flow) != (new.chip, new.hwirq, new.trigger, new.flow):
                yield Change(name, "row", _row_name(old), _row_text(old), _row_text(new))
            if counts and a.table and b.table:
                yield from _counts(name, a, b, old, new)
    ports = [{link.channel.port: link for link in view.links if link.channel} for view in (a, b)]
    for port in sorted({*ports[0], *ports[1]}):
        before, after = ports[0].get(port), ports[1].get(port)
        texts = [_port_text(link.channel) if link and link.channel else "" for link in (before, after)]
        if texts[0] != texts[1]:
            yield Change(name, "port", f"port {port}", *texts)
        elif before and after and before.channel and after.channel:
            yield from _port(name, before, after, before.channel, after.channel)
    states = [view.xl.state if view.xl else "" for view in (a, b)]
    if states[0] != states[1] and all(states):
        yield Change(name, "info", "state", *states)
    for vcpu in sorted({*a.vcpus, *b.vcpus}):
        placed = [
            f"CPU {'-' if v.cpu is None else v.cpu}, {v.affinity}" if (v := view.vcpus.get(vcpu)) else ""
            for view in (a, b)
        ]
        if placed[0] != placed[1]:
            yield Change(name, "info", f"vCPU {vcpu}", *placed)


def _port(name: str, before: Link, after: Link, old: Channel, new: Channel) -> Iterator[Change]:
    if old.vcpu != new.vcpu:
        yield Change(name, "vcpu", f"port {old.port}", f"vCPU {old.vcpu}", f"vCPU {new.vcpu}")
    states = [_state(channel) for channel in (old, new)]
    if states[0] != states[1] and None not in (old.pending, new.pending):
        yield Change(name, "state", f"port {old.port}", *states)
    irqs = [link.row.label if link.row else "" for link in (before, after)]
    if irqs[0] != irqs[1] and all(irqs):
        yield Change(name, "port", f"port {old.port}", f"IRQ {irqs[0]}", f"IRQ {irqs[1]}")


def _counts(name: str, a: DomainView, b: DomainView, old: IrqRow, new: IrqRow) -> Iterator[Change]:
    assert a.table is not None
    assert b.table is not None
    whole = len(old.counts) == len(a.table.cpus) and len(new.counts) == len(b.table.cpus)
    if not whole:
        if old.total != new.total:
            yield Change(name, "count", _row_name(old), str(old.total), f"{new.total} ({new.total - old.total:+d})")
        return
    for cpu in sorted({*a.table.cpus, *b.table.cpus}):
        counts = a.table.count(old, cpu), b.table.count(new, cpu)
        if counts[0] != counts[1]:
            change = f"{counts[1]} ({counts[1] - counts[0]:+d})"
            yield Change(name, "count", f"{_row_name(old)} CPU{cpu}", str(counts[0]), change)


def _affinities(name: str, a: Picture, b: Picture, domid: int) -> Iterator[Change]:
    tables = [picture.domains[domid].by_irq for picture in (a, b)]
    for irq in sorted({*tables[0]} & {*tables[1]}):
        lists = [picture.affinity(domid, irq) for picture in (a, b)]
        if lists[0] != lists[1] and all(lists):
            row = tables[1][irq].row
            texts = ["CPU " + ",".join(map(str, cpus)) for cpus in lists]
            yield Change(name, "affinity", _row_name(row), *texts)


def _machine(a: Snapshot, b: Snapshot, store: bool) -> Iterator[Change]:
    """What belongs to no table."""
    irqs = [{irq.irq: irq for irq in snapshot.xen_irqs} for snapshot in (a, b)]
    if all(irqs):
        for irq in sorted({*irqs[0], *irqs[1]}):
            texts = [
                f"vec {x.vector:02x} {x.type} CPUs {x.effective} " + ",".join(f"d{g.domid}:{g.pirq}" for g in x.guests)
                if (x := each.get(irq)) else "" for each in irqs
            ]  # fmt: skip
            if texts[0] != texts[1]:
                yield Change("xen", "irq", f"IRQ {irq}", *texts)
    counters = [{(c.hint, c.device, c.name): c.value for c in snapshot.counters} for snapshot in (a, b)]
    if all(counters):
        for key in sorted({*counters[0], *counters[1]}):
            values = [str(each.get(key, "")) for each in counters]
            if values[0] != values[1]:
                yield Change("sysfs", "counter", f"{key[1]}/{key[2]}", *values)
    if store and a.store and b.store:
        for path in sorted({*a.paths, *b.paths}):
            nodes = [f'"{node.value}"' if (node := each.paths.get(path)) else "" for each in (a, b)]
            if nodes[0] != nodes[1]:
                yield Change("xenstore", "node", path, *nodes)


def _row_key(row: IrqRow) -> tuple[str, str]:
    return (row.label, row.name if row.irq is not None else "")


def _row_name(row: IrqRow | None) -> str:
    if row is None:
        return ""
    return f"IRQ {row.label} {row.name}".rstrip() if row.irq is not None else row.label


def _row_text(row: IrqRow | None) -> str:
    if row is None:
        return ""
    return " ".join(filter(None, (row.chip, row.hwirq, row.trigger, row.flow))) or row.text or "a row"


def _port_text(channel: Channel) -> str:
    kind = channel.kind
    if kind is Kind.INTERDOMAIN:
        return f"interdomain, d{channel.remote} port {channel.remote_port}"
    if kind is Kind.UNBOUND:
        return f"unbound, for d{channel.remote}"
    if kind is Kind.VIRQ:
        return f"VIRQ {channel.virq}"
    return f"pirq {channel.pirq}" if kind is Kind.PIRQ else str(kind)


def _state(channel: Channel) -> str:
    return f"{'pending' if channel.pending else 'not pending'}, {'masked' if channel.masked else 'open'}"

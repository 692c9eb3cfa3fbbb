"""A summary as text for people, and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from pvirq.lab.traceview.follower import OFF, UNSEEN, VIRQ_NAMES, Port
from pvirq.lab.traceview.selection import Selection
from pvirq.lab.traceview.spread import Spread
from pvirq.lab.traceview.summary import OUTCOMES, DomainSummary, Options, PortSummary, Summary, VcpuSummary
from pvirq.lab.traceview.units import duration, moment
from pvirq.xen.probes import COALESCED, LOST, MASKED, WAITING

UNSEEN_TEXTS: Final = {UNSEEN: "its handlers are not seen", "ports": "handlers seen without names"}
MOST_HYPERCALLS: Final = 4
LISTED: Final = 10  # storms, masked times and marks that the text has


def summary_text(summary: Summary, selection: Selection, options: Options) -> str:
    """The whole summary, of the domains and ports that are selected. Times are from the trace's start."""
    lines = list(_head(summary))
    names = {one.domain.d: one.domain.name for one in summary.domains}
    for one in _domains(summary, selection):
        lines += ["", *_domain(one, names, selection)]
    lines += _notes(summary, selection, options)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _domains(summary: Summary, selection: Selection) -> list[DomainSummary]:
    return [one for one in summary.domains if selection.domain(one.domain.d, one.domain.name)]


def _head(summary: Summary) -> Iterator[str]:
    begin, end = (t - summary.trace_start for t in (summary.start, summary.end))
    where = f"{duration(end - begin)}" if not begin else f"{moment(begin)} to {moment(end)}"
    seed = "" if summary.seed is None else f", seed {summary.seed}"
    yield f"{summary.file}: {where} of virtual time, {count(summary.events, 'event')}{seed}"
    if summary.truncated:
        yield "The last line is cut off: the run was killed, or isn't over yet."


def count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _domain(one: DomainSummary, names: dict[int, str], selection: Selection) -> Iterator[str]:
    domain = one.domain
    kernel = "/".join((domain.kernel or "").split("/")[-2:])  # of a file, its directory has the version
    about = [text for text in (domain.world, kernel) if text]
    about.append(count(one.nr_vcpus, "vCPU"))
    about.append(f"at most {count(one.max_pending, 'port')} pending")
    if domain.irqs in UNSEEN_TEXTS:
        about.append(UNSEEN_TEXTS[domain.irqs])
    if domain.ended:
        about.append(f"ended: {domain.ended}")
    yield f"{domain.name} (domain {domain.d}): {', '.join(about)}"
    ports = [port for port in one.ports if selection.port(port.port.p)]
    if busy := [port for port in ports if port.raised or port.irqs]:
        yield from _table(_port_rows(busy, names))
    if silent := len(ports) - len(busy):
        yield f"  {count(silent, 'more port' if busy else 'port')} without events"
    if one.vcpus and selection.ports == ():
        yield from _table(_vcpu_rows(one))
    if (factor := one.imbalance()) is not None:
        movable = one.imbalance(movable=True)
        also = "" if movable is None else f"; {movable:.2f} times of what could be elsewhere"
        yield f"  The busiest vCPU has {factor:.2f} times its even share of IRQs{also}"
    if one.hypercalls and not selection.ports:
        most = [f"{op} {n:,}" for op, n in one.hypercalls.most_common(MOST_HYPERCALLS)]
        most += ["..."] * (len(one.hypercalls) > MOST_HYPERCALLS)
        yield f"  {count(one.hypercalls.total(), 'hypercall')}: {', '.join(most)}"


def _port_rows(ports: list[PortSummary], names: dict[int, str]) -> Iterator[list[str]]:
    rare = [out for out in (WAITING, LOST) if any(port.outcomes[out] for port in ports)]
    head = ["port", "<bound to", "<IRQ", "raised", "coalesced", "masked", *rare]
    yield [*head, "latency p50", "p90", "p99", "max", "handler p50", "masked max"]
    for one in ports:
        counts = [f"{one.outcomes[out]}" for out in (COALESCED, MASKED, *rare)]
        latency = _spread(one.latency, 50, 90, 99, 100)
        more = [*latency, *_spread(one.handler, 50), *_spread(one.masked, 100)]
        yield [f"{one.port.p}", bound_to(one.port, names), one.port.name or "-", f"{one.raised}", *counts, *more]


def bound_to(port: Port, names: dict[int, str]) -> str:
    """What a port is bound to: "guest1:12", "virq timer", "ipi", "pirq 14", "unbound"."""
    if port.type == "interdomain" and port.rd is not None:
        return f"{names.get(port.rd, f'domain {port.rd}')}:{'?' if port.rp is None else port.rp}"
    if port.type == "virq" and port.virq is not None:
        return f"virq {VIRQ_NAMES.get(port.virq, port.virq)}"
    return f"pirq {port.pirq}" if port.type == "pirq" and port.pirq is not None else port.type or "?"


def _spread(spread: Spread, *percents: int) -> list[str]:
    return [duration(spread.percentile(percent)) if spread.count else "-" for percent in percents]


def _vcpu_rows(one: DomainSummary) -> Iterator[list[str]]:
    total = sum(vcpu.irqs for vcpu in one.vcpus.values())
    states = [state for state in VcpuSummary().spent if state != OFF or any(v.spent[OFF] for v in one.vcpus.values())]
    yield ["vCPU", *states, "upcalls", "IRQs", "share", "wake to run p50", "p99", "max"]
    for v, vcpu in sorted(one.vcpus.items()):
        known = sum(vcpu.spent.values())
        spent = [f"{100 * vcpu.spent[state] / known:.1f} %" if known else "-" for state in states]
        share = f"{100 * vcpu.irqs / total:.1f} %" if total else "-"
        yield [f"{v}", *spent, f"{vcpu.upcalls}", f"{vcpu.irqs}", share, *_spread(vcpu.wake, 50, 99, 100)]


def _table(rows: Iterable[list[str]]) -> Iterator[str]:
    """Columns as wide as need be; those whose title begins with < stand to the left."""
    rows = list(rows)
    left = [title.startswith("<") for title in rows[0]]
    rows[0] = [title.removeprefix("<") for title in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ]
        yield "  " + "  ".join(cells)


def _notes(summary: Summary, selection: Selection, options: Options) -> Iterator[str]:
    zero = summary.trace_start
    names = {one.domain.d: one.domain.name for one in summary.domains}
    ports = [p for one in _domains(summary, selection) for p in one.ports if selection.port(p.port.p)]
    if masked := sorted((p for p in ports if p.masked.max), key=lambda p: -p.masked.max)[: LISTED // 2]:
        yield from ("", "Events that waited longest for their port's unmasking:")
        for one in masked:
            waited = f"{duration(one.masked.max)} from {moment(one.masked_at - zero)}"
            yield f"  {names[one.port.d]} port {one.port.p} ({one.port.title}): {waited}"
    chosen = {id(p.port) for p in ports}
    storms = [storm for storm in summary.storms if id(storm.port) in chosen]
    if storms:
        rate = f"{options.storm_events} and more events within {duration(options.storm_window)}"
        yield from ("", f"Storms ({rate}):")
        for storm in storms[:LISTED]:
            where = f"{names[storm.port.d]} port {storm.port.p} ({storm.port.title})"
            when = f"from {moment(storm.began - zero)} for {duration(storm.ended - storm.began)}"
            yield f"  {where}: {storm.events} events {when}"
        yield from _more(len(storms))
    if summary.faults:
        yield from ("", "Faults injected:")
        yield from (f"  {rule}: {action}, {n} times" for (rule, action), n in summary.faults.most_common())
    if summary.choices:
        yield from ("", "Choices:")
        others = summary.other_choices
        yield from (f"  {what}: {n}, {others[what]} not the first" for what, n in summary.choices.most_common())
    if summary.marks:
        yield from ("", "Marks:")
        yield from (f"  {moment(t - zero)}  {text}" for t, text in summary.marks[:LISTED])
        yield from _more(len(summary.marks))


def _more(number: int) -> Iterator[str]:
    if number > LISTED:
        yield f"  and {number - LISTED:,} more"


def summary_dict(summary: Summary, selection: Selection, options: Options) -> dict[str, Any]:
    """The summary for JSON. Times in ns; those that are points of it are the host's, not from the trace's start."""
    storms = [storm for storm in summary.storms if selection.port(storm.port.p)]
    domains = _domains(summary, selection)
    numbers = {one.domain.d for one in domains}
    return {
        "file": summary.file,
        "seed": summary.seed,
        "trace_start": summary.trace_start,
        "start": summary.start,
        "end": summary.end,
        "truncated": summary.truncated,
        "events": summary.events,
        "kinds": dict(summary.kinds),
        "domains": [_domain_dict(one, selection) for one in domains],
        "storm": {"events": options.storm_events, "window": options.storm_window},
        "storms": [
            {"d": s.port.d, "p": s.port.p, "name": s.port.name, "start": s.began, "end": s.ended, "events": s.events}
            for s in storms
            if s.port.d in numbers
        ],
        "faults": [{"rule": rule, "action": action, "count": n} for (rule, action), n in summary.faults.items()],
        "choices": dict(summary.choices),
        "choices_not_the_first": dict(summary.other_choices),
        "marks": [{"t": t, "text": text} for t, text in summary.marks],
    }


def _domain_dict(one: DomainSummary, selection: Selection) -> dict[str, Any]:
    domain = one.domain
    return {
        "d": domain.d,
        "name": domain.name,
        "kind": domain.world,
        "kernel": domain.kernel,
        "handlers_seen": domain.irqs,
        "vcpus": one.nr_vcpus,
        "ended": domain.ended,
        "max_pending": one.max_pending,
        "imbalance": one.imbalance(),
        "imbalance_movable": one.imbalance(movable=True),
        "hypercalls": dict(one.hypercalls),
        "ports": [_port_dict(port) for port in one.ports if selection.port(port.port.p)],
        "vcpu": [
            {
                "v": v,
                **vcpu.spent,
                "upcalls": vcpu.upcalls,
                "irqs": vcpu.irqs,
                "movable_irqs": vcpu.movable,
                "wake_to_run": vcpu.wake.as_dict(),
            }
            for v, vcpu in sorted(one.vcpus.items())
        ],
    }


def _port_dict(one: PortSummary) -> dict[str, Any]:
    port = one.port
    return {
        "p": port.p,
        "name": port.name,
        "type": port.type or None,
        "v": port.v,
        "rd": port.rd,
        "rp": port.rp,
        "virq": port.virq,
        "pirq": port.pirq,
        "raised": one.raised,
        **{out: one.outcomes[out] for out in OUTCOMES},
        "delivered": one.delivered,
        "irqs": one.irqs,
        "latency": one.latency.as_dict(),
        "upcall_to_entry": one.entry.as_dict(),
        "handler": one.handler.as_dict(),
        "masked_time": {**one.masked.as_dict(), "max_at": one.masked_at if one.masked.count else None},
    }

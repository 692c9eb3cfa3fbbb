"""A snapshot as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

from collections.abc import Iterable

from pvirq.inspect.findings import Explanation
from pvirq.inspect.picture import Link, Picture

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Family:
    """One metric with its samples, which the format wants together."""

    def __init__(self, name: str, kind: str, about: str) -> None:
        self._head = [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
        self._name = name
        self._samples: dict[str, str] = {}

    def add(self, value: float, **labels: str) -> None:
        """One sample; of two with the same labels the last one stays."""
        inside = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        self._samples[f"{self._name}{{{inside}}}" if inside else self._name] = str(value)

    def lines(self) -> Iterable[str]:
        return [*self._head, *(f"{name} {value}" for name, value in self._samples.items())] if self._samples else []


def _labels(link: Link) -> dict[str, str]:
    device = link.device
    if device is None:
        return {"device": "", "queue": "", "peer": str(link.peer[0]) if link.peer else ""}
    queue = "" if device.queue is None else f"{device.queue}"
    peer = link.peer[0] if link.peer else device.frontend if link.side == "back" else None
    return {
        "device": f"{device.type}{f'-{device.id}' if device.type not in ('store', 'console') else ''}",
        "queue": f"{queue}{f'-{device.direction}' if device.direction else ''}",
        "peer": "" if peer is None else str(peer),
    }  # fmt: skip


def prometheus(explanation: Explanation) -> str:
    """All metrics of a snapshot: counts by line and CPU, ports by kind and state, device counters, findings."""
    picture: Picture = explanation.picture
    families = (
        interrupts := _Family("pvirq_interrupts_total", "counter", "Interrupts, by line and CPU."),
        ports := _Family("pvirq_event_channels", "gauge", "Event channels, by kind."),
        pending := _Family("pvirq_event_channels_pending", "gauge", "Event channels with an event pending, by vCPU."),
        masked := _Family("pvirq_event_channels_masked", "gauge", "Event channels that are masked, by vCPU."),
        devices := _Family("pvirq_xenbus_device_total", "counter", "What Linux counts of a split-driver device."),
        threshold := _Family("pvirq_xenbus_spurious_threshold", "gauge", "Spurious events in a row that are free."),
        findings := _Family("pvirq_findings", "gauge", "Findings of pvirq explain, by severity and check."),
        unread := _Family("pvirq_unread_lines", "gauge", "Lines that were not understood."),
    )
    for view in picture.domains.values():
        domain = str(view.domid) if view.domid >= 0 else ""
        for row in view.table.rows if view.table else ():
            link = view.by_irq.get(row.irq) if row.irq is not None else None
            about = _labels(link or Link(view.domid))
            whole = view.table is not None and len(row.counts) == len(view.table.cpus)
            for i, count in enumerate(row.counts.tolist()):
                cpu = str(view.table.cpus[i]) if view.table and whole else ""
                name = row.name if row.irq is not None else row.text
                interrupts.add(count, domain=domain, irq=row.label, name=name, chip=row.chip, cpu=cpu, **about)
        counts: dict[tuple[str, ...], list[int]] = {}
        for channel in view.ports.channels if view.ports else ():
            counts.setdefault(("kind", channel.kind), [0])[0] += 1
            if channel.pending is not None:
                entry = counts.setdefault(("vcpu", str(channel.vcpu)), [0, 0])
                entry[0] += channel.pending
                entry[1] += bool(channel.masked)
        for key, values in sorted(counts.items()):
            if key[0] == "kind":
                ports.add(values[0], domain=domain, kind=key[1])
            else:
                pending.add(values[0], domain=domain, vcpu=key[1])
                masked.add(values[1], domain=domain, vcpu=key[1])
    for counter in picture.snapshot.counters:
        if counter.name == "spurious_threshold":
            threshold.add(counter.value, domain=counter.hint, device=counter.device)
        else:
            devices.add(counter.value, domain=counter.hint, device=counter.device, counter=counter.name)
    totals: dict[tuple[str, str], int] = {}
    for finding in explanation.findings:
        key = (finding.severity.name.lower(), finding.kind)
        totals[key] = totals.get(key, 0) + 1
    for (severity, kind), number in sorted(totals.items()):
        findings.add(number, severity=severity, kind=kind)
    unread.add(sum(each.last - each.first + 1 for each in picture.snapshot.unread))
    return "".join(f"{line}\n" for family in families for line in family.lines())

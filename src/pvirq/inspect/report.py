"""An explanation as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

import numpy as np

from pvirq.inspect.finding import Finding
from pvirq.inspect.findings import Explanation
from pvirq.inspect.model import Kind, Snapshot, Unread
from pvirq.inspect.picture import DomainView, How, Link
from pvirq.inspect.source import Where

EVIDENCE: Final = 6
UNREAD_SHOWN: Final = 10


def text_report(explanation: Explanation, *, table: bool = True, unread: bool = False) -> str:
    """Findings, then the table of each domain's IRQs and ports, then what wasn't understood (`unread`: all of it)."""
    lines = []
    for finding in explanation.findings:
        lines += _finding_lines(finding)
    if not explanation.findings:
        lines.append("Nothing looks wrong in what was read.")
    if table:
        for view in explanation.picture.domains.values():
            if view.links:
                lines += ["", *_table_lines(view)]
    if older := explanation.picture.superseded:
        lines += [
            "",
            f"Older dumps of event channels had no part in this: {_several_places([x.where for x in older])}.",
        ]
    lines += _unread_lines(explanation.picture.snapshot.unread, unread)
    return "\n".join(map(printable, lines)) + "\n"


def printable(text: str) -> str:
    """A line without control characters: names and logs are others' text, and may hold a terminal's commands."""
    return text if text.isprintable() else "".join(ch if ch.isprintable() else "?" for ch in text)


def _several_places(places: list[Where]) -> str:
    more = f" and {len(places) - EVIDENCE} more" if len(places) > EVIDENCE else ""
    return ", ".join(map(str, places[:EVIDENCE])) + more


def _finding_lines(finding: Finding) -> list[str]:
    lines = [f"{finding.severity.name.lower()}: {finding.text} [{finding.kind}]"]
    if finding.evidence:
        lines.append(f"    see {_several_places(list(dict.fromkeys(finding.evidence)))}")
    if finding.command:
        lines.append(f"    try {finding.command}")
    return lines


def _table_lines(view: DomainView) -> list[str]:
    lines = [
        f"{view.label}:",
        "   IRQ  port vcpu       count  what",
    ]
    last = None
    for link in view.links:
        row, channel = link.row, link.channel
        # "~": by order alone
        port = "-" if channel is None else f"{'~' if link.how is How.ORDER else ''}{channel.port}"
        vcpu = "-" if channel is None else str(channel.vcpu)
        count = "-" if row is None else '"' if row is last else str(row.total)  # a line may have several ports
        last = row
        lines.append(f"{row.label if row else '-':>6} {port:>5} {vcpu:>4} {count:>11}  {what(link)}".rstrip())
    return lines


def what(link: Link) -> str:
    """What an IRQ and its port are, in a few words."""
    words = [link.row.name] if link.row and link.row.name else []
    if link.device is not None:
        words.append(f"{link.device.name}{f' of d{link.device.frontend}' if link.side == 'back' else ''}")
    channel = link.channel
    if channel is None:
        return "  ".join(words)
    if channel.kind is Kind.INTERDOMAIN:
        words.append(f"-> d{channel.remote} port {channel.remote_port}")
    elif channel.kind is Kind.UNBOUND:
        words.append(f"waits for d{channel.remote}")
    elif channel.kind is Kind.VIRQ:
        words.append(f"VIRQ {channel.virq}")
    elif channel.kind is Kind.PIRQ:
        words.append(f"pirq {channel.pirq}" + (f" (Xen's IRQ {channel.irq})" if channel.irq is not None else ""))
    else:
        words.append({Kind.IPI: "IPI"}.get(channel.kind, str(channel.kind)))
    state = " ".join(name for name, is_so in (("pending", channel.pending), ("masked", channel.masked)) if is_so)
    return "  ".join([*words, f"[{state}]"] if state else words)


def _unread_lines(unread: tuple[Unread, ...], everything: bool) -> list[str]:
    if not unread:
        return []
    lines = [""]
    count = sum(each.last - each.first + 1 for each in unread)
    lines.append(f"{count} line{'s were' if count > 1 else ' was'} not understood, and had no part in this:")
    shown = unread if everything else unread[:UNREAD_SHOWN]
    for each in shown:
        lines.append(f"    {each}"[:200])
        if everything:
            lines += [f"        {line}" for line in each.text.splitlines()[1:]]
    if len(unread) > len(shown):
        lines.append(f"    and {len(unread) - len(shown)} more places (--unread shows all)")
    return lines


# -- JSON --------------------------------------------------------------------------------------------------------------


def json_report(explanation: Explanation) -> dict[str, Any]:
    """The same for programs: findings, domains with their IRQs and ports, and what wasn't understood."""
    picture = explanation.picture
    return {
        "findings": [
            {
                "severity": finding.severity.name.lower(), "kind": finding.kind, "text": finding.text,
                "evidence": [_where(where) for where in finding.evidence], "command": finding.command or None,
                "domid": finding.domid,
            }
            for finding in explanation.findings
        ],
        "domains": [
            {
                "domid": view.domid if view.domid >= 0 else None, "name": view.name or None,
                "cpus": list(view.table.cpus) if view.table else None,
                "lines": [_link(link) for link in view.links],
            }
            for view in picture.domains.values()
        ],
        "unread": unread_json(picture.snapshot),
    }  # fmt: skip


def snapshot_json(snapshot: Snapshot) -> dict[str, Any]:
    """All that was read, by kinds."""
    return {each.name: _plain(getattr(snapshot, each.name)) for each in dataclasses.fields(snapshot)}


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and counts as JSON has them."""
    if isinstance(value, Where):
        return _where(value)
    if dataclasses.is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def unread_json(snapshot: Snapshot) -> list[dict[str, Any]]:
    """What wasn't understood."""
    return [
        {"file": u.file, "first": u.first, "last": u.last, "reason": u.reason, "text": u.text} for u in snapshot.unread
    ]


def _link(link: Link) -> dict[str, Any]:
    row, channel, device = link.row, link.channel, link.device
    return {
        "irq": row.irq if row else None, "handlers": list(row.actions) if row else None,
        "chip": row.chip if row else None, "flow": row.flow if row else None,
        "counts": [int(count) for count in row.counts] if row else None,
        "port": channel.port if channel else None, "vcpu": channel.vcpu if channel else None,
        "kind": str(channel.kind) if channel else None,
        "pending": channel.pending if channel else None, "masked": channel.masked if channel else None,
        "virq": channel.virq if channel else None, "pirq": channel.pirq if channel else None,
        "remote": None if channel is None or channel.remote is None else (
            {"domid": channel.remote, "port": channel.remote_port}
        ),
        "known_by": str(link.how) if link.how else None,
        "device": {"frontend": device.frontend, "type": device.type, "id": device.id, "queue": device.queue,
                   "direction": device.direction or None, "side": link.side} if device else None,
        "evidence": [_where(where) for where in link.evidence],
    }  # fmt: skip


def _where(where: Where) -> dict[str, Any]:
    return {"file": where.file, "line": where.line}

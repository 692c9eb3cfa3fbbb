"""A finding, and the words that findings are made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from pvirq.inspect.model import Channel, Kind
from pvirq.inspect.picture import DomainView, Link, Picture
from pvirq.inspect.source import Where

SHOWN: Final = 6  # of many alike


class Severity(IntEnum):
    """How bad it is. An ERROR stops something; a WARNING costs something, or will; a NOTE is worth knowing."""

    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Finding:
    """`kind` names the check; `command` is what would mend it (or tell more), "" where nothing would."""

    severity: Severity
    kind: str
    text: str
    evidence: tuple[Where, ...] = ()
    command: str = ""
    domid: int | None = None


def describe(view: DomainView, link: Link) -> str:
    """As "domain 1 (u2) port 15 (IRQ 14 blkif, vbd 51712 queue 0, vCPU 1)"."""
    about = []
    if link.row is not None:
        about.append(f"IRQ {link.row.label} {link.row.name}".strip())
    if link.device is not None:
        end = f"{link.side}end of " if link.side and link.device.type not in ("store", "console") else ""
        about.append(f"{end}{link.device.name}" + (f" of domain {link.device.frontend}" if link.side == "back" else ""))
    if link.channel is not None:
        if link.row is None and link.device is None:
            about.append(what_is(link.channel))
        about.append(f"vCPU {link.channel.vcpu}")
        return f"{view.label} port {link.channel.port} ({', '.join(about)})"
    return f"{view.label} {', '.join(about)}"


def what_is(channel: Channel) -> str:
    if channel.kind is Kind.INTERDOMAIN:
        return f"to domain {channel.remote} port {channel.remote_port}"
    if channel.kind is Kind.UNBOUND:
        return f"waits for domain {channel.remote}"
    if channel.kind is Kind.VIRQ:
        return f"VIRQ {channel.virq}"
    return f"pirq {channel.pirq}" if channel.kind is Kind.PIRQ else str(channel.kind)


def several(what: list[str]) -> str:
    """A few of them, and how many more."""
    more = f" and {len(what) - SHOWN} more" if len(what) > SHOWN else ""
    return ", ".join(what[:SHOWN]) + more


def views_of(picture: Picture) -> Iterator[DomainView]:
    for domid in sorted(picture.domains, key=lambda each: (each < 0, each)):
        yield picture.domains[domid]


def channels_of(view: DomainView) -> Iterator[tuple[Link, Channel]]:
    for link in view.links:
        if link.channel is not None:
            yield link, link.channel

"""One event of a trace as a line for people."""

from __future__ import annotations

from typing import Any, Final

from pvirq.lab.traceview.follower import Follower
from pvirq.lab.traceview.traceevents import (
    XEN,
    BindEvent,
    ChoiceEvent,
    CloseEvent,
    DomainEvent,
    EndEvent,
    EoiEvent,
    Event,
    FaultEvent,
    HypercallEvent,
    InputEvent,
    IrqEvent,
    MarkEvent,
    RaiseEvent,
    StopEvent,
    UnmaskEvent,
    printable,
)
from pvirq.lab.traceview.units import moment

_KNOWN_KEYS: Final = ("t", "k", "d", "v")
_FAULT_KEYS: Final = (*_KNOWN_KEYS, "rule", "action", "p", "flow")
WIDTH: Final = 300
WORDS: Final = {"B": "begins", "E": "ends"}


def event_text(event: Event, follower: Follower) -> str:
    """When (from the trace's start), where, what: of a `follower` that has been fed all events up to this one."""
    who = "" if event.d is None else follower.domain(event.d).name
    if event.v is not None:
        who += f"/{event.v}"
    line = f"{moment(event.t - follower.start):>17}  {who:<14} {event.kind:<9} {what_text(event, follower)}".rstrip()
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def what_text(event: Event, follower: Follower) -> str:
    """What happened, without when and where."""
    match event:
        case RaiseEvent():
            by = XEN if event.by is None else f"{follower.domain(event.by[0]).name}/{event.by[1]}"
            flow = "" if event.flow is None else f", flow {event.flow}"
            return f"{_port(event.d, event.p, follower)} by {by}: {event.out}{flow}"
        case IrqEvent():
            irq = "" if event.irq is None else f"{event.irq} "
            name = f"{event.name} " if event.name else ""
            port = "" if event.p is None else f"of port {event.p} "
            flows = f", flow {', '.join(map(str, event.flow))}" if event.flow else ""
            return f"{irq}{name}{port}{WORDS[event.ph]}{flows}"
        case BindEvent():
            pairs = (("rd", event.rd), ("rp", event.rp), ("virq", event.virq), ("pirq", event.pirq))
            return f"port {event.p} {event.type} {_pairs({key: value for key, value in pairs if value is not None})}"
        case CloseEvent() | UnmaskEvent():
            return _port(event.d, event.p, follower)
        case EoiEvent():
            return _port(event.d, event.p, follower) if event.p is not None else f"irq {event.irq}"
        case HypercallEvent():
            return f"{event.op} {_value(event.args)} = {_value(event.r)}"
        case StopEvent() | EndEvent():
            return event.why or ""
        case DomainEvent():
            return _pairs({key: event.raw[key] for key in ("vcpus", "kind", "kernel") if key in event.raw})
        case FaultEvent():
            where = "" if event.p is None else f" {_port(event.d, event.p, follower)}"
            flow = "" if event.flow is None else f", flow {event.flow}"
            more = _pairs({key: value for key, value in event.raw.items() if key not in _FAULT_KEYS})
            return f"{event.rule or '?'}: {event.action or '?'}{where}{flow} {more}".rstrip()
        case ChoiceEvent():
            return f"{_value(event.n)}, {event.what}: {_value(event.took)} of {_value(event.of)}"
        case InputEvent():
            return f"to {_value(event.to)}: {_value(event.data)}"
        case MarkEvent():
            return event.text
        case _:
            return _pairs({key: value for key, value in event.raw.items() if key not in _KNOWN_KEYS})


def _port(d: int | None, p: int, follower: Follower) -> str:
    port = None if d is None else follower.domain(d).ports.get(p)
    title = port.title if port else ""
    return f"port {p} ({title})" if port and title != f"port {p}" else f"port {p}"


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{printable(str(key))}={_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    return "-" if value is None else printable(value if isinstance(value, str) else repr(value))

"""The events of a trace, each kind as a type, and its header: made of the lines of the file.

Kinds of events and keys that aren't known here are kept (`Event.raw`). Names come from guests, so every text is
printable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Final

VERSION: Final = 1
TIME_MAX: Final = (1 << 63) - 1

XEN: Final = "xen"
BEGIN: Final = "B"
END: Final = "E"


class Unexpected(Exception):
    """A line isn't as it should be: what was expected."""


# -- what a value may be: each returns it as it is kept, or raises Unexpected -----------------------------------------


def _integer(limit: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            raise Unexpected(f"a whole number from 0 to {limit}")
        return value

    return check


def _text(value: Any) -> str:
    """Printable in any case: names come from guests."""
    if type(value) is not str:
        raise Unexpected("a string")
    return value if value.isprintable() else printable(value)


def _label(value: Any) -> str:
    """A name or a number, as it is written."""
    return str(value) if type(value) is int and abs(value) < 1 << 64 else _text(value)


def _any(value: Any) -> Any:
    return value


def _phase(value: Any) -> str:
    if value not in (BEGIN, END):
        raise Unexpected('"B" or "E"')
    return str(value)


def _source(value: Any) -> tuple[int, int] | None:
    if value == XEN:
        return None
    if type(value) is not list or len(value) != 2:
        raise Unexpected('[domain, vCPU] or "xen"')
    return _domid(value[0]), _vcpu(value[1])


def _flows(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise Unexpected("a list of numbers")
    return tuple(map(_flow, value))


_time = _integer(TIME_MAX)
_flow = _integer(TIME_MAX)
_domid = _integer(0xFFFF)
_vcpu = _integer(8191)
_vcpus = _integer(8192)
_port = _integer(1 << 17)
_number = _integer((1 << 31) - 1)


def printable(text: str) -> str:
    r"""`text` with everything that a terminal or a file would not take as itself written as \x1b or \u200e is."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def _key(name: str, check: Callable[[Any], Any], default: Any = MISSING) -> Any:
    """A field that is read from the key `name`; without a default it has to be there."""
    return field(default=default, metadata={"key": name, "check": check})


# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Event:
    """Something that happened; this class itself where its kind isn't known here."""

    t: int  # ns of virtual time
    kind: str
    d: int | None  # the domain
    v: int | None  # the vCPU
    line: int  # in its file, from 1
    raw: dict[str, Any]  # the whole line


@dataclass(slots=True, kw_only=True)
class DomainEvent(Event):
    """A domain came into being, or more was learned about it."""

    d: int = _key("d", _domid)
    name: str | None = _key("name", _text, None)
    vcpus: int | None = _key("vcpus", _vcpus, None)
    world: str | None = _key("kind", _text, None)  # "modelled" or "real"
    kernel: str | None = _key("kernel", _text, None)
    irqs: str | None = _key("irqs", _text, None)  # how much of a real guest's handlers is seen: lines, ports, none


@dataclass(slots=True, kw_only=True)
class EndEvent(Event):
    """A domain is no more."""

    why: str | None = _key("why", _text, None)


@dataclass(slots=True, kw_only=True)
class BindEvent(Event):
    """A port was bound, or its binding changed; `v` is the vCPU that is notified."""

    d: int = _key("d", _domid)
    p: int = _key("p", _port)
    type: str = _key("type", _text)
    rd: int | None = _key("rd", _domid, None)
    rp: int | None = _key("rp", _port, None)
    virq: int | None = _key("virq", _number, None)
    pirq: int | None = _key("pirq", _number, None)


@dataclass(slots=True, kw_only=True)
class CloseEvent(Event):
    """A port was closed."""

    d: int = _key("d", _domid)
    p: int = _key("p", _port)


@dataclass(slots=True, kw_only=True)
class HypercallEvent(Event):
    """A hypercall, with its arguments and what it returned."""

    d: int = _key("d", _domid)
    op: str = _key("op", _text)
    args: Any = _key("args", _any, None)
    r: Any = _key("r", _any, None)


@dataclass(slots=True, kw_only=True)
class RaiseEvent(Event):
    """An event was raised on port `p` of domain `d`, towards vCPU `v`; `out` says what became of it (`xen.probes`)."""

    d: int = _key("d", _domid)
    v: int = _key("v", _vcpu)
    p: int = _key("p", _port)
    out: str = _key("out", _text)
    by: tuple[int, int] | None = _key("by", _source, None)  # domain and vCPU; None is Xen
    flow: int | None = _key("flow", _flow, None)


@dataclass(slots=True, kw_only=True)
class UnmaskEvent(Event):
    """A port was unmasked."""

    d: int = _key("d", _domid)
    p: int = _key("p", _port)


@dataclass(slots=True, kw_only=True)
class UpcallEvent(Event):
    """A vCPU was entered at its event callback."""

    d: int = _key("d", _domid)
    v: int = _key("v", _vcpu)


@dataclass(slots=True, kw_only=True)
class IrqEvent(Event):
    """A handler begins or ends; `flow` are the raised events that it was told of, where `ph` is "B"."""

    d: int = _key("d", _domid)
    v: int = _key("v", _vcpu)
    ph: str = _key("ph", _phase)
    irq: int | None = _key("irq", _number, None)
    p: int | None = _key("p", _port, None)
    name: str | None = _key("name", _text, None)
    handler: str | None = _key("handler", _text, None)
    flow: tuple[int, ...] | None = _key("flow", _flows, None)


@dataclass(slots=True, kw_only=True)
class EoiEvent(Event):
    """An end of interrupt."""

    p: int | None = _key("p", _port, None)
    irq: int | None = _key("irq", _number, None)


@dataclass(slots=True, kw_only=True)
class RunEvent(Event):
    """A vCPU gets a turn."""

    d: int = _key("d", _domid)
    v: int = _key("v", _vcpu)


@dataclass(slots=True, kw_only=True)
class StopEvent(Event):
    """A vCPU's turn ends."""

    d: int = _key("d", _domid)
    v: int = _key("v", _vcpu)
    why: str | None = _key("why", _text, None)


@dataclass(slots=True, kw_only=True)
class WakeEvent(Event):
    """A vCPU that waited wants a turn."""

    d: int = _key("d", _domid)
    v: int = _key("v", _vcpu)


@dataclass(slots=True, kw_only=True)
class FaultEvent(Event):
    """A fault was injected."""

    rule: str | None = _key("rule", _label, None)
    action: str | None = _key("action", _label, None)
    p: int | None = _key("p", _port, None)
    flow: int | None = _key("flow", _flow, None)


@dataclass(slots=True, kw_only=True)
class ChoiceEvent(Event):
    """The `n`th choice of a seeded run, one `of` so many: the first, 0, is what a run without a seed takes."""

    what: str = _key("what", _label)
    n: Any = _key("n", _any, None)
    of: Any = _key("of", _any, None)
    took: Any = _key("took", _any, None)


@dataclass(slots=True, kw_only=True)
class InputEvent(Event):
    """Something came in from outside; `data` is base64."""

    to: Any = _key("to", _any, None)
    data: Any = _key("data", _any, None)


@dataclass(slots=True, kw_only=True)
class MarkEvent(Event):
    """A note that somebody put into the trace."""

    text: str = _key("text", _text, "")


KINDS: Final[dict[str, type[Event]]] = {
    "domain": DomainEvent,
    "end": EndEvent,
    "bind": BindEvent,
    "close": CloseEvent,
    "hypercall": HypercallEvent,
    "raise": RaiseEvent,
    "unmask": UnmaskEvent,
    "upcall": UpcallEvent,
    "irq": IrqEvent,
    "eoi": EoiEvent,
    "run": RunEvent,
    "stop": StopEvent,
    "wake": WakeEvent,
    "fault": FaultEvent,
    "choice": ChoiceEvent,
    "input": InputEvent,
    "mark": MarkEvent,
}

_Spec = tuple[tuple[str, str, Callable[[Any], Any], Any], ...]  # attribute, key, check, default


def _spec(cls: type[Event]) -> _Spec:
    keyed = [(f.name, f.metadata["key"], f.metadata["check"], f.default) for f in fields(cls) if "key" in f.metadata]
    names = {name for name, *_ in keyed}
    common = [("d", "d", _domid, None), ("v", "v", _vcpu, None)]
    return (*(entry for entry in common if entry[0] not in names), *keyed)


_SPECS: Final = {kind: (cls, _spec(cls)) for kind, cls in KINDS.items()}
_UNKNOWN: Final = (Event, _spec(Event))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_decode: Final = json.JSONDecoder(parse_constant=_no_constant).raw_decode


def _object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        found, end = _decode(text)
    except (ValueError, RecursionError):
        found = None
    if type(found) is not dict or text[end:].strip(" \t\r\n"):
        raise Unexpected("expected a JSON object")
    return found


def event_of(line: bytes, number: int) -> Event:
    """The event in a line, which is the file's `number`th. Unexpected if there is none."""
    raw = _object(line)
    kind = raw.get("k")
    if type(kind) is not str:
        raise Unexpected('expected a kind of event, "k", a string')
    cls, spec = _SPECS.get(kind, _UNKNOWN)
    try:
        name = "t"
        values: dict[str, Any] = {"t": _time(raw.get(name)), "kind": kind, "line": number, "raw": raw}
        for attribute, name, check, default in spec:
            value = raw.get(name)
            if value is not None:
                values[attribute] = check(value)
            elif default is MISSING:
                raise Unexpected("a value")
            else:
                values[attribute] = default
    except Unexpected as error:
        raise Unexpected(f'{printable(kind)}: expected {error} as "{name}"') from None
    if cls is Event:
        values["kind"] = printable(kind)
    return cls(**values)


# -- the header --------------------------------------------------------------------------------------------------------


@dataclass
class HeaderDomain:
    """A domain that was there when the trace began."""

    d: int
    name: str | None = None
    vcpus: int | None = None
    world: str | None = None
    kernel: str | None = None
    irqs: str | None = None


@dataclass
class Header:
    """The first line of a trace."""

    seed: int | None
    start: int  # ns of virtual time
    domains: list[HeaderDomain]
    raw: dict[str, Any]


def header_of(line: bytes) -> Header:
    """The header that is in the first line. Unexpected if it isn't."""
    raw = _object(line)
    if raw.get("pvirq") != "trace":
        raise Unexpected('expected the header of a trace, {"pvirq":"trace",...}')
    if raw.get("version") != VERSION:
        raise Unexpected(f"expected version {VERSION} of the format, not {raw.get('version')!r:.40}")
    name = "seed"
    try:
        seed = raw.get(name)
        if seed is not None and type(seed) is not int:
            raise Unexpected("a whole number")
        name = "start"
        start = _time(raw.get(name, 0))
        name = "domains"
        domains = raw.get(name, [])
        if type(domains) is not list or not all(type(one) is dict for one in domains):
            raise Unexpected("a list of objects")
        found = []
        for one in domains:
            values: dict[str, Any] = {}
            for attribute, name, check, default in _SPECS["domain"][1]:
                value = one.get(name)
                if value is None and default is MISSING:
                    raise Unexpected("a value")
                if attribute != "v":
                    values[attribute] = None if value is None else check(value)
            found.append(HeaderDomain(**values))
    except Unexpected as error:
        raise Unexpected(f'header: expected {error} as "{name}"') from None
    return Header(seed, start, found, raw)

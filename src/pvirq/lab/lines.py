"""A trace's lines, made of what was recorded: JSON objects with their keys in the order of docs/lab-trace.md.

Flows: an event that becomes pending gets a number; whoever raises it again before it is handled gets the same, and so
does the interrupt that handles it.

There is a line for each record, and many are alike but for their time. So what is often needed is kept as text, and
lines are put together of that; what is rare goes through `json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi import sched
from pvirq.xen.probes import COALESCED, LOST, WAITING, Action

if TYPE_CHECKING:
    from pvirq.lab.recorder import Binding
    from pvirq.xen.domain import Domain, Vcpu
    from pvirq.xen.evtchn_channels import Channel

Event = dict[str, Any]
encode: Final = json.JSONEncoder(separators=(",", ":")).encode

# Why a domain ended, by SHUTDOWN_*.
REASONS: Final = {
    sched.SHUTDOWN_poweroff: "poweroff",
    sched.SHUTDOWN_reboot: "reboot",
    sched.SHUTDOWN_suspend: "suspend",
    sched.SHUTDOWN_crash: "crash",
    sched.SHUTDOWN_watchdog: "watchdog",
    sched.SHUTDOWN_soft_reset: "soft_reset",
}
# With these, what is pending on the port already is the same event.
_ONE_WITH: Final = frozenset((COALESCED, WAITING))
MOST_KEPT: Final = 100_000  # texts of one kind that are kept


def binding(t: int, domid: int, port: int, what: Binding) -> str:
    """The line of a "bind" event."""
    return encode({"t": t, "k": "bind"} | _binding(domid, port, what)) + "\n"


def _binding(domid: int, port: int, what: Binding) -> Event:
    kind, vcpu, remote, remote_port, virq, pirq = what
    event: Event = {"d": domid, "v": vcpu, "p": port, "type": kind}
    for key, value in (("rd", remote), ("rp", remote_port), ("virq", virq), ("pirq", pirq)):
        if value >= 0:
            event[key] = value
    return event


def about(domain: Domain) -> Event:
    """What a trace says of a domain, in its header or when it comes to be."""
    label = domain.label
    event: Event = {"d": domain.domid, "name": label.name, "vcpus": len(domain.vcpus), "kind": label.kind}
    event["kernel"] = label.kernel
    return event | {"irqs": label.irqs} if label.irqs else event


def handler_name(handler: object) -> str:
    """A handler's name: of a real guest's a symbol; of a modelled kernel's the Python function."""
    if isinstance(handler, str):
        return handler
    while isinstance(handler, partial):
        handler = handler.func
    return str(getattr(handler, "__qualname__", type(handler).__qualname__))


class Lines:
    """Makes lines of records, one list of records after the other."""

    def __init__(self, t: int) -> None:
        """`t` is when the first begin, in ns."""
        self._t = t
        self._lines: list[str] = []
        self._flows: dict[tuple[int, int], int] = {}  # what is pending, by domain and port
        self._last_flow = 0
        self._hypercalls: list[int] = []  # the lines of those under way: several where they are a multicall's
        self._vcpus: dict[Vcpu, str] = {}
        self._rows: dict[tuple[Any, ...], str] = {}
        self._same: dict[
            tuple[Any, ...], str
        ] = {}  # what records come to that hang on nothing else, by what is in them
        # Of each record: how many items follow its name, what makes of them all behind the line's time, and whether the
        # same items are always the same text.
        self._makers: dict[str, tuple[int, Callable[..., str], bool]] = {
            "raised": (4, self._raise, False), "irq_entry": (4, self._entry, False), "irq_exit": (3, _exit, True),
            "upcall": (1, partial(_of_vcpu, "upcall"), True), "run": (1, partial(_of_vcpu, "run"), True),
            "stop": (2, _stop, True), "woken": (1, partial(_of_vcpu, "wake"), True),
            "unmasked": (4, self._unmask, False), "eoi": (4, _eoi, True), "hypercall": (3, self._hypercall, False),
            "hypercall_done": (3, self._hypercall_done, False), "bound": (3, self._bind, False),
            "closed": (2, self._close, False), "created": (1, self._created, False),
            "shut_down": (2, self._shutdown, False), "ended": (1, self._ended, False), "noted": (3, self._note, False),
        }  # fmt: skip

    def of(self, records: Sequence[Any]) -> list[str]:
        """The lines that records come to: the items of whole turns, as `pvirq.lab.recorder` puts them down."""
        makers, same = self._makers, self._same
        lines = self._lines = []
        add = lines.append
        head = f'{{"t":{self._t},"k":"'
        at, end = 0, len(records)
        while at < end:
            name = records[at]
            if name.__class__ is int:
                self._t = name
                head = f'{{"t":{name},"k":"'
                at += 1
                continue
            count, make, alike = makers[name]
            behind = at + 1 + count
            if alike:
                key = tuple(records[at:behind])
                text = same.get(key)
                if text is None:
                    if len(same) > MOST_KEPT:
                        same.clear()
                    text = same[key] = make(*key[1:])
            else:
                text = make(*records[at + 1 : behind])
            if text:
                add(head + text)
            at = behind
        self._hypercalls.clear()
        return lines

    def _who(self, vcpu: Vcpu) -> str:
        """A vCPU as every line of its has it."""
        text = self._vcpus.get(vcpu)
        if text is None:
            if len(self._vcpus) > MOST_KEPT:
                self._vcpus.clear()
            text = self._vcpus[vcpu] = _who(vcpu)
        return text

    def _raise(self, vcpu: Vcpu, channel: Channel, outcome: str, by: Vcpu | None) -> str:
        port = channel.port
        cause = '"xen"' if by is None else f"[{by.domain.domid},{by.vcpu_id}]"
        key = vcpu.domain.domid, port
        flow = self._flows.get(key) if outcome in _ONE_WITH else None
        if flow is None:
            if outcome == LOST:
                return f'raise",{self._who(vcpu)},"p":{port},"out":"{outcome}","by":{cause}}}\n'
            flow = self._last_flow = self._last_flow + 1
            self._flows[key] = flow
        return f'raise",{self._who(vcpu)},"p":{port},"out":"{outcome}","by":{cause},"flow":{flow}}}\n'

    def _entry(self, vcpu: Vcpu, port: int, irq: int, actions: Sequence[Action]) -> str:
        row = self._rows.get((port, irq, actions))
        if row is None:
            row = self._row(port, irq, actions)
        flow = self._flows.pop((vcpu.domain.domid, port), "")
        return f'irq",{self._who(vcpu)},"ph":"B",{row},"flow":[{flow}]}}\n'

    def _row(self, port: int, irq: int, actions: Sequence[Action]) -> str:
        what: Event = {"irq": irq} if irq >= 0 else {}
        what["p"] = port
        if actions:
            what["name"] = ", ".join(action.name for action in actions)
            what["handler"] = ", ".join(handler_name(action.handler) for action in actions)
        if len(self._rows) > MOST_KEPT:
            self._rows.clear()
        row = self._rows[port, irq, actions] = encode(what)[1:-1]
        return row

    def _unmask(self, vcpu: Vcpu, channel: Channel, pending: bool, by: Vcpu | None) -> str:
        event: Event = {"p": channel.port, "pending": pending}
        event["by"] = "xen" if by is None else [by.domain.domid, by.vcpu_id]
        flow = self._flows.get((vcpu.domain.domid, channel.port)) if pending else None
        if flow is not None:
            event["flow"] = flow
        return f'unmask",{self._who(vcpu)},{encode(event)[1:]}\n'

    def _hypercall(self, vcpu: Vcpu, name: str, arguments: Sequence[int]) -> str:
        self._hypercalls.append(len(self._lines))
        numbers = ",".join(map(str, arguments))
        return f'hypercall",{self._who(vcpu)},"op":"{name}","args":[{numbers}]}}\n'

    def _hypercall_done(self, vcpu: Vcpu, name: str, result: int | None) -> str:
        if self._hypercalls:
            at = self._hypercalls.pop()
            if result is not None:
                self._lines[at] = f'{self._lines[at][:-2]},"r":{result}}}\n'
        return ""

    def _bind(self, domain: Domain, port: int, what: Binding) -> str:
        return _behind_time("bind", _binding(domain.domid, port, what))

    def _close(self, domain: Domain, port: int) -> str:
        self._flows.pop((domain.domid, port), None)
        return _behind_time("close", {"d": domain.domid, "p": port})

    def _created(self, domain: Domain) -> str:
        return _behind_time("domain", about(domain))

    def _shutdown(self, domain: Domain, reason: int) -> str:
        return _behind_time("end", {"d": domain.domid, "why": REASONS.get(reason, f"reason {reason}")})

    def _ended(self, domain: Domain) -> str:
        for key in [key for key in self._flows if key[0] == domain.domid]:
            del self._flows[key]
        self._same.clear()  # it is to be forgotten
        for vcpu in domain.vcpus:
            self._vcpus.pop(vcpu, None)
        return _behind_time("end", {"d": domain.domid, "why": "destroyed"})

    def _note(self, kind: str, vcpu: Vcpu | None, fields: Event) -> str:
        event: Event = {} if vcpu is None else {"d": vcpu.domain.domid, "v": vcpu.vcpu_id}
        event |= fields
        flow = self._flows.get((event.get("d", -1), event.get("p", -1)))
        if flow is not None:
            event.setdefault("flow", flow)
        return _behind_time(kind, event)


def _behind_time(kind: str, event: Event) -> str:
    return f"{encode(kind)[1:]},{encode(event)[1:]}\n" if event else f"{encode(kind)[1:]}}}\n"


def _who(vcpu: Vcpu) -> str:
    return f'"d":{vcpu.domain.domid},"v":{vcpu.vcpu_id}'


def _of_vcpu(kind: str, vcpu: Vcpu) -> str:
    return f'{kind}",{_who(vcpu)}}}\n'


def _stop(vcpu: Vcpu, why: str) -> str:
    return f'stop",{_who(vcpu)},"why":"{why}"}}\n'


def _exit(vcpu: Vcpu, port: int, irq: int) -> str:
    line = f'"irq":{irq},"p":{port}' if irq >= 0 else f'"p":{port}'
    return f'irq",{_who(vcpu)},"ph":"E",{line}}}\n'


def _eoi(vcpu: Vcpu, port: int, irq: int, spurious: bool) -> str:
    line = f'eoi",{_who(vcpu)}'
    if irq >= 0:
        line += f',"irq":{irq}'
    if port >= 0:
        line += f',"p":{port}'
    return line + (',"spurious":true}\n' if spurious else "}\n")

"""The lines of a trace's events: JSON objects with their keys in the order of docs/lab-trace.md.

Most lines are alike but for a few numbers: the time, the flow, a hypercall's arguments. What stays the same of one is a
`Shape`, made once and kept by whoever records the event (`pvirq.lab.recorder`); what is rare goes through `json`, when
its line is wanted. `pvirq.lab.chunks` makes text of shapes and numbers.

Flows: an event that becomes pending gets a number; whoever raises it again before it is handled gets the same, and so
does the interrupt that handles it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvirq.abi import sched
from pvirq.xen.probes import COALESCED, LOST, WAITING, Action, Record

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
MOST_KEPT: Final = 100_000  # shapes of one kind that are kept

# What a shape leaves to be found out when its line is made.
NEW_FLOW: Final = 0  # the event's flow, which begins with it
SAME_FLOW: Final = 1  # the flow of what is pending already
HANDLED: Final = 2  # the flow that ends with it, if there is one
RARE: Final = 3  # all of it: a record is among the values


class Flow:
    """What is pending on a port."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = ""  # "": nothing


class Shape:
    """A line but for what differs from one event to the next.

    `text` is what stands behind the line's time and `"k":"`, to be formatted with %; "" where there is no line. Of the
    recorded values a shape takes `takes`: first the time, if it is `timed` (else the line has that of the one before),
    then those that go into its text, `numbers` of them, then others. `late` is what its last % stands for, if that
    isn't among the values, with the flow in question. `ends`: it is often the last of several that come together.
    """

    __slots__ = ("ends", "late", "numbers", "takes", "text", "timed")

    def __init__(
        self, text: str, timed: bool, *, takes: int = 0, numbers: int = 0, late: tuple[int, Flow] | None = None,
        ends: bool = False,
    ) -> None:  # fmt: skip
        self.text, self.timed, self.takes, self.numbers = text, timed, takes + timed, numbers
        self.late, self.ends = late, ends


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


class Shapes:
    """The shapes of one trace's lines, and the flows that are open in it."""

    def __init__(self) -> None:
        self._shapes: dict[tuple[Record, bool], Shape] = {}
        self._calls: dict[tuple[Vcpu, str, int], tuple[Shape, Shape]] = {}
        self.choices: dict[str, Shape] = {}  # as `of_choice` has made them
        self._flows: dict[tuple[int, int], Flow] = {}  # by domain and port
        late = RARE, Flow()
        self.rare: Final = Shape("%s", False, takes=1, late=late), Shape("%s", True, takes=1, late=late)
        self.jump: Final = Shape("", True)
        self._makers: dict[str, Callable[..., Shape]] = {
            "raised": self._raise, "irq_entry": self._entry, "irq_exit": _exit, "upcall": partial(_of_vcpu, "upcall"),
            "run": partial(_of_vcpu, "run"), "stop": _stop, "woken": partial(_of_vcpu, "wake"), "eoi": _eoi,
        }  # fmt: skip
        self._rare: dict[str, Callable[..., str]] = {
            "unmasked": self._unmask, "bound": self._bind, "closed": self._close, "created": self._created,
            "shut_down": self._shutdown, "ended": self._ended, "noted": self._note,
        }  # fmt: skip

    def of(self, record: Record, timed: bool) -> Shape:
        """Of an event that comes again and again: all but "hypercall" and what is `rare`."""
        shape = self._shapes.get((record, timed))
        if shape is None:
            if len(self._shapes) > MOST_KEPT:
                self._shapes.clear()
            shape = self._shapes[record, timed] = self._makers[record[0]](timed, *record[1:])
        return shape

    def of_hypercall(self, vcpu: Vcpu, name: str, arguments: int) -> tuple[Shape, Shape]:
        """Of a hypercall with so many arguments: while there is no result, and with one, which is the last value."""
        key = vcpu, name, arguments
        shapes = self._calls.get(key)
        if shapes is None:
            if len(self._calls) > MOST_KEPT:
                self._calls.clear()
            text = f'hypercall",{_who(vcpu)},"op":"{_plain(name)}","args":[{",".join(["%d"] * arguments)}]'
            shapes = self._calls[key] = (
                Shape(text + "}\n", True, takes=arguments + 1, numbers=arguments),
                Shape(text + ',"r":%d}\n', True, takes=arguments + 1, numbers=arguments + 1),
            )
        return shapes

    def of_choice(self, what: str) -> Shape:
        """Of a schedule's choice: its number, of how many, which was taken."""
        text = f'choice","what":{_plain(encode(what))},"n":%d,"of":%d,"took":%d}}\n'
        shape = self.choices[what] = Shape(text, True, takes=3, numbers=3)
        return shape

    def rare_text(self, record: Record) -> str:
        """The line of a record that has no shape of its own, behind its time."""
        return self._rare[record[0]](*record[1:])

    def _flow(self, domid: int, port: int) -> Flow:
        key = domid, port
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow()
        return flow

    def _pending(self, domid: int, port: int) -> int | None:
        flow = self._flows.get((domid, port))
        return int(flow.number) if flow is not None and flow.number else None

    def _raise(self, timed: bool, vcpu: Vcpu, channel: Channel, outcome: str, by: Vcpu | None) -> Shape:
        cause = '"xen"' if by is None else f"[{by.domain.domid},{by.vcpu_id}]"
        text = f'raise",{_who(vcpu)},"p":{channel.port},"out":"{outcome}","by":{cause}'
        if outcome == LOST:
            return Shape(text + "}\n", timed)
        flow = self._flow(vcpu.domain.domid, channel.port)
        return Shape(text + ',"flow":%d}\n', timed, late=(SAME_FLOW if outcome in _ONE_WITH else NEW_FLOW, flow))

    def _entry(self, timed: bool, vcpu: Vcpu, port: int, irq: int, actions: Sequence[Action]) -> Shape:
        what: Event = {"irq": irq} if irq >= 0 else {}
        what["p"] = port
        if actions:
            what["name"] = ", ".join(action.name for action in actions)
            what["handler"] = ", ".join(handler_name(action.handler) for action in actions)
        text = f'irq",{_who(vcpu)},"ph":"B",{_plain(encode(what)[1:-1])},"flow":[%s]}}\n'
        return Shape(text, timed, late=(HANDLED, self._flow(vcpu.domain.domid, port)))

    # What is rare.

    def _unmask(self, vcpu: Vcpu, channel: Channel, pending: bool, by: Vcpu | None) -> str:
        event: Event = {"p": channel.port, "pending": pending}
        event["by"] = "xen" if by is None else [by.domain.domid, by.vcpu_id]
        flow = self._pending(vcpu.domain.domid, channel.port) if pending else None
        if flow is not None:
            event["flow"] = flow
        return f'unmask",{_who(vcpu)},{encode(event)[1:]}\n'

    def _bind(self, domain: Domain, port: int, what: Binding) -> str:
        return _behind_time("bind", _binding(domain.domid, port, what))

    def _close(self, domain: Domain, port: int) -> str:
        self._flow(domain.domid, port).number = ""
        return _behind_time("close", {"d": domain.domid, "p": port})

    def _created(self, domain: Domain) -> str:
        return _behind_time("domain", about(domain))

    def _shutdown(self, domain: Domain, reason: int) -> str:
        return _behind_time("end", {"d": domain.domid, "why": REASONS.get(reason, f"reason {reason}")})

    def _ended(self, domain: Domain) -> str:
        for (domid, _), flow in self._flows.items():
            if domid == domain.domid:
                flow.number = ""
        # It is to be forgotten.
        self._shapes.clear()
        self._calls.clear()
        return _behind_time("end", {"d": domain.domid, "why": "destroyed"})

    def _note(self, kind: str, vcpu: Vcpu | None, fields: Event) -> str:
        event: Event = {} if vcpu is None else {"d": vcpu.domain.domid, "v": vcpu.vcpu_id}
        event |= fields
        if "p" in event:
            flow = self._pending(event.get("d", -1), event["p"])
            if flow is not None:
                event.setdefault("flow", flow)
        return _behind_time(kind, event)


def _plain(text: str) -> str:
    """Text as % leaves it."""
    return text.replace("%", "%%")


def _behind_time(kind: str, event: Event) -> str:
    return f"{encode(kind)[1:]},{encode(event)[1:]}\n" if event else f"{encode(kind)[1:]}}}\n"


def _who(vcpu: Vcpu) -> str:
    return f'"d":{vcpu.domain.domid},"v":{vcpu.vcpu_id}'


def _of_vcpu(kind: str, timed: bool, vcpu: Vcpu) -> Shape:
    return Shape(f'{kind}",{_who(vcpu)}}}\n', timed)


def _stop(timed: bool, vcpu: Vcpu, why: str) -> Shape:
    return Shape(f'stop",{_who(vcpu)},"why":"{why}"}}\n', timed, ends=True)


def _exit(timed: bool, vcpu: Vcpu, port: int, irq: int) -> Shape:
    line = f'"irq":{irq},"p":{port}' if irq >= 0 else f'"p":{port}'
    return Shape(f'irq",{_who(vcpu)},"ph":"E",{line}}}\n', timed)


def _eoi(timed: bool, vcpu: Vcpu, port: int, irq: int, spurious: bool) -> Shape:
    line = f'eoi",{_who(vcpu)}'
    if irq >= 0:
        line += f',"irq":{irq}'
    if port >= 0:
        line += f',"p":{port}'
    return Shape(line + (',"spurious":true}\n' if spurious else "}\n"), timed)

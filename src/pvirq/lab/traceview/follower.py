"""Following a trace: from its events to which domain is which, what is pending where, and who runs what since when.

What each view of a trace has in common. It holds what is there at a time (domains, bound ports, events under way,
handlers and turns that have begun), never the past; so memory is bounded by the host and not by the length of its run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from pvirq.abi import xen as xen_abi
from pvirq.lab.traceview.traceevents import (
    BEGIN,
    BindEvent,
    CloseEvent,
    DomainEvent,
    EndEvent,
    Event,
    Header,
    IrqEvent,
    RaiseEvent,
    RunEvent,
    StopEvent,
    UnmaskEvent,
    UpcallEvent,
    WakeEvent,
)
from pvirq.lab.traceview.tracefile import TraceFile
from pvirq.xen.probes import COALESCED, DOWN, LOST, MASKED, PAUSED, SLICE, YIELDED

# What a vCPU may be doing.
RUNNING: Final = "running"
READY: Final = "ready"  # it wants a turn
BLOCKED: Final = "blocked"  # it waits for an event
OFF: Final = "off"  # down or paused: no event wakes it
_AFTER_STOP: Final = {SLICE: READY, YIELDED: READY, DOWN: OFF, PAUSED: OFF}  # anything else is BLOCKED

# Why a domain ends that isn't there any more; one that was only shut down keeps its ports.
DESTROYED: Final = "destroyed"
# A domain's handlers aren't seen at all (`Domain.irqs`).
UNSEEN: Final = "none"

VIRQ_NAMES: Final = {
    value: name.removeprefix("VIRQ_").lower()
    for name, value in reversed(vars(xen_abi).items())
    if name.startswith("VIRQ_") and isinstance(value, int)
}


@dataclass(slots=True, eq=False)
class Flow:
    """An event under way: from where it became pending to the handler that it is for."""

    id: int | None
    t: int
    d: int
    v: int  # the vCPU towards which it was raised
    p: int
    by: tuple[int, int] | None  # domain and vCPU; None is Xen


@dataclass(slots=True, eq=False)
class Port:
    """A port of a domain from its binding to its closing."""

    d: int
    p: int
    type: str = ""  # "" until it is known: the trace began later
    v: int | None = None
    rd: int | None = None
    rp: int | None = None
    virq: int | None = None
    pirq: int | None = None
    name: str | None = None  # of its IRQ, from its handler
    pending: Flow | None = None
    masked_since: int | None = None  # when an event was raised on it that waits for its unmasking

    @property
    def title(self) -> str:
        """The name of its IRQ, or what it is bound to: "virq timer", "port 12"."""
        if self.name:
            return self.name
        if self.type == "virq" and self.virq is not None:
            return f"virq {VIRQ_NAMES.get(self.virq, self.virq)}"
        if self.type == "pirq" and self.pirq is not None:
            return f"pirq {self.pirq}"
        return f"port {self.p}"


@dataclass(slots=True, eq=False)
class Domain:
    """A domain, as far as the trace tells."""

    d: int
    name: str
    vcpus: int | None = None
    world: str | None = None
    kernel: str | None = None
    irqs: str | None = None  # how much of its handlers is seen, where it isn't all: UNSEEN or "ports"
    ended: str | None = None  # why
    ports: dict[int, Port] = field(default_factory=dict)
    pending: int = 0  # how many ports are


@dataclass(slots=True, eq=False)
class _Vcpu:
    state: str | None = None  # None: not known yet
    since: int = 0
    woken: int | None = None
    irqs: list[IrqEvent] = field(default_factory=list)  # handlers that have begun, the innermost last


class Follower:
    """Override what is of interest: each method is called when the trace says so, in the order of time."""

    def __init__(self) -> None:
        self.domains: dict[int, Domain] = {}
        self.now = 0
        self.start = 0
        self._vcpus: dict[tuple[int, int], _Vcpu] = {}
        self._flows: dict[int, Flow] = {}

    # -- what may be overridden ---------------------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """Anything; before what it means is known to the other methods."""

    def raised(self, event: RaiseEvent, port: Port, flow: Flow | None) -> None:
        """An event was raised; `flow` is there where that made the port pending, and it isn't polled for."""

    def delivered(self, flow: Flow, port: Port, event: IrqEvent) -> None:
        """A handler begins that an event was for."""

    def handled(self, began: IrqEvent, ended: int, *, finished: bool) -> None:
        """A handler has ended; or the trace has, and it hasn't `finished`."""

    def unmasked(self, port: Port, since: int, until: int) -> None:
        """An event on a masked port waited for so long."""

    def spent(self, d: int, v: int, state: str, began: int, ended: int) -> None:
        """A vCPU was in this state from `began` to `ended`."""

    def delayed(self, d: int, v: int, woken: int, ran: int) -> None:
        """A vCPU that was woken then got its turn."""

    def counted(self, domain: Domain) -> None:
        """The number of a domain's pending ports has changed."""

    def closed(self, port: Port) -> None:
        """A port is no more; so it is at the end of its domain."""

    # -- following ----------------------------------------------------------------------------------------------------

    def begin(self, header: Header) -> None:
        """What a trace's header says. `follow` does this by itself."""
        self.start = self.now = header.start
        for domain in header.domains:
            one = self.domains[domain.d] = Domain(domain.d, domain.name or f"domain {domain.d}")
            one.vcpus, one.world, one.kernel, one.irqs = domain.vcpus, domain.world, domain.kernel, domain.irqs

    def follow(self, trace: TraceFile, until: int | None = None) -> None:
        """Read the events before `until`, or all of a trace that was just opened."""
        self.begin(trace.header)
        for event in trace:
            if until is not None and event.t >= until:
                self._finish(until)
                return
            self.feed(event)
        self._finish(self.now)

    def feed(self, event: Event) -> None:
        """What the next event means."""
        self.now = event.t
        self.event(event)
        if act := _ACTS.get(type(event)):
            act(self, event)

    def _finish(self, t: int) -> None:
        self.now = t
        for (d, v), vcpu in self._vcpus.items():
            while vcpu.irqs:
                self.handled(vcpu.irqs.pop(), t, finished=False)
            if vcpu.state is not None:
                self.spent(d, v, vcpu.state, vcpu.since, t)

    def domain(self, d: int) -> Domain:
        """The domain of this number, if need be one of which nothing else is known."""
        return self.domains.get(d) or self.domains.setdefault(d, Domain(d, f"domain {d}"))

    def port(self, d: int, p: int) -> Port:
        """The port that is bound to this number, if need be one of which nothing else is known."""
        ports = self.domain(d).ports
        return ports.get(p) or ports.setdefault(p, Port(d, p))

    def state(self, d: int, v: int) -> str | None:
        """What a vCPU does now; None if the trace hasn't said yet."""
        return self._vcpu(d, v).state

    def handlers(self, d: int, v: int) -> list[IrqEvent]:
        """The handlers that have begun on a vCPU, the innermost last."""
        return self._vcpu(d, v).irqs

    def _vcpu(self, d: int, v: int) -> _Vcpu:
        return self._vcpus.get((d, v)) or self._vcpus.setdefault((d, v), _Vcpu())

    def _domain(self, event: DomainEvent) -> None:
        domain = self.domain(event.d)
        if domain.ended is not None:  # its number is used again
            domain = self.domains[event.d] = Domain(event.d, domain.name)
        for key in ("name", "vcpus", "world", "kernel", "irqs"):
            if (value := getattr(event, key)) is not None:
                setattr(domain, key, value)

    def _end(self, event: EndEvent) -> None:
        if event.d is None:
            return
        domain = self.domain(event.d)
        domain.ended = domain.ended or event.why or "ended"
        if event.why == DESTROYED:
            for port in list(domain.ports.values()):
                self._close(port)
        for (d, v), vcpu in self._vcpus.items():
            if d == event.d:
                while vcpu.irqs:
                    self.handled(vcpu.irqs.pop(), event.t, finished=False)
                self._enter(d, v, vcpu, None)

    def _bind(self, event: BindEvent) -> None:
        port = self.port(event.d, event.p)
        port.type, port.rd, port.rp, port.virq, port.pirq = event.type, event.rd, event.rp, event.virq, event.pirq
        if event.v is not None:
            port.v = event.v
        if event.type == "interdomain" and event.rd is not None and event.rp is not None:
            other = self.port(event.rd, event.rp)  # which is connected by the same hypercall
            if other.type in ("", "unbound"):
                other.type, other.rd, other.rp = "interdomain", event.d, event.p

    def _closed(self, event: CloseEvent) -> None:
        port = self.port(event.d, event.p)
        self._close(port)
        if port.rd is not None and port.rp is not None:
            other = self.domain(port.rd).ports.get(port.rp)
            if other and (other.rd, other.rp) == (event.d, event.p):
                other.type, other.rd, other.rp = "unbound", event.d, None

    def _close(self, port: Port) -> None:
        self._taken(port)
        del self.domains[port.d].ports[port.p]
        self.closed(port)

    def _raise(self, event: RaiseEvent) -> None:
        port = self.port(event.d, event.p)
        flow = was_pending = None
        # A masked IPI is a spinlock's: it is polled for and never delivered, and when it is taken can't be seen.
        polled = event.out == MASKED and port.type == "ipi"
        if event.out not in (COALESCED, LOST) and not polled:
            flow = Flow(event.flow, event.t, event.d, event.v, event.p, event.by)
            was_pending = port.pending
            if was_pending:  # it was taken without a handler: polled, or by who reads the bits itself
                self._forget(was_pending)
            port.pending = flow
            if flow.id is not None:
                self._flows[flow.id] = flow
            if event.out == MASKED and port.masked_since is None:
                port.masked_since = event.t
        self.raised(event, port, flow)
        if flow and not was_pending:
            domain = self.domains[event.d]
            domain.pending += 1
            self.counted(domain)

    def _forget(self, flow: Flow) -> None:
        if flow.id is not None and self._flows.get(flow.id) is flow:
            del self._flows[flow.id]

    def _taken(self, port: Port) -> None:
        """Nothing is pending on the port any more."""
        if port.pending:
            self._forget(port.pending)
            port.pending = None
            domain = self.domains[port.d]
            domain.pending -= 1
            self.counted(domain)
        port.masked_since = None

    def _unmask(self, event: UnmaskEvent) -> None:
        port = self.domain(event.d).ports.get(event.p)
        if port and port.masked_since is not None:
            since, port.masked_since = port.masked_since, None
            self.unmasked(port, since, event.t)

    def _upcall(self, event: UpcallEvent) -> None:
        domain = self.domain(event.d)
        if domain.irqs == UNSEEN:  # it takes what is pending now, though nobody sees by which handlers
            for port in domain.ports.values():
                if port.pending and port.pending.v == event.v and port.masked_since is None:
                    self._taken(port)

    def _irq(self, event: IrqEvent) -> None:
        irqs = self._vcpu(event.d, event.v).irqs
        if event.ph == BEGIN:
            for flow, port in list(self._delivers(event)):
                if event.name and port.p == event.p:
                    port.name = event.name
                if port.masked_since is not None:
                    self.unmasked(port, port.masked_since, event.t)
                self.delivered(flow, port, event)
                self._taken(port)
            if event.name and event.p is not None:
                self.port(event.d, event.p).name = event.name
            irqs.append(event)
            return
        for i in range(len(irqs) - 1, -1, -1):
            if event.irq in (None, irqs[i].irq) and event.p in (None, irqs[i].p):
                while len(irqs) > i:  # those within it have ended too, if nobody has said so
                    self.handled(irqs.pop(), event.t, finished=True)
                break

    def _delivers(self, event: IrqEvent) -> Iterator[tuple[Flow, Port]]:
        """The events that a handler was told of, as far as they were seen to be raised."""
        if event.flow is None:  # not said: then what was pending on its port
            port = None if event.p is None else self.domain(event.d).ports.get(event.p)
            if port and port.pending:
                yield port.pending, port
            return
        for number in event.flow:
            flow = self._flows.get(number)
            if flow and (port := self.domain(flow.d).ports.get(flow.p)) and port.pending is flow:
                yield flow, port

    def _run(self, event: RunEvent) -> None:
        self.domain(event.d).ended = None  # one that had suspended goes on
        vcpu = self._vcpu(event.d, event.v)
        if vcpu.woken is not None:
            self.delayed(event.d, event.v, vcpu.woken, event.t)
            vcpu.woken = None
        self._enter(event.d, event.v, vcpu, RUNNING)

    def _stop(self, event: StopEvent) -> None:
        self._enter(event.d, event.v, self._vcpu(event.d, event.v), _AFTER_STOP.get(event.why or "", BLOCKED))

    def _wake(self, event: WakeEvent) -> None:
        vcpu = self._vcpu(event.d, event.v)
        if vcpu.state == READY and vcpu.woken is not None:
            vcpu.state = OFF  # woken, got no turn, woken again: it was down until now
        if vcpu.state in (None, BLOCKED, OFF):
            self._enter(event.d, event.v, vcpu, READY)
            vcpu.woken = event.t

    def _enter(self, d: int, v: int, vcpu: _Vcpu, state: str | None) -> None:
        if vcpu.state is not None:
            self.spent(d, v, vcpu.state, vcpu.since, self.now)
        vcpu.state, vcpu.since = state, self.now
        if state != READY:
            vcpu.woken = None


_ACTS: Final[dict[type[Event], Callable[[Follower, Any], None]]] = {
    DomainEvent: Follower._domain,
    EndEvent: Follower._end,
    BindEvent: Follower._bind,
    CloseEvent: Follower._closed,
    RaiseEvent: Follower._raise,
    UnmaskEvent: Follower._unmask,
    UpcallEvent: Follower._upcall,
    IrqEvent: Follower._irq,
    RunEvent: Follower._run,
    StopEvent: Follower._stop,
    WakeEvent: Follower._wake,
}

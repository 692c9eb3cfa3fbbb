"""What a trace amounts to: counts, latencies, masked times, storms, balance; in one pass and bounded memory."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from pvirq.lab.traceview.follower import BLOCKED, OFF, READY, RUNNING, Domain, Flow, Follower, Port
from pvirq.lab.traceview.spread import Spread
from pvirq.lab.traceview.traceevents import (
    ChoiceEvent,
    Event,
    FaultEvent,
    HypercallEvent,
    IrqEvent,
    MarkEvent,
    RaiseEvent,
    UpcallEvent,
)
from pvirq.lab.traceview.tracefile import TraceFile
from pvirq.xen.probes import COALESCED, LOST, MASKED, PENDING, WAITING

OUTCOMES: Final = (PENDING, COALESCED, MASKED, WAITING, LOST)
STORM_EVENTS: Final = 100
STORM_WINDOW_NS: Final = 10_000_000
MAX_LISTED: Final = 1000
# A port of these is moved by binding it to another vCPU; the others belong to theirs.
MOVABLE: Final = ("interdomain", "pirq", "unbound")


@dataclass
class Options:
    """What of a trace is summarised, and what counts as a storm.

    A storm begins with `storm_events` events on a port within `storm_window` ns, and lasts until there are fewer than
    half as many.
    """

    start: int | None = None  # ns of virtual time; events before only tell what there is
    stop: int | None = None
    storm_events: int = STORM_EVENTS
    storm_window: int = STORM_WINDOW_NS


@dataclass
class PortSummary:
    """A port, from its binding to its closing. One that was closed without an event is none."""

    port: Port
    outcomes: Counter[str] = field(default_factory=Counter)
    delivered: int = 0  # raised events that a handler was told of; a coalesced one is part of another
    irqs: int = 0  # handlers run
    latency: Spread = field(default_factory=Spread)  # ns from where it became pending to its handler
    entry: Spread = field(default_factory=Spread)  # ns from the upcall to its handler
    handler: Spread = field(default_factory=Spread)  # ns from its handler's begin to its end
    masked: Spread = field(default_factory=Spread)  # ns that events on it waited for its unmasking
    masked_at: int = 0  # when the longest of those began

    @property
    def raised(self) -> int:
        """All events that were raised on it."""
        return self.outcomes.total()


@dataclass
class VcpuSummary:
    """A vCPU of a domain."""

    spent: dict[str, int] = field(default_factory=lambda: dict.fromkeys((RUNNING, READY, BLOCKED, OFF), 0))
    wake: Spread = field(default_factory=Spread)  # ns from being woken to its turn
    upcalls: int = 0
    irqs: int = 0
    movable: int = 0  # those of them on ports that can be bound to another vCPU


@dataclass
class Storm:
    """A stretch of time in which a port was raised often."""

    port: Port
    began: int
    ended: int
    events: int


@dataclass
class DomainSummary:
    """A domain."""

    domain: Domain
    ports: list[PortSummary] = field(default_factory=list)
    vcpus: dict[int, VcpuSummary] = field(default_factory=dict)
    max_pending: int = 0  # most ports that were pending at a time
    hypercalls: Counter[str] = field(default_factory=Counter)

    @property
    def nr_vcpus(self) -> int:
        return max([self.domain.vcpus or 0, *(v + 1 for v in self.vcpus)])

    def imbalance(self, movable: bool = False) -> float | None:
        """The busiest vCPU's share of IRQs against an even share: 1.0 is even, the number of vCPUs is all on one.

        With `movable` only those that could be elsewhere count. None of one vCPU, or without IRQs.
        """
        counts = [vcpu.movable if movable else vcpu.irqs for vcpu in self.vcpus.values()]
        if self.nr_vcpus < 2 or not any(counts):
            return None
        return max(counts) * self.nr_vcpus / sum(counts)


@dataclass
class Summary:
    """All of it; times in ns of virtual time."""

    file: str
    seed: int | None
    trace_start: int
    start: int
    end: int
    truncated: bool = False
    events: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    domains: list[DomainSummary] = field(default_factory=list)  # by number; one that is used again comes again
    storms: list[Storm] = field(default_factory=list)  # the first thousand
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)  # by rule and action
    choices: Counter[str] = field(default_factory=Counter)  # by what was chosen
    other_choices: Counter[str] = field(default_factory=Counter)  # those of them that weren't the first
    marks: list[tuple[int, str]] = field(default_factory=list)  # the first thousand


def summarise(trace: TraceFile, options: Options | None = None) -> Summary:
    """Summarise a trace that was just opened. TraceFileError for what is wrong in it."""
    summariser = _Summariser(trace, options or Options())
    return summariser.run()


class _Rate:
    """Finds storms on one port: its last events' times are enough."""

    def __init__(self, events: int) -> None:
        self._times: deque[int] = deque(maxlen=events)
        self._storm: Storm | None = None

    def add(self, port: Port, t: int, window: int) -> Storm | None:
        """An event at `t`; the storm where it begins one."""
        times = self._times
        times.append(t)
        if self._storm and t - times[len(times) // 2] <= window:
            self._storm.ended = t
            self._storm.events += 1
            return None
        self._storm = None
        if len(times) < (times.maxlen or 0) or t - times[0] > window:
            return None
        self._storm = Storm(port, times[0], t, len(times))
        return self._storm


class _Summariser(Follower):
    def __init__(self, trace: TraceFile, options: Options) -> None:
        super().__init__()
        self._trace = trace
        self._options = options
        self._domains: dict[Domain, DomainSummary] = {}
        self._ports: dict[Port, PortSummary] = {}
        self._rates: dict[Port, _Rate] = {}
        self._upcalls: dict[tuple[int, int], int] = {}  # when each vCPU's last one was
        start = trace.header.start
        self._from = start if options.start is None else options.start
        self._summary = Summary(str(trace.path), trace.header.seed, start, max(self._from, start), 0)

    def run(self) -> Summary:
        self.follow(self._trace, self._options.stop)
        summary = self._summary
        for domain in self.domains.values():
            self._of_domain(domain)
            for port in domain.ports.values():  # one that is silent may be what somebody looks for
                self._of_port(port)
        for one in self._domains.values():
            one.ports.sort(key=lambda port: port.port.p)
        summary.end = max(self.now, summary.start)
        summary.truncated = self._trace.truncated
        summary.domains = sorted(self._domains.values(), key=lambda one: one.domain.d)
        return summary

    def _of_domain(self, domain: Domain) -> DomainSummary:
        found = self._domains.get(domain)
        if found is None:
            found = self._domains[domain] = DomainSummary(domain, max_pending=domain.pending)
        return found

    def _of_port(self, port: Port) -> PortSummary:
        found = self._ports.get(port)
        if found is None:
            found = self._ports[port] = PortSummary(port)
            self._of_domain(self.domains[port.d]).ports.append(found)
        return found

    def _of_vcpu(self, d: int, v: int) -> VcpuSummary:
        vcpus = self._of_domain(self.domain(d)).vcpus
        return vcpus.get(v) or vcpus.setdefault(v, VcpuSummary())

    def event(self, event: Event) -> None:
        if isinstance(event, UpcallEvent):
            self._upcalls[event.d, event.v] = event.t
        if event.t < self._from:
            return
        summary = self._summary
        if not summary.events:
            for domain in self.domains.values():
                self._of_domain(domain).max_pending = domain.pending
        summary.events += 1
        summary.kinds[event.kind] += 1
        match event:
            case IrqEvent(ph="B"):
                self._irq_begins(event)
            case UpcallEvent():
                self._of_vcpu(event.d, event.v).upcalls += 1
            case HypercallEvent():
                self._of_domain(self.domain(event.d)).hypercalls[event.op] += 1
            case FaultEvent():
                summary.faults[event.rule or "?", event.action or "?"] += 1
            case ChoiceEvent():
                summary.choices[event.what] += 1
                summary.other_choices[event.what] += event.took not in (0, None)
            case MarkEvent() if len(summary.marks) < MAX_LISTED:
                summary.marks.append((event.t, event.text))

    def _irq_begins(self, event: IrqEvent) -> None:
        vcpu = self._of_vcpu(event.d, event.v)
        vcpu.irqs += 1
        if event.p is None:
            return
        port = self.port(event.d, event.p)
        vcpu.movable += port.type in MOVABLE
        found = self._of_port(port)
        found.irqs += 1
        upcall = self._upcalls.get((event.d, event.v))
        if upcall is not None:
            found.entry.add(event.t - upcall)

    def raised(self, event: RaiseEvent, port: Port, flow: Flow | None) -> None:
        rate = self._rates.get(port)
        if rate is None:
            rate = self._rates[port] = _Rate(self._options.storm_events)
        if event.t < self._from:
            return
        self._of_port(port).outcomes[event.out] += 1
        storm = rate.add(port, event.t, self._options.storm_window)
        if storm and len(self._summary.storms) < MAX_LISTED:
            self._summary.storms.append(storm)

    def delivered(self, flow: Flow, port: Port, event: IrqEvent) -> None:
        if event.t >= self._from:
            found = self._of_port(port)
            found.delivered += 1
            found.latency.add(event.t - flow.t)

    def handled(self, began: IrqEvent, ended: int, *, finished: bool) -> None:
        if finished and began.t >= self._from and began.p is not None:
            self._of_port(self.port(began.d, began.p)).handler.add(ended - began.t)

    def unmasked(self, port: Port, since: int, until: int) -> None:
        if until >= self._from:
            found = self._of_port(port)
            if not found.masked.count or until - since > found.masked.max:
                found.masked_at = since
            found.masked.add(until - since)

    def spent(self, d: int, v: int, state: str, began: int, ended: int) -> None:
        began = max(began, self._from)
        if ended >= began:
            self._of_vcpu(d, v).spent[state] += ended - began

    def delayed(self, d: int, v: int, woken: int, ran: int) -> None:
        if ran >= self._from:
            self._of_vcpu(d, v).wake.add(ran - woken)

    def counted(self, domain: Domain) -> None:
        if self.now >= self._from:
            found = self._of_domain(domain)
            found.max_pending = max(found.max_pending, domain.pending)

    def closed(self, port: Port) -> None:
        self._ports.pop(port, None)
        self._rates.pop(port, None)

"""What a timeline shows, whoever draws it: for each vCPU its turns, its handlers and what it sent, for each domain how
many ports were pending.

Two forms side by side: each single thing, for as long as there are few enough to be told apart, and sums over short
equal stretches of time, of which there are always the same number. So memory is bounded whatever the length of a trace.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from pvirq.lab.traceview.follower import Domain, Flow, Follower, Port
from pvirq.lab.traceview.selection import Selection
from pvirq.lab.traceview.traceevents import Event, FaultEvent, IrqEvent, MarkEvent
from pvirq.lab.traceview.tracefile import TraceFile, TraceFileError
from pvirq.lab.traceview.units import moment

STRETCHES: Final = 1200
MAX_SINGLE: Final = 300  # handlers, or turns, of one vCPU that are kept one by one
MAX_ARROWS: Final = 400
MAX_NOTES: Final = 1000

Place = tuple[int, int]  # domain, vCPU


@dataclass
class Handler:
    """A handler's run."""

    began: int
    ended: int
    name: str
    depth: int  # how many others it interrupted


@dataclass
class Turn:
    """What a vCPU did for a while: a state of `follower`."""

    began: int
    ended: int
    state: str


@dataclass
class Arrow:
    """An event's way from who raised it to its handler."""

    sent: int
    by: Place | None  # None is Xen
    handled: int
    to: Place
    name: str  # of the IRQ


@dataclass
class Note:
    """A mark or a fault."""

    t: int
    text: str
    fault: bool


@dataclass
class Row:
    """One vCPU."""

    place: Place
    handlers: list[Handler] | None = field(default_factory=list)  # None: too many
    turns: list[Turn] | None = field(default_factory=list)
    spent: dict[str, dict[int, int]] = field(default_factory=dict)  # state -> stretch -> ns, at least 1
    irqs: dict[str, Counter[int]] = field(default_factory=dict)  # name of the IRQ -> stretch -> how often
    sent: dict[str, Counter[int]] = field(default_factory=dict)  # the same of events that it raised


@dataclass
class Pending:
    """How many ports of a domain are pending."""

    at_start: int = 0
    most: dict[int, int] = field(default_factory=dict)  # stretch -> most in it, where it changed
    last: dict[int, int] = field(default_factory=dict)  # stretch -> at its end, where it changed

    def line(self) -> list[int]:
        """The most in each stretch."""
        now, found = self.at_start, []
        for i in range(STRETCHES):
            found.append(max(now, self.most.get(i, 0)))
            now = self.last.get(i, now)
        return found


@dataclass
class Timeline:
    """A trace from `start` to `stop`, in ns of virtual time."""

    file: str
    zero: int  # the trace's start, from which times are counted for people
    start: int
    stop: int
    names: dict[int, str] = field(default_factory=dict)  # of all domains
    rows: list[Row] = field(default_factory=list)  # by domain and vCPU; those of which there is anything to show
    pending: dict[int, Pending] = field(default_factory=dict)
    arrows: list[Arrow] | None = field(default_factory=list)  # None: too many
    ways: Counter[tuple[Place | None, Place]] = field(default_factory=Counter)  # how many arrows there are
    notes: list[Note] = field(default_factory=list)  # the first of them

    @property
    def span(self) -> int:
        return self.stop - self.start

    def stretch(self, t: int) -> int:
        """In which stretch a time is."""
        return min(max((t - self.start) * STRETCHES // self.span, 0), STRETCHES - 1)

    def irq_counts(self) -> Counter[str]:
        """How often each IRQ was handled, by its name."""
        counts: Counter[str] = Counter()
        for row in self.rows:
            for name, by_stretch in row.irqs.items():
                counts[name] += by_stretch.total()
        return counts


def timeline(trace: TraceFile, selection: Selection) -> Timeline:
    """The timeline of a trace that was just opened; arrows from domains that aren't selected come from Xen's side.

    TraceFileError for what is wrong in it, if it can't be read twice, or ends before the time that is selected.
    """
    begin = trace.header.start
    start = max(begin, begin if selection.start is None else selection.start)
    end = trace.end_time() + 1
    if start >= end:
        raise TraceFileError(f"{trace.path}: nothing from then on: the trace ends at {moment(end - 1 - begin)}")
    stop = max(start + 1, end if selection.stop is None else min(selection.stop, end))
    collector = _Collector(Timeline(str(trace.path), begin, start, stop), selection)
    collector.follow(trace, stop)
    return collector.result()


class _Collector(Follower):
    def __init__(self, timeline: Timeline, selection: Selection) -> None:
        super().__init__()
        self._timeline = timeline
        self._selection = selection
        self._rows: dict[Place, Row] = {}

    def result(self) -> Timeline:
        found = self._timeline
        found.names = {d: domain.name for d, domain in self.domains.items()}
        found.rows = [row for _, row in sorted(self._rows.items())]
        shown = {row.place[0] for row in found.rows}
        found.pending = {d: found.pending.get(d, Pending()) for d in sorted(shown)}
        return found

    def _wanted(self, d: int) -> bool:
        return self._selection.domain(d, self.domain(d).name)

    def _row(self, d: int, v: int) -> Row:
        return self._rows.get((d, v)) or self._rows.setdefault((d, v), Row((d, v)))

    def event(self, event: Event) -> None:
        timeline = self._timeline
        if event.t < timeline.start or len(timeline.notes) >= MAX_NOTES:
            return
        if isinstance(event, MarkEvent):
            timeline.notes.append(Note(event.t, event.text, fault=False))
        elif isinstance(event, FaultEvent) and (event.d is None or self._wanted(event.d)):
            timeline.notes.append(Note(event.t, f"{event.rule or 'fault'}: {event.action or '?'}", fault=True))

    def spent(self, d: int, v: int, state: str, began: int, ended: int) -> None:
        timeline = self._timeline
        began = max(began, timeline.start)
        if ended < began or not self._wanted(d):
            return
        row = self._row(d, v)
        if row.turns is not None:
            row.turns.append(Turn(began, ended, state))
            if len(row.turns) > MAX_SINGLE:
                row.turns = None
        in_state = row.spent.setdefault(state, {})
        first, last = timeline.stretch(began), timeline.stretch(ended)
        for i in range(first, last + 1):
            low = max(began, timeline.start + -(-i * timeline.span // STRETCHES))
            high = min(ended, timeline.start + -(-(i + 1) * timeline.span // STRETCHES))
            if high > low or first == last:  # a turn that took no time is seen all the same
                in_state[i] = in_state.get(i, 0) + max(high - low, 1)

    def delivered(self, flow: Flow, port: Port, event: IrqEvent) -> None:
        timeline = self._timeline
        if event.t < timeline.start or not self._wanted(event.d):
            return
        name = event.name or port.title
        by = flow.by if flow.by and self._wanted(flow.by[0]) else None
        if by and flow.t >= timeline.start:
            self._row(*by).sent.setdefault(name, Counter())[timeline.stretch(flow.t)] += 1
        to = (event.d, event.v)
        timeline.ways[by, to] += 1
        if timeline.arrows is not None:
            timeline.arrows.append(Arrow(flow.t, by, event.t, to, name))
            if len(timeline.arrows) > MAX_ARROWS:
                timeline.arrows = None

    def handled(self, began: IrqEvent, ended: int, *, finished: bool) -> None:
        timeline = self._timeline
        if ended < timeline.start or not self._wanted(began.d):
            return
        row = self._row(began.d, began.v)
        name = began.name or (f"irq {began.irq}" if began.p is None else self.port(began.d, began.p).title)
        if began.t >= timeline.start:
            row.irqs.setdefault(name, Counter())[timeline.stretch(began.t)] += 1
        if row.handlers is not None:
            depth = len(self.handlers(began.d, began.v))
            row.handlers.append(Handler(max(began.t, timeline.start), ended, name, depth))
            if len(row.handlers) > MAX_SINGLE:
                row.handlers = None

    def counted(self, domain: Domain) -> None:
        timeline = self._timeline
        if not self._wanted(domain.d):
            return
        found = timeline.pending.setdefault(domain.d, Pending())
        if self.now < timeline.start:
            found.at_start = domain.pending
            return
        i = timeline.stretch(self.now)
        found.most[i] = max(found.most.get(i, 0), domain.pending)
        found.last[i] = domain.pending

"""A trace for Perfetto (https://ui.perfetto.dev): a process for each domain, a thread for each vCPU.

The protobuf classes are those of Perfetto's own package (`pip install 'pvirq[perfetto]'`): it and protobuf take 6 MB
and a tenth of a second to import, and the names of fields are checked when they are used. Its trace processor, which
it would have to download, isn't needed for writing.

What is where:

- A thread's slices are its vCPU's turns and, within them, its handlers; its instants are upcalls, wakes, events that it
  raises, and faults that struck it. A handler that is interrupted by the end of its vCPU's turn goes on in a
  second slice in the next turn, so that a slice's length is time that the vCPU had.
- Flow arrows lead from where an event became pending to the handler's slice. What no vCPU has raised comes from a
  process "Xen".
- Each domain has a counter of its pending ports.
- Marks, and faults and choices of no vCPU, are instants of "Xen".

Times are the host's virtual ns. Process numbers are 10000 times the domain's number plus 1, since 0 means something of
its own to Perfetto; threads come behind them.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pvirq.lab.traceview.eventtext import what_text
from pvirq.lab.traceview.follower import Domain, Flow, Follower, Port
from pvirq.lab.traceview.traceevents import (
    ChoiceEvent,
    DomainEvent,
    EndEvent,
    Event,
    FaultEvent,
    Header,
    InputEvent,
    IrqEvent,
    MarkEvent,
    RaiseEvent,
    RunEvent,
    StopEvent,
    UpcallEvent,
    WakeEvent,
)
from pvirq.lab.traceview.tracefile import TraceFile
from pvirq.xen.probes import LOST

if TYPE_CHECKING:
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TracePacket

SEQUENCE: Final = 1  # one writer, so one sequence of packets
PID_STEP: Final = 10_000
LONGEST: Final = 200  # texts of marks and the like
XEN_PID: Final = 1
XEN_TRACK: Final = 1
_DOMAIN_TRACK: Final = 1 << 32
_VCPU_TRACK: Final = 2 << 32
_COUNTER_TRACK: Final = 3 << 32

Place = tuple[int, int]


class PerfettoError(Exception):
    """Perfetto's package is missing: one line says what to do."""


def check_perfetto() -> None:
    """PerfettoError if Perfetto's package isn't installed, or is one of before it had what is used here."""
    try:
        found = importlib.util.find_spec("perfetto.trace_builder.proto_builder")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise PerfettoError("traces for Perfetto need its package: pip install 'pvirq[perfetto]'")


def convert(source: TraceFile | str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the trace `source` (a file, or one that was just opened) to `out` for Perfetto.

    Event by event: neither file is ever in memory. PerfettoError without the package, TraceFileError for what is wrong
    in the trace, OSError if `out` can't be written.
    """
    check_perfetto()
    if not isinstance(source, TraceFile):
        with TraceFile(source) as trace:
            convert(trace, out)
        return
    with Path(out).open("wb") as file:
        _Converter(file).follow(source)


class _Converter(Follower):
    def __init__(self, file: Any) -> None:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto
        from perfetto.trace_builder.proto_builder import StreamingTraceProtoBuilder

        super().__init__()
        self._builder = StreamingTraceProtoBuilder(file)
        self._types = proto.TrackEvent
        self._names: dict[str, int] = {}  # interned
        self._tracks: set[int] = set()
        self._processes: dict[int, str] = {}  # names by track, as they were written
        self._handlers: dict[Place, list[IrqEvent]] = {}  # whose slices are open, the innermost last
        self._turns: dict[Place, None] = {}  # the same of turns; each is around its vCPU's handlers
        self._ended_flows: list[int] = []  # by the event at hand
        first = self._packet(None)
        first.sequence_flags = first.SEQ_INCREMENTAL_STATE_CLEARED
        self._builder.write_packet(first)

    # -- packets ------------------------------------------------------------------------------------------------------

    def _packet(self, t: int | None) -> TracePacket:
        packet = self._builder.create_packet()
        packet.trusted_packet_sequence_id = SEQUENCE
        if t is not None:
            packet.timestamp = t
            packet.sequence_flags = packet.SEQ_NEEDS_INCREMENTAL_STATE  # names are interned
        return packet

    def _write(
        self, track: int, kind: int, name: str = "", args: dict[str, Any] | None = None, *, intern: bool = True,
        **more: Any,
    ) -> None:  # fmt: skip
        """An event of a track now."""
        packet = self._packet(self.now)
        event = packet.track_event
        event.track_uuid = track
        event.type = kind
        if name and not intern:
            event.name = name
        elif name:
            number = self._names.get(name)
            if number is None:
                number = self._names[name] = len(self._names) + 1
                entry = packet.interned_data.event_names.add()
                entry.iid, entry.name = number, name
            event.name_iid = number
        if "flow" in more:
            event.flow_ids.append(more["flow"])
        if "ends" in more:
            event.terminating_flow_ids.extend(more["ends"])
        if "value" in more:
            event.counter_value = more["value"]
        for key, value in (args or {}).items():
            if value is not None:
                annotation = event.debug_annotations.add()
                annotation.name = key
                if isinstance(value, int):
                    annotation.int_value = value
                else:
                    annotation.string_value = value
        self._builder.write_packet(packet)

    def _process(self, d: int | None) -> int:
        """The track of a domain's process; None is Xen's, which has but one thread."""
        track = XEN_TRACK if d is None else _DOMAIN_TRACK + d
        name = "Xen" if d is None else self.domain(d).name
        if self._processes.get(track) != name:
            self._processes[track] = name
            packet = self._packet(None)
            descriptor = packet.track_descriptor
            descriptor.uuid = track
            descriptor.process.pid = XEN_PID if d is None else PID_STEP * (d + 1)
            descriptor.process.process_name = name
            self._builder.write_packet(packet)
        return track

    def _thread(self, d: int, v: int) -> int:
        track = _VCPU_TRACK + (d << 13) + v
        parent = self._process(d)
        if track not in self._tracks:
            self._tracks.add(track)
            packet = self._packet(None)
            descriptor = packet.track_descriptor
            descriptor.uuid, descriptor.parent_uuid = track, parent
            descriptor.thread.pid = PID_STEP * (d + 1)
            descriptor.thread.tid = PID_STEP * (d + 1) + 1 + v
            descriptor.thread.thread_name = f"vCPU {v}"
            self._builder.write_packet(packet)
        return track

    def _counter(self, d: int) -> int:
        track = _COUNTER_TRACK + d
        parent = self._process(d)
        if track not in self._tracks:
            self._tracks.add(track)
            packet = self._packet(None)
            descriptor = packet.track_descriptor
            descriptor.uuid, descriptor.parent_uuid, descriptor.name = track, parent, "pending ports"
            descriptor.counter.SetInParent()
            self._builder.write_packet(packet)
        return track

    def _instant(self, place: Place | None, name: str, args: dict[str, Any] | None = None, **more: Any) -> None:
        track = self._process(None) if place is None else self._thread(*place)
        self._write(track, self._types.TYPE_INSTANT, name, args, **more)

    # -- what is written of each event --------------------------------------------------------------------------------

    def begin(self, header: Header) -> None:
        super().begin(header)
        for d in self.domains:
            self._process(d)

    def event(self, event: Event) -> None:
        place = None if event.d is None or event.v is None else (event.d, event.v)
        match event:
            case RunEvent():
                self._begin_turn((event.d, event.v))
            case StopEvent():
                self._end_turn((event.d, event.v), event.why)
            case UpcallEvent() | WakeEvent():
                self._instant(place, event.kind)
            case FaultEvent() | MarkEvent() | ChoiceEvent() | InputEvent():
                text = f"{event.kind}: {what_text(event, self)}"
                self._instant(place, text if len(text) <= LONGEST else text[:LONGEST] + "...", intern=False)
            case EndEvent():
                for place in [place for place in self._turns if place[0] == event.d]:
                    self._end_turn(place, event.why)
                if event.d is not None:
                    self._write(self._process(event.d), self._types.TYPE_INSTANT, f"end: {event.why or '?'}")

    def feed(self, event: Event) -> None:
        self._ended_flows = []
        super().feed(event)
        if isinstance(event, DomainEvent):
            self._process(event.d)
        elif isinstance(event, IrqEvent) and event.ph == "B":
            self._begin_handler(event, continued=False)

    def _finish(self, t: int) -> None:
        super()._finish(t)
        for place in list(self._turns):
            self._end_turn(place, None)

    def raised(self, event: RaiseEvent, port: Port, flow: Flow | None) -> None:
        name = f"{event.out if event.out == LOST else 'raise'} {self.domain(event.d).name}: {port.title}"
        args = {"port": event.p, "vCPU": event.v, "outcome": event.out, "flow": event.flow}
        more = {} if flow is None or flow.id is None else {"flow": flow.id + 1}  # 0 is none to Perfetto
        self._instant(event.by, name, args, **more)

    def delivered(self, flow: Flow, port: Port, event: IrqEvent) -> None:
        if flow.id is not None:
            self._ended_flows.append(flow.id + 1)

    def unmasked(self, port: Port, since: int, until: int) -> None:
        args = {"port": port.p, "ns that an event waited": until - since}
        self._write(self._process(port.d), self._types.TYPE_INSTANT, f"unmasked: {port.title}", args)

    def counted(self, domain: Domain) -> None:
        self._write(self._counter(domain.d), self._types.TYPE_COUNTER, value=domain.pending)

    # -- slices, which have to be nested ------------------------------------------------------------------------------

    def _begin_handler(self, event: IrqEvent, *, continued: bool) -> None:
        name = event.name or (f"irq {event.irq}" if event.p is None else self.port(event.d, event.p).title)
        args = {"irq": event.irq, "port": event.p, "handler": event.handler, "continued": 1 if continued else None}
        track = self._thread(event.d, event.v)
        self._write(track, self._types.TYPE_SLICE_BEGIN, name, args, ends=() if continued else self._ended_flows)
        self._handlers.setdefault((event.d, event.v), []).append(event)

    def handled(self, began: IrqEvent, ended: int, *, finished: bool) -> None:
        handlers = self._handlers.get((began.d, began.v))
        if handlers and handlers[-1] is began:
            handlers.pop()
            self._write(self._thread(began.d, began.v), self._types.TYPE_SLICE_END)

    def _begin_turn(self, place: Place) -> None:
        self._end_turn(place, None)
        self._turns[place] = None
        self._write(self._thread(*place), self._types.TYPE_SLICE_BEGIN, "runs")
        for handler in self.handlers(*place):
            self._begin_handler(handler, continued=True)

    def _end_turn(self, place: Place, why: str | None) -> None:
        track = self._thread(*place)
        for _ in self._handlers.pop(place, []):
            self._write(track, self._types.TYPE_SLICE_END)
        if place in self._turns:
            del self._turns[place]
            self._write(track, self._types.TYPE_SLICE_END, args={"why": why})

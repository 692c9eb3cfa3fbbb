"""Traces for Perfetto, read back with Perfetto's own classes."""

from __future__ import annotations

import importlib.util
import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.lab.traceview import perfetto
from pvirq.lab.traceview.perfetto import PerfettoError, convert
from pvirq.lab.traceview.tracefile import TraceFileError
from tracelib import MS, Simulation, TraceWriter


@dataclass
class Slice:
    name: str
    began: int
    ended: int
    depth: int
    args: dict[str, Any]


@dataclass
class Track:
    """A track as Perfetto makes it out of its packets."""

    descriptor: Any
    slices: list[Slice] = field(default_factory=list)
    instants: list[tuple[int, str, dict[str, Any]]] = field(default_factory=list)
    values: list[tuple[int, int]] = field(default_factory=list)
    flows: list[tuple[int, int, str]] = field(default_factory=list)  # begin here: id, time, name
    ends: list[tuple[int, int, str]] = field(default_factory=list)


def read(path: Path) -> dict[str, Track]:
    """All tracks by name: "guest1", "guest1/vCPU 0", "guest1/pending ports". Fails where a reader of traces would."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TracePacket, TrackEvent

    trace = Trace()
    trace.ParseFromString(path.read_bytes())
    first = trace.packet[0]
    assert first.sequence_flags == TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
    names: dict[int, str] = {}
    tracks: dict[int, Track] = {}
    open_slices: dict[int, list[Slice]] = defaultdict(list)
    last = 0
    pids, tids = set(), set()
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == first.trusted_packet_sequence_id != 0
        for entry in packet.interned_data.event_names:
            assert entry.iid not in names
            names[entry.iid] = entry.name
        if packet.HasField("track_descriptor"):
            descriptor = packet.track_descriptor
            assert not descriptor.parent_uuid or descriptor.parent_uuid in tracks
            if descriptor.uuid not in tracks:
                tracks[descriptor.uuid] = Track(descriptor)
                if descriptor.HasField("process"):
                    assert descriptor.process.pid not in pids
                    pids.add(descriptor.process.pid)
                if descriptor.HasField("thread"):
                    assert descriptor.thread.pid == tracks[descriptor.parent_uuid].descriptor.process.pid
                    assert descriptor.thread.tid not in tids
                    tids.add(descriptor.thread.tid)
            tracks[descriptor.uuid].descriptor = descriptor
        if not packet.HasField("track_event"):
            continue
        assert packet.timestamp >= last
        last = packet.timestamp
        event, track = packet.track_event, tracks[packet.track_event.track_uuid]
        if event.name_iid:
            assert packet.sequence_flags & TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        name = event.name or names.get(event.name_iid, "")
        args = {a.name: a.string_value if a.HasField("string_value") else a.int_value for a in event.debug_annotations}
        stack = open_slices[event.track_uuid]
        track.flows += [(flow, last, name) for flow in event.flow_ids]
        track.ends += [(flow, last, name) for flow in event.terminating_flow_ids]
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            stack.append(Slice(name, last, -1, len(stack), args))
            track.slices.append(stack[-1])
        elif event.type == TrackEvent.TYPE_SLICE_END:
            stack[-1].args |= args
            stack.pop().ended = last
        elif event.type == TrackEvent.TYPE_INSTANT:
            assert name
            track.instants.append((last, name, args))
        else:
            assert event.type == TrackEvent.TYPE_COUNTER
            assert track.descriptor.HasField("counter")
            track.values.append((last, event.counter_value))
    assert not any(open_slices.values())
    found = {}
    for track in tracks.values():
        descriptor = track.descriptor
        name = descriptor.process.process_name or descriptor.thread.thread_name or descriptor.name
        if descriptor.parent_uuid:
            name = f"{tracks[descriptor.parent_uuid].descriptor.process.process_name}/{name}"
        assert name not in found
        found[name] = track
    return found


def converted(trace: TraceWriter, tmp_path: Path) -> dict[str, Track]:
    convert(trace.write(tmp_path / "run.jsonl"), tmp_path / "run.pftrace")
    return read(tmp_path / "run.pftrace")


def test_a_simulation(tmp_path: Path) -> None:
    simulation = Simulation(seed=6, guests=2, vcpus=2)
    tracks = converted(simulation.run(10 * MS), tmp_path)
    vcpus = {name for name in tracks if "/vCPU" in name}
    assert vcpus == {f"{name}/vCPU {v}" for name in ("Domain-0", "guest1", "guest2") for v in (0, 1)}
    for name in vcpus:
        d = 0 if name.startswith("D") else int(name[5])
        place = (d, int(name[-1]))
        slices = tracks[name].slices
        turns = [one for one in slices if one.depth == 0]
        assert {one.name for one in turns} == {"runs"}
        assert sum(one.ended - one.began for one in turns) == simulation.running[place]
        handlers = [one for one in slices if one.depth == 1]
        assert len(handlers) == simulation.irqs[place] == len(slices) - len(turns)
        upcalls = [instant for instant in tracks[name].instants if instant[1] == "upcall"]
        assert len(upcalls) == len(simulation.wakes[place])
    # Each flow goes from one raise to one handler, and later by the latency that is known.
    begins = {flow: (t, name) for track in tracks.values() for flow, t, name in track.flows}
    ends = {flow: (t, name) for track in tracks.values() for flow, t, name in track.ends}
    assert sum(len(track.flows) for track in tracks.values()) == len(begins)
    assert sum(len(track.ends) for track in tracks.values()) == len(ends)
    assert set(ends) == set(begins)
    latencies = [latency for known in simulation.known.values() for latency in known.latencies]
    assert Counter(ends[flow][0] - begins[flow][0] for flow in ends) == Counter(latencies)
    raised = [args["outcome"] for track in tracks.values() for _, name, args in track.instants if "outcome" in args]
    assert Counter(raised) == sum((known.outcomes for known in simulation.known.values()), Counter())
    for name in ("Domain-0", "guest1", "guest2"):
        values = [value for _, value in tracks[f"{name}/pending ports"].values]
        assert max(values) > 1
        assert values[-1] == 0
        assert all(abs(a - b) == 1 for a, b in itertools.pairwise(values))


def test_a_handler_goes_on_in_the_next_turn(tmp_path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1), ("g", 1))
    for t, kind, keys in (
        (10, "run", {}),
        (20, "irq", {"ph": "B", "irq": 9, "p": 4, "name": "eth0", "flow": []}),
        (25, "irq", {"ph": "B", "irq": 8, "p": 3, "name": "timer0", "flow": []}),
        (30, "stop", {"why": "slice"}),
        (70, "run", {}),
        (75, "irq", {"ph": "E", "irq": 8, "p": 3}),
        (80, "irq", {"ph": "E", "irq": 9, "p": 4}),
        (90, "stop", {"why": "blocked"}),
        (95, "mark", {"text": "here"}),
    ):
        trace.now = t
        trace.say(kind, *(() if kind == "mark" else (1, 0)), **keys)
    tracks = converted(trace, tmp_path)
    slices = tracks["g/vCPU 0"].slices
    assert [(one.name, one.began, one.ended, one.depth) for one in slices] == [
        ("runs", 10, 30, 0), ("eth0", 20, 30, 1), ("timer0", 25, 30, 2),
        ("runs", 70, 90, 0), ("eth0", 70, 80, 1), ("timer0", 70, 75, 2),
    ]  # fmt: skip
    assert [one.args.get("continued") for one in slices] == [None, None, None, None, 1, 1]
    assert [one.args.get("why") for one in slices if one.depth == 0] == ["slice", "blocked"]
    assert tracks["Xen"].instants == [(95, "mark: here", {})]


def test_faults_lost_events_and_ends(tmp_path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1), start=5)
    trace.say("domain", 1, name="g", vcpus=1, kind="modelled", kernel="pvops")
    trace.say("run", 1, 0)
    trace.say("raise", 1, 0, p=4, out="lost", by=[1, 0])
    trace.say("fault", 1, 0, rule="lose", action="drop", p=4)
    trace.now = 9
    trace.say("end", 1, why="crash")
    tracks = converted(trace, tmp_path)
    vcpu = tracks["g/vCPU 0"]
    assert [(one.name, one.began, one.ended, one.args) for one in vcpu.slices] == [("runs", 5, 9, {"why": "crash"})]
    assert [name for _, name, _ in vcpu.instants] == ["lost g: port 4", "fault: lose: drop port 4"]
    assert [name for _, name, _ in tracks["g"].instants] == ["end: crash"]


_steps = st.tuples(
    st.integers(0, 5), st.integers(0, 1), st.sampled_from(["run", "stop", "wake", "B", "E", "raise", "end", "mark"]),
    st.integers(1, 3),
)  # fmt: skip


@given(st.lists(_steps, max_size=50))
@settings(max_examples=100)
def test_slices_are_nested_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, str, int]]
) -> None:
    trace = TraceWriter(("Domain-0", 1), ("g", 2))
    for flow, (wait, v, what, port) in enumerate(steps):
        trace.now += wait
        if what in "BE":
            trace.say("irq", 1, v, ph=what, irq=port, p=port, flow=[flow] if what == "B" else None)
        elif what == "raise":
            trace.say("raise", 1, v, p=port, out="pending", by="xen", flow=flow)
        else:
            trace.say(what, 1, v)
    for track in converted(trace, tmp_path_factory.getbasetemp()).values():
        assert all(one.ended >= one.began for one in track.slices)


def test_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TraceFileError, match="No such file"):
        convert(tmp_path / "no.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PerfettoError, match=r"pip install 'pvirq\[perfetto\]'"):
        perfetto.check_perfetto()

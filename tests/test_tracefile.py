"""Reading traces: typed events, errors by line, and nothing but TraceFileError whatever is in the file."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.lab.traceview import tracefile
from pvirq.lab.traceview.eventtext import event_text
from pvirq.lab.traceview.follower import Follower
from pvirq.lab.traceview.traceevents import KINDS, Event, IrqEvent, RaiseEvent
from pvirq.lab.traceview.tracefile import TraceFile, TraceFileError
from pvirq.lab.traceview.units import duration, moment, parse_time
from tracelib import MS, Simulation, TraceWriter

HEADER = '{"pvirq":"trace","version":1,"seed":7,"start":100,"domains":[{"d":0,"name":"Domain-0","vcpus":2}]}\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def read(path: Path, text: str | bytes) -> list[Event]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with TraceFile(path) as trace:
        return list(trace)


def test_header(path: Path) -> None:
    path.write_text(HEADER)
    with TraceFile(path) as trace:
        assert (trace.header.seed, trace.header.start) == (7, 100)
        [domain] = trace.header.domains
        assert (domain.d, domain.name, domain.vcpus, domain.world) == (0, "Domain-0", 2, None)
        assert list(trace) == []
        assert not trace.truncated


def test_events_are_typed_and_keep_what_is_not_known(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 2), ("g", 1))
    trace.now = 5
    trace.say("raise", 1, 0, p=12, out="pending", by=[0, 1], flow=3, later="x")
    trace.say("raise", 1, 0, p=12, out="coalesced", by="xen", flow=3)
    trace.say("irq", 1, 0, ph="B", irq=260, p=12, name="eth0", handler="xennet_interrupt", flow=[3])
    trace.say("weather", 1, rain=True)
    sent, again, irq, other = read(path, trace.text())
    assert isinstance(sent, RaiseEvent)
    assert (sent.t, sent.d, sent.v, sent.p, sent.out, sent.by, sent.flow, sent.line) == (
        5, 1, 0, 12, "pending", (0, 1), 3, 2,
    )  # fmt: skip
    assert sent.raw["later"] == "x"
    assert isinstance(again, RaiseEvent)
    assert again.by is None
    assert isinstance(irq, IrqEvent)
    assert (irq.irq, irq.name, irq.flow) == (260, "eth0", (3,))
    assert type(other) is Event
    assert (other.kind, other.d, other.v, other.raw["rain"]) == ("weather", 1, None, True)


def test_every_kind_is_read_and_told(path: Path) -> None:
    """With just the keys that each needs."""
    needed: dict[str, dict[str, Any]] = {
        "bind": {"d": 1, "p": 3, "type": "ipi"}, "raise": {"d": 1, "v": 0, "p": 3, "out": "lost"},
        "irq": {"d": 1, "v": 0, "ph": "B"}, "hypercall": {"d": 1, "op": "sched_op.yield"}, "choice": {"what": "turn"},
    }  # fmt: skip
    events = [
        {"t": 100 + i, "k": kind, **needed.get(kind, {"d": 1, "v": 0, "p": 3})} for i, kind in enumerate(KINDS)
    ]  # fmt: skip
    found = read(path, HEADER + "".join(json.dumps(event) + "\n" for event in events))
    assert [type(event) for event in found] == list(KINDS.values())
    follower = Follower()
    for event in found:
        follower.feed(event)
        assert f" {event.kind}" in event_text(event, follower)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "run.jsonl: empty, expected a trace"),
        ("\n", "run.jsonl:1: expected a JSON object"),
        ("{}\n", 'run.jsonl:1: expected the header of a trace, {"pvirq":"trace",...}'),
        ('{"pvirq":"trace","version":2}\n', "run.jsonl:1: expected version 1 of the format, not 2"),
        ('{"pvirq":"trace","version":1,"start":-1}\n', 'header: expected a whole number from 0 to'),
        ('{"pvirq":"trace","version":1,"domains":[{"name":"g"}]}\n', 'header: expected a value as "d"'),
        ('{"pvirq":"trace","version":1,"domains":3}\n', 'header: expected a list of objects as "domains"'),
        (HEADER + "\n", "run.jsonl:2: expected a JSON object"),
        (HEADER + "[1]\n", "run.jsonl:2: expected a JSON object"),
        (HEADER + '{"t":NaN,"k":"run"}\n', "run.jsonl:2: expected a JSON object"),
        (HEADER + "[" * 100_000 + "\n", "run.jsonl:2: expected a JSON object"),
        (HEADER + '{"t":' + "1" * 5000 + ',"k":"run"}\n', "run.jsonl:2: expected a JSON object"),
        (HEADER + '{"t":100,"k":"mark"}x\n', "run.jsonl:2: expected a JSON object"),
        (HEADER + '{"t":100,"k":"mark"}{}\n', "run.jsonl:2: expected a JSON object"),
        (HEADER + '{"t":100}\n', 'run.jsonl:2: expected a kind of event, "k", a string'),
        (HEADER + '{"k":"mark"}\n', 'run.jsonl:2: mark: expected a whole number from 0 to 9223372036854775807 as "t"'),
        (HEADER + '{"t":100.5,"k":"mark"}\n', 'as "t"'),
        (HEADER + '{"t":true,"k":"mark"}\n', 'as "t"'),
        (HEADER + '{"t":100,"k":"run","d":0}\n', 'run.jsonl:2: run: expected a value as "v"'),
        (HEADER + '{"t":100,"k":"run","d":"0","v":0}\n', 'run: expected a whole number from 0 to 65535 as "d"'),
        (HEADER + '{"t":100,"k":"close","d":0,"p":131073}\n', 'close: expected a whole number from 0 to 131072 as "p"'),
        (HEADER + '{"t":100,"k":"irq","d":0,"v":0,"ph":"C"}\n', 'irq: expected "B" or "E" as "ph"'),
        (HEADER + '{"t":100,"k":"irq","d":0,"v":0,"ph":"B","flow":3}\n', 'expected a list of numbers as "flow"'),
        (HEADER + '{"t":100,"k":"raise","d":0,"v":0,"p":1,"out":"lost","by":"me"}\n', 'vCPU] or "xen" as "by"'),
        (HEADER + '{"t":99,"k":"mark"}\n', "run.jsonl:2: time goes back, from 100 to 99"),
        (HEADER + '{"t":100,"k":"mark"}\n{"t":101,"k":\n{"t":102,"k":"mark"}\n', "run.jsonl:3: expected a JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(path: Path, text: str, words: str) -> None:
    with pytest.raises(TraceFileError) as error:
        read(path, text)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{path}:")
    assert "\n" not in str(error.value)


def test_a_last_line_that_is_cut_off(path: Path) -> None:
    whole = '{"t":101,"k":"mark","text":"a"}\n'
    for cut in range(1, len(whole) - 1):
        path.write_text(HEADER + whole + whole[:cut])
        with TraceFile(path) as trace:
            assert len(list(trace)) == 1
            assert trace.truncated
            assert trace.end_time() == 101
    path.write_text(HEADER + whole + whole[:-1])  # all but its newline: nothing is lost
    with TraceFile(path) as trace:
        assert len(list(trace)) == 2
        assert not trace.truncated


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "no", "No such file"), (tmp_path, "irectory"), (Path("a\0b"), "null")):
        with pytest.raises(TraceFileError, match=words):
            TraceFile(path)


def test_a_line_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefile, "MAX_LINE", 1000)
    with pytest.raises(TraceFileError, match=r"run.jsonl:2: a line of over"):
        read(path, HEADER + "x" * 5000)


def test_names_are_printable(path: Path) -> None:
    lines = [{"t": 100, "k": "mark", "text": "\x1b[31mred\n\ud800"}, {"t": 100, "k": "\x07", "x\x1b": "\x1b"}]
    events = read(path, HEADER + "".join(json.dumps(line) + "\n" for line in lines))
    for event in events:
        text = event_text(event, Follower())
        assert text.isprintable()
        text.encode()
    assert r"\x1b[31mred\n\ud800" in event_text(events[0], Follower())


def test_a_pipe_is_read_once(path: Path) -> None:
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text(HEADER + '{"t":101,"k":"mark"}\n'))
    writer.start()
    with TraceFile(path) as trace:
        with pytest.raises(TraceFileError, match="not a pipe"):
            trace.end_time()
        assert len(list(trace)) == 1
    writer.join()


def test_the_end_is_found_without_reading_all(path: Path) -> None:
    simulation = Simulation()
    trace = simulation.run(3 * MS)
    trace.say("mark", text="x" * 300_000)
    trace.write(path)
    with TraceFile(path) as file:
        assert file.end_time() == trace.now
        assert file.done < 1000
        assert max(event.t for event in file) == trace.now


def test_it_says_how_far_it_is(path: Path) -> None:
    Simulation().run(10 * MS).write(path)
    shares = []
    with TraceFile(path) as trace:
        trace.on_turn = lambda: shares.append(trace.done / trace.size)
        for _ in trace:
            pass
    assert shares
    assert shares == sorted(shares)
    assert shares[-1] <= 1 == trace.done / trace.size


_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_values = _scalars | st.lists(_scalars, max_size=3)
_keys = st.sampled_from(
    [
        "d",
        "v",
        "p",
        "irq",
        "flow",
        "by",
        "out",
        "ph",
        "text",
        "type",
        "rd",
        "rp",
        "virq",
        "name",
        "vcpus",
        "why",
        "what",
    ]
)
_events = st.builds(
    lambda t, kind, keys, more: {"d": 1, "v": 0, "p": 2, **keys, **more, "t": t, "k": kind},
    st.integers(100, 105) | _values, st.sampled_from(list(KINDS)) | _values,
    st.dictionaries(_keys, st.integers(0, 3), max_size=8), st.dictionaries(_keys, _values, max_size=2),
)  # fmt: skip


@given(st.binary(max_size=300) | st.lists(_events, max_size=5).map(
    lambda events: HEADER.encode() + b"".join(json.dumps(event).encode() + b"\n" for event in events)
) | st.binary(max_size=60).map(lambda data: HEADER.encode() + data))  # fmt: skip
@settings(max_examples=250)
def test_nothing_but_its_own_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    try:
        with TraceFile(path) as trace:
            trace.end_time()
            follower = Follower()
            for event in trace:
                follower.feed(event)
                event_text(event, follower).encode()
    except TraceFileError:
        pass


@pytest.mark.parametrize(
    ("ns", "text"),
    [(0, "0ns"), (999, "999ns"), (1000, "1.00us"), (12_345, "12.3us"), (999_400, "999us"), (999_600, "1.00ms"),
     (1_234_567, "1.23ms"), (99_960_000, "100ms"), (3_200_000_000, "3.20s"), (4_000_000_000_000, "4000s")],
)  # fmt: skip
def test_durations(ns: int, text: str) -> None:
    assert duration(ns) == text


def test_times() -> None:
    assert moment(1_234_567_890) == "1234.567890 ms"
    found = [parse_time(text) for text in ("1.5s", "20ms", "0.3us", "7ns", "2min", " 1 s ")]
    assert found == [1_500_000_000, 20_000_000, 300, 7, 120_000_000_000, 1_000_000_000]
    for text in ("", "5", "1h", "-1ms", "1e3ms", "x"):
        with pytest.raises(ValueError, match="expected a time"):
            parse_time(text)

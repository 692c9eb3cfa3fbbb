"""Timelines: what they hold, and how a terminal and a picture show it."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.lab.traceview import plot, terminal, timeline
from pvirq.lab.traceview.follower import BLOCKED, READY, RUNNING
from pvirq.lab.traceview.selection import Selection
from pvirq.lab.traceview.timeline import STRETCHES, Timeline
from pvirq.lab.traceview.tracefile import TraceFile
from tracelib import MS, US, Simulation, TraceWriter

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def timeline_of(trace: TraceWriter, path: Path, selection: Selection | None = None) -> Timeline:
    with TraceFile(trace.write(path)) as file:
        return timeline.timeline(file, selection or Selection())


def small(start: int = 0) -> TraceWriter:
    """A guest's vCPU runs from 100 us to 300 us; Domain-0 sends it an event at 50 us that is handled at 120 us."""
    trace = TraceWriter(("Domain-0", 1), ("g", 1), start=start)
    for t, kind, d, keys in (
        (0, "stop", 1, {"why": "blocked"}),
        (40, "run", 0, {}),
        (50, "raise", 1, {"p": 4, "out": "pending", "by": [0, 0], "flow": 1}),
        (50, "wake", 1, {}),
        (60, "stop", 0, {"why": "done"}),
        (100, "run", 1, {}),
        (100, "upcall", 1, {}),
        (120, "irq", 1, {"ph": "B", "irq": 9, "p": 4, "name": "eth0", "flow": [1]}),
        (150, "irq", 1, {"ph": "B", "irq": 10, "p": 5, "name": "timer0", "flow": []}),
        (170, "irq", 1, {"ph": "E", "irq": 10, "p": 5}),
        (220, "irq", 1, {"ph": "E", "irq": 9, "p": 4}),
        (250, "fault", 1, {"rule": "lose", "action": "drop", "p": 4}),
        (300, "stop", 1, {"why": "blocked"}),
        (350, "mark", None, {"text": "done"}),
        (400, "mark", None, {"text": "over"}),
    ):
        trace.now = start + t * US - (t == 400)  # so that all of it are 400 us
        trace.say(kind, d, None if d is None else 0, **keys)
    return trace


def test_single_things(path: Path) -> None:
    found = timeline_of(small(start=7 * MS), path)
    assert (found.zero, found.start, found.stop) == (7 * MS, 7 * MS, 7 * MS + 400 * US)
    assert found.names == {0: "Domain-0", 1: "g"}
    dom0, guest = found.rows
    assert (dom0.place, guest.place) == ((0, 0), (1, 0))

    def us(t: int) -> float:
        return (t - found.zero) / US

    assert [(us(turn.began), us(turn.ended), turn.state) for turn in guest.turns or ()] == [
        (0, 50, BLOCKED), (50, 100, READY), (100, 300, RUNNING), (300, 399.999, BLOCKED),
    ]  # fmt: skip
    assert [(us(h.began), us(h.ended), h.name, h.depth) for h in guest.handlers or ()] == [
        (150, 170, "timer0", 1), (120, 220, "eth0", 0),
    ]  # fmt: skip
    [arrow] = found.arrows or ()
    assert (us(arrow.sent), arrow.by, us(arrow.handled), arrow.to, arrow.name) == (50, (0, 0), 120, (1, 0), "eth0")
    assert [(us(note.t), note.text, note.fault) for note in found.notes] == [
        (250, "lose: drop", True), (350, "done", False), (399.999, "over", False),
    ]  # fmt: skip
    assert dom0.sent == {"eth0": Counter({found.stretch(arrow.sent): 1})}
    line = found.pending[1].line()
    first, last = found.stretch(arrow.sent), found.stretch(arrow.handled)
    assert line == [0] * first + [1] * (last - first + 1) + [0] * (STRETCHES - last - 1)
    assert not any(found.pending[0].line())


def test_a_part_of_the_time_and_of_the_domains(path: Path) -> None:
    found = timeline_of(small(), path, Selection(domains=("g",), start=110 * US, stop=160 * US))
    [guest] = found.rows
    assert [(turn.began, turn.ended, turn.state) for turn in guest.turns or ()] == [(110 * US, 160 * US, RUNNING)]
    assert [(h.began, h.ended, h.name) for h in guest.handlers or ()] == [
        (150 * US, 160 * US, "timer0"), (120 * US, 160 * US, "eth0"),
    ]  # fmt: skip
    [arrow] = found.arrows or ()
    assert arrow.by is None  # its sender has no row
    assert found.notes == []
    assert found.pending[1].line()[0] == 1
    assert found.pending[1].line()[-1] == 0


@pytest.mark.parametrize(("start", "length"), [(0, 1), (3, 7), (1, 1199), (0, 1201), (5, 10 * MS)])
def test_the_sums_are_all_the_time(path: Path, start: int, length: int) -> None:
    """However the stretches fall."""
    simulation = Simulation(seed=4, guests=1, start=0)
    base = 2 * MS + start
    found = timeline_of(simulation.run(13 * MS), path, Selection(start=base, stop=base + length))
    for row in found.rows:
        total = sum(ns for by_stretch in row.spent.values() for ns in by_stretch.values())
        assert length <= total <= length + sum(len(by_stretch) for by_stretch in row.spent.values())
        if row.turns is not None:
            assert sum(turn.ended - turn.began for turn in row.turns) == length


def test_what_is_too_much_is_not_kept(path: Path) -> None:
    simulation = Simulation(seed=4, guests=1, every=20 * US)
    found = timeline_of(simulation.run(50 * MS), path)
    assert found.arrows is None
    assert any(row.handlers is None for row in found.rows)
    assert found.irq_counts().total() == sum(simulation.irqs.values())
    assert found.ways.total() == sum(len(known.latencies) for known in simulation.known.values())
    sent = sum(counts.total() for row in found.rows for counts in row.sent.values())
    assert sent == sum(count for (by, _), count in found.ways.items() if by)


# -- the terminal ------------------------------------------------------------------------------------------------------


def lines_of(found: Timeline, width: int = 80, *, plain: bool = False) -> list[str]:
    return [line.plain for line in terminal.lines(found, width, plain=plain)]


def test_the_terminal_shows_it(path: Path) -> None:
    lines = lines_of(timeline_of(small(), path), 14 + 40)
    assert lines == [
        "0.000000 ms to 0.400000 ms, a column is 10.0us",
        "              |0us                |200us              ",
        "Domain-0 (domain 0)",
        "  0 runs          ██··································",
        "  0 sends          e                                  ",
        "g (domain 1)",
        "  0 runs      ·····~~~~~████████████████████··········",
        "  0 handles               e  t                        ",
        "  pending          11111111                           ",
        "marks, faults                          !         ^   ^",
        "  ! 0.250000 ms  lose: drop",
        "  ^ 0.350000 ms  done",
        "  ^ 0.399999 ms  over",
        "runs: ▁ little to █ all the time, ~ waits for a turn, · blocked",
        "handles, sends: the IRQ of an event, a capital where there are several",
        "  t timer0  e eth0",
    ]


@pytest.mark.parametrize("width", [40, 80, 133, 2000])
def test_it_fits(path: Path, width: int) -> None:
    found = timeline_of(Simulation(seed=1, guests=3).run(30 * MS), path)
    lines = lines_of(found, width)
    drawn = [line for line in lines if line.startswith("  ") and re.match(r"  (\d \w+|pending) ", line)]
    assert drawn
    assert all(len(line) <= max(width, 72) for line in lines)
    assert {len(line) for line in drawn} == {min(width, 14 + STRETCHES)}


def test_ascii(path: Path) -> None:
    lines = lines_of(timeline_of(Simulation().run(5 * MS), path), plain=True)
    assert "\n".join(lines).isascii()


def test_nothing_happens(path: Path) -> None:
    found = timeline_of(TraceWriter(("g", 1)), path)
    assert found.rows == []
    assert "Nothing happens in this time." in lines_of(found)


def test_an_irq_has_a_letter_of_its_name() -> None:
    names = ["timer0", "eth0", "timer1", "tty", "t", "тест", *(f"n{i}" for i in range(40))]
    letters = terminal._letters(Counter({name: 100 - i for i, name in enumerate(names)}))
    assert [letters[name] for name in names[:4]] == ["t", "e", "i", "y"]
    assert len(set(letters.values())) == len(letters) == 26


# -- the picture -------------------------------------------------------------------------------------------------------


def texts_of(path: Path) -> list[str]:
    return ["".join(element.itertext()) for element in ET.parse(path).iter(f"{SVG}text")]


def test_a_picture_of_few_events(path: Path, tmp_path: Path) -> None:
    found = timeline_of(small(), path)
    for name in ("a.svg", "b.svg"):
        plot.plot(found, tmp_path / name, "svg")
    texts = texts_of(tmp_path / "a.svg")
    for text in ("Domain-0", "g", "vCPU 0", "pending", "lose: drop", "done", "eth0 (1)", "timer0 (1)", "runs"):
        assert text in texts
    assert any(text.startswith("run.jsonl: 400us of virtual time") for text in texts)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_picture_of_many(path: Path, tmp_path: Path) -> None:
    found = timeline_of(Simulation(seed=4, guests=2, every=20 * US).run(50 * MS), path)
    plot.plot(found, tmp_path / "many.svg", "svg")
    texts = texts_of(tmp_path / "many.svg")
    assert any("too many for arrows" in text for text in texts)
    assert any(re.fullmatch(r"up to \d+ in 1\d\dus", text) for text in texts)
    assert (tmp_path / "many.svg").stat().st_size < 1_000_000  # sums, not things
    plot.plot(found, tmp_path / "many.png", "png")
    assert (tmp_path / "many.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_nothing_and_of_names_with_formulas(path: Path, tmp_path: Path) -> None:
    trace = TraceWriter((r"$\alpha$", 1))
    plot.plot(timeline_of(trace, path), tmp_path / "a.svg", "svg")
    assert any("nothing happens" in text for text in texts_of(tmp_path / "a.svg"))
    trace.say("irq", 0, 0, ph="B", irq=1, name=r"$\frac{1}$", flow=[])
    trace.say("mark", text=r"50$ _and_ $\x")
    plot.plot(timeline_of(trace, path), tmp_path / "b.svg", "svg")
    texts = texts_of(tmp_path / "b.svg")
    for text in (r"$\alpha$", r"$\frac{1}$ (1)", r"50$ _and_ $\x"):
        assert text in texts


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(plot.PlotError, match=r"need matplotlib: pip install 'pvirq\[plots\]'"):
        plot.check_plots()


def test_a_fault_that_is_made_often_has_its_text_once(path: Path, tmp_path: Path) -> None:
    trace = small()
    for _ in range(50):
        trace.say("fault", 1, 0, rule="lose", action="drop", p=4)
    plot.plot(timeline_of(trace, path), tmp_path / "a.svg", "svg")
    texts = texts_of(tmp_path / "a.svg")
    assert [text for text in texts if text.startswith("lose")] == ["lose: drop (51 times)"]


_times = st.lists(st.integers(0, 1 << 62), min_size=1, max_size=30).map(sorted)
_kinds = st.sampled_from(["run", "stop", "wake", "upcall", "raise", "irq", "mark", "fault", "end", "domain", "close"])


@given(_times, st.data())
@settings(max_examples=40)
def test_whatever_is_in_a_trace_is_shown(
    tmp_path_factory: pytest.TempPathFactory, times: list[int], data: st.DataObject
) -> None:
    trace = TraceWriter(("Domain-0", 1))
    for t in times:
        trace.now = t
        kind = data.draw(_kinds)
        keys = {
            "p": data.draw(st.integers(0, 2)),
            "out": data.draw(st.sampled_from(["pending", "masked", "lost", "?"])),
        }
        keys |= {
            "ph": data.draw(st.sampled_from("BE")),
            "flow": None if kind == "irq" else data.draw(st.integers(0, 3)),
        }
        more = {"by": [0, 0], "name": data.draw(st.text(max_size=4))}
        trace.say(kind, data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1)), **keys, **more)
    folder = tmp_path_factory.getbasetemp()
    start = data.draw(st.sampled_from([0, times[0], times[-1]]))
    found = timeline_of(trace, folder / "any.jsonl", Selection(start=start))
    for line in lines_of(found):
        line.encode()
    plot.plot(found, folder / "any.svg", "svg")
    texts_of(folder / "any.svg")  # it can be read

"""Schedules for people: columns, diagrams, files; the example's driver, whose lost wake-up is found and mended."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pvirq.check import Model, Thread, atomically, explore, note
from pvirq.check.diagram import flows, mermaid, svg
from pvirq.check.explain import columns, sentence
from pvirq.check.guided import ScheduleError, follow, one_by_one
from pvirq.check.schedulefile import Schedule, ScheduleFileError, read, write
from pvirq.check.shortest import switches
from pvirq.check.system import System

DRIVER = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "check_driver.py"))
LOST = "the driver sleeps for ever, with 2 responses in the ring"


def words() -> Model:
    """Two threads and all kinds of sentences."""
    model = Model()
    word = model.var("word", 0x1000)
    lock = model.lock("lock <&>")
    other = model.var("other")

    def first() -> Thread:
        yield lock.acquire()
        yield word.set_bit(1)
        yield other.write("a; long & <hostile> value " * 5)
        yield lock.release()

    def second() -> Thread:
        yield note("begins")
        yield word.read()
        yield atomically([word, other], lambda a, b: (a + 1, 7)).saying("does two things")
        yield other.read().saying("looks")

    model.thread("cpu0", first)
    model.thread("cpu1", second)
    return model


SCHEDULE = [(1, 0), (0, 0), (0, 0), (1, 0), (0, 0), (1, 0), (1, 0), (0, 0)]


def test_sentences() -> None:
    moved, wrong = follow(words(), SCHEDULE)
    assert wrong is None
    assert [sentence(each) for each in moved] == [
        "begins",
        "takes lock <&>",
        "sets bit 1 of word: 0x1000 -> 0x1002",
        "reads word: 0x1002",
        "writes other = 'a; long & <hostile> value a; long & <hostile> value a; long & <hostile> value a; long & "
        "<hostile> value a; long & <hostile> value ' (was 0)",
        "does two things: word 0x1002 -> 0x1003, other a; long & <hostile> value a; long & <... -> 7",
        "looks: other = 7",
        "releases lock <&>",
    ]
    assert switches(System(words()), SCHEDULE) == 5


def test_columns() -> None:
    moved, _ = follow(words(), SCHEDULE)
    table = columns(words(), moved, "something is wrong", 80)
    assert table[0].split() == ["cpu0", "cpu1"]
    second = table[0].index("cpu1")
    assert table[2] == " 1  " + " " * (second - 4) + "begins"
    assert table[3] == " 2  takes lock <&>"
    assert table[-1] == "=> something is wrong"
    assert max(map(len, table)) <= 80
    assert any("[test_check_explain.py:" in line for line in columns(words(), moved, None, 100, lines=True))
    assert max(map(len, columns(words(), moved, None, 10))) < 64  # too narrow for two columns: it's as narrow as can be


def test_threads_that_do_nothing_have_no_column() -> None:
    model = words()
    moved, _ = follow(model, [(1, 0), (1, 0)])
    assert columns(model, moved, None)[0].split() == ["cpu1"]
    assert columns(model, [], None)[0].split() == ["cpu0"]


def test_values_flow_from_writers_to_readers() -> None:
    moved, _ = follow(words(), SCHEDULE)
    assert list(flows(moved)) == [(2, 3, "word"), (2, 5, "word"), (4, 5, "other")]


@pytest.mark.parametrize("order", ["sc", "tso", "weak"])
def test_diagrams_are_well_formed(order: str) -> None:
    model = DRIVER["check_first_version"]()
    model.order = order
    failure = explore(model).failure
    assert failure is not None
    moved, wrong = follow(model, failure.schedule)
    root = ElementTree.fromstring(svg(model, moved, wrong, "a <title>"))
    assert root.tag.endswith("svg")
    texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"backend", "driver", LOST} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == len(moved) + 1
    text = mermaid(model, moved, wrong)
    assert text.startswith("sequenceDiagram\n    participant t0 as backend\n")
    assert text.count("Note over") == len(moved) + 1
    assert not set("#;<") & set(re.sub(r"#(\d+|[lg]t);", "", text))


def test_diagrams_of_hostile_names() -> None:
    moved, wrong = follow(words(), SCHEDULE)
    ElementTree.fromstring(svg(words(), moved, wrong, "&<>"))
    assert "#lt;hostile#gt; value" in mermaid(words(), moved, wrong)


def test_a_schedule_in_a_file(tmp_path: Path) -> None:
    model = DRIVER["check_first_version"]()
    failure = explore(model).failure
    assert failure is not None
    assert failure.message == LOST
    moved, wrong = follow(model, failure.schedule)
    schedule = Schedule("x.py::check_first_version", False, "sc", wrong, failure.schedule)
    write(tmp_path / "s.json", schedule, moved)
    assert read(tmp_path / "s.json") == schedule
    assert len((tmp_path / "s.json").read_text().splitlines()) == len(moved) + 2


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", "1", '{"check": "a"}', "[" * 100_000, '{"check": "a", "fault": 1, "order": "sc", "steps": []}',
        '{"check": "a", "fault": true, "order": "sc", "steps": [1]}',
        '{"check": "a", "fault": true, "order": "sc", "steps": [{"process": -1, "choice": 0}]}',
        '{"check": "a", "fault": true, "order": "sc", "steps": [{"process": true, "choice": 0}]}',
        '{"check": "a", "fault": true, "order": "sc", "steps": [{"process": 0, "choice": 99999999999}]}',
        "\udcff",
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_said(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ScheduleFileError, match=r"s\.json"):
        read(path)


def test_a_schedule_that_doesnt_fit() -> None:
    for schedule in ([(0, 0)] * 9, [(0, 1)], [(5, 0)], [(1, 0)]):
        with pytest.raises(ScheduleError, match=r"step \d: .* can't go on there"):
            follow(DRIVER["check_first_version"](), schedule)


def test_one_thread_after_the_other() -> None:
    model = DRIVER["check_looks_again"]()
    end = one_by_one(model, "backend", "driver")
    assert not end.waiting
    assert {variable.name: end[variable] for variable in model.variables} == {
        "rsp_prod": 2, "rsp_event": 3, "pending": 0,
    }  # fmt: skip
    assert one_by_one(DRIVER["check_looks_again"](), "driver").waiting == {
        "driver": "sleeps until an event is pending",
        "backend": "puts response 1 into the ring",
    }


@pytest.mark.parametrize("reduce", [True, False])
def test_the_examples_driver(reduce: bool) -> None:
    for name, lost in (
        ("first_version", True), ("looks_again", False), ("looks_again_on_x86", True), ("barriers_on_x86", False),
    ):  # fmt: skip
        result = explore(DRIVER[f"check_{name}"](), reduce=reduce)
        assert (result.failure and result.failure.message) == (LOST if lost else None), name
        assert result.complete is not lost

"""`pvirq check`: listing, searching, explaining, schedules in files, and what is wrong with a user's file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pvirq.check.race import races
from pvirq.cli.main import run

ROOT = Path(__file__).parent.parent
DRIVER = "examples/check_driver.py"
LOST = "the driver sleeps for ever, with 2 responses in the ring"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check"]) == 0
    *listed, empty, hint = lines(capsys)
    assert not empty
    assert hint.startswith("`pvirq check NAME --explain`")
    assert [line.split()[0] for line in listed] == list(races())
    assert all(race.title in line for race, line in zip(races().values(), listed, strict=True))
    assert run(["check", "--json"]) == 0
    assert [json.loads(line)["name"] for line in lines(capsys)] == list(races())


def test_models_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", DRIVER]) == 1
    out = capsys.readouterr().out
    assert re.findall(r"^  (BROKEN|clean): ", out, re.MULTILINE) == ["BROKEN", "clean", "BROKEN", "clean"]
    assert run(["check", f"{DRIVER}::check_looks_again"]) == 0
    assert run(["check", f"{DRIVER}::check_looks_again", "--order", "tso"]) == 1
    assert run(["check", f"{DRIVER}::check_looks_again", "--order", "tso", "--no-reduction"]) == 1
    assert run(["check", f"{DRIVER}::check_barriers_on_x86", "--order", "weak"]) == 0


def test_results_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", DRIVER, "--json"]) == 1
    results = [json.loads(line) for line in lines(capsys)]
    assert [result["broken"] for result in results] == [LOST, None, LOST, None]
    assert [result["complete"] for result in results] == [False, True, False, True]
    assert [result["as_expected"] for result in results] == [False, True, False, True]
    assert all(result["states"] > 10 and result["steps"] > 10 for result in results)


def test_an_end_before_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", f"{DRIVER}::check_looks_again", "--max-states", "5"]) == 3
    assert "not searched to the end" in capsys.readouterr().out


def test_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", f"{DRIVER}::check_first_version", "--explain"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^ +backend +driver$", out, re.MULTILINE)
    assert re.search(r"^ 1  puts response 1 into the ring: rsp_prod 0 -> 1$", out, re.MULTILINE)
    assert re.search(rf"^=> {LOST}$", out, re.MULTILINE)
    assert run(["check", f"{DRIVER}::check_first_version", "--explain", "--lines"]) == 1
    assert "[check_driver.py:" in capsys.readouterr().out


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "check.md").read_text()
    shown = re.findall(r"^    \$ pvirq (check [^\n]*)\n((?:    [^\n]*\n|\n)+)", page, re.MULTILINE)
    assert len(shown) >= 2
    for command, text in shown:
        run(command.split())
        printed = re.sub(r"\d+\.\d s", "N s", capsys.readouterr().out)
        wanted = re.sub(r"\d+\.\d s", "N s", re.sub(r"^    ", "", text, flags=re.MULTILINE))
        assert [line.rstrip() for line in printed.split("\n")] == [line.rstrip() for line in wanted.split("\n")][
            : len(printed.split("\n"))
        ]


def test_the_page_has_all_races() -> None:
    page = (ROOT / "docs" / "check.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \| (.*?) \| (.*?) \| (.*?) \|$", page, re.MULTILINE)
    assert rows == [(name, race.title, race.brought or "-", race.cured or "-") for name, race in races().items()]


def test_a_known_race_is_found_and_its_cure_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "fifo-control-block"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"with the fault: found: .* which isn't", out)
    assert re.search(r"cured: clean: [\d,]+ states", out)
    assert run(["check", "fifo-control-block", "--fault", "on", "--explain"]) == 0
    assert "XSA-358" in capsys.readouterr().out
    assert run(["check", "fifo-control-block", "--fault", "on", "--max-states", "3"]) == 3


def test_a_schedule_kept_and_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, drawn, text = tmp_path / "s.json", tmp_path / "s.svg", tmp_path / "s.mmd"
    name = f"{DRIVER}::check_first_version"
    assert run(["check", name, "--save", str(kept), "--svg", str(drawn), "--mermaid", str(text)]) == 1
    ElementTree.parse(drawn)
    assert text.read_text().startswith("sequenceDiagram\n")
    capsys.readouterr()
    assert run(["check", "--schedule", str(kept)]) == 0  # it ends as it did
    assert LOST in capsys.readouterr().out
    assert run(["check", "--schedule", str(kept), "--explain"]) == 0
    assert f"=> {LOST}" in capsys.readouterr().out
    mended = kept.read_text().replace("check_first_version", "check_looks_again")
    kept.write_text(mended)
    assert run(["check", "--schedule", str(kept)]) == 1  # the same steps, and nothing is wrong
    assert "nothing is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no checks: functions check_... that return a pvirq.check.Model"),
        ("def check_it(): return 1", "::check_it returns no Model but int"),
        ("def check_it(x): pass", "::check_it takes arguments (x)"),
        ("1 +", "bad.py:1: SyntaxError: invalid syntax"),
        ("x = 1\nraise ValueError('no')", "bad.py:2: ValueError: no"),
        ("import nowhere", "bad.py:1: ModuleNotFoundError: No module named 'nowhere'"),
        ("from pvirq.check import *\ndef check_it(): return Model()", "::check_it has no threads"),
        (
            "from pvirq.check import *\ndef check_it():\n  m = Model()\n  m.thread('a', lambda: None)\n  return m",
            "a isn't a generator: it has no yield",
        ),
        (
            "from pvirq.check import *\ndef check_it():\n  m = Model()\n  def a():\n    yield 1\n  m.thread('a', a)\n"
            "  return m",
            "a yields 1, which is no step",
        ),
        (
            "from pvirq.check import *\ndef check_it():\n  m = Model()\n  v = m.var('v')\n  def a():\n"
            "    yield v.write(1)\n    {}['x']\n  m.thread('a', a)\n  return m",
            "a (bad.py:6): KeyError: 'x'",
        ),
    ],
)
def test_what_is_wrong_with_a_file(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    assert run(["check", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("pvirq: ")
    assert err.count("\n") == 1


def test_what_is_wrong_with_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["nothing"], "no check 'nothing': `pvirq check` lists them; a file's name ends in .py"),
        (["nowhere.py"], "nowhere.py: No such file or directory"),
        ([f"{DRIVER}::check_nothing"], "examples/check_driver.py has no check 'check_nothing'"),
        (["--schedule", "nowhere.json"], "nowhere.json: No such file or directory"),
        (["--depth", "3", "x.py"], "--depth and --seed are for --random"),
        ([DRIVER, "--svg", str(tmp_path / "x")], "--svg, --mermaid and --save are for one check"),
        ([DRIVER, "--random", "5", "--max-states", "5"], "--max-states and --no-reduction are for the search"),
    ):
        assert run(["check", *arguments]) in (1, 2)
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1


def test_random_schedules(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", f"{DRIVER}::check_first_version", "--random", "2000", "--json"]) == 1
    (first,) = lines(capsys)
    assert run(["check", f"{DRIVER}::check_first_version", "--random", "2000", "--json", "--jobs", "1"]) == 1
    (second,) = lines(capsys)
    first_result, second_result = json.loads(first), json.loads(second)
    assert first_result["broken"] == LOST
    assert first_result["schedule"] == second_result["schedule"]
    assert first_result["seed"] == second_result["seed"]
    assert run(["check", f"{DRIVER}::check_looks_again", "--random", "500"]) == 0
    assert re.search(r"nothing found in 500 schedules", capsys.readouterr().out)


def test_the_help_names_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", "--help"]) == 0
    out = capsys.readouterr().out
    named = re.findall(r"^ +pvirq check ([a-z0-9-]*-[a-z0-9-]+) ", out, re.MULTILINE)
    assert {name for name in named if not name.startswith("-")} <= set(races())
    assert named

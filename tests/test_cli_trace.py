"""`pvirq trace`: its outputs, options, errors and exit statuses."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pvirq.cli import main, messages
from tracelib import MS, Simulation

BASE = [sys.executable, "-m", "pvirq", "trace"]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Simulation(seed=1).run(10 * MS).write(tmp_path / "run.jsonl")


def out_of(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> str:
    found = main.run(["trace", *args])
    out, err = capsys.readouterr()
    assert (found, err) == (status, "")
    return out


def test_the_summary(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "run.jsonl")
    assert out.startswith("run.jsonl: 10.1ms of virtual time, 4,566 events, seed 1\n")
    assert re.search(r"^ +11  Domain-0:101  eth0 +\d+ +\d+ +\d+ +[\d.]+us", out, re.MULTILINE)
    assert "The busiest vCPU has 1." in out
    only = out_of(capsys, "run.jsonl", "--domain", "guest1", "--port", "11", "--from", "2ms", "--to", "4ms")
    assert only.startswith("run.jsonl: 2.000000 ms to 4.000000 ms of virtual time")
    assert len(re.findall(r"^ +\d+  \S+:\d+  \S+ ", only, re.MULTILINE)) == 1
    assert out_of(capsys, "run.jsonl", "--domain", "1", "--port", "11", "--from", "2ms", "--to", "4ms") == only


def test_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(out_of(capsys, "run.jsonl", "--json", "--storm-events", "5", "--storm-window", "1ms"))
    assert [one["name"] for one in values["domains"]] == ["Domain-0", "guest1", "guest2"]
    assert values["storm"] == {"events": 5, "window": MS}
    assert values["storms"]
    assert values["end"] - values["trace_start"] >= 10 * MS


def test_events(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = out_of(capsys, "run.jsonl", "--events").splitlines()
    assert len(lines) == len(run.read_text().splitlines()) - 1
    assert lines[0] == "      0.000000 ms  guest1/0       bind      port 1 virq virq=0"
    some = out_of(capsys, "run.jsonl", "--events", "--domain", "guest1", "--port", "10", "--from", "1ms", "--to", "3ms")
    assert some
    for line in some.splitlines():
        assert re.match(r" +[12]\.\d{6} ms  guest1/0 +(raise|irq|unmask|eoi) .*port 10\b", line)
    assert set(some.splitlines()) < set(lines)


def test_the_hash(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "run.jsonl", "--hash")
    lines = run.read_bytes().split(b"\n", 1)[1]
    assert out == hashlib.sha256(lines).hexdigest() + "\n"


def test_the_timeline(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "run.jsonl", "--timeline", "--from", "1ms", "--to", "2ms", "--domain", "guest1")
    lines = out.splitlines()
    assert lines[0] == "1.000000 ms to 2.000000 ms, a column is 15.2us"
    assert lines[2] == "guest1 (domain 1)"
    assert "guest2" not in out
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in out


def test_the_timeline_where_there_is_only_ascii(run: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*BASE, "run.jsonl", "--timeline"], env=env, capture_output=True, check=True)
    assert done.stdout.isascii()
    assert b"runs: 1 little to 9 all the time" in done.stdout


def test_pictures(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "run.jsonl", "--svg", "a.svg", "--png", "a.png", "--to", "1ms") == ""
    assert Path("a.svg").read_text().startswith("<?xml")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["a.png", "a.svg", "run.jsonl"]


def test_perfetto(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert out_of(capsys, "run.jsonl", "--pftrace", "run.pftrace") == ""
    assert Path("run.pftrace").stat().st_size > 10_000


def test_the_same_trace(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other.jsonl").write_text(run.read_text())
    assert out_of(capsys, "run.jsonl", "--diff", "other.jsonl") == ""
    header, events = run.read_text().split("\n", 1)
    Path("other.jsonl").write_text(header.replace('"seed":1', '"seed":2') + "\n" + events)
    assert main.run(["trace", "run.jsonl", "--diff", "other.jsonl"]) == 0
    assert capsys.readouterr() == ("", "pvirq: the headers differ\n")


def test_the_first_difference(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if i > 100 and '"k":"raise"' in line)
    event = json.loads(lines[number])
    event["t"] += 1
    event["out"] = "lost"
    changed = [*lines[:number], json.dumps(event), *lines[number + 1 :]]
    Path("other.jsonl").write_text("\n".join(changed) + "\n")
    out = out_of(capsys, "run.jsonl", "--diff", "other.jsonl", status=1).splitlines()
    events = out_of(capsys, "run.jsonl", "--events").splitlines()
    assert out[0] == f"line {number + 1} is the first that differs, in out, t"
    assert out[1:4] == [f"  {line}" for line in events[number - 4 : number - 1]]
    assert out[4:9] == ["- run.jsonl", *(f"- {line}" for line in events[number - 1 : number + 3])]
    assert out[9] == "+ other.jsonl"
    assert " lost" in out[10]
    assert out[11:] == [line.replace("-", "+", 1) for line in out[6:9]]


def test_a_trace_that_ends_earlier(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = run.read_text().splitlines(keepends=True)
    Path("other.jsonl").write_text("".join(lines[:50]))
    out = out_of(capsys, "run.jsonl", "--diff", "other.jsonl", status=1)
    assert out.startswith("line 51 is the first that differs\n")
    assert out.endswith("+ other.jsonl: no more events\n")


def test_a_trace_of_a_killed_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_bytes(run.read_bytes()[:-20])
    assert main.run(["trace", "run.jsonl"]) == 0
    out, err = capsys.readouterr()
    assert "The last line is cut off" in out
    assert err == "pvirq: run.jsonl: the last line is cut off\n"
    assert main.run(["trace", "run.jsonl", "-q", "--hash"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "Missing argument 'FILE'"),
        (["no.jsonl"], "no.jsonl: No such file"),
        (["bad.jsonl"], "bad.jsonl:3: expected a JSON object"),
        (["bad.jsonl", "--timeline"], "bad.jsonl:3: expected a JSON object"),
        (["bad.jsonl", "--pftrace", "bad.pftrace"], "bad.jsonl:3: expected a JSON object"),
        (["bad.jsonl", "--diff", "run.jsonl"], "bad.jsonl:3: expected a JSON object"),
        (["run.jsonl", "--diff", "no.jsonl"], "no.jsonl: No such file"),
        (["run.jsonl", "--domain", "guest9"], "no domain 'guest9' in run.jsonl; there are Domain-0, guest1, guest2"),
        (["run.jsonl", "--domain", "guest9", "--events"], "no domain 'guest9'"),
        (["run.jsonl", "--domain", "guest9", "--svg", "a.svg"], "no domain 'guest9'"),
        (["run.jsonl", "--from", "5"], 'expected a time such as "20ms" or "1.5s", not \'5\''),
        (["run.jsonl", "--from", "5ms", "--to", "5ms"], "--from has to be before --to"),
        (["run.jsonl", "--timeline", "--from", "1s"], "nothing from then on: the trace ends at 10.0"),
        (["run.jsonl", "--hash", "--domain", "1"], "take all of a trace"),
        (["run.jsonl", "--timeline", "--port", "3"], "--port is for the summary"),
        (["run.jsonl", "--svg", "./run.jsonl"], "run.jsonl is the trace itself"),
        (["run.jsonl", "--storm-events", "1"], "--storm-events"),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = run.read_text().split("\n", 1)[0]
    Path("bad.jsonl").write_text(f'{header}\n{{"t":5000000,"k":"mark"}}\n{{"t"\n{{"t":5000000,"k":"mark"}}\n')
    before = sorted(os.listdir())
    assert main.run(["trace", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pvirq: ")
    assert err.count("\n") == 1
    assert words in err
    assert sorted(os.listdir()) == before  # no half of a file stays


def test_what_is_missing_is_said_first(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option, extra in (("--svg", "plots"), ("--png", "plots"), ("--pftrace", "perfetto")):
        assert main.run(["trace", "run.jsonl", option, "out"]) == 2
        assert capsys.readouterr().err.endswith(f"pip install 'pvirq[{extra}]'\n")


def test_an_output_that_cannot_be_written(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--svg", "--png", "--pftrace"):
        assert main.run(["trace", "run.jsonl", option, "no/such/out"]) == 1
        assert "No such file or directory" in capsys.readouterr().err


def test_a_reader_that_has_enough(run: Path) -> None:
    command = " ".join([*BASE, "run.jsonl", "--events"])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[1] == "141"


def test_a_status_line_in_a_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(messages, "STATUS_S", 0)  # as if it took long
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert main.run(["trace", "run.jsonl"]) == 0
        err = os.read(master, 65536).decode()
        assert re.fullmatch(r"(\r\x1b\[Kreading run.jsonl \.\.\. \d+ %, 0 s)+\r\x1b\[K", err)
        assert main.run(["trace", "run.jsonl", "-q"]) == 0
        os.write(slave, b"nothing else")
        assert os.read(master, 65536) == b"nothing else"
    os.close(master)
    assert capsys.readouterr().out.count("of virtual time") == 2


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    out = out_of(capsys, "--help")
    for option in ("--timeline", "--svg", "--png", "--pftrace", "--json", "--events", "--hash", "--diff", "--from"):
        assert option in out
    assert all(len(line) <= 80 for line in out.splitlines())

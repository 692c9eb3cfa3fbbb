"""`pvirq campaign`: what it prints, its exit status, that it goes on where it was interrupted."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pvirq.cli import main

FILE = """
[campaign]
name = "small"
seeds = 3
[kernels.old]
model = "2.6.18"
[kernels.suse]
model = "suse"
[scenarios.odd]
python = "work.py:odd"
[scenarios.slow]
python = "work.py:slow"
[[exclude]]
kernels = "suse"
scenarios = "slow"
"""
WORK = """
import time

def odd(seed):
    assert seed != 2, "it is even"

def slow():
    time.sleep(0.2)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(FILE)
    (tmp_path / "work.py").write_text(WORK)
    return tmp_path


def rows(path: Path, columns: str = "count(*)") -> list[tuple[object, ...]]:
    with sqlite3.connect(path) as database:
        return list(database.execute(f"SELECT {columns} FROM runs"))


def test_a_campaign_and_its_report(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["campaign", "small.toml", "--workers", "0"]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split()[:6] == ["kernel", "scenario", "faults", "runs", "pass", "fail"]
    assert [line.split()[:6] for line in lines[1:4]] == [
        ["old", "odd", "none", "3", "2", "1"], ["old", "slow", "none", "3", "3", "-"],
        ["suse", "odd", "none", "3", "2", "1"],
    ]  # fmt: skip
    assert lines[4] == "old/odd/none/2   fail     work.py:5: it is even"
    assert lines[-1] == "9 of 9 runs: 7 pass, 2 fail; results: small.sqlite"
    assert "pvirq: suse/odd/none/2: fail: work.py:5: it is even\n" in err
    assert {path.name for path in here.iterdir()} - {"__pycache__"} == {"small.sqlite", "small.toml", "work.py"}

    assert main.run(["campaign", "report", "small.toml"]) == 1
    report = capsys.readouterr().out.splitlines()
    assert report[:-1] == lines[:-1]
    assert report[-1] == "small: 9 of 9 runs: 7 pass, 2 fail"
    assert main.run(["campaign", "report", "small.sqlite", "--failures"]) == 1
    failures = capsys.readouterr().out
    assert "  again: pvirq campaign run small.toml --only suse/odd/none/2\n" in failures
    assert "    AssertionError: it is even\n" in failures
    assert main.run(["campaign", "report", "small.toml", "--json"]) == 1
    whole = json.loads(capsys.readouterr().out)
    assert whole["campaign"]["name"] == "small"
    assert len(whole["runs"]) == 9
    assert whole["cells"][0]["failing_seeds"] == [2]


def test_what_is_done_is_not_done_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--only", "old/odd"]
    assert main.run(["campaign", "run", "small.toml", *only, "--workers", "0", "-q"]) == 1
    before = rows(here / "small.sqlite", "id, kernel, scenario, seed")
    assert len(before) == 3
    assert main.run(["campaign", "small.toml", *only, "--workers", "0", "-q"]) == 1
    assert rows(here / "small.sqlite", "id, kernel, scenario, seed") == before
    capsys.readouterr()
    assert main.run(["campaign", "list", "small.toml"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^old/odd/none +3 runs +3 done$", listed, re.MULTILINE)
    assert re.search(r"^ +9 runs +3 done$", listed, re.MULTILINE)
    # What has changed is, and what is asked for by its whole name.
    (here / "work.py").write_text(WORK.replace("seed != 2", "seed != 3"))
    assert main.run(["campaign", "small.toml", *only, "--workers", "0", "-q"]) == 1
    assert {row[0] for row in rows(here / "small.sqlite", "id")}.isdisjoint(row[0] for row in before)
    capsys.readouterr()
    assert main.run(["campaign", "small.toml", "--only", "old/odd/none/3", "--workers", "0"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("old/odd/none/3: fail: work.py:5: it is even\n")
    assert "old/odd/none/3: the trace is the same as the last time" in err
    assert main.run(["campaign", "small.toml", "--only", "old/odd/none/99", "--workers", "0"]) == 0
    assert main.run(["campaign", "small.toml", *only, "--fresh", "--workers", "0", "-q"]) == 1
    assert rows(here / "small.sqlite") == [(3,)]


def test_lists(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["campaign", "list", "small.toml", "--runs", "--only", "*/slow"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"old/slow/none/{seed}" for seed in (1, 2, 3)]


def test_traces(here: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert main.run(["campaign", "small.toml", "--workers", "0", "--only", "old/odd", "-q"]) == 1
    capsysbinary.readouterr()
    assert main.run(["campaign", "trace", "small.toml", "old/odd/none/2"]) == 0
    first = capsysbinary.readouterr().out.splitlines()[0]
    assert json.loads(first)["pvirq"] == "trace"
    assert json.loads(first)["run"] == "old/odd/none/2"
    assert main.run(["campaign", "trace", "small.toml", "old/odd/none/1"]) == 2
    assert b"no trace was kept" in capsysbinary.readouterr().err


BAD = [
    (["gone.toml"], "gone.toml: No such file or directory"),
    (["small.toml", "--only", "x"], "--only x: small.toml has no such run"),
    (["small.toml", "--workers", "1", "--scheduler", "tcp://x"], "--workers and --scheduler exclude each other"),
    (["report", "small.toml"], "small.sqlite: there are no results yet"),
    (["report", "work.py"], "work.py: no file of results"),
    (["trace", "small.toml", "a/b/c/1"], "small.sqlite: there are no results yet"),
    (["bad.toml"], 'bad.toml:3: unknown key "sed": did you mean "seeds"?'),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD)
def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    (here / "bad.toml").write_text(FILE.replace("name =", "sed ="))
    assert main.run(["campaign", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pvirq: {expected}")
    assert error.count("\n") == 1


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["campaign", "--help"]) == 0
    assert "pvirq campaign report net.toml --plot net.png" in capsys.readouterr().out


# -- in processes of their own -----------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pvirq", "campaign", *arguments]


def wait_for_rows(path: Path, count: int) -> None:
    while True:
        with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
            if database.execute("SELECT count(*) FROM runs").fetchone()[0] >= count:
                return
        time.sleep(0.05)


def runners() -> list[str]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                line = (process / "cmdline").read_bytes()
                where = os.readlink(process / "cwd")
            except OSError:
                continue
            if b"pvirq.lab.campaign" in line:
                found.append(where)
    return found


def test_interrupted_and_gone_on_with(here: Path) -> None:
    pytest.importorskip("distributed")
    (here / "small.toml").write_text(FILE.replace("seeds = 3", "seeds = 30"))
    database = here / "small.sqlite"
    process = subprocess.Popen(
        command("small.toml", "--workers", "2", "--only", "*/slow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    while not database.exists():
        time.sleep(0.05)
    time.sleep(0.2)
    wait_for_rows(database, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.search(r"pvirq: interrupted: \d+ of 30 runs were done; the same command goes on with the rest\n$", err), (
        err
    )
    assert "Traceback" not in err
    done = {row[0] for row in rows(database, "id")}
    assert 3 <= len(done) < 30
    assert f"{len(done)} of 30 runs" in out
    end = time.monotonic() + 20
    while str(here) in runners() and time.monotonic() < end:
        time.sleep(0.1)
    assert str(here) not in runners()
    again = subprocess.run(
        command("small.toml", "--workers", "2", "--only", "*/slow"), check=False, capture_output=True, text=True
    )
    assert again.returncode == 0
    assert f"pvirq: {len(done)} runs are done already, {30 - len(done)} are left\n" in again.stderr
    assert "30 of 30 runs: 30 pass" in again.stdout
    assert done < {row[0] for row in rows(database, "id")}


def test_progress_in_a_terminal(here: Path) -> None:
    master, slave = pty.openpty()
    with open(master, "rb", buffering=0) as terminal:
        process = subprocess.Popen(
            command("small.toml", "--workers", "0"), stdout=subprocess.DEVNULL, stderr=slave,
            env={**os.environ, "COLUMNS": "100", "TERM": "xterm"},
        )  # fmt: skip
        os.close(slave)
        seen = b""
        while True:
            try:
                piece = os.read(terminal.fileno(), 4096)
            except OSError:  # EIO: nobody has the other end any more
                break
            if not piece:
                break
            seen += piece
        assert process.wait() == 1
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode())
    assert re.search(r"running .*\d+/9", text)
    assert re.search(r"\d pass, 1 fail", text)
    assert "pvirq: old/odd/none/2: fail: work.py:5: it is even" in text
    assert seen.rstrip().endswith(b"\x1b[2K")  # the bar is gone in the end
    assert b"\x1b[?25h" in seen  # and the cursor is back

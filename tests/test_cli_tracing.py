"""--trace: what it leaves in the file, with every command that has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import guestlib
from pvirq.cli import main

SCENARIO = """
title = "small"
[dom0]
platform = "recorded"
[[domain]]
name = "g"
disk = [{ name = "xvda", on = "virtio0" }]
[[workload]]
on = "g"
kind = "disk"
count = 3
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_scenario(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["model", str(scenario), "--trace", str(tmp_path / "trace.jsonl"), "-i", "g"]) == 0
    header, *events = lines(tmp_path / "trace.jsonl")
    assert [domain["name"] for domain in header["domains"]] == ["Domain-0", "g"]
    counted = int(next(line for line in capsys.readouterr().out.splitlines() if line.endswith("blkif")).split()[1])
    entries = [e for e in events if e["k"] == "irq" and e["ph"] == "B" and e.get("name") == "blkif"]
    assert len(entries) == counted > 0


@pytest.mark.guest
@pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")
def test_a_guest_without_symbols_of_linux(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    path = tmp_path / "trace.jsonl"
    assert main.run(["boot", str(guestlib.build("event")), "--initrd", "none", "--trace", str(path)]) == 0
    _, *events = lines(path)
    [domain] = [event for event in events if event["k"] == "domain"]
    assert (domain["kind"], domain["irqs"]) == ("real", "none")
    assert {"hypercall", "raise", "upcall", "run", "stop"} <= {event["k"] for event in events if event.get("d") == 1}
    assert [event["why"] for event in events if event["k"] == "end"] == ["poweroff"]


def test_a_file_that_cannot_be(scenario: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["model", str(scenario), "--trace", str(tmp_path / "no" / "trace.jsonl")]) == 1
    assert "trace.jsonl: No such file or directory" in capsys.readouterr().err


def test_perfettos_format(scenario: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What converts is `pvirq.lab.traceview.perfetto`'s; it gets the whole trace, and is asked first whether it can."""
    calls: list[str] = []

    def convert(source: Path, out: str) -> None:
        calls.append("convert")
        Path(out).write_text(json.dumps(lines(source)[0]))

    module = SimpleNamespace(check_perfetto=lambda: calls.append("check"), convert=convert)
    monkeypatch.setitem(sys.modules, "pvirq.lab.traceview.perfetto", module)
    out = tmp_path / "trace.pftrace"
    assert main.run(["model", str(scenario), "--trace", str(out)]) == 0
    assert calls == ["check", "convert"]
    assert json.loads(out.read_text())["pvirq"] == "trace"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.toml", "trace.pftrace"]

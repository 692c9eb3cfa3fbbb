"""Runs compared with recorded ones (pvirq.lab.replay), and `pvirq replay`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pvirq import Host
from pvirq.cli.main import run
from pvirq.lab.replay import CONTEXT, Different, Recorded, RecordedError
from pvirq.lab.trace import Trace
from pvirq.toolstack.kernels import KernelChoice


def work(host: Host, timers: int = 5) -> None:
    """A modelled guest whose timers fire."""
    guest = host.model("pvops", vcpus=2)
    host.settle()
    for number in range(timers):
        guest.kernel.set_timer(host.clock.now() + 1000 * (number + 1), lambda: None, cpu=number % 2)
        host.run(lambda: False, 100_000)


def record(path: Path, seed: int = 3, timers: int = 5) -> str:
    with Host(seed=seed) as host, Trace(host, path) as trace:
        work(host, timers)
    return trace.hash()


def again(path: Path, seed: int = 3, timers: int = 5) -> str:
    with Host(seed=seed) as host, Recorded(path) as recorded:
        with Trace(host, against=recorded) as trace:
            work(host, timers)
        recorded.finish()
    return trace.hash()


def test_the_same_run_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    assert record(path) == again(path)


def test_the_first_difference_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path)
    lines = path.read_text().splitlines()
    assert len(lines) > 60
    changed = json.loads(lines[49])
    changed["t"] += 1
    lines[49] = json.dumps(changed, separators=(",", ":"))
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(Different) as caught:
        again(path)
    different = caught.value
    assert (different.line, different.recorded) == (50, lines[49])
    assert json.loads(different.now)["t"] == changed["t"] - 1
    assert different.before == lines[49 - CONTEXT : 49]
    assert different.report().splitlines()[-2:] == [f"  - {lines[49]}", f"  + {different.now}"]


def test_another_seed_is_another_run(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path)
    with pytest.raises(Different):
        again(path, seed=4)


def test_a_run_that_ends_earlier_or_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    record(path)
    with pytest.raises(Different):
        again(path, timers=4)
    with pytest.raises(Different):
        again(path, timers=6)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-3]))
    with pytest.raises(Different) as caught:
        again(path)
    assert (caught.value.recorded, caught.value.line) == ("", len(lines) - 2)
    path.write_text("".join([*lines, lines[-1]]))
    with pytest.raises(Different) as caught:
        again(path)
    assert caught.value.now == ""
    assert "the run ends here" in caught.value.report()


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"pvirq": "trace", "version": 2}', "\0\xff", '"x"'])
def test_what_is_no_trace(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(RecordedError):
        Recorded(path)


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_program_s_trace_is_not_the_command_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    record(path)
    assert run(["replay", str(path)]) == 2
    assert "run its program again" in capsys.readouterr().err


def test_a_run_without_a_seed_cant_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    with Host() as host, Trace(host, path, header={"command": ["boot"]}):
        work(host)
    assert run(["replay", str(path)]) == 2
    assert "without --seed" in capsys.readouterr().err


def test_a_file_that_isnt_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["replay", str(tmp_path / "none.jsonl")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_a_scenario_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "run.jsonl")
    assert run(["model", "writeup-dom0", "--trace", path]) == 0
    capsys.readouterr()
    assert run(["replay", path]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "the same run" in shown.err


@pytest.mark.boot
def test_a_real_guest_is_run_again(
    tmp_path: Path, kernel_cloud: KernelChoice, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(kernel_cloud.path, "vmlinuz")
    boot = ["boot", "./vmlinuz", "--vcpus", "2", "-q", "--exec", "cat /proc/interrupts"]
    assert run([*boot, "--seed", "5", "--trace", "run.jsonl"]) == 0
    first = capfd.readouterr().out
    assert "timer0" in first
    assert run(["replay", "-v", "run.jsonl"]) == 0
    assert capfd.readouterr().out == first
    trace = Path("run.jsonl")
    text = trace.read_text()
    trace.write_text(text.replace('"--seed","5"', '"--seed","6"', 1))
    assert run(["replay", "run.jsonl"]) == 1
    assert "the run differs from the recorded one" in capfd.readouterr().out
    trace.write_text(text)
    with Path("vmlinuz").open("ab") as kernel:
        kernel.write(b"\0")
    assert run(["replay", "run.jsonl"]) == 2
    assert "another kernel" in capfd.readouterr().err

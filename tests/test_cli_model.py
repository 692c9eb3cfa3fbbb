"""`pvirq model`: what it prints, its exit status, its live view in a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

import pytest

from pvirq.cli import main, model_list
from pvirq.hardware.platform import MACHINES, TYPES
from pvirq.linux.personalities import KERNELS
from pvirq.scenario import workload

SCENARIO = """
title = "small"
show = "g"
[dom0]
platform = "recorded"
[[domain]]
name = "g"
disk = [{ name = "xvda", on = "virtio0" }]
[[workload]]
on = "g"
kind = "disk"
count = 10
"""


@pytest.fixture
def scenario(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SCENARIO)
    monkeypatch.chdir(tmp_path)
    return path


def test_one_table_stands_alone(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["model", "small.toml"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("           CPU0")
    assert re.search(r"^261: +11     Dynamic-irq  blkif$", out, re.MULTILINE)
    assert err == ""


def test_several_have_titles_before_and_after(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["model", "small.toml", "-i", "*", "-l", "g", "-m", "dom0", "--before"]
    assert main.run(args) == 0
    out = capsys.readouterr().out
    titles = re.findall(r"^(\S+): (.*) (before|after)$", out, re.MULTILINE)
    views = [("dom0", "/proc/interrupts"), ("g", "/proc/interrupts"), ("g", "lsevtchn"), ("dom0", "ports and IRQs")]
    assert titles == [(name, view, when) for when in ("before", "after") for name, view in views]
    before, after = out.split("dom0: /proc/interrupts after")
    assert re.search(r"^261: +1 +Dynamic-irq  blkif$", before, re.MULTILINE)
    assert re.search(r"^261: +11 +Dynamic-irq  blkif$", after, re.MULTILINE)
    assert re.search(r"^ +15 +\d +9  acpi +Physical IRQ 9$", out, re.MULTILINE)
    assert re.search(r"^ +31 +1 +50  blkif-backend +Interdomain \(Connected\) - Remote Domain 1", out, re.MULTILINE)


def test_settings(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["model", "small.toml", "--set", "g.vcpus=2", "--set", "g.kernel=suse", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("           CPU0       CPU1       \n")
    assert "Dynamic-percpu    timer" in out


def test_the_same_each_time(scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for _ in range(2):
        assert main.run(["model", "small.toml", "-i", "*"]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "expected a SCENARIO"),
        (["nowhere.toml"], "nowhere.toml: No such file"),
        (["writeup"], "no scenario 'writeup': "),
        (["small.toml", "-i", "h"], "no domain 'h' in small.toml; there are dom0, g"),
        (["small.toml", "--set", "g.vcpus=99"], "--set g.vcpus=99: expected a whole number from 1 to 32, not 99"),
        (["small.toml", "--seed", "-1"], "--seed"),
        (["small.toml", "--watch"], "--watch needs a terminal"),
    ],
)
def test_bad_input_is_one_line(args: list[str], words: str, scenario: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["model", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pvirq: ")
    assert err.count("\n") == 1
    assert words in err


def test_an_error_on_the_way_comes_behind_what_was_asked_for(
    scenario: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario.write_text(SCENARIO + '[[workload]]\non = "dom0"\nkind = "hotplug"\ncpu = 0\nto = "offline"\n')
    assert main.run(["model", "small.toml", "--dmesg", "dom0"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("dom0: dmesg then\nxen:events: Using FIFO-based ABI\n")
    assert err == "pvirq: small.toml:16: dom0: EBUSY: CPU 0 stays\n"
    assert main.run(["model", "small.toml"]) == 2
    assert capsys.readouterr().out == ""


def test_the_list_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["model", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (*KERNELS, *MACHINES, *TYPES, "writeup-guest", "writeup-dom0"):
        assert re.search(rf"^  {re.escape(name)} ", out, re.MULTILINE), name
    for kind in workload.KINDS:
        assert f'kind = "{kind}"' in out
    assert max(map(len, out.splitlines())) <= model_list.WIDTH + 30


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *args: str, size: tuple[int, int] = (24, 80)) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(
                sys.executable,
                [sys.executable, "-m", "pvirq", "model", *args],
                {**os.environ, "TERM": "xterm-256color"},
            )
        termios.tcsetwinsize(self.fd, size)
        self.output = ""

    def read_until(self, text: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, self.output
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 65536)
                except OSError:
                    data = b""
                if not data:
                    break
                self.output += data.decode()
        assert text in self.output

    def wait(self) -> int:
        while True:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                break
            if not data:
                break
            self.output += data.decode()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_watch_until_ctrl_c_leaves_a_clean_terminal() -> None:
    terminal = Terminal("writeup-guest", "--watch")
    terminal.read_until("timer0")
    terminal.read_until("Ctrl-C leaves")
    terminal.output = ""
    os.write(terminal.fd, b"\x03")
    assert terminal.wait() == 0
    assert "\x1b[?25h" in terminal.output  # the cursor is back
    # The table as it was in the end stays, as text.
    last = terminal.output.rsplit("\x1b[?25h", 1)[1]
    assert re.search(r"256: +\d+   Dynamic-irq  timer0\r\n257:", last)


def test_watch_to_the_end_and_a_small_window(scenario: Path) -> None:
    terminal = Terminal(str(scenario), "--watch", "--speed", "1000", size=(10, 40))
    assert terminal.wait() == 0
    assert re.search(r"261: +11     Dynamic-irq  blkif\r\n", terminal.output)


def test_ctrl_c_without_watch() -> None:
    terminal = Terminal(
        "writeup-dom0", "--set", "duration=100h", "--set", "workload=[{on='dom0', kind='compute', time='100h'}]"
    )
    terminal.read_until("running")  # the status line, after a second
    os.kill(terminal.pid, signal.SIGINT)
    assert terminal.wait() == 130
    assert "Traceback" not in terminal.output
    assert terminal.output.endswith("\r\x1b[K")  # the status line is gone

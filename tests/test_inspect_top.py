"""`pvirq top`: rates from snapshots, what a screen shows at any size, and the command in a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inspectlib import DATA, Table, print_interrupts, tables
from pvirq.cli.inspect_top import split_keys
from pvirq.host import Host
from pvirq.inspect import InspectError, read_files, read_text
from pvirq.inspect.rates import Rates, difference
from pvirq.inspect.sources import HostSource, LiveSource, ReplaySource
from pvirq.inspect.topview import SORTS, VIEWS, TopView, number, sparkline

BASE = DATA / "linux-2vcpu"
SIZES = [(80, 24), (200, 50), (40, 10)]


def shots(*counts: tuple[int, int], seconds: float = 1.0) -> Rates:
    """Rates of a table with one line on each of two CPUs, after these readings."""
    rates = Rates()
    for i, (a, b) in enumerate(counts):
        text = f"     CPU0 CPU1\n 5: {a} 0 xen-dyn-lateeoi -event blkif\n 6: 0 {b} xen-dyn-lateeoi -event vif0-q0-tx\n"
        rates.take(read_text(text, seconds=i * seconds))
    return rates


# -- rates -------------------------------------------------------------------------------------------------------------


def test_rates_and_marks() -> None:
    rates = shots((100, 1), (300, 1), (1300, 51), seconds=2.0)
    five = next(line for line in rates.lines.values() if line.row.irq == 5)
    assert (five.rate, five.delta, five.since_mark, five.busiest) == (500.0, 1000, 1200, 0)
    assert list(five.rates) == [0.0, 100.0, 500.0]
    assert {(cpu.cpu, cpu.rate, cpu.total) for cpu in rates.cpus.values()} == {(0, 500.0, 1300), (1, 25.0, 51)}
    assert (rates.interval, rates.elapsed) == (2.0, 4.0)
    rates.mark()
    assert (five.since_mark, rates.elapsed) == (0, 0.0)


def test_counters_that_wrap_or_begin_anew() -> None:
    before = np.array([(1 << 32) - 10, 5, 500, 7], np.uint64)
    now = np.array([20, 9, 3, 7], np.uint64)
    assert list(difference(now, before)) == [30, 4, 3, 0]


def test_cpus_and_lines_come_and_go() -> None:
    rates = Rates()
    for name in ("domU.8-aff-cpu1", "domU.10-cpu1-off", "domU.11-cpu1-on"):
        rates.take(read_files([BASE / f"{name}.interrupts"]))
        assert all(line.rate >= 0 for line in rates.lines.values())
    assert len(rates.cpus) == 2
    assert len(rates.lines) == 35


def test_ports_and_devices_are_those_of_the_picture() -> None:
    files = [BASE / f"2-drivers.{name}" for name in ("debug-e", "xenstore", "dom0.interrupts")]
    source = ReplaySource([*files, BASE / "4-after-ping.dom0.interrupts"])
    rates = Rates()
    for _ in range(2):
        snapshot = source.next()
        assert snapshot is not None
        rates.take(snapshot)
    assert source.next() is None
    line = next(line for line in rates.lines.values() if line.row.irq == 53)
    assert line.link.channel is not None
    assert (line.link.channel.port, line.link.peer) == (34, (1, 17))
    assert line.delta == line.row.total - 6 > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(tables(max_cpus=5), min_size=1, max_size=4), st.integers(1, 120), st.integers(1, 40), st.data())
def test_any_tables_fit_any_screen(many: list[Table], width: int, height: int, data: st.DataObject) -> None:
    """Whatever comes, after whatever keys: as many lines as the screen has, none longer than it is wide."""
    view = TopView(Rates(), "host")
    keys = st.sampled_from(
        [*"qvsrzpmjkhdci/+- x", "up", "down", "pageup", "end", "home", "enter", "escape", "backspace"]
    )
    for i, table in enumerate(many):
        view.rates.take(read_text(print_interrupts(table), seconds=float(i)))
        for key in data.draw(st.lists(keys, max_size=6)):
            view.key(key)
        lines = view.screen(width, height)
        assert len(lines) == height
        assert all(len(line.text) <= width and "\n" not in line.text for line in lines)


# -- sources -----------------------------------------------------------------------------------------------------------


def test_a_log_with_several_tables_is_several_states(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("".join((BASE / f"{stage}.dom0.interrupts").read_text() for stage in ("2-drivers", "4-after-ping")))
    source = ReplaySource([log], 0.5)
    times = []
    while (snapshot := source.next()) is not None:
        times.append(snapshot.seconds)
    assert times == [0.0, 0.5]
    with pytest.raises(InspectError, match="no /proc/interrupts in"):
        ReplaySource([BASE / "2-drivers.xenstore"])


def test_the_running_machine_is_asked_for_the_slow_things_seldom(tmp_path: Path) -> None:
    (tmp_path / "proc/irq/5").mkdir(parents=True)
    (tmp_path / "proc/interrupts").write_text("     CPU0 CPU1\n 5: 1 0 xen-dyn -event blkif\n")
    affinity = tmp_path / "proc/irq/5/effective_affinity_list"
    affinity.write_text("1\n")
    now = [0.0]
    source = LiveSource(str(tmp_path), tools=False, clock=lambda: now[0])
    seen = []
    for now[0], text in ((0.0, "0"), (5.0, "1"), (11.0, "1")):
        affinity.write_text(text + "\n")
        seen.append(source.next().irq_files[0].value)
    assert seen == ["0", "0", "1"]


def test_a_host_of_pvirqs() -> None:
    """Between its runs: domain 0 and a modelled guest, by their own tables and ports."""
    with Host() as host:
        host.model("pvops", vcpus=2, name="g")

        def advance() -> bool:
            host.run(lambda: False, timeout_ns=500_000_000)
            return host.clock.now() < 2_000_000_000

        source = HostSource(host, advance)
        rates = Rates()
        while (snapshot := source.next()) is not None:
            rates.take(snapshot)
        assert rates.taken >= 4
        assert {key[0] for key in rates.lines} == {0, 1}
        assert rates.picture is not None
        assert rates.picture.domains[1].label == "domain 1 (g)"
        assert rates.picture.snapshot.seconds == host.clock.now() / 1e9
        timer = next(line for key, line in rates.lines.items() if key[0] == 1 and line.row.name == "timer0")
        assert timer.link.channel is not None
        assert timer.link.channel.virq == 0
        assert "d1v1" in "\n".join(line.text for line in TopView(rates).screen(80, 24))


# -- the screen --------------------------------------------------------------------------------------------------------


def test_numbers_and_sparklines() -> None:
    assert [number(n) for n in (0, 0.25, 12, 9999, 12_345, 4_500_000, 7e9)] == [
        "0", "0.2", "12", "9,999", "12.3k", "4.5M", "7.0G",
    ]  # fmt: skip
    assert all(len(number(10.0**k * 9.9996)) <= 7 for k in range(-3, 19))
    assert sparkline([0, 1, 4, 8], 4) == " ▁▄█"[0] + "▂▅█"
    assert sparkline([0, 0], 8) == ""
    assert len(sparkline(range(100), 8)) == 8


def recorded_view() -> TopView:
    view = TopView(Rates(), "dom0")
    files = [BASE / f"2-drivers.{name}" for name in ("debug-e", "xenstore", "dom0.interrupts", "dom0.irqfiles")]
    source = ReplaySource([*files, BASE / "4-after-ping.dom0.interrupts"])
    while (snapshot := source.next()) is not None:
        view.rates.take(snapshot)
    return view


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_readable_at_each_size(width: int, height: int) -> None:
    view = recorded_view()
    text = [line.text for line in view.screen(width, height)]
    assert text[0].startswith("pvirq top  dom0  ")
    assert "CPU0" in text[1]
    head = next(line for line in text if line.lstrip().startswith("IRQ"))
    assert head.endswith("NAME")
    assert ("PEER" in head, "CHIP" in head, "TOTAL" in head) == (width >= 70, width >= 120, width >= 60)
    view.key("/")
    for letter in "vif1.0-q0-tx":
        view.key(letter)
    view.key("enter")
    found = [line.text for line in view.screen(width, height) if "vif1.0-q0-tx" in line.text and "/" not in line.text]
    (line,) = found
    if width >= 80:
        assert re.match(r"   53 +[\d.]+ +\d+ +0 +0 +34 d1:17 ", line)


def test_keys_change_what_is_shown() -> None:
    view = recorded_view()

    def names() -> list[str]:
        lines = [line.text for line in view.screen(80, 60)]
        at = next(i for i, line in enumerate(lines) if "NAME" in line or "DEVICE" in line or "BUSIEST" in line)
        return [line.split()[0] for line in lines[at + 1 : -1] if line]

    def numbers() -> list[int]:
        return [int(name) for name in names() if name.isdigit()]

    view.key("s")
    view.key("s")
    assert view.sort == "irq"
    assert numbers() == sorted(numbers())
    view.key("r")
    assert numbers() == sorted(numbers(), reverse=True)
    count = len(names())
    view.key("z")
    assert 0 < len(names()) < count
    view.key("d")
    assert any("vif0 of d1" in line.text for line in view.screen(80, 60))
    view.key("c")
    assert set(names()) == {"d0v0", "d0v1"}
    view.key("i")
    view.key("m")
    assert view.marked
    assert "SINCE" in "".join(line.text for line in view.screen(80, 24))
    assert names() == []  # nothing since, and idle lines are hidden
    view.key("z")
    view.key("end")
    last = [line.text for line in view.screen(80, 24)]
    view.key("home")
    assert [line.text for line in view.screen(80, 24)] != last
    view.key("p")
    assert "PAUSED" in view.screen(40, 10)[0].text
    view.key("h")
    assert any("leave" in line.text for line in view.screen(80, 24))
    view.key("x")
    view.key("q")
    assert view.quit


def test_hundreds_of_vcpus_and_hostile_names() -> None:
    rates = Rates()
    head = "   " + " ".join(f"CPU{i}" for i in range(300)) + "\n"
    for i in range(2):
        row = " 7: " + " ".join(str(i * j) for j in range(300)) + " xen-dyn -event \x1b[31mred\x07\n"
        rates.take(read_text(head + row, seconds=float(i)))
    view = TopView(rates)
    for name in VIEWS:
        view.view = name
        text = "\n".join(line.text for line in view.screen(80, 24))
        assert "\x1b" not in text
        assert "\x07" not in text
        assert "CPU299" in text or name == "vcpus"
    assert "+291 vCPUs" in "\n".join(line.text for line in view.screen(80, 24))


def test_keys_of_a_terminal() -> None:
    assert split_keys("a\x1b[A\x1b[6~/\r\x7f\x1b") == ["a", "up", "pagedown", "/", "enter", "backspace", "escape"]
    assert split_keys("\x1b[99;5Zq") == ["q"]
    assert split_keys("\x1b[") == []
    assert set(SORTS) == {"rate", "total", "irq", "name", "cpu"}


# -- a real terminal ---------------------------------------------------------------------------------------------------


@dataclass
class Terminal:
    """`pvirq top` on a pty of its own."""

    process: subprocess.Popen[bytes]
    master: int
    slave: int
    output: bytes = b""
    before: list[object] = field(default_factory=list)

    def read_until(self, words: bytes, seconds: float = 60) -> None:
        """Until this was written. The limit is for a hang, not for speed."""
        end = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < end, self.output[-3000:]
            if select.select([self.master], [], [], 0.1)[0]:
                self.output += os.read(self.master, 65536)

    def type(self, keys: bytes) -> None:
        self.output = b""
        os.write(self.master, keys)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def end(self) -> int:
        """Wait for its end, reading what it still writes."""
        while self.process.poll() is None:
            if select.select([self.master], [], [], 0.05)[0]:
                self.output += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.output += os.read(self.master, 65536)
        return self.process.returncode

    @property
    def restored(self) -> bool:
        """The terminal's settings are as before, the cursor shown and the other screen left."""
        shown = self.output.rfind(b"\x1b[?25h") > self.output.rfind(b"\x1b[?25l")
        left = self.output.rfind(b"\x1b[?1049l") > self.output.rfind(b"\x1b[?1049h")
        return shown and left and termios.tcgetattr(self.slave) == self.before


@contextmanager
def terminal(width: int, height: int, *args: str) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "77", "LINES": "33"}  # of a shell whose window has changed
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-m", "pvirq", "top", *args], stdin=slave, stdout=slave, stderr=slave, env=environ,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield Terminal(process, master, slave, before=before)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


FILES = [str(BASE / f"{stage}.dom0.interrupts") for stage in ("2-drivers", "4-after-ping")]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_in_a_terminal(width: int, height: int) -> None:
    with terminal(width, height, "--seconds", "0.1", *FILES) as term:
        term.read_until(b"end")  # the last file is shown
        written = term.output.replace(b"\x1b[H", b"\n")  # the next picture
        text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", written).decode()
        frames = [line for line in re.split(r"[\r\n]+", text) if line]
        assert max(map(len, frames)) <= width
        term.type(b"/xenstored\r")
        term.read_until(b"/xenstored")
        term.type(b"q")
        assert term.end() == 0
        assert term.restored


@pytest.mark.parametrize(
    ("what", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (b"\x03", 130)]
)
def test_signals_leave_the_terminal_in_order(what: signal.Signals | bytes, status: int) -> None:
    with terminal(80, 24, "--no-tools", "--seconds", "0.2") as term:  # this machine
        term.read_until(b"NAME")
        if isinstance(what, bytes):
            os.write(term.master, what)
            if not _has_controlling_terminal(term):
                term.process.send_signal(signal.SIGINT)  # a key is a signal only for a session's own terminal
        else:
            term.process.send_signal(what)
        assert term.end() == status
        assert term.restored


def _has_controlling_terminal(term: Terminal) -> bool:
    """Whether Ctrl-C at the pty reaches the process: only if the pty is its session's."""
    stat = Path(f"/proc/{term.process.pid}/stat").read_text().rpartition(")")[2].split()
    return stat[4] != "0"


def test_stopped_and_continued() -> None:
    """SIGTSTP, as Ctrl-Z sends: the shell finds its terminal as it was; SIGCONT brings the picture back."""
    with terminal(80, 24, "--seconds", "0.1", *FILES) as term:
        term.read_until(b"end")
        term.process.send_signal(signal.SIGTSTP)
        term.read_until(b"\x1b[?1049l")
        end = time.monotonic() + 60
        while Path(f"/proc/{term.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert term.restored
        term.output = b""
        term.process.send_signal(signal.SIGCONT)
        term.read_until(b"NAME")
        assert b"\x1b[?1049h" in term.output
        term.type(b"q")
        assert term.end() == 0
        assert term.restored


def test_keys_come_from_the_terminal_where_input_is_a_file(tmp_path: Path) -> None:
    """`pvirq top - < interrupts`, in a session whose terminal it is."""
    script = f"exec {sys.executable} -m pvirq top --seconds 0.1 - < {FILES[0]}"
    pid, master = pty.fork()
    if pid == 0:
        os.execv("/bin/sh", ["sh", "-c", script])
    output = b""
    end = time.monotonic() + 60
    while b"end" not in output:
        assert time.monotonic() < end, output
        output += os.read(master, 65536)
    os.write(master, b"q")
    with suppress(OSError):  # the terminal's last process has gone
        while os.read(master, 65536):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(master)


def test_a_terminal_that_changes_its_size() -> None:
    with terminal(80, 24, "--seconds", "0.1", *FILES) as term:
        term.read_until(b"end")
        assert b"CHIP" not in term.output
        term.output = b""
        term.resize(200, 50)
        term.read_until(b"CHIP")
        term.type(b"q")
        assert term.end() == 0


def test_an_error_in_between_leaves_the_terminal_in_order(tmp_path: Path) -> None:
    """The source fails while the screen is shown: a line, status 2, and the terminal as before."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys\nfrom pvirq.cli import main, inspect_top\nfrom pvirq.inspect import InspectError, sources\n"
        "first = sources.LiveSource.next\ncalls = []\n"
        "def fail(self):\n    calls.append(1)\n    if len(calls) > 2:\n        raise InspectError('gone')\n"
        "    return first(self)\nsources.LiveSource.next = fail\n"
        "sys.exit(main.run(['top', '--no-tools', '--seconds', '0.1']))\n"
    )
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    process = subprocess.Popen([sys.executable, str(script)], stdin=slave, stdout=slave, stderr=slave)
    term = Terminal(process, master, slave, before=before)
    assert term.end() == 2
    assert b"pvirq: gone" in term.output
    assert term.restored
    os.close(master)
    os.close(slave)


@pytest.mark.skipif(shutil.which("tmux") is None, reason="needs tmux")
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_what_a_terminal_makes_of_it(width: int, height: int, tmp_path: Path) -> None:
    """tmux interprets what is written: the picture of the screen is the view's, and keys change it."""
    socket = str(tmp_path / "tmux")

    def tmux(*args: str) -> str:
        return subprocess.run(["tmux", "-S", socket, *args], capture_output=True, text=True, check=True).stdout

    def wait_for(words: str) -> list[str]:
        end = time.monotonic() + 60
        while words not in (text := tmux("capture-pane", "-p")):
            assert time.monotonic() < end, text
            time.sleep(0.1)
        return text.splitlines()

    command = f"{sys.executable} -m pvirq top --seconds 0.2 {' '.join(FILES)}; echo status $?; sleep 60"
    tmux("-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", str(height), command)
    tmux("set", "-g", "status", "off")
    try:
        lines = wait_for("  end  ")
        view = TopView(Rates(), "2 files")
        source = ReplaySource(FILES, 0.2)
        while (snapshot := source.next()) is not None:
            view.rates.take(snapshot)
        view.seconds, view.ended = 0.2, True
        shown = [line.text.rstrip() for line in view.screen(width, len(lines))]
        assert [line.rstrip() for line in lines] == shown
        tmux("send-keys", "c")
        wait_for("vcpus by rate")
        tmux("send-keys", "h")
        wait_for("pause and go on" if height > 10 else "leave")
        tmux("send-keys", "x", "q")
        assert "status 0" in "\n".join(wait_for("status 0"))
    finally:
        subprocess.run(["tmux", "-S", socket, "kill-server"], check=False)


def test_once() -> None:
    """One screen as text, of all lines."""
    done = subprocess.run(
        [sys.executable, "-m", "pvirq", "top", "--once", *FILES], capture_output=True, text=True, check=True,
        env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert "vif1.0-q0-tx" in done.stdout
    assert len(done.stdout.splitlines()) == 56 + 3


def test_a_scenario() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pvirq", "top", "--once", "--model", "writeup-guest"], capture_output=True, text=True,
        check=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert re.search(r"d1 +256 .* timer0", done.stdout)

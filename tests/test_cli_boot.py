"""`pvirq boot` with real guests, in processes and on terminals of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import guestlib
from pvirq.toolstack.cpio import Writer
from pvirq.toolstack.kernels import KernelChoice

COMMAND = [sys.executable, "-m", "pvirq"]
needs_gcc = pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")


def pvirq_(*args: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with its output as text."""
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*COMMAND, *map(str, args)], capture_output=True, text=True, check=False, timeout=120,
        **{"stdin": subprocess.DEVNULL, **options},
    )  # fmt: skip


# -- small kernels: the console and how guests end ---------------------------------------------------------------------


@pytest.mark.guest
@needs_gcc
def test_console_of_a_guest_that_powers_off() -> None:
    done = pvirq_("boot", guestlib.build("event"), "--dom0-interrupts")
    assert (done.returncode, done.stderr) == (0, "")
    console, _, interrupts = done.stdout.partition("domain 0:\n")
    assert console.splitlines()[-1] == "done"
    assert re.search(r"^ *\d+: +[1-9]\d* .*evtchn:xenconsoled$", interrupts, re.MULTILINE)


@pytest.mark.guest
@needs_gcc
def test_crash_of_a_guest() -> None:
    done = pvirq_("boot", guestlib.build("crash"), "--append", "which=2")
    assert done.returncode == 3
    assert done.stdout.endswith("before 2\n")
    assert done.stderr.startswith("pvirq: guest1 crashed: unhandled exception 6 ")
    assert "Call Trace" in done.stderr


@pytest.mark.guest
@needs_gcc
def test_nobody_reads_the_output() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "boot", str(guestlib.build("event"))], stdout=write, stderr=subprocess.PIPE, check=False, timeout=60
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.guest
@needs_gcc
def test_closed_standard_files() -> None:
    command = f"'{sys.executable}' -m pvirq boot '{guestlib.build('event')}' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False, timeout=60).returncode == 0


# -- Linux -------------------------------------------------------------------------------------------------------------


@pytest.mark.boot
def test_exec(kernel_cloud: KernelChoice, busybox: Path) -> None:
    done = pvirq_("boot", "--exec", "cat /proc/interrupts; printf 'no newline'; exit 7", "--dom0-interrupts")
    assert done.returncode == 7
    guest, _, dom0 = done.stdout.partition("domain 0:\n")
    assert re.match(r" +CPU0 +\n", guest)
    assert re.search(r"^ *\d+: +[1-9]\d* +xen-dyn\S* +-event +hvc_console$", guest, re.MULTILINE)
    assert re.search(r"^ *\d+: +[1-9]\d* +\d+ .*evtchn:xenconsoled$", dom0, re.MULTILINE)
    assert re.fullmatch(r"pvirq: using .*kernel.*\n", done.stderr)


@pytest.mark.boot
def test_exec_killed_quiet_and_verbose(kernel_cloud: KernelChoice, busybox: Path) -> None:
    done = pvirq_("boot", "-q", "--exec", "kill -9 $$")
    assert (done.returncode, done.stdout, done.stderr) == (137, "", "")
    done = pvirq_("boot", kernel_cloud.path, "-v", "--exec", "poweroff -f")
    assert done.returncode == 1
    assert "Linux version" in done.stderr
    assert done.stderr.endswith("pvirq: guest1 ended (poweroff); waiting for the end of 'poweroff -f'\n")


@pytest.mark.boot
def test_exec_crash(kernel_cloud: KernelChoice, busybox: Path) -> None:
    done = pvirq_("boot", kernel_cloud.path, "--exec", "echo c > /proc/sysrq-trigger")
    assert done.returncode == 3
    assert done.stderr.startswith("pvirq: guest1 crashed: Kernel panic - not syncing: sysrq triggered crash\n")
    assert re.search(r"^ sysrq_handle_crash\+0x", done.stderr, re.MULTILINE)
    assert "---[ end Kernel panic" in done.stderr or "Kernel Offset" in done.stderr


@pytest.mark.boot
def test_exec_timeout(kernel_cloud: KernelChoice, busybox: Path) -> None:
    began = time.monotonic()
    done = pvirq_("boot", kernel_cloud.path, "--exec", "sleep 1000", "--timeout", "200")
    assert done.returncode == 4
    assert done.stderr.startswith("pvirq: 200 s of guest time passed; waiting for the end of 'sleep 1000'\n")
    assert "blocked, events enabled" in done.stderr
    assert time.monotonic() - began < 200  # sleep is skipped


@pytest.mark.boot
def test_own_initrd(kernel_cloud: KernelChoice, busybox: Path, tmp_path: Path) -> None:
    archive = Writer()
    archive.file("greeting", b"hello\n")
    archive.file("busybox", busybox.read_bytes(), 0o755)
    archive.directory("proc")
    archive.file("init", b'#!/busybox sh\ncat() { /busybox cat "$@"; }\ncat /greeting\n/busybox reboot -f\n', 0o755)
    (tmp_path / "rd").write_bytes(archive.getvalue())
    done = pvirq_("boot", kernel_cloud.path, "--initrd", tmp_path / "rd", "--exec", "cat /greeting; exit 3")
    assert (done.returncode, done.stdout) == (3, "hello\n")
    done = pvirq_("boot", kernel_cloud.path, "--initrd", tmp_path / "rd", "--append", "quiet")
    assert (done.returncode, done.stdout.count("hello\n")) == (0, 1)
    assert done.stderr == "pvirq: the guest ended: reboot; pvirq does not go on with it\n"


@pytest.mark.boot
def test_shell_from_a_pipe(kernel_cloud: KernelChoice, busybox: Path) -> None:
    done = pvirq_("boot", kernel_cloud.path, "--shell", stdin=None, input="echo a$((40+2))b\ncat\nread by cat")
    assert done.returncode == 0
    assert "\na42b\n" in done.stdout
    assert "\nread by cat\n" in done.stdout


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *args: str | Path) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("4H", 33, 101, 0, 0))
            os.execv(COMMAND[0], [*COMMAND, *map(str, args)])
        self.output = b""

    def expect(self, pattern: bytes) -> bytes:
        """Output up to a match of `pattern`, or to its end."""
        while not (match := re.search(pattern, self.output)):
            assert select.select([self.fd], [], [], 60)[0], self.output
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # the other side is closed
                data = b""
            if not data:
                return self.output
            self.output += data
        found, self.output = self.output[: match.end()], self.output[match.end() :]
        return found

    def type(self, data: bytes) -> None:
        os.write(self.fd, data)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.fd)[3] & termios.ECHO)

    def end(self) -> int:
        """Wait for its end; the exit status."""
        self.rest = self.expect(rb"(?!)")
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


@pytest.mark.boot
def test_shell(kernel_cloud: KernelChoice, busybox: Path) -> None:
    shell = Terminal("boot", kernel_cloud.path, "--shell")
    shell.expect(rb"Ctrl-\] leaves")
    shell.expect(rb"# ")
    assert not shell.echoes()
    shell.type(b"stty size; echo a$((1+1))b\r")
    assert b"33 101\r\na2b\r\n" in shell.expect(rb"a2b\r\n")
    shell.expect(rb"# ")
    before = shell.cpu_seconds()
    time.sleep(3)
    assert shell.cpu_seconds() - before < 0.9  # an idle guest costs next to nothing
    began = time.monotonic()
    shell.type(b"sleep 1; echo d$((1+1))\r")
    shell.expect(rb"d2\r\n")
    assert time.monotonic() - began > 0.9  # and its time is the user's
    shell.expect(rb"# ")
    shell.type(b"while :; do :; done\r")
    time.sleep(0.5)
    shell.type(b"\x03")  # is the guest's, busy as it is
    shell.expect(rb"# ")
    shell.type(b"\x1d")
    assert shell.end() == 0


@pytest.mark.boot
def test_shell_ends_with_the_guest_or_a_signal(kernel_cloud: KernelChoice, busybox: Path) -> None:
    shell = Terminal("boot", "-q", kernel_cloud.path, "--shell")
    shell.expect(rb"# ")
    shell.type(b"exit\r")
    assert shell.end() == 0
    shell = Terminal("boot", kernel_cloud.path, "--shell")
    shell.expect(rb"Linux version")
    os.kill(shell.pid, signal.SIGTERM)
    shell.expect(rb"(?!)")
    assert shell.end() == 128 + signal.SIGTERM


@pytest.mark.boot
def test_ctrl_c(kernel_cloud: KernelChoice, busybox: Path) -> None:
    console = Terminal("boot", kernel_cloud.path)
    console.expect(rb"Linux version")
    console.type(b"\x03")
    assert console.end() == 130
    assert b"Traceback" not in console.rest
    command = Terminal("boot", kernel_cloud.path, "--exec", "echo started; while :; do :; done")
    assert b"booting ... " in command.expect(rb"started\r\n")
    command.type(b"\x03")
    assert command.end() == 130
    assert b"Traceback" not in command.rest

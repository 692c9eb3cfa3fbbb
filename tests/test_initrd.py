"""The default initrd, the overlay, and the guest's /init as a shell script on this machine."""

import base64
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import time
import tty
from importlib import resources
from pathlib import Path

import pytest

from pvirq.toolstack import cpio, initrd

BUSYBOX = b"\x7fELF busybox"
INIT = resources.files("pvirq.toolstack").joinpath("init.sh").read_text()


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    path = tmp_path / "busybox"
    path.write_bytes(BUSYBOX)
    return path


def contents(archive: bytes) -> dict[str, cpio.Entry]:
    return {entry.name: entry for entry in cpio.read(archive)}


def test_default(busybox: Path) -> None:
    archive = initrd.default_initrd(busybox)
    assert archive == initrd.default_initrd(busybox)
    entries = contents(archive)
    assert entries["pvirq/busybox"].data == BUSYBOX
    assert stat.S_IMODE(entries["pvirq/busybox"].mode) == 0o755
    assert entries["pvirq/init"].data.startswith(b"#!/pvirq/busybox sh\n")
    assert entries["init"].data == b"pvirq/init"
    assert entries["bin/sh"].data == b"/pvirq/busybox"
    assert (entries["dev/console"].rdev, stat.S_ISCHR(entries["dev/console"].mode)) == ((5, 1), True)
    assert {"proc", "sys", "tmp", "etc/passwd", "sbin", "usr/bin"} <= set(entries)
    assert "pvirq/modules" not in entries
    assert len(archive) < 12_000 + len(BUSYBOX)


def test_links_are_made_at_boot_where_the_shell_needs_them(busybox: Path) -> None:
    assert contents(initrd.default_initrd(busybox))["pvirq/links"].data == b"always\n"
    busybox.write_bytes(BUSYBOX + b"is configured to run built-in utilities without $PATH search")
    assert contents(initrd.default_initrd(busybox))["pvirq/links"].data == b"interactive\n"


def test_poweroff_and_reboot_need_no_init_system(busybox: Path) -> None:
    entries = contents(initrd.default_initrd(busybox))
    for end in ("halt", "poweroff", "reboot"):
        assert entries[f"bin/{end}"].data == f"#!/pvirq/busybox sh\nexec /pvirq/busybox {end} -f\n".encode()
        assert stat.S_IMODE(entries[f"bin/{end}"].mode) == 0o755
        assert f"alias {end}='/pvirq/busybox {end} -f'\n".encode() in entries["pvirq/shrc"].data
    assert entries["pvirq/poweroff"].data == entries["bin/poweroff"].data
    # The user's own come first.
    assert contents(initrd.default_initrd(busybox, {"bin/reboot": b"#!mine"}))["bin/reboot"].data == b"#!mine"


def test_files(busybox: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/tool").write_bytes(b"tool")
    (tree / "sub/tool").chmod(0o750)
    (tree / "loop").symlink_to(".")
    entries = contents(
        initrd.default_initrd(
            busybox,
            {"etc/rc": b"#!/bin/sh\n", "etc/passwd": b"mine", "opt": tree, "/usr/bin/x": b"x"},
            [("xen_blkfront", b"ko1"), ("ext4", b"ko2")],
        )
    )
    assert stat.S_IMODE(entries["etc/rc"].mode) == 0o755
    assert stat.S_IMODE(entries["opt/sub/tool"].mode) == 0o750
    assert entries["etc/passwd"].data == b"mine"
    assert entries["opt/loop"].data == b"."
    assert stat.S_ISDIR(entries["usr/bin"].mode)
    assert entries["pvirq/modules"].data == b"/pvirq/xen_blkfront.ko\n/pvirq/ext4.ko\n"
    assert entries["pvirq/ext4.ko"].data == b"ko2"


def test_a_fifo_is_refused(busybox: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(cpio.CpioError, match="neither file"):
        initrd.default_initrd(busybox, {"fifo": tmp_path / "fifo"})


def test_overlay_goes_in_front(busybox: Path) -> None:
    user = b"\x1f\x8b anything"
    both = initrd.with_overlay(user, busybox)
    assert both.endswith(user)
    assert (len(both) - len(user)) % 512 == 0
    entries = contents(both)
    assert {"pvirq/init", "pvirq/busybox", "pvirq/fstab", "dev/console", "proc", "sys"} <= set(entries)
    assert not any(name == "init" or name.startswith(("bin", "etc")) for name in entries)


# The script itself: with busybox if there is one (static or not), else with dash standing in for ash, and a
# stand-in for what would change this machine. The pty is the console.

SHELL = shutil.which("busybox") or shutil.which("dash")


class Console:
    """init.sh on a pty, with /pvirq/busybox and /proc/sys/kernel replaced by harmless things."""

    def __init__(self, tmp_path: Path, mode: str, **environment: str) -> None:
        applets = tmp_path / "applets"
        applets.write_text(
            '#!/bin/sh\ncase $1 in\nmount|stty|insmod) echo "$@" >> LOG ;;\nbase64|sleep) exec "$@" ;;\n'
            'setsid) shift 3; exec "$@" ;;\n*) echo "$@" >> LOG; printf "\\036gone" ;;\nesac\n'.replace(
                "LOG", str(tmp_path / "log")
            )
        )
        applets.chmod(0o755)
        (tmp_path / "osrelease").write_text("6.1.0-test\n")
        script = INIT.replace("/pvirq/busybox", str(applets)).replace("/pvirq/", f"{tmp_path}/")
        script = script.replace("/proc/sys/kernel/", f"{tmp_path}/").replace("/etc/rc", f"{tmp_path}/rc")
        script = script.replace("/sys/devices/", f"{tmp_path}/")
        self.log = tmp_path / "log"
        (tmp_path / "init.sh").write_text(script)
        self.output = b""
        self.terminal, other = pty.openpty()
        tty.setraw(other)
        assert SHELL
        self.process = subprocess.Popen(
            [SHELL, *(["sh"] if SHELL.endswith("busybox") else []), str(tmp_path / "init.sh")],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "pvirq": mode, **environment},
            start_new_session=True,
        )
        os.close(other)

    def until(self, pattern: bytes) -> bytes:
        """What comes up to and with the pattern."""
        deadline = time.monotonic() + 20
        while not (match := re.search(pattern, self.output, re.DOTALL)):
            assert select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))[0], self.output
            try:
                self.output += os.read(self.terminal, 65536)
            except OSError:  # EIO: the other side is closed
                raise AssertionError(f"{pattern!r} is not in {self.output!r}") from None
        found, self.output = self.output[: match.end()], self.output[match.end() :]
        return found

    def command(self, nonce: str, command: bytes) -> bytes:
        os.write(self.terminal, nonce.encode() + b" " + base64.b64encode(command) + b"\n")
        return self.until(b"\x1e" + nonce.encode() + rb" end \d+\n")

    def close(self) -> None:
        os.close(self.terminal)
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def agent(tmp_path: Path):  # type: ignore[no-untyped-def]
    if not SHELL:
        pytest.skip("neither busybox nor dash is installed")
    console = Console(tmp_path, "agent")
    yield console
    console.close()


def test_agent_runs_commands(agent: Console) -> None:
    assert agent.until(b"ready\n") == b"\x1epvirq ready\n"
    assert agent.log.read_text().splitlines()[-1] == "stty raw -echo"
    assert agent.command("a1", b"echo out; echo err >&2; exit 7") == b"\x1ea1 begin\nout\nerr\n\x1ea1 end 7\n"
    assert agent.command("a2", b"printf 'a\\001\\377\\r'; cat") == b"\x1ea2 begin\na\x01\xff\r\x1ea2 end 0\n"
    quoted = b"""x='a  "b" $c \\d *'; printf '%s\n' "$x" # comment\nfalse"""
    assert agent.command("a3", quoted) == b'\x1ea3 begin\na  "b" $c \\d *\n\x1ea3 end 1\n'
    assert agent.command("a4", b"exit") == b"\x1ea4 begin\n\x1ea4 end 0\n"


def test_agent_survives_signals_background_children_and_nonsense(agent: Console) -> None:
    agent.until(b"ready\n")
    # no "Killed" or "Terminated" between the lines
    assert agent.command("b1", b"kill -9 $$") == b"\x1eb1 begin\n\x1eb1 end 137\n"
    assert agent.command("b2", b"kill -15 $$") == b"\x1eb2 begin\n\x1eb2 end 143\n"
    start = time.monotonic()
    assert agent.command("b3", b"sleep 60 & echo $!").endswith(b"\x1eb3 end 0\n")
    assert time.monotonic() - start < 10
    os.write(agent.terminal, b"\n\nb4 ****\n")
    assert b"not base64" in agent.until(b"\x1eb4 end 125\n")
    assert agent.command("b5", b"true") == b"\x1eb5 begin\n\x1eb5 end 0\n"
    long = b"echo " + b"x" * 20_000 + b" | wc -c"
    assert agent.command("b6", long).split()[2] == b"20001"


@pytest.mark.parametrize("word", ["poweroff", "reboot", "halt"])
def test_agent_ends_the_machine(agent: Console, word: str) -> None:
    agent.until(b"ready\n")
    os.write(agent.terminal, word.encode() + b"\n")
    agent.until(b"\x1egone")
    assert agent.log.read_text().splitlines()[-1] == f"{word} -f"


@pytest.mark.skipif(not SHELL, reason="neither busybox nor dash is installed")
@pytest.mark.parametrize("mode", ["shell", "", "unknown"])
def test_shell_then_poweroff(tmp_path: Path, mode: str) -> None:
    (tmp_path / "modules").write_text("/pvirq/a.ko\n/pvirq/b.ko\n")
    console = Console(tmp_path, mode, pvirq_rows="33", pvirq_cols="101")
    try:
        if mode != "shell":
            assert b"pvirq: Linux 6.1.0-test;" in console.until(b"\n")
        os.write(console.terminal, b"echo $((40 + 2))$pvirq_rows.\nexit 3\n")
        console.until(b"42\\.\r?\n")
        console.until(b"\x1egone")
        log = console.log.read_text().splitlines()
        assert log[1:] == ["insmod /pvirq/a.ko", "insmod /pvirq/b.ko", "stty rows 33 cols 101", "poweroff -f"]
    finally:
        console.close()


@pytest.mark.skipif(not SHELL, reason="neither busybox nor dash is installed")
def test_rc_instead_of_the_shell(tmp_path: Path) -> None:
    (tmp_path / "rc").write_text("#!/bin/sh\necho from rc\n")
    (tmp_path / "rc").chmod(0o755)
    console = Console(tmp_path, "")
    try:
        assert console.until(b"\x1egone").startswith(b"from rc\n")
        assert console.log.read_text().splitlines()[-1] == "poweroff -f"
    finally:
        console.close()

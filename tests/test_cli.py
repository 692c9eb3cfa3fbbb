"""The pvirq command by parts: what it says to bad input, its options, signals, the terminal. See test_cli_boot."""

from __future__ import annotations

import os
import pty
import re
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import guestlib
import pvirq
from pvirq.cli import main, terminal
from pvirq.cli.boot import MemorySize
from pvirq.cli.messages import Messages
from pvirq.cli.terminal import ConsoleInput, Interrupted, Interrupts, Left, Newlines, raw_terminal
from pvirq.pv.builder import BuildError
from pvirq.pv.image import ImageError, parse_elf
from pvirq.toolstack import images
from pvirq.toolstack.cache import Cache
from pvirq.toolstack.kernels import KernelChoice

needs_gcc = pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")


# -- bad input: one line and status 2 ----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with kernels that can't work; the cache is another, empty one."""
    monkeypatch.setenv("PVIRQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text").write_text("no kernel\n")
    (tmp_path / "empty").touch()
    elf = struct.pack("<4sBBB9xHHI", b"\x7fELF", 2, 1, 1, 2, 62, 1) + bytes(40)
    (tmp_path / "elf").write_bytes(elf)
    (tmp_path / "elf32").write_bytes(b"\x7fELF\x01" + elf[5:])
    (tmp_path / "gzip").write_bytes(b"\x1f\x8b\x08" + bytes(100))
    bzimage = bytearray(0x1000)
    bzimage[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    (tmp_path / "bzimage").write_bytes(bzimage)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["boot", "nowhere/vmlinuz"], "nowhere/vmlinuz: No such file"),
        (["boot", "text"], "text: is not a kernel"),
        (["boot", "empty"], "empty: "),
        (["boot", "elf"], "elf: "),
        (["boot", "elf32"], "elf32: is not an x86-64 ELF"),
        (["boot", "gzip"], "gzip: "),
        (["boot", "bzimage"], "bzimage: "),
        (["boot", "."], r"\.: is a directory"),
        (["boot", "\0"], "null"),
        (["boot", "text", "--memory", "-1"], "--memory"),
        (["boot", "text", "--memory", "0"], "no memory size"),
        (["boot", "text", "--memory", "1X"], "no memory size"),
        (["boot", "text", "--timeout", "0"], "--timeout"),
        (["boot", "text", "--timeout", "nan"], "--timeout"),
        (["boot", "text", "--vcpus", "0"], "--vcpus"),
        (["boot", "text", "--engine", "steam"], "steam.*unicorn"),
        (["boot", "text", "--exec", "a", "--shell"], "exclude each other"),
        (["boot", "text", "more"], "extra argument.*pvirq boot --help"),
        (["boot", "--nothing"], "--nothing"),
        (["reboot"], "reboot"),
        (["fetch", "../x"], "no name of a kernel package"),
    ],
)
def test_bad_input(
    args: list[str], words: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    assert main.run(args) == main.EXIT_BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"pvirq: .*{words}.*\n", err), err


@pytest.mark.guest
@needs_gcc
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--initrd", "nothing"], "initrd nothing: No such file"),
        (["--initrd", "."], r"initrd \.: Is a directory"),
        (["--memory", "1"], "more than --memory gives: 1 MiB"),
        (["--memory", "4", "--initrd", "big"], "more than --memory gives: 4 MiB"),
        (["--memory", "100T"], "more than this host has"),
        (["--append", "x" * 2000], "command line"),
        (["--exec", "true"], "need a Linux kernel"),
        (["--initrd", "none", "--shell"], "need an initrd"),
    ],
)
def test_bad_input_to_a_good_kernel(
    args: list[str], words: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    (files / "big").write_bytes(bytes(8 << 20))
    assert main.run(["boot", str(guestlib.build("event")), *args]) == main.EXIT_BAD_INPUT
    assert re.fullmatch(rf"pvirq: .*{words}.*\n", capsys.readouterr().err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_kernel(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "text").chmod(0)
    assert main.run(["boot", str(files / "text")]) == main.EXIT_BAD_INPUT
    assert "permission denied" in capsys.readouterr().err


def test_engine_that_cannot_work(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_args: object) -> None:
        raise pvirq.EngineError("its self-test failed: no RDTSC")

    monkeypatch.setattr("pvirq.cli.session.images.choose_kernel", fails)
    assert main.run(["boot"]) == main.EXIT_BAD_INPUT
    assert capsys.readouterr().err == "pvirq: its self-test failed: no RDTSC\n"


def test_other_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error, status, text in (
        (MemoryError(), 1, "pvirq: out of memory\n"),
        (OSError(28, "No space left on device", "/x"), 1, "pvirq: /x: No space left on device\n"),
        (KeyboardInterrupt(), 130, ""),
    ):

        def fails(*_args: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("pvirq.cli.session.images.choose_kernel", fails)
        assert main.run(["boot"]) == status
        # click ends the line that a terminal shows ^C in.
        assert capsys.readouterr().err.lstrip("\n") == text


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"pvirq, version {pvirq.__version__}\n"
    assert main.run(["boot", "--help"]) == 0
    text = capsys.readouterr().out
    assert "pvirq boot --exec 'cat /proc/interrupts'" in text
    assert re.search(r"^ +3 +the guest crashed", text, re.MULTILINE)
    assert main.run([]) == main.EXIT_BAD_INPUT
    assert "pvirq boot --shell" in capsys.readouterr().err


# -- the parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256", 256 << 20),
        ("256M", 256 << 20),
        ("1G", 1 << 30),
        ("1gib", 1 << 30),
        ("65536K", 64 << 20),
        ("3 GB", 3 << 30),
    ],
)
def test_memory_size(text: str, size: int) -> None:
    assert MemorySize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "M", "1.5G", "0x10", "-1", "0", "0G", "1 2", "٣", "9" * 40])
def test_bad_memory_size(text: str) -> None:
    with pytest.raises(click.BadParameter):
        MemorySize().convert(text, None, None)


def test_command_line() -> None:
    size = os.terminal_size((80, 25))
    assert images.command_line("", "", False, None) == "console=hvc0"
    assert images.command_line("a b", "agent", False, None) == "console=hvc0 pvirq=agent a b"
    assert images.command_line("console=tty0 a", "agent", True, None) == "pvirq=agent rdinit=/pvirq/init console=tty0 a"
    assert images.command_line("xconsole=1", "shell", False, size) == (
        "console=hvc0 pvirq=shell pvirq_rows=25 pvirq_cols=80 xconsole=1"
    )


@needs_gcc
def test_slowly_unpacked_kernels_are_kept(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = guestlib.build("event")
    fast = images.load_kernel(kernel)
    assert Cache().entries() == []
    monkeypatch.setattr(images, "SLOW_S", -1.0)
    images.load_kernel(kernel)
    (entry,) = Cache().entries()
    assert entry.kind == "unpacked"

    def fails(*_args: object) -> bytes:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(images, "decompress", fails)
        assert images.load_kernel(kernel).segments == fast.segments
    # A damaged one is as good as none.
    (entry.path / "vmlinux.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))
    assert images.load_kernel(kernel).entry == fast.entry
    (entry.path / "vmlinux.zst").write_bytes(b"")
    assert images.load_kernel(kernel).entry == fast.entry
    # And a cache that can't be written does no harm.
    monkeypatch.setenv("PVIRQ_CACHE", "/proc/none")
    assert images.load_kernel(kernel).entry == fast.entry


def test_kernel_by_name(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(which: str, _report: object) -> KernelChoice:
        return KernelChoice(Path(f"/fetched/{which}"), "", "", None, None)

    monkeypatch.setattr(images, "fetch_kernel", fetched)
    monkeypatch.chdir(files)
    assert images.choose_kernel("cloud", print).path == Path("/fetched/cloud")
    assert images.choose_kernel("linux-image-1", print).path == Path("linux-image-1")
    (files / "cache/kernels/linux-image-1").mkdir(parents=True)
    assert images.choose_kernel("linux-image-1", print).path == Path("/fetched/linux-image-1")
    (files / "cloud").touch()  # a file of that name comes first
    assert images.choose_kernel("cloud", print).path == Path("cloud")


@needs_gcc
def test_no_initrd_for_what_is_not_linux(files: Path) -> None:
    image = parse_elf(guestlib.build("event").read_bytes())
    assert images.make_initrd(None, image, False, print) == b""
    assert images.make_initrd("none", image, False, print) == b""
    (files / "rd").write_bytes(b"as it is")
    assert images.make_initrd(str(files / "rd"), image, False, print) == b"as it is"
    with pytest.raises(BuildError, match="null"):
        images.make_initrd("\0", image, False, print)


def test_image_error_names_the_file(files: Path) -> None:
    with pytest.raises(ImageError, match=re.escape(str(files / "text")) + ": is not"):
        images.load_kernel(files / "text")


def test_newlines() -> None:
    written = bytearray()
    newlines = Newlines(written.extend)
    for piece in (b"a\r", b"\nb\r\n", b"\rc\r\r\n", b"", b"d"):
        newlines.feed(piece)
    assert written == b"a\nb\n\rc\r\nd"


def test_cache_command(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "cache/kernels/linux-image-1").mkdir(parents=True)
    (files / "cache/kernels/linux-image-1/vmlinuz").write_bytes(bytes(3 << 20))
    (files / "cache/kernels/cloud").symlink_to("linux-image-1")
    assert main.run(["cache"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{files}/cache: 3.0 MiB\n")
    assert re.search(r"^  kernels/linux-image-1 \(cloud\) +3\.0 MiB$", out, re.MULTILINE)
    assert main.run(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"3.0 MiB freed in {files}/cache\n"
    assert main.run(["cache"]) == 0
    assert capsys.readouterr().out == f"{files}/cache: 0.0 MiB\n"


# -- signals and terminals ---------------------------------------------------------------------------------------------


def test_interrupts() -> None:
    before = [signal.getsignal(signum) for signum in terminal.SIGNALS]
    with Interrupts() as interrupts:
        interrupts.check()
        assert interrupts.wait(1_000_000) == 1_000_000
        os.kill(os.getpid(), signal.SIGTERM)
        interrupts.wait(None)  # the signal ends it
        with pytest.raises(Interrupted) as caught:
            interrupts.check()
        assert caught.value.signum == signal.SIGTERM
        with pytest.raises(Interrupted):  # the second one doesn't wait for anybody
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(signum) for signum in terminal.SIGNALS] == before


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            interrupts.check()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def interrupts() -> Iterator[Interrupts]:
    with Interrupts() as used:
        yield used


def test_input_from_a_pipe(interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "POLL_NS", 0)
    read, write = os.pipe()
    sent: list[bytes] = []
    keys = ConsoleInput(read, interrupts, sent.append)
    keys.pump()
    assert sent == []
    os.write(write, b"ls\n\x1d no newline")
    assert keys.wait(None) < 10**9
    keys.pump()
    os.close(write)
    keys.pump()
    # Ctrl-] is for terminals; the end is Ctrl-D at the beginning of a line, once a second.
    assert sent == [b"ls\n\x1d no newline", b"\n\x04"]
    second = 10**9
    for ns, passed in ((400_000_000, 400_000_000), (None, second), (300_000_000, 300_000_000), (5 * second, second)):
        assert keys.wait(ns) == passed
    assert sent[2:] == [b"\x04", b"\x04"]
    keys.pump()
    os.close(read)


def test_input_from_a_terminal(interrupts: Interrupts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "POLL_NS", 0)
    master, slave = pty.openpty()
    sent: list[bytes] = []
    keys = ConsoleInput(slave, interrupts, sent.append)
    before = termios.tcgetattr(slave)
    with raw_terminal(slave):
        os.write(master, b"\x03\x04\r")
        keys.wait(10**9)
        keys.pump()
        os.write(master, b"last\x1dnever")
        keys.wait(10**9)
        with pytest.raises(Left):
            keys.pump()
    assert sent == [b"\x03\x04\r", b"last"]
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_raw_terminal_is_restored_after_an_error() -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with pytest.raises(Interrupted), raw_terminal(slave):  # noqa: PT012
        assert termios.tcgetattr(slave) != before
        raise Interrupted(15)
    assert termios.tcgetattr(slave) == before
    os.close(slave)
    os.close(master)


def test_status_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr("pvirq.cli.messages.time.monotonic", lambda: clock[0])
    say = Messages()
    say.begin("booting")
    clock[0] += 5
    say.tick()
    assert capsys.readouterr().err == ""  # no terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    say.begin("booting")
    for step in (0.5, 0.6, 0.1, 1.2):
        clock[0] += step
        say.tick()
    say.note("done")
    assert capsys.readouterr().err == "\r\x1b[Kbooting ... 1 s\r\x1b[Kbooting ... 2 s\r\x1b[Kpvirq: done\n"
    quiet = Messages(quiet=True)
    quiet.begin("booting")
    clock[0] += 5
    quiet.tick()
    quiet.note("not said")
    quiet.error("said")
    assert capsys.readouterr().err == "pvirq: said\n"

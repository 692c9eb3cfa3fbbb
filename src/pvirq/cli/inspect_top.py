"""`pvirq top`: interrupts live, in the terminal. `watch(source)` is the same for a program."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from pvirq.cli.terminal import Interrupts
    from pvirq.inspect.sources import Source
    from pvirq.inspect.topview import Shown, TopView

EPILOG: Final = """\b
Keys: q quit, v lines/devices/vCPUs, s sort, r reverse, / filter, z hide idle lines, p pause, m mark (count from here),
arrows scroll, + and - interval, h help.

\b
Exit status:
  0     left, or shown to the end
  2     bad input
  130   Ctrl-C
"""
ESCAPES: Final = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\x1b[5~": "pageup", "\x1b[6~": "pagedown",
    "\x1b[H": "home", "\x1b[F": "end", "\x1b[1~": "home", "\x1b[4~": "end",
}  # fmt: skip
SINGLE: Final = {"\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", "\x1b": "escape"}
LOOK_S: Final = 0.25  # how soon a terminal's new size is seen


@click.command(epilog=EPILOG, short_help="Watch interrupts live, by line, device and vCPU.")
@click.argument("files", nargs=-1, metavar="[FILE]...", type=click.Path())
@click.option("--seconds", type=click.FloatRange(0.1, 3600), default=1.0, metavar="N", help="Interval. Default: 1.")
@click.option(
    "--sort", type=click.Choice(["rate", "total", "irq", "name", "cpu"]), default="rate", help="Default: rate."
)
@click.option("--view", type=click.Choice(["lines", "devices", "vcpus"]), default="lines", help="Default: lines.")
@click.option("--filter", "text", default="", metavar="TEXT", help="Show only lines with this text.")
@click.option("--no-tools", is_flag=True, help="Running machine: don't ask lsevtchn, xl and xenstore-ls.")
@click.option("--model", metavar="SCENARIO", help="Run a scenario of pvirq model and watch its domains.")
@click.option("--once", is_flag=True, help="Print one screen as text, after one interval, and end.")
def top(
    files: tuple[str, ...],
    seconds: float,
    sort: str,
    view: str,
    text: str,
    no_tools: bool,
    model: str | None,
    once: bool,
) -> int:
    """Show the rates of all interrupt lines: by vCPU, by device, sorted, with a sparkline, affinity and the domain at
    the other end.

    Without FILE it is the running machine. Each FILE is a captured state (a file with /proc/interrupts, or a
    directory), and they are shown one after the other, --seconds apart; files without a table (lsevtchn, xenstore-ls)
    say what belongs to what in all of them.
    """
    from pvirq.inspect.sources import LiveSource, ReplaySource

    if not once and not sys.stdout.isatty():
        raise click.UsageError("needs a terminal on stdout; --once prints one screen")
    if model is not None:
        if files:
            raise click.UsageError("--model and FILE don't go together")
        return _top_model(model, seconds, sort, view, text, once)
    source: Source = ReplaySource(files, seconds) if files else LiveSource(tools=not no_tools)
    title = f"{len(files)} files" if files else os.uname().nodename
    return _run(source, title, seconds, sort, view, text, once)


def _top_model(name: str, seconds: float, sort: str, view: str, text: str, once: bool) -> int:
    """A scenario, which goes on by `seconds` of its own time for each screen."""
    from pvirq.inspect.sources import HostSource
    from pvirq.scenario.load import load
    from pvirq.scenario.run import Run

    with Run(load(name, [])) as run:
        run.connect()
        run.start()
        host = run.host

        def advance() -> bool:
            return not run.run(host.clock.now() + int(seconds * 1e9))

        source = HostSource(host, advance)
        return _run(source, name, seconds, sort, view, text, once)


def _run(source: Source, title: str, seconds: float, sort: str, view: str, text: str, once: bool) -> int:
    from pvirq.inspect.rates import Rates
    from pvirq.inspect.topview import TopView

    state = TopView(Rates(), title)
    state.seconds, state.sort, state.view, state.filter = seconds, sort, view, text
    if once:
        return _once(source, state)
    return watch(source, state)


def _once(source: Source, state: TopView) -> int:
    """Two snapshots of what is live, or all that was captured; then a screen as text."""
    import shutil

    from pvirq.inspect.sources import LiveSource

    for i in range(2 if source.live else 1 << 30):
        if i and isinstance(source, LiveSource):
            time.sleep(state.seconds)
        snapshot = source.next()
        if snapshot is None:
            break
        state.rates.take(snapshot)
    size = shutil.get_terminal_size((80, 24))
    lines = state.screen(size.columns, 1 << 16 if not sys.stdout.isatty() else size.lines)
    while lines and not lines[-2].text:
        del lines[-2]
    click.echo("\n".join(line.text.rstrip() for line in lines[:-1]))
    return 0


# -- the terminal ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _keys(fd: int) -> Iterator[None]:
    """A terminal that hands on each key at once, without showing it; signals work. As before afterwards."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSADRAIN)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


def split_keys(text: str) -> list[str]:
    """What was typed as keys; a sequence that isn't known is none."""
    keys = []
    while text:
        if text[0] == "\x1b" and len(text) > 1 and text[1] in "[O":
            end = next((i for i in range(2, len(text)) if text[i].isalpha() or text[i] == "~"), len(text) - 1)
            sequence, text = text[: end + 1], text[end + 1 :]
            if sequence in ESCAPES:
                keys.append(ESCAPES[sequence])
            continue
        keys.append(SINGLE.get(text[0], text[0]))
        text = text[1:]
    return keys


def watch(source: Source, state: TopView | None = None) -> int:
    """Show a source in the terminal until it is left (0) or a signal comes (128 + its number).

    Keys come from standard input, or from the process's terminal where that is a file. The terminal is as before
    afterwards, whatever happens, and while the process is stopped (Ctrl-Z). InspectError: the source can't be read.
    """
    from rich.console import Console
    from rich.live import Live

    from pvirq.cli.terminal import Interrupted, Interrupts
    from pvirq.inspect.rates import Rates
    from pvirq.inspect.topview import TopView

    view = state or TopView(Rates())
    console = Console(highlight=False)
    _take(source, view)
    live = Live(console=console, auto_refresh=False, screen=True)
    with Interrupts() as interrupts, _key_file() as fd, _suspended_on_stop(live, fd), _keys(fd):
        try:
            live.start()
            _loop(source, view, live, console, interrupts, fd)
        except Interrupted as interrupted:
            return interrupted.status
        finally:
            live.stop()
    return 0


@contextlib.contextmanager
def _key_file() -> Iterator[int]:
    """Where keys come from: standard input where it is a terminal, else the terminal that the process belongs to."""
    if os.isatty(0):
        yield 0
        return
    try:
        fd = os.open("/dev/tty", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # there is none: only signals end it
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _suspended_on_stop(live: Live, fd: int) -> Iterator[None]:
    """While in use, SIGTSTP puts the terminal in order before the process stops, and goes on where it was."""
    if threading.current_thread() is not threading.main_thread() or not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)

    def stop(_signum: int, _frame: FrameType | None) -> None:
        ours = termios.tcgetattr(fd)
        live.stop()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        os.kill(os.getpid(), signal.SIGSTOP)
        # Here again when the shell says so.
        termios.tcsetattr(fd, termios.TCSADRAIN, ours)
        live.start(refresh=True)

    old = signal.signal(signal.SIGTSTP, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTSTP, old)


def _take(source: Source, view: TopView) -> None:
    snapshot = source.next()
    if snapshot is None:
        view.ended = True
    else:
        view.rates.take(snapshot)


def _loop(source: Source, view: TopView, live: Live, console: Console, interrupts: Interrupts, fd: int) -> None:
    from rich.console import ConsoleDimensions

    from pvirq.cli.terminal import terminal_size

    due = time.monotonic() + view.seconds
    size: tuple[int, int] | None = None
    changed = True
    reading = True
    while not view.quit:
        # rich would believe COLUMNS and LINES, which stay as they were when the window changes.
        now_size = terminal_size(sys.stdout.fileno()) or console.size
        if now_size != size or changed:
            size, changed = now_size, False
            console.size = ConsoleDimensions(*size)
            live.update(picture(view.screen(*size)), refresh=True)
        now = time.monotonic()
        if now >= due:
            due = max(due + view.seconds, now)
            if not view.paused and not view.ended:
                _take(source, view)
                changed = True
            continue
        interrupts.wait(int(min(due - now, LOOK_S) * 1e9), *([fd] if reading else []))
        interrupts.check()
        typed = _typed(fd) if reading else None
        if typed is None:
            reading = False  # the end of the input: only signals end it now
        for key in split_keys(typed or ""):
            view.key(key)
            changed = True


def _typed(fd: int) -> str | None:
    """What there is to read; None at the end of the input."""
    import select

    if not select.select([fd], [], [], 0)[0]:
        return ""
    try:
        data = os.read(fd, 1024)
    except OSError:
        return None
    return data.decode("utf-8", "replace") if data else None


STYLES: Final = {"head": "underline", "bold": "bold", "dim": "dim", "reverse": "reverse", "": ""}


def picture(lines: list[Shown]) -> Text:
    """A screen for rich."""
    from rich.text import Text

    text = Text(no_wrap=True, overflow="crop", end="")
    for i, line in enumerate(lines):
        text.append(line.text + ("\n" if i < len(lines) - 1 else ""), style=STYLES[line.style])
    return text

"""The user's side of a guest's console: signals, the raw terminal, and waiting in real time."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Final

LEAVE: Final = 0x1D  # Ctrl-]
END_OF_FILE: Final = b"\x04"  # Ctrl-D
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
READ_SIZE: Final = 4096
# Input is looked at this often while the guest works.
POLL_NS: Final = 10_000_000
# How long a guest may sleep behind the end of the input before it is told again.
END_AGAIN_NS: Final = 1_000_000_000


class Interrupted(BaseException):
    """The user, or whoever sent the signal, wants us gone."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
        self.status = 128 + signum  # as a shell has it


class Left(BaseException):
    """The user left the console."""


class OutputClosed(BaseException):
    """Whoever read our standard output has enough."""


class Interrupts:
    """While in use: SIGINT, SIGTERM and SIGHUP end the session at its next turn, with the terminal put in order.

    An exception raised anywhere by the interpreter's own handler could be lost in a callback of the engine's. A
    second signal raises at once all the same. The handlers there were come back in the end.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        self.wakeup, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                # A shell that starts us in the background has SIGINT ignored, nohup SIGHUP.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._before[signum] = signal.signal(signum, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self.wakeup)
        os.close(self._write)

    def _received(self, signum: int, _frame: FrameType | None) -> None:
        if self._signum is not None:
            raise Interrupted(signum)
        self._signum = signum
        with contextlib.suppress(OSError):
            os.write(self._write, b"!")

    def check(self) -> None:
        """Raise Interrupted if there was a signal."""
        if self._signum is not None:
            raise Interrupted(self._signum)

    def wait(self, ns: int | None, *also: int) -> int:
        """Sleep for `ns` (None: for ever), until a signal, or until one of the descriptors `also` can be read.

        Returns the ns that passed, at most `ns`.
        """
        began = time.monotonic_ns()
        select.select([self.wakeup, *also], [], [], None if ns is None else ns / 1e9)
        passed = time.monotonic_ns() - began
        return passed if ns is None else min(passed, ns)


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """A terminal that hands on every key and changes nothing; as before afterwards. Other files are left alone."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSADRAIN)
        yield
    finally:
        # Keys typed ahead were meant for the guest.
        termios.tcsetattr(fd, termios.TCSAFLUSH, before)


class Newlines:
    """A guest's terminal output for anything but a raw terminal: its CR LF become LF, also across pieces."""

    def __init__(self, write: Callable[[bytes], None]) -> None:
        self._write = write
        self._held = b""

    def feed(self, data: bytes) -> None:
        data = self._held + data
        self._held = b"\r" if data.endswith(b"\r") else b""
        self._write(data.removesuffix(b"\r").replace(b"\r\n", b"\n"))


def terminal_size(fd: int) -> os.terminal_size | None:
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return None
    return size if size.lines and size.columns else None


class ConsoleInput:
    """stdin, typed at a guest: `pump` for every turn of the host, `wait` for its `idle`.

    From a terminal, Ctrl-] leaves. From a file or pipe, its end becomes Ctrl-D, again and again while the guest
    sleeps: the first may have gone to a command instead of the shell. From then on time jumps.
    """

    def __init__(
        self,
        fd: int,
        interrupts: Interrupts,
        send: Callable[[bytes], None],
        outside: Callable[[], list[int]] = list,
    ) -> None:
        """`outside` has the descriptors that the guest may wait for besides (`pvirq.net.outside`)."""
        self._fd = fd
        self._outside = outside
        self._terminal = os.isatty(fd)
        self._interrupts = interrupts
        self._send = send
        self._next_look = 0
        self._last = b"\n"
        self._ended = False
        self._slept = 0

    def pump(self) -> None:
        """Send what there is to read, without waiting; Left once the user leaves."""
        now = time.monotonic_ns()
        if self._ended or now < self._next_look:
            return
        self._next_look = now + POLL_NS
        if not select.select([self._fd], [], [], 0)[0]:
            return
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return
        except OSError:  # the terminal is gone
            data = b""
        if self._terminal and (not data or LEAVE in data):
            self._send(data.partition(bytes([LEAVE]))[0])
            raise Left
        if data:
            self._last = data[-1:]
            self._send(data)
        else:
            self._ended = True
            self._send((b"" if self._last == b"\n" else b"\n") + END_OF_FILE)

    def wait(self, ns: int | None) -> int:
        """Sleep until the guest's next timer or input; returns the ns that passed."""
        if not self._ended:
            passed = self._interrupts.wait(ns, self._fd, *self._outside())
            self._next_look = 0
            return passed
        ns = END_AGAIN_NS if ns is None else min(ns, END_AGAIN_NS)
        if (outside := self._outside()) and (passed := self._interrupts.wait(ns, *outside)) < ns:
            return passed
        self._slept += ns
        if self._slept >= END_AGAIN_NS:
            self._slept = 0
            self._send(END_OF_FILE)
        return ns

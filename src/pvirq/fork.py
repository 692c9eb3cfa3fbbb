"""A function run in a copy of this process: what it changes, nobody else sees.

A copy costs some milliseconds however much memory a host has, since the pages are shared until they are written
(fork(2)); and it is exact, as nothing had to be put into words: a modelled kernel's threads, translated code and all.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import os
import pickle
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, Generic, NoReturn, TypeVar

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1


class ForkError(Exception):
    """A copy can't be made, or ended without a result. One line."""


class ForkTimeout(ForkError):
    """A copy has taken too long."""


class Fork(Generic[T]):
    """A function that runs in a copy of this process. Made by `fork`; it ends with this process at the latest."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = pipe
        self._data = bytearray()
        self._message: tuple[bool, Any, str] | None = None
        self._ended = False

    def done(self) -> bool:
        """It has ended; `result` doesn't wait."""
        return self._read(0)

    def result(self, timeout: float | None = None) -> T:
        """What the function returned; what it raised is raised here, with its traceback as the cause.

        Waits for it, `timeout` seconds of real time at most: ForkTimeout, and it goes on. ForkError where it ended
        otherwise, or its result can't be sent (pickle).
        """
        try:
            if not self._read(timeout):
                raise ForkTimeout(f"process {self.pid} hasn't ended after {timeout:g} s")
        except KeyboardInterrupt:
            self.kill()
            raise
        if self._message is None:
            raise ForkError(f"process {self.pid} ended without a result ({self._status})")
        fine, value, text = self._message
        if fine:
            return value  # type: ignore[no-any-return]
        if text:
            value.__cause__ = _Remote(text)
        raise value

    def kill(self) -> None:
        """End it at once; idempotent."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._read(None)

    def fileno(self) -> int:
        """Readable when something of its result has come: for select."""
        return self._pipe

    def _read(self, timeout: float | None) -> bool:
        end = None if timeout is None else time.monotonic() + timeout
        while not self._ended:
            left = None if end is None else max(end - time.monotonic(), 0)
            if not select.select([self._pipe], [], [], left)[0]:
                return False
            data = os.read(self._pipe, 1 << 20)
            self._data += data
            if not data:
                self._ended = True
                os.close(self._pipe)
                _, status = os.waitpid(self.pid, 0)
                code = os.waitstatus_to_exitcode(status)
                self._status = f"signal {-code}" if code < 0 else f"exit status {code}"
                with contextlib.suppress(Exception):  # cut off
                    self._message = pickle.loads(self._data)
        return True

    def __enter__(self) -> Fork[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Remote(Exception):
    """Where an exception came from in the other process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def fork(function: Callable[[], T], prepare: Callable[[], object] = lambda: None) -> Fork[T]:
    """Run `function` in a copy of this process, after `prepare`. OSError where there can't be another process.

    Of several threads only the one that calls this goes on in the copy.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    receive, send = os.pipe()
    parent = os.getpid()
    gc.freeze()  # or the copy's first collection would write to, and so copy, each object there is
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads hold nothing of ours
            pid = os.fork()
    except BaseException:
        os.close(receive)
        os.close(send)
        raise
    if pid == 0:
        os.close(receive)
        _be_copy(function, prepare, send, parent)
    gc.unfreeze()
    os.close(send)
    return Fork(pid, receive)


def _be_copy(function: Callable[[], T], prepare: Callable[[], object], send: int, parent: int) -> NoReturn:
    """The copy's whole life. It doesn't return, for what the caller would do next is the original's business."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        message: tuple[bool, Any, str]
        try:
            prepare()
            message = True, function(), ""
        except BaseException as error:
            message = False, error, "".join(traceback.format_exception(error))
        _send(send, message)
        status = 0
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)


def _send(pipe: int, message: tuple[bool, Any, str]) -> None:
    try:
        data = pickle.dumps(message)
        pickle.loads(data)  # some exceptions can be written and not read
    except Exception as error:
        fine, value, text = message
        what = "its result" if fine else f"{type(value).__name__}: {value}"
        data = pickle.dumps((False, ForkError(f"{what} can't be sent from a fork: {error}"), text))
    with io.FileIO(pipe, "wb") as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view) or 0 :]

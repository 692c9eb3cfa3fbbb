"""Ending a run at a point in time, without signals: a thread sleeps on a timerfd and calls the engine's native stop.

Arming is one system call and needs neither the interpreter lock nor a wake-up of the thread, which matters because
a guest re-arms its timer thousands of times a second. The thread works from any thread of a program and leaves no
process-wide handler behind.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.timerfd_settime.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


class Alarm:
    """Calls `action` from a thread of its own once `after` nanoseconds have passed since the last `arm`."""

    def __init__(self, action: Callable[[], object]) -> None:
        self._fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, 0o2000000)  # TFD_CLOEXEC
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._spec = (ctypes.c_int64 * 4)()  # struct itimerspec: interval s, ns; value s, ns
        self._spec_at = ctypes.addressof(self._spec)
        self._action = action
        self._closed = False
        self._thread = threading.Thread(target=self._wait, name="pvirq-alarm", daemon=True)
        self._thread.start()

    def arm(self, after: int) -> None:
        """Fire in `after` ns, and then every millisecond until disarmed: a stop that came too early is repeated."""
        after = max(after, 1000)
        self._spec[1] = 1_000_000
        self._spec[2], self._spec[3] = divmod(after, 1_000_000_000)
        _libc.timerfd_settime(self._fd, 0, self._spec_at, None)

    def disarm(self) -> None:
        self._spec[1] = self._spec[2] = self._spec[3] = 0
        _libc.timerfd_settime(self._fd, 0, self._spec_at, None)

    def close(self) -> None:
        """After this `action` is never called again."""
        if not self._closed:
            self._closed = True
            self.arm(0)
            self._thread.join()
            os.close(self._fd)

    def _wait(self) -> None:
        while True:
            struct.unpack("Q", os.read(self._fd, 8))
            if self._closed:
                return
            self._action()

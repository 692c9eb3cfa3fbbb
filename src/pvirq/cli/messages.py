"""What pvirq itself says, all of it on stderr: "pvirq: ..." lines, and a status line where stderr is a terminal."""

from __future__ import annotations

import sys
import time
from typing import Final

# What takes less than this is not worth a status line, and how often one changes.
STATUS_S: Final = 1.0
CLEAR_LINE: Final = "\r\x1b[K"


class Messages:
    """Notes (which `quiet` leaves out), errors, and the status line."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._status = ""
        self._since = 0.0
        self._next = float("inf")
        self._shown = False

    def note(self, text: str) -> None:
        """Something worth knowing."""
        if not self.quiet:
            self.error(text)

    def error(self, text: str) -> None:
        """Something that has to be known."""
        self.clear()
        _write(f"pvirq: {text}\n")

    def text(self, text: str) -> None:
        """A text of several lines, as it is."""
        self.clear()
        _write(text)

    def begin(self, status: str) -> None:
        """From now on `tick` shows "status ... n s" once that has taken a second."""
        self.clear()
        self._status = status
        self._since = time.monotonic()
        wanted = not self.quiet and sys.stderr.isatty()
        self._next = self._since + STATUS_S if wanted else float("inf")

    def tick(self, how_far: str = "") -> None:
        """Bring the status line up to date, with `how_far` it got; cheap enough for every turn of a loop."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + STATUS_S
            self._shown = True
            _write(f"{CLEAR_LINE}{self._status} ... {how_far}{now - self._since:.0f} s")

    def end(self) -> None:
        """No status line any more."""
        self.clear()
        self._next = float("inf")

    def clear(self) -> None:
        """Take the status line away, until it changes again: other output comes."""
        if self._shown:
            self._shown = False
            _write(CLEAR_LINE)


def _write(text: str) -> None:
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:  # nobody listens
        pass

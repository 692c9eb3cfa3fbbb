"""Is a run the one that was recorded? Its events are compared with a trace's as they come, to the first difference.

with Host(seed=7) as host, Recorded("run.jsonl") as recorded, Trace(host, against=recorded) as trace:
    ...                         # the same program as then
recorded.finish()
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Final

CONTEXT: Final = 5  # lines in front of a difference that are shown with it


class RecordedError(Exception):
    """A file is no trace. One line."""


class Different(Exception):
    """A run isn't the one that was recorded.

    `line` is the number in the file of the first event that differs, `recorded` and `now` are the events as they stand
    in a trace's lines, "" for none, and `before` those in front of them.
    """

    def __init__(self, path: Path, line: int, recorded: str, now: str, before: list[str]) -> None:
        self.path, self.line, self.recorded, self.now, self.before = path, line, recorded, now, before
        super().__init__(f"{path}:{line}: the run differs from the recorded one")

    def report(self) -> str:
        """Several lines: what stood in front, and both events."""
        lines = [f"{self.path}:{self.line}: the run differs from the recorded one"]
        lines += [f"    {event}" for event in self.before]
        lines += [f"  - {self.recorded or 'the recorded run ends here'}", f"  + {self.now or 'the run ends here'}"]
        return "\n".join(lines)


class Recorded:
    """A trace in a file, for `Trace(host, against=...)`. `header` is its first line."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """RecordedError for what is no trace, OSError."""
        self.path = Path(path)
        self.line = 1  # so many have been compared
        self._over = False
        self._before: deque[str] = deque(maxlen=CONTEXT)
        self._file = self.path.open("rb")
        try:
            self.header: dict[str, Any] = json.loads(self._file.readline())
            if self.header["pvirq"] != "trace" or self.header["version"] != 1:
                raise ValueError("another version")
        except (ValueError, KeyError, TypeError) as error:
            self._file.close()
            raise RecordedError(f"{self.path}: not a trace that this pvirq knows: {error}") from None

    def check_inputs(self, digests: Mapping[str, str]) -> None:
        """The run has what the recorded one had; sha256 by name. RecordedError."""
        recorded = self.header.get("inputs")
        for name, digest in digests.items():
            if isinstance(recorded, dict) and recorded.get(name, digest) != digest:
                raise RecordedError(f"{self.path}: recorded with another {name} (sha256 {recorded[name]})")

    def compare(self, lines: list[str]) -> None:
        """These are the next events. Different, at the first that isn't; nothing is compared after that."""
        if self._over:
            return
        expected = [line.decode("utf-8", "replace") for line in islice(self._file, len(lines))]
        if expected != lines:
            for number, now in enumerate(lines):
                then = expected[number] if number < len(expected) else ""
                if then != now:
                    self._before.extend(lines[max(number - CONTEXT, 0) : number])
                    self._differ(self.line + number + 1, then, now)
        self.line += len(lines)
        self._before.extend(lines[-CONTEXT:])

    def finish(self) -> None:
        """The run has ended. Different, if the recorded one went on."""
        if self._over:
            return
        then = self._file.readline().decode("utf-8", "replace")
        if then:
            self._differ(self.line + 1, then, "")

    def _differ(self, line: int, recorded: str, now: str) -> None:
        self._over = True
        before = [event.rstrip("\n") for event in self._before]
        raise Different(self.path, line, recorded.rstrip("\n"), now.rstrip("\n"), before)

    def close(self) -> None:
        """Close the file; idempotent."""
        self._file.close()

    def __enter__(self) -> Recorded:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

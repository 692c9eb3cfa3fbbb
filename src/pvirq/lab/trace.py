"""Traces: every event of a host from its cause to its effect, in virtual time.

with Host() as host, Trace(host, "boot.jsonl") as trace:
    guest = host.boot("vmlinuz", initrd=initrd)
    guest.wait()
print(trace.hash())

docs/lab-trace.md has the file's format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from pvirq.lab.lines import Event, about, binding, encode
from pvirq.lab.recorder import HOOKS, Recorder, describe

if TYPE_CHECKING:
    from typing import BinaryIO

    from pvirq.host import Host
    from pvirq.lab.replay import Recorded

VERSION: Final = 1
KINDS: Final = frozenset(HOOKS)


class Trace:
    """What happens on a host from now until `close`.

    Without a file the events are kept in memory. `kinds` are those that are wanted, as they stand in the file; what
    isn't costs nothing. "raise" and "irq" are what flows are made of. Notes are in every trace: marks, faults, choices,
    inputs.

    In a fork of the host (`Host.fork`) it goes on in memory, with what it has until then; the file is the original's.
    """

    def __init__(
        self, host: Host, path: str | os.PathLike[str] | None = None, kinds: Collection[str] = KINDS, *,
        header: Mapping[str, Any] | None = None, against: Recorded | None = None,
    ) -> None:  # fmt: skip
        """`header` is what the file's first line is to say besides; events are compared with those `against` has, and
        the first that differs ends the run with `Different`.

        ValueError for a kind that there isn't, OSError for a file that can't be written.
        """
        if unknown := set(kinds) - KINDS:
            raise ValueError(f"no such kind of event: {', '.join(sorted(unknown))}")
        self.host = host
        self.path = None if path is None else Path(path)
        self._hypervisor = hypervisor = host.hypervisor
        start = hypervisor.clock.now()
        self._recorder = Recorder(hypervisor, kinds, self.flush)
        self._kept: list[str] = []  # lines, many in one string
        self._parsed: list[Event] = []  # the events of those that were in `_kept`
        self._hash = hashlib.sha256()
        self._against = against
        self._file: BinaryIO | None = None if self.path is None else self.path.open("wb")
        self._written = 0
        self._recorder.begin()  # which shows how much there is to be seen of each guest
        self._open = True
        host.on_fork.append(self._forked)
        domains = [hypervisor.domains[domid] for domid in sorted(hypervisor.domains)]
        self.header: dict[str, Any] = {
            "pvirq": "trace", "version": VERSION, "seed": host.seed, "start": start,
            "domains": [about(domain) for domain in domains], **(header or {}),
        }  # fmt: skip
        self._write(encode(self.header).encode() + b"\n")
        if "bind" in kinds:
            self._take(
                "".join(
                    binding(start, domain.domid, channel.port, describe(channel))
                    for domain in domains
                    for channel in domain.evtchn
                    if channel.usable
                )
            )

    def mark(self, text: str) -> None:
        """Put a line of one's own into the trace."""
        self._hypervisor.probes.note("mark", text=text)

    def flush(self) -> None:
        """Make events of what was recorded, and write them to the file, if there is one."""
        if self._recorder.unwritten:
            self._take(self._recorder.take())

    def _take(self, text: str) -> None:
        raw = text.encode()
        self._hash.update(raw)
        if self._against is not None:
            self._against.compare(text.splitlines(keepends=True))
        if self._file is None:
            self._kept.append(text)
        else:
            self._write(raw)

    def _write(self, raw: bytes) -> None:
        """Nothing is left in a buffer: a fork would have it too."""
        if self._file is not None:
            self._written += self._file.write(raw)
            self._file.flush()

    def _forked(self) -> None:
        self._against = None
        if self.path is not None and self._open:
            with self.path.open("rb") as file:
                self._kept = [file.read(self._written).decode().partition("\n")[2]]
            self._file = self.path = None

    def close(self) -> None:
        """End it; idempotent. The host may be closed by then."""
        if self._open:
            self._open = False
            self.host.on_fork.remove(self._forked)
            self._recorder.end()
            self.flush()
            if self._file is not None:
                self._file.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looking at it -------------------------------------------------------------------------------------------------

    @property
    def events(self) -> list[Event]:
        """All events until now, with the keys that they have in the file; without a file, always the same objects."""
        self.flush()
        if self.path is None:
            for text in self._kept:
                self._parsed += map(json.loads, text.splitlines())
            self._kept.clear()
            return self._parsed
        with self.path.open(encoding="ascii") as file:
            next(file)
            return [json.loads(line) for line in file]

    def where(self, **wanted: object) -> list[Event]:
        """The events that have these values: `where(k="irq", ph="B", d=1)`."""
        return [event for event in self.events if all(event.get(key) == value for key, value in wanted.items())]

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def hash(self) -> str:
        """SHA-256 over the lines of all events until now: the same for two runs that were the same."""
        self.flush()
        return self._hash.hexdigest()

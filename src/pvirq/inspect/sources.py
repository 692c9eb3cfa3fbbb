"""Where `pvirq top` has its snapshots from: the running machine, captured files, or one of pvirq's own hosts."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from pvirq.inspect.live import ask_tools, live
from pvirq.inspect.model import Snapshot
from pvirq.inspect.read import Reader, read_files
from pvirq.inspect.source import InspectError

SLOW_S: Final = 10.0  # how often what costs more than /proc/interrupts is looked at


class Source(Protocol):
    """Yields snapshots of one machine. `live`: time passes by itself, so that there is always another one."""

    live: bool

    def next(self) -> Snapshot | None:
        """The next snapshot; None at the end."""
        ...


class LiveSource:
    """The running machine. Affinities, counters and Xen's tools are asked every SLOW_S."""

    live = True

    def __init__(self, root: str = "/", *, tools: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._root = root
        self._tools = tools
        self._clock = clock
        self._slow: Snapshot | None = None
        self._slow_at = 0.0

    def next(self) -> Snapshot:
        """The machine as it is. InspectError: it has no /proc/interrupts."""
        now = self._clock()
        if self._slow is None or now - self._slow_at >= SLOW_S:
            self._slow_at = now
            self._slow = live(root=self._root, tools=False, spurious=False)
            if self._tools:
                reader = Reader()
                ask_tools(reader)
                asked = reader.snapshot()
                kept = {each: getattr(asked, each) for each in ("channels", "xl_domains", "xl_vcpus", "store")}
                self._slow = dataclasses.replace(self._slow, **kept)
            return self._slow
        fast = live(root=self._root, tools=False, affinity=False)
        return dataclasses.replace(self._slow, seconds=fast.seconds, interrupts=fast.interrupts, unread=fast.unread)


class ReplaySource:
    """Captured files, one snapshot each, or each table of a single file; `seconds` lie between them.

    A directory is one snapshot of all its files. What has no table of its own (ports, xenstore) is of all snapshots.
    InspectError: a file can't be read, or there is no table.
    """

    live = False

    def __init__(self, paths: Sequence[str | os.PathLike[str]], seconds: float = 1.0) -> None:
        shots = [read_files([path]) for path in paths]
        common = [shot for shot in shots if not shot.interrupts]
        tables = [shot for shot in shots if shot.interrupts]
        if not tables:
            raise InspectError(f"no /proc/interrupts in {', '.join(str(path) for path in paths)}")
        if len(tables) == 1:
            by_owner: dict[str, int] = {}
            apart: list[list[int]] = []
            for i, table in enumerate(tables[0].interrupts):
                nth = by_owner.get(table.hint, 0)
                by_owner[table.hint] = nth + 1
                if nth == len(apart):
                    apart.append([])
                apart[nth].append(i)
            only = tables[0]
            tables = [dataclasses.replace(only, interrupts=tuple(only.interrupts[i] for i in each)) for each in apart]
        merged = {
            each: tuple(item for shot in common for item in getattr(shot, each))
            for each in ("channels", "xl_domains", "xl_vcpus", "store", "irq_files", "counters", "domains")
        }
        self._shots = [
            dataclasses.replace(
                shot, seconds=i * seconds, **{each: merged[each] + getattr(shot, each) for each in merged}
            )
            for i, shot in enumerate(tables)
        ]
        self._at = 0

    def next(self) -> Snapshot | None:
        """The next captured state."""
        if self._at == len(self._shots):
            return None
        self._at += 1
        return self._shots[self._at - 1]


class PrintsInterrupts(Protocol):
    """A kernel or a guest."""

    def proc_interrupts(self) -> str: ...


class RunningHost(Protocol):
    """As much of a `pvirq.Host` as is looked at."""

    @property
    def dom0(self) -> PrintsInterrupts: ...
    @property
    def modelled(self) -> Sequence[Any]: ...
    @property
    def clock(self) -> Any: ...
    @property
    def store(self) -> Any: ...
    def lsevtchn(self, domid: int) -> str: ...


class HostSource:
    """One of pvirq's hosts, between two of its runs: domain 0's and modelled guests' tables, ports, and xenstore.

    `advance` lets the host go on for as long as one screen is to stand for, and says whether there is more to come;
    time is the host's.

        watch(HostSource(host, lambda: host.run(lambda: False, timeout_ns=10**9) or True))
    """

    live = True

    def __init__(self, host: RunningHost, advance: Callable[[], bool]) -> None:
        self._host = host
        self._advance = advance
        self._begun = False
        self._more = True

    def next(self) -> Snapshot | None:
        """Let it run, then look. None: its work is done, and this has been seen."""
        if self._begun:
            if not self._more:
                return None
            self._more = self._advance()
        self._begun = True
        host, reader = self._host, Reader()
        domains = [(0, "Domain-0", host.dom0), *((g.domain.domid, g.name, g) for g in host.modelled)]
        for domid, name, kernel in domains:
            reader.text(kernel.proc_interrupts(), f"{name}: /proc/interrupts", hint=str(domid))
            reader.text(host.lsevtchn(domid), f"lsevtchn {domid}", hint=str(domid))
        reader.text("\n".join(host.store.dump()), "xenstore-ls -f")
        return reader.snapshot("host", host.clock.now() / 1e9)

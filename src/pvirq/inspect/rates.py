"""Snapshots become rates: what each line did in the last interval, how that went on, and since a mark."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

from pvirq.inspect.join import join
from pvirq.inspect.model import Counts, Interrupts, IrqRow, Snapshot
from pvirq.inspect.picture import DomainView, Link, Picture

HISTORY: Final = 240
# Rows that count what other rows count already, where those are there.
SUMMED: Final = frozenset(("RES", "CAL", "HYP"))
WRAP: Final = np.uint64(1 << 32)

Key: TypeAlias = tuple[int, str, str]  # domain, label, handlers


@dataclass
class LineRate:
    """A line. `rates` are interrupts a second, the last one being now; `cpus` those of each CPU of its table now."""

    key: Key
    row: IrqRow
    link: Link
    rate: float = 0.0
    delta: int = 0
    since_mark: int = 0
    busiest: int | None = None
    affinity: str = ""
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))


@dataclass
class CpuRate:
    """A vCPU of a domain: all its interrupts."""

    domid: int
    cpu: int
    rate: float = 0.0
    total: int = 0
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))


def difference(now: Counts, before: Counts) -> Counts:
    """Interrupts between two readings of counters of 32 bits, which wrap.

    A counter that fell from its lower half belongs to a line that was made anew: it counts from 0.
    """
    fell = now < before
    if not fell.any():
        return now - before
    wrapped = fell & (before >= WRAP // np.uint64(2))
    return np.where(wrapped, now + WRAP - before, np.where(fell, now, now - before)).astype(np.uint64)


class Rates:
    """Takes snapshots one after the other; `lines` and `cpus` are as of the last one.

    `interval` is the time between the last two in seconds (1 where their times aren't known), `elapsed` since the mark.
    """

    def __init__(self) -> None:
        self.lines: dict[Key, LineRate] = {}
        self.cpus: dict[tuple[int, int], CpuRate] = {}
        self.picture: Picture | None = None
        self.interval = 0.0
        self.elapsed = 0.0
        self.taken = 0
        self._before: dict[int, tuple[Interrupts, dict[tuple[str, str], IrqRow]]] = {}
        self._shape: object = None
        self._seconds: float | None = None

    def mark(self) -> None:
        """Count from here."""
        self.elapsed = 0.0
        for line in self.lines.values():
            line.since_mark = 0

    def take(self, snapshot: Snapshot) -> None:
        """The next snapshot."""
        known = snapshot.seconds is not None and self._seconds is not None
        passed = (snapshot.seconds or 0.0) - (self._seconds or 0.0) if known else 1.0
        first, self._seconds = self.taken == 0, snapshot.seconds
        self.taken += 1
        self.interval = 0.0 if first else passed
        self.elapsed += self.interval
        picture = self._join(snapshot)
        seen: dict[Key, LineRate] = {}
        cpus: dict[tuple[int, int], CpuRate] = {}
        for view in picture.domains.values():
            if view.table is not None:
                self._table(picture, view, view.table, passed if passed > 0 else 1.0, seen, cpus)
        self.lines, self.cpus, self.picture = seen, cpus, picture

    def _join(self, snapshot: Snapshot) -> Picture:
        """The picture; what is joined is taken over as long as the same lines and ports are there."""
        shape = (
            tuple(tuple((row.label, row.text) for row in table.rows) for table in snapshot.interrupts),
            tuple(table.hint for table in snapshot.interrupts), snapshot.channels, snapshot.store, snapshot.xl_domains,
        )  # fmt: skip
        if self.picture is None or shape != self._shape:
            self._shape = shape
            return join(snapshot)
        old = self.picture
        picture = Picture(snapshot, old.domains, old.complete, devices=old.devices)
        tables = iter(snapshot.interrupts)
        owners = sorted((view for view in old.domains.values() if view.table), key=lambda view: self._order(old, view))
        for view, table in zip(owners, tables, strict=False):
            view.table = table
        return picture

    @staticmethod
    def _order(picture: Picture, view: DomainView) -> int:
        """Which of a snapshot's tables a domain's is."""
        tables = picture.snapshot.interrupts
        return next((i for i, table in enumerate(tables) if table is view.table), len(tables))

    def _table(
        self, picture: Picture, view: DomainView, table: Interrupts, seconds: float, seen: dict[Key, LineRate],
        cpus: dict[tuple[int, int], CpuRate],
    ) -> None:  # fmt: skip
        old_table, old_rows = self._before.get(view.domid, (None, {}))
        same = old_table is not None and old_table.cpus == table.cpus
        links = view.by_irq
        width = len(table.cpus)
        sums, totals = np.zeros(width, np.uint64), np.zeros(width, np.uint64)
        has_ipis = any(row.flow == "ipi" for row in table.rows)
        rows: dict[tuple[str, str], IrqRow] = {}
        for row in table.rows:
            name = row.name
            rows[row.label, name] = row
            old = old_rows.get((row.label, name))
            comparable = same and old is not None and len(old.counts) == len(row.counts)
            delta = difference(row.counts, old.counts) if comparable and old is not None else np.zeros_like(row.counts)
            if len(row.counts) == width and not (row.label in SUMMED and has_ipis):
                sums += delta
                totals += row.counts
            key = (view.domid, row.label, name)
            line = self.lines.get(key)
            if line is None:
                line = LineRate(key, row, Link(view.domid, row))
            line.row = row
            line.link = links.get(row.irq, line.link) if row.irq is not None else line.link
            line.delta = int(delta.sum())
            line.rate = line.delta / seconds if comparable else 0.0
            line.since_mark += line.delta
            busy = delta if line.delta else row.counts
            whole = len(row.counts) == width and width > 0
            line.busiest = table.cpus[int(busy.argmax())] if whole and busy.any() else None
            if row.irq is not None:
                line.affinity = ",".join(map(str, picture.affinity(view.domid, row.irq)))
            line.rates.append(line.rate)
            seen[key] = line
        for i, cpu in enumerate(table.cpus):
            entry = self.cpus.get((view.domid, cpu)) or CpuRate(view.domid, cpu)
            entry.rate, entry.total = int(sums[i]) / seconds, int(totals[i])
            entry.rates.append(entry.rate)
            cpus[view.domid, cpu] = entry
        self._before[view.domid] = (table, rows)

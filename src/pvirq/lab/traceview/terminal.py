"""A timeline in a terminal: lines of text, a column for each stretch of time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from string import ascii_lowercase
from typing import Final

from rich.text import Text

from pvirq.lab.traceview.follower import BLOCKED, OFF, READY, RUNNING
from pvirq.lab.traceview.timeline import STRETCHES, Row, Timeline
from pvirq.lab.traceview.units import UNITS_NS, duration, moment

LABEL: Final = 14
MIN_COLUMNS: Final = 20
COLOURS: Final = ("green", "cyan", "yellow", "magenta", "blue", "red")
LEVELS: Final = "▁▂▃▄▅▆▇█"
ASCII_LEVELS: Final = "123456789"
NOTES: Final = 12
TICK: Final = 14  # columns between two times on the ruler, at least


def lines(timeline: Timeline, width: int = 80, *, plain: bool = False) -> Iterator[Text]:
    """The whole picture, no line wider than `width` where that is 72 or more; in ASCII if `plain`."""
    return _Picture(timeline, max(width - LABEL, MIN_COLUMNS), plain).lines()


class _Picture:
    def __init__(self, timeline: Timeline, columns: int, plain: bool) -> None:
        self._timeline = timeline
        self._columns = columns = min(columns, STRETCHES)
        self._levels = ASCII_LEVELS if plain else LEVELS
        self._blocked = "." if plain else "·"
        # The stretches of each column: as even as whole ones can be.
        self._edges = [i * STRETCHES // columns for i in range(columns + 1)]
        self._column_of = [
            column for column in range(columns) for _ in range(self._edges[column], self._edges[column + 1])
        ]
        self._letters = _letters(timeline.irq_counts())
        self._colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(self._letters)}

    def lines(self) -> Iterator[Text]:
        timeline = self._timeline
        begin, end = timeline.start - timeline.zero, timeline.stop - timeline.zero
        yield Text(f"{moment(begin)} to {moment(end)}, a column is {duration(timeline.span // self._columns)}")
        yield from self._ruler()
        domain = None
        for row in timeline.rows:
            if row.place[0] != domain:
                if domain is not None:
                    yield from self._pending(domain)
                domain = row.place[0]
                yield Text(f"{timeline.names[domain]} (domain {domain})", style="bold")
            yield from self._row(row)
        if domain is None:
            yield Text("Nothing happens in this time.")
        else:
            yield from self._pending(domain)
        yield from self._notes()
        if domain is not None:
            yield from self._legend()

    def _label(self, text: str) -> Text:
        return Text(f"{text:<{LABEL}}")

    def _ruler(self) -> Iterator[Text]:
        timeline, columns = self._timeline, self._columns
        step = _round_step(timeline.span * TICK // columns)
        unit = next((u for u in ("s", "ms", "us") if step >= UNITS_NS[u]), "ns")
        cells = [" "] * columns
        first = -(-(timeline.start - timeline.zero) // step) * step
        for t in range(first, timeline.stop - timeline.zero, step):
            at = (t + timeline.zero - timeline.start) * columns // timeline.span
            text = f"|{t // UNITS_NS[unit]}{unit}"
            if at + len(text) <= columns:
                cells[at : at + len(text)] = text
        yield self._label("").append("".join(cells), style="dim")

    def _row(self, row: Row) -> Iterator[Text]:
        v = row.place[1]
        if row.spent:
            line = self._label(f"  {v} runs")
            for cell, style in self._states(row):
                line.append(cell, style=style)
            yield line
        if row.irqs:
            yield self._counts(f"  {v} handles", row.irqs)
        if row.sent:
            yield self._counts(f"  {v} sends", row.sent)

    def _states(self, row: Row) -> Iterator[tuple[str, str]]:
        columns = {state: self._sums(row.spent.get(state, {})) for state in (RUNNING, READY, BLOCKED, OFF)}
        width = self._timeline.span / self._columns
        for i in range(self._columns):
            running, ready = columns[RUNNING][i], columns[READY][i]
            if running:
                level = min(int(running / width * len(self._levels)), len(self._levels) - 1)
                yield self._levels[level], ""
            elif ready and ready >= columns[BLOCKED][i]:
                yield "~", "yellow"
            elif columns[BLOCKED][i]:
                yield self._blocked, "dim"
            else:
                yield ("-" if columns[OFF][i] else " "), "dim"

    def _sums(self, stretches: dict[int, int]) -> list[int]:
        sums = [0] * self._columns
        for i, value in stretches.items():
            sums[self._column_of[i]] += value
        return sums

    def _counts(self, label: str, by_name: dict[str, Counter[int]]) -> Text:
        """In each column the IRQ that is there most, as a capital where it isn't alone."""
        cells: list[Counter[str]] = [Counter() for _ in range(self._columns)]
        for name, by_stretch in by_name.items():
            for i, count in by_stretch.items():
                cells[self._column_of[i]][name] += count
        line = self._label(label)
        for cell in cells:
            if not cell:
                line.append(" ")
                continue
            [(name, _)] = cell.most_common(1)
            letter = self._letters.get(name, "?")
            line.append(letter.upper() if cell.total() > 1 else letter, style=self._colours.get(name, ""))
        return line

    def _pending(self, domain: int) -> Iterator[Text]:
        most = self._timeline.pending[domain].line()
        cells = [max(most[a:b]) for a, b in zip(self._edges, self._edges[1:], strict=False)]
        if any(cells):
            text = "".join(" " if not n else str(n) if n <= 9 else "+" for n in cells)
            yield self._label("  pending").append(text, style="dim")

    def _notes(self) -> Iterator[Text]:
        timeline = self._timeline
        if not timeline.notes:
            return
        cells = [" "] * self._columns
        for note in timeline.notes:
            cells[self._column_of[timeline.stretch(note.t)]] = "!" if note.fault else "^"
        yield self._label("marks, faults").append("".join(cells), style="bold red")
        for note in timeline.notes[:NOTES]:
            text = f"  {'!' if note.fault else '^'} {moment(note.t - timeline.zero)}  {note.text}"
            yield Text(text[: LABEL + self._columns])
        if len(timeline.notes) > NOTES:
            yield Text(f"  and {len(timeline.notes) - NOTES} more")

    def _legend(self) -> Iterator[Text]:
        low, high = self._levels[0], self._levels[-1]
        yield Text(f"runs: {low} little to {high} all the time, ~ waits for a turn, {self._blocked} blocked")
        if not self._letters:
            return
        yield Text("handles, sends: the IRQ of an event, a capital where there are several")
        line = Text()
        for name, letter in self._letters.items():
            entry = f"  {letter} {name}"
            if len(line) + len(entry) > LABEL + self._columns and len(line):
                yield line
                line = Text()
            line.append(entry[: LABEL + self._columns], style=self._colours[name])
        if len(self._letters) < len(self._timeline.irq_counts()):
            line.append("  ? any other")
        yield line


def _letters(counts: Counter[str]) -> dict[str, str]:
    """A letter for each IRQ, the busiest first: of its name, if that is still free."""
    free = set(ascii_lowercase)
    letters = {}
    for name, _ in counts.most_common():
        if not free:
            break
        wanted = [c for c in name.lower() if c in free]
        letter = wanted[0] if wanted else min(free)
        free.remove(letter)
        letters[name] = letter
    return letters


def _round_step(least: int) -> int:
    """The smallest of 1, 2 and 5 times a power of ten that is no less."""
    power = 1
    while power * 10 <= least:
        power *= 10
    return next(power * times for times in (1, 2, 5, 10) if power * times >= least)

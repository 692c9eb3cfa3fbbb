"""A timeline as a picture, SVG or PNG, by matplotlib (`pip install 'pvirq[plots]'`).

A row a vCPU: below what it does (running, waiting for a turn), above its handlers, coloured by the IRQ's name. Where
there are too many to be told apart, columns say how many there were, as high as the logarithm of their number.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from pvirq.lab.traceview.follower import OFF, READY, RUNNING
from pvirq.lab.traceview.timeline import STRETCHES, Arrow, Place, Row, Timeline
from pvirq.lab.traceview.units import UNITS_NS, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES_WIDE: Final = 14.0
INCHES_A_ROW: Final = 0.42
MAX_ROWS: Final = 40
HEADED_ARROWS: Final = 200  # more are drawn as lines without heads
COLUMNS: Final = 300  # of sums; each so many stretches
LEAST: Final = 0.0012  # of the width, so that the shortest handler is seen
NOTES: Final = 20  # that have their text
MANY_NOTES: Final = 40  # more have no line through all rows
NOTE_LEVELS: Final = 5  # of texts one above the other
LETTER: Final = 0.0052  # of the width

# Told apart also by those who see no red or green (Paul Tol's "bright" and "muted").
COLOURS: Final = (
    "#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#882255", "#44AA99", "#DDCC77", "#332288",
    "#999933", "#CC6677",
)  # fmt: skip
OTHER: Final = "#999999"
STATES: Final = {READY: "#F2B134", RUNNING: "#5B6770", OFF: "#DDDDDD"}
PORTS: Final = "#B8C4CE"
FAULT: Final = "#CC3311"
MARK: Final = "#0077BB"
STYLE: Final[Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "pvirq",
    "text.parse_math": False,
}

# Within a row, which is 1 high.
STATE_HEIGHT: Final = 0.14
IRQS_FROM: Final = 0.2
IRQS_TO: Final = 0.86
PENDING_HEIGHT: Final = 0.62


class PlotError(Exception):
    """There is nothing to draw with: one line says what is missing."""


def check_plots() -> None:
    """PlotError if matplotlib isn't installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("--svg and --png need matplotlib: pip install 'pvirq[plots]'")


def plot(timeline: Timeline, path: str | os.PathLike[str], kind: str) -> None:
    """Draw into a file of `kind` "svg" or "png". PlotError without matplotlib, OSError if it can't be written."""
    check_plots()
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a name whose letters the font hasn't: it stands there as boxes
        figure = _Picture(timeline).figure
        metadata = {"Date": None} if kind == "svg" else None  # the same trace, the same file
        figure.savefig(path, format=kind, dpi=120, metadata=metadata, bbox_inches="tight", pad_inches=0.15)


class _Picture:
    def __init__(self, timeline: Timeline) -> None:
        from matplotlib.figure import Figure

        self._timeline = timeline
        rows = timeline.rows[:MAX_ROWS]
        self._unit = next((u for u in ("s", "ms", "us") if timeline.span >= UNITS_NS[u]), "ns")
        counts = timeline.irq_counts()
        names = [name for name, _ in counts.most_common(len(COLOURS))]
        self._colours = dict(zip(names, COLOURS, strict=False))
        self._others = len(counts) - len(names)
        self._rows: dict[Place, float] = {}  # the lower edge of each, with y growing downwards
        self._bands: list[tuple[int, float, float]] = []  # of domains
        self._pending: dict[int, float] = {}
        height = self._place(rows)
        self.figure = Figure(figsize=(INCHES_WIDE, 1.4 + INCHES_A_ROW * max(height, 2)))
        self._ax: Axes = self.figure.add_subplot()
        self._axes(height)
        for row in rows:
            self._states(row)
            self._irqs(row)
        for d in self._pending:
            self._ports(d)
        self._arrows()
        self._notes()
        self._legend()

    def _x(self, t: float) -> float:
        return (t - self._timeline.zero) / UNITS_NS[self._unit]

    def _place(self, rows: list[Row]) -> float:
        """Where each row is, from the top down; returns the height of all."""
        y, d, top = 0.0, None, 0.0
        for row in [*rows, None]:
            if d is not None and (row is None or row.place[0] != d):
                if any(self._timeline.pending[d].line()):
                    y += 0.9
                    self._pending[d] = y
                y += 0.1
                self._bands.append((d, top, y))
                y += 0.25
            if row is None:
                break
            if row.place[0] != d:
                d, top = row.place[0], y
                y += 0.1
            y += 1
            self._rows[row.place] = y
        return y

    def _axes(self, height: float) -> None:
        timeline, ax = self._timeline, self._ax
        ax.set_xlim(self._x(timeline.start), self._x(timeline.stop))
        ax.set_ylim(max(height, 1), -0.15)
        ax.set_xlabel(f"{self._unit} from the trace's start")
        ax.xaxis.set_major_formatter("{x:.10g}")
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.grid(axis="x", color="#E4E4E4", linewidth=0.6)
        ax.set_axisbelow(True)
        ticks, labels = [], []
        for (_, v), y in self._rows.items():
            ticks.append(y - 0.45)
            labels.append(f"vCPU {v}")
        for y in self._pending.values():
            ticks.append(y - PENDING_HEIGHT / 2)
            labels.append("pending")
        ax.set_yticks(ticks, labels)
        ax.tick_params(axis="y", length=0, colors="#444444")
        for d, top, bottom in self._bands:
            ax.axhspan(top, bottom, color="#F6F7F8", zorder=0, linewidth=0)
            where = ax.get_yaxis_transform()
            text = _short(timeline.names.get(d, str(d)), 18)
            ax.text(
                -0.065, (top + bottom) / 2, text, transform=where, ha="right", va="center", fontweight="bold"
            )  # fmt: skip

    def _states(self, row: Row) -> None:
        y = self._rows[row.place]
        if row.turns is not None:
            for state, colour in STATES.items():
                turns = [(turn.began, turn.ended) for turn in row.turns if turn.state == state]
                least = LEAST if state == RUNNING else 0  # a turn that took no time is a turn; to wait for none isn't
                self._bars(turns, y - STATE_HEIGHT, STATE_HEIGHT, least, facecolors=colour)
            return
        # Shares of each column, one state on the other; as high as a row's lower part at most.
        base = [0.0] * COLUMNS
        for state in (RUNNING, READY, OFF):
            colour = STATES[state]
            shares = [ns * COLUMNS / self._timeline.span for ns in _columns(row.spent.get(state, {}))]
            tops = [min(low + share, 1.0) for low, share in zip(base, shares, strict=True)]
            if any(shares):
                self._steps([y - STATE_HEIGHT * low for low in base], [y - STATE_HEIGHT * top for top in tops], colour)
            base = tops

    def _bars(self, spans: list[tuple[int, int]], y: float, height: float, least: float, **style: Any) -> None:
        """Bars, none shorter than `least` of the width."""
        least *= self._timeline.span
        xranges = [
            (self._x(a), self._x(a + max(b - a, least)) - self._x(a)) for a, b in spans
        ]  # fmt: skip
        if xranges:
            self._ax.broken_barh(xranges, (y, height), linewidth=0, **style)

    def _steps(self, low: list[float], high: list[float], colour: str) -> None:
        """An area between two step lines, whose steps are equal parts of the time."""
        timeline, n = self._timeline, len(low)
        pairs = [*zip(low, high, strict=True)]
        at = [i for i in range(n) if not i or pairs[i] != pairs[i - 1]]  # where there is a step: files stay small
        edges = [self._x(timeline.start + i * timeline.span / n) for i in (*at, n)]
        lows, highs = ([values[i] for i in (*at, n - 1)] for values in (low, high))
        self._ax.fill_between(edges, lows, highs, step="post", color=colour, linewidth=0, zorder=2)

    def _irqs(self, row: Row) -> None:
        y = self._rows[row.place]
        space = IRQS_TO - IRQS_FROM
        if row.handlers is not None:
            by_colour: dict[tuple[str, int], list[tuple[int, int]]] = {}
            for handler in row.handlers:
                colour = self._colours.get(handler.name, OTHER)
                by_colour.setdefault((colour, min(handler.depth, 3)), []).append((handler.began, handler.ended))
            for (colour, depth), spans in sorted(by_colour.items(), key=lambda item: item[0][1]):
                inset = 0.12 * depth
                self._bars(spans, y - IRQS_TO + inset, space - inset, LEAST, facecolors=colour, zorder=3 + depth)
            return
        sums: dict[str, list[int]] = {}  # by colour
        for name, by_stretch in row.irqs.items():
            colour = self._colours.get(name, OTHER)
            sums[colour] = [a + b for a, b in zip(sums.get(colour, [0] * COLUMNS), _columns(by_stretch), strict=True)]
        totals = [sum(column) for column in zip(*sums.values(), strict=True)]
        most = max(totals)
        # As high as the logarithm of all, so that one burst doesn't hide the rest; each colour has its share of that.
        scale = [space * math.log1p(total) / math.log1p(most) / max(total, 1) for total in totals]
        base = [0] * COLUMNS
        for colour in (*COLOURS, OTHER):
            if colour in sums:
                tops = [low + count for low, count in zip(base, sums[colour], strict=True)]
                low, high = (
                    [y - IRQS_FROM - value * one for value, one in zip(values, scale, strict=True)]
                    for values in (base, tops)
                )
                self._steps(low, high, colour)
                base = tops
        self._right(y - 0.5, f"up to {most:,} in {duration(self._timeline.span // COLUMNS)}")

    def _right(self, y: float, text: str) -> None:
        where = self._ax.get_yaxis_transform()
        self._ax.text(1.005, y, text, transform=where, fontsize=7.5, color="#666666", va="center")

    def _ports(self, d: int) -> None:
        y, counts = self._pending[d], self._timeline.pending[d].line()
        most = max(counts)
        self._steps([y] * STRETCHES, [y - PENDING_HEIGHT * count / most for count in counts], PORTS)
        self._right(y - PENDING_HEIGHT / 2, f"up to {most} port{'' if most == 1 else 's'}")

    def _arrows(self) -> None:
        from matplotlib.collections import LineCollection

        arrows = self._timeline.arrows
        if arrows is None or not arrows:
            return
        shown = [arrow for arrow in arrows if arrow.to in self._rows]
        if not shown:
            return
        headed = len(shown) <= HEADED_ARROWS
        lines = [self._line(arrow) for arrow in shown]
        colours = [self._colours.get(arrow.name, OTHER) for arrow in shown]
        xs, ys = zip(*(start for start, _ in lines), strict=True)
        self._ax.scatter(xs, ys, c=colours, s=4 if headed else 1, linewidths=0, zorder=6)
        if not headed:
            self._ax.add_collection(LineCollection(lines, colors=colours, linewidths=0.5, alpha=0.45, zorder=6))
            return
        for (start, end), colour in zip(lines, colours, strict=True):
            style = {"arrowstyle": "-|>", "color": colour, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0,
                     "mutation_scale": 8, "alpha": 0.9}  # fmt: skip
            self._ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=6, annotation_clip=False)

    def _line(self, arrow: Arrow) -> tuple[tuple[float, float], tuple[float, float]]:
        """From the sender's row to the handler's; what Xen raised comes from the edge of the row above."""
        to = self._rows[arrow.to]
        source = self._rows.get(arrow.by) if arrow.by else None
        start = max(arrow.sent, self._timeline.start)
        if source is None or source == to:
            return (self._x(start), to - 1.0), (self._x(arrow.handled), to - IRQS_TO)
        if source < to:
            return (self._x(start), source - STATE_HEIGHT / 2), (self._x(arrow.handled), to - IRQS_TO)
        return (self._x(start), source - IRQS_TO), (self._x(arrow.handled), to - IRQS_FROM)

    def _notes(self) -> None:
        """Lines through all rows; their texts above, one higher where it would meet the one before."""
        timeline = self._timeline
        ends: list[float] = []  # of the last text of each level, as a share of the width
        many = len(timeline.notes) > MANY_NOTES
        times = Counter(note.text for note in timeline.notes)
        said: set[str] = set()  # each but once, where it is first
        for note in timeline.notes:
            colour = FAULT if note.fault else MARK
            x = self._x(note.t)
            dash = "--" if note.fault and not many else "-"
            lowest = 0.985 if many else 0
            self._ax.axvline(x, lowest, color=colour, linewidth=0.9, linestyle=dash, alpha=0.8, zorder=7)
            if note.text in said or len(said) == NOTES:
                continue
            text = _short(note.text, 40) + (f" ({times[note.text]} times)" if times[note.text] > 1 else "")
            at, wide = (note.t - timeline.start) / timeline.span, len(text) * LETTER
            left = at + wide <= 1
            begin = at if left else at - wide
            level = next((i for i, end in enumerate(ends) if end + 2 * LETTER < begin), len(ends))
            if level == NOTE_LEVELS:
                continue
            said.add(note.text)
            ends[level : level + 1] = [begin + wide]
            self._ax.annotate(
                text, (x, -0.15), xytext=(1, 2 + 10 * level), textcoords="offset points", color=colour,
                fontsize=7.5, ha="left" if left else "right", va="bottom", annotation_clip=False,
            )  # fmt: skip
        self._title(8 + 10 * len(ends))

    def _title(self, pad: int) -> None:
        timeline = self._timeline
        title = f"{os.path.basename(timeline.file)}: {duration(timeline.span)} of virtual time"
        if timeline.arrows is None:
            title += f"; {timeline.ways.total():,} events on their way, too many for arrows"
        if len(timeline.rows) > MAX_ROWS:
            title += f"; the first {MAX_ROWS} of {len(timeline.rows)} vCPUs, --domain chooses"
        if not timeline.rows:
            title += "; nothing happens"
        self._ax.set_title(title, loc="left", fontsize=11, pad=pad)

    def _legend(self) -> None:
        from matplotlib.patches import Patch

        counts = self._timeline.irq_counts()
        entries = [Patch(color=c, label=f"{_short(name, 24)} ({counts[name]:,})") for name, c in self._colours.items()]
        if self._others:
            entries.append(Patch(color=OTHER, label=f"{self._others} others"))
        entries += [Patch(color=STATES[RUNNING], label="runs"), Patch(color=STATES[READY], label="waits for a turn")]
        if any(sum(row.spent.get(OFF, {}).values()) > self._timeline.span * LEAST for row in self._timeline.rows):
            entries.append(Patch(color=STATES[OFF], label="down or paused"))
        self._ax.legend(
            handles=entries, loc="upper left", bbox_to_anchor=(0, -0.9 / max(len(self._rows) + 2, 4)), ncols=6,
            frameon=False, fontsize=8, borderaxespad=0,
        )  # fmt: skip


def _columns(stretches: dict[int, int]) -> list[int]:
    sums = [0] * COLUMNS
    for i, value in stretches.items():
        sums[i * COLUMNS // STRETCHES] += value
    return sums


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"

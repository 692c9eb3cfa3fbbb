"""What `pvirq top` shows and how keys change it: text by lines, for any size, without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from pvirq.inspect.rates import CpuRate, LineRate, Rates

BLOCKS: Final = "▁▂▃▄▅▆▇█"
SORTS: Final = ("rate", "total", "irq", "name", "cpu")
VIEWS: Final = ("lines", "devices", "vcpus")
LEAST_WIDTH, LEAST_HEIGHT = 20, 5
# Title, width (0: what is left) and whether to the right.
DEVICE_COLUMNS: Final = (
    ("DOM", 4, True), ("LINES", 5, True), ("RATE/s", 7, True), ("TOTAL", 7, True), ("CPUS", 8, False),
    ("DEVICE", 0, False),
)  # fmt: skip
VCPU_COLUMNS: Final = (
    ("VCPU", 7, True), ("RATE/s", 7, True), ("TOTAL", 7, True), ("TREND", 12, False), ("BUSIEST", 0, False),
)  # fmt: skip

HELP: Final = (
    "q      leave",
    "v      lines, devices or vCPUs (also i, d, c)",
    "s      sort by rate, total, IRQ, name or CPU",
    "r      the other way round",
    "/      show only what has this text (Enter: done, Esc: all)",
    "z      show lines without interrupts or not",
    "p, ␣   pause and go on",
    "m      mark: count from here; again: totals since boot",
    "j, k   down, up (also arrows, Page Up, Page Down)",
    "+, -   slower, faster",
    "h, ?   this",
)


@dataclass(frozen=True)
class Shown:
    """A line of the screen and how it looks: "", bold, dim, reverse or head."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Column:
    """`width` 0: what is left. `value` makes its text."""

    title: str
    width: int
    right: bool
    value: Callable[[LineRate], str]


def number(value: float) -> str:
    """A rate or count in at most seven characters: 0, 0.4, 12, 9,999, 12.3k, 4.5M."""
    if value < 10 and value != int(value):
        return f"{value:.1f}"
    if value < 9_999.5:
        return f"{value:,.0f}"
    for unit in "kMGTP":
        value /= 1000
        if value < 999.95:
            return f"{value:.1f}{unit}"
    return f"{value:.0f}P"


def sparkline(rates: Sequence[float], width: int) -> str:
    """The last `width` rates as blocks, the highest of them a full one; nothing for none."""
    last = list(rates)[-width:] if width > 0 else []
    top = max(last, default=0.0)
    if top <= 0:
        return ""
    return "".join(" " if rate <= 0 else BLOCKS[min(int(rate / top * len(BLOCKS)), 7)] for rate in last).rjust(width)


class TopView:
    """The state of the display; `key` changes it, `screen` shows it."""

    def __init__(self, rates: Rates, title: str = "") -> None:
        self.rates = rates
        self.title = title
        self.view = "lines"
        self.sort = "rate"
        self.reverse = False
        self.filter = ""
        self.typing = False
        self.paused = False
        self.marked = False
        self.idle = True  # show lines without interrupts
        self.help = False
        self.ended = False
        self.quit = False
        self.offset = 0
        self.seconds = 1.0

    # -- keys ----------------------------------------------------------------------------------------------------------

    def key(self, key: str) -> None:
        """A key: a character, or up, down, pageup, pagedown, home, end, enter, escape, backspace."""
        if self.typing:
            self._type(key)
        elif self.help:
            self.help = False
            self.quit = key == "q"
        else:
            self._command(key)

    def _type(self, key: str) -> None:
        if key == "enter":
            self.typing = False
        elif key == "escape":
            self.typing, self.filter = False, ""
        elif key == "backspace":
            self.filter = self.filter[:-1]
        elif len(key) == 1 and key.isprintable() and len(self.filter) < 60:
            self.filter += key
        self.offset = 0

    def _command(self, key: str) -> None:
        views = {"i": "lines", "d": "devices", "c": "vcpus"}
        moves = {
            "j": 1,
            "down": 1,
            "k": -1,
            "up": -1,
            "pagedown": 10,
            "pageup": -10,
            "home": -(1 << 30),
            "end": 1 << 30,
        }
        if key == "q":
            self.quit = True
        elif key in ("h", "?"):
            self.help = True
        elif key == "v":
            self.view, self.offset = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)], 0
        elif key in views:
            self.view, self.offset = views[key], 0
        elif key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "r":
            self.reverse = not self.reverse
        elif key == "z":
            self.idle = not self.idle
        elif key == "/":
            self.typing = True
        elif key == "escape":
            self.filter = ""
        elif key in ("p", " "):
            self.paused = not self.paused
        elif key == "m":
            self.marked = not self.marked
            self.rates.mark()
        elif key in moves:
            self.offset = max(self.offset + moves[key], 0)
        elif key in ("+", "="):
            self.seconds = min(self.seconds * 2, 60.0)
        elif key == "-":
            self.seconds = max(self.seconds / 2, 0.25)

    # -- the screen ----------------------------------------------------------------------------------------------------

    def screen(self, width: int, height: int) -> list[Shown]:
        """Exactly `height` lines of at most `width` characters."""
        if width < LEAST_WIDTH or height < LEAST_HEIGHT:
            lines = [Shown("pvirq top: too small"[:width])]
        else:
            head = [self._status(width), *self._cpu_lines(width, 1 if height < 16 else 2 if height < 40 else 4)]
            if self.help:
                body = [Shown(""), *(Shown(f"  {line}") for line in HELP)]
            else:
                body = self._body(width, height - len(head) - 1)
            room = height - len(head) - 1
            body = (body + [Shown("")] * room)[:room]
            lines = [*head, *body, self._foot(width)]
        return [Shown(line.text[:width], line.style) for line in (lines + [Shown("")] * height)[:height]]

    def _status(self, width: int) -> Shown:
        total = sum(cpu.rate for cpu in self.rates.cpus.values())
        state = "PAUSED" if self.paused else "end" if self.ended else ""
        parts = ["pvirq top", state, self.title, f"{number(total)}/s", f"every {self.seconds:g} s"]
        if self.marked:
            parts.append(f"since mark {self.rates.elapsed:.0f} s")
        return Shown("  ".join(part for part in parts if part)[:width].ljust(width), "reverse")

    def _cpu_lines(self, width: int, most: int) -> list[Shown]:
        """vCPUs side by side, as many as there is room for; the busiest where there are more."""
        cells = 16
        fits = max(width // cells, 1) * most
        entries = list(self.rates.cpus.values())
        several = len({each.domid for each in entries}) > 1
        if len(entries) > fits:
            entries = sorted(
                sorted(entries, key=lambda each: -each.rate)[: fits - 1], key=lambda each: (each.domid, each.cpu)
            )
        top = max((each.rate for each in entries), default=0.0)
        texts = [self._cpu_cell(each, several, top, cells) for each in entries]
        if len(self.rates.cpus) > len(entries):
            texts.append(f"+{len(self.rates.cpus) - len(entries)} vCPUs")
        each_line = max(width // cells, 1)
        return [Shown("".join(texts[i : i + each_line])) for i in range(0, len(texts), each_line)][:most]

    @staticmethod
    def _cpu_cell(entry: CpuRate, several: bool, top: float, width: int) -> str:
        bar = BLOCKS[min(int(entry.rate / top * 8), 7)] if top > 0 and entry.rate > 0 else " "
        name = f"d{entry.domid}v{entry.cpu}" if several else f"CPU{entry.cpu}"
        return f"{name} {number(entry.rate):>6} {bar}"[: width - 1].ljust(width)

    def _foot(self, width: int) -> Shown:
        if self.typing:
            return Shown(f"/{self.filter}█", "bold")
        order = f"{self.view} by {self.sort}{' ↑' if self.reverse else ''}{f'  /{self.filter}' if self.filter else ''}"
        keys = "q quit  v view  s sort  / filter  p pause  m mark  h help"
        return Shown(f"{keys}   {order}" if width >= len(keys) + len(order) + 3 else f"h help  {order}", "dim")

    def _body(self, width: int, height: int) -> list[Shown]:
        rows = self._rows(width)
        head, lines = rows[0], rows[1:]
        room = max(height - 1, 0)
        self.offset = min(self.offset, max(len(lines) - room, 0))
        return [head, *lines[self.offset : self.offset + room]]

    def _rows(self, width: int) -> list[Shown]:
        if self.view == "vcpus":
            return self._vcpu_rows(width)
        if self.view == "devices":
            return self._device_rows(width)
        columns = self._columns(width)
        lines = [line for line in self.rates.lines.values() if self._wanted(line)]
        lines.sort(key=self._sort_key, reverse=self.reverse)
        shown = [Shown(_layout([(c.title, c.width, c.right) for c in columns], width), "head")]
        for line in lines:
            cells = [(column.value(line), column.width, column.right) for column in columns]
            shown.append(Shown(_layout(cells, width), "bold" if line.rate > 0 else ""))
        return shown

    def _wanted(self, line: LineRate) -> bool:
        if not self.idle and not (line.since_mark if self.marked else line.row.total):
            return False
        return (
            not self.filter
            or self.filter.lower() in f"{line.row.label} {line.row.chip} {self._name(line)} {self._peer(line)}".lower()
        )

    def _sort_key(self, line: LineRate) -> tuple[object, ...]:
        irq = line.row.irq if line.row.irq is not None else 1 << 40
        by: dict[str, tuple[object, ...]] = {
            "rate": (-line.rate, -line.since_mark, -line.row.total), "total": (-self._total(line),), "irq": (),
            "name": (self._name(line),), "cpu": (line.busiest if line.busiest is not None else 1 << 30, -line.rate),
        }  # fmt: skip
        return (*by[self.sort], line.key[0], irq, line.row.label)

    def _total(self, line: LineRate) -> int:
        return line.since_mark if self.marked else line.row.total

    def _name(self, line: LineRate) -> str:
        name, device = line.row.name, line.link.device
        if device is None:
            return name
        words = device.name if device.type in ("store", "console") else f"{device.type}{device.id}"
        if device.queue is not None and f"q{device.queue}" not in name:
            words += f" q{device.queue}"
        return name if words.replace(" ", "") in name.replace(".", "") else f"{name} ({words})" if name else words

    def _peer(self, line: LineRate) -> str:
        peer, device = line.link.peer, line.link.device
        if peer is not None:
            return f"d{peer[0]}:{peer[1]}"
        return f"d{device.frontend}" if device is not None and line.link.side == "back" else ""

    def _columns(self, width: int) -> list[Column]:
        """As many as there is room for."""
        several = len({key[0] for key in self.rates.lines}) > 1
        has_ports = any(line.link.channel for line in self.rates.lines.values())
        affine = any(line.affinity for line in self.rates.lines.values())
        columns = [Column("RATE/s", 7, True, lambda line: number(line.rate))]
        columns.insert(0, Column("IRQ", 5, True, lambda line: line.row.label))
        if several:
            columns.insert(0, Column("DOM", 4, True, lambda line: f"d{line.key[0]}" if line.key[0] >= 0 else "?"))
        if width >= 60:
            columns.append(Column("SINCE" if self.marked else "TOTAL", 7, True, lambda line: number(self._total(line))))
        columns.append(Column("CPU", 3, True, lambda line: "-" if line.busiest is None else str(line.busiest)))
        if affine and width >= 76:
            columns.append(Column("AFF", 4, True, lambda line: line.affinity))
        if has_ports and width >= 70:
            columns.append(
                Column("PORT", 5, True, lambda line: str(line.link.channel.port) if line.link.channel else "")
            )
            columns.append(Column("PEER", 8, False, self._peer))
        if width >= 72:
            trend = 8 if width < 110 else 40 if width >= 160 else 20
            columns.append(Column("TREND", trend, False, lambda line: sparkline(line.rates, trend)))
        if width >= 120:
            columns.append(Column("CHIP", 15, False, lambda line: line.row.chip))
        columns.append(Column("NAME", 0, False, self._name))
        return columns

    def _device_rows(self, width: int) -> list[Shown]:
        """Lines of a device together."""
        groups: dict[tuple[int, str], list[LineRate]] = {}
        for line in self.rates.lines.values():
            device = line.link.device
            name = line.row.name or line.row.label
            if device is not None and device.type in ("vif", "vbd"):
                name = f"{device.type}{device.id}" + (f" of d{device.frontend}" if line.link.side == "back" else "")
            if self._wanted(line):
                groups.setdefault((line.key[0], name), []).append(line)
        order = {"name": lambda item: item[0][1], "irq": lambda item: min(int(x.row.irq or 0) for x in item[1])}.get(
            self.sort, lambda item: -sum(x.rate if self.sort == "rate" else self._total(x) for x in item[1])
        )
        rows = [Shown(_layout(DEVICE_COLUMNS, width), "head")]
        for (domid, name), lines in sorted(groups.items(), key=order, reverse=self.reverse):
            rate, total = sum(line.rate for line in lines), sum(self._total(line) for line in lines)
            cpus = ",".join(map(str, sorted({line.busiest for line in lines if line.busiest is not None})))
            texts = (f"d{domid}" if domid >= 0 else "?", str(len(lines)), number(rate), number(total), cpus, name)
            cells = [(text, size, right) for text, (_, size, right) in zip(texts, DEVICE_COLUMNS, strict=True)]
            rows.append(Shown(_layout(cells, width), "bold" if rate > 0 else ""))
        return rows

    def _vcpu_rows(self, width: int) -> list[Shown]:
        """vCPUs with what keeps them busy."""
        rows = [Shown(_layout(VCPU_COLUMNS, width), "head")]
        entries = sorted(
            self.rates.cpus.values(),
            key=lambda each: (-each.rate, each.domid, each.cpu) if self.sort == "rate" else (0, each.domid, each.cpu),
            reverse=self.reverse,
        )
        lines = sorted(self.rates.lines.values(), key=lambda line: -line.rate)
        for entry in entries:
            busy = [
                self._name(line) or line.row.label
                for line in lines
                if line.rate > 0 and line.busiest == entry.cpu and line.key[0] == entry.domid
            ][:4]
            name = f"d{entry.domid}v{entry.cpu}" if entry.domid >= 0 else f"CPU{entry.cpu}"
            texts = (name, number(entry.rate), number(entry.total), sparkline(entry.rates, 12), ", ".join(busy))
            cells = [(text, size, right) for text, (_, size, right) in zip(texts, VCPU_COLUMNS, strict=True)]
            rows.append(Shown(_layout(cells, width), "bold" if entry.rate > 0 else ""))
        return rows


def _layout(cells: Sequence[tuple[str, int, bool]], width: int) -> str:
    """Cells side by side, a blank between them; control characters that a name may have are shown as "?"."""
    parts = []
    left = width
    for text, size, right in cells:
        room = size or max(left, 0)
        text = "".join(ch if ch.isprintable() else "?" for ch in text)[:room]
        parts.append(text.rjust(room) if right else text.ljust(room))
        left -= room + 1
    return " ".join(parts).rstrip()

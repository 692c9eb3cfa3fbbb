"""What there is to say about a campaign's results, as text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from pvirq.lab.campaign.perform import VERDICTS
from pvirq.lab.campaign.store import Result

SEEDS_SHOWN: Final = 6
FAILURES_SHOWN: Final = 10


@dataclass
class CellSummary:
    """The runs of one kernel with one scenario and one set of faults."""

    kernel: str
    scenario: str
    faults: str
    verdicts: Counter[str] = field(default_factory=Counter)
    failing: list[int] = field(default_factory=list)  # seeds
    wall_s: list[float] = field(default_factory=list)
    virtual_ns: list[int] = field(default_factory=list)
    fired: list[int] = field(default_factory=list)

    @property
    def runs(self) -> int:
        return self.verdicts.total()

    def to_json(self) -> dict[str, Any]:
        """Counts, failing seeds, medians."""
        return {
            "kernel": self.kernel, "scenario": self.scenario, "faults": self.faults, "runs": self.runs,
            "verdicts": dict(self.verdicts), "failing_seeds": self.failing,
            "median_wall_s": statistics.median(self.wall_s), "median_virtual_ns": statistics.median(self.virtual_ns),
            "median_fired": statistics.median(self.fired),
        }  # fmt: skip


def summarise(results: Iterable[Result]) -> list[CellSummary]:
    """By cell, in the order in which they come."""
    cells: dict[tuple[str, str, str], CellSummary] = {}
    for result in results:
        key = result.kernel, result.scenario, result.faults
        cell = cells.setdefault(key, CellSummary(*key))
        cell.verdicts[result.verdict] += 1
        cell.wall_s.append(result.wall_s)
        cell.virtual_ns.append(result.virtual_ns)
        cell.fired.append(result.fired)
        if result.verdict != "pass":
            cell.failing.append(result.seed)
    return list(cells.values())


def table(cells: Sequence[CellSummary]) -> str:
    """One line a cell: how many runs, each verdict that there was, median times, the first failing seeds."""
    seen = [verdict for verdict in VERDICTS if verdict == "pass" or any(cell.verdicts[verdict] for cell in cells)]
    fired = any(any(cell.fired) for cell in cells)  # how often faults did, where there are any
    heads = [*seen, *(["fired"] if fired else []), "guest time", "real time", "failing seeds"]
    rows = [["kernel", "scenario", "faults", "runs", *heads]]
    for cell in cells:
        seeds = ", ".join(map(str, cell.failing[:SEEDS_SHOWN]))
        more = len(cell.failing) - SEEDS_SHOWN
        rows.append([
            cell.kernel, cell.scenario, cell.faults, str(cell.runs),
            *(str(cell.verdicts[verdict] or "-") for verdict in seen),
            *([f"{statistics.median(cell.fired):g}"] if fired else []),
            duration(statistics.median(cell.virtual_ns) / 1e9), duration(statistics.median(cell.wall_s)),
            f"{seeds} and {more} more" if more > 0 else seeds,
        ])  # fmt: skip
    return _aligned(rows, left=(0, 1, 2, len(rows[0]) - 1))


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(w) if i in left else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "".join(f"{line}\n" for line in lines)


def duration(seconds: float) -> str:
    """With as many digits as matter: 5.46 ms, 1.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def totals(results_verdicts: Counter[str]) -> str:
    """As "97 pass, 2 timeout, 1 crash"."""
    return ", ".join(f"{results_verdicts[v]} {v}" for v in VERDICTS if results_verdicts[v]) or "none"


def failure_lines(results: Iterable[Result], shown: int = FAILURES_SHOWN) -> Iterator[str]:
    """A line for each run that didn't pass, up to `shown`."""
    failing = [result for result in results if result.verdict != "pass"]
    width = max((len(result.name) for result in failing[:shown]), default=0)
    for result in failing[:shown]:
        yield f"{result.name:{width}}  {result.verdict:7}  {result.message}"
    if len(failing) > shown:
        yield f"and {len(failing) - shown} more"


def failure_text(result: Result) -> str:
    """All there is about one run."""
    lines = [f"{result.name}: {result.verdict}: {result.message}", f"  again: {result.command}"]
    times = f"  {duration(result.virtual_ns / 1e9)} of guest time, {duration(result.wall_s)}; trace {result.trace_hash}"
    lines.append(times + (f"; faults fired: {result.fired}" if result.fired else ""))
    for title, text in (("detail", result.detail), ("output", result.output), ("console", result.console)):
        if text.strip() and not (title == "console" and "Last console lines:" in result.detail):
            lines += [f"  {title}:", *(f"    {line}" for line in text.rstrip().split("\n"))]
    return "\n".join(lines) + "\n"

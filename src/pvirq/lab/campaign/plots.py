"""A campaign's results as one figure: verdicts, run times and failing seeds, a line for each cell."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pvirq.lab.campaign.perform import VERDICTS
from pvirq.lab.campaign.report import CellSummary, summarise, totals
from pvirq.lab.campaign.spec import CampaignError
from pvirq.lab.campaign.store import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From Okabe and Ito's palette, which colour-blind people can tell apart.
COLOURS: Final = {
    "pass": "#a6d8c7", "fail": "#d55e00", "crash": "#1a1a1a", "timeout": "#e69f00", "stuck": "#cc79a7",
    "hung": "#0072b2", "error": "#999999",
}  # fmt: skip
INK, FAINT = "#333333", "#dddddd"
MOST_CELLS: Final = 80
ROW_INCHES: Final = 0.30
LEAST_ROWS: Final = 3  # that there is room for, or one would be a block
LOG_SPAN: Final = 30.0  # times that differ by more are on a logarithmic axis


def plot(name: str, results: Sequence[Result], path: Path) -> None:
    """Draw a campaign's results into a file, whose name says the format. CampaignError, also without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise CampaignError(f"plots need matplotlib (pip install 'pvirq[plots]'): {error}") from None
    if not results:
        raise CampaignError("there are no results to plot yet")
    cells = summarise(results)
    left_out = max(len(cells) - MOST_CELLS, 0)
    if left_out:  # those with the smallest share of failures
        worst = sorted(cells, key=lambda cell: len(cell.failing) / cell.runs, reverse=True)[:MOST_CELLS]
        cells = [cell for cell in cells if cell in worst]
    height = ROW_INCHES * max(len(cells), LEAST_ROWS)
    figure = Figure(figsize=(13.0, height + 1.9), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(1.0, 1.1, 1.4))
    _verdicts(axes[0], cells)
    _times(axes[1], cells)
    _seeds(axes[2], cells, results)
    axes[0].set_yticks(range(len(cells)), [f"{cell.kernel} / {cell.scenario} / {cell.faults}" for cell in cells])
    axes[0].set_ylim(max(len(cells), LEAST_ROWS) - 0.4, -0.6)
    for axis in axes:
        axis.tick_params(length=0, labelsize=8, colors=INK)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(FAINT)
    seen = [verdict for verdict in VERDICTS if any(cell.verdicts[verdict] for cell in cells)]
    figure.legend(
        handles=[Patch(color=COLOURS[verdict], label=verdict) for verdict in seen], loc="outside lower left",
        ncols=len(seen), frameon=False, fontsize=8,
    )  # fmt: skip
    note = f"; {left_out} combinations with fewer failures left out" if left_out else ""
    verdicts = sum((cell.verdicts for cell in summarise(results)), start=type(cells[0].verdicts)())
    figure.suptitle(
        f"{name}: {len(results)} runs, {totals(verdicts)}{note}", x=0.01, ha="left", fontsize=11, color=INK
    )  # fmt: skip
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise CampaignError(f"{path}: {' '.join(str(getattr(error, 'strerror', None) or error).split())}") from None


def _verdicts(axis: Axes, cells: Sequence[CellSummary]) -> None:
    """The share of each verdict, and how many runs there were."""
    start = [0.0] * len(cells)
    for verdict in VERDICTS:
        shares = [100 * cell.verdicts[verdict] / cell.runs for cell in cells]
        if any(shares):
            axis.barh(range(len(cells)), shares, left=start, height=0.72, color=COLOURS[verdict])
            start = [a + b for a, b in zip(start, shares, strict=True)]
    for row, cell in enumerate(cells):
        axis.text(102, row, str(cell.runs), va="center", fontsize=7, color=INK)
    axis.set_xlim(0, 112)
    axis.set_xticks((0, 50, 100))
    axis.set_title("verdicts (%), and number of runs", fontsize=9, loc="left", color=INK)


def _times(axis: Axes, cells: Sequence[CellSummary]) -> None:
    """Each cell's fastest to slowest run, the middle half of them, and the median."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    for row, cell in enumerate(cells):
        times = sorted(cell.wall_s)
        low, middle, high = (
            statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else (times[0],) * 3
        )  # fmt: skip
        axis.plot((times[0], times[-1]), (row, row), color="#9db4c0", linewidth=1.2, solid_capstyle="butt")
        axis.plot((low, high), (row, row), color="#5c7d92", linewidth=5, solid_capstyle="butt")
        axis.plot((middle,), (row,), marker="|", color="#10222e", markersize=9, markeredgewidth=1.6)
    every = [time for cell in cells for time in cell.wall_s]
    if min(every) > 0 and max(every) / min(every) > LOG_SPAN:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.set_xlim(left=0)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_title("real time of a run (s): range, quartiles, median", fontsize=9, loc="left", color=INK)


def _seeds(axis: Axes, cells: Sequence[CellSummary], results: Sequence[Result]) -> None:
    """Which seeds didn't pass."""
    from matplotlib.ticker import MaxNLocator

    rows = {(cell.kernel, cell.scenario, cell.faults): row for row, cell in enumerate(cells)}
    shown = [result for result in results if (result.kernel, result.scenario, result.faults) in rows]
    for verdict in VERDICTS[1:]:
        found = [result for result in shown if result.verdict == verdict]
        if found:
            places = [rows[result.kernel, result.scenario, result.faults] for result in found]
            axis.scatter(
                [float(result.seed) for result in found], places, marker="|", s=60, linewidths=1.4,
                color=COLOURS[verdict], rasterized=len(found) > 5000,
            )  # fmt: skip
    seeds = [result.seed for result in shown]
    margin = max((max(seeds) - min(seeds)) * 0.02, 0.5)
    axis.set_xlim(min(seeds) - margin, max(seeds) + margin)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for row in range(len(cells)):
        axis.axhline(row, color=FAINT, linewidth=0.6, zorder=0)
    none = ": none" if all(result.verdict == "pass" for result in shown) else ""
    axis.set_title(f"seeds that didn't pass{none}", fontsize=9, loc="left", color=INK)

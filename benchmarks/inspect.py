"""How fast tables are read, and what `pvirq top` costs while it runs.

python -m benchmarks.inspect

Processor time of this process; the best of several rounds, as whatever else the machine does can only make one slower.
"""

from __future__ import annotations

import io
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live

from pvirq.cli.inspect_top import picture
from pvirq.inspect import explain, read_text
from pvirq.inspect.rates import Rates
from pvirq.inspect.read import Reader
from pvirq.inspect.source import lines_of
from pvirq.inspect.sources import SLOW_S, LiveSource
from pvirq.inspect.topview import TopView

ROUNDS: Final = 7


def interrupts(cpus: int, rows: int, seed: int = 1) -> str:
    """A /proc/interrupts as a large domain 0 has it: counts of all sizes, most of them on one CPU."""
    chance = random.Random(seed)
    lines = [" " * 12 + "".join(f"CPU{cpu:<8d}" for cpu in range(cpus))]
    for row in range(rows):
        counts = [0] * cpus
        for _ in range(max(cpus // 8, 1)):
            counts[chance.randrange(cpus)] = chance.randrange(1 << chance.randrange(33))
        text = "".join(f"{count:10d} " for count in counts)
        lines.append(
            f"{row:4d}: {text} xen-dyn-lateeoi     -event     vif{row // 8}.0-q{row // 2 % 4}-{'rt'[row % 2]}x"
        )
    return "\n".join(lines) + "\n"


def best(work: Callable[[], object]) -> float:
    """Seconds of processor time of the quickest of ROUNDS."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def log() -> bytes:
    """16 MB of a console's log, of which a part is a dump of event channels."""
    noise = b"(XEN) [2026-01-01 00:00:00.123] d1v0 something that nobody asked for happened at ffff82d0402a1234\n"
    head = b"(XEN) Event channel information for domain 1:\n"
    ports = b"".join(
        b"(XEN)     %4d [0/0/  -   ]: s=3 n=0 x=0 d=0 p=%d\n" % (port, port + 9) for port in range(1, 4000)
    )
    piece = noise * 20_000 + head + ports
    return piece * ((16 << 20) // len(piece))


def top(cpus: int, rows: int) -> float:
    """Seconds for one refresh, of everything: read files, parse, rates, the picture, and writing it out.

    The rarer look at affinities is spread over the refreshes of SLOW_S, at one a second.
    """
    with tempfile.TemporaryDirectory() as root:
        table = Path(root, "proc/interrupts")
        table.parent.mkdir()
        texts = [interrupts(cpus, rows, seed) for seed in (1, 2)]
        for irq in range(rows):
            directory = Path(root, f"proc/irq/{irq}")
            directory.mkdir(parents=True)
            for name in ("smp_affinity_list", "effective_affinity_list"):
                (directory / name).write_text(f"{irq % cpus}\n")
            (directory / "spurious").write_text("count 7\nunhandled 0\nlast_unhandled 0 ms\n")
        now = [0.0]
        source = LiveSource(root, tools=False, clock=lambda: now[0])
        view = TopView(Rates(), "bench")
        console = Console(file=io.StringIO(), force_terminal=True, width=200, height=50)
        with Live(console=console, auto_refresh=False, screen=True) as live:

            def refresh() -> None:
                table.write_text(texts[int(now[0]) % 2])
                view.rates.take(source.next())
                live.update(picture(view.screen(200, 50)), refresh=True)
                now[0] += 1

            slow = best(lambda: (now.__setitem__(0, now[0] + SLOW_S), refresh()))
            quick = best(refresh)
        return quick + max(slow - quick, 0) / SLOW_S


def run() -> dict[str, float]:
    """All figures, by name; the last part of a name is the unit."""
    text = interrupts(512, 4000)
    data = log()

    def read_log() -> None:
        reader = Reader()
        reader.lines(lines_of(io.BytesIO(data), "log"))
        assert len(reader.snapshot().channels) >= 5

    snapshot = read_text(text)
    assert len(snapshot.interrupts[0].rows) == 4000
    refresh = top(64, 500)
    return {
        "inspect.interrupts_512x4000.s": best(lambda: read_text(text)),
        "inspect.explain_512x4000.s": best(lambda: explain(snapshot)),
        "inspect.log.mb_per_s": len(data) / 1e6 / best(read_log),
        "inspect.top_64x500.ms": refresh * 1e3,
        "inspect.top_64x500.percent": refresh * 100,
    }


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:40} {value:10.3f}")

"""How much faster two workers are than one: a campaign of a real guest, and one of modelled ones.

python -m benchmarks.campaign

Wall time, as somebody at a terminal has it: workers start, guests boot, all runs are done. A run's own time is also
given, and how many there are, for the share of starting and booting shrinks with their number. Other work on the
machine spoils the ratio; the load is printed with it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Final

from pvirq.lab.campaign import spec, workers
from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Plan, Run

REAL_RUNS: Final = 320
MODELLED_RUNS: Final = 1200
REAL: Final = f"""
[campaign]
seeds = {REAL_RUNS}
[kernels.cloud]
kernel = "cloud"
vcpus = 2
disk = {{ vdev = "xvda", size = "4M" }}
ready = "until [ -b /dev/xvda ]; do sleep 0.1; done"
[scenarios.dd]
exec = "for i in 1 2 3 4; do dd if=/dev/xvda of=/dev/null bs=4k count=64 iflag=direct; done"
"""
MODELLED: Final = f"""
[campaign]
seeds = {MODELLED_RUNS}
[kernels.old]
model = "2.6.18"
[scenarios.disk]
file = "disk.toml"
"""
SCENARIO: Final = """
[dom0]
platform = "recorded"
[[domain]]
name = "guest"
disk = [{ name = "xvda", on = "virtio0" }]
[[workload]]
on = "guest"
kind = "disk"
op = "mixed"
count = 200
"""


def campaign(directory: Path, text: str) -> list[Run]:
    """All runs of a campaign."""
    (directory / "disk.toml").write_text(SCENARIO)
    return list(Plan(spec.loads(text, str(directory / "bench.toml")), print))


def wall_s(runs: list[Run], count: int) -> tuple[float, float]:
    """What a whole campaign takes on so many workers, and the median run of it. RuntimeError where one fails."""
    began = time.monotonic()
    outcomes: list[Outcome] = []
    for run, outcome in workers.on_workers(runs, time.sleep, workers=count):
        if outcome.verdict != "pass":
            raise RuntimeError(f"{run.name}: {outcome.verdict}: {outcome.message}")
        outcomes.append(outcome)
    took = time.monotonic() - began
    assert len(outcomes) == len(runs)
    return took, sorted(outcome.wall_s for outcome in outcomes)[len(outcomes) // 2]


def run() -> dict[str, float]:
    """One worker's and two workers' times, and their ratios."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in (("real", REAL), ("modelled", MODELLED)):
            runs = campaign(Path(scratch), text)
            found[f"campaign.{name}.1_worker.s"], found[f"campaign.{name}.run.s"] = wall_s(runs, 1)
            found[f"campaign.{name}.2_workers.s"], _ = wall_s(runs, 2)
            found[f"campaign.{name}.ratio"] = (
                found[f"campaign.{name}.1_worker.s"] / found[f"campaign.{name}.2_workers.s"]
            )
    return found


if __name__ == "__main__":
    before = os.getloadavg()[0]
    print(json.dumps({**run(), "load_before": before}, indent=1))

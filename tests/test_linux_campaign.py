"""A campaign of a real Linux guest: runs forked from its boot, under faults, the same wherever they run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pvirq.lab.campaign import spec, workers
from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Plan, Run
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

FILE = """
[campaign]
seeds = 3
timeout = "10s"

[kernels.cloud]
kernel = "cloud"
vcpus = 2
disk = [{ vdev = "xvda", size = "4M" }, "image,raw,xvdb,w"]
files = { "opt/hello" = "hello" }
ready = "until [ -b /dev/xvda ] && [ -b /dev/xvdb ]; do sleep 0.1; done"

[scenarios.dd]
exec = '''
[ ! -e /tmp/been-here ] && touch /tmp/been-here || exit 9
[ $(head -c 4 /dev/xvdb) = file ] || exit 8
dd if=/dev/zero of=/dev/xvdb bs=4k count=8 oflag=direct && dd if=/dev/xvda of=/dev/null bs=4k count=32 iflag=direct
'''
expect.output = '32\\+0 records out'

[scenarios.cat]
exec = "cat /opt/hello; exit 3"
expect = { status = 3, output = "^hello$" }

[faults.none]

[faults.late]
rules = ["delay 2ms irq=blkif domain=guest probability=0.3"]
"""
ENDS = """
[scenarios.panics]
exec = "echo c > /proc/sysrq-trigger"
[scenarios.panics-as-it-should]
exec = "echo c > /proc/sysrq-trigger"
expect.ends = "crash"
[scenarios.goes]
exec = "true"
expect.ends = "poweroff"
[scenarios.waits]
exec = "sleep 1000"
[scenarios.loses]
exec = "dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct"
[scenarios.complains]
exec = "echo '<0>BUG: says the test' > /dev/kmsg"
[scenarios.boots]
boot = true
expect.console = "Freeing unused kernel image"
[faults.none]
[faults.lossy]
rules = ["lose irq=blkif domain=guest"]
[[include]]
faults = "none"
[[include]]
scenarios = "loses"
[[exclude]]
scenarios = "loses"
faults = "none"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_cloud: KernelChoice, busybox: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hello").write_text("hello\n")
    (tmp_path / "image").write_bytes(b"file".ljust(64 << 10, b"."))
    return tmp_path


def planned(text: str) -> list[Run]:
    return list(Plan(spec.loads(text, "x.toml"), print))


def carry_out(runs: list[Run]) -> dict[str, Outcome]:
    return {run.name: outcome for run, outcome in workers.here(runs, time.sleep)}


def test_runs_from_one_boot(here: Path) -> None:
    runs = planned(FILE)
    assert len(runs) == 2 * 2 * 3
    outcomes = carry_out(runs)
    assert {name: (outcome.verdict, outcome.message) for name, outcome in outcomes.items()} == {
        run.name: ("pass", "") for run in runs
    }
    assert sum(outcome.boot_s > 0 for outcome in outcomes.values()) == 1
    assert (here / "image").read_bytes()[:4] == b"file"
    for seed in (1, 2, 3):
        assert outcomes[f"cloud/dd/none/{seed}"].fired == 0
        assert outcomes[f"cloud/dd/late/{seed}"].fired > 0
    # Each seed is another run; and the same one is the same in another order, from another boot, in another process.
    hashes = {name: outcome.trace_hash for name, outcome in outcomes.items()}
    assert len({hashes[f"cloud/dd/{faults}/{seed}"] for faults in ("none", "late") for seed in (1, 2, 3)}) == 6
    again = carry_out([run for run in runs[::-1] if run.seed != 2])
    assert {name: outcome.trace_hash for name, outcome in again.items()} == {name: hashes[name] for name in again}


def test_how_they_end(here: Path) -> None:
    text = FILE[: FILE.index("[scenarios.dd]")].replace("seeds = 3", "seeds = [5]") + ENDS
    outcomes = {name.split("/")[1]: outcome for name, outcome in carry_out(planned(text)).items()}
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == {
        "panics": "crash", "panics-as-it-should": "pass", "goes": "pass", "waits": "timeout", "loses": "timeout",
        "complains": "fail", "boots": "pass",
    }  # fmt: skip
    assert outcomes["panics"].message == "Kernel panic - not syncing: sysrq triggered crash"
    assert "sysrq_handle_crash" in outcomes["panics"].detail
    assert outcomes["waits"].message == "10 s of guest time passed; waiting for the end of exec"
    assert outcomes["loses"].fired == 1
    assert outcomes["complains"].message.endswith("BUG: says the test")
    assert "Freeing unused kernel image" in outcomes["boots"].console


def test_boots_that_fail(here: Path) -> None:
    text = FILE.replace("seeds = 3", "seeds = 2")
    for change, verdict, message in (
        ('append = "rdinit=/nothing panic=1"', "crash", "in its boot: guest crashed"),
        ("timeout = 0.2", "timeout", "in its boot: 0.2 s of guest time passed"),
    ):
        outcomes = carry_out(planned(text.replace("vcpus = 2", change)))
        assert {outcome.verdict for outcome in outcomes.values()} == {verdict}, outcomes
        assert all(outcome.message.startswith(message) for outcome in outcomes.values()), outcomes
        assert sum(outcome.boot_s > 0 for outcome in outcomes.values()) == 1
    unready = carry_out(planned(text.replace('ready = "', 'ready = "echo no; exit 4; ')))
    assert {outcome.message for outcome in unready.values()} == {"cloud: its `ready` command ended with status 4: no"}

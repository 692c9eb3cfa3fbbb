"""Runs of modelled guests: their verdicts, that they are independent and repeatable, and who carries them out."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

import guestlib
from pvirq.lab.campaign import pool, spec, workers
from pvirq.lab.campaign.cluster import Cluster
from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Plan, Run
from pvirq.lab.campaign.spec import CampaignError

FILE = """
[campaign]
seeds = 2
timeout = "10s"
trace = "failures"
[kernels.old]
model = "2.6.18"
disk = ["disk.img,raw,xvda,w", { vdev = "xvdb", size = "64K" }]
[kernels.suse]
model = "suse"
vcpus = 2
disk = { vdev = "xvda", size = "64K" }
"""
WORK = """
import ctypes, os, time

count = 0

def disk(host, guest, rng, tries=20):
    global count
    count += 1
    assert count == 1, "another run has been here"
    def work():
        disk = yield from guest.wait_disk("xvda")
        first = yield from disk.read(0, 1)
        assert first == b"a" * 512 or first == bytes(512), "another run has been here"
        for _ in range(tries):
            sector = rng.randrange(disk.sectors)
            data = rng.randbytes(512)
            yield from disk.write(sector, data)
            yield from disk.write(0, data)
            assert (yield from disk.read(sector, 1)) == data
    thread = guest.kernel.spawn("work", work())
    assert host.run(lambda: thread.done, 10**10)
    thread.result()
    print("done", guest.name)

def compares(seed):
    assert seed == 7

def says(seed):
    assert seed > 100, f"{seed} is too few"

def breaks():
    print("here")
    return {}["key"]

def asks(gest):
    pass

def crosses(host, guest):
    guest.kernel.printk("BUG: soft lockup")

def sleeps(host, guest):
    host.run(lambda: False)

def waits(host):
    for i in range(20):
        host.clock.at(host.clock.now() + i * 10**9, lambda: None)
    host.run(lambda: False)

def kills_its_worker():
    if not os.path.exists("killed"):
        open("killed", "w").close()
        with open(f"/proc/{os.getppid()}/stat") as runner:
            os.kill(int(runner.read().rpartition(")")[2].split()[1]), 9)
        time.sleep(60)

def loops():
    while True:
        pass

def dies():
    print("about to")
    import sys
    sys.stdout.flush()
    os.kill(os.getpid(), 11)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "disk.img").write_bytes(b"a" * (64 << 10))
    return tmp_path


def planned(scenarios: str, kernels: str = FILE) -> list[Run]:
    return list(Plan(spec.loads(kernels + scenarios, "x.toml"), print))


def look(seconds: float) -> None:
    time.sleep(seconds)


def carry_out(runs: list[Run]) -> dict[str, Outcome]:
    return {run.name: outcome for run, outcome in workers.here(runs, look)}


def one(function: str, more: str = "") -> Outcome:
    """What comes of a function, once."""
    runs = planned(f'[scenarios.s]\npython = "work.py:{function}"\n{more}\n[[include]]\nkernels = "old"\nseeds = [3]\n')
    (outcome,) = carry_out(runs).values()
    return outcome


def test_runs_are_independent(here: Path) -> None:
    image = (here / "disk.img").read_bytes()
    outcomes = carry_out(planned('[scenarios.disk]\npython = "work.py:disk"\n'))
    assert [(name, outcome.verdict, outcome.message) for name, outcome in outcomes.items()] == [
        (f"{kernel}/disk/none/{seed}", "pass", "") for kernel in ("old", "suse") for seed in (1, 2)
    ]
    for outcome in outcomes.values():
        assert outcome.output == "done guest\n"
        assert outcome.virtual_ns > 0
        assert outcome.wall_s > 0
    assert (here / "disk.img").read_bytes() == image


def test_runs_are_repeatable_in_any_order(here: Path) -> None:
    runs = planned('[scenarios.disk]\npython = "work.py:disk"\n')
    first, second = carry_out(runs), carry_out(runs[::-1])
    for name, outcome in first.items():
        assert len(outcome.trace_hash) == 64
        assert (second[name].trace_hash, second[name].virtual_ns) == (outcome.trace_hash, outcome.virtual_ns), name
    assert len({outcome.trace_hash for outcome in first.values()}) == len(first)  # a seed makes a difference


VERDICTS = [
    ("compares", "fail", "work.py:26: assert seed == 7"),
    ("says", "fail", "work.py:29: 3 is too few"),
    ("breaks", "error", "KeyError: 'key'"),
    ("asks", "error", "work.py:asks: no 'gest' to call it with; there are host, guest"),
    ("gone", "error", "no function gone"),
    ("crosses", "fail", "in the console: BUG: soft lockup"),
    ("sleeps", "stuck", "every vCPU waits for an event"),
    ("waits", "timeout", "10 s of guest time passed"),
    ("dies", "error", "its process ended without a result (signal 11)"),
]


@pytest.mark.parametrize(("function", "verdict", "message"), VERDICTS)
def test_verdicts(here: Path, function: str, verdict: str, message: str) -> None:
    outcome = one(function)
    assert outcome.verdict == verdict, outcome
    assert message in outcome.message


def test_what_is_kept_of_a_failure(here: Path) -> None:
    outcome = one("breaks")
    assert outcome.output == "here\n"
    assert outcome.detail.startswith("Traceback (most recent call last):\n")
    assert "perform.py" not in outcome.detail
    assert 'return {}["key"]' in outcome.detail
    assert outcome.trace is not None
    dead = one("dies")
    assert dead.output.startswith("about to\n")


def test_a_run_that_hangs_is_killed(here: Path) -> None:
    runs = planned('[scenarios.s]\npython = "work.py:loops"\nlimit = 0.3\n[scenarios.t]\npython = "work.py:says"\n')
    began = time.monotonic()
    outcomes = carry_out(runs)
    assert time.monotonic() - began < 60
    assert [outcome.verdict for outcome in outcomes.values()] == ["hung", "hung", "fail", "fail"] * 2
    assert "0.3 s passed in reality" in outcomes["old/s/none/1"].message


def test_an_expectation_of_the_console(here: Path) -> None:
    assert one("crosses", 'expect = { no_console = "" }').verdict == "pass"
    assert one("crosses", 'expect = { no_console = "", console = "soft.*lock" }').verdict == "pass"
    wanting = one("crosses", 'expect = { no_console = "", console = "^hard" }')
    assert (wanting.verdict, wanting.message) == ("fail", "nothing in the console fits '^hard'")


def test_scenario_files(here: Path) -> None:
    (here / "storm.toml").write_text(
        '[dom0]\nplatform = "recorded"\n[[domain]]\nname = "g"\nkernel = "suse"\ndisk = [{ name = "xvda" }]\n'
        '[[workload]]\non = "g"\nkind = "disk"\nop = "mixed"\ncount = 50\n'
    )
    outcomes = carry_out(planned('[scenarios.storm]\nfile = "storm.toml"\n'))
    assert [outcome.verdict for outcome in outcomes.values()] == ["pass"] * 4
    hashes = {outcome.trace_hash for outcome in outcomes.values()}
    assert len(hashes) == 4
    (short,) = carry_out(planned('[scenarios.storm]\nfile = "storm.toml"\nset = "duration=1h"\n')[:1]).values()
    assert (short.verdict, short.message) == ("timeout", "10 s of guest time passed; the workload isn't done")
    (wrong,) = carry_out(planned('[scenarios.storm]\nfile = "storm.toml"\ndomains = "h"\n')[:1]).values()
    assert (wrong.verdict, wrong.message) == ("error", "domains: storm.toml has no 'h'; there are g")


def test_a_boot_by_itself(here: Path) -> None:
    outcomes = carry_out(planned("[scenarios.boots]\nboot = true\n"))
    assert {outcome.verdict for outcome in outcomes.values()} == {"pass"}


@pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")
def test_a_kernel_that_is_no_linux(here: Path) -> None:
    kernels = f"""
[kernels.small]
kernel = "{guestlib.build("event")}"
memory = "64M"
"""
    runs = planned(
        "[scenarios.whole]\nboot = true\nexpect = { ends = 'poweroff', console = '^done' }\n"
        "[scenarios.reboots]\nboot = true\nexpect = { ends = 'reboot' }\n"
        "[scenarios.command]\nexec = 'true'\n",
        kernels,
    )
    outcomes = {name.split("/")[1]: outcome for name, outcome in carry_out(runs).items()}
    assert (outcomes["whole"].verdict, outcomes["whole"].message) == ("pass", "")
    assert (outcomes["reboots"].verdict, outcomes["reboots"].message) == (
        "fail", "the guest ended: poweroff, expected reboot",
    )  # fmt: skip
    assert outcomes["command"].verdict == "error"
    assert "this kernel takes no commands" in outcomes["command"].message


def test_a_host_that_cannot_be_built(here: Path) -> None:
    runs = planned(
        "[scenarios.boots]\nboot = true\n", FILE.replace('disk = { vdev = "xvda"', 'disk = { vdev = "nonsense"')
    )
    outcomes = carry_out(runs)
    assert [outcome.verdict for outcome in outcomes.values()] == ["pass", "pass", "error", "error"]
    assert "nonsense" in outcomes["suse/boots/none/1"].message


def test_a_file_that_changes_meanwhile(here: Path) -> None:
    runs = planned("[scenarios.boots]\nboot = true\n")
    (here / "disk.img").write_bytes(b"b" * (64 << 10))
    outcomes = carry_out(runs)
    assert outcomes["old/boots/none/1"].verdict == "error"
    assert "disk.img is not what it was when the campaign began" in outcomes["old/boots/none/1"].message


# -- workers -----------------------------------------------------------------------------------------------------------


def children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def test_a_runner_that_is_lost_is_replaced(here: Path) -> None:
    run = planned('[scenarios.s]\npython = "work.py:says"\n')[0]
    mine = pool.Pool()
    before = children()
    try:
        assert mine.run("a", run).verdict == "fail"
        (runner,) = children() - before
        os.kill(runner, 9)
        assert mine.run("a", run).verdict == "fail"
        (other,) = children() - before
        assert other != runner
        assert mine.run("a", run).verdict == "fail"
        assert children() - before == {other}
    finally:
        mine.close()
    assert children() == before


def test_two_workers(here: Path) -> None:
    pytest.importorskip("distributed")
    runs = planned('[scenarios.disk]\npython = "work.py:disk"\n[scenarios.says]\npython = "work.py:says"\nlimit = 60\n')
    alone = carry_out(runs)
    together = {run.name: outcome for run, outcome in workers.on_workers(runs, look, workers=2)}
    assert len(together) == len(runs)
    for name, outcome in alone.items():
        other = together[name]
        assert (other.verdict, other.message, other.trace_hash) == (
            outcome.verdict,
            outcome.message,
            outcome.trace_hash,
        )


def test_a_run_whose_worker_is_lost_is_tried_again(here: Path) -> None:
    pytest.importorskip("distributed")
    runs = planned('[scenarios.kills]\npython = "work.py:kills_its_worker"\n[[include]]\nkernels = "old"\n')
    outcomes = [outcome for _, outcome in workers.on_workers(runs, look, workers=1)]
    assert [(outcome.verdict, outcome.message) for outcome in outcomes] == [("pass", "")] * len(runs)
    assert (here / "killed").exists()


def test_a_cluster_of_somebody_elses(here: Path) -> None:
    pytest.importorskip("distributed")
    runs = planned('[scenarios.says]\npython = "work.py:says"\n')
    with Cluster(1) as cluster:
        address = cluster.address(look, 0.02)
        for _ in range(2):
            outcomes = [outcome.verdict for _, outcome in workers.on_workers(runs, look, scheduler=address)]
            assert outcomes == ["fail"] * len(runs)
            assert str(here) not in runners()


def runners() -> list[str]:
    """Where those of all campaigns work."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and b"campaign.runner" in (process / "cmdline").read_bytes():
                found.append(os.readlink(process / "cwd"))
    return found


def test_a_cluster_that_is_not_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(workers, "CONNECT_S", 0.5)
    runs = planned("[scenarios.boots]\nboot = true\n")
    for address in ("nonsense://x", "tcp://127.0.0.1:1"):
        with pytest.raises(CampaignError, match=f"--scheduler {address}: "):
            next(workers.on_workers(runs, look, scheduler=address))

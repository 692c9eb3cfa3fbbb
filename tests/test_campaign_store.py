"""The file of results: what is kept, what needn't be run again, who may read it meanwhile."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from pvirq.lab.campaign import report, spec
from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Plan, Run
from pvirq.lab.campaign.spec import CampaignError
from pvirq.lab.campaign.store import SCHEMA, Store, exclusive, results_path

FILE = """
[campaign]
seeds = 3
[kernels.old]
model = "2.6.18"
[kernels.suse]
model = "suse"
[scenarios.boots]
boot = true
"""


def planned(text: str = FILE) -> Plan:
    return Plan(spec.loads(text, "x.toml"), print)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "x.sqlite", create=True) as store:
        yield store


def begin(store: Store, plan: Plan, *, fresh: bool = False) -> list[Run]:
    store.plan("x", "x.toml", FILE, plan, fresh=fresh)
    return list(plan)


def test_results_are_kept(store: Store) -> None:
    runs = begin(store, planned())
    trace = zstandard.compress(b'{"k":"raise"}\n' * 1000)
    outcome = Outcome("crash", "panic", "report", 5_000, 0.25, 1.5, 3, "abc", trace, "last words", "said")
    store.add(runs[1], outcome, "pvirq ...")
    store.add(runs[0], Outcome("pass"), "pvirq ...")
    first, second = store.results()
    assert (first.name, first.verdict) == ("old/boots/none/1", "pass")
    assert (second.name, second.verdict, second.message, second.detail) == (
        "old/boots/none/2",
        "crash",
        "panic",
        "report",
    )
    assert (second.virtual_ns, second.wall_s, second.boot_s, second.fired) == (5_000, 0.25, 1.5, 3)
    assert second.trace_hash == "abc"
    assert (second.console, second.output, second.command) == ("last words", "said", "pvirq ...")
    assert store.trace(second) == b'{"k":"raise"}\n' * 1000
    assert store.trace(first) is None
    assert store.find("old/boots/none/2") == store.find(str(second.id)) == second
    with pytest.raises(CampaignError, match="no result of a run 'old/boots/none/3'"):
        store.find("old/boots/none/3")
    assert store.campaign()["runs"] == 6


def test_a_result_takes_the_place_of_an_earlier_one(store: Store) -> None:
    run = begin(store, planned())[0]
    store.add(run, Outcome("fail", trace=zstandard.compress(b"x")), "")
    store.add(run, Outcome("pass"), "")
    (result,) = store.results()
    assert result.verdict == "pass"
    assert store.trace(result) is None


def test_what_is_done(store: Store) -> None:
    runs = begin(store, planned())
    for run, verdict in zip(runs, ("pass", "fail", "error", "hung"), strict=False):
        store.add(run, Outcome(verdict), "")
    done = store.done()
    assert {seed for _, _, _, seed, _ in done} == {1, 2}
    assert len(done) == 3  # an error may be gone the next time
    assert ("old", "boots", "none", 1, runs[0].cell.definition) in done


def test_what_a_file_has_no_more_is_kept_apart(store: Store) -> None:
    for run in begin(store, planned()):
        store.add(run, Outcome("pass"), "")
    begin(store, planned(FILE.replace("seeds = 3", "seeds = [2, 9]")))
    assert [result.name for result in store.results()] == ["old/boots/none/2", "suse/boots/none/2"]
    begin(store, planned())
    assert len(list(store.results())) == 6
    begin(store, planned(), fresh=True)
    assert list(store.results()) == []


def test_others_read_meanwhile(store: Store) -> None:
    runs = begin(store, planned())
    store.add(runs[0], Outcome("pass"), "")
    with Store(store.path) as other:
        assert len(list(other.results())) == 1
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            other.add(runs[1], Outcome("pass"), "")
    store.add(runs[1], Outcome("pass"), "")
    store.close()
    assert [path.name for path in store.path.parent.iterdir()] == ["x.sqlite"]
    with Store(store.path) as other:
        assert len(list(other.results())) == 2


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database at all, but long enough to be looked at as if it were one" * 20)
    with sqlite3.connect(tmp_path / "others") as other:
        other.execute("CREATE TABLE runs (x)")
    for name, expected in (
        ("text", "no file of results"),
        ("others", "no file of a campaign"),
        ("gone", "no results yet"),
    ):
        with pytest.raises(CampaignError, match=expected):
            Store(tmp_path / name)
    with pytest.raises(CampaignError, match="no file of a campaign"):
        Store(tmp_path / "others", create=True)


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with exclusive(path), pytest.raises(CampaignError, match="another pvirq"), exclusive(path):
        pass
    with exclusive(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_schema_is_in_the_docs() -> None:
    docs = Path(__file__).parent.parent / "docs/lab-campaigns.md"
    assert f"```sql{SCHEMA}```" in docs.read_text()


def test_where_results_are() -> None:
    assert results_path("a/x.toml") == Path("a/x.sqlite")
    assert results_path("a/y.sqlite") == Path("a/y.sqlite")


# -- reports -----------------------------------------------------------------------------------------------------------


def test_tables(store: Store) -> None:
    for run, verdict in zip(begin(store, planned()), ("pass", "fail", "stuck", "pass", "pass", "pass"), strict=True):
        store.add(run, Outcome(verdict, "why", virtual_ns=1_500_000_000, wall_s=run.seed / 10), "pvirq again")
    results = list(store.results())
    assert report.table(report.summarise(results)).splitlines() == [
        "kernel  scenario  faults  runs  pass  fail  stuck  guest time  real time  failing seeds",
        "old     boots     none       3     1     1      1       1.5 s     200 ms  2, 3",
        "suse    boots     none       3     3     -      -       1.5 s     200 ms",
    ]
    assert list(report.failure_lines(results, 1)) == ["old/boots/none/2  fail     why", "and 1 more"]
    assert report.failure_text(results[2]).startswith("old/boots/none/3: stuck: why\n  again: pvirq again\n")
    assert json.loads(json.dumps([cell.to_json() for cell in report.summarise(results)]))[0]["failing_seeds"] == [2, 3]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0054637, "5.46 ms"),
        (1.234, "1.23 s"),
        (59.9, "59.9 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_plots(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pvirq.lab.campaign.plots import plot

    with pytest.raises(CampaignError, match="no results to plot"):
        plot("x", [], tmp_path / "x.png")
    for run, verdict in zip(begin(store, planned()), ("pass", "fail", "stuck", "pass", "pass", "pass"), strict=True):
        store.add(run, Outcome(verdict, wall_s=0.1 * 10**run.seed), "")
    results = list(store.results())
    plot("x", results, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    plot("x", results, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
    with pytest.raises(CampaignError, match="not supported"):
        plot("x", results, tmp_path / "x.docx")

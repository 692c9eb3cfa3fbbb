"""Which runs a campaign has, what defines them, and how a part of them is chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

from pvirq.lab.campaign import plan, spec
from pvirq.lab.campaign.plan import Plan
from pvirq.lab.campaign.spec import CampaignError

FILE = """
[campaign]
seeds = 2
[kernels.old]
model = "2.6.18"
[kernels.suse]
model = "suse"
[scenarios.work]
python = "work.py:work"
[scenarios.net-storm]
file = "storm.toml"
[faults.none]
[faults.other]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PVIRQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work.py").write_text("def work(host): pass\n")
    (tmp_path / "storm.toml").write_text("")
    (tmp_path / "vmlinuz").write_bytes(b"no kernel")
    (tmp_path / "disk.img").write_bytes(bytes(4096))
    return tmp_path


def planned(text: str) -> Plan:
    return Plan(spec.loads(text, "x.toml"), print)


def names(text: str) -> list[str]:
    return [run.name for run in planned(text)]


def test_all_of_each(here: Path) -> None:
    found = names(FILE)
    assert len(found) == len(planned(FILE)) == 2 * 2 * 2 * 2
    assert found[:3] == ["old/work/none/1", "old/work/none/2", "old/work/other/1"]
    assert len(set(found)) == len(found)


def test_include_and_exclude(here: Path) -> None:
    text = FILE + '[[include]]\nkernels = "s*"\n[[include]]\nkernels = "suse"\nfaults = "other"\nseeds = [9]\n'
    text += '[[exclude]]\nscenarios = "net-*"\nfaults = "none"\n'
    assert names(text) == ["suse/work/none/1", "suse/work/none/2", "suse/work/other/9", "suse/net-storm/other/9"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ('[[include]]\nkernels = "linux"', 'x.toml:15: expected kernels of this file: "linux" is none of old, suse'),
        ('[[exclude]]\nkernels = "*"', "x.toml: nothing is left to be run"),
        ('[scenarios.sh]\nexec = "true"', "x.toml:14: there is no kernel that this can run with: exec is for real"),
    ],
)
def test_what_cannot_be(here: Path, more: str, expected: str) -> None:
    with pytest.raises(CampaignError) as error:
        planned(FILE + more)
    assert str(error.value).startswith(expected)


def test_real_and_modelled_kernels_have_their_own_scenarios(here: Path) -> None:
    text = FILE + '[kernels.real]\nkernel = "vmlinuz"\n[scenarios.sh]\nexec = "true"\n[scenarios.up]\nboot = true\n'
    cells = {cell.name for cell in planned(text).cells}
    assert "real/sh/none" in cells
    assert "real/work/none" in cells
    assert "real/net-storm/none" not in cells
    assert "old/sh/none" not in cells
    assert "old/up/none" in cells
    starts = {cell.scenario: cell.start for cell in planned(text).cells if cell.kernel == "real"}
    assert starts["sh"].booted
    assert not starts["up"].booted


def definitions(text: str) -> dict[str, str]:
    return {cell.name: cell.definition for cell in planned(text).cells}


def test_a_definition_is_all_that_matters(here: Path) -> None:
    text = FILE + '[kernels.real]\nkernel = "vmlinuz"\ndisk = "disk.img,raw,xvda,w"\n[scenarios.up]\nboot = true\n'
    before = definitions(text)
    assert definitions(text) == before

    def changed() -> set[str]:
        return {name.rpartition("/")[0] for name, value in definitions(text).items() if before[name] != value}

    (here / "work.py").write_text("def work(guest): pass\n")
    assert changed() == {"old/work", "suse/work", "real/work"}
    (here / "work.py").write_text("def work(host): pass\n")
    (here / "disk.img").write_bytes(bytes(8192))
    assert changed() == {"real/work", "real/up"}
    (here / "disk.img").write_bytes(bytes(4096))
    (here / "vmlinuz").write_bytes(b"another")
    assert changed() == {"real/work", "real/up"}
    (here / "vmlinuz").write_bytes(b"no kernel")
    text = text.replace('model = "suse"', 'model = "suse"\nvcpus = 2')
    assert {name.partition("/")[0] for name in changed()} == {"suse"}
    text = text.replace("seeds = 2", "seeds = 3\nlimit = 5")  # how often, and how long at most, isn't what
    assert {name.partition("/")[0] for name in changed()} == {"suse"}


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        ([], 16),
        (["old"], 8),
        (["*/work"], 8),
        (["old/work/none/1"], 1),
        (["old/*/*/2", "suse"], 12),
        (["old/work/none/77", "old/w*/none/77"], 1),
    ],
)
def test_a_part(here: Path, patterns: list[str], count: int) -> None:
    runs = planned(FILE).select(patterns)
    assert len(runs) == len({run.name for run in runs}) == count


@pytest.mark.parametrize(
    "pattern",
    ["x", "old//none", "old/work/none/1/2", "old/work/none/x", "old/work/none/01", f"old/work/none/{1 << 63}"],
)
def test_a_part_that_is_none(here: Path, pattern: str) -> None:
    with pytest.raises(CampaignError, match="--only"):
        planned(FILE).select([pattern])


def test_named_in_full() -> None:
    assert plan.names_one("a/b/c/1")
    assert not plan.names_one("a/b/c")
    assert not plan.names_one("a/*/c/1")
    assert not plan.names_one("a/b/c/1*")

"""`pvirq faults`, and --fault where it is wrong; what docs/lab-faults.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pvirq.cli.main import run
from pvirq.lab.faults import Faults
from pvirq.lab.faults.kinds import KINDS

PAGE = (Path(__file__).parent.parent / "docs" / "lab-faults.md").read_text()


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["faults"]) == 0
    out = capsys.readouterr().out
    for kind in KINDS.values():
        assert f"\n{kind.name} " in f"\n{out}"
        assert kind.example in out
        assert kind.does in out


@pytest.mark.parametrize("name", KINDS)
def test_each_kind(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["faults", name]) == 0
    out = capsys.readouterr().out
    assert out.startswith(name)
    assert KINDS[name].example in out
    for param in KINDS[name].all_params:
        assert param.does in out
        assert param.positional or f"{param.name}={param.form.shown}" in out


def test_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    """Found before a kernel is looked for."""
    assert run(["faults", "loose"]) == 2
    assert capsys.readouterr().err == "pvirq: there is no fault 'loose', but 'lose'; `pvirq faults` lists them\n"
    assert run(["boot", "nowhere", "--fault", "delay device=vif-0"]) == 2
    assert capsys.readouterr().err == "pvirq: delay: ns is missing (how much later)\n"
    assert run(["restore", "nowhere", "--fault", "lose count=0"]) == 2
    assert capsys.readouterr().err == "pvirq: lose: count: 0 is no number (at least 1)\n"


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_on_the_page(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}(?: [^`]*)?` \| `(\w+)\(.*$", PAGE, re.MULTILINE)
    assert callable(getattr(Faults, row))


def test_the_examples_of_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)  # they assert what they say


def test_a_storm_where_there_is_no_late_eoi() -> None:
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "storm(" in block]
    first = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
    names: dict[str, object] = {}
    exec("\n".join(line for line in first.splitlines() if line.startswith(("import", "from"))), names)
    old = block.replace("pvirq.Host()", 'pvirq.Host(dom0_kernel="2.6.18")').replace("taken < 1_000", "taken >= 10_000")
    assert old != block
    exec(old, names)

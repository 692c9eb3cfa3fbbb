"""Scenario files: what is read, and that every error says file, line and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.scenario import fields, workload
from pvirq.scenario.load import load, loads, shipped
from pvirq.scenario.schema import Scenario, ScenarioError

GOOD = """title = "x"
seed = 5
duration = "1.5s"
[dom0]
kernel = "suse"
vcpus = 4
[[domain]]
name = "guest"
count = 3
[[domain.disk]]
name = "xvda"
size = "4M"
[[workload]]
on = "guest*"
kind = "compute"
cpu = 0
time = "20ms"
"""


def test_values_have_their_units() -> None:
    scenario = loads(GOOD, "good.toml")
    assert (scenario.seed, scenario.duration) == (5, 1_500_000_000)
    assert (scenario.dom0.kernel, scenario.dom0.vcpus) == ("suse", 4)
    assert scenario.domains[0].disks[0].size == 4 << 20
    (compute,) = scenario.workload
    assert isinstance(compute, workload.Compute)
    assert (compute.on, compute.cpus, compute.time, compute.count) == (["guest*"], [0], 20_000_000, 1)


def test_defaults_are_not_shared() -> None:
    first, second = loads("", "a.toml"), loads("", "b.toml")
    first.domains.append(first.domains)  # type: ignore[arg-type]
    assert second.domains == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = -1", "t.toml:1: expected a whole number from 0 to 9223372036854775807, not -1"),
        ("seed = true", "t.toml:1: expected a whole number from 0 to 9223372036854775807, not true"),
        ("\nsed = 1", 't.toml:2: unknown key "sed": did you mean "seed"?'),
        ("duration = 3", 't.toml:1: expected a time such as "20ms", "1.5s" or "10min", not 3'),
        ('[dom0]\nkernel = "2.4"', 't.toml:2: expected one of "pvops", "pvops-2l", "2.6.18", "suse", not "2.4"'),
        ("dom0 = 3", "t.toml:1: expected a table, not 3"),
        (
            "[[domain]]\nvcpus = 2",
            't.toml:1: expected a key "name" here: its name, by which workloads and options mean it',
        ),
        ('[[domain]]\nname = "a"\n[[domain]]\nname = "a"', 't.toml:4: expected a name of its own: "a" is taken'),
        ('[[domain]]\nname = "dom0"', 't.toml:2: expected a name of its own: "dom0" is taken'),
        ('[[domain]]\nname = "a"\nvcpus = 33', "t.toml:3: expected a whole number from 1 to 32, not 33"),
        (
            '[[domain]]\nname = "a"\ndisk = [\n{name = "x"}, {name = "y", size = "1Q"}]',
            "t.toml:3: expected a size such as",
        ),
        ('[[workload]]\non = "a"', 't.toml:1: expected a key "kind" here: compute, disk'),
        ('[[workload]]\non = "a"\nkind = "dsk"', 't.toml:3: expected one of "compute", "disk"'),
        ('[[workload]]\non = "a"\nkind = "compute"', 't.toml:1: expected a key "time" here: how long, each time'),
        ('[[workload]]\non = []\nkind = "compute"\ntime = "1s"', "t.toml:2: expected a text, or several, not a list"),
        ('[[workload]]\non = "a"\nkind = "disk"\ntime = "1s"', 't.toml:4: unknown key "time"'),
        ("workload = 3", "t.toml:1: expected a list of tables, not 3"),
        ("x = [1,\n2\n[y", "t.toml:3: "),
        ("x =", "t.toml:1: not TOML: Invalid value"),
        ("x = 1\nx = 2", "t.toml:2: "),
    ],
)
def test_errors_name_file_line_and_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        loads(text, "t.toml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_overrides() -> None:
    scenario = loads(GOOD, "t.toml", ["seed=9", "dom0.vcpus = 8", "guest.vcpus=2", "guest.kernel=pvops", "title=a b"])
    assert (scenario.seed, scenario.dom0.vcpus, scenario.title) == (9, 8, "a b")
    assert (scenario.domains[0].vcpus, scenario.domains[0].kernel) == (2, "pvops")
    assert loads("", "t.toml", ["dom0.vcpus=3"]).dom0.vcpus == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected NAME=VALUE"),
        ("=3", "--set =3: expected NAME=VALUE"),
        ("gest.vcpus=2", "--set gest.vcpus=2: no domain is called 'gest'"),
        ("seed.x=2", "--set seed.x=2: there is nothing to set 'x' of"),
        ("seed=zero", "--set seed=zero: expected a whole number"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        loads(GOOD, "t.toml", [override])
    assert str(error.value).startswith(message)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    with pytest.raises(ScenarioError, match=r"my\.toml: No such file"):
        load(str(path))
    path.write_bytes(b"seed = 1\n\xff")
    with pytest.raises(ScenarioError, match=r"my\.toml:2: expected UTF-8"):
        load(str(path))
    path.write_text(GOOD)
    assert load(str(path)).seed == 5
    with pytest.raises(ScenarioError, match=r"Is a directory"):
        load(str(tmp_path))


def test_what_ships_loads() -> None:
    names = shipped()
    assert {"writeup-guest", "writeup-dom0"} <= set(names)
    for name, title in names.items():
        assert title
        assert load(name).title == title
    with pytest.raises(ScenarioError, match='did you mean "writeup-guest"'):
        load("writeup-gest")


def test_every_setting_is_described() -> None:
    for cls in (Scenario, *workload.KINDS.values()):
        for key, kind, about in fields.describe(cls):
            assert key
            assert kind
            assert about
    for cls in workload.KINDS.values():
        assert cls.__doc__


KEYS = ["seed", "dom0", "domain", "workload", "on", "kind", "name", "disk", "vif", "count", "show", "duration"]
TOML = st.recursive(
    st.one_of(st.integers(), st.booleans(), st.text("ab1 ", max_size=4), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYS), TOML))
def test_no_table_raises_anything_else(table: dict[str, object]) -> None:
    text = "\n".join(f"{key} = {_toml(value)}" for key, value in table.items())
    _load_or_error(text)


def _load_or_error(text: str) -> None:
    message = "t.toml:"
    try:
        loads(text, "t.toml")
    except ScenarioError as error:
        message = str(error)
    assert message.startswith("t.toml:")
    assert "\n" not in message


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


@given(st.text(max_size=60))
def test_no_text_raises_anything_else(text: str) -> None:
    _load_or_error(text)

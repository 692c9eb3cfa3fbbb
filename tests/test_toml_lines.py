"""Lines of values in TOML files."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.scenario.toml_lines import line_of

TEXT = '''# a comment = 1
seed = 1
title = """
size = "not a key"
[not a header]
"""
[dom0]
kernel = "suse"   # x = [
devices = [
  { type = "i8042" },
  { type = "rtc" },  # ] not the end
]
after = 2
[[domain]]
name = "a [b"
[[domain.disk]]
vdev = "xvda"
[[domain.disk]]
vdev = "xvdb"
"quoted key" = 1
[[domain]]
name = 'b'
disk.size = "4M"
[[domain.disk2]]
x = 1
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("seed",), 2),
        (("title",), 3),
        (("size",), 1),  # there is none
        (("dom0",), 7),
        (("dom0", "kernel"), 8),
        (("dom0", "devices", 1, "type"), 9),
        (("dom0", "after"), 13),
        (("dom0", "missing"), 7),
        (("domain", 0), 14),
        (("domain", 0, "name"), 15),
        (("domain", 0, "disk", 0, "vdev"), 17),
        (("domain", 0, "disk", 1, "vdev"), 19),
        (("domain", 0, "disk", 1, "quoted key"), 20),
        (("domain", 1, "name"), 22),
        (("domain", 1, "disk", "size"), 23),
        (("domain", 1, "disk2", 0, "x"), 25),
        (("domain", 7, "name"), 14),
    ],
)
def test_lines(path: tuple[str | int, ...], line: int) -> None:
    tomllib.loads(TEXT)  # valid
    assert line_of(TEXT, path) == line


@given(st.lists(st.sampled_from(["table", "array", "key", "text", "list"]), max_size=12))
def test_every_key_is_found_where_it_was_written(kinds: list[str]) -> None:
    lines: list[str] = []
    wanted: dict[tuple[str | int, ...], int] = {}
    table: tuple[str | int, ...] = ()
    arrays = 0
    for i, kind in enumerate(kinds):
        if kind == "table":
            table = (f"t{i}",)
            lines.append(f"[t{i}]")
            wanted[table] = len(lines)
        elif kind == "array":
            table = ("many", arrays)
            arrays += 1
            lines.append("[[many]]")
            wanted[table] = len(lines)
        else:
            lines.append({"key": f"k{i} = 1", "text": f'k{i} = """', "list": f"k{i} = ["}[kind])
            wanted[(*table, f"k{i}")] = len(lines)
            lines += {"key": [], "text": ["[x]", 'y = "1', '"""'], "list": ["  1, # ]", "  2,", "]"]}[kind]
    text = "\n".join(lines)
    tomllib.loads(text)
    assert {path: line_of(text, path) for path in wanted} == wanted

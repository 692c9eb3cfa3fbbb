"""Reading scenario files: TOML into settings, each error with its file, line and what was expected."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, Final

from pvirq.scenario import fields, workload
from pvirq.scenario.fields import Unexpected
from pvirq.scenario.schema import Scenario, ScenarioError, Source
from pvirq.scenario.toml_lines import Path as Setting
from pvirq.scenario.toml_lines import read_text

MAX_FILE: Final = 4 << 20
_AT: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")


def shipped() -> dict[str, str]:
    """The scenarios that ship: name -> title."""
    found = {}
    for entry in sorted(resources.files("pvirq.scenario").joinpath("shipped").iterdir(), key=lambda entry: entry.name):
        if entry.name.endswith(".toml"):
            found[entry.name.removesuffix(".toml")] = str(tomllib.loads(entry.read_text()).get("title", ""))
    return found


def load(name: str, overrides: Iterable[str] = ()) -> Scenario:
    """Read a scenario: a file, or the name of one that ships. `overrides` are as in `override`. ScenarioError."""
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        return loads(_read_shipped(name), f"{name}.toml", overrides)
    return loads(read_text(name, MAX_FILE, "scenario", ScenarioError), name, overrides)


def _read_shipped(name: str) -> str:
    names = list(shipped())
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        hint = f'did you mean "{near[0]}"?' if near else f"there ship {', '.join(names)};"
        raise ScenarioError(f"no scenario {name!r}: {hint} a file's name ends in .toml")
    return resources.files("pvirq.scenario").joinpath("shipped", f"{name}.toml").read_text()


def loads(text: str, name: str, overrides: Iterable[str] = ()) -> Scenario:
    """The same from a text; `name` is for messages."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        where = _AT.search(str(error))
        line = int(where[1]) if where and where[1] else text.count("\n") + 1
        raise ScenarioError(f"{name}:{line}: not TOML: {_AT.sub('', str(error))}") from None
    source = Source(name, text)
    for one in overrides:
        source.changed[override(raw, one)] = one
    try:
        scenario = _scenario(raw)
    except Unexpected as error:
        raise source.error(error) from None
    scenario.source = source
    return scenario


def override(raw: dict[str, Any], text: str) -> Setting:
    """Change one setting, whose path is returned: "seed=2", "dom0.vcpus=8", "NAME.vcpus=2" for a domain by name.

    ScenarioError.
    """
    where, equals, value = text.partition("=")
    parts = where.strip().split(".")
    if not equals or not all(parts):
        raise ScenarioError(f"--set {text}: expected NAME=VALUE, such as seed=2 or dom0.vcpus=8")
    target: Any = raw
    path: Setting = tuple(parts)
    if len(parts) > 1 and parts[0] not in raw:
        domains: Any = raw.get("domain")
        names = [d.get("name") if isinstance(d, dict) else None for d in domains] if isinstance(domains, list) else []
        if parts[0] in names:
            path = ("domain", names.index(parts[0]), *parts[1:])
            target = domains[path[1]]
        elif parts[0] == "dom0":
            target = raw.setdefault("dom0", {})
        else:
            raise ScenarioError(f"--set {text}: no domain is called {parts[0]!r}")
        parts = parts[1:]
    for part in parts[:-1]:
        target = target.get(part) if isinstance(target, dict) else None
    if not isinstance(target, dict):
        raise ScenarioError(f"--set {text}: there is nothing to set {parts[-1]!r} of")
    try:
        target[parts[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        target[parts[-1]] = value.strip()  # a text without quotes
    return path


def _scenario(raw: dict[str, Any]) -> Scenario:
    scenario = fields.parse(Scenario, raw, (), known=["workload"])
    for i, one in enumerate(fields.tables(fields.raw_table()).parse(raw.get("workload", []), ("workload",))):
        path = ("workload", i)
        one.pop(None)
        kind = fields.choice(*workload.KINDS).parse(_take_kind(one, path), (*path, "kind"))
        scenario.workload.append(fields.parse(workload.KINDS[kind], one, path))
        scenario.workload[-1].path = path
    _check(scenario)
    return scenario


def _take_kind(one: dict[Any, Any], path: tuple[str | int, ...]) -> object:
    if "kind" not in one:
        raise Unexpected(path, 'expected a key "kind" here: ' + ", ".join(workload.KINDS))
    return one.pop("kind")


def _check(scenario: Scenario) -> None:
    """What one setting alone can't tell."""
    seen = {"dom0"}
    for i, domain in enumerate(scenario.domains):
        if domain.name in seen:
            raise Unexpected(("domain", i, "name"), f'expected a name of its own: "{domain.name}" is taken')
        seen.add(domain.name)
        names = [disk.name for disk in domain.disks]
        for j, name in enumerate(names):
            if name in names[:j]:
                raise Unexpected(("domain", i, "disk", j, "name"), f'expected a name of its own: "{name}" is taken')

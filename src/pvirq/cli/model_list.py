"""`pvirq model --list`: everything that a scenario file may say, from the very tables that read it."""

from __future__ import annotations

import textwrap
from typing import Any

from pvirq.hardware.platform import MACHINES, device_help
from pvirq.linux.personalities import KERNELS
from pvirq.scenario import fields, schema, workload
from pvirq.scenario.load import shipped

WIDTH = 112


def listing_text() -> str:
    """The whole list."""
    parts = [
        _section("Scenarios that ship", shipped()),
        _section("Kernels", dict(KERNELS)),
        _section("Machines (platform of dom0)", {name: machine.help for name, machine in MACHINES.items()}),
        _devices(),
        _settings("At the top of a scenario", schema.Scenario),
        _settings("[dom0]", schema.Dom0),
        _settings("[[domain]]", schema.Domain),
        _settings("[[domain.disk]]", schema.Disk),
        _settings("[[domain.vif]]", schema.Vif),
        _settings("[[workload]] of any kind", workload.Workload),
    ]
    general = {key for key, _, _ in fields.describe(workload.Workload)}
    for name, cls in workload.KINDS.items():
        about = (cls.__doc__ or "").split("\n", maxsplit=1)[0]
        parts.append(_settings(f'[[workload]] kind = "{name}": {about}', cls, without=general))
    return "\n".join(parts)


def _section(title: str, entries: dict[str, str]) -> str:
    width = max(map(len, entries), default=0)
    return f"{title}\n" + "".join(f"  {name:<{width}}  {about}\n" for name, about in entries.items())


def _devices() -> str:
    lines = ["Device types ([[dom0.device]]): type, name, and these parameters; actions of a workload\n"]
    for device in device_help():
        actions = "; ".join(f'action "{action}": {about}' for action, about in device.uses.items())
        lines.append(f"  {device.name:<10}  {device.about}\n")
        for text in ("  ".join(device.parameters), actions):
            lines += [f"              {line}\n" for line in textwrap.wrap(text, WIDTH - 14)]
    return "".join(lines)


def _settings(title: str, cls: type[Any], without: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    lines = [f"{title}\n"]
    for key, kind, about in fields.describe(cls):
        if key not in without:
            text = textwrap.wrap(f"{about} ({kind})", WIDTH - 14)
            lines.append(f"  {key:<10}  " + "\n              ".join(text) + "\n")
    return "".join(lines)

"""A schedule in a file: JSON, one step a line, so that two can be compared by eye and with diff.

    {"check": "enable-then-halt", "fault": true, "order": "sc", "broken": "...", "steps": [
    {"process": 0, "choice": 0, "who": "vcpu0", "what": "reads evtchn_upcall_pending"},
    ...
    ]}

Only `process` and `choice` count; `who` and `what` are for people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvirq.check.guided import Moved


class ScheduleFileError(Exception):
    """Not a schedule; one line that says why."""


@dataclass(frozen=True)
class Schedule:
    check: str
    fault: bool
    order: str
    broken: str | None
    steps: tuple[tuple[int, int], ...]


def write(path: Path, schedule: Schedule, moved: list[Moved]) -> None:
    """Raises OSError."""
    head = {"check": schedule.check, "fault": schedule.fault, "order": schedule.order, "broken": schedule.broken}
    steps = [
        json.dumps({"process": each.process, "choice": each.choice, "who": each.name, "what": each.text})
        for each in moved
    ]
    path.write_text(json.dumps(head)[:-1] + ', "steps": [\n' + ",\n".join(steps) + "\n]}\n")


def read(path: Path) -> Schedule:
    """Raises OSError and ScheduleFileError."""
    try:
        data: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ScheduleFileError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ScheduleFileError(f"{path}: not a schedule")
    steps = data.get("steps")
    kinds = {"check": str, "fault": bool, "order": str, "steps": list}
    for key, kind in kinds.items():
        if not isinstance(data.get(key), kind):
            raise ScheduleFileError(f"{path}: not a schedule: no {key!r}, or not as it is to be")
    assert isinstance(steps, list)
    pairs: list[tuple[int, int]] = []
    for number, step in enumerate(steps, 1):
        process, choice = (step.get("process"), step.get("choice", 0)) if isinstance(step, dict) else (None, None)
        if not (type(process) is int and type(choice) is int and 0 <= process < 1 << 31 and 0 <= choice < 1 << 31):
            raise ScheduleFileError(f"{path}: step {number} has no process and choice")
        pairs.append((process, choice))
    broken = data.get("broken")
    return Schedule(
        data["check"], data["fault"], data["order"], broken if isinstance(broken, str) else None, tuple(pairs)
    )

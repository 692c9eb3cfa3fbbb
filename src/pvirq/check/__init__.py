"""The checker: protocols between CPUs as small programs, and explorers of all their schedules (docs/check.md)."""

from pvirq.check import compiled as _compiled  # noqa: F401 (before all others)
from pvirq.check.cores import explore_all
from pvirq.check.pct import PctResult, pct
from pvirq.check.result import Failure, Result
from pvirq.check.search import count_schedules, explore
from pvirq.check.shortest import shorten
from pvirq.check.steps import (
    Broken,
    End,
    Lock,
    Model,
    Step,
    Thread,
    Var,
    atomically,
    choose,
    fail,
    look,
    mb,
    note,
    rmb,
    wmb,
)
from pvirq.check.threads import ModelError

__all__ = [
    "Broken", "End", "Failure", "Lock", "Model", "ModelError", "PctResult", "Result", "Step", "Thread", "Var",
    "atomically", "choose", "count_schedules", "explore", "explore_all", "fail", "look", "mb", "note", "pct", "rmb",
    "shorten", "wmb",
]  # fmt: skip

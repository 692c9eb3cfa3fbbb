"""The checker: protocols between CPUs as small programs, and explorers of all their schedules (docs/check.md)."""

from pvirq.check.result import Failure, Result
from pvirq.check.search import explore
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
    "Broken", "End", "Failure", "Lock", "Model", "ModelError", "Result", "Step", "Thread", "Var", "atomically",
    "choose", "explore", "fail", "look", "mb", "note", "rmb", "wmb",
]  # fmt: skip

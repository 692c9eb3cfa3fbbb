"""Faults on command: what they are, when they fire, and what each does."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pvirq.lab.faults.manager import FaultError, Faults, Firing, Rule

__all__ = ["FaultError", "Faults", "Firing", "Rule"]


def __getattr__(name: str) -> object:
    """Loaded when first asked for: a command that only names the kinds needs no host."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pvirq.lab.faults import manager

    value: object = getattr(manager, name)
    globals()[name] = value
    return value

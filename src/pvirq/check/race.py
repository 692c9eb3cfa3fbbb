"""A known race: what the code was, which change brought it and which cured it, and a model that has it or hasn't."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from pvirq.check.steps import Model


@dataclass(frozen=True)
class Race:
    """One file of `pvirq.check.races`."""

    name: str  # as in `pvirq check NAME`: words with hyphens
    title: str  # one line
    where: str  # "Xen 4.4-4.14, xen/common/event_fifo.c: evtchn_fifo_set_pending()"
    brought: str  # the commit or release that has it first: "88910061ec6 (4.4)"; "" where it was always there
    cured: str  # the commit, advisory or issue: "71ac522909 (4.15)"
    story: str  # a few sentences: what was done, in which order, what came of it, and what the cure does
    model: Callable[[bool], Model]  # with the fault, or cured; bounded, so that it can be searched to its end


def races() -> dict[str, Race]:
    """All that pvirq knows, by name."""
    from pvirq.check import races as package

    found = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda each: each.name):
        race = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "RACE", None)
        if race is not None:
            found[race.name] = race
    return found

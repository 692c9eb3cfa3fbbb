"""What was typed, for commands that write it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pvirq.lab.replay import Recorded


@dataclass(frozen=True)
class Invocation:
    """The command line behind `pvirq`; with `against` it is run again, to be compared with its trace."""

    command: Sequence[str]
    against: Recorded | None = None


def current() -> Invocation | None:
    """That of the command which runs now; None where somebody else has called it."""
    context = click.get_current_context(silent=True)
    return None if context is None else context.find_object(Invocation)

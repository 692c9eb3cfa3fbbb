"""A schedule as text: a column for each CPU, a sentence for each step."""

from __future__ import annotations

import textwrap
from typing import Final

from pvirq.check.guided import Moved
from pvirq.check.steps import Model

NARROWEST: Final = 24  # of a column; what doesn't fit is for `less -S`
VALUE_MAX: Final = 40


def sentence(moved: Moved, choices: bool = False) -> str:
    """What a step does, what it reads, and what it changes: "clears bit 1 of pending: 2 -> 0"."""
    text = moved.text
    seen = [(name, value) for name, value in moved.read if name not in {change[0] for change in moved.changed}]
    details = [f"{_short(before)} -> {_short(after)}" for _, before, after in moved.changed]
    if len(moved.changed) > 1 or (moved.changed and moved.changed[0][0] not in text):
        details = [f"{name} {_short(before)} -> {_short(after)}" for name, before, after in moved.changed]
    if len(moved.changed) == 1 and text.endswith(f"= {moved.changed[0][2]!r}"):
        return f"{text} (was {_short(moved.changed[0][1])})"
    if seen and not moved.changed:
        details = [_short(value) if name in text else f"{name} = {_short(value)}" for name, value in seen]
    if choices or moved.choice:
        details.insert(0, f"choice {moved.choice}")
    return f"{text}: {', '.join(details)}" if details else text


def _short(value: object) -> str:
    """A value as a reader wants it: words of bits in hex once they are large."""
    text = f"{value:#x}" if type(value) is int and abs(value) > 255 else str(value)
    return text if len(text) <= VALUE_MAX else f"{text[: VALUE_MAX - 3]}..."


def columns(model: Model, moved: list[Moved], wrong: str | None, width: int = 100, lines: bool = False) -> list[str]:
    """The whole table, `width` characters wide where that is enough for its columns; with `lines`, where in the
    source each step is."""
    names = [program.name for program in model.programs]
    used = [slot for slot in range(len(names)) if any(each.thread == slot for each in moved)] or [0]
    number = max(4, len(str(len(moved))) + 2)
    column = max(NARROWEST, (width - number) // len(used) - 2)
    head = " " * number + "  ".join(f"{names[slot]:{column}}" for slot in used)
    table = [head.rstrip(), (" " * number + "  ".join("-" * column for _ in used)).rstrip()]
    for count, each in enumerate(moved, 1):
        text = sentence(each)
        if each.process >= len(names):
            text = f"~ {text}"  # hardware, some time later
        if lines and each.line:
            text += f" [{each.line}]"
        indent = " " * (used.index(each.thread) * (column + 2))
        for at, piece in enumerate(textwrap.wrap(text, column, subsequent_indent="  ", break_on_hyphens=False)):
            table.append(f"{count if not at else '':>{number - 2}}  {indent}{piece}".rstrip())
    if wrong is not None:
        table += ["", *textwrap.wrap(f"=> {wrong}", max(width, NARROWEST), subsequent_indent="   ")]
    return table

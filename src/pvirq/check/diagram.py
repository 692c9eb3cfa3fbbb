"""A schedule as a sequence diagram, Mermaid's or SVG: a lifeline a thread, arrows from writers of values to readers."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final
from xml.sax.saxutils import escape

from pvirq.check.explain import sentence
from pvirq.check.guided import Moved
from pvirq.check.steps import Model

# SVG: in pixels, but for TEXT_MAX.
LANE: Final = 300
MARGIN: Final = 24
HEAD: Final = 56
LINE: Final = 15
PAD: Final = 6
GAP: Final = 10
TEXT_MAX: Final = 42  # characters in a box's line
CHARACTER: Final = 6.6


def flows(moved: list[Moved]) -> Iterator[tuple[int, int, str]]:
    """From which step to which a value went between threads, and the variable's name."""
    last: dict[str, int] = {}
    for number, each in enumerate(moved):
        for name, _ in each.read:
            if name in last and moved[last[name]].thread != each.thread:
                yield last[name], number, name
        for name in each.wrote:
            last[name] = number


def mermaid(model: Model, moved: list[Moved], wrong: str | None) -> str:
    """The text of a Mermaid sequence diagram."""
    lines = ["sequenceDiagram"]
    lines += [f"    participant t{slot} as {_plain(program.name)}" for slot, program in enumerate(model.programs)]
    came: dict[int, list[tuple[int, str]]] = {}
    for begin, end, name in flows(moved):
        came.setdefault(end, []).append((begin, name))
    for number, each in enumerate(moved):
        for begin, name in came.get(number, ()):
            lines.append(f"    t{moved[begin].thread}-->>t{each.thread}: {_plain(name)}")
        text = sentence(each)
        if each.process >= len(model.programs):
            text = f"(later) {text}"
        lines.append(f"    Note over t{each.thread}: {number + 1}. {_plain(text)}")
    if wrong is not None:
        ends = "t0" if len(model.programs) == 1 else f"t0,t{len(model.programs) - 1}"
        lines.append(f"    Note over {ends}: {_plain(wrong)}")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """Mermaid ends a statement at ; and takes # for an entity."""
    return text.translate({ord("#"): "#35;", ord(";"): "#59;", ord("<"): "#lt;", ord(">"): "#gt;"})


def svg(model: Model, moved: list[Moved], wrong: str | None, title: str = "") -> str:
    """A picture of its own, without scripts or fonts from elsewhere."""
    width = 2 * MARGIN + LANE * len(model.programs)
    boxes: list[tuple[float, list[str]]] = []  # top, lines of text
    y: float = HEAD + MARGIN
    for number, each in enumerate(moved):
        text = f"{number + 1}. {'~ ' if each.process >= len(model.programs) else ''}{sentence(each)}"
        lines = textwrap.wrap(text, TEXT_MAX, subsequent_indent="   ", break_on_hyphens=False)
        boxes.append((y, lines))
        y += LINE * len(lines) + PAD + GAP
    verdict = textwrap.wrap(wrong or "", max(TEXT_MAX, int((width - 2 * MARGIN) / CHARACTER)))
    height = y + LINE * (len(verdict) + 1) + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:.0f}" '
            f'viewBox="0 0 {width} {height:.0f}" font-family="monospace" font-size="11">',
            f"<title>{escape(title or 'a schedule')}</title>",
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
            '<path d="M0,0 L7,3 L0,6 z" fill="#b04000"/></marker></defs>',
            f'<rect width="{width}" height="{height:.0f}" fill="#ffffff"/>',
            *_lanes(model, y),
            *_boxes(moved, boxes, len(model.programs)),
            *_arrows(moved, boxes),
            *(
                f'<text x="{MARGIN}" y="{y + LINE * (at + 1):.0f}" font-weight="bold" fill="#a00000">'
                f"{escape(line)}</text>"
                for at, line in enumerate(verdict)
            ),
            "</svg>\n",
        ]
    )


def _middle(thread: int) -> float:
    return MARGIN + LANE * (thread + 0.5)


def _lanes(model: Model, bottom: float) -> Iterator[str]:
    for slot, program in enumerate(model.programs):
        x = _middle(slot)
        yield f'<line x1="{x}" y1="{HEAD}" x2="{x}" y2="{bottom:.0f}" stroke="#bbbbbb" stroke-dasharray="4 4"/>'
        yield f'<text x="{x}" y="{HEAD - 20}" text-anchor="middle" font-weight="bold" font-size="13">' + (
            f"{escape(program.name)}</text>"
        )


def _boxes(moved: list[Moved], boxes: list[tuple[float, list[str]]], threads: int) -> Iterator[str]:
    for each, (top, lines) in zip(moved, boxes, strict=True):
        x = _middle(each.thread) - LANE / 2 + GAP / 2
        fill = "#f4f4f4" if each.process >= threads else "#fff4d6" if each.changed else "#eaf2ff"
        yield (
            f'<rect x="{x}" y="{top:.0f}" width="{LANE - GAP}" height="{LINE * len(lines) + PAD}" rx="3" '
            f'fill="{fill}" stroke="#888888"><title>{escape(each.line or each.name)}</title></rect>'
        )
        for at, line in enumerate(lines):
            yield (
                f'<text x="{x + PAD}" y="{top + LINE * (at + 1) - 1:.0f}" xml:space="preserve">{escape(line)}</text>'
            )


def _arrows(moved: list[Moved], boxes: list[tuple[float, list[str]]]) -> Iterator[str]:
    """From the edge of the box that wrote to the edge of the box that reads."""
    for begin, end, name in flows(moved):
        side = 1 if moved[end].thread > moved[begin].thread else -1
        x1 = _middle(moved[begin].thread) + side * (LANE - GAP) / 2
        x2 = _middle(moved[end].thread) - side * (LANE - GAP) / 2
        y1 = boxes[begin][0] + (LINE * len(boxes[begin][1]) + PAD) / 2
        y2 = boxes[end][0] + (LINE * len(boxes[end][1]) + PAD) / 2
        yield (
            f'<path d="M{x1:.0f},{y1:.0f} L{x2:.0f},{y2:.0f}" fill="none" stroke="#b04000" stroke-opacity="0.7" '
            f'marker-end="url(#head)"><title>{escape(name)}</title></path>'
        )

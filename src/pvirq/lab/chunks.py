"""Text of what was recorded: shapes of lines (`pvirq.lab.lines`) and the values that go into them.

What domains do, they do again and again: the lines of a turn are mostly those of one before, but for times, flows and
arguments. So lines are made by the chunk, several shapes in a row: once of one template for all of them, where the
single line would cost several times as much. Which chunk comes next is mostly the one that came next the last time.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, Final

from pvirq.lab.lines import HANDLED, NEW_FLOW, SAME_FLOW, Flow, Shape, Shapes

MOST_SHAPES: Final = 32  # of a chunk
MOST_CHUNKS: Final = 10_000  # that are kept
_TIME: Final = "\0"  # stands for the time where all of a chunk's lines have the same, known before


def _none(arguments: list[Any]) -> tuple[()]:
    return ()


class Chunk:
    """Some shapes in a row, as one template.

    `takes` is how many recorded values they take. The template's arguments are picked by `pick` from the time before,
    those values, and what `late` has to be found out now. `time` is where among them the last line's time is.
    """

    __slots__ = ("at", "late", "length", "next", "pick", "shapes", "takes", "template", "text", "time")

    def __init__(self, shapes: list[Shape]) -> None:
        self.shapes, self.length = shapes, len(shapes)
        self.takes = sum(shape.takes for shape in shapes)
        self.next: Chunk = self
        self.late: list[tuple[int, Flow, int]] = []
        self.time = 0
        template, order, value = "", [], 1
        for shape in shapes:
            if shape.timed:
                self.time = value
                value += 1
            if shape.text:
                template += f'{{"t":{"%d" if self.takes else _TIME},"k":"{shape.text}'
                order.append(self.time)
            order += range(value, value + shape.numbers)
            if shape.late is not None:
                order.append(1 + self.takes + len(self.late))
                self.late.append((*shape.late, value))
            value += shape.takes - shape.timed
        self.template = self.text = template
        self.pick: Callable[[list[Any]], Any] = itemgetter(*order) if order else _none
        self.at = -1  # the time that stands in `text` instead of _TIME

    def at_time(self, t: int) -> None:
        """`text` is now the template at that time; only where nothing is taken."""
        self.at = t
        text = self.template.replace(_TIME, str(t))
        self.text = text if self.late else text % ()


class Chunks:
    """Makes text of shapes and values, one lot after the other."""

    def __init__(self, t: int, shapes: Shapes) -> None:
        """`t` is when the first begin, in ns; the flows are those of `shapes`."""
        self._t = t
        self._rare_text = shapes.rare_text
        self._last_flow = 0
        self._chunks: dict[tuple[Shape, ...], Chunk] = {}
        self._chunk = Chunk([])  # the one before

    def text(self, shapes: list[Shape], values: list[Any]) -> str:
        """The lines of these shapes, each with its newline."""
        texts: list[str] = []
        add, chunk, t, flow_number = texts.append, self._chunk, self._t, self._last_flow
        at, end, value = 0, len(shapes), 0
        while at < end:
            before, chunk = chunk, chunk.next
            behind = at + chunk.length
            if behind == at or shapes[at:behind] != chunk.shapes:
                chunk = before.next = self._chunk_at(shapes, at)
                behind = at + chunk.length
            at = behind
            arguments: list[Any]
            if chunk.takes:
                ahead = value + chunk.takes
                arguments = [t, *values[value:ahead]]
                value = ahead
            elif not chunk.late:
                if chunk.at != t:
                    chunk.at_time(t)
                add(chunk.text)
                continue
            else:
                arguments = []
            for what, flow, where in chunk.late:
                if what == NEW_FLOW:
                    flow_number += 1
                    flow.number = flow_number
                    arguments.append(flow_number)
                elif what == HANDLED:
                    arguments.append(flow.number)
                    flow.number = ""
                elif what == SAME_FLOW:
                    if flow.number == "":
                        flow_number += 1
                        flow.number = flow_number
                    arguments.append(flow.number)
                else:
                    arguments.append(self._rare_text(arguments[where]))
            if chunk.takes:
                t = arguments[chunk.time]
                add(chunk.text % chunk.pick(arguments))
            else:
                if chunk.at != t:
                    chunk.at_time(t)
                add(chunk.text % tuple(arguments))
        self._chunk, self._t, self._last_flow = chunk, t, flow_number
        return "".join(texts)

    def _chunk_at(self, shapes: list[Shape], at: int) -> Chunk:
        found: list[Shape] = []
        for shape in shapes[at : at + MOST_SHAPES]:
            found.append(shape)
            if shape.ends:
                break
        key = tuple(found)
        chunk = self._chunks.get(key)
        if chunk is None:
            if len(self._chunks) >= MOST_CHUNKS:
                self._chunks.clear()
            chunk = self._chunks[key] = Chunk(found)
        return chunk

"""Text of what was recorded: shapes of lines (`pvirq.lab.lines`) and the values that go into them.

What domains do, they do again and again: the lines of a turn are mostly those of one before, but for times, flows and
arguments. So lines are made by the chunk, several shapes in a row: once of one template for all of them, where the
single line would cost several times as much. Which chunk comes next is mostly the one that came next the last time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import Any, Final

from pvirq.lab.lines import HANDLED, NEW_FLOW, RARE, SAME_FLOW, Flow, Shape, Shapes

FEW_SHAPES: Final = 12  # of a chunk that ends where shapes often do
MOST_SHAPES: Final = 48  # of any
MOST_CHUNKS: Final = 10_000  # that are kept
# In a template: where something is put in; a real %; and the time, where all of its lines have the same, known before.
_PUT_IN, _PERCENT, _TIME = "\0", "\1", "\2"


class Chunk:
    """Some shapes in a row, as one template: pieces of text, and between each two of them one that is put in.

    `takes` is how many recorded values the shapes take. What is put in is picked by `pick` from the time before, those
    values, and what `late` has to be found out now, all as text. `time` is where among them the last line's time is.
    """

    __slots__ = ("at", "constant", "late", "length", "next", "pick", "pieces", "rare", "shapes", "takes", "time")

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
                template += f'{{"t":{_PUT_IN if self.takes else _TIME},"k":"{_pieces_of(shape.text)}'
                order += [self.time] if self.takes else []
            order += range(value, value + shape.numbers)
            if shape.late is not None:
                order.append(1 + self.takes + len(self.late))
                self.late.append((*shape.late, value))
            value += shape.takes - shape.timed
        self.rare = any(what == RARE for what, _, _ in self.late)
        self.constant = template.split(_PUT_IN)
        self.pieces = [piece for constant in self.constant for piece in (constant, "")][:-1]
        # Of one alone, itemgetter makes no tuple.
        self.pick: Callable[[list[Any]], Any] = itemgetter(*order) if len(order) > 1 else partial(_pick, order)
        self.at = -1  # the time that stands in `pieces` instead of _TIME

    def at_time(self, t: int) -> None:
        """`pieces` are now for that time; only where nothing is taken."""
        self.at = t
        time = str(t)
        self.pieces[::2] = [piece.replace(_TIME, time) for piece in self.constant]


def _pick(order: list[int], values: list[Any]) -> list[Any]:
    return [values[i] for i in order]


def _pieces_of(text: str) -> str:
    """A shape's text with a mark where something is put in, instead of what % wants."""
    return text.replace("%%", _PERCENT).replace("%d", _PUT_IN).replace("%s", _PUT_IN).replace(_PERCENT, "%")


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
        chunk, t, flow_number = self._chunk, self._t, self._last_flow
        at, end, value, time = 0, len(shapes), 0, str(self._t)
        while at < end:
            before, chunk = chunk, chunk.next
            behind = at + chunk.length
            if behind == at or shapes[at:behind] != chunk.shapes:
                chunk = before.next = self._chunk_at(shapes, at)
                behind = at + chunk.length
            at = behind
            put_in: list[str]
            taken: list[Any] = []
            if chunk.takes:
                ahead = value + chunk.takes
                taken = values[value:ahead]
                value = ahead
                put_in = [time, *(taken if chunk.rare else map(str, taken))]
            else:
                put_in = [time]
            for what, flow, where in chunk.late:
                if what == NEW_FLOW:
                    flow_number += 1
                    flow.number = number = str(flow_number)
                    put_in.append(number)
                elif what == HANDLED:
                    put_in.append(flow.number)
                    flow.number = ""
                elif what == SAME_FLOW:
                    if not flow.number:
                        flow_number += 1
                        flow.number = str(flow_number)
                    put_in.append(flow.number)
                else:
                    put_in.append(self._rare_text(taken[where - 1]))
            pieces = chunk.pieces
            if chunk.takes:
                pieces[1::2] = map(str, chunk.pick(put_in)) if chunk.rare else chunk.pick(put_in)
                if chunk.time:
                    t = taken[chunk.time - 1]
                    time = str(t) if chunk.rare else put_in[chunk.time]
            else:
                if chunk.at != t:
                    chunk.at_time(t)
                pieces[1::2] = put_in[1:]
            texts += pieces
        self._chunk, self._t, self._last_flow = chunk, t, flow_number
        return "".join(texts)

    def _chunk_at(self, shapes: list[Shape], at: int) -> Chunk:
        found: list[Shape] = []
        for shape in shapes[at : at + MOST_SHAPES]:
            found.append(shape)
            if shape.ends and len(found) >= FEW_SHAPES:
                break
        key = tuple(found)
        chunk = self._chunks.get(key)
        if chunk is None:
            if len(self._chunks) >= MOST_CHUNKS:
                self._chunks.clear()
            chunk = self._chunks[key] = Chunk(found)
        return chunk

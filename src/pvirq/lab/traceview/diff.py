"""Where two traces begin to differ."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from typing import Final

from pvirq.lab.traceview.eventtext import event_text
from pvirq.lab.traceview.follower import Follower
from pvirq.lab.traceview.tracefile import TraceFile

CONTEXT: Final = 3


@dataclass
class Difference:
    """The first line that differs; texts of events as `event_text` has them."""

    line: int
    before: list[str]  # the last events that are the same
    keys: list[str]  # which keys of the two events differ
    first: list[str] = field(default_factory=list)  # from the difference on; empty where the file has ended
    second: list[str] = field(default_factory=list)


def differ(first: TraceFile, second: TraceFile) -> Difference | None:
    """The first difference of two traces that were just opened; None if all their events are the same.

    Their headers are not compared. TraceFileError for an event on the way that can't be read.
    """
    before: deque[str] = deque(maxlen=CONTEXT)
    followers = Follower(), Follower()
    for follower, trace in zip(followers, (first, second), strict=True):
        follower.begin(trace.header)
    for mine, theirs in zip_longest(first.raw_lines(), second.raw_lines()):
        if mine is not None and mine == theirs:
            event = first.parse(mine)
            for follower in followers:
                follower.feed(event)
            before.append(event_text(event, followers[0]))
            continue
        line = first.lines if mine is not None else second.lines
        texts: list[list[str]] = []
        keys: list[set[tuple[str, str]]] = []
        for follower, trace, raw in zip(followers, (first, second), (mine, theirs), strict=True):
            events = [] if raw is None else [trace.parse(raw), *islice(trace, CONTEXT)]
            texts.append([])
            for event in events:
                follower.feed(event)
                texts[-1].append(event_text(event, follower))
            keys.append({(key, repr(value)) for key, value in events[0].raw.items()} if events else set())
        differing = {key for key, _ in keys[0] ^ keys[1]} if all(keys) else set()
        return Difference(line, list(before), sorted(differing), *texts)
    return None


def hash_of(trace: TraceFile) -> str:
    """SHA-256 over the lines of the events of a trace that was just opened, as hexadecimal digits."""
    digest = hashlib.sha256()
    for line in trace.raw_lines():
        digest.update(line)
    return digest.hexdigest()

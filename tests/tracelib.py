"""Traces for tests: written line by line, or by a small simulation that knows what a summary of them has to say."""

from __future__ import annotations

import heapq
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

US = 1_000
MS = 1_000_000


class TraceWriter:
    """Lines of a trace, in the order in which they are said; `now` is the time of the next."""

    def __init__(self, *domains: tuple[str, int], start: int = 0, seed: int | None = 1, **more: Any) -> None:
        known = [
            {"d": d, "name": name, "vcpus": vcpus, "kind": "real" if d else "modelled", "kernel": "pvops"}
            for d, (name, vcpus) in enumerate(domains)
        ]
        header = {"pvirq": "trace", "version": 1, "seed": seed, "start": start, "domains": known, **more}
        self.now = start
        self.lines = [_json(header)]

    def say(self, kind: str, d: int | None = None, v: int | None = None, /, **keys: Any) -> None:
        """One event; what is None is left out."""
        event = {"t": self.now, "k": kind, "d": d, "v": v, **keys}
        self.lines.append(_json({key: value for key, value in event.items() if value is not None}))

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)

    def write(self, path: Path) -> Path:
        path.write_text(self.text())
        return path


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


@dataclass
class Known:
    """What is known of one port."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)
    handlers: list[int] = field(default_factory=list)
    masked: list[int] = field(default_factory=list)


@dataclass
class _Port:
    d: int
    p: int
    v: int
    name: str
    irq: int
    late: bool  # masked from its handler until some time later, as late EOI does
    by: tuple[int, int] | None
    flow: int | None = None
    raised: int = 0
    masked: bool = False
    masked_since: int | None = None


@dataclass
class _Vcpu:
    d: int
    v: int
    running: bool = False
    busy: bool = False
    woken: int | None = None
    since: int = 0


class Simulation:
    """A modelled domain 0 with two vCPUs and guests with `vcpus`, each with a timer a vCPU, a disk and an interface."""

    def __init__(
        self, seed: int = 1, guests: int = 2, vcpus: int = 2, every: int = 200 * US, start: int = 5 * MS
    ) -> None:
        self.random = random.Random(seed)
        self.every = every
        self.trace = TraceWriter(
            ("Domain-0", 2), *((f"guest{g}", vcpus) for g in range(1, guests + 1)), start=start, seed=seed
        )
        self.start = start
        self.known: dict[tuple[int, int], Known] = defaultdict(Known)
        self.running: Counter[tuple[int, int]] = Counter()
        self.wakes: dict[tuple[int, int], list[int]] = defaultdict(list)
        self.irqs: Counter[tuple[int, int]] = Counter()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._order = 0
        self._next_flow = 1
        self._ports: list[_Port] = []
        self._vcpus = {
            (d, v): _Vcpu(d, v) for d in range(guests + 1) for v in range(2 if d == 0 else vcpus)
        }  # fmt: skip
        for d in range(1, guests + 1):
            for v in range(vcpus):
                self._bind(d, v + 1, v, f"timer{v}", None, type="virq", virq=0)
            for i, (name, backend) in enumerate((("blkif", "blkif-backend"), ("eth0", "vif"))):
                mine, theirs = 10 + i, 100 * d + i
                by = (0, d % 2)
                self._bind(0, theirs, d % 2, f"{backend}{d}", (d, i % vcpus), type="interdomain", rd=d, rp=mine)
                self._bind(d, mine, i % vcpus, name, by, type="interdomain", rd=0, rp=theirs)

    def _bind(self, d: int, p: int, v: int, name: str, by: tuple[int, int] | None, **keys: Any) -> None:
        self.trace.say("bind", d, v, p=p, **keys)
        self._ports.append(_Port(d, p, v, name, 256 + p, late=keys["type"] == "interdomain", by=by))

    def run(self, length: int) -> TraceWriter:
        """Everything until `length` ns from the start; what is under way then ends, so that nothing is left."""
        for port in self._ports:
            self._again(port, self.start + length)
        while self._queue:
            self.trace.now, _, act = heapq.heappop(self._queue)
            act()
        return self.trace

    def _after(self, ns: int, act: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._queue, (self.trace.now + ns, self._order, act))

    def _again(self, port: _Port, until: int) -> None:
        def act() -> None:
            if self.trace.now < until:
                self._raise(port)
                self._again(port, until)

        self._after(int(self.random.expovariate(1 / self.every)), act)

    def _raise(self, port: _Port) -> None:
        out = "coalesced" if port.flow is not None else "masked" if port.masked else "pending"
        if port.flow is None:
            port.flow, port.raised = self._next_flow, self.trace.now
            self._next_flow += 1
        by = "xen" if port.by is None else list(port.by)
        self.trace.say("raise", port.d, port.v, p=port.p, out=out, by=by, flow=port.flow)
        self.known[port.d, port.p].outcomes[out] += 1
        if out == "masked":
            port.masked_since = self.trace.now
        if out == "pending":
            self._kick(self._vcpus[port.d, port.v])

    def _kick(self, vcpu: _Vcpu) -> None:
        if vcpu.running or vcpu.woken is not None:
            return
        vcpu.woken = self.trace.now
        self.trace.say("wake", vcpu.d, vcpu.v)
        self._after(self.random.randrange(1, 20) * US, lambda: self._turn(vcpu))

    def _turn(self, vcpu: _Vcpu) -> None:
        self.trace.say("run", vcpu.d, vcpu.v)
        assert vcpu.woken is not None
        self.wakes[vcpu.d, vcpu.v].append(self.trace.now - vcpu.woken)
        vcpu.woken, vcpu.running, vcpu.since = None, True, self.trace.now
        self.trace.say("upcall", vcpu.d, vcpu.v)
        self._next(vcpu, self.trace.now)

    def _next(self, vcpu: _Vcpu, upcall: int) -> None:
        """The next pending port's handler, or the end of the turn."""
        for port in self._ports:
            if (port.d, port.v) == (vcpu.d, vcpu.v) and port.flow is not None and not port.masked:
                break
        else:
            self.trace.say("stop", vcpu.d, vcpu.v, why="blocked")
            self.running[vcpu.d, vcpu.v] += self.trace.now - vcpu.since
            vcpu.running = False
            return
        known = self.known[port.d, port.p]
        known.latencies.append(self.trace.now - port.raised)
        known.entries.append(self.trace.now - upcall)
        self.irqs[port.d, port.v] += 1
        handler = {"irq": port.irq, "p": port.p, "name": port.name}
        self.trace.say("irq", port.d, port.v, ph="B", handler=f"{port.name}_interrupt", flow=[port.flow], **handler)
        port.flow, port.masked = None, port.late
        took = self.random.randrange(1, 30) * US

        def end() -> None:
            self.trace.say("irq", port.d, port.v, ph="E", **handler)
            known.handlers.append(took)
            if port.late:
                self._after(self.random.randrange(1, 50) * US, lambda: self._unmask(port))
            self._next(vcpu, upcall)

        self._after(took, end)

    def _unmask(self, port: _Port) -> None:
        self.trace.say("eoi", port.d, port.v, p=port.p)
        self.trace.say("unmask", port.d, port.v, p=port.p)
        port.masked = False
        if port.masked_since is not None:
            self.known[port.d, port.p].masked.append(self.trace.now - port.masked_since)
            port.masked_since = None
        if port.flow is not None:
            self._kick(self._vcpus[port.d, port.v])

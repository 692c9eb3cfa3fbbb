"""A rule: when it fires, how often it has, and how it ends."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from pvirq.lab.faults.kinds import Spec
from pvirq.lab.faults.names import Names
from pvirq.xen.domain import Vcpu
from pvirq.xen.evtchn_channels import Channel
from pvirq.xen.timer import Timer

if TYPE_CHECKING:
    from pvirq.host import Host

R = TypeVar("R", bound="Rule")
FIRINGS_KEPT: Final = 10_000


@dataclass(frozen=True)
class Firing:
    """One firing of a rule: the moment, in ns of the host's clock, what was done, and to whom or what."""

    when: int
    rule: str
    action: str
    fields: dict[str, Any]


class Rule:
    """One fault, in force until it is removed; as a context manager until the end of the block.

    `seen` counts what it was asked about while it was in force, `fired` how often it did something. `str(rule)` is the
    text that makes the same rule again.
    """

    def __init__(self, host: Host, names: Names, spec: Spec, seed: str, note: Callable[[Firing], None]) -> None:
        """`seed` is where its chances come from: those of a rule don't depend on what other rules draw."""
        self.spec = spec
        self.seen = 0
        self.fired = 0
        self.active = True
        self.host = host
        self.names = names
        self.clock = host.clock
        self.hypervisor = host.hypervisor
        self.random = random.Random(seed)
        self._note = note
        self._text = str(spec)
        made, until = self.clock.now(), spec.get("until")
        self._start = made + spec.number("after")
        self._end = None if until is None else made + int(until)
        self._count = spec.get("count")
        self._skip, self._every = int(spec.get("skip") or 0), int(spec.get("every") or 1)
        probability = spec.get("probability")
        self._probability = 1.0 if probability is None else float(probability)
        self.on_removed: Callable[[Rule], None] = lambda rule: None

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"<{self._text}: fired {self.fired} times>"

    def __enter__(self: R) -> R:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # -- when it fires -------------------------------------------------------------------------------------------------

    @property
    def in_force(self) -> bool:
        """Is it its time?"""
        return self.active and self._start <= self.clock.now() and not self.over

    @property
    def over(self) -> bool:
        """Its time has passed."""
        return self._end is not None and self.clock.now() >= self._end

    @property
    def spent(self) -> bool:
        """It has fired so often as it was to."""
        return self._count is not None and self.fired >= int(self._count)

    def due(self) -> bool:
        """It is asked about something that it is for: does it fire? Whoever asks does it then, and says so (`note`)."""
        if not self.in_force or self.spent:
            return False
        self.seen += 1
        counted = self.seen - self._skip
        if counted <= 0 or counted % self._every:
            return False
        return self._probability >= 1 or self.random.random() < self._probability

    def jittered(self, name: str = "ns") -> int:
        """Its time, and up to `jitter` more."""
        jitter = int(self.spec.get("jitter") or 0)
        return self.spec.number(name) + (self.random.randint(0, jitter) if jitter else 0)

    def note(self, action: str, *, fires: bool = True, **fields: Any) -> None:
        """It has done something: count it, and tell who watches. Not `fires`: the rest of what it began before."""
        self.fired += fires
        self._note(Firing(self.clock.now(), self._text, action, fields))
        self.hypervisor.probes.note("fault", rule=self._text, action=action, **fields)

    def note_event(self, action: str, vcpu: Vcpu, channel: Channel, *, fires: bool = True, **fields: Any) -> None:
        """The same, of an event: domain, vCPU and port of the end that it comes to."""
        self.note(action, fires=fires, d=vcpu.domain.domid, v=vcpu.vcpu_id, p=channel.port, **fields)

    # -- its end -------------------------------------------------------------------------------------------------------

    def remove(self) -> None:
        """It does nothing any more, and what it holds is let go; idempotent."""
        if self.active:
            self.active = False
            self.lifted()
            self.on_removed(self)

    def lifted(self) -> None:
        """For its kind: let go of what it holds."""


class ScheduledRule(Rule):
    """A rule that goes off by itself: after `after`, then once each `period`, `count` times at most."""

    def __init__(self, host: Host, names: Names, spec: Spec, seed: str, note: Callable[[Firing], None]) -> None:
        super().__init__(host, names, spec, seed, note)
        self.rounds = 0
        self._timer: Timer | None = None
        period = spec.get("period")
        self._period = None if period is None else int(period)
        if self._period is None:
            self._count = 1

    @property
    def spent(self) -> bool:
        return self._count is not None and self.rounds >= int(self._count)

    def start(self) -> None:
        """At once where nothing else was said: a rule that was to come later is still in time."""
        if self._start <= self.clock.now():
            self._go()
        else:
            self._timer = self.clock.at(self._start, self._go)

    def _go(self) -> None:
        self._timer = None
        if self.due():
            self.rounds += 1
            self.act()
        if self.active and not self.spent and not self.over and self._period is not None:
            self._timer = self.clock.at(self.clock.now() + self._period, self._go)

    def act(self) -> None:
        """For its kind: do it, once."""
        raise NotImplementedError

    def remove(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        super().remove()

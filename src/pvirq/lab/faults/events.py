"""Faults of events: they get lost, come late, twice, in another order, or without anybody having sent them.

Each event that is raised anywhere in the host passes the rules by the door of `pvirq.xen.probes`; the first one that
fires decides. What a rule holds back and raises later comes past the door, so no event is disturbed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from pvirq.abi.xen import VIRQ_TIMER
from pvirq.lab.faults.names import Channels, Vcpus
from pvirq.lab.faults.rule import Rule, ScheduledRule
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.evtchn_channels import ECS_VIRQ, Channel
from pvirq.xen.timer import Timer

# How soon `duplicate` looks whether an event has been taken, twice as long each time, and when it gives up.
LOOK_NS: Final = 10_000
GIVE_UP_NS: Final = 1_000_000_000


@dataclass(eq=False)
class Held:
    """An event that somebody will raise later: on the same channel, not on another that has its port by then."""

    domain: Domain
    channel: Channel
    generation: int
    timer: Timer | None = None

    @property
    def gone(self) -> bool:
        """The port was closed since, be it as its domain ended."""
        return self.channel.generation != self.generation

    @property
    def vcpu(self) -> Vcpu:
        """Whom it goes to: who the port notifies now."""
        return self.domain.vcpus[self.channel.notify_vcpu]

    def release(self) -> None:
        """Raise it, unless its port is gone: no rule is asked about it any more."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if not self.gone:
            self.domain.hypervisor.probes.raise_event(self.domain.evtchn.ops, self.vcpu, self.channel)


def hold(vcpu: Vcpu, channel: Channel) -> Held:
    """An event that is not raised now."""
    return Held(vcpu.domain, channel, channel.generation)


class EventRule(Rule):
    """A rule that each event passes.

    `held` are its events that are still to come; `released` counts those that came, `dropped` those whose port was
    closed before, `merged` those that became one with another one that was held.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.channels = Channels(self.names, self.spec)
        self.held: list[Held] = []
        self.released = self.dropped = self.merged = 0

    def is_for(self, vcpu: Vcpu, channel: Channel) -> bool:
        """Is the event one of those that the rule is about?"""
        return self.channels.matches(vcpu.domain, channel)

    def act(self, vcpu: Vcpu, channel: Channel) -> bool:
        """For its kind: do it. True: the event isn't raised now."""
        raise NotImplementedError

    def let_go(self, held: Held) -> None:
        """The time of a held event has come."""
        self.held.remove(held)
        vcpu = held.vcpu
        if held.gone:
            self.dropped += 1
            self.note_event("dropped", vcpu, held.channel, fires=False)
        else:
            self.released += 1
            self.note_event("raised", vcpu, held.channel, fires=False)
        held.release()

    def lifted(self) -> None:
        """What is held comes at once."""
        for held in list(self.held):
            self.let_go(held)


class Lose(EventRule):
    """The event never was."""

    def act(self, vcpu: Vcpu, channel: Channel) -> bool:
        self.note_event("lost", vcpu, channel)
        return True


class Delay(EventRule):
    """The event comes later."""

    def act(self, vcpu: Vcpu, channel: Channel) -> bool:
        ns, held = self.jittered(), hold(vcpu, channel)
        self.held.append(held)
        self.note_event("delayed", vcpu, channel, ns=ns)
        held.timer = self.clock.at(self.clock.now() + ns, lambda: self.let_go(held))
        return True


class Late(Delay):
    """VIRQ_TIMER does."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.vcpus = Vcpus(self.names, self.spec)

    def is_for(self, vcpu: Vcpu, channel: Channel) -> bool:
        return channel.state == ECS_VIRQ and channel.virq == VIRQ_TIMER and self.vcpus.matches(vcpu)


class Duplicate(EventRule):
    """The event comes, and later comes again."""

    def act(self, vcpu: Vcpu, channel: Channel) -> bool:
        ns, held = self.spec.get("ns"), hold(vcpu, channel)
        self.held.append(held)
        self.note_event("duplicated", vcpu, channel)
        if ns is None:
            self._when_taken(held, LOOK_NS)
        else:
            held.timer = self.clock.at(self.clock.now() + int(ns), lambda: self.let_go(held))
        return False

    def _when_taken(self, held: Held, wait: int) -> None:
        """Xen isn't told when a guest takes an event, so somebody has to look."""

        def look() -> None:
            pending = not held.gone and held.domain.evtchn.ops.is_pending(held.channel)
            if pending and wait < GIVE_UP_NS:
                self._when_taken(held, 2 * wait)
            else:
                self.let_go(held)

        held.timer = self.clock.at(self.clock.now() + wait, look)


class Reorder(EventRule):
    """Events are held until there are some of different ports, and then come in the reverse order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._timer: Timer | None = None

    def act(self, vcpu: Vcpu, channel: Channel) -> bool:
        if any(held.channel is channel and not held.gone for held in self.held):
            self.merged += 1  # a port has but one bit: here as there, two events are one
            self.note_event("merged", vcpu, channel)
            return True
        self.held.append(hold(vcpu, channel))
        self.note_event("held", vcpu, channel)
        if len(self.held) >= self.spec.number("events"):
            self._turn_round()
        elif self._timer is None:
            self._timer = self.clock.at(self.clock.now() + self.spec.number("within"), self._turn_round)
        return True

    def _turn_round(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for held in reversed(self.held[:]):
            self.let_go(held)

    def lifted(self) -> None:
        self._turn_round()


class StuckMask(EventRule):
    """A port's mask bit is set when an event comes, and whenever it is looked at; lifted, it is as the guest wants it.

    The guest clears it in its own memory, without Xen. What it then finds pending by itself, before anybody has looked,
    it handles; from the next event on it is masked again.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._masked: dict[Channel, Held] = {}
        self._timer: Timer | None = None

    def start(self) -> None:
        """Look for the first time when its time has come."""
        self._timer = self.clock.at(max(self._start, self.clock.now()), self._look)

    def act(self, vcpu: Vcpu, channel: Channel) -> bool:
        self._mask(vcpu.domain, channel)
        return False

    def is_for(self, vcpu: Vcpu, channel: Channel) -> bool:
        return super().is_for(vcpu, channel) and not vcpu.domain.evtchn.ops.is_masked(channel)

    def _look(self) -> None:
        self._timer = None
        for domain, channel in self.channels.all():
            if not domain.evtchn.ops.is_masked(channel) and self.due():
                self._mask(domain, channel)
        if self.over or self.spent:
            self.remove()
        else:
            self._timer = self.clock.at(self.clock.now() + self.spec.number("look"), self._look)

    def _mask(self, domain: Domain, channel: Channel) -> None:
        vcpu = domain.vcpus[channel.notify_vcpu]
        if domain.evtchn.ops.mask(channel):
            self._masked[channel] = hold(vcpu, channel)
            self.note_event("masked", vcpu, channel)

    def lifted(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for channel, held in self._masked.items():
            if not held.gone and channel.usable:
                held.domain.evtchn.ops.unmask(channel)
                self.note_event("unmasked", held.vcpu, channel, fires=False)
        self._masked.clear()


class Storm(ScheduledRule):
    """Events that nobody sent, to each channel that there is when it begins."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.channels = Channels(self.names, self.spec)
        self._next: Timer | None = None

    def act(self) -> None:
        ends = [Held(domain, channel, channel.generation) for domain, channel in self.channels.all()]
        self._blow(ends, self._events, 0)

    @property
    def _events(self) -> int:
        return self.spec.number("events")

    def _blow(self, ends: list[Held], left: int, index: int) -> None:
        self._next = None
        if not self.active or not ends:
            return
        for held in ends:
            if not held.gone:
                self.note_event("raised", held.vcpu, held.channel, index=index)
                held.release()
        if left > 1:
            when = self.clock.now() + self.spec.number("interval")
            self._next = self.clock.at(when, lambda: self._blow(ends, left - 1, index + 1))

    def lifted(self) -> None:
        if self._next is not None:
            self._next.cancel()


class Spurious(Storm):
    """One such event."""

    @property
    def _events(self) -> int:
        return 1


EVENT_RULES: Final[dict[str, type[EventRule]]] = {
    "lose": Lose,
    "delay": Delay,
    "late": Late,
    "duplicate": Duplicate,
    "reorder": Reorder,
    "stuck-mask": StuckMask,
}


class EventFaults:
    """The rules that events pass, in the order of their making. At the door only while there is one."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._rules: tuple[EventRule, ...] = ()

    def add(self, rule: EventRule) -> None:
        if not self._rules:
            self._hypervisor.probes.add_filter(self._filter)
        self._rules = (*self._rules, rule)

    def remove(self, rule: EventRule) -> None:
        if rule in self._rules:
            self._rules = tuple(other for other in self._rules if other is not rule)
            if not self._rules:
                self._hypervisor.probes.remove_filter(self._filter)

    def _filter(self, vcpu: Vcpu, channel: Channel) -> bool:
        for rule in self._rules:
            if rule.is_for(vcpu, channel) and rule.due():
                return rule.act(vcpu, channel)
        return False

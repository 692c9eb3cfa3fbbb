"""Faults on command: rules that disturb a host's events, operations, backends, vCPUs and clock.

    faults = Faults(host)
    with faults.lose(domain=guest, irq="blkif", count=1) as rule:
        ...
    assert rule.fired == 1

Each method makes a rule, which is in force until it is removed or the block ends; `rule` makes one from its text.
Durations that belong to a fault are in ns, `after`, `until` and `period` in seconds of the host's clock from the moment
at which the rule is made. docs/lab-faults.md has the whole of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypedDict, Unpack

from pvirq.abi.errno import Errno
from pvirq.lab.faults import kinds as fault_kinds
from pvirq.lab.faults.backends import ANSWER_RULES, AnswerFaults, AnswerRule, Restart
from pvirq.lab.faults.events import EVENT_RULES, EventFaults, EventRule, Spurious, Storm, StuckMask
from pvirq.lab.faults.kinds import Spec
from pvirq.lab.faults.names import Names
from pvirq.lab.faults.operations import Fail, HypercallFaults, NoIrqs, NoPorts
from pvirq.lab.faults.rule import FIRINGS_KEPT, Firing, R, Rule, ScheduledRule
from pvirq.lab.faults.values import FaultError
from pvirq.lab.faults.vcpus import ClockStep, Early, Pause, Starve, Upcall, WallclockStep
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.guest import Guest
    from pvirq.host import Host
    from pvirq.modelled import ModelledGuest

    DomainLike = Guest | ModelledGuest | int | str

__all__ = ["FaultError", "Faults", "Firing", "Rule"]

SECONDS: Final = ("after", "until", "period")
SCHEDULED: Final[dict[str, type[ScheduledRule]]] = {
    "storm": Storm,
    "spurious": Spurious,
    "upcall": Upcall,
    "pause": Pause,
    "starve": Starve,
    "clock": ClockStep,
    "wallclock": WallclockStep,
    "restart": Restart,
    "no-irqs": NoIrqs,
}
PLAIN: Final[dict[str, type[Rule]]] = {"early": Early, "fail": Fail, "no-ports": NoPorts}


class Window(TypedDict, total=False):
    """When a rule is in force, in seconds."""

    after: float
    until: float


class When(Window, total=False):
    """When a rule that waits for something fires."""

    count: int
    skip: int
    every: int
    probability: float


class Schedule(Window, total=False):
    """When a rule that goes off by itself does; `period` in seconds."""

    count: int
    period: float
    probability: float


class Where(TypedDict, total=False):
    """Which channels, by one of their ends."""

    domain: DomainLike
    port: int
    irq: str
    device: str
    kind: str
    vcpu: int


class Event(Where, When, total=False):
    """Which events, and when."""

    direction: str


class Masked(Where, When, total=False):
    """Which channels, and when."""


class ScheduledEvent(Where, Schedule, total=False):
    """Where events are made, and when."""

    direction: str


class OfVcpu(When, total=False):
    """Which vCPUs, and when."""

    domain: DomainLike
    vcpu: int


class ScheduledVcpu(Schedule, total=False):
    """Which vCPUs, and when."""

    domain: DomainLike
    vcpu: int


class StarvedVcpu(Window, total=False):
    """Which vCPUs, and when."""

    domain: DomainLike
    vcpu: int


class OfDomain(When, total=False):
    """Whose operations, and when."""

    domain: DomainLike


class Answers(When, total=False):
    """Which rings' answers, and when."""

    domain: DomainLike
    device: str
    ring: str


class Faults:
    """The rules that disturb one host: `rules` are those that weren't removed, `firings` the last that happened.

    The same seed in the same run makes the same firings. Leaving the `with` removes all rules.
    """

    def __init__(self, host: Host, seed: int | str = 0) -> None:
        """`seed` is where the chances of all rules come from."""
        self.host = host
        self.seed = seed
        self.rules: list[Rule] = []
        self.firings: deque[Firing] = deque(maxlen=FIRINGS_KEPT)
        self._made = 0
        self._names = Names(host)
        self._events = EventFaults(host.hypervisor)
        self._hypercalls = HypercallFaults(host, self._names)
        self._answers = AnswerFaults(host)

    def __enter__(self) -> Faults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all rules."""
        for rule in list(self.rules):
            rule.remove()

    def rule(self, text: str) -> Rule:
        """A rule from its text, such as "lose irq=blkif domain=1 count=1 after=2s". FaultError."""
        return self.add(fault_kinds.parse(text))

    def add(self, spec: Spec) -> Rule:
        """A rule that has been read (`fault_kinds.parse`). FaultError for one that this host can't have."""
        name = spec.kind.name
        kinds: Mapping[str, type[Rule]] = {**EVENT_RULES, **SCHEDULED, **ANSWER_RULES, **PLAIN}
        if (name in ANSWER_RULES or name == "restart") and not self.host.has_dom0:
            raise FaultError(f"{spec}: this host has no backends, as its domain 0 is a real kernel")
        rule = kinds[name](self.host, self._names, spec, f"{self.seed}/{self._made}", self.firings.append)
        self._made += 1
        self.rules.append(rule)
        rule.on_removed = self._removed
        if isinstance(rule, EventRule):
            self._events.add(rule)
        elif isinstance(rule, AnswerRule):
            self._answers.add(rule)
        elif isinstance(rule, NoPorts):
            self.host.hypervisor.probes.add_check(rule.check)
        elif isinstance(rule, Fail):
            if rule.hypercall is None:
                self.host.hypervisor.probes.add_check(rule.check)
            else:
                self._hypercalls.add(rule)
        if isinstance(rule, (ScheduledRule, StuckMask)):
            rule.start()
        return rule

    def _removed(self, rule: Rule) -> None:
        self.rules.remove(rule)
        if isinstance(rule, EventRule):
            self._events.remove(rule)
        elif isinstance(rule, AnswerRule):
            self._answers.remove(rule)
        elif isinstance(rule, Fail) and rule.hypercall is not None:
            self._hypercalls.remove(rule)
        elif isinstance(rule, (Fail, NoPorts)):
            self.host.hypervisor.probes.remove_check(rule.check)

    def _make(self, made: type[R], kind: str, where: Mapping[str, Any], **own: object) -> R:
        given = {**own, **where}
        for name in SECONDS:
            if given.get(name) is not None:
                given[name] = _ns(name, given[name])
        owner = given.get("domain")
        if owner is not None and not isinstance(owner, (int, str)):
            given["domain"] = owner.domain.domid
        rule = self.add(fault_kinds.make(kind, given))
        assert isinstance(rule, made)
        return rule

    # -- events --------------------------------------------------------------------------------------------------------

    def lose(self, **where: Unpack[Event]) -> EventRule:
        """An event is not raised at all."""
        return self._make(EventRule, "lose", where)

    def delay(self, ns: int, *, jitter: int = 0, **where: Unpack[Event]) -> EventRule:
        """An event is raised `ns` later, and up to `jitter` ns more at random."""
        return self._make(EventRule, "delay", where, ns=ns, jitter=jitter)

    def duplicate(self, ns: int | None = None, **where: Unpack[Event]) -> EventRule:
        """An event is raised once more, `ns` later, or as soon as the first has been taken."""
        return self._make(EventRule, "duplicate", where, ns=ns)

    def reorder(self, events: int = 2, *, within: int = 10_000_000, **where: Unpack[Event]) -> EventRule:
        """Events of `events` ports are held, for `within` ns at most, and then raised in the reverse order."""
        return self._make(EventRule, "reorder", where, events=events, within=within)

    def storm(self, events: int, *, interval: int = 10_000, **where: Unpack[ScheduledEvent]) -> Storm:
        """So many events that nobody sent, `interval` ns apart, on each channel that is meant."""
        return self._make(Storm, "storm", where, events=events, interval=interval)

    def spurious(self, **where: Unpack[ScheduledEvent]) -> Storm:
        """One such event."""
        return self._make(Storm, "spurious", where)

    def stuck_mask(self, *, look: int = 1_000_000, **where: Unpack[Masked]) -> EventRule:
        """A port's mask bit is set again whenever it is found cleared: with each event, and each `look` ns."""
        return self._make(EventRule, "stuck-mask", where, look=look)

    # -- vCPUs and time ------------------------------------------------------------------------------------------------

    def late(self, ns: int, *, jitter: int = 0, **where: Unpack[OfVcpu]) -> EventRule:
        """VIRQ_TIMER comes `ns` later than was asked for."""
        return self._make(EventRule, "late", where, ns=ns, jitter=jitter)

    def early(self, ns: int, *, jitter: int = 0, **where: Unpack[OfVcpu]) -> Rule:
        """A one-shot VIRQ_TIMER comes `ns` earlier than was asked for."""
        return self._make(Rule, "early", where, ns=ns, jitter=jitter)

    def upcall(self, **where: Unpack[ScheduledVcpu]) -> Rule:
        """A vCPU gets an upcall with no event pending."""
        return self._make(Rule, "upcall", where)

    def pause(self, ns: int, **where: Unpack[ScheduledVcpu]) -> Rule:
        """A vCPU doesn't run for `ns`."""
        return self._make(Rule, "pause", where, ns=ns)

    def starve(self, share: float, *, cycle: int = 10_000_000, **where: Unpack[StarvedVcpu]) -> Rule:
        """A vCPU runs only for its share (0 to 1) of each cycle of so many ns."""
        return self._make(Rule, "starve", where, share=share, cycle=cycle)

    def clock(self, ns: int, **when: Unpack[Schedule]) -> Rule:
        """The host's time jumps forward by `ns`."""
        return self._make(Rule, "clock", when, ns=ns)

    def wallclock(self, ns: int, *, domain: DomainLike | None = None, **when: Unpack[Schedule]) -> Rule:
        """The time of day that Xen tells a domain, or all and those to come, changes by `ns`, forward or back."""
        return self._make(Rule, "wallclock", when, ns=ns, domain=domain)

    # -- operations ----------------------------------------------------------------------------------------------------

    def fail(self, operation: str, error: Errno | str, **where: Unpack[OfDomain]) -> Rule:
        """An operation fails: "evtchn.bind_virq" and so on, of real guests "memory_op.populate_physmap" and the like.

        `error` is an errno, or the name of a grant operation's status (GNTST_*).
        """
        return self._make(Rule, "fail", where, operation=operation, error=error)

    def no_ports(self, *, free: int = 0, domain: DomainLike | None = None, **when: Unpack[Window]) -> Rule:
        """A domain has no more event channel ports than `free` new ones."""
        return self._make(Rule, "no-ports", when, free=free, domain=domain)

    def no_irqs(self, *, free: int = 0, domain: DomainLike | None = None, **when: Unpack[Window]) -> Rule:
        """A modelled kernel that there is now has no more dynamic IRQ numbers than `free` new ones."""
        return self._make(Rule, "no-irqs", when, free=free, domain=domain)

    # -- backends ------------------------------------------------------------------------------------------------------

    def slow(self, ns: int, *, jitter: int = 0, **where: Unpack[Answers]) -> AnswerRule:
        """A backend's answers come `ns` later."""
        return self._make(AnswerRule, "slow", where, ns=ns, jitter=jitter)

    def silent(self, **where: Unpack[Answers]) -> AnswerRule:
        """A backend doesn't answer until the rule is gone."""
        return self._make(AnswerRule, "silent", where)

    def error(self, **where: Unpack[Answers]) -> AnswerRule:
        """A backend answers a request that it has carried out with an error."""
        return self._make(AnswerRule, "error", where)

    def hostile(self, lie: str, **where: Unpack[Answers]) -> AnswerRule:
        """A backend's answers are lies: "id", "status", "garbage" or "index"."""
        return self._make(AnswerRule, "hostile", where, lie=lie)

    def restart(self, backend: str, *, down: int = NS_PER_S, **when: Unpack[Schedule]) -> Rule:
        """Domain 0's backend for "vbd" or "vif" is unloaded, and loaded again `down` ns later."""
        return self._make(Rule, "restart", when, backend=backend, down=down)


def _ns(name: str, seconds: object) -> int:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < 1 << 33:
        raise FaultError(f"{name}: {seconds!r} is no time in seconds")
    return round(seconds * NS_PER_S)

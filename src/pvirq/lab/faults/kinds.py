"""Which faults there are: what each does, what it takes, and the text that stands for a rule.

KIND [VALUE ...] [NAME=VALUE ...]        lose irq=blkif domain=1 count=1 after=2s
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pvirq.lab.faults import values
from pvirq.lab.faults.values import FaultError, Form, Value


@dataclass(frozen=True)
class Param:
    """One thing that a kind of fault takes. `positional`: its text has no name in front."""

    name: str
    form: Form
    does: str
    default: Value | None = None
    positional: bool = False
    required: bool = False


# Which events: a channel is described by one of its ends.
CHANNEL: Final = (
    Param("domain", values.domain(), "the domain whose end it is, by id or name"),
    Param("port", values.number(1), "its port there"),
    Param("irq", values.name("NAME"), "the name of its row in /proc/interrupts; * and ? as in file names"),
    Param("device", values.name("DEVICE"), "its frontend: vbd-51712, vif-0, console, xenstore"),
    Param("kind", values.name("KIND"), "interdomain, ipi, pirq, virq, or a VIRQ's own name: timer, debug ..."),
    Param("vcpu", values.number(), "the vCPU that it notifies"),
)
DIRECTION: Final = Param(
    "direction", values.choice("in", "out", "both"), "events that come to that end, that it sends, or both", "in"
)
EVENT_WHERE: Final = (*CHANNEL, DIRECTION)
VCPU_WHERE: Final = (
    Param("domain", values.domain(), "the domain, by id or name"),
    Param("vcpu", values.number(), "the vCPU"),
)
DOMAIN_WHERE: Final = VCPU_WHERE[:1]
DEVICE_WHERE: Final = (
    Param("domain", values.domain(), "the frontend's domain, by id or name"),
    Param("device", values.name("DEVICE"), "the frontend: vbd-51712, vif-0"),
    Param("ring", values.choice("blkif", "tx", "rx"), "which of its rings"),
)
WINDOW: Final = (
    Param("after", values.time(), "not before so long after the rule was made", 0),
    Param("until", values.time(), "nor from so long after it on"),
)
PROBABILITY: Final = Param("probability", values.share(), "how likely it is each time", 1.0)
# When a rule that waits for something fires.
WHEN: Final = (
    Param("count", values.number(1), "so often at most"),
    Param("skip", values.number(), "the first so many pass", 0),
    Param("every", values.number(1), "only each N-th of the others", 1),
    PROBABILITY,
    *WINDOW,
)
# When one that goes off by itself does.
SCHEDULE: Final = (
    Param("count", values.number(1), "so often at most; once without a period"),
    Param("period", values.time(1_000), "again each time so long afterwards"),
    PROBABILITY,
    *WINDOW,
)
JITTER: Final = Param("jitter", values.time(), "and up to so much more, at random", 0)


@dataclass(frozen=True)
class FaultKind:
    """One kind of fault; `params` are its own, `where` and `when` those that it shares with others."""

    name: str
    does: str
    params: tuple[Param, ...]
    where: tuple[Param, ...]
    when: tuple[Param, ...]
    example: str

    @property
    def all_params(self) -> tuple[Param, ...]:
        return (*self.params, *self.where, *self.when)


KINDS: Final = {
    kind.name: kind
    for kind in (
        FaultKind(
            "lose", "an event is not raised at all", (), EVENT_WHERE, WHEN,
            "lose irq=blkif domain=1 count=1 after=2s",
        ),
        FaultKind(
            "delay", "an event is raised later",
            (Param("ns", values.time(1), "how much later", positional=True, required=True), JITTER),
            EVENT_WHERE, WHEN, "delay 5ms device=vbd-51712 probability=0.1 after=2s until=3s",
        ),
        FaultKind(
            "duplicate", "an event is raised once more: after a time, or as soon as the first has been taken",
            (Param("ns", values.time(1), "how long after the first", positional=True),),
            EVENT_WHERE, WHEN, "duplicate device=vif-0 every=10",
        ),
        FaultKind(
            "reorder", "events of several ports are held and raised in the reverse order",
            (
                Param("events", values.number(2), "how many are held", 2, positional=True),
                Param("within", values.time(1_000), "how long they are held at most", 10_000_000),
            ),
            EVENT_WHERE, WHEN, "reorder 3 domain=1 within=1ms",
        ),
        FaultKind(
            "storm", "events come that nobody sent, one after the other",
            (
                Param("events", values.number(1), "how many", positional=True, required=True),
                Param("interval", values.time(100), "the time between two", 10_000),
            ),
            EVENT_WHERE, SCHEDULE, "storm 1000 interval=50us device=vbd-51712 after=3s",
        ),
        FaultKind(
            "spurious", "an event comes that nobody sent", (), EVENT_WHERE, SCHEDULE,
            "spurious domain=1 kind=timer period=100ms",
        ),
        FaultKind(
            "stuck-mask", "a port's mask bit is set again whenever it is cleared",
            (Param("look", values.time(10_000), "how often to look at it between events", 1_000_000),),
            CHANNEL, WHEN, "stuck-mask irq=blkif domain=1 after=2s until=5s",
        ),
        FaultKind(
            "late", "VIRQ_TIMER comes later than was asked for",
            (Param("ns", values.time(1), "how much later", positional=True, required=True), JITTER),
            VCPU_WHERE, WHEN, "late 20ms domain=1 vcpu=0 probability=0.5",
        ),
        FaultKind(
            "early", "a one-shot VIRQ_TIMER comes earlier than was asked for, if there is the time",
            (Param("ns", values.time(1), "how much earlier", positional=True, required=True), JITTER),
            VCPU_WHERE, WHEN, "early 1ms domain=1",
        ),
        FaultKind(
            "upcall", "a vCPU gets an upcall with no event pending", (), VCPU_WHERE, SCHEDULE,
            "upcall domain=1 vcpu=0 period=10ms count=100",
        ),
        FaultKind(
            "pause", "a vCPU doesn't run for a time",
            (Param("ns", values.time(1), "how long", positional=True, required=True),),
            VCPU_WHERE, SCHEDULE, "pause 200ms domain=1 vcpu=1 after=1s",
        ),
        FaultKind(
            "starve", "a vCPU runs only for a share of each cycle",
            (
                Param("share", values.share(), "the share that it has", positional=True, required=True),
                Param("cycle", values.time(100_000), "how long a cycle is", 10_000_000),
            ),
            VCPU_WHERE, WINDOW, "starve 0.2 domain=1 vcpu=1 cycle=30ms until=10s",
        ),
        FaultKind(
            "clock", "the host's time jumps forward",
            (Param("ns", values.time(1), "how far", positional=True, required=True),),
            (), SCHEDULE, "clock 30s after=1s",
        ),
        FaultKind(
            "wallclock", "the time of day that Xen tells is changed, forward or back",
            (Param("ns", values.signed_time(), "by how much", positional=True, required=True),),
            DOMAIN_WHERE, SCHEDULE, "wallclock -3600s domain=1",
        ),
        FaultKind(
            "fail", "an operation fails",
            (
                Param("operation", values.name("OPERATION"), "evtchn.bind_virq, memory_op.populate_physmap ...",
                      positional=True, required=True),
                Param("error", values.error(), "ENOSPC; of grant operations GNTST_bad_gntref as well",
                      positional=True, required=True),
            ),
            DOMAIN_WHERE, WHEN, "fail evtchn.bind_interdomain ENOSPC domain=0 count=1",
        ),
        FaultKind(
            "no-ports", "a domain has no more event channel ports",
            (Param("free", values.number(), "so many it can still have", 0),),
            DOMAIN_WHERE, WINDOW, "no-ports domain=1 free=2",
        ),
        FaultKind(
            "no-irqs", "a modelled kernel has no more dynamic IRQ numbers",
            (Param("free", values.number(), "so many it can still have", 0),),
            DOMAIN_WHERE, WINDOW, "no-irqs domain=0",
        ),
        FaultKind(
            "slow", "a backend's answers come later",
            (Param("ns", values.time(1), "how much later", positional=True, required=True), JITTER),
            DEVICE_WHERE, WHEN, "slow 20ms device=vbd-51712",
        ),
        FaultKind(
            "silent", "a backend doesn't answer until the rule is gone", (), DEVICE_WHERE, WHEN,
            "silent device=vbd-51712 after=1s until=4s",
        ),
        FaultKind(
            "error", "a backend answers a request with an error", (), DEVICE_WHERE, WHEN,
            "error device=vbd-51712 skip=100 count=1",
        ),
        FaultKind(
            "hostile", "a backend's answers are lies",
            (
                Param("lie", values.choice("id", "status", "garbage", "index"),
                      "an id that nobody asked with, a status that there isn't, any bytes, an index run ahead",
                      positional=True, required=True),
            ),
            DEVICE_WHERE, WHEN, "hostile id device=vbd-51712 count=1",
        ),
        FaultKind(
            "restart", "domain 0's backend is unloaded, and loaded again later",
            (
                Param("backend", values.choice("vbd", "vif"), "which", positional=True, required=True),
                Param("down", values.time(), "how long it is away", 1_000_000_000),
            ),
            (), SCHEDULE, "restart vbd down=2s after=5s",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """A rule as it was asked for: its kind, and the values of what was given."""

    kind: FaultKind
    given: Mapping[str, Value]

    def __getitem__(self, name: str) -> Value:
        """A value, or its default. KeyError for what is neither."""
        value = self.get(name)
        if value is None:
            raise KeyError(name)
        return value

    def get(self, name: str) -> Value | None:
        """A value, or its default, or None."""
        if name in self.given:
            return self.given[name]
        return next((param.default for param in self.kind.all_params if param.name == name), None)

    def number(self, name: str) -> int:
        """A whole number, or a time in ns."""
        return int(self[name])

    def __str__(self) -> str:
        positional, named = [], []
        params = {param.name: param for param in self.kind.all_params}
        for name, value in self.given.items():  # in the order in which it was said
            text = shlex.quote(params[name].form.write(value))
            if params[name].positional:
                positional.append((self.kind.params.index(params[name]), text))
            else:
                named.append(f"{name}={text}")
        return " ".join([self.kind.name, *(text for _, text in sorted(positional)), *named])


def find_kind(name: str) -> FaultKind:
    """FaultError for one that there isn't."""
    try:
        return KINDS[name]
    except KeyError:
        raise FaultError(f"there is no fault {name!r}{_near(name, KINDS)}; `pvirq faults` lists them") from None


def _near(word: str, known: Mapping[str, object] | list[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1)
    return f", but {near[0]!r}" if near else ""


def make(kind_name: str, given: Mapping[str, object]) -> Spec:
    """A rule from a program's values, of which None and defaults count as not given. FaultError."""
    kind = find_kind(kind_name)
    params = {param.name: param for param in kind.all_params}
    checked: dict[str, Value] = {}
    for name, value in given.items():
        if name not in params:
            raise FaultError(_unknown(kind, name))
        if value is None:
            continue
        try:
            checked[name] = params[name].form.check(value)
        except FaultError as error:
            raise FaultError(f"{kind.name}: {name}: {error}") from None
        if checked[name] == params[name].default:
            del checked[name]
    for param in kind.all_params:
        if param.required and param.name not in checked:
            raise FaultError(f"{kind.name}: {param.name} is missing ({param.does})")
    return _whole_rule(Spec(kind, checked))


def _unknown(kind: FaultKind, name: str) -> str:
    names = [param.name for param in kind.all_params]
    return f"{kind.name} takes no {name!r}{_near(name, names)}; it takes {', '.join(names)}"


def _whole_rule(spec: Spec) -> Spec:
    """What can't be told from one value alone."""
    until = spec.get("until")
    if until is not None and int(until) <= spec.number("after"):
        raise FaultError(f"{spec}: it is over before it begins")
    return spec


def parse(text: str) -> Spec:
    """A rule from its text. FaultError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise FaultError(f"{text!r}: {error}") from None
    if not words:
        raise FaultError("a rule begins with its kind, as in: lose irq=blkif count=1")
    kind = find_kind(words[0])
    positional = [param for param in kind.params if param.positional]
    by_name = {param.name: param for param in kind.all_params}
    given: dict[str, object] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if equals and name.isidentifier():
            param = by_name.get(name)
            if param is None:
                raise FaultError(_unknown(kind, name))
        else:
            left = [param for param in positional if param.name not in given]
            if not left:
                raise FaultError(f"{kind.name}: what is {word!r}? Expected NAME=VALUE, as in: {kind.example}")
            param, name, value = left[0], left[0].name, word
        if name in given:
            raise FaultError(f"{kind.name}: {name} is given twice")
        try:
            given[name] = param.form.parse(value)
        except FaultError as error:
            raise FaultError(f"{kind.name}: {name}: {error}") from None
    return make(kind.name, given)

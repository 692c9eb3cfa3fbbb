"""The one door for watching events and for disturbing them: traces are instruments, faults are filters.

Nothing is paid where nobody is at the door. Only while an instrument wants to be told of something is anything put in
its way: a function in front of a method, as an attribute of the very object (a domain's port operations, a kernel, a
real guest's machine), which goes again with the last instrument. So who calls those methods must look them up on the
object, and does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor, Vcpu
    from pvirq.xen.evtchn_2l import TwoLevel
    from pvirq.xen.evtchn_channels import Channel, EventChannels
    from pvirq.xen.evtchn_fifo import Fifo
    from pvirq.xen.timer import Clock

# What becomes of an event that is raised (`Instrument.raised`).
PENDING: Final = "pending"  # the guest will see it: an upcall is due, now or when the vCPU unmasks them
COALESCED: Final = "coalesced"  # it was pending already: two are one
MASKED: Final = "masked"  # pending, and no upcall before the guest unmasks the port
WAITING: Final = "waiting"  # (FIFO) kept by Xen until the guest gives a page with its event word
LOST: Final = "lost"  # (FIFO) its vCPU has no control block

# Why a vCPU's turn is over (`Instrument.stop`).
BLOCKED: Final = "blocked"  # SCHEDOP_block
POLLING: Final = "polling"  # SCHEDOP_poll
YIELDED: Final = "yielded"  # SCHEDOP_yield, or so many PAUSEs in a loop
SLICE: Final = "slice"  # others, a timer, or the host itself have something to do
DOWN: Final = "down"  # VCPUOP_down
PAUSED: Final = "paused"  # its domain is paused or has shut down
DONE: Final = "done"  # a modelled vCPU has nothing left to do, and blocks

Filter = Callable[["Vcpu", "Channel"], bool]
"""Called with each event before it is raised: True if the filter has taken it upon itself, to lose or raise later."""
Check = Callable[["Domain", str], None]
"""Called with each EVTCHNOP_* of a domain, by name, before it is done: the XenError that it raises is the answer."""

Deadline = Callable[["Vcpu", int], int]
"""Called when a vCPU's one-shot timer is set, with its time in ns: returns the time at which it is to fire."""

Record = Sequence[Any]
"""What a hook is told: its name, its arguments, and for `raised` and `unmasked` who did it (`Probes.current`)."""
Tell = Callable[[Record], object]
Once = tuple[Callable[[Any], object], Any]
"""Tells one and the same record, each time that the one is called with the other (`Probes.fixed`)."""


class NoteForm(NamedTuple):
    """What a hypercall that was noted in a book is told of (`Instrument.number_of_hypercalls`)."""

    name: str
    first: int  # of what the note has for arguments, from this one on so many
    values: int
    layout: struct.Struct | None = None  # they stand in the struct that begins with the first of them
    by_operation: bool = False  # all this hangs on the first argument as well


ReadNote = Callable[[int, int, bool], NoteForm]
"""Of a hypercall's number, its first argument, and whether the note has a struct."""


class Call(NamedTuple):
    """Tells of one and the same hypercall, but for its arguments and result (`Probes.fixed_call`)."""

    begin: Callable[[Sequence[int]], object]
    end: Callable[[int | None], object]
    if_zero: bool  # a result of 0 is told; else `begin` has taken it for granted


class Action(Protocol):
    """A handler on an interrupt line (struct irqaction): its name in /proc/interrupts, and the function or its name."""

    @property
    def name(self) -> str: ...

    @property
    def handler(self) -> object: ...


class Instrument:
    """What somebody wants to be told of. Override what is of interest; what isn't costs nothing.

    All are called before what they tell of has its effects, so that a cause stands in front of them, except where it is
    said otherwise. They must not change anything that a guest could see, nor add or remove instruments.
    """

    def hooks(self) -> Mapping[str, Tell]:
        """What is to be called for each hook of interest: the methods that a class overrides.

        An instrument that would rather have records than calls gives functions of its own, as `list.append` is one.
        Asked whenever instruments come or go, and when a host's clock begins to run by a counter.
        """
        names = [name for name in HOOKS if getattr(type(self), name) is not getattr(Instrument, name)]
        return {name: _call(name, getattr(self, name)) for name in names}

    def fixed(self, record: Record) -> Once | None:
        """What is to be called for a record that will be told again and again, and with what; None: its hook, with the
        record.

        So that an instrument can have done beforehand what there is to do with it.
        """
        return None

    def fixed_call(self, vcpu: Vcpu, name: str, arguments: int) -> Call | None:
        """What is to be called for a hypercall with so many arguments, likewise."""
        return None

    @property
    def book(self) -> Any:
        """Where machine code may put down what comes again and again, without a call (`pvirq.engine.notes.Book`)."""
        return None

    def number(self, record: Record) -> int | None:
        """What a record that will be told again and again is in the book; None: it has to be told after all."""
        return None

    def number_of_hypercalls(self, vcpu: Vcpu, read: ReadNote) -> int:
        """What all of a vCPU's hypercalls are in the book; `read` says what one of them is."""
        raise NotImplementedError

    def raised(self, vcpu: Vcpu, channel: Channel, outcome: str) -> None:
        """An event was raised on `channel`, towards `vcpu` of its domain; `outcome` is one of the five above.

        Who did it: `Probes.current`.
        """

    def unmasked(self, vcpu: Vcpu, channel: Channel, pending: bool) -> None:
        """A hypercall unmasks a port that notifies `vcpu`; `pending`: its event comes with that."""

    def bound(self, domain: Domain, channel: Channel) -> None:
        """A port was bound, or notifies another vCPU now; of an interdomain channel, the end that was bound second."""

    def closed(self, domain: Domain, port: int, remote: Domain | None, remote_port: int) -> None:
        """A port was closed; the other end of an interdomain channel, `remote_port` of `remote`, waits again."""

    def upcall(self, vcpu: Vcpu) -> None:
        """The kernel's event callback is entered."""

    def irq_entry(self, vcpu: Vcpu, port: int, irq: int, actions: Sequence[Action]) -> None:
        """A kernel found `port` pending, and begins to handle its interrupt line.

        `irq` is -1 where only the port is known, as in a guest without symbols, and for an event that goes straight to
        /dev/xen/evtchn. `actions` are empty where no handler will run, as on a line that is disabled.
        """

    def irq_exit(self, vcpu: Vcpu, port: int, irq: int) -> None:
        """It is done with that."""

    def eoi(self, vcpu: Vcpu, port: int, irq: int, spurious: bool) -> None:
        """The handler says that it is done with an event, and the next may come (xen_irq_lateeoi, PHYSDEVOP_eoi).

        `port` or `irq` is -1 where it isn't known.
        """

    def hypercall(self, vcpu: Vcpu, name: str, arguments: Sequence[int]) -> None:
        """A real guest's kernel makes a hypercall: "event_channel_op.send"; its argument registers, or what the struct
        that they point to has in it, where that is an event channel operation's."""

    def hypercall_done(self, vcpu: Vcpu, name: str, result: int | None) -> None:
        """The last one that began has ended: its result, -errno where it failed, None where it stopped half-way."""

    def run(self, vcpu: Vcpu) -> None:
        """It is this vCPU's turn."""

    def stop(self, vcpu: Vcpu, why: str) -> None:
        """Its turn is over; `why` is one of those above."""

    def woken(self, vcpu: Vcpu) -> None:
        """There may be something to do for a vCPU (vcpu_kick, vcpu_wake)."""

    def created(self, domain: Domain) -> None:
        """There is a new domain, with nothing in it yet."""

    def shut_down(self, domain: Domain, reason: int) -> None:
        """A domain has ended or was suspended: a SHUTDOWN_*."""

    def ended(self, domain: Domain) -> None:
        """A domain was destroyed."""

    def noted(self, kind: str, vcpu: Vcpu | None, fields: dict[str, Any]) -> None:
        """Somebody has something to say (`Probes.note`)."""

    def jumped(self, now: int) -> None:
        """Virtual time has jumped to `now`, in ns; without a counter (modelled domains only) it has no other way."""


_NO_HOOKS: Final = ("hooks", "fixed", "fixed_call", "book", "number", "number_of_hypercalls")
HOOKS: Final = tuple(name for name in vars(Instrument) if not name.startswith("_") and name not in _NO_HOOKS)
"""The names of all that an instrument may be told of."""


def _call(name: str, method: Callable[..., None]) -> Tell:
    end = getattr(Instrument, name).__code__.co_argcount
    return lambda record: method(*record[1:end])


K = TypeVar("K")
MOST_SAID: Final = 100_000  # of what is kept by `keep`


def keep(said: dict[Any, K], key: object, make: Callable[[], K]) -> K:
    """What tells a record, by what that hangs on; made when it is wanted for the first time."""
    once = said.get(key)
    if once is None:
        if len(said) >= MOST_SAID:
            said.clear()
        once = said[key] = make()
    return once


def nest(said: dict[Any, Any], last: K, *keys: object) -> K:
    """The same by several keys, for what is looked up most: a dict a key, one in the other.

    Those are exact dicts because CPython looks those up faster by far than others, or one with tuples.
    """
    for key in keys[:-1]:
        said = said.setdefault(key, {})
    said[keys[-1]] = last
    return last


def put_last(said: dict[Any, K], key: object, last: K) -> None:
    """The same for what is looked at before: what was told last."""
    if len(said) >= MOST_SAID:
        said.clear()
    said[key] = last


class Probed(Protocol):
    """What instruments want to be told of on further floors: a modelled kernel, a real guest's machine."""

    def probe(self, probes: Probes) -> None:
        """Put in the way what is wanted now, and take out what isn't any more."""


class Probes:
    """The instruments and filters of one hypervisor.

    `current` is the vCPU whose turn it is, for as long as an instrument wants to know who raises events; None while it
    is nobody's, as when a timer fires. `on_*` are what to call for each hook: None where nobody wants it.
    """

    on_raised: Tell | None
    on_unmasked: Tell | None
    on_bound: Tell | None
    on_closed: Tell | None
    on_upcall: Tell | None
    on_irq_entry: Tell | None
    on_irq_exit: Tell | None
    on_eoi: Tell | None
    on_hypercall: Tell | None
    on_hypercall_done: Tell | None
    on_run: Tell | None
    on_stop: Tell | None
    on_woken: Tell | None
    on_created: Tell | None
    on_shut_down: Tell | None
    on_ended: Tell | None
    on_noted: Tell | None
    on_jumped: Tell | None

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self.instruments: list[Instrument] = []
        self.filters: list[Filter] = []
        self.checks: list[Check] = []
        self.deadlines: list[Deadline] = []
        self.current: Vcpu | None = None
        self._waker: Callable[[Vcpu], None] | None = None  # the hypervisor's on_wake, where something is in front of it
        self._covered = False
        self._hooks: list[tuple[Instrument, Mapping[str, Tell]]] = []
        for name in HOOKS:
            setattr(self, f"on_{name}", None)

    def add(self, instrument: Instrument) -> None:
        """From now on `instrument` is told."""
        self.instruments.append(instrument)
        self.refresh()

    def remove(self, instrument: Instrument) -> None:
        """It is told no more. ValueError if it wasn't."""
        self.instruments.remove(instrument)
        self.refresh()

    def add_filter(self, filter: Filter) -> None:
        """From now on each event passes `filter` first; where there are several, in the order of their adding."""
        self.filters.append(filter)
        self.refresh()

    def remove_filter(self, filter: Filter) -> None:
        """Events pass it no more. ValueError if they didn't."""
        self.filters.remove(filter)
        self.refresh()

    def add_check(self, check: Check) -> None:
        """From now on each event channel operation passes `check` first."""
        self.checks.append(check)
        self._refresh_checks()

    def remove_check(self, check: Check) -> None:
        """They pass it no more. ValueError if they didn't."""
        self.checks.remove(check)
        self._refresh_checks()

    def note(self, kind: str, vcpu: Vcpu | None = None, **fields: Any) -> None:
        """Tell the instruments of something else that happened: a fault that was made, a choice, an input.

        `kind` and `fields` are for whoever reads them; a trace writes them down as they are, so they should be numbers,
        strings, and lists of them, and the same in each run that is the same.
        """
        if self.on_noted is not None:
            self.on_noted(("noted", kind, vcpu, fields))

    # -- putting it in the way -----------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """What instruments want has changed, or how."""
        if not (self.instruments or self.filters or self._covered):
            return
        self._covered = bool(self.instruments or self.filters)
        told: dict[str, list[Tell]] = {name: [] for name in HOOKS}
        self._hooks = [(instrument, instrument.hooks()) for instrument in self.instruments]
        for _, hooks in self._hooks:
            for name, tell in hooks.items():
                told[name].append(tell)
        for name, tells in told.items():
            setattr(self, f"on_{name}", tells[0] if len(tells) == 1 else _all_of(tells) if tells else None)
        self._cover_hypervisor()
        for domain in self._hypervisor.domains.values():
            self._cover_domain(domain)

    def fixed(self, *record: Any) -> Once:
        """What tells a record, for who tells it again and again: good until instruments come or go."""
        tells: list[Once] = [
            instrument.fixed(record) or (hooks[record[0]], record)
            for instrument, hooks in self._hooks
            if record[0] in hooks
        ]
        return tells[0] if len(tells) == 1 else (_tell_all, tells)

    def noting(self, *names: str) -> Instrument | None:
        """The only instrument that wants any of these hooks, if it has a book."""
        found = [instrument for instrument, hooks in self._hooks if not hooks.keys().isdisjoint(names)]
        return found[0] if len(found) == 1 and found[0].book is not None else None

    def fixed_call(self, vcpu: Vcpu, name: str, arguments: int) -> Call:
        """What tells a hypercall, likewise."""
        calls = [
            instrument.fixed_call(vcpu, name, arguments) or _call_told(vcpu, name, hooks)
            for instrument, hooks in self._hooks
            if "hypercall" in hooks or "hypercall_done" in hooks
        ]
        if len(calls) == 1:
            return calls[0]

        def begin(arguments: Sequence[int]) -> None:
            for call in calls:
                call.begin(arguments)

        def end(result: int | None) -> None:
            for call in calls:
                if result != 0 or call.if_zero:
                    call.end(result)

        return Call(begin, end, any(call.if_zero for call in calls))

    @property
    def tells_turns(self) -> bool:
        """Does anybody want to know whose turn it is, or who raises events?"""
        return bool(self.on_run or self.on_stop or self.on_raised or self.on_eoi or self.on_noted)

    def register(self, domain: Domain, probed: Probed) -> None:
        """`probed` belongs to `domain`: it is to be asked whenever what instruments want changes, and at once."""
        domain.probed.append(probed)
        if self.instruments:
            probed.probe(self)

    def domain_created(self, domain: Domain) -> None:
        """Called by the hypervisor for each domain that it makes."""
        if self.instruments:
            self._cover_domain(domain)
        if self.on_created is not None:
            self.on_created(("created", domain))

    def _cover_domain(self, domain: Domain) -> None:
        evtchn, pirqs = domain.evtchn, domain.pirqs
        self.cover(evtchn)
        put(evtchn, "close", None if self.on_closed is None else _told_close(evtchn, self.on_closed))
        put(pirqs, "eoi", None if self.on_eoi is None else self._told_eoi(domain, self.on_eoi))
        for probed in domain.probed:
            probed.probe(self)

    def cover(self, evtchn: EventChannels) -> None:
        """Put the door into a domain's port operations, or take it out, as it is wanted now."""
        ops, domain = evtchn.ops, evtchn.domain
        put(ops, "set_pending", self._door(ops) if self.on_raised or self.filters else None)
        put(ops, "unmask", None if self.on_unmasked is None else self._told_unmask(domain, ops, self.on_unmasked))
        put(ops, "init", None if self.on_bound is None else _told_init(domain, ops, self.on_bound))

    def _refresh_checks(self) -> None:
        for domain in self._hypervisor.domains.values():
            domain.evtchn.check = self.check_of(domain)

    def check_of(self, domain: Domain) -> Callable[[str], None] | None:
        """What a domain's operations are to pass now."""
        return partial(self._check, domain) if self.checks else None

    def _check(self, domain: Domain, operation: str) -> None:
        for check in tuple(self.checks):  # one may go as it is asked
            check(domain, operation)

    def _door(self, ops: TwoLevel | Fifo) -> Callable[[Vcpu, Channel], None]:
        """What stands in front of `set_pending`: each event passes it, so without filters it is as short as can be."""
        if not self.filters:
            return ops.told_set_pending(self)

        def door(vcpu: Vcpu, channel: Channel) -> None:
            for filter in self.filters:
                if filter(vcpu, channel):
                    return
            self.raise_event(ops, vcpu, channel)

        return door

    def raise_event(self, ops: TwoLevel | Fifo, vcpu: Vcpu, channel: Channel) -> None:
        """Raise an event past the filters; for a filter that has held it back."""
        if self.on_raised is not None:
            self.on_raised(("raised", vcpu, channel, ops.outcome(vcpu, channel), self.current))
        ops.do_set_pending(vcpu, channel)

    def _told_unmask(self, domain: Domain, ops: TwoLevel | Fifo, told: Tell) -> Callable[[Channel], None]:
        unmask = ops.do_unmask

        def in_front(channel: Channel) -> None:
            comes = ops.is_masked(channel) and ops.is_pending(channel)
            told(("unmasked", domain.vcpus[channel.notify_vcpu], channel, comes, self.current))
            unmask(channel)

        return in_front

    def _told_eoi(self, domain: Domain, told: Tell) -> Callable[[int], None]:
        pirqs = domain.pirqs
        eoi = MethodType(type(pirqs).eoi, pirqs)

        def in_front(pirq: int) -> None:
            told(("eoi", self.current or domain.vcpus[0], pirqs.port_of(pirq) or -1, -1, False))
            eoi(pirq)

        return in_front

    def _cover_hypervisor(self) -> None:
        hypervisor = self._hypervisor
        if self._waker is not None:
            hypervisor.on_wake, self._waker = self._waker, None
        if self.on_woken is not None:
            wake = self._waker = hypervisor.on_wake
            said: dict[Vcpu, Once] = {}

            def in_front(vcpu: Vcpu) -> None:
                try:
                    tell, what = said[vcpu]
                except KeyError:
                    tell, what = keep(said, vcpu, partial(self.fixed, "woken", vcpu))
                tell(what)
                wake(vcpu)

            hypervisor.on_wake = in_front
        put(
            hypervisor.clock,
            "jump_to",
            None if self.on_jumped is None else _told_jump(hypervisor.clock, self.on_jumped),
        )


def nothing(record: Record) -> None:
    """Stands where nobody wants to be told."""


def _tell_all(tells: list[Once]) -> None:
    for tell, what in tells:
        tell(what)


def _call_told(vcpu: Vcpu, name: str, hooks: Mapping[str, Tell]) -> Call:
    told, done = hooks.get("hypercall", nothing), hooks.get("hypercall_done", nothing)
    return Call(
        lambda arguments: told(("hypercall", vcpu, name, arguments)),
        lambda result: done(("hypercall_done", vcpu, name, result)),
        True,
    )


def _told_init(domain: Domain, ops: TwoLevel | Fifo, told: Tell) -> Callable[[Channel], None]:
    init = ops.do_init

    def behind(channel: Channel) -> None:
        init(channel)
        told(("bound", domain, channel))

    return behind


def _told_close(evtchn: EventChannels, told: Tell) -> Callable[..., None]:
    close = evtchn.do_close

    def behind(port: int, guest: bool = True) -> None:
        channel = evtchn.port(port)
        remote, remote_port = channel.remote_domain, channel.remote_port
        close(port, guest)
        told(("closed", evtchn.domain, port, remote, remote_port if remote is not None else 0))

    return behind


def _told_jump(clock: Clock, told: Tell) -> Callable[[int], None]:
    jump_to = clock.do_jump_to

    def behind(when: int) -> None:
        jump_to(when)
        told(("jumped", clock.now()))

    return behind


def put(target: object, name: str, function: Callable[..., object] | None) -> None:
    """Put a function in front of a method of one object; None: take it away.

    Where the object's class is made for that, what the method does is in another, `do_` and its name, and the method an
    attribute: with classes that are machine code (`pvirq.machine_code`) there is no other way.
    Not by way of `vars`, after which CPython finds the object's attributes more slowly for the rest of its life.
    """
    if function is not None:
        function.in_front = True  # type: ignore[attr-defined]
        setattr(target, name, function)
    elif has_front(target, name):  # what others have put there is theirs
        plain = getattr(target, f"do_{name}", None)
        if plain is None:
            delattr(target, name)
        else:
            setattr(target, name, plain)


def has_front(target: object, name: str) -> bool:
    """Has `put` something in front of this method of the object's?"""
    return hasattr(getattr(target, name), "in_front")


def _all_of(tells: list[Tell]) -> Tell:
    def tell(record: Record) -> None:
        for each in tells:
            each(record)

    return tell

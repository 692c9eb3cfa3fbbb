"""What a trace writes down while domains run: as little as can be, for every event passes through here.

An event is one item, its line's shape (`pvirq.lab.lines`), made when it happened for the first time, and known since to
who tells of it; times and other numbers go into a second list. `pvirq.lab.chunks` makes lines of both later. Nothing is
allocated that way, of which the garbage collector would want to know.

A time is recorded only where it may have gone on. Without a counter (modelled domains alone) it stands still between
two jumps of the clock. Where it counts what guests execute, it goes on in the turns of real guests, from one of their
exits to the next, and stands still in those of modelled ones.

What happens in a real guest its engine notes by itself, each with its time (`pvirq.engine.notes`): such a note says how
long both lists were then, and so where it belongs.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from pvirq.engine.notes import FINISHED, MOST_NOTES, NOTE_FORM, READ, USED, Book
from pvirq.lab.chunks import Chunks
from pvirq.lab.lines import MOST_KEPT, Shape, Shapes
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_IPI, ECS_PIRQ, ECS_UNBOUND, ECS_VIRQ, Channel
from pvirq.xen.probes import Call, Instrument, NoteForm, Once, ReadNote, Record, Tell, keep, nothing

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor, Vcpu

M32: Final = 0xFFFFFFFF
_pack_struct: Final = struct.Struct("<4Q").pack  # what notes have for arguments, from the third on
FULL: Final = 1 << 16  # events: of more, lines are made at the end of a real guest's turn, or when time jumps

# The kinds of a trace's events, and the hooks that they come from.
HOOKS: Final = {
    "raise": ("raised",),
    "upcall": ("upcall",),
    "irq": ("irq_entry", "irq_exit"),
    "run": ("run",),
    "stop": ("stop",),
    "wake": ("woken",),
    "unmask": ("unmasked",),
    "eoi": ("eoi",),
    "hypercall": ("hypercall", "hypercall_done"),
    "bind": ("bound",),
    "close": ("closed",),
    "domain": ("created",),
    "end": ("shut_down", "ended"),
    "choice": ("noted",),
}

Binding = tuple[str, int, int, int, int, int]
"""What a port is: type, vCPU notified, remote domain, remote port, VIRQ, pirq; -1 for what it has not."""

_TYPES: Final = {
    ECS_UNBOUND: "unbound",
    ECS_INTERDOMAIN: "interdomain",
    ECS_PIRQ: "pirq",
    ECS_VIRQ: "virq",
    ECS_IPI: "ipi",
}


def describe(channel: Channel) -> Binding:
    """A port that is bound, as it is now."""
    state, remote, remote_port = channel.state, -1, -1
    if state == ECS_UNBOUND:
        remote = channel.remote_domid
    elif channel.remote_domain is not None:
        remote, remote_port = channel.remote_domain.domid, channel.remote_port
    virq = channel.virq if state == ECS_VIRQ else -1
    pirq = channel.pirq if state == ECS_PIRQ else -1
    return _TYPES[state], channel.notify_vcpu, remote, remote_port, virq, pirq


class Recorder(Instrument):
    """Writes down what happens on a host, until somebody `take`s it.

    `kinds` are those that are wanted (HOOKS); the rest costs nothing. `on_full` is called between two turns when there
    are many events, to take them away.
    """

    def __init__(self, hypervisor: Hypervisor, kinds: Collection[str], on_full: Callable[[], None]) -> None:
        self._hypervisor = hypervisor
        self._wanted = {hook for kind in kinds for hook in HOOKS[kind]} | {"noted", "jumped"}
        self._on_full = on_full
        self._shapes = Shapes()
        self._chunks = Chunks(hypervisor.clock.now(), self._shapes)
        self.events: list[Shape] = []
        self._values: list[Any] = []
        self._book = Book.of(self.events, self._values, self._empty_book)  # what engines note without Python
        self._known: list[Shape | tuple[Vcpu, ReadNote]] = []  # what those notes are, by number
        self._numbers: dict[Shape, int] = {}
        self._forms: dict[tuple[int, int, int], tuple[NoteForm, tuple[Shape, Shape]]] = {}
        self._timed = self._make_timed()
        self._stopped = self._make_stopped()
        self._noted = bytearray()  # those that were in the book

    def begin(self) -> None:
        """From now on."""
        self._hypervisor.probes.add(self)

    def end(self) -> None:
        """No more."""
        self._hypervisor.probes.remove(self)

    def take(self) -> str:
        """The lines of what has happened since the last time."""
        self._empty_book()
        events, values = self._merged() if self._noted else (self.events, self._values)
        text = self._chunks.text(events, values)
        self.events.clear()
        self._values.clear()
        self._noted.clear()
        return text

    def _empty_book(self) -> None:
        if self._book is not None:
            self._noted += self._book.take()

    def _merged(self) -> tuple[list[Shape], list[Any]]:
        """All that was recorded, with what was noted where it belongs."""
        events: list[Shape] = []
        values: list[Any] = []
        event = value = 0
        known, ns, told, told_values = self._known, self._hypervisor.clock.ticks_to_ns, self.events, self._values
        for at, values_at, number, ticks, hypercall, *arguments, result in NOTE_FORM.iter_unpack(self._noted):
            if at != event:
                events += told[event:at]
                event = at
            if values_at != value:
                values += told_values[value:values_at]
                value = values_at
            values.append(ns(ticks))
            what = known[number]
            if isinstance(what, Shape):
                events.append(what)
                continue
            form, shapes = self._form(what, number, hypercall, arguments[0])
            if form.layout is not None:
                values += form.layout.unpack_from(_pack_struct(*arguments[2:]))[: form.values]
            else:
                values += arguments[form.first : form.first + form.values]
            values.append(result - (result >> 63 << 64))
            events.append(shapes[hypercall & FINISHED != 0])
        events += self.events[event:]
        values += self._values[value:]
        return events, values

    def _form(
        self, what: tuple[Vcpu, ReadNote], number: int, hypercall: int, first: int
    ) -> tuple[NoteForm, tuple[Shape, Shape]]:
        """How a hypercall's note is to be read, and what its line is without and with a result."""
        hypercall &= ~FINISHED
        known = self._forms.get((number, hypercall, 0))
        if known is None or known[0].by_operation:
            known = self._forms.get((number, hypercall, first))
            if known is None:
                vcpu, read = what
                form = read(hypercall & M32, first, hypercall & READ != 0)
                known = form, self._shapes.of_hypercall(vcpu, form.name, form.values)
                if len(self._forms) >= MOST_KEPT:
                    self._forms.clear()
                self._forms[number, hypercall, first if form.by_operation else 0] = known
        return known

    @property
    def unwritten(self) -> bool:
        """Is there anything to `take`?"""
        return bool(self.events or self._noted or (self._book is not None and self._book.used))

    # -- what is told --------------------------------------------------------------------------------------------------

    def hooks(self) -> Mapping[str, Tell]:
        hooks: dict[str, Tell] = {}
        clock = self._hypervisor.clock
        own: dict[str, Tell] = {
            "hypercall": nothing, "hypercall_done": nothing,  # see `fixed_call`
            "bound": self._bound, "closed": self._closed, "jumped": self._jumped,
        }  # fmt: skip
        for name in self._wanted:
            if name in own:
                hooks[name] = own[name]
            elif name == "noted":
                hooks[name] = self._noted_of(self._rare())
            elif name in ("unmasked", "created", "shut_down", "ended"):
                hooks[name] = self._rare()
            else:
                hooks[name] = self._again()
        if clock.counts and "stop" not in hooks:
            hooks["stop"] = self._time_passed  # what comes between two turns has none of its own
        return hooks

    def fixed(self, record: Record) -> Once | None:
        """What is told again and again becomes its shape here, and all that is left to do is to put that down."""
        name = record[0]
        if name not in self._wanted or name in ("hypercall", "hypercall_done"):
            return None
        timed = self._hypervisor.clock.counts and not self._at_once(record)
        shape = self._shapes.of(record, timed)
        if not timed:
            return self.events.append, shape
        return self._stopped if name == "stop" else self._timed, shape

    @property
    def book(self) -> Book | None:
        return self._book

    def number(self, record: Record) -> int | None:
        shape = self._shapes.of(record, True)
        number = self._numbers.get(shape)
        if number is None and len(self._numbers) < MOST_KEPT:
            number = self._numbers[shape] = len(self._known)
            self._known.append(shape)
        return number

    def number_of_hypercalls(self, vcpu: Vcpu, read: ReadNote) -> int:
        self._known.append((vcpu, read))
        return len(self._known) - 1

    def _at_once(self, record: Record) -> bool:
        """Has no time passed since the last event, where a guest's execution is all that takes any?"""
        name = record[0]
        if name in ("run", "woken"):
            return name == "run" or "raised" in self._wanted
        who: Vcpu | None = record[4] if name == "raised" else record[1]
        if name == "raised" and not {"hypercall", "shut_down"} - self._wanted:
            return True  # a real guest does it in a hypercall, or by its end, and both have been told of
        return who is None or who.domain.label.kind == "modelled"

    def _again(self) -> Tell:
        """Of events that come again and again, from who has only a record of them."""
        said: dict[Record, Once] = {}

        def make(record: Record) -> Once:
            once = self.fixed(record)
            assert once is not None
            return once

        def tell(record: Record) -> None:
            put, shape = keep(said, record, partial(make, record))
            put(shape)

        return tell

    def _make_timed(self) -> Callable[[Shape], None]:
        append, put, now = self.events.append, self._values.append, self._hypervisor.clock.now

        def timed(shape: Shape) -> None:
            try:
                put(now())
                append(shape)
            except BaseException:
                self._realign()
                raise

        return timed

    def _make_stopped(self) -> Callable[[Shape], None]:
        """A real guest's turn is over: the moment to look how much there is."""
        events, timed, full, most = self.events, self._timed, FULL, MOST_NOTES // 2
        book = (0,) if self._book is None else self._book.items

        def stopped(shape: Shape) -> None:
            timed(shape)
            if len(events) > full or book[USED] > most:
                self._filled()

        return stopped

    def _filled(self) -> None:
        self._empty_book()
        if len(self.events) + len(self._noted) // NOTE_FORM.size > FULL:
            self._on_full()

    def _time_passed(self, record: Record) -> None:
        if not self._at_once(record):
            self._put_time(self._hypervisor.clock.now())
            if self._book is not None and self._book.used > MOST_NOTES // 2:
                self._filled()

    def _jumped(self, record: Record) -> None:
        self._put_time(record[1])
        if len(self.events) > FULL and self._hypervisor.probes.current is None:
            self._on_full()

    def _put_time(self, t: int) -> None:
        try:
            self._values.append(t)
            self.events.append(self._shapes.jump)
        except BaseException:
            self._realign()
            raise

    def _realign(self) -> None:
        """Ctrl-C has come between an event and what belongs to it."""
        del self._values[sum(shape.takes for shape in self.events) :]

    def fixed_call(self, vcpu: Vcpu, name: str, arguments: int) -> Call | None:
        """A hypercall is put down as one that returns 0, as most do; what it comes to instead is seen to afterwards."""
        if "hypercall" not in self._wanted:
            return None
        append, put, now = self.events.append, self._values.extend, self._hypervisor.clock.now
        without, done = self._shapes.of_hypercall(vcpu, name, arguments)

        def begin(arguments: Sequence[int]) -> None:
            try:
                put((now(), *arguments, 0))
                append(done)
            except BaseException:
                self._realign()
                raise

        return Call(begin, partial(self._end_call, without, done), False)

    def _end_call(self, without: Shape, done: Shape, result: int | None) -> None:
        events, value = self.events, len(self._values)
        for at in range(len(events) - 1, -1, -1):
            shape = events[at]
            if shape is done:  # the last of its kind is the one under way, if it wasn't taken away meanwhile
                if result is None:
                    events[at] = without
                else:
                    self._values[value - 1] = result
                return
            value -= shape.takes

    def _noted_of(self, rare: Tell) -> Tell:
        """A schedule's choices are many, and all alike."""
        append, put, now = self.events.append, self._values.extend, self._hypervisor.clock.now
        of_choice = self._shapes.of_choice
        choices = self._shapes.choices

        def told(record: Record) -> None:
            _, kind, _, fields = record
            if kind != "choice":
                rare(record)
                return
            try:
                put((now(), fields["n"], fields["of"], fields["took"]))
                what = fields["what"]
                append(choices[what] if what in choices else of_choice(what))
            except BaseException:
                self._realign()
                raise

        return told

    def _rare(self) -> Tell:
        timed = self._hypervisor.clock.counts

        def told(record: Record) -> None:
            self._put_rare(record, timed)

        return told

    def _put_rare(self, record: Record, timed: bool) -> None:
        """What comes seldom, or may be different each time, is put into words later."""
        try:
            self._values.extend((self._hypervisor.clock.now(), record) if timed else (record,))
            self.events.append(self._shapes.rare[timed])
        except BaseException:
            self._realign()
            raise

    # What is not to be looked at later, for it changes.

    def _bound(self, record: Record) -> None:
        _, domain, channel = record
        self._bind(domain, channel.port, describe(channel))
        if channel.state == ECS_INTERDOMAIN:
            remote = channel.remote_domain.evtchn.port(channel.remote_port)
            if remote.state == ECS_UNBOUND:  # it waits no more
                what = "interdomain", remote.notify_vcpu, domain.domid, channel.port, -1, -1
                self._bind(channel.remote_domain, remote.port, what)

    def _closed(self, record: Record) -> None:
        _, domain, port, remote, remote_port = record
        self._put_rare(("closed", domain, port), True)
        if remote is not None:
            self._bind(remote, remote_port, describe(remote.evtchn.port(remote_port)))

    def _bind(self, domain: Domain, port: int, what: Binding) -> None:
        self._put_rare(("bound", domain, port, what), True)

"""The language of models: variables that threads share, and the steps that they take on them.

A thread of a model is a generator that yields a `Step` at each access of shared memory, each lock and each barrier,
and is given the step's result. What it computes in between is its own and takes no time:

    def sender():
        pending = yield word.read()
        if not pending:
            yield word.write(1)

One step is one indivisible action. Whatever can be interleaved has to be a step of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Generator, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

# A thread's program; a part of one, to be used with `yield from`, may return something.

Thread = Generator["Step", Any, Any]


class Kind(enum.Enum):
    """What memory order makes of a step (pvirq.check.system)."""

    LOAD = "load"
    STORE = "store"
    ATOMIC = "atomic"  # locked: indivisible, and a full barrier
    ACQUIRE = "acquire"  # of a lock: waits, then as ATOMIC
    SHARE = "share"  # of a lock, for reading: as ACQUIRE
    RELEASE = "release"  # of a lock
    LEAVE = "leave"  # of a lock that is held for reading: locked, as other readers count there as well
    MB = "mb"
    WMB = "wmb"
    RMB = "rmb"
    LOCAL = "local"  # touches nothing that others see

    __hash__ = object.__hash__  # an Enum's own is Python code


class Broken(Exception):
    """A property doesn't hold: raised by a model's thread (`fail`), and by an explorer that met it."""


def fail(message: str) -> None:
    """Say that what the thread has just seen must never be; a plain `assert` does as well."""
    raise Broken(message)


@dataclass(eq=False, slots=True)  # not frozen: models make them all the time, and that would take twice as long
class Step:
    """One indivisible action of a thread. It isn't changed once it is made.

    `do` is given the values of `reads`, in their order, and returns the new values of `writes` and the step's result.
    It is called again and again: it must be a function of its arguments alone. `when` is given the same values and
    says whether the step can be taken yet; a thread waits at one that can't.
    """

    kind: Kind
    reads: tuple[Var, ...] = ()
    writes: tuple[Var, ...] = ()
    do: Callable[..., tuple[tuple[Hashable, ...], Any]] = lambda *_: ((), None)
    when: Callable[..., bool] | None = None
    text: str = ""
    choices: int = 1

    def saying(self, text: str) -> Step:
        """The same step with a sentence for who reads a schedule: what it means, rather than what it touches."""
        return Step(self.kind, self.reads, self.writes, self.do, self.when, text, self.choices)


@dataclass(eq=False)
class Var:
    """A word of shared memory, or anything else that threads share and that a hashable value can stand for.

    Reading and writing are plain accesses; the other steps are locked instructions, which are full barriers as well.
    """

    name: str
    initial: Hashable
    index: int
    coherent: bool = False
    lock: bool = False  # a Lock's

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def read(self) -> Step:
        """Load it. The result is its value."""
        return Step(Kind.LOAD, (self,), (), lambda value: ((), value), text=f"reads {self.name}")

    def write(self, value: Hashable) -> Step:
        """Store `value`."""
        return Step(Kind.STORE, (), (self,), lambda: ((value,), None), text=f"writes {self.name} = {value!r}")

    def wait(self, until: Callable[[Any], bool]) -> Step:
        """Go on once `until(value)` is true, as a loop that only reads would. The result is the value."""
        return Step(Kind.LOAD, (self,), (), lambda value: ((), value), until, text=f"waits for {self.name}")

    def update(self, change: Callable[[Any], Hashable], text: str = "") -> Step:
        """Replace its value by `change(value)`, indivisibly. The result is the old value."""
        return Step(
            Kind.ATOMIC, (self,), (self,), lambda value: ((change(value),), value), text=text or f"changes {self.name}"
        )

    def xchg(self, value: Hashable) -> Step:
        """Store `value`; the result is the old one."""
        return self.update(lambda _: value, f"exchanges {self.name} for {value!r}")

    def cmpxchg(self, old: Hashable, new: Hashable) -> Step:
        """Store `new` where it is `old`. The result is what it was: `old` where it was stored."""
        return self.update(
            lambda value: new if value == old else value, f"compares {self.name} with {old!r}, exchanges it for {new!r}"
        )

    def add(self, number: int) -> Step:
        """Add `number`; the result is the value before."""
        return self.update(lambda value: value + number, f"adds {number} to {self.name}")

    def set_bit(self, bit: int) -> Step:
        """Set a bit, as test_and_set_bit does: the result is whether it was set."""
        return Step(
            Kind.ATOMIC, (self,), (self,), lambda value: ((value | 1 << bit,), bool(value >> bit & 1)),
            text=f"sets bit {bit} of {self.name}",
        )  # fmt: skip

    def clear_bit(self, bit: int) -> Step:
        """Clear a bit, as test_and_clear_bit does: the result is whether it was set."""
        return Step(
            Kind.ATOMIC, (self,), (self,), lambda value: ((value & ~(1 << bit),), bool(value >> bit & 1)),
            text=f"clears bit {bit} of {self.name}",
        )  # fmt: skip


@dataclass(eq=False)
class Lock:
    """A spinlock; with `read_acquire` and `read_release`, a rwlock. Taking it waits; interrupts are no matter here."""

    var: Var  # 0: free, -1: taken, n > 0: n readers

    @property
    def name(self) -> str:
        return self.var.name

    def acquire(self) -> Step:
        return Step(
            Kind.ACQUIRE, (self.var,), (self.var,), lambda _: ((-1,), None), lambda held: held == 0,
            text=f"takes {self.name}",
        )  # fmt: skip

    def release(self) -> Step:
        return Step(Kind.RELEASE, (self.var,), (self.var,), self._released, text=f"releases {self.name}")

    def trylock(self) -> Step:
        """The result is whether it was taken."""
        return Step(
            Kind.ATOMIC, (self.var,), (self.var,), lambda held: ((-1,), True) if held == 0 else ((held,), False),
            text=f"tries to take {self.name}",
        )  # fmt: skip

    def read_acquire(self) -> Step:
        return Step(
            Kind.SHARE, (self.var,), (self.var,), lambda held: ((held + 1,), None), lambda held: held >= 0,
            text=f"takes {self.name} for reading",
        )  # fmt: skip

    def read_trylock(self) -> Step:
        """The result is whether it was taken for reading."""
        return Step(
            Kind.ATOMIC, (self.var,), (self.var,), lambda held: ((held + 1,), True) if held >= 0 else ((held,), False),
            text=f"tries to take {self.name} for reading",
        )  # fmt: skip

    def read_release(self) -> Step:
        return Step(Kind.LEAVE, (self.var,), (self.var,), self._left, text=f"releases {self.name} for reading")

    def _released(self, held: int) -> tuple[tuple[int], None]:
        if held != -1:
            raise Broken(f"{self.name} is released, and nobody holds it")
        return (0,), None

    def _left(self, held: int) -> tuple[tuple[int], None]:
        if held <= 0:
            raise Broken(f"{self.name} is released for reading, and nobody holds it so")
        return (held - 1,), None


def atomically(
    touches: Iterable[Var], do: Callable[..., Any], when: Callable[..., bool] | None = None, text: str = ""
) -> Step:
    """What happens as one, on several variables: a part that is under a lock in all its users, or one instruction.

    `do` is given the values of `touches` and returns None, or their new values as a tuple; the result is the values
    before. `when` says whether the step can be taken yet.
    """
    variables = tuple(touches)

    def done(*values: Hashable) -> tuple[tuple[Hashable, ...], tuple[Hashable, ...]]:
        changed = do(*values)
        return (values if changed is None else tuple(changed)), values

    return Step(Kind.ATOMIC, variables, variables, done, when, text or f"does {', '.join(v.name for v in variables)}")


def look(touches: Iterable[Var], when: Callable[..., bool] | None = None, text: str = "") -> Step:
    """Read several variables as one, once `when(*values)` is true; the result is their values."""
    variables = tuple(touches)
    names = ", ".join(variable.name for variable in variables)
    return Step(Kind.ATOMIC, variables, (), lambda *values: ((), values), when, text or f"looks at {names}")


def mb() -> Step:
    """A full barrier: what was stored before is seen by all before anything after it is loaded or stored."""
    return Step(Kind.MB, text="mb()")


def wmb() -> Step:
    """What is stored before it is seen by others before what is stored after it. Only "weak" order needs it."""
    return Step(Kind.WMB, text="wmb()")


def rmb() -> Step:
    """What is loaded after it is no older than what was loaded before. Only "weak" order needs it."""
    return Step(Kind.RMB, text="rmb()")


def choose(count: int, text: str = "") -> Step:
    """Any of 0 to `count` - 1: what a hostile peer, hardware or a user does, and nobody can know."""
    return Step(Kind.LOCAL, text=text or f"chooses one of {count}", choices=count)


def note(text: str) -> Step:
    """Nothing but a line in a schedule."""
    return Step(Kind.LOCAL, text=text)


@dataclass(frozen=True)
class End:
    """A state in which no thread can go on: what `Model.at_end` judges."""

    values: dict[Var, Any]
    waiting: dict[str, str]  # of threads that haven't ended: at what they wait

    def __getitem__(self, variable: Var) -> Any:
        return self.values[variable]


@dataclass(frozen=True, eq=False)
class Program:
    name: str
    run: Callable[[], Thread]
    may_wait: bool


@dataclass(frozen=True, eq=False)
class Invariant:
    message: str
    touches: tuple[Var, ...]
    holds: Callable[..., bool]


@dataclass(eq=False)
class Model:
    """Variables, threads and properties. `order` is "sc", "tso" (x86: stores are buffered) or "weak"."""

    order: str = "sc"
    variables: list[Var] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)
    invariants: list[Invariant] = field(default_factory=list)
    ends: list[Callable[[End], str | None]] = field(default_factory=list)

    def var(self, name: str, initial: Hashable = 0, *, coherent: bool = False) -> Var:
        """A shared variable. With `coherent`, "weak" order lets nobody see an old value of it (fewer states)."""
        variable = Var(name, initial, len(self.variables), coherent)
        self.variables.append(variable)
        return variable

    def array(self, name: str, count: int, initial: Hashable = 0, *, coherent: bool = False) -> list[Var]:
        """`count` variables, "name[0]" and so on."""
        return [self.var(f"{name}[{number}]", initial, coherent=coherent) for number in range(count)]

    def lock(self, name: str) -> Lock:
        variable = self.var(name, 0, coherent=True)
        variable.lock = True
        return Lock(variable)

    def thread(self, name: str, program: Callable[..., Thread], *arguments: Any, may_wait: bool = False) -> None:
        """A CPU, a vCPU, or whatever runs beside others. One that `may_wait` may wait for ever, as an idle guest does;
        any other one that does so is a deadlock."""
        self.programs.append(Program(name, lambda: program(*arguments), may_wait))

    def invariant(self, message: str, touches: Iterable[Var], holds: Callable[..., bool]) -> None:
        """In each state `holds(*values of touches)`, or `message` is what is wrong."""
        self.invariants.append(Invariant(message, tuple(touches), holds))

    def at_end(self, judge: Callable[[End], str | None]) -> None:
        """Where nobody can go on, `judge` says what is wrong, or None: an event that nobody will ever see."""
        self.ends.append(judge)

"""One run of a test under pytest: its schedule, the host that it uses, and what is noted of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pytest

from pvirq.lab import reduce
from pvirq.lab.recorder import HOOKS, Recorder
from pvirq.schedule import ANSWER, DELAYS, NEXT, ORDER, SLICES, Schedule
from pvirq.xen.timer import NS_PER_S

if TYPE_CHECKING:
    from pvirq.guest import Guest
    from pvirq.host import Host

RUN: Final = pytest.StashKey["Run"]()
HOST_OPTIONS: Final = ("dom0_kernel", "hardware", "dom0_vcpus")


@dataclass(frozen=True)
class Settings:
    """What options and the ini file say."""

    seed: int
    choices: Mapping[int, int] | None
    seeds: int  # 0: one run of each test
    first_seed: int
    reduce_tries: int
    jobs: int
    trace_lines: int

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """UsageError for what is no number in the ini file."""
        option = config.option
        one = option.pvirq_seed is not None or option.pvirq_choices is not None
        # Under xdist one core is a worker's own.
        cpus = 1 if hasattr(config, "workerinput") else len(os.sched_getaffinity(0))
        return cls(
            seed=option.pvirq_seed or 0,
            choices=option.pvirq_choices,
            seeds=0 if one else _setting(config, "pvirq_seeds", 0),
            first_seed=_setting(config, "pvirq_first_seed", 0),
            reduce_tries=_setting(config, "pvirq_reduce_tries", reduce.TRIES),
            jobs=max(_setting(config, "pvirq_jobs", cpus), 1),
            trace_lines=_setting(config, "pvirq_trace_lines", 0),
        )


def _setting(config: pytest.Config, name: str, default: int) -> int:
    given = getattr(config.option, name, None)
    if given is not None:
        return int(given)
    text = config.getini(name)
    if not text:
        return default
    if not str(text).isdigit():
        raise pytest.UsageError(f"{name} in the ini file: {text!r} is no number")
    return int(text)


@dataclass(frozen=True)
class Choice:
    """One choice that wasn't first-in-first-out."""

    number: int
    what: str
    taken: int
    time: int  # ns
    vcpus: tuple[str, ...]  # pvirq.schedule.Schedule.vcpus

    def __str__(self) -> str:
        first = self.vcpus[0] if self.vcpus else "a vCPU"
        if self.what == NEXT:
            text = f"{self.vcpus[self.taken]} had the next turn; {first} would have had it"
        elif self.what == ORDER:
            text = f"of those woken {self.vcpus[self.taken]} came first; {first} would have"
        elif self.what == ANSWER:
            text = f"{first} had its turn {DELAYS[self.taken] // 1000} us after it was woken; at once otherwise"
        else:
            text = f"{first}'s turn was {SLICES[self.taken] // 1000} us at most; {SLICES[0] // 1000} us otherwise"
        return f"{self.number}={self.taken} at {self.time / NS_PER_S:.9f} s, {self.what}: {text}"


class Run:
    """A run under the schedule of a seed, or of `choices` where they are given.

    `story` is what is to be said of how one came to it, should it fail; of a `brief` one nothing is said.
    """

    def __init__(
        self, seed: int = 0, choices: Mapping[int, int] | None = None, *, trace_lines: int = 0, story: str = "",
        brief: bool = False,
    ) -> None:  # fmt: skip
        self.seed = seed
        self.choices = choices
        self.story = story
        self.brief = brief
        self.host: Host | None = None
        self.guest: Guest | None = None
        self.failure: tuple[str, ...] | None = None  # of its first: the phase, what was raised and where
        self.made: list[Choice] = []  # where `choices` are given, those that came to be
        self.tail: Tail | None = None
        self._trace_lines = trace_lines
        self._hash = hashlib.blake2b(digest_size=16)
        if choices is not None:
            self.schedule = Schedule.script(choices)
        else:
            self.schedule = Schedule(seed) if seed else Schedule.fifo()
        self.schedule.listeners.append(self._chosen)

    def _chosen(self, what: str, number: int, n: int, taken: int) -> None:
        self._hash.update(f"{what} {n} {taken};".encode())
        if taken and self.choices is not None:
            vcpus = tuple(f"d{vcpu.domain.domid}v{vcpu.vcpu_id}" for vcpu in self.schedule.vcpus)
            self.made.append(Choice(number, what, taken, self.now(), vcpus))

    def begin(self, host: Host, guest: Guest | None = None, tail: Tail | None = None) -> None:
        """This is what it runs on; `tail` where one is there already."""
        self.host, self.guest = host, guest
        if tail is not None and self.brief:
            tail.end()
        elif not self.brief:
            self.tail = tail or tail_of(host, self._trace_lines)

    def end(self) -> None:
        """Its host goes."""
        self._hash.update(str(self.now()).encode())
        self.host = self.guest = None

    def now(self) -> int:
        """The virtual time, in ns."""
        return self.host.clock.now() if self.host is not None else 0

    def fingerprint(self) -> str:
        """Of all choices that there were, and when it ended: another one for a run that wasn't the same."""
        return f"{self._hash.hexdigest()} {self.now()}"


class Tail:
    """The last events of a host's trace, without hypercalls; no more than those are kept."""

    def __init__(self, host: Host, lines: int) -> None:
        self._last: deque[str] = deque(maxlen=lines)
        # A kernel's hypercalls for its memory would leave no room for events.
        kinds = [kind for kind in HOOKS if kind != "hypercall"]
        self._recorder = Recorder(host.hypervisor, kinds, self._take)
        self._recorder.begin()

    def _take(self) -> None:
        self._last.extend(self._recorder.take().splitlines())

    def end(self) -> None:
        """Record nothing any more."""
        self._recorder.end()

    def lines(self) -> list[str]:
        """As text, the last one last; nothing is recorded any more."""
        self.end()
        self._take()
        return [event_line(json.loads(line)) for line in self._last]


def tail_of(host: Host, lines: int) -> Tail | None:
    """So many lines of a host's trace from now on; None for none."""
    return Tail(host, lines) if lines else None


def event_line(event: Mapping[str, Any]) -> str:
    """A trace's event for a reader: when, where, what, and the rest by name."""
    where = f"d{event['d']}v{event['v']}" if "v" in event else f"d{event['d']}" if "d" in event else "-"
    rest = " ".join(f"{key}={value}" for key, value in event.items() if key not in ("t", "d", "v", "k", "ph"))
    kind = f"{event['k']} {event['ph']}" if "ph" in event else str(event["k"])
    return f"{event['t'] / NS_PER_S:15.9f} {where:6} {kind:10} {rest}".rstrip()


def run_of(item: pytest.Item) -> Run:
    """A test's run; one that begins now where nobody has prepared any."""
    if RUN not in item.stash:
        item.stash[RUN] = plain_run(Settings.of(item.config))
    return item.stash[RUN]


def plain_run(settings: Settings) -> Run:
    """The only run of a test."""
    return Run(settings.seed, settings.choices, trace_lines=settings.trace_lines)


def interactive(config: pytest.Config) -> bool:
    """Somebody may want to look around in a test's process: it must be the one at the terminal, and left as it is."""
    return bool(config.getoption("usepdb", False) or config.getoption("trace", False))


def options_of(item: pytest.Item, mark: str, known: tuple[str, ...]) -> dict[str, Any]:
    """What the marks on a test, its class and its module say, the closest last. UsageError for what isn't `known`."""
    options: dict[str, Any] = {}
    for found in reversed(list(item.iter_markers(mark))):
        if found.args or (unknown := sorted(set(found.kwargs) - set(known))):
            wrong = "values without a name" if found.args else ", ".join(unknown)
            raise pytest.UsageError(f"{mark} takes {', '.join(known)}; not {wrong}")
        options |= found.kwargs
    return options


def host_options(item: pytest.Item) -> dict[str, Any]:
    """What the mark pvirq_host says, as options of `Host`."""
    return options_of(item, "pvirq_host", HOST_OPTIONS)

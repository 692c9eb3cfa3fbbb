"""What a trace writes down while domains run: as little as can be, for every event passes through here.

All goes into one flat list: the items of the records that instruments are told (`pvirq.xen.probes.Record`), one after
the other, objects as they are; a record begins with its name. A number in such a place is the time of all that follows.
`pvirq.lab.lines` makes lines of them later. Without a counter (modelled domains alone) time stands still between two
jumps of the clock, and then nothing but `list.extend` puts records there. A list of records would be more work: of many
tuples that stay, the garbage collector wants to know each time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Final

from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_IPI, ECS_PIRQ, ECS_UNBOUND, ECS_VIRQ, Channel
from pvirq.xen.probes import Instrument, Record, Tell

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Hypervisor

FULL: Final = 1 << 19  # items: of more than that, events are made at the end of a real guest's turn, or at a jump

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
    """Writes down what happens on a host, in `records`.

    `kinds` are those that are wanted (HOOKS); the rest costs nothing. `on_full` is called between two turns when there
    are many records, to take them away.
    """

    def __init__(self, hypervisor: Hypervisor, kinds: Collection[str], on_full: Callable[[], None]) -> None:
        self._hypervisor = hypervisor
        self._wanted = {hook for kind in kinds for hook in HOOKS[kind]} | {"noted", "jumped"}
        self._on_full = on_full
        self.records: list[Any] = []

    def hooks(self) -> Mapping[str, Tell]:
        """What is told is put down as it is, behind its time, where that may have changed since."""
        records, now, probes = self.records, self._hypervisor.clock.now, self._hypervisor.probes
        append, extend = records.append, records.extend

        def timed(record: Record) -> None:
            append(now())
            extend(record)

        def woken(record: Record) -> None:
            if probes.current is None:
                append(now())  # a timer's
            extend(record)  # else it stands behind what woke it

        counts = self._hypervisor.clock.counts
        hooks: dict[str, Tell] = dict.fromkeys(self._wanted, timed if counts else extend)
        own: dict[str, Tell] = {"bound": self._bound, "closed": self._closed, "jumped": self._jumped}
        if counts:
            own |= {"stop": self._stopped, "hypercall_done": extend}
            if "raised" in self._wanted:
                own["woken"] = woken
        return hooks | {name: own[name] for name in own if name in hooks}

    def begin(self) -> None:
        """From now on."""
        self._hypervisor.probes.add(self)

    def end(self) -> None:
        """No more."""
        self._hypervisor.probes.remove(self)

    def _stopped(self, record: Record) -> None:
        self.records += (self._hypervisor.clock.now(), *record)
        if len(self.records) > FULL:
            self._on_full()

    def _jumped(self, record: Record) -> None:
        self.records.append(record[1])
        if len(self.records) > FULL and self._hypervisor.probes.current is None:
            self._on_full()

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
        self.records += (self._hypervisor.clock.now(), "closed", domain, port)
        if remote is not None:
            self._bind(remote, remote_port, describe(remote.evtchn.port(remote_port)))

    def _bind(self, domain: Domain, port: int, what: Binding) -> None:
        self.records += (self._hypervisor.clock.now(), "bound", domain, port, what)

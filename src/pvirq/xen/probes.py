"""The one door for watching events and for disturbing them: traces are instruments, faults are filters.

Nothing is paid where nobody is at the door: only while there is an instrument or a filter do a domain's port operations
(`evtchn_2l.TwoLevel`, `evtchn_fifo.Fifo`) have a `set_pending` of their own in front of their class's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pvirq.xen.domain import Hypervisor, Vcpu
    from pvirq.xen.evtchn_2l import TwoLevel
    from pvirq.xen.evtchn_channels import Channel
    from pvirq.xen.evtchn_fifo import Fifo

# What becomes of an event that is raised (`Instrument.raised`).
PENDING: Final = "pending"  # the guest will see it: an upcall is due, now or when the vCPU unmasks them
COALESCED: Final = "coalesced"  # it was pending already: two are one
MASKED: Final = "masked"  # pending, and no upcall before the guest unmasks the port
WAITING: Final = "waiting"  # (FIFO) kept by Xen until the guest gives a page with its event word
LOST: Final = "lost"  # (FIFO) its vCPU has no control block

Filter = Callable[["Vcpu", "Channel"], bool]
"""Called with each event before it is raised: True if the filter has taken it upon itself, to lose or raise later."""


class Instrument:
    """What somebody wants to be told of. Override what is of interest; what isn't costs nothing."""

    def raised(self, vcpu: Vcpu, channel: Channel, outcome: str) -> None:
        """An event was raised on `channel`, towards `vcpu` of its domain; `outcome` is one of the five above."""


class Probes:
    """The instruments and filters of one hypervisor."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self.instruments: list[Instrument] = []
        self.filters: list[Filter] = []
        self._raised: list[Callable[[Vcpu, Channel, str], None]] = []

    def add(self, instrument: Instrument) -> None:
        """From now on `instrument` is told."""
        self.instruments.append(instrument)
        self._refresh()

    def remove(self, instrument: Instrument) -> None:
        """It is told no more. ValueError if it wasn't."""
        self.instruments.remove(instrument)
        self._refresh()

    def add_filter(self, filter: Filter) -> None:
        """From now on each event passes `filter` first; where there are several, in the order of their adding."""
        self.filters.append(filter)
        self._refresh()

    def remove_filter(self, filter: Filter) -> None:
        """Events pass it no more. ValueError if they didn't."""
        self.filters.remove(filter)
        self._refresh()

    def _refresh(self) -> None:
        self._raised = [i.raised for i in self.instruments if type(i).raised is not Instrument.raised]
        for domain in self._hypervisor.domains.values():
            self.cover(domain.evtchn.ops)

    def cover(self, ops: TwoLevel | Fifo) -> None:
        """Put the door into a domain's port operations, or take it out, as it is wanted now."""
        if self._raised or self.filters:
            vars(ops)["set_pending"] = partial(self._raise, ops)
        else:
            vars(ops).pop("set_pending", None)

    def _raise(self, ops: TwoLevel | Fifo, vcpu: Vcpu, channel: Channel) -> None:
        for filter in self.filters:
            if filter(vcpu, channel):
                return
        self.raise_event(ops, vcpu, channel)

    def raise_event(self, ops: TwoLevel | Fifo, vcpu: Vcpu, channel: Channel) -> None:
        """Raise an event past the filters; for a filter that has held it back."""
        if not self._raised:
            type(ops).set_pending(ops, vcpu, channel)  # type: ignore[arg-type]
            return
        outcome = ops.outcome(vcpu, channel)
        for told in self._raised:  # first: the cause stands in front of its effects
            told(vcpu, channel, outcome)
        type(ops).set_pending(ops, vcpu, channel)  # type: ignore[arg-type]

"""Which part of a trace somebody wants to see."""

from __future__ import annotations

from dataclasses import dataclass

from pvirq.lab.traceview.follower import Follower
from pvirq.lab.traceview.traceevents import Event, RaiseEvent


@dataclass(frozen=True)
class Selection:
    """Domains by number or name, ports, and a stretch of time; what is empty or None selects all."""

    domains: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    start: int | None = None  # ns of virtual time
    stop: int | None = None  # and before this

    def domain(self, d: int, name: str) -> bool:
        """Is the domain selected?"""
        return not self.domains or str(d) in self.domains or name in self.domains

    def port(self, p: int | None) -> bool:
        """Is a port, of a domain that is?"""
        return not self.ports or p in self.ports

    def event(self, event: Event, follower: Follower) -> bool:
        """Is an event? One that a selected domain has raised elsewhere is, too."""
        if self.start is not None and event.t < self.start:
            return False
        if self.ports and getattr(event, "p", None) not in self.ports:
            return False
        if not self.domains:
            return True
        who = {event.d} if event.d is not None else set()
        if isinstance(event, RaiseEvent) and event.by:
            who.add(event.by[0])
        return any(self.domain(d, follower.domain(d).name) for d in who)

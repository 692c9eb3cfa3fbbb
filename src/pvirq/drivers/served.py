"""The rings that a kernel's backends serve: each is announced here while it is, for whoever wants to be in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pvirq.drivers.ring import BackRing

if TYPE_CHECKING:
    from pvirq.drivers.xenbus import Device


@dataclass(eq=False)
class ServedRing:
    """One ring: `name` says which of its device's, `notify` tells the frontend of what has been pushed.

    The backend calls `ring.put` with each response, or `ring.put_all` with several, and `ring.push_responses` when they
    are to be seen; where that is true, it calls `notify`.
    """

    dev: Device
    name: str
    ring: BackRing
    notify: Callable[[], None]

    @property
    def domid(self) -> int:
        """The frontend's domain."""
        return self.dev.otherend_id

    @property
    def device(self) -> str:
        """The frontend's name, such as vbd-51712."""
        return f"{self.dev.kind}-{self.dev.nodename.rpartition('/')[2]}"


class ServedRings:
    """Those of one kernel. `on_served` is told of each new one before its first request is taken."""

    def __init__(self) -> None:
        self.rings: list[ServedRing] = []
        self.on_served: list[Callable[[ServedRing], None]] = []
        self.on_over: list[Callable[[ServedRing], None]] = []

    def add(self, served: ServedRing) -> None:
        self.rings.append(served)
        for told in self.on_served:
            told(served)

    def remove(self, ring: BackRing) -> None:
        """It isn't served any more, and its pages may be somebody else's; nothing happens where it never was."""
        for served in [served for served in self.rings if served.ring is ring]:
            self.rings.remove(served)
            for told in self.on_over:
                told(served)

"""The world outside of a host, as far as its run loop has to do with it: sockets and devices that live in real time.

A host's time jumps while all its domains sleep. Where one of them waits for an answer from outside, it can't: the time
until then passes in truth.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator
from typing import Protocol


class OutsideError(Exception):
    """What is wanted of the outside world can't be had here: a library, a device, a port. One line that says why."""


class Outsider(Protocol):
    """Something that connects a host with what is outside of it."""

    @property
    def awaited(self) -> bool:
        """Something may come that a sleeping domain waits for: time may not jump."""
        ...

    def fileno(self) -> int:
        """A descriptor that can be read when there is something to do; one of epoll's stands for many."""
        ...

    def due_ns(self) -> int | None:
        """In how many ns of real time `poll` is wanted even if nothing comes; None: not at all. Asked while awaited."""
        ...

    def poll(self, *, ready: bool) -> None:
        """Do what there is to do, without waiting; called at each turn of the host's loop, so it had better be cheap.

        `ready`: the host has just waited for this.
        """
        ...

    def close(self) -> None:
        """Let go of everything; idempotent."""
        ...


class Outside:
    """All of a host's outsiders."""

    def __init__(self) -> None:
        self._members: list[Outsider] = []
        self._ready = False

    def __bool__(self) -> bool:
        return bool(self._members)

    def __iter__(self) -> Iterator[Outsider]:
        return iter(self._members)

    def add(self, member: Outsider) -> None:
        """From now on the host's loop looks after it."""
        self._members.append(member)

    def remove(self, member: Outsider) -> None:
        """No more; nothing happens where it isn't there."""
        if member in self._members:
            self._members.remove(member)

    def poll(self) -> None:
        """A turn of the host's loop."""
        ready, self._ready = self._ready, False
        for member in list(self._members):
            member.poll(ready=ready)

    @property
    def awaited(self) -> bool:
        """One of them is."""
        return any(member.awaited for member in self._members)

    def filenos(self) -> list[int]:
        """What to wait for besides time: the descriptors of those that are awaited. For who waits by himself."""
        self._ready = True
        return [member.fileno() for member in self._members if member.awaited]

    def limit(self, ns: int | None) -> int | None:
        """How long to wait at most, where nothing else is due for `ns`."""
        for member in self._members:
            due = member.due_ns() if member.awaited else None
            if due is not None and (ns is None or due < ns):
                ns = due
        return ns

    def wait(self, ns: int | None) -> int:
        """Sleep for `ns` (None: for ever), or until there is something to do; returns the ns that passed, at most `ns`.

        The wait is not under a lock of Python's: a signal's handler runs, and may raise.
        """
        ns = self.limit(ns)
        poll = select.poll()  # which takes descriptors of any number, as select doesn't
        for fd in self.filenos():
            poll.register(fd, select.POLLIN)
        began = time.monotonic_ns()
        poll.poll(None if ns is None else -(-ns // 1_000_000))
        passed = time.monotonic_ns() - began
        return passed if ns is None else min(passed, ns)

    def close(self) -> None:
        """Close them all."""
        members, self._members = self._members, []
        for member in members:
            member.close()

"""Virtual time: one clock for a host, and the timers that fire in it.

Time is in nanoseconds since the host began and advances in two ways: with a tick counter while guest code runs
(the CPU engine's time-stamp counter), and by jumps while every vCPU sleeps. Both are one number to the guest,
because the clock's ticks *are* the guest's TSC: ns = (ticks * mul) >> 32 << shift, the formula and the very
factors that struct vcpu_time_info hands to the guest (xen/include/public/xen.h), so the two can't drift apart.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final

NS_PER_S: Final = 1_000_000_000


class Timer:
    """A callback due at `when` (ns). `cancel()` is idempotent and safe after it fired."""

    __slots__ = ("callback", "when")

    def __init__(self, when: int, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        self.callback = None


class Clock:
    """The host's clock. Without a counter (modelled domains only) time moves by jumps alone.

    `jump_to` is `do_jump_to`, unless something has been put in front of it (`pvirq.xen.probes.put`).
    """

    def __init__(self, counter: Callable[[], int] | None = None, hz: float = NS_PER_S) -> None:
        """`counter` returns ticks of `hz` per second, never backwards; it is read only between start and stop."""
        self.jump_to: Callable[[int], None] = self.do_jump_to
        self._queue: list[tuple[int, int, Timer]] = []
        self._sequence = 0
        self._listeners: list[Callable[[int], None]] = []
        self._counter: Callable[[], int] = lambda: 0
        self._offset = 0  # guest ticks = counter + offset while running
        self._ticks = 0  # guest ticks while stopped
        self._running = False
        self.counts = False  # a counter lets time run; else it moves by jumps alone
        self.on_earlier: Callable[[int], None] = lambda when: None  # a timer became the next one, due at `when`
        self.set_counter(counter, hz)

    def set_counter(self, counter: Callable[[], int] | None, hz: float) -> None:
        """Choose the source of ticks; only before the first guest is built, for the factors are in its memory."""
        if counter is not None:
            self._counter, self.counts = counter, True
        mul, shift = int((NS_PER_S << 32) / hz), 0
        while mul >= 1 << 32:
            mul, shift = mul >> 1, shift + 1
        while mul < 1 << 31:
            mul, shift = mul << 1, shift - 1
        self.mul = mul
        self.shift = shift
        self.hz = hz
        self._is_ns = self.ticks_to_ns(1 << 62) == 1 << 62  # ticks are nanoseconds

    def replace_counter(self, counter: Callable[[], int]) -> None:
        """Go on with another reading of the same hardware counter."""
        self._counter = counter

    def detach_counter(self) -> None:
        """No counter is left: time stands still but for jumps. Only while stopped."""
        self._counter, self.counts = lambda: 0, False

    def counter(self) -> int:
        """What the counter reads."""
        return self._counter()

    def is_counter(self, counter: Callable[[], int]) -> bool:
        return self._counter == counter

    def counter_at(self, ns: int) -> int:
        """What the counter will read when virtual time reaches `ns`, if it runs on."""
        return (ns if self._is_ns else self.ns_to_ticks(ns)) - self._offset

    def ticks_to_ns(self, ticks: int) -> int:
        """Exactly as the guest's pvclock_scale_delta does it: shift first, then multiply."""
        ticks = ticks << self.shift if self.shift >= 0 else ticks >> -self.shift
        return ticks * self.mul >> 32

    def ns_to_ticks(self, ns: int) -> int:
        """The least number of ticks that reaches `ns`."""
        ticks = -(-(ns << 32) // self.mul)
        return -(-ticks >> self.shift) if self.shift >= 0 else ticks << -self.shift

    def ticks(self) -> int:
        """The guest's TSC now."""
        return self._counter() + self._offset if self._running else self._ticks

    def now(self) -> int:
        """Nanoseconds of virtual time since the host began."""
        ticks = self._counter() + self._offset if self._running else self._ticks
        return ticks if self._is_ns else self.ticks_to_ns(ticks)

    def on_offset(self, listener: Callable[[int], None]) -> None:
        """`listener(offset)` is called when guest ticks - counter changes: an engine puts it in its TSC offset."""
        self._listeners.append(listener)
        listener(self._offset)

    def remove_offset(self, listener: Callable[[int], None]) -> None:
        self._listeners.remove(listener)

    def start(self) -> None:
        """Let time run with the counter; the wall time since `stop` is not part of it."""
        if not self._running:
            self._running = True
            self._set_offset(self._ticks - self._counter())

    def stop(self) -> None:
        """Freeze time, as between two calls of Host.run."""
        if self._running:
            self._ticks = self.ticks()
            self._running = False

    def do_jump_to(self, when: int) -> None:
        """Advance to `when` ns at least; never goes back."""
        ticks = self.ns_to_ticks(when)
        if self._running:
            ahead = ticks - self.ticks()
            if ahead > 0:
                self._set_offset(self._offset + ahead)
        else:
            self._ticks = max(self._ticks, ticks)

    def _set_offset(self, offset: int) -> None:
        self._offset = offset
        for listener in self._listeners:
            listener(offset)

    def at(self, when: int, callback: Callable[[], None]) -> Timer:
        """Call `callback` once virtual time has reached `when` ns; equal times fire in the order of their making."""
        timer = Timer(when, callback)
        self._sequence += 1
        heapq.heappush(self._queue, (when, self._sequence, timer))
        if self._queue[0][2] is timer:
            self.on_earlier(when)
        return timer

    def next_deadline(self) -> int | None:
        """When the next timer is due, in ns; None without timers."""
        queue = self._queue
        while queue and queue[0][2].callback is None:
            heapq.heappop(queue)
        return queue[0][0] if queue else None

    def fire_due(self) -> int:
        """Run all timers that are due and return how many."""
        fired = 0
        while (when := self.next_deadline()) is not None and when <= self.now():
            timer = heapq.heappop(self._queue)[2]
            callback, timer.callback = timer.callback, None
            assert callback is not None
            callback()
            fired += 1
        return fired

"""Process context that can wait: kernel threads of a modelled kernel, written as generators.

A thread yields what it waits for, a `Completion`, and goes on with its result once that is done:

    def probe(self):
        value = yield from self.xs.read("device/vbd/51712/backend")
        yield from sleep(kernel, 1_000_000)

Between two yields nothing else of the kernel runs: a thread gives way only where it says so. A thread is itself a
Completion, so others can wait for its end.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from mypy_extensions import mypyc_attr

if TYPE_CHECKING:
    from pvirq.linux.kernel import Kernel

T = TypeVar("T")
Body = Generator["Completion[Any]", Any, T]
"""What a thread is made of."""


@mypyc_attr(allow_interpreted_subclasses=True)
class Completion(Generic[T]):
    """Something that will be done once, with a result or an error (struct completion)."""

    __slots__ = ("_error", "_result", "_waiting", "done")

    def __init__(self) -> None:
        self.done = False
        self._result: T | None = None
        self._error: Exception | None = None
        self._waiting: list[Kthread[Any]] = []

    def complete(self, result: T) -> None:
        """It is done; whoever waits goes on with `result`. A second call does nothing."""
        if not self.done:
            self.done, self._result = True, result
            self._wake()

    def fail(self, error: Exception) -> None:
        """It is done, and has failed: `error` is raised where somebody waits."""
        if not self.done:
            self.done, self._error = True, error
            self._wake()

    def _wake(self) -> None:
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for thread in waiting:
                thread.wake()

    def result(self) -> T:
        """What it was done with; raises what it failed with."""
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]

    def wait(self) -> Body[T]:
        """Wait in a thread: `result = yield from completion.wait()`."""
        if not self.done:
            yield self
        return self.result()

    def add_waiter(self, thread: Kthread[Any]) -> None:
        """For `Kthread`: wake it when this is done."""
        self._waiting.append(thread)


class Kthread(Completion[T]):
    """A running thread; done when its body returns. An error that nobody catches in it is its failure.

    Where nobody waits for the thread, its failure comes out of the host's run loop: it is a bug, not an event.
    """

    def __init__(self, kernel: Kernel[Any], name: str, body: Body[T], cpu: int | None = None) -> None:
        """It starts when `cpu`, or the CPU that executes now, next runs process context."""
        super().__init__()
        self.name = name
        self.cpu = kernel.cpu if cpu is None else cpu
        self._kernel = kernel
        self._body = body
        self.wake()

    def wake(self) -> None:
        """Go on in process context of the thread's CPU (wake_up_process)."""
        self._kernel.queue_work(self._run, self.cpu)

    def _run(self) -> None:
        if self.done:
            return
        try:
            while True:
                waits_for = self._body.send(None)
                if not waits_for.done:
                    waits_for.add_waiter(self)
                    return
        except StopIteration as stop:
            self.complete(stop.value)
        except Exception as error:
            waited_for = bool(self._waiting)
            self.fail(error)
            if not waited_for:
                raise

    def stop(self) -> None:
        """End it where it waits, its `finally` clauses run (kthread_stop, as far as threads here need it)."""
        if not self.done:
            self._body.close()
            self.fail(ThreadStopped(self.name))


class ThreadStopped(Exception):
    """A thread was stopped before it had done what somebody waited for."""


class WaitQueue:
    """Wakes threads each time something happens (wait_queue_head_t). No wake-up is lost between look and wait:

    a thread does not give way between the two, so `while not condition: yield from queue.wait()` is right.
    """

    def __init__(self) -> None:
        self._next: Completion[None] = Completion()

    def wake_up(self) -> None:
        happened, self._next = self._next, Completion()
        happened.complete(None)

    def wait(self) -> Body[None]:
        """Until the next wake-up."""
        yield from self._next.wait()


def sleep(kernel: Kernel[Any], ns: int) -> Body[None]:
    """Wait for `ns` of virtual time; the timer interrupt of this CPU ends it (schedule_timeout). 0: don't wait."""
    if ns <= 0:
        return
    over: Completion[None] = Completion()
    kernel.set_timer(kernel.now() + ns, lambda: over.complete(None))
    yield from over.wait()

"""FIFO event channels as Xen has them (xen/common/event_fifo.c, 4.15 and later), one access at a time.

Who sends holds no lock that another sender of the same domain holds: only the queues' own. Earlier versions are in
`pvirq.check.protocols.fifo_old`, the guest's side in `fifo_linux`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pvirq.abi.event_channel import EVTCHN_FIFO_LINK_MASK, EVTCHN_FIFO_PRIORITY_DEFAULT
from pvirq.check.steps import End, Lock, Model, Thread, Var, fail, look, mb, rmb
from pvirq.xen.evtchn_fifo import BUSY, LINKED, MASKED, PENDING

DEFAULT = EVTCHN_FIFO_PRIORITY_DEFAULT
Queue = tuple[int, int]  # of a vCPU, of a priority
SetPending = Callable[..., Thread]
MAPPED = 1  # a pointer that is set


class Fifo:
    """A domain's event words and control blocks, and what Xen keeps of its queues and ports.

    All ports are bound to vCPU 0 with `priorities[0]`, were last on that queue, and are neither masked nor pending.
    With `watch`, guests notice where they take a port from another queue than Xen has put it on. `split`: Xen keeps
    that queue in two words (`pvirq.check.protocols.fifo_old`). The page with the event words and the control blocks
    are there from the start, and to look for them is no step, but with `late_array` and `late_control`.
    """

    def __init__(
        self,
        model: Model,
        ports: int,
        vcpus: int = 1,
        priorities: Iterable[int] = (DEFAULT,),
        *,
        split: bool = False,
        watch: bool = False,
        late_array: bool = False,
        late_control: bool = False,
    ) -> None:
        self.priorities = tuple(priorities)
        self.ports = tuple(range(1, ports + 1))
        self.vcpus = tuple(range(vcpus))
        queues = [(vcpu, priority) for vcpu in self.vcpus for priority in self.priorities]
        # Shared with the guest. Port 0 is never linked.
        self.word = model.array("word", ports + 1)
        self.ready = model.array("ready", vcpus)
        self.head = {queue: model.var("head[{}][{}]".format(*queue)) for queue in queues}
        self.upcall_pending = model.array("upcall_pending", vcpus)
        # Xen's own.
        self.tail = {queue: model.var("tail[{}][{}]".format(*queue)) for queue in queues}
        self.lock: dict[Queue, Lock] = {queue: model.lock("queue lock {}/{}".format(*queue)) for queue in queues}
        self.priority = [model.var(f"priority[{port}]", self.priorities[0]) for port in (0, *self.ports)]
        self.notify_vcpu = model.array("notify_vcpu", ports + 1)
        self.watch = watch
        self.lastq: list[Var] = []
        self.last_vcpu_id: list[Var] = []
        self.last_priority: list[Var] = []
        for port in (0, *self.ports):
            if split:
                self.last_vcpu_id.append(model.var(f"last_vcpu_id[{port}]", 0))
                self.last_priority.append(model.var(f"last_priority[{port}]", self.priorities[0]))
            else:
                self.lastq.append(model.var(f"lastq[{port}]", (0, self.priorities[0])))
        self.pending = model.array("evtchn.pending", ports + 1)  # raised while there was no word for it
        self.polling = model.array("polling", vcpus)  # the port that a vCPU polls
        self.num_evtchns = model.var("num_evtchns") if late_array else None
        self.event_array = model.var("event_array[0]") if late_array else None
        self.control_block = model.array("control_block", vcpus, MAPPED) if late_control else None
        self.queue_head = {queue: model.var("queue->head {}/{}".format(*queue), MAPPED) for queue in queues}

    def __hash__(self) -> int:
        return id(self)  # it's a constant of its model

    def last_queue(self, port: int) -> tuple[Var, ...]:
        """Where Xen keeps which queue a port is on, or was last on."""
        return (self.lastq[port],) if self.lastq else (self.last_vcpu_id[port], self.last_priority[port])

    def bound(self, port: int, vcpu: int, priority: int, last: Queue) -> None:
        """Let a port begin bound otherwise than to the first queue, `last` where it was last on."""
        self.notify_vcpu[port].initial = vcpu
        self.priority[port].initial = priority
        if self.lastq:
            self.lastq[port].initial = last
        else:
            self.last_vcpu_id[port].initial, self.last_priority[port].initial = last

    def lost(self, end: End) -> str | None:
        """Where nobody can go on: the event that nobody will ever look at again."""
        for port in self.ports:
            word = end[self.word[port]]
            if word & PENDING and not word & MASKED:
                return f"lost event: the guest is blocked for ever while port {port} is pending and not masked"
        return None

    def stuck(self, end: End) -> str | None:
        """As `lost`, and the port of which no event will be seen again."""
        wrong = self.lost(end)
        for port in self.ports:
            if wrong is None and end[self.word[port]] & LINKED:
                wrong = f"port {port} stays linked for ever: no event of it will be seen again"
        return wrong

    def malformed(self, end: End) -> str | None:
        """Where nobody can go on and all is consumed: the tail that Xen takes for one of another queue."""
        for queue, tail in self.tail.items():
            port = end[tail]
            if port:
                last = tuple(end[each] for each in self.last_queue(port))
                if (last[0] if self.lastq else last) != queue:
                    return f"port {port} is the tail of queue {queue[0]}/{queue[1]}, and was last on another for Xen"
        return None


# -- queues ------------------------------------------------------------------------------------------------------------


def word_from_port(fifo: Fifo, port: int, *, barrier: bool = True) -> Thread:
    """evtchn_fifo_word_from_port(): the event word, or None where it has no page yet.

    `barrier`: the one between the number of words and the page, since e7719a0dfa.
    """
    if fifo.num_evtchns is not None and fifo.event_array is not None:
        if port >= (yield fifo.num_evtchns.read()):
            return None
        if barrier:
            yield rmb()
        if not (yield fifo.event_array.read().saying("looks up the page of event words")):
            fail("uses a page of event words that isn't there yet")
    return fifo.word[port]


def try_set_link(word: Var, seen: int, link: int) -> Thread:
    """try_set_link(): whether it is linked now (None: try again), and the word as it was seen last."""
    if not seen & LINKED:
        return False, seen
    new = seen & ~(BUSY | EVTCHN_FIFO_LINK_MASK) | link
    found = yield word.cmpxchg(seen, new).saying(f"links {word.name} to port {link}, if it is as it was")
    return (True if found == seen else None), found


def set_link(word: Var, link: int) -> Thread:
    """evtchn_fifo_set_link(): link the tail to a port if the tail is still linked itself. At most 5 attempts."""
    seen = yield word.read().saying(f"reads the tail, {word.name}")
    linked, seen = yield from try_set_link(word, seen, link)
    if linked is not None:
        return linked
    # The guest may not unmask it now, and has little else to change.
    yield word.update(lambda value: value | BUSY, f"sets BUSY in {word.name}")
    seen = yield word.read()
    for _ in range(4):
        linked, seen = yield from try_set_link(word, seen, link)
        if linked is not None:
            if not linked:
                yield word.update(lambda value: value & ~BUSY, f"clears BUSY in {word.name}")
            return linked
    yield word.update(lambda value: value & ~BUSY, f"gives up, and clears BUSY in {word.name}")
    return True


def lock_queues(fifo: Fifo, vcpu: int, port: int) -> Thread:
    """Take the locks of the queue that a port is to be put on and of the one that it was last on, in order.

    The result is both, or None after three attempts in which they changed.
    """
    for _ in range(3):
        old = yield fifo.lastq[port].read().saying(f"reads which queue port {port} was last on")
        queue = vcpu, (yield fifo.priority[port].read())
        yield fifo.lock[min(queue, old)].acquire()
        if queue != old:
            yield fifo.lock[max(queue, old)].acquire()
        last = yield fifo.lastq[port].read().saying(f"reads again which queue port {port} was last on")
        if (vcpu, (yield fifo.priority[port].read())) == queue and last == old:
            return queue, old
        if queue != old:
            yield fifo.lock[old].release()
        yield fifo.lock[queue].release()
    return None


def append(fifo: Fifo, queue: Queue, port: int, set_link: Callable[[Var, int], Thread] = set_link) -> Thread:
    """Put a port, LINKED already, at the end of a queue; whether it is linked to from another one there."""
    tail = yield fifo.tail[queue].read()
    linked = tail != 0 and (yield from set_link(fifo.word[tail], port))
    if not linked:
        if fifo.control_block is not None and not (yield fifo.queue_head[queue].read()):
            fail("writes through the pointer to a queue's head, which isn't set yet")
        yield fifo.head[queue].write(port).saying(f"makes port {port} the head of queue {queue[0]}/{queue[1]}")
    yield fifo.tail[queue].write(port).saying(f"makes port {port} the tail of queue {queue[0]}/{queue[1]}")
    return linked


def set_ready(fifo: Fifo, queue: Queue) -> Thread:
    """READY, and an upcall where it is new."""
    vcpu, priority = queue
    if not (yield fifo.ready[vcpu].set_bit(priority).saying(f"sets READY of queue {vcpu}/{priority}")):
        yield from mark_events_pending(fifo, vcpu)


def mark_events_pending(fifo: Fifo, vcpu: int) -> Thread:
    """vcpu_mark_events_pending(); a blocked vCPU waits for that, so that nothing else need be done to wake it."""
    yield fifo.upcall_pending[vcpu].set_bit(0).saying(f"marks events pending for vCPU {vcpu}")


def check_pollers(fifo: Fifo, port: int) -> Thread:
    """evtchn_check_pollers()."""
    for vcpu in fifo.vcpus:
        yield fifo.polling[vcpu].update(
            lambda polled: 0 if polled == port else polled, f"wakes vCPU {vcpu} if it polls port {port}"
        )


# -- port operations ---------------------------------------------------------------------------------------------------


def set_pending(
    fifo: Fifo,
    vcpu: int,
    port: int,
    *,
    polled: bool = False,
    ready_always: bool = False,
    set_link: Callable[[Var, int], Thread] = set_link,
    barrier: bool = True,
    second_look: bool = False,
) -> Thread:
    """evtchn_fifo_set_pending(). Somebody may poll only where `polled` says so (fewer steps).

    `ready_always`: READY for each port that is linked, as before 70ccddb14a. `set_link`: another way to link.
    `barrier`: see `word_from_port`. `second_look`, which Xen hasn't: for the word, once its absence is noted.
    """
    word = yield from word_from_port(fifo, port, barrier=barrier)
    if word is None:
        yield fifo.pending[port].write(1).saying(f"notes that port {port} is pending, until there is a word for it")
        if not second_look:
            return
        yield mb()
        word = yield from word_from_port(fifo, port, barrier=barrier)
        if word is None:
            return
    locked = yield from lock_queues(fifo, vcpu, port)
    if locked is None:
        return
    queue, old = locked
    ready, was_pending = False, True
    if fifo.control_block is None or (yield fifo.control_block[vcpu].read()):
        was_pending = (yield word.update(lambda value: value | PENDING, f"sets PENDING of port {port}")) & PENDING
        masked = (yield word.read().saying(f"looks whether port {port} is masked")) & MASKED
        if not masked and not (
            (yield word.update(lambda value: value | LINKED, f"sets LINKED of port {port}")) & LINKED
        ):
            # If it was the tail of the queue that it was last on, that one is empty.
            if (yield fifo.tail[old].read()) == port:
                yield fifo.tail[old].write(0).saying(f"forgets that port {port} was the tail there")
            if old != queue:
                yield fifo.lastq[port].write(queue).saying(f"notes that port {port} is on queue {queue[0]}/{queue[1]}")
                yield fifo.lock[old].release()
                old = queue
            ready = not (yield from append(fifo, queue, port, set_link)) or ready_always
    if queue != old:
        yield fifo.lock[old].release()
    yield fifo.lock[queue].release()
    if ready:
        yield from set_ready(fifo, queue)
    if polled and not was_pending:
        yield from check_pollers(fifo, port)


def send(fifo: Fifo, *ports: int, to: SetPending = set_pending, **options: Any) -> Thread:
    """evtchn_send() to each of these ports, which are the receiving ones; `to` is set_pending or an older one."""
    for port in ports:
        vcpu = yield fifo.notify_vcpu[port].read()
        yield from to(fifo, vcpu, port, **options)


def clear_pending(fifo: Fifo, port: int) -> Thread:
    """evtchn_fifo_clear_pending(): the guest unlinks it when it comes to it."""
    yield fifo.word[port].update(lambda value: value & ~PENDING, f"clears PENDING of port {port}")


def unmask(fifo: Fifo, port: int, **options: Any) -> Thread:
    """evtchn_fifo_unmask()."""
    vcpu = yield fifo.notify_vcpu[port].read()
    yield fifo.word[port].update(lambda value: value & ~MASKED, f"clears MASKED of port {port}")
    if (yield fifo.word[port].read()) & PENDING:
        yield from set_pending(fifo, vcpu, port, **options)


def set_priority(fifo: Fifo, port: int, priority: int) -> Thread:
    """evtchn_fifo_set_priority(): for events to come."""
    yield fifo.priority[port].write(priority)


def bind_vcpu(fifo: Fifo, port: int, vcpu: int) -> Thread:
    """evtchn_bind_vcpu(), so far as FIFO queues see it."""
    yield fifo.notify_vcpu[port].write(vcpu)


def poll(fifo: Fifo, vcpu: int, port: int) -> Thread:
    """SCHEDOP_poll of one port without a timeout: whether it was blocked until `check_pollers` woke it."""
    yield fifo.polling[vcpu].xchg(port).saying(f"polls port {port}")
    woken = False
    if not (yield fifo.upcall_pending[vcpu].read()) and not (yield fifo.word[port].read()) & PENDING:
        polled, _ = yield look(
            (fifo.polling[vcpu], fifo.upcall_pending[vcpu]), lambda polled, upcall: not polled or upcall,
            "is blocked (SCHEDOP_poll) until an event is raised",
        )  # fmt: skip
        woken = not polled
    yield fifo.polling[vcpu].write(0)
    return woken

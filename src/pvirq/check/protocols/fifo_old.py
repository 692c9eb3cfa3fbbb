"""evtchn_fifo_set_pending() as it was before Xen 4.15, one access at a time (see `pvirq.check.protocols.fifo`)."""

from __future__ import annotations

from pvirq.abi.event_channel import EVTCHN_FIFO_LINK_MASK
from pvirq.check.protocols.fifo import Fifo, Queue, append, check_pollers, set_link, set_ready
from pvirq.check.steps import Thread, Var, fail
from pvirq.xen.evtchn_fifo import LINKED, MASKED, PENDING

MAX_TRIES = 5  # one and four more, as since dae2a1c5f9


def set_link_spinning(word: Var, link: int) -> Thread:
    """evtchn_fifo_set_link() of 88910061ec: again for as long as the word changes. (More than MAX_TRIES fail.)"""
    seen = yield word.read()
    tries = 0
    while seen & LINKED:
        tries += 1
        if tries > MAX_TRIES:
            fail(f"after {MAX_TRIES} attempts it still tries to link {word.name}, for as long as the guest likes")
        new = seen & ~EVTCHN_FIFO_LINK_MASK | link
        found = yield word.cmpxchg(seen, new).saying(f"links {word.name} to port {link}, if it is as it was")
        if found == seen:
            return True
        seen = found
    return False


def set_pending_first(fifo: Fifo, vcpu: int, port: int, *, ready_always: bool = False) -> Thread:
    """Before e33d4257fc, in the months before 4.4: LINKED is set without a lock, and the tail may be any port.

    `ready_always`: before 70ccddb14a, READY is set for each event.
    """
    word = fifo.word[port]
    queue = vcpu, (yield fifo.priority[port].read())
    yield word.update(lambda value: value | PENDING, f"sets PENDING of port {port}")
    if (yield word.read().saying(f"looks whether port {port} is masked")) & MASKED:
        return
    if (yield word.update(lambda value: value | LINKED, f"sets LINKED of port {port}")) & LINKED:
        return
    yield fifo.lock[queue].acquire()
    tail = yield fifo.tail[queue].read()
    linked = port != tail and (yield from set_link(fifo.word[tail], port))
    if not linked:
        yield fifo.head[queue].write(port).saying(f"makes port {port} the head of queue {queue[0]}/{queue[1]}")
    yield fifo.tail[queue].write(port).saying(f"makes port {port} the tail of queue {queue[0]}/{queue[1]}")
    yield fifo.lock[queue].release()
    if not linked or ready_always:
        yield from set_ready(fifo, queue)


def lock_old_queue(fifo: Fifo, port: int) -> Thread:
    """lock_old_queue() of 4.4 to 4.14: the queue that a port was last on, locked; None after three attempts."""
    for _ in range(3):
        old = (yield fifo.last_vcpu_id[port].read()), (yield fifo.last_priority[port].read())
        yield fifo.lock[old].acquire()
        if ((yield fifo.last_vcpu_id[port].read()), (yield fifo.last_priority[port].read())) == old:
            return old
        yield fifo.lock[old].release()
    return None


def lock_old_queue_once(fifo: Fifo, port: int) -> Thread:
    """lock_old_queue() of 1277cb9dc5: both in one word, but what was read first is compared with itself."""
    old = yield fifo.lastq[port].read().saying(f"reads which queue port {port} was last on")
    yield fifo.lock[old].acquire()
    return old


def record_queue(fifo: Fifo, port: int, queue: Queue, *, split: bool, stable: bool) -> Thread:
    """Keep which queue a port is on: in two words or one; `stable`, since 6f6f07b64c: the one it is really put on."""
    if not split:
        yield fifo.lastq[port].write(queue).saying(f"notes that port {port} is on queue {queue[0]}/{queue[1]}")
    elif stable:
        yield fifo.last_vcpu_id[port].write(queue[0])
        yield fifo.last_priority[port].write(queue[1])
    else:
        vcpu = yield fifo.notify_vcpu[port].read()
        yield fifo.last_vcpu_id[port].write(vcpu)
        priority = yield fifo.priority[port].read()
        yield fifo.last_priority[port].write(priority)


def set_pending(
    fifo: Fifo, vcpu: int, port: int, *, split: bool = True, stable: bool = True, polled: bool = False
) -> Thread:
    """4.4 (e33d4257fc) to 71ac522909: the lock of the queue that the port was last on, then that of the new one.

    `split`: the queue it was last on is in two words (before 1277cb9dc5). `stable`: see `record_queue`.
    """
    word = fifo.word[port]
    was_pending = (yield word.update(lambda value: value | PENDING, f"sets PENDING of port {port}")) & PENDING
    masked = (yield word.read().saying(f"looks whether port {port} is masked")) & MASKED
    if not masked and not (yield word.read().saying(f"looks whether port {port} is linked")) & LINKED:
        queue = vcpu, (yield fifo.priority[port].read())
        old = yield from lock_old_queue(fifo, port) if split else lock_old_queue_once(fifo, port)
        if old is not None:
            if (yield word.update(lambda value: value | LINKED, f"sets LINKED of port {port}")) & LINKED:
                yield fifo.lock[old].release()
            else:
                if (yield fifo.tail[old].read()) == port:
                    yield (
                        fifo.tail[old]
                        .write(0)
                        .saying(f"forgets port {port} as the old tail of queue {old[0]}/{old[1]}")
                    )
                if old != queue:
                    yield from record_queue(fifo, port, queue, split=split, stable=stable)
                    yield fifo.lock[old].release()
                    yield fifo.lock[queue].acquire()
                linked = yield from append(fifo, queue, port)
                yield fifo.lock[queue].release()
                if not linked:
                    yield from set_ready(fifo, queue)
    if polled and not was_pending:
        yield from check_pollers(fifo, port)

"""A rwlock around the event loop, and a console driver that takes it while it holds its own lock."""

from __future__ import annotations

from pvirq.check.race import Race
from pvirq.check.steps import Lock, Model, Step, Thread, Var, atomically


def model(fault: bool) -> Model:
    model = Model()
    evtchn = EvtchnLock(model, rcu=not fault)
    hvc = model.lock("hvc_lock")
    for number in range(2):
        model.thread(f"CPU {number}: event loop", _event_loop, evtchn, hvc)
    model.thread("CPU 2: khvcd", _hvc_poll, evtchn, hvc)
    for number in (3, 4):
        model.thread(f"CPU {number}: unbind", _free_irq, evtchn)
    return model


class EvtchnLock:
    """evtchn_rwlock, a queued rwlock: readers come behind a writer that waits, but for those in interrupts. Or RCU."""

    def __init__(self, model: Model, *, rcu: bool) -> None:
        self.rcu = rcu
        self.readers: Var = model.var("readers")  # -1: a writer
        self.waiting: Var = model.var("writers waiting")

    def read_lock(self, *, interrupt: bool) -> Step:
        if self.rcu:
            return self.readers.add(1).saying("rcu_read_lock()")
        return atomically(
            (self.readers, self.waiting),
            lambda readers, waiting: (readers + 1, waiting),
            lambda readers, waiting: readers >= 0 and (interrupt or not waiting),
            "takes evtchn_rwlock as a reader, in an interrupt" if interrupt else "takes evtchn_rwlock as a reader",
        )

    def read_unlock(self) -> Step:
        return self.readers.add(-1).saying("rcu_read_unlock()" if self.rcu else "releases evtchn_rwlock")

    def free(self) -> Thread:
        """What keeps an irq_info from being freed while it is used."""
        if self.rcu:
            # After a grace period; nobody waits for it who holds anything.
            yield self.readers.wait(_none).saying("the irq_info is freed, some time after all its readers have left")
            return
        yield self.waiting.add(1).saying("waits for evtchn_rwlock as a writer")
        yield atomically(
            (self.readers, self.waiting), lambda _, waiting: (-1, waiting - 1), lambda readers, _: readers == 0,
            "takes evtchn_rwlock as a writer",
        )  # fmt: skip
        yield self.readers.write(0).saying("releases evtchn_rwlock")


def _none(readers: int) -> bool:
    return readers == 0


def _event_loop(evtchn: EvtchnLock, hvc: Lock) -> Thread:
    """__xen_evtchn_do_upcall, and in it the handler of the console (hvc_handle_interrupt)."""
    yield evtchn.read_lock(interrupt=True)
    yield hvc.acquire()
    yield hvc.release()
    yield evtchn.read_unlock()


def _hvc_poll(evtchn: EvtchnLock, hvc: Lock) -> Thread:
    """__hvc_poll: the driver reads, and says EOI (xen_irq_lateeoi)."""
    yield hvc.acquire()
    yield evtchn.read_lock(interrupt=False)
    yield evtchn.read_unlock()
    yield hvc.release()


def _free_irq(evtchn: EvtchnLock) -> Thread:
    """xen_free_irq of any event channel."""
    yield from evtchn.free()


RACE = Race(
    name="evtchn-rwlock-deadlock",
    title="two readers of a rwlock, a writer between them, and a second lock make a deadlock",
    where="Linux 5.10-6.5, drivers/xen/events/events_base.c: evtchn_rwlock, and hvc_console.c: __hvc_poll()",
    brought="073d0552ead5 (5.10)",
    cured="87797fad6cce (6.6, XSA-441)",
    story=(
        "The event loop holds evtchn_rwlock as a reader when the console's handler takes hvc_lock; the console's poll "
        "holds hvc_lock when it takes evtchn_rwlock as a reader, to say EOI. Readers don't exclude each other, but one "
        "that isn't in an interrupt queues behind a writer: any unbind that comes between has each of the three wait "
        "for the next. The cure has RCU in the rwlock's place, and nobody waits for a reader with a lock held."
    ),
    model=model,
)

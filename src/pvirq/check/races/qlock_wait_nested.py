"""A vCPU that waits for the kick of a spinlock, and an interrupt there that waits for another one."""

from __future__ import annotations

from pvirq.check.protocols.polling import PolledDomain, PollingVcpu, do_poll, evtchn_2l_set_pending
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, Var, choose

KICK = 0  # the port of the waiting CPU's lock_kicker_irq; masked, it only ends polls
SLOW = 3  # _Q_SLOW_VAL of a lock byte: taken, and somebody waits who wants a kick


def model(fault: bool) -> Model:
    model = Model()
    vcpu = PolledDomain(model, vcpus=1, masked=1 << KICK).vcpus[0]
    outer, inner = model.var("lock 1", SLOW), model.var("lock 2", SLOW)
    nest = model.var("xen_qlock_wait_nest")

    def waiter() -> Thread:
        yield from _wait_head(vcpu, outer, nest, inner, fault)

    model.thread("CPU 0", waiter)
    for number, lock in enumerate((outer, inner), 1):
        model.thread(f"CPU {number}", _unlock, vcpu, lock)
    return model


def _unlock(vcpu: PollingVcpu, lock: Var) -> Thread:
    """__pv_queued_spin_unlock_slowpath, and xen_qlock_kick."""
    yield lock.write(0).saying("releases the lock")
    yield from evtchn_2l_set_pending(vcpu, KICK)


def _wait_head(vcpu: PollingVcpu, lock: Var, nest: Var, inner: Var | None, fault: bool) -> Thread:
    """The head of a lock's queue: it looks at the lock between waits. `inner`: an interrupt may come, once, whose
    handler waits for that lock."""
    left, pending = inner, vcpu.domain.evtchn_pending
    while (yield lock.read().saying(f"looks at {lock.name}")):
        if fault:
            yield pending.clear_bit(KICK).saying("clears the pending bit of the kick")
            interrupted = yield from _interrupt(vcpu, nest, left, fault)
            left = None if interrupted else left
            if (yield lock.read().saying(f"looks at {lock.name} again")) == SLOW:
                interrupted = yield from _interrupt(vcpu, nest, left, fault)
                left = None if interrupted else left
                yield from do_poll(vcpu, (KICK,))
            continue
        depth = (yield nest.add(1)) + 1
        interrupted = yield from _interrupt(vcpu, nest, left, fault)
        left = None if interrupted else left
        if depth == 1 and (yield pending.read().saying("is the kick pending?")):
            interrupted = yield from _interrupt(vcpu, nest, left, fault)
            left = None if interrupted else left
            yield pending.clear_bit(KICK).saying("clears the pending bit of the kick")
        elif (yield lock.read().saying(f"looks at {lock.name} again")) == SLOW:
            interrupted = yield from _interrupt(vcpu, nest, left, fault)
            left = None if interrupted else left
            yield from do_poll(vcpu, (KICK,))
        yield nest.add(-1)


def _interrupt(vcpu: PollingVcpu, nest: Var, inner: Var | None, fault: bool) -> Thread:
    """One may come here. Returns whether it has."""
    if inner is None or not (yield choose(2, "is it interrupted here?")):
        return False
    yield from _wait_head(vcpu, inner, nest, None, fault)
    return True


RACE = Race(
    name="qlock-wait-nested",
    title="an interrupt takes the kick of the spinlock whose waiter it interrupts",
    where="Linux 4.2-4.19, arch/x86/xen/spinlock.c: xen_qlock_wait()",
    brought="e95e6f176c61 (4.2)",
    cured="2ac2a7d4d9ff, a856531951dc (4.20), d3132b3860f6 (5.0)",
    story=(
        "A vCPU that waits for a spinlock clears the pending bit of its kicker's port, looks at the lock once more, "
        "and polls the port. The lock is released and the kick comes after the look; an interrupt before the poll "
        "waits for another lock in the same way, and clears the pending bit first. The poll of the outer wait finds "
        "nothing, and never ends. The cure clears the bit instead of polling where it is set, and in no nested wait."
    ),
    model=model,
)

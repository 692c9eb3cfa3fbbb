"""A function of Xen's that consumes events uses what was freed when its channel was closed."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.channels import evtchn_close, evtchn_send
from pvirq.check.protocols.ports import Xen
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread, fail
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m)
    d0, d1 = xen.domain(0, ports=2), xen.domain(1, ports=2)
    d0.bound(1, ECS_INTERDOMAIN, (1, 1))
    d1.bound(1, ECS_INTERDOMAIN, (0, 1), consumer=1)
    pointer = m.var("d1->vm_event_monitor", 1)
    lock = m.lock("ved->lock")
    freed = m.var("ved is freed", 0)

    def monitor_notification() -> Thread:
        """vm_event_resume(), under rcu_lock_domain()."""
        yield xen.rcu_readers.add(1)
        ved = yield pointer.read()
        if ved:
            if (yield freed.read()):
                fail("vm_event_resume() uses the domain's ring after it was freed")
            yield lock.acquire()
            yield lock.release()
        yield xen.rcu_readers.add(-1)

    def monitor() -> Thread:
        for _ in range(2):
            rc = yield from evtchn_send(d0, 1, monitor_notification)
            assert rc in (0, -Errno.EINVAL)

    def disable() -> Thread:
        yield lock.acquire()
        rc = yield from evtchn_close(d1, 1, guest=False)
        assert rc == 0
        yield lock.release()
        if fault:
            yield freed.write(1).saying("frees ved")
            yield pointer.write(0)
        else:
            yield pointer.write(0)
            yield xen.rcu_readers.wait(lambda count: count == 0).saying("waits for CPUs that may have seen ved before")
            yield freed.write(1).saying("frees ved")

    m.thread("d0 vCPU 0, EVTCHNOP_send", monitor)
    m.thread("d0 vCPU 1, XEN_VM_EVENT_DISABLE", disable)
    return m


RACE = Race(
    name="consumer-freed",
    title="a function that consumes events in Xen uses a ring that is freed meanwhile",
    where="Xen 4.15-, xen/common/event_channel.c: evtchn_send(); vm_event.c: vm_event_resume(), vm_event_disable()",
    brought="1376ef90d3 (4.15)",
    cured="not in Xen's history up to c447b7308b (August 2026)",
    story=(
        "Since evtchn_send() calls functions of Xen's own with no channel locked, nothing keeps the channel from being "
        "closed meanwhile: vm_event_disable() does so, and frees the ring whose pointer the function has read already, "
        "or whose lock it waits for. Only the domain itself is held, by RCU. Both sides are a privileged monitor's. "
        "The model without the fault clears the pointer first, and frees the ring once RCU says that nobody can have "
        "seen it: a way that is our own."
    ),
    model=model,
)

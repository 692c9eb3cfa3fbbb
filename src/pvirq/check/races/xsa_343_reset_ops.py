"""EVTCHNOP_reset takes the ABI away from under an event."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.abi.xen import VIRQ_TIMER
from pvirq.check.protocols.channels import evtchn_port_poll, evtchn_reset, evtchn_send, evtchn_unmask
from pvirq.check.protocols.ports import TWO_LEVEL, Code, Xen
from pvirq.check.protocols.virqs import send_guest_vcpu_virq
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_IPI, ECS_VIRQ


def model(fault: bool) -> Model:
    m = Model()
    d = Xen(m, Code(channel_lock=not fault)).domain(1, ports=4, virqs=1)
    d.bound(1, ECS_VIRQ, (VIRQ_TIMER,))
    d.bound(2, ECS_IPI)
    d.vcpus[0].virq_to_evtchn[VIRQ_TIMER].initial = 1
    d.use_fifo(words=4)

    def resetter() -> Thread:
        rc = yield from evtchn_reset(d)
        assert rc == 0

    def timer() -> Thread:
        yield from send_guest_vcpu_virq(d, 0, VIRQ_TIMER)

    def unmasker() -> Thread:
        rc = yield from evtchn_unmask(d, 2)
        assert rc in (0, -Errno.EINVAL)

    def poller() -> Thread:
        rc = yield from evtchn_send(d, 2)
        assert rc in (0, -Errno.EINVAL)
        rc = yield from evtchn_port_poll(d, 2)
        assert rc in (0, 1, -Errno.EINVAL)

    m.thread("vCPU 0, EVTCHNOP_reset", resetter)
    m.thread("VIRQ_TIMER", timer)
    m.thread("vCPU 1, EVTCHNOP_unmask", unmasker)
    m.thread("vCPU 2, EVTCHNOP_send and SCHEDOP_poll", poller)

    def left(end: End) -> str | None:
        if end[d.active_evtchns] or end[d.mapped] or end[d.evtchn_port_ops] != TWO_LEVEL:
            return "something is left of what was before the reset"
        late = [channel.port for channel in d.channels if end[channel.pending]]
        return f"port {late[0]} is pending after it was closed" if late else None

    m.at_end(left)
    return m


RACE = Race(
    name="xsa-343-reset-ops",
    title="EVTCHNOP_reset frees the FIFO ABI's state while an event uses it",
    where="Xen 4.5-4.14, xen/common/event_channel.c: evtchn_unmask(), send_guest_vcpu_virq(), do_poll()",
    brought="400b3bd642 (4.5)",
    cured="e045199c7c (4.15), XSA-343",
    story=(
        "EVTCHNOP_unmask, SCHEDOP_poll, VIRQs and PIRQs called the ABI's operations with neither the domain's event "
        "lock nor the port's own lock held. EVTCHNOP_reset on another vCPU closes the port and returns the domain to "
        "the two-level ABI: the operation of the FIFO ABI that has just been looked up finds d->evtchn_fifo NULL, or "
        "freed. The cure is to hold the port's lock and to see that it is still in use: it can't be closed then, and "
        "without that EVTCHNOP_reset doesn't succeed."
    ),
    model=model,
)

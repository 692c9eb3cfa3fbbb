"""A VIRQ is raised at a port that is something else by now."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.abi.xen import VIRQ_TIMER
from pvirq.check.protocols.channels import evtchn_bind_ipi, evtchn_close
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.protocols.virqs import evtchn_bind_virq, send_guest_vcpu_virq
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_IPI, ECS_VIRQ


def model(fault: bool) -> Model:
    m = Model()
    code = Code(virq_lock=False, clears_pending=False, channel_lock=False) if fault else Code()
    d = Xen(m, code).domain(1, ports=3, virqs=1)
    d.bound(1, ECS_VIRQ, (VIRQ_TIMER,))
    bound_at = d.vcpus[0].virq_to_evtchn[VIRQ_TIMER]
    bound_at.initial = 1

    def timer() -> Thread:
        for _ in range(2):
            yield from send_guest_vcpu_virq(d, 0, VIRQ_TIMER)

    def rebinder() -> Thread:
        rc = yield from evtchn_close(d, 1)
        assert rc == 0
        port = yield from evtchn_bind_ipi(d, 0)
        assert port in (1, 2)

    def binder() -> Thread:
        port = yield from evtchn_bind_virq(d, VIRQ_TIMER, 0)
        assert port in (1, 2, -Errno.EEXIST)

    m.thread("vCPU 0's timer", timer)
    m.thread("vCPU 1, EVTCHNOP_close and bind_ipi", rebinder)
    m.thread("vCPU 2, EVTCHNOP_bind_virq", binder)

    def judge(end: End) -> str | None:
        for channel in d.channels[1:]:
            if end[channel.state] == ECS_IPI and end[channel.pending]:
                return f"port {channel.port} is an IPI that nobody has sent, and is pending"
            if (end[channel.state] == ECS_VIRQ) != (end[bound_at] == channel.port):
                return "virq_to_evtchn[] isn't what the ports are bound to"
        return None

    m.at_end(judge)
    return m


RACE = Race(
    name="virq-port-reused",
    title="a VIRQ is raised at a port that was closed and taken for something else",
    where="Xen 3.0-3.2, xen/common/event_channel.c: send_guest_vcpu_virq(), send_guest_global_virq(), __evtchn_close()",
    brought="163ce6261c (March 2004)",
    cured="120785c177 (3.3)",
    story=(
        "A VIRQ looked up its port and set it pending without a lock. EVTCHNOP_close on another vCPU in between, then "
        "any EVTCHNOP_bind: the port is pending for its new user, to whom nobody sent anything. Besides, a port kept "
        "its pending bit when it was closed. The cure is a lock that is held while a VIRQ is sent, and that closing "
        "waits for after the port was forgotten; and closing clears the bit."
    ),
    model=model,
)

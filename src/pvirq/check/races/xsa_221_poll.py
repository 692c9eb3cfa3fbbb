"""SCHEDOP_poll of a port that has no bucket yet."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.channels import evtchn_bind_ipi, evtchn_close, evtchn_port_poll
from pvirq.check.protocols.ports import Code, Xen, evtchn_from_port
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread
from pvirq.xen.evtchn_channels import ECS_IPI


def model(fault: bool) -> Model:
    m = Model(order="weak")
    d = Xen(m, Code()).domain(1, ports=4, valid=2, bucket=2)
    d.bound(1, ECS_IPI)

    def binder() -> Thread:
        port = yield from evtchn_bind_ipi(d, 0)
        assert port == 2
        rc = yield from evtchn_close(d, 2)
        assert rc == 0

    def poller() -> Thread:
        if fault:
            # Any port that the ABI has will do.
            channel = yield from evtchn_from_port(d, 2)
            yield channel.pending.read()
            return
        rc = yield from evtchn_port_poll(d, 2)
        assert rc in (0, -Errno.EINVAL)

    m.thread("vCPU 0, EVTCHNOP_bind_ipi and close", binder)
    m.thread("vCPU 1, SCHEDOP_poll", poller)
    return m


RACE = Race(
    name="xsa-221-poll",
    title="SCHEDOP_poll follows a NULL pointer to a port's bucket",
    where="Xen 4.4-4.8, xen/common/schedule.c: do_poll()",
    brought="fbbd5009e6 (4.4)",
    cured="e7719a0dfa (4.10), XSA-221",
    story=(
        "do_poll() took any port below d->max_evtchns, what the ABI has, and since event channels have operations of "
        "their ABI it went through the port's struct evtchn to ask whether it is pending. A port that no bucket was "
        "allocated for has a NULL pointer there; another vCPU that binds ports decides when that changes. The cure "
        "asked by number, without the struct; since XSA-342 and 343 do_poll() refuses ports that aren't valid or "
        "usable, with the port's lock held, as the model does."
    ),
    model=model,
)

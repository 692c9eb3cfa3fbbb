"""EVTCHNOP_reset succeeds, and a port is open that the two-level ABI doesn't have."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.channels import (
    evtchn_bind_interdomain,
    evtchn_bind_ipi,
    evtchn_close,
    evtchn_reset,
    evtchn_send,
)
from pvirq.check.protocols.ports import FIFO, Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import End, Model, Thread
from pvirq.xen.evtchn_channels import ECS_FREE, ECS_INTERDOMAIN, ECS_IPI, ECS_UNBOUND


def model(fault: bool) -> Model:
    m = Model()
    xen = Xen(m, Code(counts_ports=not fault))
    d = xen.domain(1, ports=4, two_level=3)
    peer = xen.domain(2, ports=3)
    d.bound(1, ECS_UNBOUND, (0,), consumer=1)  # Xen's own: EVTCHNOP_reset leaves it alone
    d.bound(2, ECS_IPI)
    peer.bound(1, ECS_UNBOUND, (1,))
    d.use_fifo(words=4)

    def resetter() -> Thread:
        rc = yield from evtchn_reset(d)
        assert rc in (0, -Errno.EAGAIN)

    def binder() -> Thread:
        port = yield from evtchn_bind_interdomain(d, 2, 1)
        assert port in (2, 3, -Errno.EINVAL, -Errno.ENOSPC)  # 3 is one that only the FIFO ABI has

    def second() -> Thread:
        port = yield from evtchn_bind_ipi(d, 0)
        assert port in (2, 3, -Errno.ENOSPC)

    def other_end() -> Thread:
        rc = yield from evtchn_send(peer, 1)
        assert rc == 0
        rc = yield from evtchn_close(peer, 1)
        assert rc == 0

    m.thread("d1 vCPU 0, EVTCHNOP_reset", resetter)
    m.thread("d1 vCPU 1, EVTCHNOP_bind_interdomain", binder)
    m.thread("d2, EVTCHNOP_send and close", other_end)
    m.thread("d1 vCPU 2, EVTCHNOP_bind_ipi", second)
    m.invariant(
        "under the two-level ABI a port is open that it doesn't have",
        (d.evtchn_port_ops, d.channels[3].state),
        lambda ops, state: ops == FIFO or state == ECS_FREE,
    )

    def counted(end: End) -> str | None:
        for each in (d, peer):
            used = sum(end[channel.state] != ECS_FREE for channel in each.channels[1:])
            if used != end[each.active_evtchns]:
                return f"{used} ports of d{each.domid} are in use, {end[each.active_evtchns]} are counted"
            own = sum(end[channel.xen_consumer] != 0 for channel in each.channels)
            if own != end[each.xen_evtchns]:
                return f"{own} ports of d{each.domid} are Xen's own, {end[each.xen_evtchns]} are counted"
        bound = [channel for each in (d, peer) for channel in each.channels if end[channel.state] == ECS_INTERDOMAIN]
        return f"{len(bound)} ends are bound, and one end is closed" if bound else None

    if not fault:
        m.at_end(counted)
    return m


RACE = Race(
    name="xsa-343-reset-open",
    title="EVTCHNOP_reset succeeds although a port was opened meanwhile",
    where="Xen 4.5-4.14, xen/common/event_channel.c: evtchn_reset()",
    brought="400b3bd642 (4.5)",
    cured="8d385b247b (4.15), XSA-343",
    story=(
        "EVTCHNOP_reset closes one port after the other, with no lock held from one to the next, then returns the "
        "domain to the two-level ABI. Another vCPU that binds a port behind the one that is being closed keeps it "
        "open; if only the FIFO ABI has ports of that number, Xen then writes beyond the two-level bitmaps. The cure "
        "is to count ports in use: EVTCHNOP_reset fails with EAGAIN, under the event lock, if there are any but "
        "Xen's own."
    ),
    model=model,
)

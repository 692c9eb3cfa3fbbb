"""A port is valid before its bucket can be found."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.channels import evtchn_bind_ipi, evtchn_send, evtchn_unmask
from pvirq.check.protocols.ports import Code, Xen
from pvirq.check.race import Race
from pvirq.check.steps import Model, Thread
from pvirq.xen.evtchn_channels import ECS_IPI


def model(fault: bool) -> Model:
    m = Model(order="weak")
    d = Xen(m, Code(barriers=not fault)).domain(1, ports=4, valid=2, bucket=1)
    d.bound(1, ECS_IPI)

    def binder() -> Thread:
        for expected in (2, 3):
            port = yield from evtchn_bind_ipi(d, 0)
            assert port == expected

    def sender() -> Thread:
        for port in (2, 3):
            rc = yield from evtchn_send(d, port)
            assert rc in (0, -Errno.EINVAL)

    def unmasker() -> Thread:
        rc = yield from evtchn_unmask(d, 3)
        assert rc in (0, -Errno.EINVAL)

    m.thread("vCPU 0, EVTCHNOP_bind_ipi", binder)
    m.thread("vCPU 1, EVTCHNOP_send", sender)
    m.thread("vCPU 2, EVTCHNOP_unmask", unmasker)
    return m


RACE = Race(
    name="xsa-340-bucket",
    title="a port is valid before its bucket can be found",
    where="Xen 4.6-4.14, xen/common/event_channel.c: evtchn_allocate_port(), port_is_valid()",
    brought="01280dc19c (4.6)",
    cured="112992b05b (4.15), XSA-340",
    story=(
        "Whoever sends or unmasks asks without a lock whether there is such a port: is it below d->valid_evtchns? One "
        "CPU sets up a bucket, stores its pointer, and then counts its ports in d->valid_evtchns, with no barrier "
        "between. Another CPU may see the count first, and follow a pointer that is still NULL, or use channels whose "
        "locks aren't initialised. (x86 keeps stores in order, and loads; Arm doesn't, nor need a compiler.) The cure "
        "is a wmb() between the two stores and an rmb() after the count was read."
    ),
    model=model,
)

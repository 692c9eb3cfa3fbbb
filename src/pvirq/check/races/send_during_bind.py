"""An event that is on its way to one vCPU all through the change of its port to another."""

from __future__ import annotations

from pvirq.check.protocols.affinity import affinity_change, nothing_lost
from pvirq.check.protocols.linux_irq import LINUX_5_14
from pvirq.check.race import Race
from pvirq.check.steps import Model


def model(fault: bool) -> Model:
    setting = affinity_change(LINUX_5_14, pending=False, sends=1, send_lock=not fault)
    nothing_lost(setting)
    return setting.model


RACE = Race(
    name="send-during-bind",
    title="Xen picks the vCPU to notify, and the port goes to another one before it is notified",
    where="Xen 4.22, xen/common/event_channel.c: evtchn_send(), evtchn_bind_vcpu(); with Linux's two-level ABI",
    brought="",
    cured="",
    story=(
        "evtchn_send() reads the notify_vcpu_id of its peer's port under the lock of its own, and evtchn_bind_vcpu() "
        "changes it under the event_lock of the peer: neither excludes the other. If the sender is held up between the "
        "read and the pending bit for as long as the guest masks, binds and unmasks its port, the old vCPU is told of "
        "the event. Linux scans there for ports of that CPU and leaves this one pending; no later event notifies "
        "anybody. Nobody has been seen to meet it, and it isn't cured. It is gone here where bind_vcpu waits for "
        "senders, as closing a port does."
    ),
    model=model,
)

"""Virtual IRQs: binding, sending, and the domain that handles a global one (xen/common/event_channel.c)."""

from __future__ import annotations

from pvirq.abi.errno import Errno
from pvirq.check.protocols.ports import Domain, evtchn_from_port, evtchn_port_set_pending, get_free_port
from pvirq.check.steps import Thread
from pvirq.xen.evtchn_channels import ECS_VIRQ, virq_is_global


def evtchn_bind_virq(d: Domain, virq: int, vcpu: int) -> Thread:
    """EVTCHNOP_bind_virq. (Any domain may bind a global one, as until 4.20.)"""
    if virq >= len(d.vcpus[0].virq_to_evtchn) or (virq_is_global(virq) and vcpu):
        return -Errno.EINVAL
    if vcpu >= len(d.vcpus):
        return -Errno.ENOENT
    ports = d.vcpus[vcpu].virq_to_evtchn
    yield d.event_lock.acquire()
    if (yield ports[virq].read()):
        yield d.event_lock.release()
        return -Errno.EEXIST
    port = yield from get_free_port(d)
    if port < 0:
        yield d.event_lock.release()
        return port
    channel = yield from evtchn_from_port(d, port)
    yield channel.lock.acquire()
    yield channel.state.write(ECS_VIRQ).saying(f"d{d.domid}'s port {port} is VIRQ {virq} of vCPU {vcpu}")
    yield channel.notify_vcpu_id.write(vcpu)
    yield channel.u.write((virq,))
    yield channel.lock.release()
    yield ports[virq].write(port)
    yield d.event_lock.release()
    return port


def send_guest_vcpu_virq(d: Domain, vcpu: int, virq: int) -> Thread:
    """Raise a VIRQ at the port that it is bound to. A timer's interrupt does so, and waits for nobody."""
    lock = d.vcpus[vcpu].virq_lock
    if d.code.virq_lock:
        yield lock.read_acquire()
    port = yield d.vcpus[vcpu].virq_to_evtchn[virq].read()
    if port:
        channel = yield from evtchn_from_port(d, port)
        if not d.code.channel_lock:
            yield from evtchn_port_set_pending(d, channel)
        # Who holds it for writing binds or closes the port: in either case the event may be lost.
        elif (yield channel.lock.read_trylock()):
            yield from evtchn_port_set_pending(d, channel)
            yield channel.lock.read_release()
    if d.code.virq_lock:
        yield lock.read_release()

"""Xen's ports: which there are, their buckets, taking and giving back (xen/common/event_channel.c, xen/event.h).

What a function follows is Xen as it is now; `Code` says where it is to do as it did before. Domains and channels are
ordered by their numbers, as Xen orders locks by the addresses of what they guard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pvirq.abi.errno import Errno
from pvirq.check.steps import Model, Thread, Var, fail, look, rmb, wmb
from pvirq.xen.evtchn_channels import ECS_FREE, ECS_RESERVED

TWO_LEVEL: Final = "2l"  # values of Domain.evtchn_port_ops
FIFO: Final = "fifo"
NULL: Final = 0


@dataclass(frozen=True)
class Code:
    """Where Xen's code differed. All true: as it is now."""

    barriers: bool = True  # a bucket is seen before the number of ports that counts it (112992b05b)
    counts_ports: bool = True  # EVTCHNOP_reset refuses if ports were opened meanwhile (8d385b247b, 2785b2a9e0)
    channel_lock: bool = True  # what isn't sent through the port itself takes its lock as well (e045199c7c)
    checks_fifo_locked: bool = True  # EVTCHNOP_expand_array looks for the FIFO ABI under the event lock (0e9d647aca)
    sends_locked: bool = True  # evtchn_send() keeps its lock while it sets the other end pending (60b6be9ccd)
    clears_pending: bool = True  # a port that is given back loses its event (120785c177)
    virq_lock: bool = True  # a VIRQ isn't sent while its port is being closed (120785c177)
    checks_bound: bool = True  # a VIRQ that its handler has bound isn't given to another (980822c5ed)
    checks_dying: bool = True  # a dying domain doesn't come to handle a VIRQ (4d8acc9c1c)
    closes_when_killed: bool = True  # ports are closed while others still refer to the domain (f8a7ef4fec)
    rcu: bool = True  # evtchn_close() holds the other domain by RCU, not by a reference (65f98b8c31)
    consumer_cmpxchg: bool = True  # get_xen_consumer() takes a slot at once (dcbd1d8ae5)
    calls_unlocked: bool = True  # a function of Xen's is called without the lock of the channel (1376ef90d3)
    # It was never otherwise, but what would be if it were?
    orders_locks: bool = True  # of two domains' event locks evtchn_close() takes the one that comes first first
    looks_again: bool = True  # ... and, having let go of its own for that, whether the other end is still the same


class Fixed:
    """What no thread changes, and is equal to itself alone: whoever compares two threads needn't look into it."""

    def __hash__(self) -> int:
        return id(self)


class Channel(Fixed):
    """struct evtchn. `u` is its union: (domid,) of who may bind, (domid, port) of the other end, or a VIRQ's number."""

    def __init__(self, model: Model, domid: int, port: int) -> None:
        name = f"d{domid}p{port}"
        self.domid = domid
        self.port = port
        self.lock = model.lock(f"{name}.lock")
        self.state = model.var(f"{name}.state", ECS_FREE, coherent=True)
        self.u = model.var(f"{name}.u", (), coherent=True)
        self.notify_vcpu_id = model.var(f"{name}.notify_vcpu_id", 0, coherent=True)
        self.xen_consumer = model.var(f"{name}.xen_consumer", 0, coherent=True)
        self.pending = model.var(f"{name}.pending", 0, coherent=True)  # its bit or word, as the guest sees it

    @property
    def key(self) -> tuple[int, int]:
        """Where the channel is, for the order of locks."""
        return self.domid, self.port


class Vcpu(Fixed):
    """What ports need of struct vcpu."""

    def __init__(self, model: Model, domid: int, vcpu_id: int, virqs: int) -> None:
        name = f"d{domid}v{vcpu_id}"
        self.vcpu_id = vcpu_id
        self.virq_lock = model.lock(f"{name}.virq_lock")
        self.virq_to_evtchn = model.array(f"{name}.virq_to_evtchn", virqs, 0, coherent=True)


class Domain(Fixed):
    """The event channel part of struct domain: `ports` at most, of which the first `valid` have their bucket."""

    def __init__(
        self, xen: Xen, domid: int, *, ports: int, valid: int, bucket: int, vcpus: int, virqs: int, two_level: int
    ) -> None:
        model, name = xen.model, f"d{domid}"
        self.xen = xen
        self.code = xen.code
        self.weak = model.order == "weak"  # barriers between loads or stores are steps only there
        self.domid = domid
        self.ports = ports
        self.per_bucket = bucket  # EVTCHNS_PER_BUCKET
        self.two_level = two_level  # ports under the two-level ABI
        self.event_lock = model.lock(f"{name}.event_lock")
        self.valid_evtchns = model.var(f"{name}.valid_evtchns", valid, coherent=True)
        self.active_evtchns = model.var(f"{name}.active_evtchns", 0, coherent=True)
        self.xen_evtchns = model.var(f"{name}.xen_evtchns", 0, coherent=True)
        self.next_evtchn = model.var(f"{name}.next_evtchn", 0, coherent=True)
        self.is_dying = model.var(f"{name}.is_dying", 0, coherent=True)
        self.refcnt = model.var(f"{name}.refcnt", 1, coherent=True)
        self.freed = model.var(f"{name} is freed", 0, coherent=True)
        # Pointers to buckets, and whether what they point to is set up.
        self.buckets = tuple(
            model.var(f"{name}.bucket[{first}]", int(first < valid)) for first in range(0, ports, bucket)
        )
        self.set_up = tuple(
            model.var(f"{name}.bucket[{first}] is set up", int(first < valid)) for first in range(0, ports, bucket)
        )
        self.channels = tuple(Channel(model, domid, port) for port in range(ports))
        self.vcpus = tuple(Vcpu(model, domid, vcpu, virqs) for vcpu in range(vcpus))
        self.fifo = False  # does the model know of the FIFO ABI? If not, nobody asks for the ABI
        # The ABI. The pointer is the number of the object, counted from 1; `fifo_live` is the one that isn't freed.
        self.evtchn_port_ops = model.var(f"{name}.evtchn_port_ops", TWO_LEVEL, coherent=True)
        self.evtchn_fifo = model.var(f"{name}.evtchn_fifo", NULL, coherent=True)
        self.fifo_live = model.var(f"{name}.evtchn_fifo is allocated", NULL, coherent=True)
        self.fifo_count = model.var(f"{name}.evtchn_fifo's number", 0, coherent=True)
        self.num_evtchns = model.var(f"{name}.evtchn_fifo->num_evtchns", 0, coherent=True)
        self.mapped = model.var(f"{name}: pages mapped", 0, coherent=True)
        self.channels[0].state.initial = ECS_RESERVED

    def bound(
        self, port: int, state: int, u: tuple[int, ...] = (), *, vcpu: int = 0, consumer: int = 0, pending: int = 0
    ) -> Channel:
        """Before a model runs: a port is in use."""
        channel = self.channels[port]
        channel.state.initial = state
        channel.u.initial = u
        channel.notify_vcpu_id.initial = vcpu
        channel.xen_consumer.initial = consumer
        channel.pending.initial = pending
        _count(self.active_evtchns)
        if consumer:
            _count(self.xen_evtchns)
        return channel

    def use_fifo(self, words: int) -> None:
        """Before a model runs: the domain is under the FIFO ABI, with event words for that many ports."""
        self.fifo = True
        self.evtchn_port_ops.initial = FIFO
        self.evtchn_fifo.initial = self.fifo_live.initial = self.fifo_count.initial = 1
        self.num_evtchns.initial = words
        self.mapped.initial = words // self.per_page

    @property
    def per_page(self) -> int:
        """Event words in a page of the array."""
        return self.per_bucket


def _count(var: Var) -> None:
    assert isinstance(var.initial, int)
    var.initial += 1


class Xen(Fixed):
    """All domains of a model, and what they share."""

    def __init__(self, model: Model, code: Code | None = None) -> None:
        self.model = model
        self.code = code if code is not None else Code()
        self.domains: dict[int, Domain] = {}
        self.rcu_readers = model.var("CPUs that RCU waits for", 0, coherent=True)

    def domain(
        self, domid: int, *, ports: int, valid: int | None = None, bucket: int | None = None, vcpus: int = 1,
        virqs: int = 0, two_level: int | None = None,
    ) -> Domain:  # fmt: skip
        """A new domain with port 0 reserved; without more words, all its ports are in one bucket that is there."""
        domain = Domain(
            self, domid, ports=ports, valid=ports if valid is None else valid,
            bucket=ports if bucket is None else bucket, vcpus=vcpus, virqs=virqs,
            two_level=ports if two_level is None else two_level,
        )  # fmt: skip
        self.domains[domid] = domain
        return domain


# -- finding a port ----------------------------------------------------------------------------------------------------


def port_is_valid(d: Domain, port: int) -> Thread:
    """Is there such a port? Then its bucket may be used, whatever locks are held."""
    valid = yield d.valid_evtchns.read()
    if port >= valid:
        return False
    if d.code.barriers and d.weak:
        yield rmb()
    return True


def evtchn_from_port(d: Domain, port: int) -> Thread:
    """The channel, through its bucket's pointer."""
    if port < d.per_bucket:
        return d.channels[port]  # the first bucket is there from the beginning
    number = port // d.per_bucket
    bucket = yield d.buckets[number].read()
    if bucket == NULL:
        fail(f"the pointer to the bucket of port {port} is NULL")
    set_up = yield d.set_up[number].read()
    if not set_up:
        fail(f"the bucket of port {port} isn't set up")
    return d.channels[port]


def find_port(d: Domain, port: int) -> Thread:
    """_evtchn_from_port: the channel, or None."""
    if not (yield from port_is_valid(d, port)):
        return None
    return (yield from evtchn_from_port(d, port))


# -- taking and giving back; all under the event lock ------------------------------------------------------------------


def evtchn_allocate_port(d: Domain, port: int) -> Thread:
    """Take a port if it is free, with a new bucket where it is the first beyond those that there are.

    (A port that is still on a FIFO queue is no part of this.)
    """
    if port >= d.ports:
        return -Errno.ENOSPC
    if port >= d.two_level and (yield d.evtchn_fifo.read()) == NULL:
        return -Errno.ENOSPC
    if (yield from port_is_valid(d, port)):
        channel = yield from evtchn_from_port(d, port)
        state = yield channel.state.read()
        if state != ECS_FREE:
            return -Errno.EBUSY
    else:
        alloc_port = yield d.valid_evtchns.read()
        while port >= alloc_port:
            number = alloc_port // d.per_bucket
            yield d.set_up[number].write(1).saying(f"sets up a bucket for ports from {alloc_port}")
            yield d.buckets[number].write(1)
            if d.code.barriers and d.weak:
                yield wmb()
            alloc_port += d.per_bucket
            yield d.valid_evtchns.write(alloc_port)
    active = yield d.active_evtchns.read()
    yield d.active_evtchns.write(active + 1)
    return 0


def get_free_port(d: Domain) -> Thread:
    """The lowest free port, taken."""
    if (yield d.is_dying.read()):
        return -Errno.EINVAL
    for port in range(d.ports):
        rc = yield from evtchn_allocate_port(d, port)
        if rc == 0:
            return port
        if rc != -Errno.EBUSY:
            return rc
    return -Errno.ENOSPC


def check_free_port(d: Domain, port: int) -> Thread:
    """Where an operation ends: a port that was taken and hasn't come to be used is given back."""
    channel = yield from find_port(d, port)
    if channel is not None and (yield channel.state.read()) == ECS_FREE:
        active = yield d.active_evtchns.read()
        yield d.active_evtchns.write(active - 1)


def evtchn_free(d: Domain, channel: Channel) -> Thread:
    """Give a port back; its lock is held as well."""
    if d.code.clears_pending:
        yield from evtchn_port_clear_pending(d, channel)
    if (yield channel.xen_consumer.read()):
        count = yield d.xen_evtchns.read()
        yield d.xen_evtchns.write(count - 1)
        if d.weak:
            yield wmb()
    active = yield d.active_evtchns.read()
    yield d.active_evtchns.write(active - 1)
    yield channel.state.write(ECS_FREE).saying(f"d{d.domid}'s port {channel.port} is free")
    yield channel.notify_vcpu_id.write(0)
    yield channel.xen_consumer.write(0)


# -- what the ABI does with a port -------------------------------------------------------------------------------------


def evtchn_usable(channel: Channel) -> Thread:
    """Is it bound, and the guest's?"""
    if (yield channel.xen_consumer.read()):
        return False
    state = yield channel.state.read()
    return state > ECS_RESERVED


def evtchn_port_set_pending(d: Domain, channel: Channel) -> Thread:
    """Raise an event. The vCPU, and whether it hears of it, are no part of this. The result: is it a new one?"""
    if d.code.channel_lock and not (yield from evtchn_usable(channel)):
        return False
    if not (yield from _abi_has(d, channel.port)):
        return False
    was = yield channel.pending.set_bit(0).saying(f"d{d.domid}'s port {channel.port} is pending")
    return not was


def evtchn_port_clear_pending(d: Domain, channel: Channel) -> Thread:
    if d.code.channel_lock and not (yield from evtchn_usable(channel)):
        return
    if (yield from _abi_has(d, channel.port)):
        yield channel.pending.clear_bit(0)


def evtchn_port_is_pending(d: Domain, channel: Channel) -> Thread:
    if d.code.channel_lock and not (yield from evtchn_usable(channel)):
        return False
    if not (yield from _abi_has(d, channel.port)):
        return False
    pending = yield channel.pending.read()
    return bool(pending)


def _abi_has(d: Domain, port: int) -> Thread:
    """Call of an operation of the ABI: is there a bit or a word for the port?"""
    if not d.fifo:
        return port < d.two_level
    ops = yield d.evtchn_port_ops.read()
    if ops == TWO_LEVEL:
        if port >= d.two_level:
            fail(f"port {port} is beyond the bitmaps of the two-level ABI")
        return True
    fifo = yield d.evtchn_fifo.read()
    if fifo == NULL:
        fail("evtchn_fifo_word_from_port() follows evtchn_fifo, which is NULL")
    live, words = yield look((d.fifo_live, d.num_evtchns), text="reads evtchn_fifo->num_evtchns")
    if live != fifo:
        fail("evtchn_fifo_word_from_port() uses evtchn_fifo after it was freed")
    return port < words


# -- holding a domain --------------------------------------------------------------------------------------------------


def get_domain(d: Domain) -> Thread:
    """Hold a domain by a reference. False: there is none left to add to."""
    if (yield d.freed.read()):
        fail(f"get_domain() uses d{d.domid} after it was freed")
    before = yield d.refcnt.update(lambda count: count + 1 if count else 0, f"takes a reference to d{d.domid}")
    return before > 0


def put_domain(d: Domain) -> Thread:
    """Let go of it. (Who waits for the last one to go is `dying.complete_domain_destroy`.)"""
    yield d.refcnt.add(-1).saying(f"gives up a reference to d{d.domid}")

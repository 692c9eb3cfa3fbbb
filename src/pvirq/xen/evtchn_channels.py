"""The event channels of a domain: port numbers, states, closing (struct evtchn, xen/common/event_channel.c).

What guests ask for is in `evtchn`; how a pending event shows in a guest's memory is the business of
`evtchn_2l` and `evtchn_fifo`, the two ABIs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, Protocol

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import VIRQ_DEBUG, VIRQ_TIMER, VIRQ_XENOPROF, VIRQ_XENPMU
from pvirq.xen.evtchn_2l import TwoLevel
from pvirq.xen.evtchn_fifo import Fifo

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain, Vcpu

# Channel states (ECS_*), with Xen's numbers: the 'e' debug key prints them, and "usable" means above
# RESERVED.
ECS_FREE: Final = 0
ECS_RESERVED: Final = 1
ECS_UNBOUND: Final = 2
ECS_INTERDOMAIN: Final = 3
ECS_PIRQ: Final = 4
ECS_VIRQ: Final = 5
ECS_IPI: Final = 6

EVTCHNS_PER_BUCKET: Final = 64  # channels come to be in pages of 64-byte structures
INT_MAX: Final = (1 << 31) - 1

XenConsumer = Callable[["Vcpu", int], None]
"""What Xen itself does on a notification: called with the vCPU that the port notifies, and the port."""

LOCAL_VIRQS: Final = frozenset((VIRQ_TIMER, VIRQ_DEBUG, VIRQ_XENOPROF, VIRQ_XENPMU))


def virq_is_global(virq: int) -> bool:
    """Does the VIRQ go to one handler domain rather than to each vCPU?"""
    return virq not in LOCAL_VIRQS


class Channel:
    """One port (struct evtchn). Which fields mean something depends on `state`:

    UNBOUND `remote_domid`; INTERDOMAIN `remote_domain`, `remote_port`; PIRQ `pirq`; VIRQ `virq`. The FIFO
    fields (`pending`: raised while its event word had no page; `priority`; the queue it was last put on)
    outlive a close. `generation` counts the closes: who holds on to a channel knows by it whether it is the same one.
    """

    __slots__ = (
        "consumer", "generation", "last_priority", "last_vcpu", "notify_vcpu", "pending", "pirq", "port", "priority",
        "remote_domain", "remote_domid", "remote_port", "state", "virq",
    )  # fmt: skip

    def __init__(self, port: int) -> None:
        self.port = port
        self.generation = 0
        self.state = ECS_FREE
        self.consumer: XenConsumer | None = None
        self.notify_vcpu = 0
        self.remote_domid = 0
        self.remote_domain: Domain | None = None
        self.remote_port = 0
        self.pirq = 0
        self.virq = 0
        self.pending = False
        self.priority = 0
        self.last_vcpu = 0
        self.last_priority = 0

    @property
    def usable(self) -> bool:
        """Bound, and the guest's rather than Xen's (evtchn_usable)."""
        return self.consumer is None and self.state > ECS_RESERVED


class Pirqs(Protocol):
    """A domain's physical IRQs as event channels need them; `EventChannels.pirqs` holds the provider.

    Order of EVTCHNOP_bind_pirq: number in range (EINVAL), `access_permitted` (EPERM), `port_of` not 0
    (EEXIST), a free port, then `bind`, and `bound` once the port is set up.
    """

    @property
    def nr_pirqs(self) -> int:
        """How many numbers there are."""

    def access_permitted(self, pirq: int) -> bool:
        """May the domain use it (pirq_access_permitted)?"""

    def port_of(self, pirq: int) -> int:
        """The port that it is bound to, 0 for none (pirq_to_evtchn)."""

    def bind(self, pirq: int, port: int, vcpu: Vcpu, will_share: bool) -> None:
        """Connect the line to `port` (pirq_guest_bind); on XenError nothing has changed."""

    def bound(self, pirq: int) -> None:
        """The port is the guest's now: interrupts may come (arch_evtchn_bind_pirq)."""

    def unbind(self, pirq: int) -> None:
        """The port has been closed (pirq_guest_unbind)."""

    def set_affinity(self, pirq: int, vcpu: Vcpu) -> None:
        """The port now notifies `vcpu` (pirq_set_affinity)."""

    def irq(self, pirq: int) -> int:
        """The hypervisor's own number of the line, for the 'e' debug key (domain_pirq_to_irq)."""


class Closer(Protocol):
    """`EventChannels.do_close`, or what stands in front of it."""

    def __call__(self, port: int, guest: bool = True) -> None: ...


class EventChannels:
    """The event channels of one domain (the evtchn fields of struct domain).

    `active` counts ports in use, `xen_active` those of them that Xen itself consumes; port 0 is reserved and
    not counted. `generation` counts ports that were taken or given back: while it is the same, so are they. `check`,
    where set, is asked before each of the domain's operations (`probes.Check`). `close` is `do_close`, unless something
    has been put in front of it (`probes.put`).
    """

    def __init__(self, domain: Domain, max_evtchns: int = -1) -> None:
        """`max_evtchns` is the highest permitted port; -1: as many as the ABI has (evtchn_init)."""
        self.close: Closer = self.do_close
        self.domain = domain
        self.check = domain.hypervisor.probes.check_of(domain)
        self.max_port = INT_MAX if max_evtchns < 0 else min(max_evtchns, INT_MAX)
        self.ops: TwoLevel | Fifo
        self.use(TwoLevel(domain))
        self.pirqs: Pirqs = domain.pirqs
        self.channels = [Channel(port) for port in range(EVTCHNS_PER_BUCKET)]
        self.channels[0].state = ECS_RESERVED
        self.active = 0
        self.xen_active = 0
        self._generation = array("Q", (0,))
        self._taken = bytearray(EVTCHNS_PER_BUCKET)  # by port, 1: not to be given out, being bound
        self._taken[0] = 1
        self._first_free = 1  # no port below is free

    @property
    def generation(self) -> int:
        return self._generation[0]

    @property
    def generation_at(self) -> int:
        """Where it is, 64 bits, for machine code to look at."""
        return self._generation.buffer_info()[0]

    @property
    def fifo(self) -> bool:
        """Has the guest switched to the FIFO ABI?"""
        return self.ops.fifo

    def use(self, ops: TwoLevel | Fifo) -> None:
        """Go on with another ABI."""
        self.ops = ops
        self.domain.hypervisor.probes.cover(self)

    def port(self, port: int) -> Channel:
        """The channel object of a port, in use or not; XenError(EINVAL) beyond the ports allocated so far."""
        channels = self.channels
        if 0 <= port < len(channels):
            return channels[port]
        raise XenError(Errno.EINVAL, f"no port {port}")

    def __iter__(self) -> Iterator[Channel]:
        """The channels in use, by port."""
        return (channel for channel in self.channels if channel.state > ECS_RESERVED)

    def __len__(self) -> int:
        return self.active

    def is_pending(self, port: int) -> bool:
        """Is the port's event pending? False for a port that isn't the guest's to use (evtchn_is_pending)."""
        channel = self.port(port)
        return channel.usable and self.ops.is_pending(channel)

    def is_masked(self, port: int) -> bool:
        """Is the port masked? True for a port that isn't the guest's to use (evtchn_is_masked)."""
        channel = self.port(port)
        return not channel.usable or self.ops.is_masked(channel)

    def poll(self, port: int) -> bool:
        """As `is_pending`, but XenError(EINVAL) for a port not the guest's to use (evtchn_port_poll)."""
        channel = self.port(port)
        if not channel.usable:
            raise XenError(Errno.EINVAL, f"port {port} is not in use")
        return self.ops.is_pending(channel)

    def set_pending(self, channel: Channel, vcpu_id: int) -> None:
        """Raise an event towards a vCPU, if the port is the guest's to use (evtchn_port_set_pending)."""
        if channel.consumer is None and channel.state > ECS_RESERVED:
            self.ops.set_pending(self.domain.vcpus[vcpu_id], channel)

    def allocate(self, port: int = 0) -> Channel:
        """Take `port`, or the lowest free one for 0, still in state FREE (evtchn_get_port).

        Raises EINVAL for a dying domain, ENOSPC beyond its limits, EBUSY where the port asked for is in use
        or (FIFO) still linked on a queue. The caller binds it, or gives it back with `check_free`.
        """
        if port:
            return self._allocate_port(port)
        if self.domain.dying:
            raise XenError(Errno.EINVAL, "the domain is dying")
        port = self._first_free = self._next_free(self._first_free)
        # A free port that is still on a queue is left alone until the guest has consumed it.
        while port < len(self.channels) and self.ops.is_busy(self.channels[port]):
            port = self._next_free(port + 1)
        return self._allocate_port(port)

    def _next_free(self, port: int) -> int:
        """The first port from `port` on that is not taken; one beyond the array of channels if none."""
        port = self._taken.find(0, port)
        return port if port >= 0 else len(self._taken)

    def _allocate_port(self, port: int) -> Channel:
        """evtchn_allocate_port: the array of channels grows by whole buckets as far as needed."""
        channels = self.channels
        if port > self.max_port or port >= self.ops.max_channels:
            raise XenError(Errno.ENOSPC, f"port {port} is beyond the limit")
        if port < len(channels):
            if channels[port].state != ECS_FREE or self.ops.is_busy(channels[port]):
                raise XenError(Errno.EBUSY, f"port {port} is in use")
        else:
            buckets = -(-(port + 1) // EVTCHNS_PER_BUCKET)
            channels += map(Channel, range(len(channels), buckets * EVTCHNS_PER_BUCKET))
            self._taken += bytes(len(channels) - len(self._taken))
        self._taken[port] = 1
        self.active += 1
        self._generation[0] += 1
        return channels[port]

    def check_free(self, channel: Channel) -> None:
        """Give back an allocated port that has not come to be bound (check_free_port)."""
        if channel.state == ECS_FREE:
            self.active -= 1
            self._give_back(channel.port)

    def _give_back(self, port: int) -> None:
        self._generation[0] += 1
        self._taken[port] = 0
        self._first_free = min(self._first_free, port)

    def free(self, channel: Channel) -> None:
        """Let go of a bound port (evtchn_free)."""
        if channel.usable:
            self.ops.clear_pending(channel)
        if channel.consumer is not None:
            self.xen_active -= 1
            channel.consumer = None
        self.active -= 1
        channel.generation += 1
        channel.state = ECS_FREE
        channel.notify_vcpu = 0
        channel.remote_domain = None
        self._give_back(channel.port)

    def do_close(self, port: int, guest: bool = True) -> None:
        """Close a port; the other end of an interdomain channel becomes unbound (evtchn_close).

        Raises EINVAL for a port that is not bound, or that Xen consumes when it is the guest who asks.
        """
        channel = self.port(port)
        state = channel.state
        if (channel.consumer is not None and guest) or state <= ECS_RESERVED:
            raise XenError(Errno.EINVAL, f"port {port} can't be closed")
        if state == ECS_PIRQ:
            self.pirqs.unbind(channel.pirq)
        elif state == ECS_VIRQ:
            vcpu_id = 0 if virq_is_global(channel.virq) else channel.notify_vcpu
            self.domain.vcpus[vcpu_id].virq_to_evtchn[channel.virq] = 0
        elif state == ECS_INTERDOMAIN:
            assert channel.remote_domain is not None
            remote = channel.remote_domain.evtchn.channels[channel.remote_port]
            self.free(channel)
            remote.state = ECS_UNBOUND
            remote.remote_domid = self.domain.domid
            remote.remote_domain = None
            return
        self.free(channel)

    def reset(self) -> None:
        """Close all the guest's ports and go back to the two-level ABI (evtchn_reset)."""
        for channel in self.channels[1:]:
            if channel.usable:
                self.close(channel.port)
        if isinstance(self.ops, Fifo):
            self.ops.destroy()
            self.use(TwoLevel(self.domain))

    def destroy(self) -> None:
        """The domain has died: close everything, Xen's own channels too (evtchn_destroy)."""
        for channel in reversed(self.channels):
            if channel.state > ECS_RESERVED:
                self.close(channel.port, guest=False)
        handlers = self.domain.hypervisor.global_virq_handlers
        for virq in [virq for virq, domain in handlers.items() if domain is self.domain]:
            del handlers[virq]
        if isinstance(self.ops, Fifo):
            self.ops.destroy()

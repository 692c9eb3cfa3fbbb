"""HYPERVISOR_event_channel_op for Python callers: what a domain's kernel may ask, as methods. `Domain.evtchnop`.

Each is the operation of that name in `pvirq.xen.evtchn` with the domain as caller, and fails as it does: XenError with
the errno that a guest would get. `dom` is a domain id, DOMID_SELF for the caller itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pvirq.abi.event_channel import BIND_PIRQ__WILL_SHARE
from pvirq.abi.xen import DOMID_SELF
from pvirq.xen import evtchn

if TYPE_CHECKING:
    from pvirq.xen.domain import Domain


class Evtchnop:
    """The EVTCHNOP_* of one domain."""

    __slots__ = ("_domain",)

    def __init__(self, domain: Domain) -> None:
        self._domain = domain

    def alloc_unbound(self, remote_dom: int, dom: int = DOMID_SELF, port: int = 0) -> int:
        """A port that `remote_dom` may bind to; ESRCH, ENOSPC, EINVAL (dying), EPERM, EBUSY (`port` is taken)."""
        return evtchn.alloc_unbound(self._domain, dom, remote_dom, port)

    def bind_interdomain(self, remote_dom: int, remote_port: int) -> int:
        """A port connected to one that waits for this domain; ESRCH, ENOSPC, EINVAL (it does not wait)."""
        return evtchn.bind_interdomain(self._domain, remote_dom, remote_port)

    def bind_virq(self, virq: int, vcpu: int = 0) -> int:
        """A port for a VIRQ_*; EINVAL (number, or global and not vCPU 0), ENOENT (vCPU), EEXIST, ENOSPC."""
        return evtchn.bind_virq(self._domain, virq, vcpu)

    def bind_ipi(self, vcpu: int) -> int:
        """A port that notifies a vCPU of this domain; ENOENT, ENOSPC."""
        return evtchn.bind_ipi(self._domain, vcpu)

    def bind_pirq(self, pirq: int, share: bool = True) -> int:
        """A port for a physical IRQ; EINVAL (number), EPERM, EEXIST, ENOSPC, EBUSY (the line is not shared)."""
        return evtchn.bind_pirq(self._domain, pirq, BIND_PIRQ__WILL_SHARE if share else 0)

    def bind_vcpu(self, port: int, vcpu: int) -> None:
        """Let a port notify another vCPU; ENOENT (vCPU), EINVAL (no such port, or it can't move)."""
        evtchn.bind_vcpu(self._domain, port, vcpu)

    def send(self, port: int) -> None:
        """Notify the other end, which may not be there yet; EINVAL (a port with no other end)."""
        evtchn.send(self._domain, port)

    def unmask(self, port: int) -> None:
        """Clear a port's mask bit and deliver what is pending; EINVAL (no such port)."""
        evtchn.unmask(self._domain, port)

    def close(self, port: int) -> None:
        """Give a port back, its other end waits again; EINVAL (not bound, or Xen's own)."""
        evtchn.close(self._domain, port)

    def status(self, port: int, dom: int = DOMID_SELF) -> evtchn.Status:
        """What a port is; ESRCH, EINVAL (no such port), EACCES (Xen's own), EPERM."""
        return evtchn.status(self._domain, dom, port)

    def reset(self, dom: int = DOMID_SELF) -> None:
        """Close every port, return to the two-level ABI; ESRCH, EPERM, EINVAL (another domain, not paused)."""
        evtchn.reset(self._domain, dom)

    def init_control(self, gfn: int, offset: int, vcpu: int) -> int:
        """Give a vCPU its FIFO control block, returns the number of link bits; ENOENT (vCPU), EINVAL."""
        return evtchn.init_control(self._domain, gfn, offset, vcpu)

    def expand_array(self, gfn: int) -> None:
        """Give one page more of FIFO event words; EOPNOTSUPP (two-level ABI), ENOSPC, EINVAL (frame)."""
        evtchn.expand_array(self._domain, gfn)

    def set_priority(self, port: int, priority: int) -> None:
        """0, first, to 15; EINVAL, ENOSYS (two-level ABI), EACCES (not in use)."""
        evtchn.set_priority(self._domain, port, priority)

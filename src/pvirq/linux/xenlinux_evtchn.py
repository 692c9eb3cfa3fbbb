"""/dev/xen/evtchn of XenLinux (drivers/xen/evtchn/evtchn.c of 2.6.18): ports without an IRQ.

A daemon's port is not bound to an IRQ, so nothing of it shows in /proc/interrupts. The upcall masks the port and puts
it in the ring of the process whose it is; the process reads it there, reacts, and unmasks it by writing it back. Events
that come meanwhile become one.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.linux.evtchn_dev import EvtchnUser, UserHandler
from pvirq.linux.irq import IrqError
from pvirq.xen import evtchn

if TYPE_CHECKING:
    from pvirq.linux.xenlinux import XenLinux

EVTCHN_RING_SIZE: Final = 4096 // 4


class _Port:
    """A port of a process; `enabled`: it has been written back since it last came."""

    __slots__ = ("enabled", "handler", "port")

    def __init__(self, port: int, handler: UserHandler | None) -> None:
        self.port = port
        self.handler = handler
        self.enabled = True


class XenLinuxEvtchnUser(EvtchnUser):
    """One open /dev/xen/evtchn, as `EvtchnUser` is for a daemon; `irq_of` finds no IRQ: IrqError(ENOENT).

    `overflow`: a ring of 1,024 ports was full, and the process reads nothing (EFBIG) until it resets it.
    """

    def __init__(self, events: XenLinux, name: str) -> None:
        self.name = name
        self.cpu: int | None = None
        self.overflow = False
        self._xenlinux = events
        self._kernel = events.kernel
        self._domain = events.domain
        self._user_ports: dict[int, _Port] = {}
        self._arrived: list[int] = []

    @property
    def ports(self) -> list[int]:
        return sorted(self._user_ports)

    def _bind(self, port: int, handler: UserHandler | None) -> int:
        """evtchn_bind_to_user: known before it opens, as its first event may be pending already."""
        self._user_ports[port] = _Port(port, handler)
        self._xenlinux.port_user[port] = self
        self._xenlinux.unmask_evtchn(port)
        return port

    def irq_of(self, port: int) -> int:
        self._mine(port)
        raise IrqError(Errno.ENOENT, f"port {port} has no IRQ")

    def _mine(self, port: int) -> _Port:
        try:
            return self._user_ports[port]
        except KeyError:
            raise XenError(Errno.ENOTCONN, f"port {port} is not of {self.name}") from None

    def arrived(self, port: int) -> None:
        """In the upcall, with the port masked: into the ring, and wake the process."""
        if len(self._arrived) >= EVTCHN_RING_SIZE:
            self.overflow = True
            return
        self._user_ports[port].enabled = False
        self._arrived.append(port)
        if len(self._arrived) == 1:
            self._kernel.queue_work(self._read_ring, self.cpu)

    def _read_ring(self) -> None:
        """The daemon wakes up: read(), react, write(), until the ring is empty."""
        while self._arrived and not self.overflow:
            ports, self._arrived = self._arrived, []
            for port in ports:
                user_port = self._user_ports.get(port)
                if user_port is None or user_port.enabled:
                    continue  # unbound since, or bound anew
                if user_port.handler is None or user_port.handler(port) is not False:
                    self._write_back(user_port)

    def _write_back(self, user_port: _Port) -> None:
        if not user_port.enabled and self._user_ports.get(user_port.port) is user_port:
            user_port.enabled = True
            self._xenlinux.unmask_evtchn(user_port.port)

    def reset(self) -> None:
        """IOCTL_EVTCHN_RESET: empty the ring. Ports that were in it stay masked until they are written."""
        self._arrived.clear()
        self.overflow = False

    def notify(self, port: int) -> None:
        self._mine(port)
        with contextlib.suppress(XenError):
            evtchn.send(self._domain, port)

    def unmask(self, port: int) -> None:
        self._write_back(self._mine(port))

    def unbind(self, port: int) -> None:
        self._mine(port)
        del self._user_ports[port], self._xenlinux.port_user[port]
        self._xenlinux.mask_evtchn(port)
        evtchn.close(self._domain, port)

    def close(self) -> None:
        for port in self.ports:
            self.unbind(port)
        self._arrived.clear()

"""libslirp: the TCP/IP stack of QEMU's and slirp4netns' user-mode networks, called by ctypes (libslirp.h)."""

from __future__ import annotations

import ctypes
import functools
import select
import socket
import time
from collections import deque
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_uint8, c_uint32, c_void_p
from ipaddress import IPv4Address, IPv4Interface
from typing import Any, Final

from pvirq.net.outside import OutsideError

LIBRARY: Final = "libslirp.so.0"
CONFIG_VERSION: Final = 3  # with disable_dns; of libslirp 4.3, and known to those after it
OUT_QUEUE: Final = 4096  # frames that wait to be taken; TCP sends again what is lost

POLL_IN, POLL_OUT, POLL_PRI, POLL_ERR, POLL_HUP = 1, 2, 4, 8, 16
_TO_EPOLL: Final = {
    POLL_IN: select.EPOLLIN, POLL_OUT: select.EPOLLOUT, POLL_PRI: select.EPOLLPRI, POLL_ERR: select.EPOLLERR,
    POLL_HUP: select.EPOLLHUP,
}  # fmt: skip

_SendPacket = ctypes.CFUNCTYPE(c_ssize_t, c_void_p, c_size_t, c_void_p)
_GuestError = ctypes.CFUNCTYPE(None, c_char_p, c_void_p)
_ClockGetNs = ctypes.CFUNCTYPE(c_int64, c_void_p)
_TimerNew = ctypes.CFUNCTYPE(c_void_p, c_void_p, c_void_p, c_void_p)
_TimerFree = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
_TimerMod = ctypes.CFUNCTYPE(None, c_void_p, c_int64, c_void_p)
_PollFd = ctypes.CFUNCTYPE(None, c_int, c_void_p)
_Notify = ctypes.CFUNCTYPE(None, c_void_p)
_AddPoll = ctypes.CFUNCTYPE(c_int, c_int, c_int, c_void_p)
_GetRevents = ctypes.CFUNCTYPE(c_int, c_int, c_void_p)


class _Callbacks(ctypes.Structure):
    _fields_ = [
        ("send_packet", _SendPacket),
        ("guest_error", _GuestError),
        ("clock_get_ns", _ClockGetNs),
        ("timer_new", _TimerNew),
        ("timer_free", _TimerFree),
        ("timer_mod", _TimerMod),
        ("register_poll_fd", _PollFd),
        ("unregister_poll_fd", _PollFd),
        ("notify", _Notify),
        ("init_completed", c_void_p),  # this and the next are of version 4
        ("timer_new_opaque", c_void_p),
    ]


class _Config(ctypes.Structure):
    """struct SlirpConfig up to version 4. in_addr and in6_addr are bytes in the network's order."""

    _fields_ = [
        ("version", c_uint32),
        ("restricted", c_int),
        ("in_enabled", c_bool),
        ("vnetwork", c_uint32),
        ("vnetmask", c_uint32),
        ("vhost", c_uint32),
        ("in6_enabled", c_bool),
        ("vprefix_addr6", c_uint8 * 16),
        ("vprefix_len", c_uint8),
        ("vhost6", c_uint8 * 16),
        ("vhostname", c_char_p),
        ("tftp_server_name", c_char_p),
        ("tftp_path", c_char_p),
        ("bootfile", c_char_p),
        ("vdhcp_start", c_uint32),
        ("vnameserver", c_uint32),
        ("vnameserver6", c_uint8 * 16),
        ("vdnssearch", c_void_p),
        ("vdomainname", c_char_p),
        ("if_mtu", c_size_t),
        ("if_mru", c_size_t),
        ("disable_host_loopback", c_bool),
        ("enable_emu", c_bool),
        ("outbound_addr", c_void_p),
        ("outbound_addr6", c_void_p),
        ("disable_dns", c_bool),
        ("disable_dhcp", c_bool),
    ]


@functools.cache
def load() -> Any:
    """The library. OutsideError where it isn't installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise OutsideError(f"user-mode NAT needs {LIBRARY} (Debian: apt install libslirp0)") from None
    for name, result, arguments in (
        ("slirp_new", c_void_p, (POINTER(_Config), POINTER(_Callbacks), c_void_p)),
        ("slirp_cleanup", None, (c_void_p,)),
        ("slirp_pollfds_fill", None, (c_void_p, POINTER(c_uint32), _AddPoll, c_void_p)),
        ("slirp_pollfds_poll", None, (c_void_p, c_int, _GetRevents, c_void_p)),
        ("slirp_input", None, (c_void_p, c_char_p, c_int)),
        ("slirp_add_hostfwd", c_int, (c_void_p, c_int, c_uint32, c_int, c_uint32, c_int)),
        ("slirp_remove_hostfwd", c_int, (c_void_p, c_int, c_uint32, c_int)),
        ("slirp_connection_info", c_void_p, (c_void_p,)),
        ("slirp_version_string", c_char_p, ()),
    ):  # fmt: skip
        try:
            function = getattr(library, name)
        except AttributeError:
            raise OutsideError(f"{LIBRARY} is too old: it has no {name}") from None
        function.restype, function.argtypes = result, list(arguments)
    return library


def _in_addr(address: IPv4Address) -> int:
    """struct in_addr by value: its bytes are in the network's order."""
    return int.from_bytes(address.packed, "little")


class Slirp:
    """One instance. Frames go in by `input`; what it sends is in `out` after `input` or `turn`.

    `sockets` are the descriptors of its connections and conversations, `connections` those of TCP; `events` has those
    that wait for something.
    """

    def __init__(self, interface: IPv4Interface, dns: IPv4Address | None) -> None:
        """`interface` is its own address in the virtual network, which there stands for the real loopback.

        `dns` is one that stands for the real resolver. OutsideError where the library can't be used.
        """
        self._library = load()
        self.out: deque[bytes] = deque(maxlen=OUT_QUEUE)
        self.sockets: set[int] = set()
        self.connections: set[int] = set()
        self.events: dict[int, int] = {}
        self.timeout_ms = 1000
        self.epoll = select.epoll()
        self._polled: list[int] = []  # descriptors in the order in which slirp named them
        self._wanted: dict[int, int] = {}
        self._revents: dict[int, int] = {}
        self._add_poll = _AddPoll(self._on_add_poll)
        self._get_revents = _GetRevents(self._on_get_revents)
        self._callbacks = _Callbacks(
            send_packet=_SendPacket(self._on_send),
            guest_error=_GuestError(lambda message, opaque: None),
            # The library has one clock for all its instances, so it can't be the virtual one of a host.
            clock_get_ns=_ClockGetNs(lambda opaque: time.monotonic_ns()),
            timer_new=_TimerNew(lambda callback, argument, opaque: 1),  # for IPv6's advertisements, which are off
            timer_free=_TimerFree(lambda timer, opaque: None),
            timer_mod=_TimerMod(lambda timer, when, opaque: None),
            register_poll_fd=_PollFd(self._on_register),
            unregister_poll_fd=_PollFd(self._on_unregister),
            notify=_Notify(lambda opaque: None),
        )
        network = interface.network
        config = _Config(
            version=CONFIG_VERSION,
            in_enabled=True,
            vnetwork=_in_addr(network.network_address),
            vnetmask=_in_addr(network.netmask),
            vhost=_in_addr(interface.ip),
            vnameserver=_in_addr(dns) if dns is not None else 0,
            disable_dns=dns is None,
        )
        self._slirp: int | None = self._library.slirp_new(ctypes.byref(config), ctypes.byref(self._callbacks), None)
        if not self._slirp:
            self.epoll.close()
            raise OutsideError(f"{LIBRARY} {self.version} can't be used: slirp_new failed")
        self._fill()

    @property
    def version(self) -> str:
        text: bytes = self._library.slirp_version_string()
        return text.decode()

    def close(self) -> None:
        """Close all connections; idempotent."""
        if self._slirp:
            self._library.slirp_cleanup(self._slirp)
            self._slirp = None
            self.sockets.clear()
            self.connections.clear()
            self.events.clear()
            self.epoll.close()

    def input(self, frame: bytes) -> None:
        """A frame from the virtual network."""
        if self._slirp:
            self._library.slirp_input(self._slirp, frame, len(frame))

    def turn(self) -> None:
        """Do what there is to do for sockets and timers, without waiting."""
        if self._slirp:
            self._revents = {}
            for fd, ready in self.epoll.poll(0):
                self._revents[fd] = sum(flag for flag, of_epoll in _TO_EPOLL.items() if ready & of_epoll)
            self._library.slirp_pollfds_poll(self._slirp, 0, self._get_revents, None)
            self._fill()

    def forward(self, host: IPv4Address, port: int, to: IPv4Address, to_port: int, *, udp: bool) -> int:
        """Listen on a port of the real machine, 0: any, for `to`, a station of the virtual network.

        Returns the port; 0 where it can't be.
        """
        if not self._slirp:
            return 0
        self._fill()
        before = set(self.events)
        if self._library.slirp_add_hostfwd(self._slirp, udp, _in_addr(host), port, _in_addr(to), to_port):
            return 0
        self._fill()
        if not port:
            (fd,) = self.events.keys() - before
            listening = socket.socket(fileno=fd)
            port = listening.getsockname()[1]
            listening.detach()
        return port

    def unforward(self, host: IPv4Address, port: int, *, udp: bool) -> None:
        """Listen no more; connections that there are stay."""
        if self._slirp:
            self._library.slirp_remove_hostfwd(self._slirp, udp, _in_addr(host), port)
            self._fill()

    # -- called back ---------------------------------------------------------------------------------------------------

    def _on_send(self, data: int, size: int, _opaque: object) -> int:
        self.out.append(ctypes.string_at(data, size))
        return size

    def _on_register(self, fd: int, _opaque: object) -> None:
        self.sockets.add(fd)
        new = socket.socket(fileno=fd)
        if new.type == socket.SOCK_STREAM:
            self.connections.add(fd)
        new.detach()

    def _on_unregister(self, fd: int, _opaque: object) -> None:
        """It is about to be closed, and epoll forgets it with that."""
        self.sockets.discard(fd)
        self.connections.discard(fd)
        if self.events.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def _on_add_poll(self, fd: int, events: int, _opaque: object) -> int:
        self._polled.append(fd)
        self._wanted[fd] = events
        return len(self._polled) - 1

    def _on_get_revents(self, index: int, _opaque: object) -> int:
        return self._revents.get(self._polled[index], 0) if 0 <= index < len(self._polled) else 0

    def _fill(self) -> None:
        """Ask which descriptors to wait for, and for how long."""
        self._polled, self._wanted = [], {}
        timeout = c_uint32(1000)
        self._library.slirp_pollfds_fill(self._slirp, ctypes.byref(timeout), self._add_poll, None)
        self.timeout_ms = timeout.value
        if self._wanted == self.events:
            return
        for fd in self.events.keys() - self._wanted.keys():
            self.epoll.unregister(fd)
        for fd, events in self._wanted.items():
            mask = sum(of_epoll for flag, of_epoll in _TO_EPOLL.items() if events & flag)
            if fd not in self.events:
                self.epoll.register(fd, mask)
            elif events != self.events[fd]:
                self.epoll.modify(fd, mask)
        self.events = self._wanted

"""DHCP (RFC 2131, 2132): messages, and a server that leases the addresses of one subnet.

The codec is our own: of the libraries for it, scapy's is part of a whole tool box for packets, and the small ones have
not been kept for years. A message is a fixed header and a list of options.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

from pvirq.drivers.skb import ETH_P_IP, UDP
from pvirq.net.packets import BROADCAST, IP_BROADCAST, ethernet, ipv4, udp
from pvirq.xen.timer import NS_PER_S

SERVER_PORT, CLIENT_PORT = 67, 68
BOOTREQUEST, BOOTREPLY = 1, 2
DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

PAD, END = 0, 255
SUBNET_MASK, ROUTER, DNS_SERVER, HOST_NAME, DOMAIN_NAME, BROADCAST_ADDRESS = 1, 3, 6, 12, 15, 28
REQUESTED_ADDRESS, LEASE_TIME, OVERLOAD, MESSAGE_TYPE, SERVER_ID = 50, 51, 52, 53, 54
RENEWAL_TIME, REBINDING_TIME, CLIENT_ID = 58, 59, 61

_HEADER: Final = struct.Struct(">BBBBIHH4s4s4s4s16s64s128s4s")
_COOKIE: Final = b"\x63\x82\x53\x63"
_BROADCAST_FLAG: Final = 0x8000
_MIN_SIZE: Final = 300  # of BOOTP: there are clients that take no less
NO_ADDRESS: Final = bytes(4)

LEASE_S: Final = 12 * 3600
OFFER_NS: Final = 60 * NS_PER_S  # for so long an offered address is kept for who hasn't asked for it
DECLINED_NS: Final = 600 * NS_PER_S  # and one that somebody else was found to use isn't given to anybody
MAX_LEASES: Final = 1024
MAX_HOST_NAME: Final = 63


@dataclass(slots=True)
class Message:
    """A DHCP message. Addresses are 4 bytes; `options` has an option's bytes by its number."""

    op: int
    xid: int
    mac: bytes
    ciaddr: bytes = NO_ADDRESS
    yiaddr: bytes = NO_ADDRESS
    siaddr: bytes = NO_ADDRESS
    giaddr: bytes = NO_ADDRESS
    broadcast: bool = False
    options: dict[int, bytes] = field(default_factory=dict)

    def pack(self) -> bytes:
        """As it goes into a datagram. ValueError for an option of more than 255 bytes."""
        options = b"".join(bytes((code, len(data))) + data for code, data in self.options.items())
        header = _HEADER.pack(
            self.op, 1, 6, 0, self.xid, 0, _BROADCAST_FLAG if self.broadcast else 0, self.ciaddr, self.yiaddr,
            self.siaddr, self.giaddr, self.mac, b"", b"", _COOKIE,
        )  # fmt: skip
        return (header + options + bytes((END,))).ljust(_MIN_SIZE, b"\0")

    @property
    def kind(self) -> int:
        """DISCOVER and so on; 0 for a message without one."""
        data = self.options.get(MESSAGE_TYPE, b"")
        return data[0] if len(data) == 1 else 0

    def address(self, option: int) -> bytes | None:
        """An option that is one address."""
        data = self.options.get(option, b"")
        return data if len(data) == 4 else None

    @property
    def client(self) -> bytes:
        """Who asks: its identifier, or its Ethernet address."""
        return self.options.get(CLIENT_ID) or b"\x01" + self.mac

    @property
    def host_name(self) -> str:
        """What the client calls itself, in lower case, where that can be the name of a host; else ""."""
        name = self.options.get(HOST_NAME, b"").rstrip(b"\0").decode("latin-1").lower()
        good = name.isascii() and name.replace("-", "").isalnum() and name[0] != "-"
        return name if good and len(name) <= MAX_HOST_NAME else ""


def parse(data: bytes) -> Message | None:
    """Read a message; None where it is none, or one for other hardware than Ethernet."""
    if len(data) < _HEADER.size:
        return None
    op, htype, hlen, _hops, xid, _secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file, cookie = (
        _HEADER.unpack_from(data)
    )
    if op not in (BOOTREQUEST, BOOTREPLY) or (htype, hlen) != (1, 6) or cookie != _COOKIE:
        return None
    options: dict[int, bytes] = {}
    if not _read_options(data[_HEADER.size :], options):
        return None
    # Options may go on in two fields of the header (option overload).
    overload = options.get(OVERLOAD, b"\0")[:1]
    for bit, more in ((1, file), (2, sname)):
        if overload and overload[0] & bit and not _read_options(more, options):
            return None
    broadcast = bool(flags & _BROADCAST_FLAG)
    return Message(op, xid, chaddr[:6], ciaddr, yiaddr, siaddr, giaddr, broadcast, options)


def _read_options(data: bytes, options: dict[int, bytes]) -> bool:
    """Add the options in `data`; the parts of one that comes several times are joined (RFC 3396)."""
    at = 0
    while at < len(data):
        code = data[at]
        at += 1
        if code == PAD:
            continue
        if code == END:
            return True
        if at >= len(data) or at + 1 + data[at] > len(data):
            return False
        options[code] = options.get(code, b"") + data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
    return True


@dataclass(slots=True)
class Lease:
    """An address that a client has until `until` (virtual ns). `bound` is false while it is but offered."""

    address: IPv4Address
    client: bytes
    mac: bytes
    until: int
    bound: bool = False
    host_name: str = ""


class DhcpServer:
    """Leases the addresses of `interface`'s subnet, itself at that address.

    A client keeps its address while it renews it, and gets it again later if nobody else needed it. Of a large subnet
    the first MAX_LEASES addresses are leased; a client for which none is left gets no answer.
    """

    def __init__(
        self,
        interface: IPv4Interface,
        now: Callable[[], int],
        *,
        router: IPv4Address | None = None,
        dns: IPv4Address | None = None,
        domain: str = "",
        lease_s: int = LEASE_S,
    ) -> None:
        """`now` is the time in ns, `lease_s` the length of a lease in seconds; clients are told the rest."""
        self.interface = interface
        self.router = router
        self.dns = dns
        self.domain = domain
        self.lease_s = lease_s
        self._now = now
        self._leases: dict[bytes, Lease] = {}  # by client
        self._by_address: dict[IPv4Address, Lease] = {}
        self._declined: dict[IPv4Address, int] = {}  # until when
        first, last = int(interface.network.network_address) + 1, int(interface.network.broadcast_address) - 1
        self._pool = range(first, min(last + 1, first + MAX_LEASES))
        self._next = 0  # where in the pool to look next
        self._full_until = 0  # nothing is free before

    @property
    def leases(self) -> list[Lease]:
        """The leases that clients have now."""
        now = self._now()
        return [lease for lease in self._leases.values() if lease.bound and lease.until > now]

    def address_of(self, host_name: str) -> IPv4Address | None:
        """Where the client is that calls itself so; of several, the one that came first."""
        return next((lease.address for lease in self.leases if lease.host_name == host_name), None)

    def name_of(self, address: IPv4Address) -> str:
        """What the client calls itself that has an address; "" where nobody is known."""
        lease = self._by_address.get(address)
        return lease.host_name if lease is not None and lease.bound and lease.until > self._now() else ""

    def respond(self, data: bytes, mac: bytes) -> bytes | None:
        """The frame that answers a datagram to the server's port, from Ethernet address `mac`; None: nothing does."""
        message = parse(data)
        reply = self.answer(message) if message is not None else None
        if message is None or reply is None:
            return None
        # To where the client is; one that has no address yet hears what comes to its Ethernet address (RFC 2131 4.1).
        if message.ciaddr != NO_ADDRESS and reply.kind != NAK:
            to_mac, to = message.mac, message.ciaddr
        elif reply.broadcast:
            to_mac, to = BROADCAST, IP_BROADCAST
        else:
            to_mac, to = message.mac, reply.yiaddr
        ip = self.interface.ip.packed
        return ethernet(to_mac, mac, ETH_P_IP, ipv4(ip, to, UDP, udp(ip, SERVER_PORT, to, CLIENT_PORT, reply.pack())))

    def answer(self, message: Message) -> Message | None:
        """What the server says to a message; None: nothing."""
        if message.op != BOOTREQUEST or message.giaddr != NO_ADDRESS:
            return None  # what relays bring is for other subnets
        kind = message.kind
        if kind == DISCOVER:
            return self._discover(message)
        if kind == REQUEST:
            return self._request(message)
        if kind == INFORM:
            return self._reply(message, ACK, None)
        if kind in (RELEASE, DECLINE) and message.address(SERVER_ID) in (None, self.interface.ip.packed):
            self._give_up(message, declined=kind == DECLINE)
        return None

    # -- messages ------------------------------------------------------------------------------------------------------

    def _discover(self, message: Message) -> Message | None:
        lease = self._leases.get(message.client) or self._allocate(message)
        if lease is None:
            return None
        if not lease.bound or lease.until <= self._now():
            lease.bound, lease.until = False, self._now() + OFFER_NS
        lease.mac = message.mac
        return self._reply(message, OFFER, lease.address)

    def _request(self, message: Message) -> Message | None:
        server = message.address(SERVER_ID)
        lease = self._leases.get(message.client)
        if server not in (None, self.interface.ip.packed):
            if lease is not None and not lease.bound:
                self._drop(lease)  # another server's offer was better
            return None
        wanted = message.address(REQUESTED_ADDRESS) or message.ciaddr
        if lease is None and server is None:
            # A client from before our time. It may have what is free (RFC 2131 4.3.2 lets a server be silent, and
            # the client would wait).
            lease = self._allocate(message, IPv4Address(wanted))
        if lease is None or lease.address.packed != wanted:
            return self._reply(message, NAK, None)
        lease.bound, lease.until, lease.mac = True, self._now() + self.lease_s * NS_PER_S, message.mac
        lease.host_name = message.host_name
        return self._reply(message, ACK, lease.address)

    def _give_up(self, message: Message, *, declined: bool) -> None:
        lease = self._leases.get(message.client)
        address = message.address(REQUESTED_ADDRESS) if declined else message.ciaddr
        if lease is None or lease.address.packed != address:
            return
        self._drop(lease)
        if declined:
            self._declined[lease.address] = self._now() + DECLINED_NS

    def _reply(self, message: Message, kind: int, address: IPv4Address | None) -> Message:
        ip, network = self.interface.ip.packed, self.interface.network
        options = {MESSAGE_TYPE: bytes((kind,)), SERVER_ID: ip}
        reply = Message(BOOTREPLY, message.xid, message.mac, options=options, broadcast=message.broadcast)
        if kind == NAK:
            reply.broadcast = True
            return reply
        if address is not None:
            reply.yiaddr = address.packed
            for option, seconds in (
                (LEASE_TIME, self.lease_s), (RENEWAL_TIME, self.lease_s // 2), (REBINDING_TIME, self.lease_s * 7 // 8),
            ):  # fmt: skip
                options[option] = struct.pack(">I", seconds)
        if kind == ACK:
            reply.ciaddr = message.ciaddr
        options |= {SUBNET_MASK: network.netmask.packed, BROADCAST_ADDRESS: network.broadcast_address.packed}
        for code, server in ((ROUTER, self.router), (DNS_SERVER, self.dns)):
            if server is not None:
                options[code] = server.packed
        if self.domain:
            options[DOMAIN_NAME] = self.domain.encode()
        return reply

    # -- addresses -----------------------------------------------------------------------------------------------------

    def _allocate(self, message: Message, wanted: IPv4Address | None = None) -> Lease | None:
        """Take an address for a client that has none: the one it would like, or the next free one.

        None where there is no such address. With `wanted`, no other will do.
        """
        if wanted is not None:
            address = wanted if self._is_free(wanted) else None
        else:
            requested = message.address(REQUESTED_ADDRESS)
            address = IPv4Address(requested) if requested is not None else None
            if address is None or not self._is_free(address):
                address = self._find_free()
        if address is None:
            return None
        before = self._by_address.get(address)
        if before is not None:
            self._drop(before)
        lease = Lease(address, message.client, message.mac, self._now() + OFFER_NS)
        self._leases[lease.client] = self._by_address[address] = lease
        return lease

    def _is_free(self, address: IPv4Address) -> bool:
        if int(address) not in self._pool or address in (self.interface.ip, self.router, self.dns):
            return False
        if self._declined.get(address, 0) > self._now():
            return False
        lease = self._by_address.get(address)
        return lease is None or lease.until <= self._now()

    def _find_free(self) -> IPv4Address | None:
        pool, now = self._pool, self._now()
        if now < self._full_until:
            return None
        self._declined = {address: until for address, until in self._declined.items() if until > now}
        # Those that nobody has had come first, so that a client which returns finds its own.
        fallback: tuple[int, IPv4Address] | None = None
        for i in range(len(pool)):
            index = (self._next + i) % len(pool)
            address = IPv4Address(pool[index])
            if not self._is_free(address):
                continue
            if address not in self._by_address:
                self._next = index + 1
                return address
            until = self._by_address[address].until
            if fallback is None or until < fallback[0]:
                fallback = until, address
        if fallback is None:
            # A flood of clients must not cost a look at the whole pool each.
            ends = [lease.until for lease in self._leases.values()]
            self._full_until = min([*ends, *self._declined.values()], default=now + OFFER_NS)
            return None
        return fallback[1]

    def _drop(self, lease: Lease) -> None:
        self._full_until = 0
        del self._leases[lease.client]
        del self._by_address[lease.address]

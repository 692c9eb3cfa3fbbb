"""DHCP: the messages on the wire, and who gets which address for how long."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.net import dhcp
from pvirq.net.dhcp import ACK, DECLINE, DISCOVER, INFORM, NAK, OFFER, RELEASE, REQUEST, DhcpServer, Message
from pvirq.xen.timer import NS_PER_S

SERVER = IPv4Address("10.0.0.1").packed


def mac(i: int) -> bytes:
    return b"\x00\x16\x3e" + i.to_bytes(3, "big")


class Net:
    """A server, and clients by number."""

    def __init__(self, interface: str = "10.0.0.1/29", **options: object) -> None:
        self.time = 0
        self.server = DhcpServer(IPv4Interface(interface), lambda: self.time, **options)  # type: ignore[arg-type]

    def say(self, i: int, kind: int, *, ciaddr: str = "0.0.0.0", **options: bytes) -> Message | None:
        names = {name: getattr(dhcp, name.upper()) for name in options}
        message = Message(dhcp.BOOTREQUEST, i, mac(i), IPv4Address(ciaddr).packed)
        message.options = {dhcp.MESSAGE_TYPE: bytes((kind,))} | {names[name]: data for name, data in options.items()}
        parsed = dhcp.parse(message.pack())
        assert parsed == message
        reply = self.server.answer(parsed)
        if reply is not None:
            assert (reply.xid, reply.mac) == (i, mac(i))
            assert dhcp.parse(reply.pack()) == reply
        return reply

    def get(self, i: int, **options: bytes) -> str | None:
        """Discover and request; the address."""
        offer = self.say(i, DISCOVER)
        if offer is None:
            return None
        assert offer.kind == OFFER
        ack = self.say(i, REQUEST, requested_address=offer.yiaddr, server_id=SERVER, **options)
        assert ack is not None
        assert ack.kind == ACK
        return str(IPv4Address(ack.yiaddr))

    def kind(self, reply: Message | None) -> int:
        return reply.kind if reply is not None else 0


def test_leases_until_none_are_left() -> None:
    net = Net()
    addresses = [net.get(i) for i in range(1, 7)]
    assert addresses == [f"10.0.0.{i}" for i in range(2, 7)] + [None]
    assert net.get(3) == "10.0.0.4"  # its own again
    assert [str(lease.address) for lease in net.server.leases] == addresses[:5]
    net.time += dhcp.LEASE_S * NS_PER_S - 1
    assert net.get(9) is None
    net.time += 1
    assert net.server.leases == []
    assert net.get(9) == "10.0.0.2"  # the one that ended first
    assert net.get(3) == "10.0.0.4"


def test_what_an_answer_says() -> None:
    net = Net(
        "10.1.2.3/16", router=IPv4Address("10.1.0.254"), dns=IPv4Address("10.1.2.3"), domain="example", lease_s=600
    )
    offer = net.say(1, DISCOVER)
    assert offer is not None
    assert offer.options == {
        dhcp.MESSAGE_TYPE: b"\2", dhcp.SERVER_ID: bytes((10, 1, 2, 3)), dhcp.LEASE_TIME: (600).to_bytes(4, "big"),
        dhcp.RENEWAL_TIME: (300).to_bytes(4, "big"), dhcp.REBINDING_TIME: (525).to_bytes(4, "big"),
        dhcp.SUBNET_MASK: bytes((255, 255, 0, 0)), dhcp.ROUTER: bytes((10, 1, 0, 254)),
        dhcp.DNS_SERVER: bytes((10, 1, 2, 3)), dhcp.BROADCAST_ADDRESS: bytes((10, 1, 255, 255)),
        dhcp.DOMAIN_NAME: b"example",
    }  # fmt: skip
    inform = net.say(1, INFORM, ciaddr="10.1.0.77")
    assert inform is not None
    assert inform.kind == ACK
    assert inform.yiaddr == bytes(4)
    assert dhcp.LEASE_TIME not in inform.options


def test_an_offer_is_kept_for_a_minute() -> None:
    net = Net("10.0.0.1/30")
    assert net.kind(net.say(1, DISCOVER)) == OFFER
    assert net.say(2, DISCOVER) is None
    net.time += dhcp.OFFER_NS
    assert net.kind(net.say(2, DISCOVER)) == OFFER
    assert net.kind(net.say(2, REQUEST, requested_address=bytes((10, 0, 0, 2)), server_id=SERVER)) == ACK
    assert net.kind(net.say(1, REQUEST, requested_address=bytes((10, 0, 0, 2)), server_id=SERVER)) == NAK


def test_another_server_was_better() -> None:
    net = Net("10.0.0.1/30")
    net.say(1, DISCOVER)
    assert net.say(1, REQUEST, requested_address=bytes((10, 0, 0, 2)), server_id=bytes((10, 0, 0, 3))) is None
    assert net.get(2) == "10.0.0.2"


def test_renewing_and_rebooting() -> None:
    net = Net()
    address = net.get(1)
    assert address is not None
    net.time += 1000 * NS_PER_S
    assert net.kind(net.say(1, REQUEST, ciaddr=address)) == ACK
    assert net.server.leases[0].until == net.time + dhcp.LEASE_S * NS_PER_S
    assert net.kind(net.say(1, REQUEST, requested_address=IPv4Address(address).packed)) == ACK
    # One that knows an address from before our time may have it if it is free.
    assert net.kind(net.say(2, REQUEST, requested_address=bytes((10, 0, 0, 5)))) == ACK
    assert net.kind(net.say(3, REQUEST, requested_address=bytes((10, 0, 0, 5)))) == NAK
    assert net.kind(net.say(3, REQUEST, requested_address=bytes((10, 0, 1, 5)))) == NAK
    assert net.kind(net.say(3, REQUEST, requested_address=SERVER)) == NAK
    assert net.kind(net.say(3, REQUEST)) == NAK


def test_wishes_release_and_decline() -> None:
    net = Net()
    offer = net.say(1, DISCOVER, requested_address=bytes((10, 0, 0, 6)))
    assert offer is not None
    assert offer.yiaddr == bytes((10, 0, 0, 6))
    assert net.get(1) == "10.0.0.6"
    assert net.say(2, RELEASE, ciaddr="10.0.0.6") is None  # somebody else's
    assert len(net.server.leases) == 1
    assert net.say(1, RELEASE, ciaddr="10.0.0.6", server_id=SERVER) is None
    assert net.server.leases == []
    assert net.get(2) == "10.0.0.2"
    assert net.say(2, DECLINE, requested_address=bytes((10, 0, 0, 2)), server_id=SERVER) is None
    assert [net.get(i) for i in (3, 4, 5, 6, 7)] == ["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", None]
    net.time += dhcp.DECLINED_NS
    assert net.get(7) == "10.0.0.2"


@pytest.mark.parametrize(
    ("sent", "name"),
    [(b"Web-1", "web-1"), (b"web\0", "web"), (b"", ""), (b"-x", ""), (b"a.b", ""), (b"\xff", ""), (b"x" * 64, "")],
)
def test_host_names(sent: bytes, name: str) -> None:
    net = Net()
    net.get(1, host_name=sent)
    assert net.server.leases[0].host_name == name
    assert net.server.name_of(IPv4Address("10.0.0.2")) == name
    if name:
        assert net.server.address_of(name) == IPv4Address("10.0.0.2")
        net.get(2, host_name=sent)
        assert net.server.address_of(name) == IPv4Address("10.0.0.2")  # who came first


def test_a_flood_of_clients_fills_a_bounded_table() -> None:
    net = Net("10.0.0.1/8")
    for i in range(dhcp.MAX_LEASES + 500):
        net.say(i, DISCOVER)
    assert len(net.server._leases) == dhcp.MAX_LEASES - 1  # one is its own
    assert net.server.leases == []
    net.time += dhcp.OFFER_NS
    assert net.get(9999) is not None


def test_messages_that_are_none() -> None:
    good = Message(dhcp.BOOTREQUEST, 1, mac(1), options={dhcp.MESSAGE_TYPE: b"\1"}).pack()
    for broken in (b"", good[:239], b"\3" + good[1:], good[:1] + b"\6" + good[2:], good[:236] + b"\0" + good[237:]):
        assert dhcp.parse(broken) is None
    assert dhcp.parse(good[:243] + b"\x32\x09") is None  # an option that goes beyond the end
    assert dhcp.parse(good[:243] + b"\x32") is None
    relayed = dhcp.parse(good)
    assert relayed is not None
    relayed.giaddr = SERVER
    assert Net().server.answer(relayed) is None
    relayed.giaddr, relayed.op = bytes(4), dhcp.BOOTREPLY
    assert Net().server.answer(relayed) is None


def test_options_in_the_header_and_in_parts() -> None:
    good = bytearray(Message(dhcp.BOOTREQUEST, 1, mac(1), options={}).pack())
    good[240:] = bytes((dhcp.OVERLOAD, 1, 3, 12, 1)) + b"a" + bytes((12, 1)) + b"b" + b"\xff"
    good[108 : 108 + 4] = bytes((12, 1)) + b"c\xff"  # file
    good[44 : 44 + 4] = bytes((53, 1, 1)) + b"\xff"  # sname
    message = dhcp.parse(bytes(good))
    assert message is not None
    assert (message.host_name, message.kind) == ("abc", DISCOVER)


@given(st.binary(max_size=100), st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=20)), max_size=8))
def test_any_options(tail: bytes, options: list[tuple[int, bytes]]) -> None:
    good = Message(dhcp.BOOTREQUEST, 1, mac(1), options={}).pack()[:240]
    data = good + b"".join(bytes((code, len(value))) + value for code, value in options) + tail
    message = dhcp.parse(data)
    if message is not None:
        server = Net().server
        for kind in range(1, 10):
            message.options[dhcp.MESSAGE_TYPE] = bytes((kind,))
            reply = server.answer(message)
            assert reply is None or dhcp.parse(reply.pack()) == reply

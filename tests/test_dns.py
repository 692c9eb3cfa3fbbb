"""The DNS server: records that are there, ones that aren't, and queries that are none."""

from __future__ import annotations

from ipaddress import IPv4Address

import dns.message
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.net.dns import answer

NAMES = {"web": IPv4Address("10.0.0.80"), "db.example": IPv4Address("10.0.0.81")}


def reverse(address: IPv4Address) -> str:
    return next((name for name, of in NAMES.items() if of == address), "")


def ask(name: str, kind: str = "A", klass: str = "IN") -> dns.message.Message:
    query = dns.message.make_query(name, kind, klass)
    reply = answer(query.to_wire(), NAMES.get, reverse)
    assert reply is not None
    response = dns.message.from_wire(reply)
    assert query.is_response(response)
    return response


@pytest.mark.parametrize(
    ("name", "kind", "records"),
    [
        ("web.", "A", ["10.0.0.80"]),
        ("WeB.", "A", ["10.0.0.80"]),
        ("db.example.", "A", ["10.0.0.81"]),
        ("web.", "ANY", ["10.0.0.80"]),
        ("web.", "AAAA", []),
        ("80.0.0.10.in-addr.arpa.", "PTR", ["web."]),
        ("81.0.0.10.IN-ADDR.arpa.", "PTR", ["db.example."]),
        ("80.0.0.10.in-addr.arpa.", "A", []),
    ],
)
def test_what_is_there(name: str, kind: str, records: list[str]) -> None:
    response = ask(name, kind)
    assert response.rcode() == dns.rcode.NOERROR
    assert [str(record) for rrset in response.answer for record in rrset] == records


@pytest.mark.parametrize("name", ["nobody.", "example.", "82.0.0.10.in-addr.arpa.", "0.0.10.in-addr.arpa.", "."])
def test_what_is_not(name: str) -> None:
    response = ask(name, "PTR" if "arpa" in name else "A")
    assert (response.rcode(), response.answer) == (dns.rcode.NXDOMAIN, [])
    assert ask("web.", klass="CH").rcode() == dns.rcode.NXDOMAIN


def test_queries_of_other_kinds() -> None:
    query = dns.message.make_query("web.", "A")
    query.set_opcode(dns.opcode.NOTIFY)
    reply = answer(query.to_wire(), NAMES.get, reverse)
    assert reply is not None
    assert dns.message.from_wire(reply).rcode() == dns.rcode.NOTIMP
    response = dns.message.make_response(dns.message.make_query("web.", "A"))
    assert answer(response.to_wire(), NAMES.get, reverse) is None  # nobody answers an answer
    assert answer(bytes(600), NAMES.get, reverse) is None


@given(st.binary(max_size=120))
def test_any_bytes(data: bytes) -> None:
    answer(data, NAMES.get, reverse)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 255)), max_size=6), st.integers(0, 45))
def test_queries_with_errors_in_them(changes: list[tuple[int, int]], length: int) -> None:
    query = bytearray(dns.message.make_query("web.example.", "A", use_edns=0).to_wire())
    for at, value in changes:
        query[at % len(query)] = value
    answer(bytes(query[:length] if length % 2 else query), NAMES.get, reverse)

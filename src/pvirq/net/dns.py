"""A DNS server for a table of names (RFC 1035), on dnspython."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Final

PORT: Final = 53
TTL: Final = 60
MAX_QUERY: Final = 512

Lookup = Callable[[str], IPv4Address | None]
Reverse = Callable[[IPv4Address], str]


def answer(query: bytes, lookup: Lookup, reverse: Reverse) -> bytes | None:
    """The response to a query, None where there is nothing to respond to.

    `lookup` finds the address of a name (lower case, no dot at its end), `reverse` the name of an address or "".
    There are A and PTR records; a name that isn't there is NXDOMAIN, and nobody else is asked.
    """
    import dns.exception
    import dns.flags
    import dns.message
    import dns.opcode
    import dns.rcode
    import dns.rdataclass
    import dns.rdatatype
    import dns.rrset

    if len(query) > MAX_QUERY:
        return None
    try:
        message = dns.message.from_wire(query)
        if message.flags & dns.flags.QR:
            return None
        response = dns.message.make_response(message, recursion_available=True)
        if message.opcode() != dns.opcode.QUERY:
            response.set_rcode(dns.rcode.NOTIMP)
            return response.to_wire()
        if len(message.question) != 1:
            response.set_rcode(dns.rcode.FORMERR)
            return response.to_wire()
        (question,) = message.question
        response.flags |= dns.flags.AA
        name, kind = question.name.to_text(omit_final_dot=True).lower(), question.rdtype
        record: tuple[dns.rdatatype.RdataType, str] | None = None
        if question.rdclass not in (dns.rdataclass.IN, dns.rdataclass.ANY):
            known = False
        elif (address := _reversed(name)) is not None:
            target = reverse(address)
            known = bool(target)
            record = (dns.rdatatype.PTR, f"{target}.") if target else None
        else:
            found = lookup(name)
            known = found is not None
            record = (dns.rdatatype.A, str(found)) if known else None
        if record is not None and kind in (record[0], dns.rdatatype.ANY):
            response.answer.append(dns.rrset.from_text(question.name, TTL, dns.rdataclass.IN, *record))
        if not known:
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response.to_wire()
    except (dns.exception.DNSException, ValueError):
        # What can't be read, or what it asks for can't be written.
        return None


def _reversed(name: str) -> IPv4Address | None:
    """The address that a name such as 1.0.0.10.in-addr.arpa stands for."""
    if not name.endswith(".in-addr.arpa"):
        return None
    try:
        return IPv4Address(".".join(reversed(name.removesuffix(".in-addr.arpa").split("."))))
    except ValueError:
        return None

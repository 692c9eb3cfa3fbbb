"""Event channels against what real Xen 4.17 printed."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from evfuzz_model import EvFuzz, EvFuzzDeep
from pvirq.abi.event_channel import EVTCHN_FIFO_LINKED, EVTCHN_FIFO_MASKED, EVTCHN_FIFO_PENDING
from pvirq.xen import evtchn, sched
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.evtchn_views import debug_e, lsevtchn
from pvirq.xen.memory import Machine

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("path", sorted((DATA / "evfuzz").glob("*.gz")), ids=lambda path: path.name[:-7])
def test_transcript_is_that_of_real_xen(path: Path) -> None:
    want = gzip.decompress(path.read_bytes()).decode()
    match = re.match(r"evfuzz seed=(\d+) ops=(\d+) (fifo=(\d)|deep)\n", want)
    assert match
    seed, ops = int(match[1]), int(match[2])
    model = EvFuzzDeep(seed, ops) if match[3] == "deep" else EvFuzz(seed, ops, match[4] == "1")
    # Line by line, so that a failure shows the first operation that differs.
    for got_line, want_line in zip(model.run().split("\n"), want.split("\n"), strict=True):
        assert got_line == want_line


class AnyPirq:
    """Physical IRQs that never refuse, with the numbers that the recorded host gave their lines."""

    nr_pirqs = 416

    def access_permitted(self, pirq: int) -> bool:
        return True

    def port_of(self, pirq: int) -> int:
        return 0

    def bind(self, pirq: int, port: int, vcpu: Vcpu, will_share: bool) -> None: ...

    def bound(self, pirq: int) -> None: ...

    def unbind(self, pirq: int) -> None: ...

    def set_affinity(self, pirq: int, vcpu: Vcpu) -> None: ...

    def irq(self, pirq: int) -> int:
        return pirq if pirq < 24 else 24 + 415 - pirq


ROW = re.compile(
    r"\(XEN\) +(?P<port>\d+) \[(?P<p>\d)/(?P<m>\d)/. (?P<link>\S+) +\]: s=(?P<s>\d) n=(?P<n>\d) x=0"
    r"(?: d=(?P<d>\d+))?(?: p=(?P<rport>\d+))?(?: i=\d+)?(?: v=(?P<v>\d+))?"
)


def rebuild(dump: str) -> Hypervisor:
    """The recorded host's two domains, their ports bound in the recorded order by the public operations."""
    hypervisor = Hypervisor(Machine(64 << 20))
    sections = dump.split("Event channel information for domain ")[1:]
    rows = {int(text[0]): [match.groupdict() for match in ROW.finditer(text)] for text in sections}
    words = {}
    for domid in rows:
        domain = hypervisor.create_domain(domid, privileged=domid == 0, vcpus=2)
        domain.evtchn.pirqs = AnyPirq()
        words[domid] = use_fifo(domain)
    ends = [(domid, row) for domid in rows for row in rows[domid] if row["s"] in "23"]
    # The domain builder's two ports and the guest's devices come first in the guest, then their other ends.
    for domid in sorted(rows, reverse=True):
        domain = hypervisor.domains[domid]
        for row in rows[domid]:
            port, vcpu, kind = int(row["port"]), int(row["n"]), row["s"]
            if kind == "5":
                got = evtchn.bind_virq(domain, int(row["v"]), vcpu if row["v"] == "0" else 0)
            elif kind == "6":
                got = evtchn.bind_ipi(domain, vcpu)
            elif kind == "4":
                got = evtchn.bind_pirq(domain, int(row["rport"]), 0)
            elif kind == "2" or domid == 1 or (domid == int(row["d"]) and port < int(row["rport"])):
                got = evtchn.alloc_unbound(domain, domid, int(row["d"]))
            else:
                got = evtchn.bind_interdomain(domain, int(row["d"]), int(row["rport"]))
            assert got == port
            if kind != "6" and row["v"] != "0":
                evtchn.bind_vcpu(domain, port, vcpu)
    assert ends
    u32 = hypervisor.machine.u32
    for domid, domain_rows in rows.items():
        for row in domain_rows:
            word = int(row["p"]) << EVTCHN_FIFO_PENDING | int(row["m"]) << EVTCHN_FIFO_MASKED
            if row["link"] != "-":
                word |= 1 << EVTCHN_FIFO_LINKED | int(row["link"])
            u32[words[domid] + int(row["port"])] = word
    return hypervisor


def use_fifo(domain: Domain) -> int:
    """Switch to FIFO with one array page; the index of its words in Machine.u32."""
    machine = domain.machine
    control, array = machine.alloc(1, domain.domid), machine.alloc(1, domain.domid)
    evtchn.init_control(domain, control, 0, 0)
    evtchn.expand_array(domain, array)
    return array << 10


def test_views_print_as_the_real_tools() -> None:
    dump = (DATA / "evtchn_views/debug-e").read_text()
    hypervisor = rebuild(dump)
    assert debug_e(hypervisor) == dump
    for domid in (0, 1):
        assert lsevtchn(hypervisor.domains[domid]) == (DATA / f"evtchn_views/lsevtchn-{domid}").read_text()


def test_views_of_two_level_xen_bound_and_polling() -> None:
    hypervisor = Hypervisor(Machine(16 << 20))
    domain = hypervisor.create_domain(3, vcpus=4)
    evtchn.bind_ipi(domain, 1)
    evtchn.alloc_unbound_xen_event_channel(domain, 2, 0, lambda vcpu, port: None)
    evtchn.send(domain, 1)
    for vcpu in (0, 1, 3):
        sched.do_poll(domain.vcpus[vcpu], [], 0)
    assert debug_e(hypervisor).splitlines() == [
        "(XEN) 'e' pressed -> dumping event-channel info",
        "(XEN) Event channel information for domain 3:",
        "(XEN) Polling vCPUs: {0-1,3}",
        "(XEN)     port [p/m/s]",
        "(XEN)        1 [1/0/1]: s=6 n=1 x=0",
        "(XEN)        2 [0/1/0]: s=2 n=2 x=1 d=0",
    ]
    assert lsevtchn(domain) == "   1: VCPU 1: IPI\n"

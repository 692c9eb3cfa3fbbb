"""Events that get lost, come late, twice, in another order or from nobody: which are meant, what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import pvirq
from faultlib import MS, bare, do, elapsed, new_host, pair, run_for, take, watching
from pvirq.abi.xen import VIRQ_DEBUG, VIRQ_TIMER
from pvirq.drivers.blockstore import MemoryStore
from pvirq.lab.faults import Faults
from pvirq.modelled import ModelledGuest
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain
from pvirq.xen.probes import has_front


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with new_host() as host:
        yield host


@pytest.fixture
def faults(host: pvirq.Host) -> Iterator[Faults]:
    with Faults(host) as faults:
        yield faults


@pytest.fixture
def domain(host: pvirq.Host) -> Domain:
    return bare(host)


@pytest.fixture
def guest(host: pvirq.Host) -> ModelledGuest:
    guest = host.model("pvops", vcpus=2)
    host.attach_disk(guest, "xvda", MemoryStore(1024, b"memory"))
    host.add_bridge()
    host.attach_nic(guest)
    host.run(lambda: guest.has_disk("xvda") and guest.has_nic(0), 10**10)
    host.settle()
    return guest


class Ends:
    """Channels of a bare domain to domain 0: `send(i)` makes domain 0 send by the i-th, `ports` are the domain's."""

    def __init__(self, host: pvirq.Host, domain: Domain, count: int) -> None:
        self.dom0 = host.dom0.domain
        pairs = [pair(domain, self.dom0) for _ in range(count)]
        self.ports, self.theirs = [ours for ours, _ in pairs], [theirs for _, theirs in pairs]

    def send(self, *which: int) -> None:
        for i in which:
            evtchn.send(self.dom0, self.theirs[i])


# -- what becomes of events --------------------------------------------------------------------------------------------


def test_nothing_is_at_the_door_without_a_rule(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    with faults.lose(domain=7):
        assert has_front(domain.evtchn.ops, "set_pending")
        late = bare(host)  # and where a domain comes only now
        assert has_front(late.evtchn.ops, "set_pending")
    assert not has_front(domain.evtchn.ops, "set_pending")
    assert not has_front(late.evtchn.ops, "set_pending")


def test_lose(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 2)
    with watching(host) as seen, faults.lose(port=ends.ports[0], domain=domain.domid) as rule:
        ends.send(0, 1)
        assert take(domain) == [ends.ports[1]]
        assert (rule.fired, rule.seen) == (1, 1)
        assert seen.events == [(domain.domid, ends.ports[1], "pending")]
        fields = {"d": domain.domid, "v": 0, "p": ends.ports[0]}
        assert seen.notes == [{"rule": str(rule), "action": "lost"} | fields]
        (firing,) = faults.firings
        assert (firing.when, firing.rule, firing.action, firing.fields) == (host.clock.now(), str(rule), "lost", fields)
    ends.send(0)
    assert take(domain) == [ends.ports[0]]


def test_delay(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 2)
    rule = faults.delay(2 * MS, port=ends.ports[0])
    ends.send(0, 1)
    assert take(domain) == [ends.ports[1]]
    run_for(host, 2 * MS - 1)
    assert take(domain) == []
    run_for(host, 1)
    assert take(domain) == [ends.ports[0]]
    assert (rule.fired, rule.released, rule.held) == (1, 1, [])
    assert [firing.action for firing in faults.firings] == ["delayed", "raised"]
    # What is held comes when the rule goes.
    ends.send(0)
    assert take(domain) == []
    rule.remove()
    assert take(domain) == [ends.ports[0]]
    run_for(host, 5 * MS)
    assert take(domain) == []


def test_delay_with_jitter(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 1)
    faults.delay(MS, jitter=MS, port=ends.ports[0])
    waits = []
    for _ in range(20):
        ends.send(0)
        waits.append(elapsed(host, lambda: host.run(lambda: bool(take(domain)), 10 * MS)))
    assert all(MS <= wait <= 2 * MS for wait in waits)
    assert len(set(waits)) > 10
    assert waits == [firing.fields["ns"] for firing in faults.firings if firing.action == "delayed"]


def test_duplicate_after_a_time(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 1)
    rule = faults.duplicate(MS, port=ends.ports[0], count=1)
    ends.send(0)
    assert take(domain) == ends.ports
    run_for(host, MS)
    assert take(domain) == ends.ports
    run_for(host, 10 * MS)
    assert take(domain) == []
    assert (rule.fired, rule.released) == (1, 1)


def test_duplicate_as_soon_as_it_is_taken(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 1)
    with watching(host) as seen:
        faults.duplicate(port=ends.ports[0], count=1)
        ends.send(0)
        run_for(host, 50 * MS)
        assert [outcome for _, _, outcome in seen.events] == ["pending"]
        assert take(domain) == ends.ports
        run_for(host, 100 * MS)
        assert take(domain) == ends.ports
        assert [outcome for _, _, outcome in seen.events] == ["pending", "pending"]
        # One that nobody takes comes at last, and is the same.
        faults.duplicate(port=ends.ports[0], count=1)
        ends.send(0)
        run_for(host, 3000 * MS)
        assert [outcome for _, _, outcome in seen.events][2:] == ["pending", "coalesced"]


def test_reorder(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 3)
    rule = faults.reorder(3, within=MS, domain=domain.domid)
    with watching(host) as seen:
        ends.send(0, 1, 0)
        assert not seen.events
        assert (len(rule.held), rule.merged) == (2, 1)
        ends.send(2)
        assert [port for _, port, _ in seen.events] == [ends.ports[2], ends.ports[1], ends.ports[0]]
        # Fewer than that don't wait for ever.
        take(domain)
        ends.send(0, 1)
        run_for(host, MS - 1)
        assert take(domain) == []
        run_for(host, 1)
        assert [port for _, port, _ in seen.events][3:] == [ends.ports[1], ends.ports[0]]
        ends.send(2)
        rule.remove()
        assert ends.ports[2] in take(domain)


def test_storm(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 2)
    with watching(host) as seen:
        rule = faults.storm(100, interval=MS, port=ends.ports[0], domain=domain.domid, after=1)
        run_for(host, 999 * MS)
        assert not seen.events
        run_for(host, 11 * MS)
        assert (rule.fired, rule.rounds) == (11, 1)
        assert {port for _, port, _ in seen.events} == {ends.ports[0]}
        assert [outcome for _, _, outcome in seen.events] == ["pending"] + 10 * ["coalesced"]
        run_for(host, 1000 * MS)
        assert rule.fired == 100
        # Nobody at that port any more, and another one who has it.
        rule = faults.storm(100, interval=MS, port=ends.ports[0], domain=domain.domid)
        evtchn.close(domain, ends.ports[0])
        again, _ = pair(domain, host.dom0.domain)
        assert again == ends.ports[0]
        run_for(host, 1000 * MS)
        assert rule.fired == 1
        assert take(domain) == []


def test_a_storm_can_be_stopped_and_come_again(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 1)
    with faults.storm(1000, interval=MS, port=ends.ports[0], domain=domain.domid) as rule:
        run_for(host, 9 * MS + 1)
    assert rule.fired == 10
    run_for(host, 100 * MS)
    assert rule.fired == 10
    rule = faults.storm(3, interval=MS, port=ends.ports[0], domain=domain.domid, period=0.1, count=4)
    run_for(host, 1000 * MS)
    assert (rule.fired, rule.rounds) == (12, 4)


def test_spurious(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 2)
    assert faults.spurious(port=ends.ports[1], domain=domain.domid).fired == 1
    assert take(domain) == [ends.ports[1]]
    assert faults.spurious(domain=domain.domid).fired == 2
    assert take(domain) == ends.ports
    # An unbound port has nobody whose event it could be.
    evtchn.close(host.dom0.domain, ends.theirs[0])
    assert faults.spurious(domain=domain.domid).fired == 1


@pytest.mark.parametrize("fifo", [False, True])
def test_stuck_mask(host: pvirq.Host, faults: Faults, domain: Domain, fifo: bool) -> None:
    if fifo:
        control, array = domain.machine.alloc(1, domain.domid), domain.machine.alloc(1, domain.domid)
        evtchn.init_control(domain, control, 0, 0)
        evtchn.expand_array(domain, array)
    ends = Ends(host, domain, 2)
    port, other = ends.ports
    masked = domain.evtchn.is_masked
    with watching(host) as seen, faults.stuck_mask(port=port, domain=domain.domid, after=0.01) as rule:
        run_for(host, 9 * MS)
        assert not masked(port)
        run_for(host, 2 * MS)
        assert masked(port)
        assert not masked(other)
        assert rule.fired == 1
        ends.send(0)
        evtchn.unmask(domain, port)
        assert not masked(port)
        run_for(host, 2 * MS)
        assert masked(port)
        evtchn.unmask(domain, port)
        ends.send(0)  # each event looks as well
        assert masked(port)
        assert seen.events[-1] == (domain.domid, port, "coalesced")
    assert not masked(port)
    assert domain.evtchn.is_pending(port)


def test_stuck_mask_of_what_is_closed_or_over(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 2)
    rule = faults.stuck_mask(domain=domain.domid, until=0.1)
    run_for(host, 10 * MS)
    assert rule.fired == 2
    evtchn.close(domain, ends.ports[0])
    run_for(host, 200 * MS)
    assert not rule.active
    assert not domain.evtchn.is_masked(ends.ports[1])


def test_the_first_rule_that_fires_decides(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 1)
    first = faults.lose(port=ends.ports[0], skip=1, count=1)
    second = faults.delay(MS, port=ends.ports[0])
    ends.send(0)
    assert (first.fired, second.fired) == (0, 1)
    ends.send(0)
    assert (first.fired, second.fired, second.seen) == (1, 1, 1)
    run_for(host, MS)
    assert take(domain) == ends.ports  # and what was held isn't asked again


# -- events that are held while their world changes --------------------------------------------------------------------


def test_a_held_event_is_not_another_channels(host: pvirq.Host, faults: Faults, domain: Domain) -> None:
    ends = Ends(host, domain, 2)
    rules = [faults.delay(MS, port=ends.ports[0], count=1), faults.reorder(port=ends.ports[1], within=MS, count=1)]
    ends.send(0, 1)
    for port in ends.ports:
        evtchn.close(domain, port)
    again = [pair(domain, host.dom0.domain)[0] for _ in ends.ports]
    assert again == ends.ports
    run_for(host, 10 * MS)
    assert take(domain) == []
    assert [rule.dropped for rule in rules] == [1, 1]


def test_a_held_event_follows_its_port_to_another_vcpu(host: pvirq.Host, faults: Faults) -> None:
    domain = bare(host, vcpus=2)
    ends = Ends(host, domain, 1)
    faults.delay(MS, port=ends.ports[0])
    ends.send(0)
    evtchn.bind_vcpu(domain, ends.ports[0], 1)
    run_for(host, MS)
    assert [domain.machine.mem[vcpu.info] for vcpu in domain.vcpus] == [0, 1]


@pytest.mark.parametrize("end", ["reset", "destroy", "fifo", "peer"])
def test_a_held_event_when_its_domain_changes(host: pvirq.Host, faults: Faults, domain: Domain, end: str) -> None:
    ends = Ends(host, domain, 2)
    rule = faults.delay(MS, domain=domain.domid, direction="both")
    ends.send(0, 1)
    evtchn.send(domain, ends.ports[0])
    assert len(rule.held) == 3
    if end == "reset":
        evtchn.reset(domain, domain.domid)
    elif end == "destroy":
        host.hypervisor.destroy_domain(domain)
    elif end == "fifo":
        evtchn.init_control(domain, domain.machine.alloc(1, domain.domid), 0, 0)
        evtchn.expand_array(domain, domain.machine.alloc(1, domain.domid))
    else:  # its sender goes: the event has been sent
        evtchn.close(host.dom0.domain, ends.theirs[0])
    run_for(host, 10 * MS)
    assert not rule.held
    assert (rule.released, rule.dropped) == {"reset": (1, 2), "destroy": (1, 2), "fifo": (3, 0), "peer": (2, 1)}[end]
    if end == "fifo":
        assert all(domain.evtchn.is_pending(port) for port in ends.ports)


# -- which events ------------------------------------------------------------------------------------------------------


def who(faults: Faults, rule: str) -> set[tuple[int, int]]:
    """The ends to which events come that a rule is about, as (domid, port): found with a spurious one to each."""
    before = len(faults.firings)
    faults.rule(f"spurious {rule}").remove()
    return {(firing.fields["d"], firing.fields["p"]) for firing in list(faults.firings)[before:]}


def test_selectors(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    domain = guest.domain
    front = {
        device: {channel.port for channel in domain.evtchn if faults._names.device(domain, channel) == device}
        for device in ("vbd-51712", "vif-0", "console", "xenstore")
    }
    back = {
        device: {domain.evtchn.channels[port].remote_port for port in ports} for device, ports in front.items()
    }  # fmt: skip
    # Two queues, each with a channel for a disk and with two for an interface.
    assert {device: len(ports) for device, ports in front.items()} == {
        "vbd-51712": 2, "vif-0": 4, "console": 1, "xenstore": 1
    }  # fmt: skip
    here, there = domain.domid, 0
    for device, ports in front.items():
        ours, theirs = {(here, port) for port in ports}, {(there, port) for port in back[device]}
        assert who(faults, f"device={device}") == ours
        assert who(faults, f"device={device} direction=out") == theirs
        assert who(faults, f"device={device} direction=both") == ours | theirs
    assert who(faults, "irq=blkif") == {(here, port) for port in front["vbd-51712"]}
    assert who(faults, "irq=blkif-backend domain=0") == {(there, port) for port in back["vbd-51712"]}
    assert who(faults, "irq=vif1.0-q?-tx direction=both") <= who(faults, "device=vif-0 direction=both")
    assert len(who(faults, "irq=vif1.0-q?-tx direction=both")) == 4
    assert len(who(faults, "irq=*-q1-rx")) == 2  # of both ends
    assert len(who(faults, f"irq=*-q1-rx domain={guest.name}")) == 1
    assert len(who(faults, "irq=*-q1-rx domain=Domain-0")) == 1
    assert who(faults, "irq=blkif domain=0") == set()
    assert who(faults, "port=1 domain=1") == {(1, 1)} == who(faults, "device=xenstore")
    timers = {(here, vcpu.virq_to_evtchn[VIRQ_TIMER]) for vcpu in domain.vcpus}
    assert who(faults, "kind=timer domain=1") == timers == who(faults, "irq=timer* domain=1")
    assert len(who(faults, "kind=timer domain=1 vcpu=1")) == 1
    assert timers <= who(faults, "kind=virq domain=1")
    assert len(who(faults, "kind=ipi domain=1 vcpu=0")) == len(who(faults, "kind=ipi domain=1 vcpu=1")) > 0
    assert who(faults, "kind=ipi domain=1") == who(faults, "kind=ipi domain=1 direction=out")
    assert who(faults, "kind=interdomain domain=1") == {(here, port) for ports in front.values() for port in ports}
    assert who(faults, "kind=pirq domain=1") == set()
    host.settle()
    assert do(guest, guest.disk("xvda").read(0, 1))[:6] == b"memory"


def test_a_physical_interrupt() -> None:
    with pvirq.Host(hardware="writeup", machine_memory=1 << 28) as host, Faults(host) as faults:
        assert len(who(faults, "irq=ata_piix kind=pirq")) > 0
        guest = host.model("pvops")
        host.attach_disk(guest, "xvda", "/dev/ata1")
        host.run(lambda: guest.has_disk("xvda"), 10**10)
        plain = elapsed(host, lambda: do(guest, guest.disk("xvda").read(0, 8)))
        with faults.delay(7 * MS, irq="ata_piix", domain=0, count=1) as rule:
            assert elapsed(host, lambda: do(guest, guest.disk("xvda").read(0, 8))) >= plain + 7 * MS
        assert rule.fired == 1


@pytest.mark.parametrize("kernel", ["2.6.18", "suse", "pvops", "pvops-2l"])
def test_each_kernel_has_its_rows(host: pvirq.Host, faults: Faults, kernel: str) -> None:
    guest = host.model(kernel, vcpus=2)
    host.settle()
    for pattern in ("timer*", "resched*", "callfunc*"):
        found = who(faults, f"irq={pattern} domain={guest.domain.domid}")
        assert len(found) >= 2, pattern
    debug = {(guest.domain.domid, vcpu.virq_to_evtchn[VIRQ_DEBUG]) for vcpu in guest.domain.vcpus} - {(1, 0)}
    assert who(faults, "kind=debug domain=1") == debug


def test_a_device_is_found_again_under_another_port(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    """What is remembered of a port isn't believed of the next device that has it."""
    assert who(faults, "device=vbd-51712")
    gone = host.detach_disk(guest, "xvda")
    host.run(lambda: gone.done)
    host.settle()
    assert who(faults, "device=vbd-51712") == set()
    host.attach_disk(guest, "xvdb", MemoryStore(1024, b"second"))
    host.run(lambda: guest.has_disk("xvdb"), 10**10)
    assert who(faults, "device=vbd-51712") == set()
    assert len(who(faults, "device=vbd-51728")) == 2


# -- what a guest makes of it ------------------------------------------------------------------------------------------


def test_one_lost_response_stops_a_ring(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    """The frontend wants to be told of the answer behind the last that it has seen (rsp_event), and was: of the next
    ones the backend needn't tell. Only an event that comes for another reason makes it look."""
    disk = guest.disk("xvda")
    rule = faults.lose(domain=guest, irq="blkif", count=1)
    first = guest.kernel.spawn("first", disk.read(0, 8), 0)
    assert not host.run(lambda: first.done, 5 * 10**9)
    assert rule.fired == 1
    second = guest.kernel.spawn("second", disk.read(8, 8), 0)
    assert not host.run(lambda: second.done, 5 * 10**9)
    assert (rule.fired, rule.seen) == (1, 1)
    other = guest.kernel.spawn("other", disk.read(16, 8), 1)  # the other CPU has a ring of its own
    assert host.run(lambda: other.done, 5 * 10**9)
    faults.spurious(domain=guest, irq="blkif")
    assert host.run(lambda: first.done and second.done, 10**9)
    assert first.result()[:6] == b"memory"


def test_a_lost_request_waits_too(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    with faults.lose(device="vbd-51712", direction="out", count=1) as rule:
        reading = guest.kernel.spawn("first", guest.disk("xvda").read(0, 8))
        assert not host.run(lambda: reading.done, 5 * 10**9)
        assert rule.fired == 1
    faults.spurious(domain=0, irq="blkif-backend")
    assert host.run(lambda: reading.done, 10**9)


def test_a_guest_takes_spurious_and_double_events(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    faults.duplicate(domain=guest, direction="both")
    faults.storm(200, interval=50_000, domain=guest, direction="both")
    for i in range(50):
        assert len(do(guest, guest.disk("xvda").read(i, 8))) == 4096
    events = guest.kernel.events.irq  # its rows have counted more than there were answers
    assert sum(sum(desc.kstat) for desc in events.descs.values()) > 200

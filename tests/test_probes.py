"""Instruments and filters: what they are told, in which order, and that nothing of them stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from evtchnlib import GuestSide
from pvirq.host import Host
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.modelled import ModelledGuest
from pvirq.xen import evtchn, physdev
from pvirq.xen.domain import Domain, Hypervisor, Vcpu
from pvirq.xen.evtchn_channels import Channel
from pvirq.xen.memory import Machine
from pvirq.xen.probes import HOOKS, Instrument, Record, has_front

KERNELS = ("pvops", "pvops-2l", "2.6.18", "suse")


class Everything(Instrument):
    """Keeps each record."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def hooks(self) -> dict[str, Any]:
        return dict.fromkeys(HOOKS, self.records.append)

    def names(self) -> list[str]:
        return [record[0] for record in self.records]


class Outcomes(Instrument):
    """Only of what is raised."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, str]] = []

    def raised(self, vcpu: Vcpu, channel: Channel, outcome: str) -> None:
        self.seen.append((vcpu.domain.domid, channel.port, outcome))


@pytest.fixture
def hypervisor() -> Iterator[Hypervisor]:
    hypervisor = Hypervisor(Machine(64 << 20))
    yield hypervisor
    hypervisor.machine.close()


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def pair(hypervisor: Hypervisor) -> tuple[Domain, Domain, int, int]:
    """Two domains with a channel: their ports."""
    sender, receiver = hypervisor.create_domain(), hypervisor.create_domain()
    port = evtchn.alloc_unbound(receiver, receiver.domid, sender.domid)
    return sender, receiver, evtchn.bind_interdomain(sender, receiver.domid, port), port


# -- what becomes of an event ------------------------------------------------------------------------------------------


def test_outcomes_of_the_two_level_abi(hypervisor: Hypervisor) -> None:
    sender, receiver, own, port = pair(hypervisor)
    guest, outcomes = GuestSide(receiver), Outcomes()
    hypervisor.probes.add(outcomes)
    evtchn.send(sender, own)
    evtchn.send(sender, own)
    assert [outcome for *_, outcome in outcomes.seen] == ["pending", "coalesced"]
    receiver.evtchn.ops.clear_pending(receiver.evtchn.port(port))
    guest.mask(port)
    evtchn.send(sender, own)
    assert outcomes.seen[-1] == (receiver.domid, port, "masked")


def test_outcomes_of_the_fifo_abi(hypervisor: Hypervisor) -> None:
    sender, receiver, own, port = pair(hypervisor)
    guest, outcomes = GuestSide(receiver), Outcomes()
    guest.init_control(0)
    hypervisor.probes.add(outcomes)
    evtchn.send(sender, own)  # no page with its event word yet
    guest.expand_array()
    assert receiver.evtchn.is_pending(port)
    evtchn.send(sender, own)
    receiver.evtchn.ops.clear_pending(receiver.evtchn.port(port))
    guest.mask(port)
    evtchn.send(sender, own)
    evtchn.unmask(receiver, port)  # what is linked now was raised before
    assert [outcome for *_, outcome in outcomes.seen] == ["waiting", "coalesced", "masked"]


def test_lost_where_a_vcpu_has_no_control_block(hypervisor: Hypervisor) -> None:
    receiver = hypervisor.create_domain(vcpus=2)
    guest, outcomes = GuestSide(receiver), Outcomes()
    guest.init_control(0)
    guest.expand_array()
    port = evtchn.bind_ipi(receiver, 1)
    hypervisor.probes.add(outcomes)
    evtchn.send(receiver, port)
    assert outcomes.seen == [(receiver.domid, port, "lost")]


# -- filters -----------------------------------------------------------------------------------------------------------


def test_a_filter_takes_events_and_raises_them_later(hypervisor: Hypervisor) -> None:
    sender, receiver, own, port = pair(hypervisor)
    GuestSide(receiver)
    held: list[tuple[Vcpu, Channel]] = []
    outcomes = Outcomes()

    def hold(vcpu: Vcpu, channel: Channel) -> bool:
        held.append((vcpu, channel))
        return True

    hypervisor.probes.add(outcomes)
    hypervisor.probes.add_filter(hold)
    evtchn.send(sender, own)
    assert not outcomes.seen
    assert not receiver.evtchn.is_pending(port)
    hypervisor.probes.raise_event(receiver.evtchn.ops, *held[0])
    assert outcomes.seen == [(receiver.domid, port, "pending")]
    assert receiver.evtchn.is_pending(port)
    hypervisor.probes.remove_filter(hold)
    evtchn.send(sender, own)
    assert outcomes.seen[-1] == (receiver.domid, port, "coalesced")
    assert len(held) == 1


# -- what else is told -------------------------------------------------------------------------------------------------


def test_ports_that_are_bound_moved_and_closed(hypervisor: Hypervisor) -> None:
    everything = Everything()
    hypervisor.probes.add(everything)
    domain = hypervisor.create_domain(vcpus=2)
    port = evtchn.alloc_unbound(domain, domain.domid, 0)
    evtchn.bind_vcpu(domain, port, 1)
    evtchn.close(domain, port)
    with pytest.raises(evtchn.XenError):
        evtchn.close(domain, port)
    assert [record[:2] for record in everything.records] == [
        ("created", domain), ("bound", domain), ("bound", domain), ("closed", domain),
    ]  # fmt: skip
    hypervisor.destroy_domain(domain)
    assert everything.records[-1] == ("ended", domain)


def test_an_abi_that_is_chosen_later_is_watched_too(hypervisor: Hypervisor) -> None:
    outcomes = Outcomes()
    hypervisor.probes.add(outcomes)
    domain = hypervisor.create_domain()
    guest = GuestSide(domain)
    guest.init_control(0)
    guest.expand_array()
    port = evtchn.bind_ipi(domain, 0)
    guest.mask(port)
    evtchn.send(domain, port)
    evtchn.reset(domain, domain.domid)
    GuestSide(domain)
    evtchn.send(domain, evtchn.bind_ipi(domain, 0))
    assert [outcome for *_, outcome in outcomes.seen] == ["masked", "pending"]


def test_who_raises_an_event(host: Host) -> None:
    """Guest or kernel, whose turn it is; Xen for a timer; and the kernel that boots."""
    everything = Everything()
    host.hypervisor.probes.add(everything)
    guest = host.model("pvops")
    domain = guest.domain
    host.run(lambda: host.quiet)
    timer = guest.kernel.set_timer(host.clock.now() + 1000, lambda: None)
    host.run(lambda: timer.callback is None)
    raised = [record for record in everything.records if record[0] == "raised"]
    assert any(record[1].domain is domain and record[4] is host.dom0.domain.vcpus[1] for record in raised)
    assert any(record[1].domain.domid == 0 and record[4] is domain.vcpus[0] for record in raised)
    assert raised[-1][1:] == (domain.vcpus[0], raised[-1][2], "pending", None)
    assert host.hypervisor.probes.current is None


def test_jumps_shutdowns_and_notes(host: Host) -> None:
    everything = Everything()
    host.hypervisor.probes.add(everything)
    vcpu = host.dom0.domain.vcpus[1]
    host.clock.jump_to(5_000)
    host.hypervisor.probes.note("fault", vcpu, rule="storm", p=3)
    domain = host.hypervisor.create_domain()
    domain.shutdown(2)
    assert everything.records[:4] == [
        ("jumped", 5_000), ("noted", "fault", vcpu, {"rule": "storm", "p": 3}), ("created", domain),
        ("shut_down", domain, 2),
    ]  # fmt: skip


# -- interrupts of modelled kernels ------------------------------------------------------------------------------------


def connect(one: ModelledGuest, other: ModelledGuest, handled: list[int]) -> tuple[int, int]:
    """A channel between two guests, whose ends take what comes: their IRQs."""

    def end(kernel: Kernel[Any]) -> Any:
        def handler(irq: int, dev_id: object) -> IrqReturn:
            handled.append(irq)
            kernel.events.eoi(irq)
            return IRQ_HANDLED

        return handler

    there = one.kernel.events.bind_listening(other.domain.domid, end(one.kernel), "there", object())
    port = one.kernel.events.evtchn_from_irq(there)
    here = other.kernel.events.bind_interdomain(one.domain.domid, port, end(other.kernel), "here", object())
    return there, here


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_count_is_an_entry(host: Host, kernel: str) -> None:
    """Of each kernel's lines: entries with handlers are what /proc/interrupts counts, and each has its exit."""
    one, other = host.model(kernel, vcpus=2), host.model(kernel)
    there, here = connect(one, other, handled := [])
    host.run(lambda: host.quiet)
    everything = Everything()
    before = {irq: sum(desc.kstat) for irq, desc in one.kernel.irq.descs.items()}
    host.hypervisor.probes.add(everything)
    handled.clear()
    for _ in range(5):
        other.kernel.events.notify_remote_via_irq(here)
        host.run(lambda: host.quiet)
    one.kernel.queue_work(lambda: None, 1)
    done = one.kernel.spawn("busy", one.kernel.compute(50_000_000), 1)
    host.run(lambda: done.done)
    host.hypervisor.probes.remove(everything)
    counted = {
        irq: sum(desc.kstat) - before.get(irq, 0)
        for irq, desc in one.kernel.irq.descs.items()
        if sum(desc.kstat) != before.get(irq, 0)
    }
    assert handled == [there] * 5
    assert len(counted) >= 2  # its timer too
    entries: dict[int, int] = {}
    depth = 0
    for record in everything.records:
        if record[0] == "irq_entry" and record[1].domain is one.domain:
            assert record[4]
            assert record[2] in one.kernel.events.ports_of_irq(record[3])
            assert one.domain.evtchn.port(record[2]).notify_vcpu == record[1].vcpu_id
            entries[record[3]] = entries.get(record[3], 0) + 1
            depth += 1
        elif record[0] == "irq_exit" and record[1].domain is one.domain:
            depth -= 1
    assert depth == 0
    assert entries == counted


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_disabled_line_has_no_handler(host: Host, kernel: str) -> None:
    one, other = host.model(kernel), host.model(kernel)
    there, here = connect(one, other, handled := [])
    host.run(lambda: host.quiet)
    handled.clear()
    one.kernel.irq.disable_irq(there)
    everything = Everything()
    host.hypervisor.probes.add(everything)
    other.kernel.events.notify_remote_via_irq(here)
    host.run(lambda: host.quiet)
    entries = [record for record in everything.records if record[0] == "irq_entry" and record[3] == there]
    assert all(not record[4] for record in entries)
    assert not handled
    one.kernel.irq.enable_irq(there)
    host.run(lambda: host.quiet)
    assert handled == [there]


def test_a_handler_that_raises_has_its_exit(host: Host) -> None:
    guest = host.model("pvops")

    def broken(irq: int, dev_id: object) -> IrqReturn:
        raise ZeroDivisionError

    irq = guest.kernel.events.bind_listening(0, broken, "broken", object())
    port = evtchn.bind_interdomain(host.dom0.domain, guest.domain.domid, guest.kernel.events.evtchn_from_irq(irq))
    host.run(lambda: host.quiet)
    everything = Everything()
    host.hypervisor.probes.add(everything)
    evtchn.send(host.dom0.domain, port)
    with pytest.raises(ZeroDivisionError):
        host.run(lambda: host.quiet)
    assert everything.names()[-4:] == ["upcall", "irq_entry", "irq_exit", "stop"]
    assert host.hypervisor.probes.current is None


def test_the_event_device_of_a_xenlinux_has_no_line(host: Host) -> None:
    guest = host.model("2.6.18")
    user = guest.kernel.events.evtchn_user("daemon")
    arrived: list[int] = []
    port = user.bind_unbound(0, arrived.append)
    send = evtchn.bind_interdomain(host.dom0.domain, guest.domain.domid, port)
    host.run(lambda: host.quiet)
    everything = Everything()
    host.hypervisor.probes.add(everything)
    evtchn.send(host.dom0.domain, send)
    host.run(lambda: host.quiet)
    assert arrived
    entry = next(record for record in everything.records if record[0] == "irq_entry")
    assert entry[1:4] == (guest.domain.vcpus[0], port, -1)
    assert [action.name for action in entry[4]] == ["evtchn"]


def test_late_and_physical_eois() -> None:
    with Host(hardware="writeup") as host:
        everything = Everything()
        host.hypervisor.probes.add(everything)
        guest = host.model("pvops")
        host.attach_disk(guest, "xvda", "/dev/ata1")
        host.run(lambda: guest.has_disk("xvda"))
        disk = guest.disk("xvda")
        done = guest.kernel.spawn("read", disk.read(0, 8))
        host.run(lambda: done.done)
        eois = [record for record in everything.records if record[0] == "eoi"]
        assert any(record[3] >= 0 and record[1].domain is host.dom0.domain for record in eois)  # a lateeoi chip's
        [port] = host.dom0.events.ports_of_irq(14)
        physdev.eoi(host.dom0.domain, 14)
        assert everything.records[-1] == ("eoi", host.dom0.domain.vcpus[0], port, -1, False)  # of a pirq, by its port


# -- nothing is paid ---------------------------------------------------------------------------------------------------


def attributes(host: Host) -> list[object]:
    """All that may have been put in the way."""
    doors: list[tuple[object, tuple[str, ...]]] = [(host.clock, ("jump_to",))]
    kernels: list[Kernel[Any]] = [host.dom0, *(guest.kernel for guest in host.modelled)]
    for kernel in kernels:
        domain = kernel.domain
        doors += [(kernel, ("run",)), (domain.evtchn, ("close",)), (domain.pirqs, ("eoi",))]
        doors.append((domain.evtchn.ops, ("set_pending", "unmask", "init")))
        if hasattr(kernel.events, "lateeoi"):
            doors.append((kernel.events.lateeoi, ("eoi",)))
    fronts = [has_front(target, name) for target, names in doors for name in names]
    return [host.hypervisor.on_wake, *fronts]


def test_the_last_instrument_takes_everything_with_it(host: Host) -> None:
    guests = [host.model(kernel, vcpus=2) for kernel in KERNELS]
    connect(guests[0], guests[1], [])
    host.run(lambda: host.quiet)
    before = attributes(host)
    plain = [guest.kernel.events.upcall_entry(0).__qualname__ for guest in guests]
    first, second = Everything(), Everything()
    host.hypervisor.probes.add(first)
    host.hypervisor.probes.add(second)
    assert attributes(host) != before
    guests[0].kernel.queue_work(lambda: None, 1)
    host.run(lambda: host.quiet)
    host.hypervisor.probes.remove(first)
    assert first.records == second.records
    host.hypervisor.probes.remove(second)
    assert attributes(host) == before
    for guest, name in zip(guests, plain, strict=True):
        guest.kernel.queue_work(lambda: None, 1)
        assert guest.kernel.events.upcall_entry(0).__qualname__ == name
    count = len(second.records)
    host.run(lambda: host.quiet)
    assert len(second.records) == count
    with pytest.raises(ValueError):
        host.hypervisor.probes.remove(second)


def test_what_others_have_put_in_the_way_stays(host: Host) -> None:
    guest = host.model("pvops")
    jumps: list[int] = []
    jump_to = host.clock.jump_to

    def spy(when: int) -> None:
        jumps.append(when)
        jump_to(when)

    host.hypervisor.probes.add(outcomes := Outcomes())
    host.clock.jump_to = spy  # type: ignore[method-assign]
    host.hypervisor.probes.remove(outcomes)
    host.clock.jump_to(1000)
    assert jumps == [1000]
    assert not has_front(guest.kernel, "run")


def test_what_nobody_wants_is_not_in_the_way(host: Host) -> None:
    guest = host.model("pvops")
    before = attributes(host)
    kernel, ops = guest.kernel, guest.domain.evtchn.ops

    class Upcalls(Instrument):
        def upcall(self, vcpu: Vcpu) -> None:
            pass

    host.hypervisor.probes.add(upcalls := Upcalls())
    assert has_front(kernel, "run")  # which makes upcalls
    assert not has_front(ops, "set_pending")
    host.hypervisor.probes.add(outcomes := Outcomes())
    assert has_front(ops, "set_pending")
    assert not has_front(ops, "unmask")
    host.hypervisor.probes.remove(upcalls)
    assert has_front(kernel, "run")  # whose turn it is
    host.hypervisor.probes.remove(outcomes)
    assert attributes(host) == before

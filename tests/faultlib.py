"""Hosts for tests of faults: a domain 0, and guests without kernels, whose bits nobody takes but the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pvirq
from pvirq.abi.xen import VCPU_INFO_PENDING_SEL
from pvirq.linux.kthread import Body, Kthread
from pvirq.modelled import ModelledGuest
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.evtchn_channels import Channel
from pvirq.xen.probes import Instrument

T = TypeVar("T")
MS = 1_000_000


def new_host() -> pvirq.Host:
    return pvirq.Host(machine_memory=1 << 28)


class Seen(Instrument):
    """What instruments are told: (domid, port, outcome) of events, and the notes."""

    def __init__(self) -> None:
        self.events: list[tuple[int, int, str]] = []
        self.notes: list[dict[str, object]] = []

    def raised(self, vcpu: Vcpu, channel: Channel, outcome: str) -> None:
        self.events.append((vcpu.domain.domid, channel.port, outcome))

    def noted(self, kind: str, vcpu: Vcpu | None, fields: dict[str, object]) -> None:
        assert kind == "fault"
        self.notes.append(fields)


@contextmanager
def watching(host: pvirq.Host) -> Iterator[Seen]:
    seen = Seen()
    host.hypervisor.probes.add(seen)
    yield seen
    host.hypervisor.probes.remove(seen)


def bare(host: pvirq.Host, vcpus: int = 1) -> Domain:
    """A domain without a kernel: its events show in its bits, and stay there."""
    domain = host.hypervisor.create_domain(vcpus=vcpus)
    for vcpu in domain.vcpus:
        vcpu.up = True
    domain.machine.mem[domain.shared_info + 2048 + 512 : domain.shared_info + 2048 + 1024] = bytes(512)
    return domain


def pair(here: Domain, there: Domain) -> tuple[int, int]:
    """A channel between two domains; the ports of its ends, with nothing pending."""
    theirs = evtchn.alloc_unbound(there, there.domid, here.domid)
    ours = evtchn.bind_interdomain(here, there.domid, theirs)
    take(here)
    return ours, theirs


def take(domain: Domain) -> list[int]:
    """The ports that are pending, which they aren't any more then."""
    mem, at = domain.machine.mem, domain.shared_info + 2048
    ports = [channel.port for channel in domain.evtchn if domain.evtchn.is_pending(channel.port)]
    mem[at : at + 512] = bytes(512)
    for vcpu in domain.vcpus:
        mem[vcpu.info] = 0
        mem[vcpu.info + VCPU_INFO_PENDING_SEL : vcpu.info + VCPU_INFO_PENDING_SEL + 8] = bytes(8)
    return ports


def run_for(host: pvirq.Host, ns: int) -> None:
    host.run(lambda: False, ns)


def do(guest: ModelledGuest, body: Body[T], timeout_ns: int = 10**10) -> T:
    """Run a body in a modelled guest to its end; what it raises is raised here."""
    failed: list[Exception] = []

    def run() -> Body[T | None]:
        try:
            return (yield from body)
        except pvirq.XenError as error:
            failed.append(error)
            return None

    thread: Kthread[T | None] = guest.kernel.spawn("test", run())
    assert guest.host.run(lambda: thread.done, timeout_ns), "it doesn't end"
    if failed:
        raise failed[0]
    return thread.result()  # type: ignore[return-value]


def elapsed(host: pvirq.Host, action: Callable[[], object]) -> int:
    """ns of the host's clock that something takes."""
    before = host.clock.now()
    action()
    return host.clock.now() - before

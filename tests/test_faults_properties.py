"""Whatever rules there are and whatever happens to channels meanwhile: no event gets lost uncounted, or astray."""

from __future__ import annotations

import contextlib
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

import pvirq
from faultlib import MS, bare, new_host, take
from pvirq.abi.errno import XenError
from pvirq.abi.xen import DOMID_SELF, VIRQ_DEBUG
from pvirq.lab.faults import Faults, Rule
from pvirq.lab.faults.events import Delay, Duplicate, EventRule, Lose, Reorder, Storm
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain, Vcpu
from pvirq.xen.evtchn_channels import ECS_INTERDOMAIN, ECS_UNBOUND, Channel
from pvirq.xen.probes import Instrument

RULES = [
    "lose", "lose every=3", "lose probability=0.4", "delay 1ms", "delay 300us jitter=2ms probability=0.6", "duplicate",
    "duplicate 700us", "duplicate every=2", "reorder", "reorder 4 within=3ms", "reorder 2 within=500us probability=0.7",
    "storm 20 interval=100us", "storm 3 interval=1ms period=2ms", "spurious period=1500us", "stuck-mask look=200us",
    "stuck-mask probability=0.5 until=4ms", "late 1ms", "delay 2ms kind=ipi", "lose kind=interdomain direction=out",
]  # fmt: skip


class Ledger(Instrument):
    """Counts events at the door and behind it, and sees that each comes to a channel that it was raised on."""

    def __init__(self) -> None:
        self.raised_by_somebody = 0
        self.outcomes: Counter[str] = Counter()
        self.meant: set[tuple[Domain, Channel, int]] = set()

    def at_the_door(self, vcpu: Vcpu, channel: Channel) -> bool:
        self.raised_by_somebody += 1
        self.meant.add((vcpu.domain, channel, channel.generation))
        return False

    def raised(self, vcpu: Vcpu, channel: Channel, outcome: str) -> None:
        assert channel.usable
        assert not vcpu.domain.dying
        assert vcpu.domain.evtchn.channels[channel.port] is channel
        assert vcpu.vcpu_id == channel.notify_vcpu
        self.outcomes[outcome] += 1


class World:
    """Domains without kernels and their channels, with rules over them."""

    def __init__(self, host: pvirq.Host) -> None:
        self.host = host
        self.faults = Faults(host, 7)
        self.ledger = Ledger()
        host.hypervisor.probes.add(self.ledger)
        host.hypervisor.probes.add_filter(self.ledger.at_the_door)
        self.domains = [bare(host, vcpus=2) for _ in range(3)]
        self.ever: list[Rule] = []
        self.were_fifo: set[Domain] = set()

    def domain(self, i: int) -> Domain:
        return self.domains[i % len(self.domains)]

    def channel(self, domain: Domain, i: int) -> int:
        used = [channel.port for channel in domain.evtchn]
        return used[i % len(used)] if used else 0

    def do(self, step: tuple[str, int, int]) -> None:
        what, a, b = step
        domain = self.domain(a)
        with contextlib.suppress(XenError):
            getattr(self, what)(domain, b)

    def connect(self, domain: Domain, b: int) -> None:
        other = self.domain(b)
        evtchn.bind_interdomain(domain, other.domid, evtchn.alloc_unbound(other, DOMID_SELF, domain.domid))

    def bind_ipi(self, domain: Domain, b: int) -> None:
        evtchn.bind_ipi(domain, b % 2)

    def bind_virq(self, domain: Domain, b: int) -> None:
        evtchn.bind_virq(domain, b % 2 * VIRQ_DEBUG, b // 2 % 2)

    def send(self, domain: Domain, b: int) -> None:
        evtchn.send(domain, self.channel(domain, b))

    def virq(self, domain: Domain, b: int) -> None:
        evtchn.send_guest_vcpu_virq(domain.vcpus[b // 2 % 2], b % 2 * VIRQ_DEBUG)

    def close(self, domain: Domain, b: int) -> None:
        evtchn.close(domain, self.channel(domain, b))

    def unmask(self, domain: Domain, b: int) -> None:
        evtchn.unmask(domain, self.channel(domain, b))

    def move(self, domain: Domain, b: int) -> None:
        evtchn.bind_vcpu(domain, self.channel(domain, b), b % 2)

    def fifo(self, domain: Domain, b: int) -> None:
        self.were_fifo.add(domain)
        evtchn.init_control(domain, domain.machine.alloc(1, domain.domid), 0, b % 2)
        evtchn.expand_array(domain, domain.machine.alloc(1, domain.domid))

    def reset(self, domain: Domain, b: int) -> None:
        evtchn.reset(domain, DOMID_SELF)

    def destroy(self, domain: Domain, b: int) -> None:
        if b % 4 == 0:
            self.host.hypervisor.destroy_domain(domain)
            self.domains[self.domains.index(domain)] = bare(self.host, vcpus=2)

    def take(self, domain: Domain, b: int) -> None:
        if not domain.evtchn.fifo:
            take(domain)

    def time(self, domain: Domain, b: int) -> None:
        self.host.run(lambda: False, b % 40 * MS // 10)

    def rule(self, domain: Domain, b: int) -> None:
        text = RULES[b % len(RULES)]
        if b % 3:
            text += f" domain={domain.domid}"
        self.ever.append(self.faults.rule(text))

    def unrule(self, domain: Domain, b: int) -> None:
        if self.faults.rules:
            self.faults.rules[b % len(self.faults.rules)].remove()

    def check(self) -> None:
        """Each event that somebody raised was raised, or a rule says what it did with it; and none came of itself."""
        expected = self.ledger.raised_by_somebody
        for rule in self.ever:
            if isinstance(rule, Storm):
                expected += rule.fired
                continue
            assert isinstance(rule, EventRule)
            if isinstance(rule, Lose):
                expected -= rule.fired
            elif isinstance(rule, Duplicate):
                assert rule.fired == rule.released + rule.dropped + len(rule.held)
                expected += rule.released
            elif isinstance(rule, (Delay, Reorder)):
                assert rule.fired == rule.released + rule.dropped + rule.merged + len(rule.held)
                expected -= len(rule.held) + rule.dropped + rule.merged
        assert self.ledger.outcomes.total() == expected
        for domain in self.domains:
            for channel in domain.evtchn.channels:
                if not channel.usable:
                    # Bits of before a time with FIFO are as they were then.
                    assert channel.port == 0 or domain in self.were_fifo or not domain.evtchn.ops.is_pending(channel)
                elif channel.state == ECS_INTERDOMAIN:
                    assert channel.remote_domain is not None
                    remote = channel.remote_domain.evtchn.channels[channel.remote_port]
                    assert (remote.remote_domain, remote.remote_port) == (domain, channel.port)
                else:
                    assert channel.state >= ECS_UNBOUND


_steps = st.tuples(
    st.sampled_from([
        "connect", "bind_ipi", "bind_virq", "send", "send", "send", "virq", "close", "unmask", "move", "fifo", "reset",
        "destroy", "take", "take", "time", "time", "rule", "rule", "unrule",
    ]),
    st.integers(0, 2), st.integers(0, 500),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(_steps, min_size=20, max_size=120))
def test_every_event_is_accounted_for(steps: list[tuple[str, int, int]]) -> None:
    with new_host() as host:
        world = World(host)
        for i in range(3):  # something to begin with
            world.connect(world.domain(i), i + 1)
            world.rule(world.domain(i), sum(step[2] for step in steps) + i)
        for step in steps:
            world.do(step)
            world.check()
        world.faults.clear()
        world.check()
        assert all(not rule.held for rule in world.ever if isinstance(rule, EventRule))
        world.host.run(lambda: False, 100 * MS)
        world.check()
        assert not [
            vcpu for domain in host.hypervisor.domains.values() for vcpu in domain.vcpus if vcpu.pause_count
        ]  # fmt: skip


@settings(max_examples=10)
@given(st.lists(_steps, min_size=20, max_size=80))
def test_the_same_run_has_the_same_firings(steps: list[tuple[str, int, int]]) -> None:
    def run() -> list[tuple[int, str, str, dict[str, object]]]:
        with new_host() as host:
            world = World(host)
            for step in steps:
                world.do(step)
            return [(firing.when, firing.rule, firing.action, firing.fields) for firing in world.faults.firings]

    assert run() == run()


def test_modelled_guests_live_with_any_faults() -> None:
    """Disks, interfaces and timers under fire: a request may hang or fail, but nothing comes out of the host."""
    from pvirq.drivers.blockstore import MemoryStore
    from pvirq.linux.kthread import Body, sleep

    rules = [rule for rule in RULES if not rule.startswith("stuck")]
    for seed in range(8):
        with new_host() as host:
            host.add_bridge()
            guests = [host.model(kernel, vcpus=2) for kernel in ("pvops", "2.6.18", "suse")]
            for guest in guests:
                host.attach_disk(guest, "xvda", MemoryStore(4096))
                host.attach_nic(guest)
            host.run(lambda guests=guests: all(guest.has_disk("xvda") for guest in guests), 10**10)
            faults = Faults(host, seed)
            more = [
                "pause 3ms probability=0.5 period=7ms", "upcall period=2ms", "early 1ms probability=0.5",
                "late 2ms probability=0.3", "slow 1ms jitter=3ms", "error probability=0.1",
            ]  # fmt: skip
            for text in (rules + more)[seed::4]:
                faults.rule(text)

            def work(guest: pvirq.modelled.ModelledGuest) -> Body[None]:  # type: ignore[name-defined]
                for i in range(50):
                    with contextlib.suppress(XenError):
                        yield from guest.disk("xvda").read(8 * i % 4096, 8)
                    yield from sleep(guest.kernel, MS)

            for guest in guests:
                guest.kernel.spawn("worker", work(guest))
            host.run(lambda: False, 10**9)
            assert sum(rule.fired for rule in faults.rules) > 100
            faults.clear()
            host.run(lambda: False, 10**9)

"""Whose turn it is: the vCPUs of real guests share the host's one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pvirq import Host
from pvirq.runloop import GRACE_NS, PATIENCE, SLICE_NS
from pvirq.xen import sched
from pvirq.xen.domain import Domain, Vcpu

STEP_NS = 1_000


class Engine:
    """What the host asks of the engine of a running vCPU. Its counter is in ns."""

    def __init__(self) -> None:
        self.count = 0
        self.stopped = False
        self.stop_at: int | None = None
        self.pauses = 0

    def counter(self) -> int:
        return self.count

    def pause(self) -> None:
        """The guest executes PAUSE."""
        self.pauses -= 1
        if not self.pauses:
            self.stop()

    def stop(self) -> None:
        self.stopped = True


class Machine:
    """A guest whose vCPUs do nothing but let time pass; `work(vcpu)` is called at each step of it."""

    def __init__(self, host: Host, domain: Domain) -> None:
        self.host = host
        self.domain = domain
        self.engine = Engine()
        host.clock.set_counter(self.engine.counter, 1e9)
        self.turns: list[tuple[int, int]] = []  # (vCPU, ns)
        self.work: Callable[[Vcpu], object] = lambda vcpu: None

    def woken(self, vcpu: Vcpu) -> None:
        pass

    def end_turn(self) -> None:
        pass

    def run(self, vcpu: Vcpu, until: int | None) -> None:
        clock, engine = self.host.clock, self.engine
        began = clock.now()
        engine.stopped, engine.stop_at = False, until
        while not engine.stopped and not vcpu.blocked:
            if engine.stop_at is not None and engine.count >= engine.stop_at:
                break
            if clock.now() - began >= 10 * SLICE_NS:
                break
            engine.count += STEP_NS
            self.work(vcpu)
        self.turns.append((vcpu.vcpu_id, clock.now() - began))


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(machine_memory=1 << 28) as host:
        host.run(lambda: host.quiet)
        yield host


@pytest.fixture
def machine(host: Host) -> Iterator[Machine]:
    domain = host.hypervisor.create_domain(vcpus=2)
    domain.paused = False
    machine = Machine(host, domain)
    host._machines[domain.domid] = machine  # type: ignore[assignment]
    for vcpu in domain.vcpus:
        vcpu.up = True
    yield machine
    del host._machines[domain.domid]


def near(ns: int, wanted: int) -> bool:
    return abs(ns - wanted) <= 2 * STEP_NS


def test_two_that_work_take_turns(host: Host, machine: Machine) -> None:
    host.run(lambda: len(machine.turns) == 6)
    first = machine.turns[0][0]
    assert [vcpu for vcpu, _ in machine.turns] == [first, 1 - first] * 3
    assert all(near(ns, SLICE_NS) for _, ns in machine.turns)


def test_one_that_is_alone_runs_on(host: Host, machine: Machine) -> None:
    machine.domain.vcpus[1].blocked = True
    host.run(lambda: len(machine.turns) == 1)
    assert machine.turns[0][0] == 0
    assert machine.turns[0][1] > 2 * SLICE_NS


def test_who_waits_in_a_loop_gives_way(host: Host, machine: Machine) -> None:
    # The other one's turn lasts as long as ever; and where there is nobody else, the loop goes on.
    first, second = machine.domain.vcpus
    machine.work = lambda vcpu: vcpu is first and machine.engine.pause()
    host.run(lambda: len(machine.turns) == 6)
    for vcpu, ns in machine.turns:
        assert near(ns, PATIENCE * STEP_NS if vcpu == 0 else SLICE_NS)
    assert [vcpu for vcpu, _ in machine.turns[:4]] in ([0, 1, 0, 1], [1, 0, 1, 0])
    second.blocked = True
    machine.turns.clear()
    host.run(lambda: len(machine.turns) == 1)
    assert machine.turns[0][1] > 2 * SLICE_NS


def test_who_yields_gives_way(host: Host, machine: Machine) -> None:
    def work(vcpu: Vcpu) -> None:
        if vcpu.vcpu_id == 0:
            sched.do_yield(vcpu)
            machine.engine.stop()

    machine.work = work
    host.run(lambda: len(machine.turns) == 6)
    for vcpu, ns in machine.turns:
        assert near(ns, STEP_NS if vcpu == 0 else SLICE_NS)
    assert [vcpu for vcpu, _ in machine.turns[:4]] in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_who_wakes_another_goes_on_for_a_while(host: Host, machine: Machine) -> None:
    # It may hold a lock that the other one takes first of all.
    first, second = machine.domain.vcpus
    second.blocked = True
    sent: list[int] = []

    def work(vcpu: Vcpu) -> None:
        if vcpu is first and not sent and host.clock.now():
            sent.append(host.clock.now())
            second.kick()

    machine.work = work
    host.run(lambda: len(machine.turns) == 2)
    assert [vcpu for vcpu, _ in machine.turns] == [0, 1]
    assert near(machine.turns[0][1], GRACE_NS)


def test_a_modelled_domain_has_its_turn_at_once_and_the_guest_goes_on(host: Host, machine: Machine) -> None:
    ran: list[int] = []
    asked: list[int] = []

    def work(vcpu: Vcpu) -> None:
        if not asked and vcpu.vcpu_id == asked_by:
            asked.append(host.clock.now())
            host.dom0.queue_work(lambda: ran.append(host.clock.now()), 0)
            host.dom0.domain.vcpus[0].kick()

    asked_by = 0
    machine.work = work
    host.run(lambda: len(machine.turns) >= 4)
    assert ran == asked
    at = next(i for i, (vcpu, ns) in enumerate(machine.turns) if vcpu == 0 and not near(ns, SLICE_NS))
    # What is left of its slice is still its own.
    assert machine.turns[at + 1][0] == 0
    assert near(machine.turns[at][1] + machine.turns[at + 1][1], SLICE_NS)


def test_domain_0_answers_and_wakes_the_other(host: Host, machine: Machine) -> None:
    # As a backend does: the event goes to a vCPU that isn't the one which asked.
    first, second = machine.domain.vcpus
    second.blocked = True
    asked: list[int] = []

    def work(vcpu: Vcpu) -> None:
        if vcpu is first and not asked:
            asked.append(host.clock.now())
            host.dom0.queue_work(second.kick, 0)
            host.dom0.domain.vcpus[0].kick()

    machine.work = work
    host.run(lambda: len(machine.turns) == 3)
    assert [vcpu for vcpu, _ in machine.turns] == [0, 0, 1]
    assert near(machine.turns[1][1], GRACE_NS)


def test_what_a_handler_raises_costs_nobody_his_turn() -> None:
    """It comes out of `run`; whoever was woken together with that vCPU has his turn when the host runs again."""
    with Host(dom0_vcpus=2) as host:
        done: list[str] = []

        def fail() -> None:
            raise RuntimeError("of the user's")

        guests = [host.model(name=name) for name in ("a", "b", "c")]
        assert host.settle()
        guests[0].kernel.queue_work(lambda: done.append("a"))
        guests[1].kernel.queue_work(fail)
        guests[2].kernel.queue_work(lambda: done.append("c"))
        with pytest.raises(RuntimeError, match="of the user's"):
            host.settle()
        host.settle()
        assert sorted(done) == ["a", "c"]

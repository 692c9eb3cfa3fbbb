"""vCPUs that don't run, upcalls for nothing, timers and clocks that are wrong."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

import pvirq
from faultlib import MS, bare, do, elapsed, new_host, run_for, take
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import (
    SHARED_INFO_WC_NSEC,
    SHARED_INFO_WC_SEC,
    SHARED_INFO_WC_SEC_HI,
    SHARED_INFO_WC_VERSION,
    VIRQ_TIMER,
)
from pvirq.lab.faults import Faults
from pvirq.linux.kthread import sleep
from pvirq.modelled import ModelledGuest
from pvirq.xen import evtchn, vtimer
from pvirq.xen.domain import Domain


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with new_host() as host:
        yield host


@pytest.fixture
def faults(host: pvirq.Host) -> Iterator[Faults]:
    with Faults(host) as faults:
        yield faults


@pytest.fixture(params=["pvops", "pvops-2l", "2.6.18", "suse"])
def guest(host: pvirq.Host, request: pytest.FixtureRequest) -> ModelledGuest:
    guest = host.model(request.param, vcpus=2)
    host.settle()
    return guest


def naps(guest: ModelledGuest, ns: int = 100 * MS, cpu: int = 0) -> int:
    """How long a thread of a guest's really sleeps."""
    sleeping = guest.kernel.spawn("sleeper", sleep(guest.kernel, ns), cpu)
    return elapsed(guest.host, lambda: guest.host.run(lambda: sleeping.done, 10**10))


# -- VIRQ_TIMER --------------------------------------------------------------------------------------------------------


def test_late(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    assert naps(guest) == 100 * MS
    with faults.late(7 * MS, domain=guest, vcpu=0) as rule:
        assert naps(guest) == 107 * MS
        assert naps(guest, cpu=1) == 100 * MS
        assert rule.fired == 1
    assert naps(guest) == 100 * MS


def test_a_lost_timer_event(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rule = faults.lose(domain=guest, kind="timer", vcpu=0, count=1)
    sleeping = guest.kernel.spawn("sleeper", sleep(guest.kernel, 100 * MS), 0)
    host.run(lambda: rule.fired == 1, 10**10)
    assert not host.run(lambda: sleeping.done, 10**10)
    assert naps(guest) == 100 * MS  # the next one finds both
    assert sleeping.done


def test_early(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    """The kernel finds nothing due, and sets its timer again."""
    with faults.early(30 * MS, domain=guest, count=1) as rule:
        kernel = guest.kernel
        sleeping = kernel.spawn("sleeper", sleep(kernel, 100 * MS), 0)
        port = guest.domain.vcpus[0].virq_to_evtchn[VIRQ_TIMER]
        with faults.delay(1, domain=guest, kind="timer") as timers:
            assert elapsed(host, lambda: host.run(lambda: timers.fired == 1, 10**10)) == 70 * MS
        assert not sleeping.done
        assert elapsed(host, lambda: host.run(lambda: sleeping.done, 10**10)) == 30 * MS
        assert rule.fired == 1
        assert faults.firings[0].fields["ns"] == 30 * MS
        assert port


def test_early_all_the_time(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    """A time that isn't far enough stays as it is, or a kernel that sets it again would never get there."""
    with faults.early(30 * MS) as rule:
        assert naps(guest) == 100 * MS
        assert naps(guest, 10 * MS) == 10 * MS
    assert rule.fired >= 1
    assert not host.hypervisor.probes.deadlines


def test_early_by_hypercall(host: pvirq.Host, faults: Faults) -> None:
    domain = bare(host, vcpus=2)
    ports = [evtchn.bind_virq(domain, VIRQ_TIMER, vcpu) for vcpu in (0, 1)]
    faults.early(MS, domain=domain.domid, vcpu=1)
    now = host.clock.now()
    for vcpu in domain.vcpus:
        vtimer.set_singleshot(vcpu, now + 10 * MS)
    run_for(host, 9 * MS)
    assert take(domain) == [ports[1]]
    run_for(host, MS)
    assert take(domain) == [ports[0]]


# -- upcalls -----------------------------------------------------------------------------------------------------------


def test_a_spurious_upcall(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    before = guest.proc_interrupts()
    rule = faults.upcall(domain=guest, vcpu=1, period=0.001, count=10)
    run_for(host, 20 * MS)
    assert rule.fired == 10
    # It came in, and no row counts it; older kernels don't count upcalls at all.
    after = guest.proc_interrupts()
    rows = [line for line in before.splitlines() if "HYP:" not in line]
    assert [line for line in after.splitlines() if "HYP:" not in line] == rows
    if "HYP:" in before:
        assert after != before
    assert naps(guest) == 100 * MS


# -- vCPUs that don't run ----------------------------------------------------------------------------------------------


def test_pause(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rule = faults.pause(500 * MS, domain=guest, vcpu=1, after=0.05)
    run_for(host, 60 * MS)
    assert guest.domain.vcpus[1].pause_count == 1
    assert naps(guest, cpu=0) == 100 * MS
    assert naps(guest, 100 * MS, cpu=1) == 490 * MS  # it goes to sleep only then
    assert (rule.fired, guest.domain.vcpus[1].pause_count) == (1, 0)
    with faults.pause(10**12, domain=guest):
        sleeping = guest.kernel.spawn("sleeper", sleep(guest.kernel, MS), 0)
        assert not host.run(lambda: sleeping.done, 10**9)
    assert host.run(lambda: sleeping.done, 10 * MS)


def test_pauses_nest(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    with faults.pause(10**10, domain=guest):
        with faults.pause(10**10, domain=guest):
            assert guest.domain.vcpus[0].pause_count == 2
        assert guest.domain.vcpus[0].pause_count == 1
        host.pause(guest)
    assert not guest.domain.vcpus[0].runnable
    host.unpause(guest)
    assert naps(guest) == 100 * MS


def test_a_paused_guest_can_be_destroyed(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    rule = faults.pause(100 * MS, domain=guest)
    starve = faults.starve(0.5, domain=guest)
    host.destroy(guest)
    run_for(host, 200 * MS)
    assert rule.fired == 2
    starve.remove()
    assert not [vcpu for domain in host.hypervisor.domains.values() for vcpu in domain.vcpus if vcpu.pause_count]


def test_starve(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    """A vCPU that has a tenth of each 10 ms reacts in that tenth only."""
    moments = []
    with faults.starve(0.1, domain=guest, vcpu=0) as rule:
        start = host.clock.now()
        for _ in range(20):
            naps(guest, 3 * MS)
            moments.append((host.clock.now() - start) % (10 * MS))
    assert rule.fired >= 20
    assert all(moment == 0 or moment >= 9 * MS for moment in moments)
    assert naps(guest, 3 * MS) == 3 * MS


@pytest.mark.parametrize(("share", "late"), [(0.0, True), (1.0, False)])
def test_starve_of_all_and_of_nothing(host: pvirq.Host, faults: Faults, share: float, late: bool) -> None:
    guest = host.model("pvops")
    host.settle()
    faults.starve(share, domain=guest, until=5)
    assert (naps(guest) > 4 * 10**9) == late


# -- clocks ------------------------------------------------------------------------------------------------------------


def test_clock_step(host: pvirq.Host, faults: Faults, guest: ModelledGuest) -> None:
    start = host.clock.now()
    rule = faults.clock(30 * 10**9, after=0.05)
    sleeping = guest.kernel.spawn("sleeper", sleep(guest.kernel, 100 * MS), 0)
    host.run(lambda: sleeping.done)
    assert host.clock.now() - start == 50 * MS + 30 * 10**9  # what was to be meanwhile is due at once
    assert rule.fired == 1


def wallclock(domain: Domain) -> tuple[int, int]:
    """(version, ns) as a guest reads them."""
    mem, at = domain.machine.mem, domain.shared_info
    offsets = (SHARED_INFO_WC_VERSION, SHARED_INFO_WC_SEC, SHARED_INFO_WC_SEC_HI, SHARED_INFO_WC_NSEC)
    version, low, high, ns = (int(struct.unpack_from("<I", mem, at + offset)[0]) for offset in offsets)
    return version, (low | high << 32) * 10**9 + ns


def test_wallclock_step(host: pvirq.Host, faults: Faults) -> None:
    one, other = bare(host), bare(host)
    faults.wallclock(5 * 10**18 + 7)  # beyond 32 bits of seconds
    faults.wallclock(-3 * 10**9 - 10, domain=one.domid)
    assert [wallclock(domain) for domain in (one, other)] == [
        (4, 5 * 10**18 - 3 * 10**9 - 3), (2, 5 * 10**18 + 7)
    ]  # fmt: skip
    assert host.wallclock() == pytest.approx(5 * 10**9, abs=1)
    for _ in range(2):
        faults.wallclock(-4 * 10**18, domain=one.domid)
    assert wallclock(one) == (8, 0)  # there is no time before 1970


def test_a_paused_vcpu_has_its_operations(host: pvirq.Host) -> None:
    domain = bare(host)
    domain.vcpus[0].pause()
    assert not domain.vcpus[0].runnable
    domain.vcpus[0].unpause()
    assert domain.vcpus[0].runnable
    with pytest.raises(XenError) as error:
        domain.vcpu(1)
    assert error.value.errno is Errno.ENOENT
    assert do(host.model("pvops"), sleep(host.dom0, 0)) is None

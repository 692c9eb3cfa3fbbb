"""Where a host is free to choose (pvirq.schedule)."""

from __future__ import annotations

import pytest

from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.modelled import ModelledGuest
from pvirq.net.outside import OutsideError
from pvirq.schedule import DELAYS, SLICES, Schedule
from pvirq.xen.timer import NS_PER_S


def draw(schedule: Schedule) -> list[int]:
    return [schedule.choose("next", 4) for _ in range(50)] + [schedule.slice_ns(), schedule.answer_ns()]


def test_a_seed_says_it_all() -> None:
    assert draw(Schedule(5)) == draw(Schedule(5)) != draw(Schedule(6))


def test_fifo_takes_what_is_first() -> None:
    assert draw(Schedule.fifo()) == [0] * 50 + [SLICES[0], DELAYS[0]]


def test_what_was_taken_is_a_script_for_the_same_choices() -> None:
    first = Schedule(5)
    drawn = draw(first)
    assert first.taken
    assert len(first.taken) < first.count == 52
    again = Schedule.script(first.taken)
    assert draw(again) == drawn
    assert again.taken == first.taken


def test_a_script_never_takes_what_isnt_there() -> None:
    assert Schedule.script({0: 9}).choose("next", 3) == 2


def test_each_choice_is_told() -> None:
    told: list[tuple[str, int, int, int]] = []
    schedule = Schedule.script({1: 1})
    schedule.listeners.append(lambda *choice: told.append(choice))
    schedule.choose("next", 3)
    schedule.choose("order", 2)
    assert told == [("next", 0, 3, 0), ("order", 1, 2, 1)]


def test_who_is_told_knows_whose_choice_it_is() -> None:
    told: list[tuple[str, int, int, tuple[int, ...]]] = []
    schedule = Schedule(5)

    def choice(what: str, number: int, n: int, took: int) -> None:
        assert {"next": n, "order": n}.get(what, 1) == len(schedule.vcpus)
        told.append((what, n, took, tuple(vcpu.domain.domid for vcpu in schedule.vcpus)))

    schedule.listeners.append(choice)
    with Host(seed=schedule) as host:
        guests = [host.model("pvops") for _ in range(2)]
        host.settle()
        told.clear()
        fired: list[int] = []
        when = host.clock.now() + 1000
        for guest in guests:
            guest.kernel.set_timer(when, lambda: fired.append(1))
        host.run(lambda: len(fired) == 2, NS_PER_S)
    assert [domains for what, _, _, domains in told if what == "answer"][:2] == [(1,), (2,)]


def read_all(host: Host, guest: ModelledGuest) -> list[int]:
    """When the blocks of a disk came to a modelled guest, in ns."""
    times: list[int] = []
    host.run(lambda: guest.has_disk("xvda"), NS_PER_S)
    disk = guest.disk("xvda")

    def reader(number: int):  # type: ignore[no-untyped-def]
        yield from disk.read(number * 8, 8)
        times.append(host.clock.now())

    for number in range(20):
        guest.kernel.spawn(f"read{number}", reader(number))
        host.settle()
    return times


def run(seed: int | Schedule | None) -> tuple[list[int], str, Schedule | None]:
    with Host(seed=seed) as host:
        guest = host.model("pvops", vcpus=2)
        host.attach_disk(guest, "xvda", MemoryStore(1000))
        times = read_all(host, guest)
        return times, guest.kernel.proc_interrupts(), host.schedule


def test_a_modelled_host_is_the_same_for_the_same_seed() -> None:
    first, second, other = run(3), run(3), run(4)
    assert first[:2] == second[:2]
    assert first[0] != other[0]


def test_its_choices_are_its_run() -> None:
    first = run(3)
    assert first[2] is not None
    assert run(Schedule.script(first[2].taken))[:2] == first[:2]


def test_first_come_first_served_is_what_happens_without_a_seed() -> None:
    assert run(Schedule.fifo())[:2] == run(None)[:2]


@pytest.mark.parametrize("seed", range(20))
def test_any_schedule_is_legal(seed: int) -> None:
    times, interrupts, _ = run(seed)
    assert len(times) == 20
    assert times == sorted(times)
    assert "blkif" in interrupts


def test_what_comes_from_outside_is_refused() -> None:
    with Host(seed=1) as host:
        for connect in (host.nat, host.tap):
            with pytest.raises(OutsideError, match="a host with a seed"):
                connect()
        host.station()

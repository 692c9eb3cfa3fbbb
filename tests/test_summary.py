"""What a trace amounts to, against simulations that know it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pvirq.lab.traceview.selection import Selection
from pvirq.lab.traceview.spread import Spread
from pvirq.lab.traceview.summary import OUTCOMES, DomainSummary, Options, PortSummary, Summary, summarise
from pvirq.lab.traceview.summary_text import summary_dict, summary_text
from pvirq.lab.traceview.tracefile import TraceFile
from tracelib import MS, US, Simulation, TraceWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


def summary_of(trace: TraceWriter, path: Path, options: Options | None = None) -> Summary:
    with TraceFile(trace.write(path)) as file:
        return summarise(file, options)


def ports_of(summary: Summary) -> dict[tuple[int, int], PortSummary]:
    return {(port.port.d, port.port.p): port for one in summary.domains for port in one.ports}


def domain_of(summary: Summary, d: int) -> DomainSummary:
    return next(one for one in summary.domains if one.domain.d == d)


def same(spread: Spread, values: Sequence[int]) -> bool:
    """Are these all of it? Percentiles may be off as far as the module says."""
    ordered = sorted(values)
    for percent in (50, 90, 99, 100):
        if ordered:
            exact = ordered[max(-(-len(ordered) * percent // 100) - 1, 0)]
            assert abs(spread.percentile(percent) - exact) <= exact / 2000
    facts = (spread.count, spread.total, spread.min, spread.max)
    return facts == (len(values), sum(values), min(values, default=0), max(values, default=0))


@pytest.mark.parametrize(("guests", "vcpus", "every"), [(1, 1, 200 * US), (2, 2, 150 * US), (4, 3, 40 * US)])
def test_a_simulation(path: Path, guests: int, vcpus: int, every: int) -> None:
    simulation = Simulation(seed=guests, guests=guests, vcpus=vcpus, every=every)
    summary = summary_of(simulation.run(20 * MS), path)
    ports = ports_of(summary)
    assert set(ports) == set(simulation.known)
    for key, known in simulation.known.items():
        port = ports[key]
        assert port.outcomes == known.outcomes
        assert port.raised == known.outcomes.total()
        assert port.delivered == port.irqs == len(known.latencies)
        assert same(port.latency, known.latencies)
        assert same(port.entry, known.entries)
        assert same(port.handler, known.handlers)
        assert same(port.masked, known.masked)
    for one in summary.domains:
        for v, vcpu in one.vcpus.items():
            place = (one.domain.d, v)
            assert vcpu.spent["running"] == simulation.running[place]
            assert vcpu.irqs == simulation.irqs[place]
            assert same(vcpu.wake, simulation.wakes[place])
            assert vcpu.upcalls == len(simulation.wakes[place])
    assert summary.events == sum(summary.kinds.values()) == len(simulation.trace.lines) - 1


def test_what_comes_before_counts_only_for_what_there_is(path: Path) -> None:
    """Two parts of a trace make up the whole."""
    trace = Simulation(seed=3).run(10 * MS)
    middle = 5 * MS + 5 * MS
    whole, first, second = (
        summary_of(trace, path, options) for options in (Options(), Options(stop=middle), Options(start=middle))
    )
    assert first.events + second.events == whole.events
    assert first.end == second.start == middle
    parts = ports_of(first), ports_of(second)
    for key, port in ports_of(whole).items():
        halves = [part[key] for part in parts if key in part]
        assert port.outcomes == sum((half.outcomes for half in halves[1:]), halves[0].outcomes.copy())
        assert port.delivered == sum(half.delivered for half in halves)
        assert port.latency.total == sum(half.latency.total for half in halves)
    for one in whole.domains:
        for v, vcpu in one.vcpus.items():
            for state, spent in vcpu.spent.items():
                halves = [domain_of(half, one.domain.d).vcpus[v].spent[state] for half in (first, second)]
                assert spent == sum(halves)
    assert ports_of(second)[1, 10].port.type == "interdomain"


def test_what_is_pending_when_a_part_begins(path: Path) -> None:
    trace = TraceWriter(("g", 1))
    for t, port in ((0, 1), (10, 2), (20, 1)):
        trace.now = t
        trace.say("raise", 0, 0, p=port, out="pending", by="xen", flow=t + 1)
    assert domain_of(summary_of(trace, path, Options(start=15)), 0).max_pending == 2


def test_outcomes_and_flows(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1), ("g", 1))
    trace.say("bind", 1, 0, p=4, type="interdomain", rd=0, rp=9)

    def sent(t: int, out: str, flow: int | None) -> None:
        trace.now = t
        trace.say("raise", 1, 0, p=4, out=out, by=[0, 0], flow=flow)

    sent(100, "pending", 1)
    sent(130, "coalesced", 1)
    trace.now = 150
    trace.say("upcall", 1, 0)
    trace.now = 160
    trace.say("irq", 1, 0, ph="B", irq=300, p=4, name="eth0", flow=[1])
    sent(165, "masked", 2)
    trace.now = 170
    trace.say("irq", 1, 0, ph="E", irq=300, p=4)
    trace.now = 265
    trace.say("unmask", 1, 0, p=4)
    trace.now = 270
    trace.say("irq", 1, 0, ph="B", irq=300, p=4, name="eth0", flow=[2])
    trace.say("irq", 1, 0, ph="E", irq=300, p=4)
    sent(300, "lost", None)
    sent(310, "waiting", 3)
    sent(320, "pending", 4)  # somebody took 3 without a handler
    summary = summary_of(trace, path)
    [port] = domain_of(summary, 1).ports
    assert port.outcomes == {"pending": 2, "coalesced": 1, "masked": 1, "lost": 1, "waiting": 1}
    assert (port.delivered, port.irqs) == (2, 2)
    assert (port.latency.min, port.latency.max) == (60, 105)
    assert (port.handler.min, port.handler.max) == (0, 10)
    assert (port.masked.count, port.masked.max, port.masked_at) == (1, 100, 165)
    assert port.port.title == "eth0"
    assert domain_of(summary, 1).max_pending == 1
    other = domain_of(summary, 0)
    [silent] = other.ports  # bound by the other end, but nothing was raised there
    assert (silent.port.p, silent.port.type, silent.port.rd, silent.port.rp) == (9, "interdomain", 1, 4)
    assert silent.raised == 0
    assert "\n  1 port without events\n" in summary_text(summary, Selection(), Options())


def test_a_spinlock_is_polled_for(path: Path) -> None:
    """So it isn't pending for ever."""
    trace = TraceWriter(("Domain-0", 2))
    trace.say("bind", 0, 1, p=6, type="ipi")
    for _ in range(2):
        trace.say("raise", 0, 1, p=6, out="masked", by=[0, 0], flow=1)
    one = domain_of(summary_of(trace, path), 0)
    assert one.ports[0].outcomes == {"masked": 2}
    assert one.max_pending == 0


def test_interrupted_handlers(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1))
    for t, ph, port in ((0, "B", 1), (5, "B", 2), (9, "E", 2), (20, "E", 1), (30, "B", 1)):
        trace.now = t
        trace.say("irq", 0, 0, ph=ph, irq=port + 16, p=port, flow=[] if ph == "B" else None)
    trace.now = 40
    trace.say("mark", text="the end")
    one, two = domain_of(summary_of(trace, path), 0).ports
    assert (one.handler.count, one.handler.max) == (1, 20)  # the last isn't over
    assert (two.handler.count, two.handler.max) == (1, 4)
    assert one.irqs == 2


def test_storms(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1), ("g", 1))
    times = [*range(0, 50_000, 10_000), *range(1_000_000, 1_010_000, 100), *range(3_000_000, 3_000_900, 100)]
    for t in times:
        trace.now = t
        trace.say("raise", 1, 0, p=4, out="coalesced", by="xen")
    summary = summary_of(trace, path, Options(storm_events=10, storm_window=1000))
    [storm] = summary.storms
    assert (storm.began, storm.ended, storm.events) == (1_000_000, 1_009_900, 100)
    assert len(summary_of(trace, path, Options(storm_events=9, storm_window=1000)).storms) == 2
    assert summary_of(trace, path).storms[0].events == len(times)  # 114 within 10 ms
    text = summary_text(summary, Selection(), Options(storm_events=10, storm_window=1000))
    assert "Storms (10 and more events within 1.00us):" in text
    assert "g port 4 (port 4): 100 events from 1.000000 ms for 9.90us" in text


def test_a_storm_goes_on_until_half_of_it_is_left(path: Path) -> None:
    trace = TraceWriter(("g", 1))
    t = 0
    for gap, times in ((100, 20), (160, 20), (300, 20), (100, 5)):
        for _ in range(times):
            t += gap
            trace.now = t
            trace.say("raise", 0, 0, p=4, out="coalesced", by="xen")
    [storm] = summary_of(trace, path, Options(storm_events=10, storm_window=1000)).storms
    # Ten in 1000 ns begin it; six in 960 keep it up, and three in 900 don't.
    assert (storm.began, storm.ended) == (100, 20 * 100 + 20 * 160 + 2 * 300)


def test_handlers_that_are_not_seen(path: Path) -> None:
    """The next upcall takes what is pending, but for what is masked or goes to another vCPU."""
    trace = TraceWriter(("Domain-0", 1))
    trace.say("domain", 1, name="g", vcpus=2, kind="real", kernel="unikernel", irqs="none")
    for port, v, out in ((1, 0, "pending"), (2, 0, "masked"), (3, 1, "pending")):
        trace.say("raise", 1, v, p=port, out=out, by="xen", flow=port)
    trace.say("upcall", 1, 0)
    summary = summary_of(trace, path)
    one = domain_of(summary, 1)
    assert (one.max_pending, one.domain.pending) == (3, 2)
    assert [port.delivered for port in one.ports] == [0, 0, 0]
    assert "at most 3 ports pending, its handlers are not seen\n" in summary_text(summary, Selection(), Options())


def test_balance(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 4), ("g", 1))
    trace.say("bind", 0, 0, p=1, type="virq", virq=0)
    trace.say("bind", 0, 0, p=2, type="interdomain", rd=1, rp=1)
    for v, port, times in ((0, 1, 6), (1, 1, 2), (2, 2, 3), (3, 2, 1)):
        for _ in range(times):
            trace.say("irq", 0, v, ph="B", irq=port, p=port, flow=[])
            trace.say("irq", 0, v, ph="E", irq=port, p=port)
    one = domain_of(summary_of(trace, path), 0)
    assert one.imbalance() == 2.0  # 6 of 12, of 4 vCPUs
    assert one.imbalance(movable=True) == 3.0
    assert domain_of(summary_of(trace, path), 1).imbalance() is None


def test_vcpu_times(path: Path) -> None:
    trace = TraceWriter(("g", 1))
    for t, kind, why in (
        (10, "run", None), (30, "stop", "slice"), (35, "run", None), (40, "stop", "blocked"), (100, "wake", None),
        (107, "run", None), (110, "stop", "paused"), (120, "wake", None), (150, "wake", None), (151, "run", None),
    ):  # fmt: skip
        trace.now = t
        trace.say(kind, 0, 0, why=why)
    [vcpu] = domain_of(summary_of(trace, path), 0).vcpus.values()
    # What wakes it while it is paused doesn't count.
    assert vcpu.spent == {"running": 28, "ready": 13, "blocked": 60, "off": 40}
    assert (vcpu.wake.count, vcpu.wake.min, vcpu.wake.max) == (2, 1, 7)


def test_a_domains_end_and_its_number_again(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1))
    for t, name in ((0, "one"), (1000, "two")):
        trace.now = t
        trace.say("domain", 1, name=name, vcpus=1, kind="modelled", kernel="pvops")
        trace.say("bind", 1, 0, p=3, type="ipi")
        trace.say("run", 1, 0)
        trace.now += 100
        trace.say("raise", 1, 0, p=3, out="pending", by=[1, 0], flow=t)
        trace.say("irq", 1, 0, ph="B", irq=3, p=3, flow=[])
        trace.now += 100
        trace.say("end", 1, why="poweroff")
        trace.say("close", 1, p=3)
        trace.say("end", 1, why="destroyed")
    summary = summary_of(trace, path)
    assert [(one.domain.name, one.domain.ended) for one in summary.domains] == [
        ("Domain-0", None), ("one", "poweroff"), ("two", "poweroff"),
    ]  # fmt: skip
    for one in summary.domains[1:]:
        assert [port.raised for port in one.ports] == [1]
        assert one.domain.pending == 0
        assert one.vcpus[0].spent["running"] == 200


def test_faults_choices_marks(path: Path) -> None:
    trace = TraceWriter(("Domain-0", 1))
    for i in range(3):
        trace.say("fault", 0, 0, rule="drop blkif", action="drop" if i else "delay", p=1)
        trace.say("choice", what="turn", n=i, of=3, took=i)
    trace.say("mark", text="here")
    summary = summary_of(trace, path)
    assert summary.faults == {("drop blkif", "drop"): 2, ("drop blkif", "delay"): 1}
    assert summary.choices == {"turn": 3}
    assert summary.other_choices == {"turn": 2}
    assert summary.marks == [(0, "here")]
    text = summary_text(summary, Selection(), Options())
    for line in ("  drop blkif: drop, 2 times", "  turn: 3, 2 not the first", "  0.000000 ms  here"):
        assert f"\n{line}\n" in text


def test_the_text_and_the_json(path: Path) -> None:
    summary = summary_of(Simulation(seed=2).run(5 * MS), path)
    text = summary_text(summary, Selection(), Options())
    assert all(len(line) <= 130 and line == line.rstrip() for line in text.splitlines())
    assert "guest1 (domain 1): real, pvops, 2 vCPUs" in text
    values = json.loads(json.dumps(summary_dict(summary, Selection(), Options())))
    for one in values["domains"]:
        for port in one["ports"]:
            assert port["raised"] == sum(port[out] for out in OUTCOMES)
    only = Selection(domains=("guest1",), ports=(10,))
    values = summary_dict(summary, only, Options())
    assert [(one["name"], [port["p"] for port in one["ports"]]) for one in values["domains"]] == [("guest1", [10])]
    text = summary_text(summary, only, Options())
    assert "guest2 (" not in text
    assert "eth0" not in text


@given(st.lists(st.integers(0, 1 << 62), min_size=1), st.sampled_from([1, 50, 90, 99, 99.9, 100]))
def test_percentiles(values: list[int], percent: float) -> None:
    spread = Spread()
    for value in values:
        spread.add(value)
    ordered = sorted(values)
    exact = ordered[int(max(-(-len(values) * percent // 100) - 1, 0))]
    assert abs(spread.percentile(percent) - exact) <= exact / 2000
    assert spread.min <= spread.percentile(percent) <= spread.max


def test_many_values_take_little(path: Path) -> None:
    spread, rng = Spread(), random.Random(1)
    for _ in range(100_000):
        spread.add(int(rng.lognormvariate(10, 2)))
    assert len(spread._buckets) < 20_000


_ports = st.integers(1, 3)
_steps = st.one_of(
    st.tuples(st.just("raise"), _ports, st.sampled_from(OUTCOMES)),
    st.tuples(st.sampled_from(["close", "unmask"]), _ports),
    st.tuples(st.sampled_from(["B", "E"]), _ports, st.booleans()),
    st.tuples(st.sampled_from(["run", "stop", "wake", "end"])),
)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1), _steps), max_size=60), st.integers(0, 60))
@settings(max_examples=200)
def test_counts_add_up_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, tuple[str | int, ...]]], start: int
) -> None:
    """Also in traces that make no sense: nothing is counted twice or lost, and nothing lasts longer than the trace."""
    trace = TraceWriter(("Domain-0", 1), ("g", 2))
    flows = 0
    raised = begun = 0
    for wait, v, (what, *rest) in steps:
        trace.now += wait
        match what:
            case "raise":
                flows += rest[1] not in ("coalesced", "lost")
                trace.say("raise", 1, v, p=rest[0], out=rest[1], by="xen", flow=flows)
                raised += trace.now >= start
            case "B" | "E":
                known = {"flow": [flows]} if rest[1] and what == "B" else {}
                trace.say("irq", 1, v, ph=what, irq=rest[0], p=rest[0], **known)
                begun += what == "B" and trace.now >= start
            case "close" | "unmask":
                trace.say(str(what), 1, p=rest[0])
            case _:
                trace.say(str(what), 1, v)
    path = tmp_path_factory.getbasetemp() / "steps.jsonl"
    summary = summary_of(trace, path, Options(start=start))
    ports = [port for one in summary.domains for port in one.ports]
    assert sum(port.raised for port in ports) == raised
    assert sum(port.irqs for port in ports) == begun
    length = summary.end - summary.start
    for port in ports:
        assert port.delivered == port.latency.count
        assert port.delivered <= sum(port.outcomes[out] for out in ("pending", "masked", "waiting")) or start
        assert port.handler.count <= port.irqs
        assert port.handler.max <= length
    for one in summary.domains:
        assert 0 <= one.domain.pending <= one.max_pending <= 3
        for vcpu in one.vcpus.values():
            assert sum(vcpu.spent.values()) <= length
    summary_text(summary, Selection(), Options())
    json.dumps(summary_dict(summary, Selection(), Options()))

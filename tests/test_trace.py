"""Traces of modelled hosts: the lines' form, flows from raise to handler, files, hashes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pvirq.abi.xen import VIRQ_DEBUG
from pvirq.host import Host
from pvirq.lab.lines import handler_name
from pvirq.lab.trace import KINDS, Trace
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.xen import evtchn

KERNELS = ("pvops", "pvops-2l", "2.6.18", "suse")

# The keys of each kind of line, in order; those in brackets may be missing.
KEYS = {
    "domain": "t k d name vcpus kind kernel [irqs]",
    "end": "t k d why",
    "bind": "t k d v p type [rd] [rp] [virq] [pirq]",
    "close": "t k d p",
    "raise": "t k d v p out by [flow]",
    "unmask": "t k d v p pending by [flow]",
    "upcall": "t k d v",
    "irq": "t k d v ph [irq] p [name] [handler] [flow]",
    "eoi": "t k d v [irq] [p] [spurious]",
    "run": "t k d v",
    "stop": "t k d v why",
    "wake": "t k d v",
    "mark": "t k text",
}


@pytest.fixture
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


class Echo:
    """Two guests' ends of a channel: each handler notifies the other end until `left` is used up."""

    def __init__(self, host: Host, kernel: str) -> None:
        self.host = host
        self.left = 0
        self.one, self.other = host.model(kernel), host.model(kernel)
        self.there = self.one.kernel.events.bind_listening(
            self.other.domain.domid, self._end(self.one.kernel), "there", self
        )
        self.port = self.one.kernel.events.evtchn_from_irq(self.there)
        self.here = self.other.kernel.events.bind_interdomain(
            self.one.domain.domid, self.port, self._end(self.other.kernel), "here", self
        )
        host.run(lambda: host.quiet)

    def _end(self, kernel: Kernel[Any]) -> Any:
        def handler(irq: int, dev_id: object) -> IrqReturn:
            if self.left:
                self.left -= 1
                kernel.events.notify_remote_via_irq(irq)
            kernel.events.eoi(irq)
            return IRQ_HANDLED

        return handler

    def play(self, rounds: int) -> None:
        """So many events back and forth, after one that domain 0's side of the world doesn't know of."""
        self.left = rounds
        self.one.kernel.queue_work(lambda: self.one.kernel.events.notify_remote_via_irq(self.there))
        self.host.run(lambda: self.host.quiet)


def check_form(line: str) -> None:
    event = json.loads(line)
    keys = iter(event)
    for key in KEYS[event["k"]].split():
        if not (key.startswith("[") and key.strip("[]") not in event):
            assert next(keys) == key.strip("[]"), line
    assert next(keys, None) is None, line
    assert line == json.dumps(event, separators=(",", ":"))


def test_every_line_is_as_the_format_has_it(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    with Host(hardware="writeup") as host, Trace(host, path) as trace:
        guest = host.model("suse", vcpus=2, name='a "guest" é')
        host.attach_disk(guest, "xvda", "/dev/ata1")
        host.run(lambda: guest.has_disk("xvda"))
        trace.mark('said "so"')
        host.destroy(guest)
        host.run(lambda: host.quiet)
    header, *lines = path.read_text(encoding="ascii").splitlines()
    for line in lines:
        check_form(line)
    assert {json.loads(line)["k"] for line in lines} == KEYS.keys()
    assert json.loads(header) == {
        "pvirq": "trace",
        "version": 1,
        "seed": None,
        "start": 0,
        "domains": [{"d": 0, "name": "Domain-0", "vcpus": 2, "kind": "modelled", "kernel": "Pvops 6.1.0"}],
    }
    assert trace.where(k="domain") == [
        {"t": 0, "k": "domain", "d": 1, "name": 'a "guest" é', "vcpus": 2, "kind": "modelled",
         "kernel": "XenLinuxSuse 2.6.32"}
    ]  # fmt: skip
    assert trace.where(k="end")[-1]["why"] == "destroyed"
    times = [event["t"] for event in trace]
    assert times == sorted(times)
    assert times[-1] > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_flows_lead_from_raise_to_handler(host: Host, kernel: str) -> None:
    echo = Echo(host, kernel)
    with Trace(host) as trace:
        echo.play(6)
    pair = {echo.one.domain.domid, echo.other.domain.domid}
    raises = [event for event in trace.where(k="raise") if event["d"] in pair]
    entries = [event for event in trace.where(k="irq", ph="B") if event["d"] in pair]
    assert [event["out"] for event in raises] == ["pending"] * 7
    assert [event["by"] for event in raises] == [
        [pair_member, 0] for pair_member in [echo.one.domain.domid, echo.other.domain.domid] * 4
    ][:7]
    assert [[event["flow"]] for event in raises] == [event["flow"] for event in entries]
    assert len({event["flow"] for event in raises}) == 7
    assert {event["name"] for event in entries} == {"here", "there"}
    assert {event["handler"] for event in entries} == {"Echo._end.<locals>.handler"}
    # Each entry is inside an upcall's turn: run, upcall, B, E, stop.
    ours = [event for event in trace if event.get("d") == echo.other.domain.domid and event["k"] != "raise"]
    shape = [event["k"] + event.get("ph", "") for event in ours if event["k"] not in ("bind", "eoi", "unmask")]
    assert shape[:6] == ["wake", "run", "upcall", "irqB", "irqE", "stop"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_are_one(host: Host, kernel: str) -> None:
    """What comes while one is pending has its number; what comes while it is handled, one of its own."""
    echo = Echo(host, kernel)
    notify = echo.other.kernel.events.notify_remote_via_irq
    with Trace(host) as trace:
        for _ in range(3):
            notify(echo.here)
        host.run(lambda: host.quiet)
        notify(echo.here)
        host.run(lambda: host.quiet)
    raises = trace.where(k="raise", d=echo.one.domain.domid, p=echo.port)
    assert [event["out"] for event in raises] == ["pending", "coalesced", "coalesced", "pending"]
    first, second = raises[0]["flow"], raises[-1]["flow"]
    assert [event["flow"] for event in raises] == [first, first, first, second]
    entries = trace.where(k="irq", ph="B", d=echo.one.domain.domid, p=echo.port)
    assert [event["flow"] for event in entries] == [[first], [second]]
    assert all(event["by"] == "xen" for event in raises)  # who stands outside


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_masked_event_keeps_its_flow(host: Host, kernel: str) -> None:
    echo = Echo(host, kernel)
    echo.one.kernel.irq.disable_irq(echo.there)
    with Trace(host) as trace:
        echo.other.kernel.events.notify_remote_via_irq(echo.here)
        host.run(lambda: host.quiet)
        echo.one.kernel.irq.enable_irq(echo.there)
        host.run(lambda: host.quiet)
    [raised] = trace.where(k="raise", d=echo.one.domain.domid, p=echo.port)
    assert raised["out"] == "masked"
    [entry] = trace.where(k="irq", ph="B", d=echo.one.domain.domid, p=echo.port)
    assert entry["flow"] == [raised["flow"]]


def test_what_was_pending_before_has_a_number_when_it_is_raised_again(host: Host) -> None:
    echo = Echo(host, "pvops")
    echo.other.kernel.events.notify_remote_via_irq(echo.here)
    with Trace(host) as trace:
        echo.other.kernel.events.notify_remote_via_irq(echo.here)
        host.run(lambda: host.quiet)
    [raised] = trace.where(k="raise", p=echo.port, d=echo.one.domain.domid)
    assert raised["out"] == "coalesced"
    assert trace.where(k="irq", ph="B", p=echo.port)[0]["flow"] == [raised["flow"]]


def test_ports_that_are_there_when_it_begins(host: Host) -> None:
    echo = Echo(host, "2.6.18")
    with Trace(host) as trace:
        pass
    binds = trace.where(k="bind")
    assert len(binds) == sum(channel.usable for domain in host.hypervisor.domains.values() for channel in domain.evtchn)
    assert {
        "t": 0, "k": "bind", "d": echo.one.domain.domid, "v": 0, "p": echo.port, "type": "interdomain",
        "rd": echo.other.domain.domid, "rp": echo.other.kernel.events.evtchn_from_irq(echo.here),
    } in binds  # fmt: skip


def test_both_ends_of_a_channel_that_comes_and_goes(host: Host) -> None:
    one, other = host.hypervisor.create_domain(vcpus=2), host.hypervisor.create_domain()
    with Trace(host, kinds=["bind", "close"]) as trace:
        there = evtchn.alloc_unbound(one, one.domid, other.domid)
        evtchn.bind_vcpu(one, there, 1)
        here = evtchn.bind_interdomain(other, one.domid, there)
        evtchn.close(other, here)
        virq = evtchn.bind_virq(one, VIRQ_DEBUG, 1)
        evtchn.close(one, there)
    ends = [event for event in trace if event["d"] in (one.domid, other.domid)]
    short = [tuple(event.get(key) for key in ("k", "d", "v", "p", "type", "rd", "rp", "virq")) for event in ends]
    assert short == [
        ("bind", one.domid, 0, there, "unbound", other.domid, None, None),
        ("bind", one.domid, 1, there, "unbound", other.domid, None, None),
        ("bind", other.domid, 0, here, "interdomain", one.domid, there, None),
        ("bind", one.domid, 1, there, "interdomain", other.domid, here, None),
        ("close", other.domid, None, here, None, None, None, None),
        ("bind", one.domid, 1, there, "unbound", other.domid, None, None),
        ("bind", one.domid, 1, virq, "virq", None, None, VIRQ_DEBUG),
        ("close", one.domid, None, there, None, None, None, None),
    ]


def test_the_same_run_has_the_same_hash(tmp_path: Path) -> None:
    hashes = []
    for path in (None, None, tmp_path / "trace.jsonl"):
        with Host(hardware="writeup") as host, Trace(host, path) as trace:
            guest = host.model("pvops", vcpus=2)
            host.attach_disk(guest, "xvda", "/dev/ata1")
            host.run(lambda guest=guest: guest.has_disk("xvda"))  # type: ignore[misc]
            echo = Echo(host, "2.6.18")
            if hashes:
                assert len(trace.events) > 100  # looking at it changes nothing
            echo.play(3)
        hashes.append(trace.hash())
    assert len(set(hashes)) == 1
    with Host() as host, Trace(host) as trace:
        host.model("pvops", vcpus=2)
    assert trace.hash() != hashes[0]


def test_the_file_has_what_memory_has(tmp_path: Path) -> None:
    with Host() as host:
        echo = Echo(host, "pvops")
        with Trace(host) as memory, Trace(host, tmp_path / "trace.jsonl") as file:
            echo.play(5)
            assert file.events == memory.events
            echo.play(5)
        assert file.events == memory.events
        assert file.hash() == memory.hash()
        echo.play(5)
        assert file.events == memory.events  # closed
    with pytest.raises(OSError):
        Trace(host, tmp_path / "missing" / "trace.jsonl")


def test_only_the_kinds_that_are_wanted(host: Host) -> None:
    echo = Echo(host, "pvops")
    with Trace(host, kinds=("irq", "raise")) as trace:
        echo.play(4)
        trace.mark("here")
    assert {event["k"] for event in trace} == {"irq", "raise", "mark"}
    assert all(event["flow"] for event in trace.where(k="irq", ph="B"))
    with pytest.raises(ValueError, match="no such kind of event: nonsense"):
        Trace(host, kinds=["nonsense", *KINDS])


def test_notes_have_the_flow_of_the_port_that_they_name(host: Host) -> None:
    echo = Echo(host, "pvops")
    domain = echo.one.domain
    with Trace(host) as trace:
        echo.other.kernel.events.notify_remote_via_irq(echo.here)
        host.hypervisor.probes.note("fault", domain.vcpus[0], rule="storm", action="again", p=echo.port)
        host.run(lambda: host.quiet)
        host.hypervisor.probes.note("choice", what="vcpu", n=2, of=[[1, 0], [2, 0]], took=[2, 0])
        host.hypervisor.probes.note("fault", domain.vcpus[0], rule="storm", p=echo.port)
    flow = trace.where(k="raise", d=domain.domid)[0]["flow"]
    faults = trace.where(k="fault")
    assert faults[0] == {
        "t": 0, "k": "fault", "d": domain.domid, "v": 0, "rule": "storm", "action": "again", "p": echo.port,
        "flow": flow,
    }  # fmt: skip
    assert "flow" not in faults[1]
    assert trace.where(k="choice") == [
        {"t": 0, "k": "choice", "what": "vcpu", "n": 2, "of": [[1, 0], [2, 0]], "took": [2, 0]}
    ]


def test_time_stands_in_the_trace_as_it_jumps(host: Host) -> None:
    guest = host.model("pvops")
    host.run(lambda: host.quiet)
    fired: list[int] = []
    with Trace(host) as trace:
        for when in (10_000, 10_000, 2_000_000):
            guest.kernel.set_timer(when, lambda: fired.append(guest.kernel.now()))
        host.run(lambda: len(fired) == 3)
        host.clock.jump_to(5_000_000)  # between two runs
        evtchn.send_guest_vcpu_virq(guest.domain.vcpus[0], 0)
        trace.mark("end")
    entries = trace.where(k="irq", ph="B", name="timer0", d=guest.domain.domid)
    assert [event["t"] for event in entries] == [10_000, 2_000_000]
    assert [event["t"] for event in trace.where(k="raise", d=guest.domain.domid)] == [10_000, 2_000_000, 5_000_000]
    assert trace.where(k="mark")[0]["t"] == 5_000_000


def test_a_long_trace_is_written_as_it_goes(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded doesn't grow without end, where time goes on."""
    monkeypatch.setattr("pvirq.lab.recorder.FULL", 100)
    guest = host.model("pvops")
    host.run(lambda: host.quiet)
    path = tmp_path / "trace.jsonl"
    with Trace(host) as whole, Trace(host, path) as trace:
        done = guest.kernel.spawn("busy", guest.kernel.compute(100_000_000))
        most = 0

        def look() -> bool:
            nonlocal most
            most = max(most, len(trace._recorder.events))
            return done.done

        host.run(look)
        assert most < 200
    assert Counter(event["k"] for event in trace)["raise"] >= 20
    assert trace.events == whole.events


def test_what_is_typed(host: Host) -> None:
    guest = host.model("pvops")
    with Trace(host) as trace:
        guest.console.send(b"ls\n")
        host.run(lambda: host.quiet)
    assert trace.where(k="input") == [{"t": 0, "k": "input", "to": guest.domain.domid, "data": "bHMK"}]


def test_names_of_handlers() -> None:
    from functools import partial

    assert handler_name("xen_timer_interrupt") == "xen_timer_interrupt"
    assert handler_name(partial(partial(Host.close), None)) == "Host.close"
    assert handler_name(Host.close) == "Host.close"
    assert handler_name(object()) == "object"


def test_closing_twice_and_after_the_host(tmp_path: Path) -> None:
    with Host() as host:
        guest = host.model("pvops")
        trace = Trace(host, tmp_path / "trace.jsonl")
        host.run(lambda: host.quiet)
        host.destroy(guest)
    trace.close()
    trace.close()
    assert trace.where(k="end", d=1)


def test_choices_and_the_seed() -> None:
    hashes = []
    for _ in range(2):
        with Host(seed=3) as host:
            assert host.schedule is not None
            before = host.schedule.count
            with Trace(host) as trace, Trace(host, kinds=["choice"]) as choices:
                Echo(host, "pvops").play(20)
            told = choices.events
            assert [event["n"] for event in told] == list(range(before, host.schedule.count))
            taken = {number: took for number, took in host.schedule.taken.items() if number >= before}
            assert {event["n"]: event["took"] for event in told if event["took"]} == taken
        assert trace.header["seed"] == 3
        assert trace.where(k="choice") == told
        assert list(told[0]) == ["t", "k", "what", "n", "of", "took"]
        assert not host.hypervisor.probes.instruments
        hashes.append(trace.hash())
    with Host(seed=4) as host, Trace(host) as trace:
        Echo(host, "pvops").play(20)
    assert hashes[0] == hashes[1] != trace.hash()


def test_traces_may_end_in_any_order() -> None:
    with Host(seed=3) as host:
        echo = Echo(host, "pvops")
        first, second = Trace(host), Trace(host)
        echo.play(5)
        first.close()
        count = len(first.events)
        echo.play(5)
        second.close()
        assert len(first.events) == count
        assert len(second.where(k="choice")) > len(first.where(k="choice"))
        echo.play(5)
        assert second.events[:count] == first.events


@pytest.mark.parametrize("with_file", [True, False])
def test_in_a_fork_it_goes_on_in_memory(tmp_path: Path, with_file: bool) -> None:
    path = tmp_path / "trace.jsonl"
    with Host(seed=3) as host:
        echo = Echo(host, "pvops")

        def go_on(host: Host) -> tuple[list[dict[str, Any]], str]:
            echo.play(5)
            trace.close()
            return trace.events, trace.hash()

        with Trace(host, path if with_file else None) as trace:
            echo.play(5)
            there = host.fork(go_on)
            other = host.fork(go_on, seed=9)
            echo.play(5)
            events, hash = there.result(60)
            elsewhere, _ = other.result(60)
        assert (trace.events, trace.hash()) == (events, hash)
        choices = [event for event in elsewhere if event["k"] == "choice"]
        assert choices[-1]["n"] + 1 < len(choices)  # numbered anew from the fork on
    if with_file:
        assert len(path.read_text().splitlines()) == 1 + len(events)

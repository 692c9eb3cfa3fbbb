"""Rules as text and as values: which there are, what is refused and how, when one fires."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pvirq
from faultlib import MS, bare, new_host, pair, run_for, take
from pvirq.abi.errno import Errno
from pvirq.lab.faults import Faults, Rule
from pvirq.lab.faults import kinds as fault_kinds
from pvirq.lab.faults.kinds import KINDS, FaultKind, Spec
from pvirq.lab.faults.values import FaultError
from pvirq.xen import evtchn


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with new_host() as host:
        yield host


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_each_example_is_its_own_text(kind: FaultKind, host: pvirq.Host) -> None:
    assert str(fault_kinds.parse(kind.example)) == kind.example
    with Faults(host) as faults:
        rule = faults.rule(kind.example)
        assert str(rule) == kind.example
        assert faults.rules == [rule]
    assert not faults.rules


def test_a_program_makes_the_same_rules(host: pvirq.Host) -> None:
    faults, guest = Faults(host), host.model("pvops", name="u1")
    made: list[tuple[Rule, str]] = [
        (faults.lose(domain=guest, irq="blkif", count=1), "lose domain=1 irq=blkif count=1"),
        (faults.lose(domain="u1"), "lose domain=u1"),
        (
            faults.delay(5 * MS, device="vbd-51712", probability=0.1, after=2, until=3.5),
            "delay 5ms device=vbd-51712 probability=0.1 after=2s until=3500ms",
        ),
        (faults.duplicate(kind="ipi", direction="both"), "duplicate kind=ipi direction=both"),
        (faults.duplicate(1500), "duplicate 1500ns"),
        (faults.reorder(3, within=MS), "reorder 3 within=1ms"),
        (faults.storm(7, interval=250, port=9, after=1, period=0.5, count=4),
         "storm 7 interval=250ns port=9 after=1s period=500ms count=4"),
        (faults.fail("evtchn.bind_virq", Errno.ENOSPC, domain=0), "fail evtchn.bind_virq ENOSPC domain=0"),
        (faults.fail("grant_table_op.copy", "GNTST_bad_page"), "fail grant_table_op.copy GNTST_bad_page"),
        (faults.wallclock(-3600 * 10**9, domain=guest, after=1), "wallclock -3600s domain=1 after=1s"),
        (faults.starve(0.25, vcpu=1, after=1), "starve 0.25 vcpu=1 after=1s"),
    ]  # fmt: skip
    for rule, text in made:
        assert str(rule) == text
        assert str(faults.rule(text)) == text
    faults.clear()
    assert not host.hypervisor.probes.filters
    assert not host.hypervisor.probes.checks


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "a rule begins with its kind, as in: lose irq=blkif count=1"),
        ("loose irq=blkif", "there is no fault 'loose', but 'lose'; `pvirq faults` lists them"),
        ("lose iqr=blkif", "lose takes no 'iqr', but 'irq'; it takes domain, port, irq, device, kind, vcpu, "
         "direction, count, skip, every, probability, after, until"),
        ("lose blkif", "lose: what is 'blkif'? Expected NAME=VALUE, as in: lose irq=blkif domain=1 count=1 after=2s"),
        ("lose after=2", "lose: after: '2' is no time: expected a number and a unit, as in 250us, 5ms or 1.5s"),
        ("lose count=0", "lose: count: 0 is no number (at least 1)"),
        ("lose count=many", "lose: count: 'many' is no number"),
        ("lose port=1 port=2", "lose: port is given twice"),
        ("lose probability=2", "lose: probability: '2' is not between 0 and 1"),
        ("lose probability=nan", "lose: probability: 'nan' is not between 0 and 1"),
        ("lose after=2s until=1s", "lose after=2s until=1s: it is over before it begins"),
        ("lose 'irq=a", "\"lose 'irq=a\": No closing quotation"),
        ("delay", "delay: ns is missing (how much later)"),
        ("delay 5ms 6ms", "delay: what is '6ms'? Expected NAME=VALUE, as in: delay 5ms device=vbd-51712 "
         "probability=0.1 after=2s until=3s"),
        ("delay -5ms", "delay: ns: -5000000 is no time in ns (at least 1)"),
        ("delay 0.1ns", "delay: ns: '0.1ns' is finer than a nanosecond"),
        ("storm 5 direction=up", "storm: direction: 'up' is none of in, out, both"),
        ("fail evtchn.bind_virq ESOMETHING",
         "fail: error: 'ESOMETHING' is no error: expected a name such as ENOSPC or GNTST_bad_gntref"),
        ("hostile truth", "hostile: lie: 'truth' is none of id, status, garbage, index"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(text: str, why: str) -> None:
    with pytest.raises(FaultError) as error:
        fault_kinds.parse(text)
    assert str(error.value) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("lose kind=timr", "lose kind=timr: no kind 'timr'; there are interdomain, ipi, pirq, virq, argo, con_ring"),
        ("fail evtchn.bind_vriq ENOSPC",
         "fail evtchn.bind_vriq ENOSPC: no operation 'evtchn.bind_vriq', but 'evtchn.bind_virq'"),
        ("fail evtchn.close GNTST_no_space",
         "fail evtchn.close GNTST_no_space: only grant operations have a status such as GNTST_no_space"),
    ],
)  # fmt: skip
def test_what_this_host_cannot_have(host: pvirq.Host, text: str, why: str) -> None:
    faults = Faults(host)
    with pytest.raises(FaultError, match=f"^{why}"):
        faults.rule(text)
    assert not faults.rules
    assert not host.hypervisor.probes.filters


def test_a_program_is_told_as_well(host: pvirq.Host) -> None:
    faults = Faults(host)
    with pytest.raises(FaultError, match=r"^lose: count: True is no number"):
        faults.lose(count=True)
    with pytest.raises(FaultError, match=r"^after: -1 is no time in seconds"):
        faults.lose(after=-1)
    with pytest.raises(FaultError, match=r"^delay: ns: 1.5 is no time in ns"):
        faults.delay(1.5)  # type: ignore[arg-type]
    with pytest.raises(FaultError, match=r"^lose takes no 'direktion', but 'direction'"):
        faults.lose(direktion="in")  # type: ignore[call-arg]


def test_no_backends_without_a_modelled_domain_0() -> None:
    with pvirq.Host(dom0=False, machine_memory=1 << 28) as host:
        faults = Faults(host)
        for text in ("slow 5ms", "restart vbd"):
            with pytest.raises(FaultError, match="this host has no backends"):
                faults.rule(text)
        faults.rule("lose irq=blkif")


_values = {
    "TIME": st.integers(1_000_000, 10**15),
    "N": st.integers(2, 10**9),
    "SHARE": st.floats(0, 1),
    "DOMAIN": st.integers(0, 32751) | st.sampled_from(["u1", "a b", "o'c", "x=y", "12a"]),
    "ERROR": st.sampled_from(["EPERM", "ENOSPC", "GNTST_eagain"]),
}


@st.composite
def _specs(draw: st.DrawFn) -> Spec:
    kind = KINDS[draw(st.sampled_from(sorted(KINDS)))]
    given: dict[str, object] = {}
    for param in kind.all_params:
        if param.required or draw(st.booleans()):
            shown = param.form.shown
            words = st.sampled_from(shown.split("|")) if "|" in shown else st.text("abc-*. 'é\"\\", min_size=1)
            given[param.name] = draw(_values.get(shown, words))
    given.pop("until", None)
    return fault_kinds.make(kind.name, given)


@given(_specs())
def test_any_rule_is_the_same_after_its_text(spec: Spec) -> None:
    again = fault_kinds.parse(str(spec))
    assert again == spec
    assert str(again) == str(spec)


# -- when a rule fires -------------------------------------------------------------------------------------------------


def firings(host: pvirq.Host, rule: str, events: int, seed: int = 0) -> str:
    """Which of some events, 1 ms apart, a rule loses: one letter each."""
    domain, faults, text = bare(host), Faults(host, seed), ""
    ours, theirs = pair(domain, host.dom0.domain)
    with faults.rule(f"{rule} domain={domain.domid} port={ours}") as made:
        for _ in range(events):
            evtchn.send(host.dom0.domain, theirs)
            text += "." if take(domain) else "x"
            run_for(host, MS)
    assert made.fired == text.count("x")
    evtchn.send(host.dom0.domain, theirs)
    assert take(domain) == [ours]  # it is gone
    return text


@pytest.mark.parametrize(
    ("rule", "lost"),
    [
        ("lose", "xxxxxxxxxx"),
        ("lose count=2", "xx........"),
        ("lose skip=3", "...xxxxxxx"),
        ("lose skip=3 count=1", "...x......"),
        ("lose every=3", "..x..x..x."),
        ("lose skip=1 every=2 count=3", "..x.x.x..."),
        ("lose after=2ms", "..xxxxxxxx"),
        ("lose until=3ms", "xxx......."),
        ("lose after=3ms until=5ms", "...xx....."),
        ("lose after=3ms every=2", "....x.x.x."),
        ("lose probability=0", ".........."),
    ],
)
def test_when_it_fires(host: pvirq.Host, rule: str, lost: str) -> None:
    assert firings(host, rule, 10) == lost


def test_chances_come_from_the_seed() -> None:
    def run(seed: int) -> str:
        with new_host() as host:
            return firings(host, "lose probability=0.5", 64, seed)

    first = run(1)
    assert run(1) == first
    assert run(2) != first
    assert 16 < first.count("x") < 48


def test_a_rule_does_not_draw_another_ones_chances(host: pvirq.Host) -> None:
    domain = bare(host)
    ours, theirs = pair(domain, host.dom0.domain)
    other, others = pair(domain, host.dom0.domain)

    def run(between: bool) -> list[bool]:
        with Faults(host, 5) as faults:
            faults.lose(port=ours, probability=0.5)
            faults.lose(port=other, probability=0.5)
            lost = []
            for _ in range(32):
                if between:
                    evtchn.send(host.dom0.domain, others)
                    take(domain)
                evtchn.send(host.dom0.domain, theirs)
                lost.append(not take(domain))
            return lost

    assert run(False) == run(True)

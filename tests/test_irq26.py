"""The generic interrupt layers of Linux 2.6, with chips that only take notes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pvirq.abi.errno import Errno
from pvirq.linux.irq import (
    IRQ_HANDLED,
    IRQ_NONE,
    IRQF_NOBALANCING,
    IRQF_PERCPU,
    IRQF_SHARED,
    IrqError,
    IrqHandler,
    IrqReturn,
)
from pvirq.linux.irq26 import IRQ_STORM, IRQ_TYPE_PROBE, IRQF_PROBE_SHARED, IrqChip26, IrqDesc26, IrqLayer26
from pvirq.linux.irq2618 import IrqLayer2618, Status2618
from pvirq.linux.irq2632 import IrqLayer2632, Status2632
from pvirq.linux.kthread import Body, Completion

LAYERS = [IrqLayer2618, IrqLayer2632]


class Machine:
    """A layer with 40 lines on one noting chip; line 5 has none."""

    def __init__(self, layer: type[IrqLayer26]) -> None:
        self.notes: list[str] = []
        self.log: list[str] = []
        self.now = 0
        self.cpu = 0
        self.later: list[tuple[int, Callable[[], None]]] = []
        self.irqs = layer(
            2,
            40,
            cpu=lambda: self.cpu,
            jiffies=lambda: self.now,
            hz=100,
            printk=self.log.append,
            after=lambda jiffies, callback: self.later.append((self.now + jiffies, callback)),
        )
        self.irqs.online = 3
        self.retriggers = True
        self.chip = IrqChip26(
            "chip",
            startup=self.startup,
            shutdown=self.note("shutdown"),
            enable=self.note("enable"),
            disable=self.note("disable"),
            ack=self.ack,
            mask=self.note("mask"),
            unmask=self.note("unmask"),
            mask_ack=self.ack,
            eoi=self.note("eoi"),
            end=self.note("end"),
            set_affinity=self.set_affinity,
            retrigger=self.retrigger,
        )
        self.irqs.init_desc = self.init_desc
        if isinstance(self.irqs, IrqLayer2632):
            for irq in range(40):
                self.irqs.irq_to_desc_alloc(irq)
        self.entry = [self.irqs.entry(0), self.irqs.entry(1)]

    def init_desc(self, desc: IrqDesc26) -> None:
        if desc.irq != 5:
            desc.chip = self.chip
            if isinstance(self.irqs, IrqLayer2632):
                desc.flow, desc.name = self.irqs.handle_level_irq, "level"

    def note(self, what: str) -> Callable[[IrqDesc26], None]:
        return lambda desc: self.notes.append(f"{what} {desc.irq}")

    def startup(self, desc: IrqDesc26) -> int:
        self.notes.append(f"startup {desc.irq}")
        return 0

    def ack(self, desc: IrqDesc26) -> None:
        if desc.move_irq:
            self.irqs.move_native_irq(desc)
        self.notes.append(f"ack {desc.irq}")

    def set_affinity(self, desc: IrqDesc26, mask: int) -> None:
        self.notes.append(f"affinity {desc.irq} {mask}")
        desc.affinity = mask & -mask

    def retrigger(self, desc: IrqDesc26) -> bool:
        self.notes.append(f"retrigger {desc.irq}")
        return True

    def took(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes


def handled(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


def unhandled(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_NONE


def doing(what: Callable[[], object], result: IrqReturn = IRQ_HANDLED) -> IrqHandler:
    """A handler that does something."""

    def handler(irq: int, dev_id: object) -> IrqReturn:
        what()
        return result

    return handler


@pytest.fixture(params=LAYERS, ids=["2.6.18", "2.6.32"])
def machine(request: pytest.FixtureRequest) -> Machine:
    return Machine(request.param)


@pytest.fixture
def old() -> Machine:
    return Machine(IrqLayer2618)


@pytest.fixture
def new() -> Machine:
    return Machine(IrqLayer2632)


def fails(errno: Errno, call: Callable[..., Any], *args: Any) -> None:
    with pytest.raises(IrqError) as error:
        call(*args)
    assert error.value.errno == errno


def test_status_bits_are_each_versions() -> None:
    assert (Status2618.INPROGRESS, Status2618.DISABLED, Status2618.PENDING) == (0x10000, 0x20000, 0x40000)
    assert (Status2632.INPROGRESS, Status2632.DISABLED, Status2632.PENDING) == (0x100, 0x200, 0x400)
    for version in (Status2618, Status2632):
        bits = [getattr(version, name) for name in vars(version) if name.isupper()]
        assert len(set(bits)) == len(bits)
        assert all(bit & bit - 1 == 0 for bit in bits)


def test_first_request_starts_the_line_and_last_free_stops_it(machine: Machine) -> None:
    irqs = machine.irqs
    assert irqs.desc(7).depth == 1
    assert irqs.desc(7).status == irqs.bits.DISABLED
    irqs.request_irq(7, handled, IRQF_SHARED, "one", 1)
    irqs.request_irq(7, handled, IRQF_SHARED, "two", 2)
    assert [note for note in machine.took() if "affinity" not in note] == ["startup 7"]
    desc = irqs.desc(7)
    assert (desc.depth, desc.status & irqs.bits.DISABLED) == (0, 0)
    assert [action.name for action in desc.actions] == ["one", "two"]
    irqs.free_irq(7, 1)
    assert machine.took() == []
    irqs.free_irq(7, 2)
    assert machine.took() == ["shutdown 7"]
    assert desc.status & irqs.bits.DISABLED


def test_what_request_refuses(machine: Machine) -> None:
    irqs = machine.irqs
    fails(Errno.EINVAL, irqs.request_irq, 7, handled, IRQF_SHARED, "no dev_id")
    fails(Errno.EINVAL, irqs.request_irq, 40, handled, 0, "beyond")
    fails(Errno.EINVAL, irqs.request_irq, -1, handled, 0, "below")
    fails(Errno.ENOSYS, irqs.request_irq, 5, handled, 0, "no chip")
    irqs.desc(6).status |= irqs.bits.NOREQUEST
    fails(Errno.EINVAL, irqs.request_irq, 6, handled, 0, "not to be requested")
    irqs.request_irq(7, handled, 0, "mine")
    fails(Errno.EBUSY, irqs.request_irq, 7, handled, IRQF_SHARED, "yours", 1)
    irqs.request_irq(8, handled, IRQF_SHARED, "mine", 1)
    fails(Errno.EBUSY, irqs.request_irq, 8, handled, 0, "yours", 2)
    fails(Errno.EBUSY, irqs.request_irq, 8, handled, IRQF_SHARED | 4, "another trigger", 2)
    assert [len(irqs.desc(irq).actions) for irq in (5, 6, 7, 8)] == [0, 0, 1, 1]


def test_only_the_old_kernel_complains_of_a_mismatch(old: Machine, new: Machine) -> None:
    for machine in (old, new):
        machine.irqs.request_irq(7, handled, 0, "mine")
        fails(Errno.EBUSY, machine.irqs.request_irq, 7, handled, 0, "yours")
        fails(Errno.EBUSY, machine.irqs.request_irq, 7, handled, IRQF_PROBE_SHARED, "quiet")
    assert old.log == ["IRQ handler type mismatch for IRQ 7"]
    assert new.log == []


def test_per_cpuness_must_agree_where_it_exists(old: Machine, new: Machine) -> None:
    for machine in (old, new):
        machine.irqs.request_irq(7, handled, IRQF_SHARED | IRQF_PERCPU, "a", 1)
    old.irqs.request_irq(7, handled, IRQF_SHARED, "b", 2)
    fails(Errno.EBUSY, new.irqs.request_irq, 7, handled, IRQF_SHARED, "b", 2)
    assert new.irqs.desc(7).status & Status2632.PER_CPU
    assert not old.irqs.desc(7).status & Status2618.PER_CPU


def test_trigger_types(old: Machine, new: Machine) -> None:
    old.irqs.request_irq(7, handled, 8, "low")
    assert old.log == ["No IRQF_TRIGGER set_type function for IRQ 7 (chip)"]
    new.irqs.request_irq(7, handled, 8, "low")
    assert new.log == []

    def set_type(desc: IrqDesc26, kind: int) -> None:
        if kind != IRQ_TYPE_PROBE:
            raise IrqError(Errno.EINVAL)

    new.chip.set_type = set_type
    fails(Errno.EINVAL, new.irqs.request_irq, 8, handled, 4, "high")
    assert new.log == ["setting trigger mode 4 for irq 8 failed (chip)"]
    assert not new.irqs.desc(8).actions
    assert new.irqs.desc(8).status & Status2632.DISABLED


def test_freeing_what_is_not_there(machine: Machine) -> None:
    machine.irqs.request_irq(7, handled, IRQF_SHARED, "one", 1)
    machine.irqs.free_irq(7, 2)
    machine.irqs.free_irq(9)
    machine.irqs.free_irq(99)
    assert machine.log == ["Trying to free already-free IRQ 7", "Trying to free already-free IRQ 9"]
    assert len(machine.irqs.desc(7).actions) == 1


def test_disable_nests(machine: Machine) -> None:
    irqs, desc = machine.irqs, machine.irqs.desc(7)
    irqs.request_irq(7, handled, 0, "one")
    machine.took()
    irqs.disable_irq(7)
    irqs.disable_irq(7)
    assert (desc.depth, machine.took()) == (2, ["disable 7"])
    irqs.enable_irq(7)
    assert (desc.depth, machine.took()) == (1, [])
    assert desc.status & irqs.bits.DISABLED
    irqs.enable_irq(7)
    assert (desc.depth, machine.took()) == (0, ["enable 7"])
    assert not desc.status & irqs.bits.DISABLED
    assert desc.status & irqs.bits.NOPROBE
    irqs.enable_irq(7)
    assert machine.log == ["Unbalanced enable for IRQ 7"]
    irqs.disable_irq(99)
    irqs.enable_irq(99)


def test_noautoen_waits_for_enable(machine: Machine) -> None:
    irqs, desc = machine.irqs, machine.irqs.desc(7)
    desc.status |= irqs.bits.NOAUTOEN
    irqs.request_irq(7, handled, 0, "one")
    assert "startup 7" not in machine.took()
    assert desc.depth == 1
    irqs.enable_irq(7)
    assert machine.took() == ["enable 7"]
    assert desc.depth == 0


def test_do_irq_acks_handles_and_ends(old: Machine) -> None:
    order = old.notes
    old.irqs.request_irq(7, doing(lambda: order.append("one")), IRQF_SHARED, "one", 1)
    old.irqs.request_irq(7, doing(lambda: order.append("two"), IRQ_NONE), IRQF_SHARED, "two", 2)
    order.clear()
    old.entry[1](7)
    assert order == ["ack 7", "one", "two", "end 7"]
    desc = old.irqs.desc(7)
    assert (desc.kstat, desc.status, desc.irq_count, desc.irqs_unhandled) == ([0, 1], 0, 1, 0)


def test_level_flow(new: Machine) -> None:
    order = new.notes
    new.irqs.request_irq(7, doing(lambda: order.append("one")), 0, "one")
    order.clear()
    new.entry[0](7)
    assert order == ["ack 7", "one", "unmask 7"]
    assert new.irqs.desc(7).kstat == [1, 0]


def test_percpu_flow(new: Machine) -> None:
    assert isinstance(new.irqs, IrqLayer2632)
    desc, order = new.irqs.desc(7), new.notes
    desc.flow = new.irqs.handle_percpu_irq
    new.irqs.request_irq(7, doing(lambda: order.append("one")), IRQF_PERCPU, "one")
    order.clear()
    new.entry[1](7)
    assert order == ["ack 7", "one", "eoi 7"]
    assert desc.kstat == [0, 1]


def test_do_irq_remembers_one_interrupt_of_a_disabled_line(old: Machine) -> None:
    came: list[int] = []
    irqs, desc = old.irqs, old.irqs.desc(7)
    irqs.request_irq(7, doing(lambda: came.append(7)), 0, "one")
    irqs.disable_irq(7)
    old.took()
    old.entry[0](7)
    old.entry[0](7)
    assert (came, desc.kstat, desc.status & Status2618.PENDING) == ([], [2, 0], Status2618.PENDING)
    assert old.took() == ["ack 7", "end 7", "ack 7", "end 7"]
    irqs.enable_irq(7)
    assert old.took() == ["enable 7", "retrigger 7"]
    assert desc.status & (Status2618.PENDING | Status2618.REPLAY) == Status2618.REPLAY
    old.entry[0](7)  # as the chip has raised it again
    assert came == [7]
    assert not desc.status & Status2618.REPLAY
    irqs.disable_irq(7)
    irqs.enable_irq(7)
    assert "retrigger 7" not in old.took()


def test_level_flow_leaves_a_disabled_line_masked(new: Machine) -> None:
    irqs, desc = new.irqs, new.irqs.desc(7)
    irqs.request_irq(7, handled, 0, "one")
    irqs.disable_irq(7)
    new.took()
    new.entry[0](7)
    assert (new.took(), desc.kstat, desc.status & Status2632.PENDING) == (["ack 7"], [1, 0], 0)
    irqs.enable_irq(7)
    assert new.took() == ["enable 7"]  # hardware that still wants something interrupts again


def test_an_interrupt_within_the_handler_runs_it_again(old: Machine) -> None:
    """One more, however many come: the line is busy, and only remembers that there was something."""
    came: list[int] = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        came.append(irq)
        if len(came) == 1:
            old.entry[1](7)
            old.entry[1](7)
        return IRQ_HANDLED

    old.irqs.request_irq(7, handler, 0, "one")
    old.entry[0](7)
    assert came == [7, 7]
    assert old.irqs.desc(7).kstat == [1, 2]
    assert old.irqs.desc(7).status & (Status2618.INPROGRESS | Status2618.PENDING) == 0


def test_an_interrupt_within_the_handler_is_dropped_by_the_level_flow(new: Machine) -> None:
    came: list[int] = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        came.append(irq)
        new.entry[1](7)
        return IRQ_HANDLED

    new.irqs.request_irq(7, handler, 0, "one")
    new.entry[0](7)
    assert came == [7]
    assert new.irqs.desc(7).kstat == [1, 0]


def test_disabled_by_its_handler(machine: Machine) -> None:
    irqs = machine.irqs
    irqs.request_irq(7, doing(lambda: irqs.disable_irq(7)), 0, "one")
    machine.took()
    machine.entry[0](7)
    notes = machine.took()
    assert notes[:2] == ["ack 7", "disable 7"]
    assert "unmask 7" not in notes


def test_interrupts_without_a_line(old: Machine, new: Machine) -> None:
    old.entry[0](5)
    assert old.log == ["unexpected IRQ trap at vector 05"]
    assert old.irqs.desc(5).kstat == [1, 0]
    new.entry[0](77)
    assert new.log == ["evtchn_do_upcall(0): No handler for irq 77"]
    new.entry[0](5)
    assert new.log[1:] == ["unexpected IRQ trap at vector 05"]


NOBODY = ['irq 7: nobody cared (try booting with the "irqpoll" option)', "handlers:", "(one)", "Disabling IRQ #7"]


def test_nobody_cared_in_2_6_18_has_no_time_limit(old: Machine) -> None:
    """99,901 unhandled of 100,000, be they days apart."""
    answers = [IRQ_NONE]
    old.irqs.request_irq(7, lambda irq, dev: answers[0], 0, "one")
    desc, entry = old.irqs.desc(7), old.entry[0]
    for i in range(IRQ_STORM):
        answers[0] = IRQ_HANDLED if i < 100 else IRQ_NONE
        entry(7)
    assert old.log == []  # 99,900 are not enough
    for i in range(IRQ_STORM):
        answers[0] = IRQ_HANDLED if i < 99 else IRQ_NONE
        old.now += 50
        entry(7)
    assert old.log == NOBODY
    assert (desc.depth, desc.status & Status2618.DISABLED) == (1, Status2618.DISABLED)


def test_nobody_cared_in_2_6_32_only_in_a_row(new: Machine) -> None:
    new.irqs.request_irq(7, unhandled, 0, "one")
    desc, entry = new.irqs.desc(7), new.entry[0]
    for _ in range(IRQ_STORM):
        new.now += 11  # more than a tenth of a second apart
        entry(7)
    assert new.log == []
    for _ in range(IRQ_STORM):
        entry(7)
    assert new.log == NOBODY
    assert (desc.depth, desc.status & Status2632.DISABLED) == (1, Status2632.DISABLED)
    assert desc.status & Status2632.SPURIOUS_DISABLED


def test_given_up_shared_lines_are_polled(new: Machine) -> None:
    polled: list[int] = []
    new.irqs.request_irq(7, doing(lambda: polled.append(7), IRQ_NONE), IRQF_SHARED, "one", 1)
    for _ in range(IRQ_STORM):
        new.entry[0](7)
    polled.clear()
    [(when, poll)] = new.later
    assert when == 10
    new.later.clear()
    poll()
    assert polled == [7]
    assert len(new.later) == 1
    # One more handler gives the line another chance, and ends the polling.
    new.irqs.request_irq(7, handled, IRQF_SHARED, "two", 2)
    desc = new.irqs.desc(7)
    assert not desc.status & (Status2632.SPURIOUS_DISABLED | Status2632.DISABLED)
    [(_, poll)] = new.later
    new.later.clear()
    poll()
    assert (polled, new.later) == ([7], [])


def test_interrupts_of_a_line_that_another_domain_shares_are_forgiven(machine: Machine) -> None:
    machine.irqs.request_irq(7, unhandled, 0, "one")
    asked: list[int] = []

    def ignore(irq: int) -> bool:
        asked.append(irq)
        return True

    machine.irqs.ignore_unhandled = ignore
    for _ in range(IRQ_STORM):
        machine.entry[0](7)
    assert len(asked) == IRQ_STORM
    assert machine.log == []


def test_affinity_waits_for_the_next_interrupt(machine: Machine) -> None:
    irqs, desc = machine.irqs, machine.irqs.desc(7)
    irqs.request_irq(7, handled, 0, "one")
    machine.took()
    irqs.set_affinity(7, 2)
    assert machine.took() == []
    assert desc.move_irq
    machine.entry[0](7)
    notes = machine.took()
    assert notes[1] == "affinity 7 2"
    assert (notes[0], notes[2]) in [("disable 7", "enable 7"), ("mask 7", "unmask 7")]
    assert (desc.move_irq, desc.pending_mask, desc.affinity) == (False, 0, 2)
    machine.entry[0](7)
    assert not any("affinity" in note for note in machine.took())


def test_affinity_that_cannot_be(machine: Machine) -> None:
    irqs = machine.irqs
    irqs.request_irq(7, handled, 0, "one")
    fails(Errno.EINVAL, irqs.set_affinity, 7, 4)
    fails(Errno.EINVAL, irqs.set_affinity, 40, 1)
    fails(Errno.EIO, irqs.set_affinity, 5, 1)
    irqs.set_affinity(7, 2)
    irqs.online = 1  # it went meanwhile
    machine.took()
    machine.entry[0](7)
    assert not any("affinity" in note for note in machine.took())


def test_lines_that_later_kernels_do_not_move(new: Machine) -> None:
    new.irqs.request_irq(7, handled, IRQF_PERCPU, "percpu")
    new.irqs.request_irq(8, handled, IRQF_NOBALANCING, "nobalancing")
    fails(Errno.EIO, new.irqs.set_affinity, 7, 1)
    fails(Errno.EIO, new.irqs.set_affinity, 8, 1)


def test_userlands_affinity_outlives_free_irq(new: Machine) -> None:
    new.irqs.request_irq(7, handled, 0, "one")
    assert new.took() == ["startup 7", "affinity 7 3"]
    new.irqs.set_affinity(7, 2)
    new.entry[0](7)
    new.irqs.free_irq(7)
    new.took()
    new.irqs.request_irq(7, handled, 0, "one")
    assert new.took() == ["startup 7", "affinity 7 2"]
    new.irqs.free_irq(7)
    new.irqs.online = 1
    new.took()
    new.irqs.request_irq(7, handled, 0, "one")
    assert new.took() == ["startup 7", "affinity 7 1"]


def run_probe(machine: Machine, during: dict[int, Callable[[], object]]) -> int:
    """probe_irq_on with things happening in its waits, by their ms."""

    def msleep(ms: int) -> Body[None]:
        during.get(ms, lambda: None)()
        over: Completion[None] = Completion()
        over.complete(None)
        yield over

    body = machine.irqs.probe_irq_on(msleep)
    try:
        while True:
            next(body)
    except StopIteration as stop:
        return int(stop.value)


def test_probing(machine: Machine) -> None:
    irqs = machine.irqs
    irqs.request_irq(3, handled, 0, "taken")
    irqs.desc(4).status |= irqs.bits.NOPROBE
    machine.took()
    mask = run_probe(machine, {100: lambda: machine.entry[0](9)})
    assert not mask >> 9 & 1  # it came by itself
    assert not mask >> 3 & 1
    assert not mask >> 4 & 1
    assert mask >> 7 & 1
    assert "shutdown 9" in machine.took()
    machine.entry[0](7)
    assert irqs.probe_irq_off() == 7
    assert irqs.desc(3).actions
    assert not any(desc.status & irqs.bits.AUTODETECT for desc in irqs.descs.values())
    assert "shutdown 7" in machine.took()
    assert "shutdown 3" not in machine.took()


def test_probing_finds_none_or_too_many(machine: Machine) -> None:
    run_probe(machine, {})
    assert machine.irqs.probe_irq_off() == 0
    run_probe(machine, {20: lambda: machine.entry[0](7)})  # an old one that came in time to be forgotten
    machine.entry[0](8)
    machine.entry[0](10)
    assert machine.irqs.probe_irq_off() == -8


def test_lines_are_made_when_looked_at() -> None:
    old, new = Machine(IrqLayer2618), Machine(IrqLayer2632)
    assert old.irqs.descs == {}
    old.irqs.request_irq(30, handled, 0, "one")
    assert list(old.irqs.descs) == [30]
    fresh = IrqLayer2632(1, 40, cpu=lambda: 0, jiffies=lambda: 0, hz=100, printk=new.log.append)
    assert fresh.irq_to_desc(15) is not None
    assert fresh.irq_to_desc(16) is None
    fails(Errno.EINVAL, fresh.request_irq, 16, handled, 0, "none")
    assert fresh.irq_to_desc_alloc(16) is fresh.irq_to_desc(16)
    fails(Errno.EINVAL, fresh.irq_to_desc_alloc, 40)

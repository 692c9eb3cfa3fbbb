"""The generic interrupt layer: sharing, nesting, flow handlers, lines that nobody cares for."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.abi.errno import Errno
from pvirq.linux.irq import (
    IRQ_HANDLED,
    IRQ_NONE,
    IRQF_COND_SUSPEND,
    IRQF_EARLY_RESUME,
    IRQF_FORCE_RESUME,
    IRQF_NO_AUTOEN,
    IRQF_NO_SUSPEND,
    IRQF_NOBALANCING,
    IRQF_ONESHOT,
    IRQF_PERCPU,
    IRQF_SHARED,
    IRQS_PENDING,
    IRQS_SPURIOUS_DISABLED,
    MAX_IRQS,
    IrqChip,
    IrqDesc,
    IrqError,
    IrqLayer,
    IrqReturn,
)
from pvirq.linux.irq_pm import resume_irqs, suspend_device_irqs
from pvirq.linux.irqdesc import (
    IRQ_DISABLE_UNLAZY,
    IRQ_LEVEL,
    IRQ_NO_BALANCING,
    IRQ_NOAUTOEN,
    IRQ_NOPROBE,
    IRQ_NOREQUEST,
    IRQ_PER_CPU,
    IRQ_TYPE_EDGE_FALLING,
    IRQ_TYPE_EDGE_RISING,
    IRQ_TYPE_LEVEL_HIGH,
    IRQ_TYPE_LEVEL_LOW,
)


class Line:
    """A layer with one edge line whose chip keeps a diary of what is asked of it."""

    def __init__(self, chip_name: str = "test", **fields: object) -> None:
        self.diary: list[str] = []
        self.cpu = 0
        self.now = 0
        self.log: list[str] = []
        self.later: list[tuple[int, object]] = []
        self.layer = IrqLayer(
            2,
            cpu=lambda: self.cpu,
            jiffies=lambda: self.now,
            hz=250,
            printk=self.log.append,
            after=lambda delay, callback: self.later.append((self.now + delay, callback)),
            dynirq_base=24,
        )
        self.layer.online = 3
        chip = IrqChip(
            chip_name,
            irq_ack=lambda desc: self.diary.append("ack"),
            irq_mask=lambda desc: self.diary.append("mask"),
            irq_unmask=lambda desc: self.diary.append("unmask"),
            irq_retrigger=self._retrigger,
        )
        self.chip = replace(chip, **fields)  # type: ignore[arg-type]
        self.desc = self.layer.alloc_desc()
        self.layer.set_chip_and_handler_name(self.desc, self.chip, self.layer.handle_edge_irq, "edge")

    def _retrigger(self, desc: IrqDesc) -> bool:
        self.diary.append("retrigger")
        return True

    def fire(self, times: int = 1) -> None:
        for _ in range(times):
            self.layer.generic_handle_irq(self.desc.irq)

    def request(self, result: IrqReturn = IRQ_HANDLED, flags: int = 0, dev_id: object = None) -> list[int]:
        """Add a handler; the list tells its calls."""
        calls: list[int] = []

        def handler(irq: int, dev: object) -> IrqReturn:
            assert dev is dev_id
            calls.append(irq)
            return result

        self.layer.request_irq(self.desc.irq, handler, flags, f"dev{dev_id}", dev_id)
        return calls


def errno_of(call: object) -> Errno:
    with pytest.raises(IrqError) as error:
        call()  # type: ignore[operator]
    return error.value.errno


def test_numbers_are_given_out_lowest_first() -> None:
    layer = Line().layer
    assert [layer.alloc_desc().irq for _ in range(3)] == [25, 26, 27]
    assert layer.alloc_desc(9).irq == 9
    layer.free_desc(26)
    layer.free_desc(9)
    assert [layer.alloc_desc().irq for _ in range(2)] == [26, 28]
    assert errno_of(lambda: layer.alloc_desc(28)) == Errno.EEXIST
    assert errno_of(lambda: layer.alloc_desc(MAX_IRQS)) == Errno.ENOSPC
    assert errno_of(lambda: layer.desc(9)) == Errno.EINVAL


def test_a_line_starts_with_its_first_handler_and_stops_with_the_last() -> None:
    line = Line()
    assert (line.desc.disabled, line.desc.masked, line.desc.depth) == (True, True, 1)
    calls = line.request(flags=IRQF_SHARED, dev_id="a")
    more = line.request(flags=IRQF_SHARED, dev_id="b")
    assert line.diary == ["unmask"]
    assert (line.desc.disabled, line.desc.masked, line.desc.depth) == (False, False, 0)
    line.cpu = 1
    line.fire()
    assert (calls, more, line.desc.kstat) == ([24], [24], [0, 1])
    line.layer.free_irq(24, "a")
    line.fire()
    assert (calls, more) == ([24], [24, 24])
    line.layer.free_irq(24, "b")
    assert line.diary == ["unmask", "ack", "ack", "mask"]
    assert not line.desc.started
    line.layer.free_irq(24, "b")
    assert line.log == ["Trying to free already-free IRQ 24"]


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        (IRQF_SHARED, IRQF_SHARED, True),
        (IRQF_SHARED, 0, False),
        (0, IRQF_SHARED, False),
        (0, 0, False),
        (IRQF_SHARED, IRQF_SHARED | IRQF_ONESHOT, False),
        (IRQF_SHARED | IRQF_ONESHOT, IRQF_SHARED | IRQF_ONESHOT, True),
        (IRQF_SHARED, IRQF_SHARED | IRQF_PERCPU, False),
        (IRQF_SHARED | IRQF_PERCPU, IRQF_SHARED | IRQF_PERCPU, True),
    ],
)
def test_sharing(first: int, second: int, allowed: bool) -> None:
    line = Line()
    line.request(flags=first, dev_id="a")
    if allowed:
        line.request(flags=second, dev_id="b")
        assert [action.name for action in line.desc.actions] == ["deva", "devb"]
    else:
        assert errno_of(lambda: line.request(flags=second, dev_id="b")) == Errno.EBUSY
        assert len(line.desc.actions) == 1
        assert line.log == [
            f"genirq: Flags mismatch irq 24. {second:08x} (devb) vs. {first:08x} (deva)",
        ]


def test_later_sharers_agree_on_the_trigger() -> None:
    line = Line()
    line.request(flags=IRQF_SHARED, dev_id="a")
    line.request(flags=IRQF_SHARED | 8, dev_id="b")
    assert errno_of(lambda: line.request(flags=IRQF_SHARED | 4, dev_id="c")) == Errno.EBUSY


def test_request_refuses() -> None:
    line = Line()
    assert errno_of(lambda: line.request(flags=IRQF_SHARED)) == Errno.EINVAL
    assert errno_of(lambda: line.request(flags=IRQF_SHARED | IRQF_NO_AUTOEN, dev_id="a")) == Errno.EINVAL
    assert errno_of(lambda: line.request(flags=IRQF_COND_SUSPEND)) == Errno.EINVAL
    flags = IRQF_SHARED | IRQF_COND_SUSPEND | IRQF_NO_SUSPEND
    assert errno_of(lambda: line.request(flags=flags, dev_id="a")) == Errno.EINVAL
    bare = line.layer.alloc_desc().irq
    assert errno_of(lambda: line.layer.request_irq(bare, lambda irq, dev: IRQ_NONE, 0, "x")) == Errno.ENOSYS
    assert errno_of(lambda: line.layer.request_irq(7, lambda irq, dev: IRQ_NONE, 0, "x")) == Errno.EINVAL


def test_disable_nests() -> None:
    line: Line = Line(irq_disable=lambda desc: line.diary.append("disable"))
    line.request()
    line.layer.disable_irq(24)
    line.layer.disable_irq(24)
    line.layer.enable_irq(24)
    assert line.diary == ["unmask", "disable"]
    line.layer.enable_irq(24)
    assert line.diary == ["unmask", "disable", "unmask"]
    line.layer.enable_irq(24)
    assert line.log == ["Unbalanced enable for IRQ 24"]


def test_an_edge_while_disabled_is_replayed() -> None:
    """Without irq_disable the line is disabled lazily: the next edge finds out, masks, and waits."""
    line = Line()
    calls = line.request()
    line.layer.disable_irq(24)
    line.fire()
    assert (calls, line.desc.kstat, line.diary) == ([], [0, 0], ["unmask", "mask", "ack"])
    line.layer.enable_irq(24)
    assert line.diary[3:] == ["unmask", "retrigger"]
    line.fire()
    assert (calls, line.desc.kstat) == ([24], [1, 0])


def test_no_autoen_waits_for_enable() -> None:
    line = Line()
    line.request(flags=IRQF_NO_AUTOEN)
    assert line.diary == []
    line.layer.enable_irq(24)
    assert line.diary == ["unmask"]


def test_an_edge_within_the_handler_is_handled_again() -> None:
    line = Line()
    calls = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        calls.append(line.desc.masked)
        if len(calls) < 3:
            line.cpu = 1
            line.fire()
        return IRQ_HANDLED

    line.layer.request_irq(24, handler, 0, "x")
    line.fire()
    # The line is masked by the second edge, open again as its turn comes; only the first one is counted.
    assert calls == [False, False, False]
    assert line.desc.kstat == [1, 0]


def test_a_handler_may_free_its_line() -> None:
    line = Line()

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.layer.free_irq(irq)
        line.fire()
        return IRQ_HANDLED

    line.layer.request_irq(24, handler, 0, "x")
    line.fire()
    assert line.desc.masked
    assert not line.desc.in_progress


def test_fasteoi() -> None:
    line: Line = Line(irq_eoi=lambda desc: line.diary.append("eoi"))
    line.layer.set_chip_and_handler_name(line.desc, line.chip, line.layer.handle_fasteoi_irq, "level")
    calls = line.request()
    line.fire()
    line.layer.disable_irq(24)
    line.fire()
    assert (len(calls), line.desc.kstat) == (1, [1, 0])
    assert line.diary == ["unmask", "eoi", "mask", "eoi"]


def test_a_line_without_flow_is_unexpected() -> None:
    line = Line()
    bare = line.layer.alloc_desc()
    line.layer.generic_handle_irq(bare.irq)
    assert (bare.kstat, line.log) == ([1, 0], ["unexpected IRQ trap at vector 19"])
    line.layer.generic_handle_irq(999)


def test_nobody_cared() -> None:
    """100,000 interrupts of which more than 99,900 found nobody: the line is given up, and only then."""
    line = Line()
    line.request(IRQ_NONE)
    line.fire(99_999)
    assert not line.desc.disabled
    line.fire()
    assert line.desc.disabled
    assert line.desc.istate & IRQS_SPURIOUS_DISABLED
    assert line.log[0] == 'irq 24: nobody cared (try booting with the "irqpoll" option)'
    assert line.log[-1] == "Disabling IRQ #24"
    assert line.desc.kstat == [100_000, 0]
    line.fire()
    assert line.desc.kstat == [100_000, 0]


@pytest.mark.parametrize("cared", [99, 100])
def test_somebody_cared_sometimes(cared: int) -> None:
    """A hundred handled of 100,000 save the line."""
    line = Line()
    count = 0

    def handler(irq: int, dev_id: object) -> IrqReturn:
        nonlocal count
        count += 1
        return IRQ_HANDLED if 1 < count <= 1 + cared else IRQ_NONE

    line.layer.request_irq(24, handler, 0, "x")
    line.fire(100_000)
    assert line.desc.disabled == (cared < 100)
    assert (line.desc.irq_count, line.desc.irqs_unhandled) == (0, 0)


def test_rare_spurious_interrupts_never_add_up() -> None:
    line = Line()
    line.request(IRQ_NONE)
    for _ in range(1000):
        line.now += 26  # over a tenth of a second
        line.fire()
    assert line.desc.irqs_unhandled == 1


def test_a_given_up_shared_line_is_polled_until_a_sharer_comes() -> None:
    line = Line()
    calls = line.request(IRQ_NONE, IRQF_SHARED, "a")
    line.fire(100_000)
    assert len(calls) == 100_000
    for _ in range(3):
        when, poll = line.later.pop()
        line.now = when
        assert callable(poll)
        poll()
    assert (len(calls), line.desc.kstat[0], line.now) == (100_003, 100_000, 75)
    calls = line.request(IRQ_HANDLED, IRQF_SHARED, "b")
    assert not line.desc.disabled
    line.fire()
    assert (len(calls), line.desc.kstat[0]) == (1, 100_001)
    _, poll = line.later.pop()
    assert callable(poll)
    poll()
    assert not line.later


def test_affinity() -> None:
    moves: list[int] = []

    def set_affinity(desc: IrqDesc, mask: int) -> bool:
        moves.append(mask)
        desc.effective_affinity = mask & -mask
        return True

    line = Line(irq_set_affinity=set_affinity)
    line.layer.online = 1
    line.request()
    assert (moves, line.desc.affinity) == ([1], 1)
    line.layer.online = 3
    line.layer.set_affinity(24, 2)
    assert (moves, line.desc.affinity, line.desc.affinity_set) == ([1, 2], 2, True)
    assert errno_of(lambda: line.layer.set_affinity(24, 4)) == Errno.EINVAL
    line.layer.online = 1
    line.layer.migrate_off(1)
    assert (moves, line.desc.affinity) == ([1, 2, 1], 1)
    assert errno_of(lambda: Line().layer.set_affinity(24, 1)) == Errno.EIO


def test_default_affinity_places_what_starts() -> None:
    moves: list[int] = []

    def set_affinity(desc: IrqDesc, mask: int) -> bool:
        moves.append(mask)
        return True

    line = Line(irq_set_affinity=set_affinity)
    line.layer.set_default_affinity(2)
    assert errno_of(lambda: line.layer.set_default_affinity(4)) == Errno.EINVAL
    line.request()
    assert (moves, line.desc.affinity, line.desc.affinity_set) == ([2], 2, False)
    assert line.layer.alloc_desc().affinity == 2


def test_affinity_hint() -> None:
    moves: list[int] = []

    def set_affinity(desc: IrqDesc, mask: int) -> bool:
        moves.append(mask)
        return True

    line = Line(irq_set_affinity=set_affinity)
    line.request()
    line.layer.set_affinity_hint(24, 2)
    assert (line.desc.affinity_hint, moves[-1], line.desc.affinity_set) == (2, 2, True)
    line.layer.set_affinity_hint(24, None)
    assert (line.desc.affinity_hint, len(moves)) == (None, 2)
    line.layer.set_affinity_hint(24, 1)
    line.layer.free_irq(24)
    assert line.desc.affinity_hint is None
    assert errno_of(lambda: line.layer.set_affinity_hint(99, 1)) == Errno.EINVAL
    fixed = Line()
    fixed.layer.set_affinity_hint(24, 2)
    assert (fixed.desc.affinity_hint, fixed.desc.affinity) == (2, 3)


# Settings and trigger types.


def test_settings_forbid() -> None:
    line = Line()
    line.layer.modify_status(24, set=IRQ_NOREQUEST)
    assert errno_of(line.request) == Errno.EINVAL
    line.layer.modify_status(24, clear=IRQ_NOREQUEST, set=IRQ_NOAUTOEN | IRQ_NO_BALANCING | IRQ_PER_CPU | IRQ_LEVEL)
    line.request()
    assert (line.diary, line.desc.depth) == ([], 1)
    assert line.desc.no_balancing
    assert line.desc.per_cpu
    assert line.desc.level
    line.layer.enable_irq(24)
    assert line.diary == ["unmask"]
    assert line.desc.status & IRQ_NOPROBE  # a line that was enabled is somebody's


def test_flags_of_the_first_request_become_settings() -> None:
    line = Line()
    line.request(flags=IRQF_PERCPU | IRQF_NOBALANCING)
    assert line.desc.status == IRQ_PER_CPU | IRQ_NO_BALANCING


def test_disable_at_once_instead_of_lazily() -> None:
    line = Line()
    line.layer.modify_status(24, set=IRQ_DISABLE_UNLAZY)
    line.request()
    line.layer.disable_irq(24)
    assert line.diary == ["unmask", "mask"]
    line.layer.free_irq(24)
    assert not line.desc.status & IRQ_DISABLE_UNLAZY


def test_trigger_types() -> None:
    def set_type(desc: IrqDesc, kind: int) -> None:
        if kind == IRQ_TYPE_EDGE_FALLING:
            raise IrqError(Errno.EINVAL, "not that")
        line.diary.append(f"type {kind}")

    line: Line = Line(irq_set_type=set_type)
    line.layer.set_irq_type(24, IRQ_TYPE_LEVEL_LOW)
    assert (line.desc.trigger, line.desc.level, line.desc.status) == (IRQ_TYPE_LEVEL_LOW, True, IRQ_LEVEL)
    assert errno_of(lambda: line.layer.set_irq_type(24, IRQ_TYPE_EDGE_FALLING)) == Errno.EINVAL
    assert line.log == ["genirq: Setting trigger mode 2 for irq 24 failed (test)"]
    assert line.desc.trigger == IRQ_TYPE_LEVEL_LOW
    line.layer.set_irq_type(24, IRQ_TYPE_EDGE_RISING)
    assert (line.desc.level, line.desc.status) == (False, 0)
    assert errno_of(lambda: line.request(flags=IRQ_TYPE_EDGE_FALLING)) == Errno.EINVAL
    assert not line.desc.actions
    line.request(flags=IRQF_SHARED | IRQ_TYPE_LEVEL_HIGH, dev_id="a")
    assert line.diary == ["type 8", "type 1", "type 4", "unmask"]
    # Who says nothing takes what there is; who wants something else can't have it.
    line.request(flags=IRQF_SHARED, dev_id="b")
    assert line.desc.actions[1].flags == IRQF_SHARED | IRQ_TYPE_LEVEL_HIGH
    assert errno_of(lambda: line.request(flags=IRQF_SHARED | IRQ_TYPE_LEVEL_LOW, dev_id="c")) == Errno.EBUSY
    plain = Line()
    plain.layer.set_irq_type(24, IRQ_TYPE_LEVEL_LOW)  # a chip without the choice, as Xen's
    assert plain.desc.trigger is None


def test_a_level_is_not_replayed() -> None:
    """It comes again by itself; an edge that came while the line was disabled would not."""
    line: Line = Line(irq_eoi=lambda desc: line.diary.append("eoi"))
    line.layer.set_chip_and_handler_name(line.desc, line.chip, line.layer.handle_fasteoi_irq, "level")
    calls = line.request()
    for level, diary in ((False, ["mask", "eoi", "unmask", "retrigger"]), (True, ["mask", "eoi", "unmask"])):
        line.diary.clear()
        line.layer.modify_status(24, clear=IRQ_LEVEL, set=IRQ_LEVEL if level else 0)
        line.layer.disable_irq(24)
        line.fire()
        line.layer.enable_irq(24)
        assert line.diary == diary
        assert not line.desc.istate & IRQS_PENDING
        line.fire()  # the replay, or what the device raises again
    assert len(calls) == 2


# Suspend and resume.


def test_lines_are_closed_over_suspend() -> None:
    line: Line = Line(irq_disable=lambda desc: line.diary.append("disable"))
    calls = line.request()
    suspend_device_irqs(line.layer)
    suspended = line.desc.depth, line.desc.disabled
    resume_irqs(line.layer, early=True)
    assert (suspended, line.desc.depth, line.desc.disabled) == ((1, True), 1, True)
    line.layer.enable_irq(24)  # a driver's, at the wrong moment
    assert line.log == ["Unbalanced enable for IRQ 24"]
    resume_irqs(line.layer, early=False)
    assert (line.diary, line.desc.depth, line.desc.disabled) == (["unmask", "disable", "unmask"], 0, False)
    line.fire()
    assert calls == [24]


@pytest.mark.parametrize("disabled", [False, True])
def test_a_line_that_stays_open_is_opened_anew(disabled: bool) -> None:
    """Its chip has forgotten that it was. One that its driver has disabled remains so."""
    line: Line = Line(irq_disable=lambda desc: line.diary.append("disable"))
    line.request(flags=IRQF_NO_SUSPEND | IRQF_FORCE_RESUME | IRQF_EARLY_RESUME)
    if disabled:
        line.layer.disable_irq(24)
    line.diary.clear()
    suspend_device_irqs(line.layer)
    assert line.diary == []
    resume_irqs(line.layer, early=True)
    assert line.diary == ([] if disabled else ["unmask"])
    assert (line.desc.depth, line.desc.disabled) == (int(disabled), disabled)


def test_a_disabled_line_is_still_so_after_resume() -> None:
    line = Line()
    line.request()
    line.layer.disable_irq(24)
    suspend_device_irqs(line.layer)
    resume_irqs(line.layer, early=False)
    assert (line.desc.depth, line.desc.disabled) == (1, True)


def test_ranges_of_numbers() -> None:
    layer = Line().layer  # 24 is taken
    layer.alloc_desc(26)
    layer.alloc_desc(29)
    assert [layer.alloc_range(count) for count in (1, 2, 3)] == [25, 27, 30]


@given(st.lists(st.sampled_from(["disable", "enable", "fire"]), max_size=40))
def test_depth_is_the_number_of_disables(steps: list[str]) -> None:
    line = Line()
    calls = line.request()
    depth = handled = 0
    for step in steps:
        if step == "disable":
            line.layer.disable_irq(24)
            depth += 1
        elif step == "enable":
            line.layer.enable_irq(24)
            depth = max(depth - 1, 0)
        else:
            line.fire()
            handled += depth == 0
        assert line.desc.depth == depth
        assert line.desc.disabled == (depth > 0)
    assert len(calls) == sum(line.desc.kstat) == handled

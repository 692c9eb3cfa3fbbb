"""The clock's interrupts, and those that are lost where register C isn't read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hardwarelib import KERNELS, Rig
from pvirq.abi.errno import Errno
from pvirq.hardware.device import Board
from pvirq.hardware.platform import build
from pvirq.hardware.rtc import AF, AIE, IRQF, PIE, UIE, Mc146818, RtcDriver
from pvirq.linux import personalities
from pvirq.linux.irq import IRQ_HANDLED, IrqError
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.xen.timer import NS_PER_S


@pytest.fixture(params=KERNELS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig([{"type": "rtc"}], request.param)
    yield rig
    rig.close()


def driver(rig: Rig) -> RtcDriver:
    return rig.platform.device("rtc", RtcDriver)


def test_an_alarm_comes_once_and_on_time(rig: Rig) -> None:
    rtc = driver(rig)
    when: list[int] = []
    rtc.on_interrupt = lambda reasons: when.append(rig.clock.now())
    rtc.set_alarm(3 * NS_PER_S)
    rig.sleep(10 * NS_PER_S)
    assert (when, rtc.alarms, rig.count(8)) == ([3 * NS_PER_S], 1, 1)
    assert not rtc.chip.read_b() & AIE
    rtc.set_alarm(NS_PER_S)  # that's over
    rig.sleep(NS_PER_S)
    assert rig.count(8) == 1


def test_an_interrupt_each_second(rig: Rig) -> None:
    rtc = driver(rig)
    rig.sleep(NS_PER_S // 2)
    rtc.set_update(True)
    rig.sleep(10 * NS_PER_S)
    assert (rtc.updates, rig.count(8)) == (10, 10)
    rtc.set_update(False)
    rig.sleep(10 * NS_PER_S)
    assert rig.count(8) == 10


@pytest.mark.parametrize("hz", [2, 64, 1024])
def test_periodic(rig: Rig, hz: int) -> None:
    rtc = driver(rig)
    rtc.set_periodic(hz)
    rig.sleep(NS_PER_S)
    assert (rtc.periods, rig.count(8)) == (hz, hz)
    rtc.set_periodic(0)
    rig.sleep(NS_PER_S)
    assert rtc.periods == hz


def test_a_rate_that_the_chip_has_not(rig: Rig) -> None:
    for hz in (1, 3, 16384, -2):
        with pytest.raises(ValueError, match="expected a power of 2"):
            driver(rig).set_periodic(hz)


def test_two_reasons_at_once_are_one_interrupt(rig: Rig) -> None:
    rtc = driver(rig)
    rtc.set_update(True)
    rtc.set_alarm(NS_PER_S)
    rig.sleep(NS_PER_S)
    assert (rtc.updates, rtc.alarms, rig.count(8)) == (1, 1, 1)


def test_edges_are_lost_where_nobody_reads_register_c(rig: Rig) -> None:
    """The line stays up after the first, so there are no more edges; reading brings it down and the next one comes."""
    rtc = driver(rig)
    rtc.remove()
    rig.kernel.irq.request_irq(8, lambda irq, dev_id: IRQ_HANDLED, 0, "careless", None)
    rtc.chip.write_b(UIE)
    rig.sleep(5 * NS_PER_S)
    assert rig.count(8) == 1
    assert rtc.chip.read_c() & IRQF
    rig.sleep(NS_PER_S)
    assert rig.count(8) == 2


def test_a_flag_that_is_set_interrupts_once_it_is_enabled(rig: Rig) -> None:
    rtc = driver(rig)
    rtc.chip.write_alarm(NS_PER_S)
    rig.sleep(2 * NS_PER_S)
    assert rig.count(8) == 0
    rtc.chip.write_b(AIE)
    rig.run()
    assert (rig.count(8), rtc.alarms) == (1, 1)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("2.6.18", "rtc: IRQ 8 is not free."), ("suse", "rtc_cmos: probe of rtc failed with error -")],
)
def test_a_guest_has_no_clock(kernel: str, message: str) -> None:
    """Of a kernel that is not the initial domain's the RTC's line is left out, so that the driver's probe fails."""
    rig = Rig("none")
    domain = rig.hypervisor.create_domain(1)
    factory = personalities.find(kernel)
    guest: Kernel[Any] = Kernel(domain, lambda kernel: factory(kernel, start_info=StartInfo()))
    platform = build([{"type": "rtc"}], guest)
    guest.boot()
    assert not platform["rtc"].bound
    assert message in "\n".join(guest.log)
    with pytest.raises(IrqError) as error:
        guest.irq.request_irq(8, lambda irq, dev_id: IRQ_HANDLED, 0, "rtc", rig)
    assert error.value.errno in (Errno.ENOSYS, Errno.EINVAL)
    rig.close()


def test_register_c_tells_all_flags() -> None:
    rig = Rig("none")
    chip = Mc146818(Board(rig.kernel), 8)
    chip.write_rate(2)
    chip.write_b(PIE | AIE)
    chip.write_alarm(NS_PER_S // 2)
    rig.sleep(NS_PER_S)
    assert chip.read_c() == IRQF | AF | PIE
    assert chip.read_c() == 0
    rig.close()

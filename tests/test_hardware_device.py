"""Lines: shared ones, level and edge, and what happens where a handler doesn't serve its device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from hardwarelib import KERNELS, Rig
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.hardware.acpi import AcpiDriver
from pvirq.hardware.device import Board, Deferred
from pvirq.hardware.usb import PORT_CHANGE, UsbDriver
from pvirq.linux.irq import IRQ_HANDLED, IRQ_NONE, IRQF_SHARED, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import StartInfo
from pvirq.linux.pvops import Pvops
from pvirq.xen import physdev

SHARED = [{"type": "ehci", "name": "usb1"}, {"type": "uhci", "name": "usb2"}, {"type": "uhci", "name": "usb3"}]


@pytest.fixture(params=KERNELS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(SHARED, request.param)
    yield rig
    rig.close()


def test_all_handlers_of_a_shared_line_run_and_one_handles(rig: Rig) -> None:
    answers: list[tuple[str, IrqReturn]] = []

    def listen(driver: UsbDriver) -> None:
        handler = driver._interrupt

        def heard(irq: int, dev_id: object) -> IrqReturn:
            answer = handler(irq, dev_id)
            answers.append((driver.name, answer))
            return answer

        driver.remove()
        driver._interrupt = heard  # type: ignore[method-assign]
        driver.bind()

    for driver in rig.platform.all(UsbDriver):
        listen(driver)
    rig.platform.device("usb2", UsbDriver).controller.plug()
    rig.run()
    assert answers == [("usb1", IRQ_NONE), ("usb2", IRQ_HANDLED), ("usb3", IRQ_NONE)]
    assert rig.count(16) == 1
    assert [driver.port_changes for driver in rig.platform.all(UsbDriver)] == [0, 1, 0]


def test_two_devices_at_once_are_one_interrupt(rig: Rig) -> None:
    """The line is up once for both; one pass serves both, and it falls."""
    one, two = (rig.platform.device(name, UsbDriver) for name in ("usb1", "usb3"))
    one.controller.plug()
    two.controller.plug()
    rig.run()
    assert (one.port_changes, two.port_changes, rig.count(16)) == (1, 1, 1)
    line = rig.hypervisor.ioapic.line(16)
    assert not line.asserted


def test_a_level_that_rises_again_while_it_is_handled_comes_again(rig: Rig) -> None:
    """The first handler's device wants service again after that handler has run: no edge, but the line is up."""
    one, three = (rig.platform.device(name, UsbDriver) for name in ("usb1", "usb3"))
    plain = three.controller.clear_status

    def clear(bits: int) -> None:
        three.controller.clear_status = plain  # type: ignore[method-assign]
        one.controller.plug()
        plain(bits)

    three.controller.clear_status = clear  # type: ignore[method-assign]
    three.controller.plug()
    rig.run()
    assert (one.port_changes, three.port_changes, rig.count(16)) == (1, 1, 2)


def test_a_masked_device_keeps_the_line_down(rig: Rig) -> None:
    usb = rig.platform.device("usb1", UsbDriver)
    usb.controller.write_enable(0)
    usb.controller.plug()
    rig.run()
    assert rig.count(16) == 0
    usb.controller.write_enable(PORT_CHANGE)
    rig.run()
    assert rig.count(16) == 1


def unserved(rig: Rig, answer: IrqReturn) -> UsbDriver:
    """A device that wants service, with a handler that gives it an answer only."""
    usb = rig.platform.device("usb2", UsbDriver)
    usb.remove()
    rig.kernel.irq.request_irq(16, lambda irq, dev_id: answer, IRQF_SHARED, "deaf", usb)
    usb.controller.write_enable(PORT_CHANGE)
    usb.controller.plug()
    rig.run()
    return usb


def test_a_line_that_nobody_serves_is_given_up(rig: Rig) -> None:
    """It storms: 10,000 at once, and one more than that in each 10 ms, for Xen limits a line. Each is counted, until
    the kernel has had 100,000 in vain; then it turns the line off."""
    unserved(rig, IRQ_NONE)
    assert rig.count(16) == 10_000
    rig.sleep(10_000_000)
    assert rig.count(16) == 10_000 + 10_001
    assert "nobody cared" not in rig.log()
    rig.sleep(200_000_000)
    # 2.6.18 has the line off only when it interrupts once more.
    given_up = 100_000 + (rig.kernel_name == "2.6.18")
    assert rig.count(16) == given_up
    assert "irq 16: nobody cared (try booting with the" in rig.log()
    assert "Disabling IRQ #16" in rig.log()
    assert rig.hypervisor.ioapic.line(16).asserted
    # The others on the line suffer.
    other = rig.platform.device("usb3", UsbDriver)
    other.controller.plug()
    rig.run()
    assert rig.count(16) == given_up


def test_a_handler_that_lies_storms_for_good(rig: Rig) -> None:
    """It says "handled" and doesn't serve its device: only Xen's limit holds the line down."""
    usb = unserved(rig, IRQ_HANDLED)
    rig.sleep(20_000_000)
    stormed = 10_000 + 2 * 10_001
    assert rig.count(16) == stormed
    assert "nobody cared" not in rig.log()
    usb.controller.clear_status(PORT_CHANGE)
    rig.sleep(20_000_000)
    assert rig.count(16) <= stormed + 1
    usb.controller.plug()
    rig.run()
    assert stormed + 10_000 <= rig.count(16) <= stormed + 10_002


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_power_button(kernel: str) -> None:
    rig = Rig([{"type": "acpi"}], kernel)
    acpi = rig.platform.device("acpi", AcpiDriver)
    seen: list[int] = []
    acpi.on_event = seen.append
    acpi.pm1.press()
    rig.run()
    assert (rig.count(9), acpi.events, seen) == (1, 1, [0x100])
    acpi.pm1.press(0x200)
    rig.run()
    assert (rig.count(9), seen) == (2, [0x100, 0x200])
    rig.close()


def test_work_of_a_device_is_due_once() -> None:
    rig = Rig("none")
    board = Board(rig.kernel)
    done: list[int] = []
    work = Deferred(board, lambda: done.append(rig.clock.now()))
    work.after(100)
    work.after(50)
    assert work.pending
    rig.sleep(1000)
    assert done == [50]
    work.after(10)
    work.cancel()
    rig.sleep(1000)
    assert done == [50]
    assert not work.pending
    rig.close()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_device_given_to_a_guest_and_back(kernel: str) -> None:
    """The line goes with the device: the guest's driver serves it, domain 0 hears nothing; then it is domain 0's."""
    rig = Rig([{"type": "uhci", "name": "usb3", "gsi": 17}], kernel)
    usb = rig.platform.device("usb3", UsbDriver)
    domain = rig.hypervisor.create_domain(1)
    guest: Kernel[Any] = Kernel(domain, lambda kernel: Pvops(kernel, start_info=StartInfo()))
    guest.boot()

    usb.remove()
    dom0 = rig.kernel.domain
    domain.pirqs.permit(17)  # what a toolstack does: pci_add_dm_done
    pirq = physdev.map_pirq(dom0, 1, MAP_PIRQ_TYPE_GSI, 17)
    theirs = UsbDriver(Board(guest), "usb3", "uhci_hcd", usb.controller, pirq)
    theirs.bind()
    assert theirs.bound
    before = rig.count(17)
    usb.controller.plug()
    while any(vcpu.runnable and vcpu.event_pending() for vcpu in domain.vcpus):
        guest.run(domain.vcpus[0])
    rig.run()
    irq = theirs._irqs[0][0]
    assert (theirs.port_changes, usb.port_changes, guest.irq.descs[irq].kstat[0], rig.count(17)) == (1, 0, 1, before)

    theirs.remove()
    physdev.unmap_pirq(dom0, 1, pirq)
    usb.bind()
    usb.controller.unplug()
    rig.run()
    assert (usb.port_changes, rig.count(17)) == (1, before + 1)
    rig.close()

"""Physical lines and messages of XenLinux, of both its revisions: on Xen's I/O APIC and MSIs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.physdev import MAP_PIRQ_TYPE_GSI
from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqError, IrqReturn
from pvirq.linux.kthread import Body, Kthread, sleep
from pvirq.linux.xenlinux import XenLinux
from pvirq.linux.xenlinux_2_6_18 import XenLinux2618
from pvirq.linux.xenlinux_ports import IRQT_PIRQ
from pvirq.linux.xenlinux_suse import XenLinuxSuse
from pvirq.xen import evtchn, physdev, pirq
from pvirq.xen.msi import PciDevice
from xenlinuxlib import Setup


def handled(irq: int, dev_id: object) -> IrqReturn:
    return IRQ_HANDLED


def fails(errno: Errno, call: Callable[..., Any], *args: Any, **keys: Any) -> None:
    with pytest.raises((IrqError, XenError)) as error:
        call(*args, **keys)
    assert isinstance(error.value, (IrqError, XenError))
    assert error.value.errno == errno


KERNELS = [XenLinux2618, XenLinuxSuse]


@pytest.fixture(params=KERNELS, ids=["2.6.18", "suse"])
def hardware(request: pytest.FixtureRequest) -> Iterator[Setup]:
    it = Setup(request.param, vcpus=2, domid=0)
    yield it
    it.close()


def test_a_level_line_is_shared_and_comes_once_per_service(hardware: Setup) -> None:
    line = hardware.hypervisor.ioapic.line(18)
    irq = hardware.events.register_gsi(18, level=True, active_low=True)
    assert irq == 18
    asked: list[object] = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        asked.append(dev_id)
        line.deassert(dev_id)
        return IRQ_HANDLED

    hardware.irqs.request_irq(18, handler, IRQF_SHARED, "ehci_hcd:usb1", "a")
    hardware.irqs.request_irq(18, handler, IRQF_SHARED, "ata_piix", "b")
    line.assert_("a")
    hardware.run()
    assert (asked, hardware.counts(18), line.sent) == (["a", "b"], [1, 0], 1)
    assert hardware.events.type_from_irq(18) == IRQT_PIRQ
    fails(Errno.EBUSY, hardware.irqs.request_irq, 18, handler, 0, "alone", "c")


def test_a_level_line_that_nobody_serves_storms_until_it_is_given_up(hardware: Setup) -> None:
    line = hardware.hypervisor.ioapic.line(20)
    hardware.events.register_gsi(20, level=True, active_low=True)
    calls: list[int] = []

    def handler(irq: int, dev_id: object) -> IrqReturn:
        calls.append(irq)
        if len(calls) == 1000:
            line.deassert("device")
        return IRQ_HANDLED

    hardware.irqs.request_irq(20, handler, 0, "device", None)
    line.assert_("device")
    hardware.run()
    assert hardware.counts(20) == [1000, 0]  # each EOI found it still asserted


def test_a_disabled_level_line_is_not_acknowledged_to_xen(hardware: Setup) -> None:
    line = hardware.hypervisor.ioapic.line(19)
    hardware.events.register_gsi(19, level=True, active_low=True)

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.deassert("device")
        return IRQ_HANDLED

    hardware.irqs.request_irq(19, handler, IRQF_SHARED, "device", "device")
    hardware.irqs.disable_irq(19)
    line.assert_("device")
    hardware.run()
    assert hardware.counts(19) == [1, 0]  # it came once, was masked or shut down, and waits
    assert line.asserted
    hardware.irqs.enable_irq(19)
    hardware.run()
    assert not line.asserted
    line.assert_("device")
    hardware.run()
    assert not line.asserted


def test_an_edge(hardware: Setup) -> None:
    irq = hardware.events.register_gsi(1, level=False, active_low=False)
    hardware.irqs.request_irq(irq, handled, 0, "i8042")
    line = hardware.hypervisor.ioapic.line(1)
    for _ in range(5):
        line.pulse()
        hardware.run()
    line.pulse()
    line.pulse()  # the second finds the first still pending
    hardware.run()
    assert hardware.counts(1) == [6, 0]


def test_a_line_gives_its_port_back(hardware: Setup) -> None:
    hardware.events.register_gsi(18, level=True, active_low=True)
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "usb", "a")
    port = hardware.events.evtchn_from_irq(18)
    hardware.irqs.free_irq(18, "a")
    assert hardware.events.evtchn_from_irq(18) == 0
    assert hardware.events.irq_from_evtchn(port) == -1
    assert not hardware.domain.evtchn.port(port).usable
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "usb", "a")
    assert hardware.events.evtchn_from_irq(18) == port


def test_messages_come_from_the_top(hardware: Setup) -> None:
    top = hardware.events.nr_pirqs - 1
    assert top == (255 if isinstance(hardware.events, XenLinux2618) else 24 + 8 * 2 + 16 * 24 - 1)
    devices = [PciDevice(hardware.hypervisor, 0x300 + i, vectors=2, msix=True) for i in range(2)]
    assert hardware.events.enable_msi(devices[0], 2, msix=True) == [top, top - 1]
    assert hardware.events.enable_msi(devices[1], 1, msix=True) == [top - 2]
    fails(Errno.EINVAL, hardware.events.enable_msi, devices[0], msix=True)
    hardware.irqs.request_irq(top - 1, handled, 0, "eth0-rx")
    assert devices[0].raise_msi(1)
    hardware.run()
    assert hardware.counts(top - 1) == [1, 0]
    hardware.irqs.free_irq(top - 1)
    hardware.events.disable_msi(devices[0])
    assert not devices[0].raise_msi(1)
    fails(Errno.ENOSYS, hardware.irqs.request_irq, top, handled, 0, "gone")
    single = PciDevice(hardware.hypervisor, 0x310)
    assert hardware.events.enable_msi(single) == [top]  # free again
    fails(Errno.ENOSPC, hardware.events.enable_msi, PciDevice(hardware.hypervisor, 0x311, vectors=4), 4)


def test_messages_that_cannot_be_leave_nothing_mapped(hardware: Setup) -> None:
    device = PciDevice(hardware.hypervisor, 0x300, vectors=2, msix=True)
    fails(Errno.EINVAL, hardware.events.enable_msi, device, 3, msix=True)
    assert hardware.events.enable_msi(device, 2, msix=True) == [
        hardware.events.nr_pirqs - 1,
        hardware.events.nr_pirqs - 2,
    ]
    fails(Errno.EINVAL, hardware.events.register_gsi, 5000, level=True, active_low=True)
    fails(Errno.EINVAL, hardware.events.evtchn_map_pirq, hardware.events.nr_pirqs - 1, 3)
    assert "is already mapped to 1:" in hardware.kernel.log[-1]
    fails(Errno.EINVAL, hardware.events.evtchn_map_pirq, 100, 0)


def test_lines_move_too(hardware: Setup) -> None:
    hardware.events.register_gsi(18, level=False, active_low=False)
    hardware.irqs.request_irq(18, handled, 0, "device")
    hardware.irqs.set_affinity(18, 2)
    line = hardware.hypervisor.ioapic.line(18)
    for _ in range(3):
        line.pulse()
        hardware.run()
    assert hardware.counts(18) == [1, 2]
    hardware.kernel.cpu_down(1)
    line.pulse()
    hardware.run()
    assert hardware.counts(18) == [2, 2]


def test_unhandled_interrupts_of_a_line_that_two_domains_have(hardware: Setup) -> None:
    hardware.events.register_gsi(18, level=True, active_low=True)
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "device", "dev")
    assert not hardware.events.irq_ignore_unhandled(18)
    physdev.map_pirq(hardware.domain, 7, MAP_PIRQ_TYPE_GSI, 18, 18)
    pirq.irq_permission(hardware.domain, hardware.peer, 18, True)
    evtchn.bind_pirq(hardware.peer, 18, 1)
    assert hardware.events.irq_ignore_unhandled(18)
    assert not hardware.events.irq_ignore_unhandled(hardware.events.nr_pirqs)


def test_a_pirq_that_is_taken_already(hardware: Setup) -> None:
    """Xen gives it to nobody twice: the request succeeds, the line is silent, the log tells."""
    hardware.events.register_gsi(18, level=True, active_low=True)
    evtchn.bind_pirq(hardware.domain, 18, 1)
    hardware.irqs.request_irq(18, handled, IRQF_SHARED, "late", "dev")
    assert hardware.kernel.log[-1] == "Failed to obtain physical IRQ 18"
    assert hardware.events.evtchn_from_irq(18) == 0


@pytest.mark.parametrize("personality", KERNELS, ids=["2.6.18", "suse"])
def test_a_line_that_is_passed_through_to_a_guest(personality: type[XenLinux]) -> None:
    it = Setup(personality)
    physdev.setup_gsi(it.peer, 18, 1, 1)
    physdev.map_pirq(it.peer, 0, MAP_PIRQ_TYPE_GSI, 18, 18)
    assert it.events.register_gsi(18, level=True, active_low=True) == 18
    it.irqs.request_irq(18, handled, IRQF_SHARED, "usb", "too early")
    assert it.kernel.log[-1] == "Failed to obtain physical IRQ 18"
    it.irqs.free_irq(18, "too early")
    physdev.map_pirq(it.peer, 1, MAP_PIRQ_TYPE_GSI, 18, 18)
    pirq.irq_permission(it.peer, it.domain, 18, True)
    line = it.hypervisor.ioapic.line(18)

    def handler(irq: int, dev_id: object) -> IrqReturn:
        line.deassert("device")
        return IRQ_HANDLED

    it.irqs.request_irq(18, handler, IRQF_SHARED, "usb", "dev")
    for _ in range(4):
        line.assert_("device")
        it.run()
    assert it.counts(18) == [4]
    it.irqs.free_irq(18, "dev")
    physdev.unmap_pirq(it.peer, 1, 18)
    evtchn.bind_pirq(it.peer, 18, 0)  # domain 0 has it back
    it.close()


def sleepy(it: Setup, until: Callable[[], bool]) -> None:
    """Run with time passing."""
    clock = it.kernel.clock
    it.run()
    while not until():
        deadline = clock.next_deadline()
        assert deadline is not None
        clock.jump_to(deadline)
        clock.fire_due()
        it.run()


def test_a_driver_finds_its_line_by_trying(hardware: Setup) -> None:
    """probe_irq_on opens all unused lines, unshared; the one that then interrupts is the device's."""
    kernel, irqs, line = hardware.kernel, hardware.irqs, hardware.hypervisor.ioapic.line(7)
    noisy = hardware.hypervisor.ioapic.line(10)
    hardware.events.register_gsi(12, level=False, active_low=False)
    irqs.request_irq(12, handled, 0, "i8042")

    def probe() -> Body[tuple[int, int]]:
        mask = yield from irqs.probe_irq_on(lambda ms: sleep(kernel, ms * 1_000_000))
        action = hardware.hypervisor.irqs.desc(7).guest_action
        assert action is not None
        assert not action.shareable
        line.pulse()
        yield from sleep(kernel, 1_000_000)
        return mask, irqs.probe_irq_off()

    noisy.assert_("somebody")
    thread = Kthread(kernel, "probe", probe())
    sleepy(hardware, lambda: thread.done)
    mask, found = thread.result()
    assert found == 7
    assert mask >> 7 & 1
    assert not mask >> 10 & 1  # it interrupts all the time
    assert not mask >> 12 & 1
    assert kernel.now() == 121_000_000
    assert not any(hardware.events.evtchn_from_irq(irq) for irq in range(16) if irq != 12)
    assert hardware.events.evtchn_from_irq(12)


def test_domain_0_is_not_suspended(hardware: Setup) -> None:
    fails(Errno.ENODEV, hardware.events.suspend)

"""A modelled domain's kernel under a personality that does next to nothing; /proc/interrupts' columns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pvirq.abi.errno import Errno
from pvirq.abi.xen import VCPU_INFO_UPCALL_MASK, VCPU_INFO_UPCALL_PENDING
from pvirq.linux.evtchn_dev import EvtchnUser
from pvirq.linux.irq import IRQ_HANDLED, IRQF_SHARED, IrqChip, IrqDesc, IrqError, IrqLayer
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, Personality
from pvirq.linux.proc import IrqStat, header, irq_row, irq_width, x86_rows
from pvirq.xen import sched
from pvirq.xen.domain import Hypervisor
from pvirq.xen.memory import Machine


class Bare(Personality):
    """One upcall flag per CPU and IPIs that set it: the least that `Kernel` can stand on."""

    version = (0, 0, 0)
    hz = 100

    def __init__(self, kernel: Kernel[Bare]) -> None:
        self.kernel = kernel
        self.ipis: list[tuple[int, Ipi]] = []
        self.upcalls: list[int] = []
        self.irq = IrqLayer(
            len(kernel.domain.vcpus),
            cpu=lambda: kernel.cpu,
            jiffies=kernel.jiffies,
            hz=self.hz,
            printk=kernel.printk,
        )

    def boot(self) -> None:
        for cpu in range(self.irq.nr_cpus):
            self.cpu_up(cpu)

    def cpu_up(self, cpu: int) -> None:
        self.kernel.domain.vcpus[cpu].up = True
        self.irq.online |= 1 << cpu

    def cpu_down(self, cpu: int) -> None:
        self.irq.online &= ~(1 << cpu)

    def upcall(self, cpu: int) -> None:
        info = self.kernel.domain.vcpus[cpu].info
        mem = self.kernel.domain.machine.mem
        assert mem[info + VCPU_INFO_UPCALL_MASK] == 1
        mem[info + VCPU_INFO_UPCALL_PENDING] = 0
        self.upcalls.append(cpu)
        self.kernel.run_calls()
        self.kernel.run_irq_work()

    def send_ipi(self, cpu: int, ipi: Ipi) -> None:
        self.ipis.append((cpu, ipi))
        sched.mark_events_pending(self.kernel.domain.vcpus[cpu])

    def evtchn_user(self, name: str) -> EvtchnUser:
        raise NotImplementedError

    def interrupts(self) -> str:
        return header(self.irq)

    @property
    def irq_stat(self) -> list[IrqStat]:
        return []


Bare.__abstractmethods__ = frozenset()  # no driver binds anything here


@pytest.fixture
def kernel() -> Iterator[Kernel[Bare]]:
    machine = Machine(1 << 26)
    kernel = Kernel(Hypervisor(machine).create_domain(0, vcpus=3), Bare)
    kernel.boot()
    yield kernel
    machine.close()


def run(kernel: Kernel[Bare]) -> None:
    while ready := [vcpu for vcpu in kernel.domain.vcpus if vcpu.runnable]:
        kernel.run(ready[0])


def test_blocks_when_nothing_is_left(kernel: Kernel[Bare]) -> None:
    vcpu = kernel.domain.vcpus[1]
    assert vcpu.blocked
    assert kernel.domain.machine.mem[vcpu.info + VCPU_INFO_UPCALL_MASK] == 0
    sched.mark_events_pending(vcpu)
    assert vcpu.runnable
    kernel.run(vcpu)
    assert (kernel.events.upcalls, vcpu.blocked, kernel.cpu) == ([1], True, 0)


def test_interrupts_come_before_work(kernel: Kernel[Bare]) -> None:
    order: list[str] = []

    def work() -> None:
        order.append("work")
        kernel.queue_work(lambda: order.append("queued"))
        kernel.irq_work_queue(lambda: order.append("interrupt"))
        kernel.irq_work_queue(lambda: order.append("with it"))

    kernel.queue_work(work)
    run(kernel)
    assert order == ["work", "interrupt", "with it", "queued"]
    assert kernel.events.ipis == [(0, Ipi.IRQ_WORK)]


def test_one_ipi_for_calls_that_wait_already(kernel: Kernel[Bare]) -> None:
    ran: list[int] = []
    for _ in range(3):
        kernel.smp_call_function_single(2, lambda: ran.append(kernel.cpu))
    kernel.smp_call_function(lambda: ran.append(kernel.cpu))
    assert kernel.events.ipis == [(2, Ipi.CALL_FUNCTION_SINGLE), (1, Ipi.CALL_FUNCTION_SINGLE)]
    run(kernel)
    assert sorted(ran) == [1, 2, 2, 2, 2]
    kernel.smp_call_function(lambda: ran.append(kernel.cpu))
    assert kernel.events.ipis[2:] == [(1, Ipi.CALL_FUNCTION), (2, Ipi.CALL_FUNCTION)]


def test_work_and_timers_leave_a_cpu_that_goes(kernel: Kernel[Bare]) -> None:
    ran: list[tuple[str, int]] = []
    kernel.set_timer(1000, lambda: ran.append(("timer", kernel.cpu)), 2)
    kernel.queue_work(lambda: ran.append(("work", kernel.cpu)), 2)
    kernel.cpu_down(2)
    assert ran == [("work", 2)]  # its own work is done first
    assert kernel.domain.vcpus[2].singleshot_timer is None
    armed = kernel.domain.vcpus[0].singleshot_timer
    assert armed is not None
    assert armed.when == 1000
    kernel.queue_work(lambda: ran.append(("late", kernel.cpu)), 2)
    kernel.clock.jump_to(1000)
    kernel.run_timers()
    run(kernel)
    assert ran == [("work", 2), ("timer", 0), ("late", 0)]
    with pytest.raises(IrqError) as error:
        kernel.cpu_down(2)
    assert error.value.errno == Errno.EINVAL


def test_the_earliest_timer_is_armed(kernel: Kernel[Bare]) -> None:
    vcpu = kernel.domain.vcpus[0]

    def armed() -> int | None:
        return vcpu.singleshot_timer.when if vcpu.singleshot_timer else None

    kernel.set_timer(500, lambda: None)
    first = kernel.set_timer(200, lambda: None)
    assert armed() == 200
    first.cancel()
    kernel.set_timer(300, lambda: None)
    assert armed() == 300
    kernel.clock.jump_to(400)
    kernel.run_timers()
    assert armed() == 500
    assert kernel.jiffies_to_ns(3) == 30_000_000
    kernel.set_timer_jiffies(0, lambda: None)
    assert armed() == 0


def test_a_failing_handler_is_not_hidden(kernel: Kernel[Bare]) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    kernel.queue_work(broken)
    with pytest.raises(ZeroDivisionError):
        run(kernel)
    assert kernel.cpu == 0


# /proc/interrupts.


def test_the_number_column() -> None:
    assert [irq_width(n) for n in (0, 48, 999, 1000, 9999, 10_000, 10**12)] == [3, 3, 3, 4, 4, 5, 10]


def test_rows() -> None:
    def nothing(desc: IrqDesc) -> None:
        pass

    chip = IrqChip("xen-dyn", irq_ack=nothing, irq_mask=nothing, irq_unmask=nothing)
    layer = IrqLayer(4, cpu=lambda: 0, jiffies=lambda: 0, hz=100, printk=print, dynirq_base=5)
    layer.online = 0b1011
    assert header(layer) == "           CPU0       CPU1       CPU3       \n"
    desc = layer.alloc_desc()
    assert irq_row(layer, desc) == ""
    desc.kstat[:] = [1, 0xFFFFFFFF, 77, 1 << 32 | 5]  # they wrap as the kernel's unsigned int
    counts = "  5:          1 4294967295          5"
    assert irq_row(layer, desc) == f"{counts}      none    \n"
    layer.set_chip_and_handler_name(desc, chip, layer.handle_edge_irq, "event")
    assert irq_row(layer, desc) == f"{counts}   xen-dyn    -event   \n"
    for name in ("one", "two"):
        layer.request_irq(5, lambda irq, dev_id: IRQ_HANDLED, IRQF_SHARED, name, name)
    assert irq_row(layer, desc) == f"{counts}   xen-dyn    -event     one, two\n"


def test_x86_rows() -> None:
    layer = IrqLayer(1, cpu=lambda: 0, jiffies=lambda: 0, hz=100, printk=print)
    layer.online = 1
    rows = x86_rows(layer, [IrqStat(nmi=3, thermal=4, mce_poll=5)], mce=False, err=1, mis=2).splitlines()
    assert rows[0] == "NMI:          3   Non-maskable interrupts"
    assert rows[9:13] == [
        "TRM:          4   Thermal event interrupts",
        "ERR:          1",
        "MIS:          2",
        "PIN:          0   Posted-interrupt notification event",
    ]
    assert any(
        row.startswith("MCP:          5 ") for row in x86_rows(layer, [IrqStat(mce_poll=5)], mce=True).split("\n")
    )

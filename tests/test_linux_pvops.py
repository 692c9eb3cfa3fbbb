"""The Linux 6.1 personality against recordings of the real one, and its event handling under load."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linuxlib import DATA, RecordedDom0, counts, ignore, run, sleep_until
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, VCPU_INFO_UPCALL_MASK, VIRQ_CONSOLE, VIRQ_DOM_EXC, VIRQ_TIMER
from pvirq.linux.events_2l import Events2l
from pvirq.linux.events_info import XEN_EOI_FLAG_SPURIOUS, XenbusDevice
from pvirq.linux.irq import IRQ_HANDLED, IrqError, IrqReturn
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import Ipi, StartInfo
from pvirq.linux.pvops import HZ, Pvops, dom0
from pvirq.xen import evtchn
from pvirq.xen.domain import Hypervisor
from pvirq.xen.evtchn_views import lsevtchn
from pvirq.xen.memory import Machine
from pvirq.xen.timer import NS_PER_S

JIFFY = NS_PER_S // HZ


@pytest.fixture
def hypervisor() -> Iterator[Hypervisor]:
    machine = Machine(1 << 28)
    yield Hypervisor(machine)
    machine.close()


# The recordings.


def recorded_counts(text: str) -> dict[int, list[int]]:
    return {
        int(match[1]): [int(count) for count in match[2].split()]
        for match in re.finditer(r"^ *(\d+):((?: +\d+)+) ", text, re.MULTILINE)
    }


def recorded_stat(text: str, label: str) -> list[int]:
    match = re.search(rf"^{label}:((?: +\d+)+) ", text, re.MULTILINE)
    assert match
    return [int(count) for count in match[1].split()]


def set_counts(kernel: Kernel[Pvops], text: str) -> None:
    """Counts depend on the run, so the recorded ones are put in."""
    for irq, values in recorded_counts(text).items():
        for cpu, value in zip((0, 1), values, strict=False):
            counts(kernel, irq)[cpu] = value
    for label, name in (("RES", "resched"), ("CAL", "call")):
        for stat, value in zip(kernel.events.irq_stat, recorded_stat(text, label), strict=False):
            setattr(stat, name, value)


def assert_recorded(kernel: Kernel[Pvops], stage: str) -> None:
    assert lsevtchn(kernel.domain) == (DATA / f"{stage}.lsevtchn-0").read_text()
    assert_rows(kernel, stage)


def assert_rows(kernel: Kernel[Pvops], stage: str) -> None:
    text = (DATA / f"{stage}.dom0.interrupts").read_text()
    set_counts(kernel, text)
    assert kernel.proc_interrupts() == text


def test_dom0_is_the_real_one(hypervisor: Hypervisor) -> None:
    """From boot through a guest's life: ports, their CPUs, IRQ numbers, chips, names, rows."""
    kernel = Kernel(hypervisor.create_domain(0, privileged=True, vcpus=2), RecordedDom0)
    events = kernel.events
    kernel.boot()
    store = kernel.evtchn_user("xenstored")
    store.bind_virq(VIRQ_DOM_EXC)
    store.bind_interdomain(0, events.store_port)
    run(kernel)
    assert_recorded(kernel, "0-before")

    guest = hypervisor.create_domain(1, vcpus=2)
    store_port, console_port = (evtchn.alloc_unbound(guest, DOMID_SELF, 0) for _ in range(2))
    bench = kernel.evtchn_user("evbench")
    bench.bind_unbound(1)
    guest_store = store.bind_interdomain(1, store_port)
    console = kernel.evtchn_user("xenconsoled")
    console.bind_interdomain(1, console_port)
    run(kernel)
    # A bound port starts with an event. It comes on CPU 0, wherever the IRQ is moved as it starts.
    assert (counts(kernel, 49), counts(kernel, 50)) == ([1, 0], [1, 0])
    assert_recorded(kernel, "1-nodrivers")

    guest_kernel = [evtchn.bind_ipi(guest, 0) for _ in range(12)]
    assert guest_kernel[-1] == 14
    disk, net = XenbusDevice(1), XenbusDevice(1)
    names = ["blkif-backend"] * 2 + [f"vif1.0-q{queue}-{way}" for queue in (0, 1) for way in ("tx", "rx")]
    irqs = []
    for dev, name in zip([disk] * 2 + [net] * 4, names, strict=True):
        port = evtchn.alloc_unbound(guest, DOMID_SELF, 0)
        irqs.append(events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, ignore, 0, name, dev_id=name))
    run(kernel)
    assert [counts(kernel, irq) for irq in irqs] == [[1, 0]] * 6
    assert (disk.event_channels, disk.events, net.event_channels) == (2, 2, 4)
    assert_recorded(kernel, "2-drivers")
    assert_rows(kernel, "4-after-ping")

    for irq, name in zip(irqs, names, strict=True):
        events.unbind_from_irqhandler(irq, name)
    store.unbind(guest_store)
    console.close()
    bench.close()
    assert (disk.event_channels, net.event_channels) == (0, 0)
    assert_recorded(kernel, "7-after")


def test_a_guest_is_the_real_one(hypervisor: Hypervisor) -> None:
    """A PV guest's rows, with its drivers; then vCPU 1 goes offline and comes again."""
    hypervisor.create_domain(0, privileged=True)
    domain = hypervisor.create_domain(1, vcpus=2)
    ports = [evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(2)]
    kernel = Kernel(domain, partial(Pvops, start_info=StartInfo(store_port=ports[0], console_port=ports[1])))
    kernel.boot()

    def check(stage: str) -> None:
        text = (DATA / f"domU.{stage}.interrupts").read_text()
        set_counts(kernel, text)
        assert kernel.proc_interrupts() == text

    check("1-nodrivers")
    for name in ("blkif", "blkif", "vif0-q0-tx", "vif0-q0-rx", "vif0-q1-tx", "vif0-q1-rx"):
        port = evtchn.alloc_unbound(domain, DOMID_SELF, 0)
        kernel.events.bind_evtchn_to_irqhandler_lateeoi(port, ignore, 0, name)
    recorded = (DATA / "2-drivers.lsevtchn-domU").read_text()
    assert re.findall(r"(\d+): VCPU (\d)", lsevtchn(domain)) == re.findall(r"(\d+): VCPU (\d)", recorded)

    for stage in ("2-drivers", "4-after-ping", "8-aff-cpu0", "8-aff-cpu1"):
        check(stage)
    set_counts(kernel, (DATA / "domU.11-cpu1-on.interrupts").read_text())
    kernel.cpu_down(1)
    assert not domain.vcpus[1].up
    assert all(evtchn.status(domain, DOMID_SELF, port).vcpu == 0 for port in (*ports, 15, 16, 17, 18, 19, 20))
    check("10-cpu1-off")
    kernel.cpu_up(1)
    assert counts(kernel, 6) == [0, 0]
    check("11-cpu1-on")
    for cpu in (0, 1, 2):
        with pytest.raises(IrqError):
            kernel.cpu_up(cpu)
    with pytest.raises(IrqError):
        kernel.cpu_down(0)


def test_boot_without_hardware(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    recorded = (DATA / "0-before.dom0.interrupts").read_text()
    wanted = [line for line in recorded.splitlines() if "xen-pirq" not in line and "evtchn:" not in line]
    set_counts(kernel, "\n".join(wanted))
    assert kernel.proc_interrupts().splitlines() == wanted
    assert all(vcpu.up and vcpu.blocked for vcpu in kernel.domain.vcpus)


def test_one_vcpu_has_no_spinlock_row(hypervisor: Hypervisor) -> None:
    names = re.findall(r"  (\w+)\n", dom0(hypervisor, 1).proc_interrupts().split("NMI")[0])
    assert names[:5] == ["timer0", "resched0", "callfunc0", "callfuncsingle0", "irqwork0"]
    assert "spinlock0" not in names


def test_two_level_has_debug_rows(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor, fifo=False)
    names = re.findall(r"-(\w+) +(\w+)\n", kernel.proc_interrupts())
    assert names[2:6] == [
        ("ipi", "resched0"),
        ("ipi", "callfunc0"),
        ("virq", "debug0"),
        ("ipi", "callfuncsingle0"),
    ]
    assert kernel.log[0] == "xen:events: Using 2-level ABI"


# Events between domains.


@pytest.fixture(params=["fifo", "2l"])
def pair(request: pytest.FixtureRequest, hypervisor: Hypervisor) -> tuple[Kernel[Pvops], Kernel[Pvops]]:
    """Domain 0 and another modelled domain, under either ABI."""
    fifo = request.param == "fifo"
    kernel = dom0(hypervisor, fifo=fifo)
    other = Kernel(hypervisor.create_domain(vcpus=2), partial(Pvops, fifo=fifo))
    other.boot()
    return kernel, other


def test_counts_agree_with_sends(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, other = pair
    back, front = kernel.evtchn_user("back"), other.evtchn_user("front")
    answers: list[int] = []
    port = front.bind_unbound(0, answers.append)
    local = back.bind_interdomain(1, port, back.notify)
    run(kernel, other)
    before = sum(counts(kernel, back.irq_of(local))), len(answers)
    for _ in range(3000):
        front.notify(port)
        run(kernel, other)
    assert sum(counts(kernel, back.irq_of(local))) - before[0] == 3000
    assert len(answers) - before[1] == 3000
    for _ in range(50):  # no turn between: one event
        front.notify(port)
    run(kernel, other)
    assert sum(counts(kernel, back.irq_of(local))) - before[0] == 3001
    assert sum(kernel.irq.descs[kernel.events.irq_from_evtchn(local)].kstat) == sum(counts(kernel, back.irq_of(local)))


def test_notified_while_it_reacts(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    """Masked from the interrupt to the write, so what comes meanwhile is one more interrupt, not lost."""
    kernel, other = pair
    back, front = kernel.evtchn_user("back"), other.evtchn_user("front")
    port = front.bind_unbound(0)
    calls = []

    def react(local: int) -> None:
        calls.append(kernel.domain.machine.mem[kernel.domain.vcpus[kernel.cpu].info + VCPU_INFO_UPCALL_MASK])
        if len(calls) in (2, 3):
            front.notify(port)
            front.notify(port)

    back.bind_interdomain(1, port, react)
    run(kernel)
    assert len(calls) == 1
    front.notify(port)
    run(kernel)
    assert calls == [0, 0, 0, 0]  # process context: upcalls are not masked


def test_a_daemon_can_hold_its_unmask(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, other = pair
    back, front = kernel.evtchn_user("xenconsoled"), other.evtchn_user("front")
    port = front.bind_unbound(0)
    calls: list[int] = []

    def hold(port: int) -> bool:
        calls.append(port)
        return False

    local = back.bind_interdomain(1, port, hold)
    run(kernel)
    for _ in range(5):
        front.notify(port)
        run(kernel)
    assert calls == [local]
    back.unmask(local)
    back.unmask(local)
    run(kernel)
    assert calls == [local, local]


def test_ports_are_their_users_own(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, _ = pair
    mine, yours = kernel.evtchn_user("mine"), kernel.evtchn_user("yours")
    port = mine.bind_unbound(1)
    calls: tuple[Callable[[int], None], ...] = (yours.notify, yours.unmask, yours.unbind)
    for call in calls:
        with pytest.raises(XenError) as error:
            call(port)
        assert error.value.errno == Errno.ENOTCONN
    with pytest.raises(XenError) as error:
        mine.bind_interdomain(1, 4000)
    assert error.value.errno == Errno.EINVAL
    with pytest.raises(XenError) as error:
        mine.bind_interdomain(77, 1)
    assert error.value.errno == Errno.ESRCH
    mine.close()
    assert kernel.events.irq_from_evtchn(port) == -1


def test_the_other_end_closes(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, other = pair
    back, front = kernel.evtchn_user("back"), other.evtchn_user("front")
    port = front.bind_unbound(0)
    local = back.bind_interdomain(1, port)
    front.unbind(port)
    back.notify(local)
    run(kernel, other)
    back.unbind(local)
    assert evtchn.status(kernel.domain, DOMID_SELF, local).status == 0


def test_an_irq_moves_to_where_userland_wants_it(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, other = pair
    back, front = kernel.evtchn_user("back"), other.evtchn_user("front")
    port = front.bind_unbound(0)
    local = back.bind_interdomain(1, port)
    run(kernel)
    irq = kernel.events.irq_from_evtchn(local)
    for cpu in (0, 1, 0, 1, 1):
        kernel.irq.set_affinity(irq, 1 << cpu)
        assert evtchn.status(kernel.domain, DOMID_SELF, local).vcpu == kernel.events.cpu_from_evtchn(local) == cpu
        was = counts(kernel, irq)[cpu]
        front.notify(port)
        run(kernel)
        assert counts(kernel, irq)[cpu] == was + 1
    with pytest.raises(IrqError):
        kernel.irq.set_affinity(24, 2)


def test_lateeoi_keeps_an_irq_from_two_cpus(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    """Moved while its EOI is due, a port that fires again waits for it, then comes at the new CPU."""
    kernel, other = pair
    port = evtchn.alloc_unbound(other.domain, DOMID_SELF, 0)
    dev = XenbusDevice(other.domain.domid)
    events = kernel.events
    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, ignore, 0, "x")
    run(kernel)
    total = sum(counts(kernel, irq))
    target = 1 - events.cpu_from_evtchn(events.evtchn_from_irq(irq))
    kernel.irq.set_affinity(irq, 1 << target)
    evtchn.send(other.domain, port)
    run(kernel)
    assert sum(counts(kernel, irq)) == total
    events.xen_irq_lateeoi(irq)
    run(kernel)
    assert sum(counts(kernel, irq)) == total + 1
    events.unbind_from_irqhandler(irq)


# Late EOI.


def test_spurious_events_are_slowed_down(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    """One is free (threshold 1), the next waits a jiffy; the delayed EOI itself counts as an honest one."""
    kernel, other = pair
    port = evtchn.alloc_unbound(other.domain, DOMID_SELF, 0)
    dev = XenbusDevice(other.domain.domid)
    events = kernel.events
    times: list[int] = []

    def spurious(irq: int, dev_id: object) -> IrqReturn:
        times.append(kernel.jiffies())
        events.xen_irq_lateeoi(irq, XEN_EOI_FLAG_SPURIOUS)
        evtchn.send(other.domain, port)  # as fast as the other side can
        return IRQ_HANDLED

    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, spurious, 0, "x")
    sleep_until(NS_PER_S, kernel)
    gaps = [after - before for before, after in pairwise(times)]
    assert gaps[:501] == [0, 1] * 250 + [0]
    assert dev.events == dev.spurious_events == len(times) == sum(counts(kernel, irq))
    assert dev.jiffies_eoi_delayed == 251
    assert sum(counts(kernel, 24)) + sum(counts(kernel, 30 if events.fifo else 31)) > 0  # the delays are timer events
    events.unbind_from_irqhandler(irq)  # one EOI is still delayed
    sleep_until(2 * NS_PER_S, kernel)
    assert len(times) == dev.spurious_events


def test_the_threshold_is_a_file(hypervisor: Hypervisor) -> None:
    """xenbus/ of a device: the counts are there to read, the threshold to write, as C writes numbers."""
    dev = XenbusDevice(1, event_channels=2, events=7, spurious_events=3, jiffies_eoi_delayed=11)
    names = ("event_channels", "events", "jiffies_eoi_delayed", "spurious_events", "spurious_threshold")
    assert [dev.show(name) for name in names] == ["2\n", "7\n", "11\n", "3\n", "1\n"]
    for text, value in (("5\n", 5), ("0x10", 16), ("010", 8), ("0", 0), ("+3", 3), ("4294967295", 0xFFFFFFFF)):
        dev.store("spurious_threshold", text)
        assert dev.spurious_threshold == value
    for name, text, errno in (
        ("spurious_threshold", "-1", Errno.EINVAL),
        ("spurious_threshold", "", Errno.EINVAL),
        ("spurious_threshold", "5 ", Errno.EINVAL),
        ("spurious_threshold", "1_0", Errno.EINVAL),
        ("spurious_threshold", "0x", Errno.EINVAL),
        ("spurious_threshold", "09", Errno.EINVAL),
        ("spurious_threshold", "4294967296", Errno.ERANGE),
        ("events", "0", Errno.EACCES),
        ("nothing", "0", Errno.ENOENT),
    ):
        with pytest.raises(IrqError) as error:
            dev.store(name, text)
        assert error.value.errno == errno
    with pytest.raises(IrqError):
        dev.show("nothing")
    assert dev.spurious_threshold == 0xFFFFFFFF


@pytest.mark.parametrize("threshold", [0, 1, 2])
def test_rising_delays(hypervisor: Hypervisor, threshold: int) -> None:
    """Without honest events between: 1, 2, 4 ... jiffies, a second at most. 0 counts as 1."""
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    events = kernel.events
    dev = XenbusDevice(1, spurious_threshold=threshold)
    port = evtchn.alloc_unbound(other, DOMID_SELF, 0)
    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, ignore, 0, "x")
    info = events.info(irq)
    delays = []
    for _ in range(14):
        run(kernel)
        before = dev.jiffies_eoi_delayed
        events.xen_irq_lateeoi(irq, XEN_EOI_FLAG_SPURIOUS)
        delays.append(dev.jiffies_eoi_delayed - before)
        sleep_until(kernel.now() + (delays[-1] + 1) * JIFFY, kernel)
        info.spurious_cnt = min(len(delays), 10)  # the delayed EOI ended the row: go on as if it hadn't
        evtchn.send(other, port)
    free = max(threshold, 1)
    # The count itself ends at 10, where 2 ** count reaches four seconds.
    assert delays == [0] * free + [min(1 << min(i, 9 - free), HZ) for i in range(14 - free)]


def test_an_honest_event_ends_the_throttling(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, other = pair
    port = evtchn.alloc_unbound(other.domain, DOMID_SELF, 0)
    dev = XenbusDevice(other.domain.domid, spurious_threshold=3)
    events = kernel.events
    flags = 0
    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, ignore, 0, "x")
    run(kernel)
    events.xen_irq_lateeoi(irq)
    for flags, delayed in ((1, 0), (1, 0), (1, 0), (1, 1), (0, 1), (1, 1), (1, 1), (1, 1), (1, 2)):
        evtchn.send(other.domain, port)
        run(kernel)
        events.xen_irq_lateeoi(irq, flags)
        sleep_until(kernel.now() + 2 * JIFFY, kernel)
        assert dev.jiffies_eoi_delayed == delayed
    assert dev.spurious_events == 8


def test_a_long_loop_defers_its_eois(hypervisor: Hypervisor) -> None:
    """After two jiffies in one upcall EOIs wait ten, so that the loop ends though the other side goes on."""
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    events = kernel.events
    port = evtchn.alloc_unbound(other, DOMID_SELF, 0)
    dev = XenbusDevice(1)

    def storm(irq: int, dev_id: object) -> IrqReturn:
        hypervisor.clock.jump_to(hypervisor.clock.now() + 20_000)
        events.xen_irq_lateeoi(irq)
        evtchn.send(other, port)
        return IRQ_HANDLED

    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, storm, 0, "x")
    run(kernel)
    # One on CPU 0 before the IRQ moves; then a loop on CPU 1. The time is looked at every 256 events, the
    # first look sets the limit: 20 us each, 8 ms.
    assert dev.events == 1 + 768
    ended = kernel.jiffies()
    assert events.info(irq).delayed
    hypervisor.clock.jump_to(kernel.jiffies_to_ns(ended + 9))
    hypervisor.clock.fire_due()
    run(kernel)
    assert dev.events == 1 + 768
    hypervisor.clock.jump_to(kernel.jiffies_to_ns(ended + 10))
    hypervisor.clock.fire_due()
    run(kernel)
    assert dev.events == 1 + 2 * 768


def test_parameters_of_the_loop(hypervisor: Hypervisor) -> None:
    """xen.event_loop_timeout and xen.event_eoi_delay: after how long EOIs are deferred, and for how long."""
    domain = hypervisor.create_domain(0, privileged=True)
    kernel = Kernel(domain, partial(Pvops, event_loop_timeout=5, event_eoi_delay=3))
    kernel.boot()
    other = hypervisor.create_domain()
    events = kernel.events
    port = evtchn.alloc_unbound(other, DOMID_SELF, 0)
    dev = XenbusDevice(1)

    def storm(irq: int, dev_id: object) -> IrqReturn:
        hypervisor.clock.jump_to(hypervisor.clock.now() + 20_000)
        events.xen_irq_lateeoi(irq)
        evtchn.send(other, port)
        return IRQ_HANDLED

    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(dev, port, storm, 0, "x")
    run(kernel)
    # The first look, at event 256, sets the limit, 20 ms on; 1,000 events later comes the look at 1280.
    assert dev.events == 1280
    assert events.info(irq).eoi_time == kernel.jiffies() + 3
    events.event_loop_timeout = 1
    events.lateeoi.event_eoi_delay = 100
    sleep_until(kernel.jiffies_to_ns(events.info(irq).eoi_time), kernel)
    assert dev.events == 1280 + 512
    assert events.info(irq).eoi_time == kernel.jiffies() + 100


def test_delayed_eois_survive_their_cpu(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    events = kernel.events
    port = evtchn.alloc_unbound(other, DOMID_SELF, 0)
    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(XenbusDevice(1), port, ignore, 0, "x")
    run(kernel)
    events.xen_irq_lateeoi(irq)
    kernel.irq.set_affinity(irq, 2)
    evtchn.send(other, port)
    run(kernel)

    def spurious() -> None:
        for info in (events.info(irq),):
            info.spurious_cnt = 4
            events.xen_irq_lateeoi(irq, XEN_EOI_FLAG_SPURIOUS)

    kernel.queue_work(spurious, 1)
    run(kernel)
    assert events.info(irq).eoi_cpu == 1
    kernel.cpu_down(1)
    evtchn.send(other, port)
    sleep_until(NS_PER_S, kernel)
    assert counts(kernel, irq) == [2, 1]


def test_deferral_is_for_eois_from_inside_the_loop(hypervisor: Hypervisor) -> None:
    """An EOI that comes when the loop has ended can't prolong it, so it's not delayed."""
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    events = kernel.events
    ports = [evtchn.alloc_unbound(other, DOMID_SELF, 0) for _ in range(2)]
    deferred: list[int] = []
    storms = 0

    def storm(irq: int, dev_id: object) -> IrqReturn:
        nonlocal storms
        storms += 1
        hypervisor.clock.jump_to(hypervisor.clock.now() + 20_000)
        events.xen_irq_lateeoi(irq)
        evtchn.send(other, ports[0] if storms < 767 else ports[1])
        return IRQ_HANDLED

    def late(irq: int, dev_id: object) -> IrqReturn:
        deferred.append(events.info(irq).eoi_time)
        kernel.queue_work(lambda: events.xen_irq_lateeoi(irq))
        return IRQ_HANDLED

    bind = events.bind_interdomain_evtchn_to_irqhandler_lateeoi
    second = bind(XenbusDevice(1), ports[1], late, 0, "late")
    run(kernel)
    first = bind(XenbusDevice(1), ports[0], storm, 0, "storm")
    for irq in (first, second):
        kernel.irq.set_affinity(irq, 1)
    run(kernel)
    assert deferred[0] == 0 < deferred[1] == kernel.jiffies() + 10
    assert not events.info(second).delayed
    assert not events.info(second).eoi_time


def test_delayed_eois_come_in_the_order_of_their_time(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    events = kernel.events
    irqs = []
    for count in (5, 2, 4, 3):
        port = evtchn.alloc_unbound(other, DOMID_SELF, 0)
        irqs.append(events.bind_interdomain_evtchn_to_irqhandler_lateeoi(XenbusDevice(1), port, ignore, 0, f"x{count}"))
        run(kernel)
        events.info(irqs[-1]).spurious_cnt = count
        events.xen_irq_lateeoi(irqs[-1], XEN_EOI_FLAG_SPURIOUS)
    assert [events.info(irq).eoi_time for irq in irqs] == [16, 2, 8, 4]
    for jiffies, waiting in ((1, 4), (2, 3), (3, 3), (4, 2), (8, 1), (15, 1), (16, 0)):
        sleep_until(jiffies * JIFFY, kernel)
        assert sum(events.info(irq).delayed for irq in irqs) == waiting


def test_an_irq_active_elsewhere_waits(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    """What a second CPU would find while a first one has not acknowledged yet."""
    kernel, other = pair
    port = evtchn.alloc_unbound(other.domain, DOMID_SELF, 0)
    events = kernel.events
    irq = events.bind_interdomain_evtchn_to_irqhandler_lateeoi(XenbusDevice(1), port, ignore, 0, "x")
    run(kernel)
    events.xen_irq_lateeoi(irq)
    events.info(irq).is_active = True
    evtchn.send(other.domain, port)
    run(kernel)
    assert sum(counts(kernel, irq)) == 1
    assert events.ops.is_pending(events.evtchn_from_irq(irq))


def test_two_level_goes_round(hypervisor: Hypervisor) -> None:
    """A scan begins after the port served last; the first word's lower part comes at the end."""
    kernel = dom0(hypervisor, fifo=False)
    other = hypervisor.create_domain()
    order: list[int] = []

    def note(irq: int, dev_id: object) -> IrqReturn:
        assert isinstance(dev_id, int)
        order.append(dev_id)
        return IRQ_HANDLED

    ports = []
    for _ in range(64):  # so that the three aren't in the first word
        evtchn.alloc_unbound(kernel.domain, DOMID_SELF, 1)
    for _ in range(3):
        local = evtchn.alloc_unbound(kernel.domain, DOMID_SELF, 1)
        ports.append(evtchn.bind_interdomain(other, 0, local))
        irq = kernel.events.bind_evtchn_to_irqhandler(local, note, 0, "x", dev_id=len(ports))
        kernel.irq.set_affinity(irq, 1)
    run(kernel)
    order.clear()
    evtchn.send(other, ports[0])
    run(kernel)
    for port in ports:
        evtchn.send(other, port)
    run(kernel)
    assert order == [1, 2, 3, 1]


def test_a_stale_ring_entry_is_not_the_new_ports(hypervisor: Hypervisor) -> None:
    """Two ports in the ring; the first reaction gives up the second port and gets its number again."""
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    user = kernel.evtchn_user("x")
    calls: list[int] = []

    def first(port: int) -> None:
        user.unbind(port + 1)
        assert user.bind_unbound(1, calls.append) == port + 1

    ports = [user.bind_unbound(1, first), user.bind_unbound(1, calls.append)]
    for port in ports:
        kernel.irq.set_affinity(kernel.events.irq_from_evtchn(port), 1)
        evtchn.send(other, evtchn.bind_interdomain(other, 0, port))
    run(kernel)
    assert (calls, user.ports) == ([], ports)


# VIRQs, timers, IPIs.


def test_timers_count_on_their_cpu(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, _ = pair
    fired: list[tuple[int, int]] = []
    rows = [kernel.events.bind_virq_to_irq(VIRQ_TIMER, cpu, True) for cpu in (0, 1)]
    for cpu, when in ((1, 300), (0, 200), (1, 100), (1, 100)):
        kernel.set_timer(when, lambda: fired.append((kernel.cpu, kernel.now())), cpu)
    kernel.set_timer(150, lambda: fired.append((9, 9)), 1).cancel()
    sleep_until(1000, kernel)
    assert fired == [(1, 100), (1, 100), (0, 200), (1, 300)]
    assert [counts(kernel, row) for row in rows] == [[1, 0], [0, 2]]
    sleep_until(NS_PER_S, kernel)  # no tick
    assert [counts(kernel, row) for row in rows] == [[1, 0], [0, 2]]


def test_ipis_count_what_was_asked(pair: tuple[Kernel[Pvops], Kernel[Pvops]]) -> None:
    kernel, _ = pair
    ran: list[tuple[str, int]] = []

    def note(what: str) -> Callable[[], None]:
        return lambda: ran.append((what, kernel.cpu))

    def work() -> None:
        ran.append(("work", kernel.cpu))
        kernel.smp_call_function_single(0, note("back"))
        kernel.smp_call_function_single(1, note("here"))
        kernel.irq_work_queue(note("irq_work"))
        kernel.queue_work(note("more"), 0)

    kernel.queue_work(work, 1)
    run(kernel)
    assert ran == [
        ("work", 1), ("here", 1), ("irq_work", 1), ("back", 0), ("more", 0)
    ]  # fmt: skip
    stat = kernel.events.irq_stat
    assert [(s.resched, s.call, s.apic_irq_work) for s in stat] == [(1, 1, 0), (0, 0, 1)]
    kernel.smp_call_function(note("all"))
    run(kernel)
    assert ran[-1] == ("all", 1)
    text = kernel.proc_interrupts()
    for label, name in (("RES", "resched"), ("CAL", "callfuncsingle")):
        rows = [recorded_counts(text)[kernel.events.bind_ipi_to_irq(ipi, cpu)][cpu]
                for cpu in (0, 1) for ipi in Ipi if ipi.name.lower().replace("_", "").startswith(
                    {"resched": "resched", "callfuncsingle": "callfunctionsingle"}[name])]  # fmt: skip
        assert rows == recorded_stat(text, label)
    with pytest.raises(IrqError) as error:
        kernel.smp_call_function_single(2, work)
    assert error.value.errno == Errno.ENXIO


def test_many_cpus_are_called_by_the_other_ipi(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor, 4)
    ran: list[int] = []
    kernel.smp_call_function(lambda: ran.append(kernel.cpu))
    run(kernel)
    assert ran == [1, 2, 3]
    assert [counts(kernel, kernel.events.bind_ipi_to_irq(Ipi.CALL_FUNCTION, cpu))[cpu] for cpu in range(4)] == [
        0,
        1,
        1,
        1,
    ]


def test_console_virq(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    calls: list[int] = []
    kernel.events.on_console = lambda: calls.append(kernel.cpu)
    evtchn.send_global_virq(hypervisor, VIRQ_CONSOLE)
    run(kernel)
    assert (calls, counts(kernel, 39)) == ([0], [1, 0])


def test_xenbus_and_xenstored(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    replies: list[int] = []
    kernel.events.on_xenbus = lambda: replies.append(kernel.cpu)
    store = kernel.evtchn_user("xenstored")
    store.bind_interdomain(0, kernel.events.store_port, store.notify)
    run(kernel)
    assert replies == [1]  # the port's first event is a request too, without a message
    kernel.events.notify_remote_via_irq(kernel.events.xenbus_irq)
    run(kernel)
    assert replies == [1, 1]


def test_a_virq_left_bound_is_found(hypervisor: Hypervisor) -> None:
    """As after kexec: the VIRQ has a port already."""
    domain = hypervisor.create_domain(0, privileged=True, vcpus=1)
    port = evtchn.bind_virq(domain, VIRQ_TIMER, 0)
    kernel = Kernel(domain, Pvops)
    kernel.boot()
    assert kernel.events.evtchn_from_irq(24) == port


def test_bind_failures_leave_nothing(hypervisor: Hypervisor) -> None:
    kernel = dom0(hypervisor)
    events = kernel.events
    lines, before = set(kernel.irq.descs), lsevtchn(kernel.domain)
    with pytest.raises(XenError):
        events.bind_virq_to_irqhandler(VIRQ_DOM_EXC, 1, ignore, 0, "x")  # a global VIRQ is vCPU 0's to bind
    with pytest.raises(XenError):
        events.bind_interdomain_evtchn_to_irqhandler_lateeoi(XenbusDevice(9), 1, ignore, 0, "x")
    with pytest.raises(IrqError):
        events.bind_evtchn_to_irq(0)
    with pytest.raises(IrqError):
        events.bind_virq_to_irqhandler(VIRQ_DOM_EXC, 0, ignore, 0x80, "shared without dev_id")
    with pytest.raises(IrqError):
        events.info(0)
    with pytest.raises(IrqError):
        events.info(99)
    assert (set(kernel.irq.descs), lsevtchn(kernel.domain)) == (lines, before)
    assert sum(events._channels_on_cpu) == sum(1 for irq in lines if events.evtchn_from_irq(irq))


def test_the_array_grows(hypervisor: Hypervisor) -> None:
    """Past 1024 ports a second page of event words, past 1000 IRQs a wider column."""
    kernel = dom0(hypervisor)
    other = hypervisor.create_domain()
    user = kernel.evtchn_user("many")
    calls: list[int] = []
    ports = [user.bind_unbound(1, calls.append) for _ in range(1100)]
    remote = [evtchn.bind_interdomain(other, 0, port) for port in ports]
    for port in remote:
        evtchn.send(other, port)
    run(kernel)
    assert sorted(calls) == ports
    text = kernel.proc_interrupts()
    assert text.startswith(" " * 12 + "CPU0       CPU1       \n  24:")
    assert "\n1139:" in text
    user.close()
    assert len(kernel.irq.descs) == 16 + 16  # those of ISA lines, and the channels of boot


class Churn:
    """Random binding and sending, with what must hold after each step."""

    def __init__(self, fifo: bool) -> None:
        self.machine = Machine(1 << 26)
        hypervisor = Hypervisor(self.machine)
        self.kernel = dom0(hypervisor, fifo=fifo)
        self.other = hypervisor.create_domain()
        self.user = self.kernel.evtchn_user("x")
        self.ports: dict[int, tuple[int, int]] = {}  # local -> remote, calls expected
        self.calls: dict[int, int] = {}
        self.at_boot = lsevtchn(self.kernel.domain), set(self.kernel.irq.descs)

    def react(self, port: int) -> None:
        self.calls[port] = self.calls.get(port, 0) + 1

    def step(self, what: str, pick: int) -> None:
        ports = sorted(self.ports)
        if what == "bind":
            remote = evtchn.alloc_unbound(self.other, DOMID_SELF, 0)
            port = self.user.bind_interdomain(1, remote, self.react)
            self.ports[port] = remote, 1
            self.calls[port] = 0
        elif not ports:
            return
        else:
            port = ports[pick % len(ports)]
            remote, expected = self.ports[port]
            if what == "unbind":
                self.user.unbind(port)
                evtchn.close(self.other, remote)
                del self.ports[port]
                return
            if what == "send":
                run(self.kernel)
                evtchn.send(self.other, remote)
                self.ports[port] = remote, expected + 1
            elif what == "move":
                self.kernel.irq.set_affinity(self.kernel.events.irq_from_evtchn(port), 1 + pick % 3)
        if what == "run" or pick % 2:
            run(self.kernel)
            self.check()

    def check(self) -> None:
        events = self.kernel.events
        for port, (_, expected) in self.ports.items():
            irq = events.irq_from_evtchn(port)
            assert self.calls[port] == sum(counts(self.kernel, irq)) == expected
            assert evtchn.status(self.kernel.domain, DOMID_SELF, port).vcpu == events.cpu_from_evtchn(port)
        bound = sum(1 for irq in self.at_boot[1] if events.evtchn_from_irq(irq)) + len(self.ports)
        assert len(self.kernel.irq.descs) == len(self.at_boot[1]) + len(self.ports)
        assert sum(events._channels_on_cpu) == bound
        if isinstance(events.ops, Events2l):
            assert sum(word.bit_count() for words in events.ops._cpu_mask for word in words) == bound

    def end(self) -> None:
        run(self.kernel)
        self.check()
        self.user.close()
        assert (lsevtchn(self.kernel.domain), set(self.kernel.irq.descs)) == self.at_boot
        self.machine.close()


@settings(max_examples=60, deadline=None)
@given(
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(["bind", "bind", "unbind", "send", "send", "move", "run"]), st.integers(0, 99)),
        max_size=60,
    ),
)
def test_churn(fifo: bool, steps: list[tuple[str, int]]) -> None:
    churn = Churn(fifo)
    for what, pick in steps:
        churn.step(what, pick)
    churn.end()

"""Operations that fail with an errno that they might have given; ports and IRQ numbers that are at an end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

import pvirq
from faultlib import MS, bare, do, new_host, pair, run_for, watching
from pvirq.abi import grant_table
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, VIRQ_DEBUG
from pvirq.drivers.blockstore import MemoryStore
from pvirq.lab.faults import Faults
from pvirq.lab.faults.operations import HYPERCALL_NUMBERS, operations
from pvirq.linux.irq import IrqError
from pvirq.modelled import ModelledGuest
from pvirq.pv.hypercalls.protocol import Preempted
from pvirq.xen import evtchn
from pvirq.xen.domain import Domain
from pvirq.xen.probes import has_front


@pytest.fixture
def host() -> Iterator[pvirq.Host]:
    with new_host() as host:
        yield host


@pytest.fixture
def faults(host: pvirq.Host) -> Iterator[Faults]:
    with Faults(host) as faults:
        yield faults


def fails(errno: Errno, operation: Callable[[], object]) -> None:
    with pytest.raises(XenError) as error:
        operation()
    assert error.value.errno is errno


def _operations(domain: Domain, port: int, dom0: Domain) -> dict[str, Callable[[], object]]:
    return {
        "alloc_unbound": lambda: evtchn.alloc_unbound(domain, DOMID_SELF, 0),
        "bind_interdomain": lambda: evtchn.bind_interdomain(domain, 0, 1),
        "bind_virq": lambda: evtchn.bind_virq(domain, VIRQ_DEBUG, 0),
        "bind_ipi": lambda: evtchn.bind_ipi(domain, 0),
        "bind_pirq": lambda: evtchn.bind_pirq(domain, 1, 0),
        "close": lambda: evtchn.close(domain, port),
        "send": lambda: evtchn.send(domain, port),
        "status": lambda: evtchn.status(domain, DOMID_SELF, port),
        "bind_vcpu": lambda: evtchn.bind_vcpu(domain, port, 0),
        "unmask": lambda: evtchn.unmask(domain, port),
        "reset": lambda: evtchn.reset(domain, DOMID_SELF),
        "init_control": lambda: evtchn.init_control(domain, domain.machine.alloc(1, domain.domid), 0, 0),
        "expand_array": lambda: evtchn.expand_array(domain, 0),
        "set_priority": lambda: evtchn.set_priority(domain, port, 1),
    }


@pytest.mark.parametrize("name", [
    "alloc_unbound", "bind_interdomain", "bind_virq", "bind_ipi", "bind_pirq", "close", "send", "status", "bind_vcpu",
    "unmask", "reset", "init_control", "expand_array", "set_priority",
])  # fmt: skip
def test_each_event_channel_operation_can_fail(host: pvirq.Host, faults: Faults, name: str) -> None:
    domain, dom0 = bare(host), host.dom0.domain
    port, _ = pair(domain, dom0)
    calls = _operations(domain, port, dom0)
    before = list(domain.evtchn)
    with watching(host) as seen, faults.fail(f"evtchn.{name}", Errno.EUSERS, domain=domain.domid) as rule:
        fails(Errno.EUSERS, calls[name])
        assert [channel.port for channel in domain.evtchn] == [channel.port for channel in before]
        assert rule.fired == 1
        assert seen.notes == [{
            "rule": str(rule), "action": "refused", "d": domain.domid, "operation": f"evtchn.{name}",
            "error": "EUSERS",
        }]  # fmt: skip
        for other, call in calls.items():  # and no other one does
            if other not in (name, "reset", "close"):
                with contextlib.suppress(XenError):
                    call()
        assert rule.fired == 1
        late = bare(host)  # nor that of another domain
        assert evtchn.alloc_unbound(late, DOMID_SELF, 0) == 1
        assert rule.fired == 1
    assert domain.evtchn.check is None
    if name == "send":
        evtchn.send(domain, port)


def test_new_domains_are_meant_as_well(host: pvirq.Host, faults: Faults) -> None:
    faults.fail("evtchn.bind_ipi", "EPERM", count=1)
    domain = bare(host)
    fails(Errno.EPERM, lambda: evtchn.bind_ipi(domain, 0))
    assert evtchn.bind_ipi(domain, 0) == 1


def test_a_backend_that_cannot_bind(host: pvirq.Host, faults: Faults) -> None:
    """Its device closes, its kernel says why, and the next try is as good as any."""
    guest = host.model("pvops")
    host.settle()
    faults.fail("evtchn.bind_interdomain", Errno.ENOSPC, domain=0, count=1)
    host.attach_disk(guest, "xvda", MemoryStore(1024))
    run_for(host, 1000 * MS)
    assert not guest.has_disk("xvda")
    assert any("mapping ring-ref port" in line for line in host.dom0.log)
    host.attach_disk(guest, "xvdb", MemoryStore(1024))
    assert host.run(lambda: guest.has_disk("xvdb"), 10**10)


def test_a_frontend_that_cannot_send(host: pvirq.Host, faults: Faults) -> None:
    """Linux ignores what EVTCHNOP_send returns."""
    guest = host.model("pvops")
    host.attach_disk(guest, "xvda", MemoryStore(1024))
    host.run(lambda: guest.has_disk("xvda"), 10**10)
    rule = faults.fail("evtchn.send", Errno.EINVAL, domain=guest)
    reading = guest.kernel.spawn("reader", guest.disk("xvda").read(0, 8))
    assert not host.run(lambda: reading.done, 10**9)
    assert rule.fired == 1


def test_names_of_operations() -> None:
    names = operations()
    assert len(names) == len(set(names))
    assert {
        "evtchn.send", "grant_table_op.map_grant_ref", "memory_op.populate_physmap", "physdev_op.map_pirq",
        "vcpu_op.set_singleshot_timer", "sched_op.poll", "set_timer_op", "mmu_update",
    } <= set(names)  # fmt: skip
    assert "multicall" not in HYPERCALL_NUMBERS


class Cpu:
    """As much of a real guest's vCPU as a refused hypercall looks at."""

    def __init__(self, domain: Domain) -> None:
        self.domain, self.vcpu = domain, domain.vcpus[0]
        self.written: dict[int, bytes] = {}

    def write(self, va: int, data: bytes) -> None:
        self.written[va] = data


def test_grant_operations_fail_by_their_status(host: pvirq.Host, faults: Faults) -> None:
    """One for each of a batch, and no longer batch at a time than Xen does."""
    cpu = Cpu(bare(host))
    rule = faults.fail("grant_table_op.copy", "GNTST_bad_page")
    copy, unmap = (grant_table.GNTTABOP_copy, 0x1000, 3), (grant_table.GNTTABOP_unmap_grant_ref, 0x1000, 3)
    assert rule.is_for(cpu, copy)
    assert not rule.is_for(cpu, unmap)
    assert rule.refuse(cpu, copy) == 0
    bad_page = (grant_table.GNTST_bad_page & 0xFFFF).to_bytes(2, "little")
    assert cpu.written == {0x1000 + 36 + 40 * i: bad_page for i in range(3)}
    with pytest.raises(Preempted) as rest:
        rule.refuse(cpu, (grant_table.GNTTABOP_copy, 0x1000, 2500))
    assert rest.value.arguments == (grant_table.GNTTABOP_copy, 0x1000 + 1024 * 40, 1476)
    errno = faults.fail("grant_table_op", "EPERM")  # any of them
    assert errno.is_for(cpu, copy)
    assert errno.is_for(cpu, unmap)
    fails(Errno.EPERM, lambda: errno.refuse(cpu, unmap))


@pytest.mark.parametrize("error", ["GNTST_eagain", "EPERM"])
def test_backends_that_cannot_map(host: pvirq.Host, faults: Faults, error: str) -> None:
    """A request fails whose pages can't be had; a ring that can't be had is the end of its device."""
    guest = host.model("pvops")
    host.attach_disk(guest, "xvda", MemoryStore(1024))
    host.run(lambda: guest.has_disk("xvda"), 10**10)
    gnttab = host.backends.xenbus.gnttab
    host.backends.feature_persistent = False  # whose pages are mapped for each request
    host.attach_disk(guest, "xvdb", MemoryStore(1024))
    host.run(lambda: guest.has_disk("xvdb"), 10**10)
    with faults.fail("grant_table_op.map_grant_ref", error, domain=0, count=1) as rule:
        fails(Errno.EIO, lambda: do(guest, guest.disk("xvdb").read(0, 8)))
        assert rule.fired == 1
        do(guest, guest.disk("xvdb").read(0, 8))
    assert not has_front(gnttab, "map")
    with faults.fail("grant_table_op.map_grant_ref", error, domain="Domain-0", count=1) as rule:
        host.attach_disk(guest, "xvdc", MemoryStore(1024))
        run_for(host, 1000 * MS)
        assert rule.fired == 1
        assert not guest.has_disk("xvdc")
    with faults.fail("grant_table_op.map_grant_ref", error, domain=guest):
        assert not has_front(gnttab, "map")


# -- ports -------------------------------------------------------------------------------------------------------------


def test_no_ports(host: pvirq.Host, faults: Faults) -> None:
    domain = bare(host)
    ports = [evtchn.alloc_unbound(domain, DOMID_SELF, 0) for _ in range(5)]
    evtchn.close(domain, ports[1])
    limit = domain.evtchn.max_port
    with faults.no_ports(domain=domain.domid, free=2) as rule:
        assert evtchn.bind_ipi(domain, 0) == ports[1]
        assert evtchn.alloc_unbound(domain, DOMID_SELF, 0) == 6
        assert rule.fired == 0
        fails(Errno.ENOSPC, lambda: evtchn.bind_ipi(domain, 0))
        fails(Errno.ENOSPC, lambda: evtchn.alloc_unbound(host.dom0.domain, domain.domid, 0))
        assert rule.fired == 1
        assert evtchn.alloc_unbound(host.dom0.domain, DOMID_SELF, 0)  # another domain's ports
        evtchn.close(domain, ports[2])
        assert evtchn.bind_ipi(domain, 0) == ports[2]
        fails(Errno.ENOSPC, lambda: evtchn.bind_virq(domain, VIRQ_DEBUG, 0))
    assert domain.evtchn.max_port == limit
    assert evtchn.bind_virq(domain, VIRQ_DEBUG, 0) == 7


def test_no_ports_for_a_time(host: pvirq.Host, faults: Faults) -> None:
    domain = bare(host)
    rule = faults.no_ports(after=1, until=2)
    assert evtchn.bind_ipi(domain, 0) == 1
    run_for(host, 1500 * MS)
    fails(Errno.ENOSPC, lambda: evtchn.bind_ipi(domain, 0))
    run_for(host, 1000 * MS)
    assert evtchn.bind_ipi(domain, 0) == 2
    assert not rule.active


def test_a_guest_without_ports(host: pvirq.Host, faults: Faults) -> None:
    guest = host.model("pvops")
    host.settle()
    rule = faults.no_ports(domain=guest)
    host.attach_disk(guest, "xvda", MemoryStore(1024))
    run_for(host, 1000 * MS)
    assert rule.fired > 0
    assert not guest.has_disk("xvda")


# -- IRQ numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "warning"),
    [
        ("pvops", ""),
        ("2.6.18", "No available IRQ to bind to: increase NR_DYNIRQS."),
        ("suse", "No available IRQ to bind to: increase NR_DYNIRQS."),
    ],
)
def test_no_irqs(host: pvirq.Host, faults: Faults, kernel: str, warning: str) -> None:
    guest: ModelledGuest = host.model(kernel)
    host.settle()
    rule = faults.no_irqs(domain=guest, free=1)

    def bind() -> int:
        return guest.kernel.events.bind_listening(0, lambda irq, dev: None, "test", None)  # type: ignore[arg-type, return-value]

    irq = bind()
    for _ in range(2):
        with pytest.raises(IrqError) as error:
            bind()
        assert error.value.errno is Errno.ENOSPC
    assert rule.fired == 2
    assert [line for line in guest.kernel.log if "NR_DYNIRQS" in line] == ([warning] if warning else [])
    assert f"{irq}:" in guest.proc_interrupts()
    host.attach_disk(guest, "xvda", MemoryStore(1024))
    run_for(host, 1000 * MS)
    assert not guest.has_disk("xvda")
    rule.remove()
    assert bind() != irq


def test_no_irqs_in_domain_0(host: pvirq.Host, faults: Faults) -> None:
    guest = host.model("pvops")
    host.settle()
    with faults.no_irqs(domain=0) as rule:
        host.attach_disk(guest, "xvda", MemoryStore(1024))
        run_for(host, 1000 * MS)
        assert rule.fired == 1
        assert not guest.has_disk("xvda")
    host.attach_disk(guest, "xvdb", MemoryStore(1024))
    assert host.run(lambda: guest.has_disk("xvdb"), 10**10)

"""/dev/xen/evtchn of XenLinux: ports of processes, which have no IRQ."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import DOMID_SELF, VIRQ_DOM_EXC
from pvirq.linux.irq import IrqError
from pvirq.linux.xenlinux_2_6_18 import XenLinux2618
from pvirq.linux.xenlinux_evtchn import EVTCHN_RING_SIZE, XenLinuxEvtchnUser
from pvirq.linux.xenlinux_suse import XenLinuxSuse
from pvirq.xen import evtchn
from xenlinuxlib import Setup, unbound


@pytest.fixture(params=[XenLinux2618, XenLinuxSuse], ids=["2.6.18", "suse"])
def dom0(request: pytest.FixtureRequest) -> Iterator[Setup]:
    it = Setup(request.param, vcpus=2, domid=0)
    yield it
    it.close()


def notify(it: Setup, theirs: int, times: int = 1) -> None:
    for _ in range(times):
        evtchn.send(it.peer, theirs)


def opened(it: Setup, name: str = "xenstored") -> XenLinuxEvtchnUser:
    user = it.kernel.evtchn_user(name)
    assert isinstance(user, XenLinuxEvtchnUser)
    return user


def test_a_port_comes_masked_and_goes_on_when_it_is_written(dom0: Setup) -> None:
    user = opened(dom0)
    came: list[int] = []
    theirs = unbound(dom0.peer, 0)

    def react(port: int) -> None:
        assert dom0.events.evtchn_masked(port)
        came.append(port)
        if len(came) < 4:
            notify(dom0, theirs, 3)  # they become one

    table = dom0.kernel.proc_interrupts()
    port = user.bind_interdomain(dom0.peer.domid, theirs, react)
    dom0.run()
    assert came == [port] * 4  # the connection's own event, and one for each three
    assert not dom0.events.evtchn_masked(port)
    assert dom0.kernel.proc_interrupts().splitlines()[1:3] == table.splitlines()[1:3]
    assert "xenstored" not in dom0.kernel.proc_interrupts()
    assert dom0.events.irq_from_evtchn(port) == -1


def test_a_daemon_that_limits_the_rate(dom0: Setup) -> None:
    user, came = opened(dom0), list[int]()

    def react(port: int) -> bool:
        came.append(port)
        return False

    theirs = unbound(dom0.peer, 0)
    port = user.bind_interdomain(dom0.peer.domid, theirs, react)
    dom0.run()
    notify(dom0, theirs)
    dom0.run()
    assert came == [port]
    user.unmask(port)
    dom0.run()
    assert came == [port, port]
    user.unmask(port)
    user.unmask(port)
    dom0.run()
    assert came == [port, port]


def test_the_kinds_of_ports(dom0: Setup) -> None:
    user, came = opened(dom0), list[int]()
    virq = user.bind_virq(VIRQ_DOM_EXC, came.append)
    listening = user.bind_unbound(dom0.peer.domid, came.append)
    theirs = evtchn.bind_interdomain(dom0.peer, 0, listening)
    assert user.ports == sorted([virq, listening])
    evtchn.send_global_virq(dom0.hypervisor, VIRQ_DOM_EXC)
    notify(dom0, theirs)
    dom0.run()
    assert sorted(came) == sorted([virq, listening])
    user.notify(listening)
    assert dom0.peer.evtchn.is_pending(theirs)
    user.notify(virq)  # Xen refuses it, and nobody hears of that
    with pytest.raises(XenError) as error:
        user.bind_virq(VIRQ_DOM_EXC)
    assert error.value.errno == Errno.EEXIST
    with pytest.raises(IrqError):
        user.irq_of(virq)


def test_ports_of_another_process(dom0: Setup) -> None:
    mine, yours = opened(dom0), opened(dom0, "xenconsoled")
    port = mine.bind_unbound(dom0.peer.domid)
    for call in (yours.notify, yours.unmask, yours.unbind, yours.irq_of):
        with pytest.raises(XenError) as error:
            call(port)
        assert error.value.errno == Errno.ENOTCONN


def test_unbind_and_close(dom0: Setup) -> None:
    user, came = opened(dom0), list[int]()
    ports = [user.bind_unbound(dom0.peer.domid, came.append) for _ in range(3)]
    theirs = [evtchn.bind_interdomain(dom0.peer, 0, port) for port in ports]
    for each in theirs:
        notify(dom0, each)
    dom0.events.upcall(0)  # the ports are in the ring; the process has not run yet
    user.unbind(ports[0])
    assert dom0.events.evtchn_masked(ports[0])
    dom0.run()
    assert came == ports[1:]
    user.close()
    assert user.ports == []
    assert dom0.events.port_user == {}
    assert not any(dom0.domain.evtchn.port(port).usable for port in ports)


def test_a_port_that_nobody_has_is_masked(dom0: Setup) -> None:
    port = evtchn.alloc_unbound(dom0.domain, DOMID_SELF, dom0.peer.domid)
    theirs = evtchn.bind_interdomain(dom0.peer, 0, port)
    dom0.events.unmask_evtchn(port)
    notify(dom0, theirs)
    dom0.run()
    assert dom0.events.evtchn_masked(port)
    assert not dom0.events.test_evtchn(port)


def test_a_full_ring_gives_nothing_more(dom0: Setup) -> None:
    user, came = opened(dom0), list[int]()
    port = user.bind_unbound(dom0.peer.domid, came.append)
    user._arrived = [port] * EVTCHN_RING_SIZE
    user.arrived(port)
    assert user.overflow
    user._read_ring()
    assert came == []  # EFBIG
    user.reset()
    dom0.kernel.queue_work(lambda: user.arrived(port))
    dom0.run()
    assert came == [port]


def test_the_process_runs_on_the_cpu_it_is_bound_to(dom0: Setup) -> None:
    user, cpus = opened(dom0), list[int]()
    user.cpu = 1
    port = user.bind_unbound(dom0.peer.domid, lambda port: cpus.append(dom0.kernel.cpu))
    theirs = evtchn.bind_interdomain(dom0.peer, 0, port)
    for _ in range(3):
        notify(dom0, theirs)
        dom0.run()
    assert cpus == [1, 1, 1]
    assert not dom0.events.evtchn_masked(port)  # another CPU's port: opened by hypercall

"""Event channels from Python: the page that documents it runs as it stands; every operation is there."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest

import pvirq
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xen import VIRQ_DEBUG
from pvirq.xen import evtchn
from pvirq.xen.domain import Hypervisor
from pvirq.xen.evtchn_op import Evtchnop
from pvirq.xen.memory import Machine

PAGE = Path(__file__).parent.parent / "docs/api-evtchn.md"


def test_the_page_runs() -> None:
    failed, tried = doctest.testfile(
        str(PAGE), module_relative=False, optionflags=doctest.IGNORE_EXCEPTION_DETAIL | doctest.REPORT_NDIFF
    )
    assert tried > 20
    assert not failed


def test_the_page_names_every_method() -> None:
    text = PAGE.read_text()
    for name, method in inspect.getmembers(Evtchnop, inspect.isfunction):
        if not name.startswith("_"):
            assert f"`{name}(" in text
            assert method.__doc__


def test_each_method_is_the_operation() -> None:
    hypervisor = Hypervisor(Machine(256 << 20))
    domain = hypervisor.create_domain(0, privileged=True, vcpus=2)
    guest = hypervisor.create_domain(1)
    op = domain.evtchnop
    assert op is domain.evtchnop
    theirs = op.alloc_unbound(0, dom=1, port=9)
    assert (theirs, op.status(9, dom=1).dom) == (9, 0)
    port = op.bind_interdomain(1, 9)
    assert op.bind_virq(VIRQ_DEBUG, 1) == 2
    assert op.bind_ipi(1) == 3
    op.bind_vcpu(port, 1)
    guest.evtchnop.send(9)
    op.unmask(port)
    assert domain.evtchn.is_pending(port)
    frames = hypervisor.machine.alloc(2, 0)
    assert op.init_control(frames, 8, 0) == 17
    op.expand_array(frames + 1)
    op.set_priority(port, 3)
    op.close(3)
    for call, errno in (
        (lambda: op.bind_pirq(1), Errno.EPERM),
        (lambda: op.send(2), Errno.EINVAL),
        (lambda: op.reset(1), Errno.EINVAL),
        (lambda: guest.evtchnop.status(1, dom=0), Errno.EPERM),
    ):
        with pytest.raises(XenError) as caught:
            call()
        assert caught.value.errno == errno
    op.reset()
    assert not domain.evtchn.active
    assert evtchn.status(guest, 1, 9).port == 0


def test_views_of_a_host() -> None:
    with pvirq.Host(machine_memory=256 << 20) as host:
        assert host.lsevtchn(0).splitlines()[0].startswith("   1: VCPU 0: ")
        assert "Event channel information for domain 0:" in host.debug_key("e")
        with pytest.raises(ValueError, match="no debug key 'q'"):
            host.debug_key("q")
        with pytest.raises(XenError) as caught:
            host.lsevtchn(5)
        assert caught.value.errno == Errno.ESRCH

"""The control ring: the frontend says how packets are spread over its queues."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterator

import pytest

from driverlib import Guest, Host, nic_of, row
from pvirq.abi.io_netif import (
    NETIF_CTRL_REQUEST,
    NETIF_CTRL_RESPONSE,
    NETIF_EXTRA_HASH,
    XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER,
    XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED,
    XEN_NETIF_CTRL_STATUS_SUCCESS,
    XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS,
    XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE,
    XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM,
    XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS,
    XEN_NETIF_CTRL_TYPE_SET_HASH_KEY,
    XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING,
    XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE,
    NETRXF_extra_info,
)
from pvirq.abi.io_ring import RING_HEADER
from pvirq.drivers.netback import Vif
from pvirq.drivers.netback_ctrl import Hashing, toeplitz
from pvirq.drivers.ring import FrontRing, RingPages
from pvirq.drivers.skb import Skb
from pvirq.linux.irq import IRQ_HANDLED, IrqReturn
from pvirq.toolstack.devices import Nic

# The example of Microsoft's verification suite for receive-side scaling.
KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")
FLOWS = [
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xD718262A, 0xC626B0EA),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2CC18CD5, 0x40207D3D),
]


def frame(source: str, sport: int, dest: str, dport: int, protocol: int = 6) -> bytes:
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(dest).packed
    if len(addresses) == 8:
        header = b"\x08\x00" + struct.pack(">BBHHHBBH", 0x45, 0, 60, 0, 0, 64, protocol, 0)
    else:
        header = b"\x86\xdd" + struct.pack(">IHBB", 6 << 28, 40, protocol, 64)
    return bytes(12) + header + addresses + struct.pack(">HH", sport, dport) + bytes(36)


@pytest.mark.parametrize("flow", FLOWS)
def test_toeplitz(flow: tuple[str, int, str, int, int, int]) -> None:
    source, sport, dest, dport, plain, with_ports = flow
    addresses = ipaddress.ip_address(source).packed + ipaddress.ip_address(dest).packed
    assert toeplitz(KEY, addresses) == plain
    assert toeplitz(KEY, addresses + struct.pack(">HH", sport, dport)) == with_ports
    hashing = Hashing()
    hashing.key = KEY
    v6 = len(addresses) > 8
    data = frame(source, sport, dest, dport)
    assert hashing.hash(data) is None
    hashing.flags = 0b0101
    assert hashing.hash(data) == (plain, 2 if v6 else 0)
    hashing.flags = 0b1111
    assert hashing.hash(data) == (with_ports, 3 if v6 else 1)
    assert hashing.hash(frame(source, sport, dest, dport, 17)) == (plain, 2 if v6 else 0)
    assert hashing.hash(data[:20]) is None
    assert hashing.hash(bytes(60)) is None


class Ctrl:
    """A guest with two queues and a control ring that the test writes."""

    def __init__(self) -> None:
        self.host = Host()
        self.host.start_backends()
        self.guest: Guest = self.host.guest(2)
        self.host.manager.attach_nic(1, Nic(0, "00:16:3e:00:00:01"))
        self.host.run()
        xenbus, events = self.guest.xenbus, self.guest.kernel.events
        mfn = xenbus.pages.alloc()
        self.ring = FrontRing(RingPages(self.host.machine, [mfn]), 16)
        self.irq = events.bind_listening(0, self.interrupt, "ctrl", self)
        self.page = xenbus.pages.alloc()
        self.ref = xenbus.gnttab.grant_access(0, self.page)
        base = "/local/domain/1/device/vif/0"
        self.host.store.write(f"{base}/ctrl-ring-ref", xenbus.gnttab.grant_access(0, mfn))
        self.host.store.write(f"{base}/event-channel-ctrl", events.evtchn_from_irq(self.irq))
        self.host.start_frontends(self.guest)

    def interrupt(self, irq: int, dev_id: object) -> IrqReturn:
        self.guest.kernel.events.eoi(irq)
        return IRQ_HANDLED

    @property
    def vif(self) -> Vif:
        interface = self.host.network.interfaces["vif1.0"]
        assert isinstance(interface, Vif)
        return interface

    def ask(self, kind: int, *data: int) -> tuple[int, int]:
        """(status, data) of the answer."""
        self.ring.put(NETIF_CTRL_REQUEST.pack(7, kind, *data, *[0] * (3 - len(data))))
        assert self.ring.push_requests()
        self.guest.kernel.events.notify_remote_via_irq(self.irq)
        self.host.run()
        ident, answered, status, result = NETIF_CTRL_RESPONSE.unpack(self.ring.response(12))
        assert (ident, answered) == (7, kind)
        assert not self.ring.more_responses()
        return status, result

    def put(self, data: bytes) -> None:
        self.host.machine.page(self.page)[: len(data)] = data


@pytest.fixture
def ctrl() -> Iterator[Ctrl]:
    ctrl = Ctrl()
    yield ctrl
    ctrl.host.close()


OK = (XEN_NETIF_CTRL_STATUS_SUCCESS, 0)
INVALID = (XEN_NETIF_CTRL_STATUS_INVALID_PARAMETER, 0)


def set_up(ctrl: Ctrl) -> None:
    ctrl.put(KEY)
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, 1) == OK
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, 0b1111) == OK
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, ctrl.ref, len(KEY)) == OK
    ctrl.put(struct.pack("<4I", 0, 1, 1, 0))
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE, 4) == OK
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, ctrl.ref, 4, 0) == OK


def test_packets_go_where_the_frontend_wants_them(ctrl: Ctrl) -> None:
    set_up(ctrl)
    before = row(ctrl.guest.kernel, "ctrl"), row(ctrl.host.dom0, "xen-netback-ctrl")
    assert before == (5, 6)  # and the first one, of binding
    nic = nic_of(ctrl.guest)
    for source, sport, dest, dport, _, value in FLOWS:
        queue = nic.queues[(0, 1, 1, 0)[value % 4]]
        produced = queue.rx.rsp_prod
        vcpus = ctrl.guest.domain
        vcpus.paused = True  # the frontend that is there knows nothing of hashes: look at its ring ourselves
        ctrl.vif.transmit(Skb(frame(source, sport, dest, dport)))
        ctrl.host.run()
        assert queue.rx.rsp_prod - produced == 2
        page = ctrl.host.machine.page(queue._ring_mfns[1])
        at = RING_HEADER + produced % 256 * 8
        assert struct.unpack_from("<H", page, at + 4)[0] & NETRXF_extra_info
        assert NETIF_EXTRA_HASH.unpack_from(page, at + 8) == (4, 0, 3 if ":" in source else 1, 1, value)


def test_what_is_asked_for_wrongly(ctrl: Ctrl) -> None:
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS) == (XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED, 0)
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, 1) == INVALID
    set_up(ctrl)
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_GET_HASH_FLAGS) == (XEN_NETIF_CTRL_STATUS_SUCCESS, 0b1111)
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_GET_HASH_MAPPING_SIZE) == (XEN_NETIF_CTRL_STATUS_SUCCESS, 128)
    for kind, *data in (
        (XEN_NETIF_CTRL_TYPE_SET_HASH_ALGORITHM, 2),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_FLAGS, 16),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, ctrl.ref, 41),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_KEY, 4000, 40),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING_SIZE, 129),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, ctrl.ref, 5, 0),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, ctrl.ref, 1, 0xFFFFFFFF),
        (XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, 4000, 1, 0),
    ):
        assert ctrl.ask(kind, *data) == INVALID, (kind, data)
    ctrl.put(struct.pack("<I", 2))  # there are queues 0 and 1
    assert ctrl.ask(XEN_NETIF_CTRL_TYPE_SET_HASH_MAPPING, ctrl.ref, 1, 0) == INVALID
    assert ctrl.vif.hashing.mapping == [0, 1, 1, 0]
    assert ctrl.ask(99) == (XEN_NETIF_CTRL_STATUS_NOT_SUPPORTED, 0)


def test_an_index_run_ahead_ends_the_rings_service_alone(ctrl: Ctrl) -> None:
    ctrl.ring.req_prod_pvt = 1 << 31
    ctrl.ring.push_requests()
    ctrl.guest.kernel.events.notify_remote_via_irq(ctrl.irq)
    ctrl.host.run()
    assert ctrl.ring.rsp_prod == 0
    assert "Impossible number of requests on the control ring" in ctrl.host.dom0.log[-1]
    assert not ctrl.vif.disabled


def test_it_goes_with_the_device(ctrl: Ctrl) -> None:
    set_up(ctrl)
    ctrl.host.do(ctrl.guest.kernel, ctrl.guest.xenbus.frontends.devices["device/vif/0"].unbind())
    ctrl.host.run()
    assert row(ctrl.host.dom0, "xen-netback-ctrl") == 0
    assert ctrl.vif.hashing.algorithm == 0
    assert not ctrl.host.xenbus.gnttab.table.maptrack


def test_a_bad_ring_closes_the_device() -> None:
    host = Host()
    host.start_backends()
    guest = host.guest()
    host.manager.attach_nic(1, Nic(0, "00:16:3e:00:00:01"))
    host.run()
    host.store.write("/local/domain/1/device/vif/0/ctrl-ring-ref", 4000)
    host.store.write("/local/domain/1/device/vif/0/event-channel-ctrl", 1)
    host.start_frontends(guest)
    assert "control ring" in host.store.read_text("/local/domain/0/error/backend/vif/1/0/error")
    assert not guest.xenbus.gnttab.table.active
    host.close()

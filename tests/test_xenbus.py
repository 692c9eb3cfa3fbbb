"""The device model: devices found, states, other ends that come and go, errors in the store."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from driverlib import Guest, Host
from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_xenbus import XenbusState
from pvirq.drivers.xenbus import Device, Driver
from pvirq.linux.kthread import Body

FRONT, BACK = "/local/domain/1/device/toy/0", "/local/domain/0/backend/toy/1/0"


class Toy(Driver):
    """Writes down what happens to it; goes along with the other end's states."""

    made: list[Toy]

    def __init__(self, dev: Device) -> None:
        super().__init__(dev)
        self.seen: list[str] = []
        Toy.made.append(self)

    def probe(self) -> Body[None]:
        self.seen.append("probe")
        yield from self.dev.switch_state(XenbusState.InitWait)

    def otherend_changed(self, state: XenbusState) -> Body[None]:
        self.seen.append(state.name)
        if state == XenbusState.Closing:
            yield from self.dev.frontend_closed()
        elif state == XenbusState.Reconfiguring:
            raise XenError(Errno.EPERM, "not that")

    def remove(self) -> Body[None]:
        self.seen.append("remove")
        yield from ()


class Broken(Toy):
    def probe(self) -> Body[None]:
        yield from self.dev.xs.read(self.dev.path("none"))


@pytest.fixture
def host() -> Iterator[Host]:
    Toy.made = []
    host = Host()
    yield host
    host.close()


@pytest.fixture
def guest(host: Host) -> Guest:
    return host.guest()


def add(host: Host, devid: int = 0) -> None:
    """Both ends' nodes, as a toolstack writes them."""
    front, back = f"/local/domain/1/device/toy/{devid}", f"/local/domain/0/backend/toy/1/{devid}"

    with host.store.transaction() as t:
        t.mkdir(back)
        t.set_perms(back, ["n0", "r1"])
        for key, value in (("frontend", front), ("frontend-id", "1"), ("online", "1"), ("state", "1")):
            t.write(f"{back}/{key}", value)
        t.mkdir(front)
        t.set_perms(front, ["n1", "r0"])
        for key, value in (("backend", back), ("backend-id", "0"), ("state", "1")):
            t.write(f"{front}/{key}", value)
            t.set_perms(f"{front}/{key}", ["n1", "r0"])
    host.run()


def state(host: Host, path: str) -> str:
    return XenbusState(int(host.store.read_text(f"{path}/state"))).name


def test_devices_that_are_there(host: Host, guest: Guest) -> None:
    add(host)
    add(host, 5)
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    host.run()
    assert list(guest.xenbus.frontends.devices) == ["device/toy/0", "device/toy/5"]
    dev = guest.xenbus.frontends.devices["device/toy/0"]
    assert (dev.ident, dev.otherend, dev.otherend_id) == ("toy-0", BACK, 0)
    assert state(host, FRONT) == "InitWait"
    assert [toy.seen for toy in Toy.made] == [["probe", "Initialising"]] * 2


def test_devices_that_come_later(host: Host, guest: Guest) -> None:
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    host.finish(host.xenbus.start_backends({"toy": Toy}))
    add(host)
    assert {toy.dev.ident: (toy.seen[0], toy.seen[-1]) for toy in Toy.made} == {
        "toy-1-0": ("probe", "InitWait"),
        "toy-0": ("probe", "InitWait"),
    }
    front = next(toy for toy in Toy.made if toy.dev.ident == "toy-0")
    seen = len(front.seen)
    host.store.write(f"{BACK}/state", int(XenbusState.Connected))
    host.run()
    host.store.write(f"{BACK}/state", 77)
    host.run()
    assert front.seen[seen:] == ["Connected", "Unknown"]


def test_a_device_that_is_going_away_is_not_new(host: Host, guest: Guest) -> None:
    add(host)
    host.store.write(f"{FRONT}/state", int(XenbusState.Closed))
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    host.run()
    assert not guest.xenbus.frontends.devices


def test_drivers_that_come_later_and_go(host: Host, guest: Guest) -> None:
    add(host)
    bus = guest.xenbus.frontends
    host.finish(guest.xenbus.start_frontends({}))
    host.run()
    assert bus.devices["device/toy/0"].driver is None
    host.do(guest.kernel, bus.register_driver("toy", Toy))
    assert state(host, FRONT) == "InitWait"
    host.do(guest.kernel, bus.unregister_driver("toy"))
    host.run()
    assert state(host, FRONT) == "Closed"
    assert Toy.made[0].seen[-1] == "remove"
    host.do(guest.kernel, bus.register_driver("toy", Toy))
    host.run()
    assert state(host, FRONT) == "InitWait"
    assert len(Toy.made) == 2


def test_removed_while_running(host: Host, guest: Guest) -> None:
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    add(host)
    assert guest.xenbus.frontends.devices
    host.store.rm(FRONT)
    host.run()
    assert not guest.xenbus.frontends.devices
    assert Toy.made[0].seen[-1] == "remove"
    assert not host.store.exists(FRONT)  # nobody writes a state into what is gone
    host.store.write(f"{BACK}/state", int(XenbusState.Connected))
    host.run()
    assert Toy.made[0].seen[-1] == "remove"
    add(host)
    assert len(Toy.made) == 2


def test_the_whole_directory_goes_with_its_domain(host: Host, guest: Guest) -> None:
    host.finish(host.xenbus.start_backends({"toy": Toy}))
    add(host)
    add(host, 1)
    assert [name for name in host.xenbus.backends.devices if "toy" in name] == ["backend/toy/1/0", "backend/toy/1/1"]
    host.store.rm("/local/domain/0/backend/toy/1")
    host.run()
    assert not [name for name in host.xenbus.backends.devices if "toy" in name]
    assert [toy.seen[-1] for toy in Toy.made] == ["remove", "remove"]


def test_no_other_end(host: Host, guest: Guest) -> None:
    add(host)
    host.store.rm(BACK)
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    host.run()
    assert guest.xenbus.frontends.devices["device/toy/0"].driver is None
    assert host.store.read_text("/local/domain/1/error/device/toy/0/error").startswith("-2 ")
    assert "missing other end" in guest.kernel.log[-1]


def test_a_probe_that_fails(host: Host, guest: Guest) -> None:
    add(host)
    host.finish(guest.xenbus.start_frontends({"toy": Broken}))
    host.run()
    assert guest.xenbus.frontends.devices["device/toy/0"].driver is None
    assert state(host, FRONT) == "Initialising"
    host.store.write(f"{BACK}/state", int(XenbusState.Connected))
    host.run()
    assert Toy.made[0].seen == []


def test_a_driver_that_fails_later_closes(host: Host, guest: Guest) -> None:
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    add(host)
    host.store.write(f"{BACK}/state", int(XenbusState.Reconfiguring))
    host.run()
    assert state(host, FRONT) == "Closing"
    assert host.store.read_text("/local/domain/1/error/device/toy/0/error") == "-1 reacting to the other end"
    assert guest.kernel.log[-1].startswith("toy toy-0: -1 reacting to the other end")


def test_switch_state_writes_once(host: Host, guest: Guest) -> None:
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    add(host)
    dev = guest.xenbus.frontends.devices["device/toy/0"]
    requests = guest.xs.requests
    host.do(guest.kernel, dev.switch_state(XenbusState.InitWait))
    assert guest.xs.requests == requests
    host.do(guest.kernel, dev.switch_state(XenbusState.Connected))
    # Transaction, read, write, end; then the guest's own watch of device/ asks whether it is still there.
    host.run()
    assert guest.xs.requests == requests + 5


def test_nodes_of_nonsense_are_no_devices(host: Host, guest: Guest) -> None:
    host.finish(guest.xenbus.start_frontends({"toy": Toy}))
    for path in ("device/toy", "device/toy/x/y/z", "device/toy/3/state"):
        host.store.write(f"/local/domain/1/{path}", "rubbish")
    host.store.write("/local/domain/1/device/toy/4/state", "1")
    host.store.set_perms("/local/domain/1/device/toy/4/state", ["n1"])
    host.run()
    dev = guest.xenbus.frontends.devices["device/toy/4"]
    assert dev.driver is None  # no backend is named
    assert list(guest.xenbus.frontends.devices) == ["device/toy/4"]

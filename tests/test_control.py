"""Requests to guests through xenstore, as the toolstack writes them: to modelled guests, which don't react."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pvirq import Host
from pvirq.modelled import ModelledGuest
from pvirq.toolstack.control import ControlError

CONTROL = "/local/domain/1/control"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(machine_memory=256 << 20) as host:
        yield host


@pytest.fixture
def guest(host: Host) -> ModelledGuest:
    return host.model("pvops", vcpus=3, name="model")


def test_a_guest_that_has_not_said_that_it_can(host: Host, guest: ModelledGuest) -> None:
    for how in ("poweroff", "reboot", "suspend", "halt"):
        with pytest.raises(ControlError, match=rf"^model has not said that it can do that \({how}\): no feature-"):
            host.shutdown(guest, how)
    assert host.store.read(f"{CONTROL}/shutdown") == b""
    with pytest.raises(ValueError, match="no request 'crash'; there are poweroff, reboot, suspend, halt"):
        host.shutdown(guest, "crash")


def test_a_guest_that_does_not_acknowledge(host: Host, guest: ModelledGuest) -> None:
    host.store.write(f"{CONTROL}/feature-reboot", 1)
    before = host.clock.now()
    with pytest.raises(ControlError, match=r"^model didn't acknowledge the request \(reboot\)$"):
        host.shutdown(guest, "reboot", timeout=5)
    assert host.clock.now() - before == 5_000_000_000
    assert host.store.read(f"{CONTROL}/shutdown") == b"reboot"


def test_a_guest_acknowledges(host: Host, guest: ModelledGuest) -> None:
    kernel = host.xenstored.client(1)
    kernel.write(f"{CONTROL}/feature-poweroff", 1)
    seen: list[str] = []

    def act(path: str, _token: str) -> None:
        seen.append(kernel.read_text(path))
        if seen[-1]:
            kernel.write(path, "")

    kernel.watch("control/shutdown", "token", act)
    host.shutdown(guest)
    assert seen == ["", "poweroff", ""]
    assert not [watch for watch in host.store.watches if "shutdown" in str(watch)]


def test_an_end_is_an_answer(host: Host, guest: ModelledGuest) -> None:
    host.store.write(f"{CONTROL}/feature-poweroff", 1)
    host.clock.at(host.clock.now() + 1_000_000, lambda: guest.domain.shutdown(0))
    host.shutdown(guest)
    assert host.store.read(f"{CONTROL}/shutdown") == b"poweroff"


def test_sysrq(host: Host, guest: ModelledGuest) -> None:
    for key in ("", "ss", "\n", " ", "\x7f"):
        with pytest.raises(ValueError, match="is no sysrq"):
            host.sysrq(guest, key)
    host.sysrq(guest, "s")
    assert host.store.read(f"{CONTROL}/sysrq") == b"s"
    with pytest.raises(ControlError, match=r"^model has not taken the last sysrq \('s'\)$"):
        host.sysrq(guest, "u")
    host.store.write(f"{CONTROL}/sysrq", b"\0")  # as Linux leaves it
    host.sysrq(guest, "u")


def test_vcpus(host: Host, guest: ModelledGuest) -> None:
    def available() -> list[str]:
        return [host.store.read_text(f"/local/domain/1/cpu/{cpu}/availability") for cpu in range(3)]

    assert available() == ["online"] * 3
    host.set_vcpus(guest, 1)
    assert available() == ["online", "offline", "offline"]
    host.set_vcpus(guest, 2)
    assert available() == ["online", "online", "offline"]
    for count, why in ((4, "requested 4 vCPUs, however maximum is 3"), (0, "one has to stay"), (-1, "one has to stay")):
        with pytest.raises(ControlError, match=why):
            host.set_vcpus(guest, count)
    assert available() == ["online", "online", "offline"]

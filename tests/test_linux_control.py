"""What the toolstack asks of real guests through xenstore: to power off, to reboot, to act on magic keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.toolstack import cpio
from pvirq.toolstack.control import ControlError
from pvirq.toolstack.initrd import with_overlay
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

APPEND = "console=hvc0 pvirq=agent"


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(wallclock=1_700_000_000) as host:
        yield host


def sh(guest: Guest, command: str) -> str:
    result = guest.run(command)
    assert result.status == 0, result.text
    return result.text


# -- ending ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["poweroff", "reboot", "halt"])
def test_shutdown(host: Host, kernel_cloud: KernelChoice, initrd: bytes, how: str) -> None:
    guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND)
    with pytest.raises(ControlError, match="guest1 has not said that it can"):
        host.shutdown(guest, how)  # the kernel hasn't even begun
    with pytest.raises(ValueError, match="no request 'explode'; there are poweroff, reboot"):
        host.shutdown(guest, "explode")
    guest.await_agent()
    control = "/local/domain/1/control"
    assert [host.store.read(f"{control}/feature-{feature}") for feature in ("poweroff", "reboot")] == [b"1", b"1"]
    # Whatever the guest does at that time.
    host.run(lambda: host.quiet)
    host.shutdown(guest, how)
    assert host.store.read(f"{control}/shutdown") == b""
    assert guest.wait() == ("reboot" if how == "reboot" else "poweroff")
    host.destroy(guest)
    with pytest.raises(ControlError, match="guest1"):
        host.shutdown(guest)


def test_shutdown_while_a_command_runs(host: Host, kernel_cloud: KernelChoice, initrd: bytes) -> None:
    guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0", vcpus=2)
    guest.wait_for("powers off\r\n")
    guest.console.send(b"while :; do :; done\n")
    host.run(lambda: False, 500_000_000)
    host.shutdown(guest)
    assert guest.wait() == "poweroff"


def test_commands_that_end_the_guest(host: Host, kernel_cloud: KernelChoice, initrd: bytes) -> None:
    """Busybox' own poweroff and reboot tell the init that they take for granted."""
    guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND)
    guest.await_agent()
    guest.console.send(b"x cmVib290\n")  # base64 of "reboot": for the agent
    assert guest.wait() == "reboot"
    host.destroy(guest)
    for command, reason in (("reboot", "reboot"), ("/sbin/poweroff", "poweroff")):
        guest = host.boot(kernel_cloud.path, initrd=initrd, append="console=hvc0")
        guest.wait_for("powers off\r\n")
        guest.console.send(f"{command}\n".encode())
        assert guest.wait() == reason
        host.destroy(guest)


def test_a_guest_that_does_not_react(host: Host, kernel_cloud: KernelChoice, initrd: bytes) -> None:
    guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND)
    guest.await_agent()
    host.pause(guest)
    with pytest.raises(ControlError, match=r"guest1 didn't acknowledge the request \(poweroff\)"):
        host.shutdown(guest)
    host.sysrq(guest, "h")
    with pytest.raises(ControlError, match=r"guest1 has not taken the last sysrq \('h'\)"):
        host.sysrq(guest, "s")


def test_initrds_of_the_users(
    host: Host, kernel_cloud: KernelChoice, busybox: Path, initrd: bytes, tmp_path: Path
) -> None:
    """An initrd without any poweroff: the overlay's is found all the same."""
    archive = cpio.Writer()
    archive.file("etc/motd", b"mine\n")
    own = with_overlay(archive.getvalue(), busybox)
    for how in ("poweroff", "reboot"):
        guest = host.boot(kernel_cloud.path, initrd=own, append=f"{APPEND} rdinit=/pvirq/init")
        assert sh(guest, "cat /etc/motd; ls /sbin 2>/dev/null || true") == "mine\n"
        host.shutdown(guest, how)
        assert guest.wait() == how
        host.destroy(guest)


# -- magic keys --------------------------------------------------------------------------------------------------------


def test_sysrq(host: Host, kernel_cloud: KernelChoice, initrd: bytes) -> None:
    guest = host.boot(kernel_cloud.path, initrd=initrd, append=APPEND)
    guest.await_agent()
    for key in ("", "hh", "\0", "ä"):
        with pytest.raises(ValueError, match="is no sysrq"):
            host.sysrq(guest, key)
    for times in (1, 2):
        host.sysrq(guest, "h")
        host.run(lambda: host.quiet, 10**9)
        assert guest.console.text().count("sysrq: HELP : ") == times
    assert re.search(r"sysrq: HELP : .*show-memory-usage\(m\)", guest.console.text())
    host.sysrq(guest, "b")
    assert guest.wait() == "reboot"

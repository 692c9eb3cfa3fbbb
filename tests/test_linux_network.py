"""Real guests on domain 0's network: among themselves, with a station in Python, and through NAT with the real one."""

from __future__ import annotations

import hashlib
import random
import re
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pvirq import Guest, Host
from pvirq.net.outside import OutsideError
from pvirq.net.station import Datagram, Station
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.xen.timer import NS_PER_S

pytestmark = pytest.mark.boot

MIB = 1 << 20


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def station(host: Host) -> Station:
    return host.station("10.0.0.1/24", names={"station": "10.0.0.1"}, domain="example")


@pytest.fixture(scope="module")
def image(kernel_cloud: KernelChoice, busybox: Path) -> bytes:
    assert kernel_cloud.modules_dir is not None
    return default_initrd(busybox, modules=modules.read_modules(kernel_cloud.modules_dir, ["xen-netfront"]))


def boot(host: Host, kernel: KernelChoice, initrd: bytes, name: str, **nic: str) -> Guest:
    guest = host.boot(kernel.path, initrd=initrd, append="console=hvc0 pvirq=agent", memory=384 * MIB, name=name)
    host.attach_nic(guest, **nic)  # type: ignore[arg-type]
    sh(guest, "ip link set lo up; until [ -e /sys/class/net/eth0 ]; do sleep 0.1; done")
    sh(guest, f"udhcpc -n -q -x hostname:{name}")
    return guest


@pytest.fixture(scope="module")
def guests(host: Host, station: Station, kernel_cloud: KernelChoice, image: bytes) -> tuple[Guest, Guest]:
    return boot(host, kernel_cloud, image, "one"), boot(host, kernel_cloud, image, "two")


def sh(guest: Guest, command: str, timeout: float = 300) -> str:
    result = guest.run(command, timeout)
    assert result.status == 0, result.text
    return result.text


def address_of(guest: Guest) -> str:
    (address,) = re.findall(r"inet (\S+)/24 .*eth0", sh(guest, "ip addr show eth0"))
    return str(address)


def test_addresses_and_names(station: Station, guests: tuple[Guest, Guest]) -> None:
    one, two = guests
    assert {lease.host_name: str(lease.address) for lease in station.leases} == {
        "one": address_of(one), "two": address_of(two),
    }  # fmt: skip
    assert "default via 10.0.0.1 dev eth0" in sh(one, "ip route")
    assert f"Address: {address_of(two)}" in sh(one, "nslookup two.example")
    assert "name = station" in sh(one, "nslookup 10.0.0.1")
    missing = one.run("nslookup nobody.example")
    assert "NXDOMAIN" in missing.text
    assert missing.status


def test_they_ping_the_station_and_each_other(station: Station, guests: tuple[Guest, Guest]) -> None:
    one, two = guests
    for guest, other in ((one, "station"), (two, "station"), (one, "two"), (two, "one")):
        assert "3 packets transmitted, 3 packets received, 0% packet loss" in sh(guest, f"ping -c 3 {other}")
    assert "1400 bytes" in sh(one, "ping -c 1 -s 1392 10.0.0.1")


def test_a_server_of_ones_own(host: Host, station: Station, guests: tuple[Guest, Guest]) -> None:
    got: list[Datagram] = []
    station.on_udp(514, got.append)
    sh(guests[0], "syslogd -R 10.0.0.1:514; until [ -S /dev/log ]; do sleep 0.01; done; logger hello")
    assert host.run(lambda: any(b"hello" in datagram.data for datagram in got), 10 * NS_PER_S)
    assert {str(datagram.source) for datagram in got} == {address_of(guests[0])}
    refused = guests[0].run("wget -O - http://10.0.0.1/")
    assert refused.status
    assert "Connection refused" in refused.text


def test_100_mb_from_guest_to_guest(host: Host, guests: tuple[Guest, Guest]) -> None:
    one, two = guests
    # Each MiB is another, so that one which is lost, doubled or in another's place changes the sum.
    sh(one, "dd if=/dev/urandom of=/tmp/block bs=1M count=1 2>/dev/null")
    sh(one, "for i in $(seq 100); do echo $i; cat /tmp/block; done >/tmp/data")
    assert int(sh(one, "stat -c %s /tmp/data")) > 100 * MIB
    (sent,) = re.findall(r"^([0-9a-f]{32})", sh(one, "md5sum /tmp/data"))
    sh(one, "(nc -l -p 5000 -e cat /tmp/data >/dev/null 2>&1 </dev/null &)")
    began = time.process_time()
    sh(two, "nc one 5000 -e sh -c 'cat >/tmp/data'")
    took = time.process_time() - began
    assert sh(two, "md5sum /tmp/data").split()[0] == sent
    sh(two, "rm /tmp/data")
    sh(one, "rm /tmp/data")
    print(f"100 MiB from guest to guest in {took:.2f} s of CPU time: {100 / took:.1f} MiB/s")
    network = host.backends.network
    assert "fatal error" not in "".join(host.dom0.log)
    assert {"vif1.0", "vif2.0", "station0"} <= network.interfaces.keys()


# Through NAT.


@pytest.fixture(scope="module")
def natted(host: Host, kernel_cloud: KernelChoice, image: bytes) -> Guest:
    try:
        host.nat(bridge="xenbr1")
    except OutsideError as error:
        pytest.skip(str(error))
    return boot(host, kernel_cloud, image, "three", bridge="xenbr1")


class Download(socketserver.BaseRequestHandler):
    """Answers any request as an HTTP server does, with 8 MiB of seeded noise."""

    data = random.Random(1).randbytes(8 * MIB)

    def handle(self) -> None:
        self.request.recv(4096)
        self.request.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(self.data) + self.data)


def test_a_guest_downloads_from_the_real_loopback(natted: Guest) -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Download) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        began = time.process_time()
        try:
            sh(natted, f"wget -q -O /tmp/got http://10.0.2.2:{server.server_address[1]}/x")
        finally:
            server.shutdown()
            thread.join()
        took = time.process_time() - began
    assert sh(natted, "md5sum /tmp/got").split()[0] == hashlib.md5(Download.data).hexdigest()
    print(f"8 MiB through NAT in {took:.2f} s of CPU time: {8 / took:.1f} MiB/s")


def test_the_real_machine_reaches_a_guests_port(host: Host, natted: Guest) -> None:
    gateway = next(iter(host.outside))
    port = gateway.forward(address_of(natted), 80)  # type: ignore[attr-defined]
    sh(natted, "mkdir -p /www; echo hello from the guest > /www/index.html; httpd -h /www")
    answers: list[bytes] = []

    def client() -> None:
        with socket.create_connection(("127.0.0.1", port), 60) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while data := connection.recv(4096):
                answers.append(data)
        answers.append(b"end")

    thread = threading.Thread(target=client)
    thread.start()
    try:
        assert host.run(lambda: b"end" in answers, 60 * NS_PER_S)
    finally:
        thread.join()
        gateway.unforward(port)  # type: ignore[attr-defined]
    assert b"hello from the guest" in b"".join(answers)


def test_time_jumps_again_when_nobody_outside_is_awaited(
    host: Host, natted: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.run(lambda: not host.outside.awaited, 60 * NS_PER_S)
    waited: list[int | None] = []
    monkeypatch.setattr(host.outside, "wait", waited.append)
    began = host.clock.now()
    sh(natted, "sleep 100")
    assert host.clock.now() - began >= 100 * NS_PER_S
    assert not waited

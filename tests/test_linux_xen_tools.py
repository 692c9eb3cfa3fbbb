"""Debian's own Xen clients in real guests: xenstore-ls and its like, users of libxenevtchn, libxengnttab, libxencall.

They come to Xen by /dev/xen/xenbus, /dev/xen/evtchn, /dev/xen/gntalloc, /dev/xen/gntdev and /proc/xen/privcmd.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import xentools
from pvirq import Guest, Host
from pvirq.abi.xen import PAGE_SIZE
from pvirq.drivers.grants import Gnttab
from pvirq.drivers.pages import Pages
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

PROGRAMS = ("pingpong", "answer", "gntshare", "gntmap", "hypercall")
APPEND = "console=hvc0 pvirq=agent"
MOUNT = "mount -t xenfs xenfs /proc/xen"


@pytest.fixture(scope="module")
def archive(kernel_cloud: KernelChoice, busybox: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An initrd with Debian's tools, the programs and the modules."""
    tools = xentools.fetch()
    into = tmp_path_factory.mktemp("programs")
    programs = [tools.compile(name, into) for name in PROGRAMS]
    assert kernel_cloud.modules_dir is not None
    devices = modules.read_modules(kernel_cloud.modules_dir, xentools.MODULES)
    return default_initrd(busybox, files=tools.files(*programs), modules=devices)


@dataclass
class Pair:
    """Two guests with the tools."""

    host: Host
    one: Guest
    two: Guest


@pytest.fixture(scope="module")
def pair(kernel_cloud: KernelChoice, archive: bytes) -> Iterator[Pair]:
    with Host(wallclock=1_700_000_000) as host:
        one = host.boot(kernel_cloud.path, initrd=archive, append=APPEND, vcpus=2)
        two = host.boot(kernel_cloud.path, initrd=archive, append=APPEND)
        for guest in (one, two):
            sh(guest, MOUNT)
        yield Pair(host, one, two)
        for guest in (one, two):
            log = sh(guest, "dmesg")
            for bad in ("Oops", "BUG:", "WARNING:", "Call Trace"):
                assert bad not in log


def sh(guest: Guest, command: str, timeout: float | None = 120) -> str:
    result = guest.run(command, timeout)
    assert result.status == 0, result.text
    return result.text


def row(table: str, name: str) -> list[int]:
    """The counts of the last row of that name."""
    rows = re.findall(rf"^ *\d+:((?: +\d+)+) +xen-dyn-lateeoi +-event +{re.escape(name)}$", table, re.MULTILINE)
    assert rows, table
    return [int(count) for count in rows[-1].split()]


# -- xenstore ----------------------------------------------------------------------------------------------------------


def test_xenstore_ls_shows_what_the_guest_may_read(pair: Pair) -> None:
    for guest in (pair.one, pair.two):
        domid = guest.domain.domid
        assert sh(guest, "xenstore-read domid") == f"{domid}\n"
        path = f"/local/domain/{domid}"
        listed = sh(guest, f"xenstore-ls -f {path}").splitlines()
        assert listed == list(pair.host.xenstored.client(domid).dump(path))
        assert f'{path}/name = "{guest.name}"' in listed
        assert len(listed) > 30
        # Others' nodes, and the root's list, are for domain 0.
        other = 3 - domid
        for command in (f"xenstore-ls /local/domain/{other}", "xenstore-ls", "xenstore-write name x"):
            result = guest.run(command)
            assert result.status == 1
            assert "Permission denied" in result.text or "could not write" in result.text
        assert guest.run("xenstore-read nothing").status == 1
        assert guest.run("xenstore-exists nothing").status == 1
        assert guest.run("xenstore-exists vm").status == 0


def test_xenstore_write_and_chmod(pair: Pair) -> None:
    store, guest = pair.host.store, pair.one
    sh(guest, "xenstore-write data/a 'one two' data/deep/b 2")
    assert store.read("/local/domain/1/data/a") == b"one two"
    assert store.ls("/local/domain/1/data/deep") == ["b"]
    assert [str(perm) for perm in store.get_perms("/local/domain/1/data/a")] == ["n1"]
    assert pair.two.run("xenstore-read /local/domain/1/data/a").status == 1
    sh(guest, "xenstore-chmod data/a n1 r2")
    assert sh(pair.two, "xenstore-read /local/domain/1/data/a") == "one two\n"
    store.write("/local/domain/1/data/host", "from\tdomain 0")
    assert sh(guest, "xenstore-read data/host") == "from\\tdomain 0\n"
    sh(guest, "xenstore-rm data/deep")
    assert not store.exists("/local/domain/1/data/deep")


def test_watches_both_ways(pair: Pair) -> None:
    store, guest = pair.host.store, pair.one
    told: list[str] = []
    watch = store.watch("/local/domain/1/data", "token", lambda path, _token: told.append(path))
    sh(guest, "xenstore-write data/w 1; xenstore-write data/w 2; xenstore-rm data/w")
    watch.close()
    assert told == ["/local/domain/1/data", *["/local/domain/1/data/w"] * 3]

    sh(guest, "xenstore-watch -n 4 data > /tmp/watch 2>&1 &")
    sh(guest, "until grep -q data /tmp/watch; do sleep 0.1; done")
    for value in (1, 2):
        store.write("/local/domain/1/data/v", value)
    sh(pair.two, "xenstore-write data/not-watched 1")
    sh(guest, "xenstore-write data/mine 1; wait; until [ $(wc -l < /tmp/watch) = 4 ]; do sleep 0.1; done")
    assert sh(guest, "cat /tmp/watch").splitlines() == ["data", "data/v", "data/v", "data/mine"]


# -- event channels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trips", [1000, 100_000])
def test_round_trips_are_interrupts_one_for_one(pair: Pair, trips: int) -> None:
    host, guest = pair.host, pair.one
    user = host.dom0.evtchn_user("tests")
    port = user.bind_unbound(guest.domain.domid, user.notify)
    text = sh(guest, f"pingpong 0 {port} {trips}", timeout=None)
    # Binding raises the new port once.
    assert sum(row(text, "evtchn:pingpong")) == trips + 1
    assert sum(row(host.dom0.proc_interrupts(), "evtchn:tests")) == trips
    user.close()


def test_a_guest_listens_and_domain_0_binds(pair: Pair) -> None:
    host, guest, trips = pair.host, pair.two, 100
    sh(guest, f"answer 0 {trips} > /tmp/answer 2>&1 &")
    port = int(sh(guest, "until grep port /tmp/answer; do sleep 0.1; done").split()[1])
    got: list[int] = []

    def again(local: int) -> None:
        got.append(local)
        if len(got) <= trips:
            user.notify(local)

    user = host.dom0.evtchn_user("tests")
    local = user.bind_interdomain(guest.domain.domid, port, again)  # raises the local port once: `again` begins
    sh(guest, "until grep -q ERR /tmp/answer; do sleep 0.1; done")
    assert got == [local] * (trips + 1)
    assert sum(row(sh(guest, "cat /tmp/answer"), "evtchn:answer")) == trips
    assert sum(row(host.dom0.proc_interrupts(), "evtchn:tests")) == trips + 1
    user.close()


# -- grants ------------------------------------------------------------------------------------------------------------


def share(guest: Guest, domid: int) -> int:
    """gntshare in the background; returns its reference."""
    sh(guest, f"rm -f /tmp/share; gntshare {domid} > /tmp/share 2>&1 &")
    return int(sh(guest, "until grep ref /tmp/share; do sleep 0.1; done").split()[1])


def shared(guest: Guest) -> str:
    return sh(guest, "until grep read /tmp/share; do sleep 0.1; done")


def test_a_page_between_two_guests(pair: Pair) -> None:
    for one, two in ((pair.one, pair.two), (pair.two, pair.one)):
        reference = share(one, two.domain.domid)
        assert sh(two, f"gntmap {one.domain.domid} {reference} 'from the mapper'") == "read from the sharer\n"
        assert shared(one) == "read from the mapper\n"
        # It is granted no more.
        result = two.run(f"gntmap {one.domain.domid} {reference} x")
        assert (result.status, result.text.splitlines()[-1]) == (1, "map: Invalid argument")


def test_a_page_for_another_domain_is_refused(pair: Pair) -> None:
    reference = share(pair.one, 0)
    assert pair.two.run(f"gntmap 1 {reference} x").status == 1
    # Whom it is for, maps it: a modelled kernel.
    gnttab = Gnttab(pair.host.dom0)
    mapped = gnttab.map(1, reference)
    assert bytes(mapped.page).startswith(b"from the sharer\0")
    mapped.page[2048:2061] = b"from domain 0"
    assert shared(pair.one) == "read from domain 0\n"
    gnttab.unmap(mapped)


def test_a_modelled_domain_grants(pair: Pair) -> None:
    host = pair.host
    gnttab, pages = Gnttab(host.dom0), Pages(host.dom0.domain)
    mfn = pages.alloc()
    page = pages.page(mfn)
    page[:6] = b"model\0"
    reference = gnttab.grant_access(pair.two.domain.domid, mfn)
    assert sh(pair.two, f"gntmap 0 {reference} guest") == "read model\n"
    assert bytes(page[2048:2054]) == b"guest\0"
    assert gnttab.end_access(reference)
    assert len(page) == PAGE_SIZE


# -- hypercalls --------------------------------------------------------------------------------------------------------


def test_privcmd(pair: Pair) -> None:
    """Newer kernels open it in a guest, and let nothing through but what is for the domain that it is a helper of."""
    guest = pair.one
    assert sh(guest, "ls /proc/xen").split() == ["capabilities", "privcmd", "xenbus"]
    modules_of = "/pvirq/xen_privcmd.ko", "/pvirq/xenfs.ko"
    if "blocking all hypercalls" in sh(guest, "dmesg"):
        result = guest.run("hypercall")
        assert (result.status, result.text) == (1, "version: Operation not permitted\n")
        sh(guest, "umount /proc/xen; rmmod xenfs; rmmod xen_privcmd")
        sh(guest, f"insmod {modules_of[0]} unrestricted=1; insmod {modules_of[1]}; {MOUNT}")
    version = re.findall(r"Xen version: (\S+)", sh(guest, "dmesg"))[0]
    assert sh(guest, "hypercall") == f"Xen {version}\n"

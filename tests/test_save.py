"""A real guest is suspended, saved, restored in other frames, domains and hosts, and goes on."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from image_builder import build_elf
from pvirq import Guest, GuestError, Host
from pvirq.pv import save
from pvirq.pv.restore import RestoreError
from pvirq.pv.save import SaveError
from pvirq.pv.saved_pages import MemoryPages
from pvirq.toolstack import savefile
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice
from pvirq.toolstack.savefile import SaveFileError

pytestmark = pytest.mark.boot


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


@pytest.fixture(scope="module")
def guest(host: Host, kernel_cloud: KernelChoice, busybox: Path) -> Guest:
    guest = host.boot(
        kernel_cloud.path, initrd=default_initrd(busybox), append="console=hvc0 pvirq=agent", vcpus=2, name="u2"
    )
    guest.await_agent()
    assert guest.run("echo kept > /tmp/file").status == 0
    return guest


@pytest.fixture(scope="module")
def image(host: Host, guest: Guest) -> bytes:
    file = io.BytesIO()
    host.save(guest, file, checkpoint=True)
    return file.getvalue()


def rows(table: str) -> list[tuple[str, str]]:
    return re.findall(r"(?m)^ *(\d+):(?: +\d+)+ +(\S.*)$", table)


def test_a_cancelled_suspend_changes_nothing(host: Host, guest: Guest) -> None:
    before = rows(guest.proc_interrupts()), host.lsevtchn(guest.domain.domid)
    guest.suspend()
    assert guest.shutdown_reason == "suspend"
    guest.resume()
    assert not guest.ended
    assert guest.run("cat /tmp/file").text == "kept\n"
    assert (rows(guest.proc_interrupts()), host.lsevtchn(guest.domain.domid)) == before


def test_a_checkpoint_lets_the_guest_go_on(guest: Guest, image: bytes) -> None:
    assert len(image) > 1 << 20
    assert guest.run("cat /tmp/file").text == "kept\n"


@pytest.fixture(scope="module")
def twin(host: Host, guest: Guest, image: bytes) -> Guest:
    return host.restore(io.BytesIO(image), name="twin")


def test_beside_the_one_it_was(host: Host, guest: Guest, twin: Guest) -> None:
    """Two domains from one: each has its own memory, channels and console."""
    assert twin.domain is not guest.domain
    assert twin.run("cat /tmp/file; echo twin > /tmp/file").text == "kept\n"
    assert guest.run("cat /tmp/file").text == "kept\n"
    assert twin.run("cat /tmp/file").text == "twin\n"
    assert host.store.read_text(f"/local/domain/{twin.domain.domid}/name") == "twin"


def test_channels_and_irqs_are_rebuilt(host: Host, guest: Guest, twin: Guest) -> None:
    """The same rows with the same numbers, on new ports, which the hypervisor has just as the guest's first ones."""
    assert rows(twin.proc_interrupts()) == rows(guest.proc_interrupts())
    kinds = [re.findall(r": (VCPU \d: (?:IPI|Virtual.*)|.*Interdomain \S+)", host.lsevtchn(one.domain.domid))
             for one in (guest, twin)]  # fmt: skip
    # By default a channel between domains may be on either vCPU.
    mine, theirs = (sorted(re.sub(r".*(?=Inter)", "", kind) for kind in one) for one in kinds)
    assert len(mine) == 14
    assert mine == theirs
    toggled = twin.run("cd /sys/devices/system/cpu; echo 0 > cpu1/online; cat online; echo 1 > cpu1/online; cat online")
    assert toggled.text == "0\n0-1\n"


def test_again_and_again(host: Host, twin: Guest) -> None:
    """Each time in a new domain; the frames of the old one are free."""
    free = sum(count for _, count in host.hypervisor.machine._free)
    guest = twin
    for _ in range(3):
        file = io.BytesIO()
        host.save(guest, file)
        assert guest not in host.guests
        file.seek(0)
        guest = host.restore(file)
        assert guest.run("cat /tmp/file").text == "twin\n"
    assert abs(sum(count for _, count in host.hypervisor.machine._free) - free) < 100
    host.destroy(guest)


def test_in_another_host(image: bytes, tmp_path: Path) -> None:
    path = tmp_path / "u2.save"
    path.write_bytes(image)
    with Host() as other:
        guest = other.restore(path)
        assert (guest.name, guest.domain.domid) == ("u2", 1)
        assert guest.run("cat /tmp/file; nproc").text == "kept\n2\n"
        assert guest.poweroff() == "poweroff"


def test_a_calculation_goes_on(kernel_cloud: KernelChoice, busybox: Path) -> None:
    """Registers of every kind are what they were: a sum of floating-point numbers comes out the same."""
    program = "awk 'BEGIN { x = 0.1; for (i = 0; i < 200000; i++) x = x * 1.0000001 + 0.1; printf \"%.17g\\n\", x }'"
    with Host() as host:
        guest = host.boot(kernel_cloud.path, initrd=default_initrd(busybox), append="console=hvc0 pvirq=agent", vcpus=2)
        undisturbed = guest.run(program).text
        guest.run(f"({program} > /tmp/result; echo done >> /tmp/result) > /dev/null 2>&1 &")
        for _ in range(3):
            assert guest.run("test -s /tmp/result").status == 1  # still at it
            file = io.BytesIO()
            host.save(guest, file)
            file.seek(0)
            guest = host.restore(file)
        assert guest.run("until grep -q done /tmp/result; do sleep 0.1; done; head -n1 /tmp/result").text == undisturbed


def test_a_file_that_cannot_be_written_leaves_the_guest_running(host: Host, guest: Guest, tmp_path: Path) -> None:
    with pytest.raises(OSError):
        host.save(guest, tmp_path / "no" / "file")
    assert guest.run("cat /tmp/file").text == "kept\n"


def test_a_guest_that_takes_no_requests() -> None:
    with Host() as host:
        guest = host.boot(build_elf(b"\xeb\xfe", memsz=0x3000), memory=64 << 20)
        with pytest.raises(GuestError, match="has not said that it can"):
            guest.suspend()
        with pytest.raises(GuestError, match="not suspended"):
            guest.resume()


def test_damaged_files(host: Host, image: bytes) -> None:
    """Each is refused in one line, and nothing of it stays."""
    before = list(host.hypervisor.domains), len(host.guests)
    with pytest.raises(SaveFileError):
        host.restore(io.BytesIO(image[: len(image) // 2]))
    for damage in ("root", "start_info", "p2m", "table"):
        config, saved = savefile.read(io.BytesIO(image))
        state = bytearray(saved.vcpus[0].context)
        if damage == "root":
            state[5008:5016] = (5 << 12).to_bytes(8, "little")  # CR3: a page that is no root
        elif damage == "start_info":
            state[616:624] = (saved.max_pfn + 7).to_bytes(8, "little")
        elif damage == "p2m":
            saved.p2m_frames[0] = saved.max_pfn + 1
        else:
            data = np.concatenate([pages.array() for pages in saved.data])
            row = int((saved.types[saved.rows] == 1).argmax())
            data[row, 0] = (saved.max_pfn + 1) << 12 | 1
            saved.data = [MemoryPages(data)]
        saved.vcpus[0].context = bytes(state)
        file = io.BytesIO()
        savefile.write(file, config, saved)
        file.seek(0)
        with pytest.raises(RestoreError) as caught:
            host.restore(file)
        assert "\n" not in str(caught.value)
        assert (list(host.hypervisor.domains), len(host.guests)) == before


def test_a_guest_that_lies_about_its_memory(host: Host, guest: Guest) -> None:
    """A p2m list with frames that aren't its own, or of no length: an error, and the guest goes on."""
    machine, shared = guest.domain.machine, guest.domain.shared_info
    for offset, value in ((3088, 0), (3088, 1 << 60), (3112, 1 << 40), (3120, 0)):
        old = machine.u64[shared + offset >> 3]
        guest.suspend()
        machine.u64[shared + offset >> 3] = value
        try:
            with pytest.raises(SaveError):
                save.save(guest.machine)
        finally:
            machine.u64[shared + offset >> 3] = old
            guest.resume()
    assert guest.run("cat /tmp/file").text == "kept\n"

"""`pvirq boot FILE.cfg`, devices on the command line, and guests that are saved and restored, as processes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from image_builder import build_elf
from pvirq.abi.xen import HYPERVISOR_sched_op
from pvirq.toolstack.kernels import KernelChoice
from test_cli_boot import COMMAND, pvirq_


def small_kernel(path: Path, reason: int) -> Path:
    """A kernel that calls SCHEDOP_shutdown at once."""
    call = b"\x6a" + bytes([reason]) + b"\x48\x89\xe6\xbf\x02\0\0\0\xb8" + HYPERVISOR_sched_op.to_bytes(4, "little")
    path.write_bytes(build_elf(b"\x90" * 0x10 + call + b"\x0f\x05\xeb\xfe", memsz=0x3000))
    return path


@pytest.mark.boot
def test_a_configuration(kernel_cloud: KernelChoice, busybox: Path, tmp_path: Path) -> None:
    config = tmp_path / "u2.cfg"
    config.write_text(
        f"name = 'u2'\nkernel = '{kernel_cloud.path}'\nextra = 'quiet word'\nmemory = 192\nvcpus = 2\n"
        "vif = ['mac=00:16:3e:00:00:09']\nfrob = 1\n"
    )
    done = pvirq_(
        "boot", config, "--vcpus", "3", "--append", "more", "--xenstore", "--exec",
        "nproc; cat /sys/class/net/eth0/address; cat /proc/cmdline; awk '/MemTotal/ {print $2 / 1024}' /proc/meminfo",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cpus, mac, cmdline, megabytes, *store = done.stdout.splitlines()
    assert (cpus, mac) == ("3", "00:16:3e:00:00:09")
    assert cmdline.endswith("quiet word more")
    assert 100 < float(megabytes) < 192
    assert '/local/domain/1/name = "u2"' in store
    assert f'/vm/UUID/image/kernel = "{kernel_cloud.path}"' in [
        re.sub("/vm/[0-9a-f-]+/", "/vm/UUID/", x) for x in store
    ]
    assert done.stderr == f"pvirq: {config}:7: frob is not known, and was ignored\n"


@pytest.mark.boot
def test_saved_and_restored(kernel_cloud: KernelChoice, busybox: Path, tmp_path: Path) -> None:
    file = tmp_path / "guest.save"
    done = pvirq_("boot", kernel_cloud.path, "--vif", "", "--exec", "echo there > /tmp/x; exit 3", "--save", file)
    assert (done.returncode, done.stderr) == (3, "")
    command = "cat /tmp/x; ls -d /sys/class/net/eth0"
    done = pvirq_("restore", file, "--exec", command, "--lsevtchn", "1", "--dom0-interrupts")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("there\n/sys/class/net/eth0\ndomain 0:\n")
    assert "vif1.0-q0-rx" in done.stdout
    again = pvirq_("restore", file, "--shell", input="", stdin=None)
    assert (again.returncode, again.stderr) == (1, "pvirq: guest1 was booted without --shell\n")
    file.write_bytes(file.read_bytes()[:1000])
    damaged = pvirq_("restore", file)
    assert damaged.returncode == 2
    assert damaged.stderr.startswith("pvirq: the file ends within")
    assert pvirq_("restore", tmp_path / "none").stderr == f"pvirq: {tmp_path / 'none'}: No such file or directory\n"


def test_on_reboot(tmp_path: Path) -> None:
    """The guest starts again, as xl's default is, or ends where the configuration says so."""
    kernel = small_kernel(tmp_path / "kernel", 1)
    config = tmp_path / "u.cfg"
    config.write_text(f"name='u'; kernel='{kernel}'; memory=32; on_reboot='destroy'")
    done = pvirq_("boot", config)
    assert (done.returncode, done.stderr) == (0, "pvirq: the guest ended: reboot; pvirq does not go on with it\n")
    config.write_text(f"name='u'; kernel='{kernel}'; memory=32")
    process = subprocess.Popen([*COMMAND, "boot", str(config)], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for _ in range(3):
        assert process.stderr.readline() == "pvirq: u ended: reboot; it is started again\n"
    process.send_signal(signal.SIGINT)
    process.stderr.read()
    assert process.wait(30) == 130


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["no.cfg"], "no.cfg: No such file or directory"),
        (["bad.cfg"], "bad.cfg:2: memory: expected a number, not 'x'"),
        (["--disk", "/x,raw"], "--disk '/x,raw': no vdev, such as xvda"),
        (["--vif", "mac=1"], "--vif 'mac=1': mac '1' is no address"),
        (["--save", "f"], "--save needs --exec"),
        (["--dom0", "--vif", ""], "--dom0 has no backends"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], why: str, tmp_path: Path) -> None:
    (tmp_path / "bad.cfg").write_text("name = 'x'\nmemory = 'x'\n")
    done = pvirq_("boot", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert why in done.stderr
    assert done.stderr.count("\n") == 1
    assert sys.executable not in done.stderr

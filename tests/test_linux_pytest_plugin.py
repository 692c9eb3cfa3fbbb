"""The pytest plugin with real guests: one boot, a copy for each test (pvirq.lab.pytest_plugin.plugin)."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from pvirq.toolstack.cache import default_root
from pvirq.toolstack.kernels import KernelChoice
from pvirq.toolstack.modules import read_modules

pytestmark = [pytest.mark.boot, pytest.mark.timeout(600)]
pytest_plugins = ["pytester"]

PLUGIN = "pvirq.lab.pytest_plugin.plugin"
CACHE = default_root()  # before pytester makes a home of its own

SESSION = """
import os, signal
import pytest
from pvirq.lab.pytest_plugin import guest as pytest_guest

pytestmark = pytest.mark.pvirq_guest(vcpus=2, memory="192M", disks={"xvda": "8M"}, nics=1, append="quiet")

def test_writes(linux_guest):
    assert linux_guest.run("nproc; echo x > /tmp/leak; dd if=/tmp/leak of=/dev/xvda 2>/dev/null").text == "2\\n"
    assert linux_guest.run("head -c 1 /dev/xvda").text == "x"
    linux_guest.host.schedule = None

def test_sees_nothing_of_it(linux_guest):
    assert linux_guest.run("cat /tmp/leak").status == 1
    assert linux_guest.run("head -c 1 /dev/xvda | tr '\\\\0' z").text == "z"
    assert linux_guest.host.schedule is not None

@pytest.fixture
def network(linux_guest):
    linux_guest.run("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up")
    yield "10.0.0.1"
    assert linux_guest.run("ip link set eth0 down").status == 0

def test_depends_on_it(linux_guest, network):
    assert linux_guest.run(f"ping -c 1 {network}").status == 0

@pytest.mark.pvirq_guest(
    append="quiet maxcpus=1", modules=["build/own.ko", "xen-evtchn"], nics=0, files={"/etc/own": "build/file"}
)
def test_another(linux_guest):
    assert linux_guest.run("nproc; cat /etc/own").text == "1\\nfrom the project\\n"
    assert linux_guest.run("cut -d' ' -f1 /proc/modules | sort").text == "xen_blkfront\\nxen_evtchn\\n"
    assert linux_guest.run("head -c 1 /dev/xvda | wc -c").text == "1\\n"
    assert b"insmod:" not in linux_guest.console.output
    assert linux_guest.run("grep -c xen_netfront /proc/modules").text == "0\\n"

def test_panics(linux_guest):
    linux_guest.run("echo c > /proc/sysrq-trigger")

def test_dies(linux_guest):
    os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.timeout(2, method="signal")
def test_hangs(linux_guest):
    linux_guest.run("echo before it; while :; do :; done", timeout=None)

class TestClass:
    def test_fails(self, linux_guest, xen_host):
        assert linux_guest.host is xen_host
        assert linux_guest.run("dd if=/dev/xvda of=/dev/null bs=4k count=20 iflag=direct 2>/dev/null").status == 0
        assert linux_guest.run("echo so far > /dev/console; false").status == 0

def test_is_well_after_all_that(linux_guest, record_property):
    record_property("pid", os.getppid())
    assert linux_guest.run("echo fine").text == "fine\\n"
"""


@pytest.fixture
def session(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, outside_ci: None, kernel_cloud: KernelChoice
) -> pytest.Pytester:
    """A directory whose pytest has the plugin, installed or not."""
    monkeypatch.setenv("PVIRQ_CACHE", str(CACHE))
    if PLUGIN not in [point.value for point in entry_points(group="pytest11")]:
        pytester.makeconftest(f"pytest_plugins = [{PLUGIN!r}]")
    pytester.makeini("[pytest]\n")
    return pytester


def section(text: str, title: str) -> str:
    """A part of a report, by a part of its title."""
    found = re.search(rf"^-+ pvirq: {title}.*? -+\n(.*?)(?=^(?:-+ |_+|=+ )|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def test_each_test_has_a_guest_of_its_own(session: pytest.Pytester, kernel_cloud: KernelChoice) -> None:
    session.makepyfile(SESSION)
    build = session.mkdir("build")
    (build / "file").write_text("from the project\n")
    assert kernel_cloud.modules_dir is not None
    ((_, driver),) = read_modules(kernel_cloud.modules_dir, ["xen-blkfront"])
    (build / "own.ko").write_bytes(driver)
    boots = Path(session.path, "boots")
    session.makeconftest(
        (Path(session.path, "conftest.py").read_text() if Path(session.path, "conftest.py").exists() else "")
        + f"""
import pvirq.lab.pytest_plugin.guest as guests
boot = guests.boot
def counted(spec, lines):
    with open({str(boots)!r}, "a") as file:
        file.write(f"{{spec}}\\n")
    return boot(spec, lines)
guests.boot = counted
"""
    )
    result = session.runpytest_subprocess("-p", "no:cacheprovider", "-o", "pvirq_trace_lines=30")
    result.assert_outcomes(passed=5, failed=4)
    text = "\n".join(result.outlines)
    assert len(boots.read_text().splitlines()) == 2
    for name in ("test_panics", "test_dies", "test_hangs", "TestClass::test_fails"):
        command = f"to repeat it: pytest test_each_test_has_a_guest_of_its_own.py::{name} --pvirq-seed 0"
        assert text.count(f"{command}\n") == 1

    panic, rest = text.split("_ test_panics _")[1].split("_ test_dies _")
    assert "GuestCrashed" in panic
    assert "blkif-backend" in section(panic, "/proc/interrupts of domain 0")
    assert re.search(r"blkif$", section(panic, "/proc/interrupts of guest1, it has ended .crash."), re.MULTILINE)
    crash = section(panic, "guest1")
    assert "guest1 crashed: Kernel panic - not syncing: sysrq triggered crash" in crash
    assert "sysrq_handle_crash" in crash

    death, rest = rest.split("_ test_hangs _")
    assert "test_dies: it ended without a result (signal 9, SIGKILL)" in death

    hang, fails = rest.split("_ TestClass.test_fails _")
    assert "Timeout (>2.0s) from pytest-timeout" in hang
    assert "guest.run" in hang  # it was stopped where it hung
    assert "before it" in section(hang, "the last of guest1's console")
    assert re.search(r"hvc_console$", section(hang, "/proc/interrupts of guest1"), re.MULTILINE)

    asked = section(fails, "/proc/interrupts of guest1")
    known = section(panic, "/proc/interrupts of guest1")
    assert count(asked, "blkif") >= count(known, "blkif") + 20
    assert "so far" in section(fails, "the last of guest1's console")
    assert "debug key e" in fails
    assert re.search(r"d0v\d +raise +p=\d+ out=pending by=\[1, \d\]", section(fails, "the last events"))


def count(table: str, name: str) -> int:
    rows = re.findall(rf"^ *\d+:((?: +\d+)+) .* {name}$", table, re.MULTILINE)
    return sum(int(number) for row in rows for number in row.split())


def test_schedules_of_a_real_guest(session: pytest.Pytester) -> None:
    """A race of two processes in the guest: the plugin finds a schedule, and its command repeats the failure."""
    session.makepyfile(
        """
        import pytest

        @pytest.mark.pvirq_guest(vcpus=2)
        def test_race(linux_guest):
            work = "i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done; echo"
            text = linux_guest.run(f"({work} a) & ({work} b) & wait").text
            assert text == FIRST
        """
    )
    test = next(session.path.glob("test_*.py"))
    source = test.read_text()
    test.write_text(source + "\nFIRST = None\n")
    first = session.runpytest_subprocess("-p", "no:cacheprovider")
    found = re.search(r"assert '([ab])\\n([ab])\\n' == None", first.stdout.str())
    assert found is not None
    test.write_text(source + f"\nFIRST = '{found[1]}\\n{found[2]}\\n'\n")
    session.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
    result = session.runpytest_subprocess("-p", "no:cacheprovider", "--pvirq-seeds", "40", "-n", "1")
    result.assert_outcomes(failed=1)
    assert "NOT REPEATABLE" not in result.stdout.str()
    command = next(line for line in result.outlines if line.startswith("to repeat it: "))
    options = re.search(r"(--pvirq-seed \d+) (--pvirq-choices \S+)$", command)
    assert options is not None, command
    again = session.runpytest_subprocess("-p", "no:cacheprovider", *options[1].split(), *options[2].split())
    again.assert_outcomes(failed=1)
    assert command in again.outlines


def test_without_a_kernel_tests_are_skipped(session: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    session.makepyfile("def test_it(linux_guest): pass")
    monkeypatch.setenv("PVIRQ_CACHE", str(session.path / "empty"))
    monkeypatch.setenv("PATH", "")  # so nothing is fetched
    result = session.runpytest_subprocess("-p", "no:cacheprovider", "-rs", "-o", "pvirq_kernel=no-such-kernel")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines("*SKIPPED*no kernel or busybox for a guest: *")


def test_a_guest_that_doesnt_boot_says_why(session: pytest.Pytester) -> None:
    session.makepyfile(
        """
        import pytest
        @pytest.mark.pvirq_guest(kernel="./vmlinuz")
        def test_image(linux_guest): pass
        @pytest.mark.pvirq_guest(append="rdinit=/nowhere panic=-1")
        def test_panics(linux_guest): pass
        @pytest.mark.pvirq_guest(memory="much")
        def test_memory(linux_guest): pass
        @pytest.mark.pvirq_guest(modules=["no-such-module"])
        def test_module(linux_guest): pass
        """
    )
    (session.path / "vmlinuz").write_bytes(b"no kernel at all")
    result = session.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(errors=4)
    result.stdout.fnmatch_lines(
        [
            "*ERROR at setup of test_image*",
            "the guest doesn't boot: */vmlinuz*",
            "*ERROR at setup of test_panics*",
            "the guest doesn't boot: guest1 *",
            "*ERROR at setup of test_memory*",
            "*'much' is no size like 512M*",
            "*ERROR at setup of test_module*",
            "the guest doesn't boot: no kernel module no_such_module*",
        ]
    )

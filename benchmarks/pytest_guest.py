"""How many tests of a forked guest pytest runs in a minute, on one core.

python -m benchmarks.pytest_guest

Each test runs a command in the booted guest of its session, in a copy of the process: the processor time of many tests
less that of one, so that the boot isn't in it, nor pytest's start, nor what else the machine does.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

PLUGIN: Final = "pvirq.lab.pytest_plugin.plugin"
TESTS: Final = 100
COMMANDS: Final = {
    # What a driver's test looks at; and one that makes the guest work, with its disk and its network.
    "guest_tests": "cat /proc/interrupts",
    "guest_tests_with_devices": "dd if=/dev/xvda of=/dev/null bs=4k count=16 iflag=direct && ping -c 2 -i 0.2 10.0.0.1",
}
TEST: Final = """\
import pytest

@pytest.mark.pvirq_guest(vcpus=2, disks={{"xvda": "8M"}}, nics=1)
@pytest.mark.parametrize("number", range({tests}))
def test(linux_guest, number):
    if "10.0.0.1" in {command!r}:
        linux_guest.run("ip addr add 10.0.0.2/24 dev eth0; ip link set eth0 up")
    result = linux_guest.run({command!r})
    assert result.status == 0, result.text
"""


def run() -> dict[str, float]:
    """Tests a minute."""
    return {f"pytest.{name}.per_min": _per_minute(command) for name, command in COMMANDS.items()}


def _per_minute(command: str) -> float:
    few, many = _seconds(command, 1), _seconds(command, TESTS + 1)
    return 60 * TESTS / (many - few)


def _seconds(command: str, tests: int) -> float:
    """The processor time of a pytest run of so many tests, one after the other."""
    with tempfile.TemporaryDirectory() as directory:
        known = [point.value for point in entry_points(group="pytest11")]
        plugin = [] if PLUGIN in known else ["-p", PLUGIN]
        Path(directory, "pytest.ini").write_text("[pytest]\n")
        Path(directory, "test_it.py").write_text(TEST.format(tests=tests, command=command))
        began = _children()
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin], cwd=directory, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return _children() - began


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    for name, value in run().items():
        print(f"{name:44}{value:8.0f}")

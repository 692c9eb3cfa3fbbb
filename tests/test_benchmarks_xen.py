"""The side-by-side benchmark: a guest's configuration, the table with its ratios, and the guests' program."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import devices
from benchmarks.xen.machine import Config
from benchmarks.xen.run import table


def test_a_configuration_as_xl_reads_it() -> None:
    text = Config("u1", 4, 96, "xen.fifo_events=0", ("phy:/dev/loop0,xvda,w", "phy:/dev/loop1,xvdb,r")).text()
    values: dict[str, object] = {}
    exec(text, values)  # xl's format is Python's here
    assert values["vcpus"] == 4
    assert values["memory"] == 96
    assert values["extra"] == "console=hvc0 quiet pvirq=agent xen.fifo_events=0"
    assert values["disk"] == ["phy:/dev/loop0,xvda,w", "phy:/dev/loop1,xvdb,r"]
    assert values["vif"] == ["bridge=xenbr0"]


def test_ratios_say_how_many_times_as_fast() -> None:
    here = {"devices.boot_usable.s": [9.0, 4.0, 5.0], "devices.read_4k.per_s": [1000.0]}
    real = {"devices.boot_usable.s": [20.0], "devices.read_4k.per_s": [500.0], "devices.ping_dom0.us": [3000.0]}
    rows = {line.split()[0]: line.split()[1:] for line in table(here, real)[1:]}
    assert rows["devices.boot_usable.s"] == ["5.00", "20.00", "s", "4.00"]  # medians; less is better
    assert rows["devices.read_4k.per_s"] == ["1000", "500", "/s", "2.00"]  # more is
    assert rows["devices.ping_dom0.us"] == ["-", "3000", "us"]


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_the_guests_program_reads_and_times(tmp_path: Path) -> None:
    program = tmp_path / "work"
    program.write_bytes(devices.compile_work())
    program.chmod(0o755)
    medium = Path(__file__).parent / "medium.tmp"  # O_DIRECT needs a real file system, not a tmpfs
    medium.write_bytes(bytes(16384))
    try:
        done = subprocess.run([program, "read", medium, "4096", "4"], capture_output=True, text=True, check=False)
        beyond = subprocess.run([program, "read", medium, "4096", "5"], capture_output=True, text=True, check=False)
    finally:
        medium.unlink()
    if "Invalid argument" in done.stderr:
        pytest.skip("no O_DIRECT on this file system")
    assert done.returncode == 0
    first, last = done.stdout.splitlines()
    assert first == "begin"
    assert last.split()[0] == "end"
    assert int(last.split()[1]) > 0
    assert beyond.returncode == 1
    assert "end" not in beyond.stdout

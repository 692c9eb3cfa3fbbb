"""pvirq's modules as machine code: the same runs, what real Xen answers, and sources where they are newer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

import pvirq
from pvirq.check import explore
from pvirq.check.race import races
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

ROOT = Path(__file__).parent.parent
REPEATABLE = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import test_linux_repeatable as test
from pvirq import machine_code
print(machine_code.count() > 0)
print(repr(test.run(Path(sys.argv[2]), sys.stdin.buffer.read(), 1)))
"""
RACES = ("fifo-array-order", "fifo-busy-port", "poll-barrier", "close-dying-peer", "qlock-wait-nested")
EXPLORE = f"""
from pvirq.check import explore, freeze, reduction
from pvirq.check.race import races
print(freeze.__file__[-3:], reduction.__file__[-3:])
for name in {RACES!r}:
    for fault in (True, False):
        result = explore(races()[name].model(fault))
        print(result.states, result.steps, result.complete, result.failure)
"""

pytestmark = pytest.mark.skipif(
    not (
        shutil.which("gcc")
        and Path(sys.executable).with_name("mypyc").exists()
        and Path(sysconfig.get_path("include"), "Python.h").exists()
    ),
    reason="needs gcc, Python's headers, mypyc",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a compiled pvirq in it; quickly made, not to be fast."""
    place = tmp_path_factory.mktemp("compiled")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "compiled.txt")
    shutil.copytree(Path(pvirq.__file__).parent, place / "pvirq", ignore=ignored)
    quick = os.environ | {"MYPYC_OPT_LEVEL": "0", "MYPYC_DEBUG_LEVEL": "0"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "compiled.py", place], env=quick, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    yield place
    shutil.rmtree(place)


def python(place: Path, *arguments: str | Path, compiled: str = "", data: bytes = b"") -> str:
    """What a Python prints that has this pvirq."""
    environment = os.environ | {"PYTHONPATH": str(place), "PVIRQ_COMPILED": compiled}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, input=data, capture_output=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode() + done.stderr.decode()


@pytest.mark.boot
@pytest.mark.timeout(600)
def test_the_same_seed_is_the_same_run(place: Path, kernel_cloud: KernelChoice, busybox: Path) -> None:
    assert kernel_cloud.modules_dir is not None
    drivers = modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront", "xen-netfront"])
    initrd = default_initrd(busybox, modules=drivers)
    arguments = "-c", REPEATABLE, Path(__file__).parent, kernel_cloud.path
    machine_code, fast = python(place, *arguments, data=initrd).splitlines()
    sources, plain = python(place, *arguments, compiled="0", data=initrd).splitlines()
    assert (machine_code, sources) == ("True", "False")
    assert fast == plain


@pytest.mark.timeout(600)
def test_transcripts_of_real_xen(place: Path) -> None:
    """Small kernels that ask for all sorts of things, most of them wrong, hear what real Xen answered."""
    tests = "tests/test_guests.py", "tests/test_evtchn_truth.py"
    assert " passed" in python(place, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)


def test_the_checker_finds_the_same(place: Path) -> None:
    where, *found = python(place, "-c", EXPLORE).splitlines()
    assert where == ".so .so"
    here = [explore(races()[name].model(fault)) for name in RACES for fault in (True, False)]
    assert found == [f"{each.states} {each.steps} {each.complete} {each.failure}" for each in here]


def test_a_source_that_has_changed(place: Path) -> None:
    version = python(place, "-m", "pvirq", "--version")
    assert version.startswith(f"pvirq, version {pvirq.__version__} (")
    assert version.endswith(" modules as machine code)\n")
    assert python(place, "-m", "pvirq", "--version", compiled="0") == f"pvirq, version {pvirq.__version__}\n"
    source = place / "pvirq" / "xen" / "timer.py"
    before = source.stat()
    later = (place / "pvirq" / "compiled.txt").stat().st_mtime + 3600
    os.utime(source, (later, later))
    try:
        said = python(place, "-c", "import pvirq.xen.timer; print(pvirq.xen.timer.__file__)")
    finally:
        os.utime(source, (before.st_mtime,) * 2)
    assert said.splitlines()[0] == str(source)
    assert "pvirq/xen/timer.py has changed since pvirq was compiled, so nothing of that is used" in said

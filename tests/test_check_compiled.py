"""The search as machine code finds what it finds as Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import pvirq
from pvirq.check import explore
from pvirq.check.compiled import MODULES
from pvirq.check.race import races

ROOT = Path(__file__).parent.parent
MYPYC = Path(sys.executable).with_name("mypyc")
NAMES = ("fifo-array-order", "fifo-busy-port", "poll-barrier", "close-dying-peer", "qlock-wait-nested")
PROGRAM = f"""
import sys
from pvirq.check import explore
from pvirq.check.race import races
for name in {MODULES!r}:
    print(sys.modules["pvirq.check." + name].__file__)
for name in {NAMES!r}:
    for fault in (True, False):
        result = explore(races()[name].model(fault))
        print(result.states, result.steps, result.complete, result.failure)
"""


@pytest.mark.skipif(
    not (shutil.which("gcc") and MYPYC.exists() and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="needs gcc, Python's headers, mypyc",
)
def test_machine_code_finds_the_same(tmp_path: Path) -> None:
    package = tmp_path / "pvirq"
    shutil.copytree(Path(pvirq.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    subprocess.run([ROOT / "tools" / "compiled.sh", MYPYC, tmp_path], check=True, capture_output=True)
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
        )

    done = run()
    assert done.returncode == 0, done.stderr
    where, found = done.stdout.splitlines()[: len(MODULES)], done.stdout.splitlines()[len(MODULES) :]
    assert all(each.startswith(str(package)) and each.endswith(".so") for each in where), where
    here = [explore(races()[name].model(fault)) for name in NAMES for fault in (True, False)]
    assert found == [f"{each.states} {each.steps} {each.complete} {each.failure}" for each in here]
    # What is compiled no longer fits its source: that is said, and the source is what runs.
    for number, module in enumerate(MODULES):
        source = package / "check" / f"{module}.py"
        before = source.stat()
        later = Path(where[number]).stat().st_mtime + 3600
        os.utime(source, (later, later))
        done = run()
        assert f"is older than {module}.py and isn't used: `make compiled` again, or remove it" in done.stderr
        assert done.stdout.splitlines() == [*where[:number], str(source), *where[number + 1 :], *found]
        os.utime(source, (before.st_atime, before.st_mtime))


def test_the_sources_are_there() -> None:
    package = Path(pvirq.__file__).parent / "check"
    assert all((package / f"{module}.py").exists() for module in MODULES)

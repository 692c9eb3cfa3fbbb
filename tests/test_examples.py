"""The programs in examples/ do what they say; each checks itself what it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pvirq.toolstack.kernels import KernelChoice

pytestmark = pytest.mark.boot

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["lost_event", "storm", "hotplug", "slow_disk", "resume"])
def test_example(name: str, kernel_cloud: KernelChoice, busybox: Path) -> None:  # fetched, or skipped
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") > 2

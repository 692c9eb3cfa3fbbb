"""Fixtures that many tests share: real kernels and a static busybox, fetched once and kept in pvirq's cache."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from pvirq.toolstack import kernels
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import BusyboxNotFound, KernelChoice, KernelNotFound

# Examples aren't judged by the clock: another job on the machine would fail them. And they are the same at each run, so
# that a commit passes or fails once and for all; `make fuzz` looks for others.
_same = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("pvirq", _same)
settings.register_profile("fuzz", _same, derandomize=False, print_blob=True)
settings.load_profile("pvirq")

# What a shell without job control runs in the background ignores SIGINT, and what nohup runs SIGHUP; so would all that
# the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _kernel(flavour: str) -> KernelChoice:
    try:
        return kernels.fetch_kernel(flavour, print)
    except KernelNotFound as error:
        pytest.skip(f"neither cached nor to be had now: {error}")


@pytest.fixture(scope="session")
def kernel_cloud() -> KernelChoice:
    """The distribution's smaller kernel, for guests."""
    return _kernel("cloud")


@pytest.fixture(scope="session")
def kernel_generic() -> KernelChoice:
    """The distribution's kernel for any machine."""
    return _kernel("generic")


@pytest.fixture(scope="session")
def busybox() -> Path:
    """A statically linked busybox."""
    try:
        return kernels.find_busybox(print)
    except BusyboxNotFound as error:
        pytest.skip(f"neither cached nor to be had now: {error}")


@pytest.fixture(scope="session")
def initrd(busybox: Path) -> bytes:
    """pvirq's own initramfs, with its agent."""
    return default_initrd(busybox)


@pytest.fixture
def outside_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these variables are set, pytest's summary repeats some failures whole."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("BUILD_NUMBER", raising=False)

"""The conformance kernels: held to what real Xen printed once (always), and to a real Xen beside us (where there is
one; tests/conformance.py at full length is `make conformance`)."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

import conformance
import guestlib
import realxen

needs_compiler = pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc")
RECORDED = list(conformance.recorded())


@pytest.mark.guest
@needs_compiler
@pytest.mark.parametrize(("run", "path"), RECORDED, ids=[path.name[:-7] for _, path in RECORDED])
def test_recorded_transcript(run: conformance.Run, path: Path) -> None:
    """Booted on pvirq, the kernel prints what it printed on real Xen 4.17."""
    want = gzip.decompress(path.read_bytes()).decode().splitlines()
    here = conformance.on_pvirq(run)
    at = conformance.first_difference(want, here)
    assert at is None, "\n".join([*want[max(0, at - 5) : at + 1], "but pvirq:", *here[at : at + 1]])


@pytest.mark.conformance
@needs_compiler
@pytest.mark.skipif(realxen.missing() is not None, reason=f"no real Xen to compare with: {realxen.missing()}")
def test_against_real_xen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A fresh seed, in every configuration; the seed is in the output."""
    status = conformance.main(["--require", "--runs", "1", "--ops", "4000", "--keep", str(tmp_path)])
    assert status == conformance.SAME, capsys.readouterr().out


def test_first_difference() -> None:
    assert conformance.first_difference(["a", "b"], ["a", "b"]) is None
    assert conformance.first_difference(["a", "b"], ["a", "c"]) == 1
    assert conformance.first_difference(["a", "b"], ["a"]) == 1


def test_skips_with_a_clear_word(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nothing = tmp_path / "no-xen"
    assert conformance.main(["--xen", str(nothing)]) == conformance.SAME
    assert "SKIPPED, nothing was compared" in capsys.readouterr().out
    assert conformance.main(["--xen", str(nothing), "--require"]) == conformance.UNFINISHED

"""docs/network.md: its examples do what they say."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from pvirq.net import slirp
from pvirq.net.outside import OutsideError
from pvirq.toolstack import kernels
from pvirq.toolstack.kernels import KernelChoice

PAGE = Path(__file__).parent.parent / "docs/network.md"
SECTIONS = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("section", [text for text in SECTIONS if ">>>" in text], ids=lambda text: text.split("\n")[0])
def test_examples(section: str) -> None:
    if ".nat(" in section:
        try:
            slirp.load()
        except OutsideError as error:
            pytest.skip(str(error))
    test = doctest.DocTestParser().get_doctest(section, {}, PAGE.name, str(PAGE), 0)
    result = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF).run(test)
    assert result.attempted > 5
    assert not result.failed


@pytest.mark.boot
def test_two_guests_and_a_station(
    kernel_cloud: KernelChoice, busybox: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "find_kernel", lambda report: kernel_cloud)
    monkeypatch.setattr(kernels, "find_busybox", lambda report: busybox)
    (text,) = (text for text in SECTIONS if text.startswith("Two guests"))
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    printed = capsys.readouterr().out
    assert "{'one': '10.0.0.2', 'two': '10.0.0.3'}" in printed
    assert "3 packets received" in printed

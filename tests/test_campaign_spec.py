"""Campaign files: what they may say, and that each mistake is one line with file, line and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pvirq.lab.campaign import spec
from pvirq.lab.campaign.spec import CampaignError, MemoryDisk
from pvirq.toolstack.config import DiskConfig

WHOLE = """
[campaign]
name = "net"
seeds = { first = 10, count = 3 }
timeout = "20s"
limit = 90
trace = "all"

[kernels.cloud]
kernel = "cloud"
vcpus = 2
memory = "192M"
append = "quiet"
disk = ["disk.img,raw,xvda,w", { vdev = "xvdb", size = "8M", readonly = true }]
vif = "bridge=xenbr0"
station = "10.0.0.1/24"
ready = "true"

[kernels.old]
model = "2.6.18"
disk = { vdev = "xvda" }

[scenarios.dd]
exec = "dd if=/dev/zero of=/dev/xvda"
expect = { status = 1, output = "No space", no_console = "" }
timeout = 1.5

[scenarios.boots]
boot = true

[scenarios.stress]
python = "stress.py:blkif"

[faults.none]

[[include]]
kernels = "cloud"
seeds = [1, 2]

[[exclude]]
scenarios = "boots"
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    (tmp_path / "disk.qcow2").write_bytes(bytes(512))
    (tmp_path / "stress.py").write_text("def blkif(host): pass\n")
    (tmp_path / "u.cfg").write_text('kernel = "vmlinuz"\n')
    return tmp_path


def test_a_whole_file(here: Path) -> None:
    (here / "net.toml").write_text(WHOLE)
    campaign = spec.load("net.toml")
    assert (campaign.name, campaign.seeds, campaign.trace) == ("net", range(10, 13), "all")
    assert (campaign.timeout, campaign.limit) == (20 * 10**9, 90 * 10**9)
    cloud, old = campaign.kernels["cloud"], campaign.kernels["old"]
    assert cloud.real
    assert not old.real
    assert (cloud.vcpus, cloud.memory) == (2, 192 << 20)
    image, memory = cloud.disks
    assert isinstance(image, DiskConfig)
    assert isinstance(memory, MemoryDisk)
    assert (image.target, image.vdev, image.readonly) == ("disk.img", "xvda", False)
    assert (memory.vdev, memory.size, memory.readonly) == ("xvdb", 8 << 20, True)
    assert [vif.bridge for vif in cloud.vifs] == ["xenbr0"]
    dd = campaign.scenarios["dd"]
    assert (dd.command[:2], dd.expect.status, dd.expect.no_console) == ("dd", 1, "")
    assert dd.timeout == 1_500_000_000
    assert campaign.scenarios["boots"].expect.no_console == spec.COMPLAINTS
    assert campaign.include[0].seeds == [1, 2]
    assert campaign.exclude[0].scenarios == ["boots"]


@pytest.mark.parametrize(("value", "seeds"), [("3", [1, 2, 3]), ("[7, 0]", [7, 0]), ("{ count = 2 }", [1, 2])])
def test_seeds(here: Path, value: str, seeds: list[int]) -> None:
    assert list(spec.loads(small(campaign=f"seeds = {value}")).seeds) == seeds


def test_without_faults_there_are_none(here: Path) -> None:
    campaign = spec.loads(small(), "x.toml")
    assert list(campaign.faults) == ["none"]
    assert campaign.faults["none"].rules == []
    assert campaign.name == "x"


def small(
    campaign: str = "", kernel: str = 'model = "suse"', scenario: str = 'python = "stress.py:blkif"', more: str = ""
) -> str:
    return f"[campaign]\n{campaign}\n[kernels.k]\n{kernel}\n[scenarios.s]\n{scenario}\n{more}"


REAL = 'kernel = "cloud"'
WRONG = [
    (small(campaign="seed = 3"), '2: unknown key "seed": did you mean "seeds"?'),
    (small(campaign="seeds = 0"), "2: expected a whole number from 1"),
    (small(campaign="seeds = [1, 1]"), "2: expected at least one seed, and each of them once"),
    (small(campaign="seeds = []"), "2: expected at least one seed"),
    (small(campaign="seeds = { first = 3 }"), '2: expected a key "count" here'),
    (small(campaign='seeds = "many"'), "2: expected a whole number"),
    (small(campaign='timeout = "10"'), "2: expected seconds, or a time such as"),
    (small(campaign="timeout = 0"), "2: expected seconds"),
    (small(campaign="limit = nan"), "2: expected seconds"),
    (small(campaign="limit = inf"), "2: expected seconds"),
    (small(campaign='trace = "some"'), '2: expected one of "failures", "all", "none"'),
    (small(kernel=""), '3: expected a key "kernel", "cfg" or "model" here'),
    (small(kernel='model = "3.0"'), '4: expected one of "pvops"'),
    (small(kernel='model = "suse"\nkernel = "cloud"'), "4: expected either a real kernel or a model"),
    (small(kernel='model = "suse"\nready = "true"'), "5: a modelled guest has no ready"),
    (small(kernel=REAL + '\ncfg = "none.cfg"'), "5: expected a file: there is no none.cfg"),
    (small(kernel=REAL + '\ninitrd = "no.img"'), "5: expected a file: there is no no.img"),
    (small(kernel=REAL + '\ndisk = "disk.img,raw,xvdx9z,w"'), "5: expected a disk as xl's disk=[...] has it"),
    (small(kernel=REAL + '\ndisk = "disk.qcow2,qcow2,xvda,w"'), "5: expected a raw image"),
    (small(kernel=REAL + '\ndisk = "other.img,raw,xvda,w"'), "5: expected a file: there is no other.img"),
    (small(kernel=REAL + '\ndisk = { vdev = "xvda", size = "1" }'), "5: expected a size such as 512"),
    (small(kernel=REAL + '\nvif = "bridge"'), "5: expected an interface as xl's vif=[...] has it"),
    (small(kernel=REAL + '\nfiles = { "x" = "y" }'), "5: expected a file: there is no y"),
    (small(kernel=REAL + '\nstation = "10.0.0.1/24"'), "5: expected an interface (vif)"),
    (small(kernel=REAL + "\nmemory = 256"), "5: expected a size"),
    (small(scenario=""), '5: expected one of the keys "exec", "python" and "file" here, or boot = true'),
    (small(scenario='exec = "a"\npython = "stress.py:x"'), '5: expected one of the keys "exec", "python" and "file"'),
    (small(scenario='python = "stress.py"'), '6: expected "FILE.py:FUNCTION", not "stress.py"'),
    (small(scenario='python = "gone.py:f"'), "6: expected a file: there is no gone.py"),
    (small(scenario='file = "gone.toml"'), "6: expected a file: there is no gone.toml"),
    (small(scenario='exec = "x"\nset = "guest.vcpus=1"'), "7: this goes with file = ..."),
    (small(scenario='exec = "x"\nexpect = { output = "(" }'), "7: expected a regular expression"),
    (small(scenario='exec = "x"\nexpect = { stauts = 1 }'), '7: unknown key "stauts": did you mean "status"?'),
    (small(scenario='exec = "x"\nexpect = { ends = "happily" }'), '7: expected one of "poweroff"'),
    (small(scenario='python = "stress.py:f"\nexpect = { status = 1 }'), "7: status and output are of what exec runs"),
    (small(more='[faults.f]\nrules = [""]'), "8: expected a text"),
    (small(more='[faults."a/b"]'), "7: expected a name of letters, digits"),
    (small(more="[faults]\nx = 1"), "8: expected a table [faults.NAME]"),
    (small(more="[kernel.x]\n[kernel.y]"), '7: unknown key "kernel": did you mean "kernels"?'),
    (small(more="[include]"), "7: expected a list of tables"),
    ('[scenarios.s]\nexec = "x"', '1: expected a key "kernels" here: at least one [kernels.NAME]'),
    ("[campaign\n", "1: not TOML"),
]


@pytest.mark.parametrize(("text", "expected"), WRONG, ids=[expected[:50] for _, expected in WRONG])
def test_mistakes(here: Path, text: str, expected: str) -> None:
    with pytest.raises(CampaignError) as error:
        spec.loads(text, "x.toml")
    assert str(error.value).startswith(f"x.toml:{expected}"), str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(here: Path) -> None:
    (here / "bytes.toml").write_bytes(b"\n\xff")
    for name, expected in (("gone.toml", "gone.toml: No such file"), ("bytes.toml", "bytes.toml:2: expected UTF-8")):
        with pytest.raises(CampaignError, match=expected):
            spec.load(name)


EXAMPLE = Path(__file__).parent.parent / "examples/campaign"
DOCS = (Path(__file__).parent.parent / "docs/lab-campaigns.md").read_text()


def test_each_setting_is_described() -> None:
    for title, settings in spec.describe():
        for key, text, about in settings:
            assert text, (title, key)
            assert f"| `{key}` | {about} |" in DOCS, (title, key)


def test_the_example_of_the_docs() -> None:
    texts = {name: (EXAMPLE / name).read_text() for name in ("blkif.toml", "stress.py")}
    assert f"```toml\n{texts['blkif.toml']}```" in DOCS
    assert f"```python\n{texts['stress.py']}```" in DOCS
    campaign = spec.load(str(EXAMPLE / "blkif.toml"))
    functions = {scenario.python.partition(":")[2] for scenario in campaign.scenarios.values() if scenario.python}
    assert functions == set(re.findall(r"^def (\w+)", texts["stress.py"], re.MULTILINE))

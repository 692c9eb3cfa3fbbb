"""What a campaign's runs are: each kernel with each scenario, faults and seed that fit, and what defines them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import pvirq
from pvirq.lab.campaign.spec import LAST_SEED, Campaign, CampaignError, Choice, Faults, Include, Kernel, Scenario
from pvirq.scenario.fields import Unexpected
from pvirq.toolstack import images, xlcfg
from pvirq.toolstack.config import DiskConfig, DomainConfig
from pvirq.toolstack.kernels import KernelNotFound
from pvirq.toolstack.packages import Report
from pvirq.xen.timer import NS_PER_S

# Larger ones, disks mostly, are told by their size and age.
LARGEST_HASHED: Final = 256 << 20
BOOT_NS: Final = 60 * NS_PER_S  # of guest time, where the kernel's table says no other


@dataclass(frozen=True, eq=False)
class Start:
    """What a host is when a run begins: this kernel's, `booted` and ready, or yet to be built by the run.

    Runs with the same `key` can begin from one booted guest. `digests` are those of the files that go into it, by path
    (as the campaign's file has it, "kernel" for the image).
    """

    key: str
    name: str
    kernel: Kernel
    booted: bool
    directory: str
    digests: dict[str, str]
    boot_ns: int
    """Guest time that the boot may take."""
    limit_ns: int
    """Real time that it may take."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One kernel with one scenario and one set of faults. Its runs differ in their seeds only."""

    start: Start
    kernel: str
    scenario: str
    faults: str
    what: Scenario
    rules: tuple[str, ...]
    timeout_ns: int
    limit_ns: int
    trace: str
    definition: str
    """A digest of all that a run's result may depend on, but for its seed."""

    @property
    def name(self) -> str:
        return f"{self.kernel}/{self.scenario}/{self.faults}"


@dataclass(frozen=True)
class Run:
    """One run."""

    cell: Cell
    seed: int

    @property
    def name(self) -> str:
        """KERNEL/SCENARIO/FAULTS/SEED."""
        return f"{self.cell.name}/{self.seed}"


def configuration(kernel: Kernel, directory: Path) -> DomainConfig:
    """A real guest's configuration, with its disks as `disks` has them; paths as they are written. ConfigError."""
    config = DomainConfig()
    if kernel.cfg:
        config, _ = xlcfg.load(str(directory / kernel.cfg))
    config.kernel = kernel.kernel or config.kernel
    config.ramdisk = kernel.initrd or config.ramdisk
    config.cmdline = f"{config.cmdline} {kernel.append}".strip()
    if kernel.memory is not None:
        config.memory = config.maxmem = kernel.memory
    if kernel.vcpus is not None:
        config.vcpus = config.maxvcpus = kernel.vcpus
    config.vifs += kernel.vifs
    return config


class Plan:
    """All runs of a campaign, in the order of its file. CampaignError where there are none."""

    def __init__(self, campaign: Campaign, report: Report) -> None:
        """`report` gets a line before a kernel is fetched."""
        self.campaign = campaign
        self._digests: dict[Path, str] = {}
        self.cells: dict[Cell, Sequence[int]] = {}
        starts: dict[tuple[str, bool], Start] = {}
        for kernel, scenario, faults, seeds in self._combinations():
            booted = self._begins_booted(campaign.kernels[kernel], campaign.scenarios[scenario])
            if (kernel, booted) not in starts:
                starts[kernel, booted] = self._start(kernel, booted, report)
            self.cells[self._cell(starts[kernel, booted], kernel, scenario, faults)] = seeds

    def __iter__(self) -> Iterator[Run]:
        for cell, seeds in self.cells.items():
            for seed in seeds:
                yield Run(cell, seed)

    def __len__(self) -> int:
        return sum(map(len, self.cells.values()))

    # -- which there are -----------------------------------------------------------------------------------------------

    def _combinations(self) -> list[tuple[str, str, str, Sequence[int]]]:
        campaign = self.campaign
        include = campaign.include or [Include()]
        for key, choices in (("include", campaign.include), ("exclude", campaign.exclude)):
            for i, one in enumerate(choices):
                self._check_names(one, (key, i))
        found: list[tuple[str, str, str, Sequence[int]]] = []
        for kernel in campaign.kernels:
            for scenario in campaign.scenarios:
                if not self._fits(kernel, scenario):
                    continue
                for faults in campaign.faults:
                    # Of several that mean it, the last one's seeds count: first the general, then the particular.
                    wanted = [one for one in include if _means(one, kernel, scenario, faults)]
                    if wanted and not any(_means(one, kernel, scenario, faults) for one in campaign.exclude):
                        given = [one.seeds for one in wanted if one.seeds is not None]
                        found.append((kernel, scenario, faults, given[-1] if given else campaign.seeds))
        used = {
            "kernels": {kernel for kernel, _, _, _ in found},
            "scenarios": {scenario for _, scenario, _, _ in found},
        }
        for key, names in used.items():
            for name in getattr(campaign, key):
                if name not in names and not campaign.include and not campaign.exclude:
                    other = "scenario" if key == "kernels" else "kernel"
                    raise campaign.source.error(
                        Unexpected((key, name), f"there is no {other} that this can run with: {_FITTING}")
                    )
        if not found:
            raise CampaignError(f"{campaign.source.file}: nothing is left to be run")
        return found

    def _check_names(self, choice: Choice, path: tuple[str | int, ...]) -> None:
        for key in ("kernels", "scenarios", "faults"):
            known = getattr(self.campaign, key)
            for pattern in getattr(choice, key):
                if not any(fnmatchcase(name, pattern) for name in known):
                    expected = ", ".join(known)
                    raise self.campaign.source.error(
                        Unexpected((*path, key), f'expected {key} of this file: "{pattern}" is none of {expected}')
                    )

    def _fits(self, kernel: str, scenario: str) -> bool:
        runs, what = self.campaign.kernels[kernel], self.campaign.scenarios[scenario]
        if what.command:
            return runs.real and runs.initrd != "none"
        return not what.file or not runs.real

    @staticmethod
    def _begins_booted(kernel: Kernel, scenario: Scenario) -> bool:
        return kernel.real and not scenario.boot and kernel.initrd != "none"

    # -- what defines them ---------------------------------------------------------------------------------------------

    def _start(self, name: str, booted: bool, report: Report) -> Start:
        kernel, source = self.campaign.kernels[name], self.campaign.source
        digests: dict[str, str] = {}
        try:
            if kernel.real:
                config = configuration(kernel, source.directory)
                named = str(source.directory / config.kernel) if config.kernel else None
                if named is not None and not Path(named).exists():
                    named = config.kernel  # no file: a name of the cache's
                digests["kernel"] = self._digest(images.choose_kernel(named, report).path)
                paths = [
                    kernel.cfg,
                    config.ramdisk if config.ramdisk != images.NO_INITRD else "",
                    *kernel.files.values(),
                ]
                paths += [disk.target for disk in config.disks]
            else:
                paths = []
            paths += [disk.target for disk in kernel.disks if isinstance(disk, DiskConfig)]
            for path in filter(None, paths):
                if not path.startswith("/dev/"):
                    digests[path] = self._digest(source.directory / path)
        except OSError as error:
            raise source.error(Unexpected(("kernels", name), f"{error.filename}: {error.strerror}")) from None
        except (xlcfg.ConfigError, KernelNotFound) as error:
            raise source.error(Unexpected(("kernels", name), str(error))) from None
        timeout = kernel.timeout or BOOT_NS
        key = _hash({"kernel": _plain(kernel), "booted": booted, "digests": digests, "timeout": timeout})
        return Start(key, name, kernel, booted, str(source.directory), digests, timeout, self.campaign.limit)

    def _cell(self, start: Start, kernel: str, scenario: str, faults: str) -> Cell:
        campaign, what = self.campaign, self.campaign.scenarios[scenario]
        rules: Faults = campaign.faults[faults]
        timeout, limit = what.timeout or campaign.timeout, what.limit or campaign.limit
        digest = ""
        for path in (what.python.rpartition(":")[0], what.file if what.file.endswith(".toml") else ""):
            if path:
                digest = self._digest(campaign.source.directory / path)
        parts: dict[str, Any] = {"pvirq": pvirq.__version__, "start": start.key, "file": digest}
        parts["scenario"] = {key: value for key, value in _plain(what).items() if key != "limit"}
        parts |= {"rules": rules.rules, "timeout": timeout}
        return Cell(
            start, kernel, scenario, faults, what, tuple(rules.rules), timeout, limit, campaign.trace, _hash(parts)
        )

    def _digest(self, path: Path) -> str:
        if path not in self._digests:
            self._digests[path] = digest(path)
        return self._digests[path]

    # -- a part of them ------------------------------------------------------------------------------------------------

    def select(self, patterns: Iterable[str]) -> list[Run]:
        """The runs that any of the patterns KERNEL[/SCENARIO[/FAULTS[/SEED]]] means; all without one. CampaignError."""
        wanted = [_split(pattern) for pattern in patterns]
        if not wanted:
            return list(self)
        found: list[Run] = []
        for cell, seeds in self.cells.items():
            names = (cell.kernel, cell.scenario, cell.faults)
            fitting = [want[3] for want in wanted if all(map(fnmatchcase, names, want[:3]))]
            if fitting:
                found += [Run(cell, seed) for seed in seeds if any(fnmatchcase(str(seed), want) for want in fitting)]
                # A seed by itself may be any: who looks for more than the file has needn't change it.
                found += [Run(cell, int(want)) for want in fitting if _is_seed(want) and int(want) not in seeds]
        if not found:
            raise CampaignError(f"--only {' '.join(patterns)}: {self.campaign.source.file} has no such run")
        return list(dict.fromkeys(found))


_FITTING: Final = "exec is for real kernels with an initrd, file for modelled ones"


def _split(pattern: str) -> tuple[str, str, str, str]:
    parts = pattern.split("/")
    if len(parts) > 4 or not all(parts):
        raise CampaignError(f"--only {pattern}: expected KERNEL/SCENARIO/FAULTS/SEED, or the first few of them")
    kernel, scenario, faults, seed = [*parts, "*", "*", "*"][:4]
    return kernel, scenario, faults, seed


def _is_seed(text: str) -> bool:
    return re.fullmatch(r"0|[1-9][0-9]{0,18}", text) is not None and int(text) <= LAST_SEED


def names_one(pattern: str) -> bool:
    """A pattern that means a single run: it is named in full."""
    parts = pattern.split("/")
    return len(parts) == 4 and _is_seed(parts[3]) and not any(set(part) & set("*?[") for part in parts)


def _means(choice: Choice, kernel: str, scenario: str, faults: str) -> bool:
    return all(
        any(fnmatchcase(name, pattern) for pattern in patterns)
        for name, patterns in ((kernel, choice.kernels), (scenario, choice.scenarios), (faults, choice.faults))
    )


def digest(path: Path) -> str:
    """What tells a file from another, or a directory with all below it. OSError."""
    if path.is_dir():
        return _hash({str(child.relative_to(path)): digest(child) for child in sorted(path.iterdir())})
    stat = path.stat()
    if stat.st_size > LARGEST_HASHED:
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _plain(settings: Any) -> dict[str, Any]:
    assert is_dataclass(settings)
    return asdict(settings)  # type: ignore[arg-type]

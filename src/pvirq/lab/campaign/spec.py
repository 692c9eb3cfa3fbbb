"""Campaign files: TOML into settings, each mistake one line with file, line and what was expected.

The tables are `[campaign]`, `[kernels.NAME]`, `[scenarios.NAME]`, `[faults.NAME]`, `[[include]]` and `[[exclude]]`.
What a file's combinations are is `pvirq.lab.campaign.plan`'s.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from pvirq.lab.faults import kinds as fault_kinds
from pvirq.lab.faults.values import FaultError
from pvirq.linux.personalities import KERNELS
from pvirq.scenario import fields
from pvirq.scenario.fields import (
    Kind,
    Unexpected,
    boolean,
    choice,
    integer,
    one_or_more,
    setting,
    size,
    string,
    table,
)
from pvirq.scenario.toml_lines import Path as Setting
from pvirq.scenario.toml_lines import line_of, read_text
from pvirq.toolstack import xlcfg
from pvirq.toolstack.config import DiskConfig, VifConfig
from pvirq.xen.timer import NS_PER_S

T = TypeVar("T")

MAX_FILE: Final = 4 << 20
MOST_SEEDS: Final = 10_000_000
LAST_SEED: Final = (1 << 63) - 1
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_AT: Final = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
# What Linux prints when something is wrong with itself: see lib/bug.c, kernel/panic.c, kernel/watchdog.c, kernel/rcu,
# kernel/hung_task.c.
COMPLAINTS: Final = (
    r"\bBUG: |\bOops: |\bKernel panic\b|\bWARNING: CPU: |\bINFO: task .* blocked for more than|\bINFO: rcu_.* stall"
    r"|general protection fault|\bsoft lockup\b|\bnobody cared\b"
)
ENDS: Final = ("poweroff", "reboot", "crash", "watchdog")


class CampaignError(Exception):
    """A campaign can't be run as it was asked for: one line with file, line and what was expected."""


# -- kinds of values ---------------------------------------------------------------------------------------------------


def seconds() -> Kind:
    """A time in seconds, or a text with its unit; ns."""
    text = 'seconds, or a time such as "20ms" or "10min"'
    with_unit = fields.duration()

    def parse(value: Any, path: Setting) -> int:
        try:
            found = int(value * NS_PER_S) if type(value) in (int, float) else with_unit.parse(value, path)
        except (Unexpected, ValueError, OverflowError):
            found = 0
        if not 0 < found < 1 << 62:
            raise Unexpected(path, f"expected {text}, not {value!r}")
        return int(found)

    return Kind(text, parse)


def regex() -> Kind:
    """A regular expression of Python's, or "" for none."""

    def parse(value: Any, path: Setting) -> str:
        if not isinstance(value, str):
            raise Unexpected(path, "expected a regular expression")
        try:
            re.compile(value, re.MULTILINE)
        except re.error as error:
            raise Unexpected(path, f"expected a regular expression: {error}") from None
        return value

    return Kind("a regular expression", parse)


def seeds() -> Kind:
    """A number of seeds (from 1 up), a list of them, or {first = 1, count = 100}."""

    def parse(value: Any, path: Setting) -> list[int] | range:
        if isinstance(value, Mapping):
            span = fields.parse(_Span, value, path)
            return range(span.first, span.first + span.count)
        if isinstance(value, list):
            found = [integer(0, LAST_SEED).parse(one, path) for one in value]
            if not found or len(set(found)) < len(found):
                raise Unexpected(path, "expected at least one seed, and each of them once")
            return found
        return range(1, integer(1, MOST_SEEDS).parse(value, path) + 1)

    return Kind("a number of seeds, a list of seeds, or { first = 1, count = 100 }", parse)


def entry(parse_text: Callable[[str], T], about: str) -> Kind:
    """What xl's lists have for a device, in a text."""

    def parse(value: Any, path: Setting) -> T:
        text = string().parse(value, path)
        try:
            return parse_text(text)
        except ValueError as error:
            raise Unexpected(path, f"expected {about}: {error}") from None

    return Kind(about, parse)


def files() -> Kind:
    """A table of paths in the guest, each with a file here."""

    def parse(value: Any, path: Setting) -> dict[str, str]:
        if not isinstance(value, Mapping):
            raise Unexpected(path, 'expected a table such as { "opt/test" = "build/test" }')
        return {key.lstrip("/"): string().parse(one, (*path, key)) for key, one in value.items()}

    return Kind('a table such as { "opt/test" = "build/test" }', parse)


# -- the tables --------------------------------------------------------------------------------------------------------


@dataclass
class _Span:
    first: int = setting(integer(0, LAST_SEED - MOST_SEEDS), "the first seed", 1)
    count: int = setting(integer(1, MOST_SEEDS), "how many")


@dataclass
class MemoryDisk:
    """A disk in memory, empty at the start of each run."""

    vdev: str = setting(string(), 'what the guest calls it, as "xvda"')
    size: int = setting(size(4096, 1 << 40), "its size", 64 << 20)
    readonly: bool = setting(boolean(), "whether the guest may only read it", False)


_DISK: Final = Kind(
    'a text as in xl\'s disk=[...], or { vdev = "xvda", size = "64M" } for one in memory',
    lambda value, path: (
        entry(xlcfg.parse_disk, "a disk as xl's disk=[...] has it").parse(value, path)
        if isinstance(value, str)
        else fields.parse(MemoryDisk, value, path)
    ),
)


@dataclass
class Kernel:
    """What a guest runs, and what it has: a `[kernels.NAME]` table."""

    kernel: str = setting(string(), 'a real kernel: a file, "cloud", "generic", or a name that is in the cache', "")
    cfg: str = setting(string(), "a configuration of xl's; what is said beside it wins", "")
    model: str = setting(choice(*KERNELS), "a modelled guest's kernel, instead of a real one", "")
    initrd: str = setting(string(), 'initial ramdisk, or "none"; default: busybox with pvirq\'s agent', "")
    append: str = setting(string(), "kernel parameters, behind pvirq's own", "")
    memory: int | None = setting(size(1 << 20, 1 << 40), 'how much it has ("256M")', None)
    vcpus: int | None = setting(integer(1, 32), "virtual CPUs (1)", None)
    disks: list[DiskConfig | MemoryDisk] = setting(
        one_or_more(_DISK), "disks; what is written to one is a run's own, and the image stays as it is", [], key="disk"
    )
    vifs: list[VifConfig] = setting(
        one_or_more(entry(xlcfg.parse_vif, "an interface as xl's vif=[...] has it")), "interfaces", [], key="vif"
    )
    station: str = setting(string(), 'a station with DHCP on the first interface\'s bridge, as "10.0.0.1/24"', "")
    files: dict[str, str] = setting(files(), "put into the default initrd: path in the guest = file here", {})
    ready: str = setting(string(), "a shell command, run after the boot and before any scenario begins", "")
    hardware: str = setting(string(), "domain 0's devices: a machine by name (pvirq model --list)", "none")
    dom0_kernel: str = setting(choice(*KERNELS), "what domain 0 runs", "pvops")
    dom0_vcpus: int = setting(integer(1, 32), "domain 0's virtual CPUs", 2)
    timeout: int | None = setting(seconds(), "guest time that its boot may take (60 s)", None)

    @property
    def real(self) -> bool:
        """It is a kernel image, and no modelled one."""
        return not self.model


@dataclass
class Expect:
    """What has to come out of a run for it to pass."""

    status: int | None = setting(integer(0, 255), "exit status of `exec`; 0 unless the guest is to end", None)
    output: str = setting(regex(), "is found in what `exec` prints", "")
    no_output: str = setting(regex(), "is not found there", "")
    console: str = setting(regex(), "is found on the guest's console, from the scenario's beginning on", "")
    no_console: str = setting(
        regex(), 'is not found there; "" allows a kernel\'s complaints (BUG:, Oops: ...)', COMPLAINTS
    )
    ends: str = setting(choice(*ENDS), "the guest ends so, by itself; asked to by the agent for poweroff", "")


@dataclass
class Scenario:
    """What happens in a run: a `[scenarios.NAME]` table."""

    command: str = setting(string(), "a shell command in the guest", "", key="exec")
    python: str = setting(string(), 'a function "FILE.py:NAME", called with host, guest, faults, seed ... by name', "")
    file: str = setting(string(), "a scenario of modelled domains: a file, or the name of one that ships", "")
    settings: list[str] = setting(
        one_or_more(string()), 'with `file`: changes to it, as "guest.vcpus=2"', [], key="set"
    )
    domains: list[str] = setting(
        one_or_more(string()), "with `file`: whose kernel is the campaign's (all [[domain]]s)", []
    )
    boot: bool = setting(boolean(), "the boot is part of the run, under its seed and faults", False)
    expect: Expect = setting(table(Expect), "what it takes to pass", None)
    timeout: int | None = setting(seconds(), "guest time that a run may take (the campaign's)", None)
    limit: int | None = setting(seconds(), "real time that a run may take (the campaign's)", None)

    def __post_init__(self) -> None:
        self.expect = self.expect or Expect()


@dataclass
class Faults:
    """What goes wrong: a `[faults.NAME]` table."""

    rules: list[str] = setting(one_or_more(string()), 'as "lose irq=blkif probability=0.01"', [])


@dataclass
class Choice:
    """Combinations: an `[[include]]` or `[[exclude]]` table. Patterns such as "net-*" are names, too."""

    kernels: list[str] = setting(one_or_more(string()), "kernels, by name", ["*"])
    scenarios: list[str] = setting(one_or_more(string()), "scenarios, by name", ["*"])
    faults: list[str] = setting(one_or_more(string()), "faults, by name", ["*"])


@dataclass
class Include(Choice):
    """The same, with seeds of its own."""

    seeds: list[int] | range | None = setting(seeds(), "instead of the campaign's", None)


@dataclass
class Campaign:
    """The `[campaign]` table, and all others as `kernels`, `scenarios`, `faults`, `include`, `exclude`."""

    name: str = setting(string(), "what it is called", "")
    seeds: list[int] | range = setting(
        seeds(), "how often each combination runs, and with which seeds (once, 1)", range(1, 2)
    )
    timeout: int = setting(seconds(), "guest time that a run may take (60 s)", 60 * NS_PER_S)
    limit: int = setting(seconds(), "real time that a run may take before it is killed (600 s)", 600 * NS_PER_S)
    trace: str = setting(choice("failures", "all", "none"), "of which runs a trace is kept (failures)", "failures")

    def __post_init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.scenarios: dict[str, Scenario] = {}
        self.faults: dict[str, Faults] = {}
        self.include: list[Include] = []
        self.exclude: list[Choice] = []
        self.source = Source()


@dataclass
class Source:
    """Where a campaign came from. `directory` is what its paths are taken from."""

    file: str = ""
    text: str = field(default="", repr=False)
    directory: Path = Path()

    def error(self, error: Unexpected) -> CampaignError:
        """A setting is not what it should be."""
        return CampaignError(f"{self.file}:{line_of(self.text, error.path)}: {error}")


# -- reading -----------------------------------------------------------------------------------------------------------


def load(name: str) -> Campaign:
    """Read a campaign file. CampaignError."""
    return loads(read_text(name, MAX_FILE, "campaign", CampaignError), name)


def loads(text: str, name: str = "campaign.toml") -> Campaign:
    """The same from a text; `name` is for messages, and for where its paths are taken from."""
    source = Source(name, text, Path(name).absolute().parent)
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        where = _AT.search(str(error))
        line = int(where[1]) if where and where[1] else text.count("\n") + 1
        raise CampaignError(f"{name}:{line}: not TOML: {_AT.sub('', str(error))}") from None
    try:
        return _campaign(raw, source)
    except Unexpected as error:
        raise source.error(error) from None


def _campaign(raw: dict[str, Any], source: Source) -> Campaign:
    fields.parse(_Tables, raw, ())
    campaign = fields.parse(Campaign, raw.get("campaign", {}), ("campaign",))
    campaign.source = source
    campaign.name = campaign.name or Path(source.file).stem
    campaign.kernels = _named(Kernel, raw, "kernels")
    campaign.scenarios = _named(Scenario, raw, "scenarios")
    campaign.faults = _named(Faults, raw, "faults") or {"none": Faults()}
    campaign.include = fields.tables(table(Include)).parse(raw.get("include", []), ("include",))
    campaign.exclude = fields.tables(table(Choice)).parse(raw.get("exclude", []), ("exclude",))
    for name, kernel in campaign.kernels.items():
        _check_kernel(kernel, ("kernels", name), source)
    for name, scenario in campaign.scenarios.items():
        _check_scenario(scenario, ("scenarios", name), source)
    for name, faults in campaign.faults.items():
        _check_faults(faults, ("faults", name, "rules"))
    return campaign


_ANYTHING: Final = Kind("a table", lambda value, _path: value)


@dataclass
class _Tables:
    """What a file may have at its top."""

    campaign: Any = setting(_ANYTHING, "the campaign", None)
    kernels: Any = setting(_ANYTHING, "at least one [kernels.NAME]")
    scenarios: Any = setting(_ANYTHING, "at least one [scenarios.NAME]")
    faults: Any = setting(_ANYTHING, "tables [faults.NAME]", None)
    include: Any = setting(_ANYTHING, "tables [[include]]", None)
    exclude: Any = setting(_ANYTHING, "tables [[exclude]]", None)


def _named(cls: type[T], raw: dict[str, Any], key: str) -> dict[str, T]:
    """Tables by name."""
    found = raw.get(key, {})
    if not isinstance(found, Mapping):
        raise Unexpected((key,), f"expected tables [{key}.NAME]")
    for name, one in found.items():
        if not isinstance(one, Mapping):
            raise Unexpected((key, name), f"expected a table [{key}.NAME], and {name} as a setting in it")
        if not NAME.fullmatch(name):
            raise Unexpected((key, name), f"expected a name of letters, digits, and . _ + - inside, not {name!r}")
    return {name: fields.parse(cls, one, (key, name)) for name, one in found.items()}


def _check_kernel(kernel: Kernel, path: Setting, source: Source) -> None:
    """What one setting alone can't tell."""
    if kernel.model:
        if kernel.kernel or kernel.cfg:
            raise Unexpected((*path, "model"), "expected either a real kernel or a model")
        for key in ("initrd", "append", "memory", "files", "ready"):
            if getattr(kernel, key):
                raise Unexpected((*path, key), f"a modelled guest has no {key}")
    elif not kernel.kernel and not kernel.cfg:
        raise Unexpected(path, 'expected a key "kernel", "cfg" or "model" here')
    if kernel.files and kernel.initrd:
        raise Unexpected((*path, "files"), "files go into the default initrd; this kernel has one of its own")
    if kernel.station and not kernel.vifs and not kernel.cfg:
        raise Unexpected((*path, "station"), "expected an interface (vif) that the station is there for")
    for key, name in (("cfg", kernel.cfg), ("initrd", kernel.initrd if kernel.initrd != "none" else "")):
        if name:
            _check_file((*path, key), name, source)
    for name in kernel.files.values():
        _check_file((*path, "files"), name, source, directory=True)
    for disk in kernel.disks:
        if isinstance(disk, DiskConfig) and disk.format not in ("", "raw"):
            raise Unexpected((*path, "disk"), f"expected a raw image: runs can't share one in {disk.format}")
        if isinstance(disk, DiskConfig) and not disk.target.startswith("/dev/"):
            _check_file((*path, "disk"), disk.target, source)


def _check_scenario(scenario: Scenario, path: Setting, source: Source) -> None:
    ways = [key for key in ("command", "python", "file") if getattr(scenario, key)]
    if len(ways) > 1 or (not ways and not scenario.boot):
        raise Unexpected(path, 'expected one of the keys "exec", "python" and "file" here, or boot = true')
    expect = scenario.expect
    if not scenario.command and (expect.status is not None or expect.output or expect.no_output):
        raise Unexpected((*path, "expect"), "status and output are of what exec runs")
    if scenario.file:
        for key in ("output", "no_output", "console", "ends"):
            if getattr(expect, key):
                raise Unexpected((*path, "expect"), f"{key} is not for scenarios from files: they check themselves")
        if scenario.file.endswith(".toml"):
            _check_file((*path, "file"), scenario.file, source)
    elif scenario.settings or scenario.domains:
        raise Unexpected((*path, "set" if scenario.settings else "domains"), "this goes with file = ...")
    if scenario.python:
        file, colon, name = scenario.python.rpartition(":")
        if not colon or not name.isidentifier() or not file.endswith(".py"):
            raise Unexpected((*path, "python"), f'expected "FILE.py:FUNCTION", not "{scenario.python}"')
        _check_file((*path, "python"), file, source)


def _check_faults(faults: Faults, path: Setting) -> None:
    """The rules can be read. Whether a host can have them shows when it is there."""
    for rule in faults.rules:
        try:
            fault_kinds.parse(rule)
        except FaultError as error:
            raise Unexpected(path, f"{rule!r}: {error}") from None


def _check_file(path: Setting, name: str, source: Source, *, directory: bool = False) -> None:
    found = source.directory / name
    if not (found.exists() if directory else found.is_file() or found.is_block_device()):
        raise Unexpected(path, f"expected a file: there is no {name}")


def describe() -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Every table that a file may have, with (key, what it may be, what it is for) of its settings."""
    tables: list[tuple[str, type[Any]]] = [
        ("[campaign]", Campaign), ("[kernels.NAME]", Kernel), ("[scenarios.NAME]", Scenario), ("expect", Expect),
        ("[faults.NAME]", Faults), ("[[include]]", Include), ("[[exclude]]", Choice), ("a disk in memory", MemoryDisk),
    ]  # fmt: skip
    return [(title, fields.describe(cls)) for title, cls in tables]

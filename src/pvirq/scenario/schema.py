"""What a scenario file may say, besides its workload."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pvirq.linux.personalities import KERNELS
from pvirq.scenario.fields import (
    Unexpected,
    boolean,
    choice,
    duration,
    integer,
    one_or_more,
    raw_table,
    setting,
    size,
    string,
    table,
    tables,
)
from pvirq.scenario.toml_lines import Path, line_of

if TYPE_CHECKING:
    from pvirq.scenario.workload import Workload

MAX_DOMAINS: Final = 10_000
STYLES: Final = ("source", "writeup")


class ScenarioError(Exception):
    """A scenario can't be run: one line with file, line and what was expected."""


@dataclass
class Source:
    """Where a scenario came from, for messages: a file's name and text, and what was changed from outside."""

    file: str = ""
    text: str = ""
    changed: dict[Path, str] = field(default_factory=dict)  # path of the setting -> NAME=VALUE

    def error(self, error: Unexpected) -> ScenarioError:
        """A setting is not what it should be: with file and line, or the option that set it."""
        for path, text in self.changed.items():
            if error.path[: len(path)] == path:
                return ScenarioError(f"--set {text}: {error}")
        return ScenarioError(f"{self.file}:{line_of(self.text, error.path)}: {error}")


@dataclass
class Disk:
    """A disk of a guest: a `disk` table of a domain."""

    name: str = setting(string(), 'what the guest calls it, as "xvda"')
    size: int = setting(size(4096, 1 << 40), "its size", 64 << 20)
    on: str = setting(
        string(),
        'the device of domain 0 that it lies on, by name ("ide0"), or "memory" for one without interrupts',
        "memory",
    )
    readonly: bool = setting(boolean(), "whether the guest may only read it", False)


@dataclass
class Vif:
    """A network interface of a guest: a `vif` table of a domain."""

    mac: str = setting(string(), "its address; one is made up from the domain's id", "")
    bridge: str = setting(
        string(), 'the bridge in domain 0 that it is on; a NIC of that bridge has it as "bridge"', "xenbr0"
    )


@dataclass
class Domain:
    """A guest: a `[[domain]]` table."""

    name: str = setting(string(), "its name, by which workloads and options mean it")
    kernel: str = setting(choice(*KERNELS), "what it runs", "2.6.18")
    vcpus: int = setting(integer(1, 32), "its virtual CPUs", 1)
    count: int = setting(
        integer(1, MAX_DOMAINS), 'how many such guests there are; of several the names end in "-1" and up', 1
    )
    style: str = setting(
        choice(*STYLES), "how its /proc/interrupts is set: as its source prints it, or as the write-up", "source"
    )
    disks: list[Disk] = setting(tables(table(Disk)), "its disks", [], key="disk")
    vifs: list[Vif] = setting(tables(table(Vif)), "its network interfaces", [], key="vif")


@dataclass
class Dom0:
    """Domain 0: the `[dom0]` table."""

    kernel: str = setting(choice(*KERNELS), "what it runs", "pvops")
    vcpus: int = setting(integer(1, 32), "its virtual CPUs", 2)
    style: str = setting(choice(*STYLES), "how its /proc/interrupts is set", "source")
    platform: str = setting(string(), "a machine with its devices, by name (see --list)", "")
    devices: list[dict[Any, Any]] = setting(
        tables(raw_table()), "devices one by one, each with a type (see --list) and what that takes", [], key="device"
    )


@dataclass
class Scenario:
    """A whole scenario."""

    title: str = setting(string(), "what it shows, in a line", "")
    seed: int = setting(integer(0, (1 << 63) - 1), "what all chance comes from: sectors, sizes, moments", 1)
    duration: int = setting(duration(), "virtual time that passes at least", 0)
    show: list[str] = setting(
        one_or_more(string()), "whose /proc/interrupts is printed where no option says whose; all domains'", []
    )
    dom0: Dom0 = setting(table(Dom0), "domain 0", None)
    domains: list[Domain] = setting(tables(table(Domain)), "the guests", [], key="domain")

    def __post_init__(self) -> None:
        self.dom0 = self.dom0 or Dom0()
        self.workload: list[Workload] = []  # the loader puts them in
        self.source = Source()  # likewise

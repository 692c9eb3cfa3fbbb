"""Guests of a pytest session: what a test's mark wants, and the booted guests that tests run in copies of."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from pvirq.lab.pytest_plugin.run import Settings, Tail, options_of, tail_of
from pvirq.toolstack.kernels import BusyboxNotFound, KernelChoice, KernelNotFound, fetch_kernel, find_busybox

if TYPE_CHECKING:
    from pvirq.guest import Guest
    from pvirq.host import Host

UNITS: Final = {"": 20, "K": 10, "M": 20, "G": 30}
BOOT_S: Final = 120.0  # of the guest's time
CONNECT_S: Final = 10.0
STATION: Final = "10.0.0.1/24"
FRONTENDS: Final = {"disks": "xen_blkfront", "nics": "xen_netfront"}
XENBUS_CONNECTED: Final = "4"


@dataclass(frozen=True)
class GuestSpec:
    """What a guest and its host are like; equal ones share a boot."""

    kernel: str = "cloud"
    append: str = ""
    memory: int = 256 << 20
    vcpus: int = 1
    disks: tuple[tuple[str, str | int], ...] = ()  # name in the guest; bytes of an empty one in memory, or an image
    nics: int = 0
    modules: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()  # path in the guest; file here
    dom0_kernel: str = "pvops"
    hardware: str = "none"
    dom0_vcpus: int = 2

    @classmethod
    def of(cls, item: pytest.Item) -> GuestSpec:
        """What a test's marks say. UsageError."""
        options = options_of(item, "pvirq_guest", tuple(field.name for field in fields(cls)))
        options.setdefault("kernel", item.config.getini("pvirq_kernel"))
        root = item.config.rootpath
        try:
            return cls(**{name: _READERS.get(name, _as_it_is)(value, root) for name, value in options.items()})
        except (TypeError, ValueError) as error:
            raise pytest.UsageError(f"pvirq_guest: {error}") from None


def _as_it_is(value: Any, root: Path) -> Any:
    return value


def _size(text: str | int) -> int:
    """Bytes: "512M", "1G", "65536K"; a number by itself is MiB, as xl's are."""
    found = re.fullmatch(r"(\d+)([KMG]?)i?B?", str(text))
    if not found:
        raise ValueError(f"{text!r} is no size like 512M")
    return int(found[1]) << UNITS[found[2]]


def _disks(disks: Mapping[str, str | int], root: Path) -> tuple[tuple[str, str | int], ...]:
    return tuple((vdev, _disk(target, root)) for vdev, target in disks.items())


def _disk(target: object, root: Path) -> str | int:
    try:
        return _size(str(target))
    except ValueError:
        return str(root / str(target))


def _file(path: object, root: Path) -> str:
    """A path of the project's, where there is such a file; any other name as it is."""
    return str(root / str(path)) if (root / str(path)).is_file() else str(path)


_READERS: Final[dict[str, Any]] = {
    "kernel": _file,
    "memory": lambda value, root: _size(value),
    "disks": _disks,
    "modules": lambda names, root: tuple(_file(name, root) for name in names),
    "files": lambda files, root: tuple((str(path).lstrip("/"), str(root / str(file))) for path, file in files.items()),
}


@dataclass
class Booted:
    """A guest that has booted, on a host of its own, and never runs again but in copies; or why there is none."""

    spec: GuestSpec
    host: Host | None = None
    guest: Guest | None = None
    skip: str = ""  # it can't be had here
    error: str = ""
    tail: Tail | None = None  # of its trace, which goes on in copies: to begin one takes its kernel's symbols, and time
    said: list[str] = field(default_factory=list)  # what the toolstack reported


class Guests:
    """The booted guests of a session."""

    def __init__(self) -> None:
        self._booted: dict[GuestSpec, Booted] = {}
        self._specs: dict[str, GuestSpec | pytest.UsageError] = {}  # by a test's node id
        self._expected: Counter[GuestSpec] = Counter()
        self.used_up = False  # the test runs on the guest itself

    def expect(self, items: Sequence[pytest.Item]) -> None:
        """These tests will come: a guest goes after the last of its own."""
        for item in items:
            spec = self._spec(item)
            if isinstance(spec, GuestSpec):
                self._expected[spec] += 1

    def _spec(self, item: pytest.Item) -> GuestSpec | pytest.UsageError:
        if item.nodeid not in self._specs:
            try:
                self._specs[item.nodeid] = GuestSpec.of(item)
            except pytest.UsageError as error:
                self._specs[item.nodeid] = error
        return self._specs[item.nodeid]

    def prepare(self, item: pytest.Item) -> None:
        """Boot a test's guest, if nobody has and the test isn't skipped anyhow; what goes wrong, `check` says."""
        spec = self._spec(item)
        if isinstance(spec, GuestSpec) and spec not in self._booted and not _will_not_run(item):
            self._booted[spec] = boot(spec, Settings.of(item.config).trace_lines)

    def of(self, item: pytest.Item) -> Booted | None:
        """A test's guest; None where there is none."""
        spec = self._spec(item)
        booted = self._booted.get(spec) if isinstance(spec, GuestSpec) else None
        return booted if booted is not None and booted.guest is not None else None

    def check(self, item: pytest.Item) -> None:
        """Skip or fail where a test can't have its guest."""
        spec = self._spec(item)
        if isinstance(spec, pytest.UsageError):
            raise spec
        booted = self._booted.get(spec)
        if booted is not None and booted.skip:
            pytest.skip(booted.skip)
        if booted is not None and booted.error:
            pytest.fail(booted.error, pytrace=False)

    def done(self, item: pytest.Item) -> None:
        """A test is over; its guest goes with the last one, or with one that ran on it."""
        spec = self._spec(item)
        if isinstance(spec, GuestSpec):
            self._expected[spec] -= 1
            if self._expected[spec] <= 0 or self.used_up:
                self._drop(spec)
        self.used_up = False

    def _drop(self, spec: GuestSpec) -> None:
        booted = self._booted.pop(spec, None)
        if booted is not None and booted.host is not None:
            booted.host.close()

    def close(self) -> None:
        """Free all."""
        for spec in list(self._booted):
            self._drop(spec)


_GUESTS: Final = pytest.StashKey[Guests]()


def guests_of(config: pytest.Config) -> Guests:
    """The session's."""
    if _GUESTS not in config.stash:
        config.stash[_GUESTS] = Guests()
    return config.stash[_GUESTS]


def _will_not_run(item: pytest.Item) -> bool:
    """A mark skips it, or only the plan is wanted."""
    from _pytest.skipping import evaluate_skip_marks

    if item.config.getoption("setupplan", False):
        return True
    try:
        return evaluate_skip_marks(item) is not None
    except Exception:  # the mark is wrong, and pytest will say so
        return True


# -- booting -----------------------------------------------------------------------------------------------------------


def boot(spec: GuestSpec, trace_lines: int = 0) -> Booted:
    """Boot a guest until it takes commands, first-in-first-out: always the same."""
    from pvirq.abi.errno import XenError
    from pvirq.crash import last_words
    from pvirq.engine import EngineError
    from pvirq.guest import GuestError
    from pvirq.host import Host
    from pvirq.pv.builder import BuildError
    from pvirq.pv.image import ImageError
    from pvirq.schedule import Schedule
    from pvirq.toolstack.modules import ModuleError

    booted = Booted(spec)
    host = None
    try:
        kernel, initrd = _images(spec, booted.said)
        host = Host(
            seed=Schedule.fifo(), dom0_kernel=spec.dom0_kernel, hardware=spec.hardware, dom0_vcpus=spec.dom0_vcpus
        )
        guest = _build(host, spec, kernel, initrd)
        guest.await_agent(BOOT_S)
        _connect(host, guest)
        guest.proc_interrupts()  # stays on the console: what is known of it should it never answer again
        booted.tail = tail_of(host, trace_lines)
        booted.host, booted.guest = host, guest
    except (KernelNotFound, BusyboxNotFound) as error:
        booted.skip = f"no kernel or busybox for a guest: {error}"
    except (GuestError, ImageError, BuildError, EngineError, ModuleError, XenError, OSError, LookupError) as error:
        words = last_words(host.guests[0]) if host is not None and host.guests else []
        booted.error = "\n".join([f"the guest doesn't boot: {error}", *booted.said, *words])
    finally:
        if host is not None and booted.host is None:
            host.close()
    return booted


def _build(host: Host, spec: GuestSpec, kernel: KernelChoice, initrd: bytes) -> Guest:
    from pvirq.drivers.blockstore import SECTOR, MemoryStore

    if spec.nics:
        host.station(STATION)
    guest = host.boot(
        kernel.path, initrd=initrd, append=f"console=hvc0 pvirq=agent {spec.append}".rstrip(), memory=spec.memory,
        vcpus=spec.vcpus,
    )  # fmt: skip
    for vdev, target in spec.disks:
        host.attach_disk(guest, vdev, MemoryStore(target // SECTOR) if isinstance(target, int) else target)
    for devid in range(spec.nics):
        host.attach_nic(guest, devid=devid)
    return guest


def _connect(host: Host, guest: Guest) -> None:
    """Run until its devices are connected, if it has drivers for them."""
    from pvirq.toolstack.devices import DeviceRef, vdev_number
    from pvirq.xen.timer import NS_PER_S

    domid = guest.domain.domid
    refs = [DeviceRef(domid, "vbd", vdev_number(disk.vdev)) for disk in guest.config.disks]
    refs += [DeviceRef(domid, "vif", number) for number, _ in enumerate(guest.config.vifs)]
    states = [f"{ref.backend}/state" for ref in refs]
    host.run(
        lambda: all(host.store.read_text(state) == XENBUS_CONNECTED for state in states), int(CONNECT_S * NS_PER_S)
    )


def _images(spec: GuestSpec, said: list[str]) -> tuple[KernelChoice, bytes]:
    """Its kernel, and an initrd with the agent and its modules and files."""
    from pvirq.pv.symbols import system_map_for
    from pvirq.toolstack.initrd import default_initrd

    if "/" in spec.kernel:
        path = Path(spec.kernel)
        kernel = KernelChoice(path, "named", "", system_map_for(path), None)
    else:
        kernel = fetch_kernel(spec.kernel, said.append)
    busybox = find_busybox(said.append)
    files: dict[str, bytes | Path] = {name: Path(file) for name, file in spec.files}
    return kernel, default_initrd(busybox, files, _modules(spec, kernel))


def _modules(spec: GuestSpec, kernel: KernelChoice) -> list[tuple[str, bytes]]:
    """Those that are wanted, in loading order with what they depend on: names are the kernel's, paths files here."""
    from pvirq.toolstack import modules
    from pvirq.toolstack.kernels import image_release

    contents = []
    for path in (Path(path) for path in spec.modules if "/" in path):
        content = modules.decompress(path.name, path.read_bytes())
        name = next(iter(modules.modinfo(content, "name")), None) or modules.module_name(path.name) or path.stem
        contents.append((name, content))
    own = {name for name, _ in contents}
    drivers = [driver for kind, driver in FRONTENDS.items() if getattr(spec, kind) and driver not in own]
    needed = [name for _, content in contents for name in modules.dependencies(content)[0] if name not in own]
    names = [*(name for name in spec.modules if "/" not in name), *drivers, *needed]
    directory = kernel.modules_dir
    if directory is None:
        release = image_release(kernel.path)
        places = (kernel.path.parent / "modules", Path("/lib/modules") / release)
        directory = next((place for place in places if release and place.is_dir()), None)
    if directory is None:
        if set(names) - set(drivers):
            raise modules.ModuleError(f"no modules of {kernel.path} are at hand, for {', '.join(names)}")
        return contents  # the drivers are built in, or their disks and interfaces are nobody's
    return [*modules.read_modules(directory, names), *contents]

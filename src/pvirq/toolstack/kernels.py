"""Where a kernel comes from when the user names none: the cache, /boot, or the distribution's package.

The same for a static busybox, which the default initrd is made of. The first use of a package downloads it,
later ones find it in the cache (pvirq.toolstack.cache).
"""

from __future__ import annotations

import json
import re
import struct
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pvirq.toolstack import modules, packages
from pvirq.toolstack.cache import Cache, CacheError, write_atomic
from pvirq.toolstack.packages import FetchError, Report, Source

# The machine's own kernels. Arch and Fedora have them beside their modules, too.
BOOT_PATTERNS: Final = ("boot/vmlinuz*", "lib/modules/*/vmlinuz")
BUSYBOX_PATHS: Final = ("bin/busybox", "usr/bin/busybox", "sbin/busybox", "usr/sbin/busybox")

# What the flavours are called: "cloud" is the smaller kernel for guests, where there is one. Candidates are
# tried in order, so that of Debian's and Ubuntu's names the ones that exist are found.
_FLAVOURS: Final = {
    ("apt-get", "cloud"): ("linux-image-cloud-amd64", "linux-image-virtual"),
    ("apt-get", "generic"): ("linux-image-amd64", "linux-image-generic"),
    ("dnf", "cloud"): ("kernel-core",),
    ("dnf", "generic"): ("kernel-core",),
}
# An image with what it is split into: Ubuntu has System.map and the modules in linux-modules-<release>.
_APT_PARTS: Final = r"linux-(?:image|image-unsigned|binary|modules)-\d.*"
_DNF_PARTS: Final = ("kernel-modules-core",)
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._~-]*")
_GIVE_KERNEL: Final = "give a KERNEL path"
# Debian's packages have a System.map of one line that says where the real one is.
_MAP_MIN: Final = 4096


class KernelNotFound(Exception):
    """No kernel could be found or fetched. The message is one line and says what to do."""


class BusyboxNotFound(Exception):
    """No static busybox could be found or fetched. The message is one line and says what to do."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """A kernel image to boot. `origin` says where it is from, `version` is as uname -r has it.

    `modules_dir` is laid out as /lib/modules/<version>; that of a fetched kernel holds only what a PV guest
    can use.
    """

    path: Path
    origin: str
    version: str
    system_map: Path | None
    modules_dir: Path | None
    config: Path | None = None


def find_kernel(report: Report, cache: Cache | None = None, root: Path = Path("/")) -> KernelChoice:
    """A kernel for `pvirq boot` without KERNEL: a cached one, else the machine's newest, else a package.

    `report` gets a line that says which and why, and one before anything slow. `root` is where /boot is.
    KernelNotFound if there is none.
    """
    cache = cache or _cache(KernelNotFound)
    if choice := _cached_kernel(cache):
        report(f"using cached kernel {choice.origin}")
        return choice
    choice, unreadable = _own_kernel(root)
    if choice:
        report(f"using this machine's kernel {choice.path}")
        return choice
    hint = ""
    if unreadable:
        hint = f"{unreadable} can be read by root only; to use it, sudo chmod a+r {unreadable}"
        report(hint)
    try:
        return fetch_kernel("cloud", report, cache)
    except KernelNotFound as error:
        if hint:
            raise KernelNotFound(f"{error}; or {hint}") from error
        raise


def fetch_kernel(which: str, report: Report, cache: Cache | None = None) -> KernelChoice:
    """The kernel of a flavour ("cloud", "generic") or of a package named in full, cached or else fetched.

    Fetches at most once, even if several processes ask at once. KernelNotFound if it can't be had.
    """
    cache = cache or _cache(KernelNotFound)
    if not _NAME.fullmatch(which):
        raise KernelNotFound(f"{which!r} is no name of a kernel package; {_GIVE_KERNEL}")
    try:
        if choice := _cached_kernel(cache, which):
            return choice
        with _fetch_lock(cache, report):
            if choice := _cached_kernel(cache, which):  # another process was first
                return choice
            name = _fetch_kernel_package(which, report, cache)
            cache.alias("kernels", which, name)
    except (FetchError, CacheError) as error:
        raise KernelNotFound(f"no kernel: {error}; {_GIVE_KERNEL}") from error
    except OSError as error:
        raise KernelNotFound(f"no kernel: {error.filename or cache.root}: {error.strerror}; {_GIVE_KERNEL}") from error
    choice = _cached_kernel(cache, which)
    if choice is None:
        raise KernelNotFound(f"no kernel: {cache.root} was cleared meanwhile; {_GIVE_KERNEL}")
    return choice


def find_busybox(report: Report, cache: Cache | None = None, root: Path = Path("/")) -> Path:
    """A statically linked x86-64 busybox: cached, this machine's, or its distribution's package.

    BusyboxNotFound if there is none.
    """
    cache = cache or _cache(BusyboxNotFound)
    if cached := _cached_busybox(cache):
        return cached
    for name in BUSYBOX_PATHS:
        if is_static(root / name):
            return root / name
    try:
        with _fetch_lock(cache, report):
            return _cached_busybox(cache) or _fetch_busybox_package(report, cache)
    except (FetchError, CacheError) as error:
        raise BusyboxNotFound(f"no static busybox: {error}; install busybox-static or give an initrd") from error
    except OSError as error:
        where = error.filename or cache.root
        raise BusyboxNotFound(f"no static busybox: {where}: {error.strerror}; give an initrd") from error


def is_static(path: Path) -> bool:
    """Whether a file is an x86-64 ELF program without interpreter (PT_INTERP). False if it can't be read."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    if len(head) < 64 or head[:6] != b"\x7fELF\x02\x01":
        return False
    kind, machine = struct.unpack_from("<HH", head, 16)
    (table,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    if kind not in (2, 3) or machine != 62 or size < 56 or table + size * count > len(head):
        return False
    types = [struct.unpack_from("<I", head, table + i * size)[0] for i in range(count)]
    return 1 in types and 3 not in types  # PT_LOAD, PT_INTERP


def image_release(path: Path) -> str:
    """The release in a bzImage's header, else what follows "vmlinuz-" in its name, else "".

    Linux Documentation/arch/x86/boot.rst: "HdrS" at 0x202, and at 0x20e the version string's offset less
    0x200.
    """
    with path.open("rb") as file:
        head = file.read(0x10000)
    if head[0x202:0x206] == b"HdrS":
        (offset,) = struct.unpack_from("<H", head, 0x20E)
        words = head[offset + 0x200 : offset + 0x280].partition(b"\0")[0].split() if offset else []
        if words:
            return words[0].decode("ascii", "replace")
    return path.name.partition("-")[2]


def version_key(version: str) -> list[tuple[int, int | str]]:
    """Sorts versions naturally: 6.1.0-9 before 6.1.0-10, and a release candidate before its release."""
    parts = re.findall(r"\d+|[a-z]+", version.lower())
    # Numbers sort behind an end of string, "rc" before it.
    return [(2, int(part)) if part.isdigit() else ((-1 if part == "rc" else 1), part) for part in parts] + [(0, 0)]


def _cache(error: type[Exception]) -> Cache:
    try:
        return Cache()
    except CacheError as problem:
        raise error(str(problem)) from problem


def _fetch_lock(cache: Cache, report: Report) -> AbstractContextManager[None]:
    return cache.lock("fetch", lambda: report("waiting for another pvirq that is fetching a package ..."))


def _cached_kernel(cache: Cache, which: str | None = None) -> KernelChoice | None:
    """By name or flavour; without either the cloud flavour, then the newest."""
    if which is None:
        names = [entry.name for entry in cache.entries() if entry.kind == "kernels"]
        names = ["cloud", *sorted(names, key=version_key, reverse=True)]
    else:
        names = [which]
    for name in names:
        directory = cache.get("kernels", name)
        try:
            info = json.loads((directory / "info.json").read_text()) if directory else None
        except (OSError, ValueError):
            continue
        if directory and isinstance(info, dict) and (directory / "vmlinuz").is_file():
            origin = f"{info.get('package', directory.name)} ({info.get('version', '?')})"
            return KernelChoice(
                directory / "vmlinuz",
                origin,
                str(info.get("release", "")),
                _if_there(directory / "System.map"),
                _if_there(directory / "modules"),
                _if_there(directory / "config"),
            )
    return None


def _own_kernel(root: Path) -> tuple[KernelChoice | None, Path | None]:
    """This machine's newest kernel with Xen notes, and one that could not be read."""
    candidates: list[tuple[str, Path]] = []
    unreadable: list[Path] = []
    seen: set[Path] = set()
    for path in sorted(found for pattern in BOOT_PATTERNS for found in root.glob(pattern)):
        if (resolved := path.resolve()) in seen:  # /boot/vmlinuz is a link to one of them
            continue
        seen.add(resolved)
        try:
            if resolved.is_file():
                candidates.append((image_release(resolved), resolved))
        except OSError:
            unreadable.append(resolved)
    for release, path in sorted(candidates, key=lambda candidate: version_key(candidate[0]), reverse=True):
        if _has_xen_notes(path):
            choice = KernelChoice(
                path,
                "this machine",
                release,
                _system_map(root / f"boot/System.map-{release}"),
                _if_there(root / f"lib/modules/{release}"),
                _if_there(root / f"boot/config-{release}"),
            )
            return choice, None
    unreadable.sort(key=lambda path: version_key(path.name))
    return None, unreadable[-1] if unreadable else None


def _has_xen_notes(path: Path) -> bool:
    from pvirq.pv.image import has_xen_notes

    return has_xen_notes(path)


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _system_map(path: Path) -> Path | None:
    try:
        with path.open("rb") as file:  # root's alone on some systems
            return path if len(file.read(_MAP_MIN)) == _MAP_MIN else None
    except OSError:
        return None


def _tool() -> str:
    tool = packages.available_tool()
    if tool is None:
        raise FetchError("there is neither apt-get nor dnf to fetch a package with")
    return tool


def _fetch_kernel_package(which: str, report: Report, cache: Cache) -> str:
    """Make the cache entry, and return its name."""
    tool = _tool()
    also = _APT_PARTS if tool == "apt-get" else _DNF_PARTS if (tool, which) in _FLAVOURS else ()
    source = Source(tool, _FLAVOURS.get((tool, which), (which,)), also)
    with cache.staging() as staging:
        (staging / "packages").mkdir()
        fetched = packages.fetch(source, staging / "packages", cache, report)
        if cache.get("kernels", fetched.name):  # asked for by another name: Ubuntu's flavours are one package
            return fetched.name
        report(f"unpacking {fetched.name} ...")
        entry = staging / "entry"
        entry.mkdir()
        _unpack_kernel(fetched.files, entry)
        vmlinuz = entry / "vmlinuz"
        if not vmlinuz.exists():
            raise FetchError(f"package {fetched.name} has no vmlinuz")
        if not _has_xen_notes(vmlinuz):
            raise FetchError(f"the kernel in {fetched.name} is not built to run under Xen PV")
        info = {"package": fetched.name, "version": fetched.version, "release": image_release(vmlinuz)}
        write_atomic(entry / "info.json", json.dumps(info, indent=1).encode())
        cache.publish(entry, "kernels", fetched.name)
    return fetched.name


def _unpack_kernel(files: tuple[Path, ...], entry: Path) -> None:
    """vmlinuz, System.map and config, and of the modules those a guest can use, with what they depend on."""
    pool: dict[str, bytes] = {}
    paths: dict[str, str] = {}  # module -> its path below lib/modules/<release>
    for file in files:
        for path, data in packages.members(file):
            # boot/vmlinuz-<release> and the like (Debian, Ubuntu), or lib/modules/<release>/vmlinuz (Fedora)
            match = re.fullmatch(r"(?:usr/)?(?:boot|lib/modules/[^/]+)/(vmlinuz|System\.map|config)(?:-[^/]+)?", path)
            if match and not (match[1] == "System.map" and len(data) < _MAP_MIN):
                (entry / match[1]).write_bytes(data)
            match = re.fullmatch(r"(?:usr/)?lib/modules/[^/]+/(.+)", path)
            if match and match[1] == "modules.builtin":
                (entry / "modules").mkdir(exist_ok=True)
                (entry / "modules/modules.builtin").write_bytes(data)
            elif match and modules.POOL.match(match[1]) and (name := modules.module_name(path)):
                try:
                    pool[name] = modules.decompress(path, data)
                except modules.ModuleError as error:
                    raise FetchError(str(error)) from error
                paths[name] = match[1].partition(".ko")[0] + ".ko"
    builtin = modules.builtin_modules(entry / "modules")
    for wanted in modules.KEPT:
        try:
            names = modules.load_order([wanted], pool, builtin)
        except modules.ModuleError:
            continue  # not in this kernel, or it needs something that a guest has no use for
        for name in names:
            target = entry / "modules" / paths[name]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(pool[name])


def _cached_busybox(cache: Cache) -> Path | None:
    directory = cache.get("busybox", "busybox")
    return directory / "busybox" if directory and (directory / "busybox").is_file() else None


def _fetch_busybox_package(report: Report, cache: Cache) -> Path:
    tool = _tool()
    name = "busybox-static" if tool == "apt-get" else "busybox"
    with cache.staging() as staging:
        (staging / "packages").mkdir()
        fetched = packages.fetch(Source(tool, (name,)), staging / "packages", cache, report)
        entry = staging / "entry"
        entry.mkdir()
        for path, data in packages.members(fetched.files[0]):
            if path in BUSYBOX_PATHS:
                (entry / "busybox").write_bytes(data)
                (entry / "busybox").chmod(0o755)
        if not is_static(entry / "busybox"):
            raise FetchError(f"package {fetched.name} has no static busybox for x86-64")
        return cache.publish(entry, "busybox", "busybox") / "busybox"

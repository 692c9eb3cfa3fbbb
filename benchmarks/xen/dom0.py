"""Domain 0 of the real Xen: Debian's kernel and Xen tools in an initrd, no disk needed.

The packages are downloaded once and unpacked into pvirq's cache (kind "dom0"); nothing is installed. There are
linux-image-amd64, xen-utils-4.17 with the libraries it needs, and for the hotplug scripts bash and flock; all else is
busybox.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from pvirq.toolstack import modules, packages
from pvirq.toolstack.cache import Cache
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.packages import Source

HERE = Path(__file__).parent
KIND, ALIAS = "dom0", "xen-4.17"
TOOLS = (
    Source("apt-get", ("xen-utils-4.17",), r"xen-utils-.*|xenstore-utils|lib.*|zlib1g"),
    Source("apt-get", ("bash",)),
    Source("apt-get", ("util-linux",)),
)
KERNEL = Source("apt-get", ("linux-image-amd64",), r"linux-image-\d.*")
# In this order they are loaded.
MODULES = (
    *("xenfs", "xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc"),
    *("loop", "bridge", "xen-blkback", "xen-netback"),
)
_POOL = ("drivers/xen/", "drivers/block/", "drivers/net/xen-netback/", "net/bridge/", "net/802/", "net/llc/", "lib/")
# What domain 0 has no use for: HVM guests' firmware, Python, and what only a reader needs.
_LEFT_OUT = (
    "./usr/share/", "./usr/lib/xen-4.17/boot/", "./usr/lib/xen-4.17/lib/", "./usr/lib/x86_64-linux-gnu/gconv/",
    "./etc/init.d/",
)  # fmt: skip
_ONLY = {"util-linux": ("./usr/bin/flock",)}


@dataclass(frozen=True)
class Dom0:
    """What was unpacked: the kernel, its modules (laid out as /lib/modules/RELEASE), the tools' file system."""

    kernel: Path
    modules: Path
    root: Path

    def initrd(self, busybox: Path, files: Mapping[str, bytes | Path]) -> bytes:
        """An initramfs of the tools, the agent (agent.sh) and `files`."""
        paths = (path for path in self.root.rglob("*") if path.is_symlink() or not path.is_dir())
        tools = {str(path.relative_to(self.root)): path for path in paths}
        own = {
            "etc/rc": (HERE / "agent.sh").read_bytes(),
            "lab/guest": (HERE / "guest.sh").read_bytes(),
        }
        loaded = modules.read_modules(self.modules, MODULES)
        return default_initrd(busybox, {**tools, **own, **files}, loaded)


def prepare(report: Callable[[str], None]) -> Dom0:
    """Domain 0's parts, from the cache or else downloaded. FetchError, CacheError."""
    cache = Cache()
    directory = cache.get(KIND, ALIAS)
    if directory is None:
        with cache.lock("fetch", lambda: report("waiting for another pvirq that is fetching a package ...")):
            directory = cache.get(KIND, ALIAS) or _fetch(cache, report)
    return Dom0(directory / "vmlinuz", directory / "modules", directory / "root")


def _fetch(cache: Cache, report: Callable[[str], None]) -> Path:
    with cache.staging() as staging:
        entry = staging / "entry"
        (entry / "root").mkdir(parents=True)
        names = []
        for number, source in enumerate((*TOOLS, KERNEL)):
            into = staging / str(number)
            into.mkdir()
            fetched = packages.fetch(source, into, cache, report)
            names.append(f"{fetched.name}_{fetched.version}")
            report(f"unpacking {fetched.name} ...")
            if source is KERNEL:
                _unpack_kernel(fetched.files, entry)
            else:
                for package in fetched.files:
                    _unpack_tools(package, entry / "root", _ONLY.get(fetched.name, ("./",)))
        (entry / "packages").write_text("\n".join(names) + "\n")
        name = f"{names[0]}-{names[-1]}"
        path = cache.publish(entry, KIND, name)
    cache.alias(KIND, ALIAS, name)
    return path


def _unpack_kernel(files: tuple[Path, ...], entry: Path) -> None:
    for package in files:
        for path, data in packages.members(package):
            _, _, below = path.removeprefix("usr/").partition("lib/modules/")
            name = below.partition("/")[2]  # without the release
            if path.startswith("boot/vmlinuz"):
                (entry / "vmlinuz").write_bytes(data)
            elif name == "modules.builtin" or name.removeprefix("kernel/").startswith(_POOL):
                target = entry / "modules" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)


def _unpack_tools(package: Path, root: Path, only: tuple[str, ...]) -> None:
    """A package's files below `only` but for what is left out, with symbolic links and permissions."""
    data = packages.run(["dpkg-deb", "--fsys-tarfile", str(package)])
    with tarfile.open(fileobj=BytesIO(data)) as tar:
        names = [member for member in tar if not member.isdir() and member.name.startswith(only)]
        tar.extractall(root, [it for it in names if not it.name.startswith(_LEFT_OUT)], filter="tar")

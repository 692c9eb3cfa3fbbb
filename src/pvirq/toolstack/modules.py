"""Kernel modules: which ones a PV guest may want, what they depend on, in what order to load them.

A package's modules.dep is made when it is installed; unpacked packages have none, so dependencies are read
from the modules' own .modinfo (Linux include/linux/module.h: "depends=", "softdep=pre: ...", "alias=").
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import zstandard

# What is kept of a fetched package: the front ends, what user space talks to Xen through, and file systems to
# mount a disk with. That is 0.8 MB of 90 (Debian's cloud kernel) or 3.2 MB of 390 (generic); what needs
# hardware or a dom0 can't work in a guest without either.
KEPT: Final = (
    *("xen-blkfront", "xen-netfront", "xen-pcifront"),
    *("xenfs", "xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc"),
    *("ext4", "squashfs", "isofs"),
)
# Where those and their dependencies are, so that not all of a package has to be held in memory.
POOL: Final = re.compile(
    r"kernel/(?:drivers/(?:xen|block/xen|net/xen|pci/xen)|fs/(?:ext4|jbd2|squashfs|isofs|mbcache)|lib|crypto/crc|"
    r"arch/x86/crypto/crc|drivers/cdrom)"
)
_FILE: Final = re.compile(r"(.+)\.ko(?:\.(?:gz|xz|zst))?")


class ModuleError(Exception):
    """A module is missing or can't be unpacked; the message is one line."""


def module_name(path: str) -> str | None:
    """The name of the module in a file, with underscores as in lsmod; None if it is no module."""
    match = _FILE.fullmatch(path.rpartition("/")[2])
    return _underscored(match[1]) if match else None


def decompress(path: str, data: bytes) -> bytes:
    """A module as the kernel loads it. ModuleError if it is damaged."""
    try:
        if path.endswith(".xz"):
            return lzma.decompress(data)
        if path.endswith(".gz"):
            return gzip.decompress(data)
        if path.endswith(".zst"):
            return zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    except (lzma.LZMAError, OSError, EOFError, zstandard.ZstdError) as error:
        raise ModuleError(f"cannot unpack {path}: {error}") from error
    return data


def modinfo(module: bytes, key: str) -> list[str]:
    """The values of one key in a module's .modinfo, such as "depends" or "alias"."""
    # The strings lie between NULs; what comes before the first one is another section's end.
    values = re.findall(rb"(?<![\x20-\x7e])" + key.encode() + rb"=([^\0]*)\0", module)
    return [value.decode("ascii", "replace") for value in values]


def dependencies(module: bytes) -> tuple[list[str], list[str]]:
    """What has to be loaded before a module, and what (names or aliases) should be if there is such."""
    hard = [name for names in modinfo(module, "depends") for name in names.split(",") if name]
    softdeps = [text.partition("pre:")[2].partition("post:")[0] for text in modinfo(module, "softdep")]
    soft = [name for names in softdeps for name in names.split()]
    return [_underscored(name) for name in hard], [_underscored(name) for name in soft]


def load_order(wanted: Sequence[str], pool: Mapping[str, bytes], builtin: Iterable[str] = ()) -> list[str]:
    """`wanted` and what they depend on, each behind its dependencies. ModuleError for one that is nowhere.

    `pool` maps names to contents, `builtin` are the names in the kernel itself.
    """
    present = set(builtin)
    aliases: dict[str, str] = {}
    for name in sorted(pool):  # so that crc32c_generic comes before crc32c_intel, which not every CPU takes
        for alias in modinfo(pool[name], "alias"):
            aliases.setdefault(_underscored(alias), name)
    order: list[str] = []
    seen = set(present)

    def visit(name: str, required: bool) -> None:
        if name not in pool and name not in seen:
            name = aliases.get(name, name)
        if name in seen:
            return
        if name not in pool:
            if required:
                raise ModuleError(f"no kernel module {name}")
            return
        seen.add(name)
        hard, soft = dependencies(pool[name])
        for dependency in soft:
            visit(dependency, False)
        for dependency in hard:
            visit(dependency, True)
        order.append(name)

    for name in wanted:
        visit(_underscored(name), True)
    return order


def builtin_modules(modules_dir: Path) -> set[str]:
    """The names in modules.builtin; none if there is no such file."""
    try:
        lines = (modules_dir / "modules.builtin").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {name for line in lines if (name := module_name(line))}


def read_modules(modules_dir: Path, wanted: Sequence[str]) -> list[tuple[str, bytes]]:
    """(name, content) of the modules `wanted` and their dependencies, in loading order: initrd's `modules`.

    Works on /lib/modules/<release> as on a KernelChoice's modules_dir. Those built into the kernel are left
    out. ModuleError if one is missing, OSError if a file can't be read.
    """
    files = {name: path for path in sorted(modules_dir.rglob("*.ko*")) if (name := module_name(path.name))}
    builtin = builtin_modules(modules_dir)
    pool: dict[str, bytes] = {}
    queue = [_underscored(name) for name in wanted]
    while queue:
        name = queue.pop()
        if name in files and name not in pool:
            pool[name] = decompress(files[name].name, files[name].read_bytes())
            hard, soft = dependencies(pool[name])
            # A soft one may be an alias, as crypto-crc32c of crc32c_generic; the file's name begins alike.
            stems = [f"{name.removeprefix('crypto_')}_" for name in soft]
            queue += hard + soft + [file for file in files if any(file.startswith(stem) for stem in stems)]
    try:
        return [(name, pool[name]) for name in load_order(wanted, pool, builtin)]
    except ModuleError as error:
        raise ModuleError(f"{error} in {modules_dir}") from None


def _underscored(name: str) -> str:
    return name.replace("-", "_")

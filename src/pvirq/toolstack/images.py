"""What a guest is booted with when its user says little: its kernel's image, its initrd, its kernel parameters."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import zstandard

from pvirq.pv.builder import BuildError
from pvirq.pv.image import ImageError, KernelImage, decompress, parse_elf, read_image
from pvirq.pv.symbols import system_map_for
from pvirq.toolstack import initrd as initrds
from pvirq.toolstack import modules
from pvirq.toolstack.cache import Cache, CacheError, write_atomic
from pvirq.toolstack.kernels import KernelChoice, fetch_kernel, find_busybox, find_kernel, image_release
from pvirq.toolstack.packages import Report

FLAVOURS: Final = ("cloud", "generic")
NO_INITRD: Final = "none"
# A kernel that took longer to unpack (xz and bzip2 do) is kept unpacked. Reading it back takes 0.06 s.
SLOW_S: Final = 0.2


def choose_kernel(kernel: str | None, report: Report) -> KernelChoice:
    """The kernel that is named (a file, or else one of the cache), or one that is found or fetched."""
    if kernel is not None and (os.path.lexists(kernel) or not _in_cache(kernel)):
        return KernelChoice(Path(kernel), "named", "", system_map_for(kernel), None)
    return find_kernel(report) if kernel is None else fetch_kernel(kernel, report)


def _modules_of(kernel: Path) -> Path | None:
    """Where the modules of a kernel's file are: beside it, or this machine's."""
    with contextlib.suppress(OSError):
        release = image_release(kernel)
        for directory in (kernel.parent / "modules", Path("/lib/modules") / release):
            if release and directory.is_dir():
                return directory
    return None


def _in_cache(name: str) -> bool:
    if name in FLAVOURS:
        return True
    with contextlib.suppress(CacheError):
        return any(name in (entry.name, *entry.aliases) for entry in Cache().entries() if entry.kind == "kernels")
    return False


def load_kernel(path: Path) -> KernelImage:
    """`pvirq.pv.image.load_image`, with slowly unpacked kernels kept in the cache. ImageError as there."""
    try:
        packed = read_image(path)
        cache = _cache()
        name = hashlib.sha256(packed).hexdigest()[:32]
        if cache and (directory := cache.get("unpacked", name)):
            # A damaged file there counts as none.
            with contextlib.suppress(ImageError, OSError, zstandard.ZstdError, MemoryError):
                return parse_elf(zstandard.ZstdDecompressor().decompress((directory / "vmlinux.zst").read_bytes()))
        began = time.monotonic()
        unpacked = decompress(packed)
        took = time.monotonic() - began
        image = parse_elf(unpacked)
    except ImageError as problem:
        raise ImageError(f"{path}: {problem}") from None
    if cache and took > SLOW_S:
        # No more than a help: a cache that can't be written is no error here.
        with contextlib.suppress(CacheError, OSError):
            _keep(cache, name, unpacked)
    return image


def _cache() -> Cache | None:
    try:
        return Cache()
    except CacheError:
        return None


def _keep(cache: Cache, name: str, unpacked: bytes | bytearray | memoryview) -> None:
    with cache.staging() as staging:
        entry = staging / name
        entry.mkdir()
        packed = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(unpacked)
        write_atomic(entry / "vmlinux.zst", packed)
        cache.publish(entry, "unpacked", name)


def make_initrd(
    given: str | None, image: KernelImage, with_agent: bool, report: Report, kernel: KernelChoice | None = None,
    frontends: Sequence[str] = (), files: Mapping[str, bytes | Path] | None = None,
) -> bytes:  # fmt: skip
    """The user's initrd, with pvirq's agent or shell in front of it where that is wanted; or the default one.

    The default one, and what is put in front, load the modules `frontends` where the kernel hasn't got them built in.
    `files` (path in the guest: content) are put into the default one. BuildError, BusyboxNotFound.
    """
    if given == NO_INITRD:
        if with_agent:
            raise BuildError("--exec and --shell need an initrd")
        return b""
    if given is not None:
        try:
            data = Path(given).read_bytes()
        except (OSError, ValueError) as error:
            raise BuildError(f"initrd {given}: {getattr(error, 'strerror', None) or error}") from None
        if not with_agent:
            return data
        return initrds.with_overlay(data, find_busybox(report), _drivers(kernel, frontends, report))
    if not is_linux(image):
        if with_agent:
            raise BuildError(f"--exec and --shell need a Linux kernel; this one says that it is {image.guest_os!r}")
        return b""
    return initrds.default_initrd(find_busybox(report), files, modules=_drivers(kernel, frontends, report))


def _drivers(kernel: KernelChoice | None, names: Sequence[str], report: Report) -> list[tuple[str, bytes]]:
    if not names or kernel is None:
        return []
    modules_dir = kernel.modules_dir or _modules_of(kernel.path)
    if modules_dir is None:
        report(f"no modules of this kernel are at hand: its drivers {' and '.join(names)} have to be built in")
        return []
    try:
        return modules.read_modules(modules_dir, names)
    except (modules.ModuleError, OSError) as error:
        raise BuildError(f"the guest's drivers: {error}") from None


def is_linux(image: KernelImage) -> bool:
    """A kernel that takes Linux's parameters and initrds."""
    return image.guest_os.startswith("linux")


def command_line(append: str, mode: str, own_initrd: bool, size: os.terminal_size | None) -> str:
    """The kernel's parameters: ours first, so that the user's win. `mode` is "agent", "shell" or ""."""
    words = [] if any(word.startswith("console=") for word in append.split()) else ["console=hvc0"]
    if mode:
        words.append(f"pvirq={mode}")
        if own_initrd:
            words.append(f"rdinit={initrds.INIT}")
    if size is not None:
        words += (f"pvirq_rows={size.lines}", f"pvirq_cols={size.columns}")
    return " ".join([*words, append]).strip()

"""Debian's own Xen clients for a guest: fetched once as packages, kept in pvirq's cache, put into an initrd.

Small C programs (tests/xentools/*.c) are compiled against the same libraries.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pvirq.toolstack import packages
from pvirq.toolstack.cache import Cache
from pvirq.toolstack.packages import FetchError, Source

SOURCES = Path(__file__).parent / "xentools"
MODULES = ("xenfs", "xen-privcmd", "xen-evtchn", "xen-gntdev", "xen-gntalloc")
# libxen-dev depends on all of the libraries, each on libc6, and that on libgcc-s1 (for pthread_cancel).
_SOURCES = (
    Source("apt-get", ("libxen-dev",), r"libxen(?!misc).*|libc6|libgcc-s1"),
    Source("apt-get", ("xenstore-utils",)),
)
_LIBRARY = re.compile(r"(?:usr/)?lib/x86_64-linux-gnu/((?:libxen\w+|libc|libgcc_s)\.so\.\d+)(?:\.\d+)*")
_LOADER = re.compile(r"(?:usr/)?lib/x86_64-linux-gnu/(ld-linux-x86-64\.so\.2)")
_APPLETS = ("chmod", "exists", "list", "ls", "read", "rm", "watch", "write")


@dataclass(frozen=True)
class XenTools:
    """An unpacked copy: `bin`, `lib` (by soname), `include`."""

    root: Path

    def files(self, *programs: Path) -> dict[str, bytes | Path]:
        """What an initrd needs for xenstore-ls and its like, and for `programs`, which go to /bin."""
        found: dict[str, bytes | Path] = {f"lib/x86_64-linux-gnu/{path.name}": path for path in self._libraries()}
        found["lib64/ld-linux-x86-64.so.2"] = self.root / "lib/ld-linux-x86-64.so.2"
        found |= {f"bin/{path.name}": path for path in (self.root / "bin").iterdir()}
        return found | {f"bin/{path.name}": path for path in programs}

    def _libraries(self) -> list[Path]:
        return [path for path in (self.root / "lib").iterdir() if not path.name.startswith("ld-")]

    def compile(self, name: str, into: Path) -> Path:
        """Build tests/xentools/NAME.c as a program `into`/NAME."""
        if shutil.which("gcc") is None:
            pytest.skip("there is no gcc")
        program = into / name
        libraries = [str(path) for path in self._libraries() if path.name.startswith("libxen")]
        argv = ["gcc", "-O1", "-Wall", "-Werror", "-I", str(self.root / "include"), "-o", str(program)]
        argv += [str(SOURCES / f"{name}.c"), "-Wl,--as-needed", "-Wl,-rpath-link", str(self.root / "lib"), *libraries]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return program


def fetch() -> XenTools:
    """The tools, from the cache or else as packages; the test is skipped where they can't be had."""
    cache = Cache()
    with cache.lock("fetch"):
        if found := cache.get("packages", "xen-tools"):
            return XenTools(found)
        if packages.available_tool() != "apt-get":
            pytest.skip("Debian's Xen tools: there is no apt-get")
        try:
            return XenTools(_fetch(cache))
        except FetchError as error:
            pytest.skip(f"neither cached nor to be had now: {error}")


def _fetch(cache: Cache) -> Path:
    with cache.staging() as staging:
        entry = staging / "entry"
        for source in _SOURCES:
            into = staging / source.candidates[0]
            into.mkdir()
            for file in packages.fetch(source, into, cache, print).files:
                for path, data in packages.members(file):
                    if target := _target(path):
                        (entry / target).parent.mkdir(parents=True, exist_ok=True)
                        (entry / target).write_bytes(data)
                        (entry / target).chmod(0o644 if target.startswith("include/") else 0o755)
        for applet in _APPLETS:
            (entry / f"bin/xenstore-{applet}").symlink_to("xenstore")
        return cache.publish(entry, "packages", "xen-tools")


def _target(path: str) -> str | None:
    if match := _LIBRARY.fullmatch(path) or _LOADER.fullmatch(path):
        return f"lib/{match[1]}"
    if path == "usr/bin/xenstore":
        return "bin/xenstore"
    return path.removeprefix("usr/") if path.startswith("usr/include/") else None

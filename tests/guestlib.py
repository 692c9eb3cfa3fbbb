"""The small PV kernels of tests/guests: building them, and what real Xen printed when it ran them.

A kernel is some C on the runtime in tests/guests/lib.c, linked into an ELF image that any Xen PV domain
builder takes (ELF notes, 64 bit). Its transcript on Xen 4.17, run there as dom0, is in tests/data/guests; see
tests/record_guests.py.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parent / "guests"
GOLDEN = Path(__file__).parent / "data" / "guests"

_CFLAGS = """
    -O1 -std=gnu11 -Wall -Wextra -Wno-unused-parameter -ffreestanding -fno-pic -fno-pie -mno-red-zone -mno-sse
    -mno-mmx -mno-80387 -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables
    -fno-omit-frame-pointer -nostdlib -static -no-pie -Wl,--build-id=none -Wl,--no-warn-rwx-segments
""".split()  # noqa: SIM905
# VIRT_BASE and code model; `raw` has no hypercall page and lives at the bottom.
_KERNEL_HALF = ("-DBASE=0xffffffff80000000", "-Wl,--defsym=BASE=0xffffffff80000000", "-mcmodel=kernel")
_RAW = ("-DRAW", "-DBASE=0", "-Wl,--defsym=BASE=0", "-mcmodel=small")


class Kernel(NamedTuple):
    """One run: the kernel's name for `build`, its command line, the file with the expected transcript, how many vCPUs
    it wants, and whether it must be domain 0."""

    name: str
    cmdline: str
    golden: Path
    vcpus: int = 1
    dom0: bool = False

    @property
    def id(self) -> str:
        return self.golden.stem


def _run(name: str, cmdline: str = "", golden: str = "") -> Kernel:
    return Kernel(name, cmdline, GOLDEN / f"{golden or name}.txt")


KERNELS: list[Kernel] = [
    _run("traps"),
    _run("softint"),
    _run("user"),
    _run("privop"),
    _run("mmu"),
    _run("ptwr"),
    _run("desc"),
    _run("event"),
    _run("async"),
    _run("misc"),
    _run("memory"),
    _run("grant"),
    _run("grant2"),
    _run("raw"),
    _run("pointers"),
    _run("smp")._replace(vcpus=2),
    *(_run("physdev", f"eoi={n}", f"physdev-{n}")._replace(dom0=True) for n in (1, 2)),
    *(_run("fuzz", f"seed={seed} calls=3000", f"fuzz-{seed}") for seed in (1, 2, 3)),
    *(_run("crash", f"which={n}", f"crash-{n}") for n in range(10)),
]


def have_compiler() -> bool:
    """Whether the kernels can be built here (gcc for x86-64)."""
    if not shutil.which("gcc"):
        return False
    machine = subprocess.run(["gcc", "-dumpmachine"], capture_output=True, text=True, check=False).stdout
    return machine.startswith("x86_64")


def build(name: str) -> Path:
    """The ELF image of kernel `name`. Raises subprocess.CalledProcessError if gcc fails."""
    flags = (*_CFLAGS, *(_RAW if name == "raw" else _KERNEL_HALF))
    return compiled(name, flags, SOURCES, ("start.S", "lib.c", f"{name}.c"))


def compiled(name: str, flags: Sequence[str], sources: Path, parts: Sequence[str]) -> Path:
    """The ELF image of the `parts` of folder `sources`, linked by its link.ld: compiled unless the very same one is
    in the cache below the temporary directory. Raises subprocess.CalledProcessError if gcc fails."""
    inputs = [sources / part for part in parts]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in (*inputs, *sorted(sources.glob("*.h")), sources / "link.ld"):
        digest.update(path.read_bytes())
    cache = Path(tempfile.gettempdir()) / f"pvirq-guests-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    image = cache / f"{name}-{digest.hexdigest()[:16]}.elf"
    if not image.exists():
        # Built aside and renamed: two test runs may want it at once.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            fresh = Path(scratch) / "image"
            command = ["gcc", *flags, f"-Wl,-T,{sources / 'link.ld'}", *map(str, inputs), "-o", str(fresh)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            fresh.rename(image)
    return image


def transcript(console: str) -> list[str]:
    """The lines a kernel printed, out of a console's text: from "begin" on, without the hypervisor's own."""
    lines = [line for line in console.replace("\r", "").split("\n") if line and not line.startswith("(XEN)")]
    return lines[lines.index("begin") :] if "begin" in lines else []


def expected(kernel: Kernel, *, dom0: bool = False) -> list[str]:
    """The transcript real Xen gave. Lines that only a dom0 prints ("[dom0] ...") are left out for a domU."""
    lines = kernel.golden.read_text().splitlines()
    return [line for line in lines if dom0 or not line.startswith("[dom0] ")]

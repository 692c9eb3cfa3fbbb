"""Event channels against the real hypervisor: boots the same kernel on real Xen 4.17 in QEMU and on pvirq, with fresh
random seeds, and compares what it prints, byte for byte. See docs/conformance.md; `make conformance` runs it.

    python tests/conformance.py                               two fresh seeds in every configuration
    python tests/conformance.py --seed 1 --abi fifo --vcpus 2 one run, again
    python tests/conformance.py --kernel evfuzz --seed 1 --ops 3000

Exit status: 0 all the same, or skipped for want of QEMU or Xen; 1 a difference; 2 usage; 3 a run that did not come to
its end, or, with --require, something missing.
"""

from __future__ import annotations

import argparse
import difflib
import gzip
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import guestlib
import realxen
from pvirq import Host
from pvirq.guest import HostStuck

DATA = Path(__file__).parent / "data"
RECORDED = DATA / "conformance"
RECORDED_SEED, RECORDED_OPS = 1, 2000
ABIS = {"2l": 0, "fifo": 1, "mixed": 2}
KERNELS = ("evconf", "evfuzz", "evfuzz-deep")
MEMORY = 64 << 20
CONTEXT = 8  # lines before a difference
SAME, DIFFERENT, UNFINISHED = 0, 1, 3
_EVFUZZ_FLAGS = """
    -O1 -ffreestanding -fno-pic -fno-pie -mno-red-zone -mno-sse -mno-mmx -mcmodel=large -fno-stack-protector
    -fcf-protection=none -nostdlib -static -no-pie -Wl,--build-id=none -Wl,--no-warn-rwx-segments
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Run:
    """One sequence of operations. `abi` is a key of ABIS; `extra` more of the kernel's command line."""

    kernel: str
    seed: int
    ops: int
    abi: str
    vcpus: int
    extra: str = ""

    @property
    def cmdline(self) -> str:
        line = f"seed={self.seed} ops={self.ops}"
        if self.kernel == "evconf":
            line += f" abi={ABIS[self.abi]} vcpus={self.vcpus}"
        elif self.kernel == "evfuzz":
            line += f" fifo={ABIS[self.abi]}"
        return f"{line} {self.extra}".strip()

    def __str__(self) -> str:
        abi = "" if self.kernel == "evfuzz-deep" else f" --abi {self.abi}"
        return f"--kernel {self.kernel} --seed {self.seed} --ops {self.ops}{abi} --vcpus {self.vcpus}"


def build(kernel: str) -> Path:
    """The ELF image of one of KERNELS. Raises subprocess.CalledProcessError if gcc fails."""
    if kernel == "evconf":
        return guestlib.build(kernel)
    return guestlib.compiled(kernel, _EVFUZZ_FLAGS, DATA / "evfuzz", ("start.S", f"{kernel}.c"))


def transcript(console: str) -> list[str]:
    """The lines the kernel printed, without the hypervisor's own."""
    lines = [line for line in console.replace("\r", "").split("\n") if line and not line.startswith("(XEN)")]
    for i, line in enumerate(lines):
        if line == "begin" or line.startswith("evfuzz seed="):
            end = next((j for j in range(i, len(lines)) if lines[j] in ("done", "evfuzz done")), len(lines) - 1)
            return lines[i : end + 1]
    return []


def on_pvirq(run: Run) -> list[str]:
    """The transcript on pvirq; where it doesn't end, the last line says so."""
    why, output = "", bytearray()
    with Host(dom0=False, wallclock=1.7e9) as host:
        guest = host.boot(build(run.kernel), append=run.cmdline, memory=MEMORY, vcpus=run.vcpus)
        guest.console.on_output(output.extend)  # all of it, not only the last that the console keeps
        try:
            if not host.run(lambda: guest.ended, timeout_ns=(120 + run.ops // 100) * 1_000_000_000):
                why = "did not end"
        except HostStuck as error:
            why = str(error)
        if guest.machine.crash:
            why = guest.machine.crash
    lines = transcript(output.decode(errors="replace"))
    return [*lines, f"<pvirq: {why}>"] if why else lines


def on_xen(xen: realxen.RealXen, run: Run) -> list[str]:
    """The transcript on real Xen; where it doesn't end, the last line says so."""
    try:
        console = xen.boot(build(run.kernel), run.cmdline, vcpus=run.vcpus, timeout=120 + run.ops / 100)
    except TimeoutError as error:
        return [*transcript(str(error)), "<real Xen: did not end>"]
    return transcript(console)


def ended(lines: Sequence[str]) -> bool:
    # evfuzz keeps what fits in its buffer: a long run of it has no last line.
    return bool(lines) and (lines[-1] == "done" or (lines[0].startswith("evfuzz") and not lines[-1].startswith("<")))


def first_difference(real: Sequence[str], here: Sequence[str]) -> int | None:
    """Index of the first line that differs; None where there is none."""
    if list(real) == list(here):
        return None
    pairs = enumerate(zip(real, here, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(real), len(here)))


def explain(xen: realxen.RealXen, run: Run, real: Sequence[str], here: Sequence[str]) -> None:
    """Print the first difference with what came before it, and the memory behind it."""
    at = first_difference(real, here)
    assert at is not None
    print(f"\nDIFFERENT at line {at + 1} of {run}")
    for line in real[max(0, at - CONTEXT) : at]:
        print(f"           {line}")
    print(f"  real Xen {real[at] if at < len(real) else '(nothing more)'}")
    print(f"  pvirq    {here[at] if at < len(here) else '(nothing more)'}")
    step = re.match(r"(\d+)[ab] ", real[at] if at < len(real) else "")
    if run.kernel != "evconf" or not step:
        return
    # Once more, with all shared memory printed after the step before and after the one that differs.
    number = int(step[1])
    again = replace(run, ops=number + 1, extra=f"dump={max(0, number - 1)} last={number}")
    real_again, here_again = on_xen(xen, again), on_pvirq(again)

    def steps(lines: Sequence[str]) -> list[str]:
        return [line for line in lines if not line.startswith(("  ", "evconf seed"))]

    for name, before, after in (("real Xen", real, real_again), ("pvirq", here, here_again)):
        if steps(after)[: at - 1] != steps(before)[: at - 1]:
            print(f"  {name} did something else when it ran again: this sequence is not steady")
    print(f"  the memory, after steps {max(0, number - 1)} and {number}:")
    lines = list(difflib.unified_diff(real_again, here_again, "real Xen", "pvirq", lineterm="", n=2))
    for line in lines or ["no difference when they ran again"]:
        print(f"    {line}")


def keep(directory: Path, run: Run, real: Sequence[str], here: Sequence[str]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{run.kernel}-{run.abi}-{run.vcpus}vcpu-{run.seed}"
    for kind, lines in (("xen", real), ("pvirq", here)):
        (directory / f"{name}.{kind}.txt").write_text("\n".join(lines) + "\n")


def compare(xen: realxen.RealXen, runs: Sequence[Run], directory: Path | None = None) -> int:
    """Do all runs on both and say how they compare; an exit status."""
    status, operations = SAME, 0
    with ThreadPoolExecutor(1) as pool:  # real Xen runs ahead, beside pvirq
        began = time.monotonic()
        reals = [pool.submit(on_xen, xen, run) for run in runs]
        for run, future in zip(runs, reals, strict=True):
            here = on_pvirq(run)
            real = future.result()
            same = first_difference(real, here) is None
            finished = ended(real) and ended(here)
            if directory or not (same and finished):
                keep(directory or Path("build/conformance"), run, real, here)
            if not same:
                status = DIFFERENT
                explain(xen, run, real, here)
            elif not finished:
                status = status or UNFINISHED
                print(f"UNFINISHED on both: {run}\n  {real[-1] if real else 'no line at all'}")
            else:
                operations += run.ops
                size = sum(map(len, real)) + len(real)
                print(f"the same: {run} ({size:,} bytes)", flush=True)
        took = time.monotonic() - began
    print(f"{operations:,} operations in {len(runs)} runs compared with real Xen in {took:.0f} s", end=": ")
    print("the same byte for byte" if status == SAME else "see above")
    return status


def recorded() -> Iterator[tuple[Run, Path]]:
    """The runs whose transcripts are kept in the repository, so that pvirq is held to them without a Xen."""
    for abi in ABIS:
        for vcpus in (1, 2):
            path = RECORDED / f"evconf-{abi}-{vcpus}vcpu.txt.gz"
            yield Run("evconf", RECORDED_SEED, RECORDED_OPS, abi, vcpus), path
    for path in sorted((DATA / "evfuzz").glob("*.txt.gz")):
        match = re.fullmatch(r"(deep-)?seed(\d+)(?:-fifo(\d))?\.txt\.gz", path.name)
        assert match
        deep = bool(match[1])
        abi = "fifo" if match[3] == "1" else "2l"
        yield Run("evfuzz-deep" if deep else "evfuzz", int(match[2]), 3000, abi, 2 if deep else 1), path


def record(xen: realxen.RealXen) -> int:
    """Write the transcripts of evconf anew; each run twice, and both must be the same."""
    RECORDED.mkdir(parents=True, exist_ok=True)
    status = SAME
    for run, path in recorded():
        if run.kernel == "evconf":
            first, second = on_xen(xen, run), on_xen(xen, run)
            if first != second or not ended(first):
                print(f"not steady: {run}")
                status = UNFINISHED
                continue
            path.write_bytes(gzip.compress(("\n".join(first) + "\n").encode(), mtime=0))
    return status


def plan(options: argparse.Namespace) -> list[Run]:
    """All runs asked for: each configuration with each seed."""
    first = random.SystemRandom().randrange(1, 1 << 31) if options.seed is None else options.seed
    count = options.runs or (1 if options.seed is not None else 2)
    if options.kernel == "evfuzz-deep":
        configurations = [("mixed", 2)]
    elif options.kernel == "evfuzz":
        configurations = [(abi, 1) for abi in ("2l", "fifo")]
    else:
        configurations = [(abi, vcpus) for abi in ABIS for vcpus in (1, 2)]
    if options.abi:
        configurations = sorted({(options.abi, vcpus) for _, vcpus in configurations})
    if options.vcpus:
        configurations = sorted({(abi, options.vcpus) for abi, _ in configurations})
    return [Run(options.kernel, first + i, options.ops, *it) for i in range(count) for it in configurations]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="conformance", description="Compare event channels on pvirq with those of real Xen 4.17 in QEMU.",
        epilog="Exit status: 0 the same (or skipped), 1 different, 2 usage, 3 unfinished or something is missing.",
    )  # fmt: skip
    parser.add_argument("--kernel", choices=KERNELS, default="evconf", help="which test kernel (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="the first seed (default: a fresh random one)")
    parser.add_argument("--runs", type=int, help="so many seeds, counting up (default: 2; with --seed 1)")
    parser.add_argument("--ops", type=int, default=20000, help="operations in each run (default: %(default)s)")
    parser.add_argument("--abi", choices=ABIS, help="only this one")
    parser.add_argument("--vcpus", type=int, choices=(1, 2), help="only so many vCPUs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep all transcripts there, not only different ones")
    parser.add_argument("--xen", type=Path, default=realxen.default_binary(), help="hypervisor (default: %(default)s)")
    parser.add_argument("--require", action="store_true", help="fail where QEMU, Xen or gcc is missing")
    parser.add_argument("--record", action="store_true", help="write tests/data/conformance anew")
    options = parser.parse_args(arguments)
    if options.kernel == "evfuzz" and options.abi == "mixed":
        parser.error("evfuzz has no mixed ABI")
    if options.ops < 1 or (options.runs is not None and options.runs < 1):
        parser.error("--ops and --runs are at least 1")
    why = realxen.missing(options.xen) or (None if guestlib.have_compiler() else "there is no gcc for x86-64")
    if why:
        print(f"conformance: {'failed' if options.require else 'SKIPPED, nothing was compared'}: {why}")
        return UNFINISHED if options.require else SAME
    with realxen.RealXen(options.xen) as xen:
        if options.record:
            return record(xen)
        return compare(xen, plan(options), options.keep)


if __name__ == "__main__":
    sys.exit(main())

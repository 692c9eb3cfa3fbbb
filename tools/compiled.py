#!/usr/bin/env python3
"""Make machine code of pvirq's hottest modules, beside their sources (`make compiled`).

    tools/compiled.py [DIRECTORY]    where the package pvirq is; src, unless it is named

mypyc compiles the modules that pyproject.toml lists for it, with gcc and Python's headers. It works on a copy, and what
it has made is put in place when all is done: pvirq/compiled.txt comes last (`pvirq.machine_code` looks at it).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[str]:
    """The files to be compiled, from the directory above the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    include = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["mypyc"]["include"]
    return [path.removeprefix("src/") for path in include]


def is_up_to_date(place: Path) -> bool:
    """Is there machine code of these modules, and none of a source that is newer? (`pvirq.machine_code.choose`)"""
    made = place / "pvirq" / "compiled.txt"
    if not made.exists() or made.read_text().split() != modules():
        return False
    return all((place / path).stat().st_mtime <= made.stat().st_mtime for path in modules())


def main(place: Path) -> int:
    package = place / "pvirq"
    mypyc = Path(sys.executable).with_name("mypyc")
    if is_up_to_date(place):
        return 0
    print(f"compiling {len(modules())} modules, which takes two to five minutes ...", file=sys.stderr)
    for old in [*place.glob("*__mypyc*.so"), *package.rglob("*.so"), package / "compiled.txt"]:
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        shutil.copytree(package, copy / "pvirq", ignore=shutil.ignore_patterns("__pycache__"))
        # Another pvirq, or its type checker's cache, would be in the way.
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
        command = [mypyc, "--config-file", ROOT / "mypy.ini", *modules()]
        done = subprocess.run(
            command, cwd=copy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, end="", file=sys.stderr)
            return 1
        for made in [*copy.glob("*.so"), *(copy / "pvirq").rglob("*.so")]:
            shutil.copy(made, place / made.relative_to(copy))
    (package / "compiled.txt").write_text("".join(f"{path}\n" for path in modules()))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "src"))

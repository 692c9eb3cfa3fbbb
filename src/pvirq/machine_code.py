"""Which of pvirq's modules run as machine code, and that it is their sources' of today.

`make compiled` has mypyc compile the modules that spend most of the time; they do the same then, only faster. Python
would take such a module before its source however old it is: where one has changed since, all run from their sources,
and a warning says so. With PVIRQ_COMPILED=0 in the environment they do that too.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.machinery import FileFinder, ModuleSpec, SourceFileLoader
from types import ModuleType
from typing import Final

_PACKAGE: Final = os.path.dirname(__file__)
_LIST: Final = os.path.join(_PACKAGE, "compiled.txt")  # written when all of them are there
VARIABLE: Final = "PVIRQ_COMPILED"


@cache
def _finder(place: str) -> FileFinder:
    return FileFinder(place, (SourceFileLoader, [".py"]))


class _Sources:
    """Finds the modules of this package as if there were nothing but sources."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("pvirq.") or path is None:
            return None
        for place in path:
            found = _finder(place).find_spec(fullname)
            if found is not None:
                return found
        return None


def choose() -> None:
    """Before any other of pvirq's modules is imported: machine code or sources?"""
    if os.environ.get(VARIABLE) == "0":
        sys.meta_path.insert(0, _Sources())
        return
    try:
        made = os.path.getmtime(_LIST)
    except OSError:
        return
    with open(_LIST) as file:
        paths = file.read().split()
    for path in paths:
        source = os.path.join(_PACKAGE, os.pardir, path)
        if not os.path.exists(source) or os.path.getmtime(source) > made:
            sys.meta_path.insert(0, _Sources())
            warnings.warn(
                f"{path} has changed since pvirq was compiled, so nothing of that is used: `make compiled` again, "
                f"`make clean`, or {VARIABLE}=0",
                RuntimeWarning,
                stacklevel=3,
            )
            return


def count() -> int:
    """How many modules there are that run as machine code."""
    if any(isinstance(finder, _Sources) for finder in sys.meta_path):
        return 0
    return sum(name.endswith(".so") for _, _, names in os.walk(_PACKAGE) for name in names)

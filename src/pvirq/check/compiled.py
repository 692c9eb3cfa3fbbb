"""The reduced search: as machine code where there is some (`make compiled`) and it is of today, else as Python."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

from pvirq.check import reduction as _found

__all__ = ["Circle", "Reduced"]


def _stale(compiled: Path, source: Path) -> bool:
    return compiled != source and source.exists() and source.stat().st_mtime > compiled.stat().st_mtime


# Python takes machine code before its source, however old it is.
_compiled = Path(_found.__file__)
_source = _compiled.with_name("reduction.py")
if _stale(_compiled, _source):
    warnings.warn(
        f"{_compiled} is older than {_source.name} and isn't used: `make compiled` again, or remove it",
        RuntimeWarning,
        stacklevel=2,
    )
    _spec = importlib.util.spec_from_file_location(_found.__name__, _source)
    assert _spec is not None
    assert _spec.loader is not None
    _found = sys.modules[_found.__name__] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_found)

Circle = _found.Circle
Reduced = _found.Reduced

"""The checker's inner parts: as machine code where there is some (`make compiled`) and it is of today, else as Python.

Python takes machine code before its source, however old it is. So this module looks before the others are imported.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Final

MODULES: Final = ("freeze", "reduction")  # tools/compiled.sh; each after those that it imports


def _refuse_stale() -> None:
    """Load the source of each module whose machine code is older, and say so."""
    for module in MODULES:
        name = f"{__package__}.{module}"
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None or name in sys.modules:
            continue
        compiled = Path(found.origin)
        source = compiled.with_name(f"{module}.py")
        if compiled == source or not source.exists() or source.stat().st_mtime <= compiled.stat().st_mtime:
            continue
        warnings.warn(
            f"{compiled} is older than {source.name} and isn't used: `make compiled` again, or remove it",
            RuntimeWarning,
            stacklevel=3,
        )
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


_refuse_stale()

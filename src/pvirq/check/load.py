"""Checks by name: the known races, and the models in a file of one's own.

A file is a Python program. Its functions whose names begin with `check_` and that take no arguments are checks, each of
which returns a `Model`, made anew; a `RACE` in it is one as well, with its fault and cured.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from pvirq.check.race import Race, races
from pvirq.check.steps import Model

PREFIX: Final = "check_"


class CheckError(Exception):
    """No such check, or a file that can't be used; one line."""


@dataclass(frozen=True)
class Check:
    """A model to be searched, and what is to come of it."""

    name: str  # that of the race, or FILE::function
    title: str
    make: Callable[[], Model]
    race: Race | None = None
    fault: bool = False  # of a race: with the fault, which is to be found

    def __call__(self) -> Model:
        model = self.make()
        if not isinstance(model, Model):
            raise CheckError(f"{self.name} returns no Model but {type(model).__name__}")
        if not model.programs:
            raise CheckError(f"{self.name} has no threads")
        return model


def find(name: str, *, faulty: bool = True, cured: bool = True) -> list[Check]:
    """What NAME means: a race, FILE.py (all its checks), or FILE.py::NAME. Of races `faulty` and `cured` choose."""
    path, _, function = name.partition("::")
    if path.endswith(".py") or "/" in path:
        checks = _of_file(Path(path), faulty, cured)
        if function:
            checks = [check for check in checks if check.name == name]
            if not checks:
                raise CheckError(f"{path} has no check {function!r}: one is a function {PREFIX}..., or RACE")
        return checks
    known = races()
    if name not in known:
        raise CheckError(f"no check {name!r}: `pvirq check` lists them; a file's name ends in .py")
    return _of_race(known[name], name, faulty, cured)


def _of_race(race: Race, name: str, faulty: bool, cured: bool) -> list[Check]:
    wanted = ([True] if faulty else []) + ([False] if cured else [])
    return [Check(name, race.title, lambda fault=fault: race.model(fault), race, fault) for fault in wanted]  # type: ignore[misc]


def _of_file(path: Path, faulty: bool, cured: bool) -> list[Check]:
    module = _run(path)
    found: list[Check] = []
    if isinstance(race := getattr(module, "RACE", None), Race):
        found += _of_race(race, f"{path}::RACE", faulty, cured)
    for name, value in vars(module).items():
        if name.startswith(PREFIX) and inspect.isfunction(value) and value.__module__ == module.__name__:
            needed = [each for each in inspect.signature(value).parameters.values() if each.default is each.empty]
            if needed:
                raise CheckError(f"{path}::{name} takes arguments ({', '.join(each.name for each in needed)})")
            found.append(Check(f"{path}::{name}", (inspect.getdoc(value) or "").partition("\n")[0], value))
    if not found:
        raise CheckError(f"{path} has no checks: functions {PREFIX}... that return a pvirq.check.Model")
    return found


def _run(path: Path) -> ModuleType:
    """The file as a module; what it imports from its own folder is found."""
    name = f"pvirq_check_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise CheckError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except OSError as error:
        raise CheckError(f"{error.filename or path}: {error.strerror or error}") from None
    except Exception as error:
        raise CheckError(f"{_where(error, path)}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _where(error: Exception, path: Path) -> str:
    """The deepest line of the file's own that an error came through."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    lines: list[Any] = [each for each in traceback.extract_tb(error.__traceback__) if each.filename == str(path)]
    return f"{path}:{lines[-1].lineno}" if lines else str(path)

"""What tests of block stores share: an image, and requests that are answered at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pvirq.abi.errno import Errno

SECTORS = 64


def new_image(directory: Path) -> Path:
    """An image of so many sectors, each with all bytes from 0 to 255, twice."""
    path = directory / "disk.img"
    path.write_bytes(bytes(range(256)) * 2 * SECTORS)
    return path


def ask(call: Any, *args: Any) -> Errno | None:
    """The error that a request ends with, or None."""
    results: list[Errno | None] = []
    call(*args, lambda _data, error: results.append(error))
    (error,) = results
    return error

"""The Xen PV interrupt system in Python.

with pvirq.Host() as host:
    guest = host.boot(kernel, initrd=initrd)
    guest.wait_for("BOOTED")
    print(guest.run("cat /proc/interrupts").text)
    print(host.dom0.proc_interrupts())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pvirq import machine_code

if TYPE_CHECKING:
    from pvirq.abi.errno import Errno, XenError
    from pvirq.engine.protocol import EngineError
    from pvirq.guest import CommandResult, Guest, GuestCrashed, GuestError, GuestTimeout, HostStuck
    from pvirq.host import Host
    from pvirq.hostfile import restore_host, save_host
    from pvirq.pv.builder import BuildError
    from pvirq.pv.image import ImageError

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "CommandResult",
    "EngineError",
    "Errno",
    "Guest",
    "GuestCrashed",
    "GuestError",
    "GuestTimeout",
    "Host",
    "HostStuck",
    "ImageError",
    "XenError",
    "restore_host",
    "save_host",
]

_WHERE = {
    "BuildError": "pvirq.pv.builder",
    "EngineError": "pvirq.engine.protocol",
    "Errno": "pvirq.abi.errno",
    "Host": "pvirq.host",
    "ImageError": "pvirq.pv.image",
    "XenError": "pvirq.abi.errno",
    "restore_host": "pvirq.hostfile",
    "save_host": "pvirq.hostfile",
}


machine_code.choose()


def __getattr__(name: str) -> Any:
    # Only what is used is imported: a command that prints its help has no need of an emulator.
    if name not in __all__:
        raise AttributeError(f"module 'pvirq' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE.get(name, "pvirq.guest")), name)
    globals()[name] = value
    return value

"""The Xen PV interrupt system in Python.

with pvirq.Host() as host:
    guest = host.boot(kernel, initrd=initrd)
    guest.wait_for("BOOTED")
    print(guest.run("cat /proc/interrupts").text)
    print(host.dom0.proc_interrupts())
"""

from pvirq.abi.errno import Errno, XenError
from pvirq.engine.protocol import EngineError
from pvirq.guest import CommandResult, Guest, GuestCrashed, GuestError, GuestTimeout, HostStuck
from pvirq.host import Host
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
]

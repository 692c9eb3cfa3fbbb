"""The kernels that a modelled domain can run, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, Final

from pvirq.linux.personality import Personality

KernelFactory = Callable[..., Personality]
"""Makes a kernel's personality: called with the kernel and `start_info=`."""

# Name: (module, class, arguments, what it is).
_KERNELS: Final[dict[str, tuple[str, str, dict[str, Any], str]]] = {
    "pvops": ("pvops", "Pvops", {}, "Linux 6.1 as Debian builds it"),
    "pvops-2l": ("pvops", "Pvops", {"fifo": False}, "the same with xen.fifo_events=0, the two-level ABI"),
    "2.6.18": ("xenlinux_2_6_18", "XenLinux2618", {}, "XenLinux 2.6.18, of XenSource and RHEL 5"),
    "suse": ("xenlinux_suse", "XenLinuxSuse", {}, "XenLinux 2.6.27 to 2.6.34 as SUSE shipped it"),
}
KERNELS: Final = {name: about for name, (*_, about) in _KERNELS.items()}
"""What each is, for people."""


def find(name: str, **options: Any) -> KernelFactory:
    """The factory of a kernel by name; `options` are its personality's own. KeyError for an unknown name."""
    module, class_name, arguments, _ = _KERNELS[name]
    factory: KernelFactory = getattr(import_module(f"pvirq.linux.{module}"), class_name)
    return partial(factory, **arguments, **options)

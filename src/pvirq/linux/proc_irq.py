"""/proc/irq and /sys/kernel/irq of a modelled kernel (kernel/irq/proc.c, and kernel/irq/irqdesc.c of Linux 6.1).

Paths are absolute. Errors are IrqError with what root's open, read or write would have failed with: ENOENT, EISDIR,
ENOTDIR, EIO for a file that isn't for writing, and what the kernel says to a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pvirq.abi.errno import Errno
from pvirq.linux.cpumask import list_text, mask_text, parse_list, parse_mask
from pvirq.linux.irq import IrqDesc, IrqError, IrqLayer
from pvirq.linux.irq26 import IrqLayer26
from pvirq.linux.kernel import Kernel
from pvirq.linux.personality import IrqLine

PROC: Final = "/proc/irq"
SYS: Final = "/sys/kernel/irq"


@dataclass(frozen=True)
class ProcIrq:
    """What a version of the kernel has of it: the files of a line and how many bits its CPU masks have.

    `cpumask_bits` None: as many as there are CPUs. A personality that differs from the default of its generic layer
    has an attribute `proc_irq` of this type; with `default_affinity` its generic layer has `default_affinity` and
    `set_default_affinity`.
    """

    files: tuple[str, ...]
    cpumask_bits: int | None = None
    default_affinity: bool = True
    sysfs: bool = False


LINUX_6_1: Final = ProcIrq(
    (
        "affinity_hint",
        "effective_affinity",
        "effective_affinity_list",
        "node",
        "smp_affinity",
        "smp_affinity_list",
        "spurious",
    ),
    sysfs=True,
)
LINUX_6_1_UP: Final = ProcIrq(("spurious",), default_affinity=False, sysfs=True)
LINUX_2_6_18: Final = ProcIrq(("smp_affinity",), cpumask_bits=32, default_affinity=False)


def style_of(kernel: Kernel[Any]) -> ProcIrq:
    """What this kernel has of it."""
    style: ProcIrq | None = getattr(kernel.events, "proc_irq", None)
    if style is not None:
        return style
    irqs = kernel.irq
    if not isinstance(irqs, IrqLayer):
        return LINUX_2_6_18
    return LINUX_6_1 if irqs.smp else LINUX_6_1_UP


def listdir(kernel: Kernel[Any], path: str) -> list[str]:
    """The names in a directory: lines by number, then files and handlers by name."""
    root, parts = _split(path)
    style = style_of(kernel)
    if root == SYS and not style.sysfs:
        raise IrqError(Errno.ENOENT, path)
    if not parts:
        layer = kernel.irq
        lines: Mapping[int, IrqLine] = layer.descs
        if isinstance(layer, IrqLayer26):  # those that nobody has touched yet are made as they are looked at
            lines = {irq: each for irq in range(layer.nr_irqs) if (each := layer.irq_to_desc(irq))}
        numbers = [str(irq) for irq, each in sorted(lines.items()) if root == SYS or _has_chip(each)]
        return numbers + (["default_smp_affinity"] if root == PROC and style.default_affinity else [])
    if parts == ["default_smp_affinity"] and root == PROC and style.default_affinity:
        raise IrqError(Errno.ENOTDIR, path)
    line = _line(kernel, root, parts, path)
    if root == SYS:
        names = sorted(_SYS_FILES)
    else:
        names = sorted([*style.files, *_handlers(line)])
    if len(parts) == 1:
        return names
    if len(parts) == 2 and parts[1] in names:
        if root == PROC and parts[1] not in style.files:
            return []  # a handler's directory
        raise IrqError(Errno.ENOTDIR, path)
    raise IrqError(Errno.ENOENT, path)


def read(kernel: Kernel[Any], path: str) -> str:
    """The text of a file."""
    root, parts = _split(path)
    style = style_of(kernel)
    bits = style.cpumask_bits or kernel.irq.nr_cpus
    if root == PROC and parts == ["default_smp_affinity"] and style.default_affinity:
        return mask_text(_default_affinity(kernel), bits) + "\n"
    if len(parts) == 2:
        line = _line(kernel, root, parts, path)
        name = parts[1]
        if root == SYS and style.sysfs and name in _SYS_FILES and isinstance(line, IrqDesc):
            return _SYS_FILES[name](line)
        if root == PROC and name in style.files:
            return _PROC_FILES[name](kernel, line, bits)
    listdir(kernel, path)  # ENOENT where there is nothing
    raise IrqError(Errno.EISDIR, path)


def write(kernel: Kernel[Any], path: str, text: str) -> None:
    """Write a file: smp_affinity, smp_affinity_list or default_smp_affinity.

    IrqError besides: EIO where the line can't be moved, EINVAL for no mask or one without an online CPU, EOVERFLOW
    or ERANGE for CPUs that can't be.
    """
    root, parts = _split(path)
    style = style_of(kernel)
    bits = style.cpumask_bits or kernel.irq.nr_cpus
    irqs = kernel.irq
    if root == PROC and parts == ["default_smp_affinity"] and style.default_affinity:
        mask = parse_mask(text, bits)
        layer: Any = irqs
        layer.set_default_affinity(mask)
        return
    if root == PROC and len(parts) == 2 and parts[1] in style.files and parts[1] in _PARSERS:
        line = _line(kernel, root, parts, path)
        if isinstance(irqs, IrqLayer) and not irqs.can_set_affinity(irqs.desc(line.irq)):
            raise IrqError(Errno.EIO, f"IRQ {line.irq} can't be moved")
        irqs.set_affinity(line.irq, _PARSERS[parts[1]](text, bits))
        return
    read(kernel, path)  # ENOENT, EISDIR
    raise IrqError(Errno.EIO, f"{path} can't be written")


def _split(path: str) -> tuple[str, list[str]]:
    for root in (PROC, SYS):
        if path == root or path.startswith(root + "/"):
            return root, [part for part in path[len(root) :].split("/") if part]
    raise IrqError(Errno.ENOENT, path)


def _line(kernel: Kernel[Any], root: str, parts: list[str], path: str) -> IrqLine:
    number, irqs = parts[0], kernel.irq
    line: IrqLine | None = None
    if number.isascii() and number.isdigit():
        line = irqs.irq_to_desc(int(number)) if isinstance(irqs, IrqLayer26) else irqs.descs.get(int(number))
    if line is None or str(line.irq) != number or (root == PROC and not _has_chip(line)):
        raise IrqError(Errno.ENOENT, path)
    return line


def _has_chip(line: IrqLine) -> bool:
    """Lines that nothing is behind have no directory."""
    chip = getattr(line, "chip", None)
    return chip is not None and chip.name != "none"  # no_irq_chip


def _handlers(line: IrqLine) -> set[str]:
    """The directories of a line's handlers, which are named after them; no name can have a slash."""
    return {action.name for action in line.actions if action.has_dir and action.name and "/" not in action.name}


def _default_affinity(kernel: Kernel[Any]) -> int:
    mask: int = getattr(kernel.irq, "default_affinity", kernel.irq.online)
    return mask


# Files of /proc/irq/N.


def _smp_affinity(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    return mask_text(line.affinity, bits) + "\n"


def _smp_affinity_list(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    return list_text(line.affinity) + "\n"


def _effective_affinity(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    return mask_text(getattr(line, "effective_affinity", 0), bits) + "\n"


def _effective_affinity_list(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    return list_text(getattr(line, "effective_affinity", 0)) + "\n"


def _affinity_hint(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    return mask_text(getattr(line, "affinity_hint", None) or 0, bits) + "\n"


def _node(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    return f"{getattr(line, 'node', -1)}\n"


def _spurious(kernel: Kernel[Any], line: IrqLine, bits: int) -> str:
    last = getattr(line, "last_unhandled", 0) * 1000 // kernel.events.hz
    return (
        f"count {getattr(line, 'irq_count', 0)}\n"
        f"unhandled {getattr(line, 'irqs_unhandled', 0)}\n"
        f"last_unhandled {last} ms\n"
    )


_PROC_FILES: Final[dict[str, Callable[[Kernel[Any], IrqLine, int], str]]] = {
    "affinity_hint": _affinity_hint,
    "effective_affinity": _effective_affinity,
    "effective_affinity_list": _effective_affinity_list,
    "node": _node,
    "smp_affinity": _smp_affinity,
    "smp_affinity_list": _smp_affinity_list,
    "spurious": _spurious,
}
_PARSERS: Final = {"smp_affinity": parse_mask, "smp_affinity_list": parse_list}


# Files of /sys/kernel/irq/N. What a line doesn't have is an empty file.


def _empty_or_line(text: str | None) -> str:
    return text + "\n" if text else ""


_SYS_FILES: Final[dict[str, Callable[[IrqDesc], str]]] = {
    "actions": lambda desc: _empty_or_line(",".join(action.name for action in desc.actions)),
    "chip_name": lambda desc: (desc.chip.name if desc.chip else "none") + "\n",
    "hwirq": lambda desc: "",  # no irq domain: Xen's lines have numbers of their own
    "name": lambda desc: _empty_or_line(desc.name),
    "per_cpu_count": lambda desc: ",".join(str(count & 0xFFFFFFFF) for count in desc.kstat) + "\n",
    "type": lambda desc: "level\n" if desc.level else "edge\n",
    "wakeup": lambda desc: "disabled\n",
}

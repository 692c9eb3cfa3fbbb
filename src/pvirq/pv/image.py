"""Kernel images of Xen PV guests: from a file to what the domain builder has to load, and where.

`load_image` does it all; `decompress` and `parse_elf` are its two halves, for callers that keep the
decompressed ELF. Follows libelf (xen/common/libelf) and xc_dom_parse_elf_kernel
(tools/libs/guest/xg_dom_elfloader.c). Where libelf would load an image that can't run (no PV entry, file
shorter than its segments), this refuses it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pvirq.abi.elfnote import feature_names
from pvirq.abi.xen import PAGE_SIZE
from pvirq.pv import elf as elf64
from pvirq.pv.bsd_symtab import bsd_symtab
from pvirq.pv.decompress import MAX_IMAGE, decompress
from pvirq.pv.elf import Elf, ImageError
from pvirq.pv.elfnotes import U64, XenNotes, read_notes

__all__ = [
    "PV_FEATURES",
    "ImageError",
    "KernelImage",
    "Segment",
    "decompress",
    "has_xen_notes",
    "load_image",
    "parse_elf",
    "read_image",
]

# Features that a PV kernel may require. Xen's tools refuse `dom0` for a guest and never build a translated PV
# guest; they do load kernels that require writable page tables, as every Linux does: Xen carries out a PV
# guest's direct writes to its page tables.
PV_FEATURES: Final = frozenset({"writable_page_tables", "writable_descriptor_tables", "pae_pgdir_above_4gb"})

MAX_SPAN: Final = 4 << 30  # bytes from the first to the last byte of a loaded kernel

NO_NOTES: Final = (
    "has no Xen ELF notes: not built with CONFIG_XEN_PV. Use a kernel that supports Xen PV guests, "
    "such as the amd64 kernels of Debian, Ubuntu or Fedora"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of the kernel: `data`, then zeros up to `memsz` bytes.

    `paddr` is its pseudo-physical address, and virt_base + paddr is where the initial page tables map it.
    `vaddr` is the address it was linked for, which is the same except for special parts (Linux's per-CPU area
    has 0). `flags` are PF_X = 1, PF_W = 2, PF_R = 4; Xen maps all of a PV kernel writable regardless.
    """

    paddr: int
    vaddr: int
    data: memoryview
    memsz: int
    flags: int


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A PV kernel as the domain builder needs it. Addresses are virtual, in bytes, unless they say otherwise.

    `virt_kstart` to `virt_kend` is the kernel in the initial mapping, which begins at `virt_base`.
    `paddr_offset` is already taken off the segments' addresses. `exec_ranges` are the [start, end) of code;
    the rest of the initial mapping may be NX. `supported_features` and `required_features` are XENFEAT_*
    bitmaps. `elf` is the whole decompressed file.
    """

    entry: int
    segments: tuple[Segment, ...]
    virt_base: int
    paddr_offset: int
    virt_kstart: int
    virt_kend: int
    exec_ranges: tuple[tuple[int, int], ...]
    init_p2m: int | None
    hypercall_page: int | None
    hv_start_low: int | None
    phys32_entry: int | None
    mod_start_pfn: bool
    suspend_cancel: bool
    bsd_symtab: bool
    pae: str
    xen_version: str
    guest_os: str
    guest_version: str
    loader: str
    supported_features: int
    required_features: int
    l1_mfn_valid: tuple[tuple[int, int], ...]
    elf: Elf

    @property
    def supported_feature_names(self) -> frozenset[str]:
        return feature_names(self.supported_features)

    @property
    def required_feature_names(self) -> frozenset[str]:
        return feature_names(self.required_features)


def load_image(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview, features: Collection[str] = PV_FEATURES
) -> KernelImage:
    """Read, decompress and parse a kernel: a path, or a file's content.

    `features` are the names of those that the caller can give to a kernel that requires them. ImageError for
    anything that can't be run, missing and unreadable files included; here the path stands in front of the
    message, while the steps (`read_image`, `decompress`, `parse_elf`) leave that to their caller.
    """
    name = "kernel image" if isinstance(source, bytes | bytearray | memoryview) else os.fspath(source)
    try:
        data = source if isinstance(source, bytes | bytearray | memoryview) else read_image(source)
        return parse_elf(decompress(data), features)
    except ImageError as problem:
        raise ImageError(f"{name}: {problem}") from None


def read_image(path: str | os.PathLike[str]) -> bytes:
    """A kernel file's content; ImageError with the plain reason."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if stat.S_ISDIR(status.st_mode):  # open() has refused it already on most systems
                raise ImageError("is a directory, not a kernel image")
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("is not a regular file")
            if status.st_size > MAX_IMAGE:
                raise ImageError(f"is {status.st_size >> 20} MiB large: no kernel is that large")
            return file.read(MAX_IMAGE)
    except IsADirectoryError:
        raise ImageError("is a directory, not a kernel image") from None
    except PermissionError:
        raise ImageError("permission denied; copy it to where you can read it") from None
    except OSError as problem:
        raise ImageError(problem.strerror or str(problem)) from None
    except ValueError as problem:  # a NUL in the path; ImageError itself
        raise problem if isinstance(problem, ImageError) else ImageError(str(problem)) from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # or a FIFO would wait for its writer


def has_xen_notes(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a kernel that may run as a PV guest. Never raises; False for what can't be read.

    For a choice among many: where a `config-*` file lies beside the `vmlinuz-*`, its CONFIG_XEN_PV answers.
    Without one the kernel is decompressed and parsed.
    """
    path = Path(path)
    try:
        config = path.with_name("config-" + path.name.partition("-")[2])
        if path.name.startswith("vmlinuz-") and os.access(path, os.R_OK) and config.is_file():
            return b"\nCONFIG_XEN_PV=y\n" in config.read_bytes()
    except (OSError, ValueError):
        pass
    try:
        load_image(path)
    except ImageError:
        return False
    return True


def parse_elf(data: bytes | bytearray | memoryview, features: Collection[str] = PV_FEATURES) -> KernelImage:
    """Parse a decompressed kernel; elf_xen_parse and elf_load_binary. ImageError as for `load_image`.

    The image keeps views of `data`, copies nothing.
    """
    elf = elf64.parse(data)
    loadable = [p for p in elf.phdrs if p.type == elf64.PT_LOAD and p.flags & elf64.PF_RWX]
    notes = read_notes(elf)
    if notes is None:
        raise ImageError(NO_NOTES)
    _check_notes(notes, features)
    if not loadable:
        raise ImageError("corrupt ELF: nothing in it to load")

    pstart = min(p.paddr for p in loadable)
    pend = max(p.paddr + p.memsz for p in loadable)
    if pend > U64 or pend - pstart > MAX_SPAN:
        raise ImageError(f"corrupt ELF: it would load from {pstart:#x} to {pend:#x}")
    if sum(p.memsz for p in loadable) > 2 * (pend - pstart):  # overlaps without end; as elf_load_binary
        raise ImageError("corrupt ELF: its segments add up to more than the space they lie in")
    for p in loadable:
        if p.memsz < p.filesz:
            raise ImageError(f"corrupt ELF: a segment has {p.filesz:#x} bytes in the file, {p.memsz:#x} in memory")

    if notes.paddr_offset is not None and notes.virt_base is None:
        raise ImageError("its Xen notes set PADDR_OFFSET, but not VIRT_BASE")
    virt_base = notes.virt_base or 0
    # Kernels with the old section wrote virtual addresses into p_paddr (elf_xen_addr_calc_check).
    paddr_offset = notes.paddr_offset
    if paddr_offset is None:
        paddr_offset = virt_base if notes.legacy else 0

    segments = [Segment(p.paddr - paddr_offset & U64, p.vaddr, _file_part(elf, p), p.memsz, p.flags) for p in loadable]
    if notes.bsd_symtab and (symbols := bsd_symtab(elf)) is not None:
        paddr = pend + 7 & ~7
        pend = paddr + len(symbols)
        paddr -= paddr_offset
        segments.append(
            Segment(paddr & U64, virt_base + paddr & U64, memoryview(symbols), len(symbols), elf64.PF_RWX & ~1)
        )

    virt_offset = virt_base - paddr_offset
    virt_kstart, virt_kend = pstart + virt_offset & U64, pend + virt_offset & U64
    entry = elf.entry if notes.entry is None else notes.entry
    if not virt_base <= virt_kstart <= entry <= virt_kend:
        raise ImageError(
            f"corrupt ELF: entry {entry:#x} or base {virt_base:#x} don't fit the kernel's addresses "
            f"({virt_kstart:#x} to {virt_kend:#x})"
        )
    if notes.init_p2m is not None and virt_kstart <= notes.init_p2m < virt_kend:
        raise ImageError(f"its Xen notes place the p2m table at {notes.init_p2m:#x}, in the middle of the kernel")
    if notes.hypercall_page is not None and not 0 <= notes.hypercall_page - virt_base < MAX_SPAN:
        raise ImageError(f"its Xen notes place the hypercall page at {notes.hypercall_page:#x}, off the kernel")

    image = KernelImage(
        entry=entry,
        segments=tuple(segments),
        virt_base=virt_base,
        paddr_offset=paddr_offset,
        virt_kstart=virt_kstart,
        virt_kend=virt_kend,
        exec_ranges=_exec_ranges(elf, loadable, virt_offset, notes.hypercall_page),
        init_p2m=notes.init_p2m,
        hypercall_page=notes.hypercall_page,
        hv_start_low=notes.hv_start_low,
        phys32_entry=notes.phys32_entry,
        mod_start_pfn=bool(notes.mod_start_pfn),
        suspend_cancel=bool(notes.suspend_cancel),
        bsd_symtab=notes.bsd_symtab,
        pae=notes.pae,
        xen_version=notes.xen_version,
        guest_os=notes.guest_os,
        guest_version=notes.guest_version,
        loader=notes.loader,
        supported_features=notes.supported,
        required_features=notes.required,
        l1_mfn_valid=tuple(notes.l1_mfn_valid),
        elf=elf,
    )
    return image


def _check_notes(notes: XenNotes, features: Collection[str]) -> None:
    """elf_xen_note_check, and what a PV guest can't do without."""
    if notes.entry is None and notes.phys32_entry is not None:
        raise ImageError(
            "has only a PVH entry (PHYS32_ENTRY), none for PV guests: not built with CONFIG_XEN_PV. "
            "Use a kernel that supports Xen PV guests"
        )
    if not notes.loader.startswith("generic") and not notes.guest_os.startswith("linux"):
        raise ImageError(
            f"is for another loader: its Xen notes have neither LOADER 'generic' (but {notes.loader!r}) nor "
            f"GUEST_OS 'linux' (but {notes.guest_os!r})"
        )
    if not notes.xen_version.startswith("xen-3.0"):
        version = repr(notes.xen_version) if notes.xen_version else "no version of Xen"
        raise ImageError(f"is for {version}, not for 'xen-3.0' as its Xen notes must say")
    missing = feature_names(notes.required) - frozenset(features)
    if missing == {"dom0"}:
        raise ImageError("runs only as dom0 (its Xen notes require feature 'dom0'), not as a guest")
    if missing:
        raise ImageError(f"requires what a PV guest doesn't have here: {', '.join(sorted(missing))}")


def _file_part(elf: Elf, phdr: elf64.Phdr) -> memoryview:
    return elf.bytes_at(phdr.offset, phdr.filesz, f"the segment for {phdr.paddr:#x}")


def _exec_ranges(
    elf: Elf, loadable: list[elf64.Phdr], virt_offset: int, hypercall_page: int | None
) -> tuple[tuple[int, int], ...]:
    """Where code lies in the initial mapping: executable sections, or segments if there are no headers."""
    code = elf64.SHF_ALLOC | elf64.SHF_EXECINSTR
    ranges = []
    for section in elf.shdrs:
        if section.flags & code != code or not section.size or section.type == elf64.SHT_NOBITS:
            continue
        for p in loadable:  # mapped by physical address, so the way there is by the segment
            if p.vaddr <= section.addr and section.addr + section.size <= p.vaddr + p.memsz:
                start = section.addr - p.vaddr + p.paddr + virt_offset & U64
                ranges.append((start, start + section.size))
                break
    if not ranges:
        starts = ((p.paddr + virt_offset & U64, p.memsz) for p in loadable if p.flags & elf64.PF_X)
        ranges = [(start, start + size) for start, size in starts]
    if hypercall_page is not None:  # filled in by Xen, so the kernel may call it anything
        ranges.append((hypercall_page, hypercall_page + PAGE_SIZE))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)

"""Files of saved domains, as `xl save` writes them: xl's header, libxl's stream, libxc's stream of one PV domain.

A file of a real PV domain can be read as well, and what is written here follows the same documents: docs/specs/
libxc-migration-stream.pandoc and libxl-migration-stream.pandoc, struct save_file_header of tools/xl/xl.h, all of 4.17.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from pvirq.abi import migration as abi
from pvirq.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pvirq.pv.save import MOST_PFNS, SavedDomain, SavedVcpu
from pvirq.pv.saved_pages import ENTRIES, Descriptor, FilePages, MemoryPages, Pages, U64Array
from pvirq.toolstack.config import DomainConfig

PAGES_PER_RECORD: Final = 1024  # MAX_BATCH_SIZE
XEN_VERSION: Final = (4, 17)
TYPE_SHIFT: Final = 60
PFN_MASK: Final = (1 << 52) - 1
LARGEST_RECORD: Final = 128 << 20  # REC_LENGTH_MAX
LARGEST_CONFIG: Final = 16 << 20
MOST_VCPUS: Final = 4096
WITHOUT_DATA: Final = (abi.PFINFO_BROKEN, abi.PFINFO_XALLOC, abi.PFINFO_XTAB)
GONE: Final = (abi.PFINFO_BROKEN, abi.PFINFO_XTAB)
# Records that say nothing to a host with one kind of CPU and one clock.
IGNORED: Final = (abi.REC_X86_TSC_INFO, abi.REC_X86_CPUID_POLICY, abi.REC_X86_MSR_POLICY, abi.REC_STATIC_DATA_END,
                  abi.REC_VERIFY, abi.REC_X86_PV_VCPU_MSRS, abi.REC_X86_PV_VCPU_XSAVE)  # fmt: skip


class SaveFileError(Exception):
    """No file of a saved PV domain, or a damaged one. One line."""


# -- writing -----------------------------------------------------------------------------------------------------------


@contextmanager
def replaced(file: str | os.PathLike[str] | BinaryIO) -> Iterator[BinaryIO]:
    """A new file in the place of that by name, once all is in it: the old one may be a running guest's memory."""
    if not isinstance(file, (str, os.PathLike)):
        yield file
        return
    path = os.path.realpath(file)
    if os.path.exists(path) and not os.path.isfile(path):  # a device, a pipe
        with open(path, "wb") as out:
            yield out
        return
    new = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}")
    try:
        with open(new, "xb") as out:
            yield out
        os.replace(new, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(new)
        if isinstance(error, OSError) and error.filename == new:
            error.filename = path
        raise


def write(file: BinaryIO, config: DomainConfig, saved: SavedDomain, *, aligned: bool = False) -> None:
    """Write a whole file. OSError as writing gives it.

    `aligned`: for a file that begins at a page's boundary in another one. Pages do so as well then, and can be mapped
    from there (`read`). In front of them are records that say nothing, which any reader of the format passes over.
    """
    _Writer(file, aligned).write(config, saved)


class _Writer:
    def __init__(self, file: BinaryIO, aligned: bool) -> None:
        self.file = file
        self.aligned = aligned
        self.at = 0

    def write(self, config: DomainConfig, saved: SavedDomain) -> None:
        text = json.dumps(config.to_json(), indent=4).encode() + b"\0"
        text += bytes(-(abi.XL_HEADER.size + 4 + len(text)) % 8)  # so that what follows is at whole multiples of 8
        flags = abi.XL_MANDATORY_FLAG_JSON | abi.XL_MANDATORY_FLAG_STREAMv2
        self._put(abi.XL_HEADER.pack(abi.XL_MAGIC, abi.XL_BYTEORDER, flags, 0, len(text) + 4))
        self._put(struct.pack("<I", len(text)) + text)
        self._put(abi.LIBXL_HEADER.pack(abi.LIBXL_IDENT, abi.LIBXL_VERSION, 0))
        self._record(abi.LIBXL_REC_LIBXC_CONTEXT)
        self._write_libxc(saved)
        self._record(abi.LIBXL_REC_END)

    def _put(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.at += len(data)

    def _record(self, kind: int, *parts: bytes | memoryview) -> None:
        length = sum(map(len, parts))
        self._put(abi.RECORD.pack(kind, length))
        for part in parts:
            self._put(part)
        self._put(bytes(-length % 8))

    def _write_libxc(self, saved: SavedDomain) -> None:
        self._put(abi.LIBXC_IMAGE_HEADER.pack(abi.LIBXC_MARKER, abi.LIBXC_ID, abi.LIBXC_VERSION, 0, 0, 0))
        self._put(abi.LIBXC_DOMAIN_HEADER.pack(abi.DOMAIN_TYPE_X86_PV, PAGE_SHIFT, 0, *XEN_VERSION))
        self._record(abi.REC_X86_PV_INFO, abi.PV_INFO.pack(8, 4))
        self._record(abi.REC_STATIC_DATA_END)
        frames = struct.pack(f"<{len(saved.p2m_frames)}Q", *saved.p2m_frames)
        self._record(abi.REC_X86_PV_P2M_FRAMES, abi.P2M_FRAMES_HEADER.pack(0, saved.max_pfn), frames)
        self._write_pages(saved)
        self._record(abi.REC_SHARED_INFO, saved.shared_info)
        for vcpu_id, vcpu in sorted(saved.vcpus.items()):
            header = abi.VCPU_HEADER.pack(vcpu_id, 0)
            self._record(abi.REC_X86_PV_VCPU_BASIC, header, vcpu.context)
            if vcpu.extended:
                self._record(abi.REC_X86_PV_VCPU_EXTENDED, header, vcpu.extended)
        self._record(abi.REC_END)

    def _write_pages(self, saved: SavedDomain) -> None:
        """Those with data first, in records as large as can be; those of zeros need none.

        Of these a page table does, all the same: it has to say what it is.
        """
        has_data = np.zeros(len(saved.pfns), dtype=bool)
        has_data[saved.rows] = True
        empty_tables = np.flatnonzero(~has_data & (saved.types != abi.PFINFO_NOTAB))
        others = np.flatnonzero(~has_data & (saved.types == abi.PFINFO_NOTAB))
        order = np.concatenate([saved.rows, empty_tables, others])
        types = saved.types[order].astype(np.uint64)
        with_data = len(order) - len(others)
        types[with_data:] = abi.PFINFO_XALLOC
        names = saved.pfns[order] | types << np.uint64(TYPE_SHIFT)
        zeros = bytes(PAGES_PER_RECORD * PAGE_SIZE)
        data = saved.data[0].array() if len(saved.data) == 1 else np.concatenate([some.array() for some in saved.data])
        for start in range(0, len(order), PAGES_PER_RECORD):
            some = names[start : start + PAGES_PER_RECORD]
            before = abi.RECORD.size + abi.PAGE_DATA_HEADER.size + some.nbytes
            if self.aligned and start < with_data and (self.at + before) % PAGE_SIZE:
                self._record(abi.REC_PADDING, bytes(-(self.at + before + abi.RECORD.size) % PAGE_SIZE))
            contents = data[start : start + PAGES_PER_RECORD].reshape(-1).view(np.uint8).data
            of_zeros = max(min(start + len(some), with_data) - max(start, len(data)), 0)  # the empty tables among them
            self._record(
                abi.REC_PAGE_DATA, abi.PAGE_DATA_HEADER.pack(len(some), 0), some.tobytes(), contents,
                zeros[: of_zeros * PAGE_SIZE],
            )  # fmt: skip


# -- reading -----------------------------------------------------------------------------------------------------------


def read(file: BinaryIO, *, mapped: bool = False) -> tuple[DomainConfig, SavedDomain]:
    """Read a file that `write` or xl made. SaveFileError; OSError as reading gives it.

    Pages stay where they are until the domain is restored, if `file` is one of the system's: it may be closed
    meanwhile, but not changed. With `mapped` those that are aligned to pages stay there even then, each until it is
    written.
    """
    config = _read_config(file)
    ident, version, options = abi.LIBXL_HEADER.unpack(_take(file, abi.LIBXL_HEADER.size, "libxl's header"))
    if (ident, version) != (abi.LIBXL_IDENT, abi.LIBXL_VERSION):
        raise SaveFileError(f"libxl's stream has ident {ident:#x} and version {version}: version 2 is known")
    if options:
        raise SaveFileError("libxl's stream is big-endian, or of a 32-bit toolstack's legacy form")
    saved = None
    while True:
        kind, length = abi.RECORD.unpack(_take(file, abi.RECORD.size, "a record of libxl's"))
        if kind == abi.LIBXL_REC_END:
            break
        if kind == abi.LIBXL_REC_LIBXC_CONTEXT and saved is None:
            saved = _LibxcReader(file, mapped).read()
        elif kind in (abi.LIBXL_REC_XENSTORE_DATA, abi.LIBXL_REC_EMULATOR_CONTEXT) and length <= LARGEST_RECORD:
            _take(file, length + -length % 8, "a record of libxl's")  # of a device model's, which no PV domain here has
        else:
            raise SaveFileError(f"libxl's stream has a record of type {kind:#x} here")
    if saved is None:
        raise SaveFileError("there is no domain in it")
    return config, saved


def _take(file: BinaryIO, size: int, what: str) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise SaveFileError(f"the file ends within {what}")
    return data


def _read_config(file: BinaryIO) -> DomainConfig:
    header = file.read(abi.XL_HEADER.size)
    if len(header) < abi.XL_HEADER.size or not header.startswith(abi.XL_MAGIC):
        raise SaveFileError("not a saved domain: it doesn't begin as xl's files do")
    _, byteorder, mandatory, _, length = abi.XL_HEADER.unpack(header)
    if byteorder != abi.XL_BYTEORDER:
        raise SaveFileError("saved by a machine of another byte order")
    unknown = mandatory & ~(abi.XL_MANDATORY_FLAG_JSON | abi.XL_MANDATORY_FLAG_STREAMv2)
    if unknown or not mandatory & abi.XL_MANDATORY_FLAG_STREAMv2:
        raise SaveFileError(f"saved by another generation of Xen's tools (mandatory flags {mandatory:#x})")
    if not 4 <= length <= LARGEST_CONFIG:
        raise SaveFileError(f"its configuration has {length} bytes")
    data = _take(file, length, "the configuration")
    (size,) = struct.unpack_from("<I", data)
    text = data[4 : 4 + size].rstrip(b"\0")
    if not mandatory & abi.XL_MANDATORY_FLAG_JSON:
        raise SaveFileError("its configuration is no JSON: saved by xl of before 4.5")
    try:
        return DomainConfig.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise SaveFileError(f"its configuration can't be read: {error}") from None


@dataclass
class _Pages:
    """What PAGE_DATA records have brought so far: an item for each. Of a page that comes twice the later one counts."""

    pfns: list[U64Array] = field(default_factory=list)
    types: list[U64Array] = field(default_factory=list)
    data: list[Pages] = field(default_factory=list)  # of those pages that have any


def _has_data(types: U64Array) -> npt.NDArray[np.bool_]:
    """Which pages come with their contents."""
    return ~np.isin(types, WITHOUT_DATA)


class _LibxcReader:
    """Reads one PV domain's stream (xc_domain_restore)."""

    def __init__(self, file: BinaryIO, mapped: bool) -> None:
        self.file = file
        self.mapped = mapped
        self.descriptor = _descriptor(file)
        self.pages = _Pages()
        self.max_pfn = -1
        self.frames: list[int] = []
        self.vcpus: dict[int, SavedVcpu] = {}
        self.shared_info = b""

    def read(self) -> SavedDomain:
        marker, ident, version, options, _, _ = abi.LIBXC_IMAGE_HEADER.unpack(
            _take(self.file, abi.LIBXC_IMAGE_HEADER.size, "libxc's header")
        )
        if (marker, ident) != (abi.LIBXC_MARKER, abi.LIBXC_ID) or version not in (2, abi.LIBXC_VERSION):
            raise SaveFileError(f"libxc's stream has version {version}: 2 and 3 are known")
        if options & abi.LIBXC_OPTION_BIG_ENDIAN:
            raise SaveFileError("libxc's stream is big-endian")
        kind, shift, _, _, _ = abi.LIBXC_DOMAIN_HEADER.unpack(
            _take(self.file, abi.LIBXC_DOMAIN_HEADER.size, "the domain's header")
        )
        if kind != abi.DOMAIN_TYPE_X86_PV or shift != PAGE_SHIFT:
            raise SaveFileError("the domain is no x86 PV domain: only those can run here")
        while True:
            kind, length = abi.RECORD.unpack(_take(self.file, abi.RECORD.size, "a record"))
            if length > LARGEST_RECORD:
                raise SaveFileError(f"a record of type {kind:#x} has {length} bytes")
            if kind == abi.REC_PAGE_DATA:
                self._page_data(length)
                continue
            body = _take(self.file, length + -length % 8, f"a record of type {kind:#x}")[:length]
            if kind == abi.REC_END:
                return self._result()
            self._handle(kind, body)

    def _handle(self, kind: int, body: bytes) -> None:
        if kind == abi.REC_X86_PV_INFO:
            if len(body) < abi.PV_INFO.size or abi.PV_INFO.unpack_from(body) != (8, 4):
                raise SaveFileError("the domain isn't a 64-bit one: only those can run here")
        elif kind == abi.REC_X86_PV_P2M_FRAMES:
            self._p2m_frames(body)
        elif kind in (abi.REC_X86_PV_VCPU_BASIC, abi.REC_X86_PV_VCPU_EXTENDED):
            self._vcpu(kind, body)
        elif kind == abi.REC_SHARED_INFO:
            if len(body) != PAGE_SIZE:
                raise SaveFileError(f"shared_info has {len(body)} bytes")
            self.shared_info = body
        elif kind not in IGNORED and not kind & abi.REC_OPTIONAL:
            raise SaveFileError(f"a record of type {kind:#x} isn't known")

    def _p2m_frames(self, body: bytes) -> None:
        if len(body) < abi.P2M_FRAMES_HEADER.size:
            raise SaveFileError("a record of p2m frames is too short")
        start, end = abi.P2M_FRAMES_HEADER.unpack_from(body)
        count = end // ENTRIES + 1 - start // ENTRIES
        if start > end or end >= MOST_PFNS or len(body) != abi.P2M_FRAMES_HEADER.size + 8 * count:
            raise SaveFileError(f"a record of p2m frames for {start:#x} to {end:#x} has {len(body)} bytes")
        self.max_pfn = max(self.max_pfn, end)
        first = start // ENTRIES
        self.frames += [0] * (self.max_pfn // ENTRIES + 1 - len(self.frames))
        self.frames[first : first + count] = struct.unpack_from(f"<{count}Q", body, abi.P2M_FRAMES_HEADER.size)

    def _vcpu(self, kind: int, body: bytes) -> None:
        if len(body) < abi.VCPU_HEADER.size:
            raise SaveFileError("a vCPU's record is too short")
        vcpu_id, _ = abi.VCPU_HEADER.unpack_from(body)
        if vcpu_id >= MOST_VCPUS:
            raise SaveFileError(f"a record of vCPU {vcpu_id}")
        vcpu = self.vcpus.setdefault(vcpu_id, SavedVcpu(b""))
        rest = body[abi.VCPU_HEADER.size :]
        if kind == abi.REC_X86_PV_VCPU_BASIC:
            vcpu.context = rest
        else:
            vcpu.extended = rest

    def _page_data(self, length: int) -> None:
        if length < abi.PAGE_DATA_HEADER.size:
            raise SaveFileError("a record of pages is too short")
        count, _ = abi.PAGE_DATA_HEADER.unpack(_take(self.file, abi.PAGE_DATA_HEADER.size, "a record of pages"))
        left = length - abi.PAGE_DATA_HEADER.size - 8 * count
        if left < 0:
            raise SaveFileError(f"a record of {count} pages has {length} bytes")
        names = np.frombuffer(_take(self.file, 8 * count, "a record of pages"), "<u8")
        pfns, types = names & np.uint64(PFN_MASK), names >> np.uint64(TYPE_SHIFT)
        beyond = pfns[pfns > self.max_pfn]
        if len(beyond):
            raise SaveFileError(f"page {int(beyond[0]):#x} is beyond the last, {self.max_pfn:#x}")
        pages = int(_has_data(types).sum())
        left -= PAGE_SIZE * pages
        if left < 0:
            raise SaveFileError("a record of pages is cut short")
        if left:
            raise SaveFileError(f"a record of pages has {left} bytes too many")
        self.pages.pfns.append(pfns)
        self.pages.types.append(types)
        if pages:
            self.pages.data.append(self._contents(pages))

    def _contents(self, count: int) -> Pages:
        """The next `count` pages of the file."""
        size, what = count * PAGE_SIZE, "a record of pages"
        if self.descriptor is None:
            return MemoryPages(np.frombuffer(_take(self.file, size, what), "<u8").reshape(-1, ENTRIES))
        offset = self.file.tell()
        if os.fstat(self.descriptor.number).st_size < offset + size:
            raise SaveFileError(f"the file ends within {what}")
        self.file.seek(size, os.SEEK_CUR)
        return FilePages(self.descriptor, offset, count, self.mapped)

    def _result(self) -> SavedDomain:
        if not self.shared_info or self.max_pfn < 0:
            raise SaveFileError("shared_info or the p2m list is missing")
        pages = self.pages
        none = np.empty(0, dtype=np.uint64)
        all_pfns, all_types = np.concatenate([none, *pages.pfns]), np.concatenate([none, *pages.types])
        where = np.cumsum(_has_data(all_types)) - 1  # among those with data
        # Each pfn once, as it came last, in ascending order.
        pfns, from_end = np.unique(all_pfns[::-1], return_index=True)
        last = len(all_pfns) - 1 - from_end
        there = ~np.isin(all_types[last], GONE)
        pfns, last = pfns[there], last[there]
        types = all_types[last]
        rows = np.flatnonzero(_has_data(types))
        data = pages.data
        # Pages stay in the order of their contents, unless some of these are out of date.
        chosen = where[last[rows]]
        rows = rows[np.argsort(chosen)]
        if len(chosen) != sum(map(len, data)):
            none = np.empty((0, ENTRIES), dtype=np.uint64)
            data = [MemoryPages(np.concatenate([none, *(some.array() for some in data)])[np.sort(chosen)])]
        types[types == abi.PFINFO_XALLOC] = 0
        return SavedDomain(
            self.max_pfn, self.frames, pfns, types.astype(np.uint8), rows, data, self.vcpus, self.shared_info
        )  # fmt: skip


def _descriptor(file: BinaryIO) -> Descriptor | None:
    """Of a file in which what is read lies as it is: others have a descriptor too, as one that is compressed."""
    raw = file.raw if isinstance(file, (io.BufferedReader, io.BufferedRandom)) else file
    if not isinstance(raw, io.FileIO) or not stat.S_ISREG(os.fstat(raw.fileno()).st_mode):
        return None
    return Descriptor(raw.fileno())

"""From a kernel file to the ELF in it: bzImage payloads and plain compressed files.

The formats are those of xc_dom_probe_bzimage_kernel (tools/libs/guest/xg_dom_bzimageloader.c) except LZO. In
a bzImage, boot protocol 2.08 or later tells where the payload lies, and the payload's last four bytes are the
size of what is in it: the kernel's build appends them, and gzip's own trailer ends with them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, Protocol

from pvirq.pv.elf import ImageError, is_elf

MAX_IMAGE: Final = 1 << 30  # XC_DOM_DECOMPRESS_MAX: nothing decompresses to more
MAX_NESTING: Final = 3  # gzip around a bzImage around a payload

HDRS_MAGIC: Final = b"HdrS"
SETUP_SECTS: Final = 0x1F1
HDRS_OFFSET: Final = 0x202
PROTOCOL_VERSION: Final = 0x206
PAYLOAD_OFFSET: Final = 0x248
SETUP_HEADER_END: Final = 0x250

LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"
LZ4_FRAME_MAGIC: Final = b"\x04\x22\x4d\x18"
LZ4_LEGACY_BLOCK: Final = 8 << 20  # every block but the last one holds this much

# The kernel's build has compressed with xz dictionaries of up to 128 MiB; the decoder needs a little more.
LZMA_MEMORY: Final = 256 << 20
# One byte of zstd can stand for 43,000; feeding it in small pieces bounds what a bomb makes before it is
# noticed.
ZSTD_PIECE: Final = 16 << 10
MAX_STREAMS: Final = 256  # end to end in one file; the libraries copy the rest of the input for each


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes | None: ...
    def decompress(self, data: memoryview | bytes, max_length: int) -> bytes: ...


def decompress(data: bytes | bytearray | memoryview) -> memoryview:
    """The ELF inside a bzImage or a compressed file; an ELF is returned as it is.

    The result doesn't depend on anything but `data`, so callers may cache it. ImageError when there is no ELF
    in it, when the data are damaged, or when they would grow beyond MAX_IMAGE.
    """
    view = memoryview(data).cast("B")
    size: int | None = None
    for _ in range(MAX_NESTING):
        if not view:
            raise ImageError("is empty")
        if is_elf(view):
            return view
        if view[HDRS_OFFSET : HDRS_OFFSET + 4].tobytes() == HDRS_MAGIC:
            view, size = _bzimage_payload(view)
            if is_elf(view):
                return view
        view, size = memoryview(_decompress_any(view, size)), None
    if is_elf(view):
        return view
    raise ImageError("is not a kernel: no ELF in it after several layers of compression")


def _bzimage_payload(image: memoryview) -> tuple[memoryview, int | None]:
    """A bzImage's payload and the size that it must decompress to."""
    if len(image) < SETUP_HEADER_END:
        raise ImageError(f"truncated bzImage: only {len(image)} bytes")
    (version,) = struct.unpack_from("<H", image, PROTOCOL_VERSION)
    if version < 0x208:
        raise ImageError(
            f"bzImage has boot protocol {version >> 8}.{version & 0xFF:02}, but its kernel can be found only "
            "from 2.08 (Linux 2.6.26) on; use the vmlinux file instead"
        )
    offset, length = struct.unpack_from("<II", image, PAYLOAD_OFFSET)
    offset += (image[SETUP_SECTS] + 1) * 512
    if offset + length > len(image):
        raise ImageError(
            f"truncated or corrupt bzImage: its kernel ends at {offset + length}, the file at {len(image)}"
        )
    payload = image[offset : offset + length]
    if length < 8:
        raise ImageError(f"corrupt bzImage: a compressed kernel of {length} bytes")
    if is_elf(payload):
        return payload, None
    (size,) = struct.unpack_from("<I", payload, length - 4)
    if size > MAX_IMAGE:
        raise ImageError(
            f"corrupt bzImage: a kernel of {size >> 20} MiB in a payload of {length} bytes; "
            f"more than {MAX_IMAGE >> 20} MiB is not accepted"
        )
    return (payload if payload[:2].tobytes() == b"\x1f\x8b" else payload[:-4]), size


def _decompress_any(data: memoryview, size: int | None) -> bytes:
    """Decompress by magic number. `size`: what must come out, exactly; None: anything up to MAX_IMAGE."""
    # Libraries are imported where needed: a run uses one of them, or none when the ELF is cached.
    limit = MAX_IMAGE if size is None else size
    magic = bytes(data[:6])
    found = next((entry for entry in _FORMATS if magic.startswith(entry[0])), None)
    if found is None:
        if size is not None:
            raise ImageError(f"bzImage with an unknown compression (magic bytes {magic.hex(' ')})")
        raise ImageError(
            f"is not a kernel: neither bzImage nor ELF nor a known compression (starts with {magic.hex(' ')})"
        )
    _, name, function = found
    try:
        out = function(data, limit)
    except MemoryError:
        raise ImageError(f"not enough memory to decompress the kernel ({name})") from None
    if size is not None and len(out) != size:
        raise ImageError(
            f"truncated or corrupt bzImage: its {name} data should become {size} bytes, "
            + (f"became {len(out)}" if len(out) < size else "become more")
        )
    if len(out) > MAX_IMAGE:
        raise ImageError(f"{name} data grow beyond {MAX_IMAGE >> 20} MiB: no kernel is that large")
    return out


def _streams(
    data: memoryview,
    limit: int,
    name: str,
    new: Callable[[], _Decompressor],
    error: type[Exception],
    magic: bytes,
) -> bytes:
    """Decompress a stream, or several end to end (of parallel compressors), to limit + 1 bytes at most."""
    parts: list[bytes] = []
    room = limit + 1
    rest: memoryview | bytes = data
    for _ in range(MAX_STREAMS):
        decompressor = new()
        try:
            part = decompressor.decompress(rest, room)
            # The C libraries may stop at a full internal buffer before they have looked at the stream's end.
            while not decompressor.eof and len(part) < room:
                more = decompressor.decompress(b"", room - len(part))
                if not more:
                    break
                part += more
        except (error, EOFError, ValueError, OverflowError) as problem:
            raise ImageError(f"corrupt {name} data: {problem}") from None
        parts.append(part)
        room -= len(part)
        if not room:
            break
        if not decompressor.eof:
            raise ImageError(f"truncated {name} data: they end after {limit + 1 - room} decompressed bytes")
        rest = decompressor.unused_data or b""
        if not rest.startswith(magic):  # the end; or padding, or a size appended by the kernel's build
            break
    else:
        raise ImageError(f"corrupt {name} data: more than {MAX_STREAMS} streams end to end")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Gzip:
    """zlib's decompressor with the interface of the others: it hands back input that it didn't get to."""

    def __init__(self) -> None:
        import zlib

        self._zlib = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    def decompress(self, data: memoryview | bytes, max_length: int) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)


def _gzip(data: memoryview, limit: int) -> bytes:
    import zlib

    return _streams(data, limit, "gzip", _Gzip, zlib.error, b"\x1f\x8b")


def _bzip2(data: memoryview, limit: int) -> bytes:
    import bz2

    return _streams(data, limit, "bzip2", bz2.BZ2Decompressor, OSError, b"BZh")


def _xz(data: memoryview, limit: int) -> bytes:
    import lzma

    def new() -> _Decompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)

    return _streams(data, limit, "xz", new, lzma.LZMAError, b"\xfd7zXZ")


def _lzma(data: memoryview, limit: int) -> bytes:
    import lzma

    def new() -> _Decompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=LZMA_MEMORY)

    return _streams(data, limit, "lzma", new, lzma.LZMAError, b"]\0\0")


def _lz4_frame(data: memoryview, limit: int) -> bytes:
    import lz4.frame

    return _streams(data, limit, "lz4", lz4.frame.LZ4FrameDecompressor, RuntimeError, LZ4_FRAME_MAGIC)


def _lz4_legacy(data: memoryview, limit: int) -> bytes:
    """The format of `lz4 -l`: blocks with their compressed size before them, no checksum, no end mark."""
    import lz4.block

    parts: list[bytes] = []
    total = position = 0
    while position < len(data):
        if data[position : position + 4].tobytes() == LZ4_LEGACY_MAGIC:  # the start, or another file appended
            position += 4
            continue
        length = int.from_bytes(data[position : position + 4], "little")
        if position + 4 == len(data) and length == total:  # a bare payload with its appended size
            break
        position += 4
        if not 0 < length <= len(data) - position:
            raise ImageError(f"truncated or corrupt lz4 data: a block of {length} bytes, {len(data) - position} left")
        try:
            part = lz4.block.decompress(data[position : position + length], uncompressed_size=LZ4_LEGACY_BLOCK)
        except (lz4.block.LZ4BlockError, ValueError, OverflowError) as problem:
            raise ImageError(f"corrupt lz4 data: {problem}") from None
        parts.append(part)
        position += length
        total += len(part)
        if total > limit:
            break
    return b"".join(parts)


def _zstd(data: memoryview, limit: int) -> bytes:
    import zstandard

    parts: list[bytes] = []
    total = 0
    decompressor = zstandard.ZstdDecompressor().decompressobj(write_size=1 << 20)
    try:
        for position in range(0, len(data), ZSTD_PIECE):
            part = decompressor.decompress(data[position : position + ZSTD_PIECE])
            parts.append(part)
            total += len(part)
            if total > limit or decompressor.eof:
                break
    except (zstandard.ZstdError, ValueError) as problem:
        raise ImageError(f"corrupt zstd data: {problem}") from None
    if not decompressor.eof and total <= limit:
        raise ImageError(f"truncated zstd data: they end after {total} decompressed bytes")
    return b"".join(parts)


def _lzo(data: memoryview, limit: int) -> bytes:
    raise ImageError("kernel compressed with LZO, which can't be read here; decompress it first (use its vmlinux)")


_FORMATS: Final[tuple[tuple[bytes, str, Callable[[memoryview, int], bytes]], ...]] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _bzip2),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"]\0\0", "lzma", _lzma),
    (b"\x89LZO", "lzo", _lzo),
    (LZ4_LEGACY_MAGIC, "lz4", _lz4_legacy),
    (LZ4_FRAME_MAGIC, "lz4", _lz4_frame),
)

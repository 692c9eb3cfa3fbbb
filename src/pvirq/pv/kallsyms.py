"""The symbol table that a Linux kernel carries for its own oops messages, found in an image without symbols.

scripts/kallsyms.c writes these arrays into .rodata, each aligned to 8 bytes; kernel/kallsyms.c reads them.
Nothing points to them, so they are found by what they must satisfy, from the one that is easiest to
recognize:

    token_table   256 NUL-terminated strings; those for the digits are the digits themselves
    token_index   256 u16: where each token begins in token_table. Unique, so finding it proves both
    markers       u32 (u64 before 4.20): where every 256th symbol begins in names; before token_table
    names         per symbol a length and that many token numbers; before markers
    num_syms      u32, before names
    addresses     before num_syms, or from 6.4 on behind token_index; in one of four encodings:
                  u64 addresses (CONFIG_KALLSYMS_BASE_RELATIVE off); u32 offsets from relative_base, a u64
                  behind them; the same with per-CPU symbols as absolute values
                  (CONFIG_KALLSYMS_ABSOLUTE_PERCPU); from 7.0 on s32 offsets, each from its own place, without
                  a base

A length is one byte, and from 6.1 on (73bbb94466fd, "big" symbols) two when the first has its top bit set.
From 6.2 on (and in stable 6.1) kallsyms_seqs_of_names lies about too; it isn't needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

DIGITS: Final = b"".join(b"%d\0" % digit for digit in range(10))
TOKENS: Final = 256
MAX_TOKEN_TABLE: Final = 1 << 14
MARKER_EVERY: Final = 256
MAX_SYMBOLS: Final = 1 << 22
# 256 names take from 2 bytes (length, one token) to half a KiB each.
MARKER_STEP: Final = (2 * MARKER_EVERY, 514 * MARKER_EVERY)
# All the arrays before token_table together; the largest kernels have about 5 MiB of them.
MAX_TABLES: Final = 32 << 20
MAX_CANDIDATES: Final = 256  # places that look like a table at first sight; real kernels have a few
MAX_GAP: Final = 4096  # between arrays, for a linker that aligns more than it needs


class Kallsyms(NamedTuple):
    """A kernel's own symbols, in its order: ascending addresses, per-CPU offsets (if absolute) first.

    `addresses` are virtual addresses as linked; `name(i)` is the name of symbol i, decoded when asked for.
    """

    addresses: NDArray[np.uint64]
    name: Callable[[int], str]
    names: Callable[[], Iterator[str]]


class _Names(NamedTuple):
    start: int  # file offset of kallsyms_names
    positions: list[int]  # of each symbol's tokens, file offsets
    lengths: list[int]  # in tokens


def find_kallsyms(data: memoryview, file_to_va: Callable[[int], int | None]) -> Kallsyms | None:
    """The kallsyms of a decompressed kernel, or None if there are none that make sense.

    `data` is the image with file offsets multiples of 8 where addresses are; `file_to_va` maps a file offset
    to the address that it is loaded at.
    """
    raw = bytes(data) if not isinstance(data.obj, bytes) or len(data.obj) != len(data) else data.obj
    for table, index in _token_tables(raw):
        names = _find_names(raw, table)
        if names is None:
            continue
        addresses = _find_addresses(raw, names, index + 2 * TOKENS, file_to_va)
        if addresses is None:
            continue
        tokens = raw[table:index].split(b"\0")[:TOKENS]
        return _decoder(raw, names, tokens, addresses)
    return None


def _align8(position: int) -> int:
    return (position + 7) & ~7


def _token_tables(raw: bytes) -> Iterator[tuple[int, int]]:
    """Offsets of (token_table, token_index), normally one pair."""
    digits = -1
    for _ in range(MAX_CANDIDATES):
        digits = raw.find(DIGITS, digits + 1)
        if digits < 0:
            return
        # Token number 48 is here: go back to the first one. Only the bytes before the table decide whether
        # one more NUL belongs to it, so several beginnings are possible; the index says which it is.
        first_nul = digits
        for _ in range(ord("0") - 1):
            first_nul = raw.rfind(b"\0", max(0, digits - MAX_TOKEN_TABLE), first_nul - 1) + 1
            if not first_nul:
                break
        if not first_nul:
            continue
        before = raw.rfind(b"\0", max(0, first_nul - 1024), first_nul - 1) + 1
        end = digits
        for _ in range(TOKENS - ord("0")):
            end = raw.find(b"\0", end, digits + MAX_TOKEN_TABLE) + 1
            if not end:
                break
        if not end:
            continue
        for start in range(_align8(before), first_nul, 8):
            lengths = [len(token) + 1 for token in raw[start:end].split(b"\0")[:TOKENS]]
            offsets = np.concatenate(([0], np.cumsum(lengths[:-1]))).astype("<u2")
            index = raw.find(offsets.tobytes(), end, end + MAX_GAP + 2 * TOKENS)
            if index >= 0:
                yield start, index
                break


def _find_names(raw: bytes, table: int) -> _Names | None:
    """Find markers, names and num_syms, which lie in this order backwards from token_table."""
    base = max(0, table - MAX_TABLES) & ~7
    window = memoryview(raw)[base:table]
    for width in (4, 8):
        words = np.frombuffer(window[: len(window) & ~7], dtype=f"<u{width}")
        if len(words) < 3:
            continue
        low, high = MARKER_STEP
        # The first marker is 0, and the array begins at a multiple of 8.
        candidates = np.flatnonzero((words[:-2] == 0) & (words[1:-1] >= low) & (words[1:-1] <= high))
        if width == 4:
            candidates = candidates[candidates % 2 == 0]
        for candidate in candidates[::-1][:MAX_CANDIDATES].tolist():
            found = _names_before(raw, base + candidate * width, words[candidate:])
            if found is not None:
                return found
    return None


def _names_before(raw: bytes, markers_at: int, words: NDArray[np.unsignedinteger]) -> _Names | None:
    """The names that markers at this place could be of; None if they aren't markers.

    `words` are the integers from there on, more than there may be markers.
    """
    low, high = MARKER_STEP
    steps = np.diff(words[: MAX_SYMBOLS // MARKER_EVERY].astype(np.int64))
    wrong = np.flatnonzero((steps < low) | (steps > high))
    count = int(wrong[0]) + 1 if len(wrong) else len(steps) + 1
    if count < 2:
        return None
    # What follows the array may look like one more marker, by chance.
    for markers in (words[:count].tolist(), words[: count - 1].tolist()):
        if len(markers) < 2:
            break
        # The last 256 names or fewer lie behind the last marker, then at most a little padding.
        end = markers_at - markers[-1]
        first = max(0, end - high - MAX_GAP) & ~7
        if end - first < 16:
            continue
        counts = np.frombuffer(raw, "<u8", (end - first) // 8, first) & np.uint64(0xFFFFFFFF)
        fits = (counts + np.uint64(MARKER_EVERY - 1)) // np.uint64(MARKER_EVERY) == len(markers)
        for i in np.flatnonzero(fits)[::-1].tolist():
            for big in (True, False):
                names = _walk(raw, first + 8 * i + 8, int(counts[i]), markers, markers_at, big)
                if names is not None:
                    return names
    return None


def _walk(raw: bytes, start: int, symbols: int, markers: Sequence[int], end: int, big: bool) -> _Names | None:
    """Go through all names and compare with the markers; None unless they agree, to the last byte."""
    positions: list[int] = []
    lengths: list[int] = []
    position = start
    for i in range(symbols):
        if position >= end or (not i % MARKER_EVERY and position - start != markers[i // MARKER_EVERY]):
            return None
        length = raw[position]
        position += 1
        if length & 0x80 and big:
            length = length & 0x7F | raw[position] << 7
            position += 1
        if not length:
            return None
        positions.append(position)
        lengths.append(length)
        position += length
    return _Names(start, positions, lengths) if position <= end <= position + MAX_GAP else None


def _find_addresses(
    raw: bytes, names: _Names, behind_index: int, file_to_va: Callable[[int], int | None]
) -> NDArray[np.uint64] | None:
    """Find and decode the address table, by trying every layout: it must ascend, and lie in the kernel."""
    count = len(names.positions)
    num_syms = names.start - 8
    after = _align8(behind_index)
    base_after = after + _align8(4 * count)
    base_before = num_syms - 8
    tries = (
        # (place of the table, place of relative_base)
        (base_before - _align8(4 * count), base_before),
        (after, base_after),
    )
    for place, base_place in tries:
        for decode in (_relative, _relative_absolute_percpu):
            base = int.from_bytes(raw[base_place : base_place + 8], "little")
            found = _table(raw, place, count, "<i4")
            if found is not None and file_to_va(place) is not None and base >> 47:
                addresses = decode(found, base)
                if _sensible(addresses):
                    return addresses
    # Only with tables behind the index, for that change came first.
    va = file_to_va(after)
    found = _table(raw, after, count, "<i4")
    if found is not None and va is not None:
        places = np.uint64(va) + np.arange(count, dtype=np.uint64) * np.uint64(4)
        addresses = places + found.astype(np.int64).astype(np.uint64)
        if _sensible(addresses):
            return addresses
    for place in (num_syms - 8 * count, after):
        absolute = _table(raw, place, count, "<u8")
        if absolute is not None and _sensible(absolute.astype(np.uint64)):
            return absolute.astype(np.uint64)
    return None


def _table(raw: bytes, place: int, count: int, kind: str) -> NDArray[np.integer] | None:
    size = count * np.dtype(kind).itemsize
    return np.frombuffer(raw, kind, count, place) if 0 <= place <= len(raw) - size else None


def _relative(offsets: NDArray[np.integer], base: int) -> NDArray[np.uint64]:
    return np.uint64(base) + offsets.astype(np.uint32).astype(np.uint64)


def _relative_absolute_percpu(offsets: NDArray[np.integer], base: int) -> NDArray[np.uint64]:
    """Offsets from 0 on are absolute values; negative ones count down from relative_base - 1."""
    wide = offsets.astype(np.int64)
    return np.where(wide >= 0, wide.astype(np.uint64), np.uint64(base - 1) - wide.astype(np.uint64))


def _sensible(addresses: NDArray[np.uint64]) -> bool:
    """Ascending, mostly in the upper half of the address space, and spread over no more than 2 GiB there."""
    upper = addresses[addresses >> np.uint64(47) != 0]
    if len(upper) * 2 < len(addresses) or bool((addresses[1:] < addresses[:-1]).any()):
        return False
    return int(upper[-1]) - int(upper[0]) < 1 << 31 and int(upper[0]) != int(upper[-1])


def _decoder(raw: bytes, names: _Names, tokens: list[bytes], addresses: NDArray[np.uint64]) -> Kallsyms:
    positions, lengths = names.positions, names.lengths

    def name(i: int) -> str:
        at = positions[i]
        # The first character is the type, as in nm.
        return b"".join([tokens[token] for token in raw[at : at + lengths[i]]])[1:].decode("latin-1")

    return Kallsyms(addresses, name, lambda: map(name, range(len(positions))))

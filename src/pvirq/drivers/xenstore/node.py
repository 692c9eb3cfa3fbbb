"""Nodes of the store, their permissions, and the syntax of paths and permissions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.xs_wire import XENSTORE_REL_PATH_MAX

# Bits of an access (tools/include/xenstore_lib.h). OWNER is only ever asked for, never stored; IGNORE marks
# an entry of a domain that is gone, so that a later one with its id doesn't inherit it.
XS_PERM_NONE: Final = 0
XS_PERM_READ: Final = 1
XS_PERM_WRITE: Final = 2
XS_PERM_OWNER: Final = 8
XS_PERM_IGNORE: Final = 16

ACCESS_LETTERS: Final = {
    "n": XS_PERM_NONE,
    "r": XS_PERM_READ,
    "w": XS_PERM_WRITE,
    "b": XS_PERM_READ | XS_PERM_WRITE,
}
LETTERS: Final = {access: letter for letter, access in ACCESS_LETTERS.items()}

U32: Final = (1 << 32) - 1

VALID_PATH: Final = re.compile(r"/|(?:/[A-Za-z0-9\-_@]+)+")
# What sscanf("/local/domain/%5u/") takes: five characters at most, of which the first may be a sign.
DOMAIN_PREFIX: Final = re.compile(r"/local/domain/(?:[0-9]{1,5}|-[0-9]{1,4})/")
STRTOL_AUTO: Final = re.compile(r"[ \t\n\v\f\r]*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
ATOI: Final = re.compile(rb"[ \t\n\v\f\r]*([+-]?)([0-9]+)")


class Perm(NamedTuple):
    """One entry of a node's permissions: a domain id (32 bits) and XS_PERM_* bits.

    The first entry of a node names its owner, and its bits are what every domain without an entry may do.
    """

    domid: int
    access: int

    def __str__(self) -> str:
        domid = self.domid - (1 << 32) if self.domid >> 31 else self.domid  # printed with %i
        return f"{LETTERS[self.access & ~XS_PERM_IGNORE]}{domid}"

    @classmethod
    def parse(cls, text: str) -> Perm:
        """From the wire's form such as `r5`, the number as strtol takes it; XenError(EINVAL)."""
        access = ACCESS_LETTERS.get(text[:1])
        number = STRTOL_AUTO.fullmatch(text, 1)
        if access is None or number is None:
            raise XenError(Errno.EINVAL, f"no permission: {text!r}")
        digits = number[2]
        base = 16 if digits[:2] in ("0x", "0X") else 8 if digits[0] == "0" else 10
        return cls(_saturate(number[1], int(digits, base)) & U32, access)


class Node:
    """One node as stored. Never changed in place: a write stores a new one, and transactions share the old.

    `children` are in order of creation; `generation` is the store's count at the last write.
    """

    __slots__ = ("children", "generation", "path", "perms", "size", "value")

    def __init__(
        self, path: str, value: bytes, children: tuple[str, ...], perms: tuple[Perm, ...], generation: int
    ) -> None:
        self.path = path
        self.value = value
        self.children = children
        self.perms = perms
        self.generation = generation
        # Bytes of its database record, which quotas count (struct xs_tdb_record_hdr and what follows).
        self.size = 24 + 8 * len(perms) + len(value)
        if children:
            self.size += len("".join(children)) + len(children)

    def child_list(self) -> bytes:
        """The names of its children, each with a NUL behind it, as DIRECTORY returns them."""
        return "\0".join((*self.children, "")).encode("ascii")


def is_valid_nodename(path: str, path_max: int = XENSTORE_REL_PATH_MAX) -> bool:
    """An absolute path that a node may have; `/local/domain/<domid>/` is free in its length."""
    if VALID_PATH.fullmatch(path) is None:
        return False
    if len(path) <= path_max:
        return True
    prefix = DOMAIN_PREFIX.match(path)
    return prefix is not None and len(path) <= path_max + prefix.end()


def parent_of(path: str) -> str:
    """The path above; the root is its own."""
    return path[: path.rfind("/")] or "/"


def join(parent: str, name: str) -> str:
    """The path of a child."""
    return f"/{name}" if parent == "/" else f"{parent}/{name}"


def parse_perms(perms: Iterable[Perm | str]) -> tuple[Perm, ...]:
    """Permissions given as entries or in the wire's form; XenError(EINVAL)."""
    return tuple([perm if isinstance(perm, Perm) else Perm.parse(perm) for perm in perms])


def atoi(text: bytes) -> int:
    """C's atoi: the signed 32-bit number that leads `text`, or 0."""
    number = ATOI.match(text)
    if number is None:
        return 0
    # 20 digits are beyond 64 bits already; Python refuses to convert strings of thousands.
    digits = number[2].lstrip(b"0")[:20]
    value = _saturate(number[1].decode(), int(digits or b"0")) & U32
    return value - (1 << 32) if value >> 31 else value


def _saturate(sign: str, magnitude: int) -> int:
    return max(-magnitude, -(1 << 63)) if sign == "-" else min(magnitude, (1 << 63) - 1)

"""Reads xl's configuration files (xl.cfg(5), xl-disk-configuration(5), xl-network-configuration(5) of Xen 4.17).

The syntax is that of libxlu_cfg: NAME = VALUE by lines or semicolons, where a value is a text in quotes, a number or a
list of values; NAME += VALUE adds to a list or a text; "#" begins a comment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from pvirq.toolstack.config import Action, DiskConfig, DomainConfig, VifConfig
from pvirq.toolstack.devices import vdev_number

Value: TypeAlias = "str | int | list[Value]"

LARGEST_FILE: Final = 1 << 20
DEEPEST: Final = 16  # lists within lists
MIB: Final = 1 << 20

TOKEN: Final = re.compile(
    r"""(?P<blank>[ \t\r]+|\#[^\n]*)|(?P<newline>\n)|(?P<name>[A-Za-z][A-Za-z0-9._]*)"""
    r"""|(?P<number>0[xX][0-9a-fA-F]+|[0-9]+)|(?P<text>'(?:\\[^\n]|[^'\\\n])*'|"(?:\\[^\n]|[^"\\\n])*")"""
    r"""|(?P<mark>\+=|[=\[\],;])""",
)
ESCAPE: Final = re.compile(r"\\(x[0-9a-fA-F]{1,2}|[0-7]{1,3}|.)")
ESCAPES: Final = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
# What xl knows and a PV guest can have, but has no meaning here.
WITHOUT_EFFECT: Final = frozenset((
    "cpus", "cpus_soft", "cpu_weight", "cap", "pool", "sched", "shadow_memory", "localtime", "rtc_timeoffset",
    "description", "seclabel", "tsc_mode", "claim_mode", "on_xend_start", "on_xend_stop", "vnuma", "nomigrate",
    "driver_domain", "device_model_version", "apic", "acpi", "pae", "max_grant_frames", "max_maptrack_frames",
    "e820_host", "console", "serial", "autoballoon", "vfb", "keymap", "usbctrl", "usbdev", "vkb", "sdl", "vnc",
    "stdvga", "boot", "dm_restrict", "timer_mode", "sched_params", "xend_suspend_evtchn_compat", "gic_version",
))  # fmt: skip
# What would change the guest, and can't be had.
REFUSED: Final = {
    "bootloader": "a bootloader needs tools of domain 0's that aren't here: name kernel and ramdisk instead",
    "pci": "no PCI device can be passed through",
    "device_model_override": "there are no device models",
    "firmware": "there is no firmware for a PV guest",
}


class ConfigError(Exception):
    """A configuration can't be read or asks for what can't be had: file, line and what is wrong, on one line."""


class _Token(NamedTuple):
    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Setting:
    """A value, and the line that it is on."""

    value: Value
    line: int


# -- the syntax --------------------------------------------------------------------------------------------------------


def parse(text: str, name: str = "config") -> dict[str, Setting]:
    """The settings of a file's text. ConfigError."""
    return _Parser(text, name).settings()


class _Parser:
    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.tokens = [*self._tokens(text), _Token("end", "", text.count("\n") + 1)]
        self.at = 0

    def _tokens(self, text: str) -> Iterator[_Token]:
        at, line = 0, 1
        while at < len(text):
            match = TOKEN.match(text, at)
            if match is None:
                shown = text[at : at + 20].split("\n", maxsplit=1)[0]
                why = "a text without its closing quote" if shown[:1] in "'\"" else f"{shown!r} has no meaning here"
                raise self.error(line, why)
            kind = match.lastgroup or ""
            if kind != "blank":
                yield _Token(kind, match[0], line)
            line += match[0].count("\n")
            at = match.end()

    def error(self, line: int, why: str) -> ConfigError:
        return ConfigError(f"{self.name}:{line}: {why}")

    def _next(self) -> _Token:
        token = self.tokens[self.at]
        self.at += token.kind != "end"
        return token

    def settings(self) -> dict[str, Setting]:
        found: dict[str, Setting] = {}
        while (token := self._next()).kind != "end":
            if token.kind == "newline" or token.text == ";":
                continue
            if token.kind != "name":
                raise self.error(token.line, f"{token.text!r} where a setting's name was expected")
            sign = self._next()
            if sign.text not in ("=", "+="):
                raise self.error(token.line, f"no '=' behind {token.text!r}")
            value = self._value(0)
            if sign.text == "+=" and token.text in found:
                value = self._added(token, found[token.text].value, value)
            found[token.text] = Setting(value, token.line)
            end = self._next()
            if end.kind not in ("newline", "end") and end.text != ";":
                raise self.error(end.line, f"{end.text!r} behind the value of {token.text!r}")
        return found

    def _added(self, token: _Token, old: Value, new: Value) -> Value:
        if isinstance(old, list) and isinstance(new, list):
            return [*old, *new]
        if isinstance(old, str) and isinstance(new, str):
            return old + new
        raise self.error(token.line, f"{token.text!r} can't be added to: one is a list and the other isn't")

    def _value(self, depth: int) -> Value:
        token = self._next()
        if token.kind == "text":
            return ESCAPE.sub(_unescaped, token.text[1:-1])
        if token.kind == "number":
            return int(token.text, 0) if token.text[:2] in ("0x", "0X") else int(token.text)
        if token.text != "[":
            raise self.error(token.line, f"{token.text.strip() or 'nothing'!r} where a value was expected: a text in "
                             "quotes, a number or a list")  # fmt: skip
        if depth == DEEPEST:
            raise self.error(token.line, f"lists are nested deeper than {DEEPEST}")
        return self._list(token, depth)

    def _list(self, start: _Token, depth: int) -> Value:
        values: list[Value] = []
        while True:
            self._skip_lines()
            if self.tokens[self.at].text == "]":
                self._next()
                return values
            values.append(self._value(depth + 1))
            self._skip_lines()
            token = self._next()
            if token.text == "]":
                return values
            if token.text != ",":
                raise self.error(start.line, "a list without its closing ']'")

    def _skip_lines(self) -> None:
        while self.tokens[self.at].kind == "newline":
            self.at += 1


def _unescaped(match: re.Match[str]) -> str:
    code = match[1]
    if code[0] == "x" and len(code) > 1:
        return chr(int(code[1:], 16))
    if code[0] in "01234567":
        return chr(int(code, 8) & 0xFF)
    return ESCAPES.get(code, code)


# -- what it means -----------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> tuple[DomainConfig, list[str]]:
    """A domain's configuration from a file, and lines about what has no effect. ConfigError."""
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{os.fspath(path)}: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > LARGEST_FILE:
        raise ConfigError(f"{os.fspath(path)}: {len(data)} bytes are no configuration")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{os.fspath(path)}:{line}: this is no text in UTF-8") from None
    return interpret(parse(text, os.fspath(path)), os.fspath(path))


def interpret(settings: Mapping[str, Setting], name: str = "config") -> tuple[DomainConfig, list[str]]:
    """The domain that settings describe, and lines about what has no effect. ConfigError."""
    return _Reader(dict(settings), name).config()


class _Reader:
    def __init__(self, settings: dict[str, Setting], name: str) -> None:
        self.settings = settings
        self.name = name

    def error(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.name}:{self.settings[key].line}: {key}: {why}")

    def _take(self, key: str) -> Any:
        return self.settings[key].value if key in self.settings else None

    def text(self, key: str, default: str = "") -> str:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, list):
            raise self.error(key, "expected a text, not a list")
        return str(value)

    def number(self, key: str, default: int, low: int, high: int) -> int:
        value = self._take(key)
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()):
            value = int(value)  # xl takes a number in quotes as well
        if value is None:
            return default
        if not isinstance(value, int):
            raise self.error(key, f"expected a number, not {value!r}")
        if not low <= value <= high:
            raise self.error(key, f"{value} is not within {low} to {high}")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._take(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.error(key, "expected a list of texts in quotes")
        return [one for one in value if isinstance(one, str)]

    def config(self) -> tuple[DomainConfig, list[str]]:
        self._check_kind()
        vcpus = self.number("vcpus", 1, 1, 32)
        maxvcpus = self.number("maxvcpus", vcpus, 1, 32)
        if maxvcpus < vcpus:
            raise self.error("maxvcpus", f"{maxvcpus} are fewer than vcpus = {vcpus}")
        memory = self.number("memory", 256, 1, 1 << 20) * MIB
        maxmem = self.number("maxmem", memory // MIB, 1, 1 << 20) * MIB
        if maxmem < memory:
            raise self.error("maxmem", f"{maxmem // MIB} MiB are less than memory = {memory // MIB}")
        config = DomainConfig(
            name=self.text("name"), kernel=self.text("kernel"), ramdisk=self.text("ramdisk"), cmdline=self._cmdline(),
            memory=memory, maxmem=maxmem, vcpus=vcpus, maxvcpus=maxvcpus, uuid=self._uuid(),
            disks=[self._each("disk", disk, parse_disk) for disk in self.texts("disk")],
            vifs=[self._each("vif", vif, parse_vif) for vif in self.texts("vif")],
            max_event_channels=self.number("max_event_channels", 1023, 1, (1 << 17) - 1),
        )  # fmt: skip
        vdevs = [disk.vdev for disk in config.disks]
        if len(set(vdevs)) < len(vdevs):
            raise self.error("disk", f"two disks are {next(vdev for vdev in vdevs if vdevs.count(vdev) > 1)}")
        for reason in config.on:
            if (key := f"on_{reason}") in self.settings:
                try:
                    config.on[reason] = Action(self.text(key))
                except ValueError:
                    known = ", ".join(action.value for action in Action)
                    raise self.error(key, f"{self.text(key)!r} is none of {known}") from None
        return config, self._notes()

    def _check_kind(self) -> None:
        for key, pv in (("type", ("pv",)), ("builder", ("generic", "linux"))):
            if self.text(key, pv[0]) not in pv:
                raise self.error(key, f"{self.text(key)!r}: only PV guests can run here")
        for key, why in REFUSED.items():
            if self._take(key) not in (None, "", []):
                raise self.error(key, why)

    def _cmdline(self) -> str:
        """xl's rule: cmdline, or else root and extra."""
        if "cmdline" in self.settings:
            return self.text("cmdline")
        root = self.text("root")
        return " ".join(part for part in (f"root={root}" if root else "", self.text("extra")) if part)

    def _uuid(self) -> str:
        text = self.text("uuid").lower()
        if text and not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
            raise self.error("uuid", f"{text!r} is no uuid")
        return text

    def _each(self, key: str, text: str, parse_one: Callable[[str], Any]) -> Any:
        try:
            return parse_one(text)
        except ValueError as error:
            raise self.error(key, f"{text!r}: {error}") from None

    def _notes(self) -> list[str]:
        known = KNOWN | set(REFUSED)
        notes = []
        for key, setting in self.settings.items():
            if key in WITHOUT_EFFECT:
                notes.append(f"{self.name}:{setting.line}: {key} has no effect here")
            elif key not in known:
                notes.append(f"{self.name}:{setting.line}: {key} is not known, and was ignored")
        return notes


KNOWN: Final = {
    "name", "uuid", "type", "builder", "kernel", "ramdisk", "extra", "root", "cmdline", "memory", "maxmem", "vcpus",
    "maxvcpus", "disk", "vif", "max_event_channels", "on_poweroff", "on_reboot", "on_crash", "on_watchdog",
    "on_soft_reset",
}  # fmt: skip

# -- devices -----------------------------------------------------------------------------------------------------------

FORMATS: Final = ("raw", "qcow2", "qcow", "vhd", "qed", "empty")
PREFIX: Final = re.compile(r"(phy|file|raw|tap2?|aio|qcow2|qcow|vhd):")
READ_ONLY, READ_WRITE = ("ro", "r"), ("rw", "w")


def parse_disk(text: str) -> DiskConfig:
    """A disk as xl-disk-configuration(5) describes it; ValueError says what is wrong.

    Positional are target, format, vdev and access; the keyword `target=` is the last and takes what follows, commas
    and all. The old prefixes phy:, file:, raw:, tap: and qcow2: are known.
    """
    named, flags, positional = _split_disk(text)
    places = ["target", "format", "vdev", "access"]
    if PREFIX.match(positional[0] if positional else "") and positional[1:2] and positional[1] not in (*FORMATS, ""):
        places.remove("format")  # xm's form: behind a prefix comes the vdev
    for key, value in zip(places, positional, strict=False):
        if value:
            named.setdefault(key, value)
    if len(positional) > len(places):
        raise ValueError(f"more than {', '.join(places)} without a keyword")
    target, kind = named.get("target", ""), named.get("format", "")
    while prefix := PREFIX.match(target):
        target = target[prefix.end() :]
        kind = kind or (prefix[1] if prefix[1] in FORMATS else "")
    vdev, cdrom = named.get("vdev", ""), named.get("devtype") == "cdrom" or "cdrom" in flags
    if vdev.endswith(":cdrom"):
        vdev, cdrom = vdev.removesuffix(":cdrom"), True
    if not vdev:
        raise ValueError("no vdev, such as xvda")
    vdev_number(vdev)
    if kind and kind not in FORMATS:
        raise ValueError(f"format {kind!r} is none of {', '.join(FORMATS)}")
    access = named.get("access", "r" if cdrom else "rw")
    if access not in READ_ONLY + READ_WRITE:
        raise ValueError(f"access {access!r} is none of rw, w, ro, r")
    if not target and not (cdrom or kind == "empty"):
        raise ValueError("no target: the file or device with its sectors")
    return DiskConfig(
        target, vdev, kind, readonly=access in READ_ONLY or cdrom, removable="removable" in flags or cdrom,
        cdrom=cdrom, discard="no-discard" not in flags,
    )  # fmt: skip


DISK_KEYS: Final = ("target", "format", "vdev", "access", "devtype", "backend", "backendtype", "script")
DISK_FLAGS: Final = ("removable", "cdrom", "discard", "no-discard", "direct-io-safe", "colo")


def _split_disk(text: str) -> tuple[dict[str, str], set[str], list[str]]:
    named: dict[str, str] = {}
    flags: set[str] = set()
    positional: list[str] = []
    rest = text
    while rest:
        if match := re.match(r"\s*target=", rest):
            named["target"] = rest[match.end() :].strip()
            break
        part, _, rest = rest.partition(",")
        part = part.strip()
        key, is_named, value = part.partition("=")
        if is_named and key in DISK_KEYS:
            named[key] = value.strip()
        elif part in DISK_FLAGS:
            flags.add(part)
        elif is_named and not positional and "/" not in key:
            raise ValueError(f"{key!r} is none of {', '.join(DISK_KEYS)}")
        else:
            positional.append(part)
    backend, kind = named.get("backend", "0"), named.get("backendtype", "phy")
    if backend not in ("0", "Domain-0", "dom0"):
        raise ValueError(f"backend {backend!r}: only domain 0 has backends here")
    if kind not in ("phy", "qdisk", "tap"):
        raise ValueError(f"backendtype {kind!r} is none of phy, qdisk, tap")
    return named, flags, positional


VIF_KEYS: Final = (
    "mac", "bridge", "ip", "vifname", "type", "model", "script", "gatewaydev", "backend", "rate", "devid", "mtu",
    "accel", "trusted",
)  # fmt: skip


def parse_vif(text: str) -> VifConfig:
    """A network interface as xl-network-configuration(5) describes it; ValueError says what is wrong."""
    named: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, sign, value = part.partition("=")
        if not sign or key not in VIF_KEYS:
            raise ValueError(f"{part!r}: expected KEY=VALUE with one of {', '.join(VIF_KEYS)}")
        named[key] = value
    mac = named.get("mac", "").lower()
    if mac and (not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac) or int(mac[1], 16) & 1):
        raise ValueError(f"mac {mac!r} is no address of a station, such as 00:16:3e:00:00:01")
    if named.get("backend", "0") not in ("0", "Domain-0", "dom0"):
        raise ValueError(f"backend {named['backend']!r}: only domain 0 has backends here")
    if named.get("type", "vif") not in ("vif", "pv", "netfront"):
        raise ValueError(f"type {named['type']!r}: a PV guest has vif alone")
    devid = named.get("devid")
    if devid is not None and not re.fullmatch(r"[0-9]{1,4}", devid):
        raise ValueError(f"devid {devid!r} is no number")
    mtu = named.get("mtu", "1500")
    if not re.fullmatch(r"[0-9]{1,5}", mtu) or not 68 <= int(mtu) <= 65535:
        raise ValueError(f"mtu {mtu!r} is not within 68 to 65535")
    return VifConfig(
        mac, named.get("bridge") or "xenbr0", None if devid is None else int(devid), int(mtu), named.get("ip", ""),
        named.get("vifname", ""),
    )  # fmt: skip

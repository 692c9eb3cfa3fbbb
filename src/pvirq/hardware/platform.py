"""Machines as tables of devices, and a machine built under a kernel.

A device is declared by its type's name and parameters; what a type has for parameters are the fields of its
declaration. A machine that isn't here is a list of such declarations, as a scenario file has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final, TypeVar, get_type_hints

from pvirq.hardware.acpi import AcpiDeclaration
from pvirq.hardware.ahci import AhciDeclaration
from pvirq.hardware.ata import AtaDeclaration
from pvirq.hardware.device import Board, Declaration, Driver, HardwareError
from pvirq.hardware.floppy import FloppyDeclaration
from pvirq.hardware.hda import HdaDeclaration
from pvirq.hardware.i8042 import I8042Declaration
from pvirq.hardware.nic import NicDeclaration
from pvirq.hardware.rtc import RtcDeclaration
from pvirq.hardware.usb import EhciDeclaration, UhciDeclaration
from pvirq.hardware.virtio import VirtioBlkDeclaration
from pvirq.linux.kernel import Kernel

TYPES: Final[dict[str, type[Declaration]]] = {
    "acpi": AcpiDeclaration,
    "ahci": AhciDeclaration,
    "ata_piix": AtaDeclaration,
    "ehci": EhciDeclaration,
    "floppy": FloppyDeclaration,
    "hda": HdaDeclaration,
    "i8042": I8042Declaration,
    "nic": NicDeclaration,
    "rtc": RtcDeclaration,
    "uhci": UhciDeclaration,
    "virtio-blk": VirtioBlkDeclaration,
}

DeviceTable = Sequence[Mapping[str, object]]
"""Rows of a machine's table: "type", "name" (the type's where there is none), and parameters of the type."""


@dataclass(frozen=True)
class Machine:
    """A machine that is known by name."""

    help: str
    devices: DeviceTable


# In the order in which the drivers come up, which is also the order of the names on a shared line.
MACHINES: Final[dict[str, Machine]] = {
    "none": Machine("no hardware at all", ()),
    "recorded": Machine(
        "the QEMU machine on which the project's recordings of Linux 6.1 were made",
        (
            {"type": "acpi"},
            {"type": "i8042", "psmouse": False},
            {"type": "rtc", "name": "rtc0"},
            {"type": "virtio-blk", "name": "virtio0"},
            {"type": "virtio-blk", "name": "virtio1"},
        ),
    ),
    "writeup": Machine(
        "a PC of 2008: IDE in legacy and native mode, USB and sound on shared lines, one network card",
        (
            {"type": "i8042", "mouse": False},
            {"type": "floppy"},
            {"type": "rtc", "name": "rtc0"},
            {"type": "ehci", "name": "usb1", "gsi": 18},
            {"type": "ehci", "name": "usb2", "gsi": 16},
            {"type": "uhci", "name": "usb3", "gsi": 16},
            {"type": "uhci", "name": "usb4", "gsi": 17},
            {"type": "uhci", "name": "usb5", "gsi": 18},
            {"type": "uhci", "name": "usb6", "gsi": 16},
            {"type": "uhci", "name": "usb7", "gsi": 17},
            {"type": "uhci", "name": "usb8", "gsi": 18},
            {"type": "ata_piix", "name": "ata1", "gsi": 14},
            {"type": "ata_piix", "name": "ata2", "gsi": 15},
            {"type": "ata_piix", "name": "ata3", "gsi": 18, "native": True},
            {"type": "hda", "name": "sound"},
            {"type": "nic", "name": "peth0"},
        ),
    ),
}

D = TypeVar("D", bound=Driver)


def declare(row: Mapping[str, object]) -> Declaration:
    """A row of a machine's table, checked. HardwareError names what was expected."""
    known = ", ".join(TYPES)
    kind = row.get("type")
    if kind is None:
        raise HardwareError(f"no type: expected one of {known}", "type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise HardwareError(f"unknown device type {kind!r}: expected one of {known}", "type")
    declaration = TYPES[kind]
    parameters = {key: value for key, value in row.items() if key != "type"}
    parameters.setdefault("name", kind)
    hints = get_type_hints(declaration)
    names = [field.name for field in fields(declaration)]
    for key, value in parameters.items():
        if key not in names:
            raise HardwareError(f"unknown parameter {key!r} of {kind}: expected one of {', '.join(names)}", key)
        if type(value) is not hints[key]:
            raise HardwareError(f"{key} of {kind} is {value!r}: expected {_KINDS[hints[key]]}", key)
    if not parameters["name"]:
        raise HardwareError("name: expected a text that is not empty", "name")
    return declaration(**parameters)  # type: ignore[arg-type]


_KINDS: Final = {int: "a whole number", str: "a text", bool: "true or false"}


def device_help() -> list[DeviceHelp]:
    """About each type of device, for people."""
    rows = []
    for name, declaration in TYPES.items():
        about = (declaration.__doc__ or "").split("\n", 1)[0]
        parameters = [
            f"{field.name}={_toml(field.default)}" for field in fields(declaration) if field.default is not MISSING
        ]
        rows.append(DeviceHelp(name, about, parameters, declaration.driver.uses))
    return rows


@dataclass(frozen=True)
class DeviceHelp:
    """A type of device: a line about it, its parameters as "gsi=8", what can be done with it (see `Driver.uses`)."""

    name: str
    about: str
    parameters: list[str]
    uses: Mapping[str, str]


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


class Platform:
    """A machine under a kernel: its devices by name, each as its driver, which has the hardware as an attribute."""

    def __init__(self, kernel: Kernel[Any], devices: dict[str, Driver]) -> None:
        self.kernel = kernel
        self.devices = devices

    def __getitem__(self, name: str) -> Driver:
        return self.devices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.devices)

    def device(self, name: str, kind: type[D]) -> D:
        """A device whose driver is of this class. HardwareError where there is none of that name, or another."""
        driver = self.devices.get(name)
        if not isinstance(driver, kind):
            there = ", ".join(name for name, each in self.devices.items() if isinstance(each, kind))
            raise HardwareError(
                f"no such device {name!r}: expected {f'one of {there}' if there else 'none: it has none'}"
            )
        return driver

    def all(self, kind: type[D]) -> list[D]:
        """All devices whose drivers are of this class."""
        return [driver for driver in self.devices.values() if isinstance(driver, kind)]


# Where a kernel has none of the drivers that a device is said to follow.
_BEHIND: Final = ("hvc_open", "hvc_console", "xencons", "xenbus")


def build(machine: str | DeviceTable, kernel: Kernel[Any]) -> Platform:
    """Put a machine under domain 0's kernel: one of `MACHINES`, or a table of devices.

    Before the kernel's boot the drivers go into its boot order; a kernel that is up probes them at once.
    HardwareError for what can't be: its `device` is the place in the table, and the kernel's boot order is as it was.
    """
    if isinstance(machine, str):
        if machine not in MACHINES:
            raise HardwareError(f"unknown machine {machine!r}: expected one of {', '.join(MACHINES)}")
        machine = MACHINES[machine].devices
    board = Board(kernel)
    declarations: dict[str, Declaration] = {}
    drivers: dict[str, Driver] = {}
    for i, row in enumerate(machine):
        try:
            declaration = declare(row)
            name = declaration.name
            if name in drivers:
                raise HardwareError(f"name {name!r} is taken by another device: expected one of its own", "name")
            drivers[name] = declaration.make(board)
        except HardwareError as error:
            board.unplug_all()
            error.device = i
            raise
        declarations[name] = declaration
    last: dict[str, str] = {}  # what was put behind a driver, so that the table's order is kept
    for name, driver in drivers.items():
        if kernel.irq.online:
            driver.bind()
        else:
            _initcall(kernel, declarations[name].behind + _BEHIND, last, driver)
    return Platform(kernel, drivers)


def _initcall(kernel: Kernel[Any], anchors: Sequence[str], last: dict[str, str], driver: Driver) -> None:
    label = f"{driver.module} {driver.name}"
    for anchor in anchors:
        try:
            kernel.events.initcall_after(last.get(anchor, anchor), label, driver.bind)
        except KeyError:
            continue
        last[anchor] = label
        return
    raise HardwareError(f"the kernel has no driver that hardware could follow: expected one of {', '.join(anchors)}")

"""A whole host in one file: its guests, each as `xl save` writes it, its machine, and what its disks in memory hold.

As when a Xen machine is shut down with its guests saved (xendomains), domain 0 isn't saved but boots anew, and the
guests are restored into it. So all guests have to be ones that suspend: a modelled guest, whose kernel is a Python
object, can't be saved.

The file is a zip: host.json, guests/NUMBER as `xl save` writes them, devices/NUMBER with those pieces of a disk that
aren't all zeros; host.json says which they are. A guest's pages begin where pages of the file do, and are mapped from
there when the host is restored: each is read when the guest first needs it, and copied when it first writes to it.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Final, cast

from pvirq.abi.xen import PAGE_SIZE
from pvirq.drivers.blockstore import SECTOR, BlockStore, MemoryStore
from pvirq.guest import Guest
from pvirq.hardware.device import HardwareError
from pvirq.hardware.disk import BlockDriver
from pvirq.host import Host
from pvirq.pv import save
from pvirq.schedule import Schedule
from pvirq.toolstack import savefile

FORMAT: Final = "pvirq host 1"
PIECE_SECTORS: Final = (1 << 20) // SECTOR
ZEROS: Final = bytes(PIECE_SECTORS * SECTOR)
LOCAL_HEADER: Final = struct.Struct("<26xHH")  # of a member: the lengths of its name and extra field at its end
ZIP64_EXTRA: Final = 20  # bytes that zipfile puts into that field
# An extra field as Android's zipalign has: its tag, the bytes that follow, the alignment; then zeros.
ALIGNMENT_EXTRA: Final = struct.Struct("<HHH")
ALIGNMENT_TAG: Final = 0xD935
COMPRESSION: Final = {"guests": zipfile.ZIP_STORED, "devices": zipfile.ZIP_DEFLATED}


class HostFileError(Exception):
    """A host can't be saved, or a file is none of a host's. One line."""


def save_host(host: Host, file: str | os.PathLike[str] | BinaryIO, *, checkpoint: bool = False) -> None:
    """Suspend all guests, write the host to a file and close it; with `checkpoint` it goes on.

    A file by name appears when it is whole; one that was there is replaced, not changed.

    HostFileError for a host with modelled guests, or whose domain 0 is none of those known by name; GuestError,
    SaveError and OSError as `Host.save`. Then the host goes on.
    """
    if not host.has_dom0 or not isinstance(host.dom0_kernel, str):
        raise HostFileError("only a host whose domain 0 has a kernel known by name can be saved")
    if host.modelled:
        raise HostFileError(f"{host.modelled[0].name} is a modelled guest, which can't be saved")
    suspended: list[Guest] = []
    try:
        for guest in host.guests:
            guest.suspend()
            suspended.append(guest)
        with savefile.replaced(file) as new, zipfile.ZipFile(new, "w") as archive:
            _write(host, archive)
    except BaseException:
        for guest in suspended:
            guest.resume()
        raise
    if checkpoint:
        for guest in suspended:
            guest.resume()
    else:
        host.close()


def _write(host: Host, archive: zipfile.ZipFile) -> None:
    devices: list[dict[str, Any]] = []
    for name, store in _volatile(host):
        written = []
        with _member(archive, "devices", len(devices)) as member:
            for first, count in _pieces(store.sectors):
                data = _read(store, first, count)
                if data != ZEROS[: len(data)]:
                    written.append(first)
                    member.write(data)
        hardware = isinstance(store, BlockDriver)
        devices.append({"name": name, "sectors": store.sectors, "hardware": hardware, "written": written})
    for number, guest in enumerate(host.guests):
        with _member(archive, "guests", number) as member:
            savefile.write(member, guest.config, save.save(guest.machine), aligned=True)
    about = {
        "format": FORMAT, "wallclock": host.wallclock(), "engine": host.engine_name,
        "dom0_vcpus": len(host.dom0.domain.vcpus), "dom0_kernel": host.dom0_kernel, "hardware": host.hardware,
        "bridges": list(host.backends.network.bridges), "devices": devices, "guests": len(host.guests),
    }  # fmt: skip
    archive.writestr("host.json", json.dumps(about, indent=4))


def restore_host(
    file: str | os.PathLike[str] | BinaryIO, *, prepare: Callable[[Host], None] | None = None,
    seed: int | Schedule | None = None, mapped: bool = True,
) -> Host:  # fmt: skip
    """The host from such a file, to be closed by the caller; its guests go on when it next runs.

    With a `seed` it goes on in a repeatable run (see `Host`).

    While the host lives its guests' memory is `mapped` from the file, as far as it wasn't written: many hosts share it.
    So the file may be removed or replaced by another, but not changed in place: what is cut off would end the process
    (SIGBUS). Otherwise all of it is copied first.

    What isn't in the file but was on its network (a station, a way out) is put there by `prepare`, before the guests.
    HostFileError, SaveFileError and what `Host.restore` raises; OSError.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(info.header_offset < 0 for info in archive.infolist()):
                raise zipfile.BadZipFile("something is missing in the middle")
            about = json.loads(archive.read("host.json"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise HostFileError(f"not a saved host of this version ({FORMAT})")
            host = Host(
                engine=about["engine"], dom0_vcpus=about["dom0_vcpus"], dom0_kernel=about["dom0_kernel"],
                hardware=about["hardware"], wallclock=about["wallclock"], seed=seed,
            )  # fmt: skip
            try:
                _fill(host, archive, about, prepare, mapped)
            except BaseException:
                host.close()
                raise
            return host
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError, HardwareError) as error:
        raise HostFileError(f"no file of a saved host, or a damaged one: {error}") from None


def _fill(
    host: Host, archive: zipfile.ZipFile, about: dict[str, Any], prepare: Callable[[Host], None] | None, mapped: bool
) -> None:
    for bridge in about["bridges"]:
        host.backends.network.need_bridge(bridge)
    for number, device in enumerate(about["devices"]):
        name, sectors = device["name"], device["sectors"]
        store: BlockStore
        if device["hardware"]:
            store = host.platform.device(name.removeprefix("/dev/"), BlockDriver)  # type: ignore[type-abstract]
        else:
            store = MemoryStore(sectors)
            host.backends.devices.add(name, store)
        with archive.open(f"devices/{number}") as member:
            for first in device["written"]:
                count = min(PIECE_SECTORS, sectors - first)
                data = member.read(count * SECTOR)
                if first < 0 or count <= 0 or len(data) != count * SECTOR:
                    raise HostFileError(f"{name}: its sectors are cut short")
                _put(store, first, data)
    if prepare is not None:
        prepare(host)
    for number in range(about["guests"]):
        host.revive(*savefile.read(_stored(archive, f"guests/{number}"), mapped=mapped))


def _stored(archive: zipfile.ZipFile, name: str) -> BinaryIO:
    """The archive's file, where a member begins that is stored as it is.

    By way of `zipfile` it can only be copied, and is summed up. Its own format says where it ends.
    """
    info, file = archive.getinfo(name), archive.fp
    if file is None or info.compress_type != zipfile.ZIP_STORED:
        raise HostFileError(f"{name} is compressed")
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) != LOCAL_HEADER.size:
        raise HostFileError(f"{name} is missing")
    name_length, extra_length = LOCAL_HEADER.unpack(header)
    file.seek(name_length + extra_length, os.SEEK_CUR)
    return cast(BinaryIO, file)


def _member(archive: zipfile.ZipFile, kind: str, number: int) -> Any:
    """A new member, to be written. What is stored as it is begins where a page of the file does."""
    info = zipfile.ZipInfo(f"{kind}/{number}")
    info.compress_type = COMPRESSION[kind]
    if info.compress_type == zipfile.ZIP_STORED and archive.fp is not None:
        header = LOCAL_HEADER.size + len(info.filename) + ZIP64_EXTRA + ALIGNMENT_EXTRA.size
        padding = -(archive.fp.tell() + header) % PAGE_SIZE
        info.extra = ALIGNMENT_EXTRA.pack(ALIGNMENT_TAG, 2 + padding, PAGE_SIZE) + bytes(padding)
    return archive.open(info, "w", force_zip64=True)


# -- disks that are nowhere else ---------------------------------------------------------------------------------------


def _volatile(host: Host) -> Iterator[tuple[str, BlockStore]]:
    """Domain 0's devices whose sectors would be gone with the host."""
    devices = host.backends.devices
    for name in devices.names():
        store = devices.find(devices.number(name) or "")
        if isinstance(store, MemoryStore) or (isinstance(store, BlockDriver) and not store.medium.path):
            yield name, store


def _pieces(sectors: int) -> Iterator[tuple[int, int]]:
    for first in range(0, sectors, PIECE_SECTORS):
        yield first, min(PIECE_SECTORS, sectors - first)


def _read(store: BlockStore, first: int, count: int) -> bytes:
    if isinstance(store, BlockDriver):
        return store.medium.read(first, count)
    assert isinstance(store, MemoryStore)
    return store.read(first, count)


def _put(store: BlockStore, first: int, data: bytes) -> None:
    if isinstance(store, BlockDriver):
        store.medium.write(first, data)
    elif isinstance(store, MemoryStore):
        store.writev(first, [memoryview(data)])

"""What a domain is made of: the configuration that xl reads from a file and that is saved with a domain.

Names and defaults are those of xl.cfg(5), xl-disk-configuration(5) and xl-network-configuration(5) of 4.17.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

DEFAULT_MEMORY: Final = 256 << 20


class Action(Enum):
    """What becomes of a domain when it has ended (on_poweroff, on_reboot, on_crash ...)."""

    DESTROY = "destroy"
    RESTART = "restart"
    RENAME_RESTART = "rename-restart"
    PRESERVE = "preserve"
    COREDUMP_DESTROY = "coredump-destroy"
    COREDUMP_RESTART = "coredump-restart"
    SOFT_RESET = "soft-reset"


@dataclass(frozen=True)
class DiskConfig:
    """A disk. `target` is a device of domain 0's or a file, `format` raw, qcow2 or "" (looked at).

    `cache` is no setting of xl's: none, or writeback for one that loses what wasn't flushed when it crashes.
    """

    target: str
    vdev: str
    format: str = ""
    readonly: bool = False
    removable: bool = False
    cdrom: bool = False
    discard: bool = True
    cache: str = "none"


@dataclass(frozen=True)
class VifConfig:
    """A network interface; `mac` "" for one that is made up, `devid` None for the next."""

    mac: str = ""
    bridge: str = "xenbr0"
    devid: int | None = None
    mtu: int = 1500
    ip: str = ""
    vifname: str = ""


def _actions() -> dict[str, Action]:
    return {
        "poweroff": Action.DESTROY,
        "reboot": Action.RESTART,
        "crash": Action.DESTROY,
        "watchdog": Action.DESTROY,
        "soft_reset": Action.SOFT_RESET,
    }


@dataclass
class DomainConfig:
    """A domain. Memory in bytes; `vcpus` are online at its start, of `maxvcpus` (0: as many)."""

    name: str = ""
    kernel: str = ""
    ramdisk: str = ""
    cmdline: str = ""
    memory: int = DEFAULT_MEMORY
    maxmem: int = 0
    vcpus: int = 1
    maxvcpus: int = 0
    uuid: str = ""
    disks: list[DiskConfig] = field(default_factory=list)
    vifs: list[VifConfig] = field(default_factory=list)
    on: dict[str, Action] = field(default_factory=_actions)  # by reason of its end
    max_event_channels: int = 1023

    # -- as libxl's JSON -----------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """struct libxl_domain_config as libxl prints it (`xl list -l`), what is at its default left out."""
        return {
            "c_info": {"type": "pv", "name": self.name, "uuid": self.uuid},
            "b_info": {
                "max_vcpus": self.maxvcpus or self.vcpus,
                "avail_vcpus": list(range(self.vcpus)),
                "max_memkb": (self.maxmem or self.memory) >> 10,
                "target_memkb": self.memory >> 10,
                "event_channels": self.max_event_channels,
                "kernel": self.kernel,
                "cmdline": self.cmdline,
                "ramdisk": self.ramdisk,
                "type.pv": {},
            },
            "disks": [
                {
                    "pdev_path": disk.target, "vdev": disk.vdev, "format": disk.format or "raw",
                    "removable": int(disk.removable), "readwrite": int(not disk.readonly), "is_cdrom": int(disk.cdrom),
                    "discard_enable": str(disk.discard),
                }
                for disk in self.disks
            ],
            "nics": [
                {"devid": number if vif.devid is None else vif.devid, "mtu": vif.mtu, "mac": vif.mac,
                 "bridge": vif.bridge, "nictype": "vif"}
                for number, vif in enumerate(self.vifs)
            ],
            **{f"on_{reason}": action.value.replace("-", "_") for reason, action in self.on.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: object) -> DomainConfig:
        """The same back; ValueError, one line, for what isn't a PV domain's configuration."""
        created, built = _dict(data, "c_info"), _dict(data, "b_info")
        if created.get("type", "pv") != "pv":
            raise ValueError(f"a domain of type {created.get('type')!r}: only PV domains can run here")
        available = built.get("avail_vcpus", [0])
        assert isinstance(data, dict)
        on = _actions()
        on |= {reason: Action(str(data[key]).replace("_", "-")) for reason in on if (key := f"on_{reason}") in data}
        return cls(
            name=_text(created, "name"), uuid=_text(created, "uuid"), kernel=_text(built, "kernel"),
            ramdisk=_text(built, "ramdisk"), cmdline=_text(built, "cmdline"),
            memory=_number(built, "target_memkb", DEFAULT_MEMORY >> 10) << 10,
            maxmem=_number(built, "max_memkb", 0) << 10,
            vcpus=len(available) if isinstance(available, list) and available else 1,
            maxvcpus=_number(built, "max_vcpus", 1),
            max_event_channels=_number(built, "event_channels", 1023),
            disks=[
                DiskConfig(
                    _text(disk, "pdev_path"), _text(disk, "vdev"), _text(disk, "format"),
                    readonly=not _number(disk, "readwrite", 0), removable=bool(_number(disk, "removable", 0)),
                    cdrom=bool(_number(disk, "is_cdrom", 0)), discard=disk.get("discard_enable", "True") != "False",
                )
                for disk in _dicts(data, "disks")
            ],
            vifs=[
                VifConfig(
                    _text(nic, "mac"), _text(nic, "bridge") or "xenbr0", _number(nic, "devid", 0),
                    _number(nic, "mtu", 1500),
                )
                for nic in _dicts(data, "nics")
            ],
            on=on,
        )  # fmt: skip


def _dict(data: object, key: str) -> dict[str, Any]:
    part = data.get(key, {}) if isinstance(data, dict) else None
    if not isinstance(part, dict):
        raise ValueError(f"no {key} in the domain's configuration")
    return part


def _dicts(data: dict[str, Any], key: str) -> list[dict[str, Any]]:
    part = data.get(key, [])
    if not isinstance(part, list) or not all(isinstance(one, dict) for one in part):
        raise ValueError(f"{key} of the domain's configuration is no list of devices")
    return part


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key, "")
    if not isinstance(value, str):
        raise ValueError(f"{key} of the domain's configuration is {value!r}, no text")
    return value


def _number(data: dict[str, Any], key: str, default: int) -> int:
    value = data.get(key, default)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{key} of the domain's configuration is {value!r}, no number")
    return int(value)

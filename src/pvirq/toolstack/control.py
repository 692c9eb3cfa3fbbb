"""Requests to a running guest through its xenstore directory: xl shutdown, xl reboot, xl sysrq, xl vcpu-set.

The guest's kernel watches the nodes and reacts, or doesn't (Linux: drivers/xen/manage.c, drivers/xen/cpu_hotplug.c);
what is written, and how its answer shows, is libxl 4.17's (tools/libs/light/libxl_domain.c).
"""

from __future__ import annotations

from typing import Final

from pvirq.drivers.xenstore import Client

# What a guest that can do it says so of (xen/docs/misc/xenstore-paths.pandoc, ~/control/feature-*); of a halt it says
# nothing.
SHUTDOWN_FEATURES: Final = {"poweroff": "feature-poweroff", "reboot": "feature-reboot", "suspend": "feature-suspend",
                            "halt": "feature-poweroff"}  # fmt: skip
ACKNOWLEDGE_S: Final = 60  # how long libxl waits for the guest


class ControlError(Exception):
    """A guest can't be asked, or doesn't react. One line."""


class ShutdownRequest:
    """One request in ~/control/shutdown. The guest acknowledges by emptying the node, and then does it."""

    def __init__(self, store: Client, domid: int, name: str, how: str, *, unasked: bool = False) -> None:
        """Write it (libxl__domain_pvcontrol); `unasked`: whatever the guest has said (Linux does so as it boots).

        ValueError for a request that there is none of; ControlError where the guest's kernel hasn't said that it can do
        that, as one without the driver, or before it has come so far.
        """
        feature = SHUTDOWN_FEATURES.get(how)
        if feature is None:
            raise ValueError(f"no request {how!r}; there are {', '.join(SHUTDOWN_FEATURES)}")
        control = f"/local/domain/{domid}/control"
        if not unasked and store.read_text(f"{control}/{feature}", "") != "1":
            raise ControlError(f"{name} has not said that it can do that ({how}): no {feature} in its control/")
        self.acknowledged = False
        self._store = store
        self._node = f"{control}/shutdown"
        store.write(self._node, how)
        self._watch = store.watch(self._node, "pvirq-shutdown", self._changed)

    def _changed(self, _path: str, _token: str) -> None:
        # Gone with the domain, it is answered too (pvcontrol_acked).
        if not self._store.read_text(self._node, ""):
            self.acknowledged = True

    def close(self) -> None:
        """Wait no longer. The request stays."""
        self._watch.close()


def send_sysrq(store: Client, domid: int, name: str, key: str) -> None:
    """Have a guest's kernel act as on Alt+SysRq+`key` (libxl_send_sysrq).

    ValueError for more or less than one character, ControlError where the last one still lies there: such a guest
    doesn't look.
    """
    if len(key) != 1 or not " " < key < "\x7f":
        raise ValueError(f"{key!r} is no sysrq: that is one character")
    node = f"/local/domain/{domid}/control/sysrq"
    waiting = store.read_text(node, "").strip("\0")  # Linux leaves a NUL
    if waiting:
        raise ControlError(f"{name} has not taken the last sysrq ({waiting!r})")
    store.write(node, key)


def set_vcpus(store: Client, domid: int, name: str, count: int, maximum: int) -> None:
    """Let a guest have its first `count` vCPUs, and ask for the others back (libxl_set_vcpuonline).

    ControlError for more than its `maximum`, or none.
    """
    if count > maximum:
        raise ControlError(f"{name}: requested {count} vCPUs, however maximum is {maximum}")
    if count < 1:
        raise ControlError(f"{name}: requested {count} vCPUs; one has to stay")
    with store.transaction() as transaction:
        for cpu in range(maximum):
            state = "online" if cpu < count else "offline"
            transaction.write(f"/local/domain/{domid}/cpu/{cpu}/availability", state)

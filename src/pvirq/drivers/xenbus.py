"""Split drivers' device model: both buses, states, watches on the other end (drivers/xen/xenbus, Linux 6.1).

A kernel has one `Xenbus`. Its frontends are found under `device/`, its backends under `backend/`; each device has a
`Driver`, whose methods are bodies that run one after the other, whatever device they are for, in the kernel's thread
"xenwatch", as a real kernel's do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Final

from pvirq.abi.errno import Errno, XenError
from pvirq.abi.io_xenbus import XenbusState
from pvirq.drivers.grants import Gnttab
from pvirq.drivers.pages import Pages
from pvirq.drivers.served import ServedRings
from pvirq.drivers.xs import Xs, XsWatch
from pvirq.linux.irq import IrqError
from pvirq.linux.kernel import Kernel
from pvirq.linux.kthread import Body, Kthread, sleep
from pvirq.xen.timer import NS_PER_S

FRONTEND_LEVELS: Final = 2  # device/<type>/<id>
BACKEND_LEVELS: Final = 3  # backend/<type>/<domain>/<id>
BACKEND_LOOK_NS: Final = 5 * NS_PER_S  # XENNET_TIMEOUT


class Driver(ABC):
    """What drives one device. Errors that it does not catch itself are XenError; they end the probe as Linux's do."""

    def __init__(self, dev: Device) -> None:
        self.dev = dev

    @abstractmethod
    def probe(self) -> Body[None]:
        """The device is there, its other end known."""

    @abstractmethod
    def otherend_changed(self, state: XenbusState) -> Body[None]:
        """The other end's state node was written."""

    @abstractmethod
    def remove(self) -> Body[None]:
        """The device is going: let go of everything."""


DriverFactory = Callable[["Device"], Driver]


class Device:
    """One end of a split driver (struct xenbus_device). `nodename` is its path, relative to the domain's own.

    `state` is the last one it has set itself. `ident` is its name, such as vbd-51712 or vif-1-0.
    """

    def __init__(self, bus: Bus, kind: str, nodename: str) -> None:
        self.bus = bus
        self.xenbus = bus.xenbus
        self.kernel = bus.xenbus.kernel
        self.xs = bus.xenbus.xs
        self.kind = kind
        self.nodename = nodename
        self.ident = f"{kind}-{'-'.join(nodename.split('/')[2:])}"
        self.state = XenbusState.Initialising
        self.otherend = ""
        self.otherend_id = 0
        self.driver: Driver | None = None
        self._otherend_watch: XsWatch | None = None

    def path(self, key: str) -> str:
        return f"{self.nodename}/{key}"

    def other(self, key: str) -> str:
        """A path of the other end's."""
        return f"{self.otherend}/{key}"

    def is_online(self) -> Body[bool]:
        """Does the toolstack want the device to stay (xenbus_dev_is_online)?"""
        return bool((yield from self.xs.read_int(self.path("online"), 0)))

    def switch_state(self, state: XenbusState) -> Body[None]:
        """Tell the other end. Nothing happens where the device's nodes are gone (xenbus_switch_state)."""
        if state == self.state:
            return
        xs, path = self.xs, self.path("state")
        while True:
            try:
                tx = yield from xs.transaction_start()
            except XenError as error:
                yield from self.error(error, "starting transaction")
                return
            try:
                yield from xs.read_int(path, tx=tx)
            except XenError:
                yield from xs.transaction_end(tx, commit=False)
                return
            try:
                yield from xs.write(path, int(state), tx)
            except XenError as error:
                yield from xs.transaction_end(tx, commit=False)
                yield from self.error(error, "writing new state")
                return
            try:
                yield from xs.transaction_end(tx)
            except XenError as error:
                if error.errno is Errno.EAGAIN:
                    continue
                yield from self.error(error, "ending transaction")
            else:
                self.state = state
            return

    def frontend_closed(self) -> Body[None]:
        """A frontend has nothing to lose any more (xenbus_frontend_closed)."""
        yield from self.switch_state(XenbusState.Closed)

    def frontend_gone(self, state: XenbusState) -> Body[None]:
        """A backend whose frontend is Closed or Unknown closes; it stays if the frontend may come back."""
        yield from self.switch_state(XenbusState.Closed)
        if state == XenbusState.Closed and (yield from self.is_online()):
            return
        yield from self.bus.unregister_device(self)

    def await_backend(self) -> Body[None]:
        """A frontend that begins anew says so and waits until its backend has left the old connection behind

        (as netfront_probe does, which looks every 5 seconds).
        """
        yield from self.switch_state(XenbusState.Initialising)
        while True:
            state = yield from read_driver_state(self.xs, self.otherend)
            if state not in (XenbusState.Closed, XenbusState.Unknown):
                return
            yield from sleep(self.kernel, BACKEND_LOOK_NS)

    def error(self, error: Exception, what: str) -> Body[None]:
        """Log, and leave it in the store under error/ (xenbus_dev_error)."""
        errno = error.errno if isinstance(error, (XenError, IrqError)) else Errno.EINVAL
        text = f"{-errno} {what}"
        self.kernel.printk(f"{self.kind} {self.ident}: {text}{f' ({error})' if str(error) else ''}")
        try:
            yield from self.xs.write(f"error/{self.nodename}/error", text)
        except XenError:
            self.kernel.printk(f"{self.kind} {self.ident}: failed to write error node for {self.nodename} ({text})")

    def fatal(self, error: Exception, what: str) -> Body[None]:
        """The same, and close the device (xenbus_dev_fatal)."""
        yield from self.error(error, what)
        yield from self.switch_state(XenbusState.Closing)

    # For the bus.

    def bind(self, factory: DriverFactory) -> Body[None]:
        """Find the other end, watch it and let the driver begin (xenbus_dev_probe)."""
        try:
            yield from self._talk_to_otherend()
            driver = self.driver = factory(self)
            yield from driver.probe()
        except (XenError, IrqError) as error:
            yield from self._free_otherend()
            self.driver = None
            yield from self.error(error, f"xenbus_dev_probe on {self.nodename}")
            return
        try:
            self._otherend_watch = yield from self.xs.watch(self.other("state"), self._otherend_changed)
        except XenError as error:
            yield from self.error(error, "watching other end")

    def unbind(self, *, silent: bool = False) -> Body[None]:
        """The driver lets go (xenbus_dev_remove); `silent`: without telling the other end."""
        driver, self.driver = self.driver, None
        if driver is None:
            return
        yield from self._unwatch_otherend()
        yield from driver.remove()
        yield from self._free_otherend()
        if silent:
            self.state = XenbusState.Unknown  # whatever it was: the driver that comes next has set none yet
        else:
            yield from self.switch_state(XenbusState.Closed)

    def _talk_to_otherend(self) -> Body[None]:
        id_node, path_node = self.bus.otherend_nodes
        self.otherend_id = yield from self.xs.read_int(self.path(id_node))
        self.otherend = yield from self.xs.read(self.path(path_node))
        if not self.otherend or not (yield from self.xs.exists(self.otherend)):
            raise XenError(Errno.ENOENT, f"missing other end from {self.nodename}. perhaps it is offline?")

    def _free_otherend(self) -> Body[None]:
        yield from self._unwatch_otherend()
        self.otherend = ""

    def _unwatch_otherend(self) -> Body[None]:
        watch, self._otherend_watch = self._otherend_watch, None
        if watch is not None:
            yield from self.xs.unwatch(watch)

    def _otherend_changed(self, path: str) -> Body[None]:
        driver = self.driver
        if driver is None or not self.otherend or not path.startswith(self.otherend):
            return
        state = yield from read_driver_state(self.xs, self.otherend)
        if self.driver is not driver:
            return
        try:
            yield from driver.otherend_changed(state)
        except (XenError, IrqError) as error:
            yield from self.fatal(error, "reacting to the other end")


def read_driver_state(xs: Xs, path: str) -> Body[XenbusState]:
    """The state under a device's path; Unknown where it has none (xenbus_read_driver_state)."""
    state = yield from xs.read_int(f"{path}/state", 0)
    return XenbusState(state) if state in XenbusState.__members__.values() else XenbusState.Unknown


class Bus:
    """The frontends or the backends of a kernel (struct xen_bus_type)."""

    def __init__(self, xenbus: Xenbus, root: str, levels: int, otherend_nodes: tuple[str, str]) -> None:
        self.xenbus = xenbus
        self.root = root
        self.levels = levels
        self.otherend_nodes = otherend_nodes
        self.devices: dict[str, Device] = {}  # by nodename
        self._drivers: dict[str, DriverFactory] = {}
        self._watch: XsWatch | None = None

    def register_driver(self, kind: str, factory: DriverFactory) -> Body[None]:
        """Drive devices of type `kind` (vbd, vif), those too that are there already."""
        self._drivers[kind] = factory
        for dev in list(self.devices.values()):
            if dev.kind == kind and dev.driver is None:
                yield from dev.bind(factory)

    def drives(self, kind: str) -> bool:
        """Is there a driver for such devices?"""
        return kind in self._drivers

    def unregister_driver(self, kind: str) -> Body[None]:
        """Drive them no longer, as when the module is unloaded: its devices close, and stay known."""
        del self._drivers[kind]
        for dev in list(self.devices.values()):
            if dev.kind == kind:
                yield from dev.unbind()

    def kill_driver(self, kind: str) -> Body[None]:
        """Lose a driver without a word, as when its domain crashes: rings and channels are gone, the nodes stay.

        A backend that is registered again then goes on with the rings of frontends that have not noticed.
        """
        self._drivers.pop(kind, None)
        for dev in list(self.devices.values()):
            if dev.kind == kind:
                yield from dev.unbind(silent=True)

    def start(self) -> Body[None]:
        """Find what is there, then follow changes (xenbus_probe_devices and the watch)."""
        xs = self.xenbus.xs
        yield from self._enumerate(self.root, 1)
        try:
            self._watch = yield from xs.watch(self.root, self._changed)
        except XenError as error:  # too many watches of its devices: it will see no new ones
            self.xenbus.kernel.printk(f"xenbus: error {-error.errno} watching {self.root}")

    def _enumerate(self, path: str, level: int) -> Body[None]:
        try:
            names = yield from self.xenbus.xs.ls(path)
        except XenError:
            return
        for name in names:
            below = f"{path}/{name}"
            if level < self.levels:
                yield from self._enumerate(below, level + 1)
            elif below not in self.devices:
                yield from self._probe_node(below)

    def _changed(self, path: str) -> Body[None]:
        """Something changed below the root (xenbus_dev_changed)."""
        parts = path.split("/")
        if len(parts) < 3:
            return
        if not (yield from self.xenbus.xs.exists(path)):
            for nodename in [name for name in self.devices if f"{name}/".startswith(f"{path}/")]:
                yield from self.devices.pop(nodename).unbind()
        elif len(parts) > self.levels:
            nodename = "/".join(parts[: self.levels + 1])
            if nodename not in self.devices:
                yield from self._probe_node(nodename)

    def _probe_node(self, nodename: str) -> Body[None]:
        """A device, if it is new; one that is going away after Closed is not (xenbus_probe_node)."""
        if (yield from read_driver_state(self.xenbus.xs, nodename)) != XenbusState.Initialising:
            return
        kind = nodename.split("/")[1]
        dev = self.devices[nodename] = Device(self, kind, nodename)
        if kind in self._drivers:
            yield from dev.bind(self._drivers[kind])

    def unregister_device(self, dev: Device) -> Body[None]:
        """The device is over, though its nodes may still be there (device_unregister)."""
        if self.devices.get(dev.nodename) is dev:
            del self.devices[dev.nodename]
        yield from dev.unbind()


class Xenbus:
    """What the split drivers of one kernel share."""

    def __init__(self, kernel: Kernel[Any], xs: Xs) -> None:
        self.kernel = kernel
        self.xs = xs
        self.gnttab = Gnttab(kernel)
        self.pages = Pages(kernel.domain)
        self.served = ServedRings()
        self.frontends = Bus(self, "device", FRONTEND_LEVELS, ("backend-id", "backend"))
        self.backends = Bus(self, "backend", BACKEND_LEVELS, ("frontend-id", "frontend"))

    def start_frontends(self, drivers: Mapping[str, DriverFactory]) -> Kthread[None]:
        """Probe the frontends in a thread, as at boot: its end is the end of the first look at `device/`."""
        return Kthread(self.kernel, "xenbus_probe", self._start(self.frontends, drivers))

    def start_backends(self, drivers: Mapping[str, DriverFactory]) -> Kthread[None]:
        """The same for backends."""
        return Kthread(self.kernel, "xenbus_probe", self._start(self.backends, drivers))

    def _start(self, bus: Bus, drivers: Mapping[str, DriverFactory]) -> Body[None]:
        for kind, factory in drivers.items():
            yield from bus.register_driver(kind, factory)
        yield from bus.start()

    def run(self, name: str, body: Body[Any]) -> Kthread[Any]:
        """Run a body in a thread of the kernel's own."""
        return Kthread(self.kernel, name, body)

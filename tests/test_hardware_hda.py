"""The sound card: an interrupt a period, on a line that others share."""

from __future__ import annotations

import pytest

from hardwarelib import KERNELS, Rig
from pvirq.hardware.hda import HdaDriver
from pvirq.hardware.usb import UsbDriver
from pvirq.xen.timer import NS_PER_S


@pytest.mark.parametrize("kernel", KERNELS)
def test_playing(kernel: str) -> None:
    rig = Rig([{"type": "ehci", "name": "usb2"}, {"type": "hda", "name": "sound"}], kernel)
    sound, usb = rig.platform.device("sound", HdaDriver), rig.platform.device("usb2", UsbDriver)
    when: list[int] = []
    sound.on_period = lambda: when.append(rig.clock.now())
    start = rig.clock.now()
    sound.play(10_000_000)
    rig.sleep(NS_PER_S)
    assert when == [start + 10_000_000 * (i + 1) for i in range(100)]
    assert (sound.periods, rig.count(16), usb.port_changes) == (100, 100, 0)
    sound.play(0)
    usb.controller.plug()
    rig.sleep(NS_PER_S)
    assert (sound.periods, rig.count(16), usb.port_changes) == (100, 101, 1)
    usb.controller.transfer()
    rig.run()
    assert (usb.transfers, rig.count(16)) == (1, 102)
    usb.controller.unplug()
    with pytest.raises(ValueError, match="nothing is plugged in"):
        usb.controller.transfer()
    with pytest.raises(ValueError, match="a period of -1 ns"):
        sound.play(-1)
    rig.close()

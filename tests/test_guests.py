"""Small PV kernels of our own, one for each family of hypercalls and each kind of trap: what they print here is what
they printed on real Xen 4.17 (tests/data/guests, recorded by tests/record_guests.py).
"""

from __future__ import annotations

import pytest

import guestlib
from pvirq import Host

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(not guestlib.have_compiler(), reason="building the test kernels needs gcc"),
]

# Where the emulator can't do as Xen on a real CPU does: (kernel, what Xen printed) -> what is printed here.
DEPARTURES = {
    # Xen takes every INT n to be two bytes long. The engine reports only where it ends, which is one further.
    ("softint", "int 21 with a prefix: trap 21 err 0 rip +2"): "int 21 with a prefix: trap 21 err 0 rip +3",
    # The engine has no data breakpoints.
    ("privop", "write to the watched word: trap 1 err 0 rip +8"): "write to the watched word: no trap",
    ("privop", "  dr6 1"): "  dr6 0",
}


def expected(kernel: guestlib.Kernel) -> list[str]:
    lines = guestlib.expected(kernel, dom0=kernel.dom0)
    for (name, xen), here in DEPARTURES.items():
        if name == kernel.name:
            at = next(i for i, line in enumerate(lines) if line.startswith(xen))
            lines[at] = lines[at].replace(xen, here, 1)
    return lines


@pytest.mark.parametrize("kernel", guestlib.KERNELS, ids=lambda kernel: kernel.id)
def test_transcript_equals_real_xen(kernel: guestlib.Kernel) -> None:
    with Host(wallclock=1.7e9, dom0=not kernel.dom0) as host:
        guest = host.boot(guestlib.build(kernel.name), append=kernel.cmdline, memory=64 << 20, vcpus=kernel.vcpus)
        ended = host.run(lambda: guest.ended, timeout_ns=60_000_000_000)
        assert guestlib.transcript(guest.console.text()) == expected(kernel)
        assert ended
        assert guest.shutdown_reason == ("crash" if kernel.name == "crash" else "poweroff")


@pytest.mark.parametrize("seed", range(100, 120))
def test_hostile_arguments(seed: int) -> None:
    """Every hypercall number with random arguments: only -errno comes back, and the host lives."""
    with Host() as host:
        guest = host.boot(guestlib.build("fuzz"), append=f"seed={seed} calls=3000", memory=64 << 20)
        assert host.run(lambda: guest.ended, timeout_ns=60_000_000_000)
        assert guestlib.transcript(guest.console.text())[-1] == "done"
        assert guest.shutdown_reason == "poweroff"

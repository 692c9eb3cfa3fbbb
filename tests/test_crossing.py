"""What a guest does without Python (engine/crossing.c): its machine code, and that it comes to the same."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pvirq.engine
from pvirq import Host
from pvirq.drivers.blockstore import MemoryStore
from pvirq.engine import crossing, protocol, unicorn_state
from pvirq.toolstack import modules
from pvirq.toolstack.initrd import default_initrd
from pvirq.toolstack.kernels import KernelChoice

HERE = Path(pvirq.engine.__file__).parent
TOOL = Path(__file__).parent.parent / "tools" / "crossing.sh"
COMPILER = "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"  # another one's code is other bytes

needs_gcc = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")

# Fields whose names differ from their items'.
NAMES = {
    "other_gs": "OTHER_GS_BASE", "hypercalls": "SHORT_HYPERCALLS", "since": "RUNSTATE_SINCE", "times": "RUNSTATE_TIMES",
    "vcpu": "SLOT",
}  # fmt: skip


def fields(name: str) -> list[str]:
    """Of a struct in crossing.c."""
    body = re.search(rf"^struct {name} {{\n(.*?)^}};", (HERE / "crossing.c").read_text(), re.M | re.S)
    assert body is not None
    text = re.sub(r"/\*.*?\*/", "", body[1], flags=re.S)
    found = re.findall(r"\(\*(\w+)\)\([^;]*\)|(\w+)(?:\[.*?\])*(?=[,;])", text)
    return [function or plain for function, plain in found]


@needs_gcc
def test_the_machine_code_is_that_of_its_source(tmp_path: Path) -> None:
    compiler = subprocess.run(["gcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    subprocess.run([str(TOOL), str(tmp_path)], check=True)
    if compiler != COMPILER:
        pytest.skip(f"compiled with another gcc: {compiler}")
    assert (tmp_path / "crossing.bin").read_bytes() == (HERE / "crossing.bin").read_bytes()


@needs_gcc
def test_both_sides_mean_the_same_fields(tmp_path: Path) -> None:
    owners = fields("vcpu")[: fields("vcpu").index("there")]
    wanted = {f"vcpu.{field}": getattr(protocol, NAMES.get(field, field.upper())) for field in owners}
    wanted |= {f"cpu.{field}": getattr(crossing, NAMES.get(field, field.upper())) for field in fields("cpu")}
    wanted |= {"vcpu.there": crossing.THERE, "vcpu.tlb": crossing.TLB, "vcpu.state": crossing.STATE}
    lines = [f'printf("{name} %zu\\n", offsetof(struct {name.replace(".", ", ")}));' for name in wanted]
    lines += [
        'printf("cpu %zu\\n", sizeof(struct cpu));',
        'printf("vcpu %zu\\n", sizeof(struct vcpu));',
        *(
            f'printf("{name} %ld\\n", (long){name});'
            for name in ("EIP", "EFLAGS", "HFLAGS", "CR2", "CR3", "TLB_DESCRIPTOR")
        ),
        *(f'printf("{name} %ld\\n", (long){name});' for name in ("CS_SELECTOR", "SS_SELECTOR", "SS_FLAGS")),
        *(f'printf("{name} %ld\\n", (long){name});' for name in ("FS_BASE", "GS_BASE")),
    ]
    source = tmp_path / "offsets.c"
    source.write_text(f'#include "{HERE / "crossing.c"}"\nint printf(const char *, ...);\nint main(void) {{\n'
                      + "\n".join(lines) + "\n}\n")  # fmt: skip
    subprocess.run(["gcc", str(source), "-o", str(tmp_path / "offsets")], check=True)
    out = subprocess.run([str(tmp_path / "offsets")], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in (line.split() for line in out.splitlines())}
    field = unicorn_state.CpuState.segment_field
    assert found == {name: item * 8 for name, item in wanted.items()} | {
        "cpu": crossing.CPU_ITEMS * 8, "vcpu": crossing.VCPU_BYTES, "EIP": unicorn_state.EIP,
        "EFLAGS": unicorn_state.EFLAGS, "HFLAGS": unicorn_state.HFLAGS, "CR2": unicorn_state.CR2,
        "CR3": unicorn_state.CR3, "TLB_DESCRIPTOR": unicorn_state.TLB_DESCRIPTOR, "CS_SELECTOR": field(1, 0),
        "SS_SELECTOR": field(2, 0), "SS_FLAGS": field(2, 20), "FS_BASE": field(4, 8), "GS_BASE": field(5, 8),
    }  # fmt: skip


WORK = """dd if=/dev/xvda of=/tmp/x bs=4k count=200 iflag=direct 2>/dev/null; md5sum /tmp/x
i=0; while [ $i -lt 10 ]; do /bin/true | cat; i=$((i + 1)); done
(i=0; while [ $i -lt 500 ]; do i=$((i + 1)); done) & (i=0; while [ $i -lt 500 ]; do i=$((i + 1)); done); wait
cat /proc/interrupts"""


@pytest.mark.boot
def test_a_guest_is_the_same_with_and_without(kernel_cloud: KernelChoice, busybox: Path) -> None:
    """The same output, time and memory, to the bit."""
    assert kernel_cloud.modules_dir is not None
    initrd = default_initrd(busybox, modules=modules.read_modules(kernel_cloud.modules_dir, ["xen-blkfront"]))
    ends = []
    for shortcuts in (True, False):
        with Host(seed=1, wallclock=1e9) as host:
            guest = host.boot(
                kernel_cloud.path, initrd=initrd, append="console=hvc0 pvirq=agent", vcpus=2, memory=96 << 20
            )
            engine = guest.machine.engine
            engine.shortcuts = shortcuts  # type: ignore[attr-defined]
            engine.exchange(guest.machine.current.slot, guest.machine.current)
            host.attach_disk(guest, "xvda", MemoryStore(8 << 11))
            guest.run("until [ -b /dev/xvda ]; do sleep 0.1; done")
            text = guest.run(WORK).text
            machine, frames = host.hypervisor.machine, guest.machine
            at = frames.first_mfn << 12
            memory = hashlib.sha256(machine.mem[at : at + (frames.frames << 12)]).hexdigest()
            ends.append((text, guest.console.text(), host.clock.now(), memory))
            assert bool(engine.shortcuts_taken) == shortcuts  # type: ignore[attr-defined]
    assert ends[0] == ends[1]

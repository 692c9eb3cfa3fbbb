"""xl's configuration files: the syntax, what settings mean, and errors with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pvirq.toolstack.config import Action, DiskConfig, VifConfig
from pvirq.toolstack.xlcfg import ConfigError, interpret, load, parse, parse_disk, parse_vif

EXAMPLE = """
# A guest as xl's manual has it.
name = "u2"; type = 'pv'
kernel = "/boot/vmlinuz"
ramdisk="/boot/initrd.img"
extra = "console=hvc0 " # not the end
extra += "quiet"
root = "/dev/xvda1"
memory = 128
maxmem = 0x100
vcpus = 2
maxvcpus = 4
disk = [ '/dev/vg/lv,raw,xvda,rw',
         'format=raw, vdev=xvdb, access=ro, target=/images/a,b.img',  # commas and all

       ]
disk += [ "phy:/dev/loop1,xvdc,w" ]
vif = [ 'mac=00:16:3E:00:00:01,bridge=br1', '' ]
on_crash = "preserve"
on_reboot = 'rename-restart'
cpus = "all"
memry = 5
"""


def read(text: str) -> object:
    return interpret(parse(text, "u2.cfg"), "u2.cfg")


def test_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "u2.cfg"
    path.write_text(EXAMPLE)
    config, notes = load(path)
    assert (config.name, config.kernel, config.ramdisk) == ("u2", "/boot/vmlinuz", "/boot/initrd.img")
    assert config.cmdline == "root=/dev/xvda1 console=hvc0 quiet"
    assert (config.memory, config.maxmem, config.vcpus, config.maxvcpus) == (128 << 20, 256 << 20, 2, 4)
    assert config.disks == [
        DiskConfig("/dev/vg/lv", "xvda", "raw"),
        DiskConfig("/images/a,b.img", "xvdb", "raw", readonly=True),
        DiskConfig("/dev/loop1", "xvdc"),
    ]
    assert config.vifs == [VifConfig("00:16:3e:00:00:01", "br1"), VifConfig()]
    assert (config.on["crash"], config.on["reboot"]) == (Action.PRESERVE, Action.RENAME_RESTART)
    assert config.on["poweroff"] is Action.DESTROY
    assert notes == [f"{path}:21: cpus has no effect here", f"{path}:22: memry is not known, and was ignored"]


def test_defaults() -> None:
    config, notes = interpret(parse(""))
    assert (config.name, config.memory, config.vcpus, config.disks, notes) == ("", 256 << 20, 1, [], [])
    assert config.max_event_channels == 1023


def test_values() -> None:
    found = parse(r"""a = "x\ty\"\x41\101\\" ; b=[1,['two',0x3,],[]]; c = 'it\'s'""")
    assert found["a"].value == 'x\ty"AA\\'
    assert found["b"].value == [1, ["two", 3], []]
    assert found["c"].value == "it's"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = u2", "u2.cfg:1: 'u2' where a value was expected"),
        ("\n\nname = 'u2", "u2.cfg:3: a text without its closing quote"),
        ("name 'u2'", "no '=' behind 'name'"),
        ("= 5", "where a setting's name was expected"),
        ("disk = ['a'\n'b']", "without its closing"),
        ("disk = ['a',", "'nothing' where a value was expected"),
        ("a = 5 6", "'6' behind the value of 'a'"),
        ("a = 'x'\na += ['y']", "u2.cfg:2: 'a' can't be added to"),
        ("a = " + "[" * 40, "nested deeper"),
        ("a = $", "'\\$' has no meaning"),
        ("memory = 'much'", "u2.cfg:1: memory: expected a number"),
        ("memory = 0", "not within"),
        ("vcpus = 33", "not within"),
        ("vcpus = 4\nmaxvcpus = 2", "u2.cfg:2: maxvcpus: 2 are fewer"),
        ("memory=64\nmaxmem=32", "less than memory"),
        ("name = ['u2']", "expected a text, not a list"),
        ("disk = 'x'", "expected a list of texts"),
        ("disk = ['/x,raw']", "no vdev"),
        ("disk = ['/x,raw,vda,rw']", "is no virtual device"),
        ("disk = ['/x,raw,xvda', '/y,raw,xvda']", "two disks are xvda"),
        ("disk = ['/x,fat,xvda']", "format 'fat'"),
        ("disk = [',raw,xvda']", "no target"),
        ("vif = ['mac=zz']", "mac 'zz'"),
        ("vif = ['mac=01:00:00:00:00:00']", "no address of a station"),
        ("vif = ['colour=red']", "expected KEY=VALUE"),
        ("on_crash = 'explode'", "none of destroy, restart"),
        ("type = 'hvm'", "only PV guests"),
        ("builder = 'hvm'", "only PV guests"),
        ("bootloader = 'pygrub'", "name kernel and ramdisk"),
        ("pci = ['00:01.0']", "passed through"),
        ("uuid = 'x'", "no uuid"),
    ],
)
def test_errors_say_where_and_what(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        read(text)
    assert str(caught.value).startswith("u2.cfg:")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("/dev/vg/guest-volume,raw,xvda,rw", DiskConfig("/dev/vg/guest-volume", "xvda", "raw")),
        ("/dev/vg/guest-volume,,xvda", DiskConfig("/dev/vg/guest-volume", "xvda")),
        ("format=raw, vdev=xvda, access=rw, target=/dev/vg/v", DiskConfig("/dev/vg/v", "xvda", "raw")),
        ("raw:/dev/vg/v,xvda,w", DiskConfig("/dev/vg/v", "xvda", "raw")),
        ("phy:/dev/vg/v,,xvda,w", DiskConfig("/dev/vg/v", "xvda")),
        ("file:/img,,xvda,r", DiskConfig("/img", "xvda", readonly=True)),
        ("tap:qcow2:/img,,xvda", DiskConfig("/img", "xvda", "qcow2")),
        ("/root/image.iso,,hdc,cdrom", DiskConfig("/root/image.iso", "hdc", readonly=True, removable=True, cdrom=True)),
        ("/img,raw,hdc:cdrom,r", DiskConfig("/img", "hdc", "raw", readonly=True, removable=True, cdrom=True)),
        ("/img,raw,xvda,rw,no-discard", DiskConfig("/img", "xvda", "raw", discard=False)),
        ("vdev=xvda,backendtype=qdisk,format=qcow2,target=/i", DiskConfig("/i", "xvda", "qcow2")),
    ],
)
def test_disks(text: str, disk: DiskConfig) -> None:
    assert parse_disk(text) == disk


def test_vifs() -> None:
    assert parse_vif("") == VifConfig()
    assert parse_vif("mac=00:16:3e:aa:bb:cc, bridge=br0, devid=3, mtu=9000, ip=10.0.0.1, rate=1Mb/s") == VifConfig(
        "00:16:3e:aa:bb:cc", "br0", 3, 9000, "10.0.0.1"
    )


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "no.cfg")
    path = tmp_path / "bad.cfg"
    path.write_bytes(b"name = 'a'\n\xff")
    with pytest.raises(ConfigError, match=r"bad.cfg:2: this is no text"):
        load(path)


@given(st.text(alphabet="ab='\"[],;+#\\\n 019x", max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        interpret(parse(text))
    except ConfigError as error:
        lines = str(error).count("\n")
    else:
        lines = 0
    assert not lines

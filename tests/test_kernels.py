"""Finding and fetching kernels and busybox, the cache, kernel modules. One test uses the network."""

import lzma
import multiprocessing
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import zstandard

from pvirq.toolstack import cpio, kernels, modules, packages
from pvirq.toolstack.cache import Cache, CacheError, default_root, write_atomic

RELEASE = "6.1.0-9-cloud-amd64"
PACKAGE = f"linux-image-{RELEASE}"


def bzimage(release: str) -> bytes:
    image = bytearray(0x1000)
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x20E, 0x300)
    image[0x500 : 0x500 + len(release) + 8] = release.encode() + b" (x@y) #"
    return bytes(image)


def elf(*types: int, machine: int = 62) -> bytes:
    head = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 2, machine, 1, 0, 64, 0, 0, 64, 56, len(types), 0, 0, 0
    )
    return head + b"".join(struct.pack("<I52x", kind) for kind in types)


def module(**info: str) -> bytes:
    return b"\x7fELF\0" + b"".join(f"{key}={value}\0".encode() for key, value in info.items()) + b"\0code"


def show(name: str, version: str = "6.1-1", depends: str = "", size: int = 1000, arch: str = "amd64") -> str:
    lines = [f"Package: {name}", f"Version: {version}", f"Architecture: {arch}", f"Size: {size}"]
    return "\n".join([*lines, *([f"Depends: {depends}"] if depends else []), "Description: x", " more", "", ""])


class Apt:
    """Stands in for every tool that packages.run would start."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.known: dict[str, str] = {
            "linux-image-cloud-amd64": show("linux-image-cloud-amd64", depends=f"{PACKAGE} (= 6.1-1)"),
            PACKAGE: show(PACKAGE, depends="kmod, linux-base (>= 4.3~), initramfs-tools | x", size=26_713_492),
            "busybox-static": show("busybox-static", "1:1.35"),
        }
        self.contents: dict[str, dict[str, bytes]] = {
            PACKAGE: {
                f"boot/vmlinuz-{RELEASE}": bzimage(RELEASE),
                f"boot/System.map-{RELEASE}": b"ffffffffffffffff B The real System.map is elsewhere\n",
                f"boot/config-{RELEASE}": b"CONFIG_XEN_PV=y\n",
                f"usr/lib/modules/{RELEASE}/modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
                f"usr/lib/modules/{RELEASE}/kernel/drivers/block/xen-blkfront.ko.xz": lzma.compress(module(depends="")),
                f"usr/lib/modules/{RELEASE}/kernel/fs/isofs/isofs.ko": module(depends="cdrom"),
                f"usr/lib/modules/{RELEASE}/kernel/drivers/cdrom/cdrom.ko": module(depends=""),
                f"usr/lib/modules/{RELEASE}/kernel/drivers/net/e1000.ko": module(depends=""),
                f"usr/lib/modules/{RELEASE}/kernel/drivers/xen/xen-evtchn.ko": module(depends="not_there"),
            },
            "busybox-static": {"bin/busybox": elf(1), "usr/share/doc/busybox-static/x": b""},
        }
        self.system_lists = True
        self.private_lists = False
        self.network = True

    def run(self, argv: Sequence[str], cwd: Path | None = None) -> bytes:
        self.calls.append(list(argv))
        if not self.network and ("update" in argv or "download" in argv):
            raise packages.FetchError("apt-get: Failed to fetch http://x/y Temporary failure resolving 'x'")
        if "update" in argv:
            self.private_lists = True
        elif "show" in argv:
            if argv[-1] in self.known and (self.private_lists if "-c" in argv else self.system_lists):
                return self.known[argv[-1]].encode()
            raise packages.FetchError("apt-cache: No packages found")
        elif "download" in argv:
            assert cwd
            for name, _, version in (word.partition("=") for word in argv[argv.index("download") + 1 :]):
                (cwd / f"{name}_{version.replace(':', '%3a')}_amd64.deb").write_bytes(b"deb")
        return b""

    def members(self, package: Path) -> Iterator[tuple[str, bytes]]:
        yield from self.contents[package.name.partition("_")[0]].items()


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> Apt:
    apt = Apt()
    monkeypatch.setattr(packages, "run", apt.run)
    monkeypatch.setattr(packages, "members", apt.members)
    monkeypatch.setattr(packages, "available_tool", lambda: "apt-get")
    monkeypatch.setattr(kernels, "_has_xen_notes", lambda path: b"no notes" not in path.read_bytes())
    return apt


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def nothing_left(cache: Cache) -> bool:
    return list((cache.root / "tmp").iterdir()) == []


# kernels


def test_fetches_once(apt: Apt, cache: Cache) -> None:
    said: list[str] = []
    choice = kernels.fetch_kernel("cloud", said.append, cache)
    assert said == [f"fetching {PACKAGE} with apt-get (once, 27 MB) ...", f"unpacking {PACKAGE} ..."]
    assert choice.path.read_bytes() == bzimage(RELEASE)
    assert (choice.version, choice.origin, choice.system_map) == (RELEASE, f"{PACKAGE} (6.1-1)", None)
    assert choice.config
    assert choice.config.read_bytes() == b"CONFIG_XEN_PV=y\n"
    assert choice.modules_dir
    kept = sorted(path.name for path in choice.modules_dir.rglob("*.ko"))
    assert kept == ["cdrom.ko", "isofs.ko", "xen-blkfront.ko"]
    order = modules.read_modules(choice.modules_dir, ["ext4", "isofs", "xen-blkfront"])
    assert [name for name, _ in order] == ["cdrom", "isofs", "xen_blkfront"]
    assert nothing_left(cache)
    calls = len(apt.calls)
    for which in ("cloud", PACKAGE):
        assert kernels.fetch_kernel(which, said.append, cache) == choice
    assert kernels.find_kernel(said.append, cache) == choice
    assert said[2:] == [f"using cached kernel {PACKAGE} (6.1-1)"]
    assert len(apt.calls) == calls
    assert [(entry.name, entry.aliases) for entry in cache.entries()] == [(PACKAGE, ("cloud",))]


def test_own_package_lists_when_the_system_has_none(apt: Apt, cache: Cache) -> None:
    apt.system_lists = False
    said: list[str] = []
    assert kernels.fetch_kernel("cloud", said.append, cache).version == RELEASE
    assert said[0].startswith("fetching package lists with apt-get")
    assert (cache.root / "apt/apt.conf").read_text().startswith(f'Dir::State "{cache.root}/apt/state"')
    kernels.find_busybox(said.append, cache, root=cache.root)
    assert sum("update" in call for call in apt.calls) == 1


def test_old_lists_are_renewed(apt: Apt, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    run = apt.run

    def old(argv: Sequence[str], cwd: Path | None = None) -> bytes:
        if "download" in argv and "-c" not in argv:
            raise packages.FetchError("apt-get: 404 Not Found")
        return run(argv, cwd)

    monkeypatch.setattr(packages, "run", old)
    said: list[str] = []
    assert kernels.fetch_kernel("cloud", said.append, cache).version == RELEASE
    assert [line.split()[1] for line in said] == [PACKAGE, "package", PACKAGE, PACKAGE]


def test_ubuntu_splits_its_kernel(apt: Apt, cache: Cache) -> None:
    release = "6.8.0-31-generic"
    apt.known = {
        "linux-image-virtual": show("linux-image-virtual", depends=f"linux-image-{release}"),
        "linux-image-generic": show(
            "linux-image-generic",
            depends=f"linux-image-{release}, linux-modules-extra-{release}, linux-firmware",
        ),
        f"linux-image-{release}": show(f"linux-image-{release}", depends=f"kmod, linux-modules-{release}"),
        f"linux-modules-{release}": show(f"linux-modules-{release}", depends="linux-base"),
    }
    blkfront = zstandard.ZstdCompressor().compress(module(depends=""))
    apt.contents = {
        f"linux-image-{release}": {f"boot/vmlinuz-{release}": bzimage(release)},
        f"linux-modules-{release}": {
            f"boot/System.map-{release}": b"0" * 5000,
            f"lib/modules/{release}/kernel/drivers/block/xen-blkfront.ko.zst": blkfront,
        },
    }
    choice = kernels.fetch_kernel("cloud", lambda line: None, cache)
    assert choice.system_map
    assert choice.modules_dir
    assert modules.read_modules(choice.modules_dir, ["xen-blkfront"]) == [("xen_blkfront", module(depends=""))]
    assert kernels.fetch_kernel("generic", lambda line: None, cache) == choice
    (entry,) = cache.entries()
    assert entry.aliases == ("cloud", "generic")


def test_fedora(apt: Apt, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    release = "6.8.5-301.fc40.x86_64"
    payloads = {
        "kernel-core": {"vmlinuz": bzimage(release), "System.map": b"0" * 5000, "config": b"CONFIG_XEN_PV=y"},
        "kernel-modules-core": {"kernel/drivers/block/xen-blkfront.ko.xz": lzma.compress(module(depends=""))},
    }

    def run(argv: Sequence[str], cwd: Path | None = None) -> bytes:
        if argv[0] == "dnf":
            (into,) = (Path(word.partition("=")[2]) for word in argv if word.startswith("--destdir="))
            for name in payloads:
                (into / f"{name}-{release}.rpm").write_text(name)
            return b""
        writer = cpio.Writer()
        for path, data in payloads[Path(argv[1]).read_text()].items():
            writer.file(f"./lib/modules/{release}/{path}".removeprefix("./"), data)
        return writer.getvalue()

    monkeypatch.setattr(packages, "run", run)
    monkeypatch.setattr(packages, "available_tool", lambda: "dnf")
    monkeypatch.setattr(kernels, "_has_xen_notes", lambda path: True)
    choice = kernels.fetch_kernel("generic", lambda line: None, cache)
    assert (choice.version, choice.origin) == (release, f"kernel-core-{release} (6.8.5-301.fc40.x86_64)")
    assert choice.system_map
    assert choice.modules_dir
    assert modules.read_modules(choice.modules_dir, ["xen_blkfront"])


def test_errors_are_one_line_and_leave_nothing(
    apt: Apt, cache: Cache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def message(which: str = "cloud") -> str:
        with pytest.raises(kernels.KernelNotFound) as caught:
            kernels.fetch_kernel(which, lambda line: None, cache)
        assert "\n" not in str(caught.value)
        assert "KERNEL" in str(caught.value)
        assert not cache.root.exists() or not (cache.root / "kernels").exists() or nothing_left(cache)
        return str(caught.value)

    assert "no name" in message("../etc")
    assert "no package linux-image-7 in the package lists" in message("linux-image-7")
    apt.contents[PACKAGE][f"boot/vmlinuz-{RELEASE}"] = b"no notes"
    assert "not built to run under Xen PV" in message()
    apt.contents[PACKAGE] = {}
    assert "has no vmlinuz" in message()
    apt.network = False
    assert "Temporary failure resolving" in message()
    with pytest.raises(kernels.BusyboxNotFound, match="no static busybox: cannot fetch busybox-static"):
        kernels.find_busybox(print, cache, tmp_path)
    monkeypatch.setattr(packages, "available_tool", lambda: None)
    assert "neither apt-get nor dnf" in message()
    cache.root = Path("/dev/null/cache")
    assert "PVIRQ_CACHE" in message()


def test_interrupt_leaves_nothing(apt: Apt, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def members(package: Path) -> Iterator[tuple[str, bytes]]:
        yield f"boot/vmlinuz-{RELEASE}", b"half"
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "members", members)
    with pytest.raises(KeyboardInterrupt):
        kernels.fetch_kernel("cloud", lambda line: None, cache)
    assert nothing_left(cache)
    assert cache.entries() == []


# This machine's own


def test_own_kernel_newest_with_xen_notes(apt: Apt, cache: Cache, tmp_path: Path) -> None:
    boot = tmp_path / "boot"
    boot.mkdir()
    for release in ("6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0-99-amd64"):
        (boot / f"vmlinuz-{release}").write_bytes(bzimage(release))
    (boot / "vmlinuz-6.9.0").write_bytes(bzimage("6.9.0") + b"no notes")
    (boot / "vmlinuz").symlink_to("vmlinuz-6.1.0-9-amd64")
    (boot / "System.map-6.1.0-10-amd64").write_bytes(b"0" * 5000)
    (tmp_path / "lib/modules/6.1.0-10-amd64").mkdir(parents=True)
    said: list[str] = []
    choice = kernels.find_kernel(said.append, cache, tmp_path)
    assert said == [f"using this machine's kernel {boot}/vmlinuz-6.1.0-10-amd64"]
    assert choice.version == "6.1.0-10-amd64"
    assert choice.system_map == boot / "System.map-6.1.0-10-amd64"
    assert choice.modules_dir == tmp_path / "lib/modules/6.1.0-10-amd64"
    assert apt.calls == []


def test_unreadable_own_kernel_is_mentioned(
    apt: Apt, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "boot/vmlinuz-6.8.0-31-generic"
    path.parent.mkdir()
    path.write_bytes(bzimage("6.8.0-31-generic"))

    def refused(path: Path) -> str:  # as root, chmod 0 would not do
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(kernels, "image_release", refused)
    apt.network = False
    said: list[str] = []
    with pytest.raises(kernels.KernelNotFound, match=f"sudo chmod a\\+r {path}"):
        kernels.find_kernel(said.append, cache, tmp_path)
    assert said[0] == f"{path} can be read by root only; to use it, sudo chmod a+r {path}"


def test_versions_sort_naturally() -> None:
    versions = ["5.10.0-99", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.9-rc2", "6.9", "6.9.1", "6.10"]
    assert sorted(sorted(versions), key=kernels.version_key) == versions


def test_release_without_header(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz-5.4-x"
    for content in (b"", b"\0" * 0x206, bytes(0x202) + b"HdrS"):
        path.write_bytes(content)
        if content.endswith(b"HdrS"):
            content += bytes(16)
            path.write_bytes(content)
        assert kernels.image_release(path) == "5.4-x"


# busybox


def test_busybox_of_this_machine_or_package(apt: Apt, cache: Cache, tmp_path: Path) -> None:
    own = tmp_path / "usr/bin/busybox"
    own.parent.mkdir(parents=True)
    own.write_bytes(elf(1))
    assert kernels.find_busybox(print, cache, tmp_path) == own
    own.write_bytes(elf(1, 3))  # needs its libraries
    fetched = kernels.find_busybox(lambda line: None, cache, tmp_path)
    assert fetched.read_bytes() == elf(1)
    assert os.access(fetched, os.X_OK)
    calls = len(apt.calls)
    assert kernels.find_busybox(print, cache, tmp_path) == fetched
    assert len(apt.calls) == calls


@pytest.mark.parametrize(
    ("image", "static"),
    [
        (elf(1), True),
        (elf(1, 3), False),
        (elf(1, machine=183), False),
        (elf(), False),
        (b"#!/bin/sh", False),
        (elf(1)[:70], False),
        (b"", False),
    ],
)
def test_is_static(image: bytes, static: bool, tmp_path: Path) -> None:
    (tmp_path / "busybox").write_bytes(image)
    assert kernels.is_static(tmp_path / "busybox") is static
    assert not kernels.is_static(tmp_path / "none")


# modules


def test_load_order() -> None:
    pool = {
        "ext4": module(softdep="pre: crypto-crc32c", depends="jbd2,mbcache"),
        "jbd2": module(depends=""),
        "mbcache": module(depends=""),
        "crc32c_intel": module(alias="crypto-crc32c"),
        "crc32c_generic": module(alias="crypto-crc32c"),
        "a": module(depends="b"),
        "b": module(depends="a"),  # a loop, which no kernel has, must not hang us
    }
    assert modules.load_order(["ext4"], pool) == ["crc32c_generic", "jbd2", "mbcache", "ext4"]
    assert modules.load_order(["ext4", "jbd2", "ext4"], pool, ["mbcache"])[-1] == "ext4"
    assert modules.load_order(["a"], pool) == ["b", "a"]
    with pytest.raises(modules.ModuleError, match="no kernel module nfs"):
        modules.load_order(["nfs"], pool)


def test_damaged_module() -> None:
    for suffix in (".xz", ".gz", ".zst"):
        with pytest.raises(modules.ModuleError):
            modules.decompress(f"a.ko{suffix}", b"\xff\x00 nonsense")


# packages


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is not installed")
def test_members_of_a_real_deb(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    (tree / "boot").mkdir()
    (tree / "boot/vmlinuz-1").write_bytes(b"kernel")
    (tree / "boot/link").symlink_to("vmlinuz-1")
    subprocess.run(["dpkg-deb", "-b", tree, tmp_path / "x.deb"], check=True, capture_output=True)
    assert list(packages.members(tmp_path / "x.deb")) == [("boot/vmlinuz-1", b"kernel")]
    (tmp_path / "bad.deb").write_bytes(b"no package")
    with pytest.raises(packages.FetchError, match=r"cannot unpack bad\.deb"):
        list(packages.members(tmp_path / "bad.deb"))


def test_run_reports_the_tools_own_words() -> None:
    with pytest.raises(packages.FetchError, match=r"^sh: it is broken$"):
        packages.run(["sh", "-c", "echo W: what >&2; echo 'E: it   is broken' >&2; echo E: more >&2; exit 100"])
    with pytest.raises(packages.FetchError, match=r"^sh: exit status 3$"):
        packages.run(["sh", "-c", "exit 3"])
    with pytest.raises(packages.FetchError, match=r"^no-such-tool: No such file"):
        packages.run(["no-such-tool"])


# the cache


def test_cache_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("PVIRQ_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path("/home/x/.cache/pvirq")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_root() == Path("/home/x/.cache/pvirq")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_root() == Path("/xdg/pvirq")
    monkeypatch.setenv("PVIRQ_CACHE", str(tmp_path))
    assert Cache().root == tmp_path


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "file", b"old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_clear(cache: Cache) -> None:
    assert cache.clear() == 0
    assert not cache.root.exists()
    with cache.staging() as staging:
        (staging / "entry").mkdir()
        (staging / "entry/file").write_bytes(b"12345")
        cache.publish(staging / "entry", "kernels", "k")
    cache.alias("kernels", "cloud", "k")
    assert [(entry.kind, entry.name, entry.size) for entry in cache.entries()] == [("kernels", "k", 5)]
    assert cache.clear() == 5
    assert cache.entries() == []
    assert nothing_left(cache)


def test_abandoned_staging_is_removed_and_a_live_one_is_not(cache: Cache) -> None:
    with cache.staging() as live:
        (live.parent / "abandoned").mkdir()
        (live.parent / "abandoned/file").write_bytes(b"x")
        with cache.staging():
            assert live.is_dir()
            assert not (live.parent / "abandoned").exists()


def test_unusable_root() -> None:
    with pytest.raises(CacheError, match="PVIRQ_CACHE"), Cache(Path("/dev/null/x")).staging():
        pass


def fill(root: Path, number: int, results: "multiprocessing.SimpleQueue[tuple[int, int]]") -> None:
    cache = Cache(root)
    made = 0
    with cache.lock("fetch"):
        if not cache.get("kernels", "k"):
            with cache.staging() as staging:
                (staging / "entry").mkdir()
                (staging / "entry/file").write_bytes(bytes([number]) * 1000)
                time.sleep(0.1)
                cache.publish(staging / "entry", "kernels", "k")
                made = 1
    found = cache.get("kernels", "k")
    assert found
    results.put((made, (found / "file").read_bytes()[999]))


def test_processes_at_once(cache: Cache) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=fill, args=(cache.root, number, results)) for number in (1, 2, 3)]
    for process in processes:
        process.start()
    outcomes = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert sum(made for made, _ in outcomes) == 1
    assert len({content for _, content in outcomes}) == 1


def test_publish_when_another_was_first(cache: Cache) -> None:
    with cache.staging() as staging:
        for name in ("first", "second"):
            (staging / name).mkdir()
            (staging / name / "file").write_text(name)
            target = cache.publish(staging / name, "kernels", "k")
    assert (target / "file").read_text() == "first"


# with the network


@pytest.mark.boot
def test_really_fetches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool = packages.available_tool()
    if tool is None:
        pytest.skip("neither apt-get nor dnf is installed")
    cache = Cache(tmp_path)
    try:
        choice = kernels.fetch_kernel("cloud", print, cache)
        busybox = kernels.find_busybox(print, cache, root=tmp_path)
    except (kernels.KernelNotFound, kernels.BusyboxNotFound) as error:
        if "resolving" in str(error) or "connect" in str(error):
            pytest.skip(f"no network: {error}")
        raise
    assert kernels.image_release(choice.path) == choice.version
    assert kernels.is_static(busybox)
    assert choice.modules_dir
    assert [name for name, _ in modules.read_modules(choice.modules_dir, ["xen-blkfront"])][-1:] in (
        ["xen_blkfront"],
        [],
    )
    assert kernels.find_kernel(print, cache) == choice
    assert nothing_left(cache)

"""Distribution packages, fetched with the distribution's own tools, without root and without installing.

Debian and Ubuntu: apt-cache, apt-get download, dpkg-deb. Fedora and its kin: dnf download, rpm2cpio. The
tools check signatures and sums. Where the system's package lists are missing or old (a container), apt gets
lists of its own in the cache directory; the system's are never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pvirq.toolstack import cpio
from pvirq.toolstack.cache import Cache, write_atomic

Report = Callable[[str], None]


class FetchError(Exception):
    """A package could not be had; the message is one line."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """Package files in the order asked for; `name` and `version` are the first one's."""

    name: str
    version: str
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """How one distribution family calls what is wanted.

    `candidates`: names of which the first that exists is taken. `also`: dependencies whose names match it are
    fetched too, through any number of metapackages (apt), or packages to fetch with it (dnf).
    """

    tool: str
    candidates: tuple[str, ...]
    also: str | tuple[str, ...] = ()


def available_tool() -> str | None:
    """The package tool of this machine: "apt-get", "dnf", or None."""
    for tool, needed in (("apt-get", ("apt-cache", "dpkg-deb")), ("dnf", ("rpm2cpio",))):
        if shutil.which(tool) and all(shutil.which(other) for other in needed):
            return tool
    return None


def fetch(source: Source, into: Path, cache: Cache, report: Report) -> Fetched:
    """Download into the directory `into`. FetchError if there is no such package, no network, no tool."""
    if source.tool == "apt-get":
        return _apt_fetch(source, into, cache, report)
    return _dnf_fetch(source, into, report)


def members(package: Path) -> Iterator[tuple[str, bytes]]:
    """The regular files of a .deb or .rpm: path without leading "./" or "/", and content."""
    if package.suffix == ".rpm":
        try:
            for entry in cpio.read(run(["rpm2cpio", str(package)])):
                if stat.S_ISREG(entry.mode):
                    yield entry.name.removeprefix("./").lstrip("/"), entry.data
        except cpio.CpioError as error:
            raise FetchError(f"cannot unpack {package.name}: {error}") from error
        return
    argv = ["dpkg-deb", "--fsys-tarfile", str(package)]
    try:
        with _pipe(argv) as process, tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                if member.isreg() and (content := tar.extractfile(member)):
                    yield member.name.removeprefix("./").lstrip("/"), content.read()
    except tarfile.TarError as error:
        raise FetchError(f"cannot unpack {package.name}: {error}") from error


def run(argv: Sequence[str], cwd: Path | None = None) -> bytes:
    """Run a tool to its end and return its output. FetchError with its first error line if it fails."""
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False
        )
    except OSError as error:
        raise FetchError(f"{argv[0]}: {error.strerror}") from error
    if done.returncode:
        raise FetchError(f"{argv[0]}: {_first_error(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


@contextlib.contextmanager
def _pipe(argv: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(
            argv,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:
        raise FetchError(f"{argv[0]}: {error.strerror}") from error
    try:
        yield process
    finally:
        if process.stdout:
            process.stdout.close()  # dpkg-deb's decompressing child ends by this
        process.kill()  # of no effect if it has ended
        process.wait()


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _first_error(stderr: bytes) -> str:
    lines = [" ".join(line.split()) for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(E:|[Ee]rror)", line)]
    return (errors or lines[-1:] or [""])[0].removeprefix("E: ")


# apt

_SYSTEM: Final = ("-o", "APT::Sandbox::User=root")  # as root, apt would want a directory that _apt can write

_PRIVATE_CONF: Final = """\
Dir::State "{directory}/state";
Dir::State::lists "{directory}/state/lists";
Dir::State::status "{directory}/status";
Dir::Cache "{directory}/cache";
Dir::Cache::archives "{directory}/cache/archives";
APT::Architecture "amd64";
APT::Sandbox::User "root";
#clear APT::Architectures;
APT::Architectures {{ "amd64"; }};
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb::Packages {{
    MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages";
    flatMetaKey "Packages";
    ShortDescription "Packages";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
    flatDescription "$(RELEASE) Packages";
    Optional "no";
}};
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::Retries "1";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""


@dataclass(frozen=True, slots=True)
class _Package:
    name: str
    version: str
    depends: tuple[str, ...]
    size: int  # of the package file, bytes


def _apt_fetch(source: Source, into: Path, cache: Cache, report: Report) -> Fetched:
    wanted = source.candidates[0]
    problem = f"no package {' or '.join(source.candidates)} in the package lists"
    for lists in ("the system's", "ours", "ours, fetched anew"):
        options: Sequence[str] = _SYSTEM
        if lists != "the system's":
            options = ("-c", str(cache.root / "apt/apt.conf"))
        if lists == "ours" and not (cache.root / "apt/apt.conf").exists():
            continue
        if lists == "ours, fetched anew":
            problem = _apt_update(cache, options, report) or problem
        packages = _apt_resolve(source, options)
        if not packages:
            continue
        megabytes = max(1, round(sum(package.size for package in packages) / 1e6))
        report(f"fetching {packages[0].name} with apt-get (once, {megabytes} MB) ...")
        names = [f"{package.name}={package.version}" for package in packages]
        try:
            run(["apt-get", "-q", *options, "download", *names], into)
        except FetchError as error:
            problem = str(error)  # the system's lists may be old: again with fresh ones
            continue
        files = tuple(
            file for package in packages for file in into.iterdir() if file.name.startswith(f"{package.name}_")
        )
        return Fetched(packages[0].name, packages[0].version, files)
    raise FetchError(f"cannot fetch {wanted}: {problem}")


def _apt_update(cache: Cache, options: Sequence[str], report: Report) -> str:
    """Bring lists of our own up to date. Returns what apt complained of, if anything."""
    directory = cache.root / "apt"
    for part in ("state/lists/partial", "cache/archives/partial"):
        (directory / part).mkdir(parents=True, exist_ok=True)
    write_atomic(directory / "status", b"")  # nothing is installed, as far as this apt knows
    write_atomic(directory / "apt.conf", _PRIVATE_CONF.format(directory=directory).encode())
    report("fetching package lists with apt-get (into the cache; the system's stay as they are) ...")
    try:
        run(["apt-get", "-q", *options, "-o", "APT::Update::Error-Mode=any", "update"])
    except FetchError as error:
        return str(error)  # perhaps of one archive of several: the rest may do
    return ""


def _apt_resolve(source: Source, options: Sequence[str]) -> list[_Package]:
    """The packages to download for the first candidate that exists, itself (or what it stands for) first."""
    for candidate in source.candidates:
        root = _apt_show(candidate, options)
        if root is None:
            continue
        if not isinstance(source.also, str):
            return [root]
        pattern = re.compile(source.also)
        found, queue, seen = [], [root], {root.name}
        while queue:
            package = queue.pop(0)
            if pattern.fullmatch(package.name):
                found.append(package)
            for name in package.depends:
                if name not in seen and pattern.fullmatch(name):
                    seen.add(name)
                    if dependency := _apt_show(name, options):
                        queue.append(dependency)
        return found or [root]
    return []


def _apt_show(name: str, options: Sequence[str]) -> _Package | None:
    try:
        output = run(["apt-cache", *options, "show", "--no-all-versions", name])
    except FetchError:
        return None
    for stanza in output.decode(errors="replace").split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", stanza, re.MULTILINE))
        if fields.get("Package") == name and fields.get("Architecture") in ("amd64", "all"):
            depends = (part.split("|")[0].split() for part in fields.get("Depends", "").split(","))
            return _Package(
                name,
                fields.get("Version", ""),
                tuple(words[0].partition(":")[0] for words in depends if words),
                int(fields["Size"]) if fields.get("Size", "").isdigit() else 0,
            )
    return None


# dnf


def _dnf_fetch(source: Source, into: Path, report: Report) -> Fetched:
    names = [source.candidates[0], *(source.also if isinstance(source.also, tuple) else ())]
    report(f"fetching {' and '.join(names)} with dnf (once; dnf may fetch package lists first) ...")
    try:
        # Without the i686 packages of the same name, and for x86 guests whatever this machine is.
        run(
            [
                "dnf",
                "-q",
                "-y",
                "--forcearch=x86_64",
                "download",
                "--arch=x86_64",
                f"--destdir={into}",
                *names,
            ]
        )
    except FetchError as error:
        raise FetchError(f"cannot fetch {names[0]}: {error}") from error
    files = []
    for name in names:
        # name-version-release.arch.rpm, where only the name may have more dashes
        files += [file for file in into.glob("*.rpm") if file.stem.rsplit("-", 2)[0] == name]
    if not files:
        files = sorted(into.glob("*.rpm"))  # asked for by name and version
    if not files:
        raise FetchError(f"cannot fetch {names[0]}: dnf downloaded nothing")
    name, version, release = files[0].stem.rsplit("-", 2)
    return Fetched(files[0].stem, f"{version}-{release}", tuple(files))

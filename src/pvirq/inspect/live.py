"""The running machine: its /proc and /sys, and what Xen's tools say where they are installed.

This module's purpose is the outside world: it reads the wall clock and starts programs.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

from pvirq.inspect import procirq
from pvirq.inspect.model import Snapshot
from pvirq.inspect.read import Reader
from pvirq.inspect.source import InspectError

TIMEOUT_S: Final = 10.0
OUTPUT: Final = 1 << 26  # as much of a program's output is read
TOOL_PATHS: Final = ("/usr/sbin", "/usr/lib/xen*/bin", "/usr/lib64/xen/bin", "/usr/libexec/xen/bin")  # patterns


def live(
    *, root: str = "/", tools: bool = True, debug_keys: str = "", affinity: bool = True, spurious: bool = True
) -> Snapshot:
    """A snapshot of this machine.

    `root`: where /proc and /sys are found. `tools`: also ask lsevtchn, xl and xenstore-ls, as far as there are any and
    they may be used. `debug_keys`, of "eiq": press these on the hypervisor and read its log; that takes locks and
    fills the log, so it is never done unasked. `affinity`: read /proc/irq and the counters of devices too; `spurious`:
    also what /proc/irq counts of unhandled interrupts. InspectError: no /proc/interrupts.
    """
    reader = Reader()
    seconds = time.monotonic()
    reader.file(os.path.join(root, "proc/interrupts"), hint=_whose(root))
    if affinity:
        for path in [*_irq_files(root, spurious), *_xenbus_files(root)]:
            try:
                reader.file(path, hint=_whose(root))
            except InspectError:  # the line has gone since it was listed
                continue
    if tools:
        ask_tools(reader, debug_keys)
    return reader.snapshot("this machine", seconds)


def _whose(root: str) -> str:
    """Domain 0 says so in /proc/xen/capabilities."""
    try:
        return "0" if "control_d" in Path(root, "proc/xen/capabilities").read_text() else ""
    except OSError:
        return ""


def _irq_files(root: str, spurious: bool) -> list[str]:
    names = ("smp_affinity_list", "effective_affinity_list", *(["spurious"] if spurious else []))
    base = os.path.join(root, "proc/irq")
    return [
        os.path.join(base, irq, name)
        for irq in _listed(base)
        if irq.isdecimal()
        for name in names
        if os.path.exists(os.path.join(base, irq, name))
    ]


def _xenbus_files(root: str) -> list[str]:
    found = []
    for bus in ("xen", "xen-backend"):
        base = os.path.join(root, "sys/bus", bus, "devices")
        for device in _listed(base):
            directory = os.path.join(base, device, "xenbus")
            found += [os.path.join(directory, name) for name in _listed(directory) if name in procirq.COUNTERS]
    return found


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def ask_tools(reader: Reader, debug_keys: str = "") -> None:
    """Let the reader have what Xen's tools print. A tool that isn't there, or fails, is left out."""
    text = run_tool("xl", "list")
    if text:
        reader.text(text, "xl list")
    domids = [int(found) for found in re.findall(r"^\S.*?\s(\d+)\s+\d+\s+\d+\s+[r-][b-][p-]", text, re.MULTILINE)] or [
        0
    ]
    for name, *args in [("xl", "vcpu-list"), ("xenstore-ls", "-f")]:
        reader.text(run_tool(name, *args), " ".join((name, *args)))
    for domid in domids:
        reader.text(run_tool("lsevtchn", str(domid)), f"lsevtchn {domid}", hint=str(domid))
    if debug_keys:
        before = run_tool("xl", "dmesg")
        for key in debug_keys:
            run_tool("xl", "debug-keys", key)
        after = run_tool("xl", "dmesg")
        reader.text(after[len(_common_start(before, after)) :], "xl dmesg", hint="")


def _common_start(before: str, after: str) -> str:
    """What of the log was there before; nothing where the ring has turned over."""
    return before if after.startswith(before) else ""


def run_tool(name: str, *args: str) -> str:
    """What a program prints; "" where it isn't installed, fails, or takes longer than TIMEOUT_S."""
    path = shutil.which(name) or shutil.which(
        name, path=os.pathsep.join(found for each in TOOL_PATHS for found in sorted(glob.glob(each)))
    )
    if path is None:
        return ""
    try:
        done = subprocess.run(
            [path, *args], capture_output=True, timeout=TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout[:OUTPUT].decode("utf-8", "replace") if done.returncode == 0 else ""

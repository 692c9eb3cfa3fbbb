"""`pvirq parse`, `explain`, `diff` and `export` on the command line: what they print, and exit with."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import click
import pytest

from inspectlib import DATA
from pvirq.cli import inspect_http, main
from pvirq.inspect import InspectError, explain, live, read_files, read_text
from pvirq.inspect.diff import compare
from pvirq.inspect.export import prometheus

BASE = DATA / "linux-2vcpu"
HOST = [str(BASE / f"2-drivers.{name}") for name in ("debug-e", "xenstore", "dom0.interrupts")]


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    status = main.run(list(args))
    out, err = capsys.readouterr()
    return status, out, err


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["explain", "nowhere"], "nowhere: No such file or directory"),
        (["explain", "text"], "nothing in text is understood: text:1: not understood: nothing"),
        (["explain", "empty"], "nothing in empty is understood"),
        (["diff", "text", "empty"], "nothing in text is understood"),
        (["diff", "-", "-"], "only one of A and B"),
        (["parse", "picture"], "nothing in picture is understood"),
        (["explain", "--debug-keys", "x"], "--debug-keys: expected e, i or q"),
        (["explain", "text", "--debug-keys", "e"], "is for the running machine"),
        (["export", "text", "--listen", "99999"], "expected [ADDRESS:]PORT"),
        (["export", "-", "--listen", "1"], "standard input can't be read again"),
        (["top", "text"], "needs a terminal"),
        (["top", "--once", "text"], "no /proc/interrupts in text"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("nothing\n")
    Path("empty").touch()
    Path("picture").write_bytes(b"\x89PNG\0")
    status, out, err = run(capsys, *args)
    assert status == 2
    assert out == ""
    assert words in err
    assert len(err.splitlines()) == 1


# -- explain and parse -------------------------------------------------------------------------------------------------


def test_explain_text_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "explain", *HOST)
    assert status == 0
    assert "    51   ~32    0           2  blkif-backend  vbd 51712 queue 0 of d1  -> d1 port 15\n" in out
    status, out, _ = run(capsys, "explain", "--no-table", *HOST)
    assert "blkif-backend  vbd" not in out
    status, out, _ = run(capsys, "explain", "--json", *HOST)
    data = json.loads(out)
    (line,) = (each for each in data["domains"][0]["lines"] if each["irq"] == 53)
    assert line["device"] == {
        "frontend": 1, "type": "vif", "id": 0, "queue": 0, "direction": "tx", "side": "back",
    }  # fmt: skip
    assert line["evidence"][0] == {"file": HOST[2], "line": 35}


def test_explain_two_snapshots(capsys: pytest.CaptureFixture[str]) -> None:
    before, now = BASE / "2-drivers.dom0.interrupts", BASE / "4-after-ping.dom0.interrupts"
    status, out, _ = run(capsys, "explain", "--earlier", str(before), str(now), "--seconds", "0.01", "--no-table")
    assert status == 0
    assert re.search(r"error: domain 0 IRQ \d+ \(.*\): [\d,]+ interrupts a second\.", out)


def test_explain_tells_what_it_did_not_understand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    log.write_text("one\ntwo\n" + Path(HOST[2]).read_text() + "".join(f"(XEN) three {i}\n" for i in range(5)))
    _, out, _ = run(capsys, "explain", str(log), "--no-table")
    assert f"7 lines were not understood, and had no part in this:\n    {log}:1-2: not understood: one\n" in out
    assert "two" not in out
    _, out, _ = run(capsys, "explain", str(log), "--no-table", "--unread")
    assert "        two\n" in out
    assert "three 4\n" in out


def test_standard_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pvirq", "parse", "-"], input=Path(HOST[0]).read_bytes(), capture_output=True, check=True
    )
    data = json.loads(done.stdout)
    assert [each["domid"] for each in data["channels"]] == [0, 1]
    assert data["channels"][0]["channels"][0]["where"] == {"file": "-", "line": 5}


def test_what_pvirq_itself_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """The views of `pvirq model`, as one text."""
    _, out, _ = run(capsys, "model", "writeup-dom0", "-q", "-i", "*", "-l", "*")
    snapshot = read_text(out)
    assert len(snapshot.interrupts) == len(snapshot.channels) >= 2
    assert {each.hint for each in snapshot.interrupts} == {each.hint for each in snapshot.channels}
    assert not [
        each for each in snapshot.unread if not each.text.endswith((" /proc/interrupts", " lsevtchn", ": lsevtchn"))
    ]


def test_a_machine_without_interrupts(tmp_path: Path) -> None:
    with pytest.raises(InspectError, match="proc/interrupts"):
        live(root=str(tmp_path))


def test_tools_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """xl, lsevtchn and xenstore-ls as programs in the PATH: what they print is read; one that fails is left out."""
    tools = {
        "xl": f'case "$1" in list) cat {DATA}/inspect/2-drivers.xl-list | head -3;; '
        f"dmesg) cat {tmp_path}/ring;; debug-keys) cat {HOST[0]} >> {tmp_path}/ring;; *) exit 1;; esac",
        "lsevtchn": f"case $1 in 0) cat {BASE}/2-drivers.lsevtchn-0;; 1) cat {BASE}/2-drivers.lsevtchn-domU;; esac",
        "xenstore-ls": f"cat {HOST[1]}",
    }
    (tmp_path / "ring").write_text("(XEN) before\n")
    for name, script in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "proc/xen").mkdir(parents=True)
    shutil.copy(HOST[2], tmp_path / "proc/interrupts")
    (tmp_path / "proc/xen/capabilities").write_text("control_d\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    snapshot = live(root=str(tmp_path))
    assert [each.name for each in snapshot.xl_domains] == ["Domain-0", "u2"]
    assert [(each.hint, len(each.channels)) for each in snapshot.channels] == [("0", 37), ("1", 20)]
    assert len(snapshot.store) == 223
    assert snapshot.unread == ()
    picture = explain(snapshot).picture
    assert picture.domains[0].by_irq[53].peer == (1, 17)
    keys = live(root=str(tmp_path), debug_keys="e")
    assert [each.source for each in keys.channels] == ["lsevtchn", "lsevtchn", "debug-e", "debug-e"]
    assert keys.unread == ()  # what was in the ring before isn't taken


# -- diff --------------------------------------------------------------------------------------------------------------


def test_diff(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(BASE / "2-drivers.debug-e"), str(BASE / "7-after.debug-e")
    assert run(capsys, "diff", a, a)[:2] == (0, "")
    status, out, _ = run(capsys, "diff", a, b)
    assert status == 1
    assert "- d1 domain: domain 1\n" in out
    assert "- d0 port 34: interdomain, d1 port 17\n" in out
    status, out, _ = run(capsys, "diff", "--json", a, b)
    assert {
        "domain": "d0",
        "kind": "port",
        "what": "port 34",
        "before": "interdomain, d1 port 17",
        "after": "",
    } in json.loads(out)


def test_diff_of_tables_and_placement() -> None:
    one = BASE / "domU.8-aff-cpu0.interrupts"
    two = BASE / "domU.8-aff-cpu1.interrupts"
    off = BASE / "domU.10-cpu1-off.interrupts"
    counts = compare(read_files([one]), read_files([two]))
    assert {change.kind for change in counts} == {"count"}
    assert compare(read_files([one]), read_files([two]), counts=False) == []
    gone = compare(read_files([one]), read_files([off]), counts=False)
    assert {(change.kind, change.what, change.before, change.after) for change in gone} >= {
        ("cpus", "online CPUs", "0,1", "0"), ("row", "IRQ 7 resched1", "xen-percpu ipi", ""),
    }  # fmt: skip
    base = DATA / "linux-recorded/2vcpu"
    moved = compare(
        read_files([base / f"domU.8-aff-cpu0.{x}" for x in ("interrupts", "irqfiles")]),
        read_files([base / f"domU.8-aff-cpu1.{x}" for x in ("interrupts", "irqfiles")]), counts=False,
    )  # fmt: skip
    assert "  guest IRQ 14 blkif: CPU 0 -> CPU 1" in {str(change) for change in moved}
    ports = compare(read_files([base / "8-aff-cpu0.debug-e"]), read_files([base / "8-aff-cpu1.debug-e"]))
    assert {(change.domain, change.what, change.before, change.after) for change in ports if change.kind == "vcpu"} >= {
        ("d1", "port 15", "vCPU 0", "vCPU 1"),
    }  # fmt: skip


# -- export ------------------------------------------------------------------------------------------------------------

METRIC = re.compile(r'[a-z_]+(\{([a-z]+="(\\.|[^"\\\n])*",?)*\})? -?\d+(\.\d+)?$')


def test_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "export", *HOST)
    assert status == 0
    names = []
    for line in out.splitlines():
        if line.startswith("#"):
            names.append(line.split()[2])
        else:
            assert METRIC.match(line), line
            assert line.startswith(names[-1])  # together with its heading
    assert len(set(out.splitlines())) == len(out.splitlines())
    want = 'domain="0",irq="53",name="vif1.0-q0-tx",chip="xen-dyn-lateeoi",cpu="0",device="vif-0",queue="0-tx",peer="1"'
    assert f"pvirq_interrupts_total{{{want}}} 6\n" in out
    assert 'pvirq_event_channels{domain="0",kind="interdomain"} 10' in out
    assert 'pvirq_event_channels_pending{domain="0",vcpu="0"} 1' in out


def test_names_are_escaped() -> None:
    text = prometheus(explain(read_text('   CPU0\n 5: 1 xen-dyn -event a"b\\c\n')))
    assert 'name="a\\"b\\\\c"' in text


def test_served_by_http(tmp_path: Path) -> None:
    file = tmp_path / "interrupts"
    shutil.copy(HOST[2], file)
    server = inspect_http._Server(("127.0.0.1", 0), lambda: prometheus(explain(read_files([file]))))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert b"pvirq_interrupts_total" in answer.read()
        file.write_text("   CPU0\n 5: 77 xen-dyn -event x\n")
        with urllib.request.urlopen(f"{url}/metrics?again") as answer:
            assert b"} 77\n" in answer.read()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/etc/passwd")
        assert error.value.code == 404
        file.unlink()
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/metrics")
        assert error.value.code == 503
        with socket.create_connection(server.server_address[:2]) as client:  # nonsense is answered, and ends nothing
            client.sendall(b"\x00\xff\r\n\r\n")
            assert client.recv(100)
        assert urllib.request.urlopen(f"{url}/").status == 200
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "address"),
    [("9100", ("127.0.0.1", 9100)), ("0.0.0.0:1", ("0.0.0.0", 1)), ("[::1]:80", ("::1", 80)), (":5", ("127.0.0.1", 5))],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert inspect_http.parse_address(text) == address
    with pytest.raises(click.UsageError):
        inspect_http.parse_address(text + "x")


def test_output_that_nobody_reads() -> None:
    done = subprocess.run(
        f"{sys.executable} -m pvirq parse {HOST[1]} | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""

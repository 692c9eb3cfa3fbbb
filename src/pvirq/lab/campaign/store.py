"""The results of a campaign: one SQLite file, which others can read while the campaign goes on.

SQLite and not DuckDB: it is in the standard library, a writer doesn't keep readers of other processes out, and each
result is safe when it has been written. DuckDB reads such a file as it is (`ATTACH 'x.sqlite' (TYPE sqlite)`).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import zstandard

import pvirq
from pvirq.lab.campaign.perform import Outcome
from pvirq.lab.campaign.plan import Run
from pvirq.lab.campaign.spec import CampaignError

VERSION: Final = 1
APPLICATION_ID: Final = 0x70766371  # "pvcq": tells these files from other SQLite ones
BUSY_S: Final = 60.0
SCHEMA: Final = """
CREATE TABLE campaign (
    name TEXT NOT NULL,         -- [campaign] name
    file TEXT NOT NULL,         -- as it was given
    text TEXT NOT NULL,         -- its whole text
    pvirq TEXT NOT NULL,        -- version
    runs INTEGER NOT NULL,      -- how many there are to be
    began REAL NOT NULL         -- Unix seconds: when the campaign first ran
);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    kernel TEXT NOT NULL,
    scenario TEXT NOT NULL,
    faults TEXT NOT NULL,
    seed INTEGER NOT NULL,
    definition TEXT NOT NULL,   -- a digest of all that the result depends on, but for the seed
    planned INTEGER NOT NULL,   -- 1: the campaign's file still has it
    verdict TEXT NOT NULL,      -- pass, fail, crash, timeout, stuck, hung, error
    message TEXT NOT NULL,      -- why, in a line
    virtual_ns INTEGER NOT NULL,-- what passed on the guest's clock
    wall_s REAL NOT NULL,       -- what it took in reality
    boot_s REAL NOT NULL,       -- and the boot before it, where this run was the first after one
    fired INTEGER NOT NULL,     -- how often its faults did
    ended REAL NOT NULL,        -- Unix seconds
    trace_hash TEXT NOT NULL,   -- the same for the same run, wherever it ran
    console TEXT NOT NULL,      -- the guest's last lines
    output TEXT NOT NULL,       -- what exec or the function printed
    detail TEXT NOT NULL,       -- a report of where the guest stood, or a traceback
    command TEXT NOT NULL,      -- repeats it
    UNIQUE (kernel, scenario, faults, seed)
);
CREATE TABLE traces (
    run INTEGER PRIMARY KEY REFERENCES runs (id) ON DELETE CASCADE,
    trace BLOB NOT NULL         -- JSON lines, in one zstandard frame
);
"""
_COLUMNS: Final = (
    "id", "kernel", "scenario", "faults", "seed", "verdict", "message", "virtual_ns", "wall_s", "boot_s", "fired",
    "ended", "trace_hash", "console", "output", "detail", "command", "definition",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A run's row."""

    id: int
    kernel: str
    scenario: str
    faults: str
    seed: int
    verdict: str
    message: str
    virtual_ns: int
    wall_s: float
    boot_s: float
    fired: int
    ended: float
    trace_hash: str
    console: str
    output: str
    detail: str
    command: str
    definition: str

    @property
    def name(self) -> str:
        """KERNEL/SCENARIO/FAULTS/SEED."""
        return f"{self.kernel}/{self.scenario}/{self.faults}/{self.seed}"


def results_path(name: str) -> Path:
    """The results' file of a campaign's, or itself where it is one."""
    path = Path(name)
    return path.with_suffix(".sqlite") if path.suffix == ".toml" else path


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Nobody else runs the campaign whose results are in `path`. CampaignError."""
    name = f"{path}-lock"
    while True:
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise CampaignError(f"{name}: {error.strerror}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):
                if os.stat(name).st_ino == os.fstat(fd).st_ino:
                    break
        except BlockingIOError:
            os.close(fd)
            raise CampaignError(f"{path}: another pvirq runs this campaign") from None
        os.close(fd)  # who had it has just removed it
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(name)
        os.close(fd)


class Store:
    """An open file of results. CampaignError for a file that is none, or can't be had."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open it, to be read only unless `create`."""
        self.path = path
        self._writes = create
        if not create and not path.exists():
            raise CampaignError(f"{path}: there are no results yet")
        try:
            if create:
                self._db = sqlite3.connect(path, timeout=BUSY_S)
            else:
                self._db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
            self._open(create)
        except sqlite3.Error as error:
            raise CampaignError(f"{path}: no file of results: {error}") from None

    def _open(self, create: bool) -> None:
        db = self._db
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if create and not tables:
            db.executescript(
                f"BEGIN;{SCHEMA};PRAGMA application_id={APPLICATION_ID};PRAGMA user_version={VERSION};COMMIT"
            )
        elif application != APPLICATION_ID:
            raise CampaignError(f"{self.path}: this is no file of a campaign's results")
        elif version != VERSION:
            raise CampaignError(f"{self.path}: results in format {version}; this pvirq knows {VERSION}")
        if create:
            # While it is written to, others can read what was there when they began. `close` makes one file of it.
            db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA foreign_keys = ON")

    # -- writing -------------------------------------------------------------------------------------------------------

    def plan(self, name: str, file: str, text: str, runs: Iterable[Run], *, fresh: bool = False) -> None:
        """A campaign begins or goes on: `runs` are all that its file has. `fresh` forgets what there was."""
        with self._db as db:
            if fresh:
                db.execute("DELETE FROM traces")
                db.execute("DELETE FROM runs")
                db.execute("DELETE FROM campaign")
            db.execute("CREATE TEMP TABLE IF NOT EXISTS wanted (kernel, scenario, faults, seed, definition)")
            db.execute("DELETE FROM wanted")
            db.executemany(
                "INSERT INTO wanted VALUES (?, ?, ?, ?, ?)", ((*_key(run), run.cell.definition) for run in runs)
            )
            row = db.execute("SELECT began FROM campaign").fetchone()
            (count,) = db.execute("SELECT count(*) FROM wanted").fetchone()
            values = (name, file, text, pvirq.__version__, count, row[0] if row else time.time())
            db.execute("DELETE FROM campaign")
            db.execute("INSERT INTO campaign VALUES (?, ?, ?, ?, ?, ?)", values)
            db.execute("CREATE INDEX IF NOT EXISTS temp.by_name ON wanted (kernel, scenario, faults, seed)")
            db.execute(
                "UPDATE runs SET planned = EXISTS (SELECT 1 FROM wanted w WHERE"
                " (w.kernel, w.scenario, w.faults, w.seed) = (runs.kernel, runs.scenario, runs.faults, runs.seed))"
            )

    def done(self) -> set[tuple[str, str, str, int, str]]:
        """What needn't be run: kernel, scenario, faults, seed, definition. What ended in an error is tried again."""
        rows = self._db.execute("SELECT kernel, scenario, faults, seed, definition FROM runs WHERE verdict <> 'error'")
        return set(rows)

    def add(self, run: Run, outcome: Outcome, command: str) -> None:
        """Keep a result, in the place of what an earlier one of the same run was."""
        with self._db as db:
            db.execute(
                "DELETE FROM runs WHERE (kernel, scenario, faults, seed) = (?, ?, ?, ?)", _key(run)
            )  # fmt: skip
            row = db.execute(
                "INSERT INTO runs (kernel, scenario, faults, seed, definition, planned, verdict, message, virtual_ns,"
                " wall_s, boot_s, fired, ended, trace_hash, console, output, detail, command)"
                " VALUES (?, ?, ?, ?, ?, 1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_key(run), run.cell.definition, outcome.verdict, outcome.message, outcome.virtual_ns,
                 round(outcome.wall_s, 4), round(outcome.boot_s, 4), outcome.fired, time.time(),
                 outcome.trace_hash, outcome.console, outcome.output, outcome.detail, command),
            )  # fmt: skip
            if outcome.trace is not None:
                db.execute("INSERT INTO traces VALUES (?, ?)", (row.lastrowid, outcome.trace))

    # -- reading -------------------------------------------------------------------------------------------------------

    def campaign(self) -> dict[str, Any]:
        """What `campaign` has; empty where nothing was ever run."""
        names = ("name", "file", "text", "pvirq", "runs", "began")
        row = self._db.execute(f"SELECT {', '.join(names)} FROM campaign").fetchone()
        return dict(zip(names, row, strict=True)) if row else {}

    def results(self, where: str = "planned", values: Sequence[object] = ()) -> Iterator[Result]:
        """The results of the file's runs as it was last run, in the order of their names; `where` is SQL's."""
        query = f"SELECT {', '.join(_COLUMNS)} FROM runs WHERE {where} ORDER BY kernel, scenario, faults, seed"
        for row in self._db.execute(query, values):
            yield Result(*row)

    def get(self, name: str) -> Result | None:
        """One run by KERNEL/SCENARIO/FAULTS/SEED, or its id."""
        parts = name.split("/")
        if len(parts) == 4:
            found = self.results("(kernel, scenario, faults, CAST(seed AS TEXT)) = (?, ?, ?, ?)", parts)
        else:
            found = self.results("CAST(id AS TEXT) = ?", [name])
        return next(found, None)

    def find(self, name: str) -> Result:
        """The same; CampaignError where there is none."""
        found = self.get(name)
        if found is None:
            raise CampaignError(f"{self.path}: no result of a run {name!r}; expected KERNEL/SCENARIO/FAULTS/SEED")
        return found

    def trace(self, result: Result) -> bytes | None:
        """The trace of a run, unpacked: JSON lines. None where none was kept."""
        row = self._db.execute("SELECT trace FROM traces WHERE run = ?", (result.id,)).fetchone()
        return zstandard.ZstdDecompressor().decompressobj().decompress(row[0]) if row else None

    def close(self) -> None:
        """Idempotent."""
        if self._writes:
            self._writes = False
            with suppress(sqlite3.OperationalError):  # somebody reads: whoever writes next does it
                self._db.execute("PRAGMA busy_timeout = 0")
                self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key(run: Run) -> tuple[str, str, str, int]:
    return run.cell.kernel, run.cell.scenario, run.cell.faults, run.seed

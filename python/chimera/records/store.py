"""The file: SQLite in WAL mode, one writer, any number of readers. Owns its tables, its version, and its limits.

What is committed survives a killed process. Within its limits of size and age the oldest rows go first. Times are seconds of
the wall's clock. The tables are a user's to query:

    requests  a client's request each, as its front-end saw it
    attempts  a try at a request each: which replica, when it was routed, admitted, ended
    entries   the action log: every committed action with its reason, and what became of it
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from chimera.core.record import Attempt, Entry, RequestRecord
from chimera.errors import ConfigError
from chimera.units import MIB

VERSION: Final = 1
_APPLICATION: Final = 0x43686D72  # "Chmr"
LEAST_BYTES: Final = 16 * MIB
_FULL: Final = 0.6
"""The part of the limit at which the oldest rows go: the log of their coming and going needs room as well."""
_GOING: Final = 5
"""A fifth of each table goes at once."""

_SCHEMA = """
CREATE TABLE requests(
  request TEXT PRIMARY KEY, client TEXT, trace TEXT, key TEXT, model TEXT NOT NULL,
  arrived REAL NOT NULL, first_token REAL, ended REAL NOT NULL,
  prompt_tokens INTEGER, output_tokens INTEGER, cached_tokens INTEGER, tries INTEGER,
  outcome TEXT NOT NULL, detail TEXT, ttft_slo REAL, tpot_slo REAL, kept_ttft INTEGER, kept_tpot INTEGER,
  prompt TEXT, answer TEXT);
CREATE INDEX requests_model ON requests(model, arrived);
CREATE INDEX requests_client ON requests(client) WHERE client != '';
CREATE TABLE attempts(
  request TEXT NOT NULL, try INTEGER NOT NULL, model TEXT NOT NULL, replica TEXT NOT NULL,
  arrived REAL, routed REAL, admitted REAL, ended REAL NOT NULL,
  outcome TEXT NOT NULL, output_tokens INTEGER, cached_tokens INTEGER, reason TEXT);
CREATE INDEX attempts_request ON attempts(request);
CREATE INDEX attempts_replica ON attempts(replica, ended);
CREATE TABLE entries(
  id INTEGER PRIMARY KEY, at REAL NOT NULL, what TEXT NOT NULL, model TEXT, replica TEXT, gpus TEXT,
  request TEXT, code TEXT, reason TEXT, move INTEGER, seconds REAL, pages INTEGER, alternatives TEXT);
CREATE INDEX entries_at ON entries(at);
CREATE INDEX entries_model ON entries(model, at);
CREATE INDEX entries_request ON entries(request) WHERE request != '';
"""

_json = msgspec.json.Encoder()


def open_to_write(path: Path) -> sqlite3.Connection:
    """Makes the file if it is not there. ConfigError for one that is not ours, or of a newer release."""
    try:
        connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5.0)
        _refuse_strangers(connection, path)
        if _pragma(connection, "user_version") == 0:
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            connection.execute("PRAGMA journal_mode = WAL")
            schema = f"BEGIN; {_SCHEMA} PRAGMA application_id = {_APPLICATION}; PRAGMA user_version = {VERSION}; COMMIT;"
            connection.executescript(schema)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA journal_size_limit = 0")
    except sqlite3.Error as fault:
        raise ConfigError.single("records", f"{path}: {fault}") from None
    path.chmod(0o600)  # who asked what is nobody else's business
    return connection


def open_to_read(path: Path) -> sqlite3.Connection:
    """ConfigError when it is not there, not ours, or of a newer release."""
    if not path.exists():
        raise ConfigError.single("records", f"there is no {path}")
    try:
        connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, check_same_thread=False, timeout=5.0)
        _refuse_strangers(connection, path)
    except sqlite3.Error as fault:
        raise ConfigError.single("records", f"{path}: {fault}") from None
    connection.row_factory = sqlite3.Row
    return connection


def _refuse_strangers(connection: sqlite3.Connection, path: Path) -> None:
    version, application = _pragma(connection, "user_version"), _pragma(connection, "application_id")
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != _APPLICATION and tables:
        raise ConfigError.single("records", f"{path} is some other program's database")
    if version > VERSION:
        told = f"{path} was written by a newer release: it is of version {version}, and this one knows up to {VERSION}"
        raise ConfigError.single("records", told, hint="name another file, or move this one away")


def write(connection: sqlite3.Connection, rows: Iterable[RequestRecord | Attempt | Entry]) -> None:
    """All of them or none."""
    requests, attempts, entries = [], [], []
    for row in rows:
        match row:
            case RequestRecord():
                requests.append(_of_request(row))
            case Attempt():
                attempts.append(_of_attempt(row))
            case Entry():
                entries.append(_of_entry(row))
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.executemany(f"INSERT OR REPLACE INTO requests VALUES({','.join('?' * 20)})", requests)
        connection.executemany(f"INSERT INTO attempts VALUES({','.join('?' * 12)})", attempts)
        connection.executemany(f"INSERT INTO entries VALUES(NULL,{','.join('?' * 12)})", entries)
        connection.execute("COMMIT")
    except sqlite3.Error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def size_bytes(connection: sqlite3.Connection) -> int:
    """Of the file; the log beside it is emptied into it every 4 MiB, and by `keep_within`."""
    return _pragma(connection, "page_count") * _pragma(connection, "page_size")


def is_large(connection: sqlite3.Connection, limit_bytes: int) -> bool:
    return size_bytes(connection) > _FULL * limit_bytes


def keep_within(connection: sqlite3.Connection, limit_bytes: int, oldest_s: float) -> None:
    """Lets the oldest rows go: those before `oldest_s`, and as many as the size demands."""
    connection.execute("DELETE FROM requests WHERE arrived < ?", (oldest_s,))
    connection.execute("DELETE FROM attempts WHERE ended < ?", (oldest_s,))
    connection.execute("DELETE FROM entries WHERE at < ?", (oldest_s,))
    if is_large(connection, limit_bytes):
        for table in ("requests", "attempts", "entries"):
            cut = f"SELECT min(rowid) + (max(rowid) - min(rowid)) / {_GOING} FROM {table}"
            connection.execute(f"DELETE FROM {table} WHERE rowid <= ({cut})")
        connection.execute("PRAGMA incremental_vacuum").fetchall()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _of_request(row: RequestRecord) -> tuple[object, ...]:
    story = row.story
    return (
        row.request_id, row.client_id, row.trace, row.key, row.model, row.arrived_s, row.first_token_s, row.ended_s,
        row.prompt_tokens, row.output_tokens, row.cached_tokens, row.tries, row.outcome, row.detail,
        row.slo.ttft_s, row.slo.tpot_s, story.keeps_ttft, story.keeps_tpot, row.prompt, row.answer,
    )  # fmt: skip


def _of_attempt(row: Attempt) -> tuple[object, ...]:
    request, _, number = row.request_id.partition(".")
    return (
        request, int(number or 0), row.model, row.replica, row.arrived_s, row.routed_s, row.admitted_s, row.ended_s,
        row.outcome, row.output_tokens, row.cached_tokens, row.reason,
    )  # fmt: skip


def _of_entry(row: Entry) -> tuple[object, ...]:
    alternatives = _json.encode(row.alternatives).decode() if row.alternatives else None
    return (
        row.at_s, row.what, row.model, row.replica, ",".join(map(str, row.gpus)), row.request_id.partition(".")[0], row.code,
        row.reason, row.move, row.seconds, row.pages, alternatives,
    )  # fmt: skip

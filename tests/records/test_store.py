"""The store: what is committed stays, within its limits; a full disk or a killed process costs little and is said."""

from __future__ import annotations

import logging
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
from chimera.core.record import Alternative, Attempt, Entry, RequestRecord
from chimera.errors import ConfigError
from chimera.records import store
from chimera.records.keeper import Keeper
from chimera.units import MIB


def request(number: int, at_s: float = 1000.0) -> RequestRecord:
    return RequestRecord(
        request_id=f"r{number}", model="m", arrived_s=at_s, ended_s=at_s + 1, prompt_tokens=3, output_tokens=9, outcome="stop"
    )


def entry(what: str = "activate", at_s: float = 1000.0, reason: str = "because") -> Entry:
    weighed = (Alternative(what="GPU 1", score=0.5, unit="requests/s", chosen=True),)
    return Entry(at_s=at_s, what=what, model="m", replica="m/0", gpus=(0, 1), reason=reason, alternatives=weighed)


def count(path: Path, table: str) -> int:
    with closing(store.open_to_read(path)) as reader:
        return int(reader.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "r", wall=lambda: 1000.0)
    attempt = Attempt(request_id="r1.2", model="m", replica="m/0", arrived_s=1, routed_s=2, ended_s=1004, outcome="requeued")
    for row in (request(1), attempt, entry()):
        keeper.keep(row)
    keeper.close()
    with closing(store.open_to_read(tmp_path / "r")) as reader:
        assert reader.execute("SELECT model, outcome, kept_ttft FROM requests").fetchone()[:] == ("m", "stop", 1)
        assert reader.execute("SELECT request, try, outcome FROM attempts").fetchone()[:] == ("r1", 2, "requeued")
        row = reader.execute("SELECT what, gpus, reason, alternatives FROM entries").fetchone()
        assert row[:3] == ("activate", "0,1", "because") and '"GPU 1"' in row[3]
    assert (tmp_path / "r").stat().st_mode & 0o077 == 0


def test_a_reader_does_not_stop_the_writer(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "r", wall=lambda: 1000.0)
    keeper.keep(request(1))
    keeper.flush()
    with closing(store.open_to_read(tmp_path / "r")) as reader:
        rows = reader.execute("SELECT * FROM requests")
        assert rows.fetchone() is not None
        keeper.keep(request(2))
        keeper.flush()
        assert (keeper.kept, keeper.fault) == (2, "")
    keeper.close()


def test_the_store_stays_under_its_limit_and_keeps_the_newest(tmp_path: Path) -> None:
    path, limit_bytes = tmp_path / "r", 16 * MIB
    keeper = Keeper(path, limit_bytes=limit_bytes, wall=lambda: 1000.0)
    largest = 0
    for batch in range(12):
        for number in range(1000):
            keeper.keep(msgspec.structs.replace(request(batch * 1000 + number), detail="long" * 500))
        keeper.flush()
        largest = max(largest, sum(file.stat().st_size for file in tmp_path.iterdir() if not file.name.endswith("-shm")))
    keeper.close()
    assert limit_bytes / 2 < largest <= limit_bytes
    assert 2000 < count(path, "requests") < 12_000
    with closing(store.open_to_read(path)) as reader:
        assert reader.execute("SELECT 1 FROM requests WHERE request = 'r11999'").fetchone()


def test_what_is_too_old_goes(tmp_path: Path) -> None:
    keeper = Keeper(tmp_path / "r", keep_s=100.0, wall=lambda: 1000.0)
    for at_s in (800.0, 899.0, 901.0):
        keeper.keep(entry(at_s=at_s))
    keeper.close()
    assert count(tmp_path / "r", "entries") == 1


def test_a_full_disk_is_said_once_and_what_came_meanwhile_is_kept_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Keeper(tmp_path / "r", wall=lambda: 1000.0)
    # What SQLite says of a disk without room, it says of a file that may not grow.
    pages = keeper._connection.execute("PRAGMA page_count").fetchone()[0]
    keeper._connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    for number in range(3000):
        keeper.keep(request(number))
    keeper.flush()
    keeper.flush()
    assert "full" in keeper.fault and keeper.kept == 0
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "serving goes on" in caplog.text
    keeper._connection.execute("PRAGMA max_page_count = 1000000").fetchall()
    keeper.flush()
    assert (keeper.fault, keeper.kept, keeper.lost) == ("", 3000, 0)
    keeper.close()


def test_with_no_end_of_a_full_disk_the_oldest_are_lost_and_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chimera.records.keeper._MOST_QUEUED", 100)
    keeper = Keeper(tmp_path / "r", wall=lambda: 1000.0)
    keeper._connection.execute("PRAGMA query_only = ON")
    for number in range(250):
        keeper.keep(request(number))
    keeper.flush()
    assert keeper.lost == 150 and keeper.fault
    keeper._connection.execute("PRAGMA query_only = OFF")
    keeper.close()
    assert count(tmp_path / "r", "requests") == 100


def test_a_store_of_a_newer_release_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "newer.sqlite"
    store.open_to_write(path).close()
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("PRAGMA user_version = 7")
    for opened in (store.open_to_write, store.open_to_read):
        with pytest.raises(ConfigError, match=r"newer\.sqlite was written by a newer release: it is of version 7"):
            opened(path)


def test_another_programs_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with closing(sqlite3.connect(path)) as raw:
        raw.execute("CREATE TABLE mine(a)")
    with pytest.raises(ConfigError, match="some other program"):
        store.open_to_write(path)
    path.write_text("no database at all, but long enough to be taken for one" * 20)
    with pytest.raises(ConfigError, match="not a database"):
        store.open_to_write(path)


_WRITER = """
import sys, time
from pathlib import Path
from chimera.core.record import Entry
from chimera.records.keeper import Keeper
keeper = Keeper(Path(sys.argv[1]))
keeper.start()
for number in range(10**9):
    keeper.keep(Entry(at_s=time.time(), what="reject", request_id=str(number), reason="r"))
    if number % 20 == 0:
        print(number, time.time(), flush=True)
        time.sleep(0.01)
"""


def test_kill_9_loses_at_most_the_last_second(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    first_s = last_s = 0.0
    for line in writer.stdout:
        last_s = float(line.split()[1])
        first_s = first_s or last_s
        if last_s - first_s > 1.2:
            break
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    with closing(store.open_to_read(path)) as reader:
        assert reader.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        newest_s, rows, distinct = reader.execute("SELECT max(at), count(*), count(DISTINCT request) FROM entries").fetchone()
    assert last_s - newest_s <= 1.0
    assert rows == distinct > 0

"""Spools keep to their room, the newest longest; and what a host's administrator sets."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from agent.settings import Settings, parse, read
from agent.spool import Spools

DAY = 86_400 * 10**9


def _spool(folder: Path, name: str, size: int, age_ns: int) -> None:
    (folder / name).write_bytes(b"x" * size)
    at = time.time_ns() - age_ns
    os.utime(folder / name, ns=(at, at))


def _left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _spools(folder: Path, total: int, days: float = 7.0) -> Spools:
    return Spools(folder, lambda: Settings(total, days))


def test_the_oldest_spools_go_first_and_only_as_many_as_must(tmp_path: Path) -> None:
    for name, size, age in (("1.out", 40, 30), ("2.out", 30, 20), ("2.err", 20, 25), ("3.out", 10, 1)):
        _spool(tmp_path, name, size, age * 10**9)
    _spools(tmp_path, 60).trim()
    assert _left(tmp_path) == {"2.out", "2.err", "3.out"}
    _spools(tmp_path, 59).trim()
    assert _left(tmp_path) == {"2.out", "3.out"}


def test_what_is_too_old_goes_though_there_is_room(tmp_path: Path) -> None:
    for name, age in (("1.out", 3 * DAY), ("2.out", DAY)):
        _spool(tmp_path, name, 1, age)
    _spools(tmp_path, 100, days=4).trim()
    assert _left(tmp_path) == {"1.out", "2.out"}
    _spools(tmp_path, 100, days=2).trim()
    assert _left(tmp_path) == {"2.out"}
    Spools(tmp_path, Settings).trim()
    assert _left(tmp_path) == {"2.out"}


def test_commands_that_write_at_once_keep_to_the_total_and_take_room_from_the_oldest(tmp_path: Path) -> None:
    _spool(tmp_path, "1.out", 60, DAY)
    spools = _spools(tmp_path, 100)
    one, other = tmp_path / "2.out", tmp_path / "3.out"

    def write(path: Path, count: int) -> bool:
        if not spools.room(path, count):
            return False
        with path.open("ab") as file:
            file.write(b"x" * count)
        return True

    assert write(one, 40)
    assert _left(tmp_path) == {"1.out", "2.out"}
    assert write(other, 30)
    assert _left(tmp_path) == {"2.out", "3.out"}, "the oldest made room"
    assert write(one, 30)
    assert not write(other, 1), "nobody's that is being written is taken away"
    assert one.stat().st_size + other.stat().st_size == 100
    spools.close(one)
    assert write(other, 1)
    assert _left(tmp_path) == {"3.out"}


def test_an_empty_spool_is_no_trouble(tmp_path: Path) -> None:
    _spools(tmp_path, 0).trim()
    assert not _spools(tmp_path, 0).room(tmp_path / "1.out", 1)


def test_settings_are_read_with_what_is_wrong_all_at_once(tmp_path: Path) -> None:
    assert read(tmp_path / "agent.conf") == (Settings(), [])
    (tmp_path / "agent.conf").write_text("# ours\n\nspool_total = 512M # half\n spool_days=0.5\n")
    assert read(tmp_path / "agent.conf") == (Settings(512 << 20, 0.5), [])
    settings, wrong = parse("spool_total = much\nspool_days = -1\nspoolage = 3\nspool_total = 1k\nx\n")
    assert settings == Settings(1_024)
    assert [line.partition(":")[0] for line in wrong] == ["line 1", "line 2", "line 3", "line 5"]


@pytest.mark.parametrize("data", [b"\xff\xfe", b"spool_days = " + b"9" * 100_000, b"=\n" * 1_000, b"spool_total"])
def test_odd_settings_leave_the_defaults(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "agent.conf").write_bytes(data)
    assert read(tmp_path / "agent.conf")[0] == Settings()

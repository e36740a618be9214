"""Spools keep to their room, the newest longest."""

from __future__ import annotations

import os
from pathlib import Path

from agent.spool import trim


def _spool(folder: Path, name: str, size: int, age: int) -> None:
    (folder / name).write_bytes(b"x" * size)
    os.utime(folder / name, ns=(10**18 - age, 10**18 - age))


def test_the_oldest_spools_go_first_and_only_as_many_as_must(tmp_path: Path) -> None:
    for name, size, age in (("1.out", 40, 30), ("2.out", 30, 20), ("2.err", 20, 25), ("3.out", 10, 1)):
        _spool(tmp_path, name, size, age)
    trim(tmp_path, 60)
    assert {path.name for path in tmp_path.iterdir()} == {"2.out", "2.err", "3.out"}
    trim(tmp_path, 59)
    assert {path.name for path in tmp_path.iterdir()} == {"2.out", "3.out"}


def test_spools_that_fit_stay(tmp_path: Path) -> None:
    _spool(tmp_path, "1.out", 100, 1)
    trim(tmp_path, 100)
    assert (tmp_path / "1.out").exists()
    trim(tmp_path)
    assert (tmp_path / "1.out").exists()


def test_an_empty_spool_is_no_trouble(tmp_path: Path) -> None:
    trim(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []

"""Outcomes on an agent's disk: whole or not there, whatever became of the files."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.outcomes import KeptOutcomes
from protocol.limits import KEEP_FOR, MAX_OUTPUT
from protocol.outcomes import Exited, Lost, Output

_SIGNATURE = b"s" * 64
_OUTCOME, _OUTPUT = Exited(3), Output(out=b"hello", out_total=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outcomes"


def _kept(folder: Path, id_: int = 7) -> KeptOutcomes:
    found = KeptOutcomes(folder)
    found.keep(id_, _SIGNATURE, _OUTCOME, _OUTPUT)
    return found


def test_an_outcome_is_there_for_the_next_agent(folder: Path) -> None:
    _kept(folder)
    again = KeptOutcomes(folder)
    assert list(again.scan()) == [7]
    assert again.load(7, _SIGNATURE) == (_OUTCOME, _OUTPUT)
    assert stat.S_IMODE((folder / "7").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_largest_outcome_comes_back_whole(folder: Path) -> None:
    output = Output(out=os.urandom(MAX_OUTPUT), err=os.urandom(MAX_OUTPUT), spool="/" * 4_096)
    outcome = Lost("\U0001f600" * 2_000)
    KeptOutcomes(folder).keep(1, _SIGNATURE, outcome, output)
    again = KeptOutcomes(folder)
    assert 1 in again.scan()
    assert again.load(1, _SIGNATURE) == (outcome, output)


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _one_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def _longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


def _a_link_elsewhere(file: Path) -> None:
    other = file.with_name("elsewhere")
    file.rename(other)
    file.symlink_to(other)


def _a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _another_commands(file: Path) -> None:
    (file.parent / "8").rename(file)


def _gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    "damage", [_cut_short, _emptied, _one_bit, _longer, _a_link_elsewhere, _a_fifo, _another_commands, _gone]
)
def test_what_is_not_what_was_written_is_nothing(damage: Callable[[Path], None], folder: Path) -> None:
    kept = _kept(folder)
    kept.keep(8, _SIGNATURE, _OUTCOME, _OUTPUT)
    damage(folder / "7")
    assert kept.load(7, _SIGNATURE) is None
    again = KeptOutcomes(folder)
    again.scan()
    assert again.load(7, _SIGNATURE) is None


def test_it_is_told_for_no_command_but_its_own(folder: Path) -> None:
    assert _kept(folder).load(7, b"t" * 64) is None


def test_a_digest_over_something_else_is_no_outcome(folder: Path) -> None:
    from agent.outcomes import _digest

    kept = _kept(folder)
    for body in (b"", b"\xc1", b"\x94" * 100, b"\x91\xc0"):
        (folder / "7").write_bytes(_digest(body) + body)
        assert kept.load(7, _SIGNATURE) is None


def test_what_is_old_or_half_or_somebody_elses_is_removed_at_the_next_start(folder: Path) -> None:
    kept = _kept(folder)
    kept.keep(6, _SIGNATURE, _OUTCOME, _OUTPUT)
    long_ago = time.time() - KEEP_FOR - 60
    os.utime(folder / "6", (long_ago, long_ago))
    for name in ("5.part", "notes", "-1", "\u0667"):
        (folder / name).write_bytes(b"x")
    with (folder / "9").open("wb") as file:
        file.truncate(1 << 30)
    (folder / "sub").mkdir()
    assert list(KeptOutcomes(folder).scan()) == [7]
    assert {path.name for path in folder.iterdir()} == {"7", "sub"}


def test_without_a_folder_there_is_nothing(folder: Path) -> None:
    assert KeptOutcomes(folder).scan() == {}


def test_only_what_was_written_is_removed_when_it_is_acknowledged(folder: Path) -> None:
    kept = KeptOutcomes(folder)
    kept.expect(7)
    kept.keep(7, _SIGNATURE, _OUTCOME, _OUTPUT)
    assert kept.no_more((1, 7)) == [7]
    assert kept.no_more((7,)) == [], "once"
    kept.remove([7])
    assert list(folder.iterdir()) == []


def test_a_disk_that_takes_nothing_keeps_nothing(folder: Path) -> None:
    folder.write_bytes(b"a file where the folder should be")
    with pytest.raises(OSError, match="outcomes"):
        KeptOutcomes(folder).keep(7, _SIGNATURE, _OUTCOME, _OUTPUT)

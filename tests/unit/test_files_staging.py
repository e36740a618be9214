"""What interrupted pushes leave: found again by who comes back for it, and removed in time, alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.staging import Staging, trim

OTHER_UID = 65_534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    made = tmp_path / "notes"
    made.mkdir()
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    made = tmp_path / "target"
    made.mkdir()
    return made


def leave(notes: Path, target: Path, key: str, size: int = 10, *, age: float = 0.0, now: float = 1e9) -> Path:
    """A push that was interrupted `age` seconds before `now`; where it gathered."""
    parent = os.open(target, os.O_RDONLY)
    before = set(target.iterdir())
    staging = Staging(notes, key, str(target), parent)
    fd = staging.make()
    os.mkdir("0", dir_fd=fd)
    part = os.open("0/part", os.O_WRONLY | os.O_CREAT, dir_fd=fd)
    os.write(part, b"x" * size)
    os.close(part)
    staging.close()
    os.close(parent)
    os.utime(notes / key, (now - age, now - age))
    (made,) = set(target.iterdir()) - before
    return made


def test_what_is_too_old_goes_and_what_is_not_stays(notes: Path, target: Path) -> None:
    old, young = leave(notes, target, "old", age=100), leave(notes, target, "young", age=99)
    trim(notes, age=100, now=1e9)
    assert list(target.iterdir()) == [young]
    assert old != young
    assert [note.name for note in notes.iterdir()] == ["young"]


def test_what_is_too_much_goes_oldest_first(notes: Path, target: Path) -> None:
    for number in range(4):
        leave(notes, target, f"{number}", 100_000, age=number)
    trim(notes, most=250_000, now=1e9)
    assert sorted(note.name for note in notes.iterdir()) == ["0", "1"]
    assert len(list(target.iterdir())) == 2


def test_what_somebody_is_at_work_in_stays(notes: Path, target: Path) -> None:
    leave(notes, target, "busy", age=1e6)
    parent = os.open(target, os.O_RDONLY)
    staging = Staging(notes, "busy", str(target), parent)
    assert staging.adopted
    trim(notes, now=1e9)
    assert len(list(target.iterdir())) == len(list(notes.iterdir())) == 1
    # Another push of the same goes its own way meanwhile, with a note of its own.
    other = Staging(notes, "busy", str(target), parent)
    assert not other.adopted
    other.make()
    assert len(list(target.iterdir())) == len(list(notes.iterdir())) == 2
    other.remove()
    staging.remove()
    os.close(parent)
    assert list(target.iterdir()) == list(notes.iterdir()) == []


def test_what_is_gone_leaves_no_note(notes: Path, target: Path) -> None:
    leave(notes, target, "gone").rename(target.parent / "elsewhere")
    leave(notes, target, "moved")
    target.rename(target.parent / "moved away")
    trim(notes, now=1e9)
    assert list(notes.iterdir()) == []
    assert (target.parent / "elsewhere" / "0" / "part").exists()


def note(folder: Path, name: str) -> bytes:
    return msgspec.msgpack.encode({"folder": str(folder), "name": name})


@pytest.mark.parametrize(
    "make",
    [
        lambda target: b"",
        lambda target: b"noise",
        lambda target: note(target, "precious"),
        lambda target: note(target, "../target/precious"),
        lambda target: note(target, ".canopy-/../precious"),
        lambda target: note(target, ".canopy-link"),
        lambda target: note(target, ".canopy-file"),
        lambda target: note(target, ".canopy-open"),
        lambda target: note(target / "..", ".canopy-x"),
        lambda target: note(Path("relative"), ".canopy-x"),
    ],
)
def test_a_note_that_leads_elsewhere_removes_nothing(notes: Path, target: Path, make: Callable[[Path], bytes]) -> None:
    (target / "precious").mkdir()
    (target / "precious" / "file").write_bytes(b"precious")
    (target / ".canopy-link").symlink_to(target / "precious")
    (target / ".canopy-file").write_bytes(b"precious")
    (target / ".canopy-open").mkdir(mode=0o755)
    (target / ".canopy-open" / "file").write_bytes(b"precious")
    before = sorted(target.rglob("*"))
    (notes / "odd").write_bytes(make(target))
    os.utime(notes / "odd", (1e9, 1e9))
    trim(notes, age=0, now=1e12)
    assert sorted(target.rglob("*")) == before


@as_root
def test_another_users_directory_is_neither_used_nor_removed(notes: Path, target: Path) -> None:
    staging = leave(notes, target, "key", age=1e6)
    os.chown(staging, OTHER_UID, OTHER_UID)
    parent = os.open(target, os.O_RDONLY)
    assert not Staging(notes, "key", str(target), parent).adopted
    os.close(parent)
    trim(notes, now=1e9)
    assert (staging / "0" / "part").exists()


def test_a_directory_that_is_swapped_for_another_takes_nothing_of_that_with_it(notes: Path, target: Path) -> None:
    parent = os.open(target, os.O_RDONLY)
    staging = Staging(notes, "key", str(target), parent)
    staging.make()
    (made,) = target.iterdir()
    made.rename(target / "away")
    (target / "precious").mkdir()
    (target / "precious" / "file").write_bytes(b"precious")
    (target / "precious").rename(made)
    staging.remove()
    os.close(parent)
    assert (made / "file").read_bytes() == b"precious"


def test_what_is_only_just_noted_is_left_to_whoever_noted_it(notes: Path, target: Path) -> None:
    (notes / "key").write_bytes(note(target, ".canopy-about-to-be-made"))
    trim(notes, age=0)
    assert [path.name for path in notes.iterdir()] == ["key"]
    os.utime(notes / "key", (1e9, 1e9))
    trim(notes, age=0)
    assert list(notes.iterdir()) == []

"""What is left of an agent that leaves."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agent.leaving import leave, let_go, unit_name


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `systemctl` on the path that writes down how it was called; the file that it writes to."""
    told = tmp_path / "told"
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {told}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return told


def _installed(tmp_path: Path) -> tuple[Path, Path, Path]:
    directory, units = tmp_path / "canopy" / "f-1", tmp_path / "units"
    directory.mkdir(parents=True)
    (directory / "identity").write_text("x")
    units.mkdir()
    unit = units / unit_name("f-1")
    unit.write_text("[Service]\n")
    return directory, units, unit


def test_systemd_does_not_start_an_agent_again_that_left(tmp_path: Path, systemctl: Path) -> None:
    directory, units, unit = _installed(tmp_path)
    leave("f-1", directory, purge=False, units=units)
    assert systemctl.read_text().splitlines() == [f"disable {unit.name}", f"stop --no-block {unit.name}"]
    assert unit.exists()
    assert (directory / "identity").exists()


def test_a_purge_leaves_neither_unit_nor_directory(tmp_path: Path, systemctl: Path) -> None:
    directory, units, unit = _installed(tmp_path)
    leave("f-1", directory, purge=True, units=units)
    assert systemctl.read_text().splitlines()[-1] == f"stop --no-block {unit.name}"
    assert not unit.exists()
    assert not directory.parent.exists()


def test_a_purge_leaves_another_fleets_directory_alone(tmp_path: Path) -> None:
    directory, units, _ = _installed(tmp_path)
    other = directory.with_name("f-2")
    other.mkdir()
    leave("f-1", directory, purge=True, units=units / "none")
    assert not directory.exists()
    assert other.exists()


def test_without_systemd_nothing_is_called(tmp_path: Path, systemctl: Path) -> None:
    directory, units, _ = _installed(tmp_path)
    leave("f-3", directory, purge=False, units=units)
    assert not systemctl.exists()


def test_an_agent_that_can_not_let_go_leaves_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("libvirt said something odd")

    async def hang() -> None:
        await asyncio.Event().wait()

    asyncio.run(let_go(fail(), vms=False))
    assert "libvirt said something odd" in caplog.text
    asyncio.run(let_go(hang(), vms=False, seconds=0.01))
    assert "TimeoutError" in caplog.text

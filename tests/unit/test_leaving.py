"""What is left of an agent that leaves."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import seed
from agent.leaving import Ending, NotEnded, extension, granted, leave, unit_name
from agent.notify import Notifier
from protocol.commands import Leave


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


def test_a_purge_leaves_the_disks_of_vms_that_are_still_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory, units, _ = _installed(tmp_path)
    disk = directory / "vms" / "vm1" / "overlay.qcow2"
    disk.parent.mkdir(parents=True)
    disk.write_bytes(b"disk")
    leave("f-1", directory, purge=True, units=units)
    assert disk.read_bytes() == b"disk"
    assert "VMs are left" in caplog.text


def test_without_systemd_nothing_is_called(tmp_path: Path, systemctl: Path) -> None:
    directory, units, _ = _installed(tmp_path)
    leave("f-3", directory, purge=False, units=units)
    assert not systemctl.exists()


def test_a_part_that_can_not_be_ended_is_given_up_and_told(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        raise RuntimeError("libvirt said something odd")

    async def refuse() -> None:
        raise NotEnded("its disk does not answer")

    async def hang() -> None:
        await asyncio.Event().wait()

    async def play() -> list[str]:
        ending = Ending()
        await ending.part("VMs", fail(), 10.0)
        await ending.part("push 7", refuse(), 10.0)
        await ending.part("pulls", hang(), 0.01)
        return ending.left

    left = asyncio.run(play())
    assert left == [
        "VMs: RuntimeError: libvirt said something odd",
        "push 7: its disk does not answer",
        "pulls: not ended within 0.01 s",
    ]
    assert all(sentence in caplog.text for sentence in left)


def test_an_agent_that_a_signal_ends_gives_up_in_time_to_write_that_down() -> None:
    unit = re.search(r"^TimeoutStopSec=(\d+)$", seed.UNIT, re.MULTILINE)
    assert unit is not None
    assert granted(None) < min(seed.STOP_DEADLINE, float(unit[1]))
    assert extension(None) == 0.0


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Where what services tell systemd arrives (sd_notify(3))."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.settimeout(10.0)
        notified.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield notified


@pytest.mark.parametrize("order", [Leave(), Leave(purge=True), Leave(vms=True), Leave(vms=True, purge=True)])
def test_systemd_grants_an_agent_that_leaves_all_the_time_that_it_takes(order: Leave, systemd: socket.socket) -> None:
    Notifier().end(extension(order))
    stopping, extended = systemd.recv(1024).decode().splitlines()
    assert stopping == "STOPPING=1"
    name, _, microseconds = extended.partition("=")
    assert name == "EXTEND_TIMEOUT_USEC"
    assert int(microseconds) > granted(order) * 1_000_000


def test_an_agent_that_is_merely_stopped_asks_systemd_for_no_more_than_its_unit_has(systemd: socket.socket) -> None:
    Notifier().end(extension(None))
    assert systemd.recv(1024) == b"STOPPING=1"


def test_what_an_agent_leaves_behind_is_told_in_one_line(systemd: socket.socket) -> None:
    Notifier().tell("ended, but for VMs: vm1: libvirt says:\nno")
    assert systemd.recv(1024) == b"STATUS=ended, but for VMs: vm1: libvirt says: no"

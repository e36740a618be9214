"""The service is started where none runs, and again where one of another version does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.identity import is_running
from controller import launch
from controller.launch import ensure_service
from controller.session import Session
from controller.status import CtlError
from tests.waiting import wait_until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("CANOPY_HOME", str(tmp_path))
    yield tmp_path
    session = Session()
    if (session.directory / "client.sock").exists():
        session.shutdown()
        wait_until(lambda: not is_running(session.directory, "service.lock"), 20, "the service ends")


def _arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def test_a_service_that_runs_is_taken_as_it_is(home: Path) -> None:
    pid = ensure_service(None, listen="127.0.0.1", advertised="127.0.0.1").status().pid
    assert ensure_service(None).status().pid == pid


def test_a_service_of_another_version_is_started_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = ensure_service(None, listen="127.0.0.1").status().pid
    monkeypatch.setattr(launch, "VERSION", "0.0.9")
    assert ensure_service(None).status().pid != pid


def test_addresses_that_were_given_once_are_kept_for_later_starts(home: Path) -> None:
    session = ensure_service(None, listen="127.0.0.1", advertised="127.0.0.1")
    os.kill(session.status().pid, signal.SIGKILL)
    wait_until(lambda: not is_running(session.directory, "service.lock"), 20, "the service is gone")
    again = _arguments(ensure_service(None).status().pid)
    assert again[again.index("--listen") + 1] == again[again.index("--address") + 1] == "127.0.0.1"


def test_all_who_start_it_at_once_have_the_same_one(home: Path) -> None:
    def start(_: int) -> int:
        return ensure_service(None, listen="127.0.0.1", advertised="127.0.0.1").status().pid

    with ThreadPoolExecutor(4) as threads:
        assert len(set(threads.map(start, range(4)))) == 1


def test_one_that_does_not_start_is_told_of_with_its_last_words(home: Path) -> None:
    with pytest.raises(CtlError, match=r"the service did not start: .*203\.0\.113\.1"):
        ensure_service(None, listen="203.0.113.1", advertised="203.0.113.1")

"""How an agent's work ends: outcomes are on disk whatever else fails, and what hangs does not keep it from ending."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from agent.care import Care
from agent.identity import HostDirectory
from agent.leaving import let_go
from agent.outcomes import KeptOutcomes
from agent.worker import AgentWorker
from protocol import events
from protocol.outcomes import Exited, Outcome, Output

DEADLINE_S = 30.0
#: Long enough for a loop to come to what would be wrong, short enough to wait for.
SHORT_S = 0.1
ID, SIGNATURE = 7, b"s" * 64
OUTCOME, OUTPUT = Exited(3), Output(out=b"hello", out_total=5)


class SlowDisk(KeptOutcomes):
    """Writes when it is let."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_write = threading.Event()

    def keep(self, id_: int, signature: bytes, outcome: Outcome, output: Output) -> None:
        assert self.may_write.wait(DEADLINE_S)
        super().keep(id_, signature, outcome, output)


class Shell:
    """Has been closed: nothing that comes is anybody's business any more."""

    def feed(self, event: events.Event) -> None: ...


class Scene:
    """An agent's work on a host, whose disks hang for as long as the test goes on."""

    def __init__(self, path: Path) -> None:
        self.directory = HostDirectory(path / "host")
        self.directory.enrol("127.0.0.1")
        self.kept = SlowDisk(self.directory.outcomes)
        self.over = threading.Event()

    def worker(self) -> AgentWorker:
        return AgentWorker(cast("Any", Shell()), self.directory, self.kept, version="1", uri="test:///default")

    def hang(self, worker: AgentWorker) -> Future[bool]:
        """A disk thread hangs, as in a write to an NFS server that is gone."""
        return worker._disk.submit(self.over.wait, DEADLINE_S)

    def read(self) -> tuple[Outcome, Output] | None:
        """What the next agent finds."""
        again = KeptOutcomes(self.directory.outcomes)
        again.scan()
        return again.load(ID, SIGNATURE)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.over.set()
    made.kept.may_write.set()


def test_a_disk_that_hangs_does_not_keep_an_agent_from_ending(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    async def play() -> bool:
        worker = scene.worker()
        hanging = scene.hang(worker)
        await let_go(worker.close(None), SHORT_S)
        return hanging.done()

    assert asyncio.run(play()) is False
    assert "TimeoutError" in caplog.text


def test_an_error_does_not_end_an_agent_before_its_outcomes_are_on_disk(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        worker = scene.worker()

        async def fail(*, keep: bool) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(worker._pushes, "close", fail)
        worker.keep(events.Keep(ID, SIGNATURE, OUTCOME, OUTPUT))
        closing = asyncio.ensure_future(let_go(worker.close(None), DEADLINE_S))
        done, _ = await asyncio.wait({closing}, timeout=SHORT_S)
        assert not done
        scene.kept.may_write.set()
        await closing
        assert scene.read() == (OUTCOME, OUTPUT)

    asyncio.run(play())
    assert os.strerror(errno.EIO) in caplog.text


def test_a_look_at_the_host_that_hangs_does_not_keep_an_agent_from_ending(scene: Scene) -> None:
    async def play() -> bool:
        care = Care(scene.directory, "test:///default")
        hanging = care._threads.submit(scene.over.wait, DEADLINE_S)
        await let_go(care.close(undo=False), SHORT_S)
        return hanging.done()

    assert asyncio.run(play()) is False

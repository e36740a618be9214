"""How an agent's work ends: outcomes are on disk whatever else fails, and what hangs does not keep it from ending."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from agent import domains, incoming, leaving
from agent.hypervisor import HypervisorError
from agent.identity import HostDirectory
from agent.outcomes import KeptOutcomes
from agent.staged import Staged
from agent.worker import AgentWorker
from protocol import events
from protocol.commands import CreateVms, Leave, Stream
from protocol.outcomes import Exited, Outcome, Output
from protocol.transfer import Role
from protocol.vms import DirectBoot, VmSpec
from tests.pushes import file_push

DEADLINE_S = 30.0
#: Long enough for a loop to come to what would be wrong, short enough to wait for.
SHORT_S = 0.1
ID, SIGNATURE = 7, b"s" * 64
BYTES = b"some bytes"
KERNEL = hashlib.sha256(b"kernel").hexdigest()
VM = VmSpec(
    name="vm1",
    uuid=str(uuid.uuid5(uuid.NAMESPACE_DNS, "vm1")),
    deployment="lab",
    vcpus=1,
    memory_mib=64,
    mac="00:16:3e:12:00:01",
    ip="198.18.0.1",
    prefix=15,
    boot=DirectBoot(kernel=KERNEL, cmdline="console=ttyS0"),
)
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
    """Has been closed: nothing that comes is anybody's business any more. Before, it knows who took part in pushes."""

    def __init__(self) -> None:
        self.targets: set[int] = set()
        self.finished: dict[int, Outcome] = {}

    def feed(self, event: events.Event) -> None:
        if isinstance(event, events.Finished):
            self.finished[event.id] = event.outcome

    def begin_transfer(self, id_: int, stream: Stream, role: Role, have: int = 0) -> None:
        if role is Role.TARGET:
            self.targets.add(id_)


class Scene:
    """An agent's work on a host, whose disks hang for as long as the test goes on."""

    def __init__(self, path: Path) -> None:
        self.directory = HostDirectory(path / "host")
        self.directory.enrol("127.0.0.1")
        self.kept = SlowDisk(self.directory.outcomes)
        self.over = threading.Event()
        self.shell = Shell()

    def worker(self) -> AgentWorker:
        return AgentWorker(cast("Any", self.shell), self.directory, self.kept, version="1", uri="test:///default")

    async def with_a_vm(self, worker: AgentWorker) -> None:
        """A VM of this agent's runs."""
        (self.directory.images / KERNEL).write_bytes(b"kernel")
        worker.start(1, CreateVms(deployment="lab", specs=(VM,)), None)
        await eventually(lambda: 1 in self.shell.finished, "a VM")
        assert self.shell.finished[1] == Exited(0)
        assert self.vms

    async def with_pushes(self, worker: AgentWorker, *ids: int) -> None:
        """This host is a target of these."""
        for id_ in ids:
            worker.start(id_, file_push(BYTES, self.directory.path / f"pushed{id_}"), None)
        await eventually(lambda: self.shell.targets >= set(ids), "pushes")

    async def hang_in_writes(self, worker: AgentWorker, *ids: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """What comes of these hangs on its way to the disk, each on a thread of the disk's."""
        hanging = threading.Semaphore(0)

        def hang(*_: object) -> None:
            hanging.release()
            self.over.wait(DEADLINE_S)

        monkeypatch.setattr(Staged, "write", hang)
        for id_ in ids:
            worker.store(id_, [(0, BYTES)])
        for _ in ids:
            await eventually(lambda: hanging.acquire(blocking=False), "a write that hangs")

    @property
    def staged(self) -> list[Path]:
        """What is on its way to its place."""
        return [path for path in self.directory.path.glob(".canopy*") if path.is_dir()]

    @property
    def vms(self) -> list[str]:
        return os.listdir(self.directory.vms)

    def hang(self, worker: AgentWorker) -> Future[bool]:
        """A disk thread hangs, as in a write to an NFS server that is gone."""
        return worker._disk.submit(self.over.wait, DEADLINE_S)

    def read(self) -> tuple[Outcome, Output] | None:
        """What the next agent finds."""
        again = KeptOutcomes(self.directory.outcomes)
        again.scan()
        return again.load(ID, SIGNATURE)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    until = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < until, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.over.set()
    made.kept.may_write.set()


def give_up_soon(monkeypatch: pytest.MonkeyPatch, *bounds: str) -> None:
    """What hangs is given up soon where these say when."""
    for bound in bounds:
        monkeypatch.setattr(leaving, bound, SHORT_S)


def test_a_disk_that_hangs_does_not_keep_an_agent_from_ending(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give_up_soon(monkeypatch, "LAST_WITHIN")

    async def play() -> tuple[bool, list[str]]:
        worker = scene.worker()
        hanging = scene.hang(worker)
        left = await worker.close(None)
        return hanging.done(), left

    assert asyncio.run(play()) == (False, ["what is written: not ended within 0.1 s"])
    assert "what is written: not ended within 0.1 s" in caplog.text


def test_an_error_does_not_end_an_agent_before_its_outcomes_are_on_disk(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        worker = scene.worker()

        async def fail() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(worker._pulls, "close", fail)
        worker.keep(events.Keep(ID, SIGNATURE, OUTCOME, OUTPUT))
        closing = asyncio.ensure_future(worker.close(None))
        done, _ = await asyncio.wait({closing}, timeout=SHORT_S)
        assert not done
        scene.kept.may_write.set()
        (left,) = await closing
        assert left.startswith("pulls: OSError: ")
        assert scene.read() == (OUTCOME, OUTPUT)

    asyncio.run(play())
    assert os.strerror(errno.EIO) in caplog.text


def test_a_look_at_the_host_that_hangs_does_not_keep_an_agent_from_ending(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_soon(monkeypatch, "LET_GO_WITHIN")

    async def play() -> tuple[bool, list[str]]:
        worker = scene.worker()
        hanging = worker._care()._threads.submit(scene.over.wait, DEADLINE_S)
        left = await worker.close(None)
        return hanging.done(), left

    done, left = asyncio.run(play())
    assert not done
    assert "the host's settings: not ended within 0.1 s" in left


def test_what_is_digested_for_a_pull_and_hangs_does_not_keep_an_agent_from_ending(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up_soon(monkeypatch, "LET_GO_WITHIN")

    async def play() -> list[str]:
        worker = scene.worker()
        worker._pulls._executor().submit(scene.over.wait, DEADLINE_S)
        return await worker.close(None)

    assert "pulls: not ended within 0.1 s" in asyncio.run(play())


def test_a_push_that_hangs_keeps_no_other_from_ending(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the disk's two threads is left: what came of the other pushes is removed."""
    give_up_soon(monkeypatch, "LAST_WITHIN")
    monkeypatch.setattr(incoming, "_RELEASED_WITHIN_S", SHORT_S)

    async def play() -> list[str]:
        worker = scene.worker()
        await scene.with_pushes(worker, 1, 2, 3)
        assert len(scene.staged) == 3
        await scene.hang_in_writes(worker, 1, monkeypatch=monkeypatch)
        return await worker.close(Leave())

    left = asyncio.run(play())
    assert left == ["push 1: its disk does not answer", "what is written: not ended within 0.1 s"]
    assert len(scene.staged) == 1


def test_pushes_whose_disk_hangs_do_not_keep_vms_from_being_destroyed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")

    monkeypatch.setattr(leaving, "LET_GO_WITHIN", DEADLINE_S)

    async def play() -> None:
        worker = scene.worker()
        await scene.with_a_vm(worker)
        await scene.with_pushes(worker, 2, 3)
        await scene.hang_in_writes(worker, 2, 3, monkeypatch=monkeypatch)
        closing = asyncio.ensure_future(worker.close(Leave(vms=True)))
        await eventually(lambda: not scene.vms, "the end of the VM")
        assert not closing.done()
        scene.over.set()
        await closing

    asyncio.run(play())


def test_a_vm_that_can_not_be_destroyed_is_told(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")

    def refuse(*_: object) -> None:
        raise HypervisorError("its QEMU is in the middle of something")

    async def play() -> list[str]:
        worker = scene.worker()
        await scene.with_a_vm(worker)
        monkeypatch.setattr(domains, "remove", refuse)
        return await worker.close(Leave(vms=True))

    assert asyncio.run(play()) == ["VMs: vm1: its QEMU is in the middle of something"]
    assert scene.vms == ["vm1"]

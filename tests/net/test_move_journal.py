"""What becomes of a move that was cut short, from its journal, libvirt and the root's word alone: the VM is never taken
back where it may be all that there is of it, never runs before somebody says so, and nothing of it stays elsewhere.

Each row is a state in which an agent was killed, on the host that has the VM or on the one that takes it in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent.journal import LetGo, RemoveDomain, RemoveFiles, Step, line
from agent.vms import VmWorker
from protocol.commands import Hop, MoveVm, ReceiveVm, SettleMove
from protocol.vms import VmChange, VmPower
from tests.net.test_vms_testdriver import DEPLOYMENT, Host, a_spec, behind_its_back, eventually, powers

SPEC = a_spec()
IN = Step(does="take it in", undo=(RemoveDomain(name="vm1", uuid=SPEC.uuid), RemoveFiles(name="vm1")), arrives=True)
AWAY = Step(does="move it away", undo=(LetGo(name="vm1", uuid=SPEC.uuid),))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def journals(host: Host) -> list[str]:
    folder = host.directory / "journal"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def cut_short(host: Host, step: Step) -> None:
    folder = host.directory / "journal"
    folder.mkdir(exist_ok=True)
    (folder / "vm1").write_bytes(line(step))


async def halt(worker: VmWorker) -> None:
    await behind_its_back(worker, lambda libvirt: libvirt.lookupByName("vm1").suspend())


async def forget(worker: VmWorker) -> None:
    def vanish(libvirt: object) -> None:
        domain = libvirt.lookupByName("vm1")  # type: ignore[attr-defined]
        domain.destroy()
        domain.undefine()

    await behind_its_back(worker, vanish)


async def nothing(worker: VmWorker) -> None:
    del worker


async def power(worker: VmWorker) -> VmPower:
    """As libvirt has it: GONE where it has no such domain."""
    found = powers(await worker.states()).get("vm1", VmPower.GONE)
    assert isinstance(found, VmPower)
    return found


@dataclass(frozen=True)
class Row:
    """What the journal says, what libvirt has, what the root says, and what is there then."""

    step: Step
    libvirt: Callable[[VmWorker], Awaitable[None]]
    keep: bool | None
    change: VmChange
    power: VmPower


ROWS = {
    "it arrived and is gone there": Row(IN, halt, True, VmChange.MOVED, VmPower.RUNNING),
    "it arrived and is there still": Row(IN, halt, False, VmChange.REMOVED, VmPower.GONE),
    "it never arrived": Row(IN, forget, False, VmChange.REMOVED, VmPower.GONE),
    "it never left": Row(AWAY, nothing, None, VmChange.UNCHANGED, VmPower.RUNNING),
    "it has left": Row(AWAY, forget, None, VmChange.ABSENT, VmPower.GONE),
}


@pytest.mark.parametrize("what", ROWS)
def test_the_roots_word_settles_what_was_cut_short_once_and_again(host: Host, what: str) -> None:
    row = ROWS[what]

    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [SPEC])
        await row.libvirt(worker)
        cut_short(host, row.step)
        word = SettleMove(deployment=DEPLOYMENT, name="vm1", uuid=SPEC.uuid, keep=row.keep)
        assert (await worker.settle_move(word)).change is row.change
        assert await power(worker) is row.power
        again = (await worker.settle_move(word)).change
        assert again is (VmChange.UNCHANGED if row.power is VmPower.RUNNING else VmChange.ABSENT)
        assert await power(worker) is row.power

    host.run(scenario)
    assert journals(host) == []
    assert host.vms == (["vm1"] if row.power is VmPower.RUNNING else [])


def test_what_has_arrived_waits_and_neither_a_start_nor_a_request_takes_or_starts_it(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [SPEC])
        await halt(worker)
        cut_short(host, IN)
        worker._repairs.soon()
        await eventually(lambda: worker._repairs.waits("vm1"), "the repair to look at it")
        for results in (await worker.create(DEPLOYMENT, [SPEC]), await worker.destroy(DEPLOYMENT, ["vm1"])):
            [refused] = results
            assert refused.change in (VmChange.FAILED, VmChange.UNCHANGED)
        assert await power(worker) is VmPower.PAUSED

    host.run(scenario)
    assert journals(host) == ["vm1"]
    assert host.vms == ["vm1"]


def test_what_never_arrived_is_taken_back_by_the_next_agent_alone(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [SPEC])
        await forget(worker)
        cut_short(host, IN)
        await worker.start()
        await eventually(lambda: journals(host) == [] and host.vms == [], "the repair")

    host.run(scenario)


def test_a_move_of_another_vm_of_that_name_is_not_what_the_word_is_about(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [SPEC])
        other = "00000000-0000-4000-8000-000000000000"
        word = SettleMove(deployment=DEPLOYMENT, name="vm1", uuid=other, keep=False)
        assert (await worker.settle_move(word)).change is VmChange.UNCHANGED
        assert await power(worker) is VmPower.RUNNING

    host.run(scenario)
    assert host.vms == ["vm1"]


def test_a_driver_that_can_not_move_vms_says_so_and_the_vm_runs_on(host: Host) -> None:
    hop = Hop(1, "127.0.0.1", 1, bytes(32))

    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [SPEC])
        body = MoveVm(deployment=DEPLOYMENT, name="vm1", to=hop, of=1, directory="/d")
        result = await worker.move(body, None, "fleet", lambda _: None)  # type: ignore[arg-type]  # it is not used
        assert (result.change, "only those of qemu:///system can be moved" in result.detail) == (VmChange.FAILED, True)
        with pytest.raises(Exception, match="only those of qemu:///system can be moved"):
            await worker.receive(2, ReceiveVm(deployment=DEPLOYMENT, spec=a_spec("vm2"), source=hop), None, "fleet")  # type: ignore[arg-type]
        assert await power(worker) is VmPower.RUNNING

    host.run(scenario)
    assert host.vms == ["vm1"]
    assert journals(host) == []

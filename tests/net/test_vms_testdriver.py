"""VmWorker on libvirt's test driver: a host of its own for each connection, with VMs that are nothing but state."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import domains, moveways, vmactions, vms
from agent.console import Console
from agent.hypervisor import Connection, Hypervisor
from agent.vmcreation import Creations
from agent.vms import VmWorker
from agent.vmxml import NAMESPACE
from protocol.commands import Hop, MoveVm, ReceiveVm, SettleMove
from protocol.vms import Action, DirectBoot, Disk, Network, VmChange, VmPower, VmResult, VmSpec, VmState

pytest.importorskip("libvirt", reason="VMs need libvirt's Python binding: apt-get install python3-libvirt")

DEPLOYMENT = "lab"
KERNEL = hashlib.sha256(b"kernel").hexdigest()
# 64 CPUs and 256 GiB, which hold 200 small VMs.
NODE = """<node>
  <cpu><mhz>2000</mhz><model>x86_64</model><active>64</active><nodes>2</nodes><sockets>2</sockets>
    <cores>16</cores><threads>1</threads></cpu>
  <memory>268435456</memory>
  {domains}
</node>"""
FOREIGN = """<domain type='test'><name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type>hvm</type></os></domain>"""
FOREIGN_UUID = "11111111-2222-4333-8444-555555555555"
DEADLINE_S = 30.0


def a_spec(name: str = "vm1", **changes: object) -> VmSpec:
    number = int("".join(filter(str.isdigit, name)) or 0)
    fields: dict[str, object] = {
        "name": name,
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_DNS, f"{DEPLOYMENT}/{name}")),
        "deployment": DEPLOYMENT,
        "vcpus": 1,
        "memory_mib": 64,
        "mac": f"00:16:3e:12:{number // 256:02x}:{number % 256:02x}",
        "ip": f"198.18.{number // 256}.{number % 256}",
        "prefix": 15,
        "boot": DirectBoot(kernel=KERNEL, cmdline="console=ttyS0"),
    }
    return VmSpec(**(fields | changes))  # type: ignore[arg-type]


class Host:
    """A directory of an agent, with its images, and the node that its libvirt shows."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "agent"
        self.node = directory / "node.xml"
        self.images = self.directory / "images"
        self.images.mkdir(parents=True)
        (self.images / KERNEL).write_bytes(b"kernel")
        self.has_domains()

    def has_domains(self, *documents: str) -> None:
        self.node.write_text(NODE.format(domains="".join(documents)))

    @property
    def vms(self) -> list[str]:
        folder = self.directory / "vms"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def run(self, scenario: Callable[[VmWorker], Awaitable[None]]) -> list[list[VmState]]:
        """Run a scenario with a worker of this host; returns all changes that the worker told of."""
        told: list[list[VmState]] = []

        async def main() -> None:
            # Nothing here may wait for a look: events alone have to do.
            worker = VmWorker(self.directory, f"test://{self.node}", on_change=told.append, poll_s=3600)
            try:
                await asyncio.wait_for(scenario(worker), DEADLINE_S)
            finally:
                await worker.close()

        asyncio.run(main())
        return told


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    return Host(tmp_path)  # type: ignore[return-value]


def hypervisor_of(worker: VmWorker) -> Hypervisor:
    """The worker's own, since each connection to the test driver is a world of its own."""
    return worker._watch.hypervisor()


async def behind_its_back(worker: VmWorker, act: Callable[[Connection], object]) -> None:
    await hypervisor_of(worker).call(act, DEADLINE_S)


async def eventually(condition: Callable[[], bool], what: str) -> None:
    until = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < until, f"waited in vain for {what}"
        await asyncio.sleep(0.01)


def changes(results: list[VmResult]) -> list[tuple[str, VmChange]]:
    return [(result.name, result.change) for result in results]


def powers(states: list[VmState]) -> dict[str, VmPower]:
    return {state.name: state.power for state in states}


def test_a_rerun_changes_nothing(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        specs = [a_spec("vm1"), a_spec("vm2")]
        assert changes(await worker.create(DEPLOYMENT, specs)) == [
            ("vm1", VmChange.CREATED),
            ("vm2", VmChange.CREATED),
        ]
        assert changes(await worker.create(DEPLOYMENT, specs)) == [
            ("vm1", VmChange.UNCHANGED),
            ("vm2", VmChange.UNCHANGED),
        ]
        assert powers(await worker.states()) == {"vm1": VmPower.RUNNING, "vm2": VmPower.RUNNING}

    host.run(scenario)
    assert host.vms == ["vm1", "vm2"]


def test_what_is_defined_and_off_is_started(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec()])
        await behind_its_back(worker, lambda libvirt: libvirt.lookupByName("vm1").destroy())
        assert changes(await worker.create(DEPLOYMENT, [a_spec()])) == [("vm1", VmChange.STARTED)]
        assert powers(await worker.states()) == {"vm1": VmPower.RUNNING}

    host.run(scenario)


def test_a_vm_that_sleeps_is_defined_and_not_started_until_the_plan_wakes_it(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        asleep, awake = a_spec(start=False), a_spec(start=True)
        assert changes(await worker.create(DEPLOYMENT, [asleep])) == [("vm1", VmChange.CREATED)]
        assert powers(await worker.states()) == {"vm1": VmPower.SHUTOFF}
        assert changes(await worker.create(DEPLOYMENT, [asleep])) == [("vm1", VmChange.UNCHANGED)]
        assert changes(await worker.create(DEPLOYMENT, [awake])) == [("vm1", VmChange.STARTED)]
        assert changes(await worker.create(DEPLOYMENT, [asleep])) == [("vm1", VmChange.UNCHANGED)]
        assert powers(await worker.states()) == {"vm1": VmPower.RUNNING}

    host.run(scenario)


def test_another_specification_is_reported_field_by_field_and_changes_nothing(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec()])
        [result] = await worker.create(DEPLOYMENT, [a_spec(memory_mib=128, vcpus=2)])
        assert result == VmResult(name="vm1", change=VmChange.DIFFERS, detail="vcpus 1 -> 2; memory_mib 64 -> 128")
        assert changes(await worker.create(DEPLOYMENT, [a_spec()])) == [("vm1", VmChange.UNCHANGED)]

    host.run(scenario)


HOP = Hop(rank=1, address="127.0.0.1", bulk_port=1, key=bytes(32))
MOVE = MoveVm(deployment=DEPLOYMENT, name="vm1", to=HOP, of=1, directory="/elsewhere")
#: What is refused needs none.
NO_LINKS: Any = None


async def _alone(work: Awaitable[VmResult]) -> list[VmResult]:
    return [await work]


Asked = Callable[[VmWorker], Awaitable[list[VmResult]]]
#: All that an agent can be asked to do to a VM by its name.
ASKED: dict[str, Asked] = {
    "create": lambda worker: worker.create(DEPLOYMENT, [a_spec("vm1")]),
    "create asleep": lambda worker: worker.create(DEPLOYMENT, [a_spec("vm1", start=False)]),
    "create by its UUID": lambda worker: worker.create(DEPLOYMENT, [a_spec("vm1", uuid=FOREIGN_UUID)]),
    "move": lambda worker: _alone(worker.move(MOVE, NO_LINKS, "fleet", lambda _: None)),
    **{
        f"settle a move, {keep}": lambda worker, keep=keep: _alone(  # type: ignore[misc]
            worker.settle_move(SettleMove(deployment=DEPLOYMENT, name="vm1", uuid=FOREIGN_UUID, keep=keep))
        )
        for keep in (None, False, True)
    },
    "destroy": lambda worker: worker.destroy(DEPLOYMENT, ["vm1"]),
    "destroy of no deployment": lambda worker: worker.destroy(None, ["vm1"]),
    **{
        f"{action.value}{' hard' if hard else ''}": lambda worker, action=action, hard=hard: worker.act(  # type: ignore[misc]
            DEPLOYMENT, ["vm1"], action, hard=hard, label="before"
        )
        for action in Action
        for hard in (False, True)
    },
}
#: Somebody else's domains: without a mark, with one that can't be read, and with one of another agent.
MARKS = {
    "none": "",
    "one without sense": f"<c:vm xmlns:c='{NAMESPACE}' name='vm1'/>",
    "another agent's": f"<c:vm xmlns:c='{NAMESPACE}' name='vm1' deployment='{DEPLOYMENT}' owner='/else' digest=''/>",
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_domain_that_this_agent_did_not_make_is_never_touched(
    host: Host, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Moves are refused by this driver as such, before anybody looks whose VM it is.
    monkeypatch.setattr(moveways, "only_libvirtd", lambda _: None)
    document = FOREIGN.format(name="vm1", uuid=FOREIGN_UUID)
    host.has_domains(document.replace("<memory", f"<metadata>{MARKS[mark]}</metadata><memory", 1))

    async def scenario(worker: VmWorker) -> None:
        def look(libvirt: Connection) -> tuple[str, list[int], list[str]]:
            domain = libvirt.lookupByUUIDString(FOREIGN_UUID)
            return domain.XMLDesc(0), domain.state(0), domain.snapshotListNames()

        before = await hypervisor_of(worker).call(look, DEADLINE_S)
        for asked, ask in ASKED.items():
            [result] = await ask(worker)
            # The VM that was meant is not there: its address is free again.
            assert result.change is (VmChange.ABSENT if "destroy" in asked else VmChange.FAILED), asked
            assert "left as it is" in result.detail, asked
            assert await hypervisor_of(worker).call(look, DEADLINE_S) == before, asked
        said = await worker.console(DEPLOYMENT, "vm1", Console(lambda *_: None), force=True)
        assert "left as it is" in said
        with pytest.raises(Exception, match="vm1"):
            await worker.receive(1, ReceiveVm(deployment=DEPLOYMENT, spec=a_spec("vm1"), source=HOP), NO_LINKS, "fleet")
        for everything in (None, DEPLOYMENT):
            assert await worker.destroy(everything) == []
        for action in Action:
            assert await worker.act(DEPLOYMENT, None, action, label="before") == []
        assert await worker.states() == []
        assert await hypervisor_of(worker).call(look, DEADLINE_S) == before
        [seen] = await worker.everybody()
        assert (seen.name, seen.power, seen.mine) == ("vm1", VmPower.RUNNING, False)
        assert seen.owner == ("/else" if mark == "another agent's" else "")

    host.run(scenario)
    assert host.vms == []


def test_a_uuid_that_another_domain_has_is_refused(host: Host) -> None:
    host.has_domains(FOREIGN.format(name="other", uuid=a_spec("vm1").uuid))

    async def scenario(worker: VmWorker) -> None:
        [result] = await worker.create(DEPLOYMENT, [a_spec("vm1")])
        assert result.change is VmChange.FAILED
        assert "other" in result.detail

    host.run(scenario)


def test_a_vm_of_another_deployment_is_left_to_it(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec("vm1")])
        [created] = await worker.create("other", [a_spec("vm1", deployment="other")])
        [destroyed] = await worker.destroy("other", ["vm1"])
        assert [created.change, destroyed.change] == [VmChange.FAILED, VmChange.ABSENT]
        assert DEPLOYMENT in created.detail
        assert DEPLOYMENT in destroyed.detail
        assert await worker.destroy("other") == []
        assert powers(await worker.states()) == {"vm1": VmPower.RUNNING}

    host.run(scenario)


def test_one_bad_vm_holds_up_no_other(host: Host) -> None:
    missing = hashlib.sha256(b"never pushed").hexdigest()

    async def scenario(worker: VmWorker) -> None:
        results = await worker.create(
            DEPLOYMENT,
            [
                a_spec("vm1", boot=DirectBoot(kernel=missing)),
                a_spec("vm2"),
                a_spec("../vm3"),
                a_spec("vm4", boot=None),
                a_spec("vm5", deployment="other"),
                a_spec("vm2"),
                a_spec("vm6", network=Network(bridge="br0")),
            ],
        )
        assert [result.change for result in results] == [
            *(VmChange.FAILED, VmChange.CREATED, VmChange.FAILED, VmChange.FAILED, VmChange.FAILED, VmChange.FAILED),
            VmChange.CREATED,
        ]
        assert missing[:12] in results[0].detail
        assert "twice" in results[5].detail

    host.run(scenario)
    assert host.vms == ["vm2", "vm6"]


@pytest.mark.parametrize("step", ["define", "start"])
def test_a_creation_that_fails_leaves_nothing_behind(host: Host, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: VmWorker) -> None:
        def fail(connection: Connection, _: str) -> None:
            connection.lookupByName("there is no such domain")

        with monkeypatch.context() as broken:
            broken.setattr(domains, step, fail)
            [result] = await worker.create(DEPLOYMENT, [a_spec()])
        assert result.change is VmChange.FAILED
        assert result.detail == "Domain not found"
        assert host.vms == []
        assert await worker.states() == []
        assert changes(await worker.create(DEPLOYMENT, [a_spec()])) == [("vm1", VmChange.CREATED)]

    host.run(scenario)


def test_a_cancelled_creation_leaves_nothing_behind(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(worker: VmWorker) -> None:
        loop = asyncio.get_running_loop()
        defining = asyncio.Event()
        define = domains.define

        def slowly(connection: Connection, document: str) -> None:
            loop.call_soon_threadsafe(defining.set)
            define(connection, document)

        monkeypatch.setattr(domains, "define", slowly)
        creation = asyncio.create_task(worker.create(DEPLOYMENT, [a_spec()]))
        await defining.wait()
        creation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creation
        await eventually(lambda: host.vms == [], "the files to go")
        assert await worker.states() == []

    host.run(scenario)


def test_destroy_leaves_neither_domain_nor_files(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec("vm1"), a_spec("vm2", start=False), a_spec("vm3")])
        assert changes(await worker.destroy(DEPLOYMENT, ["vm1", "vm9"])) == [
            ("vm1", VmChange.REMOVED),
            ("vm9", VmChange.ABSENT),
        ]
        assert changes(await worker.destroy(DEPLOYMENT)) == [("vm2", VmChange.REMOVED), ("vm3", VmChange.REMOVED)]
        assert await worker.destroy(DEPLOYMENT) == []
        assert changes(await worker.destroy(DEPLOYMENT, ["../images"])) == [("../images", VmChange.FAILED)]
        assert await worker.states() == []
        names = await hypervisor_of(worker).call(
            lambda libvirt: [domain.name() for domain in libvirt.listAllDomains()], DEADLINE_S
        )
        assert names == []

    told = host.run(scenario)
    assert host.vms == []
    last = {state.name: state for batch in told for state in batch}
    assert {name: (state.power, state.reason) for name, state in last.items()} == dict.fromkeys(
        ("vm1", "vm2", "vm3"), (VmPower.GONE, "removed")
    )


def test_a_vm_that_is_undefined_behind_our_back_is_gone_and_comes_back_with_its_disk(host: Host) -> None:
    base = host.images / "base"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, "16M"], check=True)
    image = hashlib.sha256(base.read_bytes()).hexdigest()
    base.rename(host.images / image)
    spec = a_spec(disk=Disk(image=image))

    async def scenario(worker: VmWorker) -> None:
        assert changes(await worker.create(DEPLOYMENT, [spec])) == [("vm1", VmChange.CREATED)]
        overlay = host.directory / "vms" / "vm1" / "overlay.qcow2"
        written = overlay.stat().st_ino

        def vanish(libvirt: Connection) -> None:
            libvirt.lookupByName("vm1").destroy()
            libvirt.lookupByName("vm1").undefine()

        await behind_its_back(worker, vanish)
        [gone] = await worker.states()
        assert (gone.power, gone.deployment) == (VmPower.GONE, DEPLOYMENT)
        [refused] = await worker.create(DEPLOYMENT, [a_spec(memory_mib=128, disk=Disk(image=image))])
        assert refused.change is VmChange.FAILED
        assert changes(await worker.create(DEPLOYMENT, [spec])) == [("vm1", VmChange.CREATED)]
        assert overlay.stat().st_ino == written
        await behind_its_back(worker, vanish)
        assert changes(await worker.destroy(DEPLOYMENT)) == [("vm1", VmChange.REMOVED)]

    host.run(scenario)
    assert host.vms == []


def test_a_disk_smaller_than_its_image_and_an_image_of_parts_are_refused(host: Host) -> None:
    def keep(*arguments: str) -> str:
        made = host.images / "made"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *arguments], check=True, cwd=host.images)
        digest = hashlib.sha256(made.read_bytes()).hexdigest()
        made.rename(host.images / digest)
        return digest

    whole = keep("made", "16M")
    part = keep("-b", str(host.images / whole), "-F", "qcow2", "made")
    (host.images / KERNEL).chmod(0o444)

    async def scenario(worker: VmWorker) -> None:
        results = await worker.create(
            DEPLOYMENT,
            [
                a_spec("vm1", disk=Disk(image=whole, size_mib=8)),
                a_spec("vm2", disk=Disk(image=part)),
                a_spec("vm3", disk=Disk(image=KERNEL)),
                a_spec("vm4", disk=Disk(image=whole, size_mib=32)),
                a_spec("vm5", disk=Disk(image=KERNEL, image_format="raw")),
            ],
        )
        assert [result.change for result in results] == [
            *(VmChange.FAILED, VmChange.FAILED, VmChange.FAILED, VmChange.CREATED, VmChange.CREATED)
        ]
        assert "16 MiB" in results[0].detail
        assert "builds on another file" in results[1].detail
        assert "qcow2" in results[2].detail

    host.run(scenario)
    assert host.vms == ["vm4", "vm5"]


def test_events_alone_show_what_others_do_to_our_vms_and_nothing_of_theirs(host: Host) -> None:
    host.has_domains(FOREIGN.format(name="other", uuid=FOREIGN_UUID))
    told: dict[str, VmState] = {}

    async def scenario(worker: VmWorker) -> None:
        worker._watch._on_change = lambda states: told.update({state.name: state for state in states})
        await worker.create(DEPLOYMENT, [a_spec("vm1"), a_spec("vm2")])
        await behind_its_back(worker, lambda libvirt: libvirt.lookupByName("other").destroy())
        await behind_its_back(worker, lambda libvirt: libvirt.lookupByName("vm1").suspend())
        await eventually(lambda: told["vm1"].power is VmPower.PAUSED, "the pause")
        await behind_its_back(worker, lambda libvirt: libvirt.lookupByName("vm2").destroy())
        await eventually(lambda: told["vm2"].power is VmPower.SHUTOFF, "the end")
        assert told["vm2"].reason == "destroyed"

    host.run(scenario)
    assert set(told) == {"vm1", "vm2"}


def test_two_hundred_vms_are_made_and_removed_in_one_request(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        specs = [a_spec(f"vm{number}") for number in range(200)]
        assert {result.change for result in await worker.create(DEPLOYMENT, specs)} == {VmChange.CREATED}
        assert set(powers(await worker.states()).values()) == {VmPower.RUNNING}
        assert {result.change for result in await worker.create(DEPLOYMENT, specs)} == {VmChange.UNCHANGED}
        assert len(await worker.destroy(DEPLOYMENT)) == 200

    host.run(scenario)
    assert host.vms == []


@pytest.mark.parametrize(("in_flight", "most"), [(1, 1), (2, 2), (None, vms.CREATIONS_AT_A_TIME), (12, 12)])
def test_so_many_vms_are_made_at_a_time(
    host: Host, in_flight: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flying: list[int] = [0, 0]
    make = Creations._make

    async def counted(creations: Creations, *given: Any) -> VmResult:
        flying[0] += 1
        flying[1] = max(flying)
        # Nobody ends before as many are in flight as may be.
        await eventually(lambda: flying[1] >= most, f"{most} in flight")
        try:
            return await make(creations, *given)
        finally:
            flying[0] -= 1

    monkeypatch.setattr(Creations, "_make", counted)

    async def scenario(worker: VmWorker) -> None:
        specs = [a_spec(f"vm{number}") for number in range(16)]
        assert {one.change for one in await worker.create(DEPLOYMENT, specs, in_flight=in_flight)} == {VmChange.CREATED}

    host.run(scenario)
    assert flying == [0, most]


def test_requests_for_one_vm_take_their_turn(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        twice = await asyncio.gather(*(worker.create(DEPLOYMENT, [a_spec()]) for _ in range(8)))
        assert sorted(result.change.value for [result] in twice) == ["created"] + ["unchanged"] * 7

    host.run(scenario)


def test_a_worker_without_vms_leaves_libvirt_alone(host: Host) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.start()
        assert await worker.states() == []
        assert not worker._watch.begun

    host.run(scenario)


def test_a_host_without_libvirt_says_so_for_each_vm(host: Host) -> None:
    async def scenario() -> None:
        worker = VmWorker(host.directory, f"qemu+unix:///session?socket={host.directory}/none")
        results = await worker.create(DEPLOYMENT, [a_spec("vm1"), a_spec("vm2")])
        assert changes(results) == [("vm1", VmChange.FAILED), ("vm2", VmChange.FAILED)]
        assert "none" in results[0].detail
        assert await worker.destroy(DEPLOYMENT) == []
        await worker.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_vm_is_stopped_started_suspended_resumed_and_rebooted_and_doing_it_twice_is_doing_it_once(host: Host) -> None:
    table = [
        (Action.SUSPEND, VmChange.SUSPENDED, VmPower.PAUSED),
        (Action.SUSPEND, VmChange.UNCHANGED, VmPower.PAUSED),
        (Action.RESUME, VmChange.RESUMED, VmPower.RUNNING),
        (Action.RESUME, VmChange.UNCHANGED, VmPower.RUNNING),
        (Action.REBOOT, VmChange.REBOOTED, VmPower.RUNNING),
        (Action.START, VmChange.UNCHANGED, VmPower.RUNNING),
        (Action.STOP, VmChange.STOPPED, VmPower.SHUTOFF),
        (Action.STOP, VmChange.UNCHANGED, VmPower.SHUTOFF),
        (Action.START, VmChange.STARTED, VmPower.RUNNING),
        (Action.SNAPSHOT, VmChange.SNAPSHOT, VmPower.RUNNING),
        (Action.SNAPSHOT, VmChange.UNCHANGED, VmPower.RUNNING),
    ]

    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec()])
        for action, change, power in table:
            [result] = await worker.act(DEPLOYMENT, ["vm1"], action, label="before")
            assert (result.change, result.detail) == (change, "")
            assert powers(await worker.states()) == {"vm1": power}
        assert changes(await worker.destroy(DEPLOYMENT)) == [("vm1", VmChange.REMOVED)]

    host.run(scenario)


@pytest.mark.parametrize(
    ("power", "action", "says"),
    [
        ("off", Action.SUSPEND, "start it first"),
        ("off", Action.RESUME, "start it instead"),
        ("off", Action.REBOOT, "start it first"),
        ("paused", Action.START, "resume it instead"),
        ("paused", Action.REBOOT, "resume it first"),
        ("paused", Action.STOP, "--hard"),
        ("on", Action.SNAPSHOT, "needs a name"),
    ],
)
def test_what_a_vm_is_in_no_state_for_is_refused_with_the_next_step(
    host: Host, power: str, action: Action, says: str
) -> None:
    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec(start=power != "off")])
        if power == "paused":
            await worker.act(DEPLOYMENT, None, Action.SUSPEND)
        before = powers(await worker.states())
        [result] = await worker.act(DEPLOYMENT, ["vm1"], action)
        assert result.change is VmChange.FAILED
        assert says in result.detail
        assert powers(await worker.states()) == before

    host.run(scenario)


def test_nothing_is_done_to_vms_of_others(host: Host) -> None:
    host.has_domains(FOREIGN.format(name="other", uuid=FOREIGN_UUID))

    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec("vm1")])
        results = await worker.act("elsewhere", ["vm1", "other", "vm9"], Action.STOP, hard=True)
        assert changes(results) == [
            *(("vm1", VmChange.FAILED), ("other", VmChange.FAILED), ("vm9", VmChange.ABSENT)),
        ]
        assert await worker.act("elsewhere", None, Action.STOP) == []
        assert powers(await worker.states()) == {"vm1": VmPower.RUNNING}

    host.run(scenario)


def test_a_call_that_hangs_costs_its_own_vm_its_turn_and_nobody_else_theirs(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five QEMUs hang, one more than there are threads, and the sixth VM is dealt with."""
    let_go = threading.Event()
    monkeypatch.setitem(vmactions.SECONDS, Action.SUSPEND, 0.2)

    def hangs(connection: Connection, name: str, *arguments: object, **options: object) -> VmChange:
        if name != "vm6":
            let_go.wait(DEADLINE_S)
        return VmChange.SUSPENDED

    async def scenario(worker: VmWorker) -> None:
        await worker.create(DEPLOYMENT, [a_spec(f"vm{number}") for number in range(1, 7)])
        monkeypatch.setattr(vms, "act", hangs)
        hung = await worker.act(DEPLOYMENT, [f"vm{number}" for number in range(1, 6)], Action.SUSPEND)
        assert {result.change for result in hung} == {VmChange.FAILED}
        assert changes(await worker.act(DEPLOYMENT, ["vm6"], Action.SUSPEND)) == [("vm6", VmChange.SUSPENDED)]
        let_go.set()

    try:
        host.run(scenario)
    finally:
        let_go.set()

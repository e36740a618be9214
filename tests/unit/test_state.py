"""What the service still knows after it was killed."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from controller.job_records import NOT_PULLED, outcomes_of, telling
from controller.on_record import Capacity, Vm
from controller.state import Host, Record, State
from protocol import ranks
from protocol.messages import Deliver, Manner
from protocol.outcomes import Exited, Fold, Lost, Outcome, Output, Refused
from protocol.vms import VmSpec


def host(rank: int, **changes: object) -> Host:
    known = {
        "rank": rank, "name": f"h{rank}", "site": "", "address": "198.18.0.1", "control_port": 1, "bulk_port": 2,
        "key": bytes([rank]) * 32, "parent": None, "digest": "d", "facts": {"python": "3.11"},
    }  # fmt: skip
    return Host(**(known | changes))  # type: ignore[arg-type]


def vm(name: str, ip: str, deployment: str = "d") -> Vm:
    return Vm(deployment=deployment, name=name, host="h0", ip=ip, mac="", vcpus=1, memory_mib=64)


def record(id_: int, job: int) -> Record:
    delivery = Deliver(id_, ranks.pack(0b11), None, Manner.WORK, b"payload", b"s" * 64)
    return Record(
        id=id_, job=job, uid=0, what='["run"]', delivery=delivery, issued_ms=5, deadline_ms=None, settled_ms=None
    )


@pytest.fixture
def state(tmp_path: Path) -> State:
    return State(tmp_path / "state.db")


def test_hosts_are_kept_with_what_they_were_last(state: State, tmp_path: Path) -> None:
    state.put_host(host(0))
    state.put_host(host(1, parent=0))
    state.put_host(host(1, parent=None, address="198.18.0.9", member=False))
    assert State(tmp_path / "state.db").hosts() == [host(0), host(1, address="198.18.0.9", member=False)]


def test_a_hosts_incarnation_survives_a_change_of_the_host(state: State) -> None:
    state.put_host(host(0))
    state.put_incarnations({0: 77, 9: 1})
    state.put_host(host(0, address="198.18.0.9"))
    assert state.incarnations() == {0: 77}


def test_with_each_new_incarnation_goes_the_latest_command_before_it(state: State) -> None:
    state.put_host(host(0))
    state.put_incarnations({0: 1})
    before = state.new_id()
    state.put_incarnations({0: 2})
    state.new_id()
    state.put_incarnations({0: 2})
    assert state.starts() == {0: before}


def test_numbers_are_never_given_twice_also_after_a_kill(state: State, tmp_path: Path) -> None:
    given = [state.new_id() for _ in range(1500)]
    assert given == sorted(set(given))
    again = State(tmp_path / "state.db")  # as after a kill: the first one never closed
    assert again.new_id() > given[-1]


def test_an_address_is_never_two_vms(state: State) -> None:
    assert state.put_vms([vm("a", "10.0.0.1"), vm("b", "10.0.0.2")]) == []
    assert state.put_vms([vm("c", "10.0.0.3"), vm("x", "10.0.0.2", "other")]) == ["10.0.0.2 for x is b's of d"]
    assert [known.name for known in state.vms()] == ["a", "b"], "all or none"
    assert state.put_vms([vm("y", "10.0.0.7"), vm("z", "10.0.0.7")]) == ["two VMs of the request have one address"]


def test_a_vm_that_its_host_says_is_gone_frees_its_address(state: State) -> None:
    state.put_vms([vm("a", "10.0.0.1")])
    state.command_outcomes(1, [], gone=[("d", "a", "h7"), ("d", "never there", "h0")])
    assert [known.name for known in state.vms()] == ["a"], "another host's word on it counts for nothing"
    state.command_outcomes(1, [], gone=[("d", "a", "h0")])
    assert state.put_vms([vm("b", "10.0.0.1")]) == []


def spec(name: str, **changes: object) -> VmSpec:
    known: dict[str, object] = {
        "name": name, "uuid": "0" * 8 + "-0000-0000-0000-" + "0" * 12, "deployment": "d", "vcpus": 2,
        "memory_mib": 128, "mac": "00:16:3E:00:00:01", "ip": "10.0.0.1", "prefix": 8,
    }  # fmt: skip
    return VmSpec(**(known | changes))  # type: ignore[arg-type]


def test_a_vm_is_what_its_host_made_it_and_not_what_it_was_asked_to(state: State) -> None:
    state.put_vms([vm("a", "10.0.0.1")])
    assert (state.vms()[0].memory_mib, state.specs()) == (64, [])
    state.command_outcomes(1, [], made=[spec("a"), spec("nobody's")])
    assert (state.vms()[0].memory_mib, state.specs("d"), state.specs("other")) == (128, [spec("a")], [])
    state.put_vms([vm("a", "10.0.0.1")])
    assert (state.vms()[0].memory_mib, state.specs()) == (128, [spec("a")])


def test_a_disowned_vm_frees_its_address_and_is_removed_when_its_host_is_back(state: State) -> None:
    a, b = vm("a", "10.0.0.1"), vm("b", "10.0.0.2")
    state.put_vms([a, b])
    state.disown([a])
    assert [known.name for known in state.vms()] == ["b"]
    assert (state.disowned_hosts(), state.disowned("h0"), state.disowned("h1")) == ({"h0"}, {"d": ["a"]}, {})
    # Of that name there is a new one meanwhile, elsewhere, with the address.
    assert state.put_vms([msgspec.structs.replace(a, host="h1")]) == []
    state.command_outcomes(1, [], gone=[("d", "a", "h0")])
    assert (state.disowned_hosts(), [known.host for known in state.vms()]) == (set(), ["h0", "h1"])


def test_hosts_are_what_the_last_file_declared_them(state: State, tmp_path: Path) -> None:
    state.put_capacities({"h1": Capacity(cpus=1, cpu=100, memory_mib=5), "h0": Capacity(cpus=4, cpu=400, memory_mib=8)})
    state.put_capacities({"h1": Capacity(cpus=2, cpu=200, memory_mib=6)})
    assert State(tmp_path / "state.db").capacities() == {
        "h1": Capacity(cpus=2, cpu=200, memory_mib=6),
        "h0": Capacity(cpus=4, cpu=400, memory_mib=8),
    }


def test_a_database_of_the_first_schema_is_read_on(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    old = sqlite3.connect(path)
    old.execute(
        "create table vms (deployment text not null, name text not null, host text not null, ip text not null unique,"
        " mac text not null, vcpus integer not null, memory_mib integer not null,"
        " primary key (deployment, name)) strict"
    )
    old.execute("insert into vms values ('d', 'a', 'h0', '10.0.0.1', '', 1, 64)")
    old.execute("pragma user_version=1")
    old.commit()
    old.close()
    state = State(path)
    assert (state.vms(), state.specs()) == ([vm("a", "10.0.0.1")], [])


def test_what_is_open_is_what_was_given_and_not_settled(state: State) -> None:
    state.command_begins(record(1, 1))
    state.command_begins(record(2, 2))
    state.command_settles(1, 9)
    assert [open_.id for open_ in state.open_commands()] == [2]
    assert state.open_commands()[0] == record(2, 2)


def test_outcomes_come_back_as_they_were_told(state: State) -> None:
    folds = [Fold(b"\1", Exited(0), Output(out=b"\xff\0")), Fold(b"\2", Exited(3))]
    state.command_begins(record(1, 1))
    state.command_outcomes(1, folds[:1])
    state.command_outcomes(1, folds[1:])
    assert list(state.outcomes_of(1)) == folds


def test_only_the_latest_settled_jobs_are_kept(state: State) -> None:
    for number in range(1, 6):
        state.command_begins(record(number, number))
        state.command_outcomes(number, [Fold(b"\1", Exited(0))])
        if number != 2:
            state.command_settles(number, 9)
    state.prune_jobs(2)
    assert state.latest_jobs(10) == [5, 4, 2]
    assert list(state.outcomes_of(1)) == []
    assert list(state.outcomes_of(2)) != []


def test_a_newer_schema_is_refused_with_the_next_step(state: State, tmp_path: Path) -> None:
    state.close()
    import sqlite3

    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("pragma user_version=99")
    with pytest.raises(RuntimeError, match=r"newer Canopy.*upgrade this one"):
        State(tmp_path / "state.db")


_WRITER = """
import sys
from pathlib import Path
from controller.state import State
from tests.unit.test_state import record
from protocol.outcomes import Exited, Fold
state = State(Path(sys.argv[1]))
number = 1
while True:
    state.command_begins(record(number, number))
    state.command_outcomes(number, [Fold(b"\\1", Exited(0))])
    state.command_settles(number, 9)
    print(number, flush=True)
    number += 1
"""


def test_whatever_was_kept_is_there_after_a_kill_at_any_point(tmp_path: Path) -> None:
    path, root = tmp_path / "state.db", Path(__file__).parents[2]
    for kept in (1, 40, 200):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True, cwd=root,
            env=dict(os.environ) | {"PYTHONPATH": str(root)},
        )  # fmt: skip
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= kept:
                break
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        state = State(path)
        assert len(state.latest_jobs(10_000)) >= kept
        assert all(state.outcomes_of(number) for number in range(1, kept + 1))
        assert len(state.open_commands()) <= 1
        state.close()


def test_only_the_first_late_answer_of_a_lost_host_is_kept_beside_it(state: State, tmp_path: Path) -> None:
    def fold(hosts: int, outcome: Outcome) -> Fold:
        return Fold(ranks.pack(hosts), outcome)

    state.command_begins(record(1, 1))
    state.command_outcomes(1, [fold(0b001, Exited(0)), fold(0b110, Lost("its link"))])
    assert [*state.late_outcomes(1, [fold(0b011, Exited(3))]).values()] == [fold(0b010, Exited(3))]
    assert state.late_outcomes(1, [fold(0b010, Exited(4))]) == {}
    again = State(tmp_path / "state.db")
    kept = again.late_outcomes(1, [fold(0b110, Exited(4))])
    assert [*kept.values()] == [fold(0b100, Exited(4))]
    assert [again.late(row) for row in again.late_rows(1)] == [fold(0b010, Exited(3)), *kept.values()]
    assert {row: again.late(row) for row in kept} == kept
    assert list(again.outcomes_of(1)) == [fold(0b001, Exited(0)), fold(0b110, Lost("its link"))], (
        "nothing of that changed"
    )
    assert again.late_outcomes(2, [fold(0b1, Exited(0))]) == {}, "nobody gave that"
    again.command_settles(1, 9)
    again.prune_jobs(0)
    assert again.late_rows(1) == []


def test_of_a_pull_the_record_says_what_came_of_it_at_each_host(state: State) -> None:
    offer, send = (msgspec.structs.replace(record(id_, 7), what='["pull","/etc/hosts","out"]') for id_ in (7, 8))
    assert telling([offer, send]) == [offer]
    assert telling([record(1, 1), record(2, 1)]) == [record(1, 1), record(2, 1)]
    refused = Fold(ranks.pack(0b1000), Refused("No such file"))
    for each in (offer, send):
        state.command_begins(each)
    state.command_outcomes(7, [Fold(ranks.pack(0b0111), Exited(0), Output(out=b"what it has")), refused])
    state.command_outcomes(8, [Fold(ranks.pack(0b0001), Exited(0))])
    here = Fold(ranks.pack(0b0011), Exited(0), Output(out=b"pulled 1 KiB"))
    state.put_pulled(7, here)
    assert list(outcomes_of(state, offer, goes_on=True)) == [here, refused]
    not_here = Fold(ranks.pack(0b0100), NOT_PULLED)
    assert list(outcomes_of(state, offer, goes_on=False)) == [here, not_here, refused]
    state.command_settles(7, 9)
    state.command_settles(8, 9)
    state.prune_jobs(0)
    assert state.pulled(7) == []

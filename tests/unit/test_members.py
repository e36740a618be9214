"""Who is in the fleet, where each is planned, and who must be told."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agent.identity import Identity
from agent.keyring import new_keys, to_text
from controller import api
from controller.members import Members
from controller.state import State
from controller.status import CtlError, ExitStatus
from protocol import ranks

ROOT = Identity(public=b"r" * 32, secret=b"s" * 32, address="198.18.0.1", control_port=1, bulk_port=2)


@pytest.fixture
def members(tmp_path: Path) -> Members:
    found = Members(State(tmp_path / "state.db"), ROOT, None)
    found.expect(7, 2)
    return found


def request(name: str, key: str | None = None, address: str = "198.18.0.9") -> api.Enrol:
    return api.Enrol(
        name=name, site="", key=key or to_text(new_keys()[0]), address=address, control_port=3, bulk_port=4,
        digest="d", facts={},
    )  # fmt: skip


def test_hosts_fill_the_tree_level_by_level(members: Members) -> None:
    for number in range(7):
        members.enrol(request(f"h{number}"), ())
    assert {host.name: host.parent for host in members.present.values()} == {
        "h0": None, "h1": None, "h2": 0, "h3": 1, "h4": 0, "h5": 1, "h6": 2,
    }  # fmt: skip


def test_a_host_learns_its_ancestors_and_all_below_it_and_nobody_else(members: Members) -> None:
    for number in range(7):
        members.enrol(request(f"h{number}"), ())
    plan = members.plan(2)
    assert plan.you.name == "h2"
    assert [above.name for above in plan.ancestors] == ["h0", "service"]
    assert [below.rank for below in plan.below] == [6]
    assert [below.rank for below in members.root_plan().below] == list(range(7))


def test_a_newcomer_makes_stale_what_those_above_know_and_nothing_else(members: Members) -> None:
    for number in range(6):
        members.enrol(request(f"h{number}"), ())
    members.stale.clear()
    members.enrol(request("h6"), ())
    assert sorted(members.stale) == [0, 2, 6]


def test_a_host_that_comes_again_keeps_its_rank_and_its_place(members: Members) -> None:
    for number in range(4):
        members.enrol(request(f"h{number}"), ())
    again = members.enrol(request("h2", address="198.18.0.77"), ())
    assert (again.rank, again.parent, again.address) == (2, 0, "198.18.0.77")


def test_a_push_passes_from_site_to_site_once_and_through_who_is_away_last(members: Members) -> None:
    for number, site in enumerate(("north", "south", "north", "east", "south", "north")):
        members.enrol(msgspec.structs.replace(request(f"h{number}"), site=site), ())
    away = ranks.only(0)
    order = members.order([5, 4, 3, 2, 1, 0], ranks.union(range(6)) & ~away)
    assert [hop.rank for hop in order] == [3, 2, 5, 1, 4, 0]


def test_nobody_new_is_put_below_a_host_that_is_down(members: Members) -> None:
    for number in range(2):
        members.enrol(request(f"h{number}"), ())
    assert members.enrol(request("h2"), down=[0]).parent == 1


def test_one_key_under_two_names_is_refused(members: Members) -> None:
    first = request("h0")
    members.enrol(first, ())
    with pytest.raises(CtlError, match="h1 has the key of h0"):
        members.enrol(request("h1", key=first.key), ())


def test_a_key_that_is_none_is_refused(members: Members) -> None:
    with pytest.raises(CtlError, match="h0"):
        members.enrol(request("h0", key="too short"), ())


def test_hosts_below_one_that_leaves_are_planned_one_level_higher(members: Members) -> None:
    for number in range(7):
        members.enrol(request(f"h{number}"), ())
    members.remove([0])
    assert {rank: host.parent for rank, host in members.present.items()} == {
        1: None,
        2: None,
        3: 1,
        4: None,
        5: 1,
        6: 2,
    }
    assert all(above.name != "h0" for above in members.plan(6).ancestors)


def test_every_change_has_a_higher_version_also_after_a_restart(members: Members, tmp_path: Path) -> None:
    versions = [members.version]
    for number in range(3):
        members.enrol(request(f"h{number}"), ())
        versions.append(members.version)
    members.renew(1)
    versions.append(members.version)
    assert versions == sorted(set(versions))
    assert Members(State(tmp_path / "state.db"), ROOT, None).version == versions[-1]


def test_an_unknown_name_and_an_empty_fleet_match_no_host(members: Members) -> None:
    with pytest.raises(CtlError, match="no host matches") as none:
        members.ranks_of(None)
    assert none.value.status == ExitStatus.NO_TARGET
    members.enrol(request("h0"), ())
    with pytest.raises(CtlError, match=r"not in this fleet: hh0 .the nearest is h0., h.1-2.; it has h0") as strangers:
        members.ranks_of(["h0", "h1", "h2", "hh0"])
    assert strangers.value.status == ExitStatus.NO_TARGET
    assert members.ranks_of(["h0", "h0"]) == {0: "h0"}

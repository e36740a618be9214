"""Who is replaced with whom, and what becomes of an upgrade that goes wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller import api
from controller import upgrade as module
from controller.bootstrap import Enrolment, HostResult, Options, Progress, Target
from controller.status import CtlError
from controller.upgrade import Upgrader, wave_size, waves
from tests.unit import fake_service as fake


@pytest.mark.parametrize(
    ("wave", "total", "size"),
    [("10%", 64, 6), ("10%", 3, 1), ("100%", 8, 8), ("0.1%", 8, 1), ("3", 64, 3), ("9", 2, 9)],
)
def test_a_wave_is_a_share_or_a_number_and_at_least_one_host(wave: str, total: int, size: int) -> None:
    assert wave_size(wave, total) == size


@pytest.mark.parametrize("wave", ["0", "0%", "101%", "-1", "ten", "", "1.5"])
def test_what_is_no_share_is_wrong_usage(wave: str) -> None:
    with pytest.raises(CtlError, match="--wave"):
        wave_size(wave, 10)


def tree(*parents: int | None) -> list[api.HostStatus]:
    """Hosts h0, h1, … with these planned parents."""
    return [
        fake.host(rank, planned_parent=None if parent is None else f"h{parent}", parent=None, incarnation=1)
        for rank, parent in enumerate(parents)
    ]


def test_leaves_come_first_and_relays_last() -> None:
    hosts = tree(None, None, 0, 0, 1, 2)
    assert waves(hosts, [host.name for host in hosts], 2) == [("h3", "h4"), ("h5",), ("h1", "h2"), ("h0",)]
    assert waves(hosts, ["h5", "h0", "h2"], 9) == [("h5",), ("h2",), ("h0",)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=30), st.integers(1, 8), st.data())
def test_every_outdated_host_is_in_one_wave_and_nobody_with_his_planned_parent(
    draws: list[int], size: int, data: st.DataObject
) -> None:
    hosts = tree(*(None if draw >= rank else draw for rank, draw in enumerate(draws)))
    outdated = [host.name for host in hosts if data.draw(st.booleans())]
    found = waves(hosts, outdated, size)
    assert sorted(name for wave in found for name in wave) == sorted(outdated)
    assert all(0 < len(wave) <= size for wave in found)
    at = {name: number for number, wave in enumerate(found) for name in wave}
    for host in hosts:
        if host.name in at and host.planned_parent in at:
            assert at[host.name] < at[host.planned_parent]


# --- the run ----------------------------------------------------------------------------------------------------------


class Fleet:
    """Stands in for the service and the bootstrap: hosts that fail as a test says."""

    def __init__(self, hosts: Sequence[api.HostStatus], fails: Callable[[str], HostResult | None]) -> None:
        self.versions = {host.name: "old" for host in hosts}
        self.incarnations = {host.name: 1 for host in hosts}
        self.up = {host.name: True for host in hosts}
        self.silent: set[str] = set()
        self.asked: list[tuple[tuple[str, ...], str]] = []
        self._hosts = {host.name: host for host in hosts}
        self._fails = fails

    def status(self) -> api.Status:
        return fake.status(
            *(
                fake.host(
                    host.rank,
                    up=self.up[name],
                    planned_parent=host.planned_parent,
                    digest=self.versions[name],
                    incarnation=self.incarnations[name],
                )
                for name, host in self._hosts.items()
            )
        )

    def wait_for(self, hosts: Sequence[str], within: float, *, newer_than: dict[str, int]) -> dict[str, str]:
        assert within > 0
        return {
            name: "no word from it"
            for name in hosts
            if not self.up[name] or self.incarnations[name] <= newer_than.get(name, -1)
        }

    async def bootstrap(
        self, targets: Sequence[Target], options: Options, _: object, progress: Callable[[Progress], None]
    ) -> list[HostResult]:
        names = tuple(target.name for target in targets)
        self.asked.append((names, options.bundle))
        found = []
        for name in names:
            result = None if options.bundle else self._fails(name)
            if result is None:
                result = HostResult(name=name, state="started")
                self.versions[name] = options.bundle or "new"
                self.incarnations[name] += 1
                self.up[name] = bool(options.bundle) or name not in self.silent
            elif result.went_back:
                self.incarnations[name] += 2
            found.append(result)
        progress(Progress(total=len(names), started=len(names), current=0, failed=0))
        return found


class NoService:
    async def enrol(self, _: Enrolment) -> bytes:
        raise AssertionError("nobody is enrolled here")


def upgraded(fleet: Fleet, plan: Sequence[Sequence[str]], monkeypatch: pytest.MonkeyPatch) -> module.Upgrade:
    monkeypatch.setattr(module, "bootstrap", fleet.bootstrap)
    settings = Options(fleet="f")
    return Upgrader(fleet, settings, NoService(), lambda _: 1.0, lambda _: None).run(plan)  # type: ignore[arg-type]


def refused(*names: str, **fields: object) -> Callable[[str], HostResult | None]:
    def fails(name: str) -> HostResult | None:
        if name not in names:
            return None
        return HostResult(name=name, state="failed", reason="it ended at once", **fields)  # type: ignore[arg-type]

    return fails


PLAN = [("h2", "h3"), ("h1",), ("h0",)]


def test_all_come_back_and_all_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tree(None, None, 0, 0), refused())
    done = upgraded(fleet, PLAN, monkeypatch)
    assert done == module.Upgrade(new=("h2", "h3", "h1", "h0"))
    assert fleet.asked == [(wave, "") for wave in PLAN]


def test_a_host_that_went_back_by_itself_stops_the_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tree(None, None, 0, 0), refused("h3", went_back=True))
    done = upgraded(fleet, PLAN, monkeypatch)
    assert done.new == ("h2",)
    assert done.old == {"h3": "it ended at once", "h1": "not tried after that", "h0": "not tried after that"}
    assert done.gone == {}
    assert done.stopped == "h3 did not come back on the new version: it ended at once"
    assert fleet.asked == [(PLAN[0], "")], "what runs again is left alone"


def test_a_host_that_starts_and_does_not_come_back_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tree(None, None, 0, 0), refused())
    fleet.silent = {"h3"}
    done = upgraded(fleet, PLAN, monkeypatch)
    assert done.new == ("h2",)
    assert done.old["h3"].endswith("no word from it; the previous version runs again")
    assert fleet.asked == [(PLAN[0], ""), (("h3",), "old")]
    assert fleet.versions == {"h0": "old", "h1": "old", "h2": "new", "h3": "old"}
    assert "h3 did not come back" in done.stopped


def test_a_host_that_can_not_be_put_back_is_told_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tree(None, None, 0, 0), refused("h3"))
    fleet.up["h3"] = True

    async def dies(targets: Sequence[Target], options: Options, *_: object) -> list[HostResult]:
        for target in targets:
            fleet.up[target.name] = False
        return [HostResult(name=target.name, state="failed", reason="cut short") for target in targets]

    monkeypatch.setattr(module, "bootstrap", dies)
    done = Upgrader(fleet, Options(fleet="f"), NoService(), lambda _: 1.0, lambda _: None).run([("h3",), ("h0",)])  # type: ignore[arg-type]
    assert done.gone == {"h3": "cut short; the previous version can't be put back: cut short"}
    assert done.old == {"h0": "not tried after that"}


def test_a_host_that_ssh_does_not_reach_keeps_its_agent_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tree(None, None, 0, 0), refused("h2"))
    done = upgraded(fleet, PLAN, monkeypatch)
    assert (done.new, done.old, done.stopped) == (("h3", "h1", "h0"), {"h2": "it ended at once"}, "")

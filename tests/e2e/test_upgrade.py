"""`ctl up` with a newer version: agents are replaced in waves, and a version that is broken does no harm.

A version is a copy of this project's packages with something changed; `ctl` and the service run from the first one.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from controller.session import Result, Session
from controller.upgrade import waves
from deploy.testhosts import TestHosts
from protocol.outcomes import Lost, Outcome
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.e2e.ctl import Ctl
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(f"h{number}" for number in range(7))
#: The service stays on the first version, which speaks this.
ONE_VERSION = "VERSION_MIN = 1\nVERSION_MAX = 1\n"
ALL = ["up", "-w", "h[0-6]", "--fanout", "2", "--wave", "2"]

pytestmark = pytest.mark.timeout(180)


class Versions:
    """Copies of the project, each a version of its own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def make(self, name: str, changes: dict[str, tuple[str, str]] | None = None) -> Path:
        """A version; `changes` has what is replaced in which file."""
        top = self._directory / name
        for package in ("agent", "protocol", "controller"):
            shutil.copytree(ROOT / package, top / package, ignore=shutil.ignore_patterns("__pycache__"))
        (top / "agent" / "which.py").write_text(f"NAME = {name!r}\n")
        for path, (old, new) in (changes or {}).items():
            text = (top / path).read_text()
            assert text.count(old) == 1, (path, old)
            (top / path).write_text(text.replace(old, new))
        return top


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    return Versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def hosts(testhosts_module: MakeTestHosts) -> TestHosts:
    need_test_hosts()
    return testhosts_module(NAMES)


@pytest.fixture(scope="module")
def ctl(hosts: TestHosts, versions: Versions, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ctl]:
    """A fleet of seven on the first version, three levels deep."""
    runner = Ctl(tmp_path_factory.mktemp("fleets"))
    try:
        up(runner, versions.make("first"), hosts)
        yield runner
    finally:
        runner.close()


def up(ctl: Ctl, version: Path, hosts: TestHosts, *more: str, status: int = 0) -> tuple[Any, str]:
    """`ctl up` of that version; what it prints for programs, and for people."""
    ctl.environment["PYTHONPATH"] = str(version)
    done = ctl(*ALL, *more, "-F", str(hosts.ssh_config), "--json", status=status)
    return json.loads(done.stdout), done.stderr


def running(hosts: TestHosts) -> dict[str, str]:
    """The version that each host's one agent was started from."""
    found = {}
    for name in NAMES:
        agents = [process for process in hosts.processes(name) if process.argv[1:4] == ("-m", "agent", "run")]
        assert len(agents) == 1, (name, agents)
        found[name] = hosts.run(name, ["sh", "-c", "cat /var/lib/canopy/*/current/agent/which.py"]).stdout.split("'")[1]
    return found


def home(ctl: Ctl, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("CANOPY_HOME", str(ctl.home))
    return Session("default")


class Broadcasts:
    """A broadcast after the other, for as long as a block lasts."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.outcomes: list[dict[str, Outcome]] = []
        self.failure: BaseException | None = None

    @contextmanager
    def going_on(self) -> Iterator[None]:
        over = threading.Event()

        def run() -> None:
            try:
                while not over.is_set():
                    self.once()
            except BaseException as error:
                self.failure = error

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(60)
        assert not thread.is_alive()
        assert self.failure is None, self.failure

    def once(self) -> None:
        found: dict[str, Outcome] = {}
        for happening in self._session.run("true", timeout=30):
            if isinstance(happening, Result):
                for host in happening.hosts:
                    assert host not in found, "one outcome a host"
                    found[host] = happening.outcome
        assert found.keys() == set(NAMES)
        self.outcomes.append(found)

    def lost(self) -> list[dict[str, Outcome]]:
        """What was not well, by broadcast."""
        bad = [{name: how for name, how in found.items() if repr(how) != "Exited(code=0)"} for found in self.outcomes]
        return [found for found in bad if found]


def test_a_newer_version_takes_the_place_of_the_old_one_wave_by_wave(
    hosts: TestHosts, ctl: Ctl, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = home(ctl, monkeypatch)
    before = session.status()
    plan = waves(before.hosts, NAMES, 2)
    assert len({host.planned_parent for host in before.hosts}) > 2, "there are relays below relays"
    broadcasts = Broadcasts(session)
    # One version of the protocol more, so that meanwhile both speak with each other, as parents and as children.
    second = versions.make("second", {"protocol/limits.py": (ONE_VERSION, "VERSION_MIN = 1\nVERSION_MAX = 2\n")})
    with broadcasts.going_on():
        told, said = up(ctl, second, hosts)
    assert told["up"] == list(NAMES), said
    assert (told["outdated"], told["stopped"]) == ([], "")
    assert running(hosts) == dict.fromkeys(NAMES, "second")
    after = session.status()
    assert not {host.digest for host in after.hosts} & {host.digest for host in before.hosts}
    # What was lost, was lost on hosts of one wave, or of it and the next.
    assert len(broadcasts.outcomes) > 3
    pairs = [set(wave) | set(later) for wave, later in zip(plan, [*plan[1:], ()], strict=True)]
    for found in broadcasts.lost():
        assert all(isinstance(outcome, Lost) for outcome in found.values()), found
        assert any(found.keys() <= pair for pair in pairs), (found, plan)
    incarnations = {host.name: host.incarnation for host in after.hosts}
    times = [max(incarnations[name] or 0 for name in wave) for wave in plan]
    assert times == sorted(times), "leaves first"

    again, _ = up(ctl, Path(ctl.environment["PYTHONPATH"]), hosts)
    assert again["up"] == list(NAMES)
    assert {host.name: host.incarnation for host in session.status().hosts} == incarnations, "it is convergent"


def test_a_version_that_ends_at_its_start_is_taken_back_and_stops_the_upgrade(
    hosts: TestHosts, ctl: Ctl, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = home(ctl, monkeypatch)
    broken = versions.make(
        "ends",
        {
            "agent/__main__.py": (
                "async def serve(",
                "sys.argv[1] == 'run' and sys.exit('no good')\n\n\nasync def serve(",
            )
        },
    )
    good = {host.name: host.digest for host in session.status().hosts}
    first = waves(session.status().hosts, NAMES, 2)[0]
    broadcasts = Broadcasts(session)
    with broadcasts.going_on():
        told, said = up(ctl, broken, hosts, status=1)
    assert told["up"] == list(NAMES), "the fleet is complete"
    assert (told["failed"], told["met"]) == ([], True)
    by_host = {name: group["why"] for group in told["outdated"] for name in group["hosts"]}
    assert {name for name, why in by_host.items() if why.endswith("no good; the previous version runs again")} == set(
        first
    )
    assert by_host.keys() == set(NAMES)
    assert "did not come back on the new version" in told["stopped"]
    assert "ctl: the upgrade was stopped: " in said
    assert "on the new version: none" in said
    assert running(hosts) == dict.fromkeys(NAMES, "second")
    assert {host.name: host.digest for host in session.status().hosts} == good, "and the service knows it"
    for found in broadcasts.lost():
        assert found.keys() <= set(first)
        assert all(isinstance(outcome, Lost) for outcome in found.values()), found
    broadcasts.outcomes.clear()
    broadcasts.once()
    assert broadcasts.lost() == []


def test_a_version_whose_protocol_nobody_speaks_is_refused_and_put_back(
    hosts: TestHosts, ctl: Ctl, versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = home(ctl, monkeypatch)
    good = {host.name: host.digest for host in session.status().hosts}
    foreign = versions.make(
        "foreign",
        {
            "protocol/limits.py": (ONE_VERSION, "VERSION_MIN = 7\nVERSION_MAX = 8\n"),
            "controller/up.py": ("_ATTACH_EACH = 20.0, 0.1", "_ATTACH_EACH = 4.0, 0.1"),
        },
    )
    told, said = up(ctl, foreign, hosts, status=1)
    assert told["up"] == list(NAMES), said
    assert "its new agent did not come into the tree" in told["stopped"]
    # Whoever was asked last has refused it, and the service knows.
    assert "its parent refused it: it speaks protocol versions 7 to 8, and its parent 1 to " in told["stopped"], told
    wait_until(lambda: running(hosts) == dict.fromkeys(NAMES, "second"), 10, "all to run what they ran")
    assert {host.name: host.digest for host in session.status().hosts} == good
    broadcasts = Broadcasts(session)
    broadcasts.once()
    assert broadcasts.lost() == []

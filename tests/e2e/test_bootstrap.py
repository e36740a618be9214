"""The bootstrap over SSH on test hosts: controller/bootstrap.py, its seeds, and the hosts that start others.

The agent is a stand-in (stand_in_agent.py); the fleet with the real one is test_main_job.py's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import subprocess
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from agent import starter
from controller import bootstrap as engine
from controller import bundle
from controller.bootstrap import Enrolment, HostResult, Options, Progress, Target, bootstrap
from deploy.testhosts import HostSpec, TestHosts
from tests.conftest import MakeTestHosts
from tests.net.localfleet import MARK, processes_of
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

STAND_IN = Path(__file__).with_name("stand_in_agent.py")
FLEET = "0f1e2d"
DIRECTORY = f"/var/lib/canopy/{FLEET}"
BAD = {"h5": "hung", "h9": "refusing", "h13": "no_python"}
CONNECT = 3.0  # seconds: three tries at a hung host are to be over soon


class Service:
    """Stands in for the service: takes enrolments, and hands out welcomes."""

    def __init__(self, refuse: str = "", welcome: bytes = b"") -> None:
        self.seen: dict[str, Enrolment] = {}
        self._refuse = refuse
        self._welcome = welcome

    async def enrol(self, enrolment: Enrolment) -> bytes:
        self.seen[enrolment.name] = enrolment
        if enrolment.name == self._refuse:
            raise PermissionError("the fleet is closed")
        return self._welcome or b"welcome, " + enrolment.name.encode()


class Bootstraps:
    """Runs bootstraps of a fleet, and watches what they do on this machine."""

    def __init__(self, hosts: TestHosts, cache: Path) -> None:
        self.hosts = hosts
        self.cache = cache
        self.service = Service()
        self.most_ssh = 0
        self.notices: list[str] = []

    def options(self, **changes: object) -> Options:
        base = Options(fleet=FLEET, config=self.hosts.ssh_config, connect_timeout=CONNECT, cache=self.cache)
        return msgspec.structs.replace(base, **changes)

    def run(
        self,
        names: Sequence[str],
        react: Callable[[Progress], None] = lambda _: None,
        **changes: object,
    ) -> dict[str, HostResult]:
        self.most_ssh, self.notices = 0, []
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.02):
                self.most_ssh = max(self.most_ssh, self.hosts.ssh_count())

        def progress(now: Progress) -> None:
            if now.notice:
                self.notices.append(now.notice)
            react(now)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            targets = [Target(name=name) for name in names]
            results = asyncio.run(bootstrap(targets, self.options(**changes), self.service, progress))
        finally:
            over.set()
            watcher.join()
        assert [result.name for result in results] == list(names)
        wait_until(lambda: self.hosts.ssh_count() == 0, 10, "all ssh processes to end")
        return {result.name: result for result in results}

    def agents(self, name: str) -> list[int]:
        """The agents that run on a host, by their pid inside."""
        return [p.pid for p in self.hosts.processes(name) if p.argv[1:4] == ("-m", "agent", "run")]

    def seeds(self, name: str) -> list[int]:
        return [p.pid for p in self.hosts.processes(name) if any("exec(bytes(b))" in word for word in p.argv)]

    def read(self, name: str, path: str) -> str:
        return (self.hosts.host(name).root / DIRECTORY.lstrip("/") / path).read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of bundles, for all tests here, beside the user's own of wheels: those are fetched once."""
    own = tmp_path_factory.mktemp("cache")
    wheels = bundle.cache_directory() / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    (own / "wheels").symlink_to(wheels)
    return own


@pytest.fixture(autouse=True)
def with_stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The sources that bundles are made of; a test may change them."""
    sources = {**bundle.sources(), "agent/__main__.py": STAND_IN.read_bytes()}
    monkeypatch.setattr(bundle, "sources", lambda: sources)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return sources


@pytest.fixture
def make(testhosts: MakeTestHosts, cache: Path) -> Callable[..., Bootstraps]:
    return lambda *specs: Bootstraps(testhosts(specs), cache)


def states(results: dict[str, HostResult]) -> Counter[str]:
    return Counter(result.state for result in results.values())


def reasons(results: dict[str, HostResult]) -> dict[str, str]:
    return {name: result.reason for name, result in results.items() if result.reason}


class Search:
    """Looks for a secret on all hosts again and again, in what they wrote and in what their processes were given."""

    def __init__(self, hosts: TestHosts, secret: bytes) -> None:
        self._hosts = hosts
        self._secret = secret
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.found: list[str] = []
        self.rounds = 0

    def __enter__(self) -> Search:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.look()

    def _run(self) -> None:
        while not self._over.wait(0.5):
            self.look()

    def look(self) -> None:
        # The hosts' disks are mounted where their supervisor alone sees them.
        disks = Path(f"/proc/{self._hosts.supervisor_pid}/root{self._hosts.directory}/disks")
        layers = list(disks.glob("*/upper"))
        for host in self._hosts.hosts.values():
            layers += [host.root / name for name in ("dev/shm", "run", "tmp")]
        for layer in layers:
            for folder, _, names in os.walk(layer):
                for name in names:
                    self._look_into(Path(folder, name))
        for host in self._hosts.hosts.values():
            for process in self._hosts.processes(host.name):
                self._look_into(Path(f"/proc/{process.outer_pid}/environ"))
        self.rounds += 1

    def _look_into(self, path: Path) -> None:
        try:
            if path.is_symlink() or not stat.S_ISREG(path.stat().st_mode):
                return
            if self._secret in path.read_bytes():
                self.found.append(str(path))
        except OSError:
            return


def test_bare_hosts_come_up_but_for_the_three_that_cannot(make: Callable[..., Bootstraps]) -> None:
    """Sixteen, so that hosts start hosts; 64 come up in test_up.py."""
    names = [f"h{number}" for number in range(16)]
    fleet = make(*(HostSpec(name, mode=BAD.get(name, "ok")) for name in names))  # type: ignore[arg-type]
    secret = fleet.hosts.key.read_bytes().splitlines()[2]
    assert len(secret) > 40

    with Search(fleet.hosts, secret) as search:
        first = fleet.run(names, fanout=6)
    assert states(first) == {"started": 13, "failed": 3}
    assert reasons(first) == {
        "h5": "no answer to SSH within 3 s",
        "h9": "connection refused",
        "h13": "no Python 3.10 or newer: found none",
    }
    assert (first["h5"].tries, first["h9"].tries, first["h13"].tries) == (3, 3, 1)
    assert fleet.most_ssh <= 6
    assert any(result.started_by for result in first.values()), "hosts start hosts"
    assert all(result.started_by in names for result in first.values() if result.started_by)
    assert search.found == []
    assert search.rounds > 2
    for place in ("/root/stray", "/dev/shm/stray"):
        fleet.hosts.run("h1", ["tee", place], stdin=fleet.hosts.key.read_text())
    search.look()
    assert len(search.found) == 2, "the search does find a key where there is one"

    up = sorted(set(names) - set(BAD))
    assert sorted(fleet.service.seen) == up
    assert len({enrolment.key for enrolment in fleet.service.seen.values()}) == 13
    for name in up:
        assert len(fleet.agents(name)) == 1
        assert fleet.read(name, "welcome") == f"welcome, {name}"
        assert fleet.service.seen[name].address == str(fleet.hosts.host(name).address)
    wait_until(lambda: not any(fleet.seeds(name) for name in up), 10, "all seeds to end")

    pids = {name: fleet.agents(name) for name in up}
    again = fleet.run(names, fanout=6)
    assert states(again) == {"current": 13, "failed": 3}
    assert {name: fleet.agents(name) for name in up} == pids
    assert fleet.most_ssh <= 6


def test_flat_starts_every_host_from_the_service_node_a_window_at_a_time(make: Callable[..., Bootstraps]) -> None:
    names = [f"h{number}" for number in range(6)]
    fleet = make(*names)
    results = fleet.run(names, flat=True, fanout=2)
    assert states(results) == {"started": 6}
    assert not any(result.started_by for result in results.values())
    assert fleet.most_ssh <= 2


def test_one_ssh_at_a_time_brings_a_fleet_up(make: Callable[..., Bootstraps]) -> None:
    names = [f"h{number}" for number in range(5)]
    fleet = make(*names)
    results = fleet.run(names, fanout=1)
    assert states(results) == {"started": 5}
    assert fleet.most_ssh == 1


def test_what_a_starter_had_when_it_died_comes_up_all_the_same(make: Callable[..., Bootstraps]) -> None:
    names = [f"h{number}" for number in range(16)]
    fleet = make(*names)
    killed: list[str] = []

    def kill(now: Progress) -> None:
        if now.latest and now.latest.started_by and not killed:
            killed.append(now.latest.started_by)
            fleet.hosts.power_off(now.latest.started_by)

    results = fleet.run(names, kill, fanout=3)
    assert killed
    assert set(states(results)) <= {"started", "current"}, reasons(results)
    for name in set(names) - set(killed):
        assert len(fleet.agents(name)) == 1


def test_a_starter_that_falls_silent_is_given_up(
    make: Callable[..., Bootstraps], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter, "SILENCE", 8.0)  # above the time between a starter's pings
    names = [f"h{number}" for number in range(12)]
    fleet = make(*names)
    frozen: list[str] = []

    def freeze(now: Progress) -> None:
        if now.latest and now.latest.started_by and not frozen:
            frozen.append(now.latest.started_by)
            fleet.hosts.freeze(now.latest.started_by)

    results = fleet.run(names, freeze, fanout=2)
    assert frozen
    # One that the frozen host did start is found running by the next who tries.
    assert set(states(results)) <= {"started", "current"}, reasons(results)


@pytest.fixture
def config(tmp_path: Path) -> Callable[[TestHosts, str], Path]:
    """A configuration with settings ahead of the fleet's own: the first value counts."""

    def write(hosts: TestHosts, text: str) -> Path:
        path = tmp_path / "config"
        path.write_text(f"{text}\n{hosts.ssh_config.read_text()}")
        return path

    return write


def test_a_host_with_another_key_than_the_known_one_is_refused(
    make: Callable[..., Bootstraps], config: Callable[[TestHosts, str], Path], tmp_path: Path
) -> None:
    names = ["h0", "h1", "h2", "h3"]
    fleet = make(*names)
    keys = {line.split(",")[0]: line.split(" ", 1) for line in fleet.hosts.known_hosts.read_text().splitlines()}
    keys["h3"][1] = keys["h2"][1]
    forged = tmp_path / "known_hosts"
    forged.write_text("".join(" ".join(words) + "\n" for words in keys.values()))
    results = fleet.run(names, config=config(fleet.hosts, f"UserKnownHostsFile {forged}"), fanout=2)
    assert reasons(results) == {
        "h3": "host key verification failed: the key has changed; if that is right, drop the old one with ssh-keygen -R"
    }
    assert not fleet.agents("h3")
    assert "h3" not in fleet.service.seen


def test_a_host_with_an_unknown_key_is_refused_where_the_user_wants_it_known(
    make: Callable[..., Bootstraps], config: Callable[[TestHosts, str], Path]
) -> None:
    fleet = make("h0", "h1")
    results = fleet.run(["h0", "h1"], config=config(fleet.hosts, "Host h1\n UserKnownHostsFile /dev/null"))
    assert list(reasons(results)) == ["h1"]
    assert "add it to known_hosts" in reasons(results)["h1"]


def test_a_user_whose_key_no_host_takes_is_told_so(
    make: Callable[..., Bootstraps], config: Callable[[TestHosts, str], Path], tmp_path: Path
) -> None:
    fleet = make("h0", "h1")
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    text = fleet.hosts.ssh_config.read_text()
    path = config(fleet.hosts, "")
    path.write_text(re.sub(r"IdentityFile .*", f"IdentityFile {other}", text))
    results = fleet.run(["h0", "h1"], config=path)
    assert {reason.split(":")[0] for reason in reasons(results).values()} == {"permission denied (publickey)"}
    assert len(set(reasons(results).values())) == 1
    assert {result.tries for result in results.values()} == {1}, "another try is of no use"


def test_hosts_that_take_no_key_from_each_other_are_started_from_the_service_node(
    make: Callable[..., Bootstraps],
) -> None:
    """Where nobody can forward an SSH agent, each host that tries fails, and the service node does it all the same."""
    names = [f"h{number}" for number in range(8)]
    fleet = make(*names)
    for name in names:
        keys = fleet.hosts.host(name).root / "root/.ssh/authorized_keys"
        fleet.hosts.run(
            name, ["sed", "-i", f's/^ssh/from="{fleet.hosts.service_address}" ssh/', "/root/.ssh/authorized_keys"]
        )
        assert keys.read_text().startswith("from=")
    results = fleet.run(names, fanout=2)
    assert states(results) == {"started": 8}
    assert not any(result.started_by for result in results.values())
    assert any(result.tries > 1 for result in results.values())


def test_hosts_behind_a_jump_host_come_up_and_its_process_counts(
    make: Callable[..., Bootstraps], config: Callable[[TestHosts, str], Path]
) -> None:
    fleet = make("h0", "h1", "h2", "h3")
    path = config(fleet.hosts, "")
    path.write_text(f"Host h2 h3\n    ProxyCommand ssh -F {fleet.hosts.ssh_config} -W %h:%p h0\n" + path.read_text())
    results = fleet.run(["h0", "h1", "h2", "h3"], config=path, fanout=3)
    assert states(results) == {"started": 4}
    assert (results["h2"].started_by, results["h3"].started_by) == ("", "")
    assert fleet.most_ssh <= 3


def test_login_scripts_may_talk(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0", "h1")
    for name in ("h0", "h1"):
        noise = 'echo "Welcome to $(hostname)"; echo CANOPY; printf "no line end"; echo oops >&2'
        fleet.hosts.run(name, ["tee", "/root/.bashrc"], stdin=noise + "\n")
    assert states(fleet.run(["h0", "h1"], fanout=1)) == {"started": 2}


def test_an_outdated_agent_is_replaced(make: Callable[..., Bootstraps], with_stand_in: dict[str, bytes]) -> None:
    names = ["h0", "h1", "h2"]
    fleet = make(*names)
    fleet.run(names)
    keys = {name: seen.key for name, seen in fleet.service.seen.items()}
    pids = {name: fleet.agents(name) for name in names}
    with_stand_in["agent/newer.py"] = b"VERSION = 2\n"
    results = fleet.run(names)
    assert states(results) == {"started": 3}
    for name in names:
        assert len(fleet.agents(name)) == 1
        assert fleet.agents(name) != pids[name]
        assert fleet.read(name, "current/agent/newer.py") == "VERSION = 2\n"
        assert len(list((fleet.hosts.host(name).root / DIRECTORY.lstrip("/") / "bundle").iterdir())) == 3, (
            "the previous one is kept"
        )
    assert {name: seen.key for name, seen in fleet.service.seen.items()} == keys, "a host keeps its keys"


def test_an_agent_that_is_gone_is_started_again(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0", "h1")
    fleet.run(["h0", "h1"])
    (pid,) = fleet.agents("h1")
    fleet.hosts.run("h1", ["kill", "-9", str(pid)])
    wait_until(lambda: not fleet.agents("h1"), 10, "the agent to be gone")
    results = fleet.run(["h0", "h1"])
    assert (results["h0"].state, results["h1"].state) == ("current", "started")


def test_an_agent_that_does_not_heed_its_end_is_killed(
    make: Callable[..., Bootstraps], with_stand_in: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hasty = tmp_path / "seed.py"
    hasty.write_text(re.sub(r"STOP_DEADLINE = [0-9.]+", "STOP_DEADLINE = 1.0", engine.SEED.read_text()))
    monkeypatch.setattr(engine, "SEED", hasty)
    fleet = make("h0")
    deaf = STAND_IN.read_text().replace("signal.pause()", "[signal.pause() for _ in iter(int, 1)]")
    deaf = deaf.replace("import zmq\n", "import zmq\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n")
    with_stand_in["agent/__main__.py"] = deaf.encode()
    assert states(fleet.run(["h0"])) == {"started": 1}
    (old,) = fleet.agents("h0")
    with_stand_in["agent/__main__.py"] = STAND_IN.read_bytes()
    assert states(fleet.run(["h0"])) == {"started": 1}
    assert len(fleet.agents("h0")) == 1
    assert old not in fleet.agents("h0")


def test_a_host_that_the_service_refuses_gets_no_agent(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0", "h1")
    fleet.service = Service(refuse="h1")
    results = fleet.run(["h0", "h1"], fanout=1)
    assert reasons(results) == {"h1": "the fleet is closed"}
    assert not fleet.agents("h1")


def test_an_agent_that_ends_at_once_says_why(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0")
    fleet.service = Service(welcome=b"no good")
    results = fleet.run(["h0"])
    assert reasons(results) == {"h0": "the agent ended as soon as it was started: the welcome is no good"}


def test_a_full_disk_and_an_old_python_are_named(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0", HostSpec("h1", mode="old_python"))
    fleet.hosts.run("h0", ["mkdir", "-p", "/var/lib/canopy"])
    fleet.hosts.run("h0", ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/var/lib/canopy"])
    results = reasons(fleet.run(["h0", "h1"]))
    assert results["h0"] == "no space left in /var/lib/canopy: make room there"
    assert results["h1"] == "no Python 3.10 or newer: found python3 3.8.20"


def test_an_ordinary_user_gets_an_agent_at_home(
    make: Callable[..., Bootstraps], config: Callable[[TestHosts, str], Path]
) -> None:
    fleet = make("h0", "h1")
    for name in ("h0", "h1"):
        fleet.hosts.run(name, ["useradd", "--create-home", "--shell", "/bin/sh", "--password", "*", "ada"])
        fleet.hosts.run(name, ["install", "-d", "-o", "ada", "-m", "700", "/home/ada/.ssh"])
        fleet.hosts.run(
            name, ["install", "-o", "ada", "-m", "600", "/root/.ssh/authorized_keys", "/home/ada/.ssh/authorized_keys"]
        )
    plain = config(fleet.hosts, "")
    plain.write_text(re.sub(r"\n *User root", "", plain.read_text()))
    results = fleet.run(["h0", "h1"], config=plain, login="ada", fanout=1)
    assert reasons(results) == {}
    for name in ("h0", "h1"):
        assert fleet.service.seen[name].uid >= 1000
        home = fleet.hosts.host(name).root / f"home/ada/.canopy/{FLEET}"
        assert stat.S_IMODE((home / "welcome").stat().st_mode) == 0o600
        assert json.loads((home / "enrolment.json").read_text())["key"] == fleet.service.seen[name].key


def test_two_fleets_share_a_host(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0")
    fleet.run(["h0"])
    assert states(fleet.run(["h0"], fleet="another")) == {"started": 1}
    assert states(fleet.run(["h0"])) == {"current": 1}
    assert len(fleet.agents("h0")) == 2


def test_a_cancelled_bootstrap_leaves_nothing_running_and_can_be_run_again(make: Callable[..., Bootstraps]) -> None:
    names = [f"h{number}" for number in range(12)]
    fleet = make(*names)

    async def cancelled() -> None:
        targets = [Target(name=name) for name in names]
        some = asyncio.Event()
        work = asyncio.create_task(
            bootstrap(targets, fleet.options(fanout=4), fleet.service, lambda now: some.set() if now.started else None)
        )
        await asyncio.wait_for(some.wait(), 60)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    assert fleet.hosts.ssh_count() == 0
    wait_until(lambda: not any(fleet.seeds(name) for name in names), 30, "all seeds to end")
    assert sum(states(fleet.run(names)).values()) == 12
    for name in names:
        assert len(fleet.agents(name)) == 1
        directory = fleet.hosts.host(name).root / DIRECTORY.lstrip("/")
        assert not [path for path in directory.rglob("*") if re.search(r"\.tmp|starter-|\.notify", path.name)]


def test_names_that_ssh_does_not_know_fail_alone(make: Callable[..., Bootstraps]) -> None:
    fleet = make("h0")
    results = fleet.run(["h0", "-oProxyCommand=touch /tmp/x", "nowhere.invalid"])
    assert results["h0"].state == "started"
    assert results["-oProxyCommand=touch /tmp/x"].reason == "not a host name"
    assert results["nowhere.invalid"].reason in ("no such host name", "the host's name could not be resolved")


def test_a_key_with_a_passphrase_and_no_agent_goes_flat_and_says_so(
    make: Callable[..., Bootstraps], config: Callable[[TestHosts, str], Path], tmp_path: Path
) -> None:
    fleet = make("h0", "h1")
    closed = tmp_path / "closed"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(closed)], check=True)
    path = config(fleet.hosts, "")
    path.write_text(re.sub(r"IdentityFile .*", f"IdentityFile {closed}", fleet.hosts.ssh_config.read_text()))
    results = fleet.run(["h0", "h1"], config=path)
    assert fleet.notices == [
        "the identity files cannot be read without a passphrase: load one with ssh-add; all hosts are started from here"
    ]
    assert states(results) == {"failed": 2}


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing that a test started here outlives it, its private SSH agent least of all."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield
    wait_until(lambda: not processes_of(mark), 15, "all that was started here to end")

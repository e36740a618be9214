"""A fleet of real processes for one test module: a service and agents on loopback, each ended with it.

`controller.local` starts a fleet that outlives whoever started it; a test wants the opposite.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from agent.identity import HostDirectory, write_atomically
from agent.keyring import to_text
from controller import Session, api
from controller.local import host_directory
from controller.status import CtlError
from protocol.limits import MAX_OUTPUT
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
FLEET = "net"
#: Generous: eight interpreters start on a machine that others load too.
DEADLINE_S = 40.0
#: In the environment of all that a fleet starts, so that whatever is left of it can be found.
MARK = "CANOPY_TEST_FLEET"


def own_address() -> str:
    """An address of 127.0.0.0/8, all of which is this machine's: fleets of one moment may draw the same ports."""
    return f"127.{'.'.join(str(random.SystemRandom().randint(1, 254)) for _ in range(3))}"


def start_python(
    arguments: Iterable[str],
    log: Path,
    environment: Mapping[str, str],
    *,
    python: str = sys.executable,
    path: Path = ROOT,
    before: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start a module of `path`. It dies with this process, however that ends (prctl(2), PR_SET_PDEATHSIG).

    `before` is a program that executes the rest of its arguments, after it has done what the test wants.
    """
    with log.open("ab") as file:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *before, python, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(path), **environment},
        )


def processes_of(mark: str) -> list[int]:
    """All running processes of this machine that carry the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if wanted in Path("/proc", entry, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
    return [pid for pid in found if is_running(pid)]


@contextlib.contextmanager
def ended(mark: str) -> Iterator[None]:
    """Whatever carries the mark ends with the block."""
    try:
        yield
    finally:
        for pid in processes_of(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        state = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


class LocalFleet:
    """A service and its agents. Sessions find it through CANOPY_HOME, which the fixture sets."""

    def __init__(self, names: Iterable[str], *, python: str = sys.executable, path: Path | None = None) -> None:
        """`python` runs the agents, with their code in `path`, by default this checkout."""
        self._python, self._path = python, path or ROOT
        self.mark = uuid.uuid4().hex
        self.address = own_address()
        self.names = tuple(names)
        self.session = Session(FLEET)
        self.service: subprocess.Popen[bytes] | None = None
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        #: What is executed before an agent, by name (see start_python).
        self.before: dict[str, Sequence[str]] = {}

    def begin(self, fanout: int) -> None:
        """Start all of it, and wait until every agent is in the tree."""
        self.session.directory.mkdir(mode=0o700)
        self.start_service()
        self.session.begin(len(self.names), fanout)
        for name in self.names:
            self.enrol(name)
        for name in self.names:
            self.start(name)
        self.wait_until_up(self.names)

    # --- the service --------------------------------------------------------------------------------------------------

    def start_service(self) -> None:
        """Start the service and wait until it answers."""
        directory = self.session.directory
        self.service = start_python(
            ["-m", "controller.service", "--dir", str(directory), "--listen", self.address, "--address", self.address],
            directory / "service.log",
            {MARK: self.mark},
        )
        wait_until(self._answers, DEADLINE_S, "the service to answer")

    def _answers(self) -> bool:
        assert self.service is not None
        assert self.service.poll() is None, (self.session.directory / "service.log").read_text()
        try:
            self.session.status()
        except CtlError:
            return False
        return True

    def kill_service(self) -> None:
        """Kill -9."""
        assert self.service is not None
        self.service.kill()
        self.service.wait()

    # --- agents -------------------------------------------------------------------------------------------------------

    def directory(self, name: str) -> HostDirectory:
        """The agent's directory."""
        return HostDirectory(host_directory(self.session, name))

    def enrol(self, name: str) -> None:
        """Make the agent's keys and take it in."""
        directory = self.directory(name)
        identity = directory.enrol(self.address)
        welcome = self.session.enrol(
            api.Enrol(
                name=name,
                site="",
                key=to_text(identity.public),
                address=self.address,
                control_port=identity.control_port,
                bulk_port=identity.bulk_port,
                digest="test",
                facts={},
            )
        )
        write_atomically(directory.path / "welcome", welcome)

    def start(self, name: str, path: Path | None = None) -> None:
        """Start the agent's process, with its code in `path` where that is given."""
        directory = self.directory(name).path
        self.agents[name] = start_python(
            ["-m", "agent", "run", "--dir", str(directory)],
            directory / "agent.log",
            {MARK: self.mark, "CANOPY_HOST": name},
            python=self._python,
            path=path or self._path,
            before=self.before.get(name, ()),
        )

    def pid(self, name: str) -> int:
        """The agent's pid."""
        return self.agents[name].pid

    def log(self, name: str) -> str:
        """What the agent wrote to its log."""
        return (self.directory(name).path / "agent.log").read_text()

    def kill(self, *names: str) -> None:
        """Kill -9."""
        for name in names:
            self.agents[name].send_signal(signal.SIGKILL)
        for name in names:
            self.agents[name].wait()

    def restart(self, *names: str) -> None:
        """Start agents that were killed, and wait until all are where they belong."""
        for name in names:
            assert self.agents[name].poll() is not None, f"{name} still runs"
            self.start(name)
        self.wait_until_home()

    # --- waiting ------------------------------------------------------------------------------------------------------

    def hosts(self) -> dict[str, api.HostStatus]:
        """The service's view, by name."""
        return {host.name: host for host in self.session.status().hosts}

    def wait_until_up(self, names: Iterable[str]) -> None:
        """Wait until these hosts are in the tree."""
        # Two seconds more for each: dozens of interpreters that start at once take one after the other.
        missing = self.session.wait_for(names, DEADLINE_S + 2 * len(self.names))
        assert not missing, {name: (why, self.log(name)[-2_000:]) for name, why in missing.items()}

    def wait_until_down(self, name: str) -> None:
        """Wait until the service knows that this host is not in the tree."""
        wait_until(lambda: not self.hosts()[name].up, DEADLINE_S, f"{name} to be known as down")

    def wait_until_home(self) -> None:
        """Wait until every host hangs where it is planned."""
        wait_until(
            lambda: all(host.up and host.parent == host.planned_parent for host in self.hosts().values()),
            DEADLINE_S,
            "every host to hang where it is planned",
        )

    def answers(self, command: str | list[str], hosts: Iterable[str] | None = None) -> dict[str, bytes]:
        """What each host wrote; fails where one did not exit with 0."""
        results = self.session.run(command, hosts, output_limit=MAX_OUTPUT).results()
        assert all(result.ok for result in results), results
        return {host: result.stdout for result in results for host in result.hosts}

    # --- the end ------------------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """All that runs and was started by this fleet: the service, agents, and what those started."""
        return processes_of(self.mark)

    def close(self) -> None:
        """End the service and the agents."""
        for process in (*self.agents.values(), self.service):
            if process is not None:
                process.kill()
                process.wait()


@contextlib.contextmanager
def local_fleet(
    home: Path,
    names: Iterable[str],
    fanout: int,
    *,
    python: str = sys.executable,
    path: Path | None = None,
    before: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[LocalFleet]:
    """A fleet in `home` that ends with the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANOPY_HOME", str(home))
        fleet = LocalFleet(names, python=python, path=path)
        fleet.before |= before or {}
        with ended(fleet.mark):
            try:
                fleet.begin(fanout)
                yield fleet
            finally:
                fleet.close()
